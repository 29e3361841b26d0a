// y += B(A(x)) with another adapter for each run of neighbouring rows. What lies between A and B
// stays float.
#pragma once
#include <vector>

#include "linear.h"

constexpr int64_t MOST_PARTS = 3;
constexpr int64_t ROWS = 16;    // of x in one task
constexpr int64_t NARROW = 32;  // rows of A in one task
constexpr int64_t WIDE = 256;   // columns of B in one task
constexpr int EIGHT = 8;        // rows of A at once: every rank bucket is a multiple of it

// Matrices [layers, slots, …]; the strides say how far apart those of two layers and two slots are.
struct Half {
  const Number* first;
  int64_t layer, slot;
  const Number* of(int64_t l, int64_t s) const { return first + l * layer + s * slot; }
};
// One bucket: a of [parts · rank, inputs], b of each part [rank, outputs].
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
struct Task {
  const Run* run;
  const Stack* stack;
  int64_t row, rows;   // of x
  int64_t narrow;      // offset of the run's first row in A(x)
  int64_t part, from;  // shrink: first row of A; expand: the part and its first column
};

// What a step adds to one group of linears; the same tasks for every layer.
class Lora {
 public:
  Lora(const Group& group, const Stack* stacks, const Run* runs, int64_t count)
      : group(group), parts(group.parts) {
    int64_t offset = 0;
    for (const Run* run = runs; run < runs + count; run++) {
      const Stack* stack = stacks + run->stack;
      for (int64_t row = run->start; row < run->stop; row += ROWS) {
        const int64_t rows = std::min(ROWS, run->stop - row);
        for (int64_t from = 0; from < parts * stack->rank; from += NARROW)
          shrinks.push_back({run, stack, row, rows, offset, 0, from});
        for (int64_t part = 0; part < parts; part++)
          for (int64_t from = 0; from < group.outputs[part]; from += WIDE)
            expands.push_back({run, stack, row, rows, offset, part, from});
      }
      offset += (run->stop - run->start) * parts * stack->rank;
    }
    narrow.resize(offset);
    for (const Run* run = runs; run < runs + count; run++) {
      const Stack& stack = stacks[run->stack];
      cut(stack.a, run->slot, parts * stack.rank * group.inputs);
      for (int64_t part = 0; part < parts; part++)
        cut(stack.b[part], run->slot, stack.rank * group.outputs[part]);
    }
  }

  // The adapters' memory, to be fetched while the linear itself computes.
  std::vector<Piece> pieces;

  // x [rows, inputs], y [rows, sum of outputs]. Called by every thread of a parallel region.
  void run(int64_t layer, const Number* x, int64_t x_stride, Number* y, int64_t y_stride) {
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < shrinks.size(); i++) shrink(shrinks[i], layer, x, x_stride);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < expands.size(); i++) expand(expands[i], layer, y, y_stride);
  }

 private:
  const Group group;
  const int64_t parts;
  std::vector<float> narrow;  // A(x): [rows, parts · rank] of each run, one run behind the other
  std::vector<Task> shrinks, expands;

  void cut(const Half& half, int64_t slot, int64_t size) {
    for (int64_t at = 0; at < size; at += PANEL * group.inputs)
      pieces.push_back({(const char*)(half.of(0, slot) + at), half.layer * (int64_t)sizeof(Number)});
  }

  float* narrow_row(const Task& task, int64_t row) {
    return narrow.data() + task.narrow + (row - task.run->start) * parts * task.stack->rank;
  }

  void shrink(const Task& task, int64_t layer, const Number* x, int64_t x_stride) {
    const int64_t width = parts * task.stack->rank;
    const Number* a = task.stack->a.of(layer, task.run->slot);
    const int64_t to = std::min(task.from + NARROW, width);
    for (int64_t k = task.from; k < to; k += EIGHT)
      for (int64_t i = 0; i < task.rows; i += 2) {
        const int64_t one = task.row + i, two = std::min(one + 1, task.row + task.rows - 1);
        float both[LANES];
        store(both, dot(a + k * group.inputs, x + one * x_stride, x + two * x_stride));
        std::copy_n(both, EIGHT, narrow_row(task, one) + k);
        if (two > one) std::copy_n(both + EIGHT, EIGHT, narrow_row(task, two) + k);
      }
  }

  // Eight rows of A with one row of x, then the same eight with another.
  Floats dot(const Number* a, const Number* one, const Number* two) const {
    Floats products[2 * EIGHT] = {};
    const int64_t whole = group.inputs / (LANES * STEP) * (LANES * STEP);
    for (int64_t i = 0; i < whole; i += LANES * STEP) dot_step(a + i, one + i, two + i, products);
    if (whole < group.inputs)
      dot_step(a + whole, one + whole, two + whole, products, group.inputs - whole);
    return sums(products);
  }

  template <typename... Left>  // how many numbers are left, when they are fewer than a step takes
  void dot_step(const Number* a, const Number* one, const Number* two,
                Floats (&products)[2 * EIGHT], Left... left) const {
    const Words first = lanes(one, left...), second = lanes(two, left...);
#pragma GCC unroll 8
    for (int k = 0; k < EIGHT; k++) {
      const Words weights = lanes(a + k * group.inputs, left...);
      products[k] = multiply_add(weights, first, products[k]);
      products[EIGHT + k] = multiply_add(weights, second, products[EIGHT + k]);
    }
  }

  void expand(const Task& task, int64_t layer, Number* y, int64_t y_stride) {
    for (int64_t part = 0; part < task.part; part++) y += group.outputs[part];
    const int64_t last = task.row + task.rows;
    int64_t row = task.row;
    for (; row + 4 <= last; row += 4)
      widen<4, 4>(task, layer, row, task.from, y + row * y_stride, y_stride);
    for (; row < last; row++)
      widen<1, 16>(task, layer, row, task.from, y + row * y_stride, y_stride);
  }

  // R rows from `row` on, V vectors of columns at once from `column` to the end of the task.
  template <int R, int V>
  void widen(const Task& task, int64_t layer, int64_t row, int64_t column, Number* y,
             int64_t y_stride) {
    const int64_t to = std::min(task.from + WIDE, group.outputs[task.part]);
    for (; column + V * LANES <= to; column += V * LANES)
      block<R, V>(task, layer, row, column, V * LANES, y, y_stride);
    if constexpr (V > 1)
      widen<R, V / 2>(task, layer, row, column, y, y_stride);
    else if (column < to)
      block<R, 1>(task, layer, row, column, to - column, y, y_stride);
  }

  template <int R, int V>
  void block(const Task& task, int64_t layer, int64_t row, int64_t column, int64_t n, Number* y,
             int64_t y_stride) {
    const int64_t rank = task.stack->rank, out = group.outputs[task.part];
    const Number* b = task.stack->b[task.part].of(layer, task.run->slot) + column;
    const float* scales[R];
    Floats totals[R][V];
    for (int r = 0; r < R; r++) {
      scales[r] = narrow_row(task, row + r) + task.part * rank;
      for (int v = 0; v < V; v++)
        totals[r][v] = part<V>(y + r * y_stride + column + v * LANES, n);
    }
    for (int64_t k = 0; k < rank; k++, b += out)
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) {
        const Floats weights = part<V>(b + v * LANES, n);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) totals[r][v] += scales[r][k] * weights;
      }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) {
        Number* to = y + r * y_stride + column + v * LANES;
        V > 1 ? store(to, totals[r][v]) : store(to, totals[r][v], n);
      }
  }

  // Of several vectors each is whole; one alone may have n numbers only.
  template <int V>
  static Floats part(const Number* from, int64_t n) {
    return V > 1 ? load(from) : load(from, n);
  }
};
