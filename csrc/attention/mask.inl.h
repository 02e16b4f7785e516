// Which keys a panel of queries sees: causal staircase, ragged end, mask tensor; and dropout.
#pragma once
#include "../cpu/math.h"
#include "../cpu/microkernel.inl.h"
#include "../cpu/philox.inl.h"
#include "pack.inl.h"
#include "params.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kFar = int64_t{1} << 30;

// Rows [begin, end) of a block, seen by no vector before `first`; if not `masked`, all others see all of them.
struct Range {
  int first;
  bool masked;
  int64_t begin, end;
};

// A block of keys as the queries of one panel see it. Rows are keys, lanes are queries.
struct Visibility {
  int64_t keys;            // in the block
  int64_t clean;           // rows that every query sees and no mask touches; a multiple of kRowPad
  int64_t ends[kVectors];  // vector n of the panel sees no key from ends[n] on; not decreasing
  int64_t diagonal;        // lane x sees row r only if r <= x + diagonal
  const float* bias;       // (keys, kPanel), added to the scores, -inf where excluded; nullptr: none
  int64_t bias_row;        // kPanel, or 0 when all keys share one row
  Range ranges[kVectors + 1];
  int range_count;
};

// Before any mask tensor is looked at.
FASTATTN_INLINE Visibility structural_visibility(const AttentionProblem& problem, int64_t first_query,
                                                 int64_t first_key, int64_t keys) {
  Visibility seen;
  seen.keys = keys;
  seen.bias = nullptr;
  seen.bias_row = 0;
  const int64_t ahead = first_query + problem.causal_shift - first_key;
  seen.diagonal = problem.causal ? max_of(-kFar, min_of(kFar, ahead)) : kFar;
  for (int n = 0; n < kVectors; n++) seen.ends[n] = max_of(0, min_of(keys, seen.diagonal + (n + 1) * kLanes));
  seen.clean = max_of(0, min_of(keys, seen.diagonal + 1)) / kRowPad * kRowPad;
  return seen;
}

// Lanes of vector n that see row r, the mask tensor apart.
FASTATTN_INLINE Mask sees(const Visibility& seen, int64_t row, int n) {
  const int64_t first_lane = row < seen.keys ? row - seen.diagonal - n * kLanes : kFar;
  return iota() >= splat_int(static_cast<int32_t>(first_lane));
}

// Cuts the block into ranges of rows for which the same vectors matter.
FASTATTN_INLINE void cut_ranges(Visibility& seen, int vectors) {
  int64_t begin = 0;
  seen.range_count = 0;
  for (int n = 0; n < vectors; n++) {
    const int64_t end = round_up(seen.ends[n], kRowPad);
    const int64_t clean = min_of(seen.clean, end);
    if (begin < clean) {
      seen.ranges[seen.range_count++] = {n, false, begin, clean};
      begin = clean;
    }
    if (begin < end) {
      seen.ranges[seen.range_count++] = {n, true, begin, end};
      begin = end;
    }
  }
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

template <class T>
FASTATTN_INLINE MaskKind apply_mask_of(const AttentionProblem& problem, int64_t batch, int64_t head,
                                       int64_t first_query, int64_t queries, int64_t first_key, int vectors,
                                       Visibility& seen, float* bias) {
  const AttentionMask& mask = problem.mask;
  const int64_t live_keys = seen.ends[vectors - 1];
  const int64_t offset = batch * mask.batch + head * mask.head + first_query * mask.query + first_key * mask.key;
  const MaskTile<T> tile = {static_cast<const T*>(mask.data) + offset, mask.query == 0 ? 1 : queries,
                            mask.key == 0 ? 1 : live_keys, mask.query, mask.key};
  // The next block's part, which is in no cache yet and too short a stretch of every line for the hardware to guess.
  for (int64_t i = 0; i < tile.queries; i++)
    for (int64_t j = 0; j < kKeyBlock && mask.key == 1; j += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(tile.data + i * mask.query + kKeyBlock + j);
  const MaskKind kind = tile.kind();
  if (kind == MaskKind::mixed) {
    seen.clean = 0;
    seen.bias = bias;
    seen.bias_row = tile.fill(bias, vectors);
  }
  return kind;
}

// What a panel of `queries` queries sees of a block of keys; false if nothing. `bias` has room for a tile.
__attribute__((noinline)) bool look(const AttentionProblem& problem, int64_t batch, int64_t head, int64_t first_query,
                                    int64_t queries, int64_t first_key, int64_t keys, Visibility& seen, float* bias) {
  const int vectors = static_cast<int>(ceil_div(queries, kLanes));
  seen = structural_visibility(problem, first_query, first_key, keys);
  if (seen.ends[vectors - 1] == 0) return false;
  MaskKind kind = MaskKind::clean;
  if (problem.mask.data != nullptr) switch (problem.mask.dtype) {
      case DType::boolean:
        kind = apply_mask_of<uint8_t>(problem, batch, head, first_query, queries, first_key, vectors, seen, bias);
        break;
      case DType::f32:
        kind = apply_mask_of<float>(problem, batch, head, first_query, queries, first_key, vectors, seen, bias);
        break;
      case DType::bf16:
        kind = apply_mask_of<bf16>(problem, batch, head, first_query, queries, first_key, vectors, seen, bias);
        break;
      default:
        kind = apply_mask_of<f16>(problem, batch, head, first_query, queries, first_key, vectors, seen, bias);
    }
  if (kind == MaskKind::dead) return false;
  cut_ranges(seen, vectors);
  return true;
}

// ---- dropout ----

// What dropout multiplies each probability of the block by, in a tile (keys, kPanel): keep_scale or 0.
__attribute__((noinline)) void fill_dropout(const AttentionProblem& problem, int64_t batch, int64_t head,
                                            int64_t first_query, int64_t first_key, const Visibility& seen, int vectors,
                                            float* tile) {
  const AttentionDropout& dropout = problem.dropout;
  const I32 stream = splat_word(static_cast<uint32_t>(batch * problem.heads + head));
  const I32 threshold = splat_word(dropout.threshold);
  for (int64_t row = 0; row < padded_rows(seen.keys); row += 4) {
    const I32 group = splat_word(static_cast<uint32_t>((first_key + row) / 4));
    for (int n = 0; n < vectors; n++) {
      if (seen.ends[n] <= row / kRowPad * kRowPad) continue;
      const I32 query = iota() + splat_word(static_cast<uint32_t>(first_query + n * kLanes));
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
