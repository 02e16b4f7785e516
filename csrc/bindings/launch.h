// From a torch op to a kernel: tensors to plain pointers, tasks to torch's thread pool.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../cpu/table.h"
#include "fresh.h"

// torch 2.10's headers have it under this name.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

// An error that says what is wrong and nothing else: no source file, no line, the same words for every backend.
#define FASTATTN_CHECK(condition, ...)                                          \
  do {                                                                          \
    if (!(condition)) throw std::runtime_error(fastattn::message(__VA_ARGS__)); \
  } while (0)

namespace fastattn {

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Bool:
      return DType::boolean;
    default:
      FASTATTN_CHECK(false, "fastattn: the cpu kernels take float32, bfloat16, float16 and bool");
  }
  return DType::f32;
}

inline DType dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

using torch::headeronly::IntHeaderOnlyArrayRef;

// torch 2.10's headers have no == for sizes.
inline bool same_shape(const Tensor& a, const Tensor& b) { return a.sizes().equals(b.sizes()); }

// A fresh contiguous tensor.
inline Tensor empty(IntHeaderOnlyArrayRef sizes, ScalarType type) {
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const auto dims = static_cast<int64_t>(sizes.size());
  constexpr int64_t kMostDims = 64;  // as many as torch has
  AtenTensorHandle fresh = nullptr;
  if (through_dispatcher.load(std::memory_order_relaxed) || dims > kMostDims) {
    // new_empty of some tensor, because torch::stable::empty looks its op up by name: twice the time.
    static const Tensor* const some =
        new Tensor(torch::stable::empty({0}, ScalarType::Float));  // outlives static storage
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_aten_new_empty(some->get(), sizes.data(), dims, &dtype, nullptr, nullptr, 0, nullptr, &fresh));
    return Tensor(fresh);
  }
  int64_t strides[kMostDims];
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; i--) {
    strides[i] = stride;
    stride *= std::max<int64_t>(1, sizes[static_cast<size_t>(i)]);
  }
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes.data(), strides, dtype, aoti_torch_device_type_cpu(), 0, &fresh));
  return Tensor(fresh);
}
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  return empty(IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}
// A workspace or a tensor without elements: nobody needs to see it.
inline Tensor unpoisoned(int64_t elements, ScalarType type) {
  const int64_t stride = 1;
  AtenTensorHandle fresh = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      1, &elements, &stride, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &fresh));
  return Tensor(fresh);
}

// The numbers that a kernel leaves beside its result: a tensor, or memory that is gone afterwards if nobody wants them.
template <bool Wanted>
class Statistic {
 public:
  explicit Statistic(std::initializer_list<int64_t> sizes) : tensor_(empty(sizes, ScalarType::Float)) {}
  float* data() const { return static_cast<float*>(tensor_.mutable_data_ptr()); }
  const Tensor& tensor() const { return tensor_; }

 private:
  Tensor tensor_;
};
template <>
class Statistic<false> {
 public:
  explicit Statistic(std::initializer_list<int64_t> sizes) {
    size_t count = 1;
    for (const int64_t size : sizes) count *= static_cast<size_t>(size);
    memory_.reset(new float[count]);
  }
  float* data() const { return memory_.get(); }

 private:
  std::unique_ptr<float[]> memory_;
};

// What a kernel gives: its outputs, and the statistics if they are wanted.
template <bool Wanted, class... Outputs, class... Rest>
auto results_of(const std::tuple<Outputs...>& outputs, const Statistic<Wanted>& first, const Rest&... rest) {
  if constexpr (Wanted)
    return std::tuple_cat(outputs, std::make_tuple(first.tensor(), rest.tensor()...));
  else if constexpr (sizeof...(Outputs) == 1)
    return std::get<0>(outputs);
  else
    return outputs;
}

// Bytes of the largest cache. Linux says for each cache how much there is (sysconf adds up those of a socket).
inline int64_t last_cache() {
  static const int64_t bytes = [] {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
    int64_t kib = 0;
    return file >> kib && kib > 0 ? kib << 10 : int64_t{32} << 20;
  }();
  return bytes;
}

// A worker's scratch memory: kept for the next call while small, so that no call pays for fresh pages.
class Scratch {
 public:
  static constexpr size_t kKept = size_t{16} << 20;

  char* at_least(int64_t bytes) {
    const size_t wanted = (static_cast<size_t>(bytes) + 63) & ~size_t{63};
    if (wanted > capacity_) {
      release();
      memory_ = static_cast<char*>(std::aligned_alloc(64, wanted));
      if (memory_ == nullptr) throw std::bad_alloc();
      capacity_ = wanted;
    }
    return memory_;
  }
  void trim() {
    if (capacity_ > kKept) release();
  }
  ~Scratch() { release(); }

 private:
  void release() {
    std::free(memory_);
    memory_ = nullptr;
    capacity_ = 0;
  }
  char* memory_ = nullptr;
  size_t capacity_ = 0;
};

inline Scratch& scratch_of_this_thread() {
  static thread_local Scratch scratch;
  return scratch;
}

// Below this many nanoseconds of single-thread work, waking other threads costs more than it saves.
constexpr double kSerialNanoseconds = 50e3;

// Runs a kernel: one parallel region, every worker pulling tasks until there are none. `nanoseconds` is a rough
// estimate of the whole call's work on one thread.
template <class Params>
void launch(const Kernel<Params>& kernel, const Params& params, double nanoseconds) {
  TaskQueue queue{kernel.tasks(params), 0, 0};
  if (queue.total == 0) return;
  const int64_t bytes = kernel.scratch(params);
  const auto work = [&](int64_t, int64_t) {
    Scratch& scratch = scratch_of_this_thread();
    kernel.run(params, queue, scratch.at_least(bytes));
    scratch.trim();
  };
  const int64_t workers =
      nanoseconds < kSerialNanoseconds ? 1 : std::min<int64_t>(queue.total, torch::stable::get_num_threads());
  if (workers == 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, workers, 1, work);
  }
}

}  // namespace fastattn
