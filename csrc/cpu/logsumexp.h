// Sums of exponentials along a row, each relative to the row's maximum.
#pragma once
#include "row.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr float kLowest = -__FLT_MAX__;

// log(sum(exp(x))) = max + log(sum); a row of -inf has sum = 0, +inf or NaN make the sum NaN.
struct Exponentials {
  float max;
  float sum;
};

// e^x as good as a result that is rounded to T deserves; 1 at 0.
template <class T>
FASTATTN_INLINE F32x2 exp_for(const T*, F32x2 x) {
  return exp(x);
}
FASTATTN_INLINE F32x2 exp_for(const bf16*, F32x2 x) { return exp2<4>(x * splat2(kLog2e)); }

// One read from memory: chunks that stay in L1 are swept twice, every lane keeps a maximum of its own.
// `ahead` is the row to come, fetched meanwhile; `kind`: of results.
template <class Result, class T>
Exponentials sum_exponentials(const Result* kind, const T* x, int64_t columns, const T* ahead) {
  constexpr int64_t kChunk = 16384 / static_cast<int64_t>(sizeof(T));
  F32x2 max_so_far = splat2(kLowest);
  F32x2 total = splat2(0.f);
  for (int64_t begin = 0; begin < columns; begin += kChunk) {
    const int64_t count = min_of(kChunk, columns - begin);
    F32x2 tops[2] = {max_so_far, max_so_far};
    for_columns<2>(count, [&](int64_t c, int i, auto where) FASTATTN_LAMBDA {
      tops[i] = max(tops[i], keep(get(x + begin + c, Cheapest{}, where), splat(kLowest), where));
    });
    F32x2 top = max(tops[0], tops[1]);
    if (count == columns) top = splat2(reduce_max(top));  // a short row: all lanes together at once
    if (begin > 0) total = total * exp(max_so_far - top);
    max_so_far = top;
    F32x2 sums[2] = {splat2(0.f), splat2(0.f)};  // of this chunk: short sums round less
    for_columns<2>(count, [&](int64_t c, int i, auto where) FASTATTN_LAMBDA {
      sums[i] = sums[i] + keep(exp_for(kind, get(x + begin + c, Cheapest{}, where) - top), zero(), where);
      prefetch_pair(ahead + begin + c);
    });
    total = total + (sums[0] + sums[1]);
  }
  const float top = reduce_max(max_so_far);
  if (columns > kChunk) total = total * exp(max_so_far - splat2(top));
  return {top, reduce_add(total)};
}

// 1 / x in two parts, so that a product with both is as good as a division.
struct Reciprocal {
  float hi, lo;
};
FASTATTN_INLINE Reciprocal reciprocal(float x) {
  const float hi = 1.f / x;
  return {hi, __builtin_fmaf(-x, hi, 1.f) * hi};
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
