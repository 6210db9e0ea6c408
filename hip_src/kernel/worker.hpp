// The persistent worker: takes picks from a queue, waits for their inputs, runs them, tells who waits for
// them. What it does is common to all platforms; the numbers are Math's, the disturbances of a stress test
// are Hooks'.
#pragma once
#include "inputs.hpp"
#include "signals.hpp"

namespace flashmoe {

//! A pick in a worker's hands.
struct Held {
  u32 rank;   // in the policy's order; for replay the place in the worker's list
  Task task;  // the pick's first; its id is none while the plan is not there
  u64 ticket_ns;
  u32 flags;
};

//! What a worker looks at all the time. On a device it lies in the work-group's own memory.
struct WorkerMemory {
  PeView view;
  Held held[max_look_ahead + 1];
};

//! Math does the work of tasks, view in hand: gate, route, dispatch (which returns the rows sent), up, down,
//! down_rows, combine; copy and zero; landed_rows (how many came from a PE), plan and publish_planned.
template <class Math, class Hooks, class Trace>
class Worker {
 public:
  FLASHMOE_FN Worker(WorkerMemory& memory, Watchdog& watchdog, u32 worker, Trace& trace, Math& math,
                     Hooks& hooks)
      : view_(memory.view),
        held_(memory.held),
        push_(push_queue_of(view_)),
        watchdog_(watchdog),
        inputs_(view_, watchdog_, math),
        signals_(view_, push_),
        worker_(worker),
        trace_(trace),
        math_(math),
        hooks_(hooks) {}

  //! One epoch.
  FLASHMOE_FN void run() {
    if (worker_ == 0) {
      const WorkspaceLayout::Counters& idle = view_.launch.workspace.counters[(view_.epoch + 1) % 2];
      math_.zero(view_.at<char>(idle.begin), idle.end - idle.begin);
    }
    if (view_.launch.policy.queue == QueueKind::push) {
      run_push();
    } else {
      run_ranks();
    }
    if (watchdog_.stopped()) return;
    // acq_rel: the last worker out advances the epoch after everything that the others did in this one
    if (fetch_add_acq_rel<Scope::device>(view_.at<u32>(view_.counters.exits), 1u) + 1 ==
        view_.launch.num_workers) {
      store_release<Scope::device>(view_.at<u32>(view_.launch.workspace.epoch), view_.epoch);
    }
  }

 private:
  // --- ticket, domain, static, replay

  //! Runs the oldest pick in hand that is ready. Takes another one only past a pick that waits for this PE's
  //! own work: so a lone worker's order never depends on the timing of others.
  FLASHMOE_FN void run_ranks() {
    Held* const held = held_;
    u32 count = 0;
    u32 replay_turn = 0;
    bool exhausted = false;
    RankSource source(view_.launch.policy.queue, view_.at<char>(view_.counters.heads), worker_,
                      view_.launch.num_workers, view_.launch.num_domains);
    auto drop = [&](u32 place) {
      for (u32 i = place + 1; i < count; ++i) held[i - 1] = held[i];
      --count;
    };
    while (!watchdog_.stopped()) {
      Missing missing{};  // what the oldest pick waits for is what a report names
      u32 ready = 0;
      for (; ready < count; ++ready) {
        Missing lacks{};
        if (is_ready(held[ready], count == 1, source, lacks)) break;
        if (ready == 0) missing = lacks;
      }
      for (u32 i = 0; i < count; ++i) {
        if (held[i].rank != none) continue;  // turned out to be past the end
        exhausted = true;
        drop(i);
        ready = none;
        break;
      }
      if (ready == none) continue;
      if (ready < count) {
        const Held pick = held[ready];
        drop(ready);
        watchdog_.reset();
        run_pick(pick.task, pick.ticket_ns,
                 static_cast<u16>(pick.flags | (ready > 0 ? trace_out_of_order : 0)));
        continue;
      }
      if (!exhausted &&
          (count == 0 || (count <= view_.launch.policy.look_ahead && waits_for_own_pe(held[0])))) {
        Held pick{none, Task{none, TaskKind::gate, none, none, none, 0, 0, none}, now(), 0};
        if (view_.launch.policy.queue == QueueKind::replay) {
          const u32 place = view_.own.replay_offset[worker_] + replay_turn;
          if (place < view_.own.replay_offset[worker_ + 1]) {
            pick.rank = place;
            ++replay_turn;
          }
        } else {
          pick.rank = source.next(num_picks());
          if (source.is_away()) pick.flags = trace_stolen;
        }
        if (pick.rank == none) {
          exhausted = true;
        } else {
          held[count++] = pick;
        }
        continue;
      }
      // Also a worker with nothing left to do stays until the plan is there: an epoch that ended without the
      // dispatches of all PEs could run two ahead of a slow PE, into buffers that this one still reads.
      if (count == 0 && inputs_.has_plan(missing)) return;
      for (u32 i = 0; i < count; ++i) held[i].flags |= trace_waited;
      watchdog_.keep_waiting(count == 0 ? none : held[0].task.id, missing);
    }
  }

  FLASHMOE_FN bool waits_for_own_pe(const Held& held) const {
    return held.task.id != none && flashmoe::waits_for_own_pe(held.task.kind);
  }

  //! Decodes the pick as soon as that is possible. Leaves rank none when there is no such pick.
  //! Beside others in hand a pick needs the inputs of its whole chain: waiting inside a chain, the worker
  //! could not run the others, and one of them (an older one, or one stolen from another domain) may make
  //! what the chain lacks.
  FLASHMOE_FN bool is_ready(Held& held, bool alone, RankSource& source, Missing& missing) {
    if (held.task.id == none) {
      const bool replay = view_.launch.policy.queue == QueueKind::replay;
      const u32 early = PickOrder(view_.graph, view_.launch.policy.order).num_early();
      const bool stage_a =
          replay ? view_.own.replay_ids[held.rank] < view_.graph.first_up() : held.rank < early;
      if (!stage_a && !inputs_.has_plan(missing)) return false;
      if (!stage_a && !replay && held.rank >= num_picks()) {
        held.rank = source.next(num_picks());
        if (source.is_away()) held.flags |= trace_stolen;
      }
      if (held.rank == none) return false;
      held.task = view_.graph.decode(replay ? view_.own.replay_ids[held.rank]
                                            : PickOrder(view_.graph, view_.launch.policy.order)[held.rank]);
    }
    if (!inputs_.are_ready(held.task, missing)) return false;
    Task task = held.task;
    for (u32 left = alone ? 1 : chain_length(task.id); left > 1; --left) {
      task = view_.graph.next_in_chain(task);
      if (!inputs_.are_ready(task, missing)) return false;
    }
    return true;
  }

  FLASHMOE_FN u32 chain_length(u32 first) const {
    return first < view_.graph.first_up() ? 1 : view_.graph.chain(first);
  }

  //! Picks of this PE, or none while the plan is not there.
  FLASHMOE_FN u32 num_picks() {
    if (num_picks_ == none && inputs_.is_planned())
      num_picks_ = PickOrder(view_.graph, view_.launch.policy.order).size();
    return num_picks_;
  }

  // --- push

  FLASHMOE_FN void run_push() {
    if (worker_ == 0) push_first_tasks();
    while (!watchdog_.stopped()) {
      const u64 ticket_ns = now();
      const u32 place = push_.ticket();
      u16 flags = 0;
      u32 id = none;
      // more workers than picks: tickets go past the last slot, and these workers only wait for the plan
      const bool has_slot = place < view_.launch.limits.max_picks;
      while (!watchdog_.stopped() && (!has_slot || (id = push_.poll(place)) == none)) {
        if (inputs_.is_planned() && place >= num_picks()) return;
        Missing missing{push_slot, place, none, 0, view_.epoch};
        if (find_ready_tasks(missing)) continue;
        flags = trace_waited;
        watchdog_.keep_waiting(none, missing);
      }
      watchdog_.reset();
      if (!watchdog_.stopped()) run_pick(view_.graph.decode(id), ticket_ns, flags);
    }
  }

  //! Tasks without inputs.
  FLASHMOE_FN void push_first_tasks() {
    const u32 first = view_.graph.first_task();
    u32 end = view_.launch.gate_inside ? view_.graph.first_route() : view_.graph.first_dispatch();
    if (view_.graph.num_tokens == 0) end = view_.graph.first_up();
    signals_.push_range(first, end - first);
  }

  //! Waiting workers find what no task of this PE completes: the plan, and then each combine in turn. One at
  //! a time, and strictly in that sequence, so that a lone worker's order does not depend on timing. True
  //! when it found some.
  FLASHMOE_FN bool find_ready_tasks(Missing& missing) {
    if (!inputs_.has_plan(missing)) return false;
    u32* cursor = view_.at<u32>(view_.counters.cursor);
    // acquire: the one before published its pushes first
    const u32 group = load_acquire<Scope::device>(cursor);
    if (group & cursor_busy) return false;
    const PickOrder order(view_.graph, view_.launch.policy.order);
    if (group > view_.graph.num_combine()) return false;
    const u32 combine = view_.graph.first_combine() + group - 1;
    if (group > 0 && !inputs_.are_ready(view_.graph.decode(combine), missing)) return false;
    if (!compare_swap_acquire<Scope::device>(cursor, group, group | cursor_busy))
      return true;  // somebody else took it
    if (group > 0) {
      signals_.push_range(combine, 1);
    } else {
      math_.publish_planned(push_.reserve(order.num_planned()), view_);
    }
    store_release<Scope::device>(cursor, group + 1);  // release: the next group's pushes come after these
    return true;
  }

  // --- running

  FLASHMOE_FN void run_pick(Task task, u64 ticket_ns, u16 flags) {
    for (u32 left = chain_length(task.id);; task = view_.graph.next_in_chain(task)) {
      Missing missing{};
      while (!watchdog_.stopped() &&
             !inputs_.are_ready(task, missing)) {  // only within a chain: a pick's first task is ready
        flags |= trace_waited;
        watchdog_.keep_waiting(task.id, missing);
      }
      watchdog_.reset();
      const u64 ready_ns = now();
      if (watchdog_.stopped() || !hooks_.before(task)) {
        watchdog_.stop();
        return;
      }
      run_task(task, ticket_ns, ready_ns, flags);
      if (--left == 0) return;
      ticket_ns = now();
    }
  }

  FLASHMOE_FN void run_task(const Task& task, u64 ticket_ns, u64 ready_ns, u16 flags) {
    const u64 start_ns = now();
    const u32 rows = compute(task);
    const u64 end_ns = now();
    trace_.add(TraceRecord{start_ns, narrow(end_ns - start_ns), task.id, narrow(start_ns - ticket_ns),
                           narrow(start_ns - ready_ns), static_cast<u16>(worker_),
                           static_cast<u16>(task.peer),
                           static_cast<u16>(home_domain(
                               worker_, domains_in_use(view_.launch.num_domains, view_.launch.num_workers))),
                           flags});
    hooks_.between();
    signals_.signal(task, rows);
  }

  //! Does the work of a task, stores to other PEs included; returns the rows that a dispatch sent.
  FLASHMOE_FN u32 compute(const Task& task) {
    switch (task.kind) {
      case TaskKind::gate:
        math_.gate(task, view_);
        return 0;
      case TaskKind::route:
        route(task);
        return 0;
      case TaskKind::dispatch:
        return math_.dispatch(task, view_);
      case TaskKind::up:
        math_.up(task, task.tile, view_);
        return 0;
      case TaskKind::expert:
        for (u32 tile = 0; tile < view_.launch.tiling.up_tiles(view_.launch.shape); ++tile)
          math_.up(task, tile, view_);
        for (u32 tile = 0; tile < view_.launch.tiling.down_tiles(view_.launch.shape); ++tile)
          math_.down(task, tile, view_);
        return 0;
      case TaskKind::down:
        if (view_.graph.by_rows()) {
          math_.down_rows(task, view_);
        } else {
          math_.down(task, task.tile, view_);
        }
        return 0;
      case TaskKind::combine:
        math_.combine(task, view_);
        return 0;
    }
    return 0;
  }

  FLASHMOE_FN void route(const Task& task) {
    if (view_.launch.gate_inside) return math_.route(task, view_);
    const u64 first = u64{task.first} * view_.launch.shape.top_k;
    const u32 bytes = task.num_tokens * view_.launch.shape.top_k * 4;
    math_.copy(view_.at<std::int32_t>(view_.launch.workspace.topk_idx) + first, view_.own.topk_idx + first,
               bytes);
    math_.copy(view_.at<float>(view_.launch.workspace.topk_weights) + first, view_.own.topk_weights + first,
               bytes);
    if (view_.launch.tiling.has_combine(view_.launch.shape)) return;
    for (u32 token = task.first; token < task.first + task.num_tokens; ++token) {
      // no chain writes the output of a token without experts
      if (!view_.graph.has_experts(view_.own.topk_idx, token))
        math_.zero(view_.out(token), view_.row_bytes());
    }
  }

  //! Times are for the trace alone: without one the clock is not read.
  FLASHMOE_FN u64 now() const { return Trace::enabled ? clock_ns() - view_.launch.start_ns : 0; }
  FLASHMOE_FN static u32 narrow(u64 ns) { return ns < none ? static_cast<u32>(ns) : none; }

  const PeView& view_;
  Held* held_;  // [max_look_ahead + 1]
  PushQueue push_;
  Watchdog& watchdog_;
  Inputs<Math> inputs_;
  Signals signals_;
  u32 worker_;
  u32 num_picks_ = none;
  Trace& trace_;
  Math& math_;
  Hooks& hooks_;
};

}  // namespace flashmoe
