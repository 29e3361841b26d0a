// B(A(x)) where the processor multiplies vectors.
#pragma once
#include <utility>

#include "lora_plan.h"

class Lora : public LoraPlan {
 public:
  // Whether A's and B's are fetched beside the linear before and the panels before.
  static constexpr bool early() { return true; }
  static constexpr int64_t waiting() { return 0; }  // rows whose sums wait for what B adds

  Lora(const Group& group, const Stack* stacks, const Run* runs, int64_t count, int64_t rows)
      : LoraPlan(group, stacks, runs, count, rows), places(rows) {
    place_rows();
  }
  Lora(const Lora&) = delete;  // places point into narrow
  Lora(Lora&&) = default;

  // Compute A(x) of one layer, x [rows, inputs]. Called by every thread of a parallel region.
  void shrink(int64_t layer, const Number* x, int64_t x_stride) {
#pragma omp for schedule(static, 1)
    for (size_t i = 0; i < tasks.size(); i++) shrink(tasks[i], layer, x, x_stride);
  }

  // Add B(A(x)) of N rows from `row` on to the sums of one panel.
  template <int N>
  __attribute__((always_inline)) void expand(int64_t layer, int64_t row, int64_t panel,
                                             Floats (&totals)[N][COLUMNS]) const {
    const bool alike = places[row].stop >= row + N;
    if (alike && !places[row].rank) return;
    for (int64_t part = 0; part < parts; part++)
      if (panels[part].has(panel)) {
        if (alike)
          rows_of<N, 0>(layer, row, panel, part, totals);
        else
          one_by_one(layer, row, panel, part, totals, std::make_index_sequence<N>());
      }
  }

 private:
  struct Place {  // of a row; its rank is 0 where it wears nothing
    Number* narrow = nullptr;     // A(x)
    int64_t width = 0, rank = 0;  // of A(x), of each part of it
    struct {
      const Number* first;
      int64_t layer;
    } b[MOST_PARTS] = {};
    int64_t stop = 0;  // of the neighbours that wear the same
  };

  std::vector<Number> narrow;  // A(x): [rows, parts · rank] of each run, one run behind the other
  std::vector<Place> places;

  void place_rows() {
    int64_t count = 0;
    for (const Worn& each : worn)
      count += (each.run->stop - each.run->start) * parts * each.stack->rank;
    narrow.resize(count);
    Number* next = narrow.data();
    for (const Worn& each : worn) {
      const int64_t rank = each.stack->rank;
      for (int64_t row = each.run->start; row < each.run->stop; row++) {
        Place& place = places[row];
        place.narrow = next, next += parts * rank;
        place.width = parts * rank, place.rank = rank, place.stop = each.run->stop;
        for (int64_t part = 0; part < parts; part++)
          place.b[part] = {b(each, 0, part, panels[part].first), each.stack->b[part].layer};
      }
    }
    for (int64_t row = rows; row-- > 0;)
      if (!places[row].rank)
        places[row].stop = row + 1 < rows && !places[row + 1].rank ? places[row + 1].stop : row + 1;
  }

  template <int N, int FROM, int M>
  __attribute__((always_inline)) void rows_of(int64_t layer, int64_t row, int64_t panel,
                                              int64_t part, Floats (&totals)[M][COLUMNS]) const {
    const Place& place = places[row];
    const Number* weights = place.b[part].first + layer * place.b[part].layer +
                            (panel - panels[part].first) * place.rank * PANEL;
    multiply<N, FROM>(weights, place.rank / STEP, place.narrow + part * place.rank, place.width,
                      totals);
  }

  template <int N, size_t... I>
  __attribute__((always_inline)) void one_by_one(int64_t layer, int64_t row, int64_t panel,
                                                 int64_t part, Floats (&totals)[N][COLUMNS],
                                                 std::index_sequence<I...>) const {
    ((places[row + I].rank
          ? rows_of<1, I>(layer, row + I, panel, part, totals) : void()), ...);
  }

  void shrink(const Task& task, int64_t layer, const Number* x, int64_t x_stride) {
    const Worn& own = worn[task.worn];
    const int64_t width = parts * own.stack->rank;
    const int64_t count = std::min<int64_t>(NARROW, width - task.from);
    const Number* a = own.stack->a.of(layer, own.run->slot) + task.from * group.inputs;
    Number* to = places[task.row].narrow + task.from;
    x += task.row * x_stride;
    int64_t left = task.rows;
    for (; left > 1; left -= 2, x += 2 * x_stride, to += 2 * width)
      for (int64_t k = 0; k < count; k += EIGHT)
        dots<EIGHT, 2>(a + k * group.inputs, x, x_stride, to + k, width);
    if (left && count == NARROW)
      dots<NARROW, 1>(a, x, x_stride, to, width);
    else if (left)
      dots<EIGHT, 1>(a, x, x_stride, to, width);
  }

  // M rows of A with each of N rows of x: as many sums as a vector has lanes, or fewer.
  template <int M, int N>
  void dots(const Number* a, const Number* x, int64_t x_stride, Number* to, int64_t width) const {
    Floats products[N * M] = {};
    const int64_t whole = group.inputs / (LANES * STEP) * (LANES * STEP);
    for (int64_t i = 0; i < whole; i += LANES * STEP)
      dot_step<M, N>(a + i, x + i, x_stride, products);
    if (whole < group.inputs)
      dot_step<M, N>(a + whole, x + whole, x_stride, products, group.inputs - whole);
    Number all[LANES];
    store(all, sums(products));
    for (int i = 0; i < N; i++) std::copy_n(all + i * M, M, to + i * width);
  }

  template <int M, int N, typename... Left>  // how many numbers are left, fewer than a step takes
  void dot_step(const Number* a, const Number* x, int64_t x_stride, Floats (&products)[N * M],
                Left... left) const {
    Words own[N];
#pragma GCC unroll 2
    for (int i = 0; i < N; i++) own[i] = lanes(x + i * x_stride, left...);
#pragma GCC unroll 16
    for (int k = 0; k < M; k++) {
      const Words weights = lanes(a + k * group.inputs, left...);
#pragma GCC unroll 2
      for (int i = 0; i < N; i++)
        products[i * M + k] = multiply_add(weights, own[i], products[i * M + k]);
    }
  }
};
