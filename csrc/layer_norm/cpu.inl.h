// LayerNorm and RMSNorm, forward and backward, fp32 inside.
//
// Forward, row by row, two sweeps after the first over a row that is then in cache: mean, centred sum of squares,
// output. The second sweep also sums what is left of the mean's rounding error, so that a large offset costs nothing:
//   d_c = x_c - m,  delta = sum(d) / C,  variance = sum(d^2) / C - delta^2,  y_c = (d_c - delta) * rstd * w_c + b_c.
// Backward (g = grad_output * weight, n = (x - mean) * rstd):
//   grad_input = rstd * (g - mean_c(g) - n * mean_c(g * n)),  grad_weight = sum_rows(grad_output * n),  grad_bias =
//   sum_rows(grad_output),
// RMSNorm without the mean_c(g) term and with mean = 0.
#pragma once
#include "../cpu/row.h"
#include "params.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Short rows are taken four at a time, which hides the latency of their reductions and shares the loads of weight and
// bias. A row's result is the same either way: the number of accumulators depends on its length only.
constexpr int64_t kShortRowBytes = 2048;
constexpr int kRowsTogether = kLanes >= 8 ? 4 : 1;

FASTATTN_INLINE int64_t norm_rows_per_task(int64_t columns) {
  return round_up(max_of(24576 / max_of(columns, 1), 1), 4);
}

// weight or bias as floats in the order of Cheapest loads of a T: itself if it is that already, else a copy.
template <class T, class A>
FASTATTN_INLINE void copy_affine(const A* from, float* to, int64_t columns) {
  for_columns<1>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
    put(to + c, to_cheapest(static_cast<const T*>(nullptr), get(from + c, Natural{}, where), where), Natural{}, where);
  });
}
template <class T>
const float* affine(const void* from, DType dtype, float absent, float* to, int64_t columns) {
  if (from == nullptr) {
    for_columns<1>(columns,
                   [&](int64_t c, int, auto where) FASTATTN_LAMBDA { put(to + c, splat2(absent), Natural{}, where); });
  } else if (dtype != DType::f32) {
    copy_affine<T>(static_cast<const T*>(from), to, columns);
  } else if (!kOwnOrder<T>) {
    return static_cast<const float*>(from);
  } else {
    copy_affine<T>(static_cast<const float*>(from), to, columns);
  }
  return to;
}

template <int Unroll>
FASTATTN_INLINE float total(const F32x2 (&sums)[Unroll]) {
  F32x2 sum = sums[0];
  FASTATTN_UNROLL for (int i = 1; i < Unroll; i++) sum = sum + sums[i];
  return reduce_add(sum);
}

// input + residual of one row, rounded; the row to go on with.
template <class T>
const T* add_residual(const NormForward& p, int64_t row) {
  const T* const x = static_cast<const T*>(p.input) + row * p.input_stride;
  const T* const residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
  T* const sum = static_cast<T*>(p.sum) + row * p.columns;
  for_columns<2>(p.columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
    put(sum + c, get(x + c, Cheapest{}, where) + get(residual + c, Cheapest{}, where), Cheapest{}, where);
  });
  return sum;
}

template <class T, bool Centred, int Rows, int Unroll>
void norm_forward_rows(const NormForward& p, int64_t row, const float* weight, const float* bias) {
  const int64_t columns = p.columns;
  const float count = static_cast<float>(columns);
  const T* x[Rows];
  T* y[Rows];
  FASTATTN_UNROLL for (int r = 0; r < Rows; r++) {
    x[r] = static_cast<const T*>(p.input) + (row + r) * p.input_stride;
    y[r] = static_cast<T*>(p.output) + (row + r) * columns;
  }
  const T* ahead[Rows];  // rows to come, fetched while these are computed
  FASTATTN_UNROLL for (int r = 0; r < Rows; r++) ahead[r] = x[r] + Rows * p.input_stride;

  if (p.residual != nullptr) {
    FASTATTN_UNROLL for (int r = 0; r < Rows; r++) x[r] = add_residual<T>(p, row + r);
  }

  F32x2 mean[Rows], squares[Rows][Unroll];
  FASTATTN_UNROLL for (int r = 0; r < Rows; r++) FASTATTN_UNROLL for (int i = 0; i < Unroll; i++) squares[r][i] =
      splat2(0.f);
  float variance[Rows], shift[Rows];
  if constexpr (Centred) {
    F32x2 sums[Rows][Unroll], left[Rows][Unroll];
    FASTATTN_UNROLL for (int r = 0; r < Rows; r++) FASTATTN_UNROLL for (int i = 0; i < Unroll; i++) sums[r][i] =
        left[r][i] = splat2(0.f);
    for_columns<Unroll>(columns, [&](int64_t c, int i, auto where) FASTATTN_LAMBDA {
      FASTATTN_UNROLL for (int r = 0; r < Rows; r++) sums[r][i] = sums[r][i] + get(x[r] + c, Cheapest{}, where);
    });
    float rough[Rows];
    FASTATTN_UNROLL for (int r = 0; r < Rows; r++) {
      rough[r] = total(sums[r]) / count;
      mean[r] = splat2(rough[r]);
    }
    for_columns<Unroll>(columns, [&](int64_t c, int i, auto where) FASTATTN_LAMBDA {
      FASTATTN_UNROLL for (int r = 0; r < Rows; r++) {
        const F32x2 d = keep(get(x[r] + c, Cheapest{}, where) - mean[r], zero(), where);
        left[r][i] = left[r][i] + d;
        squares[r][i] = fma(d, d, squares[r][i]);
        prefetch_pair(ahead[r] + c);
      }
    });
    FASTATTN_UNROLL for (int r = 0; r < Rows; r++) {
      const float delta = total(left[r]) / count;
      const float v = total(squares[r]) / count - delta * delta;
      variance[r] = v < 0.f ? 0.f : v;
      shift[r] = -delta;
      p.mean[row + r] = rough[r] + delta;
    }
  } else {
    for_columns<Unroll>(columns, [&](int64_t c, int i, auto where) FASTATTN_LAMBDA {
      FASTATTN_UNROLL for (int r = 0; r < Rows; r++) {
        const F32x2 d = get(x[r] + c, Cheapest{}, where);
        squares[r][i] = fma(d, d, squares[r][i]);
      }
    });
    FASTATTN_UNROLL for (int r = 0; r < Rows; r++) variance[r] = total(squares[r]) / count;
  }

  F32x2 scale[Rows], offset[Rows];
  FASTATTN_UNROLL for (int r = 0; r < Rows; r++) {
    const float rstd = 1.f / __builtin_sqrtf(variance[r] + p.eps);
    p.rstd[row + r] = rstd;
    scale[r] = splat2(rstd);
    if constexpr (Centred) offset[r] = splat2(shift[r] * rstd);
  }
  for_columns<Rows == 1 ? 2 : 1>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
    const F32x2 w = get(weight + c, Natural{}, where);
    if constexpr (Centred) {
      const F32x2 b = get(bias + c, Natural{}, where);
      FASTATTN_UNROLL for (int r = 0; r < Rows; r++) {
        const F32x2 d = get(x[r] + c, Cheapest{}, where) - mean[r];
        put(y[r] + c, fma(fma(d, scale[r], offset[r]), w, b), Cheapest{}, where);
      }
    } else {
      FASTATTN_UNROLL for (int r = 0; r < Rows; r++) {
        put(y[r] + c, get(x[r] + c, Cheapest{}, where) * scale[r] * w, Cheapest{}, where);
        prefetch_pair(ahead[r] + c);
      }
    }
  });
}

template <class T, bool Centred>
void norm_forward(const NormForward& p, TaskQueue& queue, char* scratch) {
  float* const space = reinterpret_cast<float*>(scratch);
  const float* const weight = affine<T>(p.weight, p.affine_dtype, 1.f, space, p.columns);
  const float* const bias =
      Centred ? affine<T>(p.bias, p.affine_dtype, 0.f, space + round_up(p.columns, kPair), p.columns) : nullptr;
  const int64_t rows_per_task = norm_rows_per_task(p.columns);
  for (int64_t task; (task = take_task(queue)) < queue.total;) {
    int64_t row = task * rows_per_task;
    const int64_t end = min_of(row + rows_per_task, p.rows);
    if (p.columns * static_cast<int64_t>(sizeof(T)) <= kShortRowBytes) {
      for (; row + kRowsTogether <= end; row += kRowsTogether)
        norm_forward_rows<T, Centred, kRowsTogether, 1>(p, row, weight, bias);
      for (; row < end; row++) norm_forward_rows<T, Centred, 1, 1>(p, row, weight, bias);
    } else {
      for (; row < end; row++) norm_forward_rows<T, Centred, 1, 2>(p, row, weight, bias);
    }
  }
}

void run_norm_forward(const NormForward& p, TaskQueue& queue, char* scratch) {
  switch (p.dtype) {
    case DType::bf16:
      return p.centred ? norm_forward<bf16, true>(p, queue, scratch) : norm_forward<bf16, false>(p, queue, scratch);
    case DType::f16:
      return p.centred ? norm_forward<f16, true>(p, queue, scratch) : norm_forward<f16, false>(p, queue, scratch);
    default:
      return p.centred ? norm_forward<float, true>(p, queue, scratch) : norm_forward<float, false>(p, queue, scratch);
  }
}

int64_t norm_forward_tasks(const NormForward& p) { return ceil_div(p.rows, norm_rows_per_task(p.columns)); }
int64_t norm_forward_scratch(const NormForward& p) {
  return 2 * round_up(p.columns, kPair) * static_cast<int64_t>(sizeof(float));
}

// `weight_sums` and `bias_sums` (not with RMSNorm) are this chunk's, in the order of Cheapest loads.
template <class T, bool Centred, int Rows, int Unroll>
void norm_backward_rows(const NormBackward& p, int64_t row, const float* weight, float* weight_sums, float* bias_sums) {
  const int64_t columns = p.columns;
  const float count = static_cast<float>(columns);
  const T *x[Rows], *dy[Rows], *ds[Rows];
  T* dx[Rows];
  F32x2 mean[Rows], rstd[Rows];
  FASTATTN_UNROLL for (int r = 0; r < Rows; r++) {
    x[r] = static_cast<const T*>(p.input) + (row + r) * p.input_stride;
    dy[r] = static_cast<const T*>(p.grad_output) + (row + r) * p.grad_output_stride;
    ds[r] = p.grad_sum == nullptr ? nullptr : static_cast<const T*>(p.grad_sum) + (row + r) * p.grad_sum_stride;
    dx[r] = static_cast<T*>(p.grad_input) + (row + r) * columns;
    if constexpr (Centred) mean[r] = splat2(p.mean[row + r]);
    // A centred row of one column is constant: its gradient is 0, not what rounding leaves of a difference over eps.
    rstd[r] = splat2(Centred && columns == 1 ? 0.f : p.rstd[row + r]);
  }

  F32x2 sums[Rows][Unroll], products[Rows][Unroll];
  FASTATTN_UNROLL for (int r = 0; r < Rows; r++) FASTATTN_UNROLL for (int i = 0; i < Unroll; i++) sums[r][i] =
      products[r][i] = splat2(0.f);
  for_columns<Unroll>(columns, [&](int64_t c, int i, auto where) FASTATTN_LAMBDA {
    const F32x2 w = get(weight + c, Natural{}, where);
    FASTATTN_UNROLL for (int r = 0; r < Rows; r++) {
      const F32x2 g = get(dy[r] + c, Cheapest{}, where) * w;
      F32x2 d = get(x[r] + c, Cheapest{}, where);
      if constexpr (Centred) {
        sums[r][i] = sums[r][i] + g;
        d = d - mean[r];
      }
      products[r][i] = fma(g, d, products[r][i]);
    }
  });

  // grad_input = rstd * g + d * slope + level
  F32x2 slope[Rows], level[Rows];
  FASTATTN_UNROLL for (int r = 0; r < Rows; r++) {
    const float s = Centred && columns == 1 ? 0.f : p.rstd[row + r];
    slope[r] = splat2(-(total(products[r]) * s / count) * s * s);
    level[r] = splat2(Centred ? -(total(sums[r]) / count) * s : 0.f);
  }
  for_columns<1>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
    const F32x2 w = get(weight + c, Natural{}, where);
    F32x2 dw = get(weight_sums + c, Natural{}, where);
    F32x2 db = Centred ? get(bias_sums + c, Natural{}, where) : splat2(0.f);
    FASTATTN_UNROLL for (int r = 0; r < Rows; r++) {
      const F32x2 g = get(dy[r] + c, Cheapest{}, where);
      const F32x2 scaled = g * rstd[r];
      F32x2 d = get(x[r] + c, Cheapest{}, where);
      if constexpr (Centred) {
        d = d - mean[r];
        db = db + g;
      }
      dw = fma(scaled, d, dw);
      F32x2 out = fma(scaled, w, fma(d, slope[r], level[r]));
      if (ds[r] != nullptr) out = out + get(ds[r] + c, Cheapest{}, where);
      put(dx[r] + c, out, Cheapest{}, where);
    }
    put(weight_sums + c, dw, Natural{}, where);
    if constexpr (Centred) put(bias_sums + c, db, Natural{}, where);
  });
}

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

template <class T, bool Centred>
void norm_backward(const NormBackward& p, TaskQueue& queue, char* scratch) {
  const int64_t columns = p.columns;
  const int64_t stride = (Centred ? 2 : 1) * columns;
  float* const space = reinterpret_cast<float*>(scratch);
  const float* const weight = affine<T>(p.weight, p.affine_dtype, 1.f, space, columns);
  // Four rows share the loads of the sums, as long as all of them stay in cache between the two sweeps.
  const bool together = columns * static_cast<int64_t>(sizeof(T)) <= 32768;
  for (int64_t task; (task = take_task(queue)) < queue.total;) {
    float* const sums = p.partials != nullptr ? p.partials + task * stride : space + round_up(columns, kPair);
    memset(sums, 0, static_cast<size_t>(stride) * sizeof(float));
    int64_t row = task * p.chunk_rows;
    const int64_t end = min_of(row + p.chunk_rows, p.rows);
    if (together) {
      for (; row + kRowsTogether <= end; row += kRowsTogether)
        norm_backward_rows<T, Centred, kRowsTogether, 1>(p, row, weight, sums, sums + columns);
    }
    for (; row < end; row++) norm_backward_rows<T, Centred, 1, 1>(p, row, weight, sums, sums + columns);
    if (finish_task(queue)) {
      combine<T>(p, 0, stride, p.grad_weight);
      if constexpr (Centred) combine<T>(p, 1, stride, p.grad_bias);
    }
  }
}

void run_norm_backward(const NormBackward& p, TaskQueue& queue, char* scratch) {
  switch (p.dtype) {
    case DType::bf16:
      return p.centred ? norm_backward<bf16, true>(p, queue, scratch) : norm_backward<bf16, false>(p, queue, scratch);
    case DType::f16:
      return p.centred ? norm_backward<f16, true>(p, queue, scratch) : norm_backward<f16, false>(p, queue, scratch);
    default:
      return p.centred ? norm_backward<float, true>(p, queue, scratch) : norm_backward<float, false>(p, queue, scratch);
  }
}

int64_t norm_backward_tasks(const NormBackward& p) { return max_of(ceil_div(p.rows, p.chunk_rows), 1); }
int64_t norm_backward_scratch(const NormBackward& p) {
  return 3 * round_up(p.columns, kPair) * static_cast<int64_t>(sizeof(float));
}

constexpr NormKernels kNormKernels{{norm_forward_tasks, norm_forward_scratch, run_norm_forward},
                                   {norm_backward_tasks, norm_backward_scratch, run_norm_backward}};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
