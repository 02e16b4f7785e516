// Elementary functions on the vocabulary. Errors are relative, measured over all floats of the stated range.
#pragma once
#include "simd/simd.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInf = __builtin_inff();

// 2^x: relative error below 2.0e-7 (Degree 5), 5.5e-6 (Degree 4) or 7.5e-5 (Degree 3, enough where the result is
// rounded to bf16). Relative minimax polynomials on [-1/2, 1/2], 1 at 0 for degrees 4 and 5; exp2(-inf) = 0, NaN stays
// NaN.
template <int Degree = 5>
FASTATTN_INLINE F32 exp2(F32 x) {
  const F32 n = round_nearest(x);
  const F32 f = x - n;
  F32 p;
  if constexpr (Degree == 5) {
    // In halves: a long chain of products takes longer than it has work.
    const F32 high = fma(splat(1.33002642e-03f), f, splat(9.66970840e-03f));
    const F32 low = fma(splat(5.55055999e-02f), f, splat(2.40222816e-01f));
    p = fma(fma(high, f * f, low), f, splat(kLn2));
    p = fma(p, f, splat(1.f));
  } else if constexpr (Degree == 4) {
    p = splat(9.52835304e-03f);
    p = fma(p, f, splat(5.57933314e-02f));
    p = fma(p, f, splat(2.40251087e-01f));
    p = fma(p, f, splat(kLn2));
    p = fma(p, f, splat(1.f));
  } else {
    static_assert(Degree == 3, "exp2 has polynomials of degree 3, 4 and 5");
    p = splat(0.055171493f);
    p = fma(p, f, splat(0.242611109f));
    p = fma(p, f, splat(0.693261018f));
    p = fma(p, f, splat(0.999928075f));
  }
  return scale2(p, n);
}

// The same of several vectors, for x < 126 and 0 from about -125 down: step by step for all of them, which puts chains
// of dependent products side by side. The coefficients stay in memory, for loops that have no register to spare.
template <int kCount>
FASTATTN_INLINE void exp2_coarse_each(F32 (&x)[kCount]) {
  static constexpr float kTerms[] = {0.055171493f, 0.242611109f, 0.693261018f, 0.999928075f};
  const float* c = kTerms;
  asm volatile("" : "+r"(c));  // nobody knows what it points to
  F32 n[kCount], p[kCount];
  FASTATTN_UNROLL for (int i = 0; i < kCount; i++) n[i] = round_nearest(x[i]);
  FASTATTN_UNROLL for (int i = 0; i < kCount; i++) x[i] = x[i] - n[i];
  FASTATTN_UNROLL for (int i = 0; i < kCount; i++) p[i] = fma(splat(c[0]), x[i], splat(c[1]));
  FASTATTN_UNROLL for (int k = 2; k <= 3; k++) {
    FASTATTN_UNROLL for (int i = 0; i < kCount; i++) p[i] = fma(p[i], x[i], splat(c[k]));
  }
  FASTATTN_UNROLL for (int i = 0; i < kCount; i++) x[i] = scale2_small(p[i], n[i]);
}

// The same with a relative error below 6e-7, 1 at 0: powers of the nearest sixteenth from a table, and a polynomial for
// the rest that is two products shorter for it.
template <int kCount>
FASTATTN_INLINE void exp2_each(F32 (&x)[kCount]) {
  static constexpr float kTerms[] = {0.240226433f, 0.693187714f, kStepShift, -200.f};
  const float* c = kTerms;
  asm volatile("" : "+r"(c));  // nobody knows what it points to
  F32 power[kCount], p[kCount];
  FASTATTN_UNROLL for (int i = 0; i < kCount; i++) {
    x[i] = max(splat(c[3]), x[i]);
    const F32 sum = x[i] + splat(c[2]), m = sum - splat(c[2]);
    x[i] = x[i] - m;
    power[i] = step_power(sum, m);
  }
  FASTATTN_UNROLL for (int i = 0; i < kCount; i++) p[i] = fma(splat(c[0]), x[i], splat(c[1]));
  FASTATTN_UNROLL for (int i = 0; i < kCount; i++) x[i] = fma(power[i] * x[i], p[i], power[i]);
}

// x = n ln2 + r with |r| <= ln2 / 2. Cody-Waite reduction by one fma: ln2 as a float is off by no more than 1.9e-9.
FASTATTN_INLINE F32 without_ln2(F32 x, F32 n) {
  if constexpr (kFusedFma) return fnma(n, splat(kLn2), x);
  return (x - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);  // the first part so short that it is exact
}
FASTATTN_INLINE F32 reduce_by_ln2(F32 x, F32& n) {
  n = round_nearest(x * splat(kLog2e));
  return without_ln2(x, n);
}

// e^x for x <= 88: relative error below 1.0e-7 for |x| <= 10, below 3.1e-7 wherever the result is normal. 0 from -104
// down, -inf included; NaN stays NaN.
FASTATTN_INLINE F32 exp(F32 x) {
  F32 n;
  const F32 r = reduce_by_ln2(max(splat(-150.f), x), n);
  F32 p = splat(1.38146132608e-3f);
  p = fma(p, r, splat(8.36870982417e-3f));
  p = fma(p, r, splat(4.16683873613e-2f));
  p = fma(p, r, splat(0.166665206898f));
  p = fma(p, r, splat(0.499999934517f));
  p = fma(p, r, splat(1.f));
  p = fma(p, r, splat(1.f));
  return scale2(p, n);
}

// Hyperbolic tangent by e^2x - 1 over e^2x + 1, whose numerator does not cancel near 0: relative error below 1.9e-7
// over all floats, NaN stays NaN; of -0 it is 0.
FASTATTN_INLINE F32 tanh(F32 x) {
  F32 n;
  const F32 r = reduce_by_ln2(min(splat(20.f), max(splat(-20.f), x + x)), n);
  F32 p = splat(1.38825249e-3f);
  p = fma(p, r, splat(8.36652064e-3f));
  p = fma(p, r, splat(4.16671998e-2f));
  p = fma(p, r, splat(0.166665436f));
  p = fma(p, r, splat(0.499999982f));
  const F32 power = scale2(splat(1.f), n);
  const F32 less_one = fma(power, fma(r * r, p, r), power - splat(1.f));
  return less_one / (less_one + splat(2.f));
}

// Natural logarithm of positive normal x, NaN for NaN: absolute error below 2e-7 + |result| * 6e-8. The series of atanh
// at (m - 1) / (m + 1), with m in [0.7, 1.4].
FASTATTN_INLINE F32 log(F32 x) {
  F32 m;
  F32 e = split_exponent(x, m);
  const Mask large = m > splat(1.41421356f);
  m = select(large, m * splat(0.5f), m);
  e = select(large, e + splat(1.f), e);
  const F32 t = (m - splat(1.f)) / (m + splat(1.f));
  const F32 t2 = t * t;
  F32 p = splat(2.f / 9.f);
  p = fma(p, t2, splat(2.f / 7.f));
  p = fma(p, t2, splat(2.f / 5.f));
  p = fma(p, t2, splat(2.f / 3.f));
  p = fma(p, t2, splat(2.f));
  return fma(e, splat(kLn2), p * t);
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
