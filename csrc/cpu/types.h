// Plain types shared by the kernels and the bindings. Nothing here may have a body that a compiler could keep
// out of line: these headers are compiled once per instruction set, and the linker keeps only one copy.
#pragma once
#include <cstddef>
#include <cstdint>

#define FASTATTN_INLINE inline __attribute__((always_inline))

namespace fastattn {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class DType : int32_t { f32, bf16, f16, boolean };

// By number as fastattn/gpu/activation_kernels.py has them.
enum class Activation : int32_t { none, gelu, gelu_tanh, relu, gelu_sigmoid, silu };

// Tasks of one call, numbered 0 .. total-1, pulled by whichever workers turn up. What a task computes depends on
// its number only, never on who runs it: results do not change with the number of threads.
struct TaskQueue {
  int64_t total;
  int64_t next;      // first task that nobody has taken
  int64_t finished;  // tasks that are complete; whoever finishes the last one may combine partial results
};

// One kernel as the bindings see it. `tasks` and `scratch` (bytes for each worker, 64-byte aligned) are asked once
// per call; `run` is entered by every worker and returns when the queue is empty.
template <class Params>
struct Kernel {
  int64_t (*tasks)(const Params&);
  int64_t (*scratch)(const Params&);
  void (*run)(const Params&, TaskQueue&, char* scratch);
};

}  // namespace fastattn
