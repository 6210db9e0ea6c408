// Times that no schedule can beat, class by class; flashmoe/sim/bounds.py explains them, task by task.
#pragma once
#include <algorithm>
#include <array>
#include <vector>

#include "layer_graph.hpp"

namespace flashmoe::engine {

struct Bounds {
  double hbm_ps, workers_ps, longest_task_ps, critical_path_ps, links_ps;
  double busiest_link_ps;  // without the launch
};

//! Layers are added in their order. Jitter is left out.
class BoundsOf {
 public:
  BoundsOf(const Parameters& p, bool pipelined, i64 gap_ps)
      : p_(p),
        pipelined_(pipelined),
        gap_ps_(gap_ps),
        distinct_(p.num_pes),
        stream_ps_(p.num_pes),
        rest_ps_(p.num_pes),
        beside_ps_(p.num_pes),
        idle_ps_(p.num_pes),
        entry_ps_(p.num_pes),
        traffic_(u64{p.num_pes} * p.num_pes) {
    launch_ps_ = static_cast<double>(*std::min_element(p.start_ps.begin(), p.start_ps.end()));
  }

  void add(const LayerGraph& g) {
    if (num_layers_ == 0 || !pipelined_) {
      for (double& entry : entry_ps_)
        entry += launch_ps_ + (num_layers_ > 0 ? static_cast<double>(gap_ps_) : 0.0);
      launches_ps_ += launch_ps_ + (num_layers_ > 0 ? static_cast<double>(gap_ps_) : 0.0);
    }
    ++num_layers_;
    has_tasks_ = has_tasks_ || g.num_tasks() > 0;
    for (u32 pe = 0; pe < g.num_pes; ++pe) {
      // launches and gaps count on a PE while it has tasks
      if (g.first[pe] < g.first[pe + 1]) idle_ps_[pe] = launches_ps_;
      distinct_[pe] += g.distinct_bytes[pe] / (p_.hbm_bytes_per_ns * p_.speeds[pe]) * 1000.0;
    }
    for (const TaskClass& c : g.classes) add_class(g, c);
    add_chains(g);
    follow_dependences(g);
  }

  Bounds result() const {
    const bool is_host = p_.num_cores > 0;
    // between its launches a PE of a host leaves memory and cores to the others
    double least_idle = *std::min_element(idle_ps_.begin(), idle_ps_.end());
    if (p_.num_pes > 1) least_idle = std::min(least_idle, launch_ps_);
    double hbm = 0, all = 0, busiest_links = 0;
    for (u32 pe = 0; pe < p_.num_pes; ++pe) {
      hbm = std::max(hbm, distinct_[pe] + idle_ps_[pe]);
      all += distinct_[pe];
    }
    double workers = 0;
    for (const std::vector<double>* stage : {&stream_ps_, &rest_ps_, &beside_ps_}) {
      double total = 0;
      for (u32 pe = 0; pe < p_.num_pes; ++pe) {
        workers = std::max(workers, (*stage)[pe] / p_.num_workers + idle_ps_[pe]);
        total += (*stage)[pe];
      }
      if (is_host) workers = std::max(workers, total / p_.num_cores + least_idle);
    }
    for (u32 a = 0; a < p_.num_pes; ++a) {
      double out = 0, in = 0;
      for (u32 b = 0; b < p_.num_pes; ++b) {
        busiest_links = std::max(busiest_links, traffic_[a * p_.num_pes + b] / p_.link_bytes_per_ns);
        out += traffic_[a * p_.num_pes + b];
        in += traffic_[b * p_.num_pes + a];
      }
      if (p_.port_bytes_per_ns > 0)
        busiest_links = std::max(busiest_links, std::max(out, in) / p_.port_bytes_per_ns);
    }
    busiest_links *= 1000.0;
    return Bounds{
        is_host ? all + least_idle : hbm,
        workers,
        has_tasks_ ? longest_ps_ + launch_ps_ : 0.0,
        last_end_ps_,
        busiest_links > 0 ? busiest_links + launch_ps_ : 0.0,  // a link may go on while its PE is idle
        busiest_links};
  }

 private:
  i64 stream_ps(const TaskClass& c, u32 pe) const {
    return least_stream_ps(c.cost.stream_bytes, p_.speeds[pe], p_);
  }
  static i64 after_ps(const TaskClass& c) { return c.cost.overhead_ps + c.before_jitter.send_ps; }

  //! What ends beside the worker's next task.
  i64 beside_ps(const TaskClass& c) const {
    const bool is_beside = p_.finish_beside && c.kind >= static_cast<u32>(TaskKind::up) &&
                           c.kind != static_cast<u32>(TaskKind::combine);
    return is_beside ? after_ps(c) : 0;
  }

  //! What a worker does one task after the other: with prefetch it streams for one while it runs another.
  void add_class(const LayerGraph& g, const TaskClass& c) {
    const u32 pe = pe_of(g, c.first_row);
    const auto count = static_cast<double>(c.count);
    const auto stream = static_cast<double>(stream_ps(c, pe)), rest = static_cast<double>(rest_ps(c));
    const double least = least_ps(c, pe);
    if (p_.prefetch) {
      stream_ps_[pe] += count * stream;
      rest_ps_[pe] += count * rest;
    } else {
      rest_ps_[pe] += count * (least - static_cast<double>(beside_ps(c)));
    }
    beside_ps_[pe] += count * static_cast<double>(beside_ps(c));
    if (g.chain_of(c.first_row) > 0) longest_ps_ = std::max(longest_ps_, least);
    for (u32 s = c.signal_begin; s < c.signal_end; ++s) {
      const SignalTo& to = g.signals[s];
      if (to.pe != pe) traffic_[pe * p_.num_pes + to.pe] += count * static_cast<double>(to.bytes);
    }
  }

  //! A chain is one pick.
  void add_chains(const LayerGraph& g) {
    for (u32 row = 0; row < g.chain.size();) {
      const u32 chain = g.chain[row], pe = pe_of(g, row);
      double stream = 0, rest = 0, beside = 0;
      for (u32 i = row; i < row + chain; ++i) {
        stream += p_.prefetch ? static_cast<double>(stream_ps(g.of(i), pe)) : 0.0;
        beside += static_cast<double>(beside_ps(g.of(i)));
        rest += p_.prefetch ? static_cast<double>(rest_ps(g.of(i)))
                            : least_ps(g.of(i), pe) - static_cast<double>(beside_ps(g.of(i)));
      }
      longest_ps_ = std::max({longest_ps_, stream, rest, beside});
      row += chain;
    }
  }

  static u32 pe_of(const LayerGraph& g, u32 row) {
    return static_cast<u32>(std::upper_bound(g.first.begin(), g.first.end(), row) - g.first.begin()) - 1;
  }
  i64 rest_ps(const TaskClass& c) const { return c.cost.compute_ps + after_ps(c) - beside_ps(c); }
  double least_ps(const TaskClass& c, u32 pe) const {
    return static_cast<double>(std::max(stream_ps(c, pe), c.cost.compute_ps) + after_ps(c));
  }

  //! Earliest end of every class with unlimited workers. Signals inside a PE cost nothing: one worker may run
  //! both ends. Kinds in the order of the stages are in topological order, on all PEs.
  void follow_dependences(const LayerGraph& g) {
    event_ps_.assign(g.event_target.size(), 0.0);
    end_ps_.assign(g.classes.size(), 0.0);
    free_ps_.assign(g.classes.size(), 0.0);
    weights_ps_.assign(g.classes.size(), 0.0);
    std::vector<double> outputs_ps = entry_ps_, all_ps = entry_ps_;
    for (auto& numbers : by_kind_) numbers.clear();
    for (u32 number = 0; number < g.classes.size(); ++number)
      by_kind_[g.classes[number].kind].push_back(number);
    // in a chain, each task after the one before it
    auto& downs = by_kind_[static_cast<u32>(TaskKind::down)];
    if (g.by_rows) {
      std::sort(downs.begin(), downs.end(),
                [&](u32 a, u32 b) { return g.classes[a].first_row < g.classes[b].first_row; });
    }
    constexpr TaskKind stages[] = {TaskKind::gate,   TaskKind::route, TaskKind::dispatch, TaskKind::up,
                                   TaskKind::expert, TaskKind::down,  TaskKind::combine};
    for (TaskKind kind : stages) {
      for (u32 number : by_kind_[static_cast<u32>(kind)]) {
        const TaskClass& c = g.classes[number];
        const u32 pe = pe_of(g, c.first_row);
        end_class(g, pe, c.first_row, number, c);
        all_ps[pe] = std::max(all_ps[pe], end_ps_[number]);
        last_end_ps_ = std::max(last_end_ps_, end_ps_[number]);
        if (c.signal_begin == c.signal_end) outputs_ps[pe] = std::max(outputs_ps[pe], end_ps_[number]);
      }
    }
    entry_ps_ = pipelined_ ? outputs_ps : all_ps;
  }

  void end_class(const LayerGraph& g, u32 pe, u32 row, u32 number, const TaskClass& c) {
    const bool inside_chain = g.chain_of(row) == 0;
    const u32 before = inside_chain ? g.class_of[row - 1] : none;
    const bool is_planned = c.kind >= static_cast<u32>(TaskKind::up);
    double start = inside_chain ? free_ps_[before] : (is_planned ? 0.0 : entry_ps_[pe]);
    for (u32 i = c.wait_begin; i < c.wait_end; ++i) start = std::max(start, event_ps_[g.waits[i]]);
    // with prefetch the next task of a chain streams as soon as the one before has its weights
    double from = start;
    if (p_.prefetch) {
      from = std::max(inside_chain ? weights_ps_[before] : 0.0,
                      is_planned ? event_ps_[g.planned_event[pe]] : launch_ps_);
    }
    weights_ps_[number] = from + static_cast<double>(stream_ps(c, pe));
    end_ps_[number] = std::max(start + static_cast<double>(c.cost.compute_ps), weights_ps_[number]) +
                      static_cast<double>(after_ps(c));
    free_ps_[number] = end_ps_[number] - static_cast<double>(beside_ps(c));
    const double slowest = p_.port_bytes_per_ns > 0 ? std::min(p_.port_bytes_per_ns, p_.link_bytes_per_ns)
                                                    : p_.link_bytes_per_ns;
    for (u32 s = c.signal_begin; s < c.signal_end; ++s) {
      const SignalTo& to = g.signals[s];
      const double trip =
          to.pe == pe ? 0.0
                      : static_cast<double>(p_.put_ps) + static_cast<double>(to.bytes) / slowest * 1000.0;
      event_ps_[to.event] = std::max(event_ps_[to.event], end_ps_[number] + trip);
    }
  }

  const Parameters& p_;
  bool pipelined_;
  i64 gap_ps_;
  u32 num_layers_ = 0;
  bool has_tasks_ = false;
  double launch_ps_ = 0, launches_ps_ = 0, longest_ps_ = 0, last_end_ps_ = 0;
  std::vector<double> distinct_;  // [num_pes] least time for the weights [ps]
  std::vector<double> stream_ps_, rest_ps_, beside_ps_;
  std::vector<double> idle_ps_, entry_ps_;
  std::vector<double> traffic_;              // [source][destination] bytes
  std::array<std::vector<u32>, 7> by_kind_;  // classes
  std::vector<double> event_ps_, end_ps_, free_ps_, weights_ps_;
};

}  // namespace flashmoe::engine
