// Copies of what a sequence has in the cache, and whether all of it is finite.
#pragma once
#include "vector.h"

// Blocks of keys and values: [count, 2, layers, kv_heads, width], of slots [layers, slots, kv_heads,
// slot_blocks, width].
struct Blocks {
  Number *kept, *keys, *values;
  int64_t layers, slots, kv_heads, slot_blocks, width;

  // Copy what one half (0: keys) and one layer of a slot has in its block `there` to the block
  // `here`, or back, as it is to the bit. False: not all of its numbers are finite.
  bool copy(int64_t here, int64_t half, int64_t layer, int64_t slot, int64_t there,
            bool back) const {
    Number* own = kept + ((here * 2 + half) * layers + layer) * kv_heads * width;
    Number* other = (half ? values : keys) +
                    ((layer * slots + slot) * kv_heads * slot_blocks + there) * width;
    Ints strange = {};
    for (int64_t head = 0; head < kv_heads; head++, own += width, other += slot_blocks * width)
      for (int64_t i = 0; i < width; i += LANES * STEP) {
        const int64_t n = std::min<int64_t>(width - i, LANES * STEP);
        const Words words = lanes((back ? own : other) + i, n);
        strange |= (words & 0x7f800000) == 0x7f800000;
        if (STEP == 2) strange |= (words & 0x7f80) == 0x7f80;
        if (back || n < LANES * STEP)
          memcpy((back ? other : own) + i, &words, n * sizeof(Number));
        else
          stream(own + i, words);
      }
    streamed();
    for (int lane = 0; lane < LANES; lane++)
      if (strange[lane]) return false;
    return true;
  }
};
