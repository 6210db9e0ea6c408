#include "engine.hpp"

#include "workers.hpp"

namespace flashmoe::engine {
namespace {

//! Hands out what is next on the clock, until nothing is.
class Engine : Workers {
 public:
  Engine(const Parameters& p, const RunConfig& config) : Workers(p, config) {}

  Result run() {
    launch();
    Item next;
    for (;;) {
      const Clock::Turn turn = env_.clock.step(env_.memory.next_ps(), next);
      if (turn == Clock::Turn::end) break;
      if (turn == Clock::Turn::channel) {
        streams_ended();
      } else {
        handle(next);
      }
    }
    return report();
  }

 private:
  void handle(const Item& next) {
    const u32 who = next.who, high = high_of(next.what), low = low_of(next.what);
    switch (static_cast<What>(next.kind)) {
      case What::resume:
        resume(workers_[who]);
        break;
      case What::ticket:
        answer(workers_[who], queues_.ticketed(workers_[who], high, low));
        break;
      case What::look:
        answer(workers_[who], queues_.look_round(workers_[who]));
        break;
      case What::appended:
        appended(workers_[who], high != 0, low);
        break;
      case What::settle:
        answer(workers_[who], queues_.settle(workers_[who], low));
        break;
      case What::give:
        got(workers_[who], low);
        break;
      case What::land:
        land(high, low, who);
        break;
      case What::ingress:
        ingress(who);
        break;
      case What::launch:
        launch(low, who);
        break;
      case What::finish:
        finished(workers_[who], low);
        break;
      case What::release:
        released(workers_[who], low);
        break;
      case What::cached:
        cached(workers_[who]);
        break;
    }
  }

  //! An event lands in a domain; domain_plus_1 0: everybody sees it now.
  void land(u32 number, u32 event, u32 domain_plus_1) {
    Layer* l = layers_.find(number);
    if (l == nullptr) return;
    landed_.clear();
    l->events.take_landed(event, domain_plus_1, landed_);
    for (const Waiter& waiter : landed_) {
      if (waiter.call == Waiter::Call::ring) {
        l->stages[waiter.who].push->ring();
      } else {
        landed(waiter);
      }
    }
  }

  //! A message is at its destination's port.
  void ingress(u32 number) {
    const auto [message, seen_ps] = env_.links.enter(number);
    Layer* l = layers_.find(message.layer);
    if (l != nullptr) l->events.signal(message.event, nullptr, seen_ps, seen_ps);
  }

  Result report() {
    for (u32 number = 0; number < layers_.size(); ++number) {
      if (Layer* l = layers_.find(number)) layers_.close(*l);
    }
    result_.end_ps = env_.now();
    if (result_.tasks_done < result_.num_tasks) report_stuck();
    return std::move(result_);
  }

  void report_stuck() {
    for (const Worker& w : workers_) {
      const bool waits_for_slot = w.waits_for_slot != none;
      if (w.step == Step::done || (!waits_for_slot && w.sleeps_for != SleepsFor::inputs)) continue;
      ++result_.num_stuck;
      if (result_.stuck.size() < max_named) result_.stuck.push_back(stuck_of(w));
    }
    for (u32 number = 0; number < layers_.size(); ++number) {
      const Layer* l = layers_.find(number);
      if (l == nullptr) continue;
      for (u32 row = 0; row < l->has_run.size() && result_.not_taken.size() < max_named; ++row) {
        if (l->has_run[row] == 0) result_.not_taken.emplace_back(number, row);
      }
    }
  }

  //! What a worker waits for.
  Stuck stuck_of(const Worker& w) const {
    const Layer& l = *w.layer;
    Stuck stuck{w.pe, w.index, l.number, w.waits_for_slot, {}};
    for (u32 i = 0; i < w.num_held && stuck.slot == none; ++i) {
      const Pick& pick = picks_.of(w, w.held[i]);
      const TaskClass& c = l.graph.of(pick.row);
      auto name = [&](u32 event) {
        if (l.events.is_seen(event, w)) return;
        stuck.inputs.push_back(Stuck::Input{pick.row, event, l.events[event].count, l.events[event].target});
      };
      if (pick.before != none) name(pick.before);
      for (u32 j = pick.next_wait; j < c.wait_end; ++j) name(l.graph.waits[j]);
    }
    return stuck;
  }

  static constexpr u64 max_named = 8;  // of what is stuck

  std::vector<Waiter> landed_;
};

}  // namespace

Result run(const Parameters& parameters, const RunConfig& config) { return Engine(parameters, config).run(); }

}  // namespace flashmoe::engine
