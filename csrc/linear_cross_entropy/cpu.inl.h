// Losses and gradients of rows of logits, a row at a time, so that a row comes from memory once and goes back once.
#pragma once
#include "../cpu/microkernel.inl.h"
#include "../cross_entropy/cpu.inl.h"
#include "params.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Gradients of class numbers alone are computed in place; others need the logits more than once.
FASTATTN_INLINE bool gradients_in_place(const LogitRows& p) {
  return p.backward.probabilities == nullptr && p.backward.label_smoothing == 0.f;
}

int64_t logit_rows_tasks(const LogitRows& p) {
  return p.forward.columns == 0 && !p.losses ? 0
                                             : ceil_div(p.forward.rows, cross_entropy_rows_per_task(p.forward.columns));
}
int64_t logit_rows_scratch(const LogitRows& p) {
  return p.gradients && !gradients_in_place(p)
             ? round_up(p.forward.columns, kPair) * static_cast<int64_t>(sizeof(float))
             : 0;
}

// In ascending order, so that `to` may begin where `from` does.
void narrow_row(const float* from, bf16* to, int64_t columns) {
  for_columns<1>(columns, [&](int64_t c, int, auto where)
                              FASTATTN_LAMBDA { put(to + c, get(from + c, Natural{}, where), Natural{}, where); });
}

void run_logit_rows(const LogitRows& p, TaskQueue& queue, char* scratch) {
  const int64_t columns = p.forward.columns, rows_per_task = cross_entropy_rows_per_task(columns);
  const bool in_place = gradients_in_place(p);
  double weight_sum = static_cast<double>(columns);
  if (p.backward.weight != nullptr && p.backward.label_smoothing != 0.f) {
    weight_sum = 0.0;
    for (int64_t c = 0; c < columns; c++) weight_sum += static_cast<double>(p.backward.weight[c]);
  }
  for (int64_t task; (task = take_task(queue)) < queue.total;) {
    const int64_t end = min_of((task + 1) * rows_per_task, p.forward.rows);
    for (int64_t row = task * rows_per_task; row < end; row++) {
      float* const x = p.logits + row * columns;
      if (p.losses) {
        const Exponentials e = sum_exponentials(static_cast<const float*>(nullptr), x, columns, x);
        cross_entropy_forward_row<float, float>(p.forward, row, x, e);
      }
      if (!p.gradients || columns == 0) continue;
      float* const dx = in_place ? x : reinterpret_cast<float*>(scratch);
      cross_entropy_backward_row<float, float, false>(p.backward, row, static_cast<float>(weight_sum), x, dx);
      if (p.narrow)
        narrow_row(dx, reinterpret_cast<bf16*>(x), columns);
      else if (!in_place)
        memcpy(x, dx, static_cast<size_t>(columns) * sizeof(float));
    }
  }
}

constexpr LinearCrossEntropyKernels kLinearCrossEntropyKernels{{logit_rows_tasks, logit_rows_scratch, run_logit_rows},
                                                               Paired::kPaired};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
