// Memory. fastattn._C.tune_allocator: what glibc's malloc does with large blocks, for the whole process.
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "fresh.h"

#if defined(__GLIBC__)
#include <dlfcn.h>
#include <link.h>
#include <malloc.h>

#include <cstdlib>
#endif

namespace py = pybind11;

namespace fastattn {
namespace {

using Answer = std::pair<bool, std::string>;

#if defined(__GLIBC__)

constexpr int kMmapThreshold = 1 << 30;
constexpr int kOldMmapThreshold = 32 << 20;  // the most that glibc before 2.26 takes
constexpr int kTopPad = 64 << 20;

std::string file_of(const char* path) {
  const std::string whole = path == nullptr ? "" : path;
  return whole.substr(whole.rfind('/') + 1);
}

// The file that malloc comes from: not libc when an allocator is preloaded or linked in. Where the program itself is
// not position-independent (Debian's python3), the address of malloc is that of a stub in the program, which defines no
// malloc: then it is the first library that does, in the order in which the loader looks.
std::string home_of_malloc() {
  Dl_info info{};
  const ElfW(Sym)* symbol = nullptr;
  if (dladdr1(reinterpret_cast<void*>(&std::malloc), &info, reinterpret_cast<void**>(const_cast<ElfW(Sym)**>(&symbol)),
              RTLD_DL_SYMENT) == 0)
    return "";
  if (symbol != nullptr && symbol->st_shndx != SHN_UNDEF) return file_of(info.dli_fname);
  void* program = dlopen(nullptr, RTLD_NOW);
  link_map* library = nullptr;
  if (program == nullptr || dlinfo(program, RTLD_DI_LINKMAP, &library) != 0) return file_of(info.dli_fname);
  for (library = library->l_next; library != nullptr; library = library->l_next) {
    void* handle = dlopen(library->l_name, RTLD_NOW | RTLD_NOLOAD);
    if (handle == nullptr) continue;
    void* address = dlsym(handle, "malloc");  // the library's own, or that of one which it needs
    Dl_info found{};
    const bool own = address != nullptr && dladdr(address, &found) != 0 &&
                     found.dli_fbase == reinterpret_cast<void*>(library->l_addr);
    dlclose(handle);
    if (own) return file_of(library->l_name);
  }
  return file_of(info.dli_fname);
}

Answer tune_allocator() {
  const std::string home = home_of_malloc();
  if (home.rfind("libc.so", 0) != 0 && home.rfind("libc-", 0) != 0)
    return {false, "malloc is " + (home.empty() ? "an unknown library" : home) + "'s and not glibc's: nothing was set"};
  const bool threshold = mallopt(M_MMAP_THRESHOLD, kMmapThreshold) == 1;
  if (!threshold && mallopt(M_MMAP_THRESHOLD, kOldMmapThreshold) != 1)
    return {false, "glibc refused its own settings: nothing was set"};
  mallopt(M_TRIM_THRESHOLD, -1);
  mallopt(M_TOP_PAD, kTopPad);
  return {true, std::string("glibc: blocks below ") + (threshold ? "1 GiB" : "32 MiB") +
                    " come from the heap, which grows by 64 MiB more than asked for and is never given back"};
}

#elif defined(__APPLE__)
Answer tune_allocator() { return {false, "macOS: its malloc has no such settings, nothing was set"}; }
#else
Answer tune_allocator() { return {false, "this C library is not glibc: nothing was set"}; }
#endif

}  // namespace

void add_allocator(py::module_& m) {
  m.def("tune_allocator", &tune_allocator,
        "(whether malloc was set to keep large blocks, what was done or why not). For the whole process, for good.");
  m.def(
      "allocate_through_dispatcher", [](bool on) { return through_dispatcher.exchange(on); },
      "Whether the ops' results are made by torch's dispatcher, where modes see them; returns what was set before.");
}

}  // namespace fastattn
