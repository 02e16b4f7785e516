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

// e^x of several vectors, as exp2_each: for x < 87, 0 from about -87 down, else as good as exp.
template <int kCount>
FASTATTN_INLINE void exp_each(F32 (&x)[kCount]) {
  // Minimax for the quarter or the eighth of the range that a table of 16 or 8 powers leaves.
  static constexpr float kTerms[] = {kSteps == 16 ? 0.166667178f : 0.166668579f,
                                     kSteps == 16 ? 0.500016153f : 0.500064492f,
                                     1.f,
                                     kLog2e,
                                     kStepShift,
                                     kLn2,
                                     -150.f};
  const float* c = kTerms;
  asm volatile("" : "+r"(c));  // nobody knows what it points to
  F32 power[kCount], p[kCount];
  FASTATTN_UNROLL for (int i = 0; i < kCount; i++) {
    x[i] = max(splat(c[6]), x[i]);
    const F32 sum = fma(x[i], splat(c[3]), splat(c[4])), m = sum - splat(c[4]);
    x[i] = without_ln2(x[i], m);
    power[i] = step_power(sum, m);
  }
  FASTATTN_UNROLL for (int i = 0; i < kCount; i++) p[i] = fma(splat(c[0]), x[i], splat(c[1]));
  FASTATTN_UNROLL for (int i = 0; i < kCount; i++) p[i] = fma(p[i], x[i], splat(c[2]));
  FASTATTN_UNROLL for (int i = 0; i < kCount; i++) x[i] = fma(power[i] * x[i], p[i], power[i]);
}

// exp(unit * x - shift), or of finished scores exp(x - shift). fp32 scores and their maximum lie on one grid, and the
// difference is exact: it is taken as it is. To the base 2 it would be rounded, which bf16 results do not show.
template <class G, bool kFinished>
struct Relative {
  static constexpr float kBase = G::kPaired && !kFinished ? kLog2e : 1.f;
  F32 unit;
  explicit FASTATTN_INLINE Relative(float score_unit) : unit(splat(score_unit * kBase)) {}
  static FASTATTN_INLINE F32 shift(F32 natural) { return natural * splat(kBase); }
  FASTATTN_INLINE F32 take(F32 x, F32 shift) const { return kFinished ? x - shift : fms(x, unit, shift); }
  template <bool kCoarse, int kCount>  // kCoarse: as bf16 needs it
  static FASTATTN_INLINE void raise(F32 (&x)[kCount]) {
    if constexpr (!G::kPaired) {
      exp_each(x);
    } else {
      if constexpr (kFinished) {
        FASTATTN_UNROLL for (int i = 0; i < kCount; i++) x[i] = x[i] * splat(kLog2e);
      }
      if constexpr (kCoarse)
        exp2_coarse_each(x);
      else
        exp2_each(x);
    }
  }
};
constexpr bool kForSums = false;     // the sum goes into lse, which is fp32 whatever the inputs are
constexpr bool kForProducts = true;  // probabilities that are only rounded to bf16

// Per query of a panel.
struct Statistics {
  float max[kPanel];    // largest score so far, or kHeadroom less; -inf: none
  float sum[kPanel];    // of exp(score - max)
  float alpha[kPanel];  // what the last block has scaled the sums before it by
  float shift[kPanel];  // max, or 0 where max is -inf: what scores are taken relative to
  float block[kPanel];  // largest score of the last block, as it stands in the tile
  float added[kPanel];  // sum of the last block, while it is not certain that it counts
  float part[kPanel];   // sum of the last few of its rows: short sums of short sums round less than long ones
  float taken[kPanel];  // what Relative takes off the scores
  float live[kPanel];   // 1 where some key is visible, else 0

  // Of no keys; a sink above -inf is a score without a value.
  void reset(float sink) {
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

// The score that a product becomes where tiles hold finished scores: capped, and with the bias added (nullptr: none),
// which may exclude it. `slope` becomes the cap's derivative.
FASTATTN_INLINE F32 finish_score(const Visibility& seen, F32 product, float unit, const float* biases, Mask& visible,
                                 F32& slope) {
  F32 score = product * splat(unit);
  if (seen.cap != 0.f) {
    const F32 t = tanh(score * splat(seen.cap_inverse));
    slope = fnma(t, t, splat(1.f));
    score = t * splat(seen.cap);
  }
  if (biases == nullptr) return score;
  const F32 bias = load(biases);
  visible = visible & ~(bias == splat(-kInf));
  return seen.cap != 0.f ? score + bias : fma(product, splat(unit), bias);
}

// Scores of a range, their maximum and who sees anything at all.
template <class G, int kWide, View kView>
__attribute__((noinline)) void score_rows(Operand keys, const typename G::Step* query, int64_t steps,
                                          const Visibility& seen, float unit, const Range& range, float* tile,
                                          Statistics& statistics, Prefetch& prefetch) {
  constexpr int kRows = tile_rows(kWide);
  const int64_t offset = range.first * kLanes;
  if constexpr (kView == View::clean) {
    for (int n = 0; n < kWide; n++) store(statistics.live + offset + n * kLanes, splat(1.f));
  }
  for (int64_t row = range.begin; row < range.end; row += kRows) {
    Tile<kRows, kWide> s;
    clear(s);
    const char* left = keys.data + row * keys.row;
    const typename G::Step* right = query + offset;
    multiply_asking<G, 0>(s, left, keys.row, sizeof(typename G::Step), right, kPanel, steps, prefetch);
    FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
      const int64_t lane = offset + n * kLanes;
      F32 largest = load(statistics.block + lane), live = load(statistics.live + lane);
      FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
        F32 x = s.c[m][n];
        if constexpr (kView != View::clean) {
          Mask visible = sees<kView>(seen, row + m, range.first + n);
          if constexpr (kView == View::general) {
            F32 slope;
            if (seen.finished()) x = finish_score(seen, x, unit, seen.bias_at(row + m, lane), visible, slope);
          }
          x = select(visible, x, splat(-kInf));
          live = select(visible, splat(1.f), live);
        }
        store(tile + (row + m) * kPanel + lane, x);
        largest = max(largest, x);
      }
      store(statistics.block + lane, largest);
      if constexpr (kView != View::clean) store(statistics.live + lane, live);
    }
  }
}

// The probabilities of the scores of a register tile, (rows, kPanel) at `scores`, relative to the maximum as it stands:
// as they are, or as pairs of neighbouring keys. They are added to statistics->part.
template <class G>
struct Exponentiation {
  float* scores;
  typename G::Step* out;
  const float* dropout;
  Statistics* statistics;  // from the first lane on
  Relative<G, false> relative;

  // Of vector n of row (Single) or pair of rows (Paired) number m.
  FASTATTN_INLINE void operator()(int64_t m, int64_t n) const {
    F32 p[G::kPack];
    FASTATTN_UNROLL for (int i = 0; i < G::kPack; i++) p[i] =
        relative.take(load(scores + (m * G::kPack + i) * kPanel + n * kLanes), load(statistics->taken + n * kLanes));
    relative.template raise<kForSums>(p);
    F32 sum = load(statistics->part + n * kLanes);
    FASTATTN_UNROLL for (int i = 0; i < G::kPack; i++) {
      sum = sum + p[i];
      if (dropout != nullptr) p[i] = p[i] * load(dropout + (m * G::kPack + i) * kPanel + n * kLanes);
    }
    store(statistics->part + n * kLanes, sum);
    if constexpr (G::kPaired)
      G::store_pair(out + m * kPanel + n * kLanes, p[0], p[1]);
    else
      store(out + m * kPanel + n * kLanes, p[0]);
  }
  // All vectors of the tile have been through this: to the next one.
  template <int kRows, int kWide>
  FASTATTN_INLINE void next() {
    FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
      float *added = statistics->added + n * kLanes, *part = statistics->part + n * kLanes;
      store(added, load(added) + load(part));
      store(part, zero());
    }
    out += kRows / G::kPack * kPanel;
    if (dropout != nullptr) dropout += kRows * kPanel;
  }
};

// Scores of a range and, relative to the maximum as it stands, their probabilities: those of one register tile while
// the products of the next are formed.
template <class G, int kWide, View kView>
__attribute__((noinline)) void probability_rows(Operand keys, const typename G::Step* query, int64_t steps,
                                                const Visibility& seen, float unit, const Range& range,
                                                typename G::Step* out, const float* dropout, Statistics& statistics,
                                                Prefetch& prefetch) {
  constexpr int kRows = tile_rows(kWide);
  constexpr int kUnits = kRows / static_cast<int>(G::kPack);
  constexpr int64_t kStep = sizeof(typename G::Step);
  const int64_t offset = range.first * kLanes, start = range.begin * kPanel + offset;
  alignas(64) float scores[kRows * kPanel];
  for (int64_t at = offset; at < offset + kWide * kLanes; at += kLanes) {
    store(statistics.part + at, zero());
    store(statistics.taken + at, Relative<G, false>::shift(load(statistics.shift + at)));
  }
  Exponentiation<G> raise = {scores, out + range.begin / G::kPack * kPanel + offset,
                             dropout == nullptr ? nullptr : dropout + start,
                             reinterpret_cast<Statistics*>(statistics.max + offset), Relative<G, false>(unit)};
  for (int64_t row = range.begin; row < range.end; row += kRows) {
    prefetch.step();
    Tile<kRows, kWide> s;
    clear(s);
    const char* left = keys.data + row * keys.row;
    const typename G::Step* right = query + offset;
    if (row == range.begin) {
      multiply_asking<G, 0>(s, left, keys.row, kStep, right, kPanel, steps, prefetch);
    } else {
      multiply_among<G, kUnits>(s, left, keys.row, kStep, right, kPanel, steps, raise);
      raise.template next<kRows, kWide>();
    }
    FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
      F32 largest = load(statistics.block + offset + n * kLanes);
      FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
        F32 x = s.c[m][n];
        if constexpr (kView != View::clean) x = select(sees<kView>(seen, row + m, range.first + n), x, splat(-kInf));
        largest = max(largest, x);
        store(scores + m * kPanel + n * kLanes, x);
      }
      store(statistics.block + offset + n * kLanes, largest);
    }
  }
  for (int m = 0; m < kUnits; m++)
    for (int n = 0; n < kWide; n++) raise(m, n);
  raise.template next<kRows, kWide>();
}

// Scores become probabilities (relative to the running maximum): in place, or as pairs of neighbouring keys. The tile
// holds products, or with kFinished scores.
template <class G, int kWide, bool kFinished>
__attribute__((noinline)) void exponentiate_rows(float* tile, typename G::Step* pairs, const float* dropout,
                                                 float score_unit, const Range& range, Statistics& statistics) {
  const int64_t offset = range.first * kLanes;
  const Relative<G, kFinished> relative(score_unit);
  F32 shift[kWide], sum[kWide], part[kWide];  // short sums of short sums round less than long ones
  FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
    shift[n] = relative.shift(load(statistics.shift + offset + n * kLanes));
    sum[n] = zero();
    part[n] = zero();
  }
  for (int64_t row = range.begin; row < range.end; row += G::kPack) {
    F32 p[G::kPack * kWide];
    FASTATTN_UNROLL for (int m = 0; m < G::kPack; m++) {
      FASTATTN_UNROLL for (int n = 0; n < kWide; n++) p[m * kWide + n] =
          relative.take(load(tile + (row + m) * kPanel + offset + n * kLanes), shift[n]);
    }
    relative.template raise<kForSums>(p);
    FASTATTN_UNROLL for (int m = 0; m < G::kPack; m++) {
      FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
        part[n] = part[n] + p[m * kWide + n];
        if (dropout != nullptr)
          p[m * kWide + n] = p[m * kWide + n] * load(dropout + (row + m) * kPanel + offset + n * kLanes);
      }
    }
    FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
      if constexpr (G::kPaired)
        G::store_pair(pairs + row / 2 * kPanel + offset + n * kLanes, p[n], p[kWide + n]);
      else
        store(tile + row * kPanel + offset + n * kLanes, p[n]);
    }
    if ((row + G::kPack) % kRowPad == 0) {
      FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
        sum[n] = sum[n] + part[n];
        part[n] = zero();
      }
    }
  }
  FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
    float* total = statistics.sum + offset + n * kLanes;
    store(total, load(total) + sum[n]);
  }
}

// Probabilities are taken relative to a maximum that a later score may exceed by this much before the sums so far are
// scaled down to a new one: what is summed grows by no more than its power, and loses nothing by it.
constexpr float kHeadroom = 8.f;
FASTATTN_INLINE Mask outgrown(F32 maximum, F32 block) { return block > maximum + splat(kHeadroom); }

// The block's probabilities in one pass, relative to the maximum so far; false, and nothing has changed, where that
// does not do for some query. All of them have a maximum.
template <class G>
FASTATTN_INLINE bool extend_softmax(Operand keys, const PackedRows<G>& query, const Visibility& seen, float unit,
                                    int vectors, const float* dropout, typename G::Step* out, Statistics& statistics,
                                    Prefetch& prefetch) {
  for (int n = 0; n < vectors; n++) {
    store(statistics.block + n * kLanes, splat(-kInf));
    store(statistics.added + n * kLanes, zero());
  }
  for (int i = 0; i < seen.range_count; i++)
    with_width(seen.ranges[i].last - seen.ranges[i].first, [&](auto width) {
      const auto rows =
          of_view(seen.ranges[i].view, probability_rows<G, width.value, View::clean>,
                  probability_rows<G, width.value, View::stairs>, probability_rows<G, width.value, View::general>);
      rows(keys, query.transposed, query.steps(), seen, unit, seen.ranges[i], out, dropout, statistics, prefetch);
    });
  bool high = false;
  for (int n = 0; n < vectors; n++)
    high = high || any(outgrown(load(statistics.max + n * kLanes), load(statistics.block + n * kLanes) * splat(unit)));
  if (high) return false;
  for (int n = 0; n < vectors; n++) {
    float* sum = statistics.sum + n * kLanes;
    store(sum, load(sum) + load(statistics.added + n * kLanes));
  }
  return true;
}

// One more block of keys: its probabilities in `tile` (Single) or `pairs` (Paired), the statistics brought up to date.
// What the block is added to must be scaled by `alpha` first, unless the result is false.
template <class G>
FASTATTN_INLINE bool advance_softmax(Operand keys, const PackedRows<G>& query, const Visibility& seen, float unit,
                                     int vectors, bool first, const float* dropout, float* tile,
                                     typename G::Step* pairs, Statistics& statistics, Prefetch& prefetch) {
  typename G::Step* out;
  if constexpr (G::kPaired)
    out = pairs;
  else
    out = tile;
  bool extends = !first && !seen.finished();
  for (int n = 0; n < vectors; n++) extends = extends && !any(load(statistics.max + n * kLanes) == splat(-kInf));
  if (extends && extend_softmax<G>(keys, query, seen, unit, vectors, dropout, out, statistics, prefetch)) return false;
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
    const F32 block = load(statistics.block + at) * splat(finished ? 1.f : unit);
    // Each query by itself: what becomes of one does not depend on its neighbours' scores.
    const F32 now = extends ? select(outgrown(before, block), block, before) : max(before, block);
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
  return true;
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
