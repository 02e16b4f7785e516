// Attention on the CPU: what the kernel table gets.
//
//   ../cpu/microkernel.inl.h  products on register tiles, in fp32 (Single) or by bf16 dot products (Paired)
//   pack.inl.h           rows of the inputs as those products want them
//   mask.inl.h           who sees whom; dropout
//   softmax.inl.h        scores and the running softmax
//   products.inl.h       products that add to an accumulator
//   forward.inl.h  few.inl.h (few queries)  backward.inl.h  mask_gradient.inl.h
#pragma once
#include "backward.inl.h"
#include "few.inl.h"
#include "forward.inl.h"
#include "mask_gradient.inl.h"

namespace fastattn::FASTATTN_ISA {
namespace {

int64_t forward_tasks(const AttentionForward& p) {
  return has_few_queries(p.problem) ? few_tasks(p.problem) : panel_tasks(p);
}

template <class G>
FASTATTN_INLINE int64_t forward_scratch_as(const AttentionForward& p) {
  return has_few_queries(p.problem) ? FewScratch<G>{}.carve(p.problem, nullptr) : ForwardScratch<G>{}.carve(p, nullptr);
}
int64_t forward_scratch(const AttentionForward& p) {
  return p.problem.dtype == DType::bf16 ? forward_scratch_as<Paired>(p) : forward_scratch_as<Single>(p);
}

template <class G>
FASTATTN_INLINE void run_forward_as(const AttentionForward& p, TaskQueue& queue, char* memory) {
  if (has_few_queries(p.problem))
    run_few<G>(p, queue, memory);
  else
    run_panels<G>(p, queue, memory);
}
void run_forward(const AttentionForward& p, TaskQueue& queue, char* memory) {
  if (p.problem.dtype == DType::bf16)
    run_forward_as<Paired>(p, queue, memory);
  else
    run_forward_as<Single>(p, queue, memory);
}

int64_t backward_tasks(const AttentionBackward& p) { return backward_pair_tasks(p) + mask_gradient_tasks(p); }

int64_t backward_scratch(const AttentionBackward& p) {
  const int64_t bytes = p.problem.dtype == DType::bf16 ? BackwardScratch<Paired>{}.carve(p, nullptr)
                                                       : BackwardScratch<Single>{}.carve(p, nullptr);
  return p.grad_mask == nullptr ? bytes : max_of(bytes, MaskGradientScratch{}.carve(p, nullptr));
}

template <class G>
FASTATTN_INLINE void run_backward_as(const AttentionBackward& p, TaskQueue& queue, char* memory) {
  const int64_t pair_tasks = backward_pair_tasks(p);
  int64_t task = take_task(queue);
  if (task < pair_tasks) {
    BackwardScratch<G> scratch;
    scratch.carve(p, memory);
    Prefetch prefetch;
    while (task < pair_tasks) task = backward_task<G>(p, task, queue, scratch, prefetch);
  }
  if (task < queue.total) {
    MaskGradientScratch scratch;
    scratch.carve(p, memory);
    for (; task < queue.total; task = take_task(queue)) mask_gradient_task(p, task - pair_tasks, scratch);
  }
}

void run_backward(const AttentionBackward& p, TaskQueue& queue, char* memory) {
  if (p.problem.dtype == DType::bf16)
    run_backward_as<Paired>(p, queue, memory);
  else
    run_backward_as<Single>(p, queue, memory);
}

constexpr AttentionKernels kAttentionKernels{{forward_tasks, forward_scratch, run_forward},
                                             {backward_tasks, backward_scratch, run_backward}};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
