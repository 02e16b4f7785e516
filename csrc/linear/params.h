// output = activation(input weight^T + bias). Strides are in elements, between rows.
#pragma once
#include "../cpu/types.h"

namespace fastattn {

struct LinearMatrix {
  const void* data;
  int64_t row;
  DType dtype;
  bool transposed;  // column by column in memory
};

struct LinearForward {
  LinearMatrix input;   // (rows, in), never transposed
  LinearMatrix weight;  // (out, in), of the input's dtype or f32
  const void* bias;     // (out,) or nullptr
  void* output;         // (rows, out) contiguous, of output_dtype
  void* preactivation;  // the same before the activation, or nullptr
  int64_t rows;
  int64_t in;
  int64_t out;
  int64_t workers;  // how many there may be
  DType bias_dtype;
  DType output_dtype;  // the input's, or f32 without an activation and a preactivation
  Activation activation;
};

// grad_input = grad * activation'(saved)
struct LinearActivation {
  LinearMatrix grad;   // (rows, out), not transposed
  LinearMatrix saved;  // the preactivation, for relu the output
  void* grad_input;    // contiguous, of the dtype of grad
  int64_t rows;
  int64_t out;
  Activation activation;
};

struct LinearBackward {
  LinearMatrix grad;  // (rows, out), of the preactivation, not transposed, of the input's dtype or f32
  LinearMatrix input;
  LinearMatrix weight;
  void* grad_input;   // (rows, in) of input_grad_dtype, or nullptr
  void* grad_weight;  // (out, in) of weight_grad_dtype, or nullptr
  void* grad_bias;    // (out,) or nullptr
  bool accumulate;    // grad_weight and grad_bias, both f32, are added to
  int64_t rows;
  int64_t in;
  int64_t out;
  int64_t workers;
  DType input_grad_dtype;
  DType weight_grad_dtype;
  DType bias_dtype;
};

// to = from * factor, rounded to dtype
struct ScaleParams {
  const float* from;
  void* to;
  int64_t elements;
  float factor;
  DType dtype;
};

struct LinearKernels {
  Kernel<LinearForward> forward;
  Kernel<LinearActivation> activation;
  Kernel<LinearBackward> backward;
  Kernel<ScaleParams> scale;
};

}  // namespace fastattn
