// Rows of softmax with a scale, a mask or a causal limit. Scores scale * x + mask go to scratch memory in fp32, then as
// without: maximum, exponentials and their sum, result. What lies beyond a causal row's limit is neither read nor
// computed. A row that sees nothing is 0 (log_softmax: -inf), and so is its gradient.
#pragma once
#include "../cpu/logsumexp.h"
#include "params.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Columns that a row sees, from the front.
FASTATTN_INLINE int64_t softmax_visible(SoftmaxCausal causal, int64_t row, int64_t rows, int64_t columns) {
  if (causal == SoftmaxCausal::none) return columns;
  const int64_t last = row % rows + (causal == SoftmaxCausal::bottom_right ? columns - rows : 0);
  return last < 0 ? 0 : min_of(last + 1, columns);
}

FASTATTN_INLINE int64_t softmax_mask_offset(const SoftmaxMask& mask, int64_t row) {
  int64_t offset = 0;
  for (int32_t dim = mask.dims - 1; dim >= 0; dim--) {
    offset += row % mask.sizes[dim] * mask.strides[dim];
    row /= mask.sizes[dim];
  }
  return offset;
}

FASTATTN_INLINE F32x2 get_masked(F32x2 x, const uint8_t* mask, Whole) {
  return {select(load_bool(mask), x.a, splat(-kInf)), select(load_bool(mask + kLanes), x.b, splat(-kInf))};
}
FASTATTN_INLINE F32x2 get_masked(F32x2 x, const uint8_t* mask, Part part) {
  return {select(load_bool_first(mask, part.low()), x.a, splat(-kInf)),
          select(load_bool_first(mask + kLanes, part.high()), x.b, splat(-kInf))};
}

// The first element, widened.
template <class T>
FASTATTN_INLINE float only_element(const T* p) {
  alignas(64) float lanes_of[kLanes];
  store(lanes_of, load_first(p, 1));
  return lanes_of[0];
}

// scores = scale * x + mask in their natural order; returns the largest.
template <class In>
float softmax_scores(const In* x, float* scores, int64_t columns, float scale, const SoftmaxMask& mask,
                     int64_t offset) {
  const uint8_t* visible = nullptr;
  const float* wide = nullptr;
  const In* same = nullptr;
  float level = 0.f;  // of a mask that repeats along the row
  if (mask.data != nullptr) {
    if (mask.dtype == DType::boolean) {
      visible = static_cast<const uint8_t*>(mask.data) + offset;
      if (mask.column_stride == 0) visible = nullptr;  // of a row that is seen
    } else if (mask.dtype == DType::f32) {
      wide = static_cast<const float*>(mask.data) + offset;
      if (mask.column_stride == 0) level = *wide, wide = nullptr;
    } else {
      same = static_cast<const In*>(mask.data) + offset;
      if (mask.column_stride == 0) level = only_element(same), same = nullptr;
    }
  }
  const F32x2 factor = splat2(scale), base = splat2(level);
  F32x2 tops[2] = {splat2(-kInf), splat2(-kInf)};
  for_columns<2>(columns, [&](int64_t c, int i, auto where) FASTATTN_LAMBDA {
    F32x2 z = fma(get(x + c, Natural{}, where), factor, base);
    if (visible != nullptr) z = get_masked(z, visible + c, where);
    if (wide != nullptr) z = z + get(wide + c, Natural{}, where);
    if (same != nullptr) z = z + get(same + c, Natural{}, where);
    tops[i] = max(tops[i], keep(z, splat(-kInf), where));
    put(scores + c, z, Natural{}, where);
  });
  return reduce_max(max(tops[0], tops[1]));
}

template <class Out>
void softmax_fill(Out* y, int64_t columns, float value) {
  for_columns<1>(columns,
                 [&](int64_t c, int, auto where) FASTATTN_LAMBDA { put(y + c, splat2(value), Natural{}, where); });
}

bool any_nan(const float* x, int64_t count) {
  bool found = false;
  for_columns<1>(count, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
    const F32x2 z = keep(get(x + c, Natural{}, where), zero(), where);
    found = found || !all(z.a == z.a) || !all(z.b == z.b);
  });
  return found;
}

template <class In, class Out, bool Log>
void softmax_masked_row(const SoftmaxForward& p, const In* x, Out* y, int64_t row, float* scores) {
  constexpr const Out* kind = nullptr;
  constexpr float kDead = Log ? -kInf : 0.f;
  const bool masks = p.mask.data != nullptr || p.causal != SoftmaxCausal::none;
  int64_t columns = softmax_visible(p.causal, row, p.rows_per_matrix, p.columns);
  const int64_t offset = p.mask.data != nullptr ? softmax_mask_offset(p.mask, row) : 0;
  const bool repeats = p.mask.data != nullptr && p.mask.dtype == DType::boolean && p.mask.column_stride == 0;
  if (repeats && static_cast<const uint8_t*>(p.mask.data)[offset] == 0) columns = 0;
  if (columns == 0) return softmax_fill(y, p.columns, kDead);
  const float highest = softmax_scores(x, scores, columns, p.scale, p.mask, offset);
  if (masks && !(highest > -kInf)) {
    softmax_fill(y, p.columns, kDead);
    // The maximum does not tell whether there were NaNs.
    if (any_nan(scores, columns)) softmax_fill(y, columns, __builtin_nanf(""));
    return;
  }
  const F32x2 top = splat2(highest);
  F32x2 sums[2] = {splat2(0.f), splat2(0.f)};
  for_columns<2>(columns, [&](int64_t c, int i, auto where) FASTATTN_LAMBDA {
    const F32x2 e = exp_for(kind, get(scores + c, Natural{}, where) - top);
    sums[i] = sums[i] + keep(e, zero(), where);
    if constexpr (!Log) put(scores + c, e, Natural{}, where);
  });
  const float sum = reduce_add(sums[0] + sums[1]);
  if constexpr (Log) {
    const F32x2 log_sum = splat2(__builtin_logf(sum));
    for_columns<2>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
      put(y + c, (get(scores + c, Natural{}, where) - top) - log_sum, Natural{}, where);
    });
  } else {
    const Reciprocal r = reciprocal(sum);
    const F32x2 hi = splat2(r.hi), lo = splat2(r.lo);
    for_columns<2>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
      const F32x2 e = get(scores + c, Natural{}, where);
      put(y + c, fma(e, hi, e * lo), Natural{}, where);
    });
  }
  softmax_fill(y + columns, p.columns - columns, kDead);
}

// softmax: scale * y * (g - sum(g y)). log_softmax: scale * (g - exp(y) * sum(g)), 0 where y is a masked input's -inf.
template <class G, class In, bool Log>
void softmax_masked_backward_row(const SoftmaxBackward& p, const G* dy, const G* y, In* dx, int64_t row) {
  constexpr const In* kind = nullptr;
  const int64_t columns = softmax_visible(p.causal, row, p.rows_per_matrix, p.columns);
  F32x2 sums[2] = {splat2(0.f), splat2(0.f)};
  for_columns<2>(Log ? p.columns : columns, [&](int64_t c, int i, auto where) FASTATTN_LAMBDA {
    const F32x2 g = get(dy + c, Natural{}, where);
    sums[i] = Log ? sums[i] + g : fma(g, get(y + c, Natural{}, where), sums[i]);
  });
  const F32x2 sum = splat2(reduce_add(sums[0] + sums[1])), factor = splat2(p.scale);
  for_columns<2>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
    const F32x2 g = get(dy + c, Natural{}, where), out = get(y + c, Natural{}, where);
    F32x2 d;
    if constexpr (Log) {
      d = g - exp_for(kind, out) * sum;
      if (p.masked) d = select(out == splat2(-kInf), splat2(0.f), d);
    } else {
      d = out * (g - sum);
    }
    put(dx + c, d * factor, Natural{}, where);
  });
  softmax_fill(dx + columns, p.columns - columns, 0.f);
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
