// What all workers and queues share: the machine, the clock, and what they wait for on it.
#pragma once
#include "events.hpp"
#include "memory.hpp"
#include "servers.hpp"

namespace flashmoe::engine {

struct Environment {
  explicit Environment(const Parameters& parameters)
      : p(parameters),
        near_ticket{p.ticket_service_ps, p.ticket_ps},
        shared_ticket{p.num_domains > 1 ? TicketCost{p.ticket_far_service_ps, p.ticket_far_ps} : near_ticket},
        memory(p),
        cores(clock, p),
        links(clock, p) {}
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

  i64 now() const { return clock.now(); }
  //! How long a signal released now takes to another domain.
  i64 far_ps(u32 pe) const { return p.far_ps[memory.num_streams(pe)]; }
  //! How long a signal released now takes within a domain.
  i64 near_ps(u32 pe) const { return p.near_ps[memory.num_streams(pe)]; }
  //! How long a release that begins now takes.
  i64 release_ps(u32 pe) const { return p.release_ps[memory.num_streams(pe)]; }

  const Parameters& p;
  const TicketCost near_ticket, shared_ticket;
  Clock clock;
  Memory memory;
  Cores cores;
  Links links;
  Waiters waiters;
};

}  // namespace flashmoe::engine
