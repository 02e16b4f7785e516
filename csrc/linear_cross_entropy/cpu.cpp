#include "../cpu/export.h"
#include "cpu.inl.h"

FASTATTN_EXPORT(linear_cross_entropy, LinearCrossEntropyKernels, kLinearCrossEntropyKernels)
