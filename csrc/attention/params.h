// What the attention kernels are told. Strides count elements; the last (column) stride is 1.
#pragma once
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
};

// Philox4x32-10 under key `seed` at counter (offset, b * heads + h, i, j / 4) decides about (i, j) with its word
// j % 4: kept iff word >= threshold. Kept probabilities grow by keep_scale = 1 / (1 - p); p = 1 has keep_scale 0.
struct AttentionDropout {
  bool enabled;
  uint32_t threshold;
  uint32_t seed[2];
  uint32_t offset;
  float keep_scale;
};

struct AttentionProblem {
  DType dtype;  // of query, key, value and everything shaped like them
  int64_t batches, heads, kv_heads, queries, keys, head_dim, value_dim;
  float scale;
  bool causal;
  int64_t causal_shift;  // causal: query i sees key j iff j <= i + causal_shift
  AttentionMask mask;
  AttentionDropout dropout;
};

struct AttentionForward {
  AttentionProblem problem;
  AttentionInput query, key, value;
  AttentionResult output;
  float* lse;  // (batch, head, query) contiguous, natural logarithm, -inf for rows that see no key
};

struct AttentionBackward {
  AttentionProblem problem;
  AttentionInput grad_output, query, key, value, output;
  const float* lse;       // (batch, head, query) contiguous
  const float* grad_lse;  // the same shape, or nullptr
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
