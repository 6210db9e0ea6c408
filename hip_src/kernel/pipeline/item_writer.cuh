// What the picking thread hands on, and how far it may be ahead of the others.
#pragma once
#include "group.cuh"

namespace flashmoe::pipeline {

template <Mode mode>
class ItemWriter {
 public:
  __device__ ItemWriter(Group& group, const TaskGraph& graph) : group_(group), graph_(graph) {}

 protected:
  __device__ __forceinline__ void finish() {
    push(end_item);
    if (group_.stopped()) return;
    // All warps have let go of the first item, so have begun, and read the epoch. Relaxed: the next launch
    // waits for the end of this one, which comes sooner where no store has only just been made.
    if (num_pushed_ <= num_items) group_.wait(group_.item_free(0), 0);  // else seen, to push the next there
    store_relaxed<Scope::device>(group_.last_epoch(), group_.epoch());
  }

  //! A pick of `length` tasks; `task` is the first, and in the end the last. (Of a copy of it a kernel
  //! spills.)
  __device__ __forceinline__ void hand_on_pick(Task& task, u32 length) {
    if (mode == Mode::words && task.kind == TaskKind::down) {
      hand_on_chain(task, length);
    } else {
      for (u32 chain = starts_chain; length > 0; --length, chain = 0) {
        if (chain == 0) task = graph_.next_in_chain(task);
        hand_on(task, chain | (length == 1 ? ends_chain : 0));
      }
    }
  }
  //! In a chain the rows are those of the task before.
  __device__ __forceinline__ void hand_on(const Task& task, u32 chain) {
    if (task.kind == TaskKind::up)
      work_.row_tiles = graph_.up_width(task.tile) / 8;
    else if (task.kind == TaskKind::down && chain & starts_chain)
      work_.row_tiles = graph_.down_width(task.tile) / 16;
    hand_on(task, task.first, task.num_tokens, chain);
  }
  __device__ __forceinline__ void hand_on_chain(const Task& first_task, u32 length) {
    hand_on(first_task, graph_.plan.active_offset[first_task.expert], length, starts_chain | ends_chain);
  }
  //! Its id and block are known when the plan is.
  __device__ __forceinline__ void hand_on_early(u32 place, u32 tile) {
    work_.row_tiles = 1;
    hand_on(Task{none, TaskKind::up, none, tile, none, 0, 0, none}, place, 0, starts_chain | ends_chain,
            early_item);
  }
  __device__ __forceinline__ void hand_on(const Task& task, u32 first, u32 count, u32 chain,
                                          u32 kind_of_item = none) {
    work_.kind = kind_of_item == none ? static_cast<u32>(task.kind) : kind_of_item;
    work_.chain = chain;
    work_.first = first, work_.count = count;
    work_.tile = task.tile, work_.expert = task.expert;
    push(Item{work_.packed(), task.id, task.block, ticket_ns_, ticket_ns_, ticket_ns_});
  }
  __device__ __forceinline__ void push(u32 kind) { push(Item{make_uint4(kind, 0, 0, 0), 0, 0, 0, 0, 0}); }

  __device__ __forceinline__ void push(const Item& item) {
    if (!group_.wait_for_item(group_.item_free(items_.slot), items_.parity)) return;
    // over, too, as every phase that somebody arrives for must be seen by somebody
    group_.wait(group_.item_begun(items_.slot), items_.parity);
    group_.put(item, items_.slot);
    sm90::arrive(group_.item_full(items_.slot));
    last_item_ = items_;
    ++num_pushed_;
    items_.advance(num_items);
  }

  //! Until the stream has come to the last item: a worker that held more would take work from the others. A
  //! combine has nothing to stream, and has to be done.
  __device__ __forceinline__ bool one_ahead() {
    if (num_pushed_ == 0) return !group_.stopped();
    const u32 slot = last_item_.slot;
    group_.wait(work_.is(TaskKind::combine) ? group_.item_free(slot) : group_.item_begun(slot),
                last_item_.parity ^ 1);
    return !group_.stopped();
  }

  //! Until the last item is done with.
  __device__ __forceinline__ bool drain() {
    if (num_pushed_ > 0) group_.wait(group_.item_free(last_item_.slot), last_item_.parity ^ 1);
    return !group_.stopped();
  }

  Group& group_;
  const TaskGraph& graph_;
  u32 ticket_ns_ = 0;
  Work work_{};  // of the last item that was not the plan or the end
  Turn items_{1}, last_item_{1};
  u32 num_pushed_ = 0;
};

}  // namespace flashmoe::pipeline
