// Compiled once for every instruction set (see CMakeLists.txt), with FASTATTN_ISA naming the namespace and
// FASTATTN_KERNELS the exported table.
#include "../attention/cpu.inl.h"
#include "../ceilings/cpu.inl.h"
#include "../cross_entropy/cpu.inl.h"
#include "../layer_norm/cpu.inl.h"
#include "../softmax/cpu.inl.h"
#include "table.h"

#define FASTATTN_QUOTE(x) #x
#define FASTATTN_NAME(x) FASTATTN_QUOTE(x)

extern "C" const fastattn::KernelTable FASTATTN_KERNELS;
const fastattn::KernelTable FASTATTN_KERNELS = {
    FASTATTN_NAME(FASTATTN_ISA),
    fastattn::FASTATTN_ISA::kAttentionForward,
    fastattn::FASTATTN_ISA::kAttentionBackward,
    fastattn::FASTATTN_ISA::kNormForward,
    fastattn::FASTATTN_ISA::kNormBackward,
    fastattn::FASTATTN_ISA::kSoftmaxForward,
    fastattn::FASTATTN_ISA::kSoftmaxBackward,
    fastattn::FASTATTN_ISA::kCrossEntropyForward,
    fastattn::FASTATTN_ISA::kCrossEntropyBackward,
    fastattn::FASTATTN_ISA::kCeilingLoops,
};
