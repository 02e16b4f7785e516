// softmax and log_softmax of a tensor seen as (outer, columns, inner), over the columns.
// inner == 1: rows with a stride (in elements) of their own, elements adjacent. inner > 1: everything contiguous.
// Outputs are contiguous.
#pragma once
#include "../cpu/types.h"

namespace fastattn {

struct SoftmaxForward {
  const void* input;
  void* output;
  int64_t outer;
  int64_t columns;
  int64_t inner;
  int64_t input_stride;  // between rows, if inner == 1
  DType input_dtype;
  DType output_dtype;  // input_dtype or f32
  bool log;
};

struct SoftmaxBackward {
  const void* grad_output;
  const void* output;
  void* grad_input;
  int64_t outer;
  int64_t columns;
  int64_t inner;
  int64_t grad_output_stride;  // between rows, if inner == 1
  int64_t output_stride;
  DType output_dtype;  // of output and grad_output
  DType input_dtype;   // of grad_input: output_dtype, or anything if that is f32
  bool log;
};

struct SoftmaxKernels {
  Kernel<SoftmaxForward> forward;
  Kernel<SoftmaxBackward> backward;
};

}  // namespace fastattn
