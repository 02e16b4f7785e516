// fastattn::linear on the CPU.
#include <tuple>

#include "direct.h"
#include "matrix.h"

namespace fastattn {
namespace {

struct Sizes {
  int64_t rows, in, out;
  double nanoseconds() const {  // of one product
    return static_cast<double>(rows) * static_cast<double>(in) * static_cast<double>(out) * 0.01;
  }
};

Sizes check(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, int64_t activation) {
  FASTATTN_CHECK(weight.dim() == 2, "linear: weight must be (out, in), got ", weight.dim(), " dimensions");
  FASTATTN_CHECK(input.dim() >= 1, "linear: input must have at least one dimension");
  const Sizes sizes{product(input.sizes(), 0, static_cast<size_t>(input.dim()) - 1), weight.size(1), weight.size(0)};
  FASTATTN_CHECK(input.size(input.dim() - 1) == sizes.in, "linear: the input's last dimension is ",
                 input.size(input.dim() - 1), ", the weight's ", sizes.in);
  FASTATTN_CHECK(dtype_of(input) != DType::boolean, "linear: input must be floating");
  FASTATTN_CHECK(weight.scalar_type() == input.scalar_type() || weight.scalar_type() == ScalarType::Float,
                 "linear: weight must be float32 or of the input's dtype");
  FASTATTN_CHECK(activation >= 0 && activation <= 3, "linear: activation must be 0 to 3, got ", activation);
  if (bias) {
    FASTATTN_CHECK(bias->dim() == 1 && bias->numel() == sizes.out, "linear: bias must have ", sizes.out, " elements");
    FASTATTN_CHECK(bias->scalar_type() == input.scalar_type() || bias->scalar_type() == ScalarType::Float,
                   "linear: bias must be float32 or of the input's dtype");
  }
  return sizes;
}

std::tuple<Tensor, Tensor> linear_forward(Tensor input, Tensor weight, std::optional<Tensor> bias, int64_t activation,
                                          bool save) {
  const Sizes sizes = check(input, weight, bias, activation);
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = sizes.out;
  const IntHeaderOnlyArrayRef out_sizes(shape.data(), shape.size());
  Tensor output = empty(out_sizes, input.scalar_type());
  Tensor preactivation = save ? empty(out_sizes, input.scalar_type()) : unpoisoned(0, input.scalar_type());
  const Matrix x = flattened(input, sizes.in), w = matrix_of(weight);
  std::optional<Tensor> b = bias;
  if (b && !b->is_contiguous()) b = torch::stable::contiguous(*b);
  LinearForward p{};
  p.input = x.view;
  p.weight = w.view;
  p.bias = b ? b->const_data_ptr() : nullptr;
  p.bias_dtype = b ? dtype_of(*b) : DType::f32;
  p.output = output.mutable_data_ptr();
  p.preactivation = save ? preactivation.mutable_data_ptr() : nullptr;
  p.rows = sizes.rows;
  p.in = sizes.in;
  p.out = sizes.out;
  p.workers = torch::stable::get_num_threads();
  p.output_dtype = dtype_of(input);
  p.activation = static_cast<Activation>(activation);
  launch(kernels().linear->forward, p, sizes.nanoseconds());
  return {output, preactivation};
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor grad_output, Tensor input, Tensor weight,
                                                   std::optional<Tensor> bias, std::optional<Tensor> saved,
                                                   int64_t activation, bool input_grad, bool weight_grad,
                                                   bool bias_grad) {
  const Sizes sizes = check(input, weight, bias, activation);
  FASTATTN_CHECK(grad_output.scalar_type() == input.scalar_type(), "linear: grad_output must be of the input's dtype");
  FASTATTN_CHECK(grad_output.numel() == sizes.rows * sizes.out, "linear: grad_output has ", grad_output.numel(),
                 " elements, the output ", sizes.rows * sizes.out);
  Matrix grad = flattened(grad_output, sizes.out);
  Tensor through = unpoisoned(0, input.scalar_type());
  if (activation != 0) {
    FASTATTN_CHECK(saved && saved->scalar_type() == input.scalar_type() && saved->numel() == sizes.rows * sizes.out,
                   "linear: saved must be the tensor that the forward pass saved");
    through = unpoisoned(sizes.rows * sizes.out, input.scalar_type());
    const Matrix before = flattened(*saved, sizes.out);
    LinearActivation p{};
    p.grad = grad.view;
    p.saved = before.view;
    p.grad_input = through.mutable_data_ptr();
    p.rows = sizes.rows;
    p.out = sizes.out;
    p.activation = static_cast<Activation>(activation);
    if (p.out > 0) launch(kernels().linear->activation, p, static_cast<double>(sizes.rows * sizes.out) * 0.4);
    grad = {through, {through.const_data_ptr(), sizes.out, dtype_of(input), false}};
  }
  Tensor grad_input = input_grad ? empty(input.sizes(), input.scalar_type()) : unpoisoned(0, input.scalar_type());
  Tensor grad_weight = weight_grad ? empty(weight.sizes(), weight.scalar_type()) : unpoisoned(0, weight.scalar_type());
  const ScalarType bias_type = bias ? bias->scalar_type() : input.scalar_type();
  Tensor grad_bias = bias_grad ? empty({sizes.out}, bias_type) : unpoisoned(0, bias_type);
  const Matrix x = flattened(input, sizes.in), w = matrix_of(weight);
  LinearBackward p{};
  p.grad = grad.view;
  p.input = x.view;
  p.weight = w.view;
  p.grad_input = input_grad ? grad_input.mutable_data_ptr() : nullptr;
  p.grad_weight = weight_grad ? grad_weight.mutable_data_ptr() : nullptr;
  p.grad_bias = bias_grad ? grad_bias.mutable_data_ptr() : nullptr;
  p.rows = sizes.rows;
  p.in = sizes.in;
  p.out = sizes.out;
  p.workers = torch::stable::get_num_threads();
  p.input_grad_dtype = dtype_of(input);
  p.weight_grad_dtype = dtype_of(weight);
  p.bias_dtype = dtype_of(bias_type);
  launch(kernels().linear->backward, p, sizes.nanoseconds() * (int{input_grad} + int{weight_grad}));
  return {grad_input, grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) { implement<&linear_forward, &linear_backward>(m, "linear"); }

}  // namespace
}  // namespace fastattn
