// Rotary embedding in the half-split layout, and the write of keys and values into the cache.
#pragma once
#include "norm.h"

// Keys and values [slots, kv_heads, length, dim] of one layer.
struct Cache {
  Number *keys, *values;
  int64_t kv_heads, length, dim;

  int64_t place(int64_t slot, int64_t kv_head, int64_t position) const {
    return ((slot * kv_heads + kv_head) * length + position) * dim;
  }
};

struct Rope {
  const float *cos, *sin;                // [length, dim / 2]
  const Number *query_norm, *key_norm;  // [dim], or null: heads are not normalised
  float eps;

  // Rotate one row [heads + 2 · kv_heads, dim]: queries in place, keys into the cache, values as
  // they are beside them.
  void row(Number* qkv, int64_t heads, int64_t slot, int64_t position, const Cache& cache) const {
    const int64_t dim = cache.dim, kv_heads = cache.kv_heads;
    for (int64_t head = 0; head < heads; head++)
      turn(qkv + head * dim, qkv + head * dim, dim, position, query_norm);
    for (int64_t head = 0; head < kv_heads; head++) {
      const int64_t place = cache.place(slot, head, position);
      turn(qkv + (heads + head) * dim, cache.keys + place, dim, position, key_norm);
      memcpy(cache.values + place, qkv + (heads + kv_heads + head) * dim, dim * sizeof(Number));
    }
  }

  void turn(const Number* from, Number* to, int64_t dim, int64_t position,
            const Number* weight) const {
    const float scale = weight ? inverse_rms(from, dim, eps) : 1.0f;
    const int64_t half = dim / 2;
    const float *cosines = cos + position * half, *sines = sin + position * half;
    for (int64_t i = 0; i < half; i += LANES) {
      const int64_t n = half - i;
      Floats a = load(from + i, n) * scale, b = load(from + half + i, n) * scale;
      if (weight) a *= load(weight + i, n), b *= load(weight + half + i, n);
      const Floats c = some(cosines + i, n), s = some(sines + i, n);
      store(to + i, a * c - b * s, n);
      store(to + half + i, b * c + a * s, n);
    }
  }

  static Floats some(const float* p, int64_t n) {
    if (n >= LANES) return load(p);
    Floats v = {};
    memcpy(&v, p, n * sizeof(float));
    return v;
  }
};
