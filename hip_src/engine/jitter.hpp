// The model's random numbers; flashmoe/sim/jitter.py explains them.
#pragma once
#include "flashmoe/shape.hpp"

namespace flashmoe::engine {

inline u64 mixed(u64 word) {
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
  return word ^ (word >> 31);
}

//! Random bits of a task; `key` is mixed((seed + 1) * golden).
constexpr u64 golden = 0x9E3779B97F4A7C15u;
inline u64 task_bits(u64 key, u32 layer, u32 pe, u32 task_id) {
  const u64 counter = u64{layer} << 48 | u64{pe} << 32 | task_id;
  return mixed(mixed(counter * golden + key) + key);
}
inline u32 quantile_of(u64 bits) { return static_cast<u32>(bits >> 52); }
inline u32 stay_of(u64 bits) { return static_cast<u32>(bits >> 40 & 4095u); }
inline bool stalls(u64 bits, u64 threshold) { return (bits & 0xFFFFFFFFu) < threshold; }

}  // namespace flashmoe::engine
