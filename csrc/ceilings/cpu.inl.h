// What the machine can do at most: loops of nothing but independent multiply-adds, loads, or loads and stores.
#pragma once
#include "../cpu/simd/simd.h"
#include "params.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Sums in flight: at least latency x throughput of a multiply-add (4 x 2; the bf16 dot product 6 x 2), and two
// registers left for its operands.
constexpr int kCeilingSums = kRegisters >= 32 ? 16 : 12;

FASTATTN_INLINE void start_sums(F32 (&sums)[kCeilingSums]) {
  FASTATTN_UNROLL for (int i = 0; i < kCeilingSums; i++) sums[i] = splat(static_cast<float>(i));
}

template <int N>
FASTATTN_INLINE void keep_sums(const F32 (&sums)[N], float* result) {
  F32 total = sums[0];
  FASTATTN_UNROLL for (int i = 1; i < N; i++) total = total + sums[i];
  store_first(result, total, 1);
}

int64_t ceiling_fma(int64_t rounds, float* result) {
  F32 sums[kCeilingSums];
  start_sums(sums);
  const F32 factor = splat(0.999f), term = splat(1e-3f);  // the sums tend to 1: no subnormals, no infinities
  for (int64_t round = 0; round < rounds; round++)
    FASTATTN_UNROLL for (int i = 0; i < kCeilingSums; i++) sums[i] = fma(sums[i], factor, term);
  keep_sums(sums, result);
  return rounds * kCeilingSums * kLanes * 2;
}

#if defined(FASTATTN_HAS_DOT2)
int64_t ceiling_dot(int64_t rounds, float* result) {
  F32 sums[kCeilingSums];
  start_sums(sums);
  // x * x - x * x with x = 0.504: GCC 12 takes 0.5 for an immediate of fp16, which no plain ARMv8 has.
  const Pairs a = splat_pair(0x3f013f01u), b = splat_pair(0xbf013f01u);
  for (int64_t round = 0; round < rounds; round++)
    FASTATTN_UNROLL for (int i = 0; i < kCeilingSums; i++) sums[i] = dot2(sums[i], a, b);
  keep_sums(sums, result);
  return rounds * kCeilingSums * kLanes * 4;
}
#else
constexpr int64_t (*ceiling_dot)(int64_t, float*) = nullptr;
#endif

void ceiling_read(const float* source, int64_t count, float* result) {
  constexpr int kSums = 8;
  F32 sums[kSums];
  FASTATTN_UNROLL for (int i = 0; i < kSums; i++) sums[i] = zero();
  for (int64_t at = 0; at < count; at += kSums * kLanes)
    FASTATTN_UNROLL for (int i = 0; i < kSums; i++) sums[i] = sums[i] + load(source + at + i * kLanes);
  keep_sums(sums, result);
}

void ceiling_copy(const float* source, float* target, int64_t count) {
  constexpr int kUnroll = 4;
  for (int64_t at = 0; at < count; at += kUnroll * kLanes)
    FASTATTN_UNROLL for (int i = 0; i < kUnroll; i++) store(target + at + i * kLanes, load(source + at + i * kLanes));
}

constexpr CeilingLoops kCeilingLoops{ceiling_fma, ceiling_dot, ceiling_read, ceiling_copy};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
