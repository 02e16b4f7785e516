// NEON (AArch64, always there); with FASTATTN_ISA_NEON_BF16 also the conversions and the dot product of FEAT_BF16.
#pragma once
#include <arm_neon.h>

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kLanes = 4;
constexpr int kRegisters = 32;
constexpr bool kFusedFma = true;

struct F32 {
  float32x4_t v;
};
struct I32 {
  int32x4_t v;
};
struct Mask {
  uint32x4_t v;  // all bits of a lane set, or none
};

FASTATTN_INLINE F32 splat(float x) { return {vdupq_n_f32(x)}; }
FASTATTN_INLINE F32 zero() { return {vdupq_n_f32(0.f)}; }
FASTATTN_INLINE F32 operator+(F32 a, F32 b) { return {vaddq_f32(a.v, b.v)}; }
FASTATTN_INLINE F32 operator-(F32 a, F32 b) { return {vsubq_f32(a.v, b.v)}; }
FASTATTN_INLINE F32 operator*(F32 a, F32 b) { return {vmulq_f32(a.v, b.v)}; }
FASTATTN_INLINE F32 operator/(F32 a, F32 b) { return {vdivq_f32(a.v, b.v)}; }
FASTATTN_INLINE F32 fma(F32 a, F32 b, F32 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
FASTATTN_INLINE F32 fms(F32 a, F32 b, F32 c) { return {vfmaq_f32(vnegq_f32(c.v), a.v, b.v)}; }
FASTATTN_INLINE F32 fnma(F32 a, F32 b, F32 c) { return {vfmsq_f32(c.v, a.v, b.v)}; }
// Not vmaxq and vminq, which give NaN when either operand is one.
FASTATTN_INLINE F32 max(F32 a, F32 b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
FASTATTN_INLINE F32 min(F32 a, F32 b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
FASTATTN_INLINE F32 sqrt(F32 a) { return {vsqrtq_f32(a.v)}; }
FASTATTN_INLINE F32 round_nearest(F32 a) { return {vrndnq_f32(a.v)}; }
FASTATTN_INLINE float reduce_add(F32 a) { return vaddvq_f32(a.v); }
FASTATTN_INLINE float reduce_max(F32 a) { return vmaxvq_f32(a.v); }

FASTATTN_INLINE I32 splat_int(int32_t x) { return {vdupq_n_s32(x)}; }
FASTATTN_INLINE I32 iota() {
  alignas(16) static const int32_t lanes[4] = {0, 1, 2, 3};
  return {vld1q_s32(lanes)};
}
FASTATTN_INLINE I32 operator+(I32 a, I32 b) { return {vaddq_s32(a.v, b.v)}; }
FASTATTN_INLINE I32 operator-(I32 a, I32 b) { return {vsubq_s32(a.v, b.v)}; }
FASTATTN_INLINE I32 operator^(I32 a, I32 b) { return {veorq_s32(a.v, b.v)}; }
FASTATTN_INLINE I32 operator&(I32 a, I32 b) { return {vandq_s32(a.v, b.v)}; }
FASTATTN_INLINE F32 to_float(I32 a) { return {vcvtq_f32_s32(a.v)}; }
FASTATTN_INLINE Mask operator>=(I32 a, I32 b) { return {vcgeq_s32(a.v, b.v)}; }
FASTATTN_INLINE Mask operator<(I32 a, I32 b) { return {vcltq_s32(a.v, b.v)}; }
FASTATTN_INLINE I32 load_ints(const int32_t* p) { return {vld1q_s32(p)}; }
FASTATTN_INLINE Mask operator==(I32 a, I32 b) { return {vceqq_s32(a.v, b.v)}; }
FASTATTN_INLINE Mask unsigned_ge(I32 a, I32 b) {
  return {vcgeq_u32(vreinterpretq_u32_s32(a.v), vreinterpretq_u32_s32(b.v))};
}
FASTATTN_INLINE void mul_wide(I32 a, I32 b, I32& hi, I32& lo) {
  const uint32x4_t x = vreinterpretq_u32_s32(a.v), y = vreinterpretq_u32_s32(b.v);
  const uint32x4_t low = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(x), vget_low_u32(y)));
  const uint32x4_t high = vreinterpretq_u32_u64(vmull_high_u32(x, y));
  lo.v = vreinterpretq_s32_u32(vuzp1q_u32(low, high));
  hi.v = vreinterpretq_s32_u32(vuzp2q_u32(low, high));
}

FASTATTN_INLINE Mask first(int64_t n) { return iota() < splat_int(static_cast<int32_t>(n > kLanes ? kLanes : n)); }
FASTATTN_INLINE Mask operator<(F32 a, F32 b) { return {vcltq_f32(a.v, b.v)}; }
FASTATTN_INLINE Mask operator>(F32 a, F32 b) { return {vcgtq_f32(a.v, b.v)}; }
FASTATTN_INLINE Mask operator>=(F32 a, F32 b) { return {vcgeq_f32(a.v, b.v)}; }
FASTATTN_INLINE Mask operator==(F32 a, F32 b) { return {vceqq_f32(a.v, b.v)}; }
FASTATTN_INLINE Mask operator&(Mask a, Mask b) { return {vandq_u32(a.v, b.v)}; }
FASTATTN_INLINE Mask operator|(Mask a, Mask b) { return {vorrq_u32(a.v, b.v)}; }
FASTATTN_INLINE Mask operator~(Mask a) { return {vmvnq_u32(a.v)}; }
FASTATTN_INLINE bool any(Mask a) { return vmaxvq_u32(a.v) != 0; }
FASTATTN_INLINE bool all(Mask a) { return vminvq_u32(a.v) != 0; }
FASTATTN_INLINE F32 select(Mask m, F32 a, F32 b) { return {vbslq_f32(m.v, a.v, b.v)}; }
FASTATTN_INLINE I32 select(Mask m, I32 a, I32 b) { return {vbslq_s32(m.v, a.v, b.v)}; }

// Two factors, so that results as small as the subnormals come out right; n beyond +-252 saturates. Where n is NaN the
// conversion gives 0, and x is NaN.
FASTATTN_INLINE F32 scale2(F32 x, F32 n) {
  const F32 clamped = min(splat(252.f), max(splat(-252.f), n));
  const int32x4_t whole = vcvtnq_s32_f32(clamped.v), half = vshrq_n_s32(whole, 1), bias = vdupq_n_s32(127);
  const F32 a = {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23))};
  const F32 b = {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vsubq_s32(whole, half), bias), 23))};
  // n = -inf: x was computed from inf - inf.
  return select(n == splat(-__builtin_inff()), zero(), x * a * b);
}
FASTATTN_INLINE F32 scale2_small(F32 x, F32 n) {
  const int32x4_t whole = vcvtnq_s32_f32(max(splat(-126.f), n).v);
  const int32x4_t y = vaddq_s32(vreinterpretq_s32_f32(x.v), vshlq_n_s32(whole, 23));
  return select(n < splat(-125.f), zero(), F32{vreinterpretq_f32_s32(y)});
}
constexpr int kSteps = 16;
FASTATTN_INLINE F32 step_power(F32 s, F32 m) {
  // Less what the lowest bits of the shifted sum will add to them.
  alignas(16) static const uint32_t powers[kSteps] = {
      0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
      0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
  const auto* bytes = reinterpret_cast<const uint8_t*>(powers);
  const uint8x16x4_t table = {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
  const uint32x4_t sum = vreinterpretq_u32_f32(s.v);
  // The four bytes of each lane's element.
  const uint32x4_t at = vmlaq_n_u32(vdupq_n_u32(0x03020100), vandq_u32(sum, vdupq_n_u32(kSteps - 1)), 0x04040404);
  const uint32x4_t power = vreinterpretq_u32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(at)));
  const F32 y = {vreinterpretq_f32_u32(vaddq_u32(power, vshlq_n_u32(sum, 19)))};
  return select(m < splat(-125.f), zero(), y);
}
FASTATTN_INLINE F32 split_exponent(F32 x, F32& mantissa) {
  const uint32x4_t u = vreinterpretq_u32_f32(x.v);
  const uint32x4_t unit = vorrq_u32(vandq_u32(u, vdupq_n_u32(0x7fffff)), vdupq_n_u32(0x3f800000));
  mantissa = F32{vreinterpretq_f32_u32(unit)} + x * zero();  // keeps NaN
  return {vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(vshrq_n_u32(u, 23)), vdupq_n_s32(127)))};
}

FASTATTN_INLINE F32 widen(uint16x4_t h, const bf16*) { return {vreinterpretq_f32_u32(vshll_n_u16(h, 16))}; }
FASTATTN_INLINE F32 widen(uint16x4_t h, const f16*) { return {vcvt_f32_f16(vreinterpret_f16_u16(h))}; }
template <class T>
FASTATTN_INLINE F32 load(const T* p) {
  return widen(vld1_u16(&p->bits), p);
}
FASTATTN_INLINE F32 load(const float* p) { return {vld1q_f32(p)}; }
template <class T>
FASTATTN_INLINE F32 load_first(const T* p, int64_t n) {
  alignas(16) T some[kLanes] = {};
  memcpy(some, p, static_cast<size_t>(n) * sizeof(T));
  return load(some);
}
FASTATTN_INLINE Mask load_bool(const uint8_t* p) {
  uint32_t bytes;
  memcpy(&bytes, p, sizeof(bytes));
  const uint32x4_t wide = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes))));
  return {vtstq_u32(wide, wide)};
}
FASTATTN_INLINE Mask load_bool_first(const uint8_t* p, int64_t n) {
  uint8_t some[kLanes] = {};
  memcpy(some, p, static_cast<size_t>(n));
  return load_bool(some);
}

#if defined(FASTATTN_ISA_NEON_BF16)
FASTATTN_INLINE uint16x4_t narrow(F32 x, const bf16*) { return vreinterpret_u16_bf16(vcvt_bf16_f32(x.v)); }
#else
FASTATTN_INLINE uint16x4_t narrow(F32 x, const bf16*) {
  const uint32x4_t u = vreinterpretq_u32_f32(x.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd);
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x.v, x.v), rounded, vdupq_n_u32(0x7fc00000)), 16);
}
#endif
FASTATTN_INLINE uint16x4_t narrow(F32 x, const f16*) { return vreinterpret_u16_f16(vcvt_f16_f32(x.v)); }
FASTATTN_INLINE void store(float* p, F32 x) { vst1q_f32(p, x.v); }
template <class T>
FASTATTN_INLINE void store(T* p, F32 x) {
  vst1_u16(&p->bits, narrow(x, p));
}
template <class T>
FASTATTN_INLINE void store_first(T* p, F32 x, int64_t n) {
  alignas(16) T some[kLanes];
  store(some, x);
  memcpy(p, some, static_cast<size_t>(n) * sizeof(T));
}

// The even elements in a, the odd ones in b: half the work of widening them in order.
FASTATTN_INLINE void load_two(const bf16* p, F32& a, F32& b) {
  const uint32x4_t h = vreinterpretq_u32_u16(vld1q_u16(&p->bits));
  a.v = vreinterpretq_f32_u32(vshlq_n_u32(h, 16));
  b.v = vreinterpretq_f32_u32(vandq_u32(h, vdupq_n_u32(0xffff0000u)));
}
FASTATTN_INLINE void store_two(bf16* p, F32 a, F32 b) {
  vst1q_u16(&p->bits, vcombine_u16(vzip1_u16(narrow(a, p), narrow(b, p)), vzip2_u16(narrow(a, p), narrow(b, p))));
}
FASTATTN_INLINE void split_two(F32& a, F32& b) {
  const float32x4_t even = vuzp1q_f32(a.v, b.v);
  b.v = vuzp2q_f32(a.v, b.v);
  a.v = even;
}
FASTATTN_INLINE void join_two(F32& a, F32& b) {
  const float32x4_t low = vzip1q_f32(a.v, b.v);
  b.v = vzip2q_f32(a.v, b.v);
  a.v = low;
}

FASTATTN_INLINE void deinterleave(F32& a, F32& b) { split_two(a, b); }

FASTATTN_INLINE F32 sum_four(F32 a, F32 b, F32 c, F32 d) {
  return {vpaddq_f32(vpaddq_f32(a.v, b.v), vpaddq_f32(c.v, d.v))};
}
FASTATTN_INLINE F32 join_sums(const F32* t) { return t[0]; }

FASTATTN_INLINE void sum_pairs(F32 a, F32 b, F32 c, F32 d, F32& first, F32& last) {
  const float32x4_t ab = vpaddq_f32(a.v, b.v), cd = vpaddq_f32(c.v, d.v);
  first.v = vuzp1q_f32(ab, cd);
  last.v = vuzp2q_f32(ab, cd);
}
template <class T>
FASTATTN_INLINE void repeat_four(const T* p, F32& a, F32& b) {
  const float64x2_t x = vreinterpretq_f64_f32(load(p).v);
  a.v = vreinterpretq_f32_f64(vdupq_laneq_f64(x, 0));
  b.v = vreinterpretq_f32_f64(vdupq_laneq_f64(x, 1));
}
FASTATTN_INLINE void transpose_fours(F32*) {}

FASTATTN_INLINE void transpose(F32 (&x)[kLanes]) {
  const float32x4_t r0 = x[0].v, r1 = x[1].v, r2 = x[2].v, r3 = x[3].v;
  const float64x2_t t0 = vreinterpretq_f64_f32(vtrn1q_f32(r0, r1)), t1 = vreinterpretq_f64_f32(vtrn2q_f32(r0, r1));
  const float64x2_t t2 = vreinterpretq_f64_f32(vtrn1q_f32(r2, r3)), t3 = vreinterpretq_f64_f32(vtrn2q_f32(r2, r3));
  x[0].v = vreinterpretq_f32_f64(vtrn1q_f64(t0, t2));
  x[1].v = vreinterpretq_f32_f64(vtrn1q_f64(t1, t3));
  x[2].v = vreinterpretq_f32_f64(vtrn2q_f64(t0, t2));
  x[3].v = vreinterpretq_f32_f64(vtrn2q_f64(t1, t3));
}

#if defined(FASTATTN_ISA_NEON_BF16)
#define FASTATTN_HAS_DOT2
// kLanes pairs of bf16: the low half of a lane multiplies the low half, the high half the high half.
struct Pairs {
  uint32x4_t v;
};
FASTATTN_INLINE F32 dot2(F32 acc, Pairs a, Pairs b) {
  return {vbfdotq_f32(acc.v, vreinterpretq_bf16_u32(a.v), vreinterpretq_bf16_u32(b.v))};
}
FASTATTN_INLINE Pairs as_pairs(F32 x) { return {vreinterpretq_u32_f32(x.v)}; }
FASTATTN_INLINE Pairs load_pairs(const uint32_t* p) { return {vld1q_u32(p)}; }
FASTATTN_INLINE Pairs load_pairs(const bf16* p) { return {vreinterpretq_u32_u16(vld1q_u16(&p->bits))}; }
FASTATTN_INLINE Pairs load_pairs_first(const bf16* p, int64_t n) {
  alignas(16) bf16 some[8] = {};
  memcpy(some, p, static_cast<size_t>(n) * sizeof(bf16));
  return load_pairs(some);
}
FASTATTN_INLINE Pairs repeat_pairs(const bf16* p) {
  const uint16x4_t four = vld1_u16(&p->bits);
  return {vreinterpretq_u32_u16(vcombine_u16(four, four))};
}
FASTATTN_INLINE Pairs zero_pairs() { return {vdupq_n_u32(0)}; }
FASTATTN_INLINE void zip_rows(Pairs low, Pairs high, Pairs& a, Pairs& b) {
  const uint16x8_t l = vreinterpretq_u16_u32(low.v), h = vreinterpretq_u16_u32(high.v);
  a.v = vreinterpretq_u32_u16(vzip1q_u16(l, h));
  b.v = vreinterpretq_u32_u16(vzip2q_u16(l, h));
}
FASTATTN_INLINE void order_columns(F32&, F32&) {}
FASTATTN_INLINE void store_pairs(uint32_t* p, Pairs x) { vst1q_u32(p, x.v); }
FASTATTN_INLINE Pairs splat_pair(uint32_t pair) { return {vdupq_n_u32(pair)}; }
// 2*kLanes consecutive bf16, lo first: the layout of memory.
FASTATTN_INLINE Pairs narrow_two(F32 lo, F32 hi) {
  const bf16* const kind = nullptr;
  return {vreinterpretq_u32_u16(vcombine_u16(narrow(lo, kind), narrow(hi, kind)))};
}
// Lane i holds (lo[i], hi[i]).
FASTATTN_INLINE Pairs pack_pairs(F32 lo, F32 hi) {
  const bf16* const kind = nullptr;
  const uint16x4_t low = narrow(lo, kind), high = narrow(hi, kind);
  return {vreinterpretq_u32_u16(vcombine_u16(vzip1_u16(low, high), vzip2_u16(low, high)))};
}
FASTATTN_INLINE void interleave_rows(const bf16* low, const bf16* high, int64_t n, uint32_t* out) {
  const Pairs a = n >= 2 * kLanes ? load_pairs(low) : load_pairs_first(low, n);
  const Pairs b = high == nullptr ? zero_pairs() : n >= 2 * kLanes ? load_pairs(high) : load_pairs_first(high, n);
  Pairs first, second;
  zip_rows(a, b, first, second);
  store_pairs(out, first);
  store_pairs(out + kLanes, second);
}
#endif

FASTATTN_INLINE void add_moments(const bf16* p, F32& sum, F32& squares) {
  F32 a, b;
  load_two(p, a, b);
  sum = sum + (a + b);
  squares = fma(b, b, fma(a, a, squares));
}
FASTATTN_INLINE void interleave(F32& a, F32& b) { join_two(a, b); }

// There are no intrinsics for stores past the caches.
FASTATTN_INLINE void stream_two(bf16* p, F32 a, F32 b) { store_two(p, a, b); }
template <class T>
FASTATTN_INLINE void stream_two(T* p, F32 a, F32 b) {
  store(p, a);
  store(p + kLanes, b);
}
FASTATTN_INLINE void finish_streams() {}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
