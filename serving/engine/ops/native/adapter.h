// A and B as a file has them → as the operators read them: A row by row, B in panels (panel.h).
#pragma once
#include "panel.h"

constexpr int64_t MOST_RANK = 256;  // slots.py has no bucket above

struct fp16 {
  uint16_t bits;
};
inline Floats load(const fp16* p) {
  Halves half;
  memcpy(&half, p, sizeof half);
  const Words wide = __builtin_convertvector(half, Words), size = wide & 0x7fff;
  // As bits of a float it is 2^112 too small, subnormal or not; infinities and NaNs stay such.
  const Floats value = (Floats)(size << 13) * 0x1p112f;
  const Words bits = size < 0x7c00u ? (Words)value : (size << 13) | 0x7f800000u;
  return (Floats)(bits | (wide & 0x8000u) << 16);
}

// `zeros` stays zero while all numbers that were written are finite.
template <class Stored>
void convert(const Stored* from, int64_t count, float scale, Number* to, Floats& zeros) {
  for (; count > 0; count -= LANES, from += LANES, to += LANES) {
    const bool whole = count >= LANES;
    Stored last[LANES] = {};
    if (!whole) memcpy(last, from, count * sizeof(Stored));
    Number rounded[LANES];
    store(rounded, load(whole ? from : last) * scale);
    zeros += load(rounded) * 0.0f;
    memcpy(to, rounded, (whole ? LANES : count) * sizeof(Number));
  }
}

// One tensor [rows, columns] of a file.
struct FileTensor {
  int64_t start, format;  // its first byte in the file; 0: float32, 1: bfloat16, 2: float16
  int64_t rows, columns, to;  // and its first number in the adapter
  int64_t rank;   // of the bucket: above its own all is zero
  int64_t first;  // of a B: outputs of its first panel that are the part's before; -1 for an A
  float scale;

  // Tell whether all numbers are finite.
  bool write(const uint8_t* file, Number* adapter) const {
    const uint8_t* here = file + start;
    if (format == 0) return write((const float*)here, adapter + to);
    if (format == 1) return write((const bf16*)here, adapter + to);
    return write((const fp16*)here, adapter + to);
  }

 private:
  template <class Stored>
  bool write(const Stored* here, Number* there) const {
    Floats zeros = {};
    if (first < 0) {
      convert(here, rows * columns, scale, there, zeros);
      memset((void*)(there + rows * columns), 0, (rank - rows) * columns * sizeof(Number));
    } else {
      for (int64_t row = -first; row < rows; row += PANEL, there += rank * PANEL)
        panel(here, row, there, zeros);
    }
    return sum(zeros) == 0;
  }

  // The panel whose first output is `row`. First rounded, then every word goes to its place.
  template <class Stored>
  void panel(const Stored* here, int64_t row, Number* there, Floats& zeros) const {
    Number own[PANEL * MOST_RANK];
    const int64_t begin = std::max<int64_t>(row, 0), end = std::min(row + PANEL, rows);
    Number* place = own + (begin - row) * rank;
    if (end - begin < PANEL || columns < rank) memset((void*)own, 0, PANEL * rank * sizeof *own);
    if (columns == rank)
      convert(here + begin * columns, (end - begin) * columns, scale, place, zeros);
    else
      for (int64_t i = begin; i < end; i++, place += rank)
        convert(here + i * columns, columns, scale, place, zeros);
    for (int64_t step = 0; step < rank; step += STEP)
      for (int64_t i = 0; i < PANEL; i++, there += STEP)
        memcpy(there, own + i * rank + step, STEP * sizeof(Number));
  }
};
