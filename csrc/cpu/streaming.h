// How results are written. Past the caches, a line that is written whole need not be fetched first, and nothing that
// will be read again has to make room for it: worth it for results larger than the caches, the callers know. Into the
// caches otherwise, and then the line is asked for a while before: stores are done in order, and wait in line for the
// first of them that misses.
#pragma once
#include "constant.h"
#include "row.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Whether rows of so many columns from p on consist of whole lines. Run finish_streams() after the last one.
template <class T>
FASTATTN_INLINE bool fit_for_streaming(const void* p, int64_t columns) {
  return (reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(columns) * sizeof(T)) % 64 == 0;
}

// Asks for the kPair columns that lie 4 KiB behind p.
template <class T>
FASTATTN_INLINE void prefetch_to_write(T* p) {
  constexpr int64_t kAhead = 4 << 10;
  FASTATTN_UNROLL for (int64_t byte = 0; byte < kPair * static_cast<int64_t>(sizeof(T)); byte += 64)
      __builtin_prefetch(reinterpret_cast<char*>(p) + kAhead + byte, 1);
}

// In the order of Cheapest loads. p: the start of a line wherever it is a Whole pair.
template <bool Streaming, class T>
FASTATTN_INLINE void put_result(T* p, F32x2 x, Whole whole) {
  if constexpr (Streaming) {
    stream_two(p, x.a, x.b);
  } else {
    prefetch_to_write(p);
    put(p, x, Cheapest{}, whole);
  }
}
template <bool Streaming, class T>
FASTATTN_INLINE void put_result(T* p, F32x2 x, Part part) {
  put(p, x, Cheapest{}, part);
}

// body(whether to stream, as a type)
template <class Body>
FASTATTN_INLINE void with_streaming(bool streaming, Body body) {
  if (streaming) {
    body(Constant<true>{});
    finish_streams();
  } else {
    body(Constant<false>{});
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
