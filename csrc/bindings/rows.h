// A tensor as rows: its last dimensions flattened into adjacent columns, all others into one stride.
#pragma once
#include "launch.h"

namespace fastattn {

struct Rows {
  Tensor tensor;  // the given one, or a contiguous copy if its strides do not fit
  int64_t stride;

  const void* data() const { return tensor.const_data_ptr(); }
};

inline Rows rows_of(const Tensor& tensor, int64_t column_dims, int64_t columns) {
  if (tensor.is_contiguous()) return {tensor, columns};
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t expected = 1;  // what the next stride outwards must be
  int64_t dim = static_cast<int64_t>(sizes.size()) - 1;
  for (const int64_t first = dim - column_dims; dim > first; dim--) {
    if (sizes[dim] == 1) continue;
    if (strides[dim] != expected) return {torch::stable::contiguous(tensor), columns};
    expected *= sizes[dim];
  }
  int64_t stride = columns;
  bool outermost = true;  // no row dimension of more than one row seen yet
  for (; dim >= 0; dim--) {
    if (sizes[dim] == 1) continue;
    if (outermost) {
      stride = strides[dim];
    } else if (strides[dim] != expected) {
      return {torch::stable::contiguous(tensor), columns};
    }
    outermost = false;
    expected = strides[dim] * sizes[dim];
  }
  return {tensor, stride};
}

inline int64_t product(torch::headeronly::IntHeaderOnlyArrayRef sizes, size_t begin, size_t end) {
  int64_t n = 1;
  for (size_t i = begin; i < end; i++) n *= sizes[i];
  return n;
}

}  // namespace fastattn
