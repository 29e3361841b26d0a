// The first largest of a row's scores, and whether all of them are finite, in one reading.
#pragma once
#include "vector.h"

inline void greedy(const Number* scores, int64_t size, int64_t* token, uint8_t* finite) {
  Floats best = all(-INFINITY);
  Ints at = {}, strange = {};
  for (int64_t i = 0; i < size; i += LANES) {
    Floats v = load(scores + i, size - i);
    strange |= ((Ints)v & 0x7f800000) == 0x7f800000;
    for (int64_t lane = size - i; lane < LANES; lane++) v[lane] = -INFINITY;  // beyond the end
    const Ints better = v > best;
    at = better ? Ints{} + (int)i : at;
    best = better ? v : best;
  }
  int first = 0;
  *finite = 1;
  for (int lane = 0; lane < LANES; lane++) {
    if (strange[lane]) *finite = 0;
    const bool ahead = best[lane] > best[first] ||
                       (best[lane] == best[first] && at[lane] + lane < at[first] + first);
    if (ahead) first = lane;
  }
  *token = at[first] + first;
}
