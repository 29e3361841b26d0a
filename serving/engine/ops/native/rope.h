// Rotary embedding in the half-split layout, and the write of keys and values into the cache.
#pragma once
#include "norm.h"

// Keys and values of one layer: values [slots, kv_heads, length, dim]; keys lie in panels of LANES,
// as the weights of a linear do: [slots, kv_heads, length / LANES, dim / STEP, LANES, STEP].
struct Cache {
  Number *keys, *values;
  int64_t kv_heads, length, dim;

  int64_t place(int64_t slot, int64_t kv_head, int64_t position) const {
    return ((slot * kv_heads + kv_head) * length + position) * dim;
  }

  void write_key(int64_t slot, int64_t kv_head, int64_t position, const Number* key) const {
    const int64_t lane = position % LANES;
    Number* to = keys + place(slot, kv_head, position - lane) + lane * STEP;
    for (int64_t i = 0; i < dim; i += STEP, to += LANES * STEP)
      memcpy(to, key + i, STEP * sizeof(Number));
  }
};

struct Rope {
  const float *cos, *sin;                // [length, dim / 2]
  const Number *query_norm, *key_norm;  // [dim], or null: heads are not normalised
  float eps;

  // Rotate queries and keys of one row [heads + 2 · kv_heads, dim] in place, and put keys and
  // values into the cache.
  void row(Number* qkv, int64_t heads, int64_t slot, int64_t position, const Cache& cache) const {
    const int64_t dim = cache.dim, kv_heads = cache.kv_heads;
    for (int64_t head = 0; head < heads; head++)
      turn(qkv + head * dim, qkv + head * dim, dim, position, query_norm);
    for (int64_t head = 0; head < kv_heads; head++) {
      Number* key = qkv + (heads + head) * dim;
      turn(key, key, dim, position, key_norm);
      cache.write_key(slot, head, position, key);
      memcpy(cache.values + cache.place(slot, head, position), key + kv_heads * dim,
             dim * sizeof(Number));
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
