// How a worker gets its next pick: the five queue disciplines; flashmoe/sim/queues.py explains them.
#pragma once
#include "layer.hpp"

namespace flashmoe::engine {
namespace {  // internal linkage: with all callers in sight, what is called once is inlined

//! Their state is each stage's. Answers are the row of a pick, none: there are no more, or later.
class Queues {
 public:
  Queues(Environment& env, QueueKind kind) : env_(env), kind_(kind) {}

  //! Whether a worker may take its next pick while it runs a task. In the push queue the slot may not be
  //! filled yet, and often the running task is the one that will fill it.
  bool runs_ahead() const { return kind_ != QueueKind::push; }

  //! What a worker does as it enters a layer. Returns whether it has to wait for that.
  bool launch(const Worker& w) {
    return kind_ == QueueKind::push && w.index == 0 && stage_of(w).push->launch(w);
  }

  //! What a worker does right after the signals of a task. Returns whether it has to wait for that.
  bool completed(const Worker& w, const TaskClass& c) {
    return kind_ == QueueKind::push && stage_of(w).push->completed(w, c);
  }

  u32 ask(Worker& w) {
    const LayerGraph& graph = w.layer->graph;
    Stage& stage = stage_of(w);
    u32& turn = stage.turn[w.index];
    switch (kind_) {
      case QueueKind::stride: {
        const u64 rank = w.index + u64{env_.p.num_workers} * turn++;
        return rank < stage.num_picks ? graph.picks.by_rank[w.pe][rank] : none;
      }
      case QueueKind::replay: {
        const std::vector<u32>& list = graph.picks.by_worker[w.pe][w.index];
        return turn < list.size() ? list[turn++] : none;
      }
      case QueueKind::domain:
        if (const u32 row = first(w); row != later) {
          if (row != none) return row;
          w.is_away = true;
        }
        if (!w.is_away) return take(w, static_cast<u32>(w.domain), env_.near_ticket);
        if (env_.p.num_domains == 1) return none;
        env_.clock.at(env_.now() + env_.shared_ticket.service_ps + env_.shared_ticket.latency_ps,
                      item(What::look, w.number));
        return later;
      case QueueKind::ticket:
        if (const u32 row = first(w); row != later) return row;
        [[fallthrough]];
      case QueueKind::push:
        return take(w, 0, env_.shared_ticket);
    }
    return none;
  }

  //! A ticket from the nearest other domain with picks left.
  u32 look_round(const Worker& w) {
    const Stage& stage = stage_of(w);
    for (u32 step = 1; step < env_.p.num_domains; ++step) {
      const u32 domain = (static_cast<u32>(w.domain) + step) % env_.p.num_domains;
      if (rank(domain, stage.heads[domain].value) < stage.num_picks)
        return take(w, domain, env_.shared_ticket);
    }
    return none;
  }

  //! The slot that a worker waits for may be filled.
  u32 settle(Worker& w, u32 slot) { return stage_of(w).push->settle(w, slot); }

  //! The counter has answered.
  u32 ticketed(Worker& w, u32 head, u32 ticket) {
    Stage& stage = stage_of(w);
    if (const u64 r = rank(head, ticket); r < stage.num_picks)
      return kind_ == QueueKind::push ? settle(w, ticket) : w.layer->graph.picks.by_rank[w.pe][r];
    if (kind_ != QueueKind::domain) return none;
    w.is_away = true;
    return env_.p.in_order && w.is_busy() ? only_elsewhere : ask(w);
  }

 private:
  static Stage& stage_of(const Worker& w) { return w.layer->stages[w.pe]; }

  //! What was given with the launch, of the worker's own domain: its number is the rank. later: it has it.
  static u32 first(const Worker& w) {
    Stage& stage = stage_of(w);
    if (stage.has_first[w.index] != 0) return later;
    stage.has_first[w.index] = 1;
    return w.index < stage.num_picks ? w.layer->graph.picks.by_rank[w.pe][w.index] : none;
  }

  //! Domain d owns ranks d, d + D, ...
  u64 rank(u32 head, u32 ticket) const {
    return kind_ == QueueKind::domain ? head + u64{env_.p.num_domains} * ticket : ticket;
  }

  u32 take(const Worker& w, u32 head, TicketCost cost) {
    u32 ticket;
    const i64 at = stage_of(w).heads[head].add(env_.now(), cost, 1, ticket);
    env_.clock.at(at, item(What::ticket, w.number, pair_of(head, ticket)));
    return later;
  }

  Environment& env_;
  QueueKind kind_;
};

}  // namespace
}  // namespace flashmoe::engine
