// y = x Wᵀ + b for a frozen W, packed by `pack` in linear.py: panels of 32 outputs, and inside a
// panel the weights that one step multiplies side by side, so that W is read once, in order.
#pragma once
#include "vector.h"

constexpr int COLUMNS = 2;  // vectors of outputs in a panel
constexpr int PANEL = COLUMNS * LANES;
#if defined(__AVX512F__)
constexpr int TILE = 12;  // rows of x at once: 24 of 32 registers are sums
#else
constexpr int TILE = 2;
#endif
constexpr int64_t BAND = 96;  // rows of x that stay in the second level cache beside a panel

// x [rows, steps · STEP], y [rows, outputs], bias [outputs] or null; add: y += instead of y =.
struct Product {
  const Number *x, *w, *bias;
  Number* y;
  int64_t x_stride, y_stride, steps, outputs;
  bool add;

  template <int N>
  void tile(int64_t row, int64_t panel) const {
    const Number* rows = x + row * x_stride;
    const Number* weights = w + panel * steps * PANEL * STEP;
    Floats totals[N][COLUMNS] = {};
    for (int64_t k = 0; k < steps; k++, weights += PANEL * STEP) {
      Words own[COLUMNS];
      for (int c = 0; c < COLUMNS; c++) own[c] = lanes(weights + c * LANES * STEP);
#pragma GCC unroll 12
      for (int i = 0; i < N; i++) {
        const Words input = broadcast(rows + i * x_stride + k * STEP);
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; c++) totals[i][c] = multiply_add(own[c], input, totals[i][c]);
      }
    }
    for (int i = 0; i < N; i++)
      for (int c = 0; c < COLUMNS; c++) finish(row + i, panel * PANEL + c * LANES, totals[i][c]);
  }

  void finish(int64_t row, int64_t output, Floats total) const {
    const int64_t n = outputs - output;
    if (n <= 0) return;
    Number* out = y + row * y_stride + output;
    if (bias) total += load(bias + output, n);
    if (add) total += load(out, n);
    store(out, total, n);
  }

  template <int N = TILE>
  void tiles(int64_t row, int64_t rows, int64_t panel) const {
    for (; rows >= N; row += N, rows -= N) tile<N>(row, panel);
    if constexpr (N > 1) tiles<N - 1>(row, rows, panel);
  }

  // Called by every thread of a parallel region.
  void run(int64_t rows) const {
    const int64_t panels = (outputs + PANEL - 1) / PANEL;
    for (int64_t first = 0; first < rows; first += BAND)
#pragma omp for schedule(dynamic) nowait
      for (int64_t panel = 0; panel < panels; panel++)
        tiles(first, std::min(BAND, rows - first), panel);
#pragma omp barrier
  }
};

// Read one output's weights [inputs] back from the packed form.
inline void unpack(const Number* w, int64_t output, int64_t inputs, Number* to) {
  const Number* own = w + output / PANEL * PANEL * inputs + output % PANEL * STEP;
  for (int64_t k = 0; k < inputs / STEP; k++)
    memcpy(to + k * STEP, own + k * PANEL * STEP, STEP * sizeof(Number));
}
