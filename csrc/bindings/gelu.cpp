// fastattn::gelu on the CPU.
#include <tuple>

#include "rows.h"
#include "streaming.h"

namespace fastattn {
namespace {

struct Shape {
  int64_t rows, columns;
};

// The last dimension in a row: the bias repeats along it.
Shape shape_of(const Tensor& input, const std::optional<Tensor>& bias) {
  const auto sizes = input.sizes();
  const int64_t columns = sizes.size() == 0 ? 1 : sizes[sizes.size() - 1];
  if (bias) {
    FASTATTN_CHECK(input.dim() > 0 && bias->dim() == 1 && bias->size(0) == columns && bias->is_contiguous(),
                   "gelu: bias must be contiguous with one element for each of the input's ", columns, " columns");
    FASTATTN_CHECK(bias->scalar_type() == ScalarType::Float || bias->scalar_type() == input.scalar_type(),
                   "gelu: bias must be float32 or of the dtype of input");
  }
  return {product(sizes, 0, sizes.size() == 0 ? 0 : sizes.size() - 1), columns};
}

Tensor gelu_forward(Tensor input, std::optional<Tensor> bias, bool tanh) {
  const auto [rows, columns] = shape_of(input, bias);
  const Rows x = rows_of(input, std::min<int64_t>(input.dim(), 1), columns);
  Tensor output = empty(input.sizes(), input.scalar_type());
  const bool flat = !bias && x.stride == columns;  // one long row: no matter how short the rows are
  GeluForward p{};
  p.input = x.data();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.output = output.mutable_data_ptr();
  p.rows = flat ? 1 : rows;
  p.columns = flat ? rows * columns : columns;
  p.input_stride = x.stride;
  p.dtype = dtype_of(input);
  p.bias_dtype = bias ? dtype_of(*bias) : DType::f32;
  p.tanh = tanh;
  p.streaming = worth_streaming(rows * columns * 2, input.scalar_type());
  launch(kernels().gelu->forward, p, static_cast<double>(rows * columns) * 0.2);
  return output;
}

std::tuple<Tensor, Tensor> gelu_backward(Tensor grad_output, Tensor input, std::optional<Tensor> bias, bool tanh,
                                         bool bias_grad) {
  const auto [rows, columns] = shape_of(input, bias);
  FASTATTN_CHECK(grad_output.scalar_type() == input.scalar_type() && same_shape(grad_output, input),
                 "gelu: grad_output must have the shape and dtype of input");
  bias_grad = bias_grad && bias;
  const int64_t column_dims = std::min<int64_t>(input.dim(), 1);
  const Rows dy = rows_of(grad_output, column_dims, columns), x = rows_of(input, column_dims, columns);
  const ScalarType bias_type = bias ? bias->scalar_type() : ScalarType::Float;
  Tensor grad_input = empty(input.sizes(), input.scalar_type());
  Tensor grad_bias = bias_grad ? empty({columns}, bias_type) : unpoisoned(0, bias_type);
  // At most 64 chunks of at least 16 rows, in fours: the kernel's stride.
  const int64_t chunk_rows = (std::max<int64_t>((rows + 63) / 64, 16) + 3) / 4 * 4;
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  std::optional<Tensor> partials;
  if (bias_grad) partials = unpoisoned(chunks * columns, ScalarType::Float);
  const bool flat = !bias && x.stride == columns && dy.stride == columns;
  GeluBackward p{};
  p.grad_output = dy.data();
  p.input = x.data();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.grad_input = grad_input.mutable_data_ptr();
  p.grad_bias = bias_grad ? grad_bias.mutable_data_ptr() : nullptr;
  p.partials = partials ? static_cast<float*>(partials->mutable_data_ptr()) : nullptr;
  p.rows = flat ? 1 : rows;
  p.columns = flat ? rows * columns : columns;
  p.grad_output_stride = dy.stride;
  p.input_stride = x.stride;
  p.chunk_rows = chunk_rows;
  p.dtype = dtype_of(input);
  p.bias_dtype = dtype_of(bias_type);
  p.tanh = tanh;
  launch(kernels().gelu->backward, p, static_cast<double>(rows * columns) * 0.4);
  return {grad_input, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("gelu.cpu", TORCH_BOX(&gelu_forward));
  m.impl("gelu_forward.cpu", TORCH_BOX(&gelu_forward));
  m.impl("gelu_backward.cpu", TORCH_BOX(&gelu_backward));
}

}  // namespace
}  // namespace fastattn
