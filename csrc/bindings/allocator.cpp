// Memory. fastattn._C.tune_allocator: what glibc's malloc does with large blocks, for the whole process.
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "fresh.h"

#if defined(__GLIBC__)
#include <dlfcn.h>
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

// The file that malloc comes from: not libc when an allocator is preloaded or linked in.
std::string home_of_malloc() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&std::malloc), &info) == 0 || info.dli_fname == nullptr) return "";
  const std::string path = info.dli_fname;
  return path.substr(path.rfind('/') + 1);
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
