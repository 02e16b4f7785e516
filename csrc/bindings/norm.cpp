// fastattn::layer_norm, rms_norm, add_layer_norm and add_rms_norm on the CPU.
#include <tuple>

#include "direct.h"
#include "dropout.h"
#include "rows.h"
#include "streaming.h"

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

void check_input_dtype(const char* name, ScalarType input, ScalarType sum) {
  FASTATTN_CHECK(
      input == sum || (sum == ScalarType::Float && (input == ScalarType::BFloat16 || input == ScalarType::Half)), name,
      ": input must have the dtype of residual, or bfloat16 or float16 where that is float32");
}

// dtype of weight and bias, which must agree; float32 if there is neither.
DType affine_dtype(const char* name, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias) {
  if (weight && bias)
    FASTATTN_CHECK(weight->scalar_type() == bias->scalar_type(), name, ": weight and bias must have one dtype");
  return weight ? dtype_of(*weight) : bias ? dtype_of(*bias) : DType::f32;
}

double estimate(int64_t elements, double nanoseconds_each) { return static_cast<double>(elements) * nanoseconds_each; }

// Philox makes 64 numbers while memory moves 16.
double work_of_dropout(const Dropout& dropout) { return dropout.enabled ? 0.5 : 0.0; }

// What LayerNorm and RMSNorm have in common, with and without a residual.
struct Call {
  const char* name;
  bool centred;
  int64_t normalized_ndim;
  double weight_offset;
};

template <bool with_statistics>
struct Forward {
  Tensor output, sum;
  std::optional<Statistic<with_statistics>> mean;
  Statistic<with_statistics> rstd;
};

template <bool with_statistics>
Forward<with_statistics> forward(const Call& call, const Tensor& input, const std::optional<Tensor>& residual,
                                 const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                                 const Dropout& dropout = {}) {
  const char* name = call.name;
  const auto [rows, columns] = shape_of(name, input, call.normalized_ndim);
  const ScalarType type = residual ? residual->scalar_type() : input.scalar_type();
  if (residual) {
    FASTATTN_CHECK(same_shape(*residual, input), name, ": residual must have the shape of input");
    check_input_dtype(name, input.scalar_type(), type);
  }
  const Tensor& like = residual ? *residual : input;
  if (weight) check_affine(name, "weight", *weight, like, columns);
  if (bias) check_affine(name, "bias", *bias, like, columns);
  const Rows x = rows_of(input, call.normalized_ndim, columns);
  std::optional<Rows> add;
  if (residual) add = rows_of(*residual, call.normalized_ndim, columns);

  Forward<with_statistics> out{empty(input.sizes(), type), residual ? empty(input.sizes(), type) : Tensor(),
                               std::nullopt, Statistic<with_statistics>({rows})};
  if (call.centred) out.mean.emplace(std::initializer_list<int64_t>{rows});
  NormForward p{};
  p.input = x.data();
  p.residual = add ? add->data() : nullptr;
  p.weight = weight ? weight->const_data_ptr() : nullptr;
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.output = out.output.mutable_data_ptr();
  p.sum = residual ? out.sum.mutable_data_ptr() : nullptr;
  p.mean = call.centred ? out.mean->data() : nullptr;
  p.rstd = out.rstd.data();
  p.rows = rows;
  p.columns = columns;
  p.input_stride = x.stride;
  p.residual_stride = add ? add->stride : 0;
  p.eps = static_cast<float>(eps);
  p.weight_offset = static_cast<float>(call.weight_offset);
  p.dtype = dtype_of(type);
  p.input_dtype = dtype_of(input);
  p.affine_dtype = affine_dtype(name, weight, bias);
  p.centred = call.centred;
  p.streaming = worth_streaming(rows * columns * (residual ? 4 : 2), type);
  p.dropout = dropout;
  launch(kernels().layer_norm->forward, p, estimate(rows * columns, 0.2 + work_of_dropout(dropout)));
  return out;
}

struct Backward {
  Tensor grad_total, grad_input, grad_weight, grad_bias;
};

// input_type: of the gradient of input where there was a residual; without one there is no grad_input apart.
Backward backward(const Call& call, const Tensor& grad_output, const std::optional<Tensor>& grad_sum,
                  const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                  const Tensor* mean, const Tensor& rstd, bool weight_grad, bool bias_grad,
                  std::optional<ScalarType> input_type = std::nullopt, const Dropout& dropout = {}) {
  const char* name = call.name;
  const auto [rows, columns] = shape_of(name, input, call.normalized_ndim);
  const ScalarType type = input.scalar_type();
  check_like(name, "grad_output", grad_output, input);
  if (grad_sum) check_like(name, "grad_sum", *grad_sum, input);
  if (input_type) check_input_dtype(name, *input_type, type);
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
  const bool apart = input_type && (*input_type != type || dropout.enabled);
  const Rows dy = rows_of(grad_output, call.normalized_ndim, columns);
  const Rows x = rows_of(input, call.normalized_ndim, columns);
  std::optional<Rows> ds;
  if (grad_sum) ds = rows_of(*grad_sum, call.normalized_ndim, columns);

  const auto parameter = [](const std::optional<Tensor>& tensor, bool wanted) {
    const ScalarType type = tensor ? tensor->scalar_type() : ScalarType::Float;
    return wanted ? empty(tensor->sizes(), type) : unpoisoned(0, type);
  };
  Backward out{empty(input.sizes(), type),
               !input_type ? Tensor()
               : apart     ? empty(input.sizes(), *input_type)
                           : unpoisoned(0, *input_type),
               parameter(weight, weight_grad), call.centred ? parameter(bias, bias_grad) : Tensor()};
  // At most 64 chunks of at least 16 rows, in fours: the kernel's blocks.
  const int64_t chunk_rows = (std::max<int64_t>((rows + 63) / 64, 16) + 3) / 4 * 4;
  const int64_t chunks = std::max<int64_t>((rows + chunk_rows - 1) / chunk_rows, 1);
  std::optional<Tensor> partials;
  if (weight_grad || bias_grad) partials = unpoisoned(chunks * (call.centred ? 2 : 1) * columns, ScalarType::Float);

  NormBackward p{};
  p.grad_output = dy.data();
  p.grad_sum = ds ? ds->data() : nullptr;
  p.input = x.data();
  p.weight = weight ? weight->const_data_ptr() : nullptr;
  p.mean = mean != nullptr ? static_cast<const float*>(mean->const_data_ptr()) : nullptr;
  p.rstd = static_cast<const float*>(rstd.const_data_ptr());
  p.grad_total = out.grad_total.mutable_data_ptr();
  p.grad_input = apart ? out.grad_input.mutable_data_ptr() : nullptr;
  p.grad_weight = weight_grad ? out.grad_weight.mutable_data_ptr() : nullptr;
  p.grad_bias = bias_grad ? out.grad_bias.mutable_data_ptr() : nullptr;
  p.partials = partials ? static_cast<float*>(partials->mutable_data_ptr()) : nullptr;
  p.rows = rows;
  p.columns = columns;
  p.grad_output_stride = dy.stride;
  p.grad_sum_stride = ds ? ds->stride : 0;
  p.input_stride = x.stride;
  p.chunk_rows = chunk_rows;
  p.weight_offset = static_cast<float>(call.weight_offset);
  p.dtype = dtype_of(type);
  p.input_dtype = input_type ? dtype_of(*input_type) : p.dtype;
  p.affine_dtype = affine_dtype(name, weight, bias);
  p.centred = call.centred;
  p.streaming = worth_streaming(rows * columns * (3 + (grad_sum ? 1 : 0) + (apart ? 1 : 0)), type);
  p.dropout = dropout;
  launch(kernels().layer_norm->backward, p, estimate(rows * columns, 0.4 + work_of_dropout(dropout)));
  return out;
}

// ---- LayerNorm ----

template <bool with_statistics>
auto layer_norm_forward(Tensor input, std::optional<Tensor> weight, std::optional<Tensor> bias, int64_t normalized_ndim,
                        double eps, double weight_offset) {
  const auto out = forward<with_statistics>({"layer_norm", true, normalized_ndim, weight_offset}, input, std::nullopt,
                                            weight, bias, eps);
  return results_of(std::tuple(out.output), *out.mean, out.rstd);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad_output, Tensor input, std::optional<Tensor> weight,
                                                       std::optional<Tensor> bias, Tensor mean, Tensor rstd,
                                                       int64_t normalized_ndim, double weight_offset, bool weight_grad,
                                                       bool bias_grad) {
  Backward out = backward({"layer_norm", true, normalized_ndim, weight_offset}, grad_output, std::nullopt, input,
                          weight, bias, &mean, rstd, weight_grad, bias_grad);
  return {out.grad_total, out.grad_weight, out.grad_bias};
}

template <bool with_statistics>
auto add_layer_norm_forward(Tensor input, Tensor residual, std::optional<Tensor> weight, std::optional<Tensor> bias,
                            std::optional<Tensor> philox, int64_t normalized_ndim, double eps, double weight_offset,
                            double dropout_p) {
  const Call call{"add_layer_norm", true, normalized_ndim, weight_offset};
  const auto out =
      forward<with_statistics>(call, input, residual, weight, bias, eps, dropout_of(call.name, philox, dropout_p));
  return results_of(std::tuple(out.output, out.sum), *out.mean, out.rstd);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    Tensor grad_output, std::optional<Tensor> grad_sum, Tensor sum, std::optional<Tensor> weight,
    std::optional<Tensor> bias, Tensor mean, Tensor rstd, std::optional<Tensor> philox, int64_t normalized_ndim,
    double weight_offset, double dropout_p, ScalarType input_dtype, bool weight_grad, bool bias_grad) {
  const Call call{"add_layer_norm", true, normalized_ndim, weight_offset};
  Backward out = backward(call, grad_output, grad_sum, sum, weight, bias, &mean, rstd, weight_grad, bias_grad,
                          input_dtype, dropout_of(call.name, philox, dropout_p));
  return {out.grad_input, out.grad_total, out.grad_weight, out.grad_bias};
}

// ---- RMSNorm ----

template <bool with_statistics>
auto rms_norm_forward(Tensor input, std::optional<Tensor> weight, int64_t normalized_ndim, double eps,
                      double weight_offset) {
  const auto out = forward<with_statistics>({"rms_norm", false, normalized_ndim, weight_offset}, input, std::nullopt,
                                            weight, std::nullopt, eps);
  return results_of(std::tuple(out.output), out.rstd);
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad_output, Tensor input, std::optional<Tensor> weight,
                                             Tensor rstd, int64_t normalized_ndim, double weight_offset,
                                             bool weight_grad) {
  Backward out = backward({"rms_norm", false, normalized_ndim, weight_offset}, grad_output, std::nullopt, input, weight,
                          std::nullopt, nullptr, rstd, weight_grad, false);
  return {out.grad_total, out.grad_weight};
}

template <bool with_statistics>
auto add_rms_norm_forward(Tensor input, Tensor residual, std::optional<Tensor> weight, std::optional<Tensor> philox,
                          int64_t normalized_ndim, double eps, double weight_offset, double dropout_p) {
  const Call call{"add_rms_norm", false, normalized_ndim, weight_offset};
  const auto out = forward<with_statistics>(call, input, residual, weight, std::nullopt, eps,
                                            dropout_of(call.name, philox, dropout_p));
  return results_of(std::tuple(out.output, out.sum), out.rstd);
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_backward(Tensor grad_output, std::optional<Tensor> grad_sum, Tensor sum,
                                                         std::optional<Tensor> weight, Tensor rstd,
                                                         std::optional<Tensor> philox, int64_t normalized_ndim,
                                                         double weight_offset, double dropout_p, ScalarType input_dtype,
                                                         bool weight_grad) {
  const Call call{"add_rms_norm", false, normalized_ndim, weight_offset};
  Backward out = backward(call, grad_output, grad_sum, sum, weight, std::nullopt, nullptr, rstd, weight_grad, false,
                          input_dtype, dropout_of(call.name, philox, dropout_p));
  return {out.grad_input, out.grad_total, out.grad_weight};
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  implement<&layer_norm_forward<true>, &layer_norm_backward>(m, "layer_norm");
  implement_visible<&layer_norm_forward<false>>("layer_norm");
  implement<&add_layer_norm_forward<true>, &add_layer_norm_backward>(m, "add_layer_norm");
  implement_visible<&add_layer_norm_forward<false>, 2>("add_layer_norm");
  implement<&rms_norm_forward<true>, &rms_norm_backward>(m, "rms_norm");
  implement_visible<&rms_norm_forward<false>>("rms_norm");
  implement<&add_rms_norm_forward<true>, &add_rms_norm_backward>(m, "add_rms_norm");
  implement_visible<&add_rms_norm_forward<false>, 2>("add_rms_norm");
}

}  // namespace
}  // namespace fastattn
