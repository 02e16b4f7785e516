// fastattn::layer_norm and fastattn::rms_norm on the CPU.
#include <tuple>

#include "rows.h"

namespace fastattn {
namespace {

struct Shape {
  int64_t rows;
  int64_t columns;
};

Shape shape_of(const char* name, const Tensor& input, int64_t normalized_ndim) {
  FASTATTN_CHECK(normalized_ndim >= 1 && normalized_ndim <= input.dim(), name, ": normalized_ndim must be in [1, ",
                 input.dim(), "], got ", normalized_ndim);
  const auto sizes = input.sizes();
  const size_t split = sizes.size() - static_cast<size_t>(normalized_ndim);
  return {product(sizes, 0, split), product(sizes, split, sizes.size())};
}

void check_like(const char* name, const char* what, const Tensor& tensor, const Tensor& input) {
  FASTATTN_CHECK(tensor.scalar_type() == input.scalar_type() && same_shape(tensor, input), name, ": ", what,
                 " must have the shape and dtype of input");
}

void check_affine(const char* name, const char* what, const Tensor& tensor, const Tensor& input, int64_t columns) {
  FASTATTN_CHECK(tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == input.scalar_type(), name, ": ",
                 what, " must be float32 or of the dtype of input");
  FASTATTN_CHECK(tensor.numel() == columns && tensor.is_contiguous(), name, ": ", what,
                 " must be contiguous with as many elements as a row, ", columns, ", got ", tensor.numel());
}

// dtype of weight and bias, which must agree; float32 if there is neither.
DType affine_dtype(const char* name, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias) {
  if (weight && bias)
    FASTATTN_CHECK(weight->scalar_type() == bias->scalar_type(), name, ": weight and bias must have one dtype");
  return weight ? dtype_of(*weight) : bias ? dtype_of(*bias) : DType::f32;
}

double estimate(int64_t elements, double nanoseconds_each) { return static_cast<double>(elements) * nanoseconds_each; }

struct Forward {
  Tensor output, sum, mean, rstd;
};

Forward forward(const char* name, bool centred, const Tensor& input, const std::optional<Tensor>& residual,
                const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t normalized_ndim,
                double eps) {
  const auto [rows, columns] = shape_of(name, input, normalized_ndim);
  if (residual) check_like(name, "residual", *residual, input);
  if (weight) check_affine(name, "weight", *weight, input, columns);
  if (bias) check_affine(name, "bias", *bias, input, columns);
  const ScalarType type = input.scalar_type();
  const Rows x = rows_of(input, normalized_ndim, columns);
  std::optional<Rows> add;
  if (residual) add = rows_of(*residual, normalized_ndim, columns);

  Forward out{empty(input.sizes(), type), residual ? empty(input.sizes(), type) : unpoisoned(0, type),
              centred ? empty({rows}, ScalarType::Float) : Tensor(), empty({rows}, ScalarType::Float)};
  NormForward p{};
  p.input = x.data();
  p.residual = add ? add->data() : nullptr;
  p.weight = weight ? weight->const_data_ptr() : nullptr;
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.output = out.output.mutable_data_ptr();
  p.sum = residual ? out.sum.mutable_data_ptr() : nullptr;
  p.mean = centred ? static_cast<float*>(out.mean.mutable_data_ptr()) : nullptr;
  p.rstd = static_cast<float*>(out.rstd.mutable_data_ptr());
  p.rows = rows;
  p.columns = columns;
  p.input_stride = x.stride;
  p.residual_stride = add ? add->stride : 0;
  p.eps = static_cast<float>(eps);
  p.dtype = dtype_of(type);
  p.affine_dtype = affine_dtype(name, weight, bias);
  p.centred = centred;
  launch(kernels().layer_norm->forward, p, estimate(rows * columns, 0.2));
  return out;
}

struct Backward {
  Tensor grad_input, grad_weight, grad_bias;
};

Backward backward(const char* name, bool centred, const Tensor& grad_output, const std::optional<Tensor>& grad_sum,
                  const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                  const Tensor* mean, const Tensor& rstd, int64_t normalized_ndim, bool weight_grad, bool bias_grad) {
  const auto [rows, columns] = shape_of(name, input, normalized_ndim);
  check_like(name, "grad_output", grad_output, input);
  if (grad_sum) check_like(name, "grad_sum", *grad_sum, input);
  if (weight) check_affine(name, "weight", *weight, input, columns);
  if (bias) check_affine(name, "bias", *bias, input, columns);
  for (const Tensor* statistic : {mean, &rstd}) {
    if (statistic == nullptr) continue;
    FASTATTN_CHECK(
        statistic->scalar_type() == ScalarType::Float && statistic->numel() == rows && statistic->is_contiguous(), name,
        ": mean and rstd must be contiguous float32 of one element for each of the ", rows, " rows");
  }
  weight_grad = weight_grad && weight;
  bias_grad = bias_grad && bias;
  const Rows dy = rows_of(grad_output, normalized_ndim, columns);
  const Rows x = rows_of(input, normalized_ndim, columns);
  std::optional<Rows> ds;
  if (grad_sum) ds = rows_of(*grad_sum, normalized_ndim, columns);

  const auto parameter = [](const std::optional<Tensor>& tensor, bool wanted) {
    const ScalarType type = tensor ? tensor->scalar_type() : ScalarType::Float;
    return wanted ? empty(tensor->sizes(), type) : unpoisoned(0, type);
  };
  Backward out{empty(input.sizes(), input.scalar_type()), parameter(weight, weight_grad),
               centred ? parameter(bias, bias_grad) : Tensor()};
  // At most 64 chunks of at least 16 rows, in fours: the kernel's stride.
  const int64_t chunk_rows = (std::max<int64_t>((rows + 63) / 64, 16) + 3) / 4 * 4;
  const int64_t chunks = std::max<int64_t>((rows + chunk_rows - 1) / chunk_rows, 1);
  std::optional<Tensor> partials;
  if (weight_grad || bias_grad) partials = unpoisoned(chunks * (centred ? 2 : 1) * columns, ScalarType::Float);

  NormBackward p{};
  p.grad_output = dy.data();
  p.grad_sum = ds ? ds->data() : nullptr;
  p.input = x.data();
  p.weight = weight ? weight->const_data_ptr() : nullptr;
  p.mean = mean != nullptr ? static_cast<const float*>(mean->const_data_ptr()) : nullptr;
  p.rstd = static_cast<const float*>(rstd.const_data_ptr());
  p.grad_input = out.grad_input.mutable_data_ptr();
  p.grad_weight = weight_grad ? out.grad_weight.mutable_data_ptr() : nullptr;
  p.grad_bias = bias_grad ? out.grad_bias.mutable_data_ptr() : nullptr;
  p.partials = partials ? static_cast<float*>(partials->mutable_data_ptr()) : nullptr;
  p.rows = rows;
  p.columns = columns;
  p.grad_output_stride = dy.stride;
  p.grad_sum_stride = ds ? ds->stride : 0;
  p.input_stride = x.stride;
  p.chunk_rows = chunk_rows;
  p.dtype = dtype_of(input);
  p.affine_dtype = affine_dtype(name, weight, bias);
  p.centred = centred;
  launch(kernels().layer_norm->backward, p, estimate(rows * columns, 0.4));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_forward(Tensor input, std::optional<Tensor> residual,
                                                              std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                              int64_t normalized_ndim, double eps) {
  Forward out = forward("layer_norm", true, input, residual, weight, bias, normalized_ndim, eps);
  return {out.output, out.sum, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad_output, std::optional<Tensor> grad_sum, Tensor input,
                                                       std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                       Tensor mean, Tensor rstd, int64_t normalized_ndim,
                                                       bool weight_grad, bool bias_grad) {
  Backward out = backward("layer_norm", true, grad_output, grad_sum, input, weight, bias, &mean, rstd, normalized_ndim,
                          weight_grad, bias_grad);
  return {out.grad_input, out.grad_weight, out.grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_forward(Tensor input, std::optional<Tensor> residual,
                                                    std::optional<Tensor> weight, int64_t normalized_ndim, double eps) {
  Forward out = forward("rms_norm", false, input, residual, weight, std::nullopt, normalized_ndim, eps);
  return {out.output, out.sum, out.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad_output, std::optional<Tensor> grad_sum, Tensor input,
                                             std::optional<Tensor> weight, Tensor rstd, int64_t normalized_ndim,
                                             bool weight_grad) {
  Backward out = backward("rms_norm", false, grad_output, grad_sum, input, weight, std::nullopt, nullptr, rstd,
                          normalized_ndim, weight_grad, false);
  return {out.grad_input, out.grad_weight};
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("layer_norm.cpu", TORCH_BOX(&layer_norm_forward));
  m.impl("layer_norm_forward.cpu", TORCH_BOX(&layer_norm_forward));
  m.impl("layer_norm_backward.cpu", TORCH_BOX(&layer_norm_backward));
  m.impl("rms_norm.cpu", TORCH_BOX(&rms_norm_forward));
  m.impl("rms_norm_forward.cpu", TORCH_BOX(&rms_norm_forward));
  m.impl("rms_norm_backward.cpu", TORCH_BOX(&rms_norm_backward));
}

}  // namespace
}  // namespace fastattn
