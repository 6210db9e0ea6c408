// In place of the kernel's: Hopper's instructions, done by fibers. Fences do nothing: what is stored is seen
// at once.
#pragma once
#include <cuda_bf16.h>

#include "flashmoe/platform.hpp"
#include "flashmoe/shape.hpp"
#include "tile_map.hpp"

namespace flashmoe::sm90 {

inline u32 shared_address(const void* pointer) { return fibers::shared_address(pointer); }

// --- mbarriers
inline void barrier_init(u32 address, u32 arrivals) { fibers::barrier_init(address, arrivals); }
inline void barriers_initialised() {}
inline void arrive(u32 address) { fibers::arrive(address); }
inline void arrive_if(u32 address, bool condition) {
  if (condition) fibers::arrive(address);
}
inline void arrive_and_expect(u32 address, u32 bytes) { fibers::arrive(address, bytes); }
inline bool phase_is_over(u32 address, u32 parity) { return fibers::phase_is_over(address, parity); }

// --- copies
inline u64 evict_first_policy() { return 0; }
inline void bulk_copy(u32 to_shared, const void* from, u32 bytes, u32 barrier, u64) {
  fibers::bulk_copy(to_shared, from, bytes, barrier);
}
struct Tiles {
  const char* weights;
  u32 chunk_bytes, num_tiles, num_chunks, copied_tiles, copied_chunks;
};
static_assert(sizeof(Tiles) <= sizeof(TileMap));
inline const char* describe(TileMap& tile_map, const void* weights, u32 chunk_bytes, u32 num_tiles,
                            u32 num_chunks, u32 copied_tiles, u32 copied_chunks) {
  const Tiles tiles{
      static_cast<const char*>(weights), chunk_bytes, num_tiles, num_chunks, copied_tiles, copied_chunks};
  std::memcpy(&tile_map, &tiles, sizeof tiles);
  return nullptr;
}
inline void copy_tiles(u32 to_shared, const TileMap& tile_map, u32 first_tile, u32 first_chunk, u32 barrier,
                       u64) {
  Tiles map;
  std::memcpy(&map, &tile_map, sizeof map);
  const u32 chunk_bytes = map.chunk_bytes;
  static char* zeros = nullptr;
  if (zeros == nullptr)
    std::memset(zeros = static_cast<char*>(fibers::allocate(chunk_bytes)), 0, chunk_bytes);
  for (u32 tile = first_tile; tile < first_tile + map.copied_tiles; ++tile) {
    for (u32 chunk = first_chunk; chunk < first_chunk + map.copied_chunks;
         ++chunk, to_shared += chunk_bytes) {
      const bool is_there = tile < map.num_tiles && chunk < map.num_chunks;
      const char* from = map.weights + (u64{tile} * map.num_chunks + chunk) * chunk_bytes;
      fibers::bulk_copy(to_shared, is_there ? from : zeros, chunk_bytes, barrier);
    }
  }
}
inline void prefetch(const TileMap&) {}
//! So that whoever reads it after all finds something wrong.
inline void discard(const void* line) {
  if (reinterpret_cast<std::uintptr_t>(line) % 128 != 0) fibers::fail("discards what is no line");
  std::memset(const_cast<void*>(line), 0xcd, 128);
}
inline void async_copy(u32 to_shared, const void* from) { fibers::async_copy(to_shared, from, 16); }
inline void arrive_after_async_copies(u32 barrier) { fibers::arrive_after_async_copies(barrier); }
inline void wait_for_async_copies() { fibers::wait_for_async_copies(); }
inline void store_shared(u32 to_shared, u32 first, u32 second) {
  fibers::interleave();
  const u32 both[2] = {first, second};
  std::memcpy(fibers::shared_memory() + to_shared, both, sizeof both);
}
inline uint4 load_shared_if(bool condition, u32 from_shared) {
  uint4 v{0, 0, 0, 0};
  if (condition) std::memcpy(&v, fibers::shared_memory() + from_shared, sizeof v);
  return v;
}
inline u32 known_now(u32 value) { return value; }
inline void fence_before_copies() {}

// --- global memory
inline void load_words(const u64* from, u64& first, u64& second) {
  fibers::look();
  first = from[0];
  fibers::interleave();  // each word is whole, not both
  second = from[1];
}
inline void add_release(u32* address) { fetch_add_relaxed<Scope::device>(address, 1u); }
inline void prefetch(const void*) {}
inline void bulk_prefetch(const void*, u32) {}

inline float2 as_floats(u32 pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
inline u32 as_bf16_pair(float low, float high) {
  return __float2bfloat16(low).bits | static_cast<u32>(__float2bfloat16(high).bits) << 16;
}

//! d += a b, with the operands where PTX has them: lane 4 g + t holds rows g and g + 8 of a, column g of b, k
//! 2 t, 2 t + 1 and both + 8; columns 2 t and 2 t + 1 of d.
inline void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const fibers::Operands* of = fibers::meet_lanes(fibers::Operands{{a0, a1, a2, a3}, {b0, b1}});
  const u32 lane = threadIdx.x % 32;
  for (u32 i = 0; i < 4; ++i) {
    const u32 column = lane % 4 * 2 + i % 2;
    for (u32 half = 0; half < 2; ++half) {
      for (u32 t = 0; t < 4; ++t) {
        const float2 a = as_floats(of[lane / 4 * 4 + t].a[2 * half + i / 2]),
                     b = as_floats(of[column * 4 + t].b[half]);
        d[i] += a.x * b.x + a.y * b.y;
      }
    }
  }
}

template <u32 barrier, u32 threads>
void named_barrier() {
  fibers::meet_threads(barrier, threads);
}

inline u32 timer_ns() { return static_cast<u32>(clock_ns()); }

// --- launches follow each other here
inline void let_next_launch_start() {}
inline void wait_for_launch_before() {}

}  // namespace flashmoe::sm90
