// fastattn::decode and fastattn::cache_append on the CPU.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "direct.h"

namespace fastattn {
namespace {

constexpr int64_t kMostColumns = 512;
constexpr int64_t kMostKeys = (int64_t{1} << 31) - 1;
// Heads whose rows lie side by side are read together, until a slot's share is this long.
constexpr int64_t kSideBySideBytes = 2048;
constexpr int64_t kMostRowsTogether = 64;
constexpr int64_t kPartialPad = 16;  // floats behind a partial sum's columns: maximum and sum

// Integers of either width, one for each sequence.
std::vector<int64_t> numbers_of(const char* what, const Tensor& tensor, int64_t batches) {
  const ScalarType type = tensor.scalar_type();
  FASTATTN_CHECK(
      tensor.dim() == 1 && tensor.size(0) == batches && (type == ScalarType::Int || type == ScalarType::Long),
      "decode: ", what, " must be int32 or int64 of shape (", batches, ",)");
  std::vector<int64_t> numbers(static_cast<size_t>(batches));
  const int64_t stride = tensor.stride(0);
  for (int64_t b = 0; b < batches; b++) {
    const size_t at = static_cast<size_t>(b);
    numbers[at] = type == ScalarType::Int ? static_cast<const int32_t*>(tensor.const_data_ptr())[b * stride]
                                          : static_cast<const int64_t*>(tensor.const_data_ptr())[b * stride];
  }
  return numbers;
}

// Which slots of the cache belong to which sequence.
struct Places {
  std::vector<DecodeSequence> sequences;  // end: behind the new keys
  std::vector<int32_t> pages;             // (batch, most pages)
  int64_t page_size = 0;
  int64_t longest = 0;
};

// Checks everything about the indices that could reach outside of the cache. `appended` keys behind seqlens count as
// the sequence's; with `written` they must not share a row or a page.
Places places_of(const Tensor& key_cache, int64_t batches, const std::optional<Tensor>& seqlens,
                 const std::optional<Tensor>& leftpad, const std::optional<Tensor>& batch_idx,
                 const std::optional<Tensor>& block_table, int64_t appended, bool written) {
  Places places;
  const int64_t rows = key_cache.size(0), slots = key_cache.size(1);
  int64_t capacity = slots, table_width = 0;
  if (block_table) {
    FASTATTN_CHECK(!batch_idx, "decode: a paged cache has a block_table and no cache_batch_idx");
    FASTATTN_CHECK(
        block_table->dim() == 2 && block_table->size(0) == batches && block_table->scalar_type() == ScalarType::Int,
        "decode: block_table must be int32 of shape (", batches, ", pages)");
    table_width = block_table->size(1);
    capacity = slots == 0 ? 0 : std::min(kMostKeys, table_width * slots);
    places.page_size = std::max<int64_t>(slots, 1);
    places.pages.resize(static_cast<size_t>(batches * table_width));
  } else {
    FASTATTN_CHECK(batch_idx || rows == batches, "decode: a cache of ", rows, " rows for a batch of ", batches,
                   " needs cache_batch_idx or a block_table");
  }
  std::vector<int64_t> ends(static_cast<size_t>(batches), capacity);
  if (seqlens) ends = numbers_of("cache_seqlens", *seqlens, batches);
  std::vector<int64_t> begins(static_cast<size_t>(batches), 0), indices;
  if (leftpad) begins = numbers_of("cache_leftpad", *leftpad, batches);
  if (batch_idx) indices = numbers_of("cache_batch_idx", *batch_idx, batches);
  std::unordered_map<int64_t, int64_t> writer;  // row or page to sequence
  for (int64_t b = 0; b < batches; b++) {
    const size_t at = static_cast<size_t>(b);
    const int64_t length = ends[at], begin = begins[at];
    FASTATTN_CHECK(length >= 0 && length <= capacity, "decode: cache_seqlens[", b, "] = ", length, " is not in [0, ",
                   capacity, "], the slots of a sequence");
    FASTATTN_CHECK(appended <= capacity - length, "decode: cache_seqlens[", b, "] = ", length, " and ", appended,
                   " new keys do not fit into the ", capacity, " slots of a sequence");
    FASTATTN_CHECK(begin >= 0 && begin <= length, "decode: cache_leftpad[", b, "] = ", begin, " is not in [0, ", length,
                   "], the sequence's length");
    DecodeSequence sequence{begin, length + appended, b, nullptr};
    if (batch_idx) {
      sequence.cache_row = indices[at];
      FASTATTN_CHECK(sequence.cache_row >= 0 && sequence.cache_row < rows, "decode: cache_batch_idx[", b,
                     "] = ", sequence.cache_row, " is not in [0, ", rows, "), the rows of the cache");
      if (written && appended > 0) {
        const auto [other, fresh] = writer.emplace(sequence.cache_row, b);
        FASTATTN_CHECK(fresh, "decode: cache row ", sequence.cache_row, " would be written by sequences ",
                       other->second, " and ", b);
      }
    }
    if (block_table && sequence.end > sequence.begin) {
      int32_t* const pages = places.pages.data() + b * table_width;
      const int32_t* const table = static_cast<const int32_t*>(block_table->const_data_ptr());
      for (int64_t i = sequence.begin / slots; i <= (sequence.end - 1) / slots; i++) {
        pages[i] = table[b * block_table->stride(0) + i * block_table->stride(1)];
        FASTATTN_CHECK(pages[i] >= 0 && pages[i] < rows, "decode: block_table[", b, ", ", i, "] = ", pages[i],
                       " is not in [0, ", rows, "), the pages of the cache");
        if (written && appended > 0 && i >= length / slots) {
          const auto [other, fresh] = writer.emplace(pages[i], b);
          FASTATTN_CHECK(fresh, "decode: page ", pages[i], " would be written by sequences ", other->second, " and ", b,
                         other->second == b ? " (twice)" : "");
        }
      }
      sequence.pages = pages;
    }
    places.longest = std::max(places.longest, sequence.end - sequence.begin);
    places.sequences.push_back(sequence);
  }
  return places;
}

void check_cache(const char* what, const Tensor& cache, const Tensor& like, ScalarType type) {
  FASTATTN_CHECK(cache.dim() == 4 && cache.size(0) == like.size(0) && cache.size(1) == like.size(1) &&
                     cache.size(2) == like.size(2) && cache.scalar_type() == type,
                 "decode: ", what, " must be (rows, slots, heads, columns) like the other cache and of query's dtype");
  FASTATTN_CHECK(cache.stride(3) == 1 || cache.size(3) <= 1, "decode: ", what, " must have a last stride of 1, got ",
                 cache.stride(3));
}

DecodeCache cache_of(const Tensor& cache) {
  return {cache.const_data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Long enough that what a stretch leaves behind is little beside what it reads; a matter of the problem only. Blocks of
// many rows are stretches enough by themselves.
int64_t split_keys_of(int64_t rows, int64_t longest, int64_t num_splits) {
  if (num_splits > 0) {
    const int64_t each = (std::max<int64_t>(longest, 1) + num_splits - 1) / num_splits;
    return round_up(each, kDecodeChunk);
  }
  if (rows <= kDecodeRows) return 4 * kDecodeChunk;
  return rows <= 256 ? 8 * kDecodeChunk : round_up(kMostKeys, kDecodeChunk);
}

template <bool with_lse>
auto decode_forward(Tensor query, Tensor key_cache, Tensor value_cache, std::optional<Tensor> seqlens,
                    std::optional<Tensor> leftpad, std::optional<Tensor> batch_idx, std::optional<Tensor> block_table,
                    std::optional<Tensor> slopes, int64_t appended, double scale, int64_t window_left,
                    int64_t window_right, double softcap, int64_t num_splits) {
  FASTATTN_CHECK(query.dim() == 4 && key_cache.dim() == 4, "decode: query and caches must have 4 dimensions");
  const ScalarType type = query.scalar_type();
  FASTATTN_CHECK(type != ScalarType::Bool, "decode: query must be float32, bfloat16 or float16");
  DecodeForward p{};
  p.dtype = dtype_of(type);
  p.batches = query.size(0);
  p.queries = query.size(1);
  p.heads = query.size(2);
  p.head_dim = query.size(3);
  p.kv_heads = key_cache.size(2);
  check_cache("key_cache", key_cache, key_cache, type);
  check_cache("value_cache", value_cache, key_cache, type);
  p.value_dim = value_cache.size(3);
  FASTATTN_CHECK(query.stride(3) == 1 || p.head_dim <= 1, "decode: query must have a last stride of 1, got ",
                 query.stride(3));
  FASTATTN_CHECK(key_cache.size(3) == p.head_dim, "decode: query and key_cache must have one head dim, got ",
                 p.head_dim, " and ", key_cache.size(3));
  FASTATTN_CHECK(p.head_dim >= 1 && p.head_dim <= kMostColumns && p.value_dim >= 1 && p.value_dim <= kMostColumns,
                 "decode: head dims must be in [1, ", kMostColumns, "], got ", p.head_dim, " and ", p.value_dim);
  FASTATTN_CHECK(p.kv_heads == 0 ? p.heads == 0 : p.heads % p.kv_heads == 0,
                 "decode: query heads must be a multiple of the cache's heads, got ", p.heads, " and ", p.kv_heads);
  FASTATTN_CHECK(std::isfinite(scale) && std::isfinite(softcap) && softcap >= 0.0,
                 "decode: scale must be finite and softcap 0 or more, got ", scale, " and ", softcap);
  FASTATTN_CHECK(window_left >= -1 && window_right >= -1, "decode: a window reaches -1 (unbounded) or more, got ",
                 window_left, " and ", window_right);
  FASTATTN_CHECK(appended >= 0 && p.queries <= kMostKeys && key_cache.size(1) <= kMostKeys, "decode: at most ",
                 kMostKeys, " queries and slots");
  std::optional<Tensor> contiguous_slopes;
  if (slopes) {
    FASTATTN_CHECK(slopes->scalar_type() == ScalarType::Float &&
                       ((slopes->dim() == 1 && slopes->size(0) == p.heads) ||
                        (slopes->dim() == 2 && slopes->size(0) == p.batches && slopes->size(1) == p.heads)),
                   "decode: alibi_slopes must be float32 of shape (", p.heads, ",) or (", p.batches, ", ", p.heads,
                   ")");
    contiguous_slopes = slopes->is_contiguous() ? *slopes : torch::stable::contiguous(*slopes);
    p.slopes = static_cast<const float*>(contiguous_slopes->const_data_ptr());
    p.slopes_batch = slopes->dim() == 2 ? p.heads : 0;
  }
  const Places places = places_of(key_cache, p.batches, seqlens, leftpad, batch_idx, block_table, appended, false);

  Tensor output = empty({p.batches, p.queries, p.heads, p.value_dim}, type);
  const Statistic<with_lse> lse({p.batches, p.heads, p.queries});
  p.query = query.const_data_ptr();
  p.query_batch = query.stride(0);
  p.query_row = query.stride(1);
  p.query_head = query.stride(2);
  p.key = cache_of(key_cache);
  p.value = cache_of(value_cache);
  p.output = output.mutable_data_ptr();
  p.output_batch = output.stride(0);
  p.output_row = output.stride(1);
  p.output_head = output.stride(2);
  p.lse = lse.data();
  p.sequences = places.sequences.data();
  p.page_size = places.page_size;
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.left = window_left;
  p.right = window_right;
  if (p.heads == 0 || p.batches == 0 || p.queries == 0) return results_of(std::tuple(output), lse);

  const int64_t rows = p.heads / p.kv_heads * p.queries, element = p.dtype == DType::f32 ? 4 : 2;
  const int64_t row_bytes = std::max(p.head_dim, p.value_dim) * element;
  p.heads_per_task = 1;
  if (p.key.head < p.key.slot)
    p.heads_per_task = std::clamp<int64_t>(kSideBySideBytes / row_bytes, 1,
                                           std::min(p.kv_heads, std::max<int64_t>(1, kMostRowsTogether / rows)));
  double keys = 0;
  for (const DecodeSequence& sequence : places.sequences) keys += static_cast<double>(sequence.end - sequence.begin);
  const double bytes = keys * static_cast<double>(p.kv_heads * (p.head_dim + p.value_dim) * element);
  p.foreseen = p.page_size == 0 && p.key.slot == p.head_dim && p.value.slot == p.value_dim;
  p.split_keys = split_keys_of(rows, places.longest, num_splits);
  p.splits = std::max<int64_t>(1, (places.longest + p.split_keys - 1) / p.split_keys);
  std::optional<Tensor> partial;
  std::vector<int32_t> arrivals;
  if (p.splits > 1) {
    p.partial_width = round_up(p.value_dim, kDecodeColumnPad) + kPartialPad;
    partial = unpoisoned(p.batches * p.kv_heads * p.splits * rows * p.partial_width, ScalarType::Float);
    p.partial = static_cast<float*>(partial->mutable_data_ptr());
    const int64_t groups = (p.kv_heads + p.heads_per_task - 1) / p.heads_per_task;
    arrivals.resize(static_cast<size_t>(p.batches * groups * ((rows + kDecodeRows - 1) / kDecodeRows)));
    p.arrivals = arrivals.data();
  }
  launch(kernels().decode->forward, p, bytes / 50.0 * static_cast<double>(1 + rows / 8));
  return results_of(std::tuple(output), lse);
}

// Copies key and value behind the keys that the sequences have. Nothing is written unless all of it fits.
void cache_append(Tensor key_cache, Tensor value_cache, Tensor key, Tensor value, std::optional<Tensor> seqlens,
                  std::optional<Tensor> leftpad, std::optional<Tensor> batch_idx, std::optional<Tensor> block_table) {
  FASTATTN_CHECK(key_cache.dim() == 4 && key.dim() == 4 && value.dim() == 4 && seqlens,
                 "decode: caches, key and value must have 4 dimensions; cache_seqlens say where new keys belong");
  const ScalarType type = key_cache.scalar_type();
  const int64_t batches = key.size(0), fresh = key.size(1), heads = key.size(2);
  check_cache("key_cache", key_cache, key_cache, type);
  check_cache("value_cache", value_cache, key_cache, type);
  const auto fits = [&](const char* what, const Tensor& tensor, const Tensor& cache) {
    FASTATTN_CHECK(tensor.size(0) == batches && tensor.size(1) == fresh && tensor.size(2) == heads &&
                       heads == cache.size(2) && tensor.size(3) == cache.size(3) && tensor.scalar_type() == type,
                   "decode: ", what, " must be (", batches, ", ", fresh, ", ", cache.size(2), ", ", cache.size(3),
                   ") and of the cache's dtype");
    FASTATTN_CHECK(tensor.stride(3) == 1 || tensor.size(3) <= 1, "decode: ", what, " must have a last stride of 1");
  };
  fits("key", key, key_cache);
  fits("value", value, value_cache);
  const Places places = places_of(key_cache, batches, seqlens, leftpad, batch_idx, block_table, fresh, true);
  const auto element = static_cast<int64_t>(dtype_of(type) == DType::f32 ? 4 : 2);
  const auto copy = [&](const Tensor& cache, const Tensor& from) {
    char* const to = static_cast<char*>(cache.mutable_data_ptr());
    const char* const data = static_cast<const char*>(from.const_data_ptr());
    const auto bytes = static_cast<size_t>(from.size(3) * element);
    for (int64_t b = 0; b < batches; b++) {
      const DecodeSequence& sequence = places.sequences[static_cast<size_t>(b)];
      for (int64_t s = 0; s < fresh; s++) {
        const int64_t at = sequence.end - fresh + s;
        const int64_t row = places.page_size > 0 ? sequence.pages[at / places.page_size] : sequence.cache_row;
        const int64_t slot = places.page_size > 0 ? at % places.page_size : at;
        for (int64_t h = 0; h < heads; h++)
          std::memcpy(to + (row * cache.stride(0) + slot * cache.stride(1) + h * cache.stride(2)) * element,
                      data + (b * from.stride(0) + s * from.stride(1) + h * from.stride(2)) * element, bytes);
      }
    }
  };
  copy(key_cache, key);
  copy(value_cache, value);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  implement<&decode_forward<true>>(m, "decode");
  implement_visible<&decode_forward<false>>("decode");
  m.impl("cache_append.cpu", TORCH_BOX(&cache_append));
}

}  // namespace fastattn
