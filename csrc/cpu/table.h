// What an instruction set offers: one table of kernels, the only symbol that its object file exports.
#pragma once
#include "../attention/params.h"
#include "../ceilings/params.h"
#include "../cross_entropy/params.h"
#include "../layer_norm/params.h"
#include "../softmax/params.h"
#include "types.h"

namespace fastattn {

struct KernelTable {
  const char* isa;
  Kernel<AttentionForward> attention_forward;
  Kernel<AttentionBackward> attention_backward;
  Kernel<NormForward> norm_forward;  // LayerNorm and RMSNorm
  Kernel<NormBackward> norm_backward;
  Kernel<SoftmaxForward> softmax_forward;
  Kernel<SoftmaxBackward> softmax_backward;
  Kernel<CrossEntropyForward> cross_entropy_forward;
  Kernel<CrossEntropyBackward> cross_entropy_backward;
  CeilingLoops ceilings;
};

// The instruction sets of this binary, best first, nullptr at the end.
struct IsaEntry {
  const KernelTable* table;
  bool (*supported)();
  const char* needs;
};
extern const IsaEntry kIsaEntries[];

// The table in use: FASTATTN_CPU_ISA if it is set, else the best that this machine can run. Chosen once, at load.
// Throws std::invalid_argument for a name that is unknown, not in this binary, or not supported by this machine.
const KernelTable& kernels();

}  // namespace fastattn
