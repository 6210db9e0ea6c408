// One work-group: what its warps share, how they wait for each other and for other work-groups, and how they
// give up.
#pragma once
#include "flashmoe/queue.hpp"
#include "launch.cuh"
#include "sm90.cuh"

namespace flashmoe::pipeline {

// Beside the kinds of tasks. An early item is an up task, by its place in the sequence, that is handed on
// before the plan is there; or nothing, should there be no such place.
constexpr u32 plan_item = 16, end_item = 17, early_item = 18;
// A chain is an item for each of its tasks, or one, in words mode, where these are short.
constexpr u32 starts_chain = 1, ends_chain = 2;

//! What the warps must know of an item to do it.
struct Work {
  u32 kind;       // a TaskKind, or one of the above
  u32 chain;      // starts_chain, ends_chain: its place among the tasks of a pick
  u32 row_tiles;  // 16 rows each
  // Its tokens in the lists; of a whole chain, its experts among the active ones; early: its place.
  u32 first, count;
  u32 tile, expert;

  //! In 16 bytes, which are read at once. Not as bit-fields: the compiler takes those apart byte by byte.
  __device__ __forceinline__ uint4 packed() const {
    return make_uint4(kind | chain << 8 | row_tiles << 16, first | count << 16, tile, expert);
  }
  __device__ __forceinline__ static Work unpacked(const uint4& v) {
    return Work{v.x & 0xffu, v.x >> 8 & 0xffu, v.x >> 16, v.y & 0xffffu, v.y >> 16, v.z, v.w};
  }
  __device__ __forceinline__ bool is(TaskKind of) const { return kind == static_cast<u32>(of); }
  //! As of a task with all its rows: the last one, which may have fewer, needs no more room in a slot.
  template <Mode mode>
  __device__ __forceinline__ Split split(const Tiling& tiling) const {
    if constexpr (mode == Mode::words) return Split(1);
    return Split(is(TaskKind::up) ? tiling.up_rows / 8 : tiling.down_rows / 16);
  }
};

//! The plan's sequence of experts is that of their ids.
__device__ __forceinline__ bool is_by_id(Order order) {
  return order != Order::arrival && order != Order::lpt;
}

//! The later of two times of a launch, low halves of a clock.
__device__ __forceinline__ u32 later(u32 a_ns, u32 b_ns) {
  return static_cast<std::int32_t>(a_ns - b_ns) > 0 ? a_ns : b_ns;
}

__device__ __forceinline__ uint4 as_bf16(const float (&values)[8]) {
  return make_uint4(sm90::as_bf16_pair(values[0], values[1]), sm90::as_bf16_pair(values[2], values[3]),
                    sm90::as_bf16_pair(values[4], values[5]), sm90::as_bf16_pair(values[6], values[7]));
}
//! A lane's sums of all math warps, in their order; `pitch` vectors from warp to warp.
__device__ __forceinline__ float4 sum_over_warps(const float4* partial, u32 pitch) {
  float4 sum = partial[0];
#pragma unroll
  for (u32 warp = 1; warp < math_warps; ++warp) {
    const float4 other = partial[warp * pitch];
    sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
  }
  return sum;
}

//! A task on its way from the picking thread to the others; they add the times.
struct Item {
  uint4 packed_work;
  u32 id, block;
  u32 ticket_ns;
  u32 ready_ns, turn_ns;  // inputs seen complete; the math warps have come to the task

  __device__ __forceinline__ Work work() const { return Work::unpacked(packed_work); }
  __device__ __forceinline__ u32 seen_ready_ns() const { return later(ready_ns, ticket_ns); }
  //! When the worker began: it was free, and the inputs were there.
  __device__ __forceinline__ u32 start_ns() const { return later(turn_ns, seen_ready_ns()); }
};
static_assert(sizeof(Item) == sizeof_item);

//! Named barriers of the hardware; 0 is __syncthreads.
constexpr u32 math_barrier = 1, finish_barrier = 2, plan_barrier = 3;
__device__ __forceinline__ void meet_math_warps() { sm90::named_barrier<math_barrier, math_threads>(); }
constexpr u32 adding_warps = 4;  // of the math warps, which make the plan

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
  const SharedLayout& at;
  u32 worker;
  u32 ended_epoch;  // of the launch before
  u64 begin_ns;     // with the trace on: when the thread began, if it keeps records

  //! All its warps ask for it at once: in one line with the others', so would all work-groups.
  __device__ __forceinline__ u32* last_epoch() const {
    return in_workspace<u32>(params.layout.epoch + u64{worker} * line_bytes);
  }
  //! From here on the thread may read and write what launches before have to do with.
  template <bool traced>
  __device__ __forceinline__ void begin() {
    sm90::wait_for_launch_before();
    // relaxed: the launch before has ended. On its way while the first task begins: only what tells others
    // needs it.
    ended_epoch = load_relaxed<Scope::device>(last_epoch());
    if constexpr (traced) begin_ns = clock_ns();
  }
  //! Into L2, before the launch before has ended: what it wrote is there anyway, and the rest may have had to
  //! leave for the weights of other layers. By one warp.
  __device__ __forceinline__ void ask_for_inputs() const {
    const u32 lane = threadIdx.x % 32, first = worker * 32 + lane, step = params.num_workers * 32;
    if (lane == 0) sm90::prefetch(last_epoch());
    for (u32 line = first; line < params.num_tokens * d_model * 2 / 128; line += step)
      sm90::prefetch(static_cast<const char*>(params.x) + u64{line} * 128);
    if (params.given_idx == nullptr) return;
    for (u32 pair = first * 32; pair < params.num_tokens * top_k; pair += step * 32) {
      sm90::prefetch(params.given_idx + pair);
      sm90::prefetch(params.given_weights + pair);
    }
  }
  //! Added where it is asked for: right after the load, the thread would wait for it there.
  __device__ __forceinline__ u32 epoch() const { return sm90::known_now(ended_epoch) + 1; }
  __device__ __forceinline__ const Counters& counters() const { return params.layout.counters[epoch() % 2]; }
  template <class T>
  __device__ __forceinline__ T* in_shared(u32 offset) const {
    return reinterpret_cast<T*>(shared + offset);
  }
  template <class T>
  __device__ __forceinline__ T* in_workspace(u64 offset) const {
    return reinterpret_cast<T*>(params.workspace + offset);
  }

  // --- barriers, in this order
  //! Weights and tokens are there.
  __device__ __forceinline__ u32 barrier(u32 index) const {
    return sm90::shared_address(shared) + barriers_at + 8 * index;
  }
  __device__ __forceinline__ u32 slot_full(u32 slot) const { return barrier(slot); }
  __device__ __forceinline__ u32 slot_free(u32 slot) const { return barrier(most_ring_slots + slot); }
  __device__ __forceinline__ u32 item_full(u32 item) const { return barrier(2 * most_ring_slots + item); }
  __device__ __forceinline__ u32 item_free(u32 item) const {
    return barrier(2 * most_ring_slots + num_items + item);
  }
  //! The streaming warp has come to the item's last task.
  __device__ __forceinline__ u32 item_begun(u32 item) const {
    return barrier(2 * most_ring_slots + 2 * num_items + item);
  }
  //! The finish warps have stored all that the item makes.
  __device__ __forceinline__ u32 item_stored(u32 item) const {
    return barrier(2 * most_ring_slots + 3 * num_items + item);
  }
  __device__ __forceinline__ u32 partial_full(u32 buffer) const {
    return barrier(2 * most_ring_slots + 4 * num_items + buffer);
  }
  __device__ __forceinline__ u32 partial_free(u32 buffer) const {
    return barrier(2 * most_ring_slots + 4 * num_items + 2 + buffer);
  }
  //! The masks are there; the plan is.
  __device__ __forceinline__ u32 gathered() const { return barrier(2 * most_ring_slots + 4 * num_items + 4); }
  __device__ __forceinline__ u32 planned() const { return barrier(2 * most_ring_slots + 4 * num_items + 5); }
  template <Mode mode>
  __device__ void init_barriers() const {
    using R = Roles<mode>;
    for (u32 i = 0; i < ring_slots(mode); ++i) {
      sm90::barrier_init(slot_full(i), 1 + 32);  // the streaming thread and the lanes of a loading warp
      sm90::barrier_init(slot_free(i), math_warps);
    }
    for (u32 i = 0; i < num_items; ++i) {
      sm90::barrier_init(item_full(i), 1);
      sm90::barrier_init(item_free(i), math_warps + R::finish_warps + R::load_warps + R::signal_warps + 1);
      sm90::barrier_init(item_begun(i), 1);
      if constexpr (R::signal_warps > 0) sm90::barrier_init(item_stored(i), R::finish_warps);
    }
    for (u32 i = 0; i < 2; ++i) {
      sm90::barrier_init(partial_full(i), math_warps);
      sm90::barrier_init(partial_free(i), R::finish_warps);
    }
    sm90::barrier_init(gathered(), math_warps);
    sm90::barrier_init(planned(), adding_warps);
    sm90::barriers_initialised();
  }
  __device__ __forceinline__ Work work(u32 slot) const { return item(slot).work(); }
  //! Words: bit t of an expert's is set if token t has it.
  __device__ __forceinline__ const u32* masks() const { return in_shared<u32>(at.mask); }
  //! An early item's expert, and how many tokens it has. By whole warps. Most orders are that of the ids:
  //! then the masks tell, before the plan is there.
  template <Mode mode>
  __device__ __forceinline__ void complete(Work& work, const Plan& plan) const {
    if (mode != Mode::words || work.kind != early_item) return;
    const bool by_id = is_by_id(params.order);
    wait(by_id ? gathered() : planned(), 0);
    const u32 place = work.first;
    work.kind = plan_item;  // nothing to do
    if (warp_stopped()) return;
    work.expert = by_id                       ? active_expert(place, masks())
                  : place < plan.num_active() ? plan.sequence[place]
                                              : none;
    if (work.expert == none) return;
    work.kind = static_cast<u32>(TaskKind::up);
    work.count = __popc(masks()[work.expert]);
  }
  //! The expert that comes after so many others with tokens, or none. By whole warps. active_of(first
  //! expert): a bit for each of 32 that has.
  template <class ActiveOf>
  __device__ __forceinline__ static u32 active_expert(u32 left, ActiveOf active_of) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll 1
    for (u32 base = 0; base < num_experts; base += 32) {
      const u32 active = active_of(base);
      if (left < __popc(active)) {
        const bool is_it = (active >> lane & 1) != 0 && __popc(active & ((1u << lane) - 1)) == left;
        return base + __ffs(static_cast<int>(__ballot_sync(~0u, is_it))) - 1;
      }
      left -= __popc(active);
    }
    return none;
  }
  //! of_expert: [num_experts] 0 where it has none.
  __device__ __forceinline__ static u32 active_expert(u32 left, const u32* of_expert) {
    const u32 lane = threadIdx.x % 32;
    return active_expert(left, [&](u32 base) {
      return __ballot_sync(~0u, base + lane < num_experts && of_expert[base + lane] != 0);
    });
  }
  //! In whole words: a compiler may copy bytes.
  __device__ __forceinline__ void put(const Item& item, u32 slot) const {
    auto* to = in_shared<uint4>(items_at + slot * sizeof_item);
    to[0] = item.packed_work;
    to[1] = make_uint4(item.id, item.block, item.ticket_ns, item.ready_ns);
    *in_shared<u32>(items_at + slot * sizeof_item + 32) = item.turn_ns;
  }
  __device__ __forceinline__ const Item& item(u32 slot) const { return in_shared<Item>(items_at)[slot]; }
  __device__ __forceinline__ Item& item(u32 slot) { return in_shared<Item>(items_at)[slot]; }
  __device__ __forceinline__ u32 weights_of(u32 slot) const {
    return sm90::shared_address(shared + at.ring) + slot * at.slot_bytes;
  }
  __device__ __forceinline__ u32 tokens_of(u32 slot) const { return weights_of(slot) + weight_bytes; }

  // --- the trace
  //! When a task of a chain had its inputs, the chain being one item.
  __device__ __forceinline__ volatile u32& ready_ns(u32 task) const {
    return in_shared<volatile u32>(ready_at)[task % num_ready];
  }
  //! By a thread that began with the trace on.
  __device__ __forceinline__ void keep_record(const Item& item, u32 id, u32 index,
                                              u32 end_ns = sm90::timer_ns()) const {
    if (index >= params.trace_capacity) return;  // counted as dropped
    const u32 low_ns = static_cast<u32>(begin_ns);
    // what was given with the launch was in hand before it began
    const u32 start_ns = later(item.start_ns(), low_ns), ticket_ns = later(item.ticket_ns, low_ns),
              ready_ns = later(item.seen_ready_ns(), low_ns);
    params.records[u64{worker} * params.trace_capacity + index] = TraceRecord{
        begin_ns + (start_ns - low_ns),
        end_ns - start_ns,
        id,
        start_ns - ticket_ns,
        start_ns - ready_ns,
        static_cast<u16>(worker),
        0xffff,
        static_cast<u16>(home_domain(worker, domains_in_use(params.num_domains, params.num_workers))),
        0};
  }

  // --- giving up: one thread reports, the others see `stopped`. All go on to the last item, so that warps
  // which meet at a barrier do so to the end: the picking thread hands on the end at once.
  //! 0, `gave_up`, or the barrier that a warp has waited for too long.
  __device__ __forceinline__ volatile u32* stop_flag() const { return in_shared<volatile u32>(stop_at); }
  static constexpr u32 gave_up = 1;
  __device__ __forceinline__ bool stopped() const { return *stop_flag() != 0; }
  //! For a warp that must stay together.
  __device__ __forceinline__ bool warp_stopped() const { return __any_sync(~0u, stopped()); }
  __device__ __forceinline__ void give_up(u32 task_id, EventKind event, u32 index, u64 seen, u64 wanted,
                                          u64 waited_ns, FaultKind kind = FaultKind::deadline) const {
    report(params.fault, worker, epoch(), task_id, Missing{event, index, none, seen, wanted}, waited_ns,
           kind);
    *stop_flag() = gave_up;
  }
  //! One turn of a wait for another work-group; false when the wait is over without success.
  __device__ __forceinline__ bool keep_waiting(u32& turns, u64& since_ns, u32 task_id, EventKind event,
                                               u32 index, u64 seen, u64 wanted) const {
    if ((++turns & 255u) != 0) return true;
    if (stopped()) return false;
    const u64 now_ns = clock_ns();
    if (since_ns == 0) since_ns = now_ns;
    if (params.fault->raised()) {
      *stop_flag() = gave_up;
      return false;
    }
    if (now_ns - since_ns <= params.deadline_ns) return true;
    give_up(task_id, event, index, seen, wanted, now_ns - since_ns);
    return false;
  }
  //! Waits for other warps. Once the work-group gives up, the wait is over: the warps run on, on garbage that
  //! nobody will read. So it has no result, and the loops of products no branches. Who waits for another
  //! work-group has a deadline and reports it; the limit here (a second or more) is for what should not
  //! happen, and told at the end of the kernel.
  __device__ __forceinline__ void wait(u32 barrier_address, u32 parity) const {
    (void)wait_or_stop<true>(barrier_address, parity);
  }
  //! The same for an item, or room for one, whoever gives up. False past the limit: then there is none.
  __device__ __forceinline__ bool wait_for_item(u32 barrier_address, u32 parity) const {
    return wait_or_stop<false>(barrier_address, parity);
  }
  template <bool ends_with_stop>
  __device__ __forceinline__ bool wait_or_stop(u32 barrier_address, u32 parity) const {
    constexpr u32 most_turns = 1u << 26;
    for (u32 turns = 0; !sm90::phase_is_over(barrier_address, parity); ++turns) {
      if (ends_with_stop && stopped()) return false;
      if (turns < most_turns) continue;
      *stop_flag() = barrier_address;
      return false;
    }
    return true;
  }
  //! By one thread, when all have left.
  __device__ __forceinline__ void tell_stuck() const {
    const u32 stuck = *stop_flag();
    if (stuck != gave_up) give_up(none, warp_barrier, stuck - barrier(0), 0, 1, 0);
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
