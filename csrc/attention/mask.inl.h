// Which keys a panel of queries sees: window and causality (staircases), prefix, ragged end, documents, mask tensor;
// what is added to their scores; and dropout.
#pragma once
#include "../cpu/math.h"
#include "../cpu/microkernel.inl.h"
#include "../cpu/philox.inl.h"
#include "../cpu/prefetch.inl.h"
#include "pack.inl.h"
#include "params.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kFar = int64_t{1} << 30;

FASTATTN_INLINE int64_t round_down(int64_t a, int64_t b) { return a / b * b; }
FASTATTN_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) { return max_of(low, min_of(high, x)); }

// A batch element's rows of the inputs. Queries and keys are numbered as these rows are.
struct Sequence {
  int64_t query_begin, query_end, key_begin, key_end;
  int64_t shift;   // query i is level with key i + shift
  int64_t prefix;  // keys before this one are seen by all queries
};
FASTATTN_INLINE Sequence sequence_of(const AttentionProblem& problem, int64_t batch) {
  Sequence s = {0, problem.queries, 0, problem.keys, 0, 0};
  if (problem.sequences != nullptr) {
    const AttentionSequence& rows = problem.sequences[batch];
    s = {rows.query_begin, rows.query_end, rows.key_begin, rows.key_end, rows.key_begin - rows.query_begin, 0};
  }
  if (problem.window.bottom_right) s.shift = s.key_end - s.query_end;
  s.prefix = s.key_begin + (problem.window.prefixes != nullptr ? problem.window.prefixes[batch] : 0);
  return s;
}

// What stands between a product and its probability: nothing, causality and the ragged end of the keys, or anything.
enum class View { clean, stairs, general };

template <class F>
FASTATTN_INLINE F* of_view(View view, F& clean, F& stairs, F& general) {
  return view == View::clean ? &clean : view == View::stairs ? &stairs : &general;
}

// Rows [begin, end) of a block, of which vectors [first, last) see something.
struct Range {
  int first, last;
  View view;
  int64_t begin, end;
};

// A block of keys as the queries of one panel see it. Rows are keys, lanes are queries.
struct Visibility {
  int64_t keys;                    // in the block
  int64_t clean_begin, clean_end;  // rows that every query sees and nothing is done to; multiples of kRowPad
  int64_t begins[kVectors];        // vector n of the panel sees no key before begins[n], none from ends[n] on;
  int64_t ends[kVectors];          // neither decreases
  int64_t low, high;               // lane x sees row r if x + low <= r <= x + high,
  int64_t prefix;                  // or r < prefix
  float cap, cap_inverse;          // of softcap; 0: none
  float* slopes;                   // backward: room for softcap's derivative (keys, kPanel), or nullptr
  const float* bias;               // (keys, kPanel), added to the scores, -inf where excluded; nullptr: none
  int64_t bias_row;                // kPanel, or 0 when all keys share one row
  bool cut;                        // begins and ends are not those of position alone
  Range ranges[Band::kMostBoxes];
  int range_count;

  // Score tiles hold finished scores, and not products that `unit` makes scores of.
  bool finished() const { return bias != nullptr || cap != 0.f; }
  const float* bias_at(int64_t row, int64_t lane) const {
    return bias == nullptr ? nullptr : bias + row * bias_row + lane;
  }
  int64_t first_row() const { return round_down(begins[0], kRowPad); }

  // Where the tile is not zero, as the products that sum over keys or over queries go through it (keys [from, to)).
  // Where nothing was cut off, position says it all.
  Band keys_of_queries(int64_t queries, int64_t from, int64_t to) const {
    Band band = {{}, 0, low, high, prefix, 0};
    to = min_of(to, keys);
    if (!cut) {
      band.boxes[band.count++] = {0, queries, from, to};
      return band;
    }
    for (int n = 0; n * kLanes < queries; n++)
      band.boxes[band.count++] = {n * kLanes, min_of(queries, (n + 1) * kLanes), max_of(begins[n], from),
                                  min_of(ends[n], to)};
    return band;
  }
  Band queries_of_keys(int64_t queries) const {
    Band band = {{}, 1, -high, -low, 0, prefix};
    band.boxes[0] = {ranges[0].begin, ranges[range_count - 1].end, 0, queries};
    if (!cut) return band;
    for (band.count = 0; band.count < range_count; band.count++) {
      const Range& range = ranges[band.count];
      band.boxes[band.count] = {range.begin, range.end, range.first * kLanes, min_of(queries, range.last * kLanes)};
    }
    return band;
  }
};

// What position lets the panel see, before any tensor is looked at.
FASTATTN_INLINE Visibility structural_visibility(const AttentionProblem& problem, const Sequence& sequence,
                                                 int64_t first_query, int vectors, int64_t first_key, int64_t keys) {
  const AttentionWindow& window = problem.window;
  Visibility seen;
  seen.keys = keys;
  seen.cap = 0.f;
  seen.slopes = nullptr;
  seen.bias = nullptr;
  seen.bias_row = 0;
  seen.cut = false;
  const int64_t level = first_query + sequence.shift - first_key;
  seen.high = clamp(level + window.right, -kFar, kFar);
  seen.low = clamp(level - window.left, -kFar, kFar);
  seen.prefix = clamp(sequence.prefix - first_key, 0, keys);
  for (int n = 0; n < kVectors; n++) {
    seen.ends[n] = clamp(seen.high + (n + 1) * kLanes, seen.prefix, keys);
    seen.begins[n] = seen.prefix > 0 ? 0 : clamp(seen.low + n * kLanes, 0, keys);
  }
  seen.clean_begin = round_up(clamp(seen.low + vectors * kLanes - 1, 0, keys), kRowPad);
  seen.clean_end = round_down(clamp(seen.high + 1, 0, keys), kRowPad);
  if (seen.prefix == keys || seen.clean_end <= seen.clean_begin) {
    seen.clean_begin = 0;
    seen.clean_end = round_down(seen.prefix, kRowPad);
  }
  return seen;
}

// Lanes of vector n that see row r, whatever `bias` says.
template <View kView>
FASTATTN_INLINE Mask sees(const Visibility& seen, int64_t row, int n) {
  const int64_t before = row - n * kLanes;
  const int64_t first_lane = row < seen.keys ? before - seen.high : kFar;
  const Mask right = iota() >= splat_int(static_cast<int32_t>(first_lane));
  if constexpr (kView == View::stairs) return right;
  if (row < seen.prefix) return iota() >= splat_int(0);
  return right & (iota() < splat_int(static_cast<int32_t>(before - seen.low + 1)));
}

// Cuts the block into ranges of rows for which the same vectors matter.
FASTATTN_INLINE void cut_ranges(Visibility& seen, int vectors) {
  const int64_t end = round_up(seen.ends[vectors - 1], kRowPad);
  int64_t row = seen.first_row();
  int first = 0, last = 1;
  const bool stairs = !seen.finished() && seen.prefix == 0 && seen.low + vectors * kLanes <= 1;
  seen.range_count = 0;
  while (row < end) {
    while (round_up(seen.ends[first], kRowPad) <= row) first++;
    while (last < vectors && seen.begins[last] < row + kRowPad) last++;
    int64_t next = round_up(seen.ends[first], kRowPad);
    if (last < vectors) next = min_of(next, round_down(seen.begins[last], kRowPad));
    const bool clean = seen.clean_begin <= row && row < seen.clean_end;
    if (clean)
      next = min_of(next, seen.clean_end);
    else if (row < seen.clean_begin && seen.clean_begin < seen.clean_end)
      next = min_of(next, seen.clean_begin);
    if (first < last)
      seen.ranges[seen.range_count++] = {first, last,
                                         clean    ? View::clean
                                         : stairs ? View::stairs
                                                  : View::general,
                                         row, next};
    row = next;
  }
}

// The keys that some of `queries` queries may see: whole blocks from the start of the sequence, but for the end.
struct KeyRange {
  int64_t begin, end;
};
__attribute__((noinline)) KeyRange key_range(const AttentionProblem& problem, const Sequence& sequence, int64_t batch,
                                             int64_t first_query, int64_t queries) {
  const AttentionWindow& window = problem.window;
  const int64_t level = first_query + sequence.shift;
  KeyRange range;
  range.end = clamp(level + queries + window.right, sequence.prefix, sequence.key_end);
  range.begin = clamp(level - window.left, sequence.key_begin, sequence.key_end);
  if (sequence.prefix > sequence.key_begin) range.begin = sequence.key_begin;
  range.begin = sequence.key_begin + round_down(range.begin - sequence.key_begin, kKeyBlock);
  if (problem.documents.queries == nullptr) return range;
  static_assert(kKeyBlock == kAttentionIdBlock, "a block of keys has one range of ids");
  const int32_t* ids = problem.documents.queries + batch * problem.documents.queries_batch + first_query;
  int32_t smallest = ids[0], largest = ids[0];
  for (int64_t i = 1; i < queries; i++) {
    smallest = ids[i] < smallest ? ids[i] : smallest;
    largest = ids[i] > largest ? ids[i] : largest;
  }
  const int32_t* ranges = problem.documents.key_ranges + batch * problem.documents.ranges_batch;
  const auto apart = [&](int64_t key) {
    const int32_t* block = ranges + key / kKeyBlock * 2;
    return block[1] < smallest || block[0] > largest;
  };
  while (range.begin < range.end && apart(range.begin)) range.begin += kKeyBlock;
  while (range.begin < range.end && apart(range.end - 1)) range.end = round_down(range.end - 1, kKeyBlock);
  return range;
}

// Neither begins nor ends may decrease: a vector without a row takes them from its neighbours, another one grows.
FASTATTN_INLINE void put_in_order(Visibility& seen, int vectors) {
  for (int n = 0; n < vectors; n++)
    if (seen.begins[n] >= seen.ends[n]) {
      seen.begins[n] = kFar;
      seen.ends[n] = 0;
    }
  for (int n = vectors - 2; n >= 0; n--) seen.begins[n] = min_of(seen.begins[n], seen.begins[n + 1]);
  for (int n = 1; n < vectors; n++) seen.ends[n] = max_of(seen.ends[n], seen.ends[n - 1]);
  for (int n = 0; n < vectors; n++) {
    seen.begins[n] = min_of(seen.begins[n], seen.ends[vectors - 1]);
    seen.ends[n] = max_of(seen.ends[n], seen.begins[n]);
  }
}

// Rows at both ends of which a vector sees nothing are taken off it.
FASTATTN_INLINE void trim(Visibility& seen, int vectors) {
  for (int n = 0; n < vectors; n++) {
    const auto dead = [&](int64_t row) { return all(load(seen.bias + row * kPanel + n * kLanes) == splat(-kInf)); };
    while (seen.begins[n] < seen.ends[n] && dead(seen.begins[n])) seen.begins[n]++;
    while (seen.begins[n] < seen.ends[n] && dead(seen.ends[n] - 1)) seen.ends[n]--;
  }
  put_in_order(seen, vectors);
}

// ---- mask tensors ----

// The mask as something to add to the scores. Only -inf excludes; finfo.min means "unlikely".
template <class T>
FASTATTN_INLINE F32 load_bias(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, n);
}
FASTATTN_INLINE F32 load_bias(const uint8_t* p, int64_t n) {
  return select(n >= kLanes ? load_bool(p) : load_bool_first(p, n), zero(), splat(-kInf));
}

enum class MaskKind { dead, clean, mixed };

// What the bits of all elements, or-ed and and-ed, say.
template <class T>
struct MaskBits;
template <>
struct MaskBits<uint8_t> {
  using Type = uint8_t;
  static MaskKind kind(Type any, Type all) {
    return any == 0 ? MaskKind::dead : all != 0 ? MaskKind::clean : MaskKind::mixed;
  }
};
template <class Bits, Bits kMinusInfinity>
struct FloatBits {
  using Type __attribute__((may_alias)) = Bits;
  static MaskKind kind(Bits any, Bits all) {
    if (any == kMinusInfinity && all == kMinusInfinity) return MaskKind::dead;
    return static_cast<Bits>(any << 1) == 0 ? MaskKind::clean : MaskKind::mixed;
  }
};
template <>
struct MaskBits<float> : FloatBits<uint32_t, 0xff800000u> {};
template <>
struct MaskBits<bf16> : FloatBits<uint16_t, 0xff80u> {};
template <>
struct MaskBits<f16> : FloatBits<uint16_t, 0xfc00u> {};

// The part of a mask that a panel and a block of keys meet in.
template <class T>
struct MaskTile {
  const T* data;
  int64_t queries, keys;  // 1 along a broadcast dimension
  int64_t query, key;     // strides in elements

  // kLanes elements `stride` apart, of which n exist.
  static FASTATTN_INLINE F32 gather(const T* p, int64_t stride, int64_t n) {
    if (stride == 1) return load_bias(p, n);
    T some[kLanes] = {};
    for (int64_t x = 0; x < kLanes && x < n; x++) some[x] = p[x * stride];
    return load_bias(some, kLanes);
  }
  FASTATTN_INLINE F32 along_keys(int64_t i, int64_t j) const {
    return gather(data + i * query + j * key, key, keys - j);
  }
  FASTATTN_INLINE F32 along_queries(int64_t i, int64_t j) const {
    return gather(data + i * query + j * key, query, queries - i);
  }

  // Looks at bits, along whichever dimension is dense: plain loops over integers, which compilers vectorise well.
  MaskKind kind() const {
    return query == 1 && key != 1 ? kind_of_lines(keys, key, queries, query) : kind_of_lines(queries, query, keys, key);
  }
  __attribute__((noinline)) MaskKind kind_of_lines(int64_t lines, int64_t line, int64_t length, int64_t stride) const {
    using Bits = typename MaskBits<T>::Type;
    Bits any = 0, all = static_cast<Bits>(-1);
    MaskKind kind = MaskKind::dead;
    for (int64_t i = 0; i < lines && kind != MaskKind::mixed; i++) {
      const Bits* p = reinterpret_cast<const Bits*>(data) + i * line;
      if (stride == 1) {
        for (int64_t j = 0; j < length; j++) {
          any = static_cast<Bits>(any | p[j]);
          all = static_cast<Bits>(all & p[j]);
        }
      } else {
        for (int64_t j = 0; j < length; j++) {
          any = static_cast<Bits>(any | p[j * stride]);
          all = static_cast<Bits>(all & p[j * stride]);
        }
      }
      kind = MaskBits<T>::kind(any, all);
    }
    return kind;
  }

  // If all that the tile says is where each vector's rows, groups of kRowPad, begin and end, they are moved there.
  __attribute__((noinline)) bool move_edges(Visibility& seen, int vectors) const {
    using Bits = typename MaskBits<T>::Type;
    if (key != 1 || query == 0) return false;
    Visibility moved = seen;
    int64_t rows = 0;
    for (int n = 0; n < vectors; n++) {
      Bits any[kKeyBlock] = {}, all[kKeyBlock];
      memset(all, -1, sizeof(all));
      for (int64_t i = n * kLanes; i < min_of(queries, (n + 1) * kLanes); i++) {
        const Bits* p = reinterpret_cast<const Bits*>(data) + i * query;
        for (int64_t j = 0; j < keys; j++) {
          any[j] = static_cast<Bits>(any[j] | p[j]);
          all[j] = static_cast<Bits>(all[j] & p[j]);
        }
      }
      int64_t begin = keys, end = 0;
      for (int64_t j = 0; j < keys; j += kRowPad) {
        Bits some = 0, every = static_cast<Bits>(-1);
        for (int64_t k = j; k < min_of(keys, j + kRowPad); k++) {
          some = static_cast<Bits>(some | any[k]);
          every = static_cast<Bits>(every & all[k]);
        }
        const MaskKind kind = MaskBits<T>::kind(some, every);
        if (kind == MaskKind::mixed || (kind == MaskKind::clean && end > 0 && end < j)) return false;
        if (kind == MaskKind::dead) continue;
        begin = min_of(begin, j);
        end = j + kRowPad;
      }
      moved.begins[n] = max_of(seen.begins[n], begin);
      moved.ends[n] = min_of(seen.ends[n], end);
      rows += max_of(0, moved.ends[n] - moved.begins[n]);
    }
    put_in_order(moved, vectors);
    for (int n = 0; n < vectors; n++) {
      rows -= moved.ends[n] - moved.begins[n];
      if (moved.begins[n] != seen.begins[n] && moved.begins[n] % kRowPad != 0) return false;
    }
    if (rows != 0) return false;  // some vector had to grow
    moved.cut = true;
    seen = moved;
    return true;
  }

  // Writes the tile (keys, kPanel) and returns the distance of its rows.
  __attribute__((noinline)) int64_t fill(float* tile, int vectors) const {
    alignas(64) float some[kLanes * kLanes];
    if (queries == 1) {
      for (int64_t j = 0; j < keys; j += kLanes) {
        store(some, along_keys(0, j));
        for (int64_t x = 0; x < kLanes; x++)
          for (int n = 0; n < vectors; n++) store(tile + (j + x) * kPanel + n * kLanes, splat(some[x]));
      }
    } else if (keys == 1 || (query == 1 && key != 1)) {
      for (int64_t j = 0; j < keys; j++)
        for (int n = 0; n < vectors; n++) store(tile + j * kPanel + n * kLanes, along_queries(n * kLanes, j));
    } else {
      for (int n = 0; n < vectors; n++)
        for (int64_t j = 0; j < keys; j += kLanes) {
          if (sizeof(T) == sizeof(float) && key == 1 && (n + 1) * kLanes <= queries && j + kLanes <= keys) {
            transpose_tile(reinterpret_cast<const float*>(data + n * kLanes * query + j), query,
                           tile + j * kPanel + n * kLanes, kPanel);
            continue;
          }
          for (int64_t x = 0; x < kLanes; x++)
            store(some + x * kLanes, n * kLanes + x < queries ? along_keys(n * kLanes + x, j) : zero());
          transpose_tile(some, kLanes, tile + j * kPanel + n * kLanes, kPanel);
        }
    }
    return keys == 1 ? 0 : kPanel;
  }
};

// Where the kind of the mask's part for a panel and a block of keys is kept, plus 1; nullptr: nowhere.
FASTATTN_INLINE uint8_t* known_kind(const AttentionProblem& problem, int64_t batch, int64_t head, int64_t first_query,
                                    int64_t first_key) {
  const AttentionMask& mask = problem.mask;
  if (mask.kinds == nullptr) return nullptr;
  static_assert(kPanel >= kAttentionLeastPanel, "there is a byte for every panel and block");
  const int64_t heads = mask.head == 0 ? 1 : problem.heads;
  const int64_t slice = (mask.batch == 0 ? 0 : batch) * heads + (mask.head == 0 ? 0 : head);
  return mask.kinds +
         (slice * ceil_div(problem.queries, kPanel) + first_query / kPanel) * ceil_div(problem.keys, kKeyBlock) +
         first_key / kKeyBlock;
}

// Asks for the panel's part of the mask for a block of keys to come, whose lines are too short for the hardware to
// guess.
__attribute__((noinline)) void want_mask(const AttentionProblem& problem, Prefetch& prefetch, int64_t batch,
                                         int64_t head, int64_t first_query, int64_t queries, int64_t first_key,
                                         int64_t keys) {
  const AttentionMask& mask = problem.mask;
  if (const uint8_t* known = known_kind(problem, batch, head, first_query, first_key)) {
    const uint8_t kind = __atomic_load_n(known, __ATOMIC_RELAXED);
    if (kind != 0 && kind != static_cast<uint8_t>(MaskKind::mixed) + 1) return;
  }
  const int64_t size = size_of(mask.dtype);
  const char* data = static_cast<const char*>(mask.data) +
                     (batch * mask.batch + head * mask.head + first_query * mask.query + first_key * mask.key) * size;
  if (mask.key == 1)
    prefetch.add({data, mask.query * size}, mask.query == 0 ? 1 : queries, keys * size);
  else if (mask.query == 1)
    prefetch.add({data, mask.key * size}, mask.key == 0 ? 1 : keys, queries * size);
}

// Fills `bias` where the mask is neither dead nor clean, nor (if it comes `alone`) a matter of moving edges; bias_row
// becomes the distance of its rows.
template <class T>
FASTATTN_INLINE MaskKind apply_mask_of(const AttentionProblem& problem, int64_t batch, int64_t head,
                                       int64_t first_query, int64_t queries, int64_t first_key, int vectors, bool alone,
                                       Visibility& seen, float* bias, int64_t& bias_row) {
  const AttentionMask& mask = problem.mask;
  const int64_t offset = batch * mask.batch + head * mask.head + first_query * mask.query + first_key * mask.key;
  const MaskTile<T> tile = {static_cast<const T*>(mask.data) + offset, mask.query == 0 ? 1 : queries,
                            mask.key == 0 ? 1 : seen.ends[vectors - 1], mask.query, mask.key};
  // Whoever looks finds the same: it does not matter who was first.
  uint8_t* known = known_kind(problem, batch, head, first_query, first_key);
  const uint8_t found = known == nullptr ? 0 : __atomic_load_n(known, __ATOMIC_RELAXED);
  const MaskKind kind = found == 0 ? tile.kind() : static_cast<MaskKind>(found - 1);
  if (found == 0 && known != nullptr)
    __atomic_store_n(known, static_cast<uint8_t>(static_cast<int>(kind) + 1), __ATOMIC_RELAXED);
  if (kind != MaskKind::mixed) return kind;
  if (alone && tile.move_edges(seen, vectors)) return MaskKind::clean;
  bias_row = tile.fill(bias, vectors);
  return MaskKind::mixed;
}

__attribute__((noinline)) MaskKind apply_mask(const AttentionProblem& problem, int64_t batch, int64_t head,
                                              int64_t first_query, int64_t queries, int64_t first_key, int vectors,
                                              bool alone, Visibility& seen, float* bias, int64_t& bias_row) {
  const auto apply = [&](auto type) {
    return apply_mask_of<decltype(type)>(problem, batch, head, first_query, queries, first_key, vectors, alone, seen,
                                         bias, bias_row);
  };
  switch (problem.mask.dtype) {
    case DType::boolean:
      return apply(uint8_t{});
    case DType::f32:
      return apply(float{});
    case DType::bf16:
      return apply(bf16{});
    default:
      return apply(f16{});
  }
}

// ---- documents ----

// The ids of the panel's queries and of the block's keys.
struct DocumentTile {
  const int32_t *query_ids, *key_ids;
  int64_t queries, keys;

  MaskKind kind() const {
    int32_t smallest = query_ids[0], largest = query_ids[0];
    for (int64_t i = 1; i < queries; i++) {
      smallest = query_ids[i] < smallest ? query_ids[i] : smallest;
      largest = query_ids[i] > largest ? query_ids[i] : largest;
    }
    int32_t first = key_ids[0], last = key_ids[0];
    for (int64_t j = 1; j < keys; j++) {
      first = key_ids[j] < first ? key_ids[j] : first;
      last = key_ids[j] > last ? key_ids[j] : last;
    }
    if (last < smallest || largest < first) return MaskKind::dead;
    return smallest == largest && first == last ? MaskKind::clean : MaskKind::mixed;
  }

  // -inf into a tile (keys, kPanel) where the ids differ.
  void exclude(float* tile, int vectors) const {
    alignas(64) int32_t ids[kPanel];
    for (int64_t x = 0; x < kPanel; x++) ids[x] = query_ids[x < queries ? x : queries - 1];
    for (int n = 0; n < vectors; n++) {
      const I32 query = load_ints(ids + n * kLanes);
      float* to = tile + n * kLanes;
      for (int64_t j = 0; j < keys; j++, to += kPanel)
        store(to, select(query == splat_int(key_ids[j]), load(to), splat(-kInf)));
    }
  }
};

// ---- what a panel sees of a block ----

// Minus slope times the distance between query and key, added to the tile or (kFresh) written there.
template <bool kFresh>
FASTATTN_INLINE void add_distances(float slope, int64_t level, int64_t begin, int64_t end, int vectors, float* tile) {
  alignas(64) float lanes[kLanes];
  for (int x = 0; x < kLanes; x++) lanes[x] = static_cast<float>(x);
  for (int n = 0; n < vectors; n++) {
    const F32 position = load(lanes) + splat(static_cast<float>(level + n * kLanes));
    for (int64_t j = begin; j < end; j++) {
      float* to = tile + j * kPanel + n * kLanes;
      const F32 ahead = position - splat(static_cast<float>(j));
      store(to, fnma(splat(slope), max(ahead, zero() - ahead), kFresh ? zero() : load(to)));
    }
  }
}

// Mask, documents and distances, in this order, into `bias`; false if nothing is left to be seen.
__attribute__((noinline)) bool look_closer(const AttentionProblem& problem, const Sequence& sequence, int64_t batch,
                                           int64_t head, int64_t first_query, int64_t queries, int64_t first_key,
                                           int vectors, Visibility& seen, float* bias) {
  const int64_t live_keys = seen.ends[vectors - 1];
  MaskKind documents = MaskKind::clean, mask = MaskKind::clean;
  DocumentTile ids = {};
  if (problem.documents.queries != nullptr) {
    ids = {problem.documents.queries + batch * problem.documents.queries_batch + first_query,
           problem.documents.keys + batch * problem.documents.keys_batch + first_key, queries, live_keys};
    documents = ids.kind();
    if (documents == MaskKind::dead) return false;
  }
  const float slope = problem.slopes == nullptr ? 0.f : problem.slopes[batch * problem.slopes_batch + head];
  const bool distances = slope != 0.f;
  int64_t row = kPanel;
  if (problem.mask.data != nullptr) {
    const bool alone = documents == MaskKind::clean && !distances;
    mask = apply_mask(problem, batch, head, first_query, queries, first_key, vectors, alone, seen, bias, row);
    if (mask == MaskKind::dead) return false;
  }
  if (mask == MaskKind::clean && documents == MaskKind::clean && !distances)
    return seen.begins[0] < seen.ends[vectors - 1];
  if (documents == MaskKind::mixed || distances) {
    const int64_t level = first_query + sequence.shift - first_key;
    if (mask == MaskKind::clean && !distances)
      memset(bias, 0, static_cast<size_t>(round_up(live_keys, kRowPad) * kPanel) * sizeof(float));
    else if (row == 0)
      for (int64_t j = 1; j < live_keys; j++) memcpy(bias + j * kPanel, bias, kPanel * sizeof(float));
    row = kPanel;
    if (distances && mask == MaskKind::clean)
      add_distances<true>(slope, level, seen.first_row(), live_keys, vectors, bias);
    else if (distances)
      add_distances<false>(slope, level, seen.first_row(), live_keys, vectors, bias);
    if (documents == MaskKind::mixed) ids.exclude(bias, vectors);
  }
  seen.bias = bias;
  seen.bias_row = row;
  seen.cut = true;
  seen.clean_begin = seen.clean_end = 0;
  if (row != 0 && (mask == MaskKind::mixed || documents == MaskKind::mixed)) trim(seen, vectors);
  return seen.begins[0] < seen.ends[vectors - 1];
}

// What a panel of `queries` queries sees of a block of keys; false if nothing. `bias` has room for a tile.
__attribute__((noinline)) bool look(const AttentionProblem& problem, const Sequence& sequence, int64_t batch,
                                    int64_t head, int64_t first_query, int64_t queries, int64_t first_key, int64_t keys,
                                    Visibility& seen, float* bias) {
  const int vectors = static_cast<int>(ceil_div(queries, kLanes));
  seen = structural_visibility(problem, sequence, first_query, vectors, first_key, keys);
  if (seen.ends[vectors - 1] <= seen.begins[0]) return false;
  if (bias != nullptr &&
      !look_closer(problem, sequence, batch, head, first_query, queries, first_key, vectors, seen, bias))
    return false;
  if (problem.softcap != 0.f) {
    seen.cap = problem.softcap;
    seen.cap_inverse = 1.f / problem.softcap;
    seen.clean_begin = seen.clean_end = 0;
  }
  cut_ranges(seen, vectors);
  return true;
}

// Whether `look` may need room for a tile.
FASTATTN_INLINE bool wants_bias(const AttentionProblem& problem) {
  return problem.mask.data != nullptr || problem.documents.queries != nullptr || problem.slopes != nullptr;
}

// ---- dropout ----

// What dropout multiplies each probability of the block by, in a tile (keys, kPanel): keep_scale or 0.
__attribute__((noinline)) void fill_dropout(const AttentionProblem& problem, const Sequence& sequence, int64_t batch,
                                            int64_t head, int64_t first_query, int64_t first_key,
                                            const Visibility& seen, int vectors, float* tile) {
  const Dropout& dropout = problem.dropout;
  const I32 stream = splat_word(static_cast<uint32_t>(batch * problem.heads + head));
  const I32 threshold = splat_word(dropout.threshold);
  for (int64_t row = 0; row < padded_rows(seen.keys); row += 4) {
    const I32 group = splat_word(static_cast<uint32_t>((first_key - sequence.key_begin + row) / 4));
    for (int n = 0; n < vectors; n++) {
      if (seen.ends[n] <= round_down(row, kRowPad) || round_up(row + 1, kRowPad) <= seen.begins[n]) continue;
      const int64_t lanes = first_query - sequence.query_begin + n * kLanes;
      const I32 query = iota() + splat_word(static_cast<uint32_t>(lanes));
      I32 words[4] = {splat_word(dropout.offset), stream, query, group};
      philox(words, dropout.seed[0], dropout.seed[1]);
      FASTATTN_UNROLL for (int w = 0; w < 4; w++)
          store(tile + (row + w) * kPanel + n * kLanes,
                select(unsigned_ge(words[w], threshold), splat(dropout.keep_scale), zero()));
    }
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
