// The two products of decoding. Keys and values are read as they lie in memory, each row once from beyond the caches;
// the rows of query that share them (grouped heads, several queries) share every load.
#pragma once
#include "../cpu/constant.h"
#include "../cpu/row.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kDecodeTile = kRegisters >= 32 ? 4 : 2;  // rows of query that share a load of values
// Rows of query that share a load of keys: many lie side by side, two lanes for each, and meet the same four columns of
// a key at a time; few have registers of their own.
constexpr int kSlots = kLanes / 2;
constexpr int kScoreTile = kRegisters >= 32 ? 4 : 2;
constexpr int64_t kFour = 4;
constexpr int64_t kDecodeBlock = 64;  // most rows of the cache between two looks at what to fetch
constexpr int64_t kDecodeBlockBytes = 16 << 10;
constexpr int64_t kDecodeLeadBytes = 4 << 10;

// Rows of the cache: bytes from `base` on.
struct Rows {
  static constexpr bool kFarApart = true;
  const int64_t* at;
  const char* base;

  FASTATTN_INLINE const char* operator[](int64_t j) const { return base + at[j]; }
  FASTATTN_INLINE Rows from(int64_t j, int64_t bytes) const { return {at + j, base + bytes}; }
};

// Rows of kBytes, one right behind the other.
template <int64_t kBytes>
struct TightRows {
  static constexpr bool kFarApart = false;
  const char* base;

  FASTATTN_INLINE const char* operator[](int64_t j) const { return base + j * kBytes; }
  FASTATTN_INLINE TightRows from(int64_t j, int64_t bytes) const { return {base + j * kBytes + bytes}; }
};

// Rows of the cache that come next, fetched while others are worked on: the hardware does not see from one head, page
// or tensor to the next.
template <class Rows>
struct Ahead {
  Rows rows;
  int64_t count, bytes;

  int64_t step = 4;  // rows to fetch for every four that are worked on: a share of 4 where several passes take turns

  // The share of pass number `pass` of `passes`: what a pass fetches arrives while it and the others compute.
  FASTATTN_INLINE Ahead share(int64_t pass, int64_t passes) const {
    const int64_t parts = passes >= 4 ? 4 : passes >= 2 ? 2 : 1;
    const int64_t each = round_up(ceil_div(count, parts), 4);
    if (pass >= parts || pass * each >= count) return {rows, 0, bytes, 4};
    return {rows.from(pass * each, 0), min_of(each, count - pass * each), bytes, 4 / parts};
  }

  // While rows j .. j + 3 are worked on. Whatever is behind the last one is a row, too.
  template <int64_t kBytes>
  FASTATTN_INLINE void fetch(int64_t j) const {
    if (step == 4) {
      if (j >= count) return;
      FASTATTN_UNROLL for (int i = 0; i < 4; i++) fetch_row<kBytes>(j + i);
    } else {
      const int64_t first = j / 4 * step;
      if (first >= count) return;
      for (int64_t i = 0; i < step; i++) fetch_row<kBytes>(first + i);
    }
  }

  template <int64_t kBytes>
  FASTATTN_INLINE void fetch_row(int64_t j) const {
    const int64_t end = kBytes > 0 ? kBytes : bytes;
    const char* const row = rows[j];
    FASTATTN_UNROLL for (int64_t at = 0; at < end; at += 64) __builtin_prefetch(row + at);
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
  static FASTATTN_INLINE void dot(F32 (&sums)[kRows], const Query* query, int64_t query_row, const T* key, int64_t c,
                                  Where where) {
    const F32x2 k = get(key + c, Cheapest{}, where);
    FASTATTN_UNROLL for (int r = 0; r < kRows; r++) {
      const F32x2 q = get(query + r * query_row + c, Natural{}, Whole{});
      sums[r] = fma(q.b, k.b, fma(q.a, k.a, sums[r]));
    }
  }

  // kFour columns of a row for one slot, and their products with those of keys in all slots.
  static FASTATTN_INLINE F32x2 repeat(const T* p) {
    F32x2 x;
    repeat_four(p, x.a, x.b);
    return x;
  }
  static FASTATTN_INLINE void pack_four(const T* from, Query* to, int64_t slot) {
    const F32x2 x = repeat(from);
    store_first(to + slot * 2, x.a, 2);
    store_first(to + kLanes + slot * 2, x.b, 2);
  }
  template <int kKeys>
  static FASTATTN_INLINE void dot_four(F32 (&sums)[kKeys], const Query* query, const T* const (&keys)[kKeys],
                                       int64_t c) {
    const F32x2 q = get(query, Natural{}, Whole{});
    FASTATTN_UNROLL for (int i = 0; i < kKeys; i++) {
      const F32x2 k = repeat(keys[i] + c);
      sums[i] = fma(q.b, k.b, fma(q.a, k.a, sums[i]));
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
  static FASTATTN_INLINE void dot(F32 (&sums)[kRows], const Query* query, int64_t query_row, const bf16* key, int64_t c,
                                  Where where) {
    const Pairs k = take(key + c, where);
    FASTATTN_UNROLL for (int r = 0; r < kRows; r++) sums[r] = dot2(sums[r], load_pairs(query + r * query_row + c), k);
  }

  static FASTATTN_INLINE void pack_four(const bf16* from, Query* to, int64_t slot) {
    memcpy(to + slot * kFour, from, kFour * sizeof(bf16));
  }
  template <int kKeys>
  static FASTATTN_INLINE void dot_four(F32 (&sums)[kKeys], const Query* query, const bf16* const (&keys)[kKeys],
                                       int64_t c) {
    const Pairs q = load_pairs(query);
    FASTATTN_UNROLL for (int i = 0; i < kKeys; i++) sums[i] = dot2(sums[i], q, repeat_pairs(keys[i] + c));
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
template <class A, int kRows, int64_t kColumns, class Rows>
__attribute__((noinline)) void score_rows(const typename A::Query* __restrict query, int64_t query_row, const Rows rows,
                                          int64_t count, int64_t any_columns, float* __restrict scores,
                                          int64_t scores_row, const Ahead<Rows> ahead) {
  using T = typename A::Element;
  const int64_t columns = kColumns > 0 ? kColumns : any_columns;
  for (int64_t j = 0; j < count; j += kLanes) {
    F32 blocks[kRows][kLanes / 4];
    FASTATTN_UNROLL for (int g = 0; g < kLanes / 4; g++) {
      ahead.template fetch<kColumns * int64_t{sizeof(T)}>(j + g * 4);
      F32 sums[4][kRows];
      const T* keys[4];
      FASTATTN_UNROLL for (int i = 0; i < 4; i++) {
        keys[i] = reinterpret_cast<const T*>(rows[j + g * 4 + i]);
        FASTATTN_UNROLL for (int r = 0; r < kRows; r++) sums[i][r] = zero();
      }
      const auto add = [&](int i, int64_t c, auto where)
                           FASTATTN_LAMBDA { A::template dot<kRows>(sums[i], query, query_row, keys[i], c, where); };
      if constexpr (kColumns > 0 && kRows <= 2) {
        // One row behind the other, as memory has them: the hardware follows best.
        FASTATTN_UNROLL for (int i = 0; i < 4; i++) {
          FASTATTN_UNROLL for (int64_t c = 0; c < kColumns; c += kPair) add(i, c, Whole{});
        }
      } else {
        // Four keys share what is loaded of the queries.
        int64_t c = 0;
        for (; c + kPair <= columns; c += kPair) {
          FASTATTN_UNROLL for (int i = 0; i < 4; i++) add(i, c, Whole{});
        }
        if (c < columns) {
          FASTATTN_UNROLL for (int i = 0; i < 4; i++) add(i, c, Part{columns - c});
        }
      }
      FASTATTN_UNROLL for (int r = 0; r < kRows; r++) blocks[r][g] =
          sum_four(sums[0][r], sums[1][r], sums[2][r], sums[3][r]);
    }
    FASTATTN_UNROLL for (int r = 0; r < kRows; r++) store(scores + r * scores_row + j, join_sums(blocks[r]));
  }
}

// The same of up to kSlots rows of query side by side, as pack_four puts them, with a multiple of kFour columns.
template <class A, int64_t kColumns, class Rows>
__attribute__((noinline)) void score_slots(const typename A::Query* query, int64_t live, const Rows rows, int64_t count,
                                           int64_t any_columns, float* scores, int64_t scores_row,
                                           const Ahead<Rows> ahead) {
  using T = typename A::Element;
  // As many sums in flight as hide the latency; where every row has an address, as many as there are registers for
  // them.
  constexpr int kKeys = Rows::kFarApart && kLanes > 8 ? 8 : kLanes;
  constexpr int64_t kStep = kLanes;
  const int64_t columns = kColumns > 0 ? kColumns : any_columns;
  for (int64_t j = 0; j < count; j += kStep) {
    F32 low[kStep / 4], high[kStep / 4];  // of the even and of the odd slots
    FASTATTN_UNROLL for (int64_t g = 0; g < kStep; g += kKeys) {
      const T* keys[kKeys];
      FASTATTN_UNROLL for (int i = 0; i < kKeys; i++) keys[i] = reinterpret_cast<const T*>(rows[j + g + i]);
      // Line by line between the products: all at once they would wait for each other, and the products for them.
      const bool spread = kColumns > 0 && ahead.step == 4 && j + g + kKeys <= ahead.count;
      if (!spread) {
        FASTATTN_UNROLL for (int i = 0; i < kKeys; i += 4)
            ahead.template fetch<kColumns * int64_t{sizeof(T)}>(j + g + i);
      }
      F32 sums[kKeys];
      FASTATTN_UNROLL for (int i = 0; i < kKeys; i++) sums[i] = zero();
      if constexpr (kColumns > 0) {
        constexpr int64_t kLines = kFour * kKeys * int64_t{sizeof(T)} / 64;
        FASTATTN_UNROLL for (int64_t c = 0; c < kColumns; c += kFour) {
          if (spread) {
            FASTATTN_UNROLL for (int64_t i = c / kFour * kLines; i < (c / kFour + 1) * kLines; i++)
                __builtin_prefetch(ahead.rows[j + g + i % kKeys] + i / kKeys * 64);
          }
          A::dot_four(sums, query + c * kSlots, keys, c);
        }
      } else {
        for (int64_t c = 0; c < columns; c += kFour) A::dot_four(sums, query + c * kSlots, keys, c);
      }
      FASTATTN_UNROLL for (int i = 0; i < kKeys; i += 4)
          sum_pairs(sums[i], sums[i + 1], sums[i + 2], sums[i + 3], low[(g + i) / 4], high[(g + i) / 4]);
    }
    FASTATTN_UNROLL for (int64_t i = 0; i < kStep; i += kLanes) {
      transpose_fours(low + i / 4);
      transpose_fours(high + i / 4);
      FASTATTN_UNROLL for (int r = 0; r < kSlots; r++) {
        const F32 row = r % 2 == 0 ? low[i / 4 + r / 2] : high[i / 4 + r / 2];
        if (r < live) store(scores + r * scores_row + j + i, row);
      }
    }
  }
}

// sums[r] += weights[r][j] * value[j] over j < count, in the arithmetic's order of columns, for kWide pairs of them.
template <class A, int kRows, int kWide, int64_t kColumns, class Rows, class Where>
FASTATTN_INLINE void weigh_columns(const typename A::Weight* weights, int64_t weights_row, const Rows& rows,
                                   int64_t count, float* sums, int64_t sums_row, const Ahead<Rows>& ahead,
                                   Where where) {
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
    ahead.template fetch<kColumns * int64_t{sizeof(T)}>(j);
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

// Pairs of columns that a pass over the values takes for so many rows of query.
constexpr int weigh_width(int rows) { return rows * 4 <= kRegisters / 4 ? 4 : rows * 2 <= kRegisters / 4 ? 2 : 1; }

template <class A, int kRows, int64_t kColumns, class Rows>
__attribute__((noinline)) void weigh_rows(const typename A::Weight* weights, int64_t weights_row, const Rows rows,
                                          int64_t count, int64_t any_columns, float* sums, int64_t sums_row,
                                          const Ahead<Rows> ahead, int64_t tile, int64_t tiles) {
  constexpr int kWide = weigh_width(kRows);
  constexpr int64_t kBytes = sizeof(typename A::Element);
  const int64_t columns = kColumns > 0 ? kColumns : any_columns;
  const int64_t passes = ceil_div(columns, kWide * kPair);
  int64_t c = 0;
  const auto columns_of = [&](auto wide, auto where) FASTATTN_LAMBDA {
    const Ahead<Rows> share = ahead.share(tile * passes + c / (kWide * kPair), tiles * passes);
    weigh_columns<A, kRows, decltype(wide)::value, kColumns>(weights, weights_row, rows.from(0, c * kBytes), count,
                                                             sums + c, sums_row, share, where);
    c += decltype(wide)::value * kPair;
  };
  while (c + kWide * kPair <= columns) columns_of(Constant<kWide>{}, Whole{});
  if (kWide > 2 && c + 2 * kPair <= columns) columns_of(Constant<2>{}, Whole{});
  if (kWide > 1 && c + kPair <= columns) columns_of(Constant<1>{}, Whole{});
  if (c < columns) columns_of(Constant<1>{}, Part{columns - c});
}

// Rows of query from `row` on that score_slots takes together; 0 where score_rows is the better one.
FASTATTN_INLINE int64_t slots_taken(int64_t rows, int64_t row, int64_t columns) {
  if (kLanes < 8 || columns % kFour != 0) return 0;
  const int64_t live = min_of(rows - row, kSlots);
  return 2 * live > kSlots ? live : 0;
}

// body(rows as a type) for 1 to kMost rows.
template <int kMost, class Body>
FASTATTN_INLINE void for_row_tile(int64_t rows, Body body) {
  static_assert(kMost == 2 || kMost == 4);
  switch (rows) {
    case 1:
      return body(Constant<1>{});
    case 2:
      return body(Constant<2>{});
    case 3:
      return body(Constant<kMost >= 3 ? 3 : 1>{});
    default:
      return body(Constant<kMost>{});
  }
}

// body(row, number of rows as a type) for tiles of up to kDecodeTile rows.
template <class Body>
FASTATTN_INLINE void for_row_tiles(int64_t rows, Body body) {
  for (int64_t row = 0; row < rows; row += kDecodeTile) {
    for_row_tile<kDecodeTile>(min_of(rows - row, kDecodeTile), [&](auto tile) FASTATTN_LAMBDA { body(row, tile); });
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
