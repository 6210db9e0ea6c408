// Slots in a row: who makes a pick ready appends it, a worker takes a ticket and waits for its slot;
// PushQueue in flashmoe/sim/queues.py explains it.
#pragma once
#include <algorithm>
#include <deque>
#include <utility>
#include <vector>

#include "environment.hpp"
#include "layer_graph.hpp"

namespace flashmoe::engine {

//! A queue's answers beside the row of a pick, or none. later: an item on the clock will bring it;
//! only_elsewhere: ELSEWHERE in flashmoe/sim/queues.py.
constexpr u32 later = none - 1, only_elsewhere = none - 2;

//! The push queue of one PE and layer.
class PushQueue {
 public:
  PushQueue(Environment& env, const LayerGraph& graph, Events& events, u32 pe)
      : env_(env), graph_(graph), events_(events), pe_(pe) {
    const std::vector<u32>& order = graph.picks.by_rank[pe];
    slots_.resize(order.size());
    appending_.resize(env.p.num_workers);
    std::vector<u32> after_plan, combines, on_completion;
    for (u32 row : order) {
      const auto kind = static_cast<TaskKind>(graph.of(row).kind);
      if (kind == TaskKind::up || kind == TaskKind::expert || (graph.by_rows && kind == TaskKind::down)) {
        after_plan.push_back(row);
      } else if (kind == TaskKind::combine) {
        combines.push_back(row);
      } else {
        on_completion.push_back(row);
      }
    }
    std::sort(combines.begin(), combines.end());
    std::sort(on_completion.begin(), on_completion.end());
    groups_.push_back(std::move(after_plan));
    for (u32 row : combines) groups_.push_back({row});
    missing_.assign(graph.first[pe + 1] - graph.first[pe], 0);
    signals_.assign(events.size(), 0);
    unlocks_.resize(events.size());
    for (u32 row : on_completion) {
      const TaskClass& c = graph.of(row);
      for (u32 i = c.wait_begin; i < c.wait_end; ++i) {
        if (events[graph.waits[i]].target == 0) continue;
        ++missing(row);
        unlocks_[graph.waits[i]].push_back(row);
      }
      if (missing(row) == 0) first_ready_.push_back(row);
    }
  }

  //! Has the picks appended that wait for nothing. Returns whether the worker has to wait for that.
  bool launch(const Worker& w) {
    appending_[w.index] = first_ready_;
    return append(w, false);
  }

  //! Has the picks appended that signals of a task completed. Returns whether the worker has to wait for
  //! that.
  bool completed(const Worker& w, const TaskClass& c) {
    for (u32 i = c.signal_begin; i < c.signal_end; ++i) {
      const SignalTo& to = graph_.signals[i];
      if (to.pe != pe_ || ++signals_[to.event] != events_[to.event].target) continue;
      for (u32 row : unlocks_[to.event]) {
        if (--missing(row) == 0) appending_[w.index].push_back(row);
      }
    }
    return append(w, false);
  }

  //! Hands out a slot that is filled; else appends the next group, if it is ready, or waits.
  u32 settle(Worker& w, u32 slot) {
    Slot& s = slots_[slot];
    if (s.row == none) {
      w.waits_for_slot = slot;
      if (!appending_group_ && group_is_ready(&w)) return append_group(w);
      watch();
      s.waiter = w.number;
      s.serial = ++serial_;
      waiting_.emplace_back(slot, s.serial);
      return later;
    }
    offer();  // this worker may have been woken for a group, and its own slot came first
    if (s.writer == w.number || s.seen_ps <= env_.now()) return s.row;
    env_.clock.at(s.seen_ps, item(What::give, w.number, s.row));
    return later;
  }

  //! The tail has answered: the worker's picks go into slots from `first` on.
  void publish(const Worker& w, u32 first) {
    const i64 seen_ps = env_.now() + env_.far_ps(pe_);
    u32 slot = first;
    for (u32 row : appending_[w.index]) {
      Slot& s = slots_[slot];
      s.row = row;
      s.seen_ps = seen_ps;
      s.writer = w.number;
      wake(slot);
      ++slot;
    }
    appending_[w.index].clear();
  }

  //! The next group is in its slots: on with what its appender waits for.
  u32 group_appended(Worker& w) {
    appending_group_ = false;
    ++next_group_;
    return settle(w, w.waits_for_slot);
  }

  //! An input of the next group has landed.
  void ring() {
    watching_ = false;
    offer();
  }

 private:
  struct Slot {
    u32 row = none, writer = none;
    i64 seen_ps = 0;  // by other workers than the writer
    u32 waiter = none, serial = 0;
  };

  u32& missing(u32 row) { return missing_[row - graph_.first[pe_]]; }

  //! One fetch-and-add for all that became ready together. Returns whether there is something to append.
  bool append(const Worker& w, bool is_group) {
    const auto count = static_cast<u32>(appending_[w.index].size());
    if (count == 0) return false;
    u32 first;
    const i64 at = tail_.add(env_.now(), env_.shared_ticket, count, first);
    env_.clock.at(at, item(What::appended, w.number, pair_of(is_group, first)));
    return true;
  }

  u32 append_group(Worker& w) {
    appending_group_ = true;
    appending_[w.index] = groups_[next_group_];
    return append(w, true) ? later : group_appended(w);
  }

  //! Lets the worker that waits for a slot, if there is one, look again.
  void wake(u32 slot) {
    Slot& s = slots_[slot];
    if (s.waiter == none) return;
    env_.clock.at_once(item(What::settle, s.waiter, slot));
    s.waiter = none;
  }

  //! Whether a worker sees the inputs of the next group; with nullptr, whether everybody does.
  bool group_is_ready(const Worker* w) const {
    return next_group_ < groups_.size() && unseen_input(w) == none;
  }

  u32 unseen_input(const Worker* w) const {
    auto is_unseen = [&](u32 event) {
      return w != nullptr ? !events_.is_seen(event, *w) : !events_.is_seen_by_all(event);
    };
    // a chain waits for each of its other inputs itself
    const u32 planned = graph_.planned_event[pe_];
    if (next_group_ == 0) return is_unseen(planned) ? planned : none;
    const TaskClass& c = graph_.of(groups_[next_group_][0]);
    for (u32 i = c.wait_begin; i < c.wait_end; ++i) {
      if (is_unseen(graph_.waits[i])) return graph_.waits[i];
    }
    return none;
  }

  //! Hangs a bell on the first input of the next group that not everybody sees.
  void watch() {
    if (watching_ || appending_group_ || next_group_ >= groups_.size()) return;
    const u32 event = unseen_input(nullptr);
    if (event == none) return;
    events_.call_when_landed(event, Waiter{Waiter::Call::ring, pe_, 0, 0, -1, none});
    watching_ = true;
  }

  //! Wakes the worker that has waited longest if the next group is ready; else hangs the bell again.
  void offer() {
    while (!waiting_.empty()) {
      const auto [slot, serial] = waiting_.front();
      if (slots_[slot].waiter != none && slots_[slot].serial == serial) break;
      waiting_.pop_front();
    }
    if (waiting_.empty() || appending_group_) return;
    if (group_is_ready(nullptr)) {
      wake(waiting_.front().first);
    } else {
      watch();
    }
  }

  Environment& env_;
  const LayerGraph& graph_;
  Events& events_;
  u32 pe_;
  Counter tail_;
  std::vector<Slot> slots_;
  // (slot, serial), in the order of waiting; stale where serials differ
  std::deque<std::pair<u32, u32>> waiting_;
  u32 serial_ = 0;
  // first all that wait for `planned`, then each combine alone
  std::vector<std::vector<u32>> groups_;
  std::size_t next_group_ = 0;
  bool appending_group_ = false;
  bool watching_ = false;     // a bell hangs on an input of the next group
  std::vector<u32> missing_;  // [row of the PE] inputs still to be completed on this PE
  std::vector<u32> first_ready_;
  std::vector<std::vector<u32>> unlocks_;    // [event] rows that wait for it
  std::vector<u32> signals_;                 // [event] made so far, seen or not
  std::vector<std::vector<u32>> appending_;  // [worker] rows on their way
};

}  // namespace flashmoe::engine
