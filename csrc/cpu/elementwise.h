// Elementwise kernels walk over (rows, columns) in pieces of a fixed number of elements.
#pragma once
#include "row.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kElementwisePiece = 16384;

struct Pieces {
  int64_t rows, columns;
  int64_t in_row() const { return ceil_div(columns, kElementwisePiece); }                // pieces of a long row
  int64_t rows_of() const { return max_of(kElementwisePiece / max_of(columns, 1), 1); }  // or rows to a piece
  int64_t count() const { return columns == 0 ? 0 : ceil_div(rows, rows_of()) * in_row(); }
};

// body(row, column, columns from there on) for every stretch of a row
template <class Body>
FASTATTN_INLINE void for_pieces(Pieces pieces, TaskQueue& queue, Body body) {
  const int64_t in_row = pieces.in_row(), rows = pieces.rows_of();
  for (int64_t task; (task = take_task(queue)) < queue.total;) {
    const int64_t column = task % in_row * kElementwisePiece, end = min_of((task / in_row + 1) * rows, pieces.rows);
    for (int64_t row = task / in_row * rows; row < end; row++)
      body(row, column, min_of(kElementwisePiece, pieces.columns - column));
  }
}

// A second operand, of T or float32, in the order of Cheapest loads of T.
template <class T, class B, class Where>
FASTATTN_INLINE F32x2 get_beside(const T* kind, const B* p, Where where) {
  if constexpr (sizeof(B) == sizeof(T)) return get(p, Cheapest{}, where);
  return to_cheapest(kind, get(p, Natural{}, where), where);
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
