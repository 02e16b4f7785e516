#include "../cpu/export.h"
#include "cpu.inl.h"

FASTATTN_EXPORT(layer_norm, NormKernels, kNormKernels)
