// The SIMD vocabulary: every kernel is written once on these words, and each instruction set defines them.
//
//   kLanes                     floats in a register; kRegisters: how many registers there are
//   F32, I32, Mask             registers of kLanes floats, 32-bit integers, truth values
//   load(p) load_first(p, n)   from float, bf16, f16 (widened); load_first reads 0 <= n <= kLanes, the rest is 0
//   store(p, x) store_first    to float, bf16, f16 (rounded to nearest even, NaN kept)
//   load_two(p, a, b)          2*kLanes bf16 in whatever order is cheapest; store_two(p, a, b) takes them back;
//   split_two(a, b)            brings 2*kLanes consecutive elements into that order, join_two(a, b) back
//   fma(a, b, c) = a*b + c     fnma(a, b, c) = c - a*b, fms(a, b, c) = a*b - c: rounded once if kFusedFma
//   max(a, b)                  b when either is NaN (put the value that may be NaN second)
//   select(m, a, b)            m ? a : b
//   scale2(x, n)               x * 2^n for integral n of any size; n = -inf gives 0
//   scale2_small(x, n)         the same for 1/2 <= x < 2 and n < 127, quicker where it may give 0 for n < -125
//   step_power(s, m)           2^m for m a multiple of 1 / kSteps and below 127, where s is the sum m + kStepShift; 0
//   where
//                              m < -125
//   split_exponent(x, m)       x = m * 2^result with 1 <= m < 2, for positive normal x; NaN gives m = NaN
//   add_moments(p, s, q)       adds 2*kLanes bf16 to s and their squares to q; which lane gets which does not matter
//   interleave(a, b)           a0 b0 a1 b1 ... in a, the rest in b
//   stream_two(p, a, b)        like store_two (of bf16, or in order), to a 2*kLanes aligned p and past the caches where
//                              the machine can; finish_streams() before another thread may look
//   transpose(x)               kLanes registers as a square, transposed; transpose_tile(s, ls, d, ld) in memory:
//                              d[c*ld + r] = s[r*ls + c]
//   to_float(n)                the nearest float
//   deinterleave(a, b)         the even elements of 2*kLanes consecutive ones in a, the odd ones in b
//   sum_four(a, b, c, d)       in every block of four lanes: the sums of that block of a, b, c and d
//   join_sums(t)               of kLanes / 4 results of sum_four: lane 4*i + j is the sum of all lanes of argument j
//                              of t[i]
//   repeat_four(p, a, b)       two of four elements (float, bf16, f16) in every two lanes of a, the other two in b
//   sum_pairs(a, b, c, d, x, y)  in every block of four lanes: the sums of that block's first two lanes of a, b, c
//                              and d in x, of its last two in y
//   transpose_fours(t)         kLanes / 4 registers as a square of blocks of four lanes, transposed
//   mul_wide(a, b, hi, lo)     32 x 32 -> 64 bit product of unsigned lanes (Philox)
//
// With FASTATTN_HAS_DOT2 (AVX512_BF16, NEON_BF16) also Pairs of bf16:
//   dot2(acc, a, b)            acc + the products of the low and of the high halves
//   pack_pairs(lo, hi)         lane i holds lo[i] and hi[i]; narrow_two(lo, hi): consecutive
//   interleave_rows(lo, hi, n, out)  pairs of two rows of n elements, 2*kLanes of them, zero from n on
//   as_pairs(x)                the same bits
//   repeat_pairs(p)            the same four bf16 in every two lanes
//   zip_rows(low, high, a, b)  pairs of what stands in one column of two rows, in the cheapest order of columns;
//   order_columns(a, b)        brings sums in that order back into the natural one
//
// Everything lives in an anonymous namespace inside fastattn::<isa>: an object file exports its table and nothing else.
#pragma once
#include <cstring>

#include "../types.h"

#define FASTATTN_UNROLL _Pragma("GCC unroll 32")

#if defined(FASTATTN_ISA_AVX512) || defined(FASTATTN_ISA_AVX512_BF16)
#include "avx512.h"
#elif defined(FASTATTN_ISA_AVX2)
#include "avx2.h"
#elif defined(FASTATTN_ISA_NEON) || defined(FASTATTN_ISA_NEON_BF16)
#include "neon.h"
#elif defined(FASTATTN_ISA_SCALAR)
#include "scalar.h"
#else
#error "no instruction set chosen: define FASTATTN_ISA_<NAME>"
#endif

namespace fastattn::FASTATTN_ISA {
namespace {

FASTATTN_INLINE int64_t take_task(TaskQueue& queue) { return __atomic_fetch_add(&queue.next, 1, __ATOMIC_RELAXED); }

// True for exactly one caller: the one whose task was the last to finish; it sees what all the others wrote.
FASTATTN_INLINE bool finish_task(TaskQueue& queue) {
  return __atomic_add_fetch(&queue.finished, 1, __ATOMIC_ACQ_REL) == queue.total;
}

// Sums with it are rounded to multiples of 1 / kSteps, and end in their number of steps.
constexpr float kStepShift = 12582912.f / kSteps;

FASTATTN_INLINE void transpose_tile(const float* s, int64_t ls, float* d, int64_t ld) {
  F32 x[kLanes];
  FASTATTN_UNROLL for (int i = 0; i < kLanes; i++) x[i] = load(s + i * ls);
  transpose(x);
  FASTATTN_UNROLL for (int i = 0; i < kLanes; i++) store(d + i * ld, x[i]);
}

FASTATTN_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FASTATTN_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
FASTATTN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTATTN_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
