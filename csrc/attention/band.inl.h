// V P^T and K dS^T of a block of which every vector of queries sees its own stretch of keys.
#pragma once
#include "mask.inl.h"
#include "products.inl.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// multiply for vectors n < kLast.
template <class G, int kLast, int kRows, int kWide>
FASTATTN_INLINE void multiply_first(Tile<kRows, kWide>& tile, const char*& a, int64_t a_row, int64_t a_step,
                                    const typename G::Step*& b, int64_t b_row, int64_t steps) {
  for (int64_t k = 0; k < steps; k++) {
    typename G::Vector right[kLast];
    FASTATTN_UNROLL for (int n = 0; n < kLast; n++) right[n] = G::load(b + n * kLanes);
    FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
      const typename G::Vector left = G::broadcast(a + m * a_row);
      FASTATTN_UNROLL for (int n = 0; n < kLast; n++) tile.c[m][n] = G::multiply_add(left, right[n], tile.c[m][n]);
    }
    a += a_step;
    b += b_row;
  }
}

// Up the stairs: vector n joins at step begins[n].
template <class G, int kLast, int kRows, int kWide>
FASTATTN_INLINE void multiply_up(Tile<kRows, kWide>& tile, const char*& a, int64_t a_row, int64_t a_step,
                                 const typename G::Step*& b, int64_t b_row, const int64_t* begins) {
  if constexpr (kLast < kWide) {
    multiply_first<G, kLast>(tile, a, a_row, a_step, b, b_row, begins[kLast] - begins[kLast - 1]);
    multiply_up<G, kLast + 1>(tile, a, a_row, a_step, b, b_row, begins);
  }
}

// add_columns where vector n starts at step begins[n] (not decreasing, the last one not beyond ends[0]); a and b point
// at step begins[0].
template <class G, int kWide>
__attribute__((noinline)) void add_band(Operand a, int64_t rows, const typename G::Step* b, const int64_t* begins,
                                        const int64_t* ends, float* c, const float* alpha, Prefetch& prefetch) {
  constexpr int kRows = tile_rows(kWide);
  for (int64_t row = 0; row < rows; row += kRows) {
    prefetch.step();
    Tile<kRows, kWide> tile;
    clear(tile);
    const char* left = a.data + row * static_cast<int64_t>(sizeof(typename G::Step));
    const typename G::Step* right = b;
    multiply_up<G, 1>(tile, left, sizeof(typename G::Step), a.row, right, kPanel, begins);
    multiply_stairs<G, 0>(tile, left, sizeof(typename G::Step), a.row, right, kPanel, begins[kWide - 1], ends);
    float* out = c + row * kPanel;
    FASTATTN_UNROLL for (int n = 0; n < kWide; n++) {
      const F32 scale = load(alpha + n * kLanes);
      FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
        float* p = out + m * kPanel + n * kLanes;
        store(p, fma(scale, load(p), tile.c[m][n]));
      }
    }
  }
}

// add_columns for what is seen of a block: `a` holds its keys, `tile` (written where seen.ranges say) its rows.
template <class G>
FASTATTN_INLINE void add_seen_columns(Operand a, int64_t rows, typename G::Step* tile, const Visibility& seen,
                                      int vectors, float* c, const float* alpha, Prefetch& prefetch) {
  int64_t ends[kVectors];
  for (int n = 0; n < kVectors; n++) ends[n] = ceil_div(seen.ends[n], G::kPack);
  const int64_t first = seen.first_row() / G::kPack;
  if (seen.begins[vectors - 1] < kRowPad) {
    with_width(vectors, [&](auto width) { add_columns<G, width.value>(a, rows, tile, ends, c, alpha, prefetch); });
    return;
  }
  a.data += first * a.row;
  int64_t begins[kVectors];
  for (int n = 0; n < vectors; n++) {
    const int64_t begin = round_down(seen.begins[n], kRowPad) / G::kPack;
    begins[n] = min_of(begin, ends[0]);
    for (int64_t k = begins[n]; k < begin; k++)
      memset(tile + k * kPanel + n * kLanes, 0, kLanes * sizeof(typename G::Step));
  }
  with_width(vectors, [&](auto width) {
    add_band<G, width.value>(a, rows, tile + first * kPanel, begins, ends, c, alpha, prefetch);
  });
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
