// Query heads that read the same keys and values. Softmax is computed as it goes along (arXiv
// 1805.02867): what was seen before is scaled to each new maximum.
#pragma once
#include <vector>

#include "matrix.h"

constexpr int64_t KEYS = 64;  // between two looks at the maximum
#if defined(__AVX512F__)
constexpr int ACROSS = 6;  // readers at once
constexpr int WIDE = 4;    // vectors of keys, or of dimensions, at once
#else
constexpr int ACROSS = 2;
constexpr int WIDE = 2;
#endif

// Up to KEYS neighbouring tokens of one KV head: keys in panels of LANES, values [count, dim].
struct Stretch {
  const Number *keys = nullptr, *values = nullptr;
  int64_t count = 0;

  int64_t panels() const { return (count + LANES - 1) / LANES; }
};

// The lines of a stretch that is read next. They are fetched from several places in turn.
class NextLines {
 public:
  NextLines(const Stretch& next, int64_t dim)
      : left(next.panels() * LANES * dim * (int64_t)sizeof(Number) * 2 / (PLACES * LINE)) {
    const char *keys = (const char*)next.keys, *values = (const char*)next.values;
    for (int64_t i = 0; i < PLACES; i += 2, keys += left * LINE, values += left * LINE)
      places[i] = keys, places[i + 1] = values;
  }

  // Fetch so many, PLACES at least, or what is left.
  __attribute__((always_inline)) void fetch(int64_t lines) {
    for (; lines > 0 && left > 0; lines -= PLACES, left--)
      for (const char*& place : places) __builtin_prefetch(place, 0, LEVEL), place += LINE;
  }

  // How many to fetch at each of so many times until all are.
  int64_t share(int64_t times) const { return (left + times - 1) / times * PLACES; }

 private:
#if defined(MATRIX)
  static constexpr int LEVEL = 3;  // the first cache
#else
  static constexpr int LEVEL = 2;  // the second one: what the first one holds is in use
#endif
  int64_t left;  // lines of each place
  const char* places[PLACES];
};

// A reader is one query head of one token.
class Readers {
 public:
  Readers(int64_t count, int64_t dim)
      : dim(dim), width((dim + LANES - 1) / LANES * LANES), scale(1.0f / std::sqrt((float)dim)),
        queries((count + LANES) * dim), most(count + LANES), sum(count + LANES),
        total(count * width), weights((count + LANES) * KEYS) {}

  const int64_t dim, width;  // width: dim, rounded up to LANES

  // What a reader has seen: the largest score, the sum of e^(score - most), and [width] values
  // weighted by that.
  struct Seen {
    float most, sum;
    const float* total;
  };
  Seen seen(int64_t reader) const {
    return {most[reader], sum[reader], total.data() + reader * width};
  }

  // A new one, that has seen nothing.
  void set(int64_t reader, const Number* query) {
    memcpy(queries.data() + reader * dim, query, dim * sizeof(Number));
    most[reader] = -INFINITY, sum[reader] = 0;
    std::fill_n(total.data() + reader * width, width, 0.0f);
  }

  // Readers first..last read `own`; `sight` says of each from where to where it may, counted from
  // the first key of `own`. `next` is fetched meanwhile.
  template <class Sight>
  void read(int64_t first, int64_t last, const Stretch& own, const Stretch& next,
            const Sight& sight) {
    NextLines soon(next, dim);
#if defined(MATRIX)
    if (dim % DEEP == 0)
      score_whole(first, last, own, soon);
    else
#endif
      score(first, last, own.keys, own.panels(), soon);
    soften(first, last, own.panels(), sight);
    weigh(first, last, own.values, own.count, soon);
  }

 private:
  // Loops over sums are unrolled, reading and writing them as well: an index that is no constant
  // would put all of them on the stack.
  static constexpr int TOGETHER = 8;  // readers whose maxima and sums are found side by side
  const float scale;
  std::vector<Number> queries;                   // [readers, dim]
  std::vector<float> most, sum, total, weights;  // weights: [readers, KEYS]

#if defined(MATRIX)
  // Write scores as weights. SIDE readers at once: behind the last one there is room for more.
  void score_whole(int64_t first, int64_t last, const Stretch& own, NextLines& soon) {
    const int64_t size = LANES * dim, panels = own.panels();
    written(queries.data());
    for (; first < last; first += SIDE)
      for (int64_t panel = 0; panel < panels; panel += 2) {
        const Number *query = queries.data() + first * dim, *keys = own.keys + panel * size;
        const bool both = panel + 1 < panels;
        float* to = weights.data() + first * KEYS + panel * LANES;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t d = 0; d < dim; d += DEEP, query += DEEP, keys += DEEP * LANES) {
          _tile_loadd(4, query, dim * sizeof(Number));
          soon.fetch(SIDE);
          _tile_loadd(6, keys, LINE);
          _tile_dpbf16ps(0, 4, 6);
          if (!both) continue;
          soon.fetch(SIDE);
          _tile_loadd(7, keys + size, LINE);
          _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, to, KEYS * sizeof(float));
        if (both) _tile_stored(1, to + LANES, KEYS * sizeof(float));
      }
  }
#endif

  // Write scores as weights, of WIDE panels at once.
  template <int C = WIDE>
  void score(int64_t first, int64_t last, const Number* keys, int64_t panels, NextLines& soon,
             int64_t panel = 0) {
    for (; panels - panel >= C; panel += C)
      score_rows<C>(first, last, keys + panel * LANES * dim, panel, soon);
    if constexpr (C > 1) score<C / 2>(first, last, keys, panels, soon, panel);
  }

  template <int C, int N = ACROSS>
  void score_rows(int64_t first, int64_t last, const Number* keys, int64_t panel, NextLines& soon) {
    for (; last - first >= N; first += N) score_tile<N, C>(first, keys, panel, soon);
    if constexpr (N > 1) score_rows<C, N - 1>(first, last, keys, panel, soon);
  }

  template <int N, int C>
  void score_tile(int64_t first, const Number* keys, int64_t panel, NextLines& soon) {
    Floats sums[N][C] = {};
    Rows<N> rows(queries.data() + first * dim, dim);
    for (int64_t k = 0; k < dim / STEP; k++, keys += LANES * STEP) {
      Words own[C];
      for (int c = 0; c < C; c++) own[c] = lanes(keys + c * LANES * dim);
      soon.fetch(C);
      rows.template step<0>(own, sums);
    }
#pragma GCC unroll 6
    for (int i = 0; i < N; i++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++)
        store(weights.data() + (first + i) * KEYS + (panel + c) * LANES, sums[i][c]);
  }

  // Turn scores into weights: 0 for what a reader does not see.
  template <class Sight>
  void soften(int64_t first, int64_t last, int64_t panels, const Sight& sight) {
    for (; first < last; first += TOGETHER) {
      const int64_t n = std::min<int64_t>(TOGETHER, last - first);
      Floats each[TOGETHER] = {};
      for (int i = 0; i < n; i++) {
        const auto [from, to] = sight(first + i);
        each[i] = scaled(first + i, panels, from, to);
      }
      const Floats before = load(most.data() + first), now = larger(greatest(each), before);
      const Floats kept = before == now ? all(1.0f) : exp(before - now);
      for (int i = 0; i < n; i++) each[i] = weighted(first + i, panels, now[i]);
      const Floats added = load(sum.data() + first) * kept + sums(each);
      memcpy(most.data() + first, &now, n * sizeof(float));  // behind these are others
      memcpy(sum.data() + first, &added, n * sizeof(float));
      for (int i = 0; i < n; i++)
        if (kept[i] != 1.0f)
          for (int64_t d = 0; d < width; d++) total[(first + i) * width + d] *= kept[i];
    }
  }

  // Scale a reader's scores; those outside from..to become -inf. Returns the largest of each lane.
  Floats scaled(int64_t reader, int64_t panels, int64_t from, int64_t to) {
    float* own = weights.data() + reader * KEYS;
    Floats best = all(-INFINITY);
    const bool whole = from <= 0 && panels * LANES <= to;
    for (int64_t p = 0; p < panels; p++, from -= LANES, to -= LANES) {
      Floats score = load(own + p * LANES) * scale;
      if (!whole) score = inside(score, from, to);
      store(own + p * LANES, score);
      best = larger(score, best);
    }
    return best;
  }

  static Floats inside(Floats scores, int64_t from, int64_t to) {
    constexpr Ints place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const auto lane = [](int64_t n) { return (int32_t)std::clamp<int64_t>(n, 0, LANES); };
    scores = place < lane(from) ? all(-INFINITY) : scores;
    return place < lane(to) ? scores : all(-INFINITY);
  }

  // Returns the sum of each lane.
  Floats weighted(int64_t reader, int64_t panels, float most) {
    float* own = weights.data() + reader * KEYS;
    Floats added = {};
    for (int64_t p = 0; p < panels; p++) {
      const Floats weight = exp(load(own + p * LANES) - most);
      store(own + p * LANES, weight);
      added += weight;
    }
    return added;
  }

  // Add n weighted values. Vectors that share a line of memory are fetched once.
  template <int N = ACROSS>
  void weigh(int64_t first, int64_t last, const Number* values, int64_t n, NextLines& soon) {
    for (; last - first >= N; first += N) weigh_columns<N>(first, values, n, soon);
    if constexpr (N > 1) weigh<N - 1>(first, last, values, n, soon);
  }

  template <int N, int V = WIDE>
  void weigh_columns(int64_t first, const Number* values, int64_t n, NextLines& soon,
                     int64_t d = 0) {
    for (; d + V * LANES <= dim; d += V * LANES) weigh_tile<N, V>(first, values, n, soon, d);
    if constexpr (V > 1)
      weigh_columns<N, V / 2>(first, values, n, soon, d);
    else if (d < dim)
      weigh_tile<N, 1>(first, values, n, soon, d);
  }

  template <int N, int V>
  void weigh_tile(int64_t first, const Number* values, int64_t n, NextLines& soon, int64_t d) {
    const float* own = weights.data() + first * KEYS;
    float* out = total.data() + first * width + d;
    const int64_t wide = V > 1 ? V * LANES : dim - d;  // below LANES only at the last dimensions
    Floats sums[N][V];
#pragma GCC unroll 6
    for (int i = 0; i < N; i++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sums[i][v] = load(out + i * width + v * LANES);
    const int64_t lines = soon.share(n);
    values += d;
    for (int64_t j = 0; j < n; j++, values += dim) {
      soon.fetch(lines);
      Floats value[V];
      for (int v = 0; v < V; v++) value[v] = load(values + v * LANES, wide - v * LANES);
#pragma GCC unroll 6
      for (int i = 0; i < N; i++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sums[i][v] += own[i * KEYS + j] * value[v];
    }
#pragma GCC unroll 6
    for (int i = 0; i < N; i++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) store(out + i * width + v * LANES, sums[i][v]);
  }
};
