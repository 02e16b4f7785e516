// fastattn._C: what is no op. The ops register themselves in the same library (attention.cpp and its neighbours).
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../cpu/table.h"

namespace py = pybind11;

namespace fastattn {
void add_allocator(py::module_& m);  // allocator.cpp
void add_ceilings(py::module_& m);   // ceilings.cpp
void add_direct(py::module_& m);     // direct.cpp
}  // namespace fastattn

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native part of fastattn: CPU kernels, registered as torch ops, and facts about the build.";
  m.def(
      "cpu_isa", [] { return std::string(fastattn::kernels().isa); },
      "Name of the instruction set in use; ValueError when FASTATTN_CPU_ISA asks for one that cannot be had.");
  m.def(
      "cpu_isas",
      [] {
        py::list all;
        for (const auto* entry = fastattn::kIsaEntries; entry->supported != nullptr; entry++)
          all.append(py::make_tuple(std::string(entry->table.isa), entry->supported(), std::string(entry->needs)));
        return all;
      },
      "(name, can run here, what it needs) of every instruction set in this build, best first.");
  fastattn::add_allocator(m);
  fastattn::add_ceilings(m);
  fastattn::add_direct(m);
  m.attr("built_with_torch") = FASTATTN_BUILT_WITH_TORCH;
  m.attr("compiler") = FASTATTN_COMPILER;
}
