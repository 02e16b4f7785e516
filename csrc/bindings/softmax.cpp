// fastattn::softmax on the CPU.
#include "direct.h"
#include "rows.h"
#include "streaming.h"

namespace fastattn {
namespace {

struct View {
  int64_t outer, columns, inner;
};

View view_of(const Tensor& tensor, int64_t dim) {
  FASTATTN_CHECK(dim >= 0 && dim < tensor.dim(), "softmax: dim must be in [0, ", tensor.dim() - 1, "], got ", dim);
  const auto sizes = tensor.sizes();
  const size_t at = static_cast<size_t>(dim);
  return {product(sizes, 0, at), sizes[at], product(sizes, at + 1, sizes.size())};
}

// Rows with a stride of their own where the dimension is the last (all dimensions after it have one element),
// contiguous otherwise.
Rows operand(const Tensor& tensor, int64_t dim, const View& view) {
  if (view.inner == 1) return rows_of(tensor, tensor.dim() - dim, view.columns);
  return {tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor), 0};
}

int64_t elements(const View& view) { return view.outer * view.columns * view.inner; }

double estimate(const View& view, double nanoseconds_each) {
  return static_cast<double>(elements(view)) * nanoseconds_each;
}

SoftmaxCausal causal_of(int64_t causal, const Tensor& tensor, int64_t dim) {
  FASTATTN_CHECK(causal >= 0 && causal <= 2, "softmax: causal must be 0, 1 or 2, got ", causal);
  FASTATTN_CHECK(causal == 0 || (tensor.dim() >= 2 && dim == tensor.dim() - 1),
                 "softmax: causal rows are the last two dimensions, and dim is the last");
  return static_cast<SoftmaxCausal>(causal);
}
int64_t rows_per_matrix(const Tensor& tensor) {
  return tensor.dim() >= 2 ? std::max<int64_t>(tensor.size(tensor.dim() - 2), 1) : 1;
}

// The mask's strides along the rows of an input whose softmax is over the last dimension.
SoftmaxMask mask_of(const Tensor& mask, const Tensor& input, int64_t dim) {
  FASTATTN_CHECK(dim == input.dim() - 1, "softmax: with a mask, dim is the last dimension");
  FASTATTN_CHECK(mask.dim() == input.dim() && mask.dim() <= SoftmaxMask::kDims,
                 "softmax: mask must have the dimensions of input, at most ", SoftmaxMask::kDims, ", got ", mask.dim());
  const ScalarType type = mask.scalar_type();
  FASTATTN_CHECK(type == ScalarType::Bool || type == ScalarType::Float || type == input.scalar_type(),
                 "softmax: mask must be bool, float32 or of the dtype of input");
  SoftmaxMask out{};
  out.data = mask.const_data_ptr();
  out.dtype = dtype_of(mask);
  out.dims = static_cast<int32_t>(dim);
  const auto sizes = mask.sizes(), strides = mask.strides(), wanted = input.sizes();
  for (int64_t i = 0; i <= dim; i++) {
    FASTATTN_CHECK(sizes[i] == 1 || sizes[i] == wanted[i], "softmax: a mask of size ", sizes[i], " in dimension ", i,
                   " does not broadcast to ", wanted[i]);
    const int64_t stride = sizes[i] == 1 ? 0 : strides[i];
    if (i < dim) {
      out.sizes[i] = std::max<int64_t>(wanted[i], 1);
      out.strides[i] = stride;
    } else {
      FASTATTN_CHECK(stride == 0 || stride == 1, "softmax: the mask's columns must be adjacent or repeat");
      out.column_stride = stride;
    }
  }
  return out;
}

Tensor softmax_forward(Tensor input, int64_t dim, bool log, ScalarType dtype, double scale, std::optional<Tensor> mask,
                       int64_t causal) {
  FASTATTN_CHECK(dtype == ScalarType::Float || dtype == input.scalar_type(),
                 "softmax: dtype must be float32 or the dtype of input");
  const View view = view_of(input, dim);
  const Rows x = operand(input, dim, view);
  Tensor output = empty(input.sizes(), dtype);
  SoftmaxForward p{};
  p.input = x.data();
  p.output = output.mutable_data_ptr();
  p.outer = view.outer;
  p.columns = view.columns;
  p.inner = view.inner;
  p.input_stride = x.stride;
  p.input_dtype = dtype_of(input);
  p.output_dtype = dtype_of(dtype);
  p.log = log;
  p.scale = static_cast<float>(scale);
  if (mask) p.mask = mask_of(*mask, input, dim);
  p.causal = causal_of(causal, input, dim);
  p.rows_per_matrix = rows_per_matrix(input);
  FASTATTN_CHECK(scale == 1.0 || dim == input.dim() - 1, "softmax: with a scale, dim is the last dimension");
  p.streaming = worth_streaming(2 * elements(view), dtype);
  launch(kernels().softmax->forward, p, estimate(view, 0.3));
  return output;
}

Tensor softmax_backward(Tensor grad_output, Tensor output, int64_t dim, bool log, ScalarType dtype, double scale,
                        bool masked, int64_t causal) {
  FASTATTN_CHECK(grad_output.scalar_type() == output.scalar_type() && same_shape(grad_output, output),
                 "softmax: grad_output must have the shape and dtype of output");
  FASTATTN_CHECK(output.scalar_type() == ScalarType::Float || output.scalar_type() == dtype,
                 "softmax: output must be float32 or of the dtype of the input");
  const View view = view_of(output, dim);
  const Rows dy = operand(grad_output, dim, view);
  const Rows y = operand(output, dim, view);
  Tensor grad_input = empty(output.sizes(), dtype);
  SoftmaxBackward p{};
  p.grad_output = dy.data();
  p.output = y.data();
  p.grad_input = grad_input.mutable_data_ptr();
  p.outer = view.outer;
  p.columns = view.columns;
  p.inner = view.inner;
  p.grad_output_stride = dy.stride;
  p.output_stride = y.stride;
  p.output_dtype = dtype_of(output);
  p.input_dtype = dtype_of(dtype);
  p.log = log;
  p.scale = static_cast<float>(scale);
  p.masked = masked || causal != 0;
  p.causal = causal_of(causal, output, dim);
  p.rows_per_matrix = rows_per_matrix(output);
  FASTATTN_CHECK((scale == 1.0 && !masked) || dim == output.dim() - 1,
                 "softmax: with a scale or a mask, dim is the last dimension");
  p.streaming = worth_streaming(3 * elements(view), dtype);
  launch(kernels().softmax->backward, p, estimate(view, 0.3));
  return grad_input;
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) { implement<&softmax_forward, &softmax_backward>(m, "softmax"); }

}  // namespace
}  // namespace fastattn
