// fastattn::cross_entropy on the CPU.
#include <tuple>

#include "direct.h"
#include "rows.h"
#include "streaming.h"

namespace fastattn {
namespace {

// What both directions take, checked and with strides that the kernels know.
struct Problem {
  int64_t rows, columns;
  Rows input;
  Rows target;  // class numbers: one column
  bool probabilities;
  std::optional<Tensor> weight;
  Reduction reduction;

  const int64_t* numbers() const { return probabilities ? nullptr : static_cast<const int64_t*>(target.data()); }
  const void* distribution() const { return probabilities ? target.data() : nullptr; }
  const float* weights() const { return weight ? static_cast<const float*>(weight->const_data_ptr()) : nullptr; }
};

Problem problem(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight, int64_t ignore_index,
                int64_t reduction) {
  FASTATTN_CHECK(input.dim() == 2, "cross_entropy: input must be (rows, classes), got ", input.dim(), " dimensions");
  const int64_t rows = input.size(0), columns = input.size(1);
  FASTATTN_CHECK(reduction >= 0 && reduction <= 2, "cross_entropy: reduction must be 0, 1 or 2, got ", reduction);
  const bool probabilities = target.scalar_type() != ScalarType::Long;
  if (probabilities) {
    FASTATTN_CHECK(target.scalar_type() == ScalarType::Float || target.scalar_type() == input.scalar_type(),
                   "cross_entropy: target must be int64, float32 or of the dtype of input");
    FASTATTN_CHECK(same_shape(target, input), "cross_entropy: class probabilities must have the shape of input");
  } else {
    FASTATTN_CHECK(target.dim() == 1 && target.size(0) == rows,
                   "cross_entropy: target must have one class for each of ", rows, " rows");
  }
  if (weight) {
    FASTATTN_CHECK(weight->scalar_type() == ScalarType::Float && weight->numel() == columns && weight->is_contiguous(),
                   "cross_entropy: weight must be contiguous float32 with one element for each of ", columns,
                   " classes");
  }
  Problem out{rows,
              columns,
              rows_of(input, 1, columns),
              probabilities ? rows_of(target, 1, columns)
                            : Rows{target.is_contiguous() ? target : torch::stable::contiguous(target), 1},
              probabilities,
              weight,
              static_cast<Reduction>(reduction)};
  if (const int64_t* numbers = out.numbers()) {
    for (int64_t row = 0; row < rows; row++) {
      const int64_t value = numbers[row];
      FASTATTN_CHECK(value == ignore_index || (value >= 0 && value < columns), "cross_entropy: target ", value,
                     " at row ", row, " is not in [0, ", columns, ") and is not ignore_index (", ignore_index, ")");
    }
  }
  FASTATTN_CHECK(columns > 0, "cross_entropy: input must have classes, got shape (", rows, ", 0)");
  return out;
}

double estimate(const Problem& problem, double nanoseconds_each) {
  return static_cast<double>(problem.rows * problem.columns) * nanoseconds_each;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(Tensor input, Tensor target, std::optional<Tensor> weight,
                                                         int64_t ignore_index, double label_smoothing,
                                                         int64_t reduction, double z_loss, double softcap) {
  FASTATTN_CHECK(softcap >= 0.0, "cross_entropy: softcap must be 0 or more, got ", softcap);
  const Problem q = problem(input, target, weight, ignore_index, reduction);
  const bool reduced = q.reduction != Reduction::none;
  Tensor row_loss = reduced ? unpoisoned(q.rows, ScalarType::Float) : empty({q.rows}, ScalarType::Float);
  Tensor loss = reduced ? empty({}, ScalarType::Float) : row_loss;
  Tensor lse = empty({q.rows}, ScalarType::Float);
  Tensor total = empty({}, ScalarType::Float);
  CrossEntropyForward p{};
  p.input = q.input.data();
  p.target = q.numbers();
  p.probabilities = q.distribution();
  p.weight = q.weights();
  p.row_loss = static_cast<float*>(row_loss.mutable_data_ptr());
  p.loss = reduced ? static_cast<float*>(loss.mutable_data_ptr()) : nullptr;
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.total = static_cast<float*>(total.mutable_data_ptr());
  p.rows = q.rows;
  p.columns = q.columns;
  p.input_stride = q.input.stride;
  p.probabilities_stride = q.target.stride;
  p.ignore_index = ignore_index;
  p.label_smoothing = static_cast<float>(label_smoothing);
  p.z_loss = static_cast<float>(z_loss);
  p.softcap = static_cast<float>(softcap);
  p.reduction = q.reduction;
  p.dtype = dtype_of(input);
  p.probabilities_dtype = q.probabilities ? dtype_of(target) : DType::f32;
  launch(kernels().cross_entropy->forward, p, estimate(q, 0.2));
  return {loss, lse, total};
}

Tensor cross_entropy_backward(Tensor grad, Tensor input, Tensor target, std::optional<Tensor> weight, Tensor lse,
                              Tensor total, int64_t ignore_index, double label_smoothing, int64_t reduction,
                              double z_loss, double softcap) {
  FASTATTN_CHECK(softcap >= 0.0, "cross_entropy: softcap must be 0 or more, got ", softcap);
  const Problem q = problem(input, target, weight, ignore_index, reduction);
  const auto is_float = [](const Tensor& tensor, int64_t elements) {
    return tensor.scalar_type() == ScalarType::Float && tensor.numel() == elements && tensor.is_contiguous();
  };
  FASTATTN_CHECK(
      is_float(grad, q.reduction == Reduction::none ? q.rows : 1) && is_float(lse, q.rows) && is_float(total, 1),
      "cross_entropy: grad, lse and total must be contiguous float32 as the forward pass gave them");
  Tensor grad_input = empty({q.rows, q.columns}, input.scalar_type());
  CrossEntropyBackward p{};
  p.grad = static_cast<const float*>(grad.const_data_ptr());
  p.input = q.input.data();
  p.target = q.numbers();
  p.probabilities = q.distribution();
  p.weight = q.weights();
  p.lse = static_cast<const float*>(lse.const_data_ptr());
  p.total = static_cast<const float*>(total.const_data_ptr());
  p.grad_input = grad_input.mutable_data_ptr();
  p.rows = q.rows;
  p.columns = q.columns;
  p.input_stride = q.input.stride;
  p.probabilities_stride = q.target.stride;
  p.ignore_index = ignore_index;
  p.label_smoothing = static_cast<float>(label_smoothing);
  p.z_loss = static_cast<float>(z_loss);
  p.softcap = static_cast<float>(softcap);
  p.reduction = q.reduction;
  p.dtype = dtype_of(input);
  p.probabilities_dtype = q.probabilities ? dtype_of(target) : DType::f32;
  p.streaming = worth_streaming(2 * q.rows * q.columns, input.scalar_type());
  launch(kernels().cross_entropy->backward, p, estimate(q, 0.2));
  return grad_input;
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  implement<&cross_entropy_forward, &cross_entropy_backward>(m, "cross_entropy");
}

}  // namespace
}  // namespace fastattn
