// CDNA3: how a packed chunk of weights is laid out, loaded and multiplied, and what waves of a work-group
// need to read each other's memory.
#pragma once
#include "flashmoe/platform.hpp"
#include "flashmoe/shape.hpp"

namespace flashmoe::arch {

constexpr u32 wave_size = 64;
// Waves on a SIMD, which is what __launch_bounds__ counts here: two work-groups of five waves on a CU.
constexpr u32 occupancy = 3;

// --- the matrix instruction: 16 rows x 16 k times 16 columns (tokens); a chunk of 32 k takes two.
// The k's of a chunk are permuted, so that a lane's share of a row or token is 16 bytes in a row.
constexpr u32 columns = 16;

//! Place of element (row < 16, k < 32) in its chunk: 64 lanes x 8 elements.
FLASHMOE_FN u32 place_in_chunk(u32 row, u32 k) { return (k / 8 * 16 + row) * 8 + k % 8; }
//! Which token a lane loads, and its first k of 8.
FLASHMOE_FN u32 column_of(u32 lane) { return lane % 16; }
FLASHMOE_FN u32 k_of(u32 lane) { return lane / 16 * 8; }
//! Where the i-th of a lane's four sums belongs.
FLASHMOE_FN u32 sum_row(u32 lane, u32 i) { return lane / 16 * 4 + i; }
FLASHMOE_FN u32 sum_column(u32 lane, u32) { return lane % 16; }

#if defined(__HIP__)

typedef u32 Words __attribute__((ext_vector_type(4)));
typedef float Sums __attribute__((ext_vector_type(4)));
typedef short Quad __attribute__((ext_vector_type(4)));  // of bf16
using Weights = Words;

//! Opaque to the compiler: in a loop, nothing that follows from it is kept in registers from turn to turn.
FLASHMOE_DEVICE u32 thread() {
  u32 index = __builtin_amdgcn_workitem_id_x();
  asm volatile("" : "+v"(index));
  return index;
}
//! The same for all lanes, and known to be: roles of waves are branches that whole waves take.
FLASHMOE_DEVICE u32 wave_of(u32 thread_index) {
  return __builtin_amdgcn_readfirstlane(thread_index / wave_size);
}
FLASHMOE_DEVICE u32 group() { return __builtin_amdgcn_workgroup_id_x(); }

//! A kernel's only argument, where it lies: its address taken would mean a copy in scratch memory.
template <class T>
FLASHMOE_DEVICE const T& argument(const T&) {
  return *(const T*)__builtin_amdgcn_kernarg_segment_ptr();
}

// --- 16 bytes of global memory; said to be global, as flat accesses also count as LDS accesses
typedef __attribute__((address_space(1))) Words GlobalWords;
FLASHMOE_DEVICE Words load(const void* from) { return *(const GlobalWords*)from; }
FLASHMOE_DEVICE void store(void* to, Words words) { *(GlobalWords*)to = words; }
//! Weights are read once: they are the first to leave the caches.
FLASHMOE_DEVICE Weights load_weights(const char* chunk, u32 lane) {
  return __builtin_nontemporal_load((const GlobalWords*)(chunk + lane * 16));
}

FLASHMOE_DEVICE Quad quad(u32 low, u32 high) {
  const u64 both = u64{high} << 32 | low;
  Quad result;
  __builtin_memcpy(&result, &both, sizeof result);
  return result;
}
FLASHMOE_DEVICE void multiply(Sums& sums, Weights weights, Words token) {
  sums = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(quad(weights.x, weights.y), quad(token.x, token.y), sums,
                                                   0, 0, 0);
  sums = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(quad(weights.z, weights.w), quad(token.z, token.w), sums,
                                                   0, 0, 0);
}

// --- within a wave
FLASHMOE_DEVICE u32 lane() { return __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0)); }
FLASHMOE_DEVICE u32 from_lane_xor(u32 value, u32 mask) {
  return static_cast<u32>(
      __builtin_amdgcn_ds_bpermute(static_cast<int>((lane() ^ mask) * 4), static_cast<int>(value)));
}
FLASHMOE_DEVICE u32 from_lane(u32 value, u32 lane) { return __builtin_amdgcn_readlane(value, lane); }
//! Lanes run in step: only the compiler must not exchange LDS accesses across it.
FLASHMOE_DEVICE void sync_wave() {
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
  __builtin_amdgcn_wave_barrier();
}
FLASHMOE_DEVICE u64 ballot(bool condition) { return __builtin_amdgcn_ballot_w64(condition); }
FLASHMOE_DEVICE u32 lowest_bit(u64 bits) { return static_cast<u32>(__builtin_ctzll(bits)); }
FLASHMOE_DEVICE u32 count_bits(u64 bits) { return static_cast<u32>(__builtin_popcountll(bits)); }

// --- within a work-group
FLASHMOE_DEVICE void barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");  // LDS alone: vector stores are not drained
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
FLASHMOE_DEVICE void add_in_group(u32* shared, u32 value) {
  __hip_atomic_fetch_add(shared, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
}
//! release: writes this wave's stores back past L2. The leader's release after the barrier waits for its own
//! wave's stores alone.
FLASHMOE_DEVICE void release_wave() { release_fence<Scope::system>(); }
//! acquire: this wave's loads come after the leader's acquire, which it met at a barrier, and find no old
//! lines in L1 and L2.
FLASHMOE_DEVICE void acquire_wave() { __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, ""); }

#endif

}  // namespace flashmoe::arch
