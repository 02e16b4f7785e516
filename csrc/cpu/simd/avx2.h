// AVX2 + FMA + F16C.
#pragma once
#include <immintrin.h>

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kLanes = 8;
constexpr int kRegisters = 16;
constexpr bool kFusedFma = true;

struct F32 {
  __m256 v;
};
struct I32 {
  __m256i v;
};
struct Mask {
  __m256 v;  // all bits of a lane set, or none
};

FASTATTN_INLINE F32 splat(float x) { return {_mm256_set1_ps(x)}; }
FASTATTN_INLINE F32 zero() { return {_mm256_setzero_ps()}; }
FASTATTN_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FASTATTN_INLINE F32 fms(F32 a, F32 b, F32 c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
FASTATTN_INLINE F32 fnma(F32 a, F32 b, F32 c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
FASTATTN_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 sqrt(F32 a) { return {_mm256_sqrt_ps(a.v)}; }
FASTATTN_INLINE F32 round_nearest(F32 a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
FASTATTN_INLINE float reduce_add(F32 a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
FASTATTN_INLINE float reduce_max(F32 a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

FASTATTN_INLINE I32 splat_int(int32_t x) { return {_mm256_set1_epi32(x)}; }
FASTATTN_INLINE I32 iota() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
FASTATTN_INLINE I32 operator+(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
FASTATTN_INLINE I32 operator-(I32 a, I32 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
FASTATTN_INLINE I32 operator^(I32 a, I32 b) { return {_mm256_xor_si256(a.v, b.v)}; }
FASTATTN_INLINE I32 operator&(I32 a, I32 b) { return {_mm256_and_si256(a.v, b.v)}; }
FASTATTN_INLINE F32 to_float(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
FASTATTN_INLINE Mask operator<(I32 a, I32 b) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.v, a.v))}; }
FASTATTN_INLINE Mask operator~(Mask a) { return {_mm256_xor_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
FASTATTN_INLINE Mask operator>=(I32 a, I32 b) { return ~(a < b); }
FASTATTN_INLINE I32 load_ints(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
FASTATTN_INLINE Mask operator==(I32 a, I32 b) { return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))}; }
FASTATTN_INLINE Mask unsigned_ge(I32 a, I32 b) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(a.v, b.v), a.v))};
}
FASTATTN_INLINE void mul_wide(I32 a, I32 b, I32& hi, I32& lo) {
  const __m256i even = _mm256_mul_epu32(a.v, b.v);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), _mm256_srli_epi64(b.v, 32));
  lo.v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  hi.v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}

FASTATTN_INLINE Mask first(int64_t n) { return iota() < splat_int(static_cast<int32_t>(n > kLanes ? kLanes : n)); }
FASTATTN_INLINE Mask operator<(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
FASTATTN_INLINE Mask operator>(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
FASTATTN_INLINE Mask operator>=(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
FASTATTN_INLINE Mask operator==(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
FASTATTN_INLINE Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.v, b.v)}; }
FASTATTN_INLINE Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.v, b.v)}; }
FASTATTN_INLINE bool any(Mask a) { return _mm256_movemask_ps(a.v) != 0; }
FASTATTN_INLINE bool all(Mask a) { return _mm256_movemask_ps(a.v) == 0xff; }
FASTATTN_INLINE F32 select(Mask m, F32 a, F32 b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
FASTATTN_INLINE I32 select(Mask m, I32 a, I32 b) {
  return {_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(b.v), _mm256_castsi256_ps(a.v), m.v))};
}

// Two factors, so that results as small as the subnormals come out right; n beyond +-252 saturates. The clamp keeps
// NaN: max and min give back their second operand then.
FASTATTN_INLINE F32 scale2(F32 x, F32 n) {
  const F32 clamped = min(splat(252.f), max(splat(-252.f), n));
  const __m256i whole = _mm256_cvtps_epi32(clamped.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const F32 a = {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23))};
  const F32 b = {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23))};
  const F32 y = x * a * b;
  // n = -inf: x was computed from inf - inf.
  const F32 dead = {_mm256_cmp_ps(n.v, _mm256_set1_ps(-__builtin_inff()), _CMP_EQ_OQ)};
  return {_mm256_andnot_ps(dead.v, y.v)};
}

FASTATTN_INLINE F32 scale2_small(F32 x, F32 n) {
  const __m256i whole = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_set1_ps(-126.f), n.v));
  const __m256i y = _mm256_add_epi32(_mm256_castps_si256(x.v), _mm256_slli_epi32(whole, 23));
  const __m256 dead = _mm256_cmp_ps(n.v, _mm256_set1_ps(-125.f), _CMP_LT_OQ);
  return {_mm256_andnot_ps(dead, _mm256_castsi256_ps(y))};
}
constexpr int kSteps = 8;
FASTATTN_INLINE F32 step_power(F32 s, F32 m) {
  // Less what the lowest bits of the shifted sum will add to them.
  alignas(32) static const int32_t powers[kSteps] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                                     0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
  const __m256i sum = _mm256_castps_si256(s.v);
  const __m256i power = _mm256_permutevar8x32_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(powers)), sum);
  const __m256i y = _mm256_add_epi32(power, _mm256_slli_epi32(sum, 20));
  const __m256 dead = _mm256_cmp_ps(m.v, _mm256_set1_ps(-125.f), _CMP_LT_OQ);
  return {_mm256_andnot_ps(dead, _mm256_castsi256_ps(y))};
}
FASTATTN_INLINE F32 split_exponent(F32 x, F32& mantissa) {
  const __m256i u = _mm256_castps_si256(x.v);
  const __m256i fraction = _mm256_and_si256(u, _mm256_set1_epi32(0x7fffff));
  const F32 keep_nan = x * zero();
  mantissa = F32{_mm256_castsi256_ps(_mm256_or_si256(fraction, _mm256_set1_epi32(0x3f800000)))} + keep_nan;
  return {_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(u, 23), _mm256_set1_epi32(127)))};
}

FASTATTN_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
FASTATTN_INLINE F32 widen_bf16(__m128i h) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
FASTATTN_INLINE F32 load(const bf16* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
FASTATTN_INLINE F32 load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
FASTATTN_INLINE F32 load_first(const float* p, int64_t n) {
  return {_mm256_maskload_ps(p, _mm256_castps_si256(first(n).v))};
}
FASTATTN_INLINE __m128i load_first_halves(const void* p, int64_t n) {
  alignas(16) uint16_t buffer[8] = {};
  memcpy(buffer, p, static_cast<size_t>(n) * 2);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}
FASTATTN_INLINE F32 load_first(const bf16* p, int64_t n) { return widen_bf16(load_first_halves(p, n)); }
FASTATTN_INLINE F32 load_first(const f16* p, int64_t n) { return {_mm256_cvtph_ps(load_first_halves(p, n))}; }
FASTATTN_INLINE Mask bool_mask(__m128i bytes) {
  return ~Mask{_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_setzero_si256()))};
}
FASTATTN_INLINE Mask load_bool(const uint8_t* p) {
  return bool_mask(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
FASTATTN_INLINE Mask load_bool_first(const uint8_t* p, int64_t n) {
  alignas(16) uint8_t buffer[16] = {};
  memcpy(buffer, p, static_cast<size_t>(n));
  return bool_mask(_mm_load_si128(reinterpret_cast<const __m128i*>(buffer)));
}

// The bf16 in the upper half of each lane; the lower half is undefined.
FASTATTN_INLINE __m256i round_to_bf16(F32 x) {
  const __m256i u = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000), nan);
}
FASTATTN_INLINE __m128i narrow_bf16(F32 x) {
  const __m256i r = _mm256_srli_epi32(round_to_bf16(x), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
FASTATTN_INLINE __m128i narrow_f16(F32 x) { return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }
FASTATTN_INLINE void store(float* p, F32 x) { _mm256_storeu_ps(p, x.v); }
FASTATTN_INLINE void store(bf16* p, F32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(x)); }
FASTATTN_INLINE void store(f16* p, F32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_f16(x)); }
FASTATTN_INLINE void store_first(float* p, F32 x, int64_t n) {
  _mm256_maskstore_ps(p, _mm256_castps_si256(first(n).v), x.v);
}
FASTATTN_INLINE void store_first_halves(void* p, __m128i x, int64_t n) {
  alignas(16) uint16_t buffer[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), x);
  memcpy(p, buffer, static_cast<size_t>(n) * 2);
}
FASTATTN_INLINE void store_first(bf16* p, F32 x, int64_t n) { store_first_halves(p, narrow_bf16(x), n); }
FASTATTN_INLINE void store_first(f16* p, F32 x, int64_t n) { store_first_halves(p, narrow_f16(x), n); }

// The even elements in a, the odd ones in b: half the work of widening them in order.
FASTATTN_INLINE void load_two(const bf16* p, F32& a, F32& b) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a.v = _mm256_castsi256_ps(_mm256_slli_epi32(h, 16));
  b.v = _mm256_castsi256_ps(_mm256_and_si256(h, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}
FASTATTN_INLINE void store_two(bf16* p, F32 a, F32 b) {
  const __m256i lo = _mm256_srli_epi32(round_to_bf16(a), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(lo, round_to_bf16(b), 0xaa));
}
FASTATTN_INLINE void split_two(F32& a, F32& b) {
  const __m256 lo = _mm256_permute2f128_ps(a.v, b.v, 0x20), hi = _mm256_permute2f128_ps(a.v, b.v, 0x31);
  a.v = _mm256_shuffle_ps(lo, hi, 0x88);
  b.v = _mm256_shuffle_ps(lo, hi, 0xdd);
}
FASTATTN_INLINE void join_two(F32& a, F32& b) {
  const __m256 lo = _mm256_unpacklo_ps(a.v, b.v), hi = _mm256_unpackhi_ps(a.v, b.v);
  a.v = _mm256_permute2f128_ps(lo, hi, 0x20);
  b.v = _mm256_permute2f128_ps(lo, hi, 0x31);
}

FASTATTN_INLINE void deinterleave(F32& a, F32& b) { split_two(a, b); }

FASTATTN_INLINE F32 sum_four(F32 a, F32 b, F32 c, F32 d) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c.v, d.v), _mm256_unpackhi_ps(c.v, d.v));
  return {_mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee))};
}
FASTATTN_INLINE F32 join_sums(const F32* t) {
  return {_mm256_add_ps(_mm256_permute2f128_ps(t[0].v, t[1].v, 0x20), _mm256_permute2f128_ps(t[0].v, t[1].v, 0x31))};
}

FASTATTN_INLINE void sum_pairs(F32 a, F32 b, F32 c, F32 d, F32& first, F32& last) {
  const __m256 ab = _mm256_add_ps(_mm256_shuffle_ps(a.v, b.v, 0x88), _mm256_shuffle_ps(a.v, b.v, 0xdd));
  const __m256 cd = _mm256_add_ps(_mm256_shuffle_ps(c.v, d.v, 0x88), _mm256_shuffle_ps(c.v, d.v, 0xdd));
  first.v = _mm256_shuffle_ps(ab, cd, 0x88);
  last.v = _mm256_shuffle_ps(ab, cd, 0xdd);
}
FASTATTN_INLINE __m256i repeat_64(const void* p) {
  return _mm256_broadcastq_epi64(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
}
FASTATTN_INLINE void repeat_four(const float* p, F32& a, F32& b) {
  a.v = _mm256_castsi256_ps(repeat_64(p));
  b.v = _mm256_castsi256_ps(repeat_64(p + 2));
}
FASTATTN_INLINE void repeat_four(const bf16* p, F32& a, F32& b) {
  const __m256i h = repeat_64(p);
  a.v = _mm256_castsi256_ps(_mm256_slli_epi32(h, 16));
  b.v = _mm256_castsi256_ps(_mm256_and_si256(h, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}
FASTATTN_INLINE void repeat_four(const f16* p, F32& a, F32& b) {
  const __m256 x = _mm256_cvtph_ps(_mm256_castsi256_si128(repeat_64(p)));
  a.v = _mm256_castpd_ps(_mm256_movedup_pd(_mm256_castps_pd(x)));
  b.v = _mm256_castpd_ps(_mm256_permute_pd(_mm256_castps_pd(x), 0xf));
}
FASTATTN_INLINE void transpose_fours(F32* t) {
  const __m256 a = _mm256_permute2f128_ps(t[0].v, t[1].v, 0x20);
  t[1].v = _mm256_permute2f128_ps(t[0].v, t[1].v, 0x31);
  t[0].v = a;
}

FASTATTN_INLINE void transpose(F32 (&x)[kLanes]) {
  __m256 r[8], t[8];
  FASTATTN_UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  FASTATTN_UNROLL for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  FASTATTN_UNROLL for (int i = 0; i < 4; i++) {
    x[i].v = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    x[i + 4].v = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
}

FASTATTN_INLINE void add_moments(const bf16* p, F32& sum, F32& squares) {
  F32 a, b;
  load_two(p, a, b);
  sum = sum + (a + b);
  squares = fma(b, b, fma(a, a, squares));
}
FASTATTN_INLINE void interleave(F32& a, F32& b) { join_two(a, b); }

FASTATTN_INLINE void stream_two(float* p, F32 a, F32 b) {
  _mm256_stream_ps(p, a.v);
  _mm256_stream_ps(p + 8, b.v);
}
FASTATTN_INLINE void stream_two(bf16* p, F32 a, F32 b) {
  const __m256i lo = _mm256_srli_epi32(round_to_bf16(a), 16);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(lo, round_to_bf16(b), 0xaa));
}
FASTATTN_INLINE void stream_two(f16* p, F32 a, F32 b) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_f16(a));
  _mm_stream_si128(reinterpret_cast<__m128i*>(p + 8), narrow_f16(b));
}
FASTATTN_INLINE void finish_streams() { _mm_sfence(); }

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
