// The forward pass. The statistics of a row are taken in one sweep, of x - k with a k near the mean:
//   d_c = x_c - k,  delta = sum(d) / C,  variance = sum(d^2) / C - delta^2,  y_c = (d_c - delta) * rstd * w_c + b_c.
// k is the mean of the first few elements (bf16: 0, which saves a third of the arithmetic and is good enough for
// numbers of 8 bits). Where that turns out to be far off, measured in standard deviations, so that the difference of
// the two terms has lost digits, the row is swept again with the mean just found.
#pragma once
#include "walk.inl.h"

namespace fastattn::FASTATTN_ISA {
namespace {

template <class T>
constexpr bool kShifted = !kOwnOrder<T>;
// |delta| / (standard deviation) up to which variance is good: 2 or 17 roundings instead of 1.
template <class T>
constexpr float kLargestDelta = kShifted<T> ? 1.f : 4.f;

// T: of what is normalised and of the result. I: of input, different only where a residual is added.
template <class T, class I, bool Centred, bool Added>
class NormForwardRows {
 public:
  static constexpr int64_t kLag = 3;
  static constexpr int kUnroll = 2;
  struct Row {
    int64_t index;
    const T* x;  // what is normalised: a row of input or of sum
    F32x2 sum, squares;
    float k, delta, rstd;
  };

  NormForwardRows(const NormForward& p, const float* weight, const float* bias, float* factors, int64_t rows_per_task)
      : p_(p),
        weight_(weight),
        bias_(bias),
        factors_(factors),
        rows_per_task_(rows_per_task),
        streaming_(p.streaming && fit_for_streaming<T>(p.output, p.columns)) {}

  void begin_task(int64_t task, int64_t& first, int64_t& end) const {
    first = task * rows_per_task_;
    end = min_of(first + rows_per_task_, p_.rows);
  }
  void finish_task(TaskQueue&) const {}

  FASTATTN_INLINE void begin_row(Row& row, int64_t index) const {
    row.index = index;
    row.x = Added ? static_cast<const T*>(p_.sum) + index * p_.columns
                  : static_cast<const T*>(p_.input) + index * p_.input_stride;
    row.sum = row.squares = splat2(0.f);
    row.k = 0.f;
    if constexpr (Centred && kShifted<T>) {
      if (p_.columns >= kPair)
        row.k = reduce_add(first_pair(index, Whole{})) * (1.f / kPair);
      else
        row.k = reduce_add(first_pair(index, Part{p_.columns})) / static_cast<float>(p_.columns);
    }
  }

  template <bool Read, bool Write>
  FASTATTN_INLINE void read_and_write(Row& reading, int64_t ahead, int64_t shift, const Row& writing, Segment segment) {
    if (Write && streaming_)
      sweep<Read, Write, true>(reading, ahead, shift, writing, segment);
    else
      sweep<Read, Write, false>(reading, ahead, shift, writing, segment);
  }

  FASTATTN_INLINE void finish_row(Row& row) const {
    const float count = static_cast<float>(p_.columns);
    float variance = reduce_add(row.squares) / count;
    if constexpr (Centred) {
      row.delta = reduce_add(row.sum) / count;
      variance -= row.delta * row.delta;
      const float limit = kLargestDelta<T> * kLargestDelta<T>;
      if (!(row.delta * row.delta <= limit * variance)) variance = sweep_again(row);
      p_.mean[row.index] = row.k + row.delta;
    }
    row.rstd = 1.f / __builtin_sqrtf(variance + p_.eps);
    p_.rstd[row.index] = row.rstd;
  }

 private:
  FASTATTN_INLINE const I* input(int64_t row) const { return static_cast<const I*>(p_.input) + row * p_.input_stride; }
  FASTATTN_INLINE const T* residual(int64_t row) const {
    return static_cast<const T*>(p_.residual) + row * p_.residual_stride;
  }
  // Dropout apart, which k need not know of.
  template <class Where>
  FASTATTN_INLINE F32x2 first_pair(int64_t row, Where where) const {
    F32x2 x = get_like<T>(input(row), where);
    if constexpr (Added) x = x + get(residual(row), Cheapest{}, where);
    return x;
  }

  template <bool Read, bool Write, bool Streaming>
  __attribute__((noinline)) void sweep(Row& reading, int64_t ahead, int64_t shift, const Row& writing,
                                       Segment segment) const {
    const int64_t first = segment.first;
    // reading
    const T* const x = reading.x + first;
    const I* added = nullptr;
    const T* residual = nullptr;
    const I* input_ahead = nullptr;
    const T* residual_ahead = nullptr;
    const bool dropout = Read && Added && p_.dropout.enabled;
    F32x2 sums[kUnroll], squares[kUnroll];
    const F32x2 k = splat2(reading.k);
    if constexpr (Read) {
      FASTATTN_UNROLL for (int i = 0; i < kUnroll; i++) sums[i] = squares[i] = splat2(0.f);
      input_ahead = input(ahead) + first + shift;
      if constexpr (Added) {
        added = input(reading.index) + first;
        residual = this->residual(reading.index) + first;
        residual_ahead = this->residual(ahead) + first + shift;
        if (dropout) fill_dropout(p_.dropout, reading.index, segment, factors_);
      }
    }
    // writing
    const T* const done = writing.x + first;
    T* const y = static_cast<T*>(p_.output) + writing.index * p_.columns + first;
    const float *const weight = weight_ + first, *const bias = bias_ + first;
    F32x2 middle, scale, offset;
    if constexpr (Write) {
      middle = splat2(writing.k);
      scale = splat2(writing.rstd);
      if constexpr (Centred) offset = splat2(-writing.delta * writing.rstd);
    }

    for_columns<kUnroll>(segment.count, [&](int64_t c, int i, auto where) FASTATTN_LAMBDA {
      if constexpr (Read) {
        prefetch_pair(input_ahead + c);
        if constexpr (Added) {
          prefetch_pair(residual_ahead + c);
          F32x2 a = get_like<T>(added + c, where);
          const F32x2 r = get(residual + c, Cheapest{}, where);
          if (dropout) {
            const F32x2 factor = to_cheapest(x, get(factors_ + c, Natural{}, where), where);
            a = fma(a, factor, r);
          } else {
            a = a + r;
          }
          put(const_cast<T*>(x) + c, a, Cheapest{}, where);
        }
        add_statistics(x + c, k, sums[i], squares[i], where);
      }
      if constexpr (Write) {
        const F32x2 w = get(weight + c, Natural{}, where);
        F32x2 out = get(done + c, Cheapest{}, where);
        if constexpr (Centred)
          out = fma(fma(out - middle, scale, offset), w, get(bias + c, Natural{}, where));
        else
          out = out * scale * w;
        put_result<Streaming>(y + c, out, where);
      }
    });
    if constexpr (Read) {
      FASTATTN_UNROLL for (int i = 1; i < kUnroll; i++) {
        sums[0] = sums[0] + sums[i];
        squares[0] = squares[0] + squares[i];
      }
      if constexpr (Centred) reading.sum = reading.sum + sums[0];
      reading.squares = reading.squares + squares[0];
    }
  }

  template <class Where>
  static FASTATTN_INLINE void add_statistics(const T* p, F32x2 k, F32x2& sum, F32x2& squares, Where where) {
    F32x2 d = get(p, Cheapest{}, where);
    if constexpr (Centred) {
      if constexpr (kShifted<T>) d = keep(d - k, zero(), where);
      sum = sum + d;
    }
    squares = fma(d, d, squares);
  }
  static FASTATTN_INLINE void add_statistics(const bf16* p, F32x2, F32x2& sum, F32x2& squares, Whole) {
    add_moments(p, sum.a, squares.a);
  }

  __attribute__((noinline)) float sweep_again(Row& row) const {
    const float count = static_cast<float>(p_.columns);
    row.k += row.delta;
    const F32x2 k = splat2(row.k);
    F32x2 sum = splat2(0.f), squares = sum;
    for (int64_t first = 0; first < p_.columns; first += kSegment) {
      F32x2 s = splat2(0.f), q = s;
      for_columns<1>(min_of(p_.columns - first, kSegment), [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
        const F32x2 d = keep(get(row.x + first + c, Cheapest{}, where) - k, zero(), where);
        s = s + d;
        q = fma(d, d, q);
      });
      sum = sum + s;
      squares = squares + q;
    }
    row.delta = reduce_add(sum) / count;
    const float variance = reduce_add(squares) / count - row.delta * row.delta;
    return variance < 0.f ? 0.f : variance;
  }

  const NormForward& p_;
  const float *const weight_, *const bias_;
  float* const factors_;
  const int64_t rows_per_task_;
  const bool streaming_;
};

// Enough rows to be worth a task, few enough that there is work for many threads.
FASTATTN_INLINE int64_t norm_rows_per_task(const NormForward& p) {
  const int64_t columns = max_of(p.columns, 1);
  return round_up(max_of(24576 / columns, min_of(131072 / columns, p.rows / 64)) + 1, kBlockRows);
}
int64_t norm_forward_tasks(const NormForward& p) { return ceil_div(p.rows, norm_rows_per_task(p)); }
int64_t norm_forward_scratch(const NormForward& p) {
  return (2 * round_up(p.columns, kPair) + kFactors) * static_cast<int64_t>(sizeof(float));
}

template <class T, class I, bool Centred, bool Added>
void norm_forward_rows(const NormForward& p, TaskQueue& queue, char* scratch) {
  float* const space = reinterpret_cast<float*>(scratch);
  const int64_t step = round_up(p.columns, kPair);
  const float* const weight = affine<T>(p.weight, p.affine_dtype, p.weight_offset, 1.f, space, p.columns);
  const float* const bias = Centred ? affine<T>(p.bias, p.affine_dtype, 0.f, 0.f, space + step, p.columns) : weight;
  NormForwardRows<T, I, Centred, Added> rows(p, weight, bias, space + 2 * step, norm_rows_per_task(p));
  Walk walk(rows, p.rows, p.columns, static_cast<int64_t>(sizeof(T)));
  walk.run(queue);
  finish_streams();
}
template <class T, bool Centred>
void norm_forward_of(const NormForward& p, TaskQueue& queue, char* scratch) {
  if (p.residual == nullptr) return norm_forward_rows<T, T, Centred, false>(p, queue, scratch);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.input_dtype == DType::bf16) return norm_forward_rows<T, bf16, Centred, true>(p, queue, scratch);
    if (p.input_dtype == DType::f16) return norm_forward_rows<T, f16, Centred, true>(p, queue, scratch);
  }
  norm_forward_rows<T, T, Centred, true>(p, queue, scratch);
}
template <bool Centred>
void norm_forward(const NormForward& p, TaskQueue& queue, char* scratch) {
  switch (p.dtype) {
    case DType::bf16:
      return norm_forward_of<bf16, Centred>(p, queue, scratch);
    case DType::f16:
      return norm_forward_of<f16, Centred>(p, queue, scratch);
    default:
      return norm_forward_of<float, Centred>(p, queue, scratch);
  }
}
void run_norm_forward(const NormForward& p, TaskQueue& queue, char* scratch) {
  return p.centred ? norm_forward<true>(p, queue, scratch) : norm_forward<false>(p, queue, scratch);
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
