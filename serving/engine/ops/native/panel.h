// Weights as `pack` in linear.py lays them: panels of 32 outputs, and inside a panel the weights that
// one step multiplies side by side, so that they are read once, in order.
#pragma once
#include "vector.h"

constexpr int COLUMNS = 2;  // vectors of outputs in a panel
constexpr int PANEL = COLUMNS * LANES;
constexpr int64_t LINE = 64;  // bytes that memory is read in
constexpr int64_t CHUNK = 8;  // steps that are multiplied before it is asked what to fetch next
constexpr int64_t PAIR = COLUMNS * LINE, CHUNK_BYTES = CHUNK * PAIR;
// From so many places memory is fetched in turn, or twice as many: with AMX a fifth faster than what
// lies side by side.
constexpr int64_t PLACES = 4;

// Neighbouring panels.
struct Span {
  int64_t first = 0, end = 0;
  int64_t size() const { return end - first; }
  bool has(int64_t panel) const { return first <= panel && panel < end; }
};

// A packed weight [outputs, inputs].
struct Panels {
  const Number* w = nullptr;
  int64_t steps = 0, count = 0;

  Panels() = default;
  Panels(const Number* w, int64_t inputs, int64_t outputs)
      : w(w), steps(inputs / STEP), count((outputs + PANEL - 1) / PANEL) {}

  const Number* at(int64_t panel) const { return w + panel * steps * PANEL * STEP; }
  int64_t bytes() const { return steps * PANEL * STEP * (int64_t)sizeof(Number); }
};

// Neighbouring rows of x, `stride` apart; N of them are multiplied with each weight that is read.
template <int N>
class Rows {
 public:
  Rows(const Number* x, int64_t stride) : stride(stride) {
    for (int i = 0; i < N; i += 3) third[i / 3] = x + i * stride;
  }

  // Add one step: M rows of totals from FROM on are those of these rows.
  template <int FROM, int M>
  __attribute__((always_inline)) void step(const Number* weights, Floats (&totals)[M][COLUMNS]) {
    Words own[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) own[c] = lanes(weights + c * LANES * STEP);
    step<FROM>(own, totals);
  }

  template <int FROM, int M, int C>
  __attribute__((always_inline)) void step(const Words (&own)[C], Floats (&totals)[M][C]) {
#pragma GCC unroll 12
    for (int i = 0; i < N; i++) {
      const Words input = broadcast(third[i / 3] + i % 3 * stride);
#pragma GCC unroll 4
      for (int c = 0; c < C; c++)
        totals[FROM + i][c] = multiply_add(own[c], input, totals[FROM + i][c]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < (N + 2) / 3; i++) third[i] += STEP;
  }

 private:
  const Number* third[(N + 2) / 3];  // a processor adds one or two strides for free
  const int64_t stride;
};

// totals += x Wᵀ for one panel of W, N rows of x from `x` on; they are rows FROM… of totals.
template <int N, int FROM = 0, int M>
__attribute__((always_inline)) inline void multiply(const Number* weights, int64_t steps,
                                                    const Number* x, int64_t stride,
                                                    Floats (&totals)[M][COLUMNS]) {
  Rows<N> rows(x, stride);
  for (int64_t k = 0; k < steps; k++, weights += PANEL * STEP)
    rows.template step<FROM>(weights, totals);
}
