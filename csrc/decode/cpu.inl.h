// Attention of a few queries over a long cache: all of the time goes into reading keys and values.
//
// A task is a block of query rows (r = query * group + head within the group) of one or several kv heads over a stretch
// of keys. It takes kDecodeChunk keys at a time: all their scores, then softmax against the maximum so far, then the
// weighted sum of values; so keys stream, then values stream, and what comes next is always being fetched. Stretches
// are cut by the sequence's own length; whoever finishes a sequence's last one combines them in their order.
#pragma once
#include "../cpu/arena.inl.h"
#include "params.h"
#include "products.inl.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kStreamedRows = 2;  // with more, products take so long that what comes next must be asked for earlier
constexpr int64_t kScoreRow = kDecodeChunk + 16;  // rows of scores do not fall into the same cache sets

struct DecodeTask {
  int64_t batch, group, head, heads;  // group: number of the stretch of kv heads
  int64_t block, row, rows;
  int64_t split, splits;  // of this sequence
  int64_t begin, end;     // keys, counted from the beginning of the sequence
  int64_t length;
};

// Room for where the rows of a chunk are: `even` holds those of slots side by side, the same for every chunk and head.
struct Places {
  int64_t* even;
  int64_t* odd;
};

// What a worker keeps while it is at a task.
template <class A>
struct DecodeRoom {
  typename A::Query* query;  // [head][row][column], or tiles of rows side by side
  float* scores;             // [head][row][key]
  float* sums;               // [head][row][column]
  float* max;                // [head][row]
  float* total;
  Places keys, values;
  int64_t* next;  // room for the first keys of the chunk to come
  int64_t query_row, query_head, sums_row;

  DecodeRoom(const DecodeForward& p, Arena& arena) {
    const int64_t group = p.heads / p.kv_heads;
    const int64_t rows_of_head = min_of(group * p.queries, kDecodeRows), rows = p.heads_per_task * rows_of_head;
    query_row = round_up(p.head_dim, kPair);
    query_head = round_up(rows_of_head, kSlots) * query_row;
    sums_row = round_up(p.value_dim, kPair);
    query = arena.take<typename A::Query>(p.heads_per_task * query_head);
    scores = arena.take<float>(rows * kScoreRow);
    sums = arena.take<float>(rows * sums_row);
    max = arena.take<float>(rows);
    total = arena.take<float>(rows);
    keys = {arena.take<int64_t>(kScoreRow), arena.take<int64_t>(kScoreRow)};
    values = {arena.take<int64_t>(kScoreRow), arena.take<int64_t>(kScoreRow)};
    next = arena.take<int64_t>(kDecodeBlock + kLanes);
  }
};

FASTATTN_INLINE int64_t decode_row_blocks(const DecodeForward& p) {
  return ceil_div(p.heads / p.kv_heads * p.queries, kDecodeRows);
}
FASTATTN_INLINE int64_t decode_groups(const DecodeForward& p) { return ceil_div(p.kv_heads, p.heads_per_task); }

// Keys that a query sees.
struct Span {
  int64_t begin, end;
};
FASTATTN_INLINE Span visible(const DecodeForward& p, int64_t query, int64_t length) {
  const int64_t diagonal = query + length - p.queries;
  const int64_t begin = p.left < 0 ? 0 : max_of(diagonal - p.left, 0);
  const int64_t end = p.right < 0 ? length : min_of(diagonal + p.right + 1, length);
  return {begin, max_of(end, begin)};
}

// The task of a number; false where the sequence is too short to have it.
FASTATTN_INLINE bool decode_task(const DecodeForward& p, int64_t number, DecodeTask& task) {
  const int64_t group = p.heads / p.kv_heads;
  const int64_t blocks = decode_row_blocks(p), groups = decode_groups(p);
  task.block = number % blocks;
  number /= blocks;
  task.split = number % p.splits;
  number /= p.splits;
  task.group = number % groups;
  task.batch = number / groups;
  task.head = task.group * p.heads_per_task;
  task.heads = min_of(p.heads_per_task, p.kv_heads - task.head);
  task.row = task.block * kDecodeRows;
  task.rows = min_of(kDecodeRows, group * p.queries - task.row);
  const DecodeSequence& sequence = p.sequences[task.batch];
  task.length = sequence.end - sequence.begin;
  const int64_t begin = visible(p, task.row / group, task.length).begin;
  const int64_t end = max_of(visible(p, (task.row + task.rows - 1) / group, task.length).end, begin);
  const int64_t first = begin / p.split_keys;
  task.splits = max_of(ceil_div(end, p.split_keys) - first, 1);
  task.begin = max_of(begin, (first + task.split) * p.split_keys);
  task.end = min_of(end, (first + task.split + 1) * p.split_keys);
  return task.split < task.splits;
}

FASTATTN_INLINE void fill_even(const DecodeCache& cache, int64_t element, int64_t* at) {
  for (int64_t j = 0; j < kScoreRow; j++) at[j] = j * cache.slot * element;
}

// Where the slots of keys begin .. begin + count - 1 are, of one head; behind the last one it is repeated up to a
// multiple of kLanes, so that groups of rows need no end of their own.
FASTATTN_INLINE void find_rows(const DecodeForward& p, const DecodeCache& cache, int64_t element, int64_t batch,
                               int64_t head, int64_t begin, int64_t count, const int64_t* even, int64_t* odd,
                               Rows& rows) {
  const DecodeSequence& sequence = p.sequences[batch];
  const char* const data = static_cast<const char*>(cache.data) + head * cache.head * element;
  const int64_t slot_bytes = cache.slot * element, row_bytes = cache.row * element;
  const int64_t slot = sequence.begin + begin;
  if (p.page_size == 0) {
    rows = {even, data + sequence.cache_row * row_bytes + slot * slot_bytes};
    if (count % kLanes == 0) return;
    for (int64_t j = 0; j < round_up(count, kLanes); j++) odd[j] = even[min_of(j, count - 1)];
    rows.at = odd;
    return;
  }
  int64_t page = slot / p.page_size, within = slot - page * p.page_size;
  for (int64_t j = 0; j < count; page++, within = 0) {
    const int64_t first = sequence.pages[page] * row_bytes + within * slot_bytes;
    const int64_t here = min_of(p.page_size - within, count - j);
    for (int64_t i = 0; i < here; i++) odd[j + i] = first + i * slot_bytes;
    j += here;
  }
  for (int64_t j = count; j % kLanes != 0; j++) odd[j] = odd[count - 1];
  rows = {odd, data};
}

// The same of rows one right behind the other; behind the last one is nothing.
template <int64_t kBytes>
FASTATTN_INLINE void find_rows(const DecodeForward& p, const DecodeCache& cache, int64_t element, int64_t batch,
                               int64_t head, int64_t begin, int64_t, const int64_t*, int64_t*,
                               TightRows<kBytes>& rows) {
  const DecodeSequence& sequence = p.sequences[batch];
  rows.base = static_cast<const char*>(cache.data) +
              (head * cache.head + sequence.cache_row * cache.row + (sequence.begin + begin) * cache.slot) * element;
}

// Scores to weights: scale, softcap, bias, window, exponentials relative to the maximum so far.
template <class A>
void weigh_scores(const DecodeForward& p, int64_t query, int64_t head, int64_t batch, int64_t length, int64_t begin,
                  int64_t count, float* scores, float* sums, int64_t columns, float& max_so_far, float& total) {
  using Weight = typename A::Weight;
  Weight* const weights = reinterpret_cast<Weight*>(scores);  // written behind what is read
  const Span span = visible(p, query, length);
  const int64_t lo = max_of(span.begin - begin, 0), hi = min_of(span.end - begin, count);
  if (lo >= hi) {
    for (int64_t j = 0; j < count; j += kLanes) store(weights + j, zero());
    return;
  }
  const F32 scale = splat(p.scale);
  const bool plain = p.softcap == 0.f && p.slopes == nullptr && lo == 0 && hi == count;
  F32x2 top = splat2(-kInf);
  if (plain) {
    for_columns<1>(count, [&](int64_t j, int, auto where) FASTATTN_LAMBDA {
      const F32x2 s = get(scores + j, Natural{}, where);
      top = max(top, keep({s.a * scale, s.b * scale}, splat(-kInf), where));
    });
  } else {
    const F32 cap = splat(p.softcap), into_cap = splat(p.softcap == 0.f ? 0.f : 1.f / p.softcap);
    const float slope = p.slopes == nullptr ? 0.f : p.slopes[batch * p.slopes_batch + head];
    const I32 diagonal = splat_int(static_cast<int32_t>(query + length - p.queries - begin));
    for (int64_t j = 0; j < count; j += kLanes) {
      F32 s = load(scores + j) * scale;
      const I32 at = iota() + splat_int(static_cast<int32_t>(j));
      if (p.softcap != 0.f) s = cap * tanh(s * into_cap);
      if (p.slopes != nullptr) {
        const F32 distance = to_float(at - diagonal);
        s = s - splat(slope) * max(distance, zero() - distance);
      }
      const Mask seen = (at >= splat_int(static_cast<int32_t>(lo))) & (at < splat_int(static_cast<int32_t>(hi)));
      s = select(seen, s, splat(-kInf));
      store(scores + j, s);
      top.a = max(top.a, s);
    }
  }
  const float chunk_max = reduce_max(top);
  const float now = chunk_max > max_so_far ? chunk_max : max_so_far;
  // Those that are stored have been scaled.
  const F32 factor = plain ? scale : splat(1.f), shift = splat(-now);
  F32x2 sum = splat2(0.f);
  for_columns<1>(count, [&](int64_t j, int, auto where) FASTATTN_LAMBDA {
    const F32x2 s = get(scores + j, Natural{}, where);
    const F32x2 e = A::power({fma(s.a, factor, shift), fma(s.b, factor, shift)});
    sum = sum + keep(e, zero(), where);
    put(weights + j, e, Natural{}, where);
  });
  if (now != max_so_far && total != 0.f) {
    const float shrink = __builtin_expf(max_so_far - now);
    total *= shrink;
    for (int64_t c = 0; c < columns; c += kLanes) store(sums + c, load(sums + c) * splat(shrink));
  }
  total += reduce_add(sum);
  max_so_far = now;
}

// Rows of query that one pass over the keys takes.
FASTATTN_INLINE int64_t score_tile(int64_t rows, int64_t row, int64_t columns) {
  const int64_t side_by_side = slots_taken(rows, row, columns);
  return side_by_side > 0 ? side_by_side : min_of(rows - row, kScoreTile);
}

// `count` is a multiple of kLanes, or what is behind the last row is a row, too.
template <class A, int64_t kColumns, class Rows>
void score_whole(const DecodeRoom<A>& room, int64_t head, int64_t rows, int64_t j, int64_t count, const Rows& keys,
                 int64_t columns, const Ahead<Rows>& ahead) {
  int64_t passes = 0;
  for (int64_t row = 0; row < rows; passes++) row += score_tile(rows, row, columns);
  for (int64_t row = 0, pass = 0, taken; row < rows; row += taken, pass++) {
    taken = score_tile(rows, row, columns);
    const Ahead<Rows> share = ahead.share(pass, passes);
    const auto* const query = room.query + head * room.query_head + row * room.query_row;
    float* const scores = room.scores + (head * rows + row) * kScoreRow + j;
    if (slots_taken(rows, row, columns) > 0)
      score_slots<A, kColumns>(query, taken, keys, count, columns, scores, kScoreRow, share);
    else
      for_row_tile<kScoreTile>(taken, [&](auto tile) FASTATTN_LAMBDA {
        score_rows<A, decltype(tile)::value, kColumns>(query, room.query_row, keys, count, columns, scores, kScoreRow,
                                                       share);
      });
  }
}

template <class A>
FASTATTN_INLINE void pack_queries(const DecodeForward& p, const DecodeTask& task, const DecodeRoom<A>& room) {
  using T = typename A::Element;
  const int64_t group = p.heads / p.kv_heads, columns = p.head_dim;
  for (int64_t h = 0; h < task.heads; h++) {
    typename A::Query* const packed = room.query + h * room.query_head;
    int64_t tile = 0, taken = 0;
    for (int64_t r = 0; r < task.rows; r++) {
      const int64_t row = task.row + r, head = (task.head + h) * group + row % group;
      const T* const from =
          static_cast<const T*>(p.query) + task.batch * p.query_batch + row / group * p.query_row + head * p.query_head;
      if (r == tile + taken) {
        tile = r;
        taken = score_tile(task.rows, r, columns);
      }
      if (slots_taken(task.rows, tile, columns) == 0) {
        for_columns<1>(columns, [&](int64_t c, int, auto where)
                                    FASTATTN_LAMBDA { A::pack(from + c, packed + r * room.query_row + c, where); });
        continue;
      }
      typename A::Query* const to = packed + tile * room.query_row;
      for (int64_t c = 0; c < columns; c += kFour) A::pack_four(from + c, to + c * kSlots, r - tile);
    }
  }
}

template <class A, int64_t kColumns>
void score_block(const DecodeRoom<A>& room, int64_t head, int64_t rows, int64_t j, int64_t count, const Rows& keys,
                 int64_t columns, const Ahead<Rows>& ahead) {
  score_whole<A, kColumns>(room, head, rows, j, count, keys, columns, ahead);
}
template <class A, int64_t kColumns, int64_t kBytes>
void score_block(const DecodeRoom<A>& room, int64_t head, int64_t rows, int64_t j, int64_t count,
                 const TightRows<kBytes>& keys, int64_t columns, const Ahead<TightRows<kBytes>>& ahead) {
  const int64_t whole = count / kLanes * kLanes;
  if (whole > 0) score_whole<A, kColumns>(room, head, rows, j, whole, keys, columns, ahead);
  if (whole == count) return;
  int64_t at[kLanes];
  for (int64_t i = 0; i < kLanes; i++) at[i] = min_of(whole + i, count - 1) * kBytes;
  const Rows rest{at, keys.base};
  score_whole<A, kColumns>(room, head, rows, j + whole, kLanes, rest, columns, Ahead<Rows>{rest, 0, kBytes});
}

template <class A, int64_t kColumns, class Rows>
void weigh_block(const DecodeRoom<A>& room, int64_t head, int64_t rows, int64_t j, int64_t count, const Rows& values,
                 int64_t columns, const Ahead<Rows>& ahead) {
  const int64_t tiles = ceil_div(rows, kDecodeTile);
  constexpr int64_t kWeightsRow = kScoreRow * static_cast<int64_t>(sizeof(float) / sizeof(typename A::Weight));
  for_row_tiles(rows, [&](int64_t row, auto tile) FASTATTN_LAMBDA {
    const int64_t at = head * rows + row;
    weigh_rows<A, decltype(tile)::value, kColumns>(
        reinterpret_cast<const typename A::Weight*>(room.scores) + at * kWeightsRow + j, kWeightsRow, values, count,
        columns, room.sums + at * room.sums_row, room.sums_row, ahead, row / kDecodeTile, tiles);
  });
}

// Rows between two looks at what to fetch: what is worked on and what is fetched fit into the first cache together.
FASTATTN_INLINE int64_t block_rows(int64_t row_bytes) {
  return max_of(min_of(kDecodeBlockBytes / row_bytes / kLanes * kLanes, kDecodeBlock), kLanes);
}

// Rows that are fetched ahead of a stream: farther ahead, they are in the way of what the hardware fetches.
FASTATTN_INLINE int64_t lead_rows(int64_t row_bytes) {
  return max_of(min_of(kDecodeLeadBytes / row_bytes / kLanes * kLanes, kDecodeBlock), kLanes);
}

// body(block's first key, count, head, its rows, what to fetch meanwhile): blocks of the chunk, heads within blocks, so
// that heads that lie side by side in memory are read together. After the last block comes `then`.
template <class Rows, class Body>
FASTATTN_INLINE void for_blocks(int64_t count, int64_t heads, int64_t head_bytes, int64_t row_bytes, const Rows& rows,
                                const Ahead<Rows>& then, Body body) {
  const int64_t block = block_rows(row_bytes);
  for (int64_t j = 0, here; j < count; j += here) {
    here = min_of(block, count - j);
    for (int64_t h = 0; h < heads; h++) {
      Ahead<Rows> ahead{rows.from(j, (h + 1) * head_bytes), here, row_bytes};
      if (h + 1 == heads) {
        const int64_t left = count - j - here;
        ahead = left == 0 ? then : Ahead<Rows>{rows.from(j + here, 0), min_of(block, left), row_bytes};
      }
      body(j, here, h, rows.from(j, h * head_bytes), ahead);
    }
  }
}

// The same for one pass over rows of one head that the hardware foresees: `lead` rows ahead are fetched (0: none), and
// towards the end `then`.
template <class Rows, class Body>
FASTATTN_INLINE void for_stream(int64_t count, int64_t row_bytes, int64_t lead, const Rows& rows,
                                const Ahead<Rows>& then, Body body) {
  const int64_t last = max_of(count - lead_rows(row_bytes), 0) / kLanes * kLanes;
  const Ahead<Rows> ahead{rows.from(lead, 0), lead == 0 ? 0 : min_of(last, count - lead), row_bytes};
  if (last > 0) body(0, last, 0, rows, ahead);
  body(last, count - last, 0, rows.from(last, 0), then);
}

// The first rows that a task reads, asked for at the end of the one before.
template <class Rows>
FASTATTN_INLINE Ahead<Rows> first_keys(const DecodeForward& p, const DecodeTask& task, int64_t element, int64_t most,
                                       const int64_t* even, int64_t* room) {
  const int64_t bytes = p.head_dim * element;
  Ahead<Rows> ahead{};
  ahead.bytes = bytes;
  ahead.count = max_of(min_of(most, task.end - task.begin), 0);
  if (ahead.count > 0)
    find_rows(p, p.key, element, task.batch, task.head, task.begin, ahead.count, even, room, ahead.rows);
  return ahead;
}

template <class A, int64_t kColumns, class Rows>
void decode_stretch(const DecodeForward& p, const DecodeTask& task, const DecodeTask& following,
                    const DecodeRoom<A>& room) {
  using T = typename A::Element;
  constexpr int64_t kElement = sizeof(T);
  const int64_t group = p.heads / p.kv_heads;
  const int64_t all = task.heads * task.rows;
  pack_queries(p, task, room);
  memset(room.sums, 0, static_cast<size_t>(all * room.sums_row) * sizeof(float));
  for (int64_t i = 0; i < all; i++) {
    room.max[i] = -kInf;
    room.total[i] = 0.f;
  }
  const int64_t key_head = p.key.head * kElement, value_head = p.value.head * kElement;
  const int64_t key_bytes = p.head_dim * kElement, value_bytes = p.value_dim * kElement;
  const bool stream = p.foreseen && task.rows <= kStreamedRows;
  for (int64_t begin = task.begin, end; begin < task.end; begin = end) {
    end = min_of((begin / kDecodeChunk + 1) * kDecodeChunk, task.end);
    const int64_t count = end - begin;
    Rows keys, values;
    find_rows(p, p.key, kElement, task.batch, task.head, begin, count, room.keys.even, room.keys.odd, keys);
    find_rows(p, p.value, kElement, task.batch, task.head, begin, count, room.values.even, room.values.odd, values);
    DecodeTask rest = end < task.end ? task : following;
    if (end < task.end) rest.begin = end;
    const int64_t first_rows = stream ? lead_rows(key_bytes) : block_rows(key_bytes);
    const Ahead<Rows> next = first_keys<Rows>(p, rest, kElement, first_rows, room.keys.even, room.next);
    const int64_t then_rows = stream ? lead_rows(value_bytes) : block_rows(value_bytes);
    const Ahead<Rows> first_values{values, min_of(then_rows, count), value_bytes};
    const auto score = [&](int64_t j, int64_t here, int64_t h, const Rows& rows, const Ahead<Rows>& ahead) {
      score_block<A, kColumns>(room, h, task.rows, j, here, rows, p.head_dim, ahead);
    };
    if (stream)
      for_stream(count, key_bytes, lead_rows(key_bytes), keys, first_values, score);
    else
      for_blocks(count, task.heads, key_head, key_bytes, keys, first_values, score);
    for (int64_t h = 0; h < task.heads; h++) {
      for (int64_t r = 0; r < task.rows; r++) {
        const int64_t i = h * task.rows + r, row = task.row + r;
        weigh_scores<A>(p, row / group, (task.head + h) * group + row % group, task.batch, task.length, begin, count,
                        room.scores + i * kScoreRow, room.sums + i * room.sums_row, room.sums_row, room.max[i],
                        room.total[i]);
      }
    }
    const auto weigh = [&](int64_t j, int64_t here, int64_t h, const Rows& rows, const Ahead<Rows>& ahead) {
      weigh_block<A, kColumns>(room, h, task.rows, j, here, rows, p.value_dim, ahead);
    };
    if (stream)
      for_stream(count, value_bytes, 0, values, next, weigh);
    else
      for_blocks(count, task.heads, value_head, value_bytes, values, next, weigh);
  }
}

// Rows that are foreseen need nobody to say where they are.
template <class A, int64_t kColumns>
FASTATTN_INLINE void decode_columns(const DecodeForward& p, const DecodeTask& task, const DecodeTask& following,
                                    const DecodeRoom<A>& room) {
  if (p.foreseen)
    decode_stretch<A, kColumns, TightRows<kColumns * sizeof(typename A::Element)>>(p, task, following, room);
  else
    decode_stretch<A, kColumns, Rows>(p, task, following, room);
}

// sums / total and the log-sum-exp, to where they belong. A row that saw no key has total = 0.
template <class A>
void write_row(const DecodeForward& p, int64_t batch, int64_t kv_head, int64_t row, const float* sums, float max,
               float total) {
  using T = typename A::Element;
  const int64_t group = p.heads / p.kv_heads, query = row / group, head = kv_head * group + row % group;
  T* const out = static_cast<T*>(p.output) + batch * p.output_batch + query * p.output_row + head * p.output_head;
  const bool dead = total == 0.f;
  const F32x2 divisor = splat2(dead ? 1.f : total);
  for_columns<1>(p.value_dim, [&](int64_t c, int, auto where) FASTATTN_LAMBDA {
    put(out + c, A::natural(get(sums + c, Natural{}, Whole{}), where) / divisor, Natural{}, where);
  });
  p.lse[(batch * p.heads + head) * p.queries + query] = dead ? -kInf : max + __builtin_logf(total);
}

FASTATTN_INLINE float* partial_row(const DecodeForward& p, int64_t batch, int64_t kv_head, int64_t split, int64_t row) {
  const int64_t rows = p.heads / p.kv_heads * p.queries;
  return p.partial + (((batch * p.kv_heads + kv_head) * p.splits + split) * rows + row) * p.partial_width;
}

// The maximum and the sum stand behind the columns.
template <class A>
void combine_row(const DecodeForward& p, int64_t batch, int64_t kv_head, int64_t row, int64_t splits, float* sums) {
  const int64_t columns = round_up(p.value_dim, kPair);
  float top = -kInf, total = 0.f;
  for (int64_t s = 0; s < splits; s++) {
    const float* const part = partial_row(p, batch, kv_head, s, row) + columns;
    if (part[1] != 0.f && part[0] > top) top = part[0];
  }
  memset(sums, 0, static_cast<size_t>(columns) * sizeof(float));
  for (int64_t s = 0; s < splits; s++) {
    const float* const part = partial_row(p, batch, kv_head, s, row);
    if (part[columns + 1] == 0.f) continue;
    const float weight = __builtin_expf(part[columns] - top);
    total += weight * part[columns + 1];
    const F32 w = splat(weight);
    for (int64_t c = 0; c < columns; c += kLanes) store(sums + c, fma(w, load(part + c), load(sums + c)));
  }
  write_row<A>(p, batch, kv_head, row, sums, top, total);
}

// The next task that there is to do, taken while the one before is still to be done: its keys can be asked for in time.
// Without one `task` has no keys.
FASTATTN_INLINE bool next_task(const DecodeForward& p, TaskQueue& queue, DecodeTask& task) {
  for (int64_t number; (number = take_task(queue)) < queue.total;)
    if (decode_task(p, number, task)) return true;
  task.begin = task.end = 0;
  return false;
}

template <class A>
void decode_forward(const DecodeForward& p, TaskQueue& queue, char* scratch) {
  Arena arena{reinterpret_cast<uintptr_t>(scratch)};
  const DecodeRoom<A> room(p, arena);
  fill_even(p.key, sizeof(typename A::Element), room.keys.even);
  fill_even(p.value, sizeof(typename A::Element), room.values.even);
  DecodeTask task, following;
  for (bool more = next_task(p, queue, following); more;) {
    task = following;
    more = next_task(p, queue, following);
    if (p.head_dim == 64 && p.value_dim == 64)
      decode_columns<A, 64>(p, task, following, room);
    else if (p.head_dim == 128 && p.value_dim == 128)
      decode_columns<A, 128>(p, task, following, room);
    else
      decode_stretch<A, 0, Rows>(p, task, following, room);
    if (task.splits == 1) {
      for (int64_t h = 0; h < task.heads; h++) {
        for (int64_t r = 0; r < task.rows; r++) {
          const int64_t i = h * task.rows + r;
          write_row<A>(p, task.batch, task.head + h, task.row + r, room.sums + i * room.sums_row, room.max[i],
                       room.total[i]);
        }
      }
      continue;
    }
    for (int64_t h = 0; h < task.heads; h++) {
      for (int64_t r = 0; r < task.rows; r++) {
        const int64_t i = h * task.rows + r;
        float* const to = partial_row(p, task.batch, task.head + h, task.split, task.row + r);
        memcpy(to, room.sums + i * room.sums_row, static_cast<size_t>(room.sums_row) * sizeof(float));
        to[room.sums_row] = room.max[i];
        to[room.sums_row + 1] = room.total[i];
      }
    }
    const int64_t share = (task.batch * decode_groups(p) + task.group) * decode_row_blocks(p) + task.block;
    if (__atomic_add_fetch(&p.arrivals[share], 1, __ATOMIC_ACQ_REL) != task.splits) continue;
    for (int64_t h = 0; h < task.heads; h++)
      for (int64_t r = 0; r < task.rows; r++)
        combine_row<A>(p, task.batch, task.head + h, task.row + r, task.splits, room.sums);
  }
}

void run_decode_forward(const DecodeForward& p, TaskQueue& queue, char* scratch) {
  switch (p.dtype) {
    case DType::bf16:
#if defined(FASTATTN_HAS_DOT2)
      return decode_forward<Pairing>(p, queue, scratch);
#else
      return decode_forward<Widening<bf16>>(p, queue, scratch);
#endif
    case DType::f16:
      return decode_forward<Widening<f16>>(p, queue, scratch);
    default:
      return decode_forward<Widening<float>>(p, queue, scratch);
  }
}

int64_t decode_forward_tasks(const DecodeForward& p) {
  if (p.kv_heads == 0) return 0;
  return p.batches * decode_groups(p) * p.splits * decode_row_blocks(p);
}
int64_t decode_forward_scratch(const DecodeForward& p) {
  Arena arena{0};
  DecodeRoom<Widening<float>> room(p, arena);
  return static_cast<int64_t>(arena.next);
}

constexpr DecodeKernels kDecodeKernels{{decode_forward_tasks, decode_forward_scratch, run_decode_forward}};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
