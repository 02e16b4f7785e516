// No instruction set in particular: four lanes in the compiler's own vector types, which become whatever the
// machine's baseline has (SSE2 on x86-64, or single instructions one after the other).
#pragma once

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kLanes = 4;
constexpr int kRegisters = 16;
constexpr bool kFusedFma = false;

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));

struct F32 {
  Floats v;
};
struct I32 {
  Ints v;
};
struct Mask {
  Ints v;  // -1 or 0
};

FASTATTN_INLINE F32 splat(float x) { return {Floats{x, x, x, x}}; }
FASTATTN_INLINE F32 zero() { return {Floats{}}; }
FASTATTN_INLINE F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
FASTATTN_INLINE F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
FASTATTN_INLINE F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
FASTATTN_INLINE F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
FASTATTN_INLINE F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
FASTATTN_INLINE F32 fms(F32 a, F32 b, F32 c) { return {a.v * b.v - c.v}; }
FASTATTN_INLINE F32 fnma(F32 a, F32 b, F32 c) { return {c.v - a.v * b.v}; }
FASTATTN_INLINE F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
FASTATTN_INLINE F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }
FASTATTN_INLINE F32 sqrt(F32 a) {
  return {Floats{__builtin_sqrtf(a.v[0]), __builtin_sqrtf(a.v[1]), __builtin_sqrtf(a.v[2]), __builtin_sqrtf(a.v[3])}};
}
FASTATTN_INLINE float reduce_add(F32 a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
FASTATTN_INLINE float reduce_max(F32 a) {
  const float even = a.v[0] > a.v[2] ? a.v[0] : a.v[2], odd = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return even > odd ? even : odd;
}

FASTATTN_INLINE I32 splat_int(int32_t x) { return {Ints{x, x, x, x}}; }
FASTATTN_INLINE I32 iota() { return {Ints{0, 1, 2, 3}}; }
// Sums wrap around, as the lanes of every other instruction set do.
FASTATTN_INLINE I32 operator+(I32 a, I32 b) { return {(Ints)((Words)a.v + (Words)b.v)}; }
FASTATTN_INLINE I32 operator-(I32 a, I32 b) { return {(Ints)((Words)a.v - (Words)b.v)}; }
FASTATTN_INLINE I32 operator^(I32 a, I32 b) { return {a.v ^ b.v}; }
FASTATTN_INLINE I32 operator&(I32 a, I32 b) { return {a.v & b.v}; }
FASTATTN_INLINE F32 to_float(I32 a) { return {__builtin_convertvector(a.v, Floats)}; }
FASTATTN_INLINE Mask operator>=(I32 a, I32 b) { return {a.v >= b.v}; }
FASTATTN_INLINE Mask operator<(I32 a, I32 b) { return {a.v < b.v}; }
FASTATTN_INLINE I32 load_ints(const int32_t* p) { return {Ints{p[0], p[1], p[2], p[3]}}; }
FASTATTN_INLINE Mask operator==(I32 a, I32 b) { return {a.v == b.v}; }
FASTATTN_INLINE Mask unsigned_ge(I32 a, I32 b) { return {(Words)a.v >= (Words)b.v}; }
FASTATTN_INLINE void mul_wide(I32 a, I32 b, I32& hi, I32& lo) {
  for (int i = 0; i < kLanes; i++) {
    const uint64_t product =
        static_cast<uint64_t>(static_cast<uint32_t>(a.v[i])) * static_cast<uint64_t>(static_cast<uint32_t>(b.v[i]));
    hi.v[i] = static_cast<int32_t>(static_cast<uint32_t>(product >> 32));
    lo.v[i] = static_cast<int32_t>(static_cast<uint32_t>(product));
  }
}

FASTATTN_INLINE Mask first(int64_t n) { return iota() < splat_int(static_cast<int32_t>(n > kLanes ? kLanes : n)); }
FASTATTN_INLINE Mask operator<(F32 a, F32 b) { return {a.v < b.v}; }
FASTATTN_INLINE Mask operator>(F32 a, F32 b) { return {a.v > b.v}; }
FASTATTN_INLINE Mask operator>=(F32 a, F32 b) { return {a.v >= b.v}; }
FASTATTN_INLINE Mask operator==(F32 a, F32 b) { return {a.v == b.v}; }
FASTATTN_INLINE Mask operator&(Mask a, Mask b) { return {a.v & b.v}; }
FASTATTN_INLINE Mask operator|(Mask a, Mask b) { return {a.v | b.v}; }
FASTATTN_INLINE Mask operator~(Mask a) { return {~a.v}; }
FASTATTN_INLINE bool any(Mask a) { return (a.v[0] | a.v[1] | a.v[2] | a.v[3]) != 0; }
FASTATTN_INLINE bool all(Mask a) { return (a.v[0] & a.v[1] & a.v[2] & a.v[3]) != 0; }
FASTATTN_INLINE F32 select(Mask m, F32 a, F32 b) { return {m.v ? a.v : b.v}; }
FASTATTN_INLINE I32 select(Mask m, I32 a, I32 b) { return {m.v ? a.v : b.v}; }

// Adding and taking away 1.5 * 2^23 rounds to an integer; larger numbers are integers already.
FASTATTN_INLINE F32 round_nearest(F32 a) {
  const F32 magic = splat(12582912.f), rounded = (a + magic) - magic, limit = splat(4194304.f);
  return select((a < limit) & (a > zero() - limit), rounded, a);
}
// Two factors, so that results as small as the subnormals come out right; n beyond +-252 saturates.
FASTATTN_INLINE F32 scale2(F32 x, F32 n) {
  const F32 number = select(n == n, n, zero());  // where n is NaN, so is x
  const F32 clamped = min(splat(252.f), max(splat(-252.f), number));
  const Ints whole = __builtin_convertvector(clamped.v, Ints), half = whole >> 1;
  const F32 a = {(Floats)((half + 127) << 23)}, b = {(Floats)((whole - half + 127) << 23)};
  return select(n == splat(-__builtin_inff()), zero(), x * a * b);
}
FASTATTN_INLINE F32 scale2_small(F32 x, F32 n) {
  const F32 number = select(n == n, n, zero());  // where n is NaN, so is x
  const Ints whole = __builtin_convertvector(max(splat(-126.f), number).v, Ints);
  return select(number < splat(-125.f), zero(), F32{(Floats)((Ints)x.v + (whole << 23))});
}
constexpr int kSteps = 16;
FASTATTN_INLINE F32 step_power(F32 s, F32 m) {
  // Less what the lowest bits of the shifted sum will add to them.
  static const uint32_t powers[kSteps] = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
                                          0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
                                          0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
  const Words sum = (Words)s.v, at = sum & (kSteps - 1u);
  const Words power = {powers[at[0]], powers[at[1]], powers[at[2]], powers[at[3]]};
  return select(m < splat(-125.f), zero(), F32{(Floats)(power + (sum << 19))});
}
FASTATTN_INLINE F32 split_exponent(F32 x, F32& mantissa) {
  const Words bits = (Words)x.v;
  mantissa.v = (Floats)((bits & 0x7fffffu) | 0x3f800000u) + x.v * 0.f;
  return {__builtin_convertvector((Ints)(bits >> 23) - 127, Floats)};
}

FASTATTN_INLINE F32 widen(const float* p) { return {Floats{p[0], p[1], p[2], p[3]}}; }
FASTATTN_INLINE F32 widen(const bf16* p) { return {(Floats)(Words{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16)}; }
FASTATTN_INLINE F32 widen(const f16* p) {
  const Words half = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
  const Words sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  // 2^112 lifts the exponent from fp16's bias to fp32's, and normalises subnormals on the way.
  const Words lift = {0x77800000u, 0x77800000u, 0x77800000u, 0x77800000u};
  const Words finite = (Words)((Floats)(magnitude << 13) * (Floats)lift);
  const Words strange = 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  return {(Floats)(sign | (magnitude >= 0x7c00u ? strange : finite))};
}
FASTATTN_INLINE Words narrow(const bf16*, F32 x) {
  const Words u = (Words)x.v, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return x.v == x.v ? rounded : Words{0x7fc0u, 0x7fc0u, 0x7fc0u, 0x7fc0u};
}
FASTATTN_INLINE Words narrow(const f16*, F32 x) {
  const Words u = (Words)x.v, sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 rounds to a multiple of 2^-24, the distance of subnormals.
  const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
  const Words infinite = {0x7c00u, 0x7c00u, 0x7c00u, 0x7c00u}, nan = {0x7e00u, 0x7e00u, 0x7e00u, 0x7e00u};
  Words half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? infinite : half;  // 65520 and more
  half = magnitude > 0x7f800000u ? nan : half;
  return sign | half;
}

template <class T>
FASTATTN_INLINE F32 load(const T* p) {
  return widen(p);
}
template <class T>
FASTATTN_INLINE F32 load_first(const T* p, int64_t n) {
  T some[kLanes] = {};
  for (int i = 0; i < kLanes && i < n; i++) some[i] = p[i];
  return widen(some);
}
FASTATTN_INLINE Mask load_bool(const uint8_t* p) { return {Ints{p[0], p[1], p[2], p[3]} != 0}; }
FASTATTN_INLINE Mask load_bool_first(const uint8_t* p, int64_t n) {
  uint8_t some[kLanes] = {};
  for (int i = 0; i < kLanes && i < n; i++) some[i] = p[i];
  return load_bool(some);
}
FASTATTN_INLINE void store_first(float* p, F32 x, int64_t n) {
  for (int i = 0; i < kLanes && i < n; i++) p[i] = x.v[i];
}
template <class T>
FASTATTN_INLINE void store_first(T* p, F32 x, int64_t n) {
  const Words bits = narrow(p, x);
  for (int i = 0; i < kLanes && i < n; i++) p[i].bits = static_cast<uint16_t>(bits[i]);
}
template <class T>
FASTATTN_INLINE void store(T* p, F32 x) {
  store_first(p, x, kLanes);
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

FASTATTN_INLINE void deinterleave(F32& a, F32& b) {
  const Floats even = {a.v[0], a.v[2], b.v[0], b.v[2]}, odd = {a.v[1], a.v[3], b.v[1], b.v[3]};
  a.v = even;
  b.v = odd;
}
FASTATTN_INLINE F32 sum_four(F32 a, F32 b, F32 c, F32 d) {
  return {Floats{reduce_add(a), reduce_add(b), reduce_add(c), reduce_add(d)}};
}
FASTATTN_INLINE F32 join_sums(const F32* t) { return t[0]; }

FASTATTN_INLINE void sum_pairs(F32 a, F32 b, F32 c, F32 d, F32& first, F32& last) {
  first.v = Floats{a.v[0] + a.v[1], b.v[0] + b.v[1], c.v[0] + c.v[1], d.v[0] + d.v[1]};
  last.v = Floats{a.v[2] + a.v[3], b.v[2] + b.v[3], c.v[2] + c.v[3], d.v[2] + d.v[3]};
}
template <class T>
FASTATTN_INLINE void repeat_four(const T* p, F32& a, F32& b) {
  const F32 x = load(p);
  a.v = Floats{x.v[0], x.v[1], x.v[0], x.v[1]};
  b.v = Floats{x.v[2], x.v[3], x.v[2], x.v[3]};
}
FASTATTN_INLINE void transpose_fours(F32*) {}

FASTATTN_INLINE void transpose(F32 (&x)[kLanes]) {
  for (int r = 0; r < kLanes; r++)
    for (int c = r + 1; c < kLanes; c++) {
      const float upper = x[r].v[c];
      x[r].v[c] = x[c].v[r];
      x[c].v[r] = upper;
    }
}

FASTATTN_INLINE void add_moments(const bf16* p, F32& sum, F32& squares) {
  const F32 a = load(p), b = load(p + kLanes);
  sum = sum + (a + b);
  squares = fma(b, b, fma(a, a, squares));
}
FASTATTN_INLINE void interleave(F32& a, F32& b) {
  const F32 x = a, y = b;
  a = {Floats{x.v[0], y.v[0], x.v[1], y.v[1]}};
  b = {Floats{x.v[2], y.v[2], x.v[3], y.v[3]}};
}

template <class T>
FASTATTN_INLINE void stream_two(T* p, F32 a, F32 b) {
  store(p, a);
  store(p + kLanes, b);
}
FASTATTN_INLINE void finish_streams() {}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
