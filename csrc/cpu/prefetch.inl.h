// Rows that will be read or written soon, asked for a few at a time between register tiles. Short heads (a few KB that start
// anew for every head) and rows far apart are beyond what the hardware foresees: waiting for them takes up to a third
// of the time otherwise.
#pragma once
#include "microkernel.inl.h"
#include "simd/simd.h"

namespace fastattn::FASTATTN_ISA {
namespace {

class Prefetch {
 public:
  void add(Operand rows, int64_t count, int64_t bytes) {
    if (used_ < kMost && count > 0) wanted_[used_++] = {rows.data, rows.row, count, bytes};
  }

  FASTATTN_INLINE void step() {
    if (done_ < used_) ask();
  }

 private:
  struct Rows {
    const char* next;
    int64_t row, count, bytes;
  };
  static constexpr int kMost = 12;
  static constexpr int64_t kRowsAtOnce = 8;

  void ask() {
    Rows& rows = wanted_[done_];
    for (int64_t i = min_of(kRowsAtOnce, rows.count); i > 0; i--) {
      for (int64_t at = 0; at < rows.bytes; at += 64) __builtin_prefetch(rows.next + at, 0, 2);
      rows.next += rows.row;
      rows.count--;
    }
    if (rows.count == 0 && ++done_ == used_) done_ = used_ = 0;
  }

  Rows wanted_[kMost];
  int used_ = 0, done_ = 0;
};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
