// What the attention kernels are told. Strides count elements; the last (column) stride is 1.
#pragma once
#include "../cpu/dropout.h"
#include "../cpu/types.h"

namespace fastattn {

// fp32 accumulators and copies of rows are padded to these, so that no loop over them has a ragged end.
constexpr int64_t kAttentionRowPad = 8;
constexpr int64_t kAttentionColumnPad = 32;

// (batch, head, row, column): the strides of the first three.
struct AttentionInput {
  const void* data;
  int64_t batch, head, row;
};
struct AttentionResult {
  void* data;
  int64_t batch, head, row;
};

// Added to the scaled scores (f32 or the input's dtype), or true where a key takes part. No mask: data == nullptr.
// Strides are 0 along broadcast dimensions.
struct AttentionMask {
  const void* data;
  DType dtype;
  int64_t batch, head, query, key;
  // Where several heads share the mask: what has been found out about its part for a panel of queries and a block of
  // keys, 0 for nothing yet. Zeroed; (batch, head, ceil(queries / kAttentionLeastPanel), ceil(keys / 128)) of the mask.
  uint8_t* kinds;
};
constexpr int64_t kAttentionLeastPanel = 8;

// Which keys a query sees by position: j with i + shift - left <= j <= i + shift + right, and all j < prefix; i and j
// count from the start of their sequence, and shift is 0 or, bottom_right, keys - queries of the sequence.
constexpr int64_t kAttentionUnbounded = int64_t{1} << 40;
struct AttentionWindow {
  int64_t left, right;  // kAttentionUnbounded: no bound. Causal is right = 0
  bool bottom_right;
  const int64_t* prefixes;  // one for each batch element, or nullptr
};

// Query i sees key j only if their ids are equal.
constexpr int64_t kAttentionIdBlock = 128;
struct AttentionDocuments {
  const int32_t *queries, *keys;  // nullptr: none
  int64_t queries_batch, keys_batch;
  const int32_t* key_ranges;  // smallest and largest id of every kAttentionIdBlock keys
  int64_t ranges_batch;
};

// Rows of the inputs that are one sequence, where several are packed one behind the other.
struct AttentionSequence {
  int64_t query_begin, query_end, key_begin, key_end;
};

// A score is softcap(scale * q.k) - slope * |i + shift - j| + mask, where the documents and the window let i see j.
struct AttentionProblem {
  DType dtype;  // of query, key, value and everything shaped like them
  // queries and keys: of every batch element, or of the longest sequences.
  int64_t batches, heads, kv_heads, queries, keys, head_dim, value_dim;
  float scale;
  float softcap;  // c: scores become c * tanh(score / c); 0: they do not
  AttentionWindow window;
  AttentionMask mask;
  AttentionDocuments documents;
  Dropout dropout;      // the counter is (offset, b * heads + h, i, j / 4), and word j % 4 decides about (i, j)
  const float* slopes;  // (batch, head) at slopes_batch * batch + head, or nullptr
  int64_t slopes_batch;
  const float* sinks;                  // (head): a score that every query has and no value, or nullptr
  const AttentionSequence* sequences;  // one for each batch element, or nullptr: each is a whole one
  int64_t lse_batch, lse_head;         // strides of everything with one number for each (batch, head, query)
};

struct AttentionForward {
  AttentionProblem problem;
  AttentionInput query, key, value;
  AttentionResult output;
  float* lse;            // natural logarithm, -inf for rows that see no key and no sink
  int64_t* first_tasks;  // with sequences: room for the number of each one's first task, and the end
};

struct AttentionBackward {
  AttentionProblem problem;
  AttentionInput grad_output, query, key, value, output;
  const float* lse;
  const float* grad_lse;  // the same strides, or nullptr
  float* delta;           // with sinks: rowsum(dO * O) - grad_lse goes here, the same strides; else nullptr
  AttentionResult grad_query, grad_key, grad_value;

  // With few (batch, kv head) pairs, the queries of each are dealt out to `parts` tasks. Each sums its share of
  // grad_key and grad_value into its own slice of `partial`; the last one to finish (arrivals, zeroed, one counter for
  // each pair) adds the slices up in order.
  int64_t parts;
  float* partial;        // (batches * kv_heads, parts, partial_size), nullptr when parts == 1
  int64_t partial_size;  // keys, rounded up to kAttentionRowPad, x (head_dim + value_dim, each to kAttentionColumnPad)
  int32_t* arrivals;

  // Gradient of an additive mask, contiguous, in the mask's dtype; nullptr when nobody asked for it. Each size is 1
  // (the gradient is summed over that dimension) or the problem's own.
  void* grad_mask;
  int64_t grad_mask_batches, grad_mask_heads, grad_mask_queries, grad_mask_keys;
};

struct AttentionKernels {
  Kernel<AttentionForward> forward;
  Kernel<AttentionBackward> backward;
};

}  // namespace fastattn
