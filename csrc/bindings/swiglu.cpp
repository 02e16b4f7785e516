// fastattn::swiglu on the CPU.
#include <tuple>

#include "direct.h"
#include "rows.h"
#include "streaming.h"

namespace fastattn {
namespace {

void check_like(const char* what, const Tensor& tensor, const Tensor& gate) {
  FASTATTN_CHECK(tensor.scalar_type() == gate.scalar_type() && same_shape(tensor, gate), "swiglu: ", what,
                 " must have the shape and dtype of gate");
}

struct Shape {
  int64_t rows, columns;
};
Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  if (sizes.size() == 0) return {1, 1};
  return {product(sizes, 0, sizes.size() - 1), sizes[sizes.size() - 1]};
}

Tensor swiglu_forward(Tensor gate, Tensor up) {
  check_like("up", up, gate);
  const auto [rows, columns] = shape_of(gate);
  const int64_t column_dims = std::min<int64_t>(gate.dim(), 1);
  const Rows g = rows_of(gate, column_dims, columns), u = rows_of(up, column_dims, columns);
  Tensor output = empty(gate.sizes(), gate.scalar_type());
  const bool flat = g.stride == columns && u.stride == columns;  // one long row: no matter how short the rows are
  SwigluForward p{};
  p.gate = g.data();
  p.up = u.data();
  p.output = output.mutable_data_ptr();
  p.rows = flat ? 1 : rows;
  p.columns = flat ? rows * columns : columns;
  p.gate_stride = g.stride;
  p.up_stride = u.stride;
  p.dtype = dtype_of(gate);
  p.streaming = worth_streaming(rows * columns * 3, gate.scalar_type());
  launch(kernels().swiglu->forward, p, static_cast<double>(rows * columns) * 0.3);
  return output;
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor grad_output, Tensor gate, Tensor up) {
  check_like("up", up, gate);
  check_like("grad_output", grad_output, gate);
  const auto [rows, columns] = shape_of(gate);
  const int64_t column_dims = std::min<int64_t>(gate.dim(), 1);
  const Rows dy = rows_of(grad_output, column_dims, columns);
  const Rows g = rows_of(gate, column_dims, columns), u = rows_of(up, column_dims, columns);
  Tensor grad_gate = empty(gate.sizes(), gate.scalar_type());
  Tensor grad_up = empty(gate.sizes(), gate.scalar_type());
  const bool flat = dy.stride == columns && g.stride == columns && u.stride == columns;
  SwigluBackward p{};
  p.grad_output = dy.data();
  p.gate = g.data();
  p.up = u.data();
  p.grad_gate = grad_gate.mutable_data_ptr();
  p.grad_up = grad_up.mutable_data_ptr();
  p.rows = flat ? 1 : rows;
  p.columns = flat ? rows * columns : columns;
  p.grad_output_stride = dy.stride;
  p.gate_stride = g.stride;
  p.up_stride = u.stride;
  p.dtype = dtype_of(gate);
  p.streaming = worth_streaming(rows * columns * 5, gate.scalar_type());
  launch(kernels().swiglu->backward, p, static_cast<double>(rows * columns) * 0.5);
  return {grad_gate, grad_up};
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) { implement<&swiglu_forward, &swiglu_backward>(m, "swiglu"); }

}  // namespace
}  // namespace fastattn
