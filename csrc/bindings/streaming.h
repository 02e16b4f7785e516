// Which results are too large for the caches.
#pragma once
#include "launch.h"

namespace fastattn {

// Whether a call that reads and writes so many elements should write past the caches: whoever reads the result finds
// little of it there once they are more than half of the largest one, and lines need not be fetched to be overwritten.
inline bool worth_streaming(int64_t elements, ScalarType type) {
  return elements * (type == ScalarType::Float ? 4 : 2) > last_cache() / 2;
}

}  // namespace fastattn
