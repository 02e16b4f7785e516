// Cross entropy of `rows` rows of `columns` logits. Strides are in elements, between rows.
#pragma once
#include "../cpu/types.h"

namespace fastattn {

enum class Reduction : int32_t { none, mean, sum };

struct CrossEntropyForward {
  const void* input;
  const int64_t* target;      // (rows,) class numbers, or
  const void* probabilities;  // (rows, columns); exactly one of the two is not nullptr
  const float* weight;        // (columns,) or nullptr: ones
  float* row_loss;            // (rows,): the loss itself if it is not reduced
  float* loss;                // (): the reduced loss; not written for Reduction::none
  float* lse;                 // (rows,) natural log of the sum of the exponentials
  float* total;               // (): what the mean divides by
  int64_t rows;
  int64_t columns;
  int64_t input_stride;
  int64_t probabilities_stride;
  int64_t ignore_index;  // class numbers only
  float label_smoothing;
  float z_loss;   // weight of lse^2 in a row's loss
  float softcap;  // logits are softcap * tanh(input / softcap), unless it is 0
  Reduction reduction;
  DType dtype;
  DType probabilities_dtype;  // f32 or dtype
};

struct CrossEntropyBackward {
  const float* grad;  // (rows,), or () if the loss was reduced
  const void* input;
  const int64_t* target;
  const void* probabilities;
  const float* weight;
  const float* lse;
  const float* total;
  void* grad_input;  // contiguous, of `dtype`
  int64_t rows;
  int64_t columns;
  int64_t input_stride;
  int64_t probabilities_stride;
  int64_t ignore_index;
  float label_smoothing;
  float z_loss;   // weight of lse^2 in a row's loss
  float softcap;  // logits are softcap * tanh(input / softcap), unless it is 0
  Reduction reduction;
  DType dtype;
  DType probabilities_dtype;
  bool streaming;  // results had better not go through the caches
};

struct CrossEntropyKernels {
  Kernel<CrossEntropyForward> forward;
  Kernel<CrossEntropyBackward> backward;
};

}  // namespace fastattn
