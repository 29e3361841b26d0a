// Query tokens against the slotted cache. Neighbouring tokens of one sequence, and the query heads
// that share a KV head, share every load of it; a long sequence is split between threads, and its
// parts are put together at the end.
//
// A token's sums run in an order that its own position decides: splits and stretches of keys begin
// at multiples of SPLIT and KEYS. So it does not matter beside which others it is read.
#pragma once
#include <omp.h>

#include <atomic>

#include "readers.h"
#include "rope.h"

constexpr int64_t SPLIT = 512;   // keys of one task
constexpr int64_t READERS = 24;  // of one task, or those of one token where it has more

// Attention of a step's rows; the same for every layer with the same window.
class Attention {
 public:
  // slots and positions [rows]. A row sees its own position and all before it, or the last `window`
  // of them; window 0 is none.
  Attention(int64_t rows, const int64_t* slots, const int64_t* positions, int64_t heads,
            int64_t kv_heads, int64_t dim, int64_t window)
      : heads(heads), kv_heads(kv_heads), share(heads / kv_heads), dim(dim), window(window),
        partial_size(LANES + (dim + LANES - 1) / LANES * LANES),
        most(std::max<int64_t>(1, READERS / share)) {
    int64_t partials = 0;
    for (int64_t row = 0; row < rows; row += blocks.back().tokens) {
      Block block{row, 1, slots[row], positions[row]};
      while (block.tokens < most && row + block.tokens < rows &&
             follows(row + block.tokens, slots, positions))
        block.tokens++;
      const int64_t first = start(block.position) / SPLIT, last = block.last() / SPLIT;
      for (int64_t split = first; split <= last; split++)
        tasks.push_back({blocks.size(), split * SPLIT, split - first});
      if (last > first) {
        block.parts = last - first + 1, block.partials = partials;
        partials += block.parts * block.tokens * heads;
      }
      blocks.push_back(block);
    }
    scratch.resize(partials * partial_size);
    // Prompts come after single tokens, and the last keys of one are the most: the long tasks first.
    std::reverse(tasks.begin(), tasks.end());
  }

  // q [rows, heads, dim] with `stride` between rows, out [rows, heads, dim]. Called by every thread
  // of a parallel region, with a count that all share and that begins at 0.
  void run(const Number* q, int64_t stride, const Cache& cache, Number* out,
           std::atomic<int64_t>& taken) {
    const int64_t count = tasks.size() * kv_heads, threads = omp_get_num_threads();
    Readers readers(most * share, dim);
#if defined(MATRIX)
    shape_whole();
#endif
    for (int64_t task = omp_get_thread_num(), next; task < count; task = next) {
      next = threads + taken.fetch_add(1, std::memory_order_relaxed);
      read(task, q, stride, cache, next < count ? stretch(next, cache) : Stretch{}, readers);
      hand_over(task, readers, out);
    }
#pragma omp barrier
    if (scratch.empty()) return;
#pragma omp for schedule(static)
    for (size_t i = 0; i < blocks.size(); i++)
      if (blocks[i].parts) merge(blocks[i], out);
  }

 private:
  struct Block {  // neighbouring tokens of one sequence
    int64_t row, tokens, slot, position;  // of the first one
    int64_t parts = 0, partials = 0;      // in scratch; 0 where one task reads it all

    int64_t last() const { return position + tokens - 1; }
  };
  struct Task {  // for each KV head
    size_t block;
    int64_t key, part;  // where its split begins
  };

  int64_t heads, kv_heads, share, dim, window, partial_size, most;
  std::vector<Block> blocks;
  std::vector<Task> tasks;
  std::vector<float> scratch;  // most, sum and total of each part, token and head

  static bool follows(int64_t row, const int64_t* slots, const int64_t* positions) {
    return slots[row] == slots[row - 1] && positions[row] == positions[row - 1] + 1;
  }

  int64_t start(int64_t position) const {
    return window ? std::max<int64_t>(0, position + 1 - window) : 0;
  }

  float* partial(const Block& block, int64_t part, int64_t token, int64_t head) {
    return scratch.data() +
           (block.partials + (part * block.tokens + token) * heads + head) * partial_size;
  }

  int64_t first_key(const Task& task) const {
    return std::max(task.key, start(blocks[task.block].position) / KEYS * KEYS);
  }

  // What task number `number` reads first.
  Stretch stretch(int64_t number, const Cache& cache) const {
    const Task& task = tasks[number / kv_heads];
    return stretch(task, number % kv_heads, first_key(task), cache);
  }

  Stretch stretch(const Task& task, int64_t kv_head, int64_t key, const Cache& cache) const {
    const Block& block = blocks[task.block];
    const int64_t place = cache.place(block.slot, kv_head, key);
    const int64_t end = std::min(task.key + SPLIT, block.last() + 1);
    return {cache.keys + place, cache.values + place, std::min(KEYS, end - key)};
  }

  // One split of one block, for the query heads of one KV head; `after` is read afterwards.
  void read(int64_t number, const Number* q, int64_t stride, const Cache& cache,
            const Stretch& after, Readers& readers) const {
    const Task& task = tasks[number / kv_heads];
    const Block& block = blocks[task.block];
    const int64_t kv_head = number % kv_heads;
    for (int64_t i = 0; i < block.tokens * share; i++)
      readers.set(i, q + (block.row + i / share) * stride + (kv_head * share + i % share) * dim);
    const int64_t end = std::min(task.key + SPLIT, block.last() + 1);
    for (int64_t key = first_key(task); key < end; key += KEYS) {
      const Stretch own = stretch(task, kv_head, key, cache);
      const Stretch next = key + KEYS < end ? stretch(task, kv_head, key + KEYS, cache) : after;
      // Only tokens that see some of it read it.
      const int64_t low = std::max<int64_t>(0, key - block.position);
      const int64_t sight = window ? key + own.count - 1 + window - block.position : block.tokens;
      readers.read(low * share, std::min(block.tokens, sight) * share, own, next,
                   [&](int64_t reader) {
                     const int64_t position = block.position + reader / share;
                     return std::pair(start(position) - key, position + 1 - key);
                   });
    }
  }

  // Give out what the readers of a task have seen; what is a part only is put aside.
  void hand_over(int64_t number, const Readers& readers, Number* out) {
    const Task& task = tasks[number / kv_heads];
    const Block& block = blocks[task.block];
    for (int64_t i = 0; i < block.tokens * share; i++) {
      const Readers::Seen seen = readers.seen(i);
      const int64_t token = i / share, head = number % kv_heads * share + i % share;
      if (block.parts) {
        float* own = partial(block, task.part, token, head);
        own[0] = seen.most, own[1] = seen.sum;
        std::copy_n(seen.total, readers.width, own + LANES);
      } else {
        Number* to = out + ((block.row + token) * heads + head) * dim;
        for (int64_t d = 0; d < dim; d += LANES)
          store(to + d, load(seen.total + d) / seen.sum, dim - d);
      }
    }
  }

  // Put the parts of a block together.
  void merge(const Block& block, Number* out) {
    for (int64_t token = 0; token < block.tokens; token++)
      for (int64_t head = 0; head < heads; head++)
        merge(block, token, head, out + ((block.row + token) * heads + head) * dim);
  }

  void merge(const Block& block, int64_t token, int64_t head, Number* out) {
    float most = -INFINITY, sum = 0;
    for (int64_t part = 0; part < block.parts; part++)
      most = std::max(most, partial(block, part, token, head)[0]);
    for (int64_t part = 0; part < block.parts; part++) {
      float* own = partial(block, part, token, head);
      own[0] = exp(all(own[0] - most))[0];
      sum += own[0] * own[1];
    }
    for (int64_t d = 0; d < dim; d += LANES) {
      Floats total = {};
      for (int64_t part = 0; part < block.parts; part++) {
        const float* own = partial(block, part, token, head);
        total += own[0] * load(own + LANES + d);
      }
      store(out + d, total / sum, dim - d);
    }
  }
};
