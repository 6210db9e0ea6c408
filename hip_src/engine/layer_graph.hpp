// One layer as the engine runs it: every task's class, and for each class its costs and edges.
//
// Tasks that differ only in which tile they are (and whose tiles have one size) cost the same, wait for the
// same events and signal the same, so a layer of 17,000 tasks has some 1,000 classes. A task is an index, its
// row: by PE, then by id.
#pragma once
#include <vector>

#include "costs.hpp"
#include "layer_plan.hpp"

namespace flashmoe::engine {

struct SignalTo {
  u32 event;
  u32 pe;
  u64 bytes;
};

struct TaskClass {
  ClassCost before_jitter;
  Cost cost;
  u32 kind;
  u32 num_tokens;
  u32 wait_begin, wait_end;      // in LayerGraph::waits
  u32 signal_begin, signal_end;  // in LayerGraph::signals
  u64 weight_bytes, link_bytes;  // of one task
  u64 count;                     // tasks
  u32 first_row;                 // one of them
  // rows back to the first task with a task's weights: blocks of tokens share those of a tile
  u32 weights_back;
  bool shares_weights;

  void set_weights(u32 back, bool are_shared) { weights_back = back, shares_weights = are_shared; }
};

//! Which picks there are: rows by rank, or for replay rows by worker.
struct Picks {
  std::vector<std::vector<u32>> by_rank;                 // [pe]
  std::vector<std::vector<std::vector<u32>>> by_worker;  // [pe][worker]
};

struct LayerGraph {
  u32 num_pes = 0;
  bool by_rows = false;
  std::vector<u32> first, first_id;  // [num_pes + 1] rows; [num_pes] ids
  std::vector<u32> class_of;         // [num_tasks]
  std::vector<u32> chain;            // [num_tasks], or empty: all are picks of one task
  std::vector<TaskClass> classes;
  std::vector<u32> waits;
  std::vector<SignalTo> signals;
  std::vector<u32> event_target;
  std::vector<u32> planned_event;  // [num_pes]
  std::vector<u32> outputs;        // [num_pes] tasks that signal nothing: they write what the layer leaves
  std::vector<u32> tokens;         // [num_pes] that are routed there
  std::vector<u32> num_active;     // [num_pes] experts with tokens
  std::vector<double> distinct_bytes;  // [num_pes] weights that are read at least once
  Picks picks;

  u32 num_tasks() const { return static_cast<u32>(class_of.size()); }
  const TaskClass& of(u32 row) const { return classes[class_of[row]]; }
  u32 chain_of(u32 row) const { return chain.empty() ? 1 : chain[row]; }
  u32 id_of(u32 pe, u32 row) const { return row - first[pe] + first_id[pe]; }

  //! Whether a PE's results are their own signal; known once its route tasks are there, which come first.
  bool sends_words(u32 pe, const Parameters& p) const {
    return p.word_tokens > 0 && tokens[pe] <= p.word_tokens;
  }

  u32 add_class(u32 pe, Amounts amounts, const std::vector<u32>& wait, const std::vector<SignalTo>& signal,
                const Parameters& p) {
    TaskClass c{};
    c.kind = static_cast<u32>(amounts.kind);
    c.num_tokens = amounts.num_tokens;
    c.wait_begin = static_cast<u32>(waits.size());
    waits.insert(waits.end(), wait.begin(), wait.end());
    c.wait_end = static_cast<u32>(waits.size());
    c.signal_begin = static_cast<u32>(signals.size());
    signals.insert(signals.end(), signal.begin(), signal.end());
    c.signal_end = static_cast<u32>(signals.size());
    amounts.remote_bytes = 0;
    for (const SignalTo& s : signal) amounts.remote_bytes += s.pe == pe ? 0 : s.bytes;
    c.before_jitter = class_cost(amounts, sends_words(pe, p), p);
    c.cost = task_cost(c.before_jitter, p.speeds[pe], 1.0, 0);
    c.weight_bytes = amounts.weight_bytes;
    c.link_bytes = amounts.remote_bytes;
    classes.push_back(c);
    return static_cast<u32>(classes.size() - 1);
  }

  //! The next `count` rows are of a class.
  void add_rows(u32 pe, u32 number, u32 count) {
    TaskClass& c = classes[number];
    if (c.count == 0) c.first_row = num_tasks();
    c.count += count;
    outputs[pe] += c.signal_begin == c.signal_end ? count : 0;
    if (c.kind == static_cast<u32>(TaskKind::route)) tokens[pe] += count * c.num_tokens;
    class_of.insert(class_of.end(), count, number);
  }
};

//! The layer of a plan: the shared task graph is asked once for each class.
class GraphBuilder {
 public:
  static LayerGraph build(LayerPlan& plan, const Parameters& p) {
    return std::move(GraphBuilder(plan, p).graph_);
  }

  //! Fills in the picks in a built-in order.
  static void rank(LayerGraph& graph, LayerPlan& plan, Order order) {
    for (const TaskGraph& tasks : plan.graphs()) {
      plan.rank_experts(tasks.pe, order);
      const PickOrder picks(tasks, order);
      const u32 shift = graph.first[tasks.pe] - graph.first_id[tasks.pe];  // wraps where ids are above rows
      // the tiles of an expert block follow each other, in every order: only their ends are looked up
      const u32 step = std::max(1u, std::min(tasks.up_per_block(), tasks.down_per_block()));
      std::vector<u32> rows(picks.size());
      for (u32 rank = 0; rank < rows.size();) {
        const u32 row = picks[rank] + shift;
        const u32 last = rank + step - 1;
        const u32 count = last < rows.size() && picks[last] + shift == row + step - 1 ? step : 1;
        for (u32 i = 0; i < count; ++i) rows[rank++] = row + i;
      }
      graph.picks.by_rank.push_back(std::move(rows));
    }
  }

 private:
  GraphBuilder(LayerPlan& plan, const Parameters& p) : plan_(plan), parameters_(p) {
    graph_.num_pes = plan.shape().num_pes;
    graph_.event_target = plan.event_target;
    graph_.planned_event = plan.planned_event;
    graph_.first.push_back(0);
    for (const TaskGraph& tasks : plan.graphs()) add_pe(tasks);
  }

  void add_pe(const TaskGraph& g) {
    graph_.by_rows = g.by_rows();
    graph_.first_id.push_back(g.first_task());
    graph_.outputs.push_back(0);
    graph_.tokens.push_back(0);
    graph_.num_active.push_back(g.plan.num_active());
    if (g.gate_inside) {
      for (u32 block = 0; block < g.num_route(); ++block)
        add_tiles(g, block * g.tiling.gate_tiles(g.shape), g.tiling.gate_tiles(g.shape));
    }
    for (u32 id = g.first_route(); id < g.first_up(); ++id) add_tiles(g, id, 1);
    for (u32 block = 0; block < g.plan.num_blocks(); ++block)
      add_tiles(g, g.first_up() + block * g.up_per_block(), g.up_per_block());
    if (g.by_rows()) {
      add_rows(g);
    } else if (!g.whole_experts()) {
      for (u32 block = 0; block < g.plan.num_blocks(); ++block)
        add_tiles(g, g.first_down() + block * g.down_per_block(), g.down_per_block());
    }
    for (u32 id = g.first_combine(); id < g.end_task(); ++id) add_tiles(g, id, 1);
    graph_.first.push_back(static_cast<u32>(graph_.class_of.size()));
    graph_.distinct_bytes.push_back(distinct_bytes(g));
  }

  //! `count` tasks in a row, of which only the last may be of another size.
  void add_tiles(const TaskGraph& g, u32 id, u32 count) {
    const u32 all = add_class(g, id);
    const bool last_differs = count > 1 && is_smaller(g, id + count - 1, all);
    graph_.add_rows(g.pe, all, count - (last_differs ? 1 : 0));
    if (last_differs) graph_.add_rows(g.pe, add_class(g, id + count - 1), 1);
  }

  //! down="rows": for each tile of the output, one task an active expert.
  void add_rows(const TaskGraph& g) {
    const u32 tiles = g.tiling.down_tiles(g.shape), active = g.plan.num_active();
    std::vector<u32> full, last;
    for (u32 place = 0; place < active; ++place) {
      const u32 last_id = g.first_down() + (tiles - 1) * active + place;
      full.push_back(add_class(g, g.first_down() + place));
      last.push_back(is_smaller(g, last_id, full.back()) ? add_class(g, last_id) : full.back());
    }
    graph_.chain.resize(graph_.class_of.size(), 1);
    for (u32 tile = 0; tile < tiles; ++tile) {
      for (u32 place = 0; place < active; ++place) {
        graph_.add_rows(g.pe, tile + 1 < tiles ? full[place] : last[place], 1);
        graph_.chain.push_back(g.chain(g.first_down() + place));
      }
    }
    graph_.chain.resize(graph_.class_of.size() + g.num_combine(), 1);
  }

  bool is_smaller(const TaskGraph& g, u32 id, u32 other) const {
    return work_of(g, g.decode(id)).weight_bytes < graph_.classes[other].weight_bytes;
  }

  u32 add_class(const TaskGraph& g, u32 id) {
    const Task task = g.decode(id);
    const Work work = work_of(g, task);
    wait_.clear();
    signal_.clear();
    g.for_each_wait(task, [&](Event event) {
      const u32 number = plan_.event(g.pe, event);
      for (u32 known : wait_) {
        if (known == number) return;
      }
      wait_.push_back(number);
    });
    g.for_each_signal(task, [&](u32 pe, Event event, u64 bytes) {
      signal_.push_back(SignalTo{plan_.event(pe, event), pe, bytes});
    });
    const u32 num_tokens =
        task.kind == TaskKind::dispatch ? g.rows_to(task.peer, task.first, task.num_tokens) : task.num_tokens;
    const u32 number = graph_.add_class(
        g.pe,
        Amounts{task.kind, num_tokens, work.matrix_rows, work.weight_bytes, work.io_bytes, work.flops, 0},
        wait_, signal_, parameters_);
    set_weights(g, task, graph_.classes[number]);
    return number;
  }

  //! Blocks of tokens share the weights of a tile.
  static void set_weights(const TaskGraph& g, const Task& task, TaskClass& c) {
    if (task.kind == TaskKind::gate)
      return c.set_weights(task.block * g.tiling.gate_tiles(g.shape), g.num_route() > 1);
    const bool is_down = task.kind == TaskKind::down;
    if (!is_finished_kind(c.kind) || (is_down && g.by_rows())) return;
    const u32 local = task.expert - g.pe * g.plan.num_local;
    const u32 before = task.block - g.plan.block_offset[local];
    c.set_weights(before * (is_down ? g.down_per_block() : g.up_per_block()),
                  g.plan.expert_blocks(local) > 1);
  }

  static double distinct_bytes(const TaskGraph& g) {
    const u64 model = g.shape.d_model, element = g.shape.element_bytes();
    const u64 router = g.gate_inside && g.num_tokens > 0 ? g.shape.num_experts * model * element : 0;
    return static_cast<double>(router + 3 * model * g.shape.d_ff * element * g.plan.num_active());
  }

  LayerPlan& plan_;
  const Parameters& parameters_;
  LayerGraph graph_;
  std::vector<u32> wait_;
  std::vector<SignalTo> signal_;
};

}  // namespace flashmoe::engine
