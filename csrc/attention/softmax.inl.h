// Scores of a panel of queries against a block of keys, and the running softmax over the blocks (Milakov and
// Gimelshein 2018; Dao et al. 2022), transposed: a row per key, a lane per query.
#pragma once
#include "../cpu/math.h"
#include "../cpu/microkernel.inl.h"
#include "../cpu/prefetch.inl.h"
#include "mask.inl.h"
#include "pack.inl.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Score tiles hold q.k, and `unit` * q.k are the scores, unless the scores are finished (Visibility::finished). The
// unit must be positive for the maximum of one to be the maximum of the other, so queries carry the scale's sign.
struct ScoreScale {
  float sign;  // 1, -1, or 0 for scale == 0
  float unit;  // |scale|, or 1 for scale == 0
};
FASTATTN_INLINE ScoreScale score_scale(float scale) {
  if (scale == 0.f) return {0.f, 1.f};
  return scale > 0.f ? ScoreScale{1.f, scale} : ScoreScale{-1.f, -scale};
}

// exp(unit * x - shift). Where the result is rounded to bf16, unit and shift come in base 2 (see exponent_base).
template <class G, int kDegree>
FASTATTN_INLINE F32 exp_of_product(F32 x, F32 unit, F32 shift) {
  if constexpr (G::kPaired)
    return exp2<kDegree>(fms(x, unit, shift));
  else
    return exp(fms(x, unit, shift));
}
template <class G, int kDegree>
FASTATTN_INLINE F32 exp_of(F32 x) {
  if constexpr (G::kPaired)
    return exp2<kDegree>(x * splat(kLog2e));
  else
    return exp(x);
}
template <class G>
constexpr float exponent_base() {
  return G::kPaired ? kLog2e : 1.f;
}

// Per query of a panel.
struct Statistics {
  float* max;    // largest score so far; -inf: none
  float* sum;    // of exp(score - max)
  float* alpha;  // what the last block has scaled the sums before it by
  float* shift;  // max, or 0 where max is -inf: what scores are taken relative to
  float* block;  // largest score of the last block, as it stands in the tile
  float* live;   // 1 where some key is visible, else 0

  static Statistics take(Arena& arena) {
    Statistics s;
    s.max = arena.take<float>(kPanel);
    s.sum = arena.take<float>(kPanel);
    s.alpha = arena.take<float>(kPanel);
    s.shift = arena.take<float>(kPanel);
    s.block = arena.take<float>(kPanel);
    s.live = arena.take<float>(kPanel);
    return s;
  }
  // Of no keys; a sink above -inf is a score without a value.
  void reset(float sink) const {
    const float any = sink == -kInf ? 0.f : 1.f;
    for (int64_t i = 0; i < kPanel; i += kLanes) {
      store(max + i, splat(sink));
      store(sum + i, splat(any));
      store(live + i, splat(any));
    }
  }
};

FASTATTN_INLINE float sink_of(const AttentionProblem& problem, int64_t head) {
  return problem.sinks == nullptr ? -kInf : problem.sinks[head];
}

// The score that a product becomes where tiles hold finished scores: capped, and with the bias added, which may exclude
// it. `slope` becomes the cap's derivative.
FASTATTN_INLINE F32 finish_score(const Visibility& seen, F32 product, float unit, int64_t row, int64_t lane,
                                 Mask& visible, F32& slope) {
  F32 score = product * splat(unit);
  if (seen.cap != 0.f) {
    const F32 t = tanh(score * splat(seen.cap_inverse));
    slope = fnma(t, t, splat(1.f));
    score = t * splat(seen.cap);
  }
  if (seen.bias == nullptr) return score;
  const F32 bias = load(seen.bias + row * seen.bias_row + lane);
  visible = visible & ~(bias == splat(-kInf));
  return seen.cap != 0.f ? score + bias : fma(product, splat(unit), bias);
}

// Scores of a range, their maximum and who sees anything at all.
template <class G, int kWide, View kView>
__attribute__((noinline)) void score_rows(Operand keys, const typename G::Step* query, int64_t steps,
                                          const Visibility& seen, float unit, const Range& range, float* tile,
                                          const Statistics& statistics, Prefetch& prefetch) {
  constexpr int kRows = tile_rows(kWide);
  const int64_t offset = range.first * kLanes;
  F32 largest[kWide], live[kWide];
  FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
    largest[n] = load(statistics.block + offset + n * kLanes);
    live[n] = kView != View::clean ? load(statistics.live + offset + n * kLanes) : splat(1.f);
  }
  for (int64_t row = range.begin; row < range.end; row += kRows) {
    prefetch.step();
    Tile<kRows, kWide> s;
    clear(s);
    const char* left = keys.data + row * keys.row;
    const typename G::Step* right = query + offset;
    multiply<G, 0>(s, left, keys.row, sizeof(typename G::Step), right, kPanel, steps);
    FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
      float* out = tile + (row + m) * kPanel + offset;
      FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
        F32 x = s.c[m][n];
        if constexpr (kView != View::clean) {
          Mask visible = sees<kView>(seen, row + m, range.first + n);
          if constexpr (kView == View::general) {
            F32 slope;
            if (seen.finished()) x = finish_score(seen, x, unit, row + m, offset + n * kLanes, visible, slope);
          }
          x = select(visible, x, splat(-kInf));
          live[n] = select(visible, splat(1.f), live[n]);
        }
        store(out + n * kLanes, x);
        largest[n] = max(largest[n], x);
      }
    }
  }
  FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
    store(statistics.block + offset + n * kLanes, largest[n]);
    store(statistics.live + offset + n * kLanes, live[n]);
  }
}

// Scores become probabilities (relative to the running maximum): in place, or as pairs of neighbouring keys. The tile
// holds products, or with kFinished scores.
template <class G, int kWide, bool kFinished>
__attribute__((noinline)) void exponentiate_rows(float* tile, typename G::Step* pairs, const float* dropout,
                                                 float score_unit, const Range& range, const Statistics& statistics) {
  const int64_t offset = range.first * kLanes;
  const float base = kFinished ? 1.f : exponent_base<G>();
  const F32 unit = splat(score_unit * base);
  F32 shift[kWide], sum[kWide];
  FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
    shift[n] = load(statistics.shift + offset + n * kLanes) * splat(base);
    sum[n] = zero();
  }
  for (int64_t row = range.begin; row < range.end; row += G::kPack) {
    FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
      F32 p[G::kPack];
      FASTATTN_UNROLL for (int m = 0; m < G::kPack; m++) {
        const int64_t at = (row + m) * kPanel + offset + n * kLanes;
        // The sum goes into lse, which is fp32 whatever the inputs are: full precision.
        if constexpr (kFinished)
          p[m] = exp_of<G, 5>(load(tile + at) - shift[n]);
        else
          p[m] = exp_of_product<G, 5>(load(tile + at), unit, shift[n]);
        sum[n] = sum[n] + p[m];
        if (dropout != nullptr) p[m] = p[m] * load(dropout + at);
      }
      if constexpr (G::kPaired) {
        G::store_pair(pairs + row / 2 * kPanel + offset + n * kLanes, p[0], p[1]);
      } else {
        store(tile + row * kPanel + offset + n * kLanes, p[0]);
      }
    }
  }
  FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
    float* total = statistics.sum + offset + n * kLanes;
    store(total, load(total) + sum[n]);
  }
}

// One more block of keys: its probabilities in `tile` (Single) or `pairs` (Paired), the statistics brought up to date.
template <class G>
FASTATTN_INLINE void advance_softmax(Operand keys, const PackedRows<G>& query, const Visibility& seen, float unit,
                                     int vectors, const float* dropout, float* tile, typename G::Step* pairs,
                                     const Statistics& statistics, Prefetch& prefetch) {
  for (int n = 0; n < vectors; n++) store(statistics.block + n * kLanes, splat(-kInf));
  for (int i = 0; i < seen.range_count; i++)
    with_width(seen.ranges[i].last - seen.ranges[i].first, [&](auto width) {
      const auto rows = of_view(seen.ranges[i].view, score_rows<G, width.value, View::clean>,
                                score_rows<G, width.value, View::stairs>, score_rows<G, width.value, View::general>);
      rows(keys, query.transposed, query.steps(), seen, unit, seen.ranges[i], tile, statistics, prefetch);
    });
  const bool finished = seen.finished();
  for (int n = 0; n < vectors; n++) {
    const int64_t at = n * kLanes;
    const F32 before = load(statistics.max + at);
    const F32 now = max(before, load(statistics.block + at) * splat(finished ? 1.f : unit));
    const F32 shift = select(now == splat(-kInf), zero(), now);
    const F32 alpha = exp(before - shift);
    store(statistics.max + at, now);
    store(statistics.shift + at, shift);
    store(statistics.alpha + at, alpha);
    store(statistics.sum + at, load(statistics.sum + at) * alpha);
  }
  for (int i = 0; i < seen.range_count; i++)
    with_width(seen.ranges[i].last - seen.ranges[i].first, [&](auto width) {
      const auto rows = finished ? exponentiate_rows<G, width.value, true> : exponentiate_rows<G, width.value, false>;
      rows(tile, pairs, dropout, unit, seen.ranges[i], statistics);
    });
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
