// Rows that will be read or written soon, asked for two cache lines at a time while products are formed: more at once
// would keep those products waiting. Short heads (a few KB that start anew for every head) and rows far apart are
// beyond what the hardware foresees: waiting for them takes up to a third of the time otherwise.
#pragma once
#include "microkernel.inl.h"
#include "simd/simd.h"

namespace fastattn::FASTATTN_ISA {
namespace {

class Prefetch {
 public:
  void add(Operand rows, int64_t count, int64_t bytes) {
    if (used_ == kMost || count <= 0) return;
    if (rows.row == bytes) {
      bytes *= count;
      count = 1;
    }
    wanted_[used_++] = {rows.data, rows.row - bytes, count, bytes, bytes};
  }

  FASTATTN_INLINE void step() {
    if (done_ < used_) ask();
  }

 private:
  struct Rows {
    const char* next;
    int64_t gap, count, bytes, left;  // rows, and of the first of them
  };
  static constexpr int kMost = 12;
  static constexpr int64_t kBytesAtOnce = 128;

  FASTATTN_INLINE void ask() {
    Rows& rows = wanted_[done_];
    const char* next = rows.next;
    const int64_t some = min_of(kBytesAtOnce, rows.left);
    FASTATTN_UNROLL for (int64_t at = 0; at < kBytesAtOnce; at += 64)
        __builtin_prefetch(next + min_of(at, some - 1), 0, 2);
    rows.next = next + some;
    rows.left -= some;
    if (rows.left == 0) end_row(rows);
  }
  __attribute__((noinline)) void end_row(Rows& rows) {
    rows.next += rows.gap;
    rows.left = rows.bytes;
    if (--rows.count == 0 && ++done_ == used_) done_ = used_ = 0;
  }

  Rows wanted_[kMost];
  int used_ = 0, done_ = 0;
};

// multiply() that asks on the way.
template <class G, int kFirst, int kRows, int kWide>
FASTATTN_INLINE void multiply_asking(Tile<kRows, kWide>& tile, const char* a, int64_t a_row, int64_t a_step,
                                     const typename G::Step* b, int64_t b_row, int64_t steps, Prefetch& prefetch) {
  constexpr int64_t kSome = 4;
  for (; steps >= kSome; steps -= kSome) {
    prefetch.step();
    multiply<G, kFirst>(tile, a, a_row, a_step, b, b_row, kSome);
  }
  multiply<G, kFirst>(tile, a, a_row, a_step, b, b_row, steps);
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
