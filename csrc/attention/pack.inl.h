// Rows of the inputs in the form that the register tiles take: copied only where a conversion or a ragged end asks
// for it. Copies are zero beyond the real rows and columns.
#pragma once
#include "../cpu/arena.inl.h"
#include "../cpu/microkernel.inl.h"
#include "../cpu/simd/simd.h"
#include "params.h"
#include "products.inl.h"

namespace fastattn::FASTATTN_ISA {
namespace {

FASTATTN_INLINE int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::boolean ? 1 : 2; }
FASTATTN_INLINE int64_t padded_columns(int64_t columns) { return round_up(columns, kAttentionColumnPad); }
FASTATTN_INLINE int64_t padded_rows(int64_t rows) { return round_up(rows, kRowPad); }

// Rows `first`.. of one head.
FASTATTN_INLINE Operand head_rows(const AttentionInput& input, DType dtype, int64_t batch, int64_t head,
                                  int64_t first) {
  const int64_t offset = batch * input.batch + head * input.head + first * input.row;
  return {static_cast<const char*>(input.data) + offset * size_of(dtype), input.row * size_of(dtype)};
}
FASTATTN_INLINE Operand head_rows(const AttentionResult& result, DType dtype, int64_t batch, int64_t head,
                                  int64_t first) {
  return head_rows(AttentionInput{result.data, result.batch, result.head, result.row}, dtype, batch, head, first);
}

template <class T>
__attribute__((noinline)) void widen_rows_of(Operand source, int64_t rows, int64_t columns, float* target,
                                             int64_t target_row, int64_t target_rows, float factor) {
  const F32 scale = splat(factor);
  const int64_t whole = columns - columns % kLanes;
  for (int64_t i = 0; i < rows; i++) {
    const T* from = reinterpret_cast<const T*>(source.data + i * source.row);
    float* to = target + i * target_row;
    for (int64_t c = 0; c < whole; c += kLanes) store(to + c, load(from + c) * scale);
    if (whole < columns) store(to + whole, load_first(from + whole, columns - whole) * scale);
    for (int64_t c = round_up(columns, kLanes); c < target_row; c += kLanes) store(to + c, zero());
  }
  if (rows < target_rows)
    memset(target + rows * target_row, 0, static_cast<size_t>((target_rows - rows) * target_row) * sizeof(float));
}

// fp32 copies of rows of any dtype, times `factor`. target_row is a multiple of kLanes.
FASTATTN_INLINE void widen_rows(DType dtype, Operand source, int64_t rows, int64_t columns, float* target,
                                int64_t target_row, int64_t target_rows, float factor = 1.f) {
  if (dtype == DType::f32)
    widen_rows_of<float>(source, rows, columns, target, target_row, target_rows, factor);
  else if (dtype == DType::bf16)
    widen_rows_of<bf16>(source, rows, columns, target, target_row, target_rows, factor);
  else
    widen_rows_of<f16>(source, rows, columns, target, target_row, target_rows, factor);
}

template <class T>
__attribute__((noinline)) void narrow_rows_of(const float* source, int64_t source_row, int64_t rows, int64_t columns,
                                              Operand target, float factor, const float* factors) {
  const int64_t whole = columns - columns % kLanes;
  for (int64_t i = 0; i < rows; i++) {
    const float* from = source + i * source_row;
    T* to = reinterpret_cast<T*>(const_cast<char*>(target.data) + i * target.row);
    const F32 scale = splat(factors == nullptr ? factor : factors[i]);
    for (int64_t c = 0; c < whole; c += kLanes) store(to + c, load(from + c) * scale);
    if (whole < columns) store_first(to + whole, load(from + whole) * scale, columns - whole);
  }
}

// Padded fp32 rows, times `factor` or each times its own, to rows of any dtype.
FASTATTN_INLINE void narrow_rows(DType dtype, const float* source, int64_t source_row, int64_t rows, int64_t columns,
                                 Operand target, float factor, const float* factors = nullptr) {
  if (dtype == DType::f32)
    narrow_rows_of<float>(source, source_row, rows, columns, target, factor, factors);
  else if (dtype == DType::bf16)
    narrow_rows_of<bf16>(source, source_row, rows, columns, target, factor, factors);
  else
    narrow_rows_of<f16>(source, source_row, rows, columns, target, factor, factors);
}

FASTATTN_INLINE void copy_halves(Operand source, int64_t rows, int64_t columns, bf16* target, int64_t target_row,
                                 int64_t target_rows) {
  for (int64_t i = 0; i < rows; i++) {
    memcpy(target + i * target_row, source.data + i * source.row, static_cast<size_t>(columns) * sizeof(bf16));
    memset(target + i * target_row + columns, 0, static_cast<size_t>(target_row - columns) * sizeof(bf16));
  }
  if (rows < target_rows)
    memset(target + rows * target_row, 0, static_cast<size_t>((target_rows - rows) * target_row) * sizeof(bf16));
}

// Copies of rows in the words that products take, `to_row` from one to the next, zero beyond the columns and the rows;
// times `sign`, which is 1, -1 or 0.
template <class G>
FASTATTN_INLINE void copy_rows(DType dtype, Operand from, int64_t count, int64_t columns, float* to, int64_t to_row,
                               int64_t to_rows, float sign) {
  if constexpr (G::kPaired) {
    auto* halves = reinterpret_cast<bf16*>(to);
    copy_halves(from, count, columns, halves, 2 * to_row, to_rows);
    if (sign != 1.f)
      for (int64_t i = 0; i < count * 2 * to_row; i += kLanes) store(halves + i, load(halves + i) * splat(sign));
  } else {
    widen_rows(dtype, from, count, columns, to, to_row, to_rows, sign);
  }
}

// d[c][r] = s[r][c], `rows` and `columns` multiples of kLanes; d has rows of kPanel.
__attribute__((noinline)) void transpose_to_panel(const float* s, int64_t s_row, int64_t rows, int64_t columns,
                                                  float* d) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) transpose_tile(s + r * s_row + c, s_row, d + c * kPanel + r, kPanel);
}
__attribute__((noinline)) void transpose_from_panel(const float* s, int64_t rows, int64_t columns, float* d,
                                                    int64_t d_row) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) transpose_tile(s + c * kPanel + r, kPanel, d + r * d_row + c, d_row);
}

// Going down rows further apart than this again and again takes more pages than the first-level TLB has entries.
constexpr int64_t kFarRows = 1536;

// Rows that a product broadcasts, an element or pair of neighbours at a time: in place if the tiles can read them
// there, else copied to `copy`. Far rows are worth a copy where several panels read them (`shared`).
template <class G>
FASTATTN_INLINE Operand rows_operand(DType dtype, Operand rows, int64_t count, int64_t columns, bool shared,
                                     void* copy) {
  const int64_t copy_row = padded_columns(columns);
  const bool near = !shared || rows.row <= kFarRows;
  if constexpr (G::kPaired) {
    if (near && count % kRowPad == 0 && columns % 2 == 0) return rows;
    copy_halves(rows, count, columns, static_cast<bf16*>(copy), copy_row, padded_rows(count));
    return {static_cast<const char*>(copy), copy_row * static_cast<int64_t>(sizeof(bf16))};
  } else {
    if (near && dtype == DType::f32 && count % kRowPad == 0) return rows;
    widen_rows(dtype, rows, count, columns, static_cast<float*>(copy), copy_row, padded_rows(count));
    return {static_cast<const char*>(copy), copy_row * static_cast<int64_t>(sizeof(float))};
  }
}

// Pairs of neighbouring bf16 rows; an odd last one has a partner of zeros.
template <class G>
FASTATTN_INLINE void interleave(Operand rows, int64_t count, int64_t columns, typename G::Step* to, int64_t to_row) {
  for (int64_t r = 0; r < count; r += 2, to += to_row) {
    const auto* low = reinterpret_cast<const bf16*>(rows.data + r * rows.row);
    const auto* high = r + 1 < count ? reinterpret_cast<const bf16*>(rows.data + (r + 1) * rows.row) : nullptr;
    for (int64_t c = 0; c < columns; c += 2 * kLanes)
      G::interleave(low + c, high == nullptr ? nullptr : high + c, columns - c, to + c);
  }
}

// Steps of a copy of `columns` columns for each row (Single) or pair of rows (Paired).
template <class G>
FASTATTN_INLINE int64_t stretched(int64_t columns) {
  return round_up(columns, stretch_width<G>(columns));
}

// Rows that a product reads in vectors: in place, or copied to `copy`, one stretch behind the other. Stretches of
// longer rows meet in few sets of the first-level cache: when several panels read them, a copy is worth it (`shared`).
template <class G>
__attribute__((noinline)) Stretches columns_operand(DType dtype, Operand rows, int64_t count, int64_t columns,
                                                    bool shared, typename G::Step* copy) {
  constexpr int64_t kWord = sizeof(typename G::Step);
  const int64_t width = stretch_width<G>(columns);
  if (!G::kPaired && dtype == DType::f32 && columns % kLanes == 0 && rows.row <= kFarRows &&
      !(shared && columns > width))
    return {rows.data, columns, width, rows.row, width * kWord};
  const int64_t steps = ceil_div(count, G::kPack);
  for (int64_t first = 0; first < columns; first += width) {
    const Operand stretch = {rows.data + first * size_of(dtype), rows.row};
    const int64_t wide = min_of(width, columns - first);
    if constexpr (G::kPaired)
      interleave<G>(stretch, count, wide, copy + first * steps, width);
    else
      widen_rows(dtype, stretch, count, wide, copy + first * steps, width, count);
  }
  return {reinterpret_cast<const char*>(copy), columns, width, width * kWord, steps * width * kWord};
}

// A panel of rows of queries (or of anything shaped like them), as they are and transposed.
template <class G>
struct PackedRows {
  typename G::Step* transposed;  // (steps, kPanel)
  const float* rows;             // Single: `row` floats apart, zero up to a whole panel
  int64_t row;
  Operand source;  // Paired: the bf16 rows, not padded
  int64_t columns;
  float* copy;

  static PackedRows take(Arena& arena, int64_t columns) {
    PackedRows packed = {};
    const int64_t padded = padded_columns(columns);
    packed.transposed = arena.take<typename G::Step>(padded / G::kPack * kPanel);
    packed.copy = arena.take<float>(kPanel * padded / G::kPack);
    packed.columns = columns;
    return packed;
  }

  int64_t steps() const { return ceil_div(columns, G::kPack); }

  // As they are, for a product that reads them in vectors, those of several panels in turn; `copy_to` is room for a
  // copy.
  Stretches in_vectors(int64_t count, typename G::Step* copy_to) const {
    if constexpr (G::kPaired)
      return columns_operand<G>(DType::bf16, source, count, columns, true, copy_to);
    else
      return columns_operand<G>(DType::f32, {reinterpret_cast<const char*>(rows), row * 4}, count, columns, true,
                                copy_to);
  }

  // Multiplies by `sign`, which is 1, -1 or 0.
  void pack(DType dtype, Operand from, int64_t count, float sign = 1.f) {
    constexpr int64_t kWord = sizeof(float);  // a pair moves through the transpose like one fp32 word
    const int64_t padded = padded_columns(columns) / G::kPack;
    const int64_t padded_count = round_up(count, kLanes);
    source = from;
    if (sign == 1.f && count == padded_count && steps() % kLanes == 0 && columns % G::kPack == 0 &&
        from.row % kWord == 0 && dtype == (G::kPaired ? DType::bf16 : DType::f32)) {
      rows = reinterpret_cast<const float*>(from.data);
      row = from.row / kWord;
    } else {
      rows = copy;
      row = padded;
      copy_rows<G>(dtype, from, count, columns, copy, padded, padded_count, sign);
      if constexpr (G::kPaired) source = {reinterpret_cast<const char*>(copy), padded * kWord};
    }
    transpose_to_panel(rows, row, padded_count, round_up(steps(), kLanes), reinterpret_cast<float*>(transposed));
  }
};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
