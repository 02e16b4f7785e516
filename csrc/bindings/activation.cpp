// fastattn::gelu and fastattn::silu on the CPU.
#include <tuple>

#include "direct.h"
#include "rows.h"
#include "streaming.h"

namespace fastattn {
namespace {

struct Shape {
  int64_t rows, columns;
};

// The last dimension in a row: the bias repeats along it.
Shape shape_of(const char* op, const Tensor& input, const std::optional<Tensor>& bias) {
  const auto sizes = input.sizes();
  const int64_t columns = sizes.size() == 0 ? 1 : sizes[sizes.size() - 1];
  if (bias) {
    FASTATTN_CHECK(input.dim() > 0 && bias->dim() == 1 && bias->size(0) == columns && bias->is_contiguous(), op,
                   ": bias must be contiguous with one element for each of the input's ", columns, " columns");
    FASTATTN_CHECK(bias->scalar_type() == ScalarType::Float || bias->scalar_type() == input.scalar_type(), op,
                   ": bias must be float32 or of the dtype of input");
  }
  return {product(sizes, 0, sizes.size() == 0 ? 0 : sizes.size() - 1), columns};
}

Tensor forward(const char* op, const Tensor& input, const std::optional<Tensor>& bias, Activation activation) {
  const auto [rows, columns] = shape_of(op, input, bias);
  const Rows x = rows_of(input, std::min<int64_t>(input.dim(), 1), columns);
  Tensor output = empty(input.sizes(), input.scalar_type());
  const bool flat = !bias && x.stride == columns;  // one long row: no matter how short the rows are
  ActivationForward p{};
  p.input = x.data();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.output = output.mutable_data_ptr();
  p.rows = flat ? 1 : rows;
  p.columns = flat ? rows * columns : columns;
  p.input_stride = x.stride;
  p.dtype = dtype_of(input);
  p.bias_dtype = bias ? dtype_of(*bias) : DType::f32;
  p.activation = activation;
  p.streaming = worth_streaming(rows * columns * 2, input.scalar_type());
  launch(kernels().activation->forward, p, static_cast<double>(rows * columns) * 0.2);
  return output;
}

std::tuple<Tensor, Tensor> backward(const char* op, const Tensor& grad_output, const Tensor& input,
                                    const std::optional<Tensor>& bias, bool bias_grad, Activation activation) {
  const auto [rows, columns] = shape_of(op, input, bias);
  FASTATTN_CHECK(grad_output.scalar_type() == input.scalar_type() && same_shape(grad_output, input), op,
                 ": grad_output must have the shape and dtype of input");
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
  ActivationBackward p{};
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
  p.activation = activation;
  launch(kernels().activation->backward, p, static_cast<double>(rows * columns) * 0.4);
  return {grad_input, grad_bias};
}

// By number as APPROXIMATIONS of fastattn/ops/gelu/op.py.
Activation gelu_of(int64_t approximate) {
  FASTATTN_CHECK(approximate >= 0 && approximate <= 2, "gelu: approximate must be 0 to 2, got ", approximate);
  constexpr Activation kForms[] = {Activation::gelu, Activation::gelu_tanh, Activation::gelu_sigmoid};
  return kForms[approximate];
}

Tensor gelu_forward(Tensor input, std::optional<Tensor> bias, int64_t approximate) {
  return forward("gelu", input, bias, gelu_of(approximate));
}
std::tuple<Tensor, Tensor> gelu_backward(Tensor grad_output, Tensor input, std::optional<Tensor> bias, bool bias_grad,
                                         int64_t approximate) {
  return backward("gelu", grad_output, input, bias, bias_grad, gelu_of(approximate));
}

Tensor silu_forward(Tensor input, std::optional<Tensor> bias) { return forward("silu", input, bias, Activation::silu); }
std::tuple<Tensor, Tensor> silu_backward(Tensor grad_output, Tensor input, std::optional<Tensor> bias, bool bias_grad) {
  return backward("silu", grad_output, input, bias, bias_grad, Activation::silu);
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  implement<&gelu_forward, &gelu_backward>(m, "gelu");
  implement<&silu_forward, &silu_backward>(m, "silu");
}

}  // namespace
}  // namespace fastattn
