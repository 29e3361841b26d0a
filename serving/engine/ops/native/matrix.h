// The processor's own product of matrices (AMX), where it has one. A register holds 16 rows of 64
// bytes: of x 32 numbers each, of packed weights (panel.h) 16 steps of 16 outputs, or 16 sums. To
// each sum is added what the even numbers give and what the odd ones give, both summed up from zero
// (TDPBF16PS in Intel's manual of instructions). So numbers that are zero change no bit of it, but
// for a sum of -0.
//
// The compiler does not know that registers read memory: call `written` before they do, and after
// it where the same memory is written again.
#pragma once
#include "panel.h"

#if defined(__AMX_BF16__) && defined(BFLOAT16)
#define MATRIX
constexpr int64_t SIDE = 16;         // rows of a register
constexpr int64_t DEEP = 32;         // numbers in each of them
constexpr int64_t BLOCK = 2 * SIDE;  // rows of x that are multiplied with each weight that is read

inline void written(const void* there) { asm volatile("" ::"r"(there) : "memory"); }

// Fetch a line that this thread writes soon. Every processor with AMX has the instruction.
inline void fetch_to_write(const Number* there) { asm volatile("prefetchw %0" ::"m"(*there)); }

// While there is one of these, this thread takes what is too small for a normal float as zero, as
// the registers do.
class Flushing {
 public:
  Flushing() : before(_mm_getcsr()) { _mm_setcsr(before | FLUSH_TO_ZERO | DENORMALS_ARE_ZERO); }
  ~Flushing() { _mm_setcsr(before); }
  Flushing(const Flushing&) = delete;

 private:
  static constexpr unsigned DENORMALS_ARE_ZERO = 1 << 6, FLUSH_TO_ZERO = 1 << 15;  // of MXCSR
  const unsigned before;
};

// How many rows this thread's registers have, and how many bytes each row of them.
class Shapes {
 public:
  void set(int number, int64_t rows, int64_t bytes) {
    own.rows[number] = rows, own.row_bytes[number] = bytes;
  }
  void use() const {
    written(&own);
    _tile_loadconfig(&own);
  }

 private:
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } own;
};

// All registers whole.
inline void shape_whole() {
  Shapes shapes;
  for (int i = 0; i < 8; i++) shapes.set(i, SIDE, LINE);
  shapes.use();
}

// Sums [rows, PANEL] of rows of x, at most BLOCK, with one panel. They are in registers 0 to 3: 16
// outputs of the upper half of the rows, the other 16, and those of the lower half.
class Sums {
 public:
  const int64_t rows, upper;

  explicit Sums(int64_t rows) : rows(rows), upper(rows > SIDE ? (rows + 1) / 2 : rows) {}

  // Before the first product of so many rows.
  void shape() const {
    Shapes shapes;
    for (int i : {0, 1, 4}) shapes.set(i, upper, LINE);
    for (int i : {2, 3, 5}) shapes.set(i, std::max<int64_t>(1, rows - upper), LINE);  // 0 is none
    for (int i : {6, 7}) shapes.set(i, SIDE, LINE);
    shapes.use();
  }

  void clear() const {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  // Add x Wᵀ of SIDE steps, x [rows, DEEP] with `stride` between rows: take W's, then add one half
  // or both, doing `between` between its two products. W is read past the first cache: x and what is
  // written keep their place there.
  __attribute__((always_inline)) void take(const Number* weights) const {
    _tile_stream_loadd(6, weights, PANEL * STEP * sizeof(Number));
    _tile_stream_loadd(7, weights + LANES * STEP, PANEL * STEP * sizeof(Number));
  }
  template <class Between>
  __attribute__((always_inline)) void add_upper(const Number* x, int64_t stride,
                                                const Between& between) const {
    _tile_loadd(4, x, stride * sizeof(Number));
    _tile_dpbf16ps(0, 4, 6);
    between();
    _tile_dpbf16ps(1, 4, 7);
  }
  template <class Between>
  __attribute__((always_inline)) void add_lower(const Number* x, int64_t stride,
                                                const Between& between) const {
    _tile_loadd(5, x + upper * stride, stride * sizeof(Number));
    _tile_dpbf16ps(2, 5, 6);
    between();
    _tile_dpbf16ps(3, 5, 7);
  }
  void add_upper(const Number* x, int64_t stride) const {
    add_upper(x, stride, [] {});
  }
  void add_lower(const Number* x, int64_t stride) const {
    add_lower(x, stride, [] {});
  }

  // To [rows, PANEL], with `apart` between rows.
  void store(float* to, int64_t apart) const {
    const int64_t line = apart * sizeof(float);
    _tile_stored(0, to, line);
    _tile_stored(1, to + LANES, line);
    if (rows == upper) return;
    _tile_stored(2, to + upper * apart, line);
    _tile_stored(3, to + upper * apart + LANES, line);
  }
};

// As few blocks as there can be, all of one height; the last one may begin in the one before.
inline int64_t block_height(int64_t rows) {
  const int64_t blocks = std::max<int64_t>(1, (rows + BLOCK - 1) / BLOCK);
  return (rows + blocks - 1) / blocks;
}

// Words [16, 16] with rows and columns exchanged.
inline void transpose(Words (&v)[LANES]) {
  constexpr Ints low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
#pragma GCC unroll 4
  for (int round = 0; round < 4; round++) {
    Words before[LANES];
    memcpy(before, v, sizeof v);
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      v[2 * i] = __builtin_shuffle(before[i], before[i + LANES / 2], low);
      v[2 * i + 1] = __builtin_shuffle(before[i], before[i + LANES / 2], low + 8);
    }
  }
}
#endif
