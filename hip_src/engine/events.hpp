// Who sees when that an event is complete; flashmoe/sim/events.py explains it.
#pragma once
#include <vector>

#include "clock.hpp"
#include "flashmoe/task.hpp"

namespace flashmoe::engine {

struct EventState {
  u32 count = 0, target = 0;
  u32 worker = none;  // who made the last signal; none: another PE
  std::int32_t domain = -1;
  i64 far_ps = 0, near_ps = 0, own_ps = 0;
  i64 others_ps = 0, other_domains_ps = 0;
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
  bool is_seen(u32 who, std::int32_t who_domain, i64 now_ps) const {
    return is_complete() && seen_ps(who, who_domain) <= now_ps;
  }
  bool is_seen_by_all(i64 now_ps) const { return is_complete() && far_ps <= now_ps; }
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

}  // namespace flashmoe::engine
