// LayerNorm and RMSNorm over the last `columns` elements of `rows` rows. Strides are in elements, between rows;
// the elements of a row are adjacent. Outputs are contiguous.
#pragma once
#include "../cpu/types.h"

namespace fastattn {

struct NormForward {
  const void* input;
  const void* residual;  // nullptr: none; else the norm is taken of sum = input + residual, rounded to `dtype`
  const void* weight;    // nullptr: ones
  const void* bias;      // nullptr: zeros; never with RMSNorm
  void* output;
  void* sum;    // written if there is a residual
  float* mean;  // nullptr for RMSNorm
  float* rstd;
  int64_t rows;
  int64_t columns;
  int64_t input_stride;
  int64_t residual_stride;
  float eps;
  DType dtype;         // of input, residual, output, sum
  DType affine_dtype;  // of weight and bias
  bool centred;        // LayerNorm, else RMSNorm
};

struct NormBackward {
  const void* grad_output;
  const void* grad_sum;  // nullptr: none; else added to grad_input
  const void* input;
  const void* weight;  // nullptr: ones
  const float* mean;   // nullptr for RMSNorm
  const float* rstd;
  void* grad_input;
  void* grad_weight;  // nullptr: not wanted
  void* grad_bias;    // nullptr: not wanted
  float* partials;    // (max(chunks, 1), 2 for LayerNorm | 1 for RMSNorm, columns); nullptr if neither is wanted
  int64_t rows;
  int64_t columns;
  int64_t grad_output_stride;
  int64_t grad_sum_stride;
  int64_t input_stride;
  int64_t chunk_rows;  // fixed by the problem: each chunk of so many rows leaves one partial sum per column
  DType dtype;         // of grad_output, grad_sum, input, grad_input
  DType affine_dtype;  // of weight, grad_weight, grad_bias
  bool centred;        // LayerNorm, else RMSNorm
};

struct NormKernels {  // LayerNorm and RMSNorm
  Kernel<NormForward> forward;
  Kernel<NormBackward> backward;
};

}  // namespace fastattn
