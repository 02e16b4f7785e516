// Plain C++ for any machine: four lanes in a loop, which a compiler turns into whatever the baseline has.
#pragma once

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kLanes = 4;
constexpr int kRegisters = 16;
constexpr bool kFusedFma = false;
constexpr bool kHasDot2 = false;

struct F32 {
  float v[kLanes];
};
struct I32 {
  int32_t v[kLanes];
};
struct Mask {
  bool v[kLanes];
};

template <class R, class F>
FASTATTN_INLINE R lanes(F f) {
  R r;
  FASTATTN_UNROLL for (int i = 0; i < kLanes; i++) r.v[i] = f(i);
  return r;
}

FASTATTN_INLINE F32 splat(float x) { return lanes<F32>([&](int) { return x; }); }
FASTATTN_INLINE F32 zero() { return splat(0.f); }
FASTATTN_INLINE F32 operator+(F32 a, F32 b) { return lanes<F32>([&](int i) { return a.v[i] + b.v[i]; }); }
FASTATTN_INLINE F32 operator-(F32 a, F32 b) { return lanes<F32>([&](int i) { return a.v[i] - b.v[i]; }); }
FASTATTN_INLINE F32 operator*(F32 a, F32 b) { return lanes<F32>([&](int i) { return a.v[i] * b.v[i]; }); }
FASTATTN_INLINE F32 operator/(F32 a, F32 b) { return lanes<F32>([&](int i) { return a.v[i] / b.v[i]; }); }
FASTATTN_INLINE F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
FASTATTN_INLINE F32 fms(F32 a, F32 b, F32 c) { return a * b - c; }
FASTATTN_INLINE F32 fnma(F32 a, F32 b, F32 c) { return c - a * b; }
FASTATTN_INLINE F32 max(F32 a, F32 b) {
  return lanes<F32>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
FASTATTN_INLINE F32 min(F32 a, F32 b) {
  return lanes<F32>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
FASTATTN_INLINE F32 sqrt(F32 a) { return lanes<F32>([&](int i) { return __builtin_sqrtf(a.v[i]); }); }
FASTATTN_INLINE F32 round_nearest(F32 a) { return lanes<F32>([&](int i) { return __builtin_nearbyintf(a.v[i]); }); }
FASTATTN_INLINE F32 scale2(F32 x, F32 n) {
  return lanes<F32>([&](int i) {
    if (n.v[i] == -__builtin_inff()) return 0.f;
    const float clamped = n.v[i] > 300.f ? 300.f : n.v[i] < -300.f ? -300.f : n.v[i];
    return clamped != clamped ? clamped : __builtin_scalbnf(x.v[i], static_cast<int>(clamped));
  });
}
FASTATTN_INLINE float reduce_add(F32 a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
FASTATTN_INLINE float reduce_max(F32 a) {
  float m = a.v[0];
  FASTATTN_UNROLL for (int i = 1; i < kLanes; i++) m = m > a.v[i] ? m : a.v[i];
  return m;
}

FASTATTN_INLINE Mask first(int64_t n) { return lanes<Mask>([&](int i) { return i < n; }); }
FASTATTN_INLINE Mask operator<(F32 a, F32 b) { return lanes<Mask>([&](int i) { return a.v[i] < b.v[i]; }); }
FASTATTN_INLINE Mask operator>(F32 a, F32 b) { return lanes<Mask>([&](int i) { return a.v[i] > b.v[i]; }); }
FASTATTN_INLINE Mask operator>=(F32 a, F32 b) { return lanes<Mask>([&](int i) { return a.v[i] >= b.v[i]; }); }
FASTATTN_INLINE Mask operator==(F32 a, F32 b) { return lanes<Mask>([&](int i) { return a.v[i] == b.v[i]; }); }
FASTATTN_INLINE Mask operator&(Mask a, Mask b) { return lanes<Mask>([&](int i) { return a.v[i] && b.v[i]; }); }
FASTATTN_INLINE Mask operator|(Mask a, Mask b) { return lanes<Mask>([&](int i) { return a.v[i] || b.v[i]; }); }
FASTATTN_INLINE Mask operator~(Mask a) { return lanes<Mask>([&](int i) { return !a.v[i]; }); }
FASTATTN_INLINE bool any(Mask a) { return a.v[0] || a.v[1] || a.v[2] || a.v[3]; }
FASTATTN_INLINE bool all(Mask a) { return a.v[0] && a.v[1] && a.v[2] && a.v[3]; }
FASTATTN_INLINE F32 select(Mask m, F32 a, F32 b) {
  return lanes<F32>([&](int i) { return m.v[i] ? a.v[i] : b.v[i]; });
}
FASTATTN_INLINE I32 select(Mask m, I32 a, I32 b) {
  return lanes<I32>([&](int i) { return m.v[i] ? a.v[i] : b.v[i]; });
}

FASTATTN_INLINE I32 splat_int(int32_t x) { return lanes<I32>([&](int) { return x; }); }
FASTATTN_INLINE I32 iota() { return lanes<I32>([](int i) { return i; }); }
FASTATTN_INLINE int32_t wrap(uint32_t x) { return static_cast<int32_t>(x); }
FASTATTN_INLINE uint32_t bits(int32_t x) { return static_cast<uint32_t>(x); }
FASTATTN_INLINE I32 operator+(I32 a, I32 b) {
  return lanes<I32>([&](int i) { return wrap(bits(a.v[i]) + bits(b.v[i])); });
}
FASTATTN_INLINE I32 operator-(I32 a, I32 b) {
  return lanes<I32>([&](int i) { return wrap(bits(a.v[i]) - bits(b.v[i])); });
}
FASTATTN_INLINE I32 operator^(I32 a, I32 b) { return lanes<I32>([&](int i) { return a.v[i] ^ b.v[i]; }); }
FASTATTN_INLINE I32 operator&(I32 a, I32 b) { return lanes<I32>([&](int i) { return a.v[i] & b.v[i]; }); }
FASTATTN_INLINE Mask operator>=(I32 a, I32 b) { return lanes<Mask>([&](int i) { return a.v[i] >= b.v[i]; }); }
FASTATTN_INLINE Mask operator<(I32 a, I32 b) { return lanes<Mask>([&](int i) { return a.v[i] < b.v[i]; }); }
FASTATTN_INLINE Mask unsigned_ge(I32 a, I32 b) {
  return lanes<Mask>([&](int i) { return bits(a.v[i]) >= bits(b.v[i]); });
}
FASTATTN_INLINE void mul_wide(I32 a, I32 b, I32& hi, I32& lo) {
  FASTATTN_UNROLL for (int i = 0; i < kLanes; i++) {
    const uint64_t product = static_cast<uint64_t>(bits(a.v[i])) * bits(b.v[i]);
    hi.v[i] = wrap(static_cast<uint32_t>(product >> 32));
    lo.v[i] = wrap(static_cast<uint32_t>(product));
  }
}

FASTATTN_INLINE float float_of(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
FASTATTN_INLINE uint32_t bits_of(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
FASTATTN_INLINE F32 split_exponent(F32 x, F32& mantissa) {
  mantissa = lanes<F32>([&](int i) { return float_of((bits_of(x.v[i]) & 0x7fffffu) | 0x3f800000u) + x.v[i] * 0.f; });
  return lanes<F32>([&](int i) { return static_cast<float>(static_cast<int>(bits_of(x.v[i]) >> 23) - 127); });
}
FASTATTN_INLINE float widen(float x) { return x; }
FASTATTN_INLINE float widen(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
FASTATTN_INLINE float widen(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // 2^112 lifts the exponent from fp16's bias to fp32's, and normalises subnormals on the way.
  const float f = float_of(magnitude << 13) * float_of(0x77800000u);
  return float_of(bits_of(f) | sign);
}
FASTATTN_INLINE void narrow(float x, float* p) { *p = x; }
FASTATTN_INLINE void narrow(float x, bf16* p) {
  const uint32_t u = bits_of(x);
  p->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
FASTATTN_INLINE void narrow(float x, f16* p) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    h = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds the subnormal to a multiple of 2^-24
    h = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    h = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | h);
}
template <class T>
FASTATTN_INLINE F32 load(const T* p) {
  return lanes<F32>([&](int i) { return widen(p[i]); });
}
template <class T>
FASTATTN_INLINE F32 load_first(const T* p, int64_t n) {
  return lanes<F32>([&](int i) { return i < n ? widen(p[i]) : 0.f; });
}
FASTATTN_INLINE Mask load_bool(const uint8_t* p) { return lanes<Mask>([&](int i) { return p[i] != 0; }); }
FASTATTN_INLINE Mask load_bool_first(const uint8_t* p, int64_t n) {
  return lanes<Mask>([&](int i) { return i < n && p[i] != 0; });
}
template <class T>
FASTATTN_INLINE void store(T* p, F32 x) {
  FASTATTN_UNROLL for (int i = 0; i < kLanes; i++) narrow(x.v[i], p + i);
}
template <class T>
FASTATTN_INLINE void store_first(T* p, F32 x, int64_t n) {
  for (int i = 0; i < kLanes && i < n; i++) narrow(x.v[i], p + i);
}

FASTATTN_INLINE void load_two(const bf16* p, F32& a, F32& b) {
  a = load(p);
  b = load(p + kLanes);
}
FASTATTN_INLINE void store_two(bf16* p, F32 a, F32 b) {
  store(p, a);
  store(p + kLanes, b);
}
FASTATTN_INLINE void split_two(F32&, F32&) {}
FASTATTN_INLINE void join_two(F32&, F32&) {}

FASTATTN_INLINE void transpose_tile(const float* s, int64_t ls, float* d, int64_t ld) {
  for (int r = 0; r < kLanes; r++)
    for (int c = 0; c < kLanes; c++) d[c * ld + r] = s[r * ls + c];
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
