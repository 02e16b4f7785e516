#include "table.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace fastattn {

// What every op's cpu.cpp exports for an instruction set (csrc/cpu/export.h).
#define FASTATTN_DECLARE(op, Type, isa) extern "C" const Type fastattn_##op##_##isa;
#define FASTATTN_ADDRESS(op, Type, isa) &fastattn_##op##_##isa,
#define FASTATTN_TABLE(isa) {#isa, FASTATTN_OPS(FASTATTN_ADDRESS, isa)}

FASTATTN_OPS(FASTATTN_DECLARE, scalar)
#if defined(__x86_64__)
FASTATTN_OPS(FASTATTN_DECLARE, avx2)
FASTATTN_OPS(FASTATTN_DECLARE, avx512)
FASTATTN_OPS(FASTATTN_DECLARE, avx512_bf16)
#elif defined(__aarch64__)
FASTATTN_OPS(FASTATTN_DECLARE, neon)
FASTATTN_OPS(FASTATTN_DECLARE, neon_bf16)
#endif

namespace {

bool always() { return true; }

#if defined(__x86_64__)
// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#elif defined(__linux__) && defined(__aarch64__)
bool has_neon_bf16() { return (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0; }
#elif defined(__APPLE__) && defined(__aarch64__)
bool has_neon_bf16() {
  int answer = 0;
  size_t size = sizeof(answer);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &answer, &size, nullptr, 0) == 0 && answer != 0;
}
#elif defined(__aarch64__)
bool has_neon_bf16() { return false; }
#endif

const KernelTable& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const char* wanted = std::getenv("FASTATTN_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    for (const IsaEntry* entry = kIsaEntries; entry->supported != nullptr; entry++)
      if (entry->supported()) return entry->table;
  } else {
    std::string names;
    for (const IsaEntry* entry = kIsaEntries; entry->supported != nullptr; entry++) {
      if (std::strcmp(entry->table.isa, wanted) == 0) {
        if (entry->supported()) return entry->table;
        throw std::invalid_argument(std::string("FASTATTN_CPU_ISA=") + wanted + " needs " + entry->needs +
                                    ", which this machine does not have");
      }
      names += names.empty() ? entry->table.isa : std::string(", ") + entry->table.isa;
    }
    throw std::invalid_argument(std::string("FASTATTN_CPU_ISA=") + wanted + " is unknown; this build has " + names);
  }
  throw std::logic_error("no kernel table for this machine");
}

}  // namespace

const IsaEntry kIsaEntries[] = {
#if defined(__x86_64__)
    {FASTATTN_TABLE(avx512_bf16), has_avx512_bf16, "AVX-512 (F, BW, DQ, VL) and AVX512_BF16"},
    {FASTATTN_TABLE(avx512), has_avx512, "AVX-512 (F, BW, DQ, VL)"},
    {FASTATTN_TABLE(avx2), has_avx2, "AVX2, FMA and F16C"},
#elif defined(__aarch64__)
    {FASTATTN_TABLE(neon_bf16), has_neon_bf16, "FEAT_BF16 (ARMv8.6)"},
    {FASTATTN_TABLE(neon), always, "nothing"},
#endif
    {FASTATTN_TABLE(scalar), always, "nothing"},
    {{}, nullptr, nullptr},
};

const KernelTable& kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

}  // namespace fastattn
