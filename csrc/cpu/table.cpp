#include "table.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastattn {

#if defined(__x86_64__)
extern "C" const KernelTable fastattn_kernels_avx512_bf16;
extern "C" const KernelTable fastattn_kernels_avx512;
extern "C" const KernelTable fastattn_kernels_avx2;
#endif
extern "C" const KernelTable fastattn_kernels_scalar;

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
#endif

const KernelTable& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const char* wanted = std::getenv("FASTATTN_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    for (const IsaEntry* entry = kIsaEntries; entry->table != nullptr; entry++)
      if (entry->supported()) return *entry->table;
  } else {
    std::string names;
    for (const IsaEntry* entry = kIsaEntries; entry->table != nullptr; entry++) {
      if (std::strcmp(entry->table->isa, wanted) == 0) {
        if (entry->supported()) return *entry->table;
        throw std::invalid_argument(std::string("FASTATTN_CPU_ISA=") + wanted + " needs " + entry->needs +
                                    ", which this machine does not have");
      }
      names += names.empty() ? entry->table->isa : std::string(", ") + entry->table->isa;
    }
    throw std::invalid_argument(std::string("FASTATTN_CPU_ISA=") + wanted + " is unknown; this build has " + names);
  }
  throw std::logic_error("no kernel table for this machine");
}

}  // namespace

const IsaEntry kIsaEntries[] = {
#if defined(__x86_64__)
    {&fastattn_kernels_avx512_bf16, has_avx512_bf16, "AVX-512 (F, BW, DQ, VL) and AVX512_BF16"},
    {&fastattn_kernels_avx512, has_avx512, "AVX-512 (F, BW, DQ, VL)"},
    {&fastattn_kernels_avx2, has_avx2, "AVX2, FMA and F16C"},
#endif
    {&fastattn_kernels_scalar, always, "nothing"},
    {nullptr, nullptr, nullptr},
};

const KernelTable& kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

}  // namespace fastattn
