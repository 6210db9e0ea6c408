// Queues: how a worker comes by its next pick. All state is a few counters in the workspace.
#pragma once
#include "flashmoe/exchange.hpp"
#include "flashmoe/layout.hpp"
#include "flashmoe/platform.hpp"
#include "flashmoe/policy.hpp"

namespace flashmoe {

//! Domains in use: each needs a worker of its own, or nobody would take its early picks while thieves wait
//! for them.
FLASHMOE_FN u32 domains_in_use(u32 num_domains, u32 num_workers) {
  return num_domains < num_workers ? num_domains : num_workers;
}
FLASHMOE_FN u32 home_domain(u32 worker, u32 domains) { return worker % domains; }

//! When the first tickets are handed out: as they are asked for, or with the launch, to worker after worker,
//! which spares each a trip to the counter (where all workers surely run).
enum class FirstTickets : u32 { asked_for = 0, given = 1 };

constexpr u32 elsewhere = none - 1;  // no rank: a worker's domain has no more, but another has

//! `ticket`, `domain` and `stride`: ranks of the policy's order. The number of picks may still be unknown
//! (none).
class RankSource {
 public:
  FLASHMOE_FN RankSource(QueueKind kind, char* heads, u32 worker, u32 num_workers, u32 num_domains,
                         FirstTickets first = FirstTickets::asked_for)
      : kind_(kind),
        first_(first),
        heads_(heads),
        worker_(worker),
        num_workers_(num_workers),
        domains_(kind == QueueKind::domain ? domains_in_use(num_domains, num_workers) : 1),
        home_(home_domain(worker, domains_)),
        domain_(home_) {}

  //! Where the counters lie, if that was not known at first; the tickets that are given do not need them.
  FLASHMOE_FN void bind(char* heads) { heads_ = heads; }

  //! The next rank for this worker, or none when all its sources are exhausted. While num_picks is unknown
  //! the rank may turn out to be past the end: ask again then.
  FLASHMOE_FN u32 next(u32 num_picks) {
    u32 rank;
    do rank = try_next(num_picks);
    while (rank == elsewhere);
    return rank;
  }
  //! As `next`; or `elsewhere`, when the next one will be taken from another domain.
  FLASHMOE_FN u32 try_next(u32 num_picks) {
    switch (kind_) {
      case QueueKind::ticket:
        return within(take(0), num_picks);
      case QueueKind::stride:
        return within(worker_ + num_workers_ * turn_++, num_picks);
      case QueueKind::domain: {
        if (domain_ == none) return none;
        const u32 rank = domain_ + domains_ * take(domain_);
        if (rank < num_picks) return rank;
        domain_ = next_with_picks(num_picks);
        return domain_ == none ? none : elsewhere;
      }
      case QueueKind::push:
      case QueueKind::replay:
        break;
    }
    return none;
  }
  //! `ticket`: as `next`, in two steps. The answer need not have come before it is looked at, and the rank
  //! may be past the end.
  FLASHMOE_FN u32 ask() const { return fetch_add_relaxed<Scope::device>(head(0), 1u); }
  FLASHMOE_FN u32 rank_of(u32 answer) const { return given(0) + answer; }
  FLASHMOE_FN bool is_away() const { return domain_ != home_; }

 private:
  //! The nearest other domain with picks left, or none. Looks before it takes: at the end all workers come
  //! by, and fetch-adds on one word are served one after the other.
  FLASHMOE_FN u32 next_with_picks(u32 num_picks) const {
    for (u32 step = 1; step < domains_; ++step) {
      const u32 domain = (home_ + step) % domains_;
      // relaxed: an old value costs one ticket more
      if (domain + domains_ * (given(domain) + load_relaxed<Scope::device>(head(domain))) < num_picks)
        return domain;
    }
    return none;
  }
  FLASHMOE_FN u32* head(u32 domain) const { return reinterpret_cast<u32*>(heads_ + domain * line_bytes); }
  //! Tickets of a domain that are given with the launch: one to each of its workers.
  FLASHMOE_FN u32 given(u32 domain) const {
    if (first_ == FirstTickets::asked_for) return 0;
    return domains_ == 1 ? num_workers_ : (num_workers_ - domain + domains_ - 1) / domains_;
  }
  FLASHMOE_FN u32 take(u32 domain) {
    if (first_ == FirstTickets::given && turn_++ == 0) return domains_ == 1 ? worker_ : worker_ / domains_;
    // relaxed: a ticket orders nothing, the inputs of the task are acquired when they are waited for
    return given(domain) + fetch_add_relaxed<Scope::device>(head(domain), 1u);
  }
  FLASHMOE_FN static u32 within(u32 rank, u32 num_picks) { return rank < num_picks ? rank : none; }

  QueueKind kind_;
  FirstTickets first_;
  char* heads_;
  u32 worker_, num_workers_, domains_;
  u32 home_, domain_;  // the worker's own, and where it takes picks now (none: all are exhausted)
  u32 turn_ = 0;       // stride, and where first tickets are given: picks taken so far
};

//! `push`: set in the cursor while somebody publishes the group of tasks that it is at.
constexpr u32 cursor_busy = 1u << 31;

//! `push`: slots in memory; whoever makes a task ready publishes it, a worker waits for its ticket's slot.
struct PushQueue {
  u32* head;
  u32* tail;
  u64* slots;  // epoch and task id; a slot of another epoch is empty
  u32 epoch;

  //! Slots for `count` tasks in a row; returns the first.
  FLASHMOE_FN u32 reserve(u32 count) const { return fetch_add_relaxed<Scope::device>(tail, count); }
  //! Publishes tasks id_of(0), ..., id_of(count - 1) from slot `place` on. `size` threads may share that.
  template <class IdOf>
  FLASHMOE_FN void publish(u32 place, u32 count, IdOf id_of, u32 rank = 0, u32 size = 1) const {
    // release: who runs a task must see what made it ready; this worker acquired that with the last arrival
    release_fence<Scope::device>();
    for (u32 i = rank; i < count; i += size)
      store_after_fence<Scope::device>(slots + place + i, u64{epoch} << 32 | id_of(i));
  }
  //! Publishes `count` tasks with ids from `first_id` on.
  FLASHMOE_FN void publish_range(u32 first_id, u32 count) const {
    publish(reserve(count), count, [&](u32 i) { return first_id + i; });
  }
  FLASHMOE_FN u32 ticket() const { return fetch_add_relaxed<Scope::device>(head, 1u); }
  //! The task in a slot, or none while it is empty.
  FLASHMOE_FN u32 poll(u32 place) const {
    const u64 slot = load_acquire<Scope::device>(slots + place);  // acquire: pairs with publish
    return epoch_of(slot) == epoch ? static_cast<u32>(slot) : none;
  }
};

}  // namespace flashmoe
