#include "../cpu/export.h"
#include "cpu.inl.h"

FASTATTN_EXPORT(decode, DecodeKernels, kDecodeKernels)
