// A tensor as the matrix that products read: in place where its strides allow that.
#pragma once
#include "rows.h"

namespace fastattn {

struct Matrix {
  Tensor tensor;  // the given one, or a contiguous copy if its strides do not fit
  LinearMatrix view;
};

inline Matrix matrix_of(const Tensor& tensor) {
  const int64_t rows = tensor.size(0), columns = tensor.size(1);
  const DType dtype = dtype_of(tensor);
  const bool down = tensor.stride(0) == 1 && tensor.stride(1) >= std::max<int64_t>(rows, 1) && columns > 1;
  if (down && !(tensor.stride(1) == 1)) return {tensor, {tensor.const_data_ptr(), tensor.stride(1), dtype, true}};
  const Rows as_rows = rows_of(tensor, 1, columns);
  return {as_rows.tensor, {as_rows.data(), as_rows.stride, dtype, false}};
}

// All dimensions but the last as rows.
inline Matrix flattened(const Tensor& tensor, int64_t columns) {
  const Rows rows = rows_of(tensor, 1, columns);
  return {rows.tensor, {rows.data(), rows.stride, dtype_of(tensor), false}};
}

}  // namespace fastattn
