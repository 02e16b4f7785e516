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

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
