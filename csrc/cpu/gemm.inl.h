// Large matrix products, C = A B, block by block. A block of B is packed into panels of kPanel lanes that stay in the
// second-level cache; rows of A, a few at a time, are broadcast against all of them from where they lie, or from a copy
// where they need a conversion or are columns in memory. Sums are float32: every kGemmDepth steps are summed in
// registers, those sums are added in order. What a number of C is does not depend on how C is cut into blocks.
#pragma once
#include "arena.inl.h"
#include "microkernel.inl.h"
#include "simd/simd.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kGemmRows = kRegisters >= 32 ? 6 : 4;  // of a register tile that is kVectors wide
constexpr int64_t kGemmDepth = 256;                  // steps that are summed in registers, at most
constexpr int64_t kColumnTiles = 16;                 // tiles whose columns of A are copied together

FASTATTN_INLINE int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// A matrix as it lies in memory. A `lengthwise` matrix has the inner dimension along its rows: (m, k) for A, (n, k) for
// B. Otherwise it is (k, m) or (k, n).
struct GemmMatrix {
  const char* data;
  int64_t row;  // bytes from one row to the next
  DType dtype;
  bool lengthwise;

  const char* at(int64_t r, int64_t c) const { return data + r * row + c * element_size(dtype); }
};

struct Gemm {
  GemmMatrix a, b;
  int64_t m, n, k;
};

// Elements along the inner dimension as steps, zero from the last one on. `steps` is a multiple of kLanes.
template <class G, class T>
FASTATTN_INLINE void to_steps(const T* from, int64_t elements, typename G::Step* to, int64_t steps) {
  for (int64_t s = 0; s < steps; s += kLanes) {
    const int64_t left = elements - s * G::kPack;
    if constexpr (G::kPaired) {
      const int64_t low = min_of(max_of(left, 0), kLanes), high = min_of(max_of(left - kLanes, 0), kLanes);
      G::store_row(to + s, load_first(from + 2 * s, low), load_first(from + 2 * s + low, high));
    } else if (left >= kLanes) {
      store(to + s, load(from + s));
    } else {
      store(to + s, load_first(from + s, max_of(left, 0)));
    }
  }
}

template <class G>
__attribute__((noinline)) void row_to_steps(DType dtype, const char* from, int64_t elements, typename G::Step* to,
                                            int64_t steps) {
  switch (dtype) {
    case DType::bf16:
      return to_steps<G>(reinterpret_cast<const bf16*>(from), elements, to, steps);
    case DType::f16:
      return to_steps<G>(reinterpret_cast<const f16*>(from), elements, to, steps);
    default:
      return to_steps<G>(reinterpret_cast<const float*>(from), elements, to, steps);
  }
}

// Whether the tiles can read steps along the rows of a matrix where they lie.
template <class G>
FASTATTN_INLINE bool readable(DType dtype) {
  return dtype == (G::kPaired ? DType::bf16 : DType::f32);
}

// A row of lanes of `count` elements: two rows at once for pairs, high is null where there is no second one.
template <class G, class T>
FASTATTN_INLINE void to_lanes(const T* low, const T* high, int64_t count, typename G::Step* to, int64_t lanes) {
  for (int64_t c = 0; c < lanes; c += kLanes) {
    const int64_t left = min_of(max_of(count - c, 0), kLanes);
    if constexpr (G::kPaired) {
      G::store_pair(to + c, load_first(low + c, left), high == nullptr ? zero() : load_first(high + c, left));
    } else {
      store(to + c, left == kLanes ? load(low + c) : load_first(low + c, left));
    }
  }
}
template <class G>
FASTATTN_INLINE void halves_to_lanes(const bf16* low, const bf16* high, int64_t count, typename G::Step* to,
                                     int64_t lanes) {
  if constexpr (G::kPaired) {
    constexpr int64_t kTogether = 2 * kLanes;  // what interleave does
    int64_t c = 0;
    for (; c + kTogether <= lanes; c += kTogether)
      G::interleave(low + c, high == nullptr ? nullptr : high + c, max_of(count - c, 0), to + c);
    if (c < lanes) to_lanes<G>(low + c, high == nullptr ? nullptr : high + c, count - c, to + c, lanes - c);
  } else {
    to_lanes<G>(low, high, count, to, lanes);
  }
}

// Step s of columns first .. first + count of a matrix that is not lengthwise, whose steps begin at row k0.
template <class G>
FASTATTN_INLINE void columns_to_lanes(const GemmMatrix& x, int64_t k0, int64_t elements, int64_t s, int64_t first,
                                      int64_t count, typename G::Step* to, int64_t lanes) {
  const char* low = x.at(k0 + s * G::kPack, first);
  const char* high = s * G::kPack + 1 < elements ? low + x.row : nullptr;
  switch (x.dtype) {
    case DType::bf16:
      return halves_to_lanes<G>(reinterpret_cast<const bf16*>(low), reinterpret_cast<const bf16*>(high), count, to,
                                lanes);
    case DType::f16:
      return to_lanes<G>(reinterpret_cast<const f16*>(low), reinterpret_cast<const f16*>(high), count, to, lanes);
    default:
      return to_lanes<G>(reinterpret_cast<const float*>(low), reinterpret_cast<const float*>(high), count, to, lanes);
  }
}

// A block of B as panels: a row of kPanel lanes for every step, zero beyond the real columns. One row more lies between
// panels: whole pages would have them compete for the same lines of the cache.
FASTATTN_INLINE int64_t gemm_panel(int64_t steps) { return (round_up(steps, kLanes) + 1) * kPanel; }
template <class G>
__attribute__((noinline)) void pack_panels(const GemmMatrix& b, int64_t k0, int64_t elements, int64_t first,
                                           int64_t end, typename G::Step* to) {
  using Step = typename G::Step;
  const int64_t steps = ceil_div(elements, G::kPack), depth = round_up(steps, kLanes);
  if (!b.lengthwise) {
    for (int64_t s = 0; s < steps; s++) {
      Step* row = to + s * kPanel;
      for (int64_t n = first; n < end; n += kPanel, row += gemm_panel(steps))
        columns_to_lanes<G>(b, k0, elements, s, n, min_of(kPanel, end - n), row, kPanel);
    }
    return;
  }
  const bool direct = readable<G>(b.dtype) && b.row % 4 == 0;
  for (int64_t n = first; n < end; n += kPanel, to += gemm_panel(steps)) {
    for (int64_t lane = 0; lane < kPanel && n + lane < end; lane += kLanes) {
      const int64_t rows = min_of(kLanes, end - n - lane);
      for (int64_t s = 0; s < depth; s += kLanes) {
        const char* from = b.at(n + lane, k0 + s * G::kPack);
        float* const target = reinterpret_cast<float*>(to) + s * kPanel + lane;
        const int64_t left = elements - s * G::kPack;
        if (direct && rows == kLanes && left >= kLanes * G::kPack) {
          transpose_tile(reinterpret_cast<const float*>(from), b.row / 4, target, kPanel);
          continue;
        }
        alignas(64) Step square[kLanes * kLanes];
        for (int64_t r = 0; r < kLanes; r++) {
          if (r < rows)
            row_to_steps<G>(b.dtype, from + r * b.row, left, square + r * kLanes, kLanes);
          else
            memset(square + r * kLanes, 0, sizeof(Step) * kLanes);
        }
        transpose_tile(reinterpret_cast<const float*>(square), kLanes, target, kPanel);
      }
    }
  }
}

// Columns first .. end of A, which is not lengthwise: tiles of kGemmRows columns, step by step. Whole registers are
// stored each time; what is too much is overwritten by the next step, or lies between the tiles.
constexpr int64_t kTileLanes = (kGemmRows + kLanes - 1) / kLanes * kLanes;
constexpr int64_t column_tile(int64_t steps) { return steps * kGemmRows + kTileLanes; }

template <class T>
FASTATTN_INLINE void copy_columns(const GemmMatrix& a, int64_t k0, int64_t steps, int64_t first, int64_t end,
                                  float* to) {
  const int64_t whole = max_of(end - kTileLanes + 1, first);  // from here on registers reach beyond the columns
  for (int64_t s = 0; s < steps; s++) {
    const T* const row = reinterpret_cast<const T*>(a.at(k0 + s, 0));
    float* tile = to + s * kGemmRows;
    int64_t m = first;
    for (; m < whole; m += kGemmRows, tile += column_tile(steps))
      FASTATTN_UNROLL for (int64_t lane = 0; lane < kTileLanes; lane += kLanes)
          store(tile + lane, load(row + m + lane));
    for (; m < end; m += kGemmRows, tile += column_tile(steps))
      FASTATTN_UNROLL for (int64_t lane = 0; lane < kTileLanes; lane += kLanes)
          store(tile + lane, load_first(row + m + lane, max_of(min_of(end - m - lane, kLanes), 0)));
  }
}

template <class G>
__attribute__((noinline)) void pack_columns(const GemmMatrix& a, int64_t k0, int64_t elements, int64_t first,
                                            int64_t end, typename G::Step* to) {
  using Step = typename G::Step;
  const int64_t steps = ceil_div(elements, G::kPack);
  if constexpr (G::kPaired) {
    alignas(64) Step line[kColumnTiles * kGemmRows + 2 * kTileLanes];
    const int64_t count = end - first, lanes = round_up(count, kLanes);
    for (int64_t s = 0; s < steps; s++) {
      columns_to_lanes<G>(a, k0, elements, s, first, count, line, lanes);
      Step* tile = to + s * kGemmRows;
      for (int64_t m = 0; m < count; m += kGemmRows, tile += column_tile(steps))
        memcpy(tile, line + m, sizeof(Step) * kTileLanes);
    }
  } else if (a.dtype == DType::f32) {
    copy_columns<float>(a, k0, steps, first, end, to);
  } else if (a.dtype == DType::bf16) {
    copy_columns<bf16>(a, k0, steps, first, end, to);
  } else {
    copy_columns<f16>(a, k0, steps, first, end, to);
  }
}

// Asks for rows r0 .. r1 of columns first .. end.
FASTATTN_INLINE void prefetch_rows(const GemmMatrix& x, int64_t r0, int64_t r1, int64_t first, int64_t end) {
  if (first >= end) return;
  for (int64_t r = r0; r < r1; r++) {
    const char* const last = x.at(r, end) - 1;
    for (const char* p = x.at(r, first); p <= last; p += 64) __builtin_prefetch(p, 0, 2);
    __builtin_prefetch(last, 0, 2);
  }
}

// c[i][n] (+)= sum over steps of a[i * a_row + s * a_step] * b[s][n] for one panel.
template <class G, int kRows, int kWide>
__attribute__((noinline)) void gemm_tile(const char* a, int64_t a_row, int64_t a_step, const typename G::Step* b,
                                         int64_t steps, float* c, int64_t c_row, bool add) {
  Tile<kRows, kWide> tile;
  clear(tile);
  multiply<G, 0>(tile, a, a_row, a_step, b, kPanel, steps);
  if (add) {
    FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
      FASTATTN_UNROLL for (int n = 0; n < kWide; n++)
          store(c + m * c_row + n * kLanes, load(c + m * c_row + n * kLanes) + tile.c[m][n]);
    }
  } else {
    FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
      FASTATTN_UNROLL for (int n = 0; n < kWide; n++) store(c + m * c_row + n * kLanes, tile.c[m][n]);
    }
  }
}

// The same for all panels of a block of B, of which the last may be narrow.
template <class G, int kRows>
void gemm_rows(const char* a, int64_t a_row, int64_t a_step, const typename G::Step* b, int64_t columns, int64_t panel,
               int64_t steps, float* c, int64_t c_row, bool add) {
  for (; columns > kPanel - kLanes; columns -= kPanel, b += panel, c += kPanel)
    gemm_tile<G, kRows, kVectors>(a, a_row, a_step, b, steps, c, c_row, add);
  if (columns > 0) {
    with_width(static_cast<int>(ceil_div(columns, kLanes)), [&](auto width) {
      gemm_tile<G, kRows, decltype(width)::value>(a, a_row, a_step, b, steps, c, c_row, add);
    });
  }
}

// Calls f with the compile-time constant that equals `count` (1 .. kMost).
template <int kMost, class F>
FASTATTN_INLINE void with_rows(int count, F f) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_rows<kMost - 1>(count, f);
  }
  f(Constant<kMost>{});
}

template <class G>
struct GemmScratch {
  typename G::Step* panels;
  typename G::Step* rows;
  float* sums;
  int64_t sums_row;
};

FASTATTN_INLINE int64_t gemm_depth(int64_t steps) {  // equal parts
  return max_of(round_up(ceil_div(steps, max_of(ceil_div(steps, kGemmDepth), 1)), kLanes), kLanes);
}

// How C is cut into blocks, which are tasks: large ones, because a block packs its part of B for itself, but several
// for every worker. Whoever computes what, the numbers are the same.
struct GemmPlan {
  int64_t rows, columns;  // of a block
  int64_t row_blocks, column_blocks;

  int64_t tasks() const { return row_blocks * column_blocks; }
};

FASTATTN_INLINE GemmPlan gemm_plan(int64_t m, int64_t n, bool columns_of_a, int64_t workers) {
  constexpr int64_t kRowsAtLeast = 192, kPanelsAtLeast = 2, kTasksEach = 4;
  GemmPlan plan{};
  // Columns of A are copied for every block of B's columns: wider ones then.
  int64_t row_blocks = max_of(ceil_div(m, 1024), 1);
  int64_t column_blocks = max_of(ceil_div(n, (columns_of_a ? 12 : 6) * kPanel), 1);
  while (workers > 1 && row_blocks * column_blocks < kTasksEach * workers) {
    const bool rows = m >= 2 * kRowsAtLeast * row_blocks, columns = n >= 2 * kPanelsAtLeast * kPanel * column_blocks;
    if (!rows && !columns) break;
    (rows && (!columns || m * column_blocks >= n * row_blocks) ? row_blocks : column_blocks) *= 2;
  }
  plan.rows = round_up(ceil_div(m, max_of(row_blocks, 1)), kGemmRows);
  plan.columns = round_up(ceil_div(n, max_of(column_blocks, 1)), kPanel);
  plan.row_blocks = ceil_div(m, max_of(plan.rows, 1));
  plan.column_blocks = ceil_div(n, max_of(plan.columns, 1));
  return plan;
}

// Memory for blocks of up to m rows and n columns.
template <class G>
GemmScratch<G> gemm_scratch(Arena& arena, int64_t m, int64_t n, int64_t k) {
  const int64_t depth = gemm_depth(ceil_div(k, G::kPack));
  GemmScratch<G> scratch{};
  scratch.sums_row = round_up(n, kPanel);
  scratch.panels = arena.take<typename G::Step>(gemm_panel(depth) * (scratch.sums_row / kPanel));
  scratch.rows = arena.take<typename G::Step>(kColumnTiles * column_tile(depth));
  scratch.sums = arena.take<float>(round_up(k > depth * G::kPack ? m : kGemmRows, kGemmRows) * scratch.sums_row);
  return scratch;
}

// The last steps of a product: rows of sums, `row` floats apart, of the columns first .. end of C.
struct GemmSums {
  int64_t m, rows;
  int64_t first, end;
  const float* sums;
  int64_t row;
};

// The block of C at rows m0 .. m1 and columns n0 .. n1; calls finish(GemmSums) for every few
// rows.
template <class G, class Finish>
void gemm_block(const Gemm& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1, const GemmScratch<G>& scratch,
                Finish finish) {
  using Step = typename G::Step;
  const int64_t all = ceil_div(p.k, G::kPack), part = gemm_depth(all);
  const bool once = all <= part;
  for (int64_t s0 = 0; s0 < max_of(all, 1); s0 += part) {
    const int64_t steps = min_of(part, all - s0), k0 = s0 * G::kPack;
    const int64_t elements = min_of(p.k - k0, steps * G::kPack);
    const int64_t panel = gemm_panel(steps);
    pack_panels<G>(p.b, k0, elements, n0, n1, scratch.panels);
    const bool in_place = p.a.lengthwise && readable<G>(p.a.dtype) && elements == steps * G::kPack;
    for (int64_t m = m0; m < m1; m += kGemmRows) {
      const int64_t rows = min_of(kGemmRows, m1 - m);
      const char* a;
      int64_t a_row, a_step = sizeof(Step);
      if (in_place) {
        a = p.a.at(m, k0);
        a_row = p.a.row;
      } else if (p.a.lengthwise) {
        const int64_t depth = round_up(steps, kLanes);
        for (int64_t r = 0; r < rows; r++)
          row_to_steps<G>(p.a.dtype, p.a.at(m + r, k0), elements, scratch.rows + r * depth, depth);
        a = reinterpret_cast<const char*>(scratch.rows);
        a_row = depth * static_cast<int64_t>(sizeof(Step));
      } else {
        const int64_t tile = (m - m0) / kGemmRows % kColumnTiles;
        const int64_t next = m + (kColumnTiles - tile) * kGemmRows;
        if (tile == 0) pack_columns<G>(p.a, k0, elements, m, min_of(next, m1), scratch.rows);
        const int64_t share = ceil_div(elements, kColumnTiles), from = k0 + tile * share;
        prefetch_rows(p.a, from, min_of(from + share, k0 + elements), next,
                      min_of(next + kColumnTiles * kGemmRows, m1));
        a = reinterpret_cast<const char*>(scratch.rows + tile * column_tile(steps));
        a_row = sizeof(Step);
        a_step = kGemmRows * sizeof(Step);
      }
      float* const sums = scratch.sums + (once ? 0 : (m - m0) * scratch.sums_row);
      const auto work = [&](auto count) {
        gemm_rows<G, decltype(count)::value>(a, a_row, a_step, scratch.panels, n1 - n0, panel, steps, sums,
                                             scratch.sums_row, s0 > 0);
      };
      with_rows<kGemmRows>(static_cast<int>(rows), work);
      if (s0 + part >= all) finish(GemmSums{m, rows, n0, n1, sums, scratch.sums_row});
    }
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
