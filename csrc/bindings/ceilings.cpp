// The loops of csrc/ceilings for fastattn/ceilings.py. Threads come from there: every function works on the calling
// thread, without Python's lock, from `start_at` on (seconds of time.monotonic(); the past means now).
#include <pybind11/pybind11.h>

#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../cpu/table.h"

namespace py = pybind11;

namespace fastattn {
namespace {

const CeilingLoops& loops_of(const std::string& isa) {
  for (const IsaEntry* entry = kIsaEntries; entry->supported != nullptr; entry++) {
    if (entry->table.isa != isa) continue;
    if (!entry->supported()) throw std::invalid_argument(isa + " needs " + entry->needs);
    return *entry->table.ceilings;
  }
  throw std::invalid_argument("this build has no instruction set " + isa);
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void wait_until(double moment) {
  while (now() < moment) {
  }
}

// Best rate, in operations per second, over windows of about a quarter millisecond: shorter than a time slice, so that
// some of them are undisturbed even on a busy machine.
double best_rate(int64_t (*loop)(int64_t, float*), double seconds, double start_at) {
  constexpr double kWindow = 250e-6;
  py::gil_scoped_release unlocked;
  volatile float kept;
  float result = 0.f;
  wait_until(start_at);
  int64_t rounds = 1000;
  double best = 0.0;
  for (const double end = now() + seconds; now() < end;) {
    const double began = now();
    const int64_t operations = loop(rounds, &result);
    const double took = now() - began;
    kept = result;
    if (took < kWindow / 2) {
      rounds *= 2;
    } else {
      best = operations / took > best ? operations / took : best;
    }
  }
  (void)kept;
  return best;
}

struct Span {
  float* data;
  int64_t count;
};

Span floats_of(const py::buffer& buffer, bool writable) {
  const py::buffer_info info = buffer.request(writable);
  const int64_t bytes = info.size * info.itemsize;
  if (bytes == 0 || bytes % (kCeilingStep * 4) != 0 || reinterpret_cast<uintptr_t>(info.ptr) % 64 != 0)
    throw std::invalid_argument("a buffer of a multiple of 1024 bytes, 64-byte aligned, is needed");
  return {static_cast<float*>(info.ptr), bytes / 4};
}

// (began, ended) of `passes` passes, on time.monotonic()'s clock.
template <class Pass>
py::tuple timed(int64_t passes, double start_at, Pass pass) {
  double began, ended;
  {
    py::gil_scoped_release unlocked;
    wait_until(start_at);
    began = now();
    for (int64_t i = 0; i < passes; i++) {
      pass();
      asm volatile("" ::: "memory");  // passes are alike: without this the compiler may keep only one
    }
    ended = now();
  }
  return py::make_tuple(began, ended);
}

py::object fma_rate(const std::string& isa, double seconds, double start_at) {
  return py::float_(best_rate(loops_of(isa).fma, seconds, start_at));
}

py::object dot_rate(const std::string& isa, double seconds, double start_at) {
  const auto loop = loops_of(isa).dot;
  if (loop == nullptr) return py::none();
  return py::float_(best_rate(loop, seconds, start_at));
}

py::tuple read_span(const std::string& isa, const py::buffer& source, int64_t passes, double start_at) {
  const auto loop = loops_of(isa).read;
  const Span from = floats_of(source, false);
  volatile float kept;
  return timed(passes, start_at, [&] {
    float result;
    loop(from.data, from.count, &result);
    kept = result;
  });
}

py::tuple copy_span(const std::string& isa, const py::buffer& source, const py::buffer& target, int64_t passes,
                    double start_at) {
  const auto loop = loops_of(isa).copy;
  const Span from = floats_of(source, false), to = floats_of(target, true);
  if (from.count != to.count) throw std::invalid_argument("copy needs two buffers of one size");
  return timed(passes, start_at, [&] { loop(from.data, to.data, from.count); });
}

}  // namespace

void add_ceilings(py::module_& m) {
  m.def("ceiling_fma", fma_rate, py::arg("isa"), py::arg("seconds"), py::arg("start_at") = 0.0,
        "fp32 multiply-add operations per second (a multiply-add is two), the best window.");
  m.def("ceiling_dot", dot_rate, py::arg("isa"), py::arg("seconds"), py::arg("start_at") = 0.0,
        "bf16 dot-product operations per second; None when the instruction set has no such instruction.");
  m.def("ceiling_read", read_span, py::arg("isa"), py::arg("source"), py::arg("passes"), py::arg("start_at") = 0.0,
        "When reading the buffer `passes` times began and ended.");
  m.def("ceiling_copy", copy_span, py::arg("isa"), py::arg("source"), py::arg("target"), py::arg("passes"),
        py::arg("start_at") = 0.0, "When copying source to target `passes` times began and ended.");
}

}  // namespace fastattn
