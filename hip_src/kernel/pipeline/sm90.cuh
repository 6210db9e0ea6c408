// Hopper's instructions for the pipeline: barriers in shared memory, bulk copies, the matrix instruction.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "flashmoe/platform.hpp"
#include "flashmoe/shape.hpp"
#include "tile_map.hpp"

namespace flashmoe::sm90 {

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// --- mbarriers; `address` in shared memory
__device__ __forceinline__ void barrier_init(u32 address, u32 arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address), "r"(arrivals));
}
__device__ __forceinline__ void barriers_initialised() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(u32 address) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(address) : "memory");
}
//! A predicated instruction, not a branch: the warp stays together.
__device__ __forceinline__ void arrive_if(u32 address, bool condition) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %1, 0; @p mbarrier.arrive.shared.b64 _, [%0];}" ::"r"(address),
               "r"(condition ? 1u : 0u)
               : "memory");
}
__device__ __forceinline__ void arrive_and_expect(u32 address, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
}
__device__ __forceinline__ bool phase_is_over(u32 address, u32 parity) {
  u32 over;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(over)
               : "r"(address), "r"(parity)
               : "memory");
  return over != 0;
}

// --- bulk copies. Weights are read once, so they leave L2 first
__device__ __forceinline__ u64 evict_first_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void bulk_copy(u32 to_shared, const void* from, u32 bytes, u32 barrier,
                                          u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], %4;" ::"r"(to_shared),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

static_assert(sizeof(CUtensorMap) == sizeof(TileMap) && alignof(CUtensorMap) <= alignof(TileMap));
//! For copies of so many chunks of so many tiles. Gives nullptr, or what went wrong.
inline const char* describe(TileMap& tile_map, const void* weights, u32 chunk_bytes, u32 num_tiles,
                            u32 num_chunks, u32 copied_tiles, u32 copied_chunks) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const char* name = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess)
    return "the driver has no cuTensorMapEncodeTiled (it is of CUDA 12.0 or later)";
  const u32 chunk_words = chunk_bytes / 4;
  const cuuint64_t sizes[3] = {chunk_words, num_chunks, num_tiles},
                   strides[2] = {chunk_bytes, u64{num_chunks} * chunk_bytes};
  const cuuint32_t box[3] = {chunk_words, copied_chunks, copied_tiles}, steps[3] = {1, 1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      reinterpret_cast<CUtensorMap*>(&tile_map), CU_TENSOR_MAP_DATA_TYPE_UINT32, 3,
      const_cast<void*>(weights), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refuses the weights";
}
//! Tile after tile to shared memory; what lies past the last chunk or tile is zeros.
__device__ __forceinline__ void copy_tiles(u32 to_shared, const TileMap& tile_map, u32 first_tile,
                                           u32 first_chunk, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(to_shared),
      "l"(&tile_map), "r"(0), "r"(first_chunk), "r"(first_tile), "r"(barrier), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void prefetch(const TileMap& tile_map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&tile_map) : "memory");
}

//! The 128 bytes have no value from here on.
__device__ __forceinline__ void discard(const void* line) {
  asm volatile("discard.global.L2 [%0], 128;" ::"l"(line) : "memory");
}

// --- tokens: 16 bytes each time, past L1
__device__ __forceinline__ void async_copy(u32 to_shared, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to_shared), "l"(from) : "memory");
}
//! This thread's arrival, once the copies that it has asked for are there.
__device__ __forceinline__ void arrive_after_async_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait_for_async_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ __forceinline__ void store_shared(u32 to_shared, u32 first, u32 second) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to_shared), "r"(first), "r"(second) : "memory");
}
//! Zeros without the condition.
__device__ __forceinline__ uint4 load_shared_if(bool condition, u32 from_shared) {
  uint4 v{0, 0, 0, 0};
  asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
               : "r"(from_shared), "r"(condition ? 1u : 0u));
  return v;
}
//! Makes the compiler compute a value here, ahead of a wait, not where it is used.
__device__ __forceinline__ u32 known_now(u32 value) {
  asm volatile("" : "+r"(value));
  return value;
}
//! What this thread wrote, or has seen written, comes before the copies that are asked for after it.
__device__ __forceinline__ void fence_before_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }

// --- two words at once, each 8 bytes whole
__device__ __forceinline__ void load_words(const u64* from, u64& first, u64& second) {
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(first), "=l"(second)
               : "l"(from)
               : "memory");
}
//! Adds one after everything that this thread, and those it has met at a barrier, wrote before.
__device__ __forceinline__ void add_release(u32* address) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(address) : "memory");
}

//! d += a b: 16 x 16 times 16 x 8.
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

//! Into L2; a multiple of 16 bytes.
__device__ __forceinline__ void bulk_prefetch(const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

template <u32 barrier, u32 threads>
__device__ __forceinline__ void named_barrier() {
  asm volatile("bar.sync %0, %1;" ::"n"(barrier), "n"(threads) : "memory");
}

__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

//! The low half of clock_ns(): one read of a special register.
__device__ __forceinline__ u32 timer_ns() {
  u32 now;
  asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(now));
  return now;
}

// --- launches that overlap the end of the kernel before
__device__ __forceinline__ void let_next_launch_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wait_for_launch_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ float2 as_floats(u32 pair) {
  return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&pair));
}
__device__ __forceinline__ u32 as_bf16_pair(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<u32*>(&pair);
}

}  // namespace flashmoe::sm90
