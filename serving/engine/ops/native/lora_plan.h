// Which adapters rows wear on a group of linears, and in which pieces their A's and B's are read.
#pragma once
#include <vector>

#include "panel.h"

constexpr int64_t MOST_PARTS = 3;
constexpr int64_t ROWS = 16;  // of x in one task
constexpr int NARROW = 16;    // rows of A in one task
constexpr int EIGHT = 8;      // every rank bucket is a multiple of it

// Matrices [layers, slots, …]; the strides say how far apart those of two layers and two slots are.
struct Half {
  const Number* first;
  int64_t layer, slot;
  const Number* of(int64_t l, int64_t s) const { return first + l * layer + s * slot; }
};
// One bucket: a of [parts · rank, inputs], b of each part [panels, rank / step, 32, step]. The panels
// of a part are those of the group that it lies in; outputs of another part are zero in them.
struct Stack {
  int64_t rank;
  Half a, b[MOST_PARTS];
};
// Rows start..stop of x wear the adapter in `slot` of stack number `stack`.
struct Run {
  int64_t start, stop, stack, slot;
};
// A fused group of linears: what they read and what each of them gives.
struct Group {
  int64_t inputs, parts, outputs[MOST_PARTS];

  int64_t width() const { return outputs[0] + outputs[1] + outputs[2]; }
};
// Memory that is read soon.
struct Piece {
  const char* first = nullptr;
  int64_t bytes = 0;
};

// What a step adds to one group of linears; the same tasks for every layer.
class LoraPlan {
 public:
  // The runs are of so many rows.
  LoraPlan(const Group& group, const Stack* stacks, const Run* runs, int64_t count, int64_t rows)
      : group(group), parts(group.parts), rows(rows) {
    int64_t output = 0;
    for (const Run* run = runs; run < runs + count; run++) {
      const Stack* stack = stacks + run->stack;
      worn.push_back({run, stack});
      for (int64_t row = run->start; row < run->stop; row += ROWS)
        for (int64_t from = 0; from < parts * stack->rank; from += NARROW)
          tasks.push_back({worn.size() - 1, row, std::min(ROWS, run->stop - row), from});
      a_size += parts * stack->rank * group.inputs * sizeof(Number);
    }
    for (int64_t part = 0; part < parts; part++) {
      panels[part].first = output / PANEL;
      output += group.outputs[part];
      panels[part].end = (output + PANEL - 1) / PANEL;
    }
  }

  // Memory of A that thread i % threads reads in `shrink`.
  Piece a_piece(int64_t layer, size_t i) const {
    const Task& task = tasks[i];
    const Worn& own = worn[task.worn];
    if (task.row > own.run->start) return {};  // the same as that of an earlier task
    const int64_t count = std::min<int64_t>(NARROW, parts * own.stack->rank - task.from);
    return piece(own.stack->a.of(layer, own.run->slot) + task.from * group.inputs,
                 count * group.inputs);
  }
  size_t a_pieces() const { return tasks.size(); }
  int64_t a_bytes() const { return a_size; }

  // Call `take` with each piece of B that is read for one panel.
  template <class Take>
  void each_b(int64_t layer, int64_t panel, const Take& take) const {
    for (int64_t part = 0; part < parts; part++)
      if (panels[part].has(panel))
        for (const Worn& own : worn)
          take(piece(b(own, layer, part, panel), own.stack->rank * PANEL));
  }

 protected:
  struct Worn {
    const Run* run;
    const Stack* stack;
  };
  struct Task {
    size_t worn;
    int64_t row, rows;  // of x
    int64_t from;       // first row of A
  };

  const Group group;
  const int64_t parts, rows;
  int64_t a_size = 0;  // bytes
  std::vector<Worn> worn;
  std::vector<Task> tasks;
  Span panels[MOST_PARTS];

  static Piece piece(const Number* first, int64_t count) {
    return {(const char*)first, count * (int64_t)sizeof(Number)};
  }

  const Number* b(const Worn& own, int64_t layer, int64_t part, int64_t panel) const {
    return own.stack->b[part].of(layer, own.run->slot) +
           (panel - panels[part].first) * own.stack->rank * PANEL;
  }
};
