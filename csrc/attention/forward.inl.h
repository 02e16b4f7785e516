// softmax(scale * Q K^T + mask) V, one task for a few panels of queries of one head.
#pragma once
#include "../cpu/prefetch.inl.h"
#include "softmax.inl.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kMostPanels = 4;

// Panels of a task share each block of keys and values: its way into the second-level cache and its copies.
FASTATTN_INLINE int64_t forward_panels(const AttentionForward& p) {
  const AttentionProblem& problem = p.problem;
  const int64_t panels = ceil_div(problem.queries, kPanel);
  int64_t together = kMostPanels;
  while (together > 1 && problem.batches * problem.heads * ceil_div(panels, together) < 16) together /= 2;
  return together;
}

FASTATTN_INLINE int64_t forward_groups(const AttentionForward& p) {
  return ceil_div(ceil_div(p.problem.queries, kPanel), forward_panels(p));
}

template <class G>
struct ForwardScratch {
  struct Panel {
    PackedRows<G> query;
    Statistics* statistics;
    float* output;  // (kPanel, padded value_dim), once some block has been seen
    bool seen, finished;
  };
  Panel panels[kMostPanels];
  float *tile, *bias, *dropout;
  typename G::Step* pairs;
  typename G::Step* values;
  void* keys;

  // Returns the bytes used.
  int64_t carve(const AttentionForward& p, char* memory) {
    const AttentionProblem& problem = p.problem;
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
    const int64_t key_columns = padded_columns(problem.head_dim), value_columns = padded_columns(problem.value_dim);
    Arena arena{start};
    for (int64_t i = 0; i < forward_panels(p); i++) {
      panels[i].query = PackedRows<G>::take(arena, problem.head_dim);
      panels[i].statistics = arena.take<Statistics>(1);
      panels[i].output = arena.take<float>(value_columns * kPanel);
    }
    tile = arena.take<float>(kKeyBlock * kPanel);
    pairs = arena.take<typename G::Step>(G::kPaired ? kKeyBlock / 2 * kPanel : 0);
    bias = wants_bias(problem) ? arena.take<float>(kKeyBlock * kPanel) : nullptr;
    dropout = problem.dropout.enabled ? arena.take<float>(kKeyBlock * kPanel) : nullptr;
    keys = arena.take<float>(kKeyBlock * key_columns);
    values = arena.take<typename G::Step>(kKeyBlock / G::kPack * stretched<G>(problem.value_dim));
    return static_cast<int64_t>(arena.next - start);
  }
};

// lse = max + log(sum), and what the rows of O have to be multiplied by, 1 / sum. True if every query sees something.
__attribute__((noinline)) bool finish_statistics(const AttentionForward& p, Statistics& statistics, int64_t batch,
                                                 int64_t head, int64_t first, int64_t count) {
  const AttentionProblem& problem = p.problem;
  float* lse = p.lse + batch * problem.lse_batch + head * problem.lse_head + first;
  bool all_live = true;
  for (int64_t at = 0; at < count; at += kLanes) {
    const F32 sum = load(statistics.sum + at), largest = load(statistics.max + at);
    const Mask live = load(statistics.live + at) > zero();
    all_live = all_live && all(live | ~fastattn::FASTATTN_ISA::first(count - at));
    const F32 factor = splat(1.f) / sum;
    store(statistics.alpha + at, factor);
    F32 value = largest + log(sum);
    // Visible keys, but no score above -inf: 0 / 0, as the output.
    value = select(sum == zero(), zero() * factor, value);
    value = select(live, value, splat(-kInf));
    if (count - at >= kLanes)
      store(lse + at, value);
    else
      store_first(lse + at, value, count - at);
  }
  return all_live;
}

// out = O / sum.
template <class G>
__attribute__((noinline)) void finish_panel(const AttentionForward& p, const typename ForwardScratch<G>::Panel& panel,
                                            int64_t batch, int64_t head, int64_t first, int64_t count) {
  const AttentionProblem& problem = p.problem;
  const int64_t row = padded_columns(problem.value_dim);
  float* factors = panel.statistics->alpha;
  finish_statistics(p, *panel.statistics, batch, head, first, count);
  for (int64_t i = 0; i < count; i++)
    if (panel.statistics->live[i] == 0.f || !panel.seen) {
      factors[i] = 0.f;
      memset(panel.output + i * row, 0, static_cast<size_t>(row) * sizeof(float));
    }
  narrow_rows(problem.dtype, panel.output, row, count, problem.value_dim,
              head_rows(p.output, problem.dtype, batch, head, first), 1.f, factors);
}

// The queries [first, end) of one head.
struct ForwardTask {
  int64_t batch, head, kv_head, first, end;
  Sequence sequence;
  KeyRange range;

  ForwardTask(const AttentionForward& p, int64_t task) {
    const AttentionProblem& problem = p.problem;
    const int64_t queries = forward_panels(p) * kPanel;
    int64_t groups = forward_groups(p);
    if (problem.sequences == nullptr) {
      batch = task / groups / problem.heads;
    } else {
      int64_t end = problem.batches;
      for (batch = 0; end - batch > 1;) {
        const int64_t middle = (batch + end) / 2;
        (p.first_tasks[middle] <= task ? batch : end) = middle;
      }
      task -= p.first_tasks[batch];
      groups = (p.first_tasks[batch + 1] - p.first_tasks[batch]) / problem.heads;
    }
    sequence = sequence_of(problem, batch);
    head = task / groups % problem.heads;
    kv_head = head / (problem.heads / problem.kv_heads);
    first = sequence.query_begin + (groups - 1 - task % groups) * queries;  // causal: the longest first
    end = min_of(sequence.query_end, first + queries);
    range = key_range(problem, sequence, batch, first, end - first);
  }
};

int64_t panel_tasks(const AttentionForward& p) {
  const AttentionProblem& problem = p.problem;
  if (problem.sequences == nullptr) return problem.batches * problem.heads * forward_groups(p);
  int64_t tasks = 0;
  for (int64_t i = 0; i < problem.batches; i++) {
    const AttentionSequence& rows = problem.sequences[i];
    p.first_tasks[i] = tasks;
    tasks += problem.heads * ceil_div(ceil_div(rows.query_end - rows.query_begin, kPanel), forward_panels(p));
  }
  p.first_tasks[problem.batches] = tasks;
  return tasks;
}

FASTATTN_INLINE void want_keys(const AttentionForward& p, Prefetch& prefetch, const ForwardTask& task, int64_t first) {
  const AttentionProblem& problem = p.problem;
  const int64_t count = min_of(kKeyBlock, task.range.end - first), size = size_of(problem.dtype);
  prefetch.add(head_rows(p.key, problem.dtype, task.batch, task.kv_head, first), count, problem.head_dim * size);
  prefetch.add(head_rows(p.value, problem.dtype, task.batch, task.kv_head, first), count, problem.value_dim * size);
}

// Returns the number of the next task, taken just before it is needed so that its rows can be asked for.
template <class G>
__attribute__((noinline)) int64_t forward_task(const AttentionForward& p, int64_t number, TaskQueue& queue,
                                               ForwardScratch<G>& scratch, Prefetch& prefetch) {
  const AttentionProblem& problem = p.problem;
  const ForwardTask task(p, number);
  const int panels = static_cast<int>(ceil_div(task.end - task.first, kPanel));
  const ScoreScale scale = score_scale(problem.scale);
  const bool one_block = task.range.end - task.range.begin <= kKeyBlock && can_finish(problem.value_dim);
  int64_t next_number = -1;

  for (int i = 0; i < panels; i++) {
    auto& panel = scratch.panels[i];
    const int64_t first = task.first + i * kPanel;
    panel.query.pack(problem.dtype, head_rows(p.query, problem.dtype, task.batch, task.head, first),
                     min_of(kPanel, task.end - first), scale.sign);
    panel.statistics->reset(sink_of(problem, task.head));
    panel.seen = panel.finished = false;
  }

  for (int64_t first_key = task.range.begin; first_key < task.range.end; first_key += kKeyBlock) {
    const int64_t count = min_of(kKeyBlock, task.sequence.key_end - first_key);
    if (first_key + kKeyBlock < task.range.end) {
      want_keys(p, prefetch, task, first_key + kKeyBlock);
    } else {
      prefetch.add(head_rows(p.output, problem.dtype, task.batch, task.head, task.first), task.end - task.first,
                   problem.value_dim * size_of(problem.dtype));
      next_number = take_task(queue);
      if (next_number < queue.total) {
        const ForwardTask next(p, next_number);
        prefetch.add(head_rows(p.query, problem.dtype, next.batch, next.head, next.first), next.end - next.first,
                     problem.head_dim * size_of(problem.dtype));
        want_keys(p, prefetch, next, next.range.begin);
      }
    }
    bool ready = false;
    Operand keys = {};
    Stretches values = {};
    for (int i = 0; i < panels; i++) {
      auto& panel = scratch.panels[i];
      const int64_t first = task.first + i * kPanel, queries = min_of(kPanel, task.end - first);
      const int vectors = static_cast<int>(ceil_div(queries, kLanes));
      if (problem.mask.data != nullptr && first_key + kKeyBlock < task.range.end)
        want_mask(problem, prefetch, task.batch, task.head, first, queries, first_key + kKeyBlock,
                  min_of(kKeyBlock, task.sequence.key_end - first_key - kKeyBlock));
      Visibility seen;
      if (!look(problem, task.sequence, task.batch, task.head, first, queries, first_key, count, seen, scratch.bias))
        continue;
      if (!ready) {
        keys = rows_operand<G>(problem.dtype, head_rows(p.key, problem.dtype, task.batch, task.kv_head, first_key),
                               count, problem.head_dim, panels > 1, scratch.keys);
        values =
            columns_operand<G>(problem.dtype, head_rows(p.value, problem.dtype, task.batch, task.kv_head, first_key),
                               count, problem.value_dim, true, scratch.values);
        ready = true;
      }
      if (scratch.dropout != nullptr)
        fill_dropout(problem, task.sequence, task.batch, task.head, first, first_key, seen, vectors, scratch.dropout);
      const bool rescaled =
          advance_softmax<G>(keys, panel.query, seen, scale.unit, vectors, !panel.seen, scratch.dropout, scratch.tile,
                             scratch.pairs, *panel.statistics, prefetch);
      const typename G::Step* probabilities;
      if constexpr (G::kPaired)
        probabilities = scratch.pairs;
      else
        probabilities = scratch.tile;
      const Term term = {probabilities, values, seen.keys_of_queries(queries, 0, kKeyBlock)};
      const int64_t row = padded_columns(problem.value_dim);
      const float* alpha = panel.statistics->alpha;
      if (one_block && finish_statistics(p, *panel.statistics, task.batch, task.head, first, queries)) {
        finish_terms<G, Along::columns>(problem.dtype, &term, 1,
                                        head_rows(p.output, problem.dtype, task.batch, task.head, first), queries, 1.f,
                                        alpha, prefetch);
        panel.finished = true;
      } else if (!panel.seen) {
        multiply_terms<G, Along::columns>(&term, 1, Accumulate<Into::fresh>{panel.output, row, alpha}, prefetch);
      } else if (rescaled) {
        multiply_terms<G, Along::columns>(&term, 1, Accumulate<Into::scaled>{panel.output, row, alpha}, prefetch);
      } else {
        multiply_terms<G, Along::columns>(&term, 1, Accumulate<Into::added>{panel.output, row, alpha}, prefetch);
      }
      panel.seen = true;
    }
  }
  for (int i = 0; i < panels; i++) {
    const int64_t first = task.first + i * kPanel;
    if (!scratch.panels[i].finished)
      finish_panel<G>(p, scratch.panels[i], task.batch, task.head, first, min_of(kPanel, task.end - first));
  }
  return next_number < 0 ? take_task(queue) : next_number;
}

template <class G>
FASTATTN_INLINE void run_panels(const AttentionForward& p, TaskQueue& queue, char* memory) {
  ForwardScratch<G> scratch;
  scratch.carve(p, memory);
  Prefetch prefetch;
  for (int64_t task = take_task(queue); task < queue.total;) task = forward_task<G>(p, task, queue, scratch, prefetch);
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
