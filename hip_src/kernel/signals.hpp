// Telling who waits: local counters, words on other PEs, and slots of the push queue.
#pragma once
#include "flashmoe/queue.hpp"
#include "pe_view.hpp"

namespace flashmoe {

FLASHMOE_FN PushQueue push_queue_of(const PeView& view) {
  return PushQueue{view.at<u32>(view.counters.heads), view.at<u32>(view.counters.tail),
                   view.at<u64>(view.launch.workspace.slots), view.epoch};
}

//! Publishes what the plan makes ready, from slot `place` on; `size` threads share that.
FLASHMOE_FN void publish_planned(const PeView& view, u32 place, u32 rank, u32 size) {
  const PickOrder order(view.graph, view.launch.policy.order);
  push_queue_of(view).publish(
      place, order.num_planned(), [&](u32 i) { return order.planned(i); }, rank, size);
}

class Signals {
 public:
  FLASHMOE_FN Signals(const PeView& view, const PushQueue& push) : view_(view), push_(push) {}

  //! rows: how many a dispatch has sent.
  FLASHMOE_FN void signal(const Task& task, u32 rows) {
    switch (task.kind) {
      case TaskKind::gate:
        if (arrive(view_.counters.gated, task.block) == view_.launch.tiling.gate_tiles(view_.launch.shape)) {
          push_range(view_.graph.first_route() + task.block, 1);
        }
        break;
      case TaskKind::route: {
        arrive(view_.counters.routed, task.block);
        const u32 per_token_block = view_.launch.shape.num_pes - 1;
        const u32 first_block = task.first / view_.launch.tiling.dispatch_tokens;
        const u32 blocks = ceil_div(task.num_tokens, view_.launch.tiling.dispatch_tokens);
        push_range(view_.graph.first_dispatch() + first_block * per_token_block, blocks * per_token_block);
        arrive(view_.counters.num_routed, 0);
        break;
      }
      case TaskKind::dispatch: {
        u64* sum = view_.at<u64>(view_.counters.dispatched) + task.peer;
        // acq_rel at system scope: each dispatch releases its rows, the last one acquires all of them, so
        // that its word below releases them together
        const u64 mine = dispatched(1, rows);
        const u64 all = fetch_add_acq_rel<Scope::system>(sum, mine) + mine;
        if (static_cast<u32>(all >> 32) == view_.launch.tiling.dispatch_blocks(view_.own.num_tokens)) {
          const LandedWord word{view_.epoch, view_.own.num_tokens, static_cast<u32>(all)};
          // release at system scope: pairs with everything_landed on the other PE
          store_release<Scope::system>(view_.heap(task.peer).landed(view_.pe), word.pack());
        }
        break;
      }
      case TaskKind::up:
        if (arrive(view_.counters.upped, task.block) == view_.graph.up_per_block() &&
            !view_.graph.by_rows()) {
          push_range(view_.graph.first_down() + task.block * view_.graph.down_per_block(),
                     view_.graph.down_per_block());
        }
        break;
      case TaskKind::expert: {
        const Entry& entry = view_.graph.plan.entries[task.first];
        publish_result(entry.src, entry.token * view_.launch.shape.top_k + entry.k, 1);
        break;
      }
      case TaskKind::down:
        if (view_.graph.by_rows()) {
          signal_rows(task);
        } else {
          signal_tile(task);
        }
        break;
      case TaskKind::combine:
        break;
    }
  }

  //! Publishes `count` tasks in a row, if the policy has a push queue.
  FLASHMOE_FN void push_range(u32 first, u32 count) {
    if (view_.launch.policy.queue != QueueKind::push || count == 0) return;
    push_.publish_range(first, count);
  }

 private:
  FLASHMOE_FN void signal_tile(const Task& task) {
    const u32 local = task.expert - view_.pe * view_.graph.plan.num_local;
    const u32 tasks = view_.graph.plan.expert_blocks(local) * view_.graph.down_per_block();
    if (arrive(view_.counters.done, local) != tasks) return;
    view_.graph.plan.for_each_source(local, [&](u32 src) { publish_result(src, task.expert, tasks); });
  }

  FLASHMOE_FN void signal_rows(const Task& task) {
    if (!view_.graph.ends_chain(task) || !view_.launch.tiling.has_combine(view_.launch.shape)) return;
    const u32 group = view_.graph.group_of(task);
    const u32 tasks = view_.launch.tiling.down_tiles(view_.launch.shape);
    if (arrive(view_.counters.done, group) != tasks) return;
    for (u32 src = 0; src < view_.launch.shape.num_pes; ++src) {
      if (view_.graph.plan.group_rows[group * view_.launch.shape.num_pes + src] == 0) continue;
      publish_result(src, view_.pe * view_.launch.tiling.groups(view_.launch.shape) + group, tasks);
    }
  }

  //! acq_rel at system scope: releases this task's stores, to this PE and to others; the last to arrive
  //! acquires those of all the others, and what it publishes next covers them, too.
  FLASHMOE_FN u32 arrive(u64 counters_offset, u32 index) {
    return fetch_add_acq_rel<Scope::system>(view_.at<u32>(counters_offset) + index, 1u) + 1;
  }

  //! release at system scope: pairs with the acquire in has_happened at the owner of the tokens.
  FLASHMOE_FN void publish_result(u32 dst, u32 word, u32 num_tasks) {
    store_release<Scope::system>(view_.heap(dst).result(word), result_word_of(view_.epoch, num_tasks));
  }

  const PeView& view_;
  PushQueue push_;
};

}  // namespace flashmoe
