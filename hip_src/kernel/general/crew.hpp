// The leader's side: Worker's Math, which hands every piece of work to the crew.
#pragma once
#include "group.hpp"

namespace flashmoe::general {

class Crew {
 public:
  FLASHMOE_DEVICE explicit Crew(Group& group) : group_(group) {}

  FLASHMOE_DEVICE void gate(const Task& task, const PeView&) { call(Work::gate, task); }
  FLASHMOE_DEVICE void route(const Task& task, const PeView&) { call(Work::route, task); }
  FLASHMOE_DEVICE u32 dispatch(const Task& task, const PeView&) {
    group_.result = 0;
    call(Work::dispatch, task);
    return group_.result;
  }
  FLASHMOE_DEVICE void up(const Task& task, u32 tile, const PeView&) {
    group_.command.tile = tile;
    call(Work::up, task);
  }
  FLASHMOE_DEVICE void down(const Task& task, u32 tile, const PeView&) {
    group_.command.tile = tile;
    call(Work::down, task);
  }
  FLASHMOE_DEVICE void down_rows(const Task& task, const PeView& view) {
    const TaskGraph& graph = view.graph;
    const u32 group = graph.group_of(task);
    const u32 place = (task.id - graph.first_down()) % graph.plan.num_active();
    group_.command.group = group;
    group_.command.starts = place == graph.group_begin(group) ? 1 : 0;
    group_.command.ends = graph.ends_chain(task) ? 1 : 0;
    call(Work::down_rows, task);
  }
  FLASHMOE_DEVICE void combine(const Task& task, const PeView&) { call(Work::combine, task); }
  //! `bytes` is a multiple of 4.
  FLASHMOE_DEVICE void copy(void* to, const void* from, u64 bytes) {
    group_.command.to = to;
    group_.command.from = from;
    group_.command.bytes = bytes;
    call(Work::copy);
  }
  FLASHMOE_DEVICE void zero(void* to, u64 bytes) {
    group_.command.to = to;
    group_.command.bytes = bytes;
    call(Work::zero);
  }
  FLASHMOE_DEVICE u32 landed_rows(u32 src, const PeView&) {
    group_.result = 0;
    group_.command.tile = src;
    call(Work::landed_rows);
    return group_.result;
  }
  FLASHMOE_DEVICE void plan(const PeView&) { call(Work::plan); }
  FLASHMOE_DEVICE void publish_planned(u32 place, const PeView&) {
    group_.command.tile = place;
    call(Work::publish_planned);
  }
  //! The crew leaves.
  FLASHMOE_DEVICE void end() {
    group_.command.work = Work::end;
    arch::barrier();
  }

 private:
  FLASHMOE_DEVICE void call(Work work, const Task& task) {
    group_.command.task = task;
    call(work);
  }
  FLASHMOE_DEVICE void call(Work work) {
    group_.command.work = work;
    group_.done[0] = group_.done[1] = 0;
    arch::barrier();
    u32 barriers = 0;
    do {
      arch::barrier();
      ++barriers;
    } while (group_.done[barriers % 2] == 0);
  }

  Group& group_;
};

}  // namespace flashmoe::general
