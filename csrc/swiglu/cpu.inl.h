// silu(gate) * up, forward and backward, fp32 inside; the backward makes both gradients in one pass.
#pragma once
#include "../cpu/activation.h"
#include "../cpu/elementwise.h"
#include "../cpu/pipeline.h"
#include "../cpu/streaming.h"
#include "params.h"

namespace fastattn::FASTATTN_ISA {
namespace {

template <class T>
constexpr int64_t kSwigluAhead = kAheadBytes / sizeof(T);

template <class T>
void swiglu_forward(const SwigluForward& p, TaskQueue& queue) {
  with_streaming(p.streaming && fit_for_streaming<T>(p.output, p.columns), [&](auto stream) FASTATTN_LAMBDA {
    for_pieces({p.rows, p.columns}, queue, [&](int64_t row, int64_t column, int64_t columns) FASTATTN_LAMBDA {
      const T* const gate = static_cast<const T*>(p.gate) + row * p.gate_stride + column;
      const T* const up = static_cast<const T*>(p.up) + row * p.up_stride + column;
      T* const y = static_cast<T*>(p.output) + row * p.columns + column;
      for_columns<2>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
        prefetch_pair(gate + c + kSwigluAhead<T>);
        prefetch_pair(up + c + kSwigluAhead<T>);
        const F32x2 g = get(gate + c, Cheapest{}, where), u = get(up + c, Cheapest{}, where);
        put_result<decltype(stream)::value>(y + c, F32x2{swish<kFine<T>>(g.a, kSilu), swish<kFine<T>>(g.b, kSilu)} * u,
                                            where);
      });
    });
  });
}

template <class T>
void swiglu_backward(const SwigluBackward& p, TaskQueue& queue) {
  const bool streaming =
      p.streaming && fit_for_streaming<T>(p.grad_gate, p.columns) && fit_for_streaming<T>(p.grad_up, p.columns);
  with_streaming(streaming, [&](auto stream) FASTATTN_LAMBDA {
    constexpr bool kStreaming = decltype(stream)::value;
    for_pieces({p.rows, p.columns}, queue, [&](int64_t row, int64_t column, int64_t columns) FASTATTN_LAMBDA {
      const T* const dy = static_cast<const T*>(p.grad_output) + row * p.grad_output_stride + column;
      const T* const gate = static_cast<const T*>(p.gate) + row * p.gate_stride + column;
      const T* const up = static_cast<const T*>(p.up) + row * p.up_stride + column;
      T* const grad_gate = static_cast<T*>(p.grad_gate) + row * p.columns + column;
      T* const grad_up = static_cast<T*>(p.grad_up) + row * p.columns + column;
      for_columns<1>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
        prefetch_pair(dy + c + kSwigluAhead<T>);
        prefetch_pair(gate + c + kSwigluAhead<T>);
        prefetch_pair(up + c + kSwigluAhead<T>);
        const F32x2 d = get(dy + c, Cheapest{}, where), x = get(gate + c, Cheapest{}, where);
        const WithDerivative a = swish_with_derivative<kFine<T>>(x.a, kSilu);
        const WithDerivative b = swish_with_derivative<kFine<T>>(x.b, kSilu);
        put_result<kStreaming>(grad_up + c, d * F32x2{a.value, b.value}, where);
        const F32x2 slope = {a.derivative, b.derivative};
        put_result<kStreaming>(grad_gate + c, d * get(up + c, Cheapest{}, where) * slope, where);
      });
    });
  });
}

void run_swiglu_forward(const SwigluForward& p, TaskQueue& queue, char*) {
  switch (p.dtype) {
    case DType::bf16:
      return swiglu_forward<bf16>(p, queue);
    case DType::f16:
      return swiglu_forward<f16>(p, queue);
    default:
      return swiglu_forward<float>(p, queue);
  }
}
void run_swiglu_backward(const SwigluBackward& p, TaskQueue& queue, char*) {
  switch (p.dtype) {
    case DType::bf16:
      return swiglu_backward<bf16>(p, queue);
    case DType::f16:
      return swiglu_backward<f16>(p, queue);
    default:
      return swiglu_backward<float>(p, queue);
  }
}

int64_t swiglu_forward_tasks(const SwigluForward& p) { return Pieces{p.rows, p.columns}.count(); }
int64_t swiglu_forward_scratch(const SwigluForward&) { return 0; }
int64_t swiglu_backward_tasks(const SwigluBackward& p) { return Pieces{p.rows, p.columns}.count(); }
int64_t swiglu_backward_scratch(const SwigluBackward&) { return 0; }

constexpr SwigluKernels kSwigluKernels{{swiglu_forward_tasks, swiglu_forward_scratch, run_swiglu_forward},
                                       {swiglu_backward_tasks, swiglu_backward_scratch, run_swiglu_backward}};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
