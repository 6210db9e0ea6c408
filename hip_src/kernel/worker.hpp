// The persistent worker: takes picks from a queue, waits for their inputs, runs them, tells who waits for
// them. What it does is common to all platforms; the numbers are Math's, the disturbances of a stress test
// are Hooks'.
#pragma once
#include "flashmoe/exchange.hpp"
#include "flashmoe/queue.hpp"
#include "flashmoe/task_graph.hpp"
#include "launch.hpp"

namespace flashmoe {

template <class Math, class Hooks>
class Worker {
 public:
  Worker(const Launch& launch, u32 pe, u32 worker, TraceBuffer& trace, Math& math, Hooks& hooks)
      : launch_(launch),
        own_(launch.pes[pe]),
        pe_(pe),
        worker_(worker),
        trace_(trace),
        math_(math),
        hooks_(hooks) {
    const WorkspaceLayout& w = launch.workspace;
    // relaxed: the launch itself orders this worker after the last one of the launch before
    epoch_ = load_relaxed<Scope::device>(at<u32>(w.epoch)) + 1;
    counters_ = w.counters[epoch_ % 2];
    graph_.shape = launch.shape;
    graph_.tiling = launch.tiling;
    graph_.pe = pe;
    graph_.num_tokens = own_.num_tokens;
    graph_.gate_inside = launch.gate_inside;
    graph_.topk_idx = at<std::int32_t>(w.topk_idx);
    key_scratch_ = WorkspaceLayout::bind_plan(graph_.plan, launch.shape, launch.tiling, at<u32>(w.plan),
                                              at<Entry>(w.entries));
    push_ = PushQueue{at<u32>(counters_.heads), at<u32>(counters_.tail), at<u64>(w.slots), epoch_};
  }

  //! One epoch.
  void run() {
    if (worker_ == 0) {
      const WorkspaceLayout::Counters& idle = launch_.workspace.counters[(epoch_ + 1) % 2];
      for (u64 offset = idle.begin; offset < idle.end; offset += sizeof(u64)) *at<u64>(offset) = 0;
    }
    if (launch_.policy.queue == QueueKind::push) {
      run_push();
    } else {
      run_ranks();
    }
    if (stopped_) return;
    // acq_rel: the last worker out advances the epoch after everything that the others did in this one
    if (fetch_add_acq_rel<Scope::device>(at<u32>(counters_.exits), 1u) + 1 == launch_.num_workers) {
      store_release<Scope::device>(at<u32>(launch_.workspace.epoch), epoch_);
    }
  }

 private:
  struct Held {
    u32 rank;  // in the policy's order; for replay the place in the worker's list
    u32 id;    // none while the plan is not there
    u64 ticket_ns;
    u16 flags;
  };

  // --- ticket, domain, static, replay
  // ---------------------------------------------------------------------------

  //! Runs the oldest pick in hand that is ready. Takes another one only past a pick that waits for this PE's
  //! own work: so a lone worker's order never depends on the timing of others.
  void run_ranks() {
    Held held[max_look_ahead + 1];
    u32 count = 0;
    u32 replay_turn = 0;
    bool exhausted = false;
    RankSource source(launch_.policy.queue, at<char>(counters_.heads), worker_, launch_.num_workers,
                      launch_.num_domains);
    while (!stopped_) {
      Missing missing{}, other{};  // what the oldest pick waits for is what a report names
      u32 ready = 0;
      while (ready < count && !is_ready(held[ready], count == 1, source, ready == 0 ? missing : other))
        ++ready;
      for (u32 i = 0; i < count; ++i) {
        if (held[i].rank != none) continue;  // turned out to be past the end
        exhausted = true;
        for (u32 j = i + 1; j < count; ++j) held[j - 1] = held[j];
        --count;
        ready = none;
        break;
      }
      if (ready == none) continue;
      if (ready < count) {
        const Held pick = held[ready];
        for (u32 j = ready + 1; j < count; ++j) held[j - 1] = held[j];
        --count;
        waiting_since_ = 0;
        run_pick(pick.id, pick.ticket_ns,
                 static_cast<u16>(pick.flags | (ready > 0 ? trace_out_of_order : 0)));
        continue;
      }
      if (!exhausted && (count == 0 || (count <= launch_.policy.look_ahead && waits_for_own_pe(held[0])))) {
        Held pick{none, none, now(), 0};
        if (launch_.policy.queue == QueueKind::replay) {
          const u32 place = own_.replay_offset[worker_] + replay_turn;
          if (place < own_.replay_offset[worker_ + 1]) {
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
      if (count == 0 && has_plan(missing)) return;
      for (u32 i = 0; i < count; ++i) held[i].flags |= trace_waited;
      keep_waiting(count == 0 ? none : held[0].id, missing);
    }
  }

  bool waits_for_own_pe(const Held& held) const {
    return held.id != none && flashmoe::waits_for_own_pe(graph_.decode(held.id).kind);
  }

  //! Decodes the pick as soon as that is possible. Leaves rank none when there is no such pick.
  //! Beside others in hand a pick needs the inputs of its whole chain: waiting inside a chain, the worker
  //! could not run the others, and one of them (an older one, or one stolen from another domain) may make
  //! what the chain lacks.
  bool is_ready(Held& held, bool alone, RankSource& source, Missing& missing) {
    if (held.id == none) {
      const bool replay = launch_.policy.queue == QueueKind::replay;
      const u32 early = PickOrder(graph_, launch_.policy.order).num_early();
      const bool stage_a = replay ? own_.replay_ids[held.rank] < graph_.first_up() : held.rank < early;
      if (!stage_a && !has_plan(missing)) return false;
      if (!stage_a && !replay && held.rank >= num_picks()) held.rank = source.next(num_picks());
      if (held.rank == none) return false;
      held.id = replay ? own_.replay_ids[held.rank] : PickOrder(graph_, launch_.policy.order)[held.rank];
    }
    const u32 length = alone ? 1 : chain_length(held.id);
    for (u32 i = 0; i < length; ++i) {
      if (!inputs_ready(graph_.decode(held.id + i), missing)) return false;
    }
    return true;
  }

  u32 chain_length(u32 first) const { return first < graph_.first_up() ? 1 : graph_.chain(first); }

  //! Picks of this PE, or none while the plan is not there.
  u32 num_picks() const { return planned_ ? PickOrder(graph_, launch_.policy.order).size() : none; }

  // --- push
  // -----------------------------------------------------------------------------------------------------

  void run_push() {
    if (worker_ == 0) push_first_tasks();
    while (!stopped_) {
      const u64 ticket_ns = now();
      const u32 place = push_.ticket();
      u16 flags = 0;
      u32 id = none;
      // more workers than picks: tickets go past the last slot, and these workers only wait for the plan
      const bool has_slot = place < launch_.limits.max_picks;
      while (!stopped_ && (!has_slot || (id = push_.poll(place)) == none)) {
        if (planned_ && place >= num_picks()) return;
        Missing missing{push_slot, place, none, 0, epoch_};
        if (find_ready_tasks(missing)) continue;
        flags = trace_waited;
        keep_waiting(none, missing);
      }
      waiting_since_ = 0;
      if (!stopped_) run_pick(id, ticket_ns, flags);
    }
  }

  //! Tasks without inputs.
  void push_first_tasks() {
    const u32 first = graph_.first_task();
    u32 end = launch_.gate_inside ? graph_.first_route() : graph_.first_dispatch();
    if (graph_.num_tokens == 0) end = graph_.first_up();
    push_range(first, end - first);
  }

  //! Waiting workers find what no task of this PE completes: the plan, and then each combine in turn. One at
  //! a time, and strictly in that sequence, so that a lone worker's order does not depend on timing. True
  //! when it found some.
  bool find_ready_tasks(Missing& missing) {
    if (!has_plan(missing)) return false;
    constexpr u32 busy = 1u << 31;
    u32* cursor = at<u32>(counters_.cursor);
    // acquire: the one before published its pushes first
    const u32 group = load_acquire<Scope::device>(cursor);
    if (group & busy) return false;
    const PickOrder order(graph_, launch_.policy.order);
    if (group > graph_.num_combine()) return false;
    const u32 combine = graph_.first_combine() + group - 1;
    if (group > 0 && !inputs_ready(graph_.decode(combine), missing)) return false;
    if (!compare_swap_acquire<Scope::device>(cursor, group, group | busy))
      return true;  // somebody else took it
    if (group > 0) {
      push_range(combine, 1);
    } else {
      // with down="rows" the chains, too: a chain waits for each of its inputs itself
      const u32 end = graph_.by_rows() ? graph_.first_combine() : graph_.first_down();
      const u32 late = graph_.num_combine() + (graph_.by_rows() ? 0 : graph_.num_down());
      u32 place = push_.reserve(order.size() - order.num_early() - late);
      for (u32 rank = order.num_early(); rank < order.size(); ++rank) {
        if (order[rank] < end) push_.publish(place++, order[rank]);
      }
    }
    store_release<Scope::device>(cursor, group + 1);  // release: the next group's pushes come after these
    return true;
  }

  void push_range(u32 first, u32 count) {
    if (launch_.policy.queue != QueueKind::push || count == 0) return;
    const u32 place = push_.reserve(count);
    for (u32 i = 0; i < count; ++i) push_.publish(place + i, first + i);
  }

  // --- waiting
  // --------------------------------------------------------------------------------------------------

  bool inputs_ready(const Task& task, Missing& missing) {
    bool all = true;
    graph_.for_each_wait(task, [&](Event event) { all = all && has_happened(event, missing); });
    return all;
  }

  bool has_happened(Event event, Missing& missing) {
    switch (event.kind) {
      // Acquire on each: pairs with the acq_rel additions of the tasks that made the input.
      case EventKind::gated:
        return reached(at<u32>(counters_.gated) + event.index, launch_.tiling.gate_tiles(launch_.shape),
                       event, missing);
      case EventKind::routed:
        return reached(at<u32>(counters_.routed) + event.index, 1, event, missing);
      case EventKind::upped:
        return reached(at<u32>(counters_.upped) + event.index, graph_.up_per_block(), event, missing);
      case EventKind::planned:
        return has_plan(missing);
      case EventKind::result: {
        // acquire at system scope: pairs with the publish of the results' maker, on whatever PE
        const u64 word = load_acquire<Scope::system>(heap(pe_).result(event.index));
        if (epoch_of(word) == epoch_) return true;
        missing = Missing{event.kind, event.index, none, epoch_of(word), epoch_};
        return false;
      }
    }
    return false;
  }

  bool reached(const u32* counter, u32 target, Event event, Missing& missing) const {
    const u32 seen = load_acquire<Scope::device>(counter);
    if (seen == target) return true;
    missing = Missing{event.kind, event.index, none, seen, target};
    return false;
  }

  //! True when the PE knows its tokens per expert. The first worker to find all inputs there builds the plan.
  bool has_plan(Missing& missing) {
    if (planned_) return true;
    u32* state = at<u32>(counters_.plan_state);
    constexpr u32 building = 1, ready = 2;
    u32 seen = load_acquire<Scope::device>(state);  // acquire: pairs with the release by the plan's builder
    if (seen == 0 && everything_landed(missing) && compare_swap_acquire<Scope::device>(state, 0u, building)) {
      make_plan();
      if (stopped_) return false;
      store_release<Scope::device>(state, ready);  // release: others read the plan's arrays
      seen = ready;
    }
    planned_ = seen == ready;
    if (seen == building) missing = Missing{EventKind::planned, 0, pe_, building, ready};
    return planned_;
  }

  bool everything_landed(Missing& missing) const {
    if (!reached(at<u32>(counters_.num_routed), graph_.num_route(), Event{EventKind::planned, 0}, missing)) {
      missing.src = pe_;
      return false;
    }
    for (u32 src = 0; src < launch_.shape.num_pes; ++src) {
      if (src == pe_) continue;
      // acquire at system scope: pairs with the release of the last dispatch; then all rows of src are here
      const u64 word = load_acquire<Scope::system>(heap(pe_).landed(src));
      if (epoch_of(word) == epoch_) continue;
      missing = Missing{EventKind::planned, 0, src, epoch_of(word), epoch_};
      return false;
    }
    return true;
  }

  void make_plan() {
    const Heap own = heap(pe_);
    // relaxed: everything_landed acquired them
    auto word = [&](u32 src) { return LandedWord::unpack(load_relaxed<Scope::system>(own.landed(src))); };
    auto num_tokens = [&](u32 src) { return src == pe_ ? own_.num_tokens : word(src).num_tokens; };
    auto topk_of = [&](u32 src, u32 token) -> const std::int32_t* {
      if (src == pe_) return graph_.topk_idx + u64{token} * launch_.shape.top_k;
      return *own.tag(src, token) == epoch_ ? own.experts(src, token) : nullptr;
    };
    for (u32 src = 0; src < launch_.shape.num_pes; ++src) {
      if (src == pe_) continue;
      u32 rows = 0;
      for (u32 token = 0; token < num_tokens(src); ++token) rows += *own.tag(src, token) == epoch_ ? 1 : 0;
      if (rows == word(src).num_rows) continue;
      return raise(FaultKind::landed_mismatch, none,
                   Missing{EventKind::planned, 0, src, rows, word(src).num_rows}, 0);
    }
    build_plan(graph_.plan, launch_.shape, launch_.tiling, pe_, num_tokens, topk_of);
    build_sequence(graph_.plan, launch_.shape, launch_.policy.order, pe_, key_scratch_);
    const u64 digest = plan_digest(graph_.plan.entry_offset, graph_.plan.num_local);
    if (launch_.policy.queue == QueueKind::replay && digest != own_.replay_digest) {
      raise(FaultKind::replay_mismatch, none,
            Missing{EventKind::planned, 0, none, digest, own_.replay_digest}, 0);
    }
  }

  //! One turn of a wait: gives the core away, ends the launch when the wait is past its deadline.
  void keep_waiting(u32 id, const Missing& missing) {
    const u64 now_ns = clock_ns();
    if (waiting_since_ == 0) waiting_since_ = now_ns;
    if (now_ns - waiting_since_ > launch_.deadline_ns) {
      raise(FaultKind::deadline, id, missing, now_ns - waiting_since_);
    }
    if (launch_.fault->raised()) stopped_ = true;
    pause();
  }

  void raise(FaultKind kind, u32 id, const Missing& missing, u64 waited_ns) {
    stopped_ = true;
    FaultReport& fault = *launch_.fault;
    if (!fault.claim()) return;
    fault.kind = kind;
    fault.pe = pe_;
    fault.worker = worker_;
    fault.task_id = id;
    fault.epoch = epoch_;
    fault.missing = missing;
    fault.waited_ns = waited_ns;
  }

  // --- running
  // --------------------------------------------------------------------------------------------------

  void run_pick(u32 first, u64 ticket_ns, u16 flags) {
    const u32 length = chain_length(first);
    for (u32 i = 0; i < length && !stopped_; ++i) {
      const Task task = graph_.decode(first + i);
      Missing missing{};
      while (!stopped_ &&
             !inputs_ready(task, missing)) {  // only within a chain: a pick's first task is ready
        flags |= trace_waited;
        keep_waiting(task.id, missing);
      }
      waiting_since_ = 0;
      const u64 ready_ns = now();
      if (stopped_ || !hooks_.before(task)) {
        stopped_ = true;
        return;
      }
      run_task(task, ticket_ns, ready_ns, flags);
      ticket_ns = now();
    }
  }

  void run_task(const Task& task, u64 ticket_ns, u64 ready_ns, u16 flags) {
    const u64 start_ns = now();
    const u32 rows = compute(task);
    const u64 end_ns = now();
    trace_.add(TraceRecord{
        start_ns, narrow(end_ns - start_ns), task.id, narrow(start_ns - ticket_ns),
        narrow(start_ns - ready_ns), static_cast<u16>(worker_), static_cast<u16>(task.peer),
        static_cast<u16>(home_domain(worker_, domains_in_use(launch_.num_domains, launch_.num_workers))),
        flags});
    hooks_.between();
    signal(task, rows);
  }

  //! Does the work of a task, stores to other PEs included; returns the rows that a dispatch sent.
  u32 compute(const Task& task) {
    switch (task.kind) {
      case TaskKind::gate:
        math_.gate(task, own_.x, at<float>(launch_.workspace.logits));
        return 0;
      case TaskKind::route:
        route(task);
        return 0;
      case TaskKind::dispatch:
        return dispatch(task);
      case TaskKind::up:
        math_.up(task, task.tile, *this);
        return 0;
      case TaskKind::expert:
        for (u32 tile = 0; tile < launch_.tiling.up_tiles(launch_.shape); ++tile) math_.up(task, tile, *this);
        for (u32 tile = 0; tile < launch_.tiling.down_tiles(launch_.shape); ++tile)
          math_.down(task, tile, *this);
        return 0;
      case TaskKind::down:
        if (graph_.by_rows()) {
          math_.down_rows(task, *this);
        } else {
          math_.down(task, task.tile, *this);
        }
        return 0;
      case TaskKind::combine:
        math_.combine(task, *this);
        return 0;
    }
    return 0;
  }

  void route(const Task& task) {
    const u32 top_k = launch_.shape.top_k;
    std::int32_t* topk_idx = at<std::int32_t>(launch_.workspace.topk_idx);
    float* topk_weights = at<float>(launch_.workspace.topk_weights);
    for (u32 token = task.first; token < task.first + task.num_tokens; ++token) {
      const u64 slot = u64{token} * top_k;
      if (launch_.gate_inside) {
        math_.route(at<float>(launch_.workspace.logits) + u64{token} * launch_.shape.num_experts,
                    topk_idx + slot, topk_weights + slot);
        continue;
      }
      for (u32 k = 0; k < top_k; ++k) {
        topk_idx[slot + k] = own_.topk_idx[slot + k];
        topk_weights[slot + k] = own_.topk_weights[slot + k];
      }
    }
  }

  u32 dispatch(const Task& task) {
    const Heap peer = heap(task.peer);
    const u64 row_bytes = u64{launch_.shape.d_model} * launch_.shape.element_bytes();
    const u32 top_k = launch_.shape.top_k;
    u32 rows = 0;
    for (u32 token = task.first; token < task.first + task.num_tokens; ++token) {
      if (!graph_.goes_to(token, task.peer)) continue;
      math_.copy(peer.row(pe_, token), static_cast<const char*>(own_.x) + token * row_bytes, row_bytes);
      math_.copy(peer.experts(pe_, token), graph_.topk_idx + u64{token} * top_k,
                 top_k * sizeof(std::int32_t));
      math_.copy(peer.weights(pe_, token), topk_weights() + u64{token} * top_k, top_k * sizeof(float));
      *peer.tag(pe_, token) = epoch_;
      ++rows;
    }
    return rows;
  }

  //! Tells who waits for the task. Everything here comes after the task's own stores.
  void signal(const Task& task, u32 rows) {
    switch (task.kind) {
      case TaskKind::gate:
        if (arrive(counters_.gated, task.block) == launch_.tiling.gate_tiles(launch_.shape)) {
          push_range(graph_.first_route() + task.block, 1);
        }
        break;
      case TaskKind::route: {
        arrive(counters_.routed, task.block);
        const u32 per_token_block = launch_.shape.num_pes - 1;
        const u32 first_block = task.first / launch_.tiling.dispatch_tokens;
        const u32 blocks = ceil_div(task.num_tokens, launch_.tiling.dispatch_tokens);
        push_range(graph_.first_dispatch() + first_block * per_token_block, blocks * per_token_block);
        arrive(counters_.num_routed, 0);
        break;
      }
      case TaskKind::dispatch: {
        u64* sum = at<u64>(counters_.dispatched) + task.peer;
        // acq_rel at system scope: each dispatch releases its rows, the last one acquires all of them, so
        // that its word below releases them together
        const u64 mine = dispatched(1, rows);
        const u64 all = fetch_add_acq_rel<Scope::system>(sum, mine) + mine;
        if (static_cast<u32>(all >> 32) == launch_.tiling.dispatch_blocks(own_.num_tokens)) {
          const LandedWord word{epoch_, own_.num_tokens, static_cast<u32>(all)};
          // release at system scope: pairs with everything_landed on the other PE
          store_release<Scope::system>(heap(task.peer).landed(pe_), word.pack());
        }
        break;
      }
      case TaskKind::up:
        if (arrive(counters_.upped, task.block) == graph_.up_per_block() && !graph_.by_rows()) {
          push_range(graph_.first_down() + task.block * graph_.down_per_block(), graph_.down_per_block());
        }
        break;
      case TaskKind::expert: {
        const Entry& entry = graph_.plan.entries[task.first];
        publish_result(entry.src, entry.token * launch_.shape.top_k + entry.k, 1);
        break;
      }
      case TaskKind::down:
        if (graph_.by_rows()) {
          signal_rows(task);
        } else {
          signal_tile(task);
        }
        break;
      case TaskKind::combine:
        break;
    }
  }

  void signal_tile(const Task& task) {
    const u32 local = task.expert - pe_ * graph_.plan.num_local;
    const u32 tasks = graph_.plan.expert_blocks(local) * graph_.down_per_block();
    if (arrive(counters_.done, local) != tasks) return;
    u32 src = none;
    for (u32 i = graph_.plan.entry_offset[local]; i < graph_.plan.entry_offset[local + 1]; ++i) {
      if (graph_.plan.entries[i].src == src) continue;
      src = graph_.plan.entries[i].src;
      publish_result(src, task.expert, tasks);
    }
  }

  void signal_rows(const Task& task) {
    if (!graph_.ends_chain(task) || !launch_.tiling.has_combine(launch_.shape)) return;
    const u32 group = graph_.group_of(task);
    const u32 tasks = launch_.tiling.down_tiles(launch_.shape);
    if (arrive(counters_.done, group) != tasks) return;
    for (u32 src = 0; src < launch_.shape.num_pes; ++src) {
      if (graph_.plan.group_rows[group * launch_.shape.num_pes + src] == 0) continue;
      publish_result(src, pe_ * launch_.tiling.groups(launch_.shape) + group, tasks);
    }
  }

  //! acq_rel at system scope: releases this task's stores, to this PE and to others; the last to arrive
  //! acquires those of all the others, and what it publishes next covers them, too.
  u32 arrive(u64 counters_offset, u32 index) {
    return fetch_add_acq_rel<Scope::system>(at<u32>(counters_offset) + index, 1u) + 1;
  }

  //! release at system scope: pairs with the acquire in has_happened at the owner of the tokens.
  void publish_result(u32 dst, u32 word, u32 num_tasks) {
    store_release<Scope::system>(heap(dst).result(word), result_word_of(epoch_, num_tasks));
  }

 public:
  // --- where things lie, for Math
  // -------------------------------------------------------------------------------
  const TaskGraph& graph() const { return graph_; }
  Heap heap(u32 pe) const {
    return Heap{launch_.heaps[pe],
                &launch_.heap,
                &launch_.shape,
                launch_.limits.max_tokens,
                launch_.tiling.result_slots(launch_.shape),
                epoch_ % 2};
  }
  //! The token row of an entry: own tokens are read in place, others where they landed.
  const void* row(const Entry& entry) const {
    const u64 row_bytes = u64{launch_.shape.d_model} * launch_.shape.element_bytes();
    if (entry.src == pe_) return static_cast<const char*>(own_.x) + entry.token * row_bytes;
    return heap(pe_).row(entry.src, entry.token);
  }
  float weight(const Entry& entry) const {
    if (entry.src == pe_) return topk_weights()[u64{entry.token} * launch_.shape.top_k + entry.k];
    return heap(pe_).weights(entry.src, entry.token)[entry.k];
  }
  const float* topk_weights() const { return at<float>(launch_.workspace.topk_weights); }
  void* hidden(u32 entry_idx) const {
    return at<char>(launch_.workspace.hidden) +
           u64{entry_idx} * launch_.shape.d_ff * launch_.shape.element_bytes();
  }
  void* out(u32 token) const {
    return static_cast<char*>(own_.out) + u64{token} * launch_.shape.d_model * launch_.shape.element_bytes();
  }

 private:
  template <class T>
  T* at(u64 offset) const {
    return reinterpret_cast<T*>(own_.workspace + offset);
  }
  u64 now() const { return clock_ns() - launch_.start_ns; }
  static u32 narrow(u64 ns) { return ns < none ? static_cast<u32>(ns) : none; }

  const Launch& launch_;
  const LaunchPe& own_;
  u32 pe_, worker_;
  TraceBuffer& trace_;
  Math& math_;
  Hooks& hooks_;
  u32 epoch_ = 0;
  WorkspaceLayout::Counters counters_{};
  TaskGraph graph_{};
  u32* key_scratch_ = nullptr;
  PushQueue push_{};
  bool planned_ = false;
  bool stopped_ = false;
  u64 waiting_since_ = 0;
};

}  // namespace flashmoe
