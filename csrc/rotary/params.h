// Rotary position embedding: pairs of columns turned by an angle that depends on the row's position.
// Input and output are (sequence, row, head, column) with adjacent columns; strides in elements.
#pragma once
#include "../cpu/types.h"

namespace fastattn {

struct RotarySequence {
  int64_t input;  // where its first row starts
  int64_t output;
  int64_t rows;
  int64_t position;  // of its first row
};

struct Rotary {
  const void* input;
  void* output;  // may be the input
  int64_t input_row, input_head, output_row, output_head;
  const RotarySequence* sequences;
  int64_t count;
  int64_t longest;  // rows
  int64_t heads, columns;
  const void* cos;  // (position, half), rows with strides of their own
  const void* sin;
  int64_t cos_row, sin_row;
  int64_t half;  // columns turned, divided by two
  DType dtype;
  DType table_dtype;  // dtype or f32
  bool interleaved;   // pairs are neighbours; else column i and i + half
  bool inverse;       // by the negative angle
};

struct RotaryKernels {
  Kernel<Rotary> forward;
};

}  // namespace fastattn
