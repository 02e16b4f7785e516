// Numbers, switches and enumerators that are handed to a lambda as types, for it to choose its code by.
#pragma once

namespace fastattn::FASTATTN_ISA {
namespace {

template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
