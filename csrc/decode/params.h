// Attention of a few queries over a cache of keys and values, plain or paged.
// The cache is (cache rows or pages, slots, kv heads, columns) with any strides (in elements) and adjacent columns;
// so are query and output: (batch, queries, heads, columns).
#pragma once
#include "../cpu/types.h"

namespace fastattn {

constexpr int64_t kDecodeColumnPad = 32;  // columns of a partial sum come in groups of this many

// The keys of one element of the batch: slots begin .. end - 1 of its cache row or, if paged, of its pages.
struct DecodeSequence {
  int64_t begin;
  int64_t end;
  int64_t cache_row;
  const int32_t* pages;
};

struct DecodeCache {
  const void* data;
  int64_t row, slot, head;  // strides; a page is a row
};

struct DecodeForward {
  const void* query;
  int64_t query_batch, query_row, query_head;
  DecodeCache key, value;
  void* output;
  int64_t output_batch, output_row, output_head;
  float* lse;  // (batch, heads, queries)
  const DecodeSequence* sequences;
  int64_t page_size;  // 0: not paged
  int64_t batches, heads, kv_heads, queries, head_dim, value_dim;
  DType dtype;
  float scale;
  float softcap;        // 0: none
  const float* slopes;  // ALiBi, [batch * slopes_batch + head], or null
  int64_t slopes_batch;
  int64_t left, right;  // the window around the diagonal that ends at the last key and query; -1: unbounded

  // How the work is cut, by the binding, and room for it.
  int64_t heads_per_task;  // kv heads
  bool foreseen;           // rows follow each other as the hardware foresees: fetch only where they do not
  int64_t split_keys;      // a multiple of kDecodeChunk
  int64_t splits;          // of the longest sequence
  float* partial;          // splits > 1: of every (batch, kv head, split, row): value_dim padded, maximum, sum
  int64_t partial_width;
  int32_t* arrivals;  // splits > 1: zeros, one for every (batch, group of heads, block of rows)
};

constexpr int64_t kDecodeChunk = 512;  // keys whose scores are kept at a time
constexpr int64_t kDecodeRows = 16;    // query rows (of one kv head) in a task

struct DecodeKernels {
  Kernel<DecodeForward> forward;
};

}  // namespace fastattn
