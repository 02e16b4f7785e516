// softmax and log_softmax of a tensor seen as (outer, columns, inner), over the columns.
// inner == 1: rows with a stride (in elements) of their own, elements adjacent. inner > 1: everything contiguous.
// Outputs are contiguous. Scales, masks and causal rows are for inner == 1.
#pragma once
#include "../cpu/types.h"

namespace fastattn {

enum class SoftmaxCausal : int32_t { none, top_left, bottom_right };

// A mask that is not expanded: row r begins at the sum over dimensions of its index there times the stride, which is 0
// where the mask repeats.
struct SoftmaxMask {
  static constexpr int kDims = 16;
  const void* data;  // nullptr: no mask
  DType dtype;       // boolean: true is visible; f32 or the input's: added
  int32_t dims;      // of the rows
  int64_t sizes[kDims];
  int64_t strides[kDims];
  int64_t column_stride;  // 0 or 1
};

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
  float scale;  // of the input
  SoftmaxMask mask;
  SoftmaxCausal causal;  // over rows of rows_per_matrix
  int64_t rows_per_matrix;
  bool streaming;  // results had better not go through the caches
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
  float scale;
  bool masked;  // an output of 0 (log: -inf) may be a masked input's, whose gradient is 0
  SoftmaxCausal causal;
  int64_t rows_per_matrix;
  bool streaming;  // results had better not go through the caches
};

struct SoftmaxKernels {
  Kernel<SoftmaxForward> forward;
  Kernel<SoftmaxBackward> backward;
};

}  // namespace fastattn
