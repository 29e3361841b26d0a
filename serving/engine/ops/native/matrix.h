// The processor's own product of matrices (AMX), where it has one. A register holds 16 rows of 64
// bytes: 32 inputs of a row of x, or one step of 16 outputs of weights as panel.h lays them, or 16
// sums.
#pragma once
#include "panel.h"

#if defined(__AMX_BF16__) && defined(BFLOAT16)
#define MATRIX
constexpr int64_t SIDE = 16;         // rows of a register
constexpr int64_t BLOCK = 2 * SIDE;  // rows of x that are multiplied with each weight that is read

// Shape this thread's registers for `rows` of x in each `multiply_block`, until the next call.
inline void shape_registers(int64_t rows) {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  const int64_t above = rows > SIDE ? (rows + 1) / 2 : rows;
  for (int i : {0, 1, 4}) shapes.rows[i] = above;
  for (int i : {2, 3, 5}) shapes.rows[i] = std::max<int64_t>(1, rows - above);  // none is an error
  for (int i : {6, 7}) shapes.rows[i] = SIDE;
  for (int i = 0; i < 8; i++) shapes.row_bytes[i] = LINE;
  _tile_loadconfig(&shapes);
}

// sums [rows, PANEL] = x Wᵀ for one panel of W and the first steps / 16 · 16 steps; `beside` is
// called with the weights of each 16 before they are multiplied.
template <class Beside>
inline void multiply_block(const Number* weights, int64_t steps, const Number* x, int64_t stride,
                           int64_t rows, float* sums, const Beside& beside) {
  const int64_t row = stride * sizeof(Number), panel = PANEL * STEP * sizeof(Number);
  const int64_t half = LANES * STEP, above = rows > SIDE ? (rows + 1) / 2 : rows;
  const Number* below = x + above * stride;
  const auto each = [&](auto multiply) __attribute__((always_inline)) {
    for (int64_t left = steps / SIDE; left > 0; left--) {
      beside(weights);
      _tile_loadd(4, x, row);
      _tile_loadd(6, weights, panel);
      _tile_loadd(7, weights + half, panel);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      multiply();
      x += SIDE * STEP, below += SIDE * STEP, weights += SIDE * PANEL * STEP;
    }
  };
  _tile_zero(0);
  _tile_zero(1);
  if (rows <= SIDE) {
    each([] {});
  } else {
    _tile_zero(2);
    _tile_zero(3);
    each([&]() __attribute__((always_inline)) {
      _tile_loadd(5, below, row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    });
    float* there = sums + above * PANEL;
    _tile_stored(2, there, PANEL * sizeof(float));
    _tile_stored(3, there + LANES, PANEL * sizeof(float));
  }
  _tile_stored(0, sums, PANEL * sizeof(float));
  _tile_stored(1, sums + LANES, PANEL * sizeof(float));
}
#endif
