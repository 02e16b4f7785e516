// What an instruction set offers: the kernels of every op.
#pragma once
#include "../activation/params.h"
#include "../attention/params.h"
#include "../ceilings/params.h"
#include "../cross_entropy/params.h"
#include "../decode/params.h"
#include "../layer_norm/params.h"
#include "../linear/params.h"
#include "../linear_cross_entropy/params.h"
#include "../rotary/params.h"
#include "../softmax/params.h"
#include "../swiglu/params.h"
#include "types.h"

namespace fastattn {

// Every op that has kernels: its folder in csrc/, the type of what its cpu.cpp exports, and a word to pass through.
#define FASTATTN_OPS(X, isa)                              \
  X(activation, ActivationKernels, isa)                   \
  X(attention, AttentionKernels, isa)                     \
  X(ceilings, CeilingLoops, isa)                          \
  X(cross_entropy, CrossEntropyKernels, isa)              \
  X(decode, DecodeKernels, isa)                           \
  X(layer_norm, NormKernels, isa)                         \
  X(linear, LinearKernels, isa)                           \
  X(linear_cross_entropy, LinearCrossEntropyKernels, isa) \
  X(rotary, RotaryKernels, isa)                           \
  X(softmax, SoftmaxKernels, isa)                         \
  X(swiglu, SwigluKernels, isa)

struct KernelTable {
  const char* isa;
#define FASTATTN_MEMBER(op, Type, isa) const Type* op;
  FASTATTN_OPS(FASTATTN_MEMBER, )
#undef FASTATTN_MEMBER
};

// The instruction sets of this binary, best first; the last entry is all zeros.
struct IsaEntry {
  KernelTable table;
  bool (*supported)();
  const char* needs;
};
extern const IsaEntry kIsaEntries[];

// The table in use: FASTATTN_CPU_ISA if it is set, else the best that this machine can run. Chosen once, at load.
// Throws std::invalid_argument for a name that is unknown, not in this binary, or not supported by this machine.
const KernelTable& kernels();

}  // namespace fastattn
