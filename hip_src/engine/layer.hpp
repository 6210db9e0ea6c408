// One layer as it runs, and which layers there are at the moment.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "engine.hpp"
#include "push_queue.hpp"

namespace flashmoe::engine {

//! One PE's share of one layer.
struct Stage {
  u32 num_picks = 0;
  u32 planned = 0, entry = 0;           // events; entry: what the layer before left is there
  std::vector<Counter> heads;           // of the queue: one, or one a domain
  std::vector<u32> turn;                // [worker] picks taken (static, replay)
  std::vector<std::uint8_t> has_first;  // [worker] has had the ticket that is given with the launch
  bool sends_words = false;             // results are their own signal
  std::vector<u32> launched;            // workers that have ended the layer before
  std::unique_ptr<PushQueue> push;
};

//! Some weights, which one task or several stream; flashmoe/sim/bandwidth.py.
struct Weights {
  double asked_bytes = -HUGE_VAL;  // what the memory had been asked for when they were asked for last
  bool is_on_its_way = false;
  u32 first_waiting = none, last_waiting = none;  // workers that follow the stream on its way
};

struct Layer {
  Layer(Environment& env, u32 its_number, LayerGraph its_graph)
      : graph(std::move(its_graph)), number(its_number), events(env.clock, env.waiters, its_number) {}

  LayerGraph graph;
  u32 number;
  bool is_pipelined = false;  // after the layer before, without a launch
  Events events;
  std::vector<Stage> stages;
  std::vector<Weights> weights;       // [row] of the first task that streams them; empty: no cache
  std::vector<Record> records;        // [row]; empty: not kept
  std::vector<std::uint8_t> has_run;  // [row], if records are kept: a replay may name a task twice
  u64 left = 0, tasks_done = 0;       // left: workers that have
  i64 end_ps = 0;

  void record(u32 row, const Record& task) {
    end_ps = std::max(end_ps, task.end_ps);
    if (records.empty()) {
      ++tasks_done;
    } else {
      tasks_done += has_run[row] == 0 ? 1 : 0;
      has_run[row] = 1;
      records[row] = task;
    }
  }
};

//! Layers are made as the first worker gets there and forgotten as the last one leaves: memory stays flat
//! however many there are.
class Layers {
 public:
  Layers(Environment& env, const RunConfig& config, Result& result)
      : env_(env), config_(config), result_(result), layers_(config.num_layers) {}

  u32 size() const { return static_cast<u32>(layers_.size()); }
  Layer& operator[](u32 number) {
    if (!layers_[number]) make(number);
    return *layers_[number];
  }
  //! nullptr: not there yet, or not any more.
  Layer* find(u32 number) { return layers_[number].get(); }

  bool is_pipelined(u32 number) const { return number > 0 && config_.pipelined; }

  //! One more worker has left a layer.
  void left(Layer& l) {
    if (++l.left < u64{env_.p.num_pes} * env_.p.num_workers || l.tasks_done < l.graph.num_tasks()) return;
    close(l);
    layers_[l.number].reset();
  }

  //! Adds what a layer did to the result.
  void close(Layer& l) {
    result_.tasks_done += l.tasks_done;
    result_.layer_end_ps.resize(std::max<std::size_t>(result_.layer_end_ps.size(), l.number + 1));
    result_.layer_end_ps[l.number] = l.end_ps;
    result_.makespan_ps = std::max(result_.makespan_ps, l.end_ps);
    if (config_.keep_records) {
      result_.records.resize(config_.num_layers);
      result_.records[l.number] = std::move(l.records);
    }
  }

 private:
  void make(u32 number) {
    auto made = std::make_unique<Layer>(env_, number, config_.make_layer(number));
    Layer& l = *made;
    const LayerGraph& g = l.graph;
    l.is_pipelined = is_pipelined(number);
    for (u32 target : g.event_target) l.events.add(target);
    i64 plan_ps = env_.p.plan_ps;
    for (u32 count : g.tokens) plan_ps += env_.p.plan_token_ps * count;
    for (u32 pe = 0; pe < g.num_pes; ++pe) {
      Stage stage;
      stage.planned = g.planned_event[pe];
      stage.sends_words = g.sends_words(pe, env_.p);
      const i64 sort_ps =
          config_.sorts_experts ? env_.p.sort_ps + env_.p.sort_expert_ps * g.num_active[pe] : 0;
      l.events.set_use(stage.planned, plan_ps + sort_ps);
      stage.entry = l.events.add(l.is_pipelined ? (*this)[number - 1].graph.outputs[pe] : 0);
      stage.heads.resize(config_.queue == QueueKind::domain ? env_.p.num_domains : 1);
      stage.turn.assign(env_.p.num_workers, 0);
      const bool gives_first = env_.p.first_given && config_.queue != QueueKind::push;
      stage.has_first.assign(env_.p.num_workers, gives_first ? 0 : 1);
      for (u32 worker = 0; gives_first && worker < env_.p.num_workers; ++worker)
        ++stage.heads[worker % stage.heads.size()].value;
      if (config_.queue != QueueKind::replay) stage.num_picks = static_cast<u32>(g.picks.by_rank[pe].size());
      l.stages.push_back(std::move(stage));
    }
    if (config_.queue == QueueKind::push) {
      for (u32 pe = 0; pe < g.num_pes; ++pe)
        l.stages[pe].push = std::make_unique<PushQueue>(env_, g, l.events, pe);
    }
    if (config_.keep_records) {
      l.records.resize(g.num_tasks());
      l.has_run.assign(g.num_tasks(), 0);
    }
    result_.num_tasks += g.num_tasks();
    if (env_.p.cache_bytes > 0) l.weights.resize(g.num_tasks());
    for (const TaskClass& c : g.classes) result_.link_bytes += c.count * c.link_bytes;
    layers_[number] = std::move(made);
  }

  Environment& env_;
  const RunConfig& config_;
  Result& result_;
  std::vector<std::unique_ptr<Layer>> layers_;
};

}  // namespace flashmoe::engine
