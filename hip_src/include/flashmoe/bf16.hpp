// bf16, as its 16 bits, on host and device.
#pragma once
#include "flashmoe/shape.hpp"

namespace flashmoe {

struct bf16 {
  u16 bits;
};

FLASHMOE_FN float to_float(float value) { return value; }
FLASHMOE_FN float to_float(bf16 value) {
  const u32 bits = u32{value.bits} << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

FLASHMOE_FN bf16 to_bf16(float value) {
  u32 bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if (value != value) return bf16{static_cast<u16>((bits >> 16) | 0x40)};  // a NaN must not round to infinity
  return bf16{static_cast<u16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
}

}  // namespace flashmoe
