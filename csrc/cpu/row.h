// Walking along a row, two registers at a time.
#pragma once
#include "math.h"

#define FASTATTN_LAMBDA __attribute__((always_inline))

namespace fastattn::FASTATTN_ISA {
namespace {

// 2*kLanes columns. Which column sits in which lane is a matter of the order they were loaded in: `Natural`, or
// `Cheapest`, which differs for bf16. Sums do not care; what meets column by column must be in the same order.
struct F32x2 {
  F32 a, b;
};
constexpr int64_t kPair = 2 * kLanes;

FASTATTN_INLINE F32x2 splat2(float x) { return {splat(x), splat(x)}; }
FASTATTN_INLINE F32x2 operator+(F32x2 x, F32x2 y) { return {x.a + y.a, x.b + y.b}; }
FASTATTN_INLINE F32x2 operator-(F32x2 x, F32x2 y) { return {x.a - y.a, x.b - y.b}; }
FASTATTN_INLINE F32x2 operator*(F32x2 x, F32x2 y) { return {x.a * y.a, x.b * y.b}; }
FASTATTN_INLINE F32x2 operator/(F32x2 x, F32x2 y) { return {x.a / y.a, x.b / y.b}; }
FASTATTN_INLINE F32x2 fma(F32x2 x, F32x2 y, F32x2 z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
FASTATTN_INLINE F32x2 max(F32x2 x, F32x2 y) { return {max(x.a, y.a), max(x.b, y.b)}; }
struct Maskx2 {
  Mask a, b;
};
FASTATTN_INLINE Maskx2 operator==(F32x2 x, F32x2 y) { return {x.a == y.a, x.b == y.b}; }
FASTATTN_INLINE F32x2 select(Maskx2 m, F32x2 x, F32x2 y) { return {select(m.a, x.a, y.a), select(m.b, x.b, y.b)}; }
FASTATTN_INLINE F32x2 exp(F32x2 x) { return {exp(x.a), exp(x.b)}; }
template <int Degree>
FASTATTN_INLINE F32x2 exp2(F32x2 x) {
  return {exp2<Degree>(x.a), exp2<Degree>(x.b)};
}
FASTATTN_INLINE float reduce_add(F32x2 x) { return reduce_add(x.a + x.b); }
FASTATTN_INLINE float reduce_max(F32x2 x) { return reduce_max(max(x.a, x.b)); }

// Fetches kPair columns of a row to come; past the end of memory it does nothing.
template <class T>
FASTATTN_INLINE void prefetch_pair(const T* p) {
  FASTATTN_UNROLL for (int64_t byte = 0; byte < kPair * static_cast<int64_t>(sizeof(T)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(p) + byte);
}

template <class T>
constexpr bool kOwnOrder = false;  // Cheapest is not Natural
template <>
constexpr bool kOwnOrder<bf16> = true;

struct Natural {};
struct Cheapest {};
struct Whole {};  // kPair columns
struct Part {     // the last n < kPair columns of a row, always in their natural order
  int64_t n;
  int64_t low() const { return n < kLanes ? n : kLanes; }
  int64_t high() const { return n < kLanes ? 0 : n - kLanes; }
};

template <class T>
FASTATTN_INLINE F32x2 get(const T* p, Natural, Whole) {
  return {load(p), load(p + kLanes)};
}
template <class T>
FASTATTN_INLINE F32x2 get(const T* p, Cheapest, Whole) {
  return {load(p), load(p + kLanes)};
}
FASTATTN_INLINE F32x2 get(const bf16* p, Cheapest, Whole) {
  F32x2 x;
  load_two(p, x.a, x.b);
  return x;
}
template <class T, class Order>
FASTATTN_INLINE F32x2 get(const T* p, Order, Part part) {
  return {load_first(p, part.low()), load_first(p + kLanes, part.high())};
}

// From the natural order into that of Cheapest loads of a T, and back.
template <class T, class Where>
FASTATTN_INLINE F32x2 to_cheapest(const T*, F32x2 x, Where) {
  return x;
}
FASTATTN_INLINE F32x2 to_cheapest(const bf16*, F32x2 x, Whole) {
  split_two(x.a, x.b);
  return x;
}
template <class T, class Where>
FASTATTN_INLINE F32x2 from_cheapest(const T*, F32x2 x, Where) {
  return x;
}
FASTATTN_INLINE F32x2 from_cheapest(const bf16*, F32x2 x, Whole) {
  join_two(x.a, x.b);
  return x;
}

template <class T>
FASTATTN_INLINE void put(T* p, F32x2 x, Natural, Whole) {
  store(p, x.a);
  store(p + kLanes, x.b);
}
template <class T>
FASTATTN_INLINE void put(T* p, F32x2 x, Cheapest, Whole) {
  store(p, x.a);
  store(p + kLanes, x.b);
}
FASTATTN_INLINE void put(bf16* p, F32x2 x, Cheapest, Whole) { store_two(p, x.a, x.b); }
template <class T, class Order>
FASTATTN_INLINE void put(T* p, F32x2 x, Order, Part part) {
  store_first(p, x.a, part.low());
  store_first(p + kLanes, x.b, part.high());
}

// x in the columns that exist, `other` beyond them.
FASTATTN_INLINE F32x2 keep(F32x2 x, F32, Whole) { return x; }
FASTATTN_INLINE F32x2 keep(F32x2 x, F32 other, Part part) {
  return {select(first(part.low()), x.a, other), select(first(part.high()), x.b, other)};
}

// body(column, i, Whole or Part) along a row; i < Unroll numbers independent accumulators. Narrow registers are not
// worth the code.
template <int Unroll, class Body>
FASTATTN_INLINE void for_columns(int64_t columns, Body body) {
  constexpr int kTogether = kLanes >= 8 || kRegisters >= 32 ? Unroll : 1;
  int64_t c = 0;
  for (; c + kTogether * kPair <= columns; c += kTogether * kPair)
    FASTATTN_UNROLL for (int i = 0; i < kTogether; i++) body(c + i * kPair, i, Whole{});
  if constexpr (kTogether > 1)
    for (; c + kPair <= columns; c += kPair) body(c, 0, Whole{});
  if (c < columns) body(c, 0, Part{columns - c});
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
