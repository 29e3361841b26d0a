// Root mean square normalisation: y = x / sqrt(mean(x²) + eps) · w.
#pragma once
#include "vector.h"

inline float inverse_rms(const Number* x, int64_t size, float eps) {
  Floats squares = {};
  for (int64_t i = 0; i < size; i += LANES) {
    const Floats v = load(x + i, size - i);
    squares += v * v;
  }
  return 1.0f / std::sqrt(sum(squares) / size + eps);
}

inline void normalise(const Number* x, const Number* w, Number* y, int64_t size, float eps) {
  const Floats scale = all(inverse_rms(x, size, eps));
  for (int64_t i = 0; i < size; i += LANES)
    store(y + i, load(x + i, size - i) * scale * load(w + i, size - i), size - i);
}
