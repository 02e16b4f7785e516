// fastattn::rotary on the CPU.
#include <algorithm>
#include <vector>

#include "direct.h"

namespace fastattn {
namespace {

int64_t number_at(const Tensor& tensor, int64_t i) {
  const int64_t at = i * tensor.stride(0);
  return tensor.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(tensor.const_data_ptr())[at]
                                                 : static_cast<const int64_t*>(tensor.const_data_ptr())[at];
}

bool is_index(const Tensor& tensor, int64_t count) {
  const ScalarType type = tensor.scalar_type();
  return tensor.dim() == 1 && tensor.size(0) == count && (type == ScalarType::Int || type == ScalarType::Long);
}

void rotate(const Tensor& input, const Tensor& output, const Tensor& cos, const Tensor& sin,
            const std::optional<Tensor>& offsets, const std::optional<Tensor>& cu_seqlens, int64_t offset,
            bool interleaved, bool inverse) {
  const int64_t dims = cu_seqlens ? 3 : 4;
  FASTATTN_CHECK(input.dim() == dims, "rotary: x must have ", dims, " dimensions, got ", input.dim());
  FASTATTN_CHECK(cos.dim() == 2 && sin.dim() == 2 && cos.size(0) == sin.size(0) && cos.size(1) == sin.size(1) &&
                     cos.scalar_type() == sin.scalar_type(),
                 "rotary: cos and sin must be (positions, rotary_dim / 2), both alike");
  FASTATTN_CHECK(cos.scalar_type() == ScalarType::Float || cos.scalar_type() == input.scalar_type(),
                 "rotary: cos and sin must be float32 or of the dtype of x");
  Rotary p{};
  p.dtype = dtype_of(input);
  FASTATTN_CHECK(p.dtype != DType::boolean, "rotary: x must be float32, bfloat16 or float16");
  p.table_dtype = dtype_of(cos);
  p.heads = input.size(dims - 2);
  p.columns = input.size(dims - 1);
  p.half = cos.size(1);
  FASTATTN_CHECK(2 * p.half <= p.columns, "rotary: rotary_dim ", 2 * p.half, " is more than the head dim ", p.columns);
  for (const Tensor* tensor : {&input, &output, &cos, &sin})
    FASTATTN_CHECK(tensor->stride(tensor->dim() - 1) == 1 || tensor->size(tensor->dim() - 1) <= 1,
                   "rotary: x, cos and sin must have a last stride of 1");
  const int64_t positions = cos.size(0);
  std::vector<RotarySequence> sequences;
  if (cu_seqlens) {
    const int64_t total = input.size(0), count = cu_seqlens->dim() == 1 ? cu_seqlens->size(0) - 1 : -1;
    FASTATTN_CHECK(count >= 0 && is_index(*cu_seqlens, count + 1),
                   "rotary: cu_seqlens must be int32 or int64 of shape (batch + 1,)");
    FASTATTN_CHECK(number_at(*cu_seqlens, 0) == 0, "rotary: cu_seqlens[0] = ", number_at(*cu_seqlens, 0), " must be 0");
    for (int64_t b = 0; b < count; b++) {
      const int64_t begin = number_at(*cu_seqlens, b), end = number_at(*cu_seqlens, b + 1);
      FASTATTN_CHECK(begin <= end && end <= total, "rotary: cu_seqlens[", b + 1, "] = ", end, " is not in [", begin,
                     ", ", total, "], from the one before to the rows of x");
      sequences.push_back({begin * input.stride(0), begin * output.stride(0), end - begin, 0});
    }
    const int64_t last = number_at(*cu_seqlens, count);
    FASTATTN_CHECK(last == total, "rotary: cu_seqlens[", count, "] = ", last, " must be ", total, ", the rows of x");
  } else {
    for (int64_t b = 0; b < input.size(0); b++)
      sequences.push_back({b * input.stride(0), b * output.stride(0), input.size(1), 0});
  }
  p.count = static_cast<int64_t>(sequences.size());
  FASTATTN_CHECK(!offsets || is_index(*offsets, p.count), "rotary: seqlen_offsets must be int32 or int64 of shape (",
                 p.count, ",)");
  for (int64_t b = 0; b < p.count; b++) {
    RotarySequence& sequence = sequences[static_cast<size_t>(b)];
    sequence.position = offsets ? number_at(*offsets, b) : offset;
    FASTATTN_CHECK(sequence.rows == 0 || (sequence.position >= 0 && sequence.position <= positions - sequence.rows),
                   "rotary: sequence ", b, " of ", sequence.rows, " rows at offset ", sequence.position,
                   " is not within the ", positions, " positions of cos and sin");
    p.longest = std::max(p.longest, sequence.rows);
  }
  if (input.numel() == 0) return;
  p.input = input.const_data_ptr();
  p.output = output.mutable_data_ptr();
  p.input_row = input.stride(dims - 3);
  p.input_head = input.stride(dims - 2);
  p.output_row = output.stride(dims - 3);
  p.output_head = output.stride(dims - 2);
  p.sequences = sequences.data();
  p.cos = cos.const_data_ptr();
  p.sin = sin.const_data_ptr();
  p.cos_row = cos.stride(0);
  p.sin_row = sin.stride(0);
  p.interleaved = interleaved;
  p.inverse = inverse;
  launch(kernels().rotary->forward, p, static_cast<double>(input.numel()) * 0.15);
}

Tensor rotary_forward(Tensor x, Tensor cos, Tensor sin, std::optional<Tensor> offsets, std::optional<Tensor> cu_seqlens,
                      int64_t offset, bool interleaved) {
  Tensor output = empty(x.sizes(), x.scalar_type());
  rotate(x, output, cos, sin, offsets, cu_seqlens, offset, interleaved, false);
  return output;
}

Tensor rotary_backward(Tensor grad, Tensor cos, Tensor sin, std::optional<Tensor> offsets,
                       std::optional<Tensor> cu_seqlens, int64_t offset, bool interleaved) {
  Tensor output = empty(grad.sizes(), grad.scalar_type());
  rotate(grad, output, cos, sin, offsets, cu_seqlens, offset, interleaved, true);
  return output;
}

void rotary_in_place(Tensor x, Tensor cos, Tensor sin, std::optional<Tensor> offsets, std::optional<Tensor> cu_seqlens,
                     int64_t offset, bool interleaved) {
  rotate(x, x, cos, sin, offsets, cu_seqlens, offset, interleaved, false);
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  implement<&rotary_forward, &rotary_backward>(m, "rotary");
  m.impl("rotary_in_place.cpu", TORCH_BOX(&rotary_in_place));
}

}  // namespace
}  // namespace fastattn
