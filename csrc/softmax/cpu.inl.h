// softmax and log_softmax, forward and backward, fp32 inside.
//
// Rows (inner == 1): maximum, exponentials and their sum, result; the row sits in cache between the sweeps, the
// exponentials in the output or, widened, in scratch. Rows too long for that are read twice instead: sums of
// exponentials online, then exp(x - max) / sum.
// Columns (inner > 1): the same online sums with `inner` in the lanes; nothing is transposed.
#pragma once
#include "../cpu/logsumexp.h"
#include "../cpu/pipeline.h"
#include "../cpu/streaming.h"
#include "masked.inl.h"
#include "params.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kSoftmaxLongRow = 65536;  // columns: with the exponentials, half a megabyte
constexpr int64_t kSoftmaxTaskElements = 16384;
constexpr int kSoftmaxWidth = kLanes >= 8 ? kRegisters / 8 : 1;  // pairs of registers across `inner`
constexpr int64_t kSoftmaxChunk = 64;  // columns summed up together when `inner` is in the lanes

// 2^-24 more or less does not matter to a result of 8 or 11 bits.
template <class T>
constexpr bool kNarrow = sizeof(T) < sizeof(float);

// Rows between the stages of one: 2 for short ones only, which then stay in the first cache with their exponentials.
FASTATTN_INLINE int64_t softmax_lag(int64_t columns) { return columns <= 1024 ? 2 : 1; }

template <class A, class B>
struct OrderOf {
  using type = Natural;
};
template <class T>
struct OrderOf<T, T> {
  using type = Cheapest;
};
template <class Order>
constexpr bool kIsCheapest = false;
template <>
constexpr bool kIsCheapest<Cheapest> = true;

// In Order, past the caches where Order is that of Cheapest loads of a T.
template <bool Streaming, class Order, class T, class Where>
FASTATTN_INLINE void put_row(T* p, F32x2 x, Order order, Where where) {
  if constexpr (!kOwnOrder<T> || kIsCheapest<Order>)
    put_result<Streaming>(p, x, where);
  else
    put(p, x, order, where);
}

// e^x of a softmax, whose sum is of the same numbers; of a log_softmax, whose dominant term must be 1.
template <bool Log, class T>
FASTATTN_INLINE F32x2 softmax_exp(const T*, F32x2 x) {
  return exp(x);
}
template <bool Log>
FASTATTN_INLINE F32x2 softmax_exp(const bf16* kind, F32x2 x) {
  return Log ? exp_for(kind, x) : exp2<3>(x * splat2(kLog2e));
}

// In three stages: the maximum of a row is found, its exponentials are computed, its results are written.
template <class In, class Out, bool Log, bool Streaming>
class SoftmaxRows {
 public:
  struct Row {
    int64_t index;
    F32x2 tops, sums;
    float top, sum;
    float* kept;  // the exponentials
  };

  // kept: scratch of softmax_lag(columns) rows; not for Log
  SoftmaxRows(const SoftmaxForward& p, float* kept) : p_(p), kept_(kept) {}

  void run(TaskQueue& queue, int64_t rows_per_task) {
    Stages<3, SoftmaxRows>(*this).run(RowsOfTasks(queue, p_.outer, rows_per_task), softmax_lag(p_.columns));
  }

  FASTATTN_INLINE void enter(int stage, Row& row) {
    if (stage == 1) {
      row.top = reduce_max(row.tops);
      // Where the row lies that is written meanwhile: what is there is read before it is overwritten.
      row.kept = kept_ + computed_++ % softmax_lag(p_.columns) * round_up(p_.columns, kPair);
    } else {
      row.sum = reduce_add(row.sums);
    }
  }
  void leave(const Row&) const {}

  template <int Live>
  __attribute__((noinline)) void sweep(Row* const (&rows)[3]) const {
    constexpr bool Read = Live & 1, Compute = Live & 2, Write = Live & 4;
    Row &reading = *rows[0], &computing = *rows[1];
    const Row& writing = *rows[2];
    const In* const x = Read ? input(reading) : nullptr;
    const In* const found = Compute ? input(computing) : nullptr;
    const In* const done = Log && Write ? input(writing) : nullptr;
    Out* const y = Write ? static_cast<Out*>(p_.output) + writing.index * p_.columns : nullptr;
    float* const kept = Compute ? computing.kept : writing.kept;
    F32x2 tops[2] = {splat2(-kInf), splat2(-kInf)}, total = splat2(0.f);
    const F32x2 top = splat2(computing.top), top_of_done = splat2(writing.top);
    const Reciprocal r = reciprocal(writing.sum);
    const F32x2 hi = splat2(r.hi), lo = splat2(r.lo), log_sum = splat2(Log ? __builtin_logf(writing.sum) : 0.f);
    for (int64_t begin = 0; begin < p_.columns; begin += kChunk) {
      F32x2 sums[2] = {splat2(0.f), splat2(0.f)};
      for_columns<2>(min_of(kChunk, p_.columns - begin), [&](int64_t offset, int i, auto where) FASTATTN_LAMBDA {
        const int64_t c = begin + offset;
        if constexpr (Read) {
          prefetch_pair(x + c + kAhead);
          tops[i] = max(tops[i], keep(get(x + c, Cheapest{}, where), splat(-kInf), where));
        }
        if constexpr (Write) {
          if constexpr (Log) {
            put_row<Streaming>(y + c, (get(done + c, Order{}, where) - top_of_done) - log_sum, Order{}, where);
          } else {
            const F32x2 e = get(kept + c, Natural{}, where);
            put_row<Streaming>(y + c, kNarrow<Out> ? e * hi : fma(e, hi, e * lo), Order{}, where);
          }
        }
        if constexpr (Compute) {
          const F32x2 e = softmax_exp<Log>(kKind, get(found + c, Order{}, where) - top);
          sums[i] = sums[i] + keep(e, zero(), where);
          if constexpr (!Log) put(kept + c, e, Natural{}, where);
        }
      });
      total = total + (sums[0] + sums[1]);
    }
    if constexpr (Read) reading.tops = max(tops[0], tops[1]);
    if constexpr (Compute) computing.sums = total;
  }

 private:
  using Order = typename OrderOf<In, Out>::type;
  static constexpr const Out* kKind = nullptr;
  static constexpr int64_t kChunk = 4096;  // columns whose exponentials are summed up together: rounds less
  static constexpr int64_t kAhead = kAheadBytes / sizeof(In);

  const In* input(const Row& row) const { return static_cast<const In*>(p_.input) + row.index * p_.input_stride; }

  const SoftmaxForward& p_;
  float* const kept_;
  int64_t computed_ = 0;  // rows
};

// A row too long for its exponentials to be kept: they are computed again.
template <class In, class Out, bool Log, bool Streaming>
void softmax_long_row(const In* x, Out* y, int64_t columns) {
  using Order = typename OrderOf<In, Out>::type;
  constexpr const Out* kind = nullptr;
  const Exponentials e = sum_exponentials(kind, x, columns, x);
  const F32x2 top = splat2(e.max);
  if constexpr (Log) {
    const F32x2 log_sum = splat2(__builtin_logf(e.sum));
    for_columns<2>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
      put_row<Streaming>(y + c, (get(x + c, Order{}, where) - top) - log_sum, Order{}, where);
    });
  } else {
    const Reciprocal r = reciprocal(e.sum);
    const F32x2 hi = splat2(r.hi), lo = splat2(r.lo);
    for_columns<2>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
      const F32x2 p = exp_for(kind, get(x + c, Order{}, where) - top);
      put_row<Streaming>(y + c, fma(p, hi, p * lo), Order{}, where);
    });
  }
}

// `Width` pairs of lanes, or the part of one pair that is left, at x[column * inner].
template <class In, class Out, bool Log, int Width, class Where>
void softmax_columns(const In* x, Out* y, int64_t columns, int64_t inner, Where where) {
  using Order = typename OrderOf<In, Out>::type;
  constexpr const Out* kind = nullptr;
  F32x2 top[Width], sum[Width];
  FASTATTN_UNROLL for (int u = 0; u < Width; u++) {
    top[u] = splat2(kLowest);
    sum[u] = splat2(0.f);
  }
  for (int64_t begin = 0; begin < columns; begin += kSoftmaxChunk) {
    const int64_t end = min_of(begin + kSoftmaxChunk, columns);
    F32x2 now[Width];
    FASTATTN_UNROLL for (int u = 0; u < Width; u++) now[u] = top[u];
    for (int64_t c = begin; c < end; c++)
      FASTATTN_UNROLL for (int u = 0; u < Width; u++) now[u] =
          max(now[u], get(x + c * inner + u * kPair, Order{}, where));
    FASTATTN_UNROLL for (int u = 0; u < Width; u++) {
      sum[u] = sum[u] * exp(top[u] - now[u]);
      top[u] = now[u];
    }
    F32x2 part[Width];  // of this chunk: short sums round less
    FASTATTN_UNROLL for (int u = 0; u < Width; u++) part[u] = splat2(0.f);
    for (int64_t c = begin; c < end; c++)
      FASTATTN_UNROLL for (int u = 0; u < Width; u++) part[u] =
          part[u] + exp_for(kind, get(x + c * inner + u * kPair, Order{}, where) - top[u]);
    FASTATTN_UNROLL for (int u = 0; u < Width; u++) sum[u] = sum[u] + part[u];
  }
  F32x2 last[Width];  // log of the sum, or its reciprocal
  FASTATTN_UNROLL for (int u = 0; u < Width; u++) {
    if constexpr (Log) {
      float lanes_of[kPair];
      put(lanes_of, sum[u], Natural{}, Whole{});
      for (int64_t i = 0; i < kPair; i++) lanes_of[i] = __builtin_logf(lanes_of[i]);
      last[u] = get(lanes_of, Natural{}, Whole{});
    } else {
      last[u] = splat2(1.f) / sum[u];
    }
  }
  for (int64_t c = 0; c < columns; c++) {
    FASTATTN_UNROLL for (int u = 0; u < Width; u++) {
      const int64_t at = c * inner + u * kPair;
      const F32x2 d = get(x + at, Order{}, where) - top[u];
      if constexpr (Log)
        put(y + at, d - last[u], Order{}, where);
      else
        put(y + at, exp_for(kind, d) * last[u], Order{}, where);
    }
  }
}

template <class In, bool Log>
FASTATTN_INLINE F32x2 softmax_gradient(F32x2 g, F32x2 y, F32x2 sum) {
  constexpr const In* kind = nullptr;
  if constexpr (Log)
    return g - exp_for(kind, y) * sum;
  else
    return y * (g - sum);
}

// In two stages: the sum over a row is taken, its gradient is written.
template <class G, class In, bool Log, bool Streaming>
class SoftmaxBackwardRows {
 public:
  struct Row {
    int64_t index;
    float sum;
  };

  explicit SoftmaxBackwardRows(const SoftmaxBackward& p) : p_(p) {}

  void run(TaskQueue& queue, int64_t rows_per_task) {
    constexpr int64_t kLag = 1;  // two operands: more rows would not fit into the first cache
    Stages<2, SoftmaxBackwardRows>(*this).run(RowsOfTasks(queue, p_.outer, rows_per_task), kLag);
  }

  void enter(int, const Row&) const {}
  void leave(const Row&) const {}

  template <int Live>
  __attribute__((noinline)) void sweep(Row* const (&rows)[2]) const {
    constexpr bool Read = Live & 1, Write = Live & 2;
    Row& reading = *rows[0];
    const Row& writing = *rows[1];
    const G *const dy = Read ? gradient(reading) : nullptr, *const y = Read ? output(reading) : nullptr;
    const G *const done_dy = Write ? gradient(writing) : nullptr, *const done_y = Write ? output(writing) : nullptr;
    In* const dx = Write ? static_cast<In*>(p_.grad_input) + writing.index * p_.columns : nullptr;
    F32x2 sums[2] = {splat2(0.f), splat2(0.f)};
    const F32x2 sum = splat2(writing.sum);
    for_columns<2>(p_.columns, [&](int64_t c, int i, auto where) FASTATTN_LAMBDA {
      if constexpr (Read) {
        prefetch_pair(dy + c + kAhead);
        prefetch_pair(y + c + kAhead);
        const F32x2 g = get(dy + c, Cheapest{}, where);
        sums[i] = Log ? sums[i] + g : fma(g, get(y + c, Cheapest{}, where), sums[i]);
      }
      if constexpr (Write) {
        const F32x2 g = get(done_dy + c, Order{}, where);
        put_row<Streaming>(dx + c, softmax_gradient<In, Log>(g, get(done_y + c, Order{}, where), sum), Order{}, where);
      }
    });
    if constexpr (Read) reading.sum = reduce_add(sums[0] + sums[1]);
  }

 private:
  using Order = typename OrderOf<G, In>::type;
  static constexpr int64_t kAhead = kAheadBytes / sizeof(G);

  const G* gradient(const Row& row) const {
    return static_cast<const G*>(p_.grad_output) + row.index * p_.grad_output_stride;
  }
  const G* output(const Row& row) const { return static_cast<const G*>(p_.output) + row.index * p_.output_stride; }

  const SoftmaxBackward& p_;
};

template <class G, class In, bool Log, int Width, class Where>
void softmax_backward_columns(const G* dy, const G* y, In* dx, int64_t columns, int64_t inner, Where where) {
  using Order = typename OrderOf<G, In>::type;
  F32x2 sum[Width];
  FASTATTN_UNROLL for (int u = 0; u < Width; u++) sum[u] = splat2(0.f);
  for (int64_t begin = 0; begin < columns; begin += kSoftmaxChunk) {
    F32x2 part[Width];
    FASTATTN_UNROLL for (int u = 0; u < Width; u++) part[u] = splat2(0.f);
    for (int64_t c = begin; c < min_of(begin + kSoftmaxChunk, columns); c++) {
      FASTATTN_UNROLL for (int u = 0; u < Width; u++) {
        const int64_t at = c * inner + u * kPair;
        const F32x2 g = get(dy + at, Order{}, where);
        part[u] = Log ? part[u] + g : fma(g, get(y + at, Order{}, where), part[u]);
      }
    }
    FASTATTN_UNROLL for (int u = 0; u < Width; u++) sum[u] = sum[u] + part[u];
  }
  for (int64_t c = 0; c < columns; c++) {
    FASTATTN_UNROLL for (int u = 0; u < Width; u++) {
      const int64_t at = c * inner + u * kPair;
      const F32x2 g = get(dy + at, Order{}, where);
      put(dx + at, softmax_gradient<In, Log>(g, get(y + at, Order{}, where), sum[u]), Order{}, where);
    }
  }
}

// Tasks are runs of units: rows, or (outer, stretch of `inner`) pairs.
constexpr int64_t kSoftmaxStretch = kSoftmaxWidth * kPair;
FASTATTN_INLINE int64_t softmax_units(int64_t outer, int64_t inner) {
  return inner == 1 ? outer : outer * ceil_div(inner, kSoftmaxStretch);
}
FASTATTN_INLINE int64_t softmax_units_per_task(int64_t columns, int64_t inner) {
  return max_of(kSoftmaxTaskElements / max_of(columns * min_of(inner, kSoftmaxStretch), 1), 1);
}

// body(unit, offset, lanes): where the unit starts in a contiguous tensor, and how many lanes of `inner` it has.
template <class Body>
FASTATTN_INLINE void for_softmax_units(int64_t outer, int64_t columns, int64_t inner, TaskQueue& queue, Body body) {
  const int64_t units = softmax_units(outer, inner), per_task = softmax_units_per_task(columns, inner);
  const int64_t stretches = ceil_div(inner, kSoftmaxStretch);
  for (int64_t task; (task = take_task(queue)) < queue.total;) {
    const int64_t end = min_of((task + 1) * per_task, units);
    for (int64_t unit = task * per_task; unit < end; unit++) {
      const int64_t first_lane = unit % stretches * kSoftmaxStretch;
      body(unit, unit / stretches * columns * inner + first_lane, min_of(inner - first_lane, kSoftmaxStretch));
    }
  }
}
// A stretch in pieces: body(width as a type, lane, Whole or Part).
template <int N>
struct Width {
  static constexpr int value = N;
};
template <class Body>
FASTATTN_INLINE void for_lanes(int64_t lanes, Body body) {
  if (lanes == kSoftmaxStretch) return body(Width<kSoftmaxWidth>{}, 0, Whole{});
  for (int64_t lane = 0; lane < lanes; lane += kPair) body(Width<1>{}, lane, Part{min_of(lanes - lane, kPair)});
}

FASTATTN_INLINE bool softmax_is_masked(const SoftmaxForward& p) {
  return p.scale != 1.f || p.mask.data != nullptr || p.causal != SoftmaxCausal::none;
}

template <class In, class Out, bool Log, bool Streaming>
void softmax_forward(const SoftmaxForward& p, TaskQueue& queue, char* scratch) {
  const In* const x = static_cast<const In*>(p.input);
  Out* const y = static_cast<Out*>(p.output);
  float* const space = reinterpret_cast<float*>(scratch);
  if (p.inner == 1 && p.columns <= kSoftmaxLongRow && !softmax_is_masked(p)) {
    SoftmaxRows<In, Out, Log, Streaming>(p, space).run(queue, softmax_units_per_task(p.columns, 1));
    return;
  }
  for_softmax_units(p.outer, p.columns, p.inner, queue, [&](int64_t unit, int64_t at, int64_t lanes) FASTATTN_LAMBDA {
    if (p.inner == 1 && softmax_is_masked(p)) {
      softmax_masked_row<In, Out, Log>(p, x + unit * p.input_stride, y + at, unit, space);
    } else if (p.inner == 1) {
      softmax_long_row<In, Out, Log, Streaming>(x + unit * p.input_stride, y + at, p.columns);
    } else {
      for_lanes(lanes, [&](auto width, int64_t lane, auto where) FASTATTN_LAMBDA {
        softmax_columns<In, Out, Log, decltype(width)::value>(x + at + lane, y + at + lane, p.columns, p.inner, where);
      });
    }
  });
}

template <class G, class In, bool Log, bool Streaming>
void softmax_backward(const SoftmaxBackward& p, TaskQueue& queue) {
  const G* const dy = static_cast<const G*>(p.grad_output);
  const G* const y = static_cast<const G*>(p.output);
  In* const dx = static_cast<In*>(p.grad_input);
  const bool masked = p.scale != 1.f || p.masked || p.causal != SoftmaxCausal::none;
  if (p.inner == 1 && !masked)
    return SoftmaxBackwardRows<G, In, Log, Streaming>(p).run(queue, softmax_units_per_task(p.columns, 1));
  for_softmax_units(p.outer, p.columns, p.inner, queue, [&](int64_t unit, int64_t at, int64_t lanes) FASTATTN_LAMBDA {
    if (p.inner == 1) {
      softmax_masked_backward_row<G, In, Log>(p, dy + unit * p.grad_output_stride, y + unit * p.output_stride, dx + at,
                                              unit);
    } else {
      for_lanes(lanes, [&](auto width, int64_t lane, auto where) FASTATTN_LAMBDA {
        const int64_t i = at + lane;
        softmax_backward_columns<G, In, Log, decltype(width)::value>(dy + i, y + i, dx + i, p.columns, p.inner, where);
      });
    }
  });
}

template <class In, class Out, bool Log>
void softmax_forward(const SoftmaxForward& p, TaskQueue& queue, char* scratch) {
  const bool streaming = p.streaming && p.inner == 1 && fit_for_streaming<Out>(p.output, p.columns);
  with_streaming(streaming, [&](auto stream) FASTATTN_LAMBDA {
    softmax_forward<In, Out, Log, decltype(stream)::value>(p, queue, scratch);
  });
}
template <class In, class Out>
void softmax_forward(const SoftmaxForward& p, TaskQueue& queue, char* scratch) {
  return p.log ? softmax_forward<In, Out, true>(p, queue, scratch) : softmax_forward<In, Out, false>(p, queue, scratch);
}
void run_softmax_forward(const SoftmaxForward& p, TaskQueue& queue, char* scratch) {
  const bool widened = p.output_dtype == DType::f32;
  switch (p.input_dtype) {
    case DType::bf16:
      return widened ? softmax_forward<bf16, float>(p, queue, scratch) : softmax_forward<bf16, bf16>(p, queue, scratch);
    case DType::f16:
      return widened ? softmax_forward<f16, float>(p, queue, scratch) : softmax_forward<f16, f16>(p, queue, scratch);
    default:
      return softmax_forward<float, float>(p, queue, scratch);
  }
}

template <class G, class In, bool Log>
void softmax_backward(const SoftmaxBackward& p, TaskQueue& queue) {
  const bool streaming = p.streaming && p.inner == 1 && fit_for_streaming<In>(p.grad_input, p.columns);
  with_streaming(streaming,
                 [&](auto stream) FASTATTN_LAMBDA { softmax_backward<G, In, Log, decltype(stream)::value>(p, queue); });
}
template <class G, class In>
void softmax_backward(const SoftmaxBackward& p, TaskQueue& queue) {
  return p.log ? softmax_backward<G, In, true>(p, queue) : softmax_backward<G, In, false>(p, queue);
}
void run_softmax_backward(const SoftmaxBackward& p, TaskQueue& queue, char*) {
  const bool widened = p.output_dtype == DType::f32;
  switch (p.input_dtype) {
    case DType::bf16:
      return widened ? softmax_backward<float, bf16>(p, queue) : softmax_backward<bf16, bf16>(p, queue);
    case DType::f16:
      return widened ? softmax_backward<float, f16>(p, queue) : softmax_backward<f16, f16>(p, queue);
    default:
      return softmax_backward<float, float>(p, queue);
  }
}

int64_t softmax_forward_tasks(const SoftmaxForward& p) {
  if (p.columns == 0) return 0;
  return ceil_div(softmax_units(p.outer, p.inner), softmax_units_per_task(p.columns, p.inner));
}
int64_t softmax_forward_scratch(const SoftmaxForward& p) {
  const bool kept = !p.log && p.columns <= kSoftmaxLongRow;
  const bool needed = p.inner == 1 && (kept || softmax_is_masked(p));
  return needed ? softmax_lag(p.columns) * round_up(p.columns, kPair) * static_cast<int64_t>(sizeof(float)) : 0;
}
int64_t softmax_backward_tasks(const SoftmaxBackward& p) {
  if (p.columns == 0) return 0;
  return ceil_div(softmax_units(p.outer, p.inner), softmax_units_per_task(p.columns, p.inner));
}
int64_t softmax_backward_scratch(const SoftmaxBackward&) { return 0; }

constexpr SoftmaxKernels kSoftmaxKernels{{softmax_forward_tasks, softmax_forward_scratch, run_softmax_forward},
                                         {softmax_backward_tasks, softmax_backward_scratch, run_softmax_backward}};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
