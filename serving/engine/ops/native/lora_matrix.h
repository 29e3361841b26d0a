// B(A(x)) where the processor multiplies matrices (matrix.h). B's of one row are multiplied with
// zeros for another: all that are worn must be finite, as `write_adapter` sees to. A rank divides
// DEEP or is a multiple of it, so that sums run in the same order beside any others.
#pragma once
#include <omp.h>

#include "lora_plan.h"
#include "matrix.h"

static_assert(ROWS <= SIDE && NARROW <= SIDE, "a task of A(x) is one register");

class Lora : public LoraPlan {
 public:
  // Whether A's and B's are fetched beside the linear before and the panels before: not here, what
  // multiplies with them does it.
  static constexpr bool early() { return false; }

  Lora(const Group& group, const Stack* stacks, const Run* runs, int64_t count, int64_t rows)
      : LoraPlan(group, stacks, runs, count, rows), places(rows) {
    place_rows();
  }

  // Compute A(x) of one layer, x [rows, inputs]. Called by every thread of a parallel region. The A
  // of a thread's next task is fetched beside each.
  void shrink(int64_t layer, const Number* x, int64_t x_stride) {
    const size_t threads = omp_get_num_threads();
#pragma omp for schedule(static, 1)
    for (size_t i = 0; i < tasks.size(); i++) {
      const Piece soon = i + threads < tasks.size() ? a_piece(layer, i + threads) : Piece{};
      shrink(tasks[i], soon, layer, x, x_stride);
    }
  }

  // Add B(A(x)) of the rows of block `number` to its sums of one panel.
  void expand(const Sums& sums, int64_t layer, int64_t number, int64_t panel) const {
    const Block& block = blocks[number];
    for (int64_t part = 0; part < parts; part++)
      if (panels[part].has(panel))
        for (int64_t i = 0; i < block.deep(); i++) expand(sums, layer, block, panel, part, i);
  }

  // Of blocks in which rows are alone with their adapters all sums wait for what these add: how many
  // rows that are, and which of them is the first of block `number`, or -1.
  int64_t waiting() const { return waiting_rows; }
  int64_t waits_at(int64_t number) const { return blocks[number].waits_at; }

  // Add B(A(x)) of the rows that are alone to `sums` of all that wait, with `apart` between rows: by
  // hand what the registers do, to the same bits. They would take as long as for 16 rows.
  void expand_alone(float* sums, int64_t apart, int64_t layer, const Span& all) const {
    for (int64_t part = 0; part < parts; part++) {
      const Span own{std::max(all.first, panels[part].first), std::min(all.end, panels[part].end)};
      for (size_t i = 0; own.size() > 0 && i < alone.size(); i++)
        expand_row(i, layer, part, own,
                   sums + alone[i].waits_at * apart + (own.first - all.first) * PANEL);
    }
  }

 private:
  struct alignas(LINE) Line {  // of a register
    Number numbers[DEEP] = {};
  };
  struct Use {  // of a block: what one adapter adds to some of its rows
    size_t worn;
    int64_t first, last;  // of the rows, counted from the block's first
    int64_t from = 0, end = 0;  // of its numbers among all that A(x) has of the block's adapters
  };
  struct Alone {  // a row of a block whose neighbours wear something else
    size_t worn;
    int64_t row, waits_at;  // of all rows, and of those that wait
    int64_t line = 0;    // its first of A(x)
  };
  // A(x) of a block is [parts, deep, rows of a block] lines: each adapter has numbers of its own, which
  // are zero in other rows, so that all of it can be multiplied with all B's at once. A row that is
  // alone with its adapter has [parts, deep] lines elsewhere.
  struct Block {
    int64_t line = 0;  // its first
    std::vector<Use> uses;
    int64_t waits_at = -1;
    int64_t deep() const { return uses.empty() ? 0 : (uses.back().end + DEEP - 1) / DEEP; }
  };
  // Of a row: its first line, how many are of one part and how far they are apart, and which of
  // their numbers is its adapter's first.
  struct Place {
    int64_t line = 0, deep = 0, apart = 0, from = 0;
  };

  int64_t high = 0;  // rows of a block
  int64_t waiting_rows = 0;
  std::vector<Alone> alone;
  std::vector<Block> blocks;
  std::vector<Line> narrow;  // A(x)
  std::vector<Place> places;

  void place_rows() {
    if (rows == 0) return;
    high = block_height(rows);
    blocks.resize((rows + high - 1) / high);
    for (size_t i = 0; i < worn.size(); i++)
      for (int64_t row = worn[i].run->start, stop; row < worn[i].run->stop; row = stop) {
        const int64_t number = row / high, first = row - first_row(number);
        stop = std::min(worn[i].run->stop, (number + 1) * high);
        add_use(number, {i, first, first + stop - row - 1});
      }
    int64_t line = 0;
    for (size_t number = 0; number < blocks.size(); number++) {
      Block& block = blocks[number];
      block.line = line;
      line += parts * block.deep() * high;
      for (const Use& use : block.uses)
        for (int64_t row = use.first; row <= use.last; row++)
          places[first_row(number) + row] = {block.line + row, block.deep(), high, use.from};
    }
    for (Alone& each : alone) {
      each.line = line;
      line += parts * lines_of(worn[each.worn]);
      places[each.row] = {each.line, lines_of(worn[each.worn]), 1, 0};
    }
    narrow.resize(line);
  }

  void add_use(int64_t number, Use use) {
    Block& block = blocks[number];
    if (use.first == use.last) {
      if (block.waits_at < 0) block.waits_at = waiting_rows, waiting_rows += high;
      return alone.push_back({use.worn, first_row(number) + use.first, block.waits_at + use.first});
    }
    const int64_t rank = worn[use.worn].stack->rank, whole = std::min(rank, DEEP);
    const int64_t before = block.uses.empty() ? 0 : block.uses.back().end;
    use.from = (before + whole - 1) / whole * whole;  // never in more lines than need be
    use.end = use.from + rank;
    block.uses.push_back(use);
  }

  static int64_t lines_of(const Worn& own) { return (own.stack->rank + DEEP - 1) / DEEP; }

  int64_t first_row(int64_t block) const { return std::min(block * high, rows - high); }

  // Where number `rank` of A(x) of a row is, of all parts; EIGHT are side by side.
  Number* narrow_at(const Worn& own, int64_t row, int64_t rank) {
    const Place& place = places[row];
    const int64_t part = rank / own.stack->rank, at = place.from + rank % own.stack->rank;
    return narrow[place.line + (part * place.deep + at / DEEP) * place.apart].numbers + at % DEEP;
  }

  // What line number `deep` of the rows of a block adds.
  void expand(const Sums& sums, int64_t layer, const Block& block, int64_t panel, int64_t part,
              int64_t deep) const {
    const int64_t begin = deep * DEEP, end = begin + DEEP;
    alignas(LINE) Number mixed[DEEP * PANEL];  // B's that do not fill a register by themselves
    const Number* weights = mixed;
    int64_t filled = 0;
    bool upper = false, lower = false;
    for (const Use& use : block.uses) {
      const int64_t from = std::max(begin, use.from), to = std::min(end, use.end);
      if (from >= to) continue;
      upper |= use.first < sums.upper, lower |= use.last >= sums.upper;
      const Number* own = b(worn[use.worn], layer, part, panel) + (from - use.from) * PANEL;
      if (to - from == DEEP) {
        weights = own;
        break;
      }
      Number* there = mixed + (from - begin) * PANEL;
      clear(mixed + filled, there);
      for (int64_t i = 0; i < (to - from) * PANEL; i += LANES * STEP)
        put(there + i, lanes(own + i));
      filled = (to - begin) * PANEL;
    }
    if (weights == mixed) clear(mixed + filled, mixed + DEEP * PANEL);
    const Line* lines = &narrow[block.line + (part * block.deep() + deep) * high];
    written(mixed);
    sums.take(weights);
    written(mixed);
    if (upper) sums.add_upper(lines->numbers, DEEP);
    if (lower) sums.add_lower(lines->numbers, DEEP);
  }

  // Add B(A(x)) of the i-th row that is alone to its sums of these panels of a part. Rows come in
  // groups of PLACES; beside each, a quarter of every B of the next group is fetched, in turn.
  void expand_row(size_t i, int64_t layer, int64_t part, const Span& own, float* sums) const {
    const Worn& wears = worn[alone[i].worn];
    const int64_t rank = wears.stack->rank, size = rank * PANEL;
    const size_t quarter = i % PLACES, next_group = i - quarter + PLACES;
    const Number* soon[PLACES];
    for (size_t j = 0; j < PLACES; j++) {
      const Worn& next = worn[alone[std::min(next_group + j, alone.size() - 1)].worn];
      const int64_t numbers = own.size() * next.stack->rank * PANEL;
      soon[j] = b(next, layer, part, own.first) + quarter * numbers / PLACES;
    }
    const Number* weights = b(wears, layer, part, own.first);
    const Number* numbers = narrow[alone[i].line + part * lines_of(wears)].numbers;
    for (int64_t panel = 0; panel < own.size(); panel++, weights += size, sums += PANEL)
      add_product(weights, numbers, rank, soon, sums);
  }

  // sums [PANEL] += B · numbers of one panel.
  static void add_product(const Number* weights, const Number* numbers, int64_t rank,
                          const Number* (&soon)[PLACES], float* sums) {
    constexpr int STEPS = PLACES / COLUMNS;  // a rank is a multiple of their numbers
    Floats total[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) total[c] = load(sums + c * LANES);
    for (int64_t left = rank; left > 0; left -= DEEP) {
      Floats even[COLUMNS] = {}, odd[COLUMNS] = {};
      for (int64_t k = std::min(left, DEEP); k > 0; k -= STEPS * STEP)
#pragma GCC unroll 4
        for (int i = 0; i < STEPS * COLUMNS; i++, weights += LANES * STEP) {
          __builtin_prefetch(soon[i], 0, 2);
          soon[i] += LANES * STEP;
          const int c = i % COLUMNS;
          const Words own = lanes(weights), input = broadcast(numbers);
          even[c] = fused((Floats)(own << 16), (Floats)(input << 16), even[c]);
          odd[c] = fused((Floats)(own & HIGH), (Floats)(input & HIGH), odd[c]);
          if (c == COLUMNS - 1) numbers += STEP;
        }
      for (int c = 0; c < COLUMNS; c++) total[c] += even[c] + odd[c];
    }
    for (int c = 0; c < COLUMNS; c++) store(sums + c * LANES, total[c]);
  }

  static constexpr uint32_t HIGH = 0xffff0000u;
  static Floats fused(Floats a, Floats b, Floats c) {
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  }

  static void put(Number* to, Words words) { memcpy((void*)to, &words, sizeof words); }
  static void clear(Number* from, const Number* to) {
    for (; from < to; from += LANES * STEP) put(from, Words{});
  }

  // Aᵀ is not needed: it is A xᵀ that is computed, with x as the weights.
  void shrink(const Task& task, const Piece& soon, int64_t layer, const Number* x,
              int64_t x_stride) {
    const Worn& own = worn[task.worn];
    const int64_t count = std::min<int64_t>(NARROW, parts * own.stack->rank - task.from);
    const Number* a = own.stack->a.of(layer, own.run->slot) + task.from * group.inputs;
    x += task.row * x_stride;
    Shapes shapes;
    for (int i : {0, 1}) shapes.set(i, count, task.rows * sizeof(float));
    shapes.set(4, count, LINE);
    shapes.set(6, SIDE, task.rows * sizeof(float));
    shapes.use();
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t i = 0; i < group.inputs; i += 2 * DEEP) {
      fetch(soon, i);
      load_both(a + i, count, x + i, task.rows, x_stride, group.inputs - i);
      _tile_dpbf16ps(0, 4, 6);
      if (i + DEEP >= group.inputs) break;
      fetch(soon, i + DEEP);
      load_both(a + i + DEEP, count, x + i + DEEP, task.rows, x_stride, group.inputs - i - DEEP);
      _tile_dpbf16ps(1, 4, 6);
    }
    alignas(LINE) float even[SIDE][LANES], odd[SIDE][LANES];
    const int64_t apart = task.rows == 1 ? sizeof(float) : LINE;  // one row of x is one vector
    _tile_stored(0, even, apart);
    _tile_stored(1, odd, apart);
    Words sums[LANES] = {};
    for (int64_t k = 0; k < (task.rows == 1 ? 1 : count); k++)
      sums[k] = (Words)(load(even[k]) + load(odd[k]));
    if (task.rows > 1) transpose(sums);
    for (int64_t row = 0; row < task.rows; row++) {
      Number rounded[LANES];
      store(rounded, (Floats)sums[row]);
      for (int64_t k = 0; k < count; k += EIGHT)
        memcpy(narrow_at(own, task.row + row, task.from + k), rounded + k, EIGHT * sizeof(Number));
    }
  }

  // Fetch the part of a piece of A that goes with numbers `from` to `from` + DEEP of x: as many
  // lines as it has rows, from each of its quarters in turn.
  void fetch(const Piece& piece, int64_t from) const {
    const int64_t quarter = piece.bytes / PLACES;
    const int64_t lines = quarter / (group.inputs * (int64_t)sizeof(Number));
    const char* here = piece.first + from / DEEP * lines * LINE;
    for (int64_t place = 0; place < PLACES; place++, here += quarter)
      for (int64_t line = 0; line < lines; line++) __builtin_prefetch(here + line * LINE, 0, 2);
  }

  // DEEP numbers of some rows of A and of x, or the last ones, into registers 4 and 6.
  void load_both(const Number* a, int64_t count, const Number* x, int64_t x_rows, int64_t x_stride,
                 int64_t left) const {
    alignas(LINE) Number last[SIDE][DEEP];
    Words own[LANES];
    if (left >= DEEP) {
      _tile_loadd(4, a, group.inputs * sizeof(Number));
    } else {
      for (int64_t i = 0; i < count; i++) {
        const Words some = lanes(a + i * group.inputs, left);
        memcpy((void*)last[i], &some, LINE);
      }
      written(last);
      _tile_loadd(4, last, LINE);
      written(last);
    }
    if (x_rows == 1 && left >= DEEP) {  // words of one row are 16 rows of one word
      _tile_loadd(6, x, STEP * sizeof(Number));
      return;
    }
    for (int64_t i = 0; i < x_rows; i++) own[i] = lanes(x + i * x_stride, left);
    for (int64_t i = x_rows; i < LANES; i++) own[i] = Words{};
    transpose(own);
    written(own);
    _tile_loadd(6, own, LINE);
    written(own);
  }
};
