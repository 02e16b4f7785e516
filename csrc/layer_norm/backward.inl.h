// The backward pass. With g = grad_output * weight and n = (x - mean) * rstd, both taken again from the saved
// statistics:
//   grad_total = rstd * (g - mean_c(g) - n * mean_c(g * n)) + grad_sum,
//   grad_weight = sum_rows(grad_output * n),  grad_bias = sum_rows(grad_output);
// RMSNorm without the mean_c(g) term and with mean = 0. The first sweep over a row has all that the sums over rows
// need.
#pragma once
#include "walk.inl.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// T: of everything but the input's gradient, which is an I. Apart: that one is not grad_total.
template <class T, class I, bool Centred, bool Apart>
class NormBackwardRows {
 public:
  static constexpr int64_t kLag = 2;
  struct Row {
    int64_t index;
    F32x2 sum, products;  // of g and of g * (x - mean)
    float mean, rstd, slope, level;
  };

  NormBackwardRows(const NormBackward& p, const float* weight, float* space, float* factors)
      : p_(p),
        weight_(weight),
        space_(space),
        factors_(factors),
        streaming_(p.streaming && fit_for_streaming<T>(p.grad_total, p.columns)) {}

  void begin_task(int64_t task, int64_t& first, int64_t& end) {
    const int64_t stride = (Centred ? 2 : 1) * p_.columns;
    weight_sums_ = p_.partials != nullptr ? p_.partials + task * stride : space_;
    bias_sums_ = weight_sums_ + (Centred ? p_.columns : 0);
    memset(weight_sums_, 0, static_cast<size_t>(stride) * sizeof(float));
    first = task * p_.chunk_rows;
    end = min_of(first + p_.chunk_rows, p_.rows);
  }
  void finish_task(TaskQueue& queue) const;

  FASTATTN_INLINE void begin_row(Row& row, int64_t index) const {
    row.index = index;
    row.sum = row.products = splat2(0.f);
    row.mean = Centred ? p_.mean[index] : 0.f;
    // A centred row of one column is constant: its gradient is 0, not what rounding leaves of a difference over eps.
    row.rstd = Centred && p_.columns == 1 ? 0.f : p_.rstd[index];
  }

  template <bool Read, bool Write>
  FASTATTN_INLINE void read_and_write(Row& reading, int64_t ahead, int64_t shift, const Row& writing, Segment segment) {
    if (Write && streaming_)
      sweep<Read, Write, true>(reading, ahead, shift, writing, segment);
    else
      sweep<Read, Write, false>(reading, ahead, shift, writing, segment);
  }

  // grad_total = rstd * g + (x - mean) * slope + level
  FASTATTN_INLINE void finish_row(Row& row) const {
    const float count = static_cast<float>(p_.columns);
    row.slope = -(reduce_add(row.products) * row.rstd / count) * row.rstd * row.rstd;
    row.level = Centred ? -(reduce_add(row.sum) / count) * row.rstd : 0.f;
  }

 private:
  FASTATTN_INLINE const T* row_of(const void* tensor, int64_t stride, int64_t row, int64_t column) const {
    return static_cast<const T*>(tensor) + row * stride + column;
  }

  template <bool Read, bool Write, bool Streaming>
  __attribute__((noinline)) void sweep(Row& reading, int64_t ahead, int64_t shift, const Row& writing,
                                       Segment segment) const {
    const int64_t first = segment.first;
    const float* const weight = weight_ + first;
    // reading
    const T *x = nullptr, *dy = nullptr, *x_ahead = nullptr, *dy_ahead = nullptr, *ds_ahead = nullptr;
    float *weight_sums = nullptr, *bias_sums = nullptr;
    F32x2 mean, rstd, sum, product;
    if constexpr (Read) {
      x = row_of(p_.input, p_.input_stride, reading.index, first);
      dy = row_of(p_.grad_output, p_.grad_output_stride, reading.index, first);
      x_ahead = row_of(p_.input, p_.input_stride, ahead, first + shift);
      dy_ahead = row_of(p_.grad_output, p_.grad_output_stride, ahead, first + shift);
      if (p_.grad_sum != nullptr) ds_ahead = row_of(p_.grad_sum, p_.grad_sum_stride, ahead, first + shift);
      weight_sums = weight_sums_ + first;
      bias_sums = bias_sums_ + first;
      mean = splat2(reading.mean);
      rstd = splat2(reading.rstd);
      sum = product = splat2(0.f);
    }
    // writing
    const T *done_x = nullptr, *done_dy = nullptr, *ds = nullptr;
    T* out = nullptr;
    I* apart = nullptr;
    F32x2 middle, scale, slope, level;
    const bool dropout = Apart && p_.dropout.enabled;
    if constexpr (Write) {
      done_x = row_of(p_.input, p_.input_stride, writing.index, first);
      done_dy = row_of(p_.grad_output, p_.grad_output_stride, writing.index, first);
      if (p_.grad_sum != nullptr) ds = row_of(p_.grad_sum, p_.grad_sum_stride, writing.index, first);
      out = static_cast<T*>(p_.grad_total) + writing.index * p_.columns + first;
      if constexpr (Apart) {
        apart = static_cast<I*>(p_.grad_input) + writing.index * p_.columns + first;
        if (dropout) fill_dropout(p_.dropout, writing.index, segment, factors_);
      }
      middle = splat2(writing.mean);
      scale = splat2(writing.rstd);
      slope = splat2(writing.slope);
      level = splat2(writing.level);
    }

    for_columns<1>(segment.count, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
      const F32x2 w = get(weight + c, Natural{}, where);
      if constexpr (Read) {
        prefetch_pair(x_ahead + c);
        prefetch_pair(dy_ahead + c);
        if (ds_ahead != nullptr) prefetch_pair(ds_ahead + c);
        const F32x2 grad = get(dy + c, Cheapest{}, where);
        const F32x2 g = grad * w;
        F32x2 d = get(x + c, Cheapest{}, where);
        if constexpr (Centred) {
          d = d - mean;
          sum = sum + g;
          put(bias_sums + c, get(bias_sums + c, Natural{}, where) + grad, Natural{}, where);
        }
        product = fma(g, d, product);
        put(weight_sums + c, fma(grad * rstd, d, get(weight_sums + c, Natural{}, where)), Natural{}, where);
      }
      if constexpr (Write) {
        F32x2 d = get(done_x + c, Cheapest{}, where);
        if constexpr (Centred)
          d = fma(d - middle, slope, level);
        else
          d = d * slope;
        F32x2 total = fma(get(done_dy + c, Cheapest{}, where) * scale, w, d);
        if (ds != nullptr) total = total + get(ds + c, Cheapest{}, where);
        put_result<Streaming>(out + c, total, where);
        if constexpr (Apart) {
          if (dropout)
            total = total * to_cheapest(static_cast<const T*>(nullptr), get(factors_ + c, Natural{}, where), where);
          put_like<T>(apart + c, total, where);
        }
      }
    });
    if constexpr (Read) {
      if constexpr (Centred) reading.sum = reading.sum + sum;
      reading.products = reading.products + product;
    }
  }

  const NormBackward& p_;
  const float* const weight_;
  float *const space_, *const factors_;
  float *weight_sums_ = nullptr, *bias_sums_ = nullptr;  // of the task at hand, in the order of Cheapest loads of a T
  const bool streaming_;
};

// Adds the chunks' partial sums into the first one's, in four chains over the chunks in order.
void add_chunks(float* partials, int64_t stride, int64_t chunks, int64_t columns) {
  for_columns<1>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
    F32x2 sums[4];
    FASTATTN_UNROLL for (int i = 0; i < 4; i++) sums[i] = splat2(0.f);
    int64_t k = 0;
    for (; k + 4 <= chunks; k += 4)
      FASTATTN_UNROLL for (int i = 0; i < 4; i++) sums[i] =
          sums[i] + get(partials + (k + i) * stride + c, Natural{}, where);
    for (; k < chunks; k++) sums[0] = sums[0] + get(partials + k * stride + c, Natural{}, where);
    put(partials + c, (sums[0] + sums[1]) + (sums[2] + sums[3]), Natural{}, where);
  });
}
template <class T, class A>
FASTATTN_INLINE void narrow_sums(const float* sums, A* out, int64_t columns) {
  for_columns<1>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
    const F32x2 sum = get(sums + c, Natural{}, where);
    put(out + c, from_cheapest(static_cast<const T*>(nullptr), sum, where), Natural{}, where);
  });
}
template <class T>
void combine(const NormBackward& p, int64_t which, int64_t stride, void* out) {
  if (out == nullptr) return;
  float* const partials = p.partials + which * p.columns;
  add_chunks(partials, stride, ceil_div(p.rows, p.chunk_rows), p.columns);
  if (p.affine_dtype == DType::f32)
    narrow_sums<T>(partials, static_cast<float*>(out), p.columns);
  else
    narrow_sums<T>(partials, static_cast<T*>(out), p.columns);
}

template <class T, class I, bool Centred, bool Apart>
void NormBackwardRows<T, I, Centred, Apart>::finish_task(TaskQueue& queue) const {
  if (!fastattn::FASTATTN_ISA::finish_task(queue)) return;
  const int64_t stride = (Centred ? 2 : 1) * p_.columns;
  combine<T>(p_, 0, stride, p_.grad_weight);
  if constexpr (Centred) combine<T>(p_, 1, stride, p_.grad_bias);
}

int64_t norm_backward_tasks(const NormBackward& p) { return max_of(ceil_div(p.rows, p.chunk_rows), 1); }
int64_t norm_backward_scratch(const NormBackward& p) {
  return (3 * round_up(p.columns, kPair) + kFactors) * static_cast<int64_t>(sizeof(float));
}

template <class T, class I, bool Centred, bool Apart>
void norm_backward_rows(const NormBackward& p, TaskQueue& queue, char* scratch) {
  float* const space = reinterpret_cast<float*>(scratch);
  const int64_t step = round_up(p.columns, kPair);
  const float* const weight = affine<T>(p.weight, p.affine_dtype, p.weight_offset, 1.f, space, p.columns);
  NormBackwardRows<T, I, Centred, Apart> rows(p, weight, space + step, space + 3 * step);
  Walk walk(rows, p.rows, p.columns, static_cast<int64_t>(sizeof(T)));
  walk.run(queue);
  finish_streams();
}
template <class T, bool Centred>
void norm_backward_of(const NormBackward& p, TaskQueue& queue, char* scratch) {
  if (p.grad_input == nullptr) return norm_backward_rows<T, T, Centred, false>(p, queue, scratch);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.input_dtype == DType::bf16) return norm_backward_rows<T, bf16, Centred, true>(p, queue, scratch);
    if (p.input_dtype == DType::f16) return norm_backward_rows<T, f16, Centred, true>(p, queue, scratch);
  }
  norm_backward_rows<T, T, Centred, true>(p, queue, scratch);
}
template <bool Centred>
void norm_backward(const NormBackward& p, TaskQueue& queue, char* scratch) {
  switch (p.dtype) {
    case DType::bf16:
      return norm_backward_of<bf16, Centred>(p, queue, scratch);
    case DType::f16:
      return norm_backward_of<f16, Centred>(p, queue, scratch);
    default:
      return norm_backward_of<float, Centred>(p, queue, scratch);
  }
}
void run_norm_backward(const NormBackward& p, TaskQueue& queue, char* scratch) {
  return p.centred ? norm_backward<true>(p, queue, scratch) : norm_backward<false>(p, queue, scratch);
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
