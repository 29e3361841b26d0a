// One token drawn from a row of scores by inverting its distribution: temperature, then min-p, then
// top-k, then top-p of what top-k left. The same rules as `sample` in ops/sampling.py.
#pragma once
#include <utility>
#include <vector>

#include "vector.h"

struct Wish {
  double temperature;  // above 0
  int64_t top_k;       // 0: off
  double top_p, min_p;
  double uniform;  // the row's own random number in [0, 1)
};

class Sampling {
 public:
  explicit Sampling(int64_t size)
      : size(size), weights((size + BLOCK - 1) / BLOCK * BLOCK), masses(weights.size() / BLOCK) {}

  int64_t draw(const float* scores, const Wish& wish) {
    weigh(scores, wish);
    return wish.top_k > 0 || wish.top_p < 1 ? cut(wish) : whole(wish.uniform);
  }

 private:
  using Candidate = std::pair<float, int32_t>;  // weight, token
  static constexpr int64_t BLOCK = 256;         // tokens whose weights are summed up beforehand
  static constexpr float FIRST = 1.0f / 32;     // of the largest weight: what is looked at first
  const int64_t size;
  std::vector<float> weights;  // of each token; the largest is 1, and beyond the last they are 0
  std::vector<double> masses;  // of each block
  std::vector<Candidate> candidates;
  double total = 0;

  void weigh(const float* scores, const Wish& wish) {
    const float most = *std::max_element(scores, scores + size);
    const float temperature = std::max((float)wish.temperature, 1e-37f), least = wish.min_p;
    total = 0;
    for (int64_t block = 0; block < (int64_t)masses.size(); block++) {
      Floats mass = {};
      for (int64_t i = block * BLOCK; i < (block + 1) * BLOCK; i += LANES) {
        Floats weight = exp((some(scores + i, size - i) - most) / temperature);
        weight = weight >= least ? weight : all(0);
        store(weights.data() + i, weight);
        mass += weight;
      }
      total += masses[block] = sum(mass);
    }
  }

  static Floats some(const float* from, int64_t n) {
    if (n >= LANES) return load(from);
    Floats v = all(-INFINITY);
    for (int64_t i = 0; i < n; i++) v[i] = from[i];
    return v;
  }

  int64_t whole(double uniform) const {
    double before = 0;
    const double aim = uniform * total;
    int64_t last = 0;  // of the tokens seen, the last that can be drawn: sums are rounded
    for (int64_t block = 0; block < (int64_t)masses.size(); block++) {
      const bool here = before + masses[block] > aim;
      double mass = before;
      if (here || block + 1 == (int64_t)masses.size())
        for (int64_t i = block * BLOCK; i < (block + 1) * BLOCK; i++) {
          if (weights[i] > 0) last = i;
          if ((mass += weights[i]) > aim) return last;
        }
      if (here) return last;
      before += masses[block];
    }
    return last;
  }

  int64_t cut(const Wish& wish) {
    const size_t limit = wish.top_k > 0 ? std::min(wish.top_k, size) : size;
    for (float least = FIRST;; least = least > 1e-6f ? least / 32 : 0) {
      const double mass = collect(least);
      // top-p is of what top-k leaves, so that has to be there as a whole.
      const bool enough = wish.top_k > 0 ? candidates.size() >= limit : mass >= wish.top_p * total;
      if (enough || least <= wish.min_p) break;  // what is below min-p weighs nothing
    }
    if (candidates.empty()) return 0;  // scores that are no numbers: their row fails elsewhere
    double whole = total;
    if (wish.top_k > 0) {
      if (candidates.size() > limit) {
        const auto first = candidates.begin();
        std::nth_element(first, first + limit, candidates.end(), likelier);
        candidates.resize(limit);
      }
      whole = mass_of(0, candidates.size());
    }
    const double wanted = wish.top_p * whole;
    const auto [count, mass] = likeliest(candidates.size(), [=](double m) { return m >= wanted; });
    const double aim = wish.uniform * mass;
    return candidates[likeliest(count, [=](double m) { return m > aim; }).count - 1].second;
  }

  static bool likelier(const Candidate& one, const Candidate& two) {
    return one.first > two.first || (one.first == two.first && one.second < two.second);
  }

  double mass_of(size_t from, size_t to) const {
    double mass = 0;
    for (size_t i = from; i < to; i++) mass += candidates[i].first;
    return mass;
  }

  struct Likeliest {
    size_t count;
    double mass;
  };

  // Put the fewest likeliest of the first `count` candidates that have `enough` mass to the front,
  // the least likely of them last; all, if they have not. Only the part in which the last one lies
  // is put in order, half of it at a time: a flat distribution has tens of thousands of candidates.
  template <class Enough>
  Likeliest likeliest(size_t count, const Enough& enough) {
    const auto first = candidates.begin();
    size_t low = 0, high = count;
    double mass = 0;  // of those before `low`, all of which are taken
    while (high - low > 32) {
      const size_t middle = low + (high - low) / 2;
      std::nth_element(first + low, first + middle, first + high, likelier);
      const double more = mass_of(low, middle);
      if (enough(mass + more)) {
        high = middle;
      } else {
        mass += more;
        low = middle;
      }
    }
    std::sort(first + low, first + high, likelier);
    do mass += candidates[low++].first;
    while (low < high && !enough(mass));
    return {low, mass};
  }

  // Gather the tokens that have at least this share of the largest weight; return their mass.
  double collect(float least) {
    candidates.clear();
    double mass = 0;
    for (int64_t i = 0; i < size; i++)
      if (weights[i] > 0 && weights[i] >= least) {
        candidates.push_back({weights[i], (int32_t)i});
        mass += weights[i];
      }
    return mass;
  }
};
