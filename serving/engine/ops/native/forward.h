// The forward pass of the Llama family over one step's rows: one call, one parallel region.
#pragma once
#include <list>
#include <optional>

#include "activation.h"
#include "attention.h"
#include "linear.h"
#include "step.h"

struct Linear {
  const Number *weight, *bias;  // packed; [outputs] or null
};
struct Layer {
  const Number *attention_norm, *mlp_norm, *query_norm, *key_norm;
  Linear linears[4];  // qkv, o, gate_up, down
  int64_t window;  // 0: none
};
struct Model {
  int64_t layers, hidden, heads, kv_heads, dim, intermediate, vocab;
  float eps;
  const Layer* layer;
  const Number* embedding;  // [vocab, hidden], or null: the rows of the head
  const Number* norm;
  Linear head;
  const float *cos, *sin;  // [length, dim / 2]
};

// What the layers do to the rows of a step; every thread of a parallel region calls it.
class Layers {
 public:
  Layers(const Model& model, const Step& step)
      : m(model), s(step), queries(m.heads * m.dim), keys(m.kv_heads * m.dim),
        groups{{m.hidden, 3, {queries, keys, keys}},
               {queries, 1, {m.hidden}},
               {m.hidden, 2, {m.intermediate, m.intermediate}},
               {m.intermediate, 1, {m.hidden}},
               {m.hidden, 1, {m.vocab}}},
        taken(m.layers * 4 + 1), looked(m.layers) {
    for (int i = 0; i < 4 && s.runs; i++)
      loras.emplace_back(groups[i], s.stacks[i], s.run, s.runs, s.rows);
    for (int64_t i = 0; i < m.layers; i++) attentions.push_back(attention(m.layer[i].window));
  }

  void embed() {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < s.rows; row++) {
      Number* to = s.x + row * m.hidden;
      if (s.embedded && s.embedded[row])
        memcpy(to, s.embedded[row], m.hidden * sizeof(Number));
      else if (m.embedding)
        memcpy(to, m.embedding + s.ids[row] * m.hidden, m.hidden * sizeof(Number));
      else
        unpack(m.head.weight, s.ids[row], m.hidden, to);
    }
  }

  // The first part of a layer: queries into qkv, keys and values into the cache.
  void write(int64_t i) {
    const Rope rope{m.cos, m.sin, m.layer[i].query_norm, m.layer[i].key_norm, m.eps};
    const Cache own = cache(i);
    normalise_all(2 * i, m.layer[i].attention_norm);
    linear(i, 0, s.h, s.qkv, false);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < s.rows; row++)
      rope.row(s.qkv + row * width(), m.heads, s.slots[row], s.positions[row], own);
  }

  // The second part: what the queries find in the cache, then the MLP.
  void read(int64_t i) {
    attentions[i]->run(s.qkv, width(), cache(i), s.attended, looked[i]);
    linear(i, 1, s.attended, s.x, true);
    normalise_all(2 * i + 1, m.layer[i].mlp_norm);
    linear(i, 2, s.h, s.gate_up, false);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < s.rows; row++)
      silu_mul(s.gate_up + row * 2 * m.intermediate, s.activated + row * m.intermediate,
               m.intermediate);
    linear(i, 3, s.activated, s.x, true);
  }

  // Move rows in the middle of a layer, after `write`, to the front; `numbers` [rows] is ascending.
  // Called by one thread.
  void gather(const int64_t* numbers) {
    for (int64_t row = 0; row < s.rows; row++) {
      memmove(s.x + row * m.hidden, s.x + numbers[row] * m.hidden, m.hidden * sizeof(Number));
      memmove(s.qkv + row * width(), s.qkv + numbers[row] * width(), queries * sizeof(Number));
    }
  }

  // Logits of all rows.
  void head() {
    normalise_all(2 * m.layers, m.norm);
    multiply(m.layers * 4, s.h, s.logits, false);
  }

 private:
  const Model& m;
  const Step& s;
  const int64_t queries, keys;
  const Group groups[5];  // qkv, o, gate_up, down, head
  std::vector<std::atomic<int64_t>> taken;   // spans of each linear, in the order they run
  std::vector<std::atomic<int64_t>> looked;  // tasks of each layer's attention
  std::vector<Lora> loras;
  std::list<std::pair<int64_t, Attention>> windows;  // window → its plan; addresses stay
  std::vector<Attention*> attentions;                // of each layer

  Attention* attention(int64_t window) {
    for (auto& [known, plan] : windows)
      if (known == window) return &plan;
    windows.emplace_back(window, Attention(s.rows, s.slots, s.positions, m.heads, m.kv_heads, m.dim,
                                           window));
    return &windows.back().second;
  }

  Cache cache(int64_t i) const {
    const int64_t kv = i * s.cache_slots * m.kv_heads * s.cache_length * m.dim;
    return {s.keys + kv, s.values + kv, m.kv_heads, s.cache_length, m.dim};
  }

  int64_t width() const { return groups[0].width(); }  // of qkv

  void normalise_all(int64_t number, const Number* weight) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < s.rows; row++)
      normalise(s.x + row * m.hidden, norm(row, number, weight), s.h + row * m.hidden, m.hidden,
                m.eps);
  }

  const Number* norm(int64_t row, int64_t number, const Number* weight) const {
    const Vectors* own = s.vectors ? s.vectors[row] : nullptr;
    return own && own->norms ? own->norms + number * m.hidden : weight;
  }

  // Where what a linear and its LoRA give is to be scaled, what y holds waits in h.
  void set_aside(int group, Number* y) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < s.rows; row++)
      if (s.vectors[row] && s.vectors[row]->scale[group]) {
        memcpy(s.h + row * m.hidden, y + row * m.hidden, m.hidden * sizeof(Number));
        memset(y + row * m.hidden, 0, m.hidden * sizeof(Number));
      }
  }

  void dress_all(int64_t layer, int group, Number* y, bool add) {
    const int64_t width = groups[group].width();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < s.rows; row++)
      if (const Vectors* own = s.vectors[row]; own && own->scale[group])
        dress(y + row * width, own->scale[group] + layer * width, own->shift[group] + layer * width,
              add ? s.h + row * width : nullptr, width);
  }

  // y = or += linear(x) and, for rows that wear an adapter, what it adds.
  void linear(int64_t layer, int group, const Number* x, Number* y, bool add) {
    if (s.vectors && add) set_aside(group, y);
    if (!loras.empty()) loras[group].shrink(layer, x, groups[group].inputs);
    multiply(layer * 4 + group, x, y, add);
    if (s.vectors) dress_all(layer, group, y, add);
  }

  // Of the linears in the order in which they run, 4 of each layer and the head, number n.
  void multiply(int64_t n, const Number* x, Number* y, bool add) {
    const int64_t inputs = group(n).inputs, outputs = group(n).width();
    const Product product{x, dressed(n), own(n).bias, y, inputs, outputs, outputs, add};
    product.run(s.rows, taken[n], n < m.layers * 4 ? dressed(n + 1) : Dressed{});
  }

  Dressed dressed(int64_t n) const {
    const Panels panels{own(n).weight, group(n).inputs, group(n).width()};
    return {panels, loras.empty() || n == m.layers * 4 ? nullptr : &loras[n % 4], n / 4};
  }

  const Linear& own(int64_t n) const {
    return n < m.layers * 4 ? m.layer[n / 4].linears[n % 4] : m.head;
  }

  const Group& group(int64_t n) const { return groups[n < m.layers * 4 ? n % 4 : 4]; }
};

// The whole pass. Of a row that nobody samples the last layer computes keys and values only.
class Forward {
 public:
  Forward(const Model& model, const Step& step)
      : last(model.layers - 1), sampled(step), all(model, step) {
    if (step.sampled < step.rows) few.emplace(model, sampled.step);
  }

  // Called by every thread of a parallel region.
  void run() {
    all.embed();
    for (int64_t i = 0; i < last; i++) all.write(i), all.read(i);
    all.write(last);
    if (few) {
#pragma omp single
      few->gather(sampled.step.sampled_rows);
    }
    Layers& rest = few ? *few : all;
    rest.read(last);
    rest.head();
  }

 private:
  const int64_t last;
  const Sampled sampled;
  Layers all;
  std::optional<Layers> few;  // the sampled rows, where they are not all
};
