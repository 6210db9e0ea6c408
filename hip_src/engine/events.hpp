// What tasks wait for: counters that signals add to, and who sees when that one is complete.
// flashmoe/sim/events.py explains it.
#pragma once
#include <vector>

#include "items.hpp"
#include "worker_state.hpp"

namespace flashmoe::engine {

struct EventState {
  u32 count = 0, target = 0;
  u32 worker = none;  // who made the last signal; none: another PE
  std::int32_t domain = -1;
  i64 far_ps = 0, near_ps = 0, own_ps = 0;
  i64 others_ps = 0, other_domains_ps = 0;
  i64 use_ps = 0;  // what every worker, its maker too, has to do with it before it counts as seen
  u32 first_waiter = none, last_waiter = none;

  bool is_complete() const { return count >= target; }
  //! Adds a signal. Returns whether the event is complete with it.
  bool add(u32 maker, std::int32_t maker_domain, i64 now_ps, i64 far, i64 near) {
    if (++count > target) return false;  // a task that ran twice: the event was complete before
    if (maker == none || maker != worker) {
      others_ps = far_ps;
      worker = maker;
    }
    if (maker == none || maker_domain != domain) {
      other_domains_ps = far_ps;
      domain = maker_domain;
    }
    if (far > far_ps) far_ps = far;
    if (count < target) return false;
    near_ps = near > other_domains_ps ? near : other_domains_ps;
    if (near_ps > far_ps) near_ps = far_ps;
    own_ps = others_ps <= now_ps ? now_ps : near_ps;
    return true;
  }
  i64 seen_ps(u32 who, std::int32_t who_domain) const {
    if (who == worker) return own_ps;
    return who_domain == domain ? near_ps : far_ps;
  }
};

//! Who is to be told when an event lands.
struct Waiter {
  enum class Call : u32 { wake, stream, ring };
  Call call;
  u32 who;              // worker (wake, stream), PE (ring)
  u32 pick, serial;     // stream
  std::int32_t domain;  // -1: only when everybody sees it
  u32 next;
};

//! The waiters of all events, a list each, in the order of waiting.
class Waiters {
 public:
  void add(EventState& e, const Waiter& waiter) {
    u32 node = free_;
    if (node == none) {
      node = static_cast<u32>(waiters_.size());
      waiters_.push_back(waiter);
    } else {
      free_ = waiters_[node].next;
      waiters_[node] = waiter;
    }
    append(e, node);
  }

  //! Takes those out who see an event that lands in a domain; domain_plus_1 0: everybody does.
  void take(EventState& e, u32 domain_plus_1, std::vector<Waiter>& landed) {
    u32 node = e.first_waiter;
    e.first_waiter = e.last_waiter = none;
    while (node != none) {
      Waiter& waiter = waiters_[node];
      const u32 next = waiter.next;
      if (domain_plus_1 == 0 || waiter.domain == static_cast<std::int32_t>(domain_plus_1) - 1) {
        landed.push_back(waiter);
        waiter.next = free_;
        free_ = node;
      } else {
        append(e, node);
      }
      node = next;
    }
  }

 private:
  void append(EventState& e, u32 node) {
    waiters_[node].next = none;
    if (e.first_waiter == none) {
      e.first_waiter = node;
    } else {
      waiters_[e.last_waiter].next = node;
    }
    e.last_waiter = node;
  }

  std::vector<Waiter> waiters_;
  u32 free_ = none;
};

//! The events of one layer.
class Events {
 public:
  Events(Clock& clock, Waiters& waiters, u32 layer) : clock_(clock), waiters_(waiters), layer_(layer) {}

  u32 add(u32 target) {
    events_.emplace_back().target = target;
    return size() - 1;
  }
  void set_use(u32 event, i64 use_ps) { events_[event].use_ps = use_ps; }
  u32 size() const { return static_cast<u32>(events_.size()); }
  const EventState& operator[](u32 event) const { return events_[event]; }

  //! Adds one. maker: the worker, or nullptr: another PE. far_ps, near_ps: when others see it.
  void signal(u32 event, const Worker* maker, i64 far_ps, i64 near_ps) {
    EventState& e = events_[event];
    if (e.use_ps > 0) {
      maker = nullptr;
      far_ps = near_ps = far_ps + e.use_ps;
    }
    const bool completed = maker != nullptr
                               ? e.add(maker->number, maker->domain, clock_.now(), far_ps, near_ps)
                               : e.add(none, -1, clock_.now(), far_ps, near_ps);
    if (!completed) return;
    const u64 where = pair_of(layer_, event);
    if (e.near_ps < e.far_ps) clock_.at(e.near_ps, item(What::land, static_cast<u32>(e.domain) + 1, where));
    clock_.at(e.far_ps, item(What::land, 0, where));
  }

  //! When a worker sees a complete event as such.
  i64 seen_ps(u32 event, const Worker& w) const { return events_[event].seen_ps(w.number, w.domain); }
  bool is_seen(u32 event, const Worker& w) const {
    return events_[event].is_complete() && seen_ps(event, w) <= clock_.now();
  }
  bool is_seen_by_all(u32 event) const {
    return events_[event].is_complete() && events_[event].far_ps <= clock_.now();
  }

  void call_when_landed(u32 event, const Waiter& waiter) { waiters_.add(events_[event], waiter); }
  void take_landed(u32 event, u32 domain_plus_1, std::vector<Waiter>& landed) {
    waiters_.take(events_[event], domain_plus_1, landed);
  }

 private:
  Clock& clock_;
  Waiters& waiters_;
  u32 layer_;
  std::vector<EventState> events_;
};

}  // namespace flashmoe::engine
