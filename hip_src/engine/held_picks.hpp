// The picks that workers have taken: which of them is ready, and their weights.
#pragma once
#include <algorithm>
#include <vector>

#include "layer.hpp"

namespace flashmoe::engine {
namespace {  // internal linkage: with all callers in sight, what is called once is inlined

inline bool is_planned_kind(u32 kind) { return kind >= static_cast<u32>(TaskKind::up); }
inline bool is_first_kind(u32 kind) { return kind <= static_cast<u32>(TaskKind::dispatch); }

class HeldPicks {
 public:
  HeldPicks(Environment& env, const RunConfig& config)
      : env_(env),
        look_ahead_(config.queue == QueueKind::push ? 0 : config.look_ahead),
        in_order_(env.p.in_order && config.queue != QueueKind::push),
        picks_a_worker_(std::max(std::min(config.look_ahead, max_look_ahead), 1u) + 3),
        picks_(u64{env.p.num_pes} * env.p.num_workers * picks_a_worker_),
        followers_(u64{env.p.num_pes} * env.p.num_workers),
        key_(mixed((env.p.seed + 1) * golden)) {}

  Pick& of(const Worker& w, u32 place) { return picks_[w.number * picks_a_worker_ + place]; }
  const Pick& of(const Worker& w, u32 place) const { return picks_[w.number * picks_a_worker_ + place]; }

  //! Takes or reaches a task: from now on its weights may stream, or from the plan on if it needs that.
  std::uint8_t hold(Worker& w, u32 row, i64 asked_ps) {
    Layer& l = *w.layer;
    const LayerGraph& g = l.graph;
    const Stage& stage = l.stages[w.pe];
    const auto place = static_cast<std::uint8_t>(__builtin_ctz(~w.used_picks));
    w.used_picks |= 1u << place;
    Pick& pick = of(w, place);
    const TaskClass& c = g.of(row);
    pick.row = row;
    ++pick.serial;
    pick.streaming = pick.from_cache = pick.leads = false;
    pick.loaded_ps = -1;
    pick.asked_ps = asked_ps;
    pick.ticket_ps = env_.now();
    pick.next_wait = c.wait_begin;
    pick.before = none;
    if (env_.p.jitters || env_.p.cache_bytes > 0) {
      const u64 bits = task_bits(key_, l.number, w.pe, g.id_of(w.pe, row));
      pick.quantile = quantile_of(bits);
      pick.stay = stay_of(bits);
      pick.stalls = stalls(bits, env_.p.stall_threshold);
    }
    const bool unplanned = is_planned_kind(c.kind) && !l.events.is_seen(stage.planned, w);
    if (unplanned) {
      pick.before = stage.planned;  // until then an id of a later stage is only a number
    } else if (l.is_pipelined && is_first_kind(c.kind)) {
      pick.before = stage.entry;
    }
    if (env_.p.prefetch && c.cost.stream_bytes > 0) {
      if (unplanned) {
        const Waiter waiter{Waiter::Call::stream, w.number, place, pick.serial, w.domain, none};
        l.events.call_when_landed(stage.planned, waiter);
      } else {
        stream(w, place);
      }
    }
    return place;
  }

  void let_go(Worker& w, u32 place) { w.used_picks &= ~(1u << place); }

  // --- inputs

  bool is_ready(const Worker& w, Pick& pick) const {
    const Layer& l = *w.layer;
    if (pick.before != none) {
      if (!l.events.is_seen(pick.before, w)) return false;
      pick.before = none;
    }
    const TaskClass& c = l.graph.of(pick.row);
    for (; pick.next_wait < c.wait_end; ++pick.next_wait) {
      if (!l.events.is_seen(l.graph.waits[pick.next_wait], w)) return false;
    }
    return true;
  }

  //! Picks in hand, the oldest first, that may be the next to run.
  u32 num_eligible(const Worker& w) const { return in_order_ && w.num_held > 0 ? 1 : w.num_held; }
  //! Index in the worker's hand, or none.
  u32 oldest_ready(Worker& w) {
    for (u32 i = 0; i < num_eligible(w); ++i) {
      Pick& pick = of(w, w.held[i]);
      if (is_ready(w, pick) && (w.num_held == 1 || whole_chain_is_ready(w, pick))) return i;
    }
    return none;
  }

  bool may_take(const Worker& w) const {
    if (w.num_held == 0) return true;
    const Layer& l = *w.layer;
    // and of a chain the stream must have come to the last task, which takes inputs
    if (in_order_) return w.num_held == 1 && !w.is_away && l.graph.chain_of(of(w, w.held[0]).row) <= 1;
    const u32 kind = l.graph.of(of(w, w.held[0]).row).kind;
    // a down that cannot be decoded yet waits for the plan, and so for other PEs
    const bool waits_here = waits_for_own_pe(static_cast<TaskKind>(kind)) &&
                            (!is_planned_kind(kind) || l.events.is_seen(l.stages[w.pe].planned, w));
    return waits_here && w.num_held < 1 + look_ahead_;
  }

  //! Has the worker woken by the first input that is missing, of each of these picks.
  void listen(const Worker& w, const std::uint8_t* places, u32 count) {
    for (u32 i = 0; i < count; ++i) {
      const Pick& pick = of(w, places[i]);
      u32 event = pick.before;
      if (event == none) {
        const LayerGraph& g = w.layer->graph;
        event = pick.next_wait < g.of(pick.row).wait_end
                    ? g.waits[pick.next_wait]
                    : first_unseen(w, pick.row, pick.row + std::max(1u, g.chain_of(pick.row)));
      }
      listen_to(w, event);
    }
  }
  void listen_to(const Worker& w, u32 event) {
    w.layer->events.call_when_landed(event, Waiter{Waiter::Call::wake, w.number, 0, 0, w.domain, none});
  }

  // --- weights

  //! Asks for a pick's weights. A CU streams for one task at a time, in the order in which it asks.
  void stream(Worker& w, std::uint8_t place) {
    Pick& pick = of(w, place);
    if (pick.streaming) return;  // its worker may have seen the plan before the others
    pick.streaming = true;
    if (w.add_stream(place)) start_stream(w);
  }

  //! The memory has read what a worker streams: whoever follows has it, too.
  void read(const Worker& w) {
    const Pick& pick = of(w, w.streams[w.first_stream]);
    if (!pick.leads) return;
    Weights* weights = weights_of(w, pick);
    weights->is_on_its_way = false;
    for (u32 who = weights->first_waiting; who != none; who = followers_[who].next)
      env_.clock.at(std::max(env_.now(), followers_[who].there_ps), item(What::cached, who));
    weights->first_waiting = weights->last_waiting = none;
  }

  //! The first stream has ended, the next one starts. Returns its pick.
  std::uint8_t loaded(Worker& w) {
    const std::uint8_t place = w.end_stream();
    of(w, place).loaded_ps = env_.now();
    if (w.num_streams > 0) start_stream(w);
    return place;
  }

  //! What a pick costs, with its jitter.
  Cost cost(const Worker& w, const Pick& pick, const TaskClass& c) const {
    if (!env_.p.jitters) return c.cost;
    return task_cost(c.before_jitter, env_.p.speeds[w.pe], factor(pick, c),
                     pick.stalls ? env_.p.stall_ps : 0);
  }

 private:
  //! A chain beside others in hand must not wait inside: one of them may make what it waits for.
  bool whole_chain_is_ready(const Worker& w, const Pick& pick) const {
    const u32 chain = w.layer->graph.chain_of(pick.row);
    return chain <= 1 || first_unseen(w, pick.row + 1, pick.row + chain) == none;
  }

  //! First event that one of these tasks waits for, or none.
  u32 first_unseen(const Worker& w, u32 row, u32 end) const {
    const LayerGraph& g = w.layer->graph;
    for (; row < end; ++row) {
      const TaskClass& c = g.of(row);
      for (u32 i = c.wait_begin; i < c.wait_end; ++i) {
        if (!w.layer->events.is_seen(g.waits[i], w)) return g.waits[i];
      }
    }
    return none;
  }

  void start_stream(const Worker& w) {
    Pick& pick = of(w, w.streams[w.first_stream]);
    const double num_bytes = stream_bytes(w, pick);
    if (Weights* weights = weights_of(w, pick); weights != nullptr) {
      const double asked_bytes = env_.memory.asked_bytes(w.pe);
      pick.from_cache = asked_bytes - weights->asked_bytes <= env_.p.stay_bytes[pick.stay];
      weights->asked_bytes = asked_bytes + (pick.from_cache ? 0.0 : num_bytes);
      if (pick.from_cache) return follow(w, *weights, num_bytes);
      pick.leads = !weights->is_on_its_way;  // else its first bytes have left the cache already
      weights->is_on_its_way = true;
    }
    env_.memory.start(env_.now(), w.pe, num_bytes, w.number);
  }

  //! nullptr: no other task has them, or there is no cache.
  Weights* weights_of(const Worker& w, const Pick& pick) const {
    if (env_.p.cache_bytes == 0) return nullptr;
    const TaskClass& c = w.layer->graph.of(pick.row);
    return c.shares_weights ? &w.layer->weights[pick.row - c.weights_back] : nullptr;
  }

  //! From the cache: as fast as a CU alone streams, but not before the weights are there.
  void follow(const Worker& w, Weights& weights, double num_bytes) {
    const i64 there_ps = env_.now() + least_stream_ps(num_bytes, env_.p.speeds[w.pe], env_.p);
    if (!weights.is_on_its_way) return env_.clock.at(there_ps, item(What::cached, w.number));
    followers_[w.number] = Follower{there_ps, none};
    (weights.last_waiting == none ? weights.first_waiting : followers_[weights.last_waiting].next) = w.number;
    weights.last_waiting = w.number;
  }

  double stream_bytes(const Worker& w, const Pick& pick) const {
    const TaskClass& c = w.layer->graph.of(pick.row);
    return env_.p.jitters ? c.cost.stream_bytes * factor(pick, c) : c.cost.stream_bytes;
  }

  double factor(const Pick& pick, const TaskClass& c) const {
    return jitter_factor(c.before_jitter, env_.p.quantiles[pick.quantile]);
  }

  //! Of a stream on its way: when its worker has the weights at the earliest, and who follows it, too.
  struct Follower {
    i64 there_ps;
    u32 next;
  };

  Environment& env_;
  u32 look_ahead_;
  bool in_order_;
  u32 picks_a_worker_;
  std::vector<Pick> picks_;          // [worker][picks_a_worker_]
  std::vector<Follower> followers_;  // [worker]
  u64 key_;
};

}  // namespace
}  // namespace flashmoe::engine
