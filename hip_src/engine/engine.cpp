#include "engine.hpp"

#include <algorithm>
#include <memory>

namespace flashmoe::engine {
namespace {

enum class What : u32 { resume, ticket, look, appended, settle, give, land, ingress, launch };
enum class Step : std::uint8_t {
  enter,
  start,
  launch_queue,
  loop,
  get_core,
  has_core,
  execute,
  loaded,
  end,
  bookkeep,
  yield_core,
  next_in_chain,
  wait_in_chain,
  leave,
  done
};
enum class SleepsFor : std::uint8_t { nothing, pick, weights, inputs };

constexpr u32 max_held = max_look_ahead + 1;
constexpr u32 max_picks = max_held + 2;  // beside them the one that runs and the next of its chain
constexpr std::uint8_t no_pick = max_picks;
constexpr u64 progress_step = 1 << 16;
constexpr u64 named_stuck = 8;

bool is_planned_kind(u32 kind) { return kind >= static_cast<u32>(TaskKind::up); }
bool is_first_kind(u32 kind) { return kind <= static_cast<u32>(TaskKind::dispatch); }

struct Pick {
  u32 row;
  u32 before;     // event to be seen before all others: the plan, or the layer's entry; or none
  u32 next_wait;  // first input, in the class's list, that was not seen yet
  u32 serial;
  u32 quantile;
  bool streaming, stalls;
  i64 asked_ps, ticket_ps, loaded_ps;
};

struct Layer;

//! Two cache lines: what a worker is doing. Its picks lie elsewhere, as many as it may have at a time.
struct alignas(64) Worker {
  u32 number = 0;
  u16 pe = 0, index = 0;
  std::int16_t domain = 0;
  Step step = Step::enter, then = Step::enter;
  SleepsFor sleeps_for = SleepsFor::nothing;
  bool triggered = false, more = true, asking = false;
  std::uint8_t current = no_pick, following = no_pick, awaited = no_pick;
  std::uint8_t num_held = 0, first_stream = 0, num_streams = 0;
  std::uint8_t held[max_held]{};  // picks, oldest first
  std::uint8_t
      streams[max_picks]{};  // ring of picks whose weights have been asked for, the first one on its way
  u32 chain_end = 0, waits_for_slot = none, used_picks = 0;
  Layer* layer = nullptr;
  i64 start_ps = 0, asked_ps = 0, ready_ps = 0, done_ps = 0, core_since_ps = 0, last_end_ps = 0;
};
static_assert(sizeof(Worker) == 128);

//! The push queue of one PE and layer.
struct PushState {
  struct Slot {
    u32 row = none, writer = none;
    i64 seen_ps = 0;
    u32 waiter = none, serial = 0;
  };
  Counter tail;
  std::vector<Slot> slots;
  std::deque<std::pair<u32, u32>>
      waiting;  // (slot, serial), in the order of waiting; stale where serials differ
  u32 serial = 0;
  std::vector<std::vector<u32>> groups;
  std::size_t next_group = 0;
  bool appending_group = false, watching = false;
  std::vector<u32> missing;  // [row of the PE] inputs still to be completed on this PE
  std::vector<u32> first_ready;
  std::vector<std::vector<u32>> unlocks;  // [event of the PE, from first_event] rows that wait for it
  u32 first_event = 0;
  std::vector<u32> signals;                 // [event of the PE] made so far, seen or not
  std::vector<std::vector<u32>> appending;  // [worker] rows on their way
};

//! One PE's share of one layer.
struct Stage {
  u32 num_picks = 0, planned = 0, entry = 0, arrived = 0;
  std::vector<Counter> heads;
  std::vector<u32>
      turn;  // [worker] picks taken (static, replay); whether its own domain is exhausted (domain)
  std::vector<u32> launched;
  std::unique_ptr<PushState> push;
};

struct Layer {
  LayerGraph graph;
  u32 number = 0;
  std::vector<EventState> events;
  std::vector<Stage> stages;
  std::vector<Record> records;        // [row], if kept
  std::vector<std::uint8_t> has_run;  // [row], if records are kept: a replay may name a task twice
  u64 left = 0, tasks_done = 0;
  i64 end_ps = 0;
};

class Engine {
 public:
  Engine(const Parameters& p, const RunConfig& config)
      : p_(p), config_(config), links_(p), layers_(config.num_layers) {
    const u64 row = p.rates.size() / p.num_pes;
    const bool is_host = p.num_cores > 0;
    for (u32 pe = 0; pe < (is_host ? 1 : p.num_pes); ++pe)
      channels_.emplace_back(p.rates.data() + pe * row, static_cast<u32>(row - 1));
    next_of_channel_.assign(channels_.size(), never);
    shares_channel_ = is_host;
    free_cores_ = p.num_cores;
    workers_.resize(u64{p.num_pes} * p.num_workers);
    for (u32 i = 0; i < workers_.size(); ++i) {
      Worker& w = workers_[i];
      w.number = i;
      w.pe = static_cast<u16>(i / p.num_workers);
      w.index = static_cast<u16>(i % p.num_workers);
      w.domain = static_cast<std::int16_t>(w.index % p.num_domains);
    }
    picks_a_worker_ = std::min(config.look_ahead, max_look_ahead) + 3;
    picks_.resize(workers_.size() * picks_a_worker_);
    clock_.keep_near(workers_.data(), sizeof(Worker));
    key_ = mixed((p.seed + 1) * golden);
    near_ticket_[0] = p.ticket_service_ps;
    near_ticket_[1] = p.ticket_ps;
    shared_ticket_[0] = p.num_domains > 1 ? p.ticket_far_service_ps : p.ticket_service_ps;
    shared_ticket_[1] = p.num_domains > 1 ? p.ticket_far_ps : p.ticket_ps;
  }

  Result run() {
    for (Worker& w : workers_) {
      w.layer = &layer(0);
      clock_.at_once(item(What::resume, w.number));
    }
    Item next;
    for (;;) {
      const Clock::Turn turn = clock_.step(channel_ps_, next);
      if (turn == Clock::Turn::end) break;
      if (turn == Clock::Turn::channel) {
        finish_streams();
      } else {
        handle(next);
      }
    }
    return report();
  }

 private:
  static Item item(What what, u32 who, u64 value = 0) { return Item{value, who, static_cast<u32>(what)}; }
  i64 now() const { return clock_.now(); }

  // --- layers

  Layer& layer(u32 number) {
    if (!layers_[number]) make_layer(number);
    return *layers_[number];
  }

  void make_layer(u32 number) {
    auto made = std::make_unique<Layer>();
    made->graph = config_.make_layer(number);
    made->number = number;
    const LayerGraph& g = made->graph;
    made->events.resize(g.event_target.size() + g.num_pes);
    for (std::size_t i = 0; i < g.event_target.size(); ++i) made->events[i].target = g.event_target[i];
    const u32 first_entry = static_cast<u32>(g.event_target.size());
    for (u32 pe = 0; pe < g.num_pes; ++pe) {
      if (is_pipelined(number)) made->events[first_entry + pe].target = layer(number - 1).graph.outputs[pe];
      Stage stage;
      stage.planned = g.planned_event[pe];
      stage.entry = first_entry + pe;
      stage.heads.resize(config_.queue == QueueKind::domain ? p_.num_domains : 1);
      stage.turn.assign(p_.num_workers, 0);
      if (config_.queue != QueueKind::replay) stage.num_picks = static_cast<u32>(g.picks.by_rank[pe].size());
      made->stages.push_back(std::move(stage));
    }
    if (config_.keep_records) {
      made->records.resize(g.num_tasks());
      made->has_run.assign(g.num_tasks(), 0);
    }
    result_.num_tasks += g.num_tasks();
    for (const TaskClass& c : g.classes) {
      result_.hbm_bytes += c.count * c.weight_bytes;
      result_.link_bytes += c.count * c.link_bytes;
    }
    layers_[number] = std::move(made);
    if (config_.queue == QueueKind::push) {
      for (u32 pe = 0; pe < g.num_pes; ++pe) make_push(number, pe);
    }
  }

  bool is_pipelined(u32 number) const { return number > 0 && config_.pipelined; }
  bool is_launch(u32 number) const { return number == 0 || !config_.pipelined; }

  //! Forgets a layer that everybody has left: memory stays flat however many there are.
  void left(u32 number) {
    Layer& l = *layers_[number];
    if (++l.left < workers_.size() || l.tasks_done < l.graph.num_tasks()) return;
    close_layer(number);
    layers_[number].reset();
  }

  void close_layer(u32 number) {
    Layer& l = *layers_[number];
    result_.tasks_done += l.tasks_done;
    result_.layer_end_ps.resize(std::max<std::size_t>(result_.layer_end_ps.size(), number + 1));
    result_.layer_end_ps[number] = l.end_ps;
    result_.makespan_ps = std::max(result_.makespan_ps, l.end_ps);
    if (config_.keep_records) {
      result_.records.resize(config_.num_layers);
      result_.records[number] = std::move(l.records);
    }
  }

  // --- memory

  Channel& channel(u32 pe) { return channels_[shares_channel_ ? 0 : pe]; }

  void update_channel_ps() {
    channel_ps_ = never;
    for (u32 i = 0; i < next_of_channel_.size(); ++i) {
      if (next_of_channel_[i] < channel_ps_) {
        channel_ps_ = next_of_channel_[i];
        first_channel_ = i;
      }
    }
  }

  void start_stream(Worker& w) {
    const u32 index = shares_channel_ ? 0 : w.pe;
    Channel& c = channels_[index];
    c.start(now(), stream_bytes(w, pick_of(w, w.streams[w.first_stream])), w.number);
    const i64 next_ps = next_of_channel_[index] = c.next_ps();
    if (next_ps < channel_ps_ || (next_ps == channel_ps_ && index < first_channel_)) {
      channel_ps_ = next_ps;
      first_channel_ = index;
    } else if (index == first_channel_) {
      update_channel_ps();
    }
  }

  void finish_streams() {
    ended_.clear();
    channels_[first_channel_].finish(now(), ended_);
    next_of_channel_[first_channel_] = channels_[first_channel_].next_ps();
    update_channel_ps();
    for (u32 number : ended_) {
      Worker& w = workers_[number];
      const u32 pick = w.streams[w.first_stream];
      w.first_stream = static_cast<std::uint8_t>(w.first_stream + 1 == max_picks ? 0 : w.first_stream + 1);
      --w.num_streams;
      pick_of(w, pick).loaded_ps = now();
      const bool waits = w.sleeps_for == SleepsFor::weights && w.awaited == pick;
      if (w.num_streams > 0) start_stream(w);
      if (waits) wake_for_weights(w);
    }
    if (channel_ps_ != never) __builtin_prefetch(&workers_[channels_[first_channel_].first_worker()], 1);
  }

  //! If nothing else is due, what the wake-up would lead to may happen at once.
  void wake_for_weights(Worker& w) {
    if (ended_.size() > 1 || !clock_.is_idle_now() || channel_ps_ == now()) {
      wake(w, SleepsFor::weights);
    } else {
      resume(w);
    }
  }

  //! Asks for a pick's weights. A CU streams for one task at a time, in the order in which it asks.
  void stream(Worker& w, u32 slot) {
    Pick& pick = pick_of(w, slot);
    if (pick.streaming) return;  // its worker may have seen the plan before the others
    pick.streaming = true;
    const u32 last = w.first_stream + w.num_streams;
    w.streams[last < max_picks ? last : last - max_picks] = static_cast<std::uint8_t>(slot);
    if (++w.num_streams == 1) start_stream(w);
  }

  double stream_bytes(const Worker& w, const Pick& pick) const {
    const TaskClass& c = w.layer->graph.of(pick.row);
    return p_.jitters ? c.cost.stream_bytes * factor(pick, c) : c.cost.stream_bytes;
  }

  Cost cost(const Worker& w, const Pick& pick, const TaskClass& c) const {
    if (!p_.jitters) return c.cost;
    return task_cost(c.before_jitter, p_.speeds[w.pe], factor(pick, c), pick.stalls ? p_.stall_ps : 0);
  }

  double factor(const Pick& pick, const TaskClass& c) const {
    return jitter_factor(c.before_jitter, p_.quantiles[pick.quantile]);
  }

  i64 far_ps(u32 pe) { return p_.far_ps[channel(pe).num_streams()]; }
  i64 near_ps(u32 pe) { return p_.near_ps[channel(pe).num_streams()]; }

  // --- events

  bool sees(const Worker& w, const Layer& l, u32 event) const {
    return l.events[event].is_seen(w.number, w.domain, now());
  }

  void signal(Layer& l, u32 event, u32 maker, std::int32_t domain, i64 far, i64 near) {
    EventState& e = l.events[event];
    if (!e.add(maker, domain, now(), far, near)) return;
    const u64 where = u64{l.number} << 32 | event;
    if (e.near_ps < e.far_ps) clock_.at(e.near_ps, item(What::land, static_cast<u32>(e.domain) + 1, where));
    clock_.at(e.far_ps, item(What::land, 0, where));
  }

  void call_when_landed(Layer& l, u32 event, Waiter waiter) {
    waiter.next = none;
    u32 node = free_waiter_;
    if (node == none) {
      node = static_cast<u32>(waiters_.size());
      waiters_.push_back(waiter);
    } else {
      free_waiter_ = waiters_[node].next;
      waiters_[node] = waiter;
    }
    EventState& e = l.events[event];
    if (e.first_waiter == none) {
      e.first_waiter = node;
    } else {
      waiters_[e.last_waiter].next = node;
    }
    e.last_waiter = node;
  }

  //! domain_plus_1: 0: everybody sees the event now.
  void land(u32 number, u32 event, u32 domain_plus_1) {
    if (!layers_[number]) return;
    EventState& e = layers_[number]->events[event];
    u32 node = e.first_waiter;
    e.first_waiter = e.last_waiter = none;
    landed_.clear();
    while (node != none) {
      Waiter& waiter = waiters_[node];
      const u32 next = waiter.next;
      if (domain_plus_1 == 0 || waiter.domain == static_cast<std::int32_t>(domain_plus_1) - 1) {
        landed_.push_back(waiter);
        waiter.next = free_waiter_;
        free_waiter_ = node;
      } else {
        waiter.next = none;
        if (e.first_waiter == none) {
          e.first_waiter = node;
        } else {
          waiters_[e.last_waiter].next = node;
        }
        e.last_waiter = node;
      }
      node = next;
    }
    for (std::size_t i = 0; i < landed_.size(); ++i) {
      const Waiter waiter = landed_[i];
      switch (waiter.call) {
        case Waiter::Call::wake:
          wake(workers_[waiter.who], SleepsFor::inputs);
          break;
        case Waiter::Call::stream: {
          Worker& w = workers_[waiter.who];
          if (pick_of(w, waiter.pick).serial == waiter.serial) stream(w, waiter.pick);
          break;
        }
        case Waiter::Call::ring:
          layers_[number]->stages[waiter.who].push->watching = false;
          offer(number, waiter.who);
          break;
      }
    }
  }

  void put(Layer& l, u32 source, const SignalTo& to) {
    if (!links_.has_ports()) {
      const i64 seen_ps = links_.send(now(), source, to.pe, to.bytes);
      signal(l, to.event, none, -1, seen_ps, seen_ps);
      return;
    }
    Message message{l.number, to.event, to.pe, 0, 0, 0};
    links_.leave(now(), source, to.bytes, message);
    u32 slot;
    if (free_messages_.empty()) {
      slot = static_cast<u32>(messages_.size());
      messages_.push_back(message);
    } else {
      slot = free_messages_.back();
      free_messages_.pop_back();
      messages_[slot] = message;
    }
    clock_.at(message.head_ps, item(What::ingress, slot));
  }

  void ingress(u32 slot) {
    const Message message = messages_[slot];
    free_messages_.push_back(slot);
    const i64 seen_ps = links_.enter(message);
    if (layers_[message.layer]) signal(*layers_[message.layer], message.event, none, -1, seen_ps, seen_ps);
  }

  // --- waiting

  void sleep(Worker& w, SleepsFor what, bool with_core, Step then) {
    if (!with_core) give_core();
    w.sleeps_for = what;
    w.triggered = false;
    w.step = with_core ? then : Step::get_core;
    w.then = then;
  }

  void wake(Worker& w, SleepsFor what) {
    if (w.sleeps_for != what || w.triggered) return;
    w.triggered = true;
    clock_.at_once(item(What::resume, w.number));
  }

  void give_core() {
    if (p_.num_cores == 0) return;
    if (core_queue_.empty()) {
      ++free_cores_;
    } else {
      pass_core();
    }
  }

  void pass_core() {
    const u32 number = core_queue_.front();
    core_queue_.pop_front();
    clock_.at_once(item(What::resume, number));
  }

  //! Returns whether the worker goes on at once.
  bool acquire_core(Worker& w, Step then) {
    w.then = then;
    if (p_.num_cores == 0) {
      w.step = then;
      return true;
    }
    w.step = Step::has_core;
    core_queue_.push_back(w.number);
    if (free_cores_ > 0) {
      --free_cores_;
      pass_core();
    }
    return false;
  }

  // --- picks

  Pick& pick_of(const Worker& w, u32 slot) { return picks_[w.number * picks_a_worker_ + slot]; }
  const Pick& pick_of(const Worker& w, u32 slot) const { return picks_[w.number * picks_a_worker_ + slot]; }

  std::uint8_t hold(Worker& w, u32 row, i64 asked_ps) {
    Layer& l = *w.layer;
    const LayerGraph& g = l.graph;
    const Stage& stage = l.stages[w.pe];
    const auto slot = static_cast<std::uint8_t>(__builtin_ctz(~w.used_picks));
    w.used_picks |= 1u << slot;
    Pick& pick = pick_of(w, slot);
    const TaskClass& c = g.of(row);
    pick.row = row;
    ++pick.serial;
    pick.streaming = false;
    pick.loaded_ps = -1;
    pick.asked_ps = asked_ps;
    pick.ticket_ps = now();
    pick.next_wait = c.wait_begin;
    pick.before = none;
    if (p_.jitters) {
      const u64 bits = task_bits(key_, w.layer->number, w.pe, g.id_of(w.pe, row));
      pick.quantile = quantile_of(bits);
      pick.stalls = stalls(bits, p_.stall_threshold);
    }
    const bool unplanned = is_planned_kind(c.kind) && !sees(w, l, stage.planned);
    if (unplanned) {
      pick.before = stage.planned;
    } else if (is_pipelined(w.layer->number) && is_first_kind(c.kind)) {
      pick.before = stage.entry;
    }
    if (p_.prefetch && c.cost.stream_bytes > 0) {
      if (unplanned) {
        call_when_landed(l, stage.planned,
                         Waiter{Waiter::Call::stream, w.number, slot, pick.serial, w.domain, none});
      } else {
        stream(w, slot);
      }
    }
    return slot;
  }

  bool is_ready(const Worker& w, Layer& l, Pick& pick) const {
    if (pick.before != none) {
      if (!sees(w, l, pick.before)) return false;
      pick.before = none;
    }
    const TaskClass& c = l.graph.of(pick.row);
    for (; pick.next_wait < c.wait_end; ++pick.next_wait) {
      if (!sees(w, l, l.graph.waits[pick.next_wait])) return false;
    }
    return true;
  }

  //! First event that a task or a later one of its chain waits for, or none.
  u32 first_unseen_in_chain(const Worker& w, const Layer& l, u32 row, u32 end) const {
    const LayerGraph& g = l.graph;
    for (; row < end; ++row) {
      const TaskClass& c = g.of(row);
      for (u32 i = c.wait_begin; i < c.wait_end; ++i) {
        if (!sees(w, l, g.waits[i])) return g.waits[i];
      }
    }
    return none;
  }

  u32 oldest_ready(Worker& w, Layer& l) {
    for (u32 i = 0; i < w.num_held; ++i) {
      Pick& pick = pick_of(w, w.held[i]);
      if (!is_ready(w, l, pick)) continue;
      const u32 chain = l.graph.chain_of(pick.row);
      if (w.num_held == 1 || chain <= 1 ||
          first_unseen_in_chain(w, l, pick.row + 1, pick.row + chain) == none)
        return i;
    }
    return none;
  }

  bool may_take(const Worker& w, const Layer& l) const {
    if (w.num_held == 0) return true;
    const u32 kind = l.graph.of(pick_of(w, w.held[0]).row).kind;
    // a down that cannot be decoded yet waits for the plan, and so for other PEs
    const bool waits_here = waits_for_own_pe(static_cast<TaskKind>(kind)) &&
                            (!is_planned_kind(kind) || sees(w, l, l.stages[w.pe].planned));
    const u32 look_ahead = config_.queue == QueueKind::push ? 0 : config_.look_ahead;
    return waits_here && w.num_held < 1 + look_ahead;
  }

  void listen(Worker& w, Layer& l, const std::uint8_t* picks, u32 count) {
    for (u32 i = 0; i < count; ++i) {
      const Pick& pick = pick_of(w, picks[i]);
      u32 event = pick.before;
      if (event == none) {
        const TaskClass& c = l.graph.of(pick.row);
        event =
            pick.next_wait < c.wait_end
                ? l.graph.waits[pick.next_wait]
                : first_unseen_in_chain(w, l, pick.row, pick.row + std::max(1u, l.graph.chain_of(pick.row)));
      }
      listen_to(w, l, event);
    }
  }
  void listen_to(Worker& w, Layer& l, u32 event) {
    call_when_landed(l, event, Waiter{Waiter::Call::wake, w.number, 0, 0, w.domain, none});
  }

  void remove_held(Worker& w, u32 index) {
    for (u32 i = index; i + 1 < w.num_held; ++i) w.held[i] = w.held[i + 1];
    --w.num_held;
  }

  // --- queues

  void ask(Worker& w) {
    w.asking = true;
    w.asked_ps = now();
    look_up(w);
  }

  void look_up(Worker& w) {
    Layer& l = *w.layer;
    Stage& stage = l.stages[w.pe];
    u32& turn = stage.turn[w.index];
    switch (config_.queue) {
      case QueueKind::stride: {
        const u64 rank = w.index + u64{p_.num_workers} * turn++;
        got(w, rank < stage.num_picks ? l.graph.picks.by_rank[w.pe][rank] : none);
        break;
      }
      case QueueKind::replay: {
        const auto& list = l.graph.picks.by_worker[w.pe][w.index];
        got(w, turn < list.size() ? list[turn] : none);
        ++turn;
        break;
      }
      case QueueKind::domain:
        if (turn == 0) {
          take_ticket(w, static_cast<u32>(w.domain), near_ticket_);
        } else if (p_.num_domains == 1) {
          got(w, none);
        } else {
          clock_.at(now() + shared_ticket_[0] + shared_ticket_[1], item(What::look, w.number));
        }
        break;
      case QueueKind::ticket:
      case QueueKind::push:
        take_ticket(w, 0, shared_ticket_);
        break;
    }
  }

  void take_ticket(Worker& w, u32 head, const i64* cost) {
    u32 ticket;
    const i64 at = w.layer->stages[w.pe].heads[head].add(now(), cost[0], cost[1], 1, ticket);
    clock_.at(at, item(What::ticket, w.number, u64{head} << 32 | ticket));
  }

  //! The nearest other domain with picks left.
  void look_round(Worker& w) {
    const Stage& stage = w.layer->stages[w.pe];
    for (u32 step = 1; step < p_.num_domains; ++step) {
      const u32 domain = (static_cast<u32>(w.domain) + step) % p_.num_domains;
      if (domain + u64{p_.num_domains} * stage.heads[domain].value < stage.num_picks) {
        take_ticket(w, domain, shared_ticket_);
        return;
      }
    }
    got(w, none);
  }

  void ticketed(Worker& w, u32 head, u32 ticket) {
    Layer& l = *w.layer;
    Stage& stage = l.stages[w.pe];
    const bool is_domain = config_.queue == QueueKind::domain;
    const u64 rank = is_domain ? head + u64{p_.num_domains} * ticket : ticket;
    if (rank < stage.num_picks) {
      if (config_.queue == QueueKind::push) {
        settle(w, ticket);
      } else {
        got(w, l.graph.picks.by_rank[w.pe][rank]);
      }
    } else if (is_domain) {
      stage.turn[w.index] = 1;
      look_up(w);
    } else {
      got(w, none);
    }
  }

  void got(Worker& w, u32 row) {
    w.asking = false;
    if (row == none) {
      w.more = false;
    } else {
      w.held[w.num_held] = hold(w, row, w.asked_ps);
      ++w.num_held;
    }
    wake(w, SleepsFor::pick);
  }

  bool runs_ahead() const { return config_.queue != QueueKind::push; }

  void fetch_ahead(Worker& w) {
    if (w.more && !w.asking && w.num_held == 0 && runs_ahead()) ask(w);
  }

  // --- the push queue

  void make_push(u32 number, u32 pe) {
    Layer& l = *layers_[number];
    const LayerGraph& g = l.graph;
    auto push = std::make_unique<PushState>();
    const std::vector<u32>& order = g.picks.by_rank[pe];
    push->slots.resize(order.size());
    push->appending.resize(p_.num_workers);
    push->groups.emplace_back();
    std::vector<u32> combines, on_completion;
    for (u32 row : order) {
      const auto kind = static_cast<TaskKind>(g.of(row).kind);
      if (kind == TaskKind::up || kind == TaskKind::expert || (g.by_rows && kind == TaskKind::down)) {
        push->groups[0].push_back(row);
      } else if (kind == TaskKind::combine) {
        combines.push_back(row);
      } else {
        on_completion.push_back(row);
      }
    }
    std::sort(combines.begin(), combines.end());
    std::sort(on_completion.begin(), on_completion.end());
    for (u32 row : combines) push->groups.push_back({row});
    push->missing.assign(g.first[pe + 1] - g.first[pe], 0);
    push->signals.assign(l.events.size(), 0);
    push->unlocks.resize(l.events.size());
    for (u32 row : on_completion) {
      const TaskClass& c = g.of(row);
      u32& missing = push->missing[row - g.first[pe]];
      for (u32 i = c.wait_begin; i < c.wait_end; ++i) {
        if (l.events[g.waits[i]].target == 0) continue;
        ++missing;
        push->unlocks[g.waits[i]].push_back(row);
      }
      if (missing == 0) push->first_ready.push_back(row);
    }
    l.stages[pe].push = std::move(push);
  }

  //! Hands out a slot that is filled; else appends the next group, if it is ready, or waits.
  void settle(Worker& w, u32 slot) {
    Layer& l = *w.layer;
    PushState& push = *l.stages[w.pe].push;
    PushState::Slot& s = push.slots[slot];
    if (s.row == none) {
      if (!push.appending_group && group_is_ready(w.layer->number, w.pe, &w)) {
        push.appending_group = true;
        w.waits_for_slot = slot;
        if (push.groups[push.next_group].empty()) {
          push.appending_group = false;
          ++push.next_group;
          settle(w, slot);
        } else {
          push.appending[w.index] = push.groups[push.next_group];
          add_to_tail(w, true);
        }
        return;
      }
      watch(w.layer->number, w.pe);
      s.waiter = w.number;
      s.serial = ++push.serial;
      push.waiting.emplace_back(slot, s.serial);
      w.waits_for_slot = slot;
      return;
    }
    offer(w.layer->number, w.pe);  // this worker may have been woken for a group, and its own slot came first
    if (s.writer != w.number && s.seen_ps > now()) {
      clock_.at(s.seen_ps, item(What::give, w.number, s.row));
    } else {
      got(w, s.row);
    }
  }

  void add_to_tail(Worker& w, bool is_group) {
    PushState& push = *w.layer->stages[w.pe].push;
    u32 first;
    const u32 count = static_cast<u32>(push.appending[w.index].size());
    const i64 at = push.tail.add(now(), shared_ticket_[0], shared_ticket_[1], count, first);
    clock_.at(at, item(What::appended, w.number, u64{is_group} << 32 | first));
  }

  void appended(Worker& w, u32 first, bool is_group) {
    PushState& push = *w.layer->stages[w.pe].push;
    const i64 seen_ps = now() + far_ps(w.pe);
    u32 slot = first;
    for (u32 row : push.appending[w.index]) {
      PushState::Slot& s = push.slots[slot];
      s.row = row;
      s.seen_ps = seen_ps;
      s.writer = w.number;
      wake_slot(push, slot);
      ++slot;
    }
    push.appending[w.index].clear();
    if (is_group) {
      push.appending_group = false;
      ++push.next_group;
      settle(w, w.waits_for_slot);
    } else {
      advance(w);
    }
  }

  void wake_slot(PushState& push, u32 slot) {
    PushState::Slot& s = push.slots[slot];
    if (s.waiter == none) return;
    clock_.at_once(item(What::settle, s.waiter, slot));
    s.waiter = none;
  }

  bool group_is_ready(u32 number, u32 pe, const Worker* w) const {
    const PushState& push = *layers_[number]->stages[pe].push;
    return push.next_group < push.groups.size() && unseen_input(number, pe, w) == none;
  }

  //! First input of the next group that the worker, or with nullptr somebody, does not see; or none.
  u32 unseen_input(u32 number, u32 pe, const Worker* w) const {
    const Layer& l = *layers_[number];
    const Stage& stage = l.stages[pe];
    auto is_unseen = [&](u32 event) {
      return w != nullptr ? !sees(*w, l, event) : !l.events[event].is_seen_by_all(now());
    };
    // a chain waits for each of its other inputs itself
    if (stage.push->next_group == 0) return is_unseen(stage.planned) ? stage.planned : none;
    const TaskClass& c = l.graph.of(stage.push->groups[stage.push->next_group][0]);
    for (u32 i = c.wait_begin; i < c.wait_end; ++i) {
      if (is_unseen(l.graph.waits[i])) return l.graph.waits[i];
    }
    return none;
  }

  void watch(u32 number, u32 pe) {
    Layer& l = *layers_[number];
    PushState& push = *l.stages[pe].push;
    if (push.watching || push.appending_group || push.next_group >= push.groups.size()) return;
    const u32 event = unseen_input(number, pe, nullptr);
    if (event == none) return;
    call_when_landed(l, event, Waiter{Waiter::Call::ring, pe, 0, 0, -1, none});
    push.watching = true;
  }

  //! Wakes the worker that has waited longest if the next group is ready; else hangs the bell again.
  void offer(u32 number, u32 pe) {
    PushState& push = *layers_[number]->stages[pe].push;
    while (!push.waiting.empty()) {
      const auto [slot, serial] = push.waiting.front();
      if (push.slots[slot].waiter != none && push.slots[slot].serial == serial) break;
      push.waiting.pop_front();
    }
    if (push.waiting.empty() || push.appending_group) return;
    if (group_is_ready(number, pe, nullptr)) {
      wake_slot(push, push.waiting.front().first);
    } else {
      watch(number, pe);
    }
  }

  //! Has the picks appended that signals of a task completed. Returns whether the worker has to wait for
  //! that.
  bool completed(Worker& w, const Layer& l, const TaskClass& c) {
    PushState& push = *l.stages[w.pe].push;
    std::vector<u32>& ready = push.appending[w.index];
    for (u32 i = c.signal_begin; i < c.signal_end; ++i) {
      const SignalTo& to = l.graph.signals[i];
      if (to.pe != w.pe || ++push.signals[to.event] != l.events[to.event].target) continue;
      for (u32 row : push.unlocks[to.event]) {
        if (--push.missing[row - l.graph.first[w.pe]] == 0) ready.push_back(row);
      }
    }
    if (ready.empty()) return false;
    add_to_tail(w, false);
    return true;
  }

  // --- the worker

  void handle(const Item& next) {
    const u32 who = next.who;
    switch (static_cast<What>(next.kind)) {
      case What::resume:
        resume(workers_[who]);
        break;
      case What::ticket:
        ticketed(workers_[who], static_cast<u32>(next.what >> 32), static_cast<u32>(next.what));
        break;
      case What::look:
        look_round(workers_[who]);
        break;
      case What::appended:
        appended(workers_[who], static_cast<u32>(next.what), (next.what >> 32) != 0);
        break;
      case What::settle:
        settle(workers_[who], static_cast<u32>(next.what));
        break;
      case What::give:
        got(workers_[who], static_cast<u32>(next.what));
        break;
      case What::land:
        land(static_cast<u32>(next.what >> 32), static_cast<u32>(next.what), who);
        break;
      case What::ingress:
        ingress(who);
        break;
      case What::launch:
        for (u32 number : layers_[next.what]->stages[who].launched) {
          Worker& w = workers_[number];
          start_after(w, config_.gap_ps + p_.start_ps[w.index]);
        }
        break;
    }
  }

  void resume(Worker& w) {
    w.sleeps_for = SleepsFor::nothing;
    w.waits_for_slot = none;
    advance(w);
  }

  void start_after(Worker& w, i64 delay_ps) {
    w.step = Step::start;
    if (delay_ps > 0) {
      clock_.at(now() + delay_ps, item(What::resume, w.number));
    } else {
      advance(w);
    }
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
          if (p_.gap_ps > 0) {
            w.step = Step::yield_core;
            clock_.at(now() + p_.gap_ps, item(What::resume, w.number));
            return;
          }
          [[fallthrough]];
        case Step::yield_core:
          if (p_.num_cores > 0 && !core_queue_.empty() && now() - w.core_since_ps >= p_.slice_ps) {
            give_core();
            if (!acquire_core(w, Step::next_in_chain)) return;
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
          if (!acquire_core(w, Step::launch_queue)) return;
          continue;
        case Step::launch_queue:
          w.step = Step::loop;
          if (!launch_queue(w)) return;
          continue;
        case Step::get_core:
          if (!acquire_core(w, w.then)) return;
          continue;
        case Step::has_core:
          w.core_since_ps = now();
          w.step = w.then;
          continue;
        case Step::wait_in_chain: {
          Layer& l = *w.layer;
          if (is_ready(w, l, pick_of(w, w.current))) {
            remove_held(w, 0);
            w.step = Step::execute;
            continue;
          }
          listen(w, l, &w.current, 1);
          sleep(w, SleepsFor::inputs, false, Step::wait_in_chain);
          return;
        }
        case Step::leave:
          if (!leave(w)) return;
          continue;
        case Step::done:
          return;
      }
    }
  }

  bool enter(Worker& w) {
    w.more = true;
    w.step = w.layer->number == 0 ? Step::start : Step::launch_queue;
    if (w.layer->number > 0 || p_.start_ps[w.index] == 0) return true;
    clock_.at(p_.start_ps[w.index], item(What::resume, w.number));
    return false;
  }

  bool launch_queue(Worker& w) {
    if (w.index != 0 || config_.queue != QueueKind::push) return true;
    PushState& push = *w.layer->stages[w.pe].push;
    if (push.first_ready.empty()) return true;
    push.appending[w.index] = push.first_ready;
    add_to_tail(w, false);
    return false;
  }

  //! Runs the oldest pick that is ready; without one takes another, if allowed; else waits for an input.
  //! Returns whether there is one to run now.
  bool choose(Worker& w) {
    Layer& l = *w.layer;
    for (;;) {
      const u32 ready = w.num_held > 0 ? oldest_ready(w, l) : none;
      if (ready != none) {
        w.current = w.held[ready];
        remove_held(w, ready);
        const u32 row = pick_of(w, w.current).row;
        w.chain_end = row + l.graph.chain_of(row);
        return true;
      }
      if (w.asking) {
        sleep(w, SleepsFor::pick, runs_ahead(), Step::loop);
        return false;
      }
      if (w.more && may_take(w, l)) {
        ask(w);
        continue;
      }
      if (w.num_held > 0) {
        listen(w, l, w.held, w.num_held);
        sleep(w, SleepsFor::inputs, false, Step::loop);
      } else {
        w.step = Step::leave;
      }
      return false;
    }
  }

  bool execute(Worker& w) {
    Layer& l = *w.layer;
    Pick& pick = pick_of(w, w.current);
    const TaskClass& c = l.graph.of(pick.row);
    w.start_ps = now();
    w.ready_ps = 0;
    for (u32 i = c.wait_begin; i < c.wait_end; ++i)
      w.ready_ps = std::max(w.ready_ps, l.events[l.graph.waits[i]].seen_ps(w.number, w.domain));
    if (is_pipelined(w.layer->number) && is_first_kind(c.kind))
      w.ready_ps = std::max(w.ready_ps, l.events[l.stages[w.pe].entry].seen_ps(w.number, w.domain));
    if (pick.loaded_ps < 0 && c.cost.stream_bytes > 0) {
      stream(w, w.current);
      w.awaited = w.current;
      sleep(w, SleepsFor::weights, true, Step::loaded);
      return false;
    }
    return true;
  }

  bool loaded(Worker& w) {
    const Pick& pick = pick_of(w, w.current);
    if (p_.prefetch) {
      if (pick.row + 1 < w.chain_end) {
        w.following = hold(w, pick.row + 1, now());
      } else {
        fetch_ahead(w);
      }
    }
    const TaskClass& c = w.layer->graph.of(pick.row);
    const Cost costs = cost(w, pick, c);
    w.done_ps = std::max(now(), w.start_ps + costs.compute_ps);
    const i64 end_ps = w.done_ps + costs.overhead_ps + c.before_jitter.send_ps;
    if (end_ps == now()) return true;
    w.step = Step::end;
    clock_.at(end_ps, item(What::resume, w.number));
    return false;
  }

  bool end_task(Worker& w) {
    Layer& l = *w.layer;
    const Pick& pick = pick_of(w, w.current);
    const TaskClass& c = l.graph.of(pick.row);
    record(w, l, pick, c);
    const i64 far = now() + far_ps(w.pe), near = now() + near_ps(w.pe);
    for (u32 i = c.signal_begin; i < c.signal_end; ++i) {
      const SignalTo& to = l.graph.signals[i];
      if (to.pe == w.pe) {
        signal(l, to.event, w.number, w.domain, far, near);
      } else {
        put(l, w.pe, to);
      }
    }
    if (c.signal_begin == c.signal_end && l.number + 1 < config_.num_layers && is_pipelined(l.number + 1)) {
      // the output is part of the next layer's input
      Layer& next = layer(l.number + 1);
      signal(next, next.stages[w.pe].entry, w.number, w.domain, far, near);
    }
    if (config_.queue != QueueKind::push || !completed(w, l, c)) return true;
    w.step = Step::bookkeep;
    return false;
  }

  void record(Worker& w, Layer& l, const Pick& pick, const TaskClass& c) {
    const i64 end_ps = now(), since_ps = w.last_end_ps;
    const i64 loaded_ps = pick.loaded_ps < 0 ? w.start_ps : pick.loaded_ps;
    TimeShares& time = result_.time;
    time.ticket += std::max(i64{0}, pick.ticket_ps - std::max(pick.asked_ps, since_ps));
    time.inputs += w.start_ps - std::max(pick.ticket_ps, since_ps);
    time.stream += std::max(i64{0}, loaded_ps - w.start_ps);
    time.compute += w.done_ps - std::max(w.start_ps, loaded_ps);
    const i64 send_ps = std::min(end_ps - w.done_ps, c.before_jitter.send_ps);
    time.send += send_ps;
    time.overhead += end_ps - w.done_ps - send_ps;
    w.last_end_ps = end_ps;
    l.end_ps = std::max(l.end_ps, end_ps);
    if (!config_.keep_records) {
      ++l.tasks_done;
    } else {
      l.tasks_done += l.has_run[pick.row] == 0 ? 1 : 0;
      l.has_run[pick.row] = 1;
      l.records[pick.row] = Record{w.index,    w.ready_ps, pick.asked_ps, pick.ticket_ps,
                                   w.start_ps, loaded_ps,  w.done_ps,     end_ps};
    }
    if (++total_done_ % progress_step == 0 && config_.progress) config_.progress(total_done_);
  }

  //! Returns whether the chain is at its end.
  bool next_in_chain(Worker& w) {
    const u32 row = pick_of(w, w.current).row;
    w.used_picks &= ~(1u << w.current);
    if (row + 1 >= w.chain_end) {
      w.current = no_pick;
      return true;
    }
    w.current = w.following != no_pick ? w.following : hold(w, row + 1, now());
    w.following = no_pick;
    for (u32 i = w.num_held; i > 0; --i) w.held[i] = w.held[i - 1];
    w.held[0] = w.current;
    ++w.num_held;
    w.step = Step::wait_in_chain;
    return false;
  }

  //! On to the next layer, or the end. Nobody knows before the plan that there is nothing left to do.
  bool leave(Worker& w) {
    Layer& l = *w.layer;
    const u32 next = l.number + 1;
    if (next == config_.num_layers) {
      give_core();
      w.step = Step::done;
      left(l.number);
      return false;
    }
    const bool is_launched = is_launch(next);
    if (is_launched) {
      give_core();
    } else if (!sees(w, l, l.stages[w.pe].planned)) {
      listen_to(w, l, l.stages[w.pe].planned);
      sleep(w, SleepsFor::inputs, false, Step::leave);
      return false;
    }
    w.layer = &layer(next);
    w.more = true;
    w.step = Step::enter;
    left(l.number);
    if (!is_launched) return true;
    Stage& stage = w.layer->stages[w.pe];
    stage.launched.push_back(w.number);
    if (stage.launched.size() == p_.num_workers) clock_.at_once(item(What::launch, w.pe, next));
    return false;
  }

  // --- the end

  Result report() {
    for (u32 number = 0; number < layers_.size(); ++number) {
      if (layers_[number]) close_layer(number);
    }
    result_.end_ps = now();
    if (result_.tasks_done < result_.num_tasks) report_stuck();
    return std::move(result_);
  }

  void report_stuck() {
    for (const Worker& w : workers_) {
      const bool waits_for_slot = w.waits_for_slot != none;
      if (w.step == Step::done || (!waits_for_slot && w.sleeps_for != SleepsFor::inputs)) continue;
      ++result_.num_stuck;
      if (result_.stuck.size() == named_stuck) continue;
      Stuck stuck{w.pe, w.index, w.layer->number, w.waits_for_slot, {}};
      const Layer& l = *w.layer;
      for (u32 i = 0; i < w.num_held && !waits_for_slot; ++i) {
        const Pick& pick = pick_of(w, w.held[i]);
        const TaskClass& c = l.graph.of(pick.row);
        auto name = [&](u32 event) {
          const EventState& e = l.events[event];
          if (!sees(w, l, event)) stuck.inputs.push_back(Stuck::Input{pick.row, event, e.count, e.target});
        };
        if (pick.before != none) name(pick.before);
        for (u32 j = pick.next_wait; j < c.wait_end; ++j) name(l.graph.waits[j]);
      }
      result_.stuck.push_back(std::move(stuck));
    }
    for (u32 number = 0; number < layers_.size(); ++number) {
      if (!layers_[number]) continue;
      const auto& has_run = layers_[number]->has_run;
      for (u32 row = 0; row < has_run.size() && result_.not_taken.size() < named_stuck; ++row) {
        if (has_run[row] == 0) result_.not_taken.emplace_back(number, row);
      }
    }
  }

  const Parameters& p_;
  const RunConfig& config_;
  Clock clock_;
  Links links_;
  std::vector<std::unique_ptr<Layer>> layers_;
  std::vector<Channel> channels_;
  std::vector<i64> next_of_channel_;  // their next_ps(), side by side
  std::vector<Worker> workers_;
  std::vector<Pick> picks_;  // [worker][picks_a_worker_]
  u32 picks_a_worker_ = 0;
  bool shares_channel_ = false;
  i64 channel_ps_ = never;
  u32 first_channel_ = 0;
  u32 free_cores_ = 0;
  std::deque<u32> core_queue_;
  std::vector<Waiter> waiters_;
  u32 free_waiter_ = none;
  std::vector<Waiter> landed_;
  std::vector<u32> ended_;
  std::vector<Message> messages_;
  std::vector<u32> free_messages_;
  i64 near_ticket_[2], shared_ticket_[2];
  u64 key_ = 0, total_done_ = 0;
  Result result_;
};

}  // namespace

Result run(const Parameters& parameters, const RunConfig& config) { return Engine(parameters, config).run(); }

}  // namespace flashmoe::engine
