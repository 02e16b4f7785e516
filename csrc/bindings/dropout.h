// Dropout as a call asks for it: the state that Philox counts from, and a probability.
#pragma once
#include <cmath>
#include <optional>

#include "../cpu/dropout.h"
#include "launch.h"

namespace fastattn {

inline Dropout dropout_of(const char* name, const std::optional<Tensor>& philox, double p) {
  FASTATTN_CHECK(p >= 0.0 && p <= 1.0, name, ": dropout_p must be in [0, 1], got ", p);
  Dropout dropout{};
  if (p == 0.0) return dropout;
  FASTATTN_CHECK(philox && philox->scalar_type() == ScalarType::Long && philox->numel() == 2 && philox->is_contiguous(),
                 name, ": dropout needs philox, two int64 numbers: seed and offset");
  const auto* words = static_cast<const int64_t*>(philox->const_data_ptr());
  const auto seed = static_cast<uint64_t>(words[0]);
  dropout.enabled = true;
  // p = 1 keeps nothing: its threshold is one more than a word can hold, its keep_scale 0.
  dropout.threshold = p == 1.0 ? ~uint32_t{0} : static_cast<uint32_t>(std::floor(p * 4294967296.0));
  dropout.seed[0] = static_cast<uint32_t>(seed);
  dropout.seed[1] = static_cast<uint32_t>(seed >> 32);
  dropout.offset = static_cast<uint32_t>(static_cast<uint64_t>(words[1]));
  dropout.keep_scale = p == 1.0 ? 0.f : static_cast<float>(1.0 / (1.0 - p));
  return dropout;
}

}  // namespace fastattn
