// An activation of input + bias, one of the GELUs or SiLU, seen as (rows, columns). Strides are in elements, between
// rows; outputs are contiguous.
#pragma once
#include "../cpu/types.h"

namespace fastattn {

struct ActivationForward {
  const void* input;
  const void* bias;  // (columns,) or nullptr
  void* output;
  int64_t rows;
  int64_t columns;
  int64_t input_stride;
  DType dtype;
  DType bias_dtype;  // f32 or dtype
  Activation activation;
  bool streaming;  // results had better not go through the caches
};

struct ActivationBackward {
  const void* grad_output;
  const void* input;
  const void* bias;
  void* grad_input;
  void* grad_bias;  // (columns,) of bias_dtype, or nullptr
  float* partials;  // with grad_bias: (chunks, columns)
  int64_t rows;
  int64_t columns;
  int64_t grad_output_stride;
  int64_t input_stride;
  int64_t chunk_rows;  // with grad_bias: rows whose gradients are summed up by one task
  DType dtype;
  DType bias_dtype;
  Activation activation;
};

struct ActivationKernels {
  Kernel<ActivationForward> forward;
  Kernel<ActivationBackward> backward;
};

}  // namespace fastattn
