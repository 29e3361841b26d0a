// B(A(x)) with another adapter for each run of neighbouring rows. A(x) is computed before a linear;
// B, which lies in panels as the linear's own weight does, is multiplied into the sums of the linear
// while they are still in registers. A(x) is rounded to a Number in between, as PEFT does.
#pragma once
#include <omp.h>

#include <utility>
#include <vector>

#include "panel.h"

constexpr int64_t MOST_PARTS = 3;
constexpr int64_t ROWS = 16;  // of x in one task
constexpr int NARROW = 16;    // rows of A in one task
constexpr int EIGHT = 8;      // every rank bucket is a multiple of it

// Matrices [layers, slots, …]; the strides say how far apart those of two layers and two slots are.
struct Half {
  const Number* first;
  int64_t layer, slot;
  const Number* of(int64_t l, int64_t s) const { return first + l * layer + s * slot; }
};
// One bucket: a of [parts · rank, inputs], b of each part [panels, rank / step, 32, step]. The panels
// of a part are those of the group that it lies in; outputs of another part are zero in them.
struct Stack {
  int64_t rank;
  Half a, b[MOST_PARTS];
};
// Rows start..stop of x wear the adapter in `slot` of stack number `stack`.
struct Run {
  int64_t start, stop, stack, slot;
};
// A fused group of linears: what they read and what each of them gives.
struct Group {
  int64_t inputs, parts, outputs[MOST_PARTS];

  int64_t width() const { return outputs[0] + outputs[1] + outputs[2]; }
};
// Memory that is read soon.
struct Piece {
  const char* first = nullptr;
  int64_t bytes = 0;
};

// What a step adds to one group of linears; the same tasks for every layer.
class Lora {
 public:
  Lora(const Group& group, const Stack* stacks, const Run* runs, int64_t count)
      : group(group), parts(group.parts), rows(count ? runs[count - 1].stop : 0), places(rows) {
    int64_t offset = 0, output = 0;
    for (const Run* run = runs; run < runs + count; run++) {
      const Stack* stack = stacks + run->stack;
      worn.push_back({run, stack, offset});
      for (int64_t row = run->start; row < run->stop; row += ROWS)
        for (int64_t from = 0; from < parts * stack->rank; from += NARROW)
          tasks.push_back({worn.size() - 1, row, std::min(ROWS, run->stop - row), from});
      offset += (run->stop - run->start) * parts * stack->rank;
      a_size += parts * stack->rank * group.inputs * sizeof(Number);
    }
    narrow.resize(offset);
    for (int64_t part = 0; part < parts; part++) {
      panels[part].first = output / PANEL;
      output += group.outputs[part];
      panels[part].end = (output + PANEL - 1) / PANEL;
    }
    for (const Worn& each : worn) {
      const int64_t rank = each.stack->rank;
      for (int64_t row = each.run->start; row < each.run->stop; row++) {
        Place& place = places[row];
        place.narrow = narrow.data() + narrow_row(each, row);
        place.width = parts * rank, place.rank = rank, place.stop = each.run->stop;
        for (int64_t part = 0; part < parts; part++)
          place.b[part] = {b(each, 0, part, panels[part].first), each.stack->b[part].layer};
      }
    }
    for (int64_t row = rows; row-- > 0;)
      if (!places[row].rank)
        places[row].stop = row + 1 < rows && !places[row + 1].rank ? places[row + 1].stop : row + 1;
  }
  Lora(const Lora&) = delete;  // places point into narrow
  Lora(Lora&&) = default;

  int64_t last_row() const { return rows; }

  // Compute A(x) of one layer, x [rows, inputs]. Called by every thread of a parallel region.
  void shrink(int64_t layer, const Number* x, int64_t x_stride) {
#pragma omp for schedule(static, 1)
    for (size_t i = 0; i < tasks.size(); i++) shrink(tasks[i], layer, x, x_stride);
  }

  // Memory of A that thread i % threads reads in `shrink`.
  Piece a_piece(int64_t layer, size_t i) const {
    const Task& task = tasks[i];
    const Worn& own = worn[task.worn];
    if (task.row > own.run->start) return {};  // the same as that of an earlier task
    const int64_t count = std::min<int64_t>(NARROW, parts * own.stack->rank - task.from);
    return piece(own.stack->a.of(layer, own.run->slot) + task.from * group.inputs,
                 count * group.inputs);
  }
  size_t a_pieces() const { return tasks.size(); }
  int64_t a_bytes() const { return a_size; }

  // Call `take` with each piece of B that is read for one panel.
  template <class Take>
  void each_b(int64_t layer, int64_t panel, const Take& take) const {
    for (int64_t part = 0; part < parts; part++)
      if (panels[part].has(panel))
        for (const Worn& own : worn)
          take(piece(b(own, layer, part, panel), own.stack->rank * PANEL));
  }

  // Add B(A(x)) of N rows from `row` on to the sums of one panel.
  template <int N>
  __attribute__((always_inline)) void expand(int64_t layer, int64_t row, int64_t panel,
                                             Floats (&totals)[N][COLUMNS]) const {
    if (row >= rows) return;
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
  struct Worn {
    const Run* run;
    const Stack* stack;
    int64_t narrow;  // offset of its first row in A(x)
  };
  struct Place {  // of a row; its rank is 0 where it wears nothing
    const Number* narrow = nullptr;  // A(x)
    int64_t width = 0, rank = 0;     // of A(x), of each part of it
    struct {
      const Number* first;
      int64_t layer;
    } b[MOST_PARTS] = {};
    int64_t stop = 0;  // of the neighbours that wear the same
  };
  struct Task {
    size_t worn;
    int64_t row, rows;  // of x
    int64_t from;       // first row of A
  };
  struct Range {
    int64_t first = 0, end = 0;
    bool has(int64_t panel) const { return first <= panel && panel < end; }
  };

  const Group group;
  const int64_t parts, rows;
  int64_t a_size = 0;  // bytes
  std::vector<Number> narrow;  // A(x): [rows, parts · rank] of each run, one run behind the other
  std::vector<Worn> worn;
  std::vector<Place> places;
  std::vector<Task> tasks;
  Range panels[MOST_PARTS];

  static Piece piece(const Number* first, int64_t count) {
    return {(const char*)first, count * (int64_t)sizeof(Number)};
  }

  const Number* b(const Worn& own, int64_t layer, int64_t part, int64_t panel) const {
    return own.stack->b[part].of(layer, own.run->slot) +
           (panel - panels[part].first) * own.stack->rank * PANEL;
  }

  size_t narrow_row(const Worn& own, int64_t row) const {
    return own.narrow + (row - own.run->start) * parts * own.stack->rank;
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
    ((row + (int64_t)I < rows && places[row + I].rank
          ? rows_of<1, I>(layer, row + I, panel, part, totals) : void()), ...);
  }

  void shrink(const Task& task, int64_t layer, const Number* x, int64_t x_stride) {
    const Worn& own = worn[task.worn];
    const int64_t width = parts * own.stack->rank;
    const int64_t count = std::min<int64_t>(NARROW, width - task.from);
    const Number* a = own.stack->a.of(layer, own.run->slot) + task.from * group.inputs;
    Number* to = &narrow[narrow_row(own, task.row) + task.from];
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
