// The two products of decoding. Keys and values are read as they lie in memory, each row once from beyond the caches;
// the rows of query that share them (grouped heads, several queries) share every load.
#pragma once
#include "../cpu/row.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kDecodeTile = kRegisters >= 32 ? 4 : 2;  // rows of query that share a load
constexpr int64_t kDecodeBlock = 64;                   // most rows of the cache between two looks at what to fetch
constexpr int64_t kDecodeBlockBytes = 16 << 10;

template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

// What p points to is loaded again from here on: kept in registers over the whole loop it would have to be spilled.
template <class T>
FASTATTN_INLINE void load_anew(const T*& p) {
  asm("" : "+r"(p));
}

// Rows of the cache: bytes from `base` on.
struct Rows {
  const int64_t* at;
  const char* base;

  FASTATTN_INLINE const char* operator[](int64_t j) const { return base + at[j]; }
  FASTATTN_INLINE Rows from(int64_t j, int64_t bytes) const { return {at + j, base + bytes}; }
};

// Rows of the cache that come next, fetched while others are worked on: the hardware does not see from one head, page
// or tensor to the next.
struct Ahead {
  Rows rows;
  int64_t count, bytes;

  // Rows j .. j + 3: whatever is behind the last one is a row, too.
  template <int64_t kBytes>
  FASTATTN_INLINE void fetch_four(int64_t j) const {
    if (j >= count) return;
    const int64_t end = kBytes > 0 ? kBytes : bytes;
    FASTATTN_UNROLL for (int i = 0; i < 4; i++) {
      const char* const row = rows[j + i];
      FASTATTN_UNROLL for (int64_t at = 0; at < end; at += 64) __builtin_prefetch(row + at);
    }
  }
};

// Elements widened to fp32, in the order in which that is cheapest; queries and sums are in the same order.
template <class T>
struct Widening {
  using Element = T;
  using Query = float;
  using Weight = float;
  static constexpr int64_t kKeysAtOnce = 1;

  template <class Where>
  static FASTATTN_INLINE void pack(const T* from, Query* to, Where where) {
    put(to, get(from, Cheapest{}, where), Natural{}, Whole{});
  }
  static FASTATTN_INLINE F32x2 power(F32x2 x) { return exp(x); }
  template <class Where>
  static FASTATTN_INLINE F32x2 natural(F32x2 x, Where where) {
    return from_cheapest(static_cast<const T*>(nullptr), x, where);
  }

  template <int kRows, class Where>
  static FASTATTN_INLINE void dot(F32 (&sums)[kRows][4], const Query* query, int64_t query_row,
                                  const T* const (&keys)[4], int64_t c, Where where) {
    F32x2 q[kRows];
    FASTATTN_UNROLL for (int r = 0; r < kRows; r++) q[r] = get(query + r * query_row + c, Natural{}, Whole{});
    FASTATTN_UNROLL for (int i = 0; i < 4; i++) {
      const F32x2 k = get(keys[i] + c, Cheapest{}, where);
      FASTATTN_UNROLL for (int r = 0; r < kRows; r++) sums[r][i] = fma(q[r].a, k.a, sums[r][i]);
      FASTATTN_UNROLL for (int r = 0; r < kRows; r++) sums[r][i] = fma(q[r].b, k.b, sums[r][i]);
    }
  }

  // sums += weight of a key x kWide pairs of its columns.
  template <bool, int kRows, int kWide, class Where>
  static FASTATTN_INLINE void weigh(F32x2 (&sums)[kRows][kWide], const Weight* weights, int64_t weights_row,
                                    const T* value, const T*, Where where) {
    F32x2 w[kRows];
    FASTATTN_UNROLL for (int r = 0; r < kRows; r++) w[r] = splat2(weights[r * weights_row]);
    FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
      const F32x2 v = get(value + n * kPair, Cheapest{}, where);
      FASTATTN_UNROLL for (int r = 0; r < kRows; r++) sums[r][n] = fma(w[r], v, sums[r][n]);
    }
  }
};

#if defined(FASTATTN_HAS_DOT2)
// bf16 by dot products of pairs: neighbours in a row meet queries, neighbours in a column meet weights.
struct Pairing {
  using Element = bf16;
  using Query = bf16;
  using Weight = bf16;
  static constexpr int64_t kKeysAtOnce = 2;

  static FASTATTN_INLINE Pairs take(const bf16* p, Whole) { return load_pairs(p); }
  static FASTATTN_INLINE Pairs take(const bf16* p, Part part) { return load_pairs_first(p, part.n); }
  template <class Where>
  static FASTATTN_INLINE void pack(const bf16* from, Query* to, Where where) {
    store_pairs(reinterpret_cast<uint32_t*>(to), take(from, where));
  }
  // Exact enough for weights that are rounded to bf16.
  static FASTATTN_INLINE F32x2 power(F32x2 x) { return exp2<3>(x * splat2(kLog2e)); }
  template <class Where>
  static FASTATTN_INLINE F32x2 natural(F32x2 x, Where) {
    order_columns(x.a, x.b);
    return x;
  }

  template <int kRows, class Where>
  static FASTATTN_INLINE void dot(F32 (&sums)[kRows][4], const Query* query, int64_t query_row,
                                  const bf16* const (&keys)[4], int64_t c, Where where) {
    Pairs q[kRows];
    FASTATTN_UNROLL for (int r = 0; r < kRows; r++) q[r] = load_pairs(query + r * query_row + c);
    FASTATTN_UNROLL for (int i = 0; i < 4; i++) {
      const Pairs k = take(keys[i] + c, where);
      FASTATTN_UNROLL for (int r = 0; r < kRows; r++) sums[r][i] = dot2(sums[r][i], q[r], k);
    }
  }

  // Of two keys, or of the first one alone.
  template <bool kBoth, int kRows, int kWide, class Where>
  static FASTATTN_INLINE void weigh(F32x2 (&sums)[kRows][kWide], const Weight* weights, int64_t weights_row,
                                    const bf16* even, const bf16* odd, Where where) {
    Pairs w[kRows];
    FASTATTN_UNROLL for (int r = 0; r < kRows; r++) {
      uint32_t pair = weights[r * weights_row].bits;
      if constexpr (kBoth) memcpy(&pair, weights + r * weights_row, sizeof(pair));
      w[r] = splat_pair(pair);
    }
    FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
      Pairs a, b;
      zip_rows(take(even + n * kPair, where), kBoth ? take(odd + n * kPair, where) : zero_pairs(), a, b);
      FASTATTN_UNROLL for (int r = 0; r < kRows; r++) {
        sums[r][n].a = dot2(sums[r][n].a, w[r], a);
        sums[r][n].b = dot2(sums[r][n].b, w[r], b);
      }
    }
  }
};
#endif

// scores[r][j] = query[r] . key[j] for j < count, rounded up to kLanes: `rows` has as many, the last ones repeated.
// kColumns: how many columns both keys and values have, where that is worth a loop of its own; else 0.
template <class A, int kRows, int64_t kColumns>
__attribute__((noinline)) void score_rows(const typename A::Query* query, int64_t query_row, const Rows rows,
                                          int64_t count, int64_t any_columns, float* scores, int64_t scores_row,
                                          const Ahead ahead) {
  using T = typename A::Element;
  const int64_t columns = kColumns > 0 ? kColumns : any_columns;
  for (int64_t j = 0; j < count; j += kLanes) {
    F32 blocks[kRows][kLanes / 4];
    FASTATTN_UNROLL for (int g = 0; g < kLanes / 4; g++) {
      const T* keys[4];
      FASTATTN_UNROLL for (int i = 0; i < 4; i++) keys[i] = reinterpret_cast<const T*>(rows[j + g * 4 + i]);
      ahead.fetch_four<kColumns * int64_t{sizeof(T)}>(j + g * 4);
      if constexpr (kRows > 2) load_anew(query);
      F32 sums[kRows][4];
      FASTATTN_UNROLL for (int r = 0; r < kRows; r++) {
        FASTATTN_UNROLL for (int i = 0; i < 4; i++) sums[r][i] = zero();
      }
      if constexpr (kColumns > 0) {
        FASTATTN_UNROLL for (int64_t c = 0; c < kColumns; c += kPair)
            A::template dot<kRows>(sums, query, query_row, keys, c, Whole{});
      } else {
        int64_t c = 0;
        for (; c + kPair <= columns; c += kPair) A::template dot<kRows>(sums, query, query_row, keys, c, Whole{});
        if (c < columns) A::template dot<kRows>(sums, query, query_row, keys, c, Part{columns - c});
      }
      FASTATTN_UNROLL for (int r = 0; r < kRows; r++) blocks[r][g] =
          sum_four(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
    }
    FASTATTN_UNROLL for (int r = 0; r < kRows; r++) store(scores + r * scores_row + j, join_sums(blocks[r]));
  }
}

// sums[r] += weights[r][j] * value[j] over j < count, in the arithmetic's order of columns, for kWide pairs of them.
template <class A, int kRows, int kWide, int64_t kColumns, class Where>
FASTATTN_INLINE void weigh_columns(const typename A::Weight* weights, int64_t weights_row, const Rows& rows,
                                   int64_t count, float* sums, int64_t sums_row, const Ahead& ahead, Where where) {
  using T = typename A::Element;
  // Sums in flight hide the latency of a multiply-add.
  constexpr int kSets = 2 * kRows * kWide <= kRegisters / 4 ? 2 : 1;
  const auto value = [&](int64_t j) FASTATTN_LAMBDA { return reinterpret_cast<const T*>(rows[j]); };
  F32x2 acc[kSets][kRows][kWide];
  FASTATTN_UNROLL for (int r = 0; r < kRows; r++) {
    FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
      acc[0][r][n] = get(sums + r * sums_row + n * kPair, Natural{}, Whole{});
      if constexpr (kSets > 1) acc[1][r][n] = splat2(0.f);
    }
  }
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    ahead.fetch_four<kColumns * int64_t{sizeof(T)}>(j);
    FASTATTN_UNROLL for (int i = 0; i < 4; i += A::kKeysAtOnce)
        A::template weigh<true>(acc[i / A::kKeysAtOnce % kSets], weights + j + i, weights_row, value(j + i),
                                value(j + i + A::kKeysAtOnce - 1), where);
  }
  for (; j + A::kKeysAtOnce <= count; j += A::kKeysAtOnce)
    A::template weigh<true>(acc[0], weights + j, weights_row, value(j), value(j + A::kKeysAtOnce - 1), where);
  if (j < count) A::template weigh<false>(acc[0], weights + j, weights_row, value(j), value(j), where);
  FASTATTN_UNROLL for (int r = 0; r < kRows; r++) {
    FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
      if constexpr (kSets > 1) acc[0][r][n] = acc[0][r][n] + acc[1][r][n];
      put(sums + r * sums_row + n * kPair, acc[0][r][n], Natural{}, Whole{});
    }
  }
}

template <class A, int kRows, int64_t kColumns>
__attribute__((noinline)) void weigh_rows(const typename A::Weight* weights, int64_t weights_row, const Rows rows,
                                          int64_t count, int64_t any_columns, float* sums, int64_t sums_row,
                                          Ahead ahead) {
  constexpr int kWide = kRows * 4 <= kRegisters / 4 ? 4 : kRows * 2 <= kRegisters / 4 ? 2 : 1;
  constexpr int64_t kBytes = sizeof(typename A::Element);
  const int64_t columns = kColumns > 0 ? kColumns : any_columns;
  int64_t c = 0;
  const auto columns_of = [&](auto wide, auto where) FASTATTN_LAMBDA {
    weigh_columns<A, kRows, decltype(wide)::value, kColumns>(weights, weights_row, rows.from(0, c * kBytes), count,
                                                             sums + c, sums_row, ahead, where);
    ahead.count = 0;
    c += decltype(wide)::value * kPair;
  };
  while (c + kWide * kPair <= columns) columns_of(Number<kWide>{}, Whole{});
  if (kWide > 2 && c + 2 * kPair <= columns) columns_of(Number<2>{}, Whole{});
  if (kWide > 1 && c + kPair <= columns) columns_of(Number<1>{}, Whole{});
  if (c < columns) columns_of(Number<1>{}, Part{columns - c});
}

// body(row, number of rows as a type) for tiles of up to kDecodeTile rows.
template <class Body>
FASTATTN_INLINE void for_row_tiles(int64_t rows, Body body) {
  for (int64_t row = 0; row < rows; row += kDecodeTile) {
    switch (min_of(rows - row, kDecodeTile)) {
      case 1:
        body(row, Number<1>{});
        break;
      case 2:
        body(row, Number<2>{});
        break;
      case 3:
        body(row, Number<kDecodeTile >= 3 ? 3 : 1>{});
        break;
      default:
        body(row, Number<kDecodeTile>{});
    }
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
