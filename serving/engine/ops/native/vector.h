// Sixteen floats at a time, on any processor: the compiler turns these types into AVX-512, AVX2 or
// plain SSE by the flags it is given. Only the product of bfloat16 pairs has an instruction of its
// own, and only where the flags allow it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));  // 16 floats, or 16 pairs of bfloat16
typedef uint16_t Halves __attribute__((vector_size(32)));

struct bf16 {
  uint16_t bits;
};
#if defined(BFLOAT16)
using Number = bf16;  // of weights and activations; sums are float
#else
using Number = float;
#endif

inline Floats all(float value) { return Floats{} + value; }

inline Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline Floats load(const bf16* p) {
  Halves half;
  memcpy(&half, p, sizeof half);
#if defined(__AVX512F__)
  return (Floats)((Words)_mm512_cvtepu16_epi32((__m256i)half) << 16);  // one instruction, not four
#else
  return (Floats)(__builtin_convertvector(half, Words) << 16);
#endif
}
inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }
inline void store(bf16* p, Floats v) {
#if defined(__AVX512BF16__)
  __m256bh half = _mm512_cvtneps_pbh((__m512)v);
#else
  Words bits = (Words)v;  // round to nearest, ties to even; a NaN stays one
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Words whole = (v == v) ? rounded : ((bits >> 16) | 0x40);
  Halves half = __builtin_convertvector(whole, Halves);
#endif
  memcpy(p, &half, sizeof half);
}

// The first n lanes only; the others are zero, and memory beyond them is not touched.
inline Floats load(const Number* p, int64_t n) {
  if (n >= LANES) return load(p);
  Number whole[LANES] = {};
  memcpy(whole, p, n * sizeof(Number));
  return load(whole);
}
inline void store(Number* p, Floats v, int64_t n) {
  if (n >= LANES) return store(p, v);
  Number whole[LANES];
  store(whole, v);
  memcpy(p, whole, n * sizeof(Number));
}

// One step of a product multiplies a float in each lane, or two neighbouring bfloat16.
constexpr int STEP = 4 / sizeof(Number);

inline Words lanes(const Number* p) {
  Words v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline Words lanes(const Number* p, int64_t n) {
  if (n >= LANES * STEP) return lanes(p);
  Words v = {};
  memcpy(&v, p, n * sizeof(Number));
  return v;
}
// Store what nobody reads soon: past the caches, and without reading what was there. `streamed` comes
// after the last one and before another thread reads it.
inline void stream(Number* p, Words v) {
#if defined(__AVX512F__)
  if ((uintptr_t)p % sizeof v == 0) return _mm512_stream_si512((__m512i*)p, (__m512i)v);
#endif
  memcpy(p, &v, sizeof v);
}
inline void streamed() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}
inline Words broadcast(const Number* p) {
  uint32_t word;
  memcpy(&word, p, sizeof word);
  return Words{} + word;
}
inline Floats multiply_add(Words a, Words b, Floats sum) {
#if !defined(BFLOAT16)
  return sum + (Floats)a * (Floats)b;
#elif defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum += (Floats)(a << 16) * (Floats)(b << 16);
  return sum + (Floats)(a & 0xffff0000u) * (Floats)(b & 0xffff0000u);
#endif
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Put the lanes of each of N vectors (a power of two, at most 16) together by `two`: what vector i
// gives is lane i of the result.
template <int N, class Two>
Floats together(Floats (&v)[N], const Two& two) {
  // Each round joins two vectors so that the lanes of both are half as many, side by side.
  constexpr Ints even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
#pragma GCC unroll 4
  for (int n = N, left = LANES; left > 1; n = (n + 1) / 2, left /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < (n + 1) / 2; i++) {
      Floats a = v[2 * i], b = n > 1 ? v[2 * i + 1] : a;
      v[i] = two(__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, even + 1));
    }
  return v[0];
}
template <int N>
Floats sums(Floats (&v)[N]) {
  return together(v, [](Floats a, Floats b) { return a + b; });
}
template <int N>
Floats greatest(Floats (&v)[N]) {
  return together(v, larger);
}
inline float sum(Floats v) {
  Floats one[1] = {v};
  return sums(one)[0];
}

// e^x, within 2 units of the last place: e^x = 2^n · e^r with |r| <= ln 2 / 2 and the Taylor series
// of e^r to the seventh power. NaN stays NaN; below -87.3 it is 0, above 88.7 it is infinite.
inline Floats exp(Floats x) {
  Floats clamped = x < -88.0f ? all(-88.0f) : x;
  clamped = clamped > 89.0f ? all(89.0f) : clamped;
  Floats shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: rounds to an integer
  Floats n = shifted - 12582912.0f;
  Floats r = clamped - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  Floats e = all(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) e = e * r + c;
  Ints half = ((Ints)shifted - 0x4b400000) >> 1, rest = ((Ints)shifted - 0x4b400000) - half;
  Floats result = e * (Floats)((half + 127) << 23) * (Floats)((rest + 127) << 23);
  result = x < -87.3f ? all(0) : result;
  return x == x ? result : x;
}
