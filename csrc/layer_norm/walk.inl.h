// How both passes walk over rows, so that memory never waits for arithmetic.
//
// Every row is read twice: for what must be known of all of it (mean, sums), then for the result. While one row's
// results are written, the sums of a later one are read: reading and writing proceed together and evenly as in a copy,
// and the reductions at the end of a row have finished long before somebody needs them. Rows follow each other one at a
// time: several at once are several streams, which memory likes much less, the second cache included.
//
// A row that is written is at most three rows old, so that short ones are still in the first cache. Long ones are taken
// in blocks, and these in segments, so that weight and bias of a segment stay there for all rows of a block.
#pragma once
#include "../cpu/philox.inl.h"
#include "../cpu/streaming.h"
#include "params.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kBlockRows = 4;
constexpr int64_t kSegment = 1024;           // columns
constexpr int64_t kBlockBytes = 64 << 10;    // of rows, per tensor read: a block is read again, from the second cache
constexpr int64_t kPrefetchBytes = 4 << 10;  // memory is asked for what comes so much later

FASTATTN_INLINE int64_t rows_of_block(int64_t columns, int64_t element) {
  return max_of(1, min_of(kBlockRows, kBlockBytes / max_of(columns * element, 1)));
}

// Where one segment of a row starts, and how many columns it has.
struct Segment {
  int64_t first, count;
};

// Walks over all rows of the tasks in `queue`. Walker:
//   Row, begin_row(row, index); read_and_write<Read, Write>(reading, ahead, writing, segment); finish_row(row)
//   begin_task(number, first, end) gives the task's rows; finish_task(): all its rows have been read
//   kLag: how many rows after it a short row is written. It is finished just before that row kLag - 1 after it is read:
//   what comes next must not wait in line behind a chain of reductions whose operands are not there yet.
// ahead: index of the row whose same segment is worth fetching.
template <class Walker>
class Walk {
 public:
  using Row = typename Walker::Row;

  Walk(Walker& walker, int64_t rows, int64_t columns, int64_t element)
      : walker_(walker),
        rows_(rows),
        columns_(columns),
        segments_(max_of(ceil_div(columns, kSegment), 1)),
        most_(rows_of_block(columns, element)),
        distance_(max_of(1, min_of(kPrefetchBytes / max_of(min_of(columns, kSegment) * element, 1), kBlockRows))) {}

  void run(TaskQueue& queue) {
    if (segments_ == 1)
      run_rows(queue);
    else
      run_blocks(queue);
  }

 private:
  struct Block {
    int64_t first = 0, count = 0;
    Row rows[kBlockRows] = {};
  };

  void run_rows(TaskQueue& queue) {
    constexpr int64_t kLag = Walker::kLag;
    static_assert(kLag < kBlockRows, "the ring has as many rows as a block");
    Row* const ring = blocks_[0].rows;
    const auto row = [&](int64_t number) -> Row& { return ring[number % kBlockRows]; };
    const Segment all{0, columns_};
    int64_t count = 0;  // rows read; those before count - kLag + 1 are finished, those before count - kLag written
    for (int64_t task; (task = take_task(queue)) < queue.total;) {
      int64_t first, end;
      walker_.begin_task(task, first, end);
      for (; first < end; first++, count++) {
        const int64_t ahead = min_of(first + distance_, rows_ - 1);
        walker_.begin_row(row(count), first);
        if (count >= kLag - 1) walker_.finish_row(row(count - kLag + 1));
        if (count >= kLag)
          walker_.template read_and_write<true, true>(row(count), ahead, 0, row(count - kLag), all);
        else
          walker_.template read_and_write<true, false>(row(count), ahead, 0, row(count), all);
      }
      walker_.finish_task(queue);
    }
    for (int64_t number = max_of(count - kLag, 0); number < count; number++) {
      if (number > count - kLag) walker_.finish_row(row(number));
      walker_.template read_and_write<false, true>(row(number), 0, 0, row(number), all);
    }
  }

  void run_blocks(TaskQueue& queue) {
    for (int64_t task; (task = take_task(queue)) < queue.total;) {
      int64_t first, end;
      walker_.begin_task(task, first, end);
      for (; first < end; first += most_) advance(first, min_of(most_, end - first));
      walker_.finish_task(queue);
    }
    for_segments<false, true>(blocks_[now_], blocks_[1 - now_]);
  }

  void advance(int64_t first, int64_t count) {
    Block& writing = blocks_[1 - now_];
    Block& reading = blocks_[now_];
    reading.first = first;
    reading.count = count;
    for (int64_t r = 0; r < count; r++) walker_.begin_row(reading.rows[r], first + r);
    if (reading.count == writing.count) {
      for_segments<true, true>(reading, writing);
    } else {
      for_segments<true, false>(reading, writing);
      for_segments<false, true>(reading, writing);
    }
    now_ = 1 - now_;
  }

  template <bool Read, bool Write>
  void for_segments(Block& reading, Block& writing) {
    const int64_t count = Read ? reading.count : writing.count;
    for (int64_t s = 0; s < segments_; s++) {
      const Segment segment{s * kSegment, min_of(columns_ - s * kSegment, kSegment)};
      for (int64_t r = 0; r < count; r++) {
        Row& row = reading.rows[r];
        int64_t later = r + distance_, shift = 0;
        if (later >= count) {  // the next segment of this block, or the next block
          later -= count;
          if (s + 1 < segments_) {
            shift = kSegment;
          } else {
            later += count;
            shift = -segment.first;
          }
        }
        walker_.template read_and_write<Read, Write>(row, min_of(reading.first + later, rows_ - 1), shift,
                                                     writing.rows[r], segment);
        if (Read && s + 1 == segments_) walker_.finish_row(row);
      }
    }
  }

  Walker& walker_;
  const int64_t rows_, columns_, segments_, most_, distance_;
  Block blocks_[2];
  int now_ = 0;
};

// ---- what both passes need ----

// weight (plus its offset) or bias as floats in the order of Cheapest loads of a T: itself if it is that already, else
// a copy.
template <class T, class A>
FASTATTN_INLINE void copy_affine(const A* from, float offset, float* to, int64_t columns) {
  for_columns<1>(columns, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
    const F32x2 x = get(from + c, Natural{}, where) + splat2(offset);
    put(to + c, to_cheapest(static_cast<const T*>(nullptr), x, where), Natural{}, where);
  });
}
template <class T>
const float* affine(const void* from, DType dtype, float offset, float absent, float* to, int64_t columns) {
  if (from == nullptr) {
    for_columns<1>(columns,
                   [&](int64_t c, int, auto where) FASTATTN_LAMBDA { put(to + c, splat2(absent), Natural{}, where); });
  } else if (dtype != DType::f32) {
    copy_affine<T>(static_cast<const T*>(from), offset, to, columns);
  } else if (!kOwnOrder<T> && offset == 0.f) {
    return static_cast<const float*>(from);
  } else {
    copy_affine<T>(static_cast<const float*>(from), offset, to, columns);
  }
  return to;
}

// A pair of an I, in the order of Cheapest loads of a T.
template <class T, class I, class Where>
FASTATTN_INLINE F32x2 get_like(const I* p, Where where) {
  if constexpr (kOwnOrder<T> || !kOwnOrder<I>) {
    static_assert(!kOwnOrder<T> || kOwnOrder<I>, "the only narrower inputs are those of float sums");
    return get(p, Cheapest{}, where);
  } else {
    return get(p, Natural{}, where);
  }
}
template <class T, class I, class Where>
FASTATTN_INLINE void put_like(I* p, F32x2 x, Where where) {
  if constexpr (kOwnOrder<T> || !kOwnOrder<I>)
    put(p, x, Cheapest{}, where);
  else
    put(p, x, Natural{}, where);
}

// What dropout multiplies the elements of a segment by: keep_scale or 0. Counter (offset, row / 2^32, row, column / 4),
// word column % 4.
__attribute__((noinline)) void fill_dropout(const Dropout& dropout, int64_t row, Segment segment, float* factors) {
  const I32 low = splat_word(static_cast<uint32_t>(row)), high = splat_word(static_cast<uint32_t>(row >> 32));
  const I32 threshold = splat_word(dropout.threshold);
  for (int64_t c = 0; c < segment.count; c += 4 * kLanes) {
    I32 words[4] = {splat_word(dropout.offset), high, low,
                    iota() + splat_word(static_cast<uint32_t>((segment.first + c) / 4))};
    philox(words, dropout.seed[0], dropout.seed[1]);
    F32 f[4];
    FASTATTN_UNROLL for (int w = 0; w < 4; w++) f[w] =
        select(unsigned_ge(words[w], threshold), splat(dropout.keep_scale), zero());
    interleave(f[0], f[2]);  // columns 0, 2, 4, ... in f[0] and f[2]
    interleave(f[1], f[3]);
    interleave(f[0], f[1]);
    interleave(f[2], f[3]);
    FASTATTN_UNROLL for (int i = 0; i < 4; i++) store(factors + c + i * kLanes, f[i]);
  }
}
constexpr int64_t kFactors = kSegment + 4 * kLanes;

template <int Unroll>
FASTATTN_INLINE float total(const F32x2 (&sums)[Unroll]) {
  F32x2 sum = sums[0];
  FASTATTN_UNROLL for (int i = 1; i < Unroll; i++) sum = sum + sums[i];
  return reduce_add(sum);
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
