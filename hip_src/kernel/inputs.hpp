// What tasks wait for: counters of the PE itself, words from other PEs, and the plan that is made of them.
#pragma once
#include "flashmoe/policy.hpp"
#include "watchdog.hpp"

namespace flashmoe {

template <class Math>
class Inputs {
 public:
  FLASHMOE_FN Inputs(const PeView& view, Watchdog& watchdog, Math& math)
      : view_(view), watchdog_(watchdog), math_(math) {}

  FLASHMOE_FN bool are_ready(const Task& task, Missing& missing) {
    bool all = true;
    view_.graph.for_each_wait(task, [&](Event event) { all = all && has_happened(event, missing); });
    return all;
  }

  FLASHMOE_FN bool is_planned() const { return planned_; }

  //! True when the PE knows its tokens per expert. The first worker to find all inputs there builds the plan.
  FLASHMOE_FN bool has_plan(Missing& missing) {
    if (planned_) return true;
    u32* state = view_.at<u32>(view_.counters.plan_state);
    constexpr u32 building = 1, ready = 2;
    // acquire: pairs with the release by the plan's builder. System scope, though both are on this PE: it
    // hands on what the builder acquired from other PEs, and rows that came over a link are read by workers
    // of every cache.
    u32 seen = load_acquire<Scope::system>(state);
    if (seen == 0 && everything_landed(missing) && compare_swap_acquire<Scope::system>(state, 0u, building)) {
      make_plan();
      if (watchdog_.stopped()) return false;
      store_release<Scope::system>(state, ready);  // release: others read the plan's arrays
      seen = ready;
    }
    planned_ = seen == ready;
    if (seen == building) missing = Missing{EventKind::planned, 0, view_.pe, building, ready};
    return planned_;
  }

 private:
  FLASHMOE_FN bool has_happened(Event event, Missing& missing) {
    switch (event.kind) {
      // Acquire on each: pairs with the acq_rel additions of the tasks that made the input.
      case EventKind::gated:
        return reached(view_.at<u32>(view_.counters.gated) + event.index,
                       view_.launch.tiling.gate_tiles(view_.launch.shape), event, missing);
      case EventKind::routed:
        return reached(view_.at<u32>(view_.counters.routed) + event.index, 1, event, missing);
      case EventKind::upped:
        return reached(view_.at<u32>(view_.counters.upped) + event.index, view_.graph.up_per_block(), event,
                       missing);
      case EventKind::planned:
        return has_plan(missing);
      case EventKind::result: {
        // acquire at system scope: pairs with the publish of the results' maker, on whatever PE
        const u64 word = load_acquire<Scope::system>(view_.heap(view_.pe).result(event.index));
        if (epoch_of(word) == view_.epoch) return true;
        missing = Missing{event.kind, event.index, none, epoch_of(word), view_.epoch};
        return false;
      }
    }
    return false;
  }

  FLASHMOE_FN bool reached(const u32* counter, u32 target, Event event, Missing& missing) const {
    const u32 seen = load_acquire<Scope::device>(counter);
    if (seen == target) return true;
    missing = Missing{event.kind, event.index, none, seen, target};
    return false;
  }

  FLASHMOE_FN bool everything_landed(Missing& missing) const {
    if (!reached(view_.at<u32>(view_.counters.num_routed), view_.graph.num_route(),
                 Event{EventKind::planned, 0}, missing)) {
      missing.src = view_.pe;
      return false;
    }
    for (u32 src = 0; src < view_.launch.shape.num_pes; ++src) {
      if (src == view_.pe) continue;
      // acquire at system scope: pairs with the release of the last dispatch; then all rows of src are here
      const u64 word = load_acquire<Scope::system>(view_.heap(view_.pe).landed(src));
      if (epoch_of(word) == view_.epoch) continue;
      missing = Missing{EventKind::planned, 0, src, epoch_of(word), view_.epoch};
      return false;
    }
    return true;
  }

  FLASHMOE_FN void make_plan() {
    for (u32 src = 0; src < view_.launch.shape.num_pes; ++src) {
      if (src == view_.pe) continue;
      const u32 rows = math_.landed_rows(src, view_), told = view_.landed(src).num_rows;
      if (rows == told) continue;
      return watchdog_.raise(FaultKind::landed_mismatch, none,
                             Missing{EventKind::planned, 0, src, rows, told}, 0);
    }
    math_.plan(view_);
    const u64 digest = plan_digest(view_.graph.plan.entry_offset, view_.graph.plan.num_local);
    if (view_.launch.policy.queue == QueueKind::replay && digest != view_.own.replay_digest) {
      watchdog_.raise(FaultKind::replay_mismatch, none,
                      Missing{EventKind::planned, 0, none, digest, view_.own.replay_digest}, 0);
    }
  }

  const PeView& view_;
  Watchdog& watchdog_;
  Math& math_;
  bool planned_ = false;
};

}  // namespace flashmoe
