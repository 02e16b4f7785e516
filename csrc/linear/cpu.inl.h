// Linear layers: three products on the blocks of csrc/cpu/gemm.inl.h. Forward: rows of the input against rows of the
// weight, bias and activation on the finished sums. Backward: grad against the weight as it lies (grad_input), columns
// of grad against the input (grad_weight), and the sums of grad's columns (grad_bias), all tasks of one call. Sums over
// rows are float32 and in an order that only the number of rows fixes.
#pragma once
#include "../cpu/activation.h"
#include "../cpu/constant.h"
#include "../cpu/gemm.inl.h"
#include "../cpu/row.h"
#include "params.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Calls f with a value of the element type.
template <class F>
FASTATTN_INLINE void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    default:
      return f(float{});
  }
}

// The arithmetic for inputs of a type.
template <class T>
struct ArithmeticOf {
  using G = Single;
};
template <>
struct ArithmeticOf<bf16> {
  using G = Paired;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::G;

FASTATTN_INLINE GemmMatrix gemm_matrix(const LinearMatrix& x, bool inner_along_rows) {
  return {static_cast<const char*>(x.data), x.row * element_size(x.dtype), x.dtype, inner_along_rows != x.transposed};
}

// Calls f with the compile-time constant that equals `kind`, of those that linear has.
template <class F>
FASTATTN_INLINE void with_linear_activation(Activation kind, F f) {
  with_activation<Activation::none, Activation::gelu, Activation::gelu_tanh, Activation::relu>(kind, f);
}

// body(column, elements) for whole registers and the rest of a row.
template <class Body>
FASTATTN_INLINE void for_registers(int64_t columns, Body body) {
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) body(c, Whole{});
  if (c < columns) body(c, Part{columns - c});
}
template <class T>
FASTATTN_INLINE F32 get_register(const T* p, Whole) {
  return load(p);
}
template <class T>
FASTATTN_INLINE F32 get_register(const T* p, Part part) {
  return load_first(p, part.n);
}
template <class T>
FASTATTN_INLINE void put_register(T* p, F32 x, Whole) {
  store(p, x);
}
template <class T>
FASTATTN_INLINE void put_register(T* p, F32 x, Part part) {
  store_first(p, x, part.n);
}

// Finished sums to rows of T, or added to rows of floats.
template <class T>
void store_sums(const GemmSums& s, T* out, int64_t row) {
  for (int64_t r = 0; r < s.rows; r++) {
    T* const to = out + (s.m + r) * row + s.first;
    const float* const from = s.sums + r * s.row;
    for_registers(s.end - s.first,
                  [&](int64_t c, auto where) FASTATTN_LAMBDA { put_register(to + c, load(from + c), where); });
  }
}

void add_sums(const GemmSums& s, float* out, int64_t row) {
  for (int64_t r = 0; r < s.rows; r++) {
    float* const to = out + (s.m + r) * row + s.first;
    const float* const from = s.sums + r * s.row;
    for_registers(s.end - s.first, [&](int64_t c, auto where) FASTATTN_LAMBDA {
      put_register(to + c, get_register(to + c, where) + load(from + c), where);
    });
  }
}

// Sums with bias and activation to rows of T; `bias` holds floats for the columns from n0 on.
template <class T, Activation kind>
void store_activated(const GemmSums& s, const float* bias, int64_t n0, T* out, T* before, int64_t row) {
  for (int64_t r = 0; r < s.rows; r++) {
    const int64_t at = (s.m + r) * row + s.first;
    const float* const from = s.sums + r * s.row;
    for_registers(s.end - s.first, [&](int64_t c, auto where) FASTATTN_LAMBDA {
      const F32 x = load(from + c) + load(bias + s.first - n0 + c);
      if (before != nullptr) put_register(before + at + c, x, where);
      put_register(out + at + c, activate<kind, kFine<T>>(x), where);
    });
  }
}

FASTATTN_INLINE GemmPlan linear_forward_plan(const LinearForward& p) { return gemm_plan(p.rows, p.out, p.workers); }

FASTATTN_INLINE Gemm linear_product(const LinearForward& p) {
  return {gemm_matrix(p.input, true), gemm_matrix(p.weight, true), p.rows, p.out, p.in};
}

struct LinearForwardScratch {
  float* bias;
  template <class G>
  static LinearForwardScratch deal(Arena& arena, const LinearForward& p, const GemmPlan& plan, GemmScratch<G>& gemm) {
    gemm = gemm_scratch<G>(arena, linear_product(p), plan);
    return {arena.take<float>(plan.columns)};
  }
};

int64_t linear_forward_tasks(const LinearForward& p) { return linear_forward_plan(p).tasks(); }

int64_t linear_forward_scratch(const LinearForward& p) {
  Arena arena{0};
  with_type(p.input.dtype, [&](auto element) {
    GemmScratch<Arithmetic<decltype(element)>> gemm;
    LinearForwardScratch::deal(arena, p, linear_forward_plan(p), gemm);
  });
  return static_cast<int64_t>(arena.next);
}

template <class G, class T, Activation kind>
void linear_forward(const LinearForward& p, TaskQueue& queue, char* memory) {
  const Gemm product = linear_product(p);
  const GemmPlan plan = linear_forward_plan(p);
  Arena arena{reinterpret_cast<uintptr_t>(memory)};
  GemmScratch<G> gemm;
  const LinearForwardScratch own = LinearForwardScratch::deal(arena, p, plan, gemm);
  T* const out = static_cast<T*>(p.output);
  T* const before = static_cast<T*>(p.preactivation);
  for (int64_t task; (task = take_task(queue)) < queue.total;) {
    const int64_t m0 = task % plan.row_blocks * plan.rows, m1 = min_of(m0 + plan.rows, p.rows);
    const int64_t n0 = task / plan.row_blocks * plan.columns, n1 = min_of(n0 + plan.columns, p.out);
    if (p.bias != nullptr)
      row_to_steps<Single>(p.bias_dtype, static_cast<const char*>(p.bias) + n0 * element_size(p.bias_dtype), n1 - n0,
                           own.bias, plan.columns);
    else
      memset(own.bias, 0, static_cast<size_t>(plan.columns) * sizeof(float));
    const GemmTarget target{{reinterpret_cast<const char*>(out), reinterpret_cast<const char*>(before)},
                            p.out * int64_t{sizeof(T)},
                            sizeof(T)};
    gemm_block<G>(product, m0, m1, n0, n1, gemm, target, [&](const GemmSums& sums) FASTATTN_LAMBDA {
      if (kind == Activation::none && p.bias == nullptr)
        store_sums(sums, out, p.out);
      else
        store_activated<T, kind>(sums, own.bias, n0, out, before, p.out);
    });
  }
}

void run_linear_forward(const LinearForward& p, TaskQueue& queue, char* memory) {
  if (p.output_dtype != p.input.dtype) {  // floats of 16-bit inputs
    if (p.input.dtype == DType::bf16) return linear_forward<Paired, float, Activation::none>(p, queue, memory);
    return linear_forward<Single, float, Activation::none>(p, queue, memory);
  }
  with_linear_activation(p.activation, [&](auto activation) {
    with_type(p.input.dtype, [&](auto element) {
      using T = decltype(element);
      linear_forward<Arithmetic<T>, T, decltype(activation)::value>(p, queue, memory);
    });
  });
}

constexpr int64_t kActivationElements = 32768;  // of a task

int64_t linear_activation_rows(const LinearActivation& p) { return max_of(kActivationElements / max_of(p.out, 1), 1); }
int64_t linear_activation_tasks(const LinearActivation& p) { return ceil_div(p.rows, linear_activation_rows(p)); }
int64_t linear_activation_scratch(const LinearActivation&) { return 0; }

template <class T, Activation kind>
void linear_activation(const LinearActivation& p, TaskQueue& queue) {
  const int64_t rows = linear_activation_rows(p);
  for (int64_t task; (task = take_task(queue)) < queue.total;) {
    const int64_t end = min_of((task + 1) * rows, p.rows);
    for (int64_t r = task * rows; r < end; r++) {
      const T* const grad = static_cast<const T*>(p.grad.data) + r * p.grad.row;
      const T* const saved = static_cast<const T*>(p.saved.data) + r * p.saved.row;
      T* const out = static_cast<T*>(p.grad_input) + r * p.out;
      for_registers(p.out, [&](int64_t c, auto where) FASTATTN_LAMBDA {
        const F32 x = get_register(saved + c, where);
        const F32 g = get_register(grad + c, where);
        if constexpr (kind == Activation::relu)
          put_register(out + c, select(zero() >= x, zero(), g), where);
        else
          put_register(out + c, g * activation_derivative<kind, kFine<T>>(x), where);
      });
    }
  }
}

void run_linear_activation(const LinearActivation& p, TaskQueue& queue, char*) {
  with_linear_activation(p.activation, [&](auto activation) {
    with_type(p.grad.dtype,
              [&](auto element) { linear_activation<decltype(element), decltype(activation)::value>(p, queue); });
  });
}

// Sums of the columns of grad: kBiasColumns for a task, kBiasRows rows in a partial sum.
constexpr int64_t kBiasColumns = 256, kBiasRows = 64;

// The tasks of a backward: those of grad_weight, then those of grad_input, then those of grad_bias.
struct LinearBackwardPlan {
  Gemm weight_product, input_product;
  GemmPlan weight, input;
  int64_t weight_tasks, input_tasks, bias_tasks;
};

FASTATTN_INLINE LinearBackwardPlan linear_backward_plan(const LinearBackward& p) {
  LinearBackwardPlan plan{};
  plan.weight_product = {gemm_matrix(p.grad, false), gemm_matrix(p.input, false), p.out, p.in, p.rows};
  plan.input_product = {gemm_matrix(p.grad, true), gemm_matrix(p.weight, false), p.rows, p.in, p.out};
  plan.weight = gemm_plan(p.out, p.in, p.workers);
  plan.input = gemm_plan(p.rows, p.in, p.workers);
  plan.weight_tasks = p.grad_weight != nullptr ? plan.weight.tasks() : 0;
  plan.input_tasks = p.grad_input != nullptr ? plan.input.tasks() : 0;
  plan.bias_tasks = p.grad_bias != nullptr ? ceil_div(p.out, kBiasColumns) : 0;
  return plan;
}

int64_t linear_backward_tasks(const LinearBackward& p) {
  const LinearBackwardPlan plan = linear_backward_plan(p);
  return plan.weight_tasks + plan.input_tasks + plan.bias_tasks;
}

int64_t linear_backward_scratch(const LinearBackward& p) {
  const LinearBackwardPlan plan = linear_backward_plan(p);
  int64_t most = 2 * kBiasColumns * static_cast<int64_t>(sizeof(float));
  with_type(p.input.dtype, [&](auto element) {
    using G = Arithmetic<decltype(element)>;
    Arena weight{0}, input{0};
    if (plan.weight_tasks > 0) gemm_scratch<G>(weight, plan.weight_product, plan.weight);
    if (plan.input_tasks > 0) gemm_scratch<G>(input, plan.input_product, plan.input);
    most = max_of(most, max_of(static_cast<int64_t>(weight.next), static_cast<int64_t>(input.next)));
  });
  return most;
}

template <class T>
void sum_columns(const LinearBackward& p, int64_t first, float* memory) {
  const int64_t columns = min_of(kBiasColumns, p.out - first);
  float* const total = memory;
  float* const partial = memory + kBiasColumns;
  memset(total, 0, kBiasColumns * sizeof(float));
  if (p.accumulate)
    memcpy(total, static_cast<const float*>(p.grad_bias) + first, static_cast<size_t>(columns) * sizeof(float));
  for (int64_t r0 = 0; r0 < p.rows; r0 += kBiasRows) {
    memset(partial, 0, kBiasColumns * sizeof(float));
    for (int64_t r = r0; r < min_of(r0 + kBiasRows, p.rows); r++) {
      const T* const row = static_cast<const T*>(p.grad.data) + r * p.grad.row + first;
      if (r + kAskAhead < p.rows)
        ask_for(reinterpret_cast<const char*>(row + kAskAhead * p.grad.row),
                reinterpret_cast<const char*>(row + kAskAhead * p.grad.row + columns));
      for_registers(columns, [&](int64_t c, auto where) FASTATTN_LAMBDA {
        store(partial + c, load(partial + c) + get_register(row + c, where));
      });
    }
    for (int64_t c = 0; c < kBiasColumns; c += kLanes) store(total + c, load(total + c) + load(partial + c));
  }
  with_type(p.bias_dtype, [&](auto element) {
    auto* const out = static_cast<decltype(element)*>(p.grad_bias) + first;
    for_registers(columns,
                  [&](int64_t c, auto where) FASTATTN_LAMBDA { put_register(out + c, load(total + c), where); });
  });
}

template <class G>
void linear_product_task(const Gemm& product, const GemmPlan& plan, int64_t task, DType dtype, bool add, void* out,
                         char* memory) {
  Arena arena{reinterpret_cast<uintptr_t>(memory)};
  const GemmScratch<G> scratch = gemm_scratch<G>(arena, product, plan);
  const int64_t m0 = task % plan.row_blocks * plan.rows, m1 = min_of(m0 + plan.rows, product.m);
  const int64_t n0 = task / plan.row_blocks * plan.columns, n1 = min_of(n0 + plan.columns, product.n);
  const int64_t size = element_size(dtype);
  const GemmTarget target{{static_cast<const char*>(out), nullptr}, product.n * size, size};
  if (add) {
    float* const to = static_cast<float*>(out);
    gemm_block<G>(product, m0, m1, n0, n1, scratch, target,
                  [&](const GemmSums& sums) FASTATTN_LAMBDA { add_sums(sums, to, product.n); });
    return;
  }
  with_type(dtype, [&](auto element) {
    auto* const to = static_cast<decltype(element)*>(out);
    gemm_block<G>(product, m0, m1, n0, n1, scratch, target,
                  [&](const GemmSums& sums) FASTATTN_LAMBDA { store_sums(sums, to, product.n); });
  });
}

template <class G>
void linear_backward(const LinearBackward& p, TaskQueue& queue, char* memory) {
  const LinearBackwardPlan plan = linear_backward_plan(p);
  for (int64_t task; (task = take_task(queue)) < queue.total;) {
    if (task < plan.weight_tasks) {
      linear_product_task<G>(plan.weight_product, plan.weight, task, p.weight_grad_dtype, p.accumulate, p.grad_weight,
                             memory);
    } else if (task < plan.weight_tasks + plan.input_tasks) {
      linear_product_task<G>(plan.input_product, plan.input, task - plan.weight_tasks, p.input_grad_dtype, false,
                             p.grad_input, memory);
    } else {
      const int64_t chunk = task - plan.weight_tasks - plan.input_tasks;
      with_type(p.grad.dtype, [&](auto element) {
        sum_columns<decltype(element)>(p, chunk * kBiasColumns, reinterpret_cast<float*>(memory));
      });
    }
  }
}

void run_linear_backward(const LinearBackward& p, TaskQueue& queue, char* memory) {
  if (p.input.dtype == DType::bf16) return linear_backward<Paired>(p, queue, memory);
  linear_backward<Single>(p, queue, memory);
}

int64_t scale_tasks(const ScaleParams& p) { return ceil_div(p.elements, kActivationElements); }
int64_t scale_scratch(const ScaleParams&) { return 0; }
void run_scale(const ScaleParams& p, TaskQueue& queue, char*) {
  const F32 factor = splat(p.factor);
  with_type(p.dtype, [&](auto element) {
    auto* const to = static_cast<decltype(element)*>(p.to);
    for (int64_t task; (task = take_task(queue)) < queue.total;) {
      const int64_t begin = task * kActivationElements, count = min_of(kActivationElements, p.elements - begin);
      for_registers(count, [&](int64_t c, auto where) FASTATTN_LAMBDA {
        put_register(to + begin + c, get_register(p.from + begin + c, where) * factor, where);
      });
    }
  });
}

constexpr LinearKernels kLinearKernels{{linear_forward_tasks, linear_forward_scratch, run_linear_forward},
                                       {linear_activation_tasks, linear_activation_scratch, run_linear_activation},
                                       {linear_backward_tasks, linear_backward_scratch, run_linear_backward},
                                       {scale_tasks, scale_scratch, run_scale}};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
