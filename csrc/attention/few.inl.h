// The forward pass of no more queries than half a register has lanes. Keys lie in the lanes here, and are turned around
// for it; a task takes heads that share keys, and they share that. Each score is summed in the order of the
// other kernels, so that a backward pass finds the same scores again, bit for bit.
#pragma once
#include "forward.inl.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kFewQueries = kLanes / 2;
constexpr int kFewRows = tile_rows(kVectors);  // most queries in one register tile

FASTATTN_INLINE bool has_few_queries(const AttentionProblem& problem) { return problem.queries <= kFewQueries; }

// Heads of a task, which share keys. A matter of the problem only: with few tasks, machines of many cores have nothing
// to do.
FASTATTN_INLINE int64_t few_heads(const AttentionProblem& problem) {
  const int64_t sharing = problem.heads / problem.kv_heads;
  int64_t together = kMostPanels;
  while (together > 1 && problem.batches * problem.kv_heads * ceil_div(sharing, together) < 8) together /= 2;
  return together;
}

int64_t few_tasks(const AttentionProblem& problem) {
  if (problem.kv_heads == 0 || problem.queries == 0) return 0;
  return problem.batches * problem.kv_heads * ceil_div(problem.heads / problem.kv_heads, few_heads(problem));
}

template <class G>
struct FewScratch {
  struct Head : ForwardScratch<G>::Panel {
    float* queries;  // as they are, with the scale's sign
    float* scores;   // (kFewQueries, kKeyBlock), then probabilities
    float* bias;     // tile (key, kPanel), nullptr where there is none
    Visibility visible;
    bool looks;
  };
  Head heads[kMostPanels];
  float* rows;                      // keys that cannot be turned around where they are
  float* dropout;                   // tile (key, kPanel), nullptr where there is none
  float *bias_rows, *dropout_rows;  // the same of a head, (query, kKeyBlock)
  typename G::Step* values;

  // Returns the bytes used.
  int64_t carve(const AttentionProblem& problem, char* memory) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
    const int64_t key_columns = padded_columns(problem.head_dim), value_columns = padded_columns(problem.value_dim);
    Arena arena{start};
    for (int64_t i = 0; i < few_heads(problem); i++) {
      Head& head = heads[i];
      head.statistics = arena.take<Statistics>(1);
      head.output = arena.take<float>(value_columns * kFewQueries);
      head.queries = arena.take<float>(key_columns / G::kPack * kFewQueries);
      head.scores = arena.take<float>(kKeyBlock * kFewQueries);
      head.bias = wants_bias(problem) ? arena.take<float>(kKeyBlock * kPanel) : nullptr;
    }
    rows = arena.take<float>(kLanes * key_columns / G::kPack);
    dropout = problem.dropout.enabled ? arena.take<float>(kKeyBlock * kPanel) : nullptr;
    bias_rows = arena.take<float>(wants_bias(problem) ? kLanes * kKeyBlock : 0);
    dropout_rows = arena.take<float>(problem.dropout.enabled ? kLanes * kKeyBlock : 0);
    values = arena.take<typename G::Step>(kKeyBlock / G::kPack * stretched<G>(problem.value_dim));
    return static_cast<int64_t>(arena.next - start);
  }
};

// f(first, number of them as a type) for queries by register tiles.
template <class F>
FASTATTN_INLINE void for_few_rows(int64_t count, F f) {
  int64_t first = 0;
  for (; first + kFewRows <= count; first += kFewRows) f(first, Constant<kFewRows>{});
  if (kFewRows > 2 && first + 2 <= count) {
    f(first, Constant<2>{});
    first += 2;
  }
  for (; first < count; first++) f(first, Constant<1>{});
}

// Where the rows of query of a task and their scores are, those of all heads that look at a block; and the block, for
// what comes next to be asked for: the hardware does not foresee rows that are read side by side.
constexpr int64_t kFewAhead = 64;
struct FewRows {
  static constexpr int kMost = static_cast<int>(kMostPanels * kFewQueries);
  const char* queries[kMost];
  float* scores[kMost];
  int count;
  Operand keys, values;
};

// Products of kRows of them with `count` keys, which are turned around in registers: whole registers are written.
template <class G, int kRows>
__attribute__((noinline)) void score_few(const FewRows& few, int first, Operand keys, int64_t key, int64_t count,
                                         int64_t steps) {
  constexpr int64_t kWord = sizeof(typename G::Step);
  const char* queries[kRows];
  float* scores[kRows];
  FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
    // There may be fewer.
    queries[m] = few.queries[min_of(first + m, few.count - 1)];
    scores[m] = few.scores[min_of(first + m, few.count - 1)] + key;
  }
  // Few sums in flight would wait for each other.
  constexpr int kSets = kRows <= 2 ? 2 : 1;
  for (int64_t j = 0; j < count; j += kSets * kLanes) {
    F32 sums[kSets][kRows];
    int64_t at[kSets];
    FASTATTN_UNROLL for (int s = 0; s < kSets; s++) {
      at[s] = min_of(j + s * kLanes, count - kLanes);
      FASTATTN_UNROLL for (int m = 0; m < kRows; m++) sums[s][m] = zero();
    }
    for (int64_t c = 0; c < steps; c += kLanes) {
      FASTATTN_UNROLL for (int s = 0; s < kSets; s++) {
        F32 square[kLanes];
        FASTATTN_UNROLL for (int i = 0; i < kLanes; i++) square[i] =
            load(reinterpret_cast<const float*>(keys.data + (at[s] + i) * keys.row) + c);
        FASTATTN_UNROLL for (int i = 0; i < kLanes; i++) {
          const int64_t row = key + at[s] + i;
          __builtin_prefetch(few.keys.data + (row + kFewAhead) * few.keys.row + c * kWord, 0, 2);
          __builtin_prefetch(few.values.data + row * few.values.row + c * kWord, 0, 2);
        }
        transpose(square);
        FASTATTN_UNROLL for (int i = 0; i < kLanes; i += 4) {
          const typename G::Vector right[4] = {G::of_words(square[i]), G::of_words(square[i + 1]),
                                               G::of_words(square[i + 2]), G::of_words(square[i + 3])};
          FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
            const char* left = queries[m] + (c + i) * kWord;
            sums[s][m] = add_four<G>({G::broadcast(left), G::broadcast(left + kWord), G::broadcast(left + 2 * kWord),
                                      G::broadcast(left + 3 * kWord)},
                                     right, sums[s][m]);
          }
        }
      }
    }
    FASTATTN_UNROLL for (int s = 0; s < kSets; s++) {
      FASTATTN_UNROLL for (int m = 0; m < kRows; m++) store(scores[m] + at[s], sums[s][m]);
    }
  }
}

// All rows of query, with keys [key, key + count) of a block.
template <class G>
FASTATTN_INLINE void score_all(const FewRows& few, Operand keys, int64_t key, int64_t count, int64_t steps) {
  constexpr int kMany = kRegisters >= 32 ? 8 : 4;
  for (int first = 0; first < few.count; first += kMany) {
    const int left = few.count - first;
    const auto score = left == 1   ? score_few<G, 1>
                       : left == 2 ? score_few<G, 2>
                       : left <= 4 ? score_few<G, 4>
                                   : score_few<G, kMany>;
    score(few, first, keys, key, count, steps);
  }
}

// Keys [begin, end) of the block: in place, or copied a few at a time to where they can be loaded as they are.
template <class G>
FASTATTN_INLINE void score_keys(const FewRows& few, DType dtype, int64_t begin, int64_t end, int64_t columns,
                                float* copy) {
  const Operand keys = few.keys;
  constexpr int64_t kWord = sizeof(typename G::Step);
  const int64_t steps = ceil_div(columns, G::kPack), row = padded_columns(columns) / G::kPack;
  const bool as_they_are = dtype == (G::kPaired ? DType::bf16 : DType::f32) && columns % (kLanes * G::kPack) == 0;
  const int64_t whole = as_they_are ? begin + round_down(end - begin, kLanes) : begin;
  if (whole > begin) score_all<G>(few, {keys.data + begin * keys.row, keys.row}, begin, whole - begin, steps);
  for (int64_t key = whole; key < end; key += kLanes) {
    copy_rows<G>(dtype, {keys.data + key * keys.row, keys.row}, min_of(kLanes, end - key), columns, copy, row, kLanes,
                 1.f);
    score_all<G>(few, {reinterpret_cast<const char*>(copy), row * kWord}, key, kLanes, steps);
  }
}

// The first kLanes columns of a tile (key, kPanel), keys [begin, end), become rows: (query, kKeyBlock).
__attribute__((noinline)) void turn_tile(const float* tile, int64_t begin, int64_t end, float* rows) {
  for (int64_t j = begin; j < end; j += kLanes) transpose_tile(tile + j * kPanel, kPanel, rows + j, kKeyBlock);
}

FASTATTN_INLINE void turn_bias(const Visibility& seen, int64_t count, int64_t begin, int64_t end, float* rows) {
  if (seen.bias_row != 0) return turn_tile(seen.bias, begin, end, rows);
  for (int64_t i = 0; i < count; i++)
    for (int64_t j = begin; j < end; j += kLanes) store(rows + i * kKeyBlock + j, splat(seen.bias[i]));
}

// Which of kLanes keys from `key` on query number `i` sees, whatever the bias says.
FASTATTN_INLINE Mask seen_keys(const Visibility& seen, int64_t key, int64_t i) {
  const auto from = [&](int64_t first) { return iota() >= splat_int(static_cast<int32_t>(max_of(first - key, -1))); };
  const auto before = [&](int64_t end) {
    return iota() < splat_int(static_cast<int32_t>(min_of(max_of(end - key, 0), kLanes)));
  };
  const Mask window = from(i + seen.low) & before(i + seen.high + 1);
  return (window | before(seen.prefix)) & from(seen.begins[0]) & before(min_of(seen.ends[0], seen.keys));
}

// Products of keys [begin, end), registers of them, become probabilities relative to the maximum, which moves with
// them.
template <class G, bool kFinished>
__attribute__((noinline)) void raise_few(const Visibility& seen, const float* bias, const float* dropout, float unit,
                                         int64_t count, int64_t begin, int64_t end, float* scores,
                                         Statistics& statistics) {
  const bool clean = seen.range_count == 1 && seen.ranges[0].view == View::clean && seen.ranges[0].begin <= begin &&
                     end <= seen.ranges[0].end;
  store(statistics.block, splat(-kInf));
  store(statistics.added, zero());
  for (int64_t i = 0; i < count; i++) {
    float* row = scores + i * kKeyBlock;
    F32 largest = splat(-kInf), live = splat(clean ? 1.f : statistics.live[i]);
    for (int64_t j = begin; j < end; j += kLanes) {
      F32 x = load(row + j);
      if (!clean) {
        Mask visible = seen_keys(seen, j, i);
        if constexpr (kFinished) {
          F32 slope;
          x = finish_score(seen, x, unit, bias == nullptr ? nullptr : bias + i * kKeyBlock + j, visible, slope);
        }
        x = select(visible, x, splat(-kInf));
        live = select(visible, splat(1.f), live);
        store(row + j, x);
      }
      largest = max(largest, x);
    }
    statistics.block[i] = reduce_max(largest);
    statistics.live[i] = reduce_max(live);
  }
  // All queries at once.
  const F32 before = load(statistics.max), block = load(statistics.block) * splat(kFinished ? 1.f : unit);
  const F32 now = max(before, block), shift = select(now == splat(-kInf), zero(), now), alpha = exp(before - shift);
  store(statistics.max, now);
  store(statistics.shift, shift);
  store(statistics.alpha, alpha);
  const Relative<G, kFinished> relative(unit);
  for (int64_t i = 0; i < count; i++) {
    float* row = scores + i * kKeyBlock;
    const F32 taken = relative.shift(splat(statistics.shift[i]));
    F32 sum = zero();
    for (int64_t j = begin; j < end; j += kLanes) {
      F32 p[1] = {relative.take(load(row + j), taken)};
      relative.template raise<kForSums>(p);
      sum = sum + p[0];
      if (dropout != nullptr) p[0] = p[0] * load(dropout + i * kKeyBlock + j);
      if constexpr (G::kPaired)
        store(reinterpret_cast<bf16*>(row) + j, p[0]);
      else
        store(row + j, p[0]);
    }
    statistics.added[i] = reduce_add(sum);
  }
  store(statistics.sum, fma(load(statistics.sum), alpha, load(statistics.added)));
}

// output = alpha * output + P V
template <class G>
__attribute__((noinline)) void weigh_few(const typename FewScratch<G>::Head& head, int64_t count,
                                         const Stretches& values, int64_t output_row) {
  constexpr int64_t kWord = sizeof(typename G::Step);
  const Band band = head.visible.keys_of_queries(count, 0, kKeyBlock);
  const float* alpha = head.statistics->alpha;
  for (int64_t column = 0; column < values.columns; column += values.width)
    with_width(static_cast<int>(ceil_div(min_of(values.width, values.columns - column), kLanes)), [&](auto width) {
      for_few_rows(count, [&](int64_t i, auto rows) {
        Tile<rows.value, width.value> tile;
        clear(tile);
        const int64_t begin = band.from(band.boxes[0], i) / G::kPack;
        const int64_t end = ceil_div(band.to(band.boxes[0], i, rows.value), G::kPack);
        const char* left = reinterpret_cast<const char*>(head.scores + i * kKeyBlock) + begin * kWord;
        const auto* right = reinterpret_cast<const typename G::Step*>(
            values.data + column / values.width * values.next + begin * values.row);
        multiply<G, 0>(tile, left, kKeyBlock * int64_t{sizeof(float)}, kWord, right, values.row / kWord, end - begin);
        float* to = head.output + column;
        if (head.seen)
          Accumulate<Into::scaled>{to, output_row, alpha}(i, tile);
        else
          Accumulate<Into::fresh>{to, output_row, alpha}(i, tile);
      });
    });
}

template <class G>
__attribute__((noinline)) void few_task(const AttentionForward& p, int64_t number, FewScratch<G>& scratch) {
  const AttentionProblem& problem = p.problem;
  const int64_t sharing = problem.heads / problem.kv_heads, together = few_heads(problem);
  const int64_t groups = ceil_div(sharing, together);
  const int64_t batch = number / groups / problem.kv_heads, kv_head = number / groups % problem.kv_heads;
  const int64_t first_head = kv_head * sharing + number % groups * together;
  const int heads = static_cast<int>(min_of(together, (kv_head + 1) * sharing - first_head));
  const Sequence sequence = sequence_of(problem, batch);
  const int64_t first = sequence.query_begin, count = sequence.query_end - first;
  if (count == 0) return;
  const KeyRange range = key_range(problem, sequence, batch, first, count);
  const ScoreScale scale = score_scale(problem.scale);
  const int64_t query_row = padded_columns(problem.head_dim) / G::kPack, output_row = padded_columns(problem.value_dim);

  for (int i = 0; i < heads; i++) {
    auto& head = scratch.heads[i];
    copy_rows<G>(problem.dtype, head_rows(p.query, problem.dtype, batch, first_head + i, first), count,
                 problem.head_dim, head.queries, query_row, count, scale.sign);
    head.statistics->reset(sink_of(problem, first_head + i));
    head.seen = false;
  }

  for (int64_t first_key = range.begin; first_key < range.end; first_key += kKeyBlock) {
    const int64_t keys = min_of(kKeyBlock, sequence.key_end - first_key);
    int64_t begin = keys, end = 0;  // of what anybody sees
    FewRows few;
    few.count = 0;
    few.keys = head_rows(p.key, problem.dtype, batch, kv_head, first_key);
    few.values = head_rows(p.value, problem.dtype, batch, kv_head, first_key);
    for (int i = 0; i < heads; i++) {
      auto& head = scratch.heads[i];
      head.looks =
          look(problem, sequence, batch, first_head + i, first, count, first_key, keys, head.visible, head.bias);
      if (!head.looks) continue;
      begin = min_of(begin, round_down(head.visible.begins[0], kLanes));
      end = max_of(end, head.visible.ends[0]);
      for (int64_t q = 0; q < count; q++) {
        few.queries[few.count] = reinterpret_cast<const char*>(head.queries + q * query_row);
        few.scores[few.count++] = head.scores + q * kKeyBlock;
      }
    }
    if (end <= begin) continue;
    end = min_of(end, keys);
    score_keys<G>(few, problem.dtype, begin, end, problem.head_dim, scratch.rows);
    end = round_up(end, kLanes);
    const Stretches values =
        columns_operand<G>(problem.dtype, few.values, keys, problem.value_dim, heads > 1, scratch.values);
    for (int i = 0; i < heads; i++) {
      auto& head = scratch.heads[i];
      if (!head.looks) continue;
      if (head.visible.bias != nullptr) turn_bias(head.visible, count, begin, end, scratch.bias_rows);
      if (scratch.dropout != nullptr) {
        fill_dropout(problem, sequence, batch, first_head + i, first, first_key, head.visible, 1, scratch.dropout);
        turn_tile(scratch.dropout, begin, end, scratch.dropout_rows);
      }
      const float* bias = head.visible.bias == nullptr ? nullptr : scratch.bias_rows;
      const float* dropout = scratch.dropout == nullptr ? nullptr : scratch.dropout_rows;
      if (head.visible.finished())
        raise_few<G, true>(head.visible, bias, dropout, scale.unit, count, begin, end, head.scores, *head.statistics);
      else
        raise_few<G, false>(head.visible, bias, dropout, scale.unit, count, begin, end, head.scores, *head.statistics);
      weigh_few<G>(head, count, values, output_row);
      head.seen = true;
    }
  }
  for (int i = 0; i < heads; i++) finish_panel<G>(p, scratch.heads[i], batch, first_head + i, first, count);
}

template <class G>
FASTATTN_INLINE void run_few(const AttentionForward& p, TaskQueue& queue, char* memory) {
  FewScratch<G> scratch;
  scratch.carve(p.problem, memory);
  for (int64_t task = take_task(queue); task < queue.total; task = take_task(queue)) few_task<G>(p, task, scratch);
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
