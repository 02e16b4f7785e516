// Cross entropy, forward and backward, fp32 inside. With coefficients
//   a_c = weight_c * ((1 - smoothing) * t_c + smoothing / C),  t the class probabilities or the one-hot of the target,
// a row's loss is sum_c(a_c * (lse - x_c)) and its gradient softmax(x)_c * sum(a) - a_c. A class with a_c = 0 adds
// nothing, however impossible it is. lse - x_c is taken as log(sum) - (x_c - max), so that a large offset costs
// nothing. With z_loss (PaLM, Chowdhery et al. 2022, section 5) z lse^2 is added, whose gradient is 2 z lse softmax(x).
// Capped logits go through fp32 scratch rows: X is the type of the logits that are read, T that of the tensors.
#pragma once
#include "../cpu/logsumexp.h"
#include "../cpu/pipeline.h"
#include "../cpu/streaming.h"
#include "params.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kCrossEntropyTaskElements = 16384;

FASTATTN_INLINE int64_t cross_entropy_rows_per_task(int64_t columns) {
  return max_of(kCrossEntropyTaskElements / max_of(columns, 1), 1);
}

template <class T>
FASTATTN_INLINE float element(const T* p) {
  alignas(64) float lanes_of[kLanes];
  store(lanes_of, load_first(p, 1));
  return lanes_of[0];
}

// e^(x - lse) of one element
template <class T>
FASTATTN_INLINE float element_exp(const T* p, float lse) {
  alignas(64) float lanes_of[kLanes];
  store(lanes_of, exp(load_first(p, 1) - splat(lse)));
  return lanes_of[0];
}

// ---- forward ----

// sum_c(a_c * -logp_c) over all columns, with a_c = weight_c * (share * t_c + spread); t = nullptr: 0.
template <class T, class Target>
float soft_loss(const T* x, int64_t columns, const Target* t, const float* weight, float share, float spread,
                Exponentials e) {
  const F32x2 top = splat2(e.max), log_sum = splat2(__builtin_logf(e.sum));
  constexpr int64_t kChunk = 4096;
  double loss = 0.0;  // of chunks: short sums round less
  for (int64_t begin = 0; begin < columns; begin += kChunk) {
    F32x2 sums[2] = {splat2(0.f), splat2(0.f)};
    for_columns<2>(min_of(kChunk, columns - begin), [&](int64_t offset, int i, auto where) FASTATTN_LAMBDA {
      const int64_t c = begin + offset;
      F32x2 a = splat2(spread);
      if (t != nullptr) a = fma(splat2(share), get(t + c, Natural{}, where), a);
      if (weight != nullptr) a = a * get(weight + c, Natural{}, where);
      const F32x2 term = a * (log_sum - (get(x + c, Natural{}, where) - top));
      sums[i] = sums[i] + keep(select(a == splat2(0.f), splat2(0.f), term), zero(), where);
    });
    loss += static_cast<double>(reduce_add(sums[0] + sums[1]));
  }
  return static_cast<float>(loss);
}

// softcap * tanh(x / softcap)
template <class T>
void cap_logits(const T* x, float* capped, int64_t columns, float softcap) {
  const F32x2 inverse = splat2(1.f / softcap), cap = splat2(softcap);
  for_columns<2>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
    const F32x2 t = get(x + c, Natural{}, where) * inverse;
    put(capped + c, cap * F32x2{tanh(t.a), tanh(t.b)}, Natural{}, where);
  });
}

template <class X, class T>
void cross_entropy_forward_row(const CrossEntropyForward& p, int64_t row, const X* x, Exponentials e) {
  const float log_sum = __builtin_logf(e.sum);
  p.lse[row] = e.max + log_sum;
  const float spread = p.columns > 0 ? p.label_smoothing / static_cast<float>(p.columns) : 0.f;
  const float share = 1.f - p.label_smoothing;
  float loss = 0.f;
  if (p.probabilities != nullptr) {
    if (p.probabilities_dtype == DType::f32) {
      const float* t = static_cast<const float*>(p.probabilities) + row * p.probabilities_stride;
      loss = soft_loss(x, p.columns, t, p.weight, share, spread, e);
    } else {
      const T* t = static_cast<const T*>(p.probabilities) + row * p.probabilities_stride;
      loss = soft_loss(x, p.columns, t, p.weight, share, spread, e);
    }
  } else if (p.target[row] != p.ignore_index) {
    const int64_t target = p.target[row];
    const float a = share * (p.weight != nullptr ? p.weight[target] : 1.f);
    if (a != 0.f) loss = a * (log_sum - (element(x + target) - e.max));
    if (spread != 0.f) loss += soft_loss<X, X>(x, p.columns, nullptr, p.weight, 0.f, spread, e);
  }
  const bool counts = p.probabilities != nullptr || p.target[row] != p.ignore_index;
  if (p.z_loss != 0.f && counts) loss += p.z_loss * p.lse[row] * p.lse[row];
  p.row_loss[row] = loss;
}

// Losses in doubles, row by row: the same whoever computed them.
void cross_entropy_reduce(const CrossEntropyForward& p) {
  double loss = 0.0, total = 0.0;
  for (int64_t row = 0; row < p.rows; row++) {
    loss += static_cast<double>(p.row_loss[row]);
    if (p.probabilities != nullptr)
      total += 1.0;
    else if (p.target[row] != p.ignore_index)
      total += p.weight != nullptr ? static_cast<double>(p.weight[p.target[row]]) : 1.0;
  }
  *p.total = static_cast<float>(total);
  if (p.reduction == Reduction::mean) *p.loss = static_cast<float>(loss / total);
  if (p.reduction == Reduction::sum) *p.loss = static_cast<float>(loss);
}

// In two stages: the maximum of a row is found, its exponentials are summed up.
template <class T>
class CrossEntropyRows {
 public:
  struct Row {
    int64_t index;
    F32x2 tops, sums;
    float top;
  };

  CrossEntropyRows(const CrossEntropyForward& p, TaskQueue& queue) : p_(p), queue_(queue) {}

  void run() {
    constexpr int64_t kLag = 1;  // rows are long
    Stages<2, CrossEntropyRows>(*this).run(RowsOfTasks(queue_, p_.rows, rows_per_task_), kLag);
  }

  FASTATTN_INLINE void enter(int, Row& row) const { row.top = reduce_max(row.tops); }
  void leave(const Row& row) const {
    cross_entropy_forward_row<T, T>(p_, row.index, input(row), {row.top, reduce_add(row.sums)});
    const int64_t done = row.index + 1;
    if ((done % rows_per_task_ == 0 || done == p_.rows) && finish_task(queue_)) cross_entropy_reduce(p_);
  }

  template <int Live>
  __attribute__((noinline)) void sweep(Row* const (&rows)[2]) const {
    constexpr bool Read = Live & 1, Compute = Live & 2;
    Row &reading = *rows[0], &computing = *rows[1];
    const T *const x = Read ? input(reading) : nullptr, *const found = Compute ? input(computing) : nullptr;
    const F32x2 top = splat2(computing.top);
    F32x2 tops[2] = {splat2(kLowest), splat2(kLowest)}, total = splat2(0.f);
    for (int64_t begin = 0; begin < p_.columns; begin += kChunk) {
      F32x2 sums[2] = {splat2(0.f), splat2(0.f)};
      for_columns<2>(min_of(kChunk, p_.columns - begin), [&](int64_t offset, int i, auto where) FASTATTN_LAMBDA {
        const int64_t c = begin + offset;
        if constexpr (Read) {
          prefetch_pair(x + c + kAhead);
          tops[i] = max(tops[i], keep(get(x + c, Cheapest{}, where), splat(kLowest), where));
        }
        if constexpr (Compute) {
          const F32x2 e = exp(get(found + c, Cheapest{}, where) - top);
          sums[i] = sums[i] + keep(e, zero(), where);
        }
      });
      total = total + (sums[0] + sums[1]);
    }
    if constexpr (Read) reading.tops = max(tops[0], tops[1]);
    if constexpr (Compute) computing.sums = total;
  }

 private:
  static constexpr int64_t kChunk = 4096;  // columns whose exponentials are summed up together: rounds less
  static constexpr int64_t kAhead = kAheadBytes / sizeof(T);

  const T* input(const Row& row) const { return static_cast<const T*>(p_.input) + row.index * p_.input_stride; }

  const CrossEntropyForward& p_;
  TaskQueue& queue_;
  const int64_t rows_per_task_ = cross_entropy_rows_per_task(p_.columns);
};

template <class T>
void cross_entropy_forward(const CrossEntropyForward& p, TaskQueue& queue, char* scratch) {
  if (p.softcap == 0.f && p.rows > 0) return CrossEntropyRows<T>(p, queue).run();
  float* const capped = reinterpret_cast<float*>(scratch);
  const int64_t rows_per_task = cross_entropy_rows_per_task(p.columns);
  for (int64_t task; (task = take_task(queue)) < queue.total;) {
    const int64_t end = min_of((task + 1) * rows_per_task, p.rows);
    for (int64_t row = task * rows_per_task; row < end; row++) {
      cap_logits(static_cast<const T*>(p.input) + row * p.input_stride, capped, p.columns, p.softcap);
      const Exponentials e = sum_exponentials(static_cast<const float*>(nullptr), capped, p.columns, capped);
      cross_entropy_forward_row<float, T>(p, row, capped, e);
    }
    if (finish_task(queue)) cross_entropy_reduce(p);
  }
}

void run_cross_entropy_forward(const CrossEntropyForward& p, TaskQueue& queue, char* scratch) {
  switch (p.dtype) {
    case DType::bf16:
      return cross_entropy_forward<bf16>(p, queue, scratch);
    case DType::f16:
      return cross_entropy_forward<f16>(p, queue, scratch);
    default:
      return cross_entropy_forward<float>(p, queue, scratch);
  }
}

// ---- backward ----

// The rounding of lse is an error of the whole row's softmax, the largest of all where lse is not small. So the
// exponentials are summed up once more: of an fp32 row always, of a 16-bit row, whose result is rounded far more
// coarsely, where lse is huge.
constexpr float kTrustedLse = 1024.f;
template <class T>
constexpr bool kSumAgain = sizeof(T) == sizeof(float);

// 1 / sum(exp(x - lse)), which is 1 but for rounding. The exponentials of an fp32 row are left in dx.
template <class T>
float normalizer(const T* x, T* dx, int64_t columns, float lse) {
  if (!kSumAgain<T> && !(__builtin_fabsf(lse) > kTrustedLse)) return 1.f;
  const F32x2 shift = splat2(lse);
  F32x2 sums[2] = {splat2(0.f), splat2(0.f)};
  for_columns<2>(columns, [&](int64_t c, int i, auto where) FASTATTN_LAMBDA {
    const F32x2 p = exp(get(x + c, Cheapest{}, where) - shift);
    if constexpr (kSumAgain<T>) put(dx + c, p, Cheapest{}, where);
    sums[i] = sums[i] + keep(p, zero(), where);
  });
  return 1.f / reduce_add(sums[0] + sums[1]);
}
template <class T, class Where>
FASTATTN_INLINE F32x2 exponential(const T* x, const T* dx, F32x2 lse, Where where) {
  if constexpr (kSumAgain<T>)
    return get(dx, Natural{}, where);
  else
    return exp_for(x, get(x, Natural{}, where) - lse);
}

// softmax * scale; returns the target's, unrounded. An fp32 row is written before its sum is known, and once more only
// if the sum is so far off that it shows: the error (1 - sum) * |softmax| is held against one rounding of the
// gradient's norm, |softmax - one_hot|.
template <bool Streaming, class T>
float hard_gradient(const T* x, T* dx, int64_t columns, int64_t target, float lse, float scale) {
  constexpr int64_t kAhead = kAheadBytes / sizeof(T);
  const float own = element_exp(x + target, lse);  // before dx is written, which may be x
  const F32x2 shift = splat2(lse), all = splat2(scale);
  F32x2 sums[2] = {splat2(0.f), splat2(0.f)}, squares[2] = {splat2(0.f), splat2(0.f)};
  for_columns<2>(columns, [&](int64_t c, int i, auto where) FASTATTN_LAMBDA {
    prefetch_pair(x + c + kAhead);
    const F32x2 p = exp_for(x, get(x + c, Cheapest{}, where) - shift);
    put_result<Streaming>(dx + c, p * all, where);
    if constexpr (kSumAgain<T>) {
      const F32x2 own = keep(p, zero(), where);
      sums[i] = sums[i] + own;
      squares[i] = fma(own, own, squares[i]);
    }
  });
  if constexpr (kSumAgain<T>) {
    const float sum = reduce_add(sums[0] + sums[1]), square = reduce_add(squares[0] + squares[1]);
    const float gradient = square - 2.f * own + 1.f;
    if (!((sum - 1.f) * (sum - 1.f) * square <= 0x1p-48f * gradient)) {
      const F32x2 correction = splat2(1.f / sum);
      for_columns<2>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
        put(dx + c, get(dx + c, Natural{}, where) * correction, Natural{}, where);
      });
      return own * scale * (1.f / sum);
    }
  }
  return own * scale;
}

// softmax * total - weight * spread, where softmax * total = exponential * scale
template <class T>
void smooth_gradient(const T* x, T* dx, int64_t columns, const float* weight, float lse, float scale, float spread) {
  const F32x2 shift = splat2(lse), all = splat2(scale), base = splat2(-spread);
  for_columns<2>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
    const F32x2 share = weight != nullptr ? base * get(weight + c, Natural{}, where) : base;
    put(dx + c, fma(exponential(x + c, dx + c, shift, where), all, share), Natural{}, where);
  });
}

// softmax * (sum(a) + extra) - a, a_c = grad * weight_c * (share * t_c + spread)
template <class T, class Target>
void soft_gradient(const T* x, T* dx, int64_t columns, const Target* t, const float* weight, float lse, float scale,
                   float grad, float share, float spread, float extra) {
  const auto coefficient = [&](int64_t c, auto where) FASTATTN_LAMBDA {
    F32x2 a = fma(splat2(share), get(t + c, Natural{}, where), splat2(spread));
    if (weight != nullptr) a = a * get(weight + c, Natural{}, where);
    return a * splat2(grad);
  };
  F32x2 sums[2] = {splat2(0.f), splat2(0.f)};
  for_columns<2>(columns, [&](int64_t c, int i, auto where)
                              FASTATTN_LAMBDA { sums[i] = sums[i] + keep(coefficient(c, where), zero(), where); });
  const F32x2 shift = splat2(lse), all = splat2((reduce_add(sums[0] + sums[1]) + extra) * scale);
  for_columns<2>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
    const F32x2 p = exponential(x + c, dx + c, shift, where);
    put(dx + c, p * all - coefficient(c, where), Natural{}, where);
  });
}

template <class X, class T, bool Streaming>
void cross_entropy_backward_row(const CrossEntropyBackward& p, int64_t row, float weight_sum, const X* x, X* dx) {
  const float lse = p.lse[row];
  const float grad = p.reduction == Reduction::none   ? p.grad[row]
                     : p.reduction == Reduction::mean ? *p.grad / *p.total
                                                      : *p.grad;
  const float spread = p.label_smoothing / static_cast<float>(p.columns);
  const float share = 1.f - p.label_smoothing;
  const float extra = p.z_loss == 0.f ? 0.f : grad * 2.f * p.z_loss * lse;
  if (p.probabilities != nullptr) {
    const float scale = normalizer(x, dx, p.columns, lse);
    if (p.probabilities_dtype == DType::f32) {
      const float* t = static_cast<const float*>(p.probabilities) + row * p.probabilities_stride;
      soft_gradient(x, dx, p.columns, t, p.weight, lse, scale, grad, share, spread, extra);
    } else {
      const T* t = static_cast<const T*>(p.probabilities) + row * p.probabilities_stride;
      soft_gradient(x, dx, p.columns, t, p.weight, lse, scale, grad, share, spread, extra);
    }
    return;
  }
  const int64_t target = p.target[row];
  if (target == p.ignore_index) {
    memset(dx, 0, static_cast<size_t>(p.columns) * sizeof(X));
    return;
  }
  const float weight = p.weight != nullptr ? p.weight[target] : 1.f;
  // The target's own column, which has a larger coefficient, is written once more.
  const float coefficient = grad * (share * weight + spread * weight);
  float scale = grad * (share * weight + spread * weight_sum) + extra, own;
  if (spread == 0.f) {
    if constexpr (!kSumAgain<X>) scale *= normalizer(x, dx, p.columns, lse);
    own = hard_gradient<Streaming>(x, dx, p.columns, target, lse, scale);
  } else {
    scale *= normalizer(x, dx, p.columns, lse);
    own = element_exp(x + target, lse) * scale;
    smooth_gradient(x, dx, p.columns, p.weight, lse, scale, grad * spread);
  }
  put(dx + target, splat2(own - coefficient), Natural{}, Part{1});
}

// 1 - tanh(x)^2 = 4 e / (1 + e)^2 with e = exp(-2 |x|): it does not cancel
FASTATTN_INLINE F32 tanh_derivative(F32 x) {
  const F32 e = exp(min(x, zero() - x) * splat(2.f)), sum = splat(1.f) + e;
  return splat(4.f) * e / (sum * sum);
}
template <class T>
void uncap_gradient(const float* gradient, const T* x, T* dx, int64_t columns, float softcap) {
  const F32x2 inverse = splat2(1.f / softcap);
  for_columns<2>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
    const F32x2 t = get(x + c, Natural{}, where) * inverse;
    const F32x2 slope = {tanh_derivative(t.a), tanh_derivative(t.b)};
    put(dx + c, get(gradient + c, Natural{}, where) * slope, Natural{}, where);
  });
}

template <class T, bool Streaming>
void cross_entropy_backward(const CrossEntropyBackward& p, TaskQueue& queue, char* scratch) {
  float* const capped = reinterpret_cast<float*>(scratch);
  float* const gradient = capped + round_up(p.columns, kPair);
  double weight_sum = static_cast<double>(p.columns);
  if (p.weight != nullptr && p.label_smoothing != 0.f) {
    weight_sum = 0.0;
    for (int64_t c = 0; c < p.columns; c++) weight_sum += static_cast<double>(p.weight[c]);
  }
  const int64_t rows_per_task = cross_entropy_rows_per_task(p.columns);
  for (int64_t task; (task = take_task(queue)) < queue.total;) {
    const int64_t end = min_of((task + 1) * rows_per_task, p.rows);
    for (int64_t row = task * rows_per_task; row < end; row++) {
      const T* const x = static_cast<const T*>(p.input) + row * p.input_stride;
      T* const dx = static_cast<T*>(p.grad_input) + row * p.columns;
      if (p.softcap == 0.f) {
        cross_entropy_backward_row<T, T, Streaming>(p, row, static_cast<float>(weight_sum), x, dx);
      } else {
        cap_logits(x, capped, p.columns, p.softcap);
        cross_entropy_backward_row<float, T, false>(p, row, static_cast<float>(weight_sum), capped, gradient);
        uncap_gradient(gradient, x, dx, p.columns, p.softcap);
      }
    }
  }
}

template <class T>
void cross_entropy_backward(const CrossEntropyBackward& p, TaskQueue& queue, char* scratch) {
  with_streaming(p.streaming && fit_for_streaming<T>(p.grad_input, p.columns), [&](auto streaming) FASTATTN_LAMBDA {
    cross_entropy_backward<T, decltype(streaming)::value>(p, queue, scratch);
  });
}

void run_cross_entropy_backward(const CrossEntropyBackward& p, TaskQueue& queue, char* scratch) {
  switch (p.dtype) {
    case DType::bf16:
      return cross_entropy_backward<bf16>(p, queue, scratch);
    case DType::f16:
      return cross_entropy_backward<f16>(p, queue, scratch);
    default:
      return cross_entropy_backward<float>(p, queue, scratch);
  }
}

int64_t cross_entropy_forward_tasks(const CrossEntropyForward& p) {
  return max_of(ceil_div(p.rows, cross_entropy_rows_per_task(p.columns)), 1);  // no rows have a loss, too
}
int64_t cross_entropy_forward_scratch(const CrossEntropyForward& p) {
  return p.softcap == 0.f ? 0 : round_up(p.columns, kPair) * static_cast<int64_t>(sizeof(float));
}
int64_t cross_entropy_backward_tasks(const CrossEntropyBackward& p) {
  return p.columns == 0 ? 0 : ceil_div(p.rows, cross_entropy_rows_per_task(p.columns));
}
int64_t cross_entropy_backward_scratch(const CrossEntropyBackward& p) {
  return p.softcap == 0.f ? 0 : 2 * round_up(p.columns, kPair) * static_cast<int64_t>(sizeof(float));
}

constexpr CrossEntropyKernels kCrossEntropyKernels{
    {cross_entropy_forward_tasks, cross_entropy_forward_scratch, run_cross_entropy_forward},
    {cross_entropy_backward_tasks, cross_entropy_backward_scratch, run_cross_entropy_backward}};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
