#include "../cpu/export.h"
#include "cpu.inl.h"

FASTATTN_EXPORT(cross_entropy, CrossEntropyKernels, kCrossEntropyKernels)
