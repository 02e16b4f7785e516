// softmax(scale * Q K^T + mask) V, one task for a few panels of queries of one head.
#pragma once
#include "../cpu/prefetch.inl.h"
#include "band.inl.h"
#include "softmax.inl.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kMostPanels = 4;

// Panels of a task share each copy of a block of keys and values, where one has to be made.
FASTATTN_INLINE int64_t forward_panels(const AttentionForward& p) {
  const AttentionProblem& problem = p.problem;
  if (problem.dtype == DType::f32 && problem.value_dim % kRowPad == 0 && p.value.row * 4 <= kFarRows) return 1;
  const int64_t panels = ceil_div(problem.queries, kPanel);
  int64_t together = kLanes >= 16 ? 2 : kMostPanels;
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
    Statistics statistics;
    float* output;  // transposed: (padded value_dim, kPanel)
  };
  Panel panels[kMostPanels];
  float *tile, *bias, *dropout, *rows;
  typename G::Step* pairs;
  void *keys, *values;

  // Returns the bytes used.
  int64_t carve(const AttentionForward& p, char* memory) {
    const AttentionProblem& problem = p.problem;
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
    const int64_t key_columns = padded_columns(problem.head_dim), value_columns = padded_columns(problem.value_dim);
    Arena arena{start};
    for (int64_t i = 0; i < forward_panels(p); i++) {
      panels[i].query = PackedRows<G>::take(arena, problem.head_dim);
      panels[i].statistics = Statistics::take(arena);
      panels[i].output = arena.take<float>(value_columns * kPanel);
    }
    tile = arena.take<float>(kKeyBlock * kPanel);
    pairs = arena.take<typename G::Step>(G::kPaired ? kKeyBlock / 2 * kPanel : 0);
    bias = wants_bias(problem) ? arena.take<float>(kKeyBlock * kPanel) : nullptr;
    dropout = problem.dropout.enabled ? arena.take<float>(kKeyBlock * kPanel) : nullptr;
    keys = arena.take<float>(kKeyBlock * key_columns);
    values = arena.take<float>(kKeyBlock * value_columns);
    rows = arena.take<float>(kPanel * value_columns);
    return static_cast<int64_t>(arena.next - start);
  }
};

// out = O / sum and lse = max + log(sum).
template <class G>
__attribute__((noinline)) void finish_panel(const AttentionForward& p, const typename ForwardScratch<G>::Panel& panel,
                                            int64_t batch, int64_t head, int64_t first, int64_t count, float* rows) {
  const AttentionProblem& problem = p.problem;
  float* lse = p.lse + batch * problem.lse_batch + head * problem.lse_head + first;
  const int64_t columns = padded_rows(problem.value_dim);
  for (int64_t at = 0; at < count; at += kLanes) {
    const F32 sum = load(panel.statistics.sum + at), largest = load(panel.statistics.max + at);
    const Mask live = load(panel.statistics.live + at) > zero();
    const F32 factor = splat(1.f) / sum;
    for (int64_t d = 0; d < columns; d++) {
      float* o = panel.output + d * kPanel + at;
      store(o, select(live, load(o) * factor, zero()));
    }
    F32 value = largest + log(sum);
    // Visible keys, but no score above -inf: 0 / 0, as the output.
    value = select(sum == zero(), zero() * factor, value);
    value = select(live, value, splat(-kInf));
    if (count - at >= kLanes)
      store(lse + at, value);
    else
      store_first(lse + at, value, count - at);
  }
  const Operand target = head_rows(p.output, problem.dtype, batch, head, first);
  const int64_t whole = round_up(count, kLanes);
  if (problem.dtype == DType::f32 && count == whole && problem.value_dim % kLanes == 0) {
    transpose_from_panel(panel.output, whole, problem.value_dim,
                         reinterpret_cast<float*>(const_cast<char*>(target.data)), p.output.row);
    return;
  }
  const int64_t row = padded_columns(problem.value_dim);
  transpose_from_panel(panel.output, whole, round_up(problem.value_dim, kLanes), rows, row);
  narrow_rows(problem.dtype, rows, row, count, problem.value_dim, target, 1.f);
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

int64_t forward_tasks(const AttentionForward& p) {
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
  int64_t next_number = -1;

  for (int i = 0; i < panels; i++) {
    auto& panel = scratch.panels[i];
    const int64_t first = task.first + i * kPanel;
    panel.query.pack(problem.dtype, head_rows(p.query, problem.dtype, task.batch, task.head, first),
                     min_of(kPanel, task.end - first), scale.sign);
    panel.statistics.reset(sink_of(problem, task.head));
    memset(panel.output, 0, static_cast<size_t>(padded_rows(problem.value_dim) * kPanel) * sizeof(float));
  }

  for (int64_t first_key = task.range.begin; first_key < task.range.end; first_key += kKeyBlock) {
    const int64_t count = min_of(kKeyBlock, task.sequence.key_end - first_key);
    if (first_key + kKeyBlock < task.range.end) {
      want_keys(p, prefetch, task, first_key + kKeyBlock);
    } else {
      next_number = take_task(queue);
      if (next_number < queue.total) {
        const ForwardTask next(p, next_number);
        prefetch.add(head_rows(p.query, problem.dtype, next.batch, next.head, next.first), next.end - next.first,
                     problem.head_dim * size_of(problem.dtype));
        want_keys(p, prefetch, next, next.range.begin);
      }
    }
    bool ready = false;
    Operand keys = {}, values = {};
    for (int i = 0; i < panels; i++) {
      auto& panel = scratch.panels[i];
      const int64_t first = task.first + i * kPanel, queries = min_of(kPanel, task.end - first);
      const int vectors = static_cast<int>(ceil_div(queries, kLanes));
      Visibility seen;
      if (!look(problem, task.sequence, task.batch, task.head, first, queries, first_key, count, seen, scratch.bias))
        continue;
      if (!ready) {
        keys = rows_operand<G>(problem.dtype, head_rows(p.key, problem.dtype, task.batch, task.kv_head, first_key),
                               count, problem.head_dim, false, scratch.keys);
        values =
            columns_operand<G>(problem.dtype, head_rows(p.value, problem.dtype, task.batch, task.kv_head, first_key),
                               count, problem.value_dim, scratch.values);
        ready = true;
      }
      if (scratch.dropout != nullptr)
        fill_dropout(problem, task.sequence, task.batch, task.head, first, first_key, seen, vectors, scratch.dropout);
      advance_softmax<G>(keys, panel.query, seen, scale.unit, vectors, scratch.dropout, scratch.tile, scratch.pairs,
                         panel.statistics, prefetch);
      typename G::Step* probabilities;
      if constexpr (G::kPaired)
        probabilities = scratch.pairs;
      else
        probabilities = scratch.tile;
      add_seen_columns<G>(values, padded_rows(problem.value_dim), probabilities, seen, vectors, panel.output,
                          panel.statistics.alpha, prefetch);
    }
  }
  for (int i = 0; i < panels; i++) {
    const int64_t first = task.first + i * kPanel;
    finish_panel<G>(p, scratch.panels[i], task.batch, task.head, first, min_of(kPanel, task.end - first), scratch.rows);
  }
  return next_number < 0 ? take_task(queue) : next_number;
}

template <class G>
FASTATTN_INLINE void run_forward_as(const AttentionForward& p, TaskQueue& queue, char* memory) {
  ForwardScratch<G> scratch;
  scratch.carve(p, memory);
  Prefetch prefetch;
  for (int64_t task = take_task(queue); task < queue.total;) task = forward_task<G>(p, task, queue, scratch, prefetch);
}

int64_t forward_scratch(const AttentionForward& p) {
  if (p.problem.dtype == DType::bf16) return ForwardScratch<Paired>{}.carve(p, nullptr);
  return ForwardScratch<Single>{}.carve(p, nullptr);
}

void run_forward(const AttentionForward& p, TaskQueue& queue, char* memory) {
  if (p.problem.dtype == DType::bf16)
    run_forward_as<Paired>(p, queue, memory);
  else
    run_forward_as<Single>(p, queue, memory);
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
