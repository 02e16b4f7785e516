// The one symbol of an object file that is compiled for an instruction set: fastattn_<op>_<isa>, the op's kernels.
// Everything else has internal linkage: an inline function that two objects define would be merged by the linker, and a
// machine without AVX-512 could be handed the wrong copy.
#pragma once

#define FASTATTN_JOIN(a, b, c) a##b##_##c
#define FASTATTN_SYMBOL(op, isa) FASTATTN_JOIN(fastattn_, op, isa)
#define FASTATTN_EXPORT(op, Type, kernels)                           \
  extern "C" const fastattn::Type FASTATTN_SYMBOL(op, FASTATTN_ISA); \
  const fastattn::Type FASTATTN_SYMBOL(op, FASTATTN_ISA) = fastattn::FASTATTN_ISA::kernels;
