// Gradients in one pass over the score matrix: a task walks the panels of queries that share one kv head, and the
// probabilities are recomputed from the saved lse (Dao et al. 2022, appendix B.4):
//   P = exp(S - lse), dV += P^T dO, dP = dO V^T, dS = P * (dP - delta), dQ = scale * dS K, dK += scale * dS^T Q
// with delta = rowsum(dO * O) - grad_lse. Tiles are transposed: a row per key, a lane per query.
#pragma once
#include "../cpu/prefetch.inl.h"
#include "softmax.inl.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Per query of a panel.
struct SavedStatistics {
  float* lse;   // +inf for rows that see nothing, so that their probabilities are 0
  float* rest;  // what is too small to show in lse where that is huge, else 0
  float* delta;

  static SavedStatistics take(Arena& arena) {
    return {arena.take<float>(kPanel), arena.take<float>(kPanel), arena.take<float>(kPanel)};
  }
};

// The tiles of one panel and one block, as the products that follow read them: fp32 (Single), or bf16 with dS also as
// pairs of neighbouring keys (Paired).
template <class G>
struct GradientTiles {
  float* probabilities;
  float* scores;
  typename G::Step* score_pairs;

  static GradientTiles take(Arena& arena) {
    return {arena.take<float>(kKeyBlock * kPanel), arena.take<float>(kKeyBlock * kPanel),
            arena.take<typename G::Step>(G::kPaired ? kKeyBlock / 2 * kPanel : 0)};
  }
  const typename G::Step* score_columns() const {
    if constexpr (G::kPaired)
      return score_pairs;
    else
      return scores;
  }
  // P and dS of kRows keys from `row` on and kWide vectors of queries from `lane` on.
  template <int kRows, int kWide>
  FASTATTN_INLINE void put(int64_t row, int64_t lane, const F32 (&p)[kRows][kWide],
                           const F32 (&ds)[kRows][kWide]) const {
    const int64_t at = row * kPanel + lane;
    if constexpr (!G::kPaired) {
      FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
        FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
          store(probabilities + at + m * kPanel + n * kLanes, p[m][n]);
          store(scores + at + m * kPanel + n * kLanes, ds[m][n]);
        }
      }
    } else {
      FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
        put_row<kWide>(reinterpret_cast<bf16*>(probabilities) + at + m * kPanel, p[m]);
        put_row<kWide>(reinterpret_cast<bf16*>(scores) + at + m * kPanel, ds[m]);
      }
      FASTATTN_UNROLL for (int m = 0; m < kRows; m += 2) {
        FASTATTN_UNROLL for (int n = 0; n < kWide; n++)
            G::store_pair(score_pairs + (row + m) / 2 * kPanel + lane + n * kLanes, ds[m][n], ds[m + 1][n]);
      }
    }
  }

 private:
  template <int kWide>
  static FASTATTN_INLINE void put_row(bf16* to, const F32 (&x)[kWide]) {
    FASTATTN_UNROLL for (int n = 0; n + 1 < kWide; n += 2)
        G::store_row(reinterpret_cast<typename G::Step*>(to + n * kLanes), x[n], x[n + 1]);
    if constexpr (kWide % 2 == 1) store(to + (kWide - 1) * kLanes, x[kWide - 1]);
  }
};

// score - lse where the tiles hold finished scores; `visible` loses the excluded ones.
FASTATTN_INLINE F32 finished_difference(const Visibility& seen, F32 product, float unit, int64_t row, int64_t lane,
                                        const SavedStatistics& saved, Mask& visible) {
  F32 slope;
  const F32 score = finish_score(seen, product, unit, seen.bias_at(row, lane), visible, slope);
  if (seen.slopes != nullptr) store(seen.slopes + row * kPanel + lane, slope);
  return score - load(saved.lse + lane) - load(saved.rest + lane);
}

// P and dS of a range.
template <class G, int kWide, View kView>
__attribute__((noinline)) void gradient_rows(Operand keys, Operand values, const PackedRows<G>& query,
                                             const PackedRows<G>& grad, const Visibility& seen, float score_unit,
                                             const Range& range, const SavedStatistics& saved, const float* dropout,
                                             const GradientTiles<G>& tiles, Prefetch& prefetch) {
  constexpr int kRows = tile_rows(kWide);
  const int64_t offset = range.first * kLanes;
  const Relative<G, false> relative(score_unit);
  const bool finished = kView == View::general && seen.finished();
  F32 lse[kWide];
  FASTATTN_UNROLL for (int n = 0; n < kWide; n++) lse[n] = relative.shift(load(saved.lse + offset + n * kLanes));
  for (int64_t row = range.begin; row < range.end; row += kRows) {
    Tile<kRows, kWide> p, d;
    clear(p);
    const char* left = keys.data + row * keys.row;
    const typename G::Step* right = query.transposed + offset;
    multiply_asking<G, 0>(p, left, keys.row, sizeof(typename G::Step), right, kPanel, query.steps(), prefetch);
    FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
      Mask visible[kWide];
      FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
        const int64_t lane = offset + n * kLanes;
        if constexpr (kView != View::clean) visible[n] = sees<kView>(seen, row + m, range.first + n);
        p.c[m][n] = finished ? finished_difference(seen, p.c[m][n], score_unit, row + m, lane, saved, visible[n])
                             : relative.take(p.c[m][n], lse[n]);
      }
      if (finished)
        Relative<G, true>::template raise<kForProducts>(p.c[m]);
      else
        relative.template raise<kForProducts>(p.c[m]);
      if constexpr (kView != View::clean) {
        FASTATTN_UNROLL for (int n = 0; n < kWide; n++) p.c[m][n] = select(visible[n], p.c[m][n], zero());
      }
    }
    clear(d);
    left = values.data + row * values.row;
    right = grad.transposed + offset;
    multiply_asking<G, 0>(d, left, values.row, sizeof(typename G::Step), right, kPanel, grad.steps(), prefetch);
    FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
      FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
        const int64_t lane = offset + n * kLanes, at = (row + m) * kPanel + lane;
        const F32 whole = p.c[m][n];
        if (dropout != nullptr) {
          const F32 factor = load(dropout + at);
          p.c[m][n] = whole * factor;
          d.c[m][n] = d.c[m][n] * factor;
        }
        d.c[m][n] = whole * (d.c[m][n] - load(saved.delta + lane));
        if constexpr (kView == View::general)
          if (seen.slopes != nullptr) d.c[m][n] = d.c[m][n] * load(seen.slopes + at);
      }
    }
    tiles.put(row, offset, p.c, d.c);
  }
}

template <class G>
FASTATTN_INLINE void gradient_block(Operand keys, Operand values, const PackedRows<G>& query, const PackedRows<G>& grad,
                                    const Visibility& seen, float unit, const SavedStatistics& saved,
                                    const float* dropout, const GradientTiles<G>& tiles, Prefetch& prefetch) {
  for (int i = 0; i < seen.range_count; i++)
    with_width(seen.ranges[i].last - seen.ranges[i].first, [&](auto width) {
      const auto rows =
          of_view(seen.ranges[i].view, gradient_rows<G, width.value, View::clean>,
                  gradient_rows<G, width.value, View::stairs>, gradient_rows<G, width.value, View::general>);
      rows(keys, values, query, grad, seen, unit, seen.ranges[i], saved, dropout, tiles, prefetch);
    });
}

// A panel of queries in the backward pass: everything about it that does not depend on the block of keys.
template <class G>
struct BackwardPanel {
  PackedRows<G> query, grad, output;
  SavedStatistics saved;
  Statistics* statistics;          // only where lse cannot tell
  float *bias, *dropout, *slopes;  // tiles, nullptr where there is none
  GradientTiles<G> tiles;
  int64_t batch, head, first, count;
  Sequence sequence;
  KeyRange range;
  int vectors;

  // All but `output`, for which panels that are loaded one after the other have one room. `capped`: dS is of the scores
  // before softcap.
  static BackwardPanel take(Arena& arena, const AttentionProblem& problem, bool capped) {
    BackwardPanel panel = {};
    panel.query = PackedRows<G>::take(arena, problem.head_dim);
    panel.grad = PackedRows<G>::take(arena, problem.value_dim);
    panel.saved = SavedStatistics::take(arena);
    panel.statistics = arena.take<Statistics>(1);
    panel.bias = wants_bias(problem) ? arena.take<float>(kKeyBlock * kPanel) : nullptr;
    panel.slopes = capped && problem.softcap != 0.f ? arena.take<float>(kKeyBlock * kPanel) : nullptr;
    panel.dropout = problem.dropout.enabled ? arena.take<float>(kKeyBlock * kPanel) : nullptr;
    panel.tiles = GradientTiles<G>::take(arena);
    return panel;
  }

  // `keys` is room for a copy of a block of keys.
  __attribute__((noinline)) void load_panel(const AttentionBackward& p, int64_t which_batch, int64_t which_head,
                                            int64_t which_panel, void* keys) {
    const AttentionProblem& problem = p.problem;
    batch = which_batch;
    head = which_head;
    sequence = sequence_of(problem, batch);
    first = sequence.query_begin + which_panel * kPanel;
    count = min_of(kPanel, sequence.query_end - first);
    range = key_range(problem, sequence, batch, first, count);
    vectors = static_cast<int>(ceil_div(count, kLanes));
    query.pack(problem.dtype, head_rows(p.query, problem.dtype, batch, head, first), count,
               score_scale(problem.scale).sign);
    const Operand grads = head_rows(p.grad_output, problem.dtype, batch, head, first);
    grad.pack(problem.dtype, grads, count);
    output.pack(problem.dtype, head_rows(p.output, problem.dtype, batch, head, first), count);
    const int64_t row = batch * problem.lse_batch + head * problem.lse_head + first;
    // In the order in which dP sums: where one key has all the weight, dP - delta is exactly 0.
    F32 sums[kVectors];
    FASTATTN_UNROLL for (int n = 0; n < kVectors; n++) sums[n] = zero();
    for (int64_t k = 0; k < grad.steps(); k += 4) {  // rows are zero up to a whole register of steps
      FASTATTN_UNROLL for (int n = 0; n < kVectors; n++) {
        typename G::Vector left[4], right[4];
        FASTATTN_UNROLL for (int i = 0; i < 4; i++) {
          left[i] = G::load(output.transposed + (k + i) * kPanel + n * kLanes);
          right[i] = G::load(grad.transposed + (k + i) * kPanel + n * kLanes);
        }
        sums[n] = add_four<G>(left, right, sums[n]);
      }
    }
    FASTATTN_UNROLL for (int n = 0; n < kVectors; n++) store(saved.delta + n * kLanes, sums[n]);
    bool huge = false;
    for (int64_t at = 0; at < count; at += kLanes) {
      const int64_t n = min_of(kLanes, count - at);
      const Mask real = first_lanes(n);
      const F32 lse = load_first(p.lse + row + at, n);
      const Mask live = real & ~(lse == splat(-kInf));
      F32 delta = load(saved.delta + at);
      if (p.grad_lse != nullptr) delta = delta - load_first(p.grad_lse + row + at, n);
      store(saved.delta + at, select(live, delta, zero()));
      store(saved.lse + at, select(live, lse, splat(kInf)));
      store(saved.rest + at, zero());
      huge = huge || any(is_huge(lse) & live);
    }
    if (huge && problem.mask.data != nullptr && problem.mask.dtype != DType::boolean) recover_statistics(p, keys);
  }

  bool look_at(const AttentionProblem& problem, int64_t first_key, Visibility& seen) const {
    const int64_t keys = min_of(kKeyBlock, sequence.key_end - first_key);
    if (!look(problem, sequence, batch, head, first, count, first_key, keys, seen, bias)) return false;
    seen.slopes = slopes;
    if (dropout != nullptr) fill_dropout(problem, sequence, batch, head, first, first_key, seen, vectors, dropout);
    return true;
  }

 private:
  static FASTATTN_INLINE Mask first_lanes(int64_t n) { return fastattn::FASTATTN_ISA::first(n); }
  static FASTATTN_INLINE Mask is_huge(F32 lse) { return max(lse, zero() - lse) > splat(1024.f); }

  // A row whose every key carries a mask of, say, -1e9 has an lse in which the logarithm of the sum is lost. Its
  // maximum and its sum are computed again.
  __attribute__((noinline)) void recover_statistics(const AttentionBackward& p, void* keys) {
    const AttentionProblem& problem = p.problem;
    Prefetch nothing;
    statistics->reset(sink_of(problem, head));
    for (int64_t first_key = range.begin; first_key < range.end; first_key += kKeyBlock) {
      const int64_t n = min_of(kKeyBlock, sequence.key_end - first_key);
      Visibility seen;
      if (!look(problem, sequence, batch, head, first, count, first_key, n, seen, bias)) continue;
      const int64_t kv_head = head / (problem.heads / problem.kv_heads);
      const Operand block = rows_operand<G>(problem.dtype, head_rows(p.key, problem.dtype, batch, kv_head, first_key),
                                            n, problem.head_dim, false, keys);
      advance_softmax<G>(block, query, seen, score_scale(problem.scale).unit, vectors, true, nullptr,
                         tiles.probabilities, tiles.score_pairs, *statistics, nothing);
    }
    for (int64_t at = 0; at < vectors * kLanes; at += kLanes) {
      const F32 lse = load(saved.lse + at);
      const Mask huge = is_huge(lse) & (lse < splat(kInf));
      store(saved.lse + at, select(huge, load(statistics->shift + at), lse));
      store(saved.rest + at, select(huge, log(load(statistics->sum + at)), zero()));
    }
  }
};

// Panels of one head go through the keys together: each block is read, copied where that is needed and added to once
// for all of them. They stay in the second-level cache meanwhile, if heads are not too wide for that.
constexpr int kMostTogether = kPanel < 48 ? 4 : 2;
FASTATTN_INLINE int panels_together(const AttentionProblem& problem) {
  return problem.head_dim + problem.value_dim <= 256 ? kMostTogether : 1;
}

// What has become of a block of the gradients of keys and values.
enum class BlockState : uint8_t { untouched, summed, finished };

template <class G>
struct BackwardScratch {
  struct Panel : BackwardPanel<G> {
    typename G::Step *query_columns, *grad_columns;  // copies, where they are needed
    float* grad_query;                               // (kPanel, padded head_dim)
    bool fresh;                                      // grad_query holds nothing yet
    Stretches queries, grads;
  };
  Panel panels[kMostTogether];
  typename G::Step* key_columns;
  BlockState* states;
  float* partial;
  void *keys, *values;

  // Returns the bytes used.
  int64_t carve(const AttentionBackward& p, char* memory) {
    const AttentionProblem& problem = p.problem;
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
    Arena arena{start};
    const PackedRows<G> output = PackedRows<G>::take(arena, problem.value_dim);
    for (int i = 0; i < panels_together(problem); i++) {
      Panel& panel = panels[i];
      static_cast<BackwardPanel<G>&>(panel) = BackwardPanel<G>::take(arena, problem, true);
      panel.output = output;
      panel.query_columns = arena.take<typename G::Step>(kPanel / G::kPack * stretched<G>(problem.head_dim));
      panel.grad_columns = arena.take<typename G::Step>(kPanel / G::kPack * stretched<G>(problem.value_dim));
      panel.grad_query = arena.take<float>(kPanel * padded_columns(problem.head_dim));
    }
    key_columns = arena.take<typename G::Step>(kKeyBlock / G::kPack * stretched<G>(problem.head_dim));
    keys = arena.take<float>(kKeyBlock * padded_columns(problem.head_dim));
    values = arena.take<float>(kKeyBlock * padded_columns(problem.value_dim));
    states = arena.take<BlockState>(ceil_div(problem.keys, kKeyBlock));
    partial = arena.take<float>(p.parts == 1 ? p.partial_size : 0);
    return static_cast<int64_t>(arena.next - start);
  }
};

// What one task adds up: gradients of all keys, then of all values, of one kv head.
struct Partial {
  float *keys, *values;
  int64_t count, size;         // keys; floats
  int64_t key_row, value_row;  // floats
  Partial(const AttentionProblem& problem, const Sequence& sequence, float* memory)
      : keys(memory),
        count(sequence.key_end - sequence.key_begin),
        key_row(padded_columns(problem.head_dim)),
        value_row(padded_columns(problem.value_dim)) {
    values = memory + padded_rows(count) * key_row;
    size = padded_rows(count) * (key_row + value_row);
  }
  // The rows of the block from key `at` on but [begin, end) of them.
  void clear(int64_t at, int64_t begin, int64_t end) const {
    const int64_t rows = min_of(kKeyBlock, padded_rows(count) - at);
    const auto clear_rows = [](float* sums, int64_t row, int64_t first, int64_t last) {
      memset(sums + first * row, 0, static_cast<size_t>((last - first) * row) * sizeof(float));
    };
    clear_rows(keys + at * key_row, key_row, 0, begin);
    clear_rows(keys + at * key_row, key_row, end, rows);
    clear_rows(values + at * value_row, value_row, 0, begin);
    clear_rows(values + at * value_row, value_row, end, rows);
  }
};

FASTATTN_INLINE void want_keys(const AttentionBackward& p, Prefetch& prefetch, int64_t batch, int64_t kv_head,
                               int64_t first, int64_t end) {
  const AttentionProblem& problem = p.problem;
  const int64_t count = min_of(kKeyBlock, end - first), size = size_of(problem.dtype);
  prefetch.add(head_rows(p.key, problem.dtype, batch, kv_head, first), count, problem.head_dim * size);
  prefetch.add(head_rows(p.value, problem.dtype, batch, kv_head, first), count, problem.value_dim * size);
}

// Where the gradients of the keys and values of one head go.
struct KeyGradients {
  const AttentionBackward& p;
  const Partial& sums;
  int64_t batch, kv_head, first_key;  // of the sequence
  bool alone;                         // what is added to a block of them is all that ever is

  Operand rows(const AttentionResult& result, int64_t at) const {
    return head_rows(result, p.problem.dtype, batch, kv_head, first_key + at);
  }
  // What is not in the rows [begin, end) of the block from `at` on is 0.
  void clear_results(int64_t at, int64_t keys, int64_t begin, int64_t end) const {
    clear_rows(rows(p.grad_key, at), p.problem.head_dim, 0, begin);
    clear_rows(rows(p.grad_key, at), p.problem.head_dim, end, keys);
    clear_rows(rows(p.grad_value, at), p.problem.value_dim, 0, begin);
    clear_rows(rows(p.grad_value, at), p.problem.value_dim, end, keys);
  }
  void clear_rows(Operand rows, int64_t columns, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i++)
      memset(const_cast<char*>(rows.data) + i * rows.row, 0, static_cast<size_t>(columns * size_of(p.problem.dtype)));
  }

  // Adds P^T dO to those of values and dS^T Q to those of keys, of `count` panels that see `keys` keys from `at` on.
  template <class G>
  void add(int64_t at, int64_t keys, const Term* value_terms, const Term* key_terms, int count, BlockState& state,
           Prefetch& prefetch) const {
    float *key_sums = sums.keys + at * sums.key_row, *value_sums = sums.values + at * sums.value_row;
    bool one_box = true;
    int64_t begin = kKeyBlock, end = 0;
    for (int i = 0; i < count; i++) {
      const Band& band = key_terms[i].band;
      one_box = one_box && band.count == 1;
      begin = min_of(begin, band.boxes[0].begin);
      end = max_of(end, band.boxes[0].end);
    }
    if (!one_box) {  // boxes leave gaps between them
      if (state == BlockState::untouched) sums.clear(at, 0, 0);
      for (int i = 0; i < count; i++) {
        multiply_terms<G, Along::rows>(value_terms + i, 1, Accumulate<Into::added>{value_sums, sums.value_row, nullptr},
                                       prefetch);
        multiply_terms<G, Along::rows>(key_terms + i, 1, Accumulate<Into::added>{key_sums, sums.key_row, nullptr},
                                       prefetch);
      }
    } else if (alone) {
      clear_results(at, keys, min_of(begin, keys), min_of(end, keys));
      finish_terms<G, Along::rows>(p.problem.dtype, value_terms, count, rows(p.grad_value, at), keys, 1.f, nullptr,
                                   prefetch);
      finish_terms<G, Along::rows>(p.problem.dtype, key_terms, count, rows(p.grad_key, at), keys,
                                   __builtin_fabsf(p.problem.scale), nullptr, prefetch);
      state = BlockState::finished;
      return;
    } else if (state == BlockState::untouched) {
      sums.clear(at, begin, end);
      multiply_terms<G, Along::rows>(value_terms, count, Accumulate<Into::fresh>{value_sums, sums.value_row, nullptr},
                                     prefetch);
      multiply_terms<G, Along::rows>(key_terms, count, Accumulate<Into::fresh>{key_sums, sums.key_row, nullptr},
                                     prefetch);
    } else {
      multiply_terms<G, Along::rows>(value_terms, count, Accumulate<Into::added>{value_sums, sums.value_row, nullptr},
                                     prefetch);
      multiply_terms<G, Along::rows>(key_terms, count, Accumulate<Into::added>{key_sums, sums.key_row, nullptr},
                                     prefetch);
    }
    state = BlockState::summed;
  }
};

// Gradients of the queries of `count` panels, and their share of those of keys and values.
template <class G>
__attribute__((noinline)) void backward_panels(const AttentionBackward& p, int count, const KeyGradients& gradients,
                                               BackwardScratch<G>& scratch, Prefetch& prefetch) {
  const AttentionProblem& problem = p.problem;
  const float unit = score_scale(problem.scale).unit;
  const int64_t key_row = padded_columns(problem.head_dim);
  // Keys that dS K goes through at a time: stretches of longer rows, read in place, meet in half the sets of the
  // first-level cache or fewer.
  const int64_t key_step = !G::kPaired && problem.head_dim > kPanel ? kKeyBlock / 2 : kKeyBlock;
  KeyRange range = scratch.panels[0].range;
  for (int i = 0; i < count; i++) {
    auto& panel = scratch.panels[i];
    range.begin = min_of(range.begin, panel.range.begin);
    range.end = max_of(range.end, panel.range.end);
    panel.fresh = true;
    panel.queries = panel.query.in_vectors(panel.count, panel.query_columns);
    panel.grads = panel.grad.in_vectors(panel.count, panel.grad_columns);
    if (p.delta != nullptr)
      memcpy(p.delta + panel.batch * problem.lse_batch + panel.head * problem.lse_head + panel.first, panel.saved.delta,
             static_cast<size_t>(panel.count) * sizeof(float));
  }
  const bool one_block = range.end - range.begin <= kKeyBlock && key_step == kKeyBlock && can_finish(problem.head_dim);

  for (int64_t first_key = range.begin; first_key < range.end; first_key += kKeyBlock) {
    const int64_t keys_here = min_of(kKeyBlock, gradients.first_key + gradients.sums.count - first_key);
    const Operand key_rows = head_rows(p.key, problem.dtype, gradients.batch, gradients.kv_head, first_key);
    Operand keys = {}, values = {};
    Stretches key_columns = {};
    Term value_terms[kMostTogether], key_terms[kMostTogether];
    int live = 0;
    for (int i = 0; i < count; i++) {
      auto& panel = scratch.panels[i];
      Visibility seen;
      if (first_key < panel.range.begin || first_key >= panel.range.end) continue;
      const int64_t next_key = first_key + kKeyBlock;
      if (problem.mask.data != nullptr && next_key < panel.range.end)
        want_mask(problem, prefetch, panel.batch, panel.head, panel.first, panel.count, next_key,
                  min_of(kKeyBlock, panel.sequence.key_end - next_key));
      if (!panel.look_at(problem, first_key, seen)) continue;
      if (live == 0) {
        if (next_key < range.end) want_keys(p, prefetch, gradients.batch, gradients.kv_head, next_key, range.end);
        keys = rows_operand<G>(problem.dtype, key_rows, keys_here, problem.head_dim, count > 1, scratch.keys);
        values = rows_operand<G>(problem.dtype,
                                 head_rows(p.value, problem.dtype, gradients.batch, gradients.kv_head, first_key),
                                 keys_here, problem.value_dim, count > 1, scratch.values);
        key_columns =
            columns_operand<G>(problem.dtype, key_rows, keys_here, problem.head_dim, false, scratch.key_columns);
      }
      gradient_block<G>(keys, values, panel.query, panel.grad, seen, unit, panel.saved, panel.dropout, panel.tiles,
                        prefetch);
      for (int64_t key = 0; key < keys_here; key += key_step) {
        const Term term = {panel.tiles.score_columns(), key_columns,
                           seen.keys_of_queries(panel.count, key, key + key_step)};
        if (one_block)
          finish_terms<G, Along::columns>(problem.dtype, &term, 1,
                                          head_rows(p.grad_query, problem.dtype, panel.batch, panel.head, panel.first),
                                          panel.count, problem.scale, nullptr, prefetch);
        else if (panel.fresh)
          multiply_terms<G, Along::columns>(&term, 1, Accumulate<Into::fresh>{panel.grad_query, key_row, nullptr},
                                            prefetch);
        else
          multiply_terms<G, Along::columns>(&term, 1, Accumulate<Into::added>{panel.grad_query, key_row, nullptr},
                                            prefetch);
        panel.fresh = false;
      }
      const Band seers = seen.queries_of_keys(panel.count);
      value_terms[live] = {panel.tiles.probabilities, panel.grads, seers};
      key_terms[live] = {panel.tiles.scores, panel.queries, seers};
      live++;
    }
    const int64_t at = first_key - gradients.first_key;
    if (live > 0)
      gradients.add<G>(at, keys_here, value_terms, key_terms, live, scratch.states[at / kKeyBlock], prefetch);
  }
  for (int i = 0; i < count; i++) {
    auto& panel = scratch.panels[i];
    if (!panel.fresh && one_block) continue;
    if (panel.fresh) memset(panel.grad_query, 0, static_cast<size_t>(panel.count * key_row) * sizeof(float));
    narrow_rows(problem.dtype, panel.grad_query, key_row, panel.count, problem.head_dim,
                head_rows(p.grad_query, problem.dtype, panel.batch, panel.head, panel.first), problem.scale);
  }
}

int64_t backward_pair_tasks(const AttentionBackward& p) { return p.problem.batches * p.problem.kv_heads * p.parts; }

// One of `parts` tasks for a (batch, kv head): every parts-th group of panels of its query heads, the last ones, which
// see the most where there is causality, first.
struct BackwardTask {
  int64_t pair, part, batch, kv_head;
  Sequence sequence;
  int64_t together, panels, groups;  // panels of a group; panels and groups of each query head
  int64_t last;                      // group of all
  BackwardTask(const AttentionBackward& p, int64_t task)
      : pair(task / p.parts),
        part(task % p.parts),
        batch(pair / p.problem.kv_heads),
        kv_head(pair % p.problem.kv_heads),
        sequence(sequence_of(p.problem, batch)),
        together(panels_together(p.problem)),
        panels(ceil_div(sequence.query_end - sequence.query_begin, kPanel)),
        groups(ceil_div(panels, together)),
        last(p.problem.heads / p.problem.kv_heads * groups - 1 - part) {}

  struct Group {
    int64_t head, panel, count;
  };
  Group group(const AttentionBackward& p, int64_t number) const {
    const int64_t panel = number % groups * together;
    return {kv_head * (p.problem.heads / p.problem.kv_heads) + number / groups, panel,
            min_of(together, panels - panel)};
  }
};

// Rows that a group of panels will read: all but those of keys.
FASTATTN_INLINE void want_group(const AttentionBackward& p, Prefetch& prefetch, const BackwardTask& task,
                                int64_t number) {
  const AttentionProblem& problem = p.problem;
  const BackwardTask::Group group = task.group(p, number);
  const int64_t first = task.sequence.query_begin + group.panel * kPanel;
  const int64_t count = min_of(group.count * kPanel, task.sequence.query_end - first), size = size_of(problem.dtype);
  const auto want = [&](const AttentionInput& input, int64_t columns) {
    prefetch.add(head_rows(input, problem.dtype, task.batch, group.head, first), count, columns * size);
  };
  want(p.query, problem.head_dim);
  want(p.grad_output, problem.value_dim);
  want(p.output, problem.value_dim);
}

// Where a group's results go; `last`: and the first of those of the keys.
FASTATTN_INLINE void want_results(const AttentionBackward& p, Prefetch& prefetch, const BackwardTask& task,
                                  const BackwardTask::Group& group, bool last) {
  const DType dtype = p.problem.dtype;
  const int64_t size = size_of(dtype), key_row = p.problem.head_dim * size, value_row = p.problem.value_dim * size;
  const Sequence& sequence = task.sequence;
  const int64_t first = sequence.query_begin + group.panel * kPanel;
  prefetch.add(head_rows(p.grad_query, dtype, task.batch, group.head, first),
               min_of(group.count * kPanel, sequence.query_end - first), key_row);
  if (!last) return;
  const int64_t count = min_of(kKeyBlock, sequence.key_end - sequence.key_begin);
  prefetch.add(head_rows(p.grad_value, dtype, task.batch, task.kv_head, sequence.key_begin), count, value_row);
  prefetch.add(head_rows(p.grad_key, dtype, task.batch, task.kv_head, sequence.key_begin), count, key_row);
}

// Returns the number of the next task, taken just before it is needed so that its rows can be asked for.
template <class G>
__attribute__((noinline)) int64_t backward_task(const AttentionBackward& p, int64_t number, TaskQueue& queue,
                                                BackwardScratch<G>& scratch, Prefetch& prefetch) {
  const AttentionProblem& problem = p.problem;
  const BackwardTask task(p, number);
  const int64_t pair = task.pair;
  int64_t next_number = -1;
  float* memory = p.parts == 1 ? scratch.partial : p.partial + (pair * p.parts + task.part) * p.partial_size;
  const Partial sums(problem, task.sequence, memory);
  const int64_t blocks = ceil_div(sums.count, kKeyBlock);
  const bool alone = p.parts == 1 && task.last == 0 && can_finish(problem.head_dim) && can_finish(problem.value_dim);
  const KeyGradients gradients = {p, sums, task.batch, task.kv_head, task.sequence.key_begin, alone};
  memset(scratch.states, static_cast<int>(BlockState::untouched), static_cast<size_t>(blocks));
  for (int64_t i = task.last; i >= 0; i -= p.parts) {
    const BackwardTask::Group group = task.group(p, i);
    for (int64_t n = 0; n < group.count; n++)
      scratch.panels[n].load_panel(p, task.batch, group.head, group.panel + n, scratch.keys);
    want_results(p, prefetch, task, group, p.parts == 1 && i == 0);
    if (i >= p.parts) {
      want_group(p, prefetch, task, i - p.parts);
    } else {
      next_number = take_task(queue);
      if (next_number < backward_pair_tasks(p)) {
        const BackwardTask other(p, next_number);
        if (other.last >= 0) {
          want_group(p, prefetch, other, other.last);
          const BackwardTask::Group next = other.group(p, other.last);
          const Sequence& sequence = other.sequence;
          const int64_t first = sequence.query_begin + next.panel * kPanel;
          const KeyRange range =
              key_range(problem, sequence, other.batch, first, min_of(next.count * kPanel, sequence.query_end - first));
          want_keys(p, prefetch, other.batch, other.kv_head, range.begin, range.end);
        }
      }
    }
    backward_panels<G>(p, static_cast<int>(group.count), gradients, scratch, prefetch);
  }
  for (int64_t i = 0; i < blocks; i++)
    if (scratch.states[i] == BlockState::untouched) sums.clear(i * kKeyBlock, 0, 0);
  if (next_number < 0) next_number = take_task(queue);
  if (p.parts > 1) {
    if (__atomic_add_fetch(p.arrivals + pair, 1, __ATOMIC_ACQ_REL) != p.parts) return next_number;
    memory = p.partial + pair * p.parts * p.partial_size;
    for (int64_t i = 0; i < sums.size; i += kLanes) {
      F32 sum = load(memory + i);
      for (int64_t other = 1; other < p.parts; other++) sum = sum + load(memory + other * p.partial_size + i);
      store(memory + i, sum);
    }
  }
  const Partial total(problem, task.sequence, memory);
  for (int64_t i = 0; i < blocks; i++) {
    if (scratch.states[i] == BlockState::finished) continue;
    const int64_t at = i * kKeyBlock, keys = min_of(kKeyBlock, total.count - at);
    narrow_rows(problem.dtype, total.keys + at * total.key_row, total.key_row, keys, problem.head_dim,
                gradients.rows(p.grad_key, at), __builtin_fabsf(problem.scale));
    narrow_rows(problem.dtype, total.values + at * total.value_row, total.value_row, keys, problem.value_dim,
                gradients.rows(p.grad_value, at), 1.f);
  }
  return next_number;
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
