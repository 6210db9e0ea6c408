// What workers do, from the launch of the first layer to the end of the last one: Worker in
// flashmoe/sim/simpy_worker.py, with a step where the generator yields.
#pragma once
#include <algorithm>
#include <vector>

#include "flashmoe/trace.hpp"
#include "held_picks.hpp"
#include "queues.hpp"

namespace flashmoe::engine {
namespace {  // internal linkage: with all callers in sight, what is called once is inlined

//! The engine's base. What a run consists of lies in it: behind references it would cost one more load each.
class Workers {
 protected:
  Workers(const Parameters& p, const RunConfig& config)
      : config_(config),
        env_(p),
        layers_(env_, config, result_),
        queues_(env_, config.queue),
        picks_(env_, config),
        workers_(u64{p.num_pes} * p.num_workers),
        released_ps_(workers_.size()),
        untold_(workers_.size()) {
    for (u32 i = 0; i < workers_.size(); ++i) {
      Worker& w = workers_[i];
      w.number = i;
      w.pe = static_cast<u16>(i / p.num_workers);
      w.index = static_cast<u16>(i % p.num_workers);
      w.domain = static_cast<std::int16_t>(w.index % p.num_domains);
    }
    env_.clock.keep_near(workers_.data(), sizeof(Worker));
  }

  void launch() {
    for (Worker& w : workers_) {
      w.layer = &layers_[0];
      env_.clock.at_once(item(What::resume, w.number));
    }
  }

  //! A PE launches a layer after the first.
  void launch(u32 number, u32 pe) {
    for (u32 who : layers_[number].stages[pe].launched) {
      Worker& w = workers_[who];
      const i64 delay_ps = config_.gap_ps + env_.p.start_ps[w.index];
      w.step = Step::start;
      if (delay_ps > 0) {
        env_.clock.at(env_.now() + delay_ps, item(What::resume, who));
      } else {
        advance(w);
      }
    }
  }

  // --- what they wait for

  //! An input has landed.
  void landed(const Waiter& waiter) {
    Worker& w = workers_[waiter.who];
    if (waiter.call == Waiter::Call::wake) {
      wake(w, SleepsFor::inputs);
    } else if (picks_.of(w, waiter.pick).serial == waiter.serial) {
      picks_.stream(w, static_cast<std::uint8_t>(waiter.pick));
    }
  }

  //! Streams of the next memory channel have ended.
  void streams_ended() {
    ended_.clear();
    env_.memory.finish(env_.now(), ended_);
    for (u32 who : ended_) {
      Worker& w = workers_[who];
      picks_.read(w);
      const u32 pick = picks_.loaded(w);
      if (w.sleeps_for == SleepsFor::weights && w.awaited == pick) wake_for_weights(w);
    }
    if (env_.memory.next_ps() != never) __builtin_prefetch(&workers_[env_.memory.next_worker()], 1);
  }

  //! The cache has brought what a worker streams.
  void cached(Worker& w) {
    const u32 pick = picks_.loaded(w);
    if (w.awaited == pick) wake(w, SleepsFor::weights);
  }

  void resume(Worker& w) {
    w.sleeps_for = SleepsFor::nothing;
    w.waits_for_slot = none;
    advance(w);
  }

  //! Runs a worker until it has to wait for something. Steps follow each other as they mostly do: an indirect
  //! jump for each would cost more than what it leads to.
  void advance(Worker& w) {
    for (;;) {
      switch (w.step) {
        case Step::end:
          if (!end_task(w)) return;
          [[fallthrough]];
        case Step::bookkeep:
          if (env_.p.gap_ps > 0) {
            w.step = Step::yield_core;
            env_.clock.at(env_.now() + env_.p.gap_ps, item(What::resume, w.number));
            return;
          }
          [[fallthrough]];
        case Step::yield_core:
          if (env_.cores.is_over(w.core_since_ps)) {
            env_.cores.release();
            if (!get_core(w, Step::next_in_chain)) return;
          }
          [[fallthrough]];
        case Step::next_in_chain:
          if (!next_in_chain(w)) continue;
          [[fallthrough]];
        case Step::loop:
          if (!choose(w)) {
            if (w.step == Step::leave) continue;
            return;
          }
          [[fallthrough]];
        case Step::execute:
          if (!execute(w)) return;
          [[fallthrough]];
        case Step::loaded:
          if (!loaded(w)) return;
          w.step = Step::end;
          continue;
        case Step::enter:
          if (!enter(w)) return;
          continue;
        case Step::start:
          if (!get_core(w, Step::launch_queue)) return;
          continue;
        case Step::launch_queue:
          w.step = Step::loop;
          if (queues_.launch(w)) return;
          continue;
        case Step::get_core:
          if (!get_core(w, w.then)) return;
          continue;
        case Step::has_core:
          w.core_since_ps = env_.now();
          w.step = w.then;
          continue;
        case Step::wait_in_chain:
          if (picks_.is_ready(w, picks_.of(w, w.current))) {
            w.remove_held(0);
            w.step = Step::execute;
            continue;
          }
          picks_.listen(w, &w.current, 1);
          sleep(w, SleepsFor::inputs, false, Step::wait_in_chain);
          return;
        case Step::leave:
          if (!leave(w)) return;
          continue;
        case Step::done:
          return;
      }
    }
  }

  //! Runs the oldest pick that is ready; without one takes another, if allowed; else waits for an input.
  //! Returns whether there is one to run now.
  bool choose(Worker& w) {
    for (;;) {
      const u32 ready = w.num_held > 0 ? picks_.oldest_ready(w) : none;
      if (ready != none) {
        w.current = w.held[ready];
        w.remove_held(ready);
        const u32 row = picks_.of(w, w.current).row;
        w.chain_end = row + w.layer->graph.chain_of(row);
        return true;
      }
      if (w.asking) {
        sleep(w, SleepsFor::pick, queues_.runs_ahead(), Step::loop);
        return false;
      }
      if (w.more && picks_.may_take(w)) {
        ask(w);
        continue;
      }
      if (w.num_held > 0) {
        picks_.listen(w, w.held, picks_.num_eligible(w));
        sleep(w, SleepsFor::inputs, false, Step::loop);
      } else {
        w.step = Step::leave;
      }
      return false;
    }
  }

  // --- from layer to layer

  //! Launched with the layer, or on from the one before.
  bool enter(Worker& w) {
    w.step = w.layer->number == 0 ? Step::start : Step::launch_queue;
    if (w.layer->number > 0 || env_.p.start_ps[w.index] == 0) return true;
    env_.clock.at(env_.p.start_ps[w.index], item(What::resume, w.number));
    return false;
  }

  //! On to the next layer, or the end. Nobody knows before the plan that there is nothing left to do.
  bool leave(Worker& w) {
    Layer& l = *w.layer;
    const u32 next = l.number + 1, planned = l.stages[w.pe].planned;
    const i64 busy_ps = std::max(w.last_end_ps, released_ps_[w.number]);
    if (busy_ps > env_.now() || untold_[w.number] > 0) {
      env_.clock.at(busy_ps, item(What::resume, w.number));
      return false;
    }
    if (next == layers_.size()) {
      env_.cores.release();
      w.step = Step::done;
      layers_.left(l);
      return false;
    }
    const bool is_launch = !layers_.is_pipelined(next);
    if (is_launch) {
      env_.cores.release();
    } else if (!l.events.is_seen(planned, w)) {
      picks_.listen_to(w, planned);
      sleep(w, SleepsFor::inputs, false, Step::leave);
      return false;
    }
    w.layer = &layers_[next];
    w.more = true;
    w.is_away = false;
    w.step = Step::enter;
    layers_.left(l);
    if (!is_launch) return true;
    Stage& stage = w.layer->stages[w.pe];
    stage.launched.push_back(w.number);
    if (stage.launched.size() == env_.p.num_workers) env_.clock.at_once(item(What::launch, w.pe, next));
    return false;
  }

  // --- waiting

  //! Until woken; on a host that means without a core, unless the wait is short.
  void sleep(Worker& w, SleepsFor what, bool with_core, Step then) {
    if (!with_core) env_.cores.release();
    w.sleeps_for = what;
    w.triggered = false;
    w.step = with_core ? then : Step::get_core;
    w.then = then;
  }

  void wake(Worker& w, SleepsFor what) {
    if (w.sleeps_for != what || w.triggered) return;
    w.triggered = true;
    env_.clock.at_once(item(What::resume, w.number));
  }

  //! If nothing else is due, what the wake-up would lead to may happen at once.
  void wake_for_weights(Worker& w) {
    if (ended_.size() > 1 || !env_.clock.is_idle_now() || env_.memory.next_ps() == env_.now()) {
      wake(w, SleepsFor::weights);
    } else {
      resume(w);
    }
  }

  //! Returns whether the worker goes on at once.
  bool get_core(Worker& w, Step then) {
    w.then = then;
    w.step = env_.cores.are_shared() ? Step::has_core : then;
    if (!env_.cores.are_shared()) return true;
    env_.cores.acquire(w.number);
    return false;
  }

  // --- picks

  void ask(Worker& w) {
    w.asking = true;
    w.asked_ps = env_.now();
    answer(w, queues_.ask(w));
  }

  void answer(Worker& w, u32 row) {
    if (row != later) got(w, row);
  }

  void got(Worker& w, u32 row) {
    w.asking = false;
    if (row == none) {
      w.more = false;
    } else if (row != only_elsewhere) {
      w.held[w.num_held] = picks_.hold(w, row, w.asked_ps);
      ++w.num_held;
    }
    wake(w, SleepsFor::pick);
  }

  //! The push queue's tail has answered.
  void appended(Worker& w, bool is_group, u32 first) {
    PushQueue& push = *w.layer->stages[w.pe].push;
    push.publish(w, first);
    if (is_group) {
      answer(w, push.group_appended(w));
    } else {
      advance(w);
    }
  }

  //! With the weights of a task there, its worker's stream is free: takes the next pick while the task runs.
  //! Or has it at hand by then, if the machine asks early.
  void fetch_ahead(Worker& w) {
    const bool stays = env_.p.in_order && w.is_away;  // until it has nothing in hand
    if (w.more && !stays && !w.asking && w.num_held == 0 && queues_.runs_ahead()) ask(w);
  }

  // --- tasks

  //! Returns whether the weights are there.
  bool execute(Worker& w) {
    const Layer& l = *w.layer;
    const Pick& pick = picks_.of(w, w.current);
    const TaskClass& c = l.graph.of(pick.row);
    w.start_ps = env_.now();
    w.ready_ps = 0;
    for (u32 i = c.wait_begin; i < c.wait_end; ++i)
      w.ready_ps = std::max(w.ready_ps, l.events.seen_ps(l.graph.waits[i], w));
    if (l.is_pipelined && is_first_kind(c.kind))
      w.ready_ps = std::max(w.ready_ps, l.events.seen_ps(l.stages[w.pe].entry, w));
    if (env_.p.prefetch && env_.p.ask_early && pick.row + 1 >= w.chain_end) fetch_ahead(w);
    if (pick.loaded_ps >= 0 || c.cost.stream_bytes <= 0) return true;
    picks_.stream(w, w.current);
    w.awaited = w.current;
    sleep(w, SleepsFor::weights, true, Step::loaded);
    return false;
  }

  //! Weights and arithmetic side by side, then the fixed part and the remote stores. Returns whether the task
  //! is at its end.
  bool loaded(Worker& w) {
    const Pick& pick = picks_.of(w, w.current);
    if (env_.p.prefetch) {
      if (pick.row + 1 < w.chain_end) {
        w.following = picks_.hold(w, pick.row + 1, env_.now());
      } else {
        fetch_ahead(w);
      }
    }
    const TaskClass& c = w.layer->graph.of(pick.row);
    const Cost cost = picks_.cost(w, pick, c);
    w.done_ps = std::max(env_.now(), w.start_ps + cost.compute_ps);
    const i64 then_ps = w.done_ps + (ends_beside(c) ? 0 : after_ps(w, c, cost));
    if (then_ps == env_.now()) return true;
    w.step = Step::end;
    env_.clock.at(then_ps, item(What::resume, w.number));
    return false;
  }

  bool ends_beside(const TaskClass& c) const {
    return env_.p.finish_beside && is_finished_kind(c.kind) && queues_.runs_ahead();
  }
  static bool releases(const Worker& w, const TaskClass& c) {
    return is_finished_kind(c.kind) && c.signal_begin != c.signal_end && !w.layer->stages[w.pe].sends_words;
  }
  //! What follows a task's weights and arithmetic, if it begins now.
  i64 after_ps(const Worker& w, const TaskClass& c, const Cost& cost) const {
    // who pushes has to wait for its release: it appends what the signals have made ready
    const i64 release_ps = releases(w, c) && !queues_.runs_ahead() ? env_.release_ps(w.pe) : 0;
    return cost.overhead_ps + c.before_jitter.send_ps + release_ps;
  }

  //! Returns whether the worker goes on at once.
  bool end_task(Worker& w) {
    Layer& l = *w.layer;
    const Pick& pick = picks_.of(w, w.current);
    const TaskClass& c = l.graph.of(pick.row);
    i64 end_ps = env_.now();
    if (ends_beside(c)) end_ps = std::max(end_ps, w.last_end_ps) + after_ps(w, c, picks_.cost(w, pick, c));
    record(w, l, pick, c, end_ps);
    if (end_ps > env_.now()) {
      env_.clock.at(end_ps, item(What::finish, w.number, pick.row));
      ++untold_[w.number];
      return true;
    }
    if (queues_.runs_ahead()) {
      tell(w, pick.row);
      return true;
    }
    signal(w, l, c);
    if (!queues_.completed(w, c)) return true;
    w.step = Step::bookkeep;
    return false;
  }

  //! Signals the end of a task, where need be after a release: a worker makes one at a time, beside its
  //! tasks.
  void tell(const Worker& w, u32 row) {
    const TaskClass& c = w.layer->graph.of(row);
    if (releases(w, c)) {
      i64& released_ps = released_ps_[w.number];
      released_ps = std::max(env_.now(), released_ps) + env_.release_ps(w.pe);
      if (released_ps > env_.now()) {
        env_.clock.at(released_ps, item(What::release, w.number, row));
        ++untold_[w.number];
        return;
      }
    }
    signal(w, *w.layer, c);
  }
  void finished(const Worker& w, u32 row) {
    --untold_[w.number];
    tell(w, row);
  }
  void released(const Worker& w, u32 row) {
    --untold_[w.number];
    signal(w, *w.layer, w.layer->graph.of(row));
  }

  void signal(const Worker& w, Layer& l, const TaskClass& c) {
    const i64 far_ps = env_.now() + env_.far_ps(w.pe), near_ps = env_.now() + env_.near_ps(w.pe);
    for (u32 i = c.signal_begin; i < c.signal_end; ++i) {
      const SignalTo& to = l.graph.signals[i];
      if (to.pe == w.pe) {
        // with words every worker routes for itself, and has the routing as this one has it
        const Stage& stage = l.stages[w.pe];
        const bool is_own = to.event == stage.planned && stage.sends_words;
        l.events.signal(to.event, &w, is_own ? env_.now() : far_ps, is_own ? env_.now() : near_ps);
      } else {
        put(l, w.pe, to);
      }
    }
    const u32 next = l.number + 1;
    if (c.signal_begin == c.signal_end && next < layers_.size() && layers_.is_pipelined(next)) {
      // the output is part of the next layer's input
      layers_[next].events.signal(layers_[next].stages[w.pe].entry, &w, far_ps, near_ps);
    }
  }

  void put(Layer& l, u32 source, const SignalTo& to) {
    const i64 seen_ps = env_.links.send(source, Message{l.number, to.event, to.pe}, to.bytes);
    if (seen_ps != never) l.events.signal(to.event, nullptr, seen_ps, seen_ps);
  }

  void record(Worker& w, Layer& l, const Pick& pick, const TaskClass& c, i64 end_ps) {
    const i64 loaded_ps = pick.loaded_ps < 0 ? w.start_ps : pick.loaded_ps;
    const u32 flags = pick.from_cache ? trace_from_cache : 0;
    const Record task{w.index,    flags,     w.ready_ps, pick.asked_ps, pick.ticket_ps,
                      w.start_ps, loaded_ps, w.done_ps,  end_ps};
    result_.hbm_bytes += pick.from_cache ? 0 : c.weight_bytes;
    result_.time.add(task, w.last_end_ps, c.before_jitter.send_ps);
    w.last_end_ps = std::max(w.last_end_ps, end_ps);
    l.record(pick.row, task);
    if (++total_done_ % progress_step == 0 && config_.progress) config_.progress(total_done_);
  }

  //! Returns whether the chain is at its end.
  bool next_in_chain(Worker& w) {
    const u32 row = picks_.of(w, w.current).row;
    picks_.let_go(w, w.current);
    if (row + 1 >= w.chain_end) {
      w.current = no_pick;
      return true;
    }
    w.current = w.following != no_pick ? w.following : picks_.hold(w, row + 1, env_.now());
    w.following = no_pick;
    w.hold_first(w.current);
    w.step = Step::wait_in_chain;
    return false;
  }

  const RunConfig& config_;
  Result result_;
  Environment env_;
  Layers layers_;
  Queues queues_;
  HeldPicks picks_;
  std::vector<Worker> workers_;
  std::vector<i64> released_ps_;  // [worker] until then it is at the releases of tasks before
  // [worker] tasks of which others still have to be told, perhaps at this very moment
  std::vector<u32> untold_;

 private:
  static constexpr u64 progress_step = 1 << 16;  // tasks between two calls of progress

  std::vector<u32> ended_;
  u64 total_done_ = 0;
};

}  // namespace
}  // namespace flashmoe::engine
