// Rotary position embedding at the speed of a copy: (x, y) -> (x cos - y sin, x sin + y cos), in fp32.
#pragma once
#include "../cpu/row.h"
#include "params.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kRotaryTaskElements = 16384;

FASTATTN_INLINE int64_t rotary_rows_per_task(const Rotary& p) {
  return max_of(kRotaryTaskElements / max_of(p.heads * p.columns, 1), 1);
}
FASTATTN_INLINE int64_t rotary_blocks(const Rotary& p) { return ceil_div(p.longest, rotary_rows_per_task(p)); }

FASTATTN_INLINE void turn(F32 cos, F32 sin, F32& x, F32& y) {
  const F32 turned = fnma(y, sin, x * cos);
  y = fma(x, sin, y * cos);
  x = turned;
}

template <class T>
FASTATTN_INLINE void copy_rest(const T* from, T* to, int64_t columns) {
  if (columns > 0 && from != to) memcpy(to, from, static_cast<size_t>(columns) * sizeof(T));
}

// Column i turns with column i + half.
template <class T, class Table>
FASTATTN_INLINE void turn_halves(const T* x, T* y, const Table* cos, const Table* sin, F32x2 sign, int64_t half) {
  for_columns<2>(half, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
    F32x2 low = get(x + c, Natural{}, where), high = get(x + half + c, Natural{}, where);
    const F32x2 co = get(cos + c, Natural{}, where), si = get(sin + c, Natural{}, where) * sign;
    turn(co.a, si.a, low.a, high.a);
    turn(co.b, si.b, low.b, high.b);
    put(y + c, low, Natural{}, where);
    put(y + half + c, high, Natural{}, where);
  });
}

// Column 2i turns with column 2i + 1.
template <class T, class Table>
FASTATTN_INLINE void turn_neighbours(const T* x, T* y, const Table* cos, const Table* sin, F32x2 sign, int64_t half) {
  for_columns<2>(2 * half, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
    F32x2 pair = get(x + c, Natural{}, where);
    const int64_t angles = min_of(kLanes, half - c / 2);
    const F32 co = angles == kLanes ? load(cos + c / 2) : load_first(cos + c / 2, angles);
    const F32 si = angles == kLanes ? load(sin + c / 2) : load_first(sin + c / 2, angles);
    deinterleave(pair.a, pair.b);
    turn(co, si * sign.a, pair.a, pair.b);
    interleave(pair.a, pair.b);
    put(y + c, pair, Natural{}, where);
  });
}

template <class T, class Table, bool kInterleaved>
void rotary(const Rotary& p, TaskQueue& queue) {
  const int64_t per_task = rotary_rows_per_task(p), blocks = rotary_blocks(p);
  const F32x2 sign = splat2(p.inverse ? -1.f : 1.f);
  for (int64_t task; (task = take_task(queue)) < queue.total;) {
    const RotarySequence& sequence = p.sequences[task / blocks];
    const int64_t begin = task % blocks * per_task, end = min_of(begin + per_task, sequence.rows);
    for (int64_t row = begin; row < end; row++) {
      const T* const x = static_cast<const T*>(p.input) + sequence.input + row * p.input_row;
      T* const y = static_cast<T*>(p.output) + sequence.output + row * p.output_row;
      const Table* const cos = static_cast<const Table*>(p.cos) + (sequence.position + row) * p.cos_row;
      const Table* const sin = static_cast<const Table*>(p.sin) + (sequence.position + row) * p.sin_row;
      for (int64_t h = 0; h < p.heads; h++) {
        const T* const from = x + h * p.input_head;
        T* const to = y + h * p.output_head;
        if constexpr (kInterleaved)
          turn_neighbours(from, to, cos, sin, sign, p.half);
        else
          turn_halves(from, to, cos, sin, sign, p.half);
        copy_rest(from + 2 * p.half, to + 2 * p.half, p.columns - 2 * p.half);
      }
    }
  }
}

template <class T, class Table>
void rotary(const Rotary& p, TaskQueue& queue) {
  return p.interleaved ? rotary<T, Table, true>(p, queue) : rotary<T, Table, false>(p, queue);
}
void run_rotary(const Rotary& p, TaskQueue& queue, char*) {
  const bool wide = p.table_dtype == DType::f32;
  switch (p.dtype) {
    case DType::bf16:
      return wide ? rotary<bf16, float>(p, queue) : rotary<bf16, bf16>(p, queue);
    case DType::f16:
      return wide ? rotary<f16, float>(p, queue) : rotary<f16, f16>(p, queue);
    default:
      return rotary<float, float>(p, queue);
  }
}

int64_t rotary_tasks(const Rotary& p) { return p.count * rotary_blocks(p); }
int64_t rotary_scratch(const Rotary&) { return 0; }

constexpr RotaryKernels kRotaryKernels{{rotary_tasks, rotary_scratch, run_rotary}};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
