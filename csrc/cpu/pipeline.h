// For kernels that work on several rows at once, each row a stage further than the one after it, so that reading,
// computing and writing go on together and evenly.
#pragma once
#include "row.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kAheadBytes = 8192;  // memory is asked for what comes so much later in the row that is read first

// The rows of the tasks that a worker pulls, one after another; -1 when there are no more.
class RowsOfTasks {
 public:
  RowsOfTasks(TaskQueue& queue, int64_t rows, int64_t rows_per_task)
      : queue_(queue), rows_(rows), rows_per_task_(rows_per_task) {}
  int64_t next() {
    if (at_ == end_) {
      const int64_t task = take_task(queue_);
      if (task >= queue_.total) return -1;
      at_ = task * rows_per_task_;
      end_ = min_of(at_ + rows_per_task_, rows_);
    }
    return at_++;
  }

 private:
  TaskQueue& queue_;
  const int64_t rows_, rows_per_task_;
  int64_t at_ = 0, end_ = 0;
};

// Takes rows through stages, one row of each at a time: `lag` rows after its first stage a row is in the second, and so
// on. With a lag of 2 what a stage leaves behind is there when it is reduced for the next one, and nothing waits in
// line behind a chain of reductions; with 1 the rows in between, one less of them, are likelier to be in the first
// cache. Walker:
//   Row, with the index of a row; enter(stage, row): its next stage, not the first, begins; leave(row): it is done
//   sweep<Live>(rows): the stages in the set of bits Live, rows[s] being in stage s
template <int kStages, class Walker>
class Stages {
 public:
  using Row = typename Walker::Row;

  explicit Stages(Walker& walker) : walker_(walker) {}

  void run(RowsOfTasks rows, int64_t lag) {
    const int64_t full = (kStages - 1) * lag;
    int64_t now = 0, index = 0;
    for (; (index = rows.next()) >= 0; now++) {
      ring_[now & kLast].index = index;
      if (now >= full)
        step<true>(now, lag, kAll);
      else
        step<false>(now, lag, kAll & ((2 << now / lag) - 1));
    }
    for (int64_t left = full - 1; left >= 0; left--, now++) {  // rows that are under way, if there were so many
      int live = 0;
      for (int s = 1; s < kStages; s++)
        if (now >= s * lag && left >= full - s * lag) live |= 1 << s;
      step<false>(now, lag, live);
    }
  }

 private:
  static constexpr int kAll = (1 << kStages) - 1;
  static constexpr int64_t kLast = 7;  // of the ring
  static_assert((kStages - 1) * 2 <= kLast, "rows under way are all in the ring");

  template <bool Full>
  FASTATTN_INLINE void step(int64_t now, int64_t lag, int live) {
    Row* at[kStages];
    FASTATTN_UNROLL for (int s = 0; s < kStages; s++) {
      at[s] = &ring_[(now - s * lag) & kLast];
      if (s > 0 && (Full || live & 1 << s)) walker_.enter(s, *at[s]);
    }
    if constexpr (Full)
      walker_.template sweep<kAll>(at);
    else
      sweep_each<kStages - 1>(at, live);
    if (Full || live & 1 << (kStages - 1)) walker_.leave(*at[kStages - 1]);
  }
  template <int kStage>
  void sweep_each(Row* const (&at)[kStages], int live) {
    if (live & 1 << kStage) walker_.template sweep<1 << kStage>(at);
    if constexpr (kStage > 0) sweep_each<kStage - 1>(at, live);
  }

  Walker& walker_;
  Row ring_[kLast + 1] = {};
};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
