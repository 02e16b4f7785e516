// Loops that show what one thread of this machine can do at most, with one instruction set.
#pragma once
#include "../cpu/types.h"

namespace fastattn {

// read and copy work in steps of this many floats.
constexpr int64_t kCeilingStep = 256;

struct CeilingLoops {
  // Return the floating-point operations done: a multiply-add counts as two. `result` keeps the work alive.
  int64_t (*fma)(int64_t rounds, float* result);
  int64_t (*dot)(int64_t rounds, float* result);  // bf16 pairs into fp32; nullptr without such an instruction
  // `count` is a multiple of kCeilingStep, the pointers are 64-byte aligned.
  void (*read)(const float* source, int64_t count, float* result);
  void (*copy)(const float* source, float* target, int64_t count);
};

}  // namespace fastattn
