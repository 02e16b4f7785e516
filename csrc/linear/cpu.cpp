#include "../cpu/export.h"
#include "cpu.inl.h"

FASTATTN_EXPORT(linear, LinearKernels, kLinearKernels)
