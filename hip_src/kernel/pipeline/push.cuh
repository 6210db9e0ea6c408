// The queue `push`: whoever makes tasks ready publishes them in slots, and a worker waits for the slot of its
// ticket.
#pragma once
#include "item_writer.cuh"
#include "router.cuh"

namespace flashmoe::pipeline {

__device__ __forceinline__ PushQueue push_queue_of(const Group& group) {
  return PushQueue{group.in_workspace<u32>(group.counters().heads),
                   group.in_workspace<u32>(group.counters().tail),
                   group.in_workspace<u64>(group.params.layout.slots), group.epoch()};
}

//! Counts a task; true for the one that makes it `target`. acq_rel: each brings its stores, the last one has
//! them all, and what it publishes next covers them.
__device__ __forceinline__ bool is_last_of(const Group& group, u64 counters, u32 index, u32 target) {
  return fetch_add_acq_rel<Scope::device>(group.in_workspace<u32>(counters) + index, 1u) + 1 == target;
}

//! After a gate task: its logits are on their way, and the route task looks for them itself.
__device__ __forceinline__ void push_route(const Group& group, const TaskGraph& graph, u32 block) {
  if (threadIdx.x == 0 &&
      is_last_of(group, group.counters().gated, block, graph.tiling.gate_tiles(graph.shape)))
    push_queue_of(group).publish_range(graph.first_route() + block, 1);
}

//! After an up task, by one thread.
__device__ __forceinline__ void push_downs(const Group& group, const TaskGraph& graph, u32 block) {
  const u32 count = graph.down_per_block();
  if (is_last_of(group, group.counters().upped, block, graph.up_per_block()))
    push_queue_of(group).publish_range(graph.first_down() + block * count, count);
}

//! Groups of tasks that no task completes: what the plan makes ready, then each combine. The next of them.
__device__ __forceinline__ u32* cursor_of(const Group& group) {
  return group.in_workspace<u32>(group.counters().cursor);
}

//! What the plan makes ready, by the math warps of the work-group that has its plan first.
__device__ __forceinline__ void push_planned(const Group& group, const TaskGraph& graph) {
  const PickOrder order(graph, group.params.order);
  const PushQueue queue = push_queue_of(group);
  const u32 count = order.num_planned();
  auto* place = group.in_shared<u32>(group.at.partial);  // no task is under way
  if (threadIdx.x == 0) {
    // Words: a plan may be there before the last gate task has pushed its route. Picks that need the plan
    // come after all that do not.
    const u32 num_early = graph.first_up() - graph.first_task();
    u32 turns = 0, seen;
    u64 since_ns = 0;
    while ((seen = load_relaxed<Scope::device>(queue.tail)) < num_early &&
           group.keep_waiting(turns, since_ns, none, EventKind::gated, 0, seen, num_early)) {
    }
    const bool is_first = compare_swap_acquire<Scope::device>(cursor_of(group), 0u, cursor_busy);
    *place = is_first ? queue.reserve(count) : none;
  }
  meet_math_warps();
  const u32 first = *place;
  if (first != none)
    queue.publish(first, count, [&](u32 i) { return order.planned(i); }, threadIdx.x, math_threads);
  meet_math_warps();
  // release: the pushes of the next group come after these
  if (first != none && threadIdx.x == 0) store_release<Scope::device>(cursor_of(group), 1u);
}

//! The picking thread: one task at a time, as its own may be the one that fills the slot it waits for.
template <Mode mode, bool traced>
class PushPicker : ItemWriter<mode> {
  using Writer = ItemWriter<mode>;
  using Writer::drain, Writer::finish, Writer::graph_, Writer::group_, Writer::hand_on_pick, Writer::push,
      Writer::ticket_ns_;

 public:
  using Writer::Writer;

  __device__ void run() {
    group_.template begin<false>();
    // of an earlier launch: nothing runs until the host has reset the layer
    if (load_relaxed<Scope::system>(&group_.params.fault->claimed) != 0) *group_.stop_flag() = Group::gave_up;
    pick();
    finish();
  }

 private:
  __device__ __forceinline__ void pick() {
    const PushQueue queue = push_queue_of(group_);
    const u32 first_task = graph_.first_task(), num_early = graph_.first_up() - first_task;
    if (group_.worker == 0)
      queue.publish_range(first_task, graph_.gate_inside ? graph_.first_route() - first_task : num_early);
    u32 num_picks = none;  // until the plan is there
    for (;;) {
      if (!drain()) return;
      if constexpr (traced) ticket_ns_ = sm90::timer_ns();
      const u32 place = queue.ticket();
      // early tasks fill the first slots: who comes after them has none left, and makes the plan
      if (place >= num_early && num_picks == none) {
        push(plan_item);
        group_.wait(group_.planned(), 0);
        if (group_.stopped()) return;
        num_picks = PickOrder(graph_, group_.params.order).size();
      }
      if (num_picks != none && place >= num_picks) return;
      const u32 id = wait_for_slot(queue, place, num_picks != none);
      if (id == none) return;
      Task task = graph_.decode(id);
      hand_on_pick(task, num_picks == none ? 1 : graph_.chain(id));
    }
  }

  __device__ __forceinline__ u32 wait_for_slot(const PushQueue& queue, u32 place, bool is_planned) const {
    u32 turns = 0, id;
    u64 since_ns = 0;
    while ((id = queue.poll(place)) == none) {
      if (is_planned && push_next_combine(queue)) continue;
      if (!group_.keep_waiting(turns, since_ns, none, push_slot, place, 0, group_.epoch())) break;
    }
    return id;
  }

  //! Nobody completes a combine's inputs alone: who waits for a slot looks after them, in their order. True:
  //! look again at the slot.
  __device__ __forceinline__ bool push_next_combine(const PushQueue& queue) const {
    u32* cursor = cursor_of(group_);
    // acquire: who moved it on has pushed before
    const u32 next = load_acquire<Scope::device>(cursor);
    if (next == 0 || next >= cursor_busy || next > graph_.num_combine()) return false;
    const u32 id = graph_.first_combine() + next - 1;
    if (!is_ready(graph_.decode(id))) return false;
    if (!compare_swap_acquire<Scope::device>(cursor, next, next | cursor_busy)) return true;
    queue.publish_range(id, 1);
    store_release<Scope::device>(cursor, next + 1);  // release: the next one's push comes after this
    return true;
  }

  //! Relaxed: who runs the combine acquires its results.
  __device__ __forceinline__ bool is_ready(const Task& combine) const {
    const Router<mode, 1> router(group_, graph_.tiling);
    const u32* done = group_.template in_workspace<u32>(group_.counters().done);
    const u32 slots = graph_.tiling.result_slots(graph_.shape);
    bool is_ready = true;
    for (u32 token = combine.first; token < combine.first + combine.num_tokens; ++token) {
      for (u32 slot = 0; slot < slots; ++slot) {
        const Result result = result_of(router, graph_, token, slot);
        is_ready = is_ready && (result.target == 0 ||
                                load_relaxed<Scope::device>(done + result.counter) == result.target);
      }
    }
    return is_ready;
  }
};

}  // namespace flashmoe::pipeline
