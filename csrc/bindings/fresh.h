// Where the ops' results come from.
#pragma once
#include <atomic>

namespace fastattn {

// Whether they come through torch's dispatcher, so that modes see them and poisoned memory is poisoned. Tests want
// that; it costs three times as much as the same memory straight from torch's allocator.
inline std::atomic<bool> through_dispatcher{false};

}  // namespace fastattn
