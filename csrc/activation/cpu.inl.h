// An activation of input + bias, forward and backward, fp32 inside. The bias' gradient is the sum of the input's over
// the rows: fp32 sums of fixed chunks of rows, combined in a fixed order.
#pragma once
#include "../cpu/activation.h"
#include "../cpu/elementwise.h"
#include "../cpu/pipeline.h"
#include "../cpu/streaming.h"
#include "params.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kBiasRowsTogether = 4;  // share the loads and stores of the bias' sums

// Elements of a bias that is not there are left out of the sum.
template <class T, class B, class Where>
FASTATTN_INLINE F32x2 add_bias(F32x2 x, const T* kind, const B* bias, int64_t c, Where where) {
  return bias == nullptr ? x : x + get_beside(kind, bias + c, where);
}
template <Activation kind, bool Fine>
FASTATTN_INLINE F32x2 activate(F32x2 x) {
  return {activate<kind, Fine>(x.a), activate<kind, Fine>(x.b)};
}
template <Activation kind, bool Fine>
FASTATTN_INLINE F32x2 activation_derivative(F32x2 x) {
  return {activation_derivative<kind, Fine>(x.a), activation_derivative<kind, Fine>(x.b)};
}

template <class T, class B, Activation kind>
void activation_forward(const ActivationForward& p, TaskQueue& queue) {
  const B* const bias = static_cast<const B*>(p.bias);
  with_streaming(p.streaming && fit_for_streaming<T>(p.output, p.columns), [&](auto stream) FASTATTN_LAMBDA {
    for_pieces({p.rows, p.columns}, queue, [&](int64_t row, int64_t column, int64_t columns) FASTATTN_LAMBDA {
      const T* const x = static_cast<const T*>(p.input) + row * p.input_stride + column;
      T* const y = static_cast<T*>(p.output) + row * p.columns + column;
      for_columns<2>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
        prefetch_pair(x + c + kAheadBytes / static_cast<int64_t>(sizeof(T)));
        const F32x2 v = add_bias(get(x + c, Cheapest{}, where), x, bias, column + c, where);
        put_result<decltype(stream)::value>(y + c, activate<kind, kFine<T>>(v), where);
      });
    });
  });
}

template <class T, class B, Activation kind, int Rows>
FASTATTN_INLINE void activation_backward_rows(const ActivationBackward& p, int64_t row, int64_t column, int64_t columns,
                                              float* sums) {
  const B* const bias = static_cast<const B*>(p.bias);
  const T* const dy = static_cast<const T*>(p.grad_output) + row * p.grad_output_stride + column;
  const T* const x = static_cast<const T*>(p.input) + row * p.input_stride + column;
  T* const dx = static_cast<T*>(p.grad_input) + row * p.columns + column;
  for_columns<1>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
    F32x2 sum = sums == nullptr ? splat2(0.f) : get(sums + c, Natural{}, where);
    FASTATTN_UNROLL for (int r = 0; r < Rows; r++) {
      const F32x2 v = add_bias(get(x + r * p.input_stride + c, Cheapest{}, where), x, bias, column + c, where);
      const F32x2 g =
          get(dy + r * p.grad_output_stride + c, Cheapest{}, where) * activation_derivative<kind, kFine<T>>(v);
      sum = sum + g;
      put(dx + r * p.columns + c, g, Cheapest{}, where);
    }
    if (sums != nullptr) put(sums + c, sum, Natural{}, where);
  });
}

// The chunks' sums in a tree of pairs, into the first one's; then out in their natural order.
template <class T, class B>
void activation_bias_gradient(const ActivationBackward& p) {
  const int64_t chunks = ceil_div(p.rows, p.chunk_rows);
  float* const partials = p.partials;
  for (int64_t step = 1; step < chunks; step *= 2)
    for (int64_t chunk = 0; chunk + step < chunks; chunk += 2 * step) {
      float *const to = partials + chunk * p.columns, *const from = partials + (chunk + step) * p.columns;
      for_columns<1>(p.columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
        put(to + c, get(to + c, Natural{}, where) + get(from + c, Natural{}, where), Natural{}, where);
      });
    }
  B* const out = static_cast<B*>(p.grad_bias);
  for_columns<1>(p.columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
    const F32x2 sum = chunks > 0 ? get(partials + c, Natural{}, where) : splat2(0.f);
    put(out + c, from_cheapest(static_cast<const T*>(nullptr), sum, where), Natural{}, where);
  });
}

template <class T, class B, Activation kind>
void activation_backward(const ActivationBackward& p, TaskQueue& queue) {
  if (p.grad_bias == nullptr) {
    return for_pieces({p.rows, p.columns}, queue, [&](int64_t row, int64_t column, int64_t columns) FASTATTN_LAMBDA {
      activation_backward_rows<T, B, kind, 1>(p, row, column, columns, nullptr);
    });
  }
  for (int64_t task; (task = take_task(queue)) < queue.total;) {
    float* const sums = p.partials + task * p.columns;
    int64_t row = task * p.chunk_rows;
    const int64_t end = min_of(row + p.chunk_rows, p.rows);
    if (row < end) memset(sums, 0, static_cast<size_t>(p.columns) * sizeof(float));
    for (; row + kBiasRowsTogether <= end; row += kBiasRowsTogether)
      activation_backward_rows<T, B, kind, kBiasRowsTogether>(p, row, 0, p.columns, sums);
    for (; row < end; row++) activation_backward_rows<T, B, kind, 1>(p, row, 0, p.columns, sums);
    if (finish_task(queue)) activation_bias_gradient<T, B>(p);
  }
}

// Calls f with the compile-time constant that equals `kind`, of those that have ops of their own.
template <class F>
FASTATTN_INLINE void with_own_activation(Activation kind, F f) {
  with_activation<Activation::gelu, Activation::gelu_tanh, Activation::gelu_sigmoid, Activation::silu>(kind, f);
}

template <class T, class B>
void activation_forward(const ActivationForward& p, TaskQueue& queue) {
  with_own_activation(p.activation, [&](auto kind) { activation_forward<T, B, decltype(kind)::value>(p, queue); });
}
template <class T, class B>
void activation_backward(const ActivationBackward& p, TaskQueue& queue) {
  with_own_activation(p.activation, [&](auto kind) { activation_backward<T, B, decltype(kind)::value>(p, queue); });
}

void run_activation_forward(const ActivationForward& p, TaskQueue& queue, char*) {
  const bool wide = p.bias_dtype == DType::f32;
  switch (p.dtype) {
    case DType::bf16:
      return wide ? activation_forward<bf16, float>(p, queue) : activation_forward<bf16, bf16>(p, queue);
    case DType::f16:
      return wide ? activation_forward<f16, float>(p, queue) : activation_forward<f16, f16>(p, queue);
    default:
      return activation_forward<float, float>(p, queue);
  }
}
void run_activation_backward(const ActivationBackward& p, TaskQueue& queue, char*) {
  const bool wide = p.bias_dtype == DType::f32;
  switch (p.dtype) {
    case DType::bf16:
      return wide ? activation_backward<bf16, float>(p, queue) : activation_backward<bf16, bf16>(p, queue);
    case DType::f16:
      return wide ? activation_backward<f16, float>(p, queue) : activation_backward<f16, f16>(p, queue);
    default:
      return activation_backward<float, float>(p, queue);
  }
}

int64_t activation_forward_tasks(const ActivationForward& p) { return Pieces{p.rows, p.columns}.count(); }
int64_t activation_forward_scratch(const ActivationForward&) { return 0; }
int64_t activation_backward_tasks(const ActivationBackward& p) {
  if (p.grad_bias == nullptr) return Pieces{p.rows, p.columns}.count();
  return max_of(ceil_div(p.rows, p.chunk_rows), 1);  // no rows have a gradient of the bias, too
}
int64_t activation_backward_scratch(const ActivationBackward&) { return 0; }

constexpr ActivationKernels kActivationKernels{
    {activation_forward_tasks, activation_forward_scratch, run_activation_forward},
    {activation_backward_tasks, activation_backward_scratch, run_activation_backward}};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
