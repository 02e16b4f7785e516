// The products that add a block's share to an accumulator.
#pragma once
#include "../cpu/microkernel.inl.h"
#include "../cpu/prefetch.inl.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// C^T[row][lane] = alpha[lane] * C^T[row][lane] + sum over k of A[k][row] * B[k][lane], where vector n of the lanes has
// ends[n] steps. The block is summed by itself before it joins C: two short sums round less than one long one.
template <class G, int kWide>
__attribute__((noinline)) void add_columns(Operand a, int64_t rows, const typename G::Step* b, const int64_t* ends,
                                           float* c, const float* alpha, Prefetch& prefetch) {
  constexpr int kRows = tile_rows(kWide);
  for (int64_t row = 0; row < rows; row += kRows) {
    prefetch.step();
    Tile<kRows, kWide> tile;
    clear(tile);
    const char* left = a.data + row * static_cast<int64_t>(sizeof(typename G::Step));
    const typename G::Step* right = b;
    multiply_stairs<G, 0>(tile, left, sizeof(typename G::Step), a.row, right, kPanel, 0, ends);
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

// C[row][lane] += sum over k < steps of A[row][k] * B[k][lane] for rows [begin, end).
template <class G, int kWide>
__attribute__((noinline)) void add_rows(Operand a, const typename G::Step* b, int64_t b_row, int64_t steps, float* c,
                                        int64_t c_row, int64_t begin, int64_t end, Prefetch& prefetch) {
  constexpr int kRows = tile_rows(kWide);
  for (int64_t row = begin; row < end; row += kRows) {
    prefetch.step();
    // C is in a far cache, and the product takes about as long as it takes to come.
    FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
      FASTATTN_UNROLL for (int n = 0; n < kWide; n++) __builtin_prefetch(c + (row + m) * c_row + n * kLanes, 1, 3);
    }
    Tile<kRows, kWide> tile;
    clear(tile);
    const char* left = a.data + row * a.row;
    const typename G::Step* right = b;
    multiply<G, 0>(tile, left, a.row, sizeof(typename G::Step), right, b_row, steps);
    FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
      float* p = c + (row + m) * c_row;
      FASTATTN_UNROLL for (int n = 0; n < kWide; n++) store(p + n * kLanes, load(p + n * kLanes) + tile.c[m][n]);
    }
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
