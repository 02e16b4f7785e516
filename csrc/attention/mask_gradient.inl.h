// Gradient of an additive mask: dS, summed over the dimensions along which the mask was broadcast. A pass of its own,
// in fp32, for those who ask; a task owns a slice of the result and visits everything that contributes to it in order.
#pragma once
#include "backward.inl.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Keys of a task where the mask has no dimension of queries (all panels go to one task), so that there are several.
constexpr int64_t kMaskGradientKeys = 512;

struct MaskGradientPlan {
  int64_t panels, key_ranges;  // per (batch, head) of the mask
  int64_t range_keys;          // keys of a range

  explicit MaskGradientPlan(const AttentionBackward& p) {
    const bool per_query = p.grad_mask_queries > 1, per_key = p.grad_mask_keys > 1;
    panels = per_query ? ceil_div(p.problem.queries, kPanel) : 1;
    range_keys = per_key && !per_query ? kMaskGradientKeys : max_of(1, p.problem.keys);
    key_ranges = max_of(1, ceil_div(p.problem.keys, range_keys));
  }
};

int64_t mask_gradient_tasks(const AttentionBackward& p) {
  if (p.grad_mask == nullptr) return 0;
  const MaskGradientPlan plan(p);
  return p.grad_mask_batches * p.grad_mask_heads * plan.panels * plan.key_ranges;
}

struct MaskGradientScratch {
  BackwardPanel<Single> panel;
  void *keys, *values;
  float *sums, *rows;  // (keys of a range, kPanel) and its transpose, a panel of queries at a time

  // Returns the bytes used.
  int64_t carve(const AttentionBackward& p, char* memory) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
    const int64_t range = round_up(MaskGradientPlan(p).range_keys, kKeyBlock);
    Arena arena{start};
    panel = BackwardPanel<Single>::take(arena, p.problem, false);
    panel.output = PackedRows<Single>::take(arena, p.problem.value_dim);
    keys = arena.take<float>(kKeyBlock * padded_columns(p.problem.head_dim));
    values = arena.take<float>(kKeyBlock * padded_columns(p.problem.value_dim));
    sums = arena.take<float>(range * kPanel);
    rows = arena.take<float>(kPanel * range);
    return static_cast<int64_t>(arena.next - start);
  }
};

// dS of the panel against keys [begin, end), added to scratch.sums.
__attribute__((noinline)) void add_mask_gradient(const AttentionBackward& p, int64_t begin, int64_t end,
                                                 MaskGradientScratch& scratch) {
  const AttentionProblem& problem = p.problem;
  const BackwardPanel<Single>& panel = scratch.panel;
  Prefetch nothing;
  const int64_t kv_head = panel.head / (problem.heads / problem.kv_heads);
  for (int64_t first_key = max_of(begin, panel.range.begin); first_key < min_of(end, panel.range.end);
       first_key += kKeyBlock) {
    Visibility seen;
    if (!panel.look_at(problem, first_key, seen)) continue;
    const Operand keys =
        rows_operand<Single>(problem.dtype, head_rows(p.key, problem.dtype, panel.batch, kv_head, first_key), seen.keys,
                             problem.head_dim, false, scratch.keys);
    const Operand values =
        rows_operand<Single>(problem.dtype, head_rows(p.value, problem.dtype, panel.batch, kv_head, first_key),
                             seen.keys, problem.value_dim, false, scratch.values);
    gradient_block<Single>(keys, values, panel.query, panel.grad, seen, score_scale(problem.scale).unit, panel.saved,
                           panel.dropout, panel.tiles, nothing);
    float* sums = scratch.sums + (first_key - begin) * kPanel;
    for (int i = 0; i < seen.range_count; i++)
      for (int64_t row = seen.ranges[i].begin; row < seen.ranges[i].end; row++)
        for (int64_t at = row * kPanel + seen.ranges[i].first * kLanes;
             at < row * kPanel + seen.ranges[i].last * kLanes; at += kLanes)
          store(sums + at, load(sums + at) + load(panel.tiles.scores + at));
  }
}

__attribute__((noinline)) void mask_gradient_task(const AttentionBackward& p, int64_t task,
                                                  MaskGradientScratch& scratch) {
  const AttentionProblem& problem = p.problem;
  const MaskGradientPlan plan(p);
  const int64_t range = task % plan.key_ranges, which_panel = task / plan.key_ranges % plan.panels;
  const int64_t slice = task / plan.key_ranges / plan.panels;  // (batch, head) of the mask
  const int64_t mask_batch = slice / p.grad_mask_heads, mask_head = slice % p.grad_mask_heads;
  const int64_t begin = range * plan.range_keys, end = min_of(problem.keys, begin + plan.range_keys);
  const int64_t padded = round_up(plan.range_keys, kKeyBlock);
  const bool per_query = p.grad_mask_queries > 1, per_key = p.grad_mask_keys > 1;

  memset(scratch.sums, 0, static_cast<size_t>(padded * kPanel) * sizeof(float));
  const int64_t all_panels = ceil_div(problem.queries, kPanel);
  for (int64_t batch = p.grad_mask_batches > 1 ? mask_batch : 0;
       batch < (p.grad_mask_batches > 1 ? mask_batch + 1 : problem.batches); batch++)
    for (int64_t head = p.grad_mask_heads > 1 ? mask_head : 0;
         head < (p.grad_mask_heads > 1 ? mask_head + 1 : problem.heads); head++)
      for (int64_t i = per_query ? which_panel : 0; i < (per_query ? which_panel + 1 : all_panels); i++) {
        scratch.panel.load_panel(p, batch, head, i, scratch.keys);
        add_mask_gradient(p, begin, end, scratch);
      }

  const int64_t count = end - begin, first_query = per_query ? which_panel * kPanel : 0;
  const int64_t queries = per_query ? min_of(kPanel, problem.queries - first_query) : 1;
  if (!per_query)  // lane 0 becomes the sum over the lanes
    for (int64_t row = 0; row < count; row++) {
      F32 sum = zero();
      for (int64_t at = 0; at < kPanel; at += kLanes) sum = sum + load(scratch.sums + row * kPanel + at);
      scratch.sums[row * kPanel] = reduce_add(sum);
    }
  if (!per_key)  // row 0 becomes the sum over the rows
    for (int64_t at = 0; at < kPanel; at += kLanes) {
      F32 sum = zero();
      for (int64_t row = 0; row < count; row++) sum = sum + load(scratch.sums + row * kPanel + at);
      store(scratch.sums + at, sum);
    }
  transpose_from_panel(scratch.sums, kPanel, per_key ? round_up(count, kLanes) : kLanes, scratch.rows, padded);
  const int64_t size = size_of(problem.mask.dtype), row = p.grad_mask_keys * size;
  const int64_t at = (slice * p.grad_mask_queries + first_query) * p.grad_mask_keys + (per_key ? begin : 0);
  const Operand target = {static_cast<const char*>(p.grad_mask) + at * size, row};
  narrow_rows(problem.mask.dtype, scratch.rows, padded, queries, per_key ? count : 1, target, 1.f);
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
