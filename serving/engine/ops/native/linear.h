// y = x Wᵀ + b for a frozen, packed W, and what the adapters of the rows add to it.
#pragma once
#include <omp.h>

#include <atomic>
#include <type_traits>

#include "lora.h"

#if defined(__AVX512F__)
constexpr int TILE = 12;  // rows of x at once: 24 of 32 registers are sums
#else
constexpr int TILE = 2;
#endif
#if !defined(MATRIX)
constexpr int64_t BLOCK = TILE;
#endif

constexpr int64_t SPREAD = 8;  // tiles that fetch; those behind them multiply only
constexpr int64_t LATE = 48;   // panels beside which A's are fetched; before, they would be lost again

// A linear of one layer and what its rows wear on it.
struct Dressed {
  Panels w;
  const Lora* lora = nullptr;
  int64_t layer = 0;
};

// What a thread fetches while it multiplies, so that memory and multipliers are busy at the same
// time: its next panel and the B's for that, then, beside the last panels, the A's that it reads
// before the next linear; adapters' only as far as `Lora` wants them early.
// It is spread evenly over the tiles of a panel: in one go it would stop the multipliers.
class Ahead {
 public:
  Ahead(const Dressed& own, const Dressed& after)
      : own(own), after(after), a(omp_get_thread_num()), threads(omp_get_num_threads()),
        share(after.lora ? after.lora->a_bytes() / CHUNK_BYTES / std::min(LATE, own.w.count) + 1 : 0),
        late_from(own.w.count - LATE) {}

  // The next panel is this one of `next`, or null; so many rows are computed before it.
  void begin(const Dressed* next, int64_t panel, int64_t rows) {
    soon.clear(), left = 0, begun = 0, at = end = nullptr;
    tiles = std::min(SPREAD, (rows + BLOCK - 1) / BLOCK);
    if (next) add({(const char*)next->w.at(panel), next->w.bytes()});
    if (next && next->lora && Lora::b_early(rows))
      next->lora->each_b(next->layer, panel, [&](const Piece& piece) { add(piece); });
    if (after.lora && Lora::a_early() && (next != &own || panel >= late_from))
      for (int64_t due = share; due > 0 && a < after.lora->a_pieces(); a += threads) {
        const Piece piece = after.lora->a_piece(after.layer, a);
        add(piece);
        due -= piece.bytes / CHUNK_BYTES;
      }
  }

  // How many chunks to fetch beside the next tile.
  int64_t portion() {
    const int64_t own = tiles ? (left + tiles - 1) / tiles : 0;
    tiles -= tiles > 0;
    return own;
  }

  // Let so many of the `calls` of `next` that follow give something to fetch, spread evenly.
  void spread(int64_t wanted, int64_t calls) {
    wanted = std::min(wanted, calls);
    left -= wanted;
    rate = wanted ? wanted * ONE / calls : 0;  // a LoRA alone has no weights, and no calls
    owed = ONE - 1;
  }

  // Where the next chunk to fetch begins, or `here`, which is fetched already.
  const char* next(const char* here) {
    owed += rate;
    if (owed < ONE) return here;
    owed -= ONE;
    if (at == end) {
      at = soon[begun].first;
      end = at + chunks(soon[begun++]) * CHUNK_BYTES;
    }
    const char* chunk = at;
    at += CHUNK_BYTES;
    return chunk;
  }

 private:
  static constexpr int64_t ONE = 1 << 16;
  const Dressed &own, &after;
  std::vector<Piece> soon;                   // what to fetch, of which some are begun
  const char *at = nullptr, *end = nullptr;  // what is left of the last one of those
  size_t begun = 0, a;                       // a: the next piece of A
  const size_t threads;
  const int64_t share, late_from;
  int64_t left = 0, tiles = 0;  // chunks, and tiles beside which they are fetched
  int64_t rate = 0, owed = 0;   // chunks for each call of `next`, in parts of ONE

  void add(const Piece& piece) {
    if (piece.bytes == 0) return;
    soon.push_back(piece);
    left += chunks(piece);
  }

  static int64_t chunks(const Piece& piece) {
    return (piece.bytes + CHUNK_BYTES - 1) / CHUNK_BYTES;
  }
};

// x [rows, inputs], y [rows, outputs], bias [outputs] or null; add: y += instead of y =.
struct Product {
  const Number* x;
  const Dressed own;
  const Number* bias;
  Number* y;
  int64_t x_stride, y_stride, outputs;
  bool add;

  // Beside each chunk of weights STREAMS others are fetched. `sums` [N, PANEL] are those of the
  // steps before `from`, or null.
  template <int N, int STREAMS>
  void tile(int64_t row, int64_t panel, Ahead& ahead, int64_t from = 0,
            const float* sums = nullptr) const {
    const Number* weights = own.w.at(panel) + from * PANEL * STEP;
    Rows<N> rows(x + row * x_stride + from * STEP, x_stride);
    Floats totals[N][COLUMNS] = {};
    if (sums)
#pragma GCC unroll 12
      for (int i = 0; i < N; i++)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; c++) totals[i][c] = load(sums + i * PANEL + c * LANES);
    for (int64_t left = own.w.steps - from; left > 0; left -= CHUNK) {
      const char* soon[STREAMS + 1];  // one more than is used: an array cannot be empty
      for (int i = 0; i < STREAMS; i++) soon[i] = ahead.next((const char*)weights);
      for (int64_t k = std::min(CHUNK, left); k > 0; k--, weights += PANEL * STEP) {
        for (int i = 0; i < STREAMS; i++) {
          for (int c = 0; c < COLUMNS; c++) __builtin_prefetch(soon[i] + c * LINE, 0, 2);
          soon[i] += COLUMNS * LINE;
        }
        rows.template step<0>(weights, totals);
      }
    }
#if !defined(MATRIX)
    if (own.lora) own.lora->expand(own.layer, row, panel, totals);
#endif
    finish(row, panel, totals);
  }

  // Indices of `totals` are constants here and in `expand`, or all of it would lie on the stack.
  template <int N>
  __attribute__((always_inline)) void finish(int64_t row, int64_t panel,
                                             Floats (&totals)[N][COLUMNS]) const {
    const int64_t output = panel * PANEL;
    Number* out = y + row * y_stride + output;
    const auto each = [&](const auto& take) __attribute__((always_inline)) {
#pragma GCC unroll 12
      for (int i = 0; i < N; i++)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; c++) take(i, c, totals[i][c]);
    };
    if (output + PANEL > outputs)
      return each([&](int i, int c, Floats t) { finish_part(row + i, output + c * LANES, t); });
    if (bias) each([&](int, int c, Floats& t) { t += load(bias + output + c * LANES); });
    if (add) each([&](int i, int c, Floats& t) { t += load(out + i * y_stride + c * LANES); });
    each([&](int i, int c, Floats t) { store(out + i * y_stride + c * LANES, t); });
  }

  // Of a panel that goes beyond the last output.
  __attribute__((noinline)) void finish_part(int64_t row, int64_t output, Floats total) const {
    const int64_t n = outputs - output;
    if (n <= 0) return;
    Number* out = y + row * y_stride + output;
    if (bias) total += load(bias + output, n);
    if (add) total += load(out, n);
    store(out, total, n);
  }

#if defined(MATRIX)
  void tiles(int64_t rows, int64_t panel, Ahead& ahead) const {
    const Sums block(block_height(rows));
    const Flushing flushing;
    alignas(LINE) float sums[BLOCK * PANEL];
    for (int64_t number = 0, row = 0; row < rows; number++, row += block.rows) {
      const int64_t first = std::min(row, rows - block.rows);
      block.clear();
      multiply(block, first, panel, ahead);
      if (own.lora) own.lora->expand(block, own.layer, number, panel);
      block.store(sums);
      if (own.lora) own.lora->expand_alone(sums, own.layer, number, panel);
      for (int64_t i = row; i < first + block.rows; i += TILE)
        sized(std::min<int64_t>(TILE, first + block.rows - i), [&](auto n) {
          tile<n, 0>(i, panel, ahead, own.w.steps / SIDE * SIDE, sums + (i - first) * PANEL);
        });
    }
  }

  // Of as many steps as registers hold at once.
  void multiply(const Sums& block, int64_t row, int64_t panel, Ahead& ahead) const {
    const int64_t times = own.w.steps / SIDE, calls = times * (SIDE / CHUNK);
    const int64_t wanted = ahead.portion(), streams = calls ? (wanted + calls - 1) / calls : 0;
    ahead.spread(wanted, streams * calls);
    const auto each = [&](const auto& rest) __attribute__((always_inline)) {
      const Number *from = x + row * x_stride, *weights = own.w.at(panel);
      for (int64_t i = 0; i < times; i++, from += DEEP, weights += SIDE * PANEL * STEP) {
        for (int64_t j = 0; j < streams * (SIDE / CHUNK); j++) {
          const char* soon = ahead.next((const char*)weights);
          if (soon == (const char*)weights) continue;
          for (int64_t line = 0; line < CHUNK_BYTES; line += LINE)
            __builtin_prefetch(soon + line, 0, 2);
        }
        block.take(weights);
        block.add_upper(from, x_stride);
        rest(from);
      }
    };
    if (block.rows == block.upper)
      each([](const Number*) {});
    else
      each([&](const Number* from)
               __attribute__((always_inline)) { block.add_lower(from, x_stride); });
  }

  static void shape_registers(int64_t rows) { Sums(block_height(rows)).shape(); }
#else
  static void shape_registers(int64_t) {}

  // As few tiles as there can be, of even heights: one of a single row waits for its weights.
  void tiles(int64_t rows, int64_t panel, Ahead& ahead) const {
    for (int64_t row = 0, left = (rows + TILE - 1) / TILE; left > 0; left--) {
      const int64_t height = (rows - row + left - 1) / left;
      sized(height, [&](auto n) { fetching_tile<n>(row, panel, ahead); });
      row += height;
    }
  }

  template <int N>
  void fetching_tile(int64_t row, int64_t panel, Ahead& ahead) const {
    const int64_t wanted = ahead.portion();
    if (wanted == 0) return tile<N, 0>(row, panel, ahead);
    const int64_t chunks = (own.w.steps + CHUNK - 1) / CHUNK;
    const int streams = wanted <= chunks ? 1 : 2;
    ahead.spread(wanted, streams * chunks);
    streams == 1 ? tile<N, 1>(row, panel, ahead) : tile<N, 2>(row, panel, ahead);
  }
#endif

  // Call `use` with `height`, which is at most TILE, as a constant.
  template <int N = TILE, class Use>
  static void sized(int64_t height, const Use& use) {
    if constexpr (N > 1)
      if (height < N) return sized<N - 1>(height, use);
    use(std::integral_constant<int, N>());
  }

  // Called by every thread of a parallel region, with a count that all share and that begins at 0.
  // A thread takes its next panel before it computes one, and fetches it in the meantime; beside its
  // last panel it fetches one of `after`.
  void run(int64_t rows, std::atomic<int64_t>& taken, const Dressed& after = {}) const {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    if (rows == 0) return;
    Ahead ahead(own, after);
    shape_registers(rows);
    for (int64_t panel = thread, next; panel < own.w.count; panel = next) {
      next = threads + taken.fetch_add(1, std::memory_order_relaxed);
      if (next < own.w.count)
        ahead.begin(&own, next, rows);
      else
        ahead.begin(thread < after.w.count ? &after : nullptr, thread, rows);
      tiles(rows, panel, ahead);
    }
#pragma omp barrier
  }
};

// Read one output's weights [inputs] back from the packed form.
inline void unpack(const Number* w, int64_t output, int64_t inputs, Number* to) {
  const Number* own = w + output / PANEL * PANEL * inputs + output % PANEL * STEP;
  for (int64_t k = 0; k < inputs / STEP; k++)
    memcpy(to + k * STEP, own + k * PANEL * STEP, STEP * sizeof(Number));
}
