// Large matrix products, C = A B, block by block. A block of B is packed into panels of kPanel lanes that stay in the
// second-level cache; rows of A, a few at a time, are broadcast against one panel after the other from where they lie,
// or from a copy where they need a conversion or are columns in memory that go together in pairs. Sums are float32:
// kGemmSegment steps are summed in registers, those sums are added in order. What a number of C is does not depend on
// how C is cut into blocks.
#pragma once
#include "arena.inl.h"
#include "microkernel.inl.h"
#include "simd/simd.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kGemmRows = kRegisters >= 32 ? 6 : 4;  // of a register tile that is kVectors wide
constexpr int64_t kGemmSegment = 384;                // steps that are summed in registers, at most
constexpr int64_t kGemmDepth = 1024;                 // steps that are packed together, at most
constexpr int64_t kGemmBlock = 800 << 10;            // bytes of B that are packed together, at most
constexpr int64_t kColumnTiles = 32;                 // tiles whose columns of A are copied together

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

// Rows that are read a piece at a time are asked for this many steps before: each is a new page to the machine.
constexpr int64_t kAskAhead = 8;
FASTATTN_INLINE void ask_for(const char* first, const char* end) {
  for (; first < end; first += 64) __builtin_prefetch(first, 0, 3);
}

// A block of B as panels: a row of kPanel lanes for every step, zero beyond the real columns. One row more lies between
// panels: whole pages would have them compete for the same lines of the cache.
FASTATTN_INLINE int64_t gemm_panel(int64_t steps) { return (round_up(steps, kLanes) + 1) * kPanel; }
constexpr int64_t kTransposedAhead = 4;
template <class G>
__attribute__((noinline)) void pack_panels(const GemmMatrix& b, int64_t k0, int64_t elements, int64_t first,
                                           int64_t end, typename G::Step* to) {
  using Step = typename G::Step;
  const int64_t steps = ceil_div(elements, G::kPack), depth = round_up(steps, kLanes);
  if (!b.lengthwise) {
    for (int64_t s = 0; s < steps; s++) {
      Step* row = to + s * kPanel;
      if (s + kAskAhead < steps) {
        const int64_t ahead = k0 + (s + kAskAhead) * G::kPack;
        ask_for(b.at(ahead, first), b.at(ahead, end));
        if (G::kPaired && (s + kAskAhead) * G::kPack + 1 < elements)
          ask_for(b.at(ahead + 1, first), b.at(ahead + 1, end));
      }
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
        if (left > kTransposedAhead * kLanes * G::kPack)
          for (int64_t r = 0; r < rows; r++) __builtin_prefetch(from + r * b.row + kTransposedAhead * 64, 0, 3);
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

// Columns first .. end of A, which is not lengthwise: tiles of kGemmRows columns, step by step, kTileRow apart.
constexpr int64_t kTileRow = kGemmRows <= 4 ? 4 : 8;
constexpr int64_t column_tile(int64_t steps) { return steps * kTileRow + 16; }

template <class T>
FASTATTN_INLINE void widen_columns(const GemmMatrix& a, int64_t k0, int64_t steps, int64_t first, int64_t end,
                                   float* to) {
  const int64_t count = end - first, lanes = round_up(count, kLanes);
  alignas(64) float line[kColumnTiles * kGemmRows + kTileRow + kLanes];
  for (int64_t s = 0; s < steps; s++) {
    const T* const row = reinterpret_cast<const T*>(a.at(k0 + s, first));
    if (s + kAskAhead < steps) ask_for(a.at(k0 + s + kAskAhead, first), a.at(k0 + s + kAskAhead, end));
    float* tile = to + s * kTileRow;
    for (int64_t c = 0; c < lanes; c += kLanes) store(line + c, load_first(row + c, min_of(count - c, kLanes)));
    for (int64_t m = 0; m < count; m += kGemmRows, tile += column_tile(steps))
      memcpy(tile, line + m, sizeof(float) * kTileRow);
  }
}

template <class G>
__attribute__((noinline)) void pack_columns(const GemmMatrix& a, int64_t k0, int64_t elements, int64_t first,
                                            int64_t end, typename G::Step* to) {
  using Step = typename G::Step;
  const int64_t steps = ceil_div(elements, G::kPack);
  if constexpr (G::kPaired) {
    alignas(64) Step line[kColumnTiles * kGemmRows + kTileRow + kLanes];
    const int64_t count = end - first, lanes = round_up(count, kLanes);
    for (int64_t s = 0; s < steps; s++) {
      for (int64_t r = (s + kAskAhead) * G::kPack; r < min_of((s + kAskAhead + 1) * G::kPack, elements); r++)
        ask_for(a.at(k0 + r, first), a.at(k0 + r, end));
      columns_to_lanes<G>(a, k0, elements, s, first, count, line, lanes);
      Step* tile = to + s * kTileRow;
      for (int64_t m = 0; m < count; m += kGemmRows, tile += column_tile(steps))
        memcpy(tile, line + m, sizeof(Step) * kTileRow);
    }
  } else if (a.dtype == DType::bf16) {
    widen_columns<bf16>(a, k0, steps, first, end, to);
  } else {
    widen_columns<f16>(a, k0, steps, first, end, to);
  }
}

// c[i][n] (+)= sum over steps of a[i * a_row + s * a_step] * b[s][n] for one panel, in segments. Meanwhile asks for
// what lies at two other places, a step further at every step: rows of A that come next. (Not as a struct: copied
// through the stack in one piece it would wait for every store before it.)
template <class G, int kRows, int kWide>
__attribute__((noinline)) void gemm_tile(const char* a, int64_t a_row, int64_t a_step, const typename G::Step* b,
                                         int64_t steps, int64_t segment, float* c, bool add, const char* ahead,
                                         const char* ahead_too) {
  do {
    Tile<kRows, kWide> tile;
    clear(tile);
    const int64_t now = min_of(segment, steps);
    for (int64_t k = 0; k < now; k++) {
      typename G::Vector right[kWide];
      FASTATTN_UNROLL for (int n = 0; n < kWide; n++) right[n] = G::load(b + n * kLanes);
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead_too, 0, 2);
      FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
        const typename G::Vector left = G::broadcast(a + m * a_row);
        FASTATTN_UNROLL for (int n = 0; n < kWide; n++) tile.c[m][n] = G::multiply_add(left, right[n], tile.c[m][n]);
      }
      a += a_step;
      b += kPanel;
      ahead += a_step;
      ahead_too += a_step;
    }
    if (add) {
      FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
        FASTATTN_UNROLL for (int n = 0; n < kWide; n++)
            store(c + m * kPanel + n * kLanes, load(c + m * kPanel + n * kLanes) + tile.c[m][n]);
      }
    } else {
      FASTATTN_UNROLL for (int m = 0; m < kRows; m++) {
        FASTATTN_UNROLL for (int n = 0; n < kWide; n++) store(c + m * kPanel + n * kLanes, tile.c[m][n]);
      }
    }
    add = true;
    steps -= now;
  } while (steps > 0);
}

// Calls f with the compile-time constant that equals `count` (1 .. kMost).
template <int kMost, class F>
FASTATTN_INLINE void with_rows(int count, F f) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_rows<kMost - 1>(count, f);
  }
  f(Constant<kMost>{});
}

// `whole` in equal parts of at most `most`, each but the last a multiple of `unit`.
FASTATTN_INLINE int64_t equal_parts(int64_t whole, int64_t most, int64_t unit) {
  return max_of(round_up(ceil_div(whole, max_of(ceil_div(whole, most), 1)), unit), unit);
}
FASTATTN_INLINE int64_t gemm_depth(int64_t steps) { return equal_parts(steps, kGemmDepth, kLanes); }
// Columns of B that are packed together.
FASTATTN_INLINE int64_t gemm_width(int64_t depth, int64_t columns) {
  const int64_t panels = max_of(kGemmBlock / (gemm_panel(depth) * static_cast<int64_t>(sizeof(float))), 1);
  return equal_parts(columns, panels * kPanel, kPanel);
}

// How C is cut into blocks, which are tasks: large ones, because a block packs its part of B for itself, but several
// for every worker. Whoever computes what, the numbers are the same.
struct GemmPlan {
  int64_t rows, columns;  // of a block
  int64_t row_blocks, column_blocks;

  int64_t tasks() const { return row_blocks * column_blocks; }
};

FASTATTN_INLINE GemmPlan gemm_plan(int64_t m, int64_t n, int64_t workers) {
  constexpr int64_t kRowsAtMost = 1024, kRowsAtLeast = 192, kPanelsAtMost = 16, kPanelsAtLeast = 2, kTasksEach = 4;
  GemmPlan plan{};
  int64_t row_blocks = max_of(ceil_div(m, kRowsAtMost), 1);
  int64_t column_blocks = max_of(ceil_div(n, kPanelsAtMost * kPanel), 1);
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

template <class G>
struct GemmScratch {
  typename G::Step* panels;
  typename G::Step* rows;  // of A, where they are copied
  float* sums;             // tiles of kGemmRows x kPanel: one, or all of a block where its depth is cut
};

// Whether the tiles read A where it lies: along its rows, or, where a step is one element, down its columns.
template <class G>
FASTATTN_INLINE bool gemm_in_place(const Gemm& p) {
  return readable<G>(p.a.dtype) && (p.a.lengthwise ? p.k % G::kPack == 0 : G::kPack == 1);
}
// Steps of a copy of kGemmRows rows of A.
FASTATTN_INLINE int64_t gemm_copied(const Gemm& p, int64_t depth) {
  return p.a.lengthwise ? kGemmRows * (round_up(depth, kLanes) + kLanes) : column_tile(depth);
}

// Memory for the blocks of a plan.
template <class G>
GemmScratch<G> gemm_scratch(Arena& arena, const Gemm& p, const GemmPlan& plan) {
  const int64_t all = ceil_div(p.k, G::kPack), depth = gemm_depth(all);
  const int64_t groups = ceil_div(plan.rows, kGemmRows);
  GemmScratch<G> scratch{};
  scratch.panels = arena.take<typename G::Step>(gemm_panel(depth) * (gemm_width(depth, plan.columns) / kPanel));
  scratch.rows = arena.take<typename G::Step>(gemm_in_place<G>(p) ? 0 : groups * gemm_copied(p, depth));
  const int64_t tiles = all > depth ? groups * (round_up(plan.columns, kPanel) / kPanel) : 1;
  scratch.sums = arena.take<float>(tiles * kGemmRows * kPanel);
  return scratch;
}

// The last steps of a product: rows of sums, `row` floats apart, of the columns first .. end of C.
struct GemmSums {
  int64_t m, rows;
  int64_t first, end;
  const float* sums;
  int64_t row;
};

// Where the results of a block will be written, so that their lines can be asked for: nothing else is done with it.
struct GemmTarget {
  const char* data[2];  // the second is another matrix of the same layout, or null
  int64_t row, size;    // bytes: from one row to the next, of an element

  void ask(int64_t m, int64_t rows, int64_t first, int64_t end) const {
    for (int i = 0; i < 2 && data[i] != nullptr; i++)
      for (int64_t r = m; r < m + rows; r++) ask_for(data[i] + r * row + first * size, data[i] + r * row + end * size);
  }
};

// Copies rows m0 .. m1 of A, kGemmRows after kGemmRows.
template <class G>
void copy_rows(const Gemm& p, int64_t k0, int64_t elements, int64_t m0, int64_t m1, typename G::Step* to) {
  const int64_t steps = ceil_div(elements, G::kPack), depth = round_up(steps, kLanes), tile = gemm_copied(p, steps);
  if (p.a.lengthwise) {
    for (int64_t m = m0; m < m1; m++, to += depth + kLanes)
      row_to_steps<G>(p.a.dtype, p.a.at(m, k0), elements, to, depth);
    return;
  }
  for (int64_t m = m0; m < m1; m += kColumnTiles * kGemmRows, to += kColumnTiles * tile)
    pack_columns<G>(p.a, k0, elements, m, min_of(m + kColumnTiles * kGemmRows, m1), to);
}

// The block of C at rows m0 .. m1 and columns n0 .. n1; calls finish(GemmSums) for every tile.
template <class G, class Finish>
void gemm_block(const Gemm& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1, const GemmScratch<G>& scratch,
                GemmTarget target, Finish finish) {
  using Step = typename G::Step;
  constexpr int64_t kStep = sizeof(Step);
  const int64_t all = ceil_div(p.k, G::kPack), part = gemm_depth(all), width = gemm_width(part, n1 - n0);
  const bool in_place = gemm_in_place<G>(p), once = all <= part;
  const int64_t panels = ceil_div(n1 - n0, kPanel);
  for (int64_t s0 = 0; s0 < max_of(all, 1); s0 += part) {
    const int64_t steps = min_of(part, all - s0), segment = equal_parts(steps, kGemmSegment, kLanes);
    const int64_t k0 = s0 * G::kPack, elements = min_of(p.k - k0, steps * G::kPack);
    const int64_t panel = gemm_panel(steps), copied = gemm_copied(p, steps);
    if (!in_place) copy_rows<G>(p, k0, elements, m0, m1, scratch.rows);
    // Where the rows of a tile are: bytes from one to the next, and from a step to the next.
    int64_t a_row = p.a.lengthwise ? p.a.row : kStep, a_step = p.a.lengthwise ? kStep : p.a.row;
    if (!in_place) {
      a_row = p.a.lengthwise ? (round_up(steps, kLanes) + kLanes) * kStep : kStep;
      a_step = p.a.lengthwise ? kStep : kTileRow * kStep;
    }
    const auto rows_at = [&](int64_t m) {
      if (!in_place) return reinterpret_cast<const char*>(scratch.rows + (m - m0) / kGemmRows * copied);
      return p.a.lengthwise ? p.a.at(m, k0) : p.a.at(k0, m);
    };
    for (int64_t first = n0; first < n1; first += width) {
      const int64_t end = min_of(first + width, n1);
      pack_panels<G>(p.b, k0, elements, first, end, scratch.panels);
      for (int64_t m = m0; m < m1; m += kGemmRows) {
        const int64_t rows = min_of(kGemmRows, m1 - m), group = (m - m0) / kGemmRows;
        const int64_t next = m + kGemmRows < m1 ? m + kGemmRows : m0;
        const char *const a = rows_at(m), *const ahead = rows_at(next);
        for (int64_t n = first; n < end; n += kPanel) {
          const int64_t number = (n - first) / kPanel;
          const Step* const b = scratch.panels + number * panel;
          float* const sums = scratch.sums + (once ? 0 : (group * panels + (n - n0) / kPanel) * kGemmRows * kPanel);
          const int64_t row = min_of(2 * number, m1 - next - 1);
          const char *const low = ahead + row * a_row, *const high = ahead + min_of(row + 1, m1 - next - 1) * a_row;
          if (s0 > 0)
            ask_for(reinterpret_cast<const char*>(sums), reinterpret_cast<const char*>(sums + kGemmRows * kPanel));
          if (s0 + part >= all) target.ask(m, rows, n, min_of(n + kPanel, end));
          with_rows<kGemmRows>(static_cast<int>(rows), [&](auto count) {
            constexpr int kRows = decltype(count)::value;
            if (end - n > kPanel - kLanes)
              return gemm_tile<G, kRows, kVectors>(a, a_row, a_step, b, steps, segment, sums, s0 > 0, low, high);
            with_width(static_cast<int>(ceil_div(end - n, kLanes)), [&](auto wide) {
              gemm_tile<G, kRows, decltype(wide)::value>(a, a_row, a_step, b, steps, segment, sums, s0 > 0, low, high);
            });
          });
          if (s0 + part >= all) finish(GemmSums{m, rows, n, min_of(n + kPanel, end), sums, kPanel});
        }
      }
    }
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
