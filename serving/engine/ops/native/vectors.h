// What a row may wear beside A and B: y = scale · y + shift after a linear and its LoRA, norms of its own.
#pragma once
#include "vector.h"

// Any pointer may be null: then it is as the base has it. A scale has a shift.
struct Vectors {
  const float *scale[4], *shift[4];  // of qkv, o, gate_up, down: [layers, outputs]
  const Number* norms;               // [2 · layers + 1, hidden]: attention, MLP, …, the last one
};

inline Floats some(const float* p, int64_t n) {
  Floats v = {};
  memcpy(&v, p, std::min<int64_t>(n, LANES) * sizeof(float));
  return v;
}

// y = scale · y + shift + before, where there is a before.
inline void dress(Number* y, const float* scale, const float* shift, const Number* before,
                  int64_t size) {
  for (int64_t i = 0; i < size; i += LANES) {
    const int64_t n = size - i;
    Floats v = some(scale + i, n) * load(y + i, n) + some(shift + i, n);
    if (before) v += load(before + i, n);
    store(y + i, v, n);
  }
}
