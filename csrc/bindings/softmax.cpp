// fastattn::softmax on the CPU.
#include "rows.h"

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

double estimate(const View& view, double nanoseconds_each) {
  return static_cast<double>(view.outer * view.columns * view.inner) * nanoseconds_each;
}

Tensor softmax_forward(Tensor input, int64_t dim, bool log, ScalarType dtype) {
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
  launch(kernels().softmax->forward, p, estimate(view, 0.3));
  return output;
}

Tensor softmax_backward(Tensor grad_output, Tensor output, int64_t dim, bool log, ScalarType dtype) {
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
  launch(kernels().softmax->backward, p, estimate(view, 0.3));
  return grad_input;
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("softmax.cpu", TORCH_BOX(&softmax_forward));
  m.impl("softmax_forward.cpu", TORCH_BOX(&softmax_forward));
  m.impl("softmax_backward.cpu", TORCH_BOX(&softmax_backward));
}

}  // namespace
}  // namespace fastattn
