// LayerNorm and RMSNorm over the last `columns` elements of `rows` rows, of input or of
//   sum = residual + dropout(input), rounded to `dtype`.
// Strides are in elements, between rows; the elements of a row are adjacent. Outputs are contiguous.
#pragma once
#include "../cpu/dropout.h"
#include "../cpu/types.h"

namespace fastattn {

struct NormForward {
  const void* input;
  const void* residual;  // nullptr: the norm is taken of input, and there is neither sum nor dropout
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
  float weight_offset;  // added to a weight that is given
  DType dtype;          // of residual, output, sum
  DType input_dtype;    // `dtype`, or with a residual in f32 bf16 or f16
  DType affine_dtype;   // of weight and bias
  bool centred;         // LayerNorm, else RMSNorm
  bool streaming;       // results had better not go through the caches
  Dropout dropout;      // of input, where there is a residual; row and column of the mask are those of the problem
};

struct NormBackward {
  const void* grad_output;
  const void* grad_sum;  // nullptr: none; else added to the gradient of what was normalised
  const void* input;     // what was normalised: sum if there was a residual
  const void* weight;    // nullptr: ones
  const float* mean;     // nullptr for RMSNorm
  const float* rstd;
  void* grad_total;   // the gradient of what was normalised
  void* grad_input;   // nullptr: grad_total is that, too; else it goes through dropout and is rounded to input_dtype
  void* grad_weight;  // nullptr: not wanted
  void* grad_bias;    // nullptr: not wanted
  float* partials;    // (max(chunks, 1), 2 for LayerNorm | 1 for RMSNorm, columns); nullptr if neither is wanted
  int64_t rows;
  int64_t columns;
  int64_t grad_output_stride;
  int64_t grad_sum_stride;
  int64_t input_stride;
  int64_t chunk_rows;   // fixed by the problem: each chunk of so many rows leaves one partial sum per column
  float weight_offset;  // added to a weight that is given
  DType dtype;          // of grad_output, grad_sum, input, grad_total
  DType input_dtype;    // of grad_input
  DType affine_dtype;   // of weight, grad_weight, grad_bias
  bool centred;         // LayerNorm, else RMSNorm
  bool streaming;       // results had better not go through the caches
  Dropout dropout;
};

struct NormKernels {  // LayerNorm and RMSNorm
  Kernel<NormForward> forward;
  Kernel<NormBackward> backward;
};

}  // namespace fastattn
