// One work-group: what its warps share, how they wait for each other and for other work-groups, and how they
// give up.
#pragma once
#include "launch.cuh"
#include "sm90.cuh"

namespace flashmoe::pipeline {

enum class ItemKind : u32 { task, plan, end };

//! A task on its way from the picking thread to the others; the math warps add the times.
struct Item {
  ItemKind kind;
  TaskKind task_kind;
  u32 id, expert, tile, block, first, num_tokens;
  u32 row_tiles;    // 16 rows each
  u32 chain_first;  // down: place of the chain's first expert among the active ones
  u32 chain_end;
  u32 passes;  // down: times that the weights are read
  u64 ticket_ns;
  u32 ready_delta, start_delta;  // since the ticket
};
static_assert(sizeof(Item) == sizeof_item);

//! Named barriers of the hardware; 0 is __syncthreads.
constexpr u32 math_barrier = 1, finish_barrier = 2;

//! By value, so that no struct of the caller's has to lie in memory.
static __device__ __noinline__ void report(FaultReport* fault, u32 worker, u32 epoch, u32 task_id,
                                           Missing missing, u64 waited_ns, FaultKind kind) {
  if (!fault->claim()) return;
  fault->kind = kind;
  fault->pe = 0;
  fault->worker = worker;
  fault->task_id = task_id;
  fault->epoch = epoch;
  fault->missing = missing;
  fault->waited_ns = waited_ns;
}

struct Group {
  const Params& params;
  char* shared;
  SharedLayout at;
  u32 worker;
  u32 epoch;
  Counters counters;

  template <class T>
  __device__ __forceinline__ T* in_shared(u32 offset) const {
    return reinterpret_cast<T*>(shared + offset);
  }
  template <class T>
  __device__ __forceinline__ T* in_workspace(u64 offset) const {
    return reinterpret_cast<T*>(params.workspace + offset);
  }

  // --- barriers, in this order
  __device__ __forceinline__ u32 barrier(u32 index) const {
    return sm90::shared_address(shared + at.barriers) + 8 * index;
  }
  __device__ __forceinline__ u32 slot_full(u32 slot) const { return barrier(slot); }
  __device__ __forceinline__ u32 slot_free(u32 slot) const { return barrier(params.ring_slots + slot); }
  __device__ __forceinline__ u32 item_full(u32 item) const { return barrier(2 * params.ring_slots + item); }
  __device__ __forceinline__ u32 item_free(u32 item) const {
    return barrier(2 * params.ring_slots + num_items + item);
  }
  //! The streaming thread has come to the item.
  __device__ __forceinline__ u32 item_begun(u32 item) const {
    return barrier(2 * params.ring_slots + 2 * num_items + item);
  }
  __device__ __forceinline__ u32 partial_full(u32 buffer) const {
    return barrier(2 * params.ring_slots + 3 * num_items + buffer);
  }
  __device__ __forceinline__ u32 partial_free(u32 buffer) const {
    return barrier(2 * params.ring_slots + 3 * num_items + 2 + buffer);
  }
  __device__ __forceinline__ u32 planned() const {
    return barrier(2 * params.ring_slots + 3 * num_items + 4);
  }
  __device__ void init_barriers() const {
    for (u32 i = 0; i < params.ring_slots; ++i) {
      sm90::barrier_init(slot_full(i), 1);
      sm90::barrier_init(slot_free(i), math_warps);
    }
    for (u32 i = 0; i < num_items; ++i) {
      sm90::barrier_init(item_full(i), 1);
      sm90::barrier_init(item_free(i), math_warps + finish_warps + 1);
      sm90::barrier_init(item_begun(i), 1);
    }
    for (u32 i = 0; i < 2; ++i) {
      sm90::barrier_init(partial_full(i), math_warps);
      sm90::barrier_init(partial_free(i), finish_warps);
    }
    sm90::barrier_init(planned(), math_warps);
    sm90::barriers_initialised();
  }

  // --- giving up: one thread reports, the others see `stopped` and leave
  __device__ __forceinline__ volatile u32* stop_flag() const { return in_shared<volatile u32>(at.scratch); }
  __device__ __forceinline__ bool stopped() const { return *stop_flag() != 0; }
  __device__ __forceinline__ void give_up(u32 task_id, EventKind event, u32 index, u64 seen, u64 wanted,
                                          u64 waited_ns, FaultKind kind = FaultKind::deadline) const {
    report(params.fault, worker, epoch, task_id, Missing{event, index, none, seen, wanted}, waited_ns, kind);
    *stop_flag() = 1;
  }
  //! One turn of a wait for another work-group; false when the wait is over without success.
  __device__ __forceinline__ bool keep_waiting(u32& turns, u64& since_ns, u32 task_id, EventKind event,
                                               u32 index, u64 seen, u64 wanted) const {
    if ((++turns & 255u) != 0) return true;
    if (stopped()) return false;
    const u64 now_ns = clock_ns();
    if (since_ns == 0) since_ns = now_ns;
    if (params.fault->raised()) {
      *stop_flag() = 1;
      return false;
    }
    if (now_ns - since_ns <= params.deadline_ns) return true;
    give_up(task_id, event, index, seen, wanted, now_ns - since_ns);
    return false;
  }
  //! Waits for other warps. Once the work-group gives up, every wait is over: the warps run on to their next
  //! look at `stopped`, on garbage that nobody will read. So no wait has a result, and the loops of products
  //! no branches.
  __device__ __forceinline__ void wait(u32 barrier_address, u32 parity) const {
    u32 turns = 0;
    while (!sm90::phase_is_over(barrier_address, parity)) {
      if ((++turns & 63u) == 0 && stopped()) break;
    }
  }
};

//! A place in a ring of `size` slots and the parity of its barrier.
struct Turn {
  u32 slot = 0, parity;
  __device__ __forceinline__ explicit Turn(u32 first_parity) : parity(first_parity) {}
  __device__ __forceinline__ void advance(u32 size) {
    if (++slot == size) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace flashmoe::pipeline
