// What one step computes: its rows, what they wear, and the memory that it is computed in.
#pragma once
#include "lora.h"
#include "vectors.h"

struct Step {
  int64_t rows, sampled;
  const int64_t *ids, *positions, *slots;  // [rows]
  const int64_t* sampled_rows;             // [sampled], ascending
  int64_t cache_slots, cache_length;
  Number *keys, *values;  // [layers, cache_slots, kv_heads, cache_length, dim]
  int64_t runs;
  const Run* run;
  const Stack* stacks[4];  // of qkv, o, gate_up, down; read when there are runs
  const Vectors* const* vectors;   // [rows], null where a row wears none; null when none does
  const Number* const* embedded;   // [rows] the input where it is not the token's; may be null
  // Space for rows × hidden, hidden, (heads + 2 kv_heads) · dim, heads · dim, 2 · intermediate and
  // intermediate numbers.
  Number *x, *h, *qkv, *attended, *gate_up, *activated;
  Number* logits;  // [sampled, vocab]
};

// The sampled rows of a step as a step of their own, in the same memory. It begins in the middle of
// the forward pass: ids and embedded are of no use to it.
class Sampled {
 public:
  explicit Sampled(const Step& whole) : step(whole) {
    for (int64_t i = 0; i < whole.sampled; i++) {
      const int64_t row = whole.sampled_rows[i];
      positions.push_back(whole.positions[row]);
      slots.push_back(whole.slots[row]);
      if (whole.vectors) vectors.push_back(whole.vectors[row]);
    }
    for (const Run* run = whole.run; run < whole.run + whole.runs; run++)
      if (const int64_t start = before(run->start), stop = before(run->stop); start < stop)
        runs.push_back({start, stop, run->stack, run->slot});
    step.rows = whole.sampled;
    step.positions = positions.data(), step.slots = slots.data();
    step.runs = runs.size(), step.run = runs.data();
    if (whole.vectors) step.vectors = vectors.data();
  }
  Sampled(const Sampled&) = delete;  // step points into it

  Step step;

 private:
  std::vector<int64_t> positions, slots;
  std::vector<const Vectors*> vectors;
  std::vector<Run> runs;

  // How many sampled rows are before this one.
  int64_t before(int64_t row) const {
    const int64_t* end = step.sampled_rows + step.sampled;
    return std::lower_bound(step.sampled_rows, end, row) - step.sampled_rows;
  }
};
