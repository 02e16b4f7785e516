// The products that add a block's share to an accumulator: P V and dS K to rows of queries, P^T dO and dS^T Q to rows
// of keys. Columns lie in the lanes, so results have the layout of memory; the tile of probabilities (or of dS) is
// broadcast, down its columns or along its rows.
#pragma once
#include "../cpu/microkernel.inl.h"
#include "../cpu/prefetch.inl.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Where a matrix is not zero: rows [row, row + n) have nothing outside the elements [row + first, row + n + last), but
// all of them have the first `always`, and rows before `full` have everything; and all that only within boxes. A
// product that keeps to it leaves out half of a diagonal block, a few rows at a time.
struct Band {
  // Rows [begin, end), elements [from, to).
  struct Box {
    int64_t begin, end, from, to;
  };
  static constexpr int kMostBoxes = 2 * kVectors + 3;
  Box boxes[kMostBoxes];
  int count;
  int64_t first, last, always, full;

  FASTATTN_INLINE int64_t from(const Box& box, int64_t row) const {
    return row < full || always > 0 ? box.from : max_of(box.from, row + first);
  }
  FASTATTN_INLINE int64_t to(const Box& box, int64_t row, int64_t n) const {
    return row < full ? box.to : min_of(box.to, max_of(always, row + n + last));
  }
};

// The right side: rows (Single) or pairs of neighbouring rows (Paired), cut into stretches of columns as wide as a
// register tile, `next` bytes from one to the next.
struct Stretches {
  const char* data;
  int64_t columns, width, row, next;
};
// As equal as can be: narrow tiles have few sums in flight.
template <class G>
FASTATTN_INLINE int64_t stretch_width(int64_t columns) {
  return round_up(ceil_div(columns, ceil_div(columns, kPanel)), kLanes * G::kPack);
}

// How a product goes through a tile (key, kPanel): its columns (queries) or its rows (keys) are the rows of the result.
enum class Along { columns, rows };

// One product: the tile, what it is multiplied by, and where it is not zero.
struct Term {
  const void* tile;
  Stretches right;
  Band band;
};

// What becomes of finished sums: an accumulator is replaced, added to, or added to after alpha[row] has scaled it.
enum class Into { fresh, added, scaled };
template <Into kInto>
struct Accumulate {
  float* c;
  int64_t c_row;
  const float* alpha;

  Accumulate columns_from(int64_t column) const { return {c + column, c_row, alpha}; }
  // Accumulators may be in a far cache, and a product takes about as long as it takes them to come.
  template <int kRows, int kWide>
  FASTATTN_INLINE void expect(int64_t row) const {
    FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
      FASTATTN_UNROLL for (int n = 0; n < kWide; n++) __builtin_prefetch(c + (row + m) * c_row + n * kLanes, 1, 3);
    }
  }
  template <int kRows, int kWide>
  FASTATTN_INLINE void operator()(int64_t row, const Tile<kRows, kWide>& tile) const {
    FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
      float* p = c + (row + m) * c_row;
      FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
        if constexpr (kInto == Into::fresh)
          store(p + n * kLanes, tile.c[m][n]);
        else if constexpr (kInto == Into::added)
          store(p + n * kLanes, load(p + n * kLanes) + tile.c[m][n]);
        else
          store(p + n * kLanes, fma(splat(alpha[row + m]), load(p + n * kLanes), tile.c[m][n]));
      }
    }
  }
};

// Or they are all there is: times `factor`, or each row times its own, they are the result, of which there are `rows`.
template <class T>
struct Finish {
  T* c;
  int64_t c_row, rows;
  float factor;
  const float* factors;

  Finish columns_from(int64_t column) const { return {c + column, c_row, rows, factor, factors}; }
  template <int kRows, int kWide>
  FASTATTN_INLINE void expect(int64_t) const {}
  template <int kRows, int kWide>
  FASTATTN_INLINE void operator()(int64_t row, const Tile<kRows, kWide>& tile) const {
    FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
      if (row + m >= rows) return;
      T* p = c + (row + m) * c_row;
      const F32 scale = splat(factors == nullptr ? factor : factors[row + m]);
      FASTATTN_UNROLL for (int n = 0; n < kWide; n++) store(p + n * kLanes, tile.c[m][n] * scale);
    }
  }
};

// The rows of one box of each of the terms: the sum over the terms of sums over k of tile[row][k] * right[k], for kWide
// vectors of columns of the stretch number `stretch`. What is summed here is summed by itself before it joins an
// accumulator: two short sums round less than one long one.
template <class G, Along kAlong, int kWide, class Sink>
__attribute__((noinline)) void multiply_box(const Term* terms, int count, int which_box, int64_t stretch,
                                            const Sink& into, Prefetch& prefetch) {
  // Queries of one vector: all that its range of keys has been written for.
  constexpr int kRows = kAlong == Along::columns && tile_rows(kWide) > kLanes ? kLanes : tile_rows(kWide);
  constexpr int64_t kWord = sizeof(typename G::Step);
  constexpr int64_t kRow = kAlong == Along::columns ? kWord : kPanel / G::kPack * kWord;
  constexpr int64_t kStep = kAlong == Along::columns ? kPanel * kWord : kWord;
  int64_t first = terms[0].band.boxes[which_box].begin, last = terms[0].band.boxes[which_box].end;
  for (int i = 1; i < count; i++) {
    first = min_of(first, terms[i].band.boxes[which_box].begin);
    last = max_of(last, terms[i].band.boxes[which_box].end);
  }
  for (int64_t row = first; row < last; row += kRows) {
    if constexpr (kAlong == Along::rows) into.template expect<kRows, kWide>(row);
    Tile<kRows, kWide> tile;
    clear(tile);
    for (int i = 0; i < count; i++) {
      const Band& band = terms[i].band;
      const Band::Box& box = band.boxes[which_box];
      if (row < box.begin || row >= box.end) continue;
      const int64_t begin = band.from(box, row) / G::kPack;
      const int64_t end = ceil_div(band.to(box, row, kRows), G::kPack);
      const int64_t right_row = terms[i].right.row / kWord;
      const char* left = static_cast<const char*>(terms[i].tile) + row * kRow + begin * kStep;
      const auto* right =
          reinterpret_cast<const typename G::Step*>(terms[i].right.data + stretch * terms[i].right.next) +
          begin * right_row;
      multiply_asking<G, 0>(tile, left, kRow, kStep, right, right_row, end - begin, prefetch);
    }
    into(row, tile);
  }
}

// All rows and columns. Several terms go together if each has one box, and all the same stretches.
template <class G, Along kAlong, class Sink>
FASTATTN_INLINE void multiply_terms(const Term* terms, int count, const Sink& into, Prefetch& prefetch) {
  const Stretches& right = terms[0].right;
  for (int64_t first = 0; first < right.columns; first += right.width)
    with_width(static_cast<int>(ceil_div(min_of(right.width, right.columns - first), kLanes)), [&](auto width) {
      for (int i = 0; i < terms[0].band.count; i++)
        multiply_box<G, kAlong, width.value>(terms, count, i, first / right.width, into.columns_from(first), prefetch);
    });
}

// Results can be stored as they are finished if they end where registers end.
FASTATTN_INLINE bool can_finish(int64_t columns) { return columns % kLanes == 0; }

template <class G, Along kAlong>
FASTATTN_INLINE void finish_terms(DType dtype, const Term* terms, int count, Operand rows, int64_t row_count,
                                  float factor, const float* factors, Prefetch& prefetch) {
  const auto finish = [&](auto into) {
    into = {reinterpret_cast<decltype(into.c)>(const_cast<char*>(rows.data)),
            rows.row / static_cast<int64_t>(sizeof(*into.c)), row_count, factor, factors};
    multiply_terms<G, kAlong>(terms, count, into, prefetch);
  };
  if constexpr (G::kPaired)
    finish(Finish<bf16>{});
  else if (dtype == DType::f32)
    finish(Finish<float>{});
  else if (dtype == DType::bf16)
    finish(Finish<bf16>{});
  else
    finish(Finish<f16>{});
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
