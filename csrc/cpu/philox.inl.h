// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"), one stream per lane.
#pragma once
#include "simd/simd.h"

namespace fastattn::FASTATTN_ISA {
namespace {

FASTATTN_INLINE I32 splat_word(uint32_t x) { return splat_int(static_cast<int32_t>(x)); }

// The four counter words become the four random words.
FASTATTN_INLINE void philox(I32 (&c)[4], uint32_t key0, uint32_t key1) {
  const I32 m0 = splat_word(0xD2511F53u), m1 = splat_word(0xCD9E8D57u);
  FASTATTN_UNROLL for (int round = 0; round < 10; round++) {
    I32 high0, low0, high1, low1;
    mul_wide(c[0], m0, high0, low0);
    mul_wide(c[2], m1, high1, low1);
    c[0] = high1 ^ c[1] ^ splat_word(key0);
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ splat_word(key1);
    c[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
