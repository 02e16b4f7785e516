// Activations and their derivatives on registers. With `Fine` they are good for fp32 results, without for bf16 ones.
// NaN stays NaN; at infinities they are what the formulas give: silu(-inf) is -inf * 0.
#pragma once
#include "constant.h"
#include "math.h"
#include "types.h"

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

// (1 - Phi(x)) / Phi(x), Phi the distribution function of the standard normal, as 2^(-x R(x^2)). R is fitted so that
// x Phi(x) has an error below 5e-8 |x|, and for x < 0 a relative one below 2.5e-4 down to x = -5.5; not Fine: below
// 2.4e-4 |x| and 2.4e-3. Beyond, R is too large, and Phi falls to 0 early.
template <bool Fine>
FASTATTN_INLINE F32 normal_odds(F32 x) {
  F32 p;
  if constexpr (Fine) {
    // In pieces: a long chain of products takes longer than it has work.
    const F32 square = min(splat(1e3f), x * x), fourth = square * square, eighth = fourth * fourth;
    const F32 p0 = fma(splat(0.1048350831f), square, splat(2.302209277f));
    const F32 p2 = fma(splat(-1.588255018e-4f), square, splat(-9.450491203e-5f));
    const F32 p4 = fma(splat(-2.938148317e-7f), square, splat(1.105350471e-5f));
    const F32 p6 = fma(splat(5.550799433e-10f), square, splat(-4.807671991e-9f));
    const F32 p8 = fma(splat(1.306519922e-13f), square, splat(-1.439538297e-11f));
    p = fma(fma(fma(p8, fourth, p6), eighth, fma(p4, fourth, p2)), fourth, p0);
  } else {
    const F32 square = x * x;
    p = splat(6.143198171e-8f);
    p = fma(p, square, splat(8.542490468e-6f));
    p = fma(p, square, splat(-1.315595995e-3f));
    p = fma(p, square, splat(0.1084548702f));
    p = fma(p, square, splat(2.299726829f));
  }
  return power_of_two<Fine>(min(splat(200.f), fnma(x, p, zero())));
}

// GELU (Hendrycks and Gimpel 2016): x Phi(x), or with Phi(x) taken as sigmoid(2 u),
// u = sqrt(2 / pi) * (x + 0.044715 x^3), which is (1 + tanh(u)) / 2.
constexpr float kGeluLinear = -2.302208198f;  // of -2 u log2(e)
constexpr float kGeluCubic = -0.1029432397f;
constexpr float kGeluSlope = 1.595769122f;  // of 2 u' = slope * (1 + 3 * 0.044715 x^2)

template <bool Tanh, bool Fine>
FASTATTN_INLINE F32 gelu(F32 x) {
  if constexpr (!Tanh) return x / (splat(1.f) + normal_odds<Fine>(x));
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
    return fma(x, density, splat(1.f) / (splat(1.f) + normal_odds<Fine>(x)));
  }
  const F32 exponent = x * fma(square, splat(kGeluCubic), splat(kGeluLinear));
  const Sigmoid s = sigmoid_from(x, power_of_two<Fine>(min(exponent, zero() - exponent)));
  const F32 inner = fma(min(splat(1e30f), square), splat(3.f * 0.044715f * kGeluSlope), splat(kGeluSlope));
  return fma(x * s.slope, inner, s.value);
}

// Swish (Ramachandran et al. 2017): x * sigmoid(beta x). SiLU with 1; GELU by a sigmoid (Hendrycks and Gimpel 2016,
// section 2) with 1.702.
constexpr float kSilu = 1.f;
constexpr float kGeluSigmoid = 1.702f;

template <bool Fine>
FASTATTN_INLINE F32 swish(F32 x, float beta) {
  if constexpr (Fine) return x / (splat(1.f) + exp(min(splat(100.f), x * splat(-beta))));
  return x / (splat(1.f) + exp2<3>(min(splat(200.f), x * splat(-beta * kLog2e))));
}
struct WithDerivative {
  F32 value, derivative;
};
template <bool Fine>
FASTATTN_INLINE WithDerivative swish_with_derivative(F32 x, float beta) {
  const F32 scaled = x * splat(beta), falling = min(scaled, zero() - scaled);
  const Sigmoid s = sigmoid_from(x, Fine ? exp(falling) : exp2<3>(falling * splat(kLog2e)));
  return {x * s.value, fma(x, s.slope * splat(beta), s.value)};  // beta x may be infinite where x is not
}

// Any of them, by its name.
template <Activation kind, bool Fine>
FASTATTN_INLINE F32 activate(F32 x) {
  if constexpr (kind == Activation::gelu) return gelu<false, Fine>(x);
  if constexpr (kind == Activation::gelu_tanh) return gelu<true, Fine>(x);
  if constexpr (kind == Activation::relu) return max(zero(), x);
  if constexpr (kind == Activation::gelu_sigmoid) return swish<Fine>(x, kGeluSigmoid);
  if constexpr (kind == Activation::silu) return swish<Fine>(x, kSilu);
  return x;
}
template <Activation kind, bool Fine>
FASTATTN_INLINE F32 activation_derivative(F32 x) {
  if constexpr (kind == Activation::gelu) return gelu_derivative<false, Fine>(x);
  if constexpr (kind == Activation::gelu_tanh) return gelu_derivative<true, Fine>(x);
  if constexpr (kind == Activation::relu) return select(zero() >= x, zero(), splat(1.f));
  if constexpr (kind == Activation::gelu_sigmoid) return swish_with_derivative<Fine>(x, kGeluSigmoid).derivative;
  if constexpr (kind == Activation::silu) return swish_with_derivative<Fine>(x, kSilu).derivative;
  return splat(1.f);
}

// Calls f with the compile-time constant that equals `kind`, which is one of kKinds.
template <Activation... kKinds, class F>
FASTATTN_INLINE void with_activation(Activation kind, F f) {
  (void)((kind == kKinds && (f(Constant<kKinds>{}), true)) || ...);
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
