// A worker's scratch memory, dealt out.
#pragma once
#include "simd/simd.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Deals out scratch memory in cache lines; with base 0 it only adds up how much that will be.
struct Arena {
  uintptr_t next;
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next);
    next += static_cast<uintptr_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return p;
  }
};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
