// y = x Wᵀ + b for a frozen, packed W, and what the adapters of the rows add to it.
#pragma once
#include <omp.h>

#include <atomic>
#include <memory>
#include <type_traits>

#include "lora.h"

#if defined(MATRIX)
constexpr int64_t FIRST_CACHE = 48 << 10, SPAN_BYTES = 512 << 10;  // the second cache has 2 MB
#else
#if defined(__AVX512F__)
constexpr int TILE = 12;  // rows of x at once: 24 of 32 registers are sums
#else
constexpr int TILE = 2;
#endif
constexpr int64_t BLOCK = TILE;
#endif

constexpr int64_t SPREAD = 8;  // tiles of a panel that fetch; those behind them multiply only
constexpr int64_t LATE = 48;   // panels beside which A's are fetched; before, they would be lost again

// A linear of one layer and what its rows wear on it.
struct Dressed {
  Panels w;
  const Lora* lora = nullptr;
  int64_t layer = 0;

  int64_t waiting() const { return lora ? lora->waiting() : 0; }  // rows

  // Neighbouring panels, so many at once, or what is left of them.
  Span span(int64_t number, int64_t size) const {
    return {std::min(number * size, w.count), std::min((number + 1) * size, w.count)};
  }
};

// What a thread fetches while it multiplies, so that memory and multipliers are busy at the same
// time: its next panels and the B's for these, then, beside the last panels, the A's that it reads
// before the next linear; adapters' only as far as `Lora` wants them early.
// It is spread evenly over tiles: in one go it would stop the multipliers.
class Ahead {
 public:
  Ahead(const Dressed& own, const Dressed& after)
      : own(own), after(after), a(omp_get_thread_num()), threads(omp_get_num_threads()),
        share(after.lora ? after.lora->a_bytes() / CHUNK_BYTES / std::min(LATE, own.w.count) + 1 : 0),
        late_from(own.w.count - LATE) {}

  // The next panels are these of `next`; before them so many are computed, of so many rows.
  void begin(const Dressed& next, const Span& panels, int64_t before, int64_t rows) {
    soon.clear(), left = 0, begun = 0, at = end = nullptr;
    tiles = before * std::min(SPREAD, (rows + BLOCK - 1) / BLOCK);
    add({(const char*)next.w.at(panels.first), panels.size() * next.w.bytes()});
    if (next.lora && Lora::early())
      for (int64_t panel = panels.first; panel < panels.end; panel++)
        next.lora->each_b(next.layer, panel, [&](const Piece& piece) { add(piece); });
    if (after.lora && Lora::early() && (&next != &own || panels.first >= late_from))
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

#if defined(MATRIX)
  // Fetch the next chunk if it is due: two lines from each of several places in turn.
  void fetch_due() {
    owed += rate;
    if (owed < ONE) return;
    owed -= ONE;
    if (at == end) {
      at = soon[begun].first;
      apart = chunks(soon[begun++]) * PAIR;
      end = at + apart;
    }
    for (const char* place = at; place < at + CHUNK * apart; place += apart)
      for (int64_t line = 0; line < PAIR; line += LINE) __builtin_prefetch(place + line, 0, 2);
    at += PAIR;
  }
#else
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
#endif

 private:
  static constexpr int64_t ONE = 1 << 16;
  const Dressed &own, &after;
  std::vector<Piece> soon;                   // what to fetch, of which some are begun
  const char *at = nullptr, *end = nullptr;  // what is left of the last one of those
  int64_t apart = 0;                         // bytes between the places it is fetched from
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
  // How many panels a thread computes at once. Several where rows are alone with their adapters:
  // B's of these are read in longer pieces when all panels are multiplied. And several of many
  // rows, where x of a block stays in the first cache while it meets them.
  static int64_t span_size(const Dressed& linear, int64_t rows) {
    const int64_t inputs = linear.w.steps * STEP;
    const bool stays = BLOCK * inputs * (int64_t)sizeof(Number) <= FIRST_CACHE;
    const bool several = linear.waiting() > 0 || (rows > BLOCK && stays);
    if (!several) return 1;
    const int64_t most = std::clamp<int64_t>(SPAN_BYTES / std::max(LINE, linear.w.bytes()), 1, 8);
    return std::clamp<int64_t>(linear.w.count / (3 * omp_get_num_threads()), 1, most);
  }

  // `sums`: space for those of the rows that wait, of the panels.
  void compute(int64_t rows, const Span& panels, Ahead& ahead, float* sums) const {
    const Sums block(block_height(rows));
    const Flushing flushing;
    const int64_t apart = panels.size() * PANEL;
    for (int64_t number = 0, row = 0; row < rows; number++, row += block.rows) {
      const int64_t first = std::min(row, rows - block.rows);
      const int64_t waits_at = own.lora ? own.lora->waits_at(number) : -1;
      for (int64_t panel = panels.first; panel < panels.end; panel++) {
        block.clear();
        multiply(block, first, panel, ahead);
        if (own.lora) own.lora->expand(block, own.layer, number, panel);
        if (waits_at >= 0) {
          block.store(sums + waits_at * apart + (panel - panels.first) * PANEL, apart);
          continue;
        }
        alignas(LINE) float own_sums[BLOCK * PANEL];
        block.store(own_sums, PANEL);
        for (int64_t i = row; i < first + block.rows; i++)
          finish(i, panel, own_sums + (i - first) * PANEL);
      }
    }
    if (own.waiting()) finish_waiting(rows, panels, sums);
  }

  void finish_waiting(int64_t rows, const Span& panels, float* sums) const {
    const int64_t apart = panels.size() * PANEL, high = block_height(rows);
    own.lora->expand_alone(sums, apart, own.layer, panels);
    for (int64_t number = 0, row = 0; row < rows; number++, row += high) {
      const int64_t waits_at = own.lora->waits_at(number), first = std::min(row, rows - high);
      for (int64_t i = row; waits_at >= 0 && i < first + high; i++)
        for (int64_t panel = panels.first; panel < panels.end; panel++)
          finish(i, panel, sums + (waits_at + i - first) * apart + (panel - panels.first) * PANEL);
    }
  }

  void finish(int64_t row, int64_t panel, const float* sums) const {
    Floats totals[1][COLUMNS];
    for (int c = 0; c < COLUMNS; c++) totals[0][c] = load(sums + c * LANES);
    finish(row, panel, totals);
  }

  // What comes next is fetched between products, which is a fifth faster than before them. What is
  // to be written is made the thread's own meanwhile.
  void multiply(const Sums& block, int64_t row, int64_t panel, Ahead& ahead) const {
    const int64_t times = own.w.steps / SIDE, calls = 2 * times;
    const int64_t wanted = ahead.portion(), streams = calls ? (wanted + calls - 1) / calls : 0;
    ahead.spread(wanted, streams * calls);
    const int64_t some = times ? (block.rows + times - 1) / times : 0;
    const Number* out = y + row * y_stride + panel * PANEL;
    const auto fetch = [&]() __attribute__((always_inline)) {
      for (int64_t j = 0; j < streams; j++) ahead.fetch_due();
    };
    const auto each = [&](const auto& rest) __attribute__((always_inline)) {
      const Number *from = x + row * x_stride, *weights = own.w.at(panel);
      int64_t left = block.rows;
      for (int64_t i = 0; i < times; i++, from += DEEP, weights += SIDE * PANEL * STEP) {
        block.take(weights);
        block.add_upper(from, x_stride, fetch);
        rest(from);
        for (int64_t j = std::min(some, left); j > 0; j--, left--, out += y_stride)
          fetch_to_write(out);
      }
    };
    if (block.rows == block.upper)
      each([&](const Number*) __attribute__((always_inline)) { fetch(); });
    else
      each([&](const Number* from)
               __attribute__((always_inline)) { block.add_lower(from, x_stride, fetch); });
    if (times * SIDE < own.w.steps) multiply_rest(block, row, panel, times * SIDE);
  }

  // The steps from this one on, fewer than a register has.
  __attribute__((noinline)) void multiply_rest(const Sums& block, int64_t row, int64_t panel,
                                               int64_t from) const {
    alignas(LINE) Number last[BLOCK * DEEP] = {}, weights[SIDE * PANEL * STEP] = {};
    const int64_t left = (own.w.steps - from) * STEP;
    for (int64_t i = 0; i < block.rows; i++)
      std::copy_n(x + (row + i) * x_stride + from * STEP, left, last + i * DEEP);
    std::copy_n(own.w.at(panel) + from * PANEL * STEP, left * PANEL, weights);
    written(last);
    written(weights);
    block.take(weights);
    block.add_upper(last, DEEP);
    if (block.rows > block.upper) block.add_lower(last, DEEP);
  }

  static void shape_registers(int64_t rows) { Sums(block_height(rows)).shape(); }
#else
  static int64_t span_size(const Dressed&, int64_t) { return 1; }
  static void shape_registers(int64_t) {}

  // As few tiles as there can be, of even heights: one of a single row waits for its weights.
  void compute(int64_t rows, const Span& panels, Ahead& ahead, float*) const {
    for (int64_t row = 0, left = (rows + TILE - 1) / TILE; left > 0; left--) {
      const int64_t height = (rows - row + left - 1) / left;
      sized(height, [&](auto n) { fetching_tile<n>(row, panels.first, ahead); });
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

  // Beside each chunk of weights STREAMS others are fetched.
  template <int N, int STREAMS>
  void tile(int64_t row, int64_t panel, Ahead& ahead) const {
    const Number* weights = own.w.at(panel);
    Rows<N> rows(x + row * x_stride, x_stride);
    Floats totals[N][COLUMNS] = {};
    for (int64_t left = own.w.steps; left > 0; left -= CHUNK) {
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
    if (own.lora) own.lora->expand(own.layer, row, panel, totals);
    finish(row, panel, totals);
  }

  // Call `use` with `height`, which is at most TILE, as a constant.
  template <int N = TILE, class Use>
  static void sized(int64_t height, const Use& use) {
    if constexpr (N > 1)
      if (height < N) return sized<N - 1>(height, use);
    use(std::integral_constant<int, N>());
  }
#endif

  // Called by every thread of a parallel region, with a count that all share and that begins at 0.
  // A thread takes its next span before it computes one, and fetches it in the meantime; beside its
  // last one it fetches one of `after`.
  void run(int64_t rows, std::atomic<int64_t>& taken, const Dressed& after = {}) const {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    if (rows == 0) return;
    Ahead ahead(own, after);
    shape_registers(rows);
    const int64_t size = span_size(own, rows);
    const std::unique_ptr<Floats[]> sums(new Floats[own.waiting() * size * COLUMNS]);
    for (Span panels = own.span(thread, size), next; panels.size(); panels = next) {
      next = own.span(threads + taken.fetch_add(1, std::memory_order_relaxed), size);
      if (next.size())
        ahead.begin(own, next, panels.size(), rows);
      else
        ahead.begin(after, after.span(thread, span_size(after, rows)), panels.size(), rows);
      compute(rows, panels, ahead, (float*)sums.get());
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
