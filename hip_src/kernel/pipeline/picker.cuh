// The picking thread: takes picks as the policy says, decodes them and hands
// them on, one pick ahead of the stream.
#pragma once
#include "flashmoe/queue.hpp"
#include "group.cuh"

namespace flashmoe::pipeline {

template <Mode mode, bool traced>
class Picker {
 public:
  __device__ Picker(Group& group, const TaskGraph& graph) : group_(group), graph_(graph) {}

  __device__ void run() {
    const Params& params = group_.params;
    // of an earlier launch: nothing runs until the host has reset the layer
    const u32 fault_before = load_relaxed<Scope::system>(&params.fault->claimed);
    RankSource source(params.queue, nullptr, group_.worker, params.num_workers, params.num_domains,
                      FirstTickets::given);
    const PickOrder order(graph_, params.order);
    const bool replay = params.queue == QueueKind::replay;
    u32 place = replay ? params.replay_offset[group_.worker] : 0;
    const u32 num_early = order.num_early();
    // first what the plan is made of ...
    u32 rank = none;
    while (one_ahead()) {
      if constexpr (traced) ticket_ns_ = any_item_ ? clock_ns() : params.logs[group_.worker].begin_ns;
      if (replay) {
        if (place == params.replay_offset[group_.worker + 1] || params.replay_ids[place] >= graph_.first_up())
          break;
        hand_on(graph_.decode(params.replay_ids[place++]), starts_chain | ends_chain);
      } else {
        rank = source.next(none);
        source.bind(heads());
        if (rank == none || rank >= num_early) break;
        if (source.is_away() && !drain()) break;
        hand_on(graph_.decode(order[rank]), starts_chain | ends_chain);
      }
    }
    PickDecoder decode(order);
    // ... then the plan, which everybody needs, be it to learn that there is
    // nothing to do ...
    if (fault_before != 0) *group_.stop_flag() = 1;
    if (!get_plan()) return;
    decode.count();
    // ... and the rest
    bool is_first = !replay;  // that pick is in hand
    while (is_first || one_ahead()) {
      if constexpr (traced) {
        if (!is_first) ticket_ns_ = clock_ns();
      }
      Task task;
      if (replay) {
        if (place == params.replay_offset[group_.worker + 1]) break;
        task = graph_.decode(params.replay_ids[place++]);
      } else {
        if (!is_first || rank >= decode.size()) rank = source.next(decode.size());
        is_first = false;
        if (rank == none) break;
        // A pick of another domain may be what an own one waits for, and the
        // others handle picks in turn: so first all that is in hand must have
        // had its inputs.
        if (source.is_away() && !drain()) break;
        task = decode(rank);
      }
      u32 length = graph_.chain(task.id);
      hand_on(task, starts_chain | (length == 1 ? ends_chain : 0));
      for (; length > 1; --length) {
        task = graph_.next_in_chain(task);
        hand_on(task, length == 2 ? ends_chain : 0);
      }
    }
    push(Item{ItemKind::end});
  }

 private:
  __device__ __forceinline__ char* heads() const {
    return group_.template in_workspace<char>(group_.counters().heads);
  }

  //! Asks the math warps for the plan, and waits for it.
  __device__ bool get_plan() {
    push(Item{ItemKind::plan});
    group_.wait(group_.planned(), 0);
    const Params& params = group_.params;
    if (params.queue == QueueKind::replay && !group_.stopped()) {
      const u64 digest = plan_digest(graph_.plan.entry_offset, num_experts);
      if (digest != params.replay_digest)
        group_.give_up(none, EventKind::planned, 0, digest, params.replay_digest, 0,
                       FaultKind::replay_mismatch);
    }
    return !group_.stopped();
  }

  //! In a chain the rows are those of the task before.
  __device__ void hand_on(const Task& task, u32 chain) {
    item_.kind = ItemKind::task;
    item_.task_kind = task.kind;
    item_.id = task.id, item_.expert = task.expert, item_.tile = task.tile;
    item_.block = task.block, item_.first = task.first, item_.num_tokens = task.num_tokens;
    item_.ticket_ns = ticket_ns_;
    item_.chain = chain;
    item_.passes = 1;
    if (task.kind == TaskKind::up) {
      item_.row_tiles = graph_.up_width(task.tile) / 8;
    } else if (task.kind == TaskKind::down) {
      if (chain & starts_chain) item_.row_tiles = graph_.down_width(task.tile) / 16;
      if constexpr (mode == Mode::rows) item_.passes = ceil_div(task.num_tokens, graph_.tiling.block_tokens);
      if constexpr (mode == Mode::words) {
        const u16* entries = group_.template in_shared<u16>(group_.at.entries) + task.first;
        item_.present = 0;
        for (u32 i = 0; i < task.num_tokens; ++i) item_.present |= 1u << entries[i] / top_k;
      }
    }
    push(item_);
  }

  __device__ void push(const Item& item) {
    group_.wait(group_.item_free(items_.slot), items_.parity);
    group_.item(items_.slot) = item;
    sm90::arrive(group_.item_full(items_.slot));
    last_item_ = items_;
    any_item_ = true;
    items_.advance(num_items);
  }

  //! Until the stream has come to the last item: a worker that held more would take work from the others. A
  //! combine has nothing to stream, and has to be done.
  __device__ bool one_ahead() {
    if (item_.kind == ItemKind::task && item_.task_kind == TaskKind::combine) return drain();
    if (any_item_) group_.wait(group_.item_begun(last_item_.slot), last_item_.parity ^ 1);
    return !group_.stopped();
  }

  //! Until the last item is done with.
  __device__ bool drain() {
    if (any_item_) group_.wait(group_.item_free(last_item_.slot), last_item_.parity ^ 1);
    return !group_.stopped();
  }

  Group& group_;
  const TaskGraph& graph_;
  u64 ticket_ns_ = 0;
  Item item_{};
  Turn items_{1}, last_item_{1};
  bool any_item_ = false;
};

}  // namespace flashmoe::pipeline
