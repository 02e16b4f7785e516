// Small matrix products on register tiles. Queries (or head dimensions) lie in the lanes, the other operand is
// broadcast one element at a time from wherever it is, so that only Q^T and dO^T ever need another layout.
#pragma once
#include "constant.h"
#include "simd/simd.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kVectors = kRegisters >= 32 ? 4 : 3;
constexpr int64_t kPanel = kVectors * kLanes;  // queries worked on together
constexpr int64_t kKeyBlock = 128;             // keys worked on together
constexpr int64_t kRowPad = 8;                 // rows come in groups of this many, a multiple of every tile_rows()

// Rows of a register tile that is `vectors` wide: enough sums in flight to hide the latency of a multiply-add.
constexpr int tile_rows(int vectors) { return vectors >= 3 ? 4 : kRegisters >= 32 || vectors == 1 ? 8 : 4; }

// The two kinds of arithmetic. A Step is what one lane consumes of the inner dimension at a time.
struct Single {
  using Step = float;
  using Vector = F32;
  static constexpr int64_t kPack = 1;
  static constexpr bool kPaired = false;
  static FASTATTN_INLINE Vector load(const Step* p) { return fastattn::FASTATTN_ISA::load(p); }
  static FASTATTN_INLINE Vector broadcast(const char* p) {
    float x;
    memcpy(&x, p, sizeof(x));
    return splat(x);
  }
  static FASTATTN_INLINE Vector of_words(F32 words) { return words; }
  static FASTATTN_INLINE F32 multiply_add(Vector a, Vector b, F32 sum) { return fma(a, b, sum); }
};

#if defined(FASTATTN_HAS_DOT2)
struct Paired {
  using Step = uint32_t;  // two bf16
  using Vector = Pairs;
  static constexpr int64_t kPack = 2;
  static constexpr bool kPaired = true;
  static FASTATTN_INLINE Vector load(const Step* p) { return load_pairs(p); }
  static FASTATTN_INLINE Vector broadcast(const char* p) {
    uint32_t pair;
    memcpy(&pair, p, sizeof(pair));
    return splat_pair(pair);
  }
  static FASTATTN_INLINE Vector of_words(F32 words) { return as_pairs(words); }
  static FASTATTN_INLINE F32 multiply_add(Vector a, Vector b, F32 sum) { return dot2(sum, a, b); }
  static FASTATTN_INLINE void store_pair(Step* p, F32 low, F32 high) { store_pairs(p, pack_pairs(low, high)); }
  static FASTATTN_INLINE void store_row(Step* p, F32 low, F32 high) { store_pairs(p, narrow_two(low, high)); }
  static FASTATTN_INLINE void interleave(const bf16* low, const bf16* high, int64_t n, Step* out) {
    interleave_rows(low, high, n, out);
  }
};
#else
using Paired = Single;  // bf16 is widened to fp32
#endif

// A matrix in memory, read one element (Single) or pair of neighbours in a row (Paired) at a time.
struct Operand {
  const char* data;
  int64_t row;  // bytes from one row to the next
};

template <int kRows, int kWide>
struct Tile {
  F32 c[kRows][kWide];
};

template <int kRows, int kWide>
FASTATTN_INLINE void clear(Tile<kRows, kWide>& tile) {
  FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
    FASTATTN_UNROLL for (int n = 0; n < kWide; n++) tile.c[m][n] = zero();
  }
}

// Steps whose products are summed before they join a sum: where a product and a sum are rounded apart, long sums would
// round twice as often as elsewhere.
constexpr int64_t kTogether = kFusedFma ? 1 : 4;
template <class G>
FASTATTN_INLINE F32 add_four(const typename G::Vector (&a)[4], const typename G::Vector (&b)[4], F32 sum) {
  if constexpr (kTogether == 4) {
    F32 products[4];
    for (int i = 0; i < 4; i++) products[i] = G::multiply_add(a[i], b[i], zero());
    return sum + ((products[0] + products[1]) + (products[2] + products[3]));
  }
  FASTATTN_UNROLL for (int i = 0; i < 4; i++) sum = G::multiply_add(a[i], b[i], sum);
  return sum;
}

// tile[m][n] += sum over k < steps of a[m * a_row + k * a_step] * b[k * b_row + n], for vectors n >= kFirst.
// Leaves a and b behind the last step.
template <class G, int kFirst, int kRows, int kWide>
FASTATTN_INLINE void multiply(Tile<kRows, kWide>& tile, const char*& a, int64_t a_row, int64_t a_step,
                              const typename G::Step*& b, int64_t b_row, int64_t steps) {
  if constexpr (kTogether == 4) {
    for (; steps > 0; steps -= 4) {
      const int64_t some = steps < 4 ? steps : 4;
      FASTATTN_UNROLL for (int n = kFirst; n < kWide; n++) {
        typename G::Vector right[4] = {};
        for (int64_t k = 0; k < some; k++) right[k] = G::load(b + k * b_row + n * kLanes);
        FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
          typename G::Vector left[4] = {};
          for (int64_t k = 0; k < some; k++) left[k] = G::broadcast(a + m * a_row + k * a_step);
          tile.c[m][n] = add_four<G>(left, right, tile.c[m][n]);
        }
      }
      a += some * a_step;
      b += some * b_row;
    }
    return;
  }
  for (int64_t k = 0; k < steps; k++) {
    typename G::Vector right[kWide];
    FASTATTN_UNROLL for (int n = kFirst; n < kWide; n++) right[n] = G::load(b + n * kLanes);
    FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
      const typename G::Vector left = G::broadcast(a + m * a_row);
      FASTATTN_UNROLL for (int n = kFirst; n < kWide; n++) tile.c[m][n] = G::multiply_add(left, right[n], tile.c[m][n]);
    }
    a += a_step;
    b += b_row;
  }
}

// The same, with other work done on the way: `other(m, n)` for m < kMost, n < kWide, a little at a time, so that its
// chains of dependent instructions wait without anybody waiting for them.
template <class G, int kMost, int kRows, int kWide, class Other>
FASTATTN_INLINE void multiply_among(Tile<kRows, kWide>& tile, const char* a, int64_t a_row, int64_t a_step,
                                    const typename G::Step* b, int64_t b_row, int64_t steps, Other other) {
  const int64_t some = steps / (kMost * kWide * kTogether) * kTogether;
  for (int m = 0; m < kMost; m++)
    for (int n = 0; n < kWide; n++) {
      other(m, n);
      multiply<G, 0>(tile, a, a_row, a_step, b, b_row, some);
    }
  multiply<G, 0>(tile, a, a_row, a_step, b, b_row, steps - some * (kMost * kWide));
}

// Calls f with the compile-time constant that equals `count` (1 .. kVectors).
template <class F>
FASTATTN_INLINE void with_width(int count, F f) {
  switch (count) {
    case 1:
      return f(Constant<1>{});
    case 2:
      return f(Constant<2>{});
    case 3:
      return f(Constant<3>{});
    default:
      return f(Constant<kVectors>{});
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
