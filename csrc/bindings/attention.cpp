// fastattn::attention on the CPU.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "direct.h"
#include "dropout.h"
#include "launch.h"

namespace fastattn {
namespace {

constexpr int64_t kMostColumns = 512;
constexpr int64_t kMostRows = (int64_t{1} << 31) - 1;  // rows, columns and heads are words of the dropout counter
// With fewer (batch, kv head) pairs than this, a backward pass deals out the queries of each.
constexpr int64_t kFewPairs = 8;
constexpr int64_t kPartQueries = 128;                      // a part has at least this many
constexpr int64_t kMostPartialBytes = int64_t{256} << 20;  // of all parts together

void check_rows(const char* what, const Tensor& tensor, ScalarType type, int64_t batches, int64_t heads, int64_t rows,
                int64_t columns) {
  FASTATTN_CHECK(tensor.dim() == 4 && tensor.size(0) == batches && tensor.size(1) == heads && tensor.size(2) == rows &&
                     tensor.size(3) == columns && tensor.scalar_type() == type,
                 "attention: ", what, " must have shape (", batches, ", ", heads, ", ", rows, ", ", columns,
                 ") and the dtype of query");
  FASTATTN_CHECK(tensor.stride(3) == 1 || columns <= 1, "attention: ", what, " must have a last stride of 1, got ",
                 tensor.stride(3));
}

AttentionInput input_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}
AttentionResult result_of(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// A fresh (batch, head, row, column) tensor, with rows outside heads in memory where `like` has them so.
Tensor empty_like_order(int64_t batches, int64_t heads, int64_t rows, int64_t columns, const Tensor& like) {
  if (like.stride(1) < like.stride(2))
    return torch::stable::transpose(empty({batches, rows, heads, columns}, like.scalar_type()), 1, 2);
  return empty({batches, heads, rows, columns}, like.scalar_type());
}

// What there may be beyond the mask, as it is handed over.
struct Features {
  int64_t window_left, window_right;
  double softcap;
  const std::optional<Tensor>&sinks, &slopes, &query_ids, &key_ids, &prefix_len;
};

// What kernels read of them, where the tensors are not in that form.
struct FeatureStorage {
  std::vector<float> sinks, slopes;
  std::vector<int32_t> query_ids, key_ids, ranges;
  std::vector<int64_t> prefixes;
  std::vector<uint8_t> mask_kinds;
};

template <class T, class To>
void copy_as(const Tensor& tensor, std::vector<To>& to) {
  const auto* from = static_cast<const T*>(tensor.const_data_ptr());
  for (size_t i = 0; i < to.size(); i++) to[i] = static_cast<To>(from[i]);
}

// The numbers of a tensor, row after row.
std::vector<float> floats_of(const char* what, const Tensor& given) {
  const Tensor tensor = given.is_contiguous() ? given : torch::stable::contiguous(given);
  std::vector<float> numbers(static_cast<size_t>(tensor.numel()));
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      copy_as<float>(tensor, numbers);
      break;
    case ScalarType::BFloat16:
      copy_as<torch::headeronly::BFloat16>(tensor, numbers);
      break;
    case ScalarType::Half:
      copy_as<torch::headeronly::Half>(tensor, numbers);
      break;
    default:
      FASTATTN_CHECK(false, "attention: ", what, " must be float32, bfloat16 or float16");
  }
  return numbers;
}
std::vector<int64_t> integers_of(const char* what, const Tensor& given) {
  const Tensor tensor = given.is_contiguous() ? given : torch::stable::contiguous(given);
  std::vector<int64_t> numbers(static_cast<size_t>(tensor.numel()));
  FASTATTN_CHECK(tensor.scalar_type() == ScalarType::Int || tensor.scalar_type() == ScalarType::Long,
                 "attention: ", what, " must be int32 or int64");
  if (tensor.scalar_type() == ScalarType::Int)
    copy_as<int32_t>(tensor, numbers);
  else
    copy_as<int64_t>(tensor, numbers);
  return numbers;
}

// Ids only have to be told apart: those that do not fit 32 bits are replaced by their ranks.
void documents_of(const Tensor& queries, const Tensor& keys, AttentionProblem& p, FeatureStorage& storage) {
  const auto fits = [&](const Tensor& ids, int64_t length) {
    return ids.dim() == 2 && (ids.size(0) == 1 || ids.size(0) == p.batches) && ids.size(1) == length;
  };
  FASTATTN_CHECK(fits(queries, p.queries) && fits(keys, p.keys), "attention: document ids must have shape (1 or ",
                 p.batches, ", ", p.queries, ") of queries and (1 or ", p.batches, ", ", p.keys, ") of keys");
  const std::vector<int64_t> wide_queries = integers_of("document ids", queries);
  const std::vector<int64_t> wide_keys = integers_of("document ids", keys);
  std::vector<int64_t> ranks;
  const auto small = [](int64_t id) { return id == static_cast<int32_t>(id); };
  if (!std::all_of(wide_queries.begin(), wide_queries.end(), small) ||
      !std::all_of(wide_keys.begin(), wide_keys.end(), small)) {
    ranks = wide_queries;
    ranks.insert(ranks.end(), wide_keys.begin(), wide_keys.end());
    std::sort(ranks.begin(), ranks.end());
    ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
  }
  const auto narrow = [&](const std::vector<int64_t>& wide, std::vector<int32_t>& ids) {
    ids.resize(wide.size());
    for (size_t i = 0; i < wide.size(); i++)
      ids[i] = static_cast<int32_t>(
          ranks.empty() ? wide[i] : std::lower_bound(ranks.begin(), ranks.end(), wide[i]) - ranks.begin());
  };
  narrow(wide_queries, storage.query_ids);
  narrow(wide_keys, storage.key_ids);
  const int64_t blocks = (p.keys + kAttentionIdBlock - 1) / kAttentionIdBlock;
  for (int64_t batch = 0; batch < keys.size(0); batch++)
    for (int64_t first = 0; first < p.keys; first += kAttentionIdBlock) {
      const auto begin = storage.key_ids.begin() + batch * p.keys + first;
      const auto ends = std::minmax_element(begin, begin + std::min(kAttentionIdBlock, p.keys - first));
      storage.ranges.push_back(*ends.first);
      storage.ranges.push_back(*ends.second);
    }
  const auto stride = [](const Tensor& ids, int64_t size) { return ids.size(0) == 1 ? 0 : size; };
  // Without queries or keys there is nothing to point at.
  if (!storage.query_ids.empty() && !storage.key_ids.empty())
    p.documents = {storage.query_ids.data(), storage.key_ids.data(), stride(queries, p.queries),
                   stride(keys, p.keys),     storage.ranges.data(),  stride(keys, 2 * blocks)};
}

// Room for what heads that share a mask find out about it. (Prefixes let every batch element look at other keys.)
void share_mask(AttentionProblem& p, FeatureStorage& storage) {
  const bool shared = (p.mask.head == 0 && p.heads > 1) || (p.mask.batch == 0 && p.batches > 1);
  if (p.mask.data == nullptr || p.mask.query == 0 || !shared || p.window.prefixes != nullptr) return;
  const auto blocks = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  const int64_t slices = (p.mask.batch == 0 ? 1 : p.batches) * (p.mask.head == 0 ? 1 : p.heads);
  storage.mask_kinds.resize(
      static_cast<size_t>(slices * blocks(p.queries, kAttentionLeastPanel) * blocks(p.keys, kAttentionIdBlock)));
  p.mask.kinds = storage.mask_kinds.data();
}

void add_features(const Features& features, AttentionProblem& p, FeatureStorage& storage) {
  FASTATTN_CHECK(features.window_left >= -1 && features.window_right >= -1,
                 "attention: window must hold two numbers of at least -1, got (", features.window_left, ", ",
                 features.window_right, ")");
  if (features.window_left >= 0) p.window.left = std::min(features.window_left, kAttentionUnbounded);
  if (features.window_right >= 0) p.window.right = std::min(p.window.right, features.window_right);
  FASTATTN_CHECK(std::isfinite(features.softcap) && features.softcap >= 0.0, "attention: softcap must be finite and",
                 " not negative, got ", features.softcap);
  p.softcap = static_cast<float>(features.softcap);
  if (features.sinks) {
    FASTATTN_CHECK(features.sinks->dim() == 1 && features.sinks->size(0) == p.heads, "attention: sinks must have ",
                   "shape (", p.heads, ")");
    storage.sinks = floats_of("sinks", *features.sinks);
    p.sinks = storage.sinks.data();
  }
  if (features.slopes) {
    const Tensor& slopes = *features.slopes;
    const int64_t dims = slopes.dim();
    FASTATTN_CHECK((dims == 1 && slopes.size(0) == p.heads) ||
                       (dims == 2 && slopes.size(0) == p.batches && slopes.size(1) == p.heads),
                   "attention: alibi_slopes must have shape (", p.heads, ") or (", p.batches, ", ", p.heads, ")");
    storage.slopes = floats_of("alibi_slopes", slopes);
    p.slopes = storage.slopes.data();
    p.slopes_batch = dims == 2 ? p.heads : 0;
  }
  if (features.query_ids && features.key_ids) documents_of(*features.query_ids, *features.key_ids, p, storage);
  if (features.prefix_len) {
    storage.prefixes = integers_of("prefix_len", *features.prefix_len);
    if (storage.prefixes.size() == 1) storage.prefixes.resize(static_cast<size_t>(p.batches), storage.prefixes[0]);
    FASTATTN_CHECK(static_cast<int64_t>(storage.prefixes.size()) == p.batches,
                   "attention: prefix_len must have shape (", p.batches, ") or (1)");
    for (const int64_t prefix : storage.prefixes)
      FASTATTN_CHECK(prefix >= 0 && prefix <= p.keys, "attention: prefix_len must be in [0, ", p.keys, "], got ",
                     prefix);
    p.window.prefixes = storage.prefixes.data();
  }
  share_mask(p, storage);
}

// Of sinks: each query's probability of the sink times what its gradient lacks, summed in an order of its own.
Tensor sink_gradient(const AttentionProblem& p, const std::optional<Tensor>& sinks, const float* lse,
                     const float* delta, int64_t rows) {
  if (!sinks) return empty({0}, ScalarType::Float);
  Tensor gradient = empty({p.heads}, sinks->scalar_type());
  for (int64_t head = 0; head < p.heads; head++) {
    const double sink = p.sinks[head];
    double sum = 0.0;
    for (int64_t batch = 0; batch < (p.sequences == nullptr ? p.batches : 1); batch++)
      for (int64_t i = 0; i < rows; i++) {
        const int64_t at = batch * p.lse_batch + head * p.lse_head + i;
        if (!std::isinf(lse[at])) sum -= std::exp(sink - static_cast<double>(lse[at])) * static_cast<double>(delta[at]);
      }
    void* data = gradient.mutable_data_ptr();
    if (sinks->scalar_type() == ScalarType::Float)
      static_cast<float*>(data)[head] = static_cast<float>(sum);
    else if (sinks->scalar_type() == ScalarType::BFloat16)
      static_cast<torch::headeronly::BFloat16*>(data)[head] = static_cast<float>(sum);
    else
      static_cast<torch::headeronly::Half*>(data)[head] = static_cast<float>(sum);
  }
  return gradient;
}

// Checks the inputs and describes them; everything but features and dropout.
AttentionProblem problem_of(const Tensor& query, const Tensor& key, const Tensor& value,
                            const std::optional<Tensor>& mask, double scale, bool is_causal, bool bottom_right) {
  FASTATTN_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                 "attention: query, key and value must have 4 dimensions");
  const ScalarType type = query.scalar_type();
  FASTATTN_CHECK(type != ScalarType::Bool, "attention: query must be float32, bfloat16 or float16");
  AttentionProblem p{};
  p.dtype = dtype_of(type);
  p.batches = query.size(0);
  p.heads = query.size(1);
  p.kv_heads = key.size(1);
  p.queries = query.size(2);
  p.keys = key.size(2);
  p.head_dim = query.size(3);
  p.value_dim = value.size(3);
  check_rows("query", query, type, p.batches, p.heads, p.queries, p.head_dim);
  check_rows("key", key, type, p.batches, p.kv_heads, p.keys, p.head_dim);
  check_rows("value", value, type, p.batches, p.kv_heads, p.keys, p.value_dim);
  FASTATTN_CHECK(p.kv_heads == 0 ? p.heads == 0 : p.heads % p.kv_heads == 0,
                 "attention: query heads must be a multiple of key heads, got ", p.heads, " and ", p.kv_heads);
  FASTATTN_CHECK(p.head_dim >= 1 && p.head_dim <= kMostColumns && p.value_dim >= 1 && p.value_dim <= kMostColumns,
                 "attention: head dims must be in [1, ", kMostColumns, "], got ", p.head_dim, " and ", p.value_dim);
  FASTATTN_CHECK(p.queries <= kMostRows && p.keys <= kMostRows, "attention: at most ", kMostRows,
                 " queries and keys, got ", p.queries, " and ", p.keys);
  FASTATTN_CHECK(std::isfinite(scale), "attention: scale must be finite, got ", scale);
  p.scale = static_cast<float>(scale);
  p.window = {kAttentionUnbounded, is_causal ? 0 : kAttentionUnbounded, bottom_right, nullptr};
  p.lse_batch = p.heads * p.queries;
  p.lse_head = p.queries;
  if (mask) {
    const int64_t full[4] = {p.batches, p.heads, p.queries, p.keys};
    bool fits = mask->dim() == 4;
    for (int64_t i = 0; fits && i < 4; i++) fits = mask->size(i) == 1 || mask->size(i) == full[i];
    FASTATTN_CHECK(fits, "attention: every dimension of mask must be 1 or that of (", full[0], ", ", full[1], ", ",
                   full[2], ", ", full[3], ")");
    const ScalarType mask_type = mask->scalar_type();
    FASTATTN_CHECK(mask_type == ScalarType::Bool || mask_type == ScalarType::Float || mask_type == type,
                   "attention: mask must be bool, float32 or of the dtype of query");
    const auto stride = [&](int64_t i) { return mask->size(i) == 1 ? 0 : mask->stride(i); };
    p.mask = {mask->const_data_ptr(), dtype_of(mask_type), stride(0), stride(1), stride(2), stride(3), nullptr};
  }
  return p;
}

// Of the forward pass on one thread: two products, at 100 GF/s in fp32.
double nanoseconds_of(const AttentionProblem& p) {
  const int64_t half = p.keys / 2;
  const auto seen =
      static_cast<double>(std::min(p.keys, std::min(half, p.window.left) + std::min(half, p.window.right) + 1));
  // Of one query it is the way of the keys and values into the registers that takes its time.
  constexpr int64_t kFewest = 4;
  const auto queries = static_cast<double>(std::max(p.queries, kFewest));
  const double products =
      static_cast<double>(p.batches * p.heads) * queries * seen * static_cast<double>(p.head_dim + p.value_dim);
  return products * 2.0 / (p.dtype == DType::bf16 ? 200.0 : 100.0);
}

template <bool with_lse>
auto attention_forward(Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask, std::optional<Tensor> philox,
                       double scale, bool is_causal, bool bottom_right, double dropout_p, int64_t window_left,
                       int64_t window_right, double softcap, std::optional<Tensor> sinks,
                       std::optional<Tensor> alibi_slopes, std::optional<Tensor> query_ids,
                       std::optional<Tensor> key_ids, std::optional<Tensor> prefix_len) {
  AttentionForward p{};
  p.problem = problem_of(query, key, value, mask, scale, is_causal, bottom_right);
  FeatureStorage storage;
  add_features({window_left, window_right, softcap, sinks, alibi_slopes, query_ids, key_ids, prefix_len}, p.problem,
               storage);
  p.problem.dropout = dropout_of("attention", philox, dropout_p);
  const AttentionProblem& problem = p.problem;
  Tensor output = empty_like_order(problem.batches, problem.heads, problem.queries, problem.value_dim, query);
  const Statistic<with_lse> lse({problem.batches, problem.heads, problem.queries});
  p.query = input_of(query);
  p.key = input_of(key);
  p.value = input_of(value);
  p.output = result_of(output);
  p.lse = lse.data();
  launch(kernels().attention->forward, p, nanoseconds_of(problem));
  return results_of(std::tuple(output), lse);
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Into how many parts the queries of each (batch, kv head) go: a matter of the problem only, so that sums are the same
// on every machine.
int64_t parts_of(const AttentionProblem& p, int64_t partial_size) {
  int64_t pairs = p.batches * p.kv_heads;
  if (pairs == 0) return 1;
  int64_t even = pairs;  // as many as there would be if all sequences were as long as the longest
  if (p.sequences != nullptr) {
    double all = 0.0, most = 1.0;
    for (int64_t i = 0; i < p.batches; i++) {
      const AttentionSequence& rows = p.sequences[i];
      const double work =
          static_cast<double>(rows.query_end - rows.query_begin) * static_cast<double>(rows.key_end - rows.key_begin);
      all += work;
      most = std::max(most, work);
    }
    even = std::max<int64_t>(1, static_cast<int64_t>(all / most * static_cast<double>(p.kv_heads)));
  }
  if (even >= kFewPairs) return 1;
  const int64_t wanted = (kFewPairs + even - 1) / even;
  const int64_t queries = p.heads / p.kv_heads * round_up(p.queries, kPartQueries) / kPartQueries;
  const int64_t affordable = kMostPartialBytes / std::max<int64_t>(1, pairs * partial_size * int64_t{sizeof(float)});
  return std::max<int64_t>(1, std::min({wanted, queries, affordable}));
}

// What tasks that share keys add up.
struct PartialSums {
  std::optional<Tensor> memory;
  std::vector<int32_t> arrivals;

  void give(AttentionBackward& p) {
    const AttentionProblem& problem = p.problem;
    p.partial_size = round_up(problem.keys, kAttentionRowPad) * (round_up(problem.head_dim, kAttentionColumnPad) +
                                                                 round_up(problem.value_dim, kAttentionColumnPad));
    p.parts = parts_of(problem, p.partial_size);
    if (p.parts == 1) return;
    const int64_t pairs = problem.batches * problem.kv_heads;
    memory = empty({pairs * p.parts * p.partial_size}, ScalarType::Float);
    arrivals.resize(static_cast<size_t>(pairs));
    p.partial = static_cast<float*>(memory->mutable_data_ptr());
    p.arrivals = arrivals.data();
  }
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients attention_backward(Tensor grad_output, std::optional<Tensor> grad_lse, Tensor query, Tensor key, Tensor value,
                             std::optional<Tensor> mask, std::optional<Tensor> philox, Tensor output, Tensor lse,
                             double scale, bool is_causal, bool bottom_right, double dropout_p, bool mask_grad,
                             int64_t window_left, int64_t window_right, double softcap, std::optional<Tensor> sinks,
                             std::optional<Tensor> alibi_slopes, std::optional<Tensor> query_ids,
                             std::optional<Tensor> key_ids, std::optional<Tensor> prefix_len) {
  AttentionBackward p{};
  p.problem = problem_of(query, key, value, mask, scale, is_causal, bottom_right);
  FeatureStorage storage;
  add_features({window_left, window_right, softcap, sinks, alibi_slopes, query_ids, key_ids, prefix_len}, p.problem,
               storage);
  p.problem.dropout = dropout_of("attention", philox, dropout_p);
  const AttentionProblem& problem = p.problem;
  const ScalarType type = query.scalar_type();
  check_rows("grad_output", grad_output, type, problem.batches, problem.heads, problem.queries, problem.value_dim);
  check_rows("output", output, type, problem.batches, problem.heads, problem.queries, problem.value_dim);
  const auto statistic = [&](const char* what, const Tensor& tensor) {
    FASTATTN_CHECK(tensor.dim() == 3 && tensor.size(0) == problem.batches && tensor.size(1) == problem.heads &&
                       tensor.size(2) == problem.queries && tensor.scalar_type() == ScalarType::Float,
                   "attention: ", what, " must be float32 of shape (", problem.batches, ", ", problem.heads, ", ",
                   problem.queries, ")");
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  };
  lse = statistic("lse", lse);
  if (grad_lse) grad_lse = statistic("grad_lse", *grad_lse);

  const auto like = [](const Tensor& t) { return empty_like_order(t.size(0), t.size(1), t.size(2), t.size(3), t); };
  Tensor grad_query = like(query), grad_key = like(key), grad_value = like(value);
  p.grad_output = input_of(grad_output);
  p.query = input_of(query);
  p.key = input_of(key);
  p.value = input_of(value);
  p.output = input_of(output);
  p.lse = static_cast<const float*>(lse.const_data_ptr());
  p.grad_lse = grad_lse ? static_cast<const float*>(grad_lse->const_data_ptr()) : nullptr;
  p.grad_query = result_of(grad_query);
  p.grad_key = result_of(grad_key);
  p.grad_value = result_of(grad_value);

  PartialSums sums;
  sums.give(p);

  FASTATTN_CHECK(!mask_grad || (mask && problem.mask.dtype != DType::boolean),
                 "attention: only an additive mask has a gradient");
  Tensor grad_mask = mask_grad ? empty(mask->sizes(), mask->scalar_type()) : empty({0}, ScalarType::Float);
  if (mask_grad && grad_mask.numel() > 0) {
    p.grad_mask = grad_mask.mutable_data_ptr();
    p.grad_mask_batches = mask->size(0);
    p.grad_mask_heads = mask->size(1);
    p.grad_mask_queries = mask->size(2);
    p.grad_mask_keys = mask->size(3);
  }
  std::vector<float> delta(sinks ? static_cast<size_t>(lse.numel()) : 0);
  if (sinks) p.delta = delta.data();
  launch(kernels().attention->backward, p, nanoseconds_of(problem) * 2.5);
  return {grad_query, grad_key, grad_value, grad_mask, sink_gradient(problem, sinks, p.lse, p.delta, problem.queries)};
}

// ---- packed sequences ----

void check_packed(const char* what, const Tensor& tensor, ScalarType type, int64_t rows, int64_t heads,
                  int64_t columns) {
  FASTATTN_CHECK(tensor.dim() == 3 && tensor.size(0) == rows && tensor.size(1) == heads && tensor.size(2) == columns &&
                     tensor.scalar_type() == type,
                 "attention_varlen: ", what, " must have shape (", rows, ", ", heads, ", ", columns,
                 ") and the dtype of query");
  FASTATTN_CHECK(tensor.stride(2) == 1 || columns <= 1, "attention_varlen: ", what,
                 " must have a last stride of 1, got ", tensor.stride(2));
}
AttentionInput packed_input(const Tensor& tensor) {
  return {tensor.const_data_ptr(), 0, tensor.stride(1), tensor.stride(0)};
}
AttentionResult packed_result(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), 0, tensor.stride(1), tensor.stride(0)};
}

// Where sequences start and end: not decreasing, within the rows.
std::vector<int64_t> bounds_of(const char* what, const Tensor& tensor, int64_t rows) {
  FASTATTN_CHECK(tensor.dim() == 1 && tensor.numel() >= 1, "attention_varlen: ", what, " must have shape (N + 1,)");
  std::vector<int64_t> bounds = integers_of(what, tensor);
  for (size_t i = 0; i < bounds.size(); i++) {
    FASTATTN_CHECK(bounds[i] >= 0 && bounds[i] <= rows, "attention_varlen: ", what, " must be in [0, ", rows, "], got ",
                   bounds[i], " at ", i);
    FASTATTN_CHECK(i == 0 || bounds[i] >= bounds[i - 1], "attention_varlen: ", what, " must not decrease, got ",
                   bounds[i], " at ", i, " after ", bounds[i - 1]);
  }
  return bounds;
}

// The problem and what it points to.
struct Packed {
  AttentionProblem problem{};
  FeatureStorage storage;
  std::vector<AttentionSequence> sequences;
  bool all_queries = true, all_keys = true;  // belong to some sequence

  Packed(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seq_q, const Tensor& cu_seq_k,
         const std::optional<Tensor>& seqused_k, double scale, int64_t max_q, int64_t max_k, const Features& features) {
    FASTATTN_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3,
                   "attention_varlen: query, key and value must have 3 dimensions");
    AttentionProblem& p = problem;
    const ScalarType type = query.scalar_type();
    FASTATTN_CHECK(type != ScalarType::Bool, "attention_varlen: query must be float32, bfloat16 or float16");
    const int64_t query_rows = query.size(0), key_rows = key.size(0);
    p.dtype = dtype_of(type);
    p.heads = query.size(1);
    p.kv_heads = key.size(1);
    p.head_dim = query.size(2);
    p.value_dim = value.size(2);
    check_packed("query", query, type, query_rows, p.heads, p.head_dim);
    check_packed("key", key, type, key_rows, p.kv_heads, p.head_dim);
    check_packed("value", value, type, key_rows, p.kv_heads, p.value_dim);
    FASTATTN_CHECK(p.kv_heads == 0 ? p.heads == 0 : p.heads % p.kv_heads == 0,
                   "attention_varlen: query heads must be a multiple of key heads, got ", p.heads, " and ", p.kv_heads);
    FASTATTN_CHECK(p.head_dim >= 1 && p.head_dim <= kMostColumns && p.value_dim >= 1 && p.value_dim <= kMostColumns,
                   "attention_varlen: head dims must be in [1, ", kMostColumns, "], got ", p.head_dim, " and ",
                   p.value_dim);
    FASTATTN_CHECK(query_rows <= kMostRows && key_rows <= kMostRows, "attention_varlen: at most ", kMostRows,
                   " rows, got ", query_rows, " and ", key_rows);
    FASTATTN_CHECK(std::isfinite(scale), "attention_varlen: scale must be finite, got ", scale);
    p.scale = static_cast<float>(scale);
    p.window = {kAttentionUnbounded, kAttentionUnbounded, true, nullptr};
    p.lse_head = query_rows;
    const std::vector<int64_t> queries = bounds_of("cu_seq_q", cu_seq_q, query_rows);
    const std::vector<int64_t> keys = bounds_of("cu_seq_k", cu_seq_k, key_rows);
    FASTATTN_CHECK(queries.size() == keys.size(), "attention_varlen: cu_seq_q and cu_seq_k must have one length, got ",
                   queries.size(), " and ", keys.size());
    std::vector<int64_t> used;
    if (seqused_k) {
      used = integers_of("seqused_k", *seqused_k);
      FASTATTN_CHECK(used.size() + 1 == keys.size(), "attention_varlen: seqused_k must have shape (", keys.size() - 1,
                     ",)");
      all_keys = false;
    }
    p.batches = static_cast<int64_t>(queries.size()) - 1;
    for (size_t i = 0; i + 1 < queries.size(); i++) {
      AttentionSequence rows = {queries[i], queries[i + 1], keys[i], keys[i + 1]};
      const int64_t room = rows.key_end - rows.key_begin;
      if (seqused_k) {
        FASTATTN_CHECK(used[i] >= 0 && used[i] <= room, "attention_varlen: seqused_k must be in [0, ", room, "], got ",
                       used[i], " at ", i);
        rows.key_end = rows.key_begin + used[i];
      }
      FASTATTN_CHECK(rows.query_end - rows.query_begin <= max_q, "attention_varlen: sequence ", i, " has ",
                     rows.query_end - rows.query_begin, " queries, more than max_q, ", max_q);
      FASTATTN_CHECK(room <= max_k, "attention_varlen: sequence ", i, " has ", room, " keys, more than max_k, ", max_k);
      p.queries = std::max(p.queries, rows.query_end - rows.query_begin);
      p.keys = std::max(p.keys, rows.key_end - rows.key_begin);
      sequences.push_back(rows);
    }
    all_queries = queries.front() == 0 && queries.back() == query_rows;
    all_keys = all_keys && keys.front() == 0 && keys.back() == key_rows;
    p.sequences = sequences.data();
    add_features(features, p, storage);
  }

  double nanoseconds() const {
    AttentionProblem one = problem;
    double sum = 0.0;
    one.batches = 1;
    for (const AttentionSequence& rows : sequences) {
      one.queries = rows.query_end - rows.query_begin;
      one.keys = rows.key_end - rows.key_begin;
      sum += nanoseconds_of(one);
    }
    return sum;
  }
};

void zero(const Tensor& tensor) {
  std::memset(tensor.mutable_data_ptr(), 0, static_cast<size_t>(tensor.numel() * tensor.element_size()));
}

std::tuple<Tensor, Tensor> attention_varlen_forward(Tensor query, Tensor key, Tensor value, Tensor cu_seq_q,
                                                    Tensor cu_seq_k, std::optional<Tensor> seqused_k,
                                                    std::optional<Tensor> philox, std::optional<Tensor> sinks,
                                                    std::optional<Tensor> alibi_slopes, double scale, int64_t max_q,
                                                    int64_t max_k, int64_t window_left, int64_t window_right,
                                                    double softcap, double dropout_p) {
  const std::optional<Tensor> none;
  Packed packed(query, key, value, cu_seq_q, cu_seq_k, seqused_k, scale, max_q, max_k,
                {window_left, window_right, softcap, sinks, alibi_slopes, none, none, none});
  AttentionForward p{};
  p.problem = packed.problem;
  p.problem.dropout = dropout_of("attention", philox, dropout_p);
  std::vector<int64_t> first_tasks(packed.sequences.size() + 1);
  Tensor output = empty({query.size(0), p.problem.heads, p.problem.value_dim}, query.scalar_type());
  Tensor lse = empty({p.problem.heads, query.size(0)}, ScalarType::Float);
  p.query = packed_input(query);
  p.key = packed_input(key);
  p.value = packed_input(value);
  p.output = packed_result(output);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.first_tasks = first_tasks.data();
  if (!packed.all_queries) {
    zero(output);
    std::fill(p.lse, p.lse + lse.numel(), -std::numeric_limits<float>::infinity());
  }
  launch(kernels().attention->forward, p, packed.nanoseconds());
  return {output, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_varlen_backward(
    Tensor grad_output, std::optional<Tensor> grad_lse, Tensor query, Tensor key, Tensor value, Tensor cu_seq_q,
    Tensor cu_seq_k, std::optional<Tensor> seqused_k, std::optional<Tensor> philox, std::optional<Tensor> sinks,
    std::optional<Tensor> alibi_slopes, Tensor output, Tensor lse, double scale, int64_t max_q, int64_t max_k,
    int64_t window_left, int64_t window_right, double softcap, double dropout_p) {
  const std::optional<Tensor> none;
  Packed packed(query, key, value, cu_seq_q, cu_seq_k, seqused_k, scale, max_q, max_k,
                {window_left, window_right, softcap, sinks, alibi_slopes, none, none, none});
  AttentionBackward p{};
  p.problem = packed.problem;
  p.problem.dropout = dropout_of("attention", philox, dropout_p);
  const AttentionProblem& problem = p.problem;
  const int64_t rows = query.size(0);
  check_packed("grad_output", grad_output, query.scalar_type(), rows, problem.heads, problem.value_dim);
  check_packed("output", output, query.scalar_type(), rows, problem.heads, problem.value_dim);
  const auto statistic = [&](const char* what, const Tensor& tensor) {
    FASTATTN_CHECK(tensor.dim() == 2 && tensor.size(0) == problem.heads && tensor.size(1) == rows &&
                       tensor.scalar_type() == ScalarType::Float,
                   "attention_varlen: ", what, " must be float32 of shape (", problem.heads, ", ", rows, ")");
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  };
  lse = statistic("lse", lse);
  if (grad_lse) grad_lse = statistic("grad_lse", *grad_lse);
  Tensor grad_query = empty(query.sizes(), query.scalar_type());
  Tensor grad_key = empty(key.sizes(), query.scalar_type()), grad_value = empty(value.sizes(), query.scalar_type());
  if (!packed.all_queries) zero(grad_query);
  if (!packed.all_keys) {
    zero(grad_key);
    zero(grad_value);
  }
  p.grad_output = packed_input(grad_output);
  p.query = packed_input(query);
  p.key = packed_input(key);
  p.value = packed_input(value);
  p.output = packed_input(output);
  p.lse = static_cast<const float*>(lse.const_data_ptr());
  p.grad_lse = grad_lse ? static_cast<const float*>(grad_lse->const_data_ptr()) : nullptr;
  p.grad_query = packed_result(grad_query);
  p.grad_key = packed_result(grad_key);
  p.grad_value = packed_result(grad_value);
  PartialSums sums;
  sums.give(p);
  std::vector<float> delta(sinks ? static_cast<size_t>(lse.numel()) : 0);
  if (sinks) p.delta = delta.data();
  launch(kernels().attention->backward, p, packed.nanoseconds() * 2.5);
  return {grad_query, grad_key, grad_value, sink_gradient(problem, sinks, p.lse, p.delta, rows)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  implement<&attention_varlen_forward, &attention_varlen_backward>(m, "attention_varlen");
  implement<&attention_forward<true>, &attention_backward>(m, "attention");
  implement_visible<&attention_forward<false>>("attention");
}

}  // namespace fastattn
