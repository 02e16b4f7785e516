// Dropout as fastattn/philox.py defines it: Philox4x32-10 under key `seed` at a counter whose first word is `offset`
// makes four words; an element is kept if its word is at least `threshold`, and multiplied by `keep_scale` then.
#pragma once
#include <cstdint>

namespace fastattn {

struct Dropout {
  bool enabled;
  uint32_t threshold;
  uint32_t seed[2];
  uint32_t offset;
  float keep_scale;
};

}  // namespace fastattn
