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
// What becomes of the accumulator: replaced, added to, or added to after alpha[row] has scaled it.
enum class Into { fresh, added, scaled };

// C[row] (+)= sum over k of A[row][k] * B[k] for the rows of the box and kWide vectors of columns, as kInto says.
// The block is summed by itself before it joins C: two short sums round less than
// one long one.
template <class G, Along kAlong, Into kInto, int kWide>
__attribute__((noinline)) void add_product_of(const char* a, const typename G::Step* b, int64_t b_row, const Band& band,
                                              const Band::Box& box, const float* alpha, float* c, int64_t c_row,
                                              Prefetch& prefetch) {
  // Queries of one vector: all that its range of keys has been written for.
  constexpr int kRows = kAlong == Along::columns && tile_rows(kWide) > kLanes ? kLanes : tile_rows(kWide);
  constexpr int64_t kWord = sizeof(typename G::Step);
  constexpr int64_t kRow = kAlong == Along::columns ? kWord : kPanel / G::kPack * kWord;
  constexpr int64_t kStep = kAlong == Along::columns ? kPanel * kWord : kWord;
  for (int64_t row = box.begin; row < box.end; row += kRows) {
    prefetch.step();
    // Gradients of keys are in a far cache, and the product takes about as long as it takes them to come.
    if constexpr (kAlong == Along::rows) FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
        FASTATTN_UNROLL for (int n = 0; n < kWide; n++) __builtin_prefetch(c + (row + m) * c_row + n * kLanes, 1, 3);
      }
    const int64_t begin = band.from(box, row) / G::kPack;
    const int64_t end = ceil_div(band.to(box, row, kRows), G::kPack);
    Tile<kRows, kWide> tile;
    clear(tile);
    const char* left = a + row * kRow + begin * kStep;
    const typename G::Step* right = b + begin * b_row;
    multiply<G, 0>(tile, left, kRow, kStep, right, b_row, end - begin);
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
}

// The same for a whole band and any number of columns.
template <class G, Along kAlong, Into kInto>
FASTATTN_INLINE void add_product(const void* a, const Stretches& b, const Band& band, const float* alpha, float* c,
                                 int64_t c_row, Prefetch& prefetch) {
  for (int64_t first = 0; first < b.columns; first += b.width) {
    const auto* right = reinterpret_cast<const typename G::Step*>(b.data + first / b.width * b.next);
    const int64_t right_row = b.row / static_cast<int64_t>(sizeof(typename G::Step));
    with_width(static_cast<int>(ceil_div(min_of(b.width, b.columns - first), kLanes)), [&](auto width) {
      for (int i = 0; i < band.count; i++)
        add_product_of<G, kAlong, kInto, width.value>(static_cast<const char*>(a), right, right_row, band,
                                                      band.boxes[i], alpha, c + first, c_row, prefetch);
    });
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
