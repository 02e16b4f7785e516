// Activations and their derivatives on registers. With `Fine` they are good for fp32 results, without for bf16 ones.
// NaN stays NaN; at infinities they are what the formulas give: silu(-inf) is -inf * 0.
#pragma once
#include "math.h"

namespace fastattn::FASTATTN_ISA {
namespace {

template <class T>
constexpr bool kFine = true;  // whether results of this type need it
template <>
constexpr bool kFine<bf16> = false;

// 2^x, of any x
template <bool Fine>
FASTATTN_INLINE F32 power_of_two(F32 x) {
  return Fine ? exp2<5>(x) : exp2<3>(x);
}

// erfc(|x| / sqrt2) / 2, the smaller of normal_cdf(x) and normal_cdf(-x), as 2^(-a P(a) - 1): the polynomial is fitted
// so that x * normal_cdf(x) has a relative error of 1e-7 (Fine; else 1e-5) for small |x|, and of 4e-4 down to x = -10.
// From 15 up, where P is far beyond its fit, the result is 0.
template <bool Fine>
FASTATTN_INLINE F32 normal_tail(F32 x) {
  const F32 a = min(splat(15.f), max(zero() - x, x));
  F32 p;
  if constexpr (Fine) {
    p = splat(5.360132984e-9f);
    p = fma(p, a, splat(-2.298830369e-7f));
    p = fma(p, a, splat(4.0198173e-6f));
    p = fma(p, a, splat(-3.564617439e-5f));
    p = fma(p, a, splat(1.418017477e-4f));
    p = fma(p, a, splat(2.725419841e-4f));
    p = fma(p, a, splat(-7.255314978e-3f));
    p = fma(p, a, splat(5.262814516e-2f));
    p = fma(p, a, splat(0.4591683475f));
    p = fma(p, a, splat(1.151108991f));
  } else {
    p = splat(1.021839651e-6f);
    p = fma(p, a, splat(-4.276267904e-5f));
    p = fma(p, a, splat(7.650691912e-4f));
    p = fma(p, a, splat(-7.82746942e-3f));
    p = fma(p, a, splat(5.26456083e-2f));
    p = fma(p, a, splat(0.4595374855f));
    p = fma(p, a, splat(1.150975817f));
  }
  return power_of_two<Fine>(fnma(a, p, zero())) * splat(0.5f);
}

// The probability that a standard normal variable is below x.
template <bool Fine>
FASTATTN_INLINE F32 normal_cdf(F32 x) {
  const F32 tail = normal_tail<Fine>(x);
  return select(x > zero(), splat(1.f) - tail, tail);
}

// GELU (Hendrycks and Gimpel 2016): x * normal_cdf(x), or with normal_cdf(x) taken as sigmoid(2 u),
// u = sqrt(2 / pi) * (x + 0.044715 x^3), which is (1 + tanh(u)) / 2.
constexpr float kGeluLinear = -2.302208198f;  // of -2 u log2(e)
constexpr float kGeluCubic = -0.1029432397f;
constexpr float kGeluSlope = 1.595769122f;  // of 2 u' = slope * (1 + 3 * 0.044715 x^2)

template <bool Tanh, bool Fine>
FASTATTN_INLINE F32 gelu(F32 x) {
  if constexpr (!Tanh) return x * normal_cdf<Fine>(x);
  const F32 exponent = x * fma(x * x, splat(kGeluCubic), splat(kGeluLinear));
  return x / (splat(1.f) + power_of_two<Fine>(min(splat(200.f), exponent)));
}

// sigmoid(x), and sigmoid(x) * (1 - sigmoid(x)) without cancellation, given 2^-|x log2(e)|.
struct Sigmoid {
  F32 value, slope;
};
FASTATTN_INLINE Sigmoid sigmoid_from(F32 x, F32 decay) {
  const F32 upper = splat(1.f) / (splat(1.f) + decay), lower = decay * upper;
  return {select(x > zero(), upper, lower), upper * lower};
}

template <bool Tanh, bool Fine>
FASTATTN_INLINE F32 gelu_derivative(F32 x) {
  const F32 square = x * x;
  if constexpr (!Tanh) {
    const F32 density = power_of_two<Fine>(square * splat(-0.5f * kLog2e)) * splat(0.3989422804f);
    return fma(x, density, normal_cdf<Fine>(x));
  }
  const F32 exponent = x * fma(square, splat(kGeluCubic), splat(kGeluLinear));
  const Sigmoid s = sigmoid_from(x, power_of_two<Fine>(min(exponent, zero() - exponent)));
  const F32 inner = fma(min(splat(1e30f), square), splat(3.f * 0.044715f * kGeluSlope), splat(kGeluSlope));
  return fma(x * s.slope, inner, s.value);
}

// SiLU, or swish: x * sigmoid(x).
template <bool Fine>
FASTATTN_INLINE F32 silu(F32 x) {
  if constexpr (Fine) return x / (splat(1.f) + exp(min(splat(100.f), zero() - x)));
  return x / (splat(1.f) + exp2<3>(min(splat(200.f), x * splat(-kLog2e))));
}
struct SiluWithDerivative {
  F32 value, derivative;
};
template <bool Fine>
FASTATTN_INLINE SiluWithDerivative silu_with_derivative(F32 x) {
  const F32 falling = min(x, zero() - x);
  const Sigmoid s = sigmoid_from(x, Fine ? exp(falling) : exp2<3>(falling * splat(kLog2e)));
  return {x * s.value, fma(x, s.slope, s.value)};
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
