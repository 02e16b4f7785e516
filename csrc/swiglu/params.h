// silu(gate) * up, seen as (rows, columns). Strides are in elements, between rows; outputs are contiguous.
#pragma once
#include "../cpu/types.h"

namespace fastattn {

struct SwigluForward {
  const void* gate;
  const void* up;
  void* output;
  int64_t rows;
  int64_t columns;
  int64_t gate_stride;
  int64_t up_stride;
  DType dtype;
  bool streaming;  // results had better not go through the caches
};

struct SwigluBackward {
  const void* grad_output;
  const void* gate;
  const void* up;
  void* grad_gate;
  void* grad_up;
  int64_t rows;
  int64_t columns;
  int64_t grad_output_stride;
  int64_t gate_stride;
  int64_t up_stride;
  DType dtype;
  bool streaming;  // results had better not go through the caches
};

struct SwigluKernels {
  Kernel<SwigluForward> forward;
  Kernel<SwigluBackward> backward;
};

}  // namespace fastattn
