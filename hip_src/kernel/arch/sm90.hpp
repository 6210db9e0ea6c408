// Hopper: how a packed chunk of weights is laid out, loaded and multiplied, and what waves of a work-group
// need to read each other's memory.
#pragma once
#include "flashmoe/platform.hpp"
#include "flashmoe/shape.hpp"

namespace flashmoe::arch {

constexpr u32 wave_size = 32;
constexpr u32 occupancy = 2;  // work-groups on an SM: what __launch_bounds__ counts here

// --- the matrix instruction: 16 rows x 16 k times 8 columns (tokens); a chunk of 32 k takes two.
// The k's of a chunk are permuted, so that a lane's share of a token is 16 bytes in a row.
constexpr u32 columns = 8;

//! Place of element (row < 16, k < 32) in its chunk: two halves of 32 lanes x 8 elements.
FLASHMOE_FN u32 place_in_chunk(u32 row, u32 k) {
  const u32 half = k / 4 % 2, lane = row % 8 * 4 + k / 8;
  const u32 element = (k / 2 % 2 * 2 + row / 8) * 2 + k % 2;
  return (half * 32 + lane) * 8 + element;
}
//! Which token a lane loads, and its first k of 8.
FLASHMOE_FN u32 column_of(u32 lane) { return lane / 4; }
FLASHMOE_FN u32 k_of(u32 lane) { return lane % 4 * 8; }
//! Where the i-th of a lane's four sums belongs.
FLASHMOE_FN u32 sum_row(u32 lane, u32 i) { return lane / 4 + i / 2 * 8; }
FLASHMOE_FN u32 sum_column(u32 lane, u32 i) { return lane % 4 * 2 + i % 2; }

#if defined(__CUDACC__)

using Words = uint4;
struct Weights {
  Words half[2];
};
struct Sums {
  float of[4];
  FLASHMOE_DEVICE float& operator[](u32 i) { return of[i]; }
};

//! Opaque to the compiler: in a loop, nothing that follows from it is kept in registers from turn to turn.
FLASHMOE_DEVICE u32 thread() {
  u32 index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
//! The same for all lanes, and known to be: roles of waves are branches that whole waves take.
FLASHMOE_DEVICE u32 wave_of(u32 thread_index) { return __shfl_sync(~0u, thread_index / wave_size, 0); }
FLASHMOE_DEVICE u32 group() { return blockIdx.x; }

//! A kernel's argument, where it lies.
template <class T>
FLASHMOE_DEVICE const T& argument(const T& params) {
  return params;
}

// --- 16 bytes of global memory
FLASHMOE_DEVICE Words load(const void* from) { return *static_cast<const Words*>(from); }
FLASHMOE_DEVICE void store(void* to, Words words) { *static_cast<Words*>(to) = words; }
//! Weights are read once: they leave no trace in L1. Nothing writes them during a launch.
FLASHMOE_DEVICE Words load_once(const void* from) {
  Words words;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from));
  return words;
}
FLASHMOE_DEVICE Weights load_weights(const char* chunk, u32 lane) {
  return Weights{{load_once(chunk + lane * 16), load_once(chunk + 512 + lane * 16)}};
}

FLASHMOE_DEVICE void multiply(Sums& sums, Words weights, u32 token0, u32 token1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sums.of[0]), "+f"(sums.of[1]), "+f"(sums.of[2]), "+f"(sums.of[3])
      : "r"(weights.x), "r"(weights.y), "r"(weights.z), "r"(weights.w), "r"(token0), "r"(token1));
}
FLASHMOE_DEVICE void multiply(Sums& sums, const Weights& weights, Words token) {
  multiply(sums, weights.half[0], token.x, token.y);
  multiply(sums, weights.half[1], token.z, token.w);
}

// --- within a wave
FLASHMOE_DEVICE u32 from_lane_xor(u32 value, u32 mask) { return __shfl_xor_sync(~0u, value, mask); }
FLASHMOE_DEVICE u32 from_lane(u32 value, u32 lane) { return __shfl_sync(~0u, value, static_cast<int>(lane)); }
FLASHMOE_DEVICE void sync_wave() { __syncwarp(); }
FLASHMOE_DEVICE u64 ballot(bool condition) { return __ballot_sync(~0u, condition); }
FLASHMOE_DEVICE u32 lowest_bit(u64 bits) {
  return static_cast<u32>(__ffsll(static_cast<long long>(bits)) - 1);
}
FLASHMOE_DEVICE u32 count_bits(u64 bits) { return static_cast<u32>(__popcll(bits)); }

// --- within a work-group
//! Of all waves. The leader's comes with one lane alone: __syncthreads() wants whole warps.
FLASHMOE_DEVICE void barrier() { asm volatile("barrier.sync 0;" ::: "memory"); }
FLASHMOE_DEVICE void add_in_group(u32* shared, u32 value) { atomicAdd(shared, value); }
//! Nothing to do: order is cumulative. A barrier orders the stores of all waves before the leader's release,
//! and its acquire before the loads of all waves.
FLASHMOE_DEVICE void release_wave() {}
FLASHMOE_DEVICE void acquire_wave() {}

#endif

}  // namespace flashmoe::arch
