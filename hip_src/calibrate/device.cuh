#pragma once
// The PTX instructions that the benchmarks are made of, and waits that cannot hang the GPU.
#include <cstdio>

#include "pipeline/sm90.cuh"

using namespace flashmoe;

//! A wait longer than this is a fault: the kernel says which one and traps.
constexpr u64 kWaitLimitNs = 500'000'000;

//! Nanoseconds of a clock common to all SMs; its step is measured, not assumed.
__device__ __forceinline__ u64 now_ns() {
  u64 value;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value)::"memory");
  return value;
}

//! Cycles of this SM's clock.
__device__ __forceinline__ u64 now_cycles() {
  u64 value;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(value)::"memory");
  return value;
}

__device__ __forceinline__ u32 sm_id() {
  u32 value;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(value));
  return value;
}

__device__ __noinline__ void give_up(const char* what) {
  printf("wait for %s took over %llu ms: block %u thread %u\n", what,
         static_cast<unsigned long long>(kWaitLimitNs / 1'000'000), blockIdx.x, threadIdx.x);
  __trap();
}

//! Polls until ready() holds. The deadline is looked at rarely: reading the timer would blur short waits.
template <class Ready>
__device__ __forceinline__ void wait_until(Ready ready, const char* what) {
  u64 deadline_ns = 0;
  for (u32 polls = 1; !ready(); ++polls) {
    if (polls % 256 != 0) continue;
    if (deadline_ns == 0) deadline_ns = now_ns() + kWaitLimitNs;
    if (now_ns() > deadline_ns) give_up(what);
  }
}

__device__ __forceinline__ void wait_until_ns(u64 time_ns) {
  wait_until([&] { return now_ns() >= time_ns; }, "a point in time");
}

// ---- words that SMs share: what the kernels use, and the addition of any number

__device__ __forceinline__ void add_release(u32* word, u32 value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

// ---- bulk copies: one thread issues them, an mbarrier in shared memory counts their bytes

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  wait_until([&] { return sm90::phase_is_over(barrier, parity); }, "a bulk copy");
}

//! For data that is read again; the kernels stream what is read once.
__device__ __forceinline__ u64 keep_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

//! Starts a copy of `bytes` (a multiple of 16) into shared memory; `barrier` must expect them.
__device__ __forceinline__ void bulk_copy(u32 shared, const void* global, u32 bytes, u32 barrier,
                                          u64 policy) {
  sm90::arrive_and_expect(barrier, bytes);
  sm90::bulk_copy(shared, global, bytes, barrier, policy);
}

// ---- one block an SM, all blocks from one moment on

constexpr u32 kMaxSlots = 8;
constexpr u32 kSlotBytes = 24 * 1024;
constexpr u32 kRingBytes = kMaxSlots * kSlotBytes;
//! More than half an SM's shared memory, so no SM can hold two blocks.
constexpr u32 kSharedBytes = 200 * 1024;
static_assert(kRingBytes <= kSharedBytes);

//! In device memory, zeroed before each launch.
struct Start {
  u32 arrived;
  u32 padding;
  u64 at_ns;
};

//! Called by one thread of every block of a grid that fits the GPU at once.
//! Returns a common time a little ahead [ns of now_ns()].
__device__ __forceinline__ u64 start_together(Start* start) {
  constexpr u64 kLeadNs = 10'000;  // longer than any signal takes
  if (fetch_add_acq_rel<Scope::device>(&start->arrived, 1u) == gridDim.x - 1)
    store_release<Scope::device>(&start->at_ns, now_ns() + kLeadNs);
  u64 at_ns = 0;
  wait_until([&] { return (at_ns = load_acquire<Scope::device>(&start->at_ns)) != 0; }, "the other blocks");
  return at_ns;
}

//! What each block needs: barriers of the ring and the common start. Called by all threads of a block.
struct Block {
  unsigned char* ring;  // kRingBytes in shared memory
  u32 barriers;         // shared address of kMaxSlots mbarriers of one arrival each
  u64 start_ns;
};

__device__ __forceinline__ Block open_block(Start* start) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ u64 barriers[kMaxSlots];
  __shared__ u64 start_ns;
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < kMaxSlots; ++i) sm90::barrier_init(sm90::shared_address(&barriers[i]), 1);
    sm90::barriers_initialised();
    start_ns = start_together(start);
  }
  __syncthreads();
  return {shared, sm90::shared_address(barriers), start_ns};
}

// ---- the stream of weights

//! Chunks of kSlotBytes, read round and round.
struct Stream {
  const unsigned char* data;
  u64 num_chunks;   // in data
  u64 first_chunk;  // of this launch
  u64 work_chunks;  // stop after so many over all blocks
  u32* ticket;      // who takes which chunk; null: every gridDim.x-th chunk is mine
  u32 slots;        // copies in flight, 1..kMaxSlots
  u32 readers;      // of each chunk: 1 or 2
  u64 lag_chunks;   // the second reads what the first one read so long ago
};

//! Copies that arrived after the first one in a window of time.
struct Count {
  u64 chunks, first_ns, last_ns;
};

//! Streams by one thread until end_ns (or until the work is done) and counts what arrives in [begin_ns,
//! end_ns).
__device__ __forceinline__ Count stream_until(const Stream& stream, const Block& block, u64 begin_ns,
                                              u64 end_ns) {
  const u64 policy = sm90::evict_first_policy();
  const u32 ring = sm90::shared_address(block.ring);
  u64 next = stream.ticket ? fetch_add_relaxed<Scope::device>(stream.ticket, 1u) : blockIdx.x;
  auto issue = [&](u32 slot) {
    u64 chunk =
        stream.first_chunk + next / stream.readers + (next % stream.readers == 0 ? stream.lag_chunks : 0);
    while (chunk >= stream.num_chunks) chunk -= stream.num_chunks;
    bulk_copy(ring + slot * kSlotBytes, stream.data + chunk * kSlotBytes, kSlotBytes,
              block.barriers + 8 * slot, policy);
    // The next ticket is asked for here and looked at when a slot is free: its trip hides behind the copies.
    next = stream.ticket ? fetch_add_relaxed<Scope::device>(stream.ticket, 1u) : next + gridDim.x;
  };
  u32 in_flight = 0;
  while (in_flight < stream.slots && next < stream.work_chunks) issue(in_flight++);
  Count count{0, 0, 0};
  u64 time_ns = now_ns();
  for (u32 slot = 0, parity = 0; in_flight > 0;) {
    barrier_wait(block.barriers + 8 * slot, parity);
    // Refill first: the clock and the counting then run beside the next copy.
    if (time_ns < end_ns && next < stream.work_chunks) {
      issue(slot);
    } else {
      --in_flight;
    }
    time_ns = now_ns();
    if (time_ns >= begin_ns && time_ns < end_ns) {
      if (count.first_ns == 0) {
        count.first_ns = time_ns;
      } else {
        ++count.chunks;
      }
      count.last_ns = time_ns;
    }
    if (++slot == stream.slots) {
      slot = 0;
      parity ^= 1;
    }
  }
  return count;
}
