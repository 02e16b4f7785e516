#include "../cpu/export.h"
#include "cpu.inl.h"

FASTATTN_EXPORT(activation, ActivationKernels, kActivationKernels)
