// fastattn::linear_cross_entropy on the CPU: the products of linear and the rows of cross_entropy on a few hundred
// tokens at a time. The logits of a chunk are float32, whatever the inputs are; their gradients take their place, in
// bfloat16 where the products want that.
#include <cmath>
#include <tuple>

#include "direct.h"
#include "matrix.h"

namespace fastattn {
namespace {

constexpr int64_t kChunkElements = int64_t{26} << 20;     // logits of a chunk: 104 MiB
constexpr int64_t kRowsAtLeast = 48, kRowsAtMost = 1024;  // fewer are not worth packing the weight for

struct Problem {
  int64_t rows, in, classes;
  Matrix input, weight;
  std::optional<Tensor> bias;
  Rows target;  // class numbers: one column
  bool probabilities;
  std::optional<Tensor> class_weight;
  Reduction reduction;
  int64_t ignore_index;
  float label_smoothing;
  float total;  // what the mean divides by

  // Equal chunks, of whole register tiles (which have 2, 4 or 6 rows).
  int64_t chunk() const {
    const int64_t fit = std::min(kChunkElements / std::max<int64_t>(classes, 1), kRowsAtMost);
    const int64_t most = std::max(fit, kRowsAtLeast), chunks = std::max<int64_t>((rows + most - 1) / most, 1);
    return std::min((((rows + chunks - 1) / chunks + 11) / 12) * 12, rows);
  }
  double nanoseconds(int64_t count) const {  // of one product
    return static_cast<double>(count) * static_cast<double>(in) * static_cast<double>(classes) * 0.01;
  }
};

// values * factor in another dtype
Tensor scaled(const Tensor& values, float factor, ScalarType type) {
  Tensor out = empty(values.sizes(), type);
  const float* const from = static_cast<const float*>(values.const_data_ptr());
  ScaleParams s{from, out.mutable_data_ptr(), values.numel(), factor, dtype_of(type)};
  launch(kernels().linear->scale, s, static_cast<double>(values.numel()) * 0.2);
  return out;
}

Problem problem(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target,
                const std::optional<Tensor>& class_weight, int64_t ignore_index, double label_smoothing,
                int64_t reduction) {
  FASTATTN_CHECK(input.dim() == 2 && weight.dim() == 2 && input.size(1) == weight.size(1),
                 "linear_cross_entropy: input must be (rows, in) and linear_weight (classes, in)");
  const int64_t rows = input.size(0), classes = weight.size(0);
  FASTATTN_CHECK(reduction >= 0 && reduction <= 2, "linear_cross_entropy: reduction must be 0, 1 or 2, got ",
                 reduction);
  FASTATTN_CHECK(dtype_of(input) != DType::boolean, "linear_cross_entropy: input must be floating");
  for (const Tensor* parameter : {&weight, bias ? &*bias : nullptr}) {
    FASTATTN_CHECK(parameter == nullptr || parameter->scalar_type() == input.scalar_type() ||
                       parameter->scalar_type() == ScalarType::Float,
                   "linear_cross_entropy: parameters must be float32 or of the input's dtype");
  }
  FASTATTN_CHECK(!bias || (bias->dim() == 1 && bias->numel() == classes && bias->is_contiguous()),
                 "linear_cross_entropy: linear_bias must be contiguous with ", classes, " elements");
  FASTATTN_CHECK(!class_weight || (class_weight->scalar_type() == ScalarType::Float &&
                                   class_weight->numel() == classes && class_weight->is_contiguous()),
                 "linear_cross_entropy: weight must be contiguous float32 with ", classes, " elements");
  const bool probabilities = target.scalar_type() != ScalarType::Long;
  if (probabilities) {
    FASTATTN_CHECK(target.scalar_type() == ScalarType::Float && target.dim() == 2 && target.size(0) == rows &&
                       target.size(1) == classes,
                   "linear_cross_entropy: class probabilities must be float32 (rows, classes)");
  } else {
    FASTATTN_CHECK(target.dim() == 1 && target.size(0) == rows,
                   "linear_cross_entropy: target must have one class for each of ", rows, " rows");
  }
  Problem p{rows,
            input.size(1),
            classes,
            matrix_of(input),
            matrix_of(weight),
            bias,
            probabilities ? rows_of(target, 1, classes)
                          : Rows{target.is_contiguous() ? target : torch::stable::contiguous(target), 1},
            probabilities,
            class_weight,
            static_cast<Reduction>(reduction),
            ignore_index,
            static_cast<float>(label_smoothing),
            static_cast<float>(rows)};
  // Rounded once, not while it is packed for every chunk.
  if (input.scalar_type() == ScalarType::BFloat16 && p.weight.view.dtype == DType::f32 && rows > p.chunk())
    p.weight = matrix_of(scaled(torch::stable::contiguous(weight), 1.f, ScalarType::BFloat16));
  if (p.input.view.transposed) p.input = flattened(torch::stable::contiguous(input), p.in);
  if (!probabilities) {
    const auto* numbers = static_cast<const int64_t*>(p.target.data());
    const auto* weights = class_weight ? static_cast<const float*>(class_weight->const_data_ptr()) : nullptr;
    double total = 0.0;
    for (int64_t row = 0; row < rows; row++) {
      const int64_t value = numbers[row];
      if (value == ignore_index) continue;
      FASTATTN_CHECK(value >= 0 && value < classes, "linear_cross_entropy: target ", value, " at row ", row,
                     " is not in [0, ", classes, ") and is not ignore_index (", ignore_index, ")");
      total += weights != nullptr ? static_cast<double>(weights[value]) : 1.0;
    }
    p.total = static_cast<float>(total);
  }
  return p;
}

const void* row_of(const LinearMatrix& x, int64_t row) {
  const int64_t size = x.dtype == DType::f32 ? 4 : 2;
  return static_cast<const char*>(x.data) + row * x.row * size;
}

void logits_of(const Problem& p, int64_t first, int64_t count, float* logits) {
  LinearForward f{};
  f.input = p.input.view;
  f.input.data = row_of(p.input.view, first);
  f.weight = p.weight.view;
  f.bias = p.bias ? p.bias->const_data_ptr() : nullptr;
  f.bias_dtype = p.bias ? dtype_of(*p.bias) : DType::f32;
  f.output = logits;
  f.output_dtype = DType::f32;
  f.rows = count;
  f.in = p.in;
  f.out = p.classes;
  f.workers = torch::stable::get_num_threads();
  launch(kernels().linear->forward, f, p.nanoseconds(count));
}

// What both directions of cross_entropy take of a chunk.
template <class Params>
Params rows_of_chunk(const Problem& p, int64_t first, int64_t count, const float* logits) {
  Params c{};
  c.input = logits;
  if (p.probabilities)
    c.probabilities = static_cast<const float*>(p.target.data()) + first * p.target.stride;
  else
    c.target = static_cast<const int64_t*>(p.target.data()) + first;
  c.weight = p.class_weight ? static_cast<const float*>(p.class_weight->const_data_ptr()) : nullptr;
  c.rows = count;
  c.columns = p.classes;
  c.input_stride = p.classes;
  c.probabilities_stride = p.target.stride;
  c.ignore_index = p.ignore_index;
  c.label_smoothing = p.label_smoothing;
  c.dtype = DType::f32;
  c.probabilities_dtype = DType::f32;
  return c;
}

// Whether the gradients of logits are bfloat16.
bool narrow(const Problem& p) { return p.input.view.dtype == DType::bf16 && kernels().linear_cross_entropy->pairs; }

// Losses of a chunk (unless `losses` is null), then gradients in place of its logits, if `grad` is not null: one for
// every row of the chunk, or one for all.
void losses_and_gradients(const Problem& p, int64_t first, int64_t count, float* logits, float* losses, float* lse,
                          const float* grad, bool one) {
  LogitRows r{};
  r.logits = logits;
  r.forward = rows_of_chunk<CrossEntropyForward>(p, first, count, logits);
  r.forward.row_loss = losses == nullptr ? nullptr : losses + first;
  r.forward.lse = lse + first;
  r.backward = rows_of_chunk<CrossEntropyBackward>(p, first, count, logits);
  r.backward.grad = grad;
  r.backward.lse = lse + first;
  r.backward.reduction = one ? Reduction::sum : Reduction::none;
  r.losses = losses != nullptr;
  r.gradients = grad != nullptr;
  r.narrow = narrow(p);
  launch(kernels().linear_cross_entropy->rows, r, static_cast<double>(count * p.classes) * 0.3);
}

// Gradients of all rows, float32, chunk after chunk.
struct Gradients {
  std::optional<Tensor> input, weight, bias;

  Gradients(const Problem& p, bool input_grad, bool weight_grad, bool bias_grad) {
    if (input_grad) input = empty({p.rows, p.in}, ScalarType::Float);
    if (weight_grad) weight = empty({p.classes, p.in}, ScalarType::Float);
    if (bias_grad) bias = empty({p.classes}, ScalarType::Float);
  }
  static float* data(const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<float*>(tensor->mutable_data_ptr()) : nullptr;
  }

  // From the gradients of a chunk's logits.
  void add(const Problem& p, int64_t first, int64_t count, const float* of_logits) {
    LinearBackward b{};
    b.grad = {of_logits, p.classes, DType::f32, false};
    if (narrow(p)) b.grad = {of_logits, 2 * p.classes, DType::bf16, false};
    b.input = p.input.view;
    b.input.data = row_of(p.input.view, first);
    b.weight = p.weight.view;
    products(p, b, first, count);
  }
  // No rows have gradients, too.
  void none(const Problem& p) {
    LinearBackward b{};
    b.grad = {nullptr, p.classes, DType::f32, false};
    b.input = p.input.view;
    b.weight = p.weight.view;
    products(p, b, 0, 0);
  }

 private:
  void products(const Problem& p, LinearBackward& b, int64_t first, int64_t count) {
    b.input_grad_dtype = DType::f32;
    b.grad_input = input ? data(input) + first * p.in : nullptr;
    b.grad_weight = data(weight);
    b.grad_bias = data(bias);
    b.accumulate = first > 0;
    b.rows = count;
    b.in = p.in;
    b.out = p.classes;
    b.workers = torch::stable::get_num_threads();
    b.weight_grad_dtype = DType::f32;
    b.bias_dtype = DType::f32;
    launch(kernels().linear->backward, b, p.nanoseconds(count) * (int{bool(input)} + int{bool(weight)}));
  }
};

Tensor or_nothing(const std::optional<Tensor>& tensor) { return tensor ? *tensor : unpoisoned(0, ScalarType::Float); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward(
    Tensor input, Tensor weight, std::optional<Tensor> bias, Tensor target, std::optional<Tensor> class_weight,
    int64_t ignore_index, double label_smoothing, int64_t reduction, bool input_grad, bool weight_grad,
    bool bias_grad) {
  const Problem p = problem(input, weight, bias, target, class_weight, ignore_index, label_smoothing, reduction);
  const bool reduced = p.reduction != Reduction::none, mean = p.reduction == Reduction::mean;
  FASTATTN_CHECK(reduced || !(input_grad || weight_grad || bias_grad),
                 "linear_cross_entropy: gradients are computed ahead for a reduced loss only");
  Tensor row_loss = reduced ? unpoisoned(p.rows, ScalarType::Float) : empty({p.rows}, ScalarType::Float);
  Tensor lse = empty({p.rows}, ScalarType::Float);
  float* const losses = static_cast<float*>(row_loss.mutable_data_ptr());
  float* const sums = static_cast<float*>(lse.mutable_data_ptr());
  const Tensor memory = unpoisoned(p.chunk() * p.classes, ScalarType::Float);
  float* const logits = static_cast<float*>(memory.mutable_data_ptr());
  std::optional<Gradients> gradients;
  if (input_grad || weight_grad || bias_grad) gradients.emplace(p, input_grad, weight_grad, bias_grad);
  const float share = mean ? 1.f / p.total : 1.f;
  for (int64_t first = 0; first < p.rows; first += p.chunk()) {
    const int64_t count = std::min(p.chunk(), p.rows - first);
    logits_of(p, first, count, logits);
    losses_and_gradients(p, first, count, logits, losses, sums, gradients ? &share : nullptr, true);
    if (gradients) gradients->add(p, first, count, logits);
  }
  if (gradients && p.rows == 0) gradients->none(p);
  Tensor loss = reduced ? empty({}, ScalarType::Float) : row_loss;
  if (reduced) {
    double sum = 0.0;
    for (int64_t row = 0; row < p.rows; row++) sum += static_cast<double>(losses[row]);
    *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(mean ? sum / static_cast<double>(p.total) : sum);
  }
  if (!gradients) return {loss, lse, or_nothing({}), or_nothing({}), or_nothing({})};
  return {loss, lse, or_nothing(gradients->input), or_nothing(gradients->weight), or_nothing(gradients->bias)};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(Tensor grad, Tensor input, Tensor weight,
                                                                 std::optional<Tensor> bias, Tensor target,
                                                                 std::optional<Tensor> class_weight, Tensor lse,
                                                                 Tensor ahead_input, Tensor ahead_weight,
                                                                 Tensor ahead_bias, int64_t ignore_index,
                                                                 double label_smoothing, int64_t reduction,
                                                                 bool input_grad, bool weight_grad, bool bias_grad) {
  const Problem p = problem(input, weight, bias, target, class_weight, ignore_index, label_smoothing, reduction);
  const auto is_float = [](const Tensor& tensor, int64_t elements) {
    return tensor.scalar_type() == ScalarType::Float && tensor.numel() == elements && tensor.is_contiguous();
  };
  FASTATTN_CHECK(is_float(grad, p.reduction == Reduction::none ? p.rows : 1) && is_float(lse, p.rows),
                 "linear_cross_entropy: grad and lse must be contiguous float32 as the forward pass gave them");
  const float* const grads = static_cast<const float*>(grad.const_data_ptr());
  bias_grad = bias_grad && bias;
  const bool ahead = p.reduction != Reduction::none && (!input_grad || ahead_input.dim() == 2) &&
                     (!weight_grad || ahead_weight.dim() == 2) && (!bias_grad || is_float(ahead_bias, p.classes));
  const ScalarType bias_type = bias ? bias->scalar_type() : input.scalar_type();
  const auto finish = [&](const Tensor& values, bool wanted, float factor, ScalarType type) {
    return wanted ? scaled(values, factor, type) : unpoisoned(0, type);
  };
  if (ahead) {
    FASTATTN_CHECK((!input_grad || is_float(ahead_input, p.rows * p.in)) &&
                       (!weight_grad || is_float(ahead_weight, p.classes * p.in)),
                   "linear_cross_entropy: the gradients that were computed ahead do not fit");
    return {finish(ahead_input, input_grad, *grads, input.scalar_type()),
            finish(ahead_weight, weight_grad, *grads, weight.scalar_type()),
            finish(ahead_bias, bias_grad, *grads, bias_type)};
  }
  Gradients gradients(p, input_grad, weight_grad, bias_grad);
  const Tensor memory = unpoisoned(p.chunk() * p.classes, ScalarType::Float);
  float* const logits = static_cast<float*>(memory.mutable_data_ptr());
  float* const sums = static_cast<float*>(lse.mutable_data_ptr());  // only read
  const bool one = p.reduction != Reduction::none;
  const float share = one ? (p.reduction == Reduction::mean ? *grads / p.total : *grads) : 0.f;
  for (int64_t first = 0; first < p.rows; first += p.chunk()) {
    const int64_t count = std::min(p.chunk(), p.rows - first);
    logits_of(p, first, count, logits);
    losses_and_gradients(p, first, count, logits, nullptr, sums, one ? &share : grads + first, one);
    gradients.add(p, first, count, logits);
  }
  if (p.rows == 0) gradients.none(p);
  return {finish(or_nothing(gradients.input), input_grad, 1.f, input.scalar_type()),
          finish(or_nothing(gradients.weight), weight_grad, 1.f, weight.scalar_type()),
          finish(or_nothing(gradients.bias), bias_grad, 1.f, bias_type)};
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  implement<&linear_cross_entropy_forward, &linear_cross_entropy_backward>(m, "linear_cross_entropy");
}

}  // namespace
}  // namespace fastattn
