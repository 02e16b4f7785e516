// AVX-512 F/BW/DQ/VL; with FASTATTN_ISA_AVX512_BF16 also the bf16 dot product.
#pragma once
#include <immintrin.h>

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kLanes = 16;
constexpr int kRegisters = 32;
constexpr bool kFusedFma = true;

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};
struct Mask {
  __mmask16 v;
};

FASTATTN_INLINE F32 splat(float x) { return {_mm512_set1_ps(x)}; }
FASTATTN_INLINE F32 zero() { return {_mm512_setzero_ps()}; }
FASTATTN_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FASTATTN_INLINE F32 fms(F32 a, F32 b, F32 c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
FASTATTN_INLINE F32 fnma(F32 a, F32 b, F32 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
FASTATTN_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
FASTATTN_INLINE F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
FASTATTN_INLINE F32 round_nearest(F32 a) { return {_mm512_roundscale_ps(a.v, 8)}; }
FASTATTN_INLINE F32 scale2(F32 x, F32 n) { return {_mm512_scalef_ps(x.v, n.v)}; }
FASTATTN_INLINE F32 scale2_small(F32 x, F32 n) { return scale2(x, n); }
constexpr int kSteps = 16;
FASTATTN_INLINE F32 step_power(F32 s, F32 m) {
  alignas(64) static const float powers[kSteps] = {
      1.f,         1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
      1.41421356f, 1.47682615f, 1.5422108f,  1.61049029f, 1.68179283f, 1.75625216f, 1.8340081f,  1.91520658f};
  return scale2({_mm512_permutexvar_ps(_mm512_castps_si512(s.v), _mm512_load_ps(powers))}, m);
}
FASTATTN_INLINE F32 split_exponent(F32 x, F32& mantissa) {
  mantissa.v = _mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
  return {_mm512_getexp_ps(x.v)};
}
FASTATTN_INLINE float reduce_add(F32 a) { return _mm512_reduce_add_ps(a.v); }
FASTATTN_INLINE float reduce_max(F32 a) { return _mm512_reduce_max_ps(a.v); }

FASTATTN_INLINE Mask first(int64_t n) { return {static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u)}; }
FASTATTN_INLINE Mask operator<(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
FASTATTN_INLINE Mask operator>(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
FASTATTN_INLINE Mask operator>=(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
FASTATTN_INLINE Mask operator==(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
FASTATTN_INLINE Mask operator&(Mask a, Mask b) { return {_kand_mask16(a.v, b.v)}; }
FASTATTN_INLINE Mask operator|(Mask a, Mask b) { return {_kor_mask16(a.v, b.v)}; }
FASTATTN_INLINE Mask operator~(Mask a) { return {_knot_mask16(a.v)}; }
FASTATTN_INLINE bool any(Mask a) { return a.v != 0; }
FASTATTN_INLINE bool all(Mask a) { return a.v == 0xffff; }
FASTATTN_INLINE F32 select(Mask m, F32 a, F32 b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
FASTATTN_INLINE I32 select(Mask m, I32 a, I32 b) { return {_mm512_mask_blend_epi32(m.v, b.v, a.v)}; }

FASTATTN_INLINE I32 splat_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
FASTATTN_INLINE I32 iota() { return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
FASTATTN_INLINE I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
FASTATTN_INLINE I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
FASTATTN_INLINE I32 operator^(I32 a, I32 b) { return {_mm512_xor_si512(a.v, b.v)}; }
FASTATTN_INLINE I32 operator&(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
FASTATTN_INLINE F32 to_float(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
FASTATTN_INLINE Mask operator>=(I32 a, I32 b) { return {_mm512_cmpge_epi32_mask(a.v, b.v)}; }
FASTATTN_INLINE Mask operator<(I32 a, I32 b) { return {_mm512_cmplt_epi32_mask(a.v, b.v)}; }
FASTATTN_INLINE I32 load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
FASTATTN_INLINE Mask operator==(I32 a, I32 b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
FASTATTN_INLINE Mask unsigned_ge(I32 a, I32 b) { return {_mm512_cmpge_epu32_mask(a.v, b.v)}; }
FASTATTN_INLINE void mul_wide(I32 a, I32 b, I32& hi, I32& lo) {
  const __m512i even = _mm512_mul_epu32(a.v, b.v);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
  lo.v = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  hi.v = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}

FASTATTN_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
FASTATTN_INLINE F32 widen_bf16(__m256i h) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
FASTATTN_INLINE F32 load(const bf16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
FASTATTN_INLINE F32 load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
FASTATTN_INLINE F32 load_first(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n).v, p)}; }
FASTATTN_INLINE F32 load_first(const bf16* p, int64_t n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n).v, p)); }
FASTATTN_INLINE F32 load_first(const f16* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n).v, p))};
}
FASTATTN_INLINE Mask load_bool(const uint8_t* p) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm_test_epi8_mask(b, b)};
}
FASTATTN_INLINE Mask load_bool_first(const uint8_t* p, int64_t n) {
  const __m128i b = _mm_maskz_loadu_epi8(first(n).v, p);
  return {_mm_test_epi8_mask(b, b)};
}

#if defined(FASTATTN_ISA_AVX512_BF16)
// The instruction takes subnormals for zero.
FASTATTN_INLINE __m256i narrow_bf16(F32 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)); }
#else
// The bf16 in the upper half of each lane; the lower half is undefined.
FASTATTN_INLINE __m512i round_to_bf16(F32 x) {
  const __m512i u = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc00000));
}
FASTATTN_INLINE __m256i narrow_bf16(F32 x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(x), 16)); }
#endif
FASTATTN_INLINE __m256i narrow_f16(F32 x) { return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }
FASTATTN_INLINE void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
FASTATTN_INLINE void store(bf16* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x)); }
FASTATTN_INLINE void store(f16* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(x)); }
FASTATTN_INLINE void store_first(float* p, F32 x, int64_t n) { _mm512_mask_storeu_ps(p, first(n).v, x.v); }
FASTATTN_INLINE void store_first(bf16* p, F32 x, int64_t n) { _mm256_mask_storeu_epi16(p, first(n).v, narrow_bf16(x)); }
FASTATTN_INLINE void store_first(f16* p, F32 x, int64_t n) { _mm256_mask_storeu_epi16(p, first(n).v, narrow_f16(x)); }

FASTATTN_INLINE void split_two(F32& a, F32& b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512 e = _mm512_permutex2var_ps(a.v, even, b.v);
  b.v = _mm512_permutex2var_ps(a.v, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b.v);
  a.v = e;
}
FASTATTN_INLINE void join_two(F32& a, F32& b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512 l = _mm512_permutex2var_ps(a.v, low, b.v);
  b.v = _mm512_permutex2var_ps(a.v, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b.v);
  a.v = l;
}

FASTATTN_INLINE void deinterleave(F32& a, F32& b) { split_two(a, b); }

FASTATTN_INLINE F32 sum_four(F32 a, F32 b, F32 c, F32 d) {
  const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v)));
  const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v)));
  return {_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)))};
}
FASTATTN_INLINE F32 join_sums(const F32* t) {
  const __m512 a =
      _mm512_add_ps(_mm512_shuffle_f32x4(t[0].v, t[1].v, 0x88), _mm512_shuffle_f32x4(t[0].v, t[1].v, 0xdd));
  const __m512 b =
      _mm512_add_ps(_mm512_shuffle_f32x4(t[2].v, t[3].v, 0x88), _mm512_shuffle_f32x4(t[2].v, t[3].v, 0xdd));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd))};
}

FASTATTN_INLINE void sum_pairs(F32 a, F32 b, F32 c, F32 d, F32& first, F32& last) {
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_ps(a.v, b.v, 0x88), _mm512_shuffle_ps(a.v, b.v, 0xdd));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_ps(c.v, d.v, 0x88), _mm512_shuffle_ps(c.v, d.v, 0xdd));
  first.v = _mm512_shuffle_ps(ab, cd, 0x88);
  last.v = _mm512_shuffle_ps(ab, cd, 0xdd);
}
// 64 bits in all lanes: other than 128, a load alone.
FASTATTN_INLINE __m512i repeat_64(const void* p) {
  return _mm512_broadcastq_epi64(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
}
FASTATTN_INLINE void repeat_four(const float* p, F32& a, F32& b) {
  a.v = _mm512_castsi512_ps(repeat_64(p));
  b.v = _mm512_castsi512_ps(repeat_64(p + 2));
}
FASTATTN_INLINE void repeat_four(const bf16* p, F32& a, F32& b) {
  const __m512i h = repeat_64(p);
  a.v = _mm512_castsi512_ps(_mm512_slli_epi32(h, 16));
  b.v = _mm512_castsi512_ps(_mm512_and_si512(h, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}
FASTATTN_INLINE void repeat_four(const f16* p, F32& a, F32& b) {
  const __m512 x = _mm512_cvtph_ps(_mm512_castsi512_si256(repeat_64(p)));
  a.v = _mm512_castpd_ps(_mm512_movedup_pd(_mm512_castps_pd(x)));
  b.v = _mm512_castpd_ps(_mm512_permute_pd(_mm512_castps_pd(x), 0xff));
}
FASTATTN_INLINE void transpose_fours(F32* t) {
  const __m512 a = _mm512_shuffle_f32x4(t[0].v, t[1].v, 0x44), b = _mm512_shuffle_f32x4(t[0].v, t[1].v, 0xee);
  const __m512 c = _mm512_shuffle_f32x4(t[2].v, t[3].v, 0x44), d = _mm512_shuffle_f32x4(t[2].v, t[3].v, 0xee);
  t[0].v = _mm512_shuffle_f32x4(a, c, 0x88);
  t[1].v = _mm512_shuffle_f32x4(a, c, 0xdd);
  t[2].v = _mm512_shuffle_f32x4(b, d, 0x88);
  t[3].v = _mm512_shuffle_f32x4(b, d, 0xdd);
}

FASTATTN_INLINE void transpose(F32 (&x)[kLanes]) {
  __m512 r[16], t[16];
  FASTATTN_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  FASTATTN_UNROLL for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), e = _mm512_castps_pd(t[i + 3]);
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, e));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, e));
  }
  FASTATTN_UNROLL for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  FASTATTN_UNROLL for (int i = 0; i < 4; i++) {
    x[i].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    x[i + 8].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    x[i + 4].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    x[i + 12].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

#if defined(FASTATTN_ISA_AVX512_BF16)
#define FASTATTN_HAS_DOT2
// kLanes pairs of bf16: the low half of a lane multiplies the low half, the high half the high half.
struct Pairs {
  __m512i v;
};
FASTATTN_INLINE F32 dot2(F32 acc, Pairs a, Pairs b) {
  return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
FASTATTN_INLINE Pairs as_pairs(F32 x) { return {_mm512_castps_si512(x.v)}; }
FASTATTN_INLINE Pairs load_pairs(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
FASTATTN_INLINE Pairs load_pairs(const bf16* p) { return {_mm512_loadu_si512(p)}; }
FASTATTN_INLINE Pairs load_pairs_first(const bf16* p, int64_t n) {
  return {_mm512_maskz_loadu_epi16(n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1, p)};
}
FASTATTN_INLINE Pairs repeat_pairs(const bf16* p) { return {repeat_64(p)}; }
FASTATTN_INLINE Pairs zero_pairs() { return {_mm512_setzero_si512()}; }
FASTATTN_INLINE void zip_rows(Pairs low, Pairs high, Pairs& a, Pairs& b) {
  a.v = _mm512_unpacklo_epi16(low.v, high.v);
  b.v = _mm512_unpackhi_epi16(low.v, high.v);
}
FASTATTN_INLINE void order_columns(F32& a, F32& b) {
  const __m512 low = _mm512_shuffle_f32x4(a.v, b.v, 0x44), high = _mm512_shuffle_f32x4(a.v, b.v, 0xee);
  a.v = _mm512_shuffle_f32x4(low, low, 0xd8);
  b.v = _mm512_shuffle_f32x4(high, high, 0xd8);
}
FASTATTN_INLINE void store_pairs(uint32_t* p, Pairs x) { _mm512_storeu_si512(p, x.v); }
FASTATTN_INLINE Pairs splat_pair(uint32_t pair) { return {_mm512_set1_epi32(static_cast<int32_t>(pair))}; }
// 32 consecutive bf16, lo first: the layout of memory.
FASTATTN_INLINE Pairs narrow_two(F32 lo, F32 hi) {
  return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(hi.v, lo.v))};
}
// Lane i holds (lo[i], hi[i]).
FASTATTN_INLINE Pairs pack_pairs(F32 lo, F32 hi) {
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return {_mm512_permutexvar_epi16(_mm512_load_si512(order), narrow_two(lo, hi).v)};
}
// Lane i of the 32 lanes written to `out` holds (low[i], high[i]); zero from n on, and where high is null.
FASTATTN_INLINE void interleave_rows(const bf16* low, const bf16* high, int64_t n, uint32_t* out) {
  alignas(64) static const uint16_t order[64] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                 8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
                                                 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __mmask32 live = n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
  const __m512i a = _mm512_maskz_loadu_epi16(live, low);
  const __m512i b = high == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(live, high);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, _mm512_load_si512(order), b));
  _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi16(a, _mm512_load_si512(order + 32), b));
}
#endif

// The even elements in a, the odd ones in b: half the work of widening them in order.
FASTATTN_INLINE void load_two(const bf16* p, F32& a, F32& b) {
  __m512i h = _mm512_loadu_si512(p);
  asm("" : "+v"(h));  // loaded once, not for each of the two instructions
  a.v = _mm512_castsi512_ps(_mm512_slli_epi32(h, 16));
  b.v = _mm512_castsi512_ps(_mm512_and_si512(h, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}
FASTATTN_INLINE void store_two(bf16* p, F32 a, F32 b) {
#if defined(FASTATTN_ISA_AVX512_BF16)
  _mm512_storeu_si512(p, pack_pairs(a, b).v);
#else
  const __m512i lo = _mm512_srli_epi32(round_to_bf16(a), 16);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, lo, round_to_bf16(b)));
#endif
}

FASTATTN_INLINE void add_moments(const bf16* p, F32& sum, F32& squares) {
#if defined(FASTATTN_ISA_AVX512_BF16)
  const Pairs x = load_pairs(reinterpret_cast<const uint32_t*>(p));
  sum = dot2(sum, x, splat_pair(0x3f803f80u));
  squares = dot2(squares, x, x);
#else
  F32 a, b;
  load_two(p, a, b);
  sum = sum + (a + b);
  squares = fma(b, b, fma(a, a, squares));
#endif
}
FASTATTN_INLINE void interleave(F32& a, F32& b) { join_two(a, b); }

FASTATTN_INLINE void stream_two(float* p, F32 a, F32 b) {
  _mm512_stream_ps(p, a.v);
  _mm512_stream_ps(p + 16, b.v);
}
FASTATTN_INLINE void stream_two(bf16* p, F32 a, F32 b) {
#if defined(FASTATTN_ISA_AVX512_BF16)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), pack_pairs(a, b).v);
#else
  const __m512i lo = _mm512_srli_epi32(round_to_bf16(a), 16);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_mask_blend_epi16(0xaaaaaaaau, lo, round_to_bf16(b)));
#endif
}
FASTATTN_INLINE void stream_two(f16* p, F32 a, F32 b) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_f16(a));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p + 16), narrow_f16(b));
}
FASTATTN_INLINE void finish_streams() { _mm_sfence(); }

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
