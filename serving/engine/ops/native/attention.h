// Query tokens against the slotted cache. A token reads as many keys as it sees, never a padded
// length, and query heads that share a KV head share every load of it. Softmax is computed as it
// goes along (arXiv 1805.02867); a long sequence is split between threads, and its parts are put
// together at the end.
#pragma once
#include <vector>

#include "rope.h"

constexpr int64_t SPLIT = 512;  // keys of one task
constexpr int KEYS = 64;        // keys between two looks at the running maximum
constexpr int GROUP = 4;        // query heads at once

// What a task has seen so far for one query head.
struct Partial {
  float *most, *sum;  // the largest score, and the sum of e^(score - most)
  float* total;       // [dim, rounded up to LANES] values weighted by e^(score - most)
};

// The keys and values [length, dim] of one KV head, read by G query heads [G, dim].
template <int G>
struct Reader {
  const Number *q, *keys, *values;
  int64_t dim;
  float scale;
  Partial* partials;

  void read(int64_t from, int64_t to) const {
    for (int64_t first = from; first < to; first += KEYS) {
      const int64_t n = std::min<int64_t>(KEYS, to - first);
      float weights[G][KEYS];
      soften(first, n, weights);
      weigh(first, n, 0, weights);
    }
  }

  // Turn the scores of n keys into weights; what was seen before is scaled to the new maximum.
  void soften(int64_t first, int64_t n, float (&weights)[G][KEYS]) const {
    Floats scores[KEYS / LANES][G];
    const int64_t blocks = (n + LANES - 1) / LANES;
    for (int64_t b = 0; b < blocks; b++)
      score(first + b * LANES, std::min<int64_t>(LANES, n - b * LANES), scores[b]);
    for (int g = 0; g < G; g++) {
      const Partial& own = partials[g];
      Floats most = scores[0][g], added = {};
      for (int64_t b = 1; b < blocks; b++) most = larger(scores[b][g], most);
      const float now = std::max(*own.most, largest(most));
      for (int64_t b = 0; b < blocks; b++) {
        const Floats weight = exp(scores[b][g] - now);
        store(weights[g] + b * LANES, weight);
        added += weight;
      }
      const float kept = exp(all(*own.most - now))[0];
      *own.sum = *own.sum * kept + sum(added);
      *own.most = now;
      for (int64_t d = 0; d < dim; d++) own.total[d] *= kept;
    }
  }

  // Scores of up to 16 keys; -inf beyond the n there are.
  void score(int64_t first, int64_t n, Floats (&scores)[G]) const {
    const Number* own = keys + first * dim;
    for (int64_t i = 0; i < LANES * dim; i += 64 / sizeof(Number)) {
      __builtin_prefetch(own + LANES * dim + i);      // the next keys
      __builtin_prefetch(values + first * dim + i);  // and what these weigh
    }
    for (int g = 0; g < G; g++) {
      scores[g] = (n == LANES ? products<LANES>(own, q + g * dim) : some(own, n, q + g * dim)) * scale;
      for (int64_t j = n; j < LANES; j++) scores[g][j] = -INFINITY;
    }
  }

  // One query with N neighbouring keys: product j is lane j of the result.
  template <int N>
  Floats products(const Number* own, const Number* query) const {
    Floats totals[N] = {};
    int64_t d = 0;
    for (; d + LANES * STEP <= dim; d += LANES * STEP) {
      const Words part = lanes(query + d);
#pragma GCC unroll 16
      for (int j = 0; j < N; j++) totals[j] = multiply_add(lanes(own + j * dim + d), part, totals[j]);
    }
    if (d < dim) {
      const Words part = lanes(query + d, dim - d);
      for (int j = 0; j < N; j++)
        totals[j] = multiply_add(lanes(own + j * dim + d, dim - d), part, totals[j]);
    }
    return sums(totals);
  }

  Floats some(const Number* own, int64_t n, const Number* query) const {
    Floats result = {};
    for (int64_t j = 0; j < n; j++) result[j] = products<1>(own + j * dim, query)[0];
    return result;
  }

  // Add the values of n keys, V vectors of dimensions at once.
  template <int V = 4>
  void weigh(int64_t first, int64_t n, int64_t d, const float (&weights)[G][KEYS]) const {
    for (; d + V * LANES <= dim; d += V * LANES) weigh_block<V>(first, n, d, weights);
    if constexpr (V > 1)
      weigh<V / 2>(first, n, d, weights);
    else if (d < dim)
      weigh_block<1>(first, n, d, weights);
  }

  template <int V>
  void weigh_block(int64_t first, int64_t n, int64_t d, const float (&weights)[G][KEYS]) const {
    Floats totals[G][V];
    for (int g = 0; g < G; g++)
      for (int v = 0; v < V; v++) totals[g][v] = load(partials[g].total + d + v * LANES);
    const Number* own = values + first * dim + d;
    const int64_t width = V > 1 ? V * LANES : dim - d;  // below LANES only at the last dimensions
    for (int64_t j = 0; j < n; j++, own += dim)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        const Floats value = load(own + v * LANES, width - v * LANES);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) totals[g][v] += weights[g][j] * value;
      }
    for (int g = 0; g < G; g++)
      for (int v = 0; v < V; v++) store(partials[g].total + d + v * LANES, totals[g][v]);
  }
};

// Attention of a step's rows; the same for every layer with the same window.
class Attention {
 public:
  // slots and positions [rows]. A row sees its own position and all before it, or the last `window`
  // of them; window 0 is none.
  Attention(int64_t rows, const int64_t* slots, const int64_t* positions, int64_t heads,
            int64_t kv_heads, int64_t dim, int64_t window)
      : rows(rows), heads(heads), share(heads / kv_heads), dim(dim), window(window),
        partial_size(LANES + (dim + LANES - 1) / LANES * LANES), slots(slots),
        positions(positions), first_part{0} {
    for (int64_t row = 0; row < rows; row++)
      first_part.push_back(first_part[row] +
                           (positions[row] + 1 - start(row) + SPLIT - 1) / SPLIT);
    scratch.resize(first_part[rows] * heads * partial_size);
  }

  // q [rows, heads, dim] with `stride` between rows, out [rows, heads, dim]. Called by every thread
  // of a parallel region.
  void run(const Number* q, int64_t stride, const Cache& cache, Number* out) {
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t part = 0; part < first_part[rows]; part++)
      for (int64_t kv_head = 0; kv_head < cache.kv_heads; kv_head++)
        read(part, kv_head, q, stride, cache);
#pragma omp for schedule(static) collapse(2)
    for (int64_t row = 0; row < rows; row++)
      for (int64_t head = 0; head < heads; head++) merge(row, head, out + (row * heads + head) * dim);
  }

 private:
  int64_t rows, heads, share, dim, window, partial_size;
  const int64_t *slots, *positions;
  std::vector<int64_t> first_part;  // of each row; a part is a split of a row
  std::vector<float> scratch;

  int64_t start(int64_t row) const {
    return window ? std::max<int64_t>(0, positions[row] + 1 - window) : 0;
  }

  Partial partial(int64_t part, int64_t head) {
    float* own = scratch.data() + (part * heads + head) * partial_size;
    return {own, own + 1, own + LANES};
  }

  // One split of one row, for the query heads of one KV head.
  void read(int64_t part, int64_t kv_head, const Number* q, int64_t stride, const Cache& cache) {
    const auto after = std::upper_bound(first_part.begin(), first_part.end(), part);
    const int64_t row = after - first_part.begin() - 1;
    const int64_t from = start(row) + (part - first_part[row]) * SPLIT;
    const int64_t to = std::min(from + SPLIT, positions[row] + 1);
    const int64_t place = cache.place(slots[row], kv_head, 0);
    read_heads(part, kv_head * share, share, q + row * stride, cache.keys + place,
               cache.values + place, from, to);
  }

  template <int G = GROUP>
  void read_heads(int64_t part, int64_t head, int64_t count, const Number* q, const Number* keys,
                  const Number* values, int64_t from, int64_t to) {
    for (; count >= G; count -= G, head += G) {
      Partial partials[G];
      for (int g = 0; g < G; g++) {
        partials[g] = partial(part, head + g);
        *partials[g].most = -INFINITY;
        *partials[g].sum = 0;
        std::fill_n(partials[g].total, partial_size - LANES, 0.0f);
      }
      const float scale = 1.0f / std::sqrt((float)dim);
      Reader<G>{q + head * dim, keys, values, dim, scale, partials}.read(from, to);
    }
    if constexpr (G > 1) read_heads<G - 1>(part, head, count, q, keys, values, from, to);
  }

  // Put the parts of one query head of a row together.
  void merge(int64_t row, int64_t head, Number* out) {
    const int64_t first = first_part[row], last = first_part[row + 1];
    float most = -INFINITY, sum = 0;
    for (int64_t part = first; part < last; part++)
      most = std::max(most, *partial(part, head).most);
    for (int64_t part = first; part < last; part++) {
      const Partial own = partial(part, head);
      *own.most = exp(all(*own.most - most))[0];
      sum += *own.most * *own.sum;
    }
    for (int64_t d = 0; d < dim; d += LANES) {
      Floats total = {};
      for (int64_t part = first; part < last; part++) {
        const Partial own = partial(part, head);
        total += *own.most * load(own.total + d);
      }
      store(out + d, total / sum, dim - d);
    }
  }
};
