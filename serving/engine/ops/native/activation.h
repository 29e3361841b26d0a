// silu(gate) · up, where silu(g) = g / (1 + e^-g).
#pragma once
#include "vector.h"

// x [2 · size]: gates, then ups. y [size].
inline void silu_mul(const Number* x, Number* y, int64_t size) {
  for (int64_t i = 0; i < size; i += LANES) {
    const Floats gate = load(x + i, size - i), up = load(x + size + i, size - i);
    store(y + i, gate / (1.0f + exp(-gate)) * up, size - i);
  }
}
