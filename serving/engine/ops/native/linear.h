// y = x Wᵀ + b for a frozen W, packed by `pack` in linear.py: panels of 32 outputs, and inside a
// panel the weights that one step multiplies side by side, so that W is read once, in order.
#pragma once
#include <omp.h>

#include <atomic>
#include <utility>
#include <vector>

#include "vector.h"

constexpr int COLUMNS = 2;  // vectors of outputs in a panel
constexpr int PANEL = COLUMNS * LANES;
constexpr int64_t LINE = 64;  // bytes that memory is read in
#if defined(__AVX512F__)
constexpr int TILE = 12;  // rows of x at once: 24 of 32 registers are sums
#else
constexpr int TILE = 2;
#endif

// A packed weight [outputs, inputs].
struct Panels {
  const Number* w = nullptr;
  int64_t steps = 0, count = 0;

  Panels() = default;
  Panels(const Number* w, int64_t inputs, int64_t outputs)
      : w(w), steps(inputs / STEP), count((outputs + PANEL - 1) / PANEL) {}

  const Number* at(int64_t panel) const { return w + panel * steps * PANEL * STEP; }
};

// Memory of one layer that is read soon, as much as a panel; of the next layer, `stride` beyond it.
struct Piece {
  const char* first;
  int64_t stride;  // bytes
};

// What a thread's tiles ask for beside their own work: each tile one piece.
struct Ahead {
  const void* panel;  // the first to be asked for, or null
  const Piece *piece, *end;
  int64_t layer, threads;

  const void* take() {
    if (panel) return std::exchange(panel, nullptr);
    if (piece >= end) return nullptr;
    const char* first = piece->first + layer * piece->stride;
    piece += threads;  // between them are those of the other threads
    return first;
  }
};

// x [rows, inputs], y [rows, outputs], bias [outputs] or null; add: y += instead of y =.
struct Product {
  const Number* x;
  const Panels w;
  const Number* bias;
  Number* y;
  int64_t x_stride, y_stride, outputs;
  bool add;

  // While it multiplies, a tile asks for memory that is as large as its panel and read soon.
  template <int N>
  void tile(int64_t row, int64_t panel, const void* soon) const {
    const Number* weights = w.at(panel);
    const int64_t ahead = soon ? (const char*)soon - (const char*)weights : 0;
    const Number* rows[(N + 2) / 3];  // every third: a processor adds one or two strides for free
    for (int i = 0; i < N; i += 3) rows[i / 3] = x + (row + i) * x_stride;
    Floats totals[N][COLUMNS] = {};
    for (int64_t k = 0; k < w.steps; k++, weights += PANEL * STEP) {
      for (int c = 0; c < COLUMNS; c++)
        __builtin_prefetch((const char*)weights + ahead + c * LINE, 0, 2);
      Words own[COLUMNS];
      for (int c = 0; c < COLUMNS; c++) own[c] = lanes(weights + c * LANES * STEP);
#pragma GCC unroll 12
      for (int i = 0; i < N; i++) {
        const Words input = broadcast(rows[i / 3] + i % 3 * x_stride);
#pragma GCC unroll 2
        for (int c = 0; c < COLUMNS; c++) totals[i][c] = multiply_add(own[c], input, totals[i][c]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < (N + 2) / 3; i++) rows[i] += STEP;
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
  void tiles(int64_t row, int64_t rows, int64_t panel, Ahead& ahead) const {
    for (; rows >= N; row += N, rows -= N) tile<N>(row, panel, ahead.take());
    if constexpr (N > 1) tiles<N - 1>(row, rows, panel, ahead);
  }

  // Called by every thread of a parallel region, with a count that all share and that begins at 0.
  // A thread takes its next panel before it computes one, and fetches it in the meantime, and then
  // `pieces`: memory and multipliers are busy at the same time. Beside its last panel it fetches
  // one of `after`.
  void run(int64_t rows, std::atomic<int64_t>& taken, const Panels& after = {},
           const std::vector<Piece>& pieces = {}, int64_t layer = 0) const {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    Ahead ahead{nullptr, pieces.data() + thread, pieces.data() + pieces.size(), layer, threads};
    for (int64_t panel = thread, next; panel < w.count; panel = next) {
      next = threads + taken.fetch_add(1, std::memory_order_relaxed);
      ahead.panel = next < w.count ? w.at(next) : thread < after.count ? after.at(thread) : nullptr;
      tiles(0, rows, panel, ahead);
    }
#pragma omp barrier
  }
};

// Read one output's weights [inputs] back from the packed form.
inline void unpack(const Number* w, int64_t output, int64_t inputs, Number* to) {
  const Number* own = w + output / PANEL * PANEL * inputs + output % PANEL * STEP;
  for (int64_t k = 0; k < inputs / STEP; k++)
    memcpy(to + k * STEP, own + k * PANEL * STEP, STEP * sizeof(Number));
}
