// Every word of the vocabulary (csrc/cpu/simd/simd.h) against plain C++, one lane at a time. Compiled once for every
// instruction set like the kernels; prints the words that differ and returns their number.
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>

#include "../../csrc/cpu/simd/simd.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();
constexpr int kPair = 2 * kLanes,
              kRoom = 4 * kLanes;  // elements of a buffer: some on either side must stay as they are
constexpr int kSpecials = 12, kRounds = 200;
const float kSpecial[kSpecials] = {0.f,   -0.f,  1.f,       -1.f,      0.5f,       2.5f,
                                   -3.5f, 1e30f, 8388609.f, kInfinity, -kInfinity, kNaN};

int wrong = 0;
const char* last = "";
void expect(bool right, const char* word) {
  if (right || word == last) return;
  std::printf("%s\n", last = word);
  wrong++;
}

uint32_t state = 1;
uint32_t random_word() {
  state ^= state << 13;
  state ^= state >> 17;
  return state ^= state << 5;
}
float random_float() {
  const uint32_t word = random_word();
  if (word % 8 == 0) return kSpecial[word / 8 % kSpecials];
  return static_cast<float>(static_cast<int32_t>(random_word())) * (word % 8 < 4 ? 1e-9f : 3e-5f);
}

bool same(float a, float b) { return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b); }

struct Lanes {
  alignas(64) float x[kLanes];
  float& operator[](int i) { return x[i]; }
};
Lanes floats_of(F32 v) {
  Lanes f;
  store(f.x, v);
  return f;
}
Lanes random_floats() {
  Lanes f;
  for (float& x : f.x) x = random_float();
  return f;
}
// The lanes of a mask as floats 1 and 0.
Lanes floats_of(Mask m) { return floats_of(select(m, splat(1.f), zero())); }

template <class Actual, class Expected>
void lanes(const char* word, Actual actual, Expected expected) {
  Lanes found = floats_of(actual);
  for (int i = 0; i < kLanes; i++) expect(same(found[i], expected(i)), word);
}
// The smallest normal numbers and those below may become 0 in conversions.
bool tiny(float x) { return x != 0.f && std::fabs(x) < 1e-30f; }

// ---- plain C++ of the 16-bit types ----

float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
float plain(float x) { return x; }
float plain(bf16 h) { return bits_to_float(uint32_t{h.bits} << 16); }
float plain(f16 h) {
  const int exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
  const float sign = h.bits >> 15 ? -1.f : 1.f;
  if (exponent == 31) return mantissa != 0 ? kNaN : sign * kInfinity;
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                               : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25));
}
template <class T>
constexpr int kMantissa = 23;
template <>
constexpr int kMantissa<bf16> = 7;
template <>
constexpr int kMantissa<f16> = 10;
// The nearest number of the type, the even one of two.
template <class T>
float rounded(float x) {
  if (std::isnan(x) || std::isinf(x) || x == 0.f || sizeof(T) == 4) return x;
  int exponent;
  std::frexp(x, &exponent);
  const int least = kMantissa<T> == 10 ? -24 : -133;
  int unit = exponent - 1 - kMantissa<T>;
  if (unit < least) unit = least;
  const float y = std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
  return kMantissa<T> == 10 && std::fabs(y) > 65504.f ? std::copysign(kInfinity, x) : y;
}
template <class T>
T stored(float x) {
  T one[kLanes];
  store_first(one, splat(x), 1);
  return one[0];
}

// ---- the words ----

void arithmetic() {
  for (int round = 0; round < kRounds; round++) {
    Lanes a = random_floats(), b = random_floats(), c = random_floats();
    const F32 x = load(a.x), y = load(b.x), z = load(c.x);
    lanes("operator+", x + y, [&](int i) { return a[i] + b[i]; });
    lanes("operator-", x - y, [&](int i) { return a[i] - b[i]; });
    lanes("operator*", x * y, [&](int i) { return a[i] * b[i]; });
    lanes("operator/", x / y, [&](int i) { return a[i] / b[i]; });
    lanes("fma", fma(x, y, z), [&](int i) { return kFusedFma ? std::fma(a[i], b[i], c[i]) : a[i] * b[i] + c[i]; });
    lanes("fnma", fnma(x, y, z), [&](int i) { return kFusedFma ? std::fma(-a[i], b[i], c[i]) : c[i] - a[i] * b[i]; });
    Lanes less = floats_of(fms(x, y, z));
    for (int i = 0; i < kLanes; i++) {  // of 0 either sign will do
      const float expected = kFusedFma ? std::fma(a[i], b[i], -c[i]) : a[i] * b[i] - c[i];
      expect(same(less[i], expected) || (expected == 0.f && less[i] == 0.f), "fms");
    }
    Lanes most = floats_of(max(x, y)), least = floats_of(min(x, y));
    for (int i = 0; i < kLanes; i++) {
      expect(most[i] == (a[i] > b[i] ? a[i] : b[i]) || (std::isnan(b[i]) && std::isnan(most[i])), "max");
      expect(least[i] == (a[i] < b[i] ? a[i] : b[i]) || (std::isnan(b[i]) && std::isnan(least[i])), "min");
      if (std::isnan(a[i])) expect(same(most[i], b[i]) && same(least[i], b[i]), "max of NaN");
    }
    lanes("sqrt", sqrt(x), [&](int i) { return std::sqrt(a[i]); });
    Lanes whole = floats_of(round_nearest(x));
    for (int i = 0; i < kLanes; i++)
      expect(whole[i] == std::nearbyint(a[i]) || (std::isnan(a[i]) && std::isnan(whole[i])), "round_nearest");
    lanes("operator< of floats", select(x < y, splat(1.f), zero()), [&](int i) { return a[i] < b[i] ? 1.f : 0.f; });
    lanes("operator> of floats", select(x > y, splat(1.f), zero()), [&](int i) { return a[i] > b[i] ? 1.f : 0.f; });
    lanes("operator>= of floats", select(x >= y, splat(1.f), zero()), [&](int i) { return a[i] >= b[i] ? 1.f : 0.f; });
    lanes("operator== of floats", select(x == x, x, y), [&](int i) { return std::isnan(a[i]) ? b[i] : a[i]; });
    Lanes both = floats_of((x < y) & (y < z)), either = floats_of((x < y) | (y < z)), not_less = floats_of(~(x < y));
    bool some = false, every = true;
    for (int i = 0; i < kLanes; i++) {
      expect((both[i] != 0.f) == (a[i] < b[i] && b[i] < c[i]), "operator& of masks");
      expect((either[i] != 0.f) == (a[i] < b[i] || b[i] < c[i]), "operator| of masks");
      expect((not_less[i] != 0.f) == !(a[i] < b[i]), "operator~");
      some = some || a[i] < b[i];
      every = every && a[i] < b[i];
    }
    expect(any(x < y) == some, "any");
    expect(all(x < y) == every, "all");
    Lanes small;
    float sum = 0.f, largest = -kInfinity;
    for (int i = 0; i < kLanes; i++) {
      small[i] = static_cast<float>(random_word() % 1000) - 500.f;
      sum += small[i];
      largest = small[i] > largest ? small[i] : largest;
    }
    expect(reduce_add(load(small.x)) == sum, "reduce_add");
    expect(reduce_max(load(small.x)) == largest, "reduce_max");
  }
  expect(all(zero() == splat(0.f)) && !any(zero() > zero()), "zero");
}

void powers() {
  for (int n = -400; n <= 400; n++) {
    const float x = 1.f + static_cast<float>(random_word() % 1000) / 1000.f;
    const float expected = std::ldexp(x, n);
    lanes("scale2", scale2(splat(x), splat(static_cast<float>(n))), [&](int) {
      // Twice rounded, where there is no instruction for it, among the subnormals.
      const float found = floats_of(scale2(splat(x), splat(static_cast<float>(n))))[0];
      return tiny(expected) && std::fabs(found - expected) <= 1.5e-45f ? found : expected;
    });
  }
  for (int n = -400; n <= 126; n++) {
    const float x = 0.5f + static_cast<float>(random_word() % 1500) / 1000.f;
    const float expected = std::ldexp(x, n);
    lanes("scale2_small", scale2_small(splat(x), splat(static_cast<float>(n))), [&](int) {
      const float found = floats_of(scale2_small(splat(x), splat(static_cast<float>(n))))[0];
      return n < -125 && found == 0.f ? found : expected;
    });
  }
  lanes("scale2_small of -inf", scale2_small(splat(kNaN), splat(-kInfinity)), [](int) { return 0.f; });
  lanes("scale2_small of NaN", scale2_small(splat(kNaN), splat(kNaN)), [](int) { return kNaN; });
  lanes("scale2 of -inf", scale2(splat(kNaN), splat(-kInfinity)), [](int) { return 0.f; });
  lanes("scale2 of NaN", scale2(splat(kNaN), splat(kNaN)), [](int) { return kNaN; });
  for (int n = -200 * kSteps; n < 127 * kSteps; n++) {
    const float m = static_cast<float>(n) / kSteps;
    const double expected = std::exp2(static_cast<double>(m));
    const float found = floats_of(step_power(splat(m) + splat(kStepShift), splat(m)))[0];
    const double error = std::fabs(found - expected);
    expect(error <= 6e-8 * expected + 1.5e-45 || (m < -125.f && found == 0.f), "step_power");
    lanes("step_power", step_power(splat(m) + splat(kStepShift), splat(m)), [&](int) { return found; });
  }
  for (int n = -126; n < 128; n++) {
    const float m = 1.f + static_cast<float>(random_word() % 8192) / 8192.f;
    F32 mantissa;
    lanes("split_exponent", split_exponent(splat(std::ldexp(m, n)), mantissa),
          [&](int) { return static_cast<float>(n); });
    lanes("split_exponent", mantissa, [&](int) { return m; });
  }
  F32 mantissa;
  split_exponent(splat(kNaN), mantissa);
  lanes("split_exponent of NaN", mantissa, [](int) { return kNaN; });
}

void integers() {
  alignas(64) int32_t a[kLanes], b[kLanes];
  for (int round = 0; round < kRounds; round++) {
    for (int i = 0; i < kLanes; i++) {
      a[i] = static_cast<int32_t>(random_word());
      b[i] = round % 3 == 0 ? a[i] : static_cast<int32_t>(random_word());
    }
    const I32 x = load_ints(a), y = load_ints(b);
    const auto equal = [&](const char* word, I32 found, auto expected) {
      alignas(64) int32_t lane[kLanes];
      for (int i = 0; i < kLanes; i++)
        lane[i] = static_cast<int32_t>(expected(static_cast<uint32_t>(a[i]), static_cast<uint32_t>(b[i])));
      expect(all(found == load_ints(lane)), word);
    };
    equal("operator+ of integers", x + y, [](uint32_t p, uint32_t q) { return p + q; });
    equal("operator- of integers", x - y, [](uint32_t p, uint32_t q) { return p - q; });
    equal("operator^", x ^ y, [](uint32_t p, uint32_t q) { return p ^ q; });
    equal("operator& of integers", x & y, [](uint32_t p, uint32_t q) { return p & q; });
    equal("select of integers", select(unsigned_ge(x, y), x, y), [](uint32_t p, uint32_t q) { return p >= q ? p : q; });
    I32 high, low;
    mul_wide(x, y, high, low);
    equal("mul_wide", high, [](uint32_t p, uint32_t q) { return static_cast<uint64_t>(p) * q >> 32; });
    equal("mul_wide", low, [](uint32_t p, uint32_t q) { return p * q; });
    lanes("to_float", to_float(x), [&](int i) { return static_cast<float>(a[i]); });
    lanes("operator>= of integers", select(x >= y, splat(1.f), zero()),
          [&](int i) { return a[i] >= b[i] ? 1.f : 0.f; });
    lanes("operator< of integers", select(x < y, splat(1.f), zero()), [&](int i) { return a[i] < b[i] ? 1.f : 0.f; });
    lanes("operator== of integers", select(x == y, splat(1.f), zero()),
          [&](int i) { return a[i] == b[i] ? 1.f : 0.f; });
  }
  lanes("iota", to_float(iota()), [](int i) { return static_cast<float>(i); });
  lanes("splat_int", to_float(splat_int(-7)), [](int) { return -7.f; });
  for (int64_t n = 0; n <= kLanes + 3; n++) {
    Lanes seen = floats_of(first(n));
    for (int i = 0; i < kLanes; i++) expect((seen[i] != 0.f) == (i < n), "first");
  }
}

template <class T>
void memory(const char* word) {
  for (uint32_t bits = 0; bits < 65536 && sizeof(T) == 2; bits += kLanes) {
    T h[kLanes];
    for (int i = 0; i < kLanes; i++) {
      const auto half = static_cast<uint16_t>(bits + static_cast<uint32_t>(i));
      memcpy(&h[i], &half, 2);
    }
    lanes(word, load(h), [&](int i) { return plain(h[i]); });
  }
  for (int round = 0; round < kRounds; round++) {
    T buffer[kRoom], other[kRoom];
    float values[kRoom];
    for (int i = 0; i < kRoom; i++) {
      values[i] = random_float();
      // Halves between two neighbours, too.
      if (round % 2 == 0 && sizeof(T) == 2) values[i] = bits_to_float(float_to_bits(values[i]) & 0xffff8000u);
      buffer[i] = stored<T>(values[i]);
      expect(tiny(values[i]) || same(plain(buffer[i]), rounded<T>(values[i])), word);
    }
    for (int n = 0; n <= kLanes; n++) {
      lanes(word, load_first(buffer + 1, n), [&](int i) { return i < n ? plain(buffer[1 + i]) : 0.f; });
      for (T& t : other) t = stored<T>(77.f);
      if (n == kLanes)
        store(other + 1, load(buffer + 1));
      else
        store_first(other + 1, load(buffer + 1), n);
      for (int i = 0; i < kRoom; i++)
        expect(same(plain(other[i]), i < 1 || i > n ? 77.f : plain(buffer[i])) || tiny(plain(buffer[i])), word);
    }
    alignas(64) T aligned[kPair];
    if constexpr (sizeof(T) == 4 || kMantissa<T> == 10) {
      stream_two(aligned, load(buffer), load(buffer + kLanes));
      finish_streams();
      for (int i = 0; i < kPair; i++)
        expect(same(plain(aligned[i]), plain(buffer[i])) || tiny(plain(buffer[i])), "stream_two");
    }
  }
}

void pairs_of_registers() {
  Lanes a, b;
  float both[kPair];
  bf16 halves[kRoom], out[kRoom];
  alignas(64) bf16 aligned[kPair];
  for (int i = 0; i < kPair; i++) {
    both[i] = static_cast<float>(i + 1);
    (i < kLanes ? a[i] : b[i - kLanes]) = both[i];
  }
  for (int i = 0; i < kRoom; i++) halves[i] = stored<bf16>(static_cast<float>(i + 1));
  F32 x, y, p = load(a.x), q = load(b.x);
  load_two(halves, x, y);
  split_two(p, q);
  expect(all(x == p) && all(y == q), "split_two");
  for (bf16& h : out) h = stored<bf16>(77.f);
  store_two(out + 1, x, y);
  for (int i = 0; i < kRoom; i++) expect(plain(out[i]) == (i < 1 || i > kPair ? 77.f : both[i - 1]), "store_two");
  stream_two(aligned, x, y);
  finish_streams();
  for (int i = 0; i < kPair; i++) expect(plain(aligned[i]) == both[i], "stream_two of bf16");
  join_two(p, q);
  expect(all(p == load(a.x)) && all(q == load(b.x)), "join_two");
  deinterleave(p, q);
  lanes("deinterleave", p, [&](int i) { return both[2 * i]; });
  lanes("deinterleave", q, [&](int i) { return both[2 * i + 1]; });
  interleave(p, q);
  expect(all(p == load(a.x)) && all(q == load(b.x)), "interleave");
  F32 sum = zero(), squares = zero();
  add_moments(halves, sum, squares);
  float expected = 0.f, of_squares = 0.f;
  for (float v : both) expected += v, of_squares += v * v;
  expect(reduce_add(sum) == expected && reduce_add(squares) == of_squares, "add_moments");

  F32 four[kLanes / 4];
  for (int i = 0; i < kLanes / 4; i++) {
    const auto part = [&](int j) { return load(a.x) * splat(static_cast<float>(4 * i + j + 1)); };
    four[i] = sum_four(part(0), part(1), part(2), part(3));
    lanes("sum_four", four[i], [&](int lane) {
      float block = 0.f;
      for (int k = 0; k < 4; k++) block += a[lane / 4 * 4 + k];
      return block * static_cast<float>(4 * i + lane % 4 + 1);
    });
  }
  float total = 0.f;
  for (int i = 0; i < kLanes; i++) total += a[i];
  lanes("join_sums", join_sums(four), [&](int i) { return total * static_cast<float>(i + 1); });

  constexpr int kRow = kLanes + 3, kColumn = kLanes + 5;
  float from[kLanes * kRow], to[kLanes * kColumn];
  for (int i = 0; i < kLanes * kRow; i++) from[i] = static_cast<float>(i);
  for (float& t : to) t = -1.f;
  transpose_tile(from, kRow, to, kColumn);
  for (int c = 0; c < kLanes; c++)
    for (int r = 0; r < kColumn; r++)
      expect(to[c * kColumn + r] == (r < kLanes ? from[r * kRow + c] : -1.f), "transpose_tile");

  F32 registers[kLanes];
  for (int r = 0; r < kLanes; r++) registers[r] = load(from + r * kRow);
  transpose(registers);
  for (int c = 0; c < kLanes; c++) lanes("transpose", registers[c], [&](int r) { return from[r * kRow + c]; });

  uint8_t bytes[kRoom];
  for (int i = 0; i < kRoom; i++) bytes[i] = i % 3 == 0 ? 0 : static_cast<uint8_t>(i % 2 == 0 ? 1 : 255);
  for (int n = 0; n <= kLanes; n++) {
    Lanes seen = floats_of(n == kLanes ? load_bool(bytes + 1) : load_bool_first(bytes + 1, n));
    for (int i = 0; i < kLanes; i++) expect((seen[i] != 0.f) == (i < n && bytes[1 + i] != 0), "load_bool");
  }
}

template <class T>
void repeated(const char* word) {
  T four[4];
  for (int i = 0; i < 4; i++) four[i] = stored<T>(static_cast<float>(1 << i));
  F32 x, y;
  repeat_four(four, x, y);
  Lanes a = floats_of(x), b = floats_of(y);
  for (int i = 0; i < kLanes; i++) {
    expect(same(a[i], a[i % 2]) && same(b[i], b[i % 2]), word);
    expect(same(a[0] + a[1] + b[0] + b[1], 15.f) && a[0] != a[1] && b[0] != b[1] && a[0] + a[1] != b[0] + b[1], word);
  }
}

void blocks_of_lanes() {
  repeated<float>("repeat_four of float32");
  repeated<bf16>("repeat_four of bfloat16");
  repeated<f16>("repeat_four of float16");
  F32 of[4];
  for (int i = 0; i < 4; i++) of[i] = load(random_floats().x);
  F32 x, y;
  sum_pairs(of[0], of[1], of[2], of[3], x, y);
  lanes("sum_pairs", x, [&](int i) { return floats_of(of[i % 4])[i / 4 * 4] + floats_of(of[i % 4])[i / 4 * 4 + 1]; });
  lanes("sum_pairs", y,
        [&](int i) { return floats_of(of[i % 4])[i / 4 * 4 + 2] + floats_of(of[i % 4])[i / 4 * 4 + 3]; });
  F32 square[kLanes / 4];
  for (int i = 0; i < kLanes / 4; i++) square[i] = to_float(iota() + splat_int(100 * i));
  transpose_fours(square);
  for (int i = 0; i < kLanes / 4; i++)
    lanes("transpose_fours", square[i],
          [&](int lane) { return static_cast<float>(100 * (lane / 4) + 4 * i + lane % 4); });
}

#if defined(FASTATTN_HAS_DOT2)
uint32_t pair_of(bf16 low, bf16 high) { return low.bits | uint32_t{high.bits} << 16; }

void pairs() {
  bf16 low[kRoom], high[kRoom];
  for (int i = 0; i < kRoom; i++) {
    low[i] = stored<bf16>(static_cast<float>(i + 1));
    high[i] = stored<bf16>(static_cast<float>(100 - i));
  }
  uint32_t words[kRoom];
  const auto words_of = [&](Pairs p) { store_pairs(words, p); };
  words_of(load_pairs(low));
  for (int i = 0; i < kLanes; i++) expect(words[i] == pair_of(low[2 * i], low[2 * i + 1]), "load_pairs");
  for (int n = 0; n <= kPair; n++) {
    words_of(load_pairs_first(low, n));
    for (int i = 0; i < kPair; i++) {
      const uint32_t half = words[i / 2] >> (i % 2 * 16) & 0xffff;
      expect(half == (i < n ? low[i].bits : 0), "load_pairs_first");
    }
  }
  words_of(repeat_pairs(low));
  for (int i = 0; i < kLanes; i++) expect(words[i] == pair_of(low[i % 2 * 2], low[i % 2 * 2 + 1]), "repeat_pairs");
  words_of(zero_pairs());
  for (int i = 0; i < kLanes; i++) expect(words[i] == 0, "zero_pairs");
  words_of(splat_pair(0x3f804000u));
  for (int i = 0; i < kLanes; i++) expect(words[i] == 0x3f804000u, "splat_pair");
  lanes("dot2", dot2(splat(0.5f), load_pairs(low), load_pairs(high)), [&](int i) {
    return 0.5f + plain(low[2 * i]) * plain(high[2 * i]) + plain(low[2 * i + 1]) * plain(high[2 * i + 1]);
  });
  words_of(narrow_two(load(low), load(low + kLanes)));
  for (int i = 0; i < kLanes; i++) expect(words[i] == pair_of(low[2 * i], low[2 * i + 1]), "narrow_two");
  words_of(pack_pairs(load(low), load(high)));
  for (int i = 0; i < kLanes; i++) expect(words[i] == pair_of(low[i], high[i]), "pack_pairs");
  for (int n = 0; n <= kPair + 1; n++)
    for (const bf16* other : {static_cast<const bf16*>(high), static_cast<const bf16*>(nullptr)}) {
      for (uint32_t& word : words) word = 77;
      interleave_rows(low, other, n, words + 1);
      for (int i = 0; i < kRoom; i++) {
        const bf16 none = {0};
        const uint32_t expected = i < 1 || i > kPair ? 77
                                  : i > n            ? 0
                                                     : pair_of(low[i - 1], other == nullptr ? none : other[i - 1]);
        expect(words[i] == expected, "interleave_rows");
      }
    }
  Pairs x, y;
  zip_rows(load_pairs(low), load_pairs(high), x, y);
  const bf16 one = stored<bf16>(1.f), hundred = stored<bf16>(128.f);
  F32 first_half = dot2(zero(), x, splat_pair(pair_of(one, hundred)));
  F32 second_half = dot2(zero(), y, splat_pair(pair_of(one, hundred)));
  order_columns(first_half, second_half);
  lanes("zip_rows", first_half, [&](int i) { return plain(low[i]) + 128.f * plain(high[i]); });
  lanes("zip_rows", second_half, [&](int i) { return plain(low[kLanes + i]) + 128.f * plain(high[kLanes + i]); });
}
#endif

int run() {
  arithmetic();
  powers();
  integers();
  memory<float>("load and store of float32");
  memory<bf16>("load and store of bfloat16");
  memory<f16>("load and store of float16");
  pairs_of_registers();
  blocks_of_lanes();
#if defined(FASTATTN_HAS_DOT2)
  pairs();
#endif
  return wrong;
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA

int main() { return fastattn::FASTATTN_ISA::run(); }
