// The task graphs of all PEs of a layer, for one routing, as arrays.
#pragma once
#include <vector>

#include "flashmoe/layout.hpp"
#include "flashmoe/policy.hpp"
#include "flashmoe/work.hpp"

namespace flashmoe {

//! A task as Python sees it; TASK_DTYPE in flashmoe/tasks.py.
struct TaskRow {
  u16 pe;
  u16 kind;
  u32 task_id;
  std::int32_t expert, tile, block;  // -1: does not apply
  u32 num_tokens;                    // dispatch: rows that it sends
  std::int32_t peer;
  u32 chain;  // tasks that one pick takes; 0 inside a chain
  u64 weight_bytes, io_bytes, link_bytes, flops;
};

//! Compressed rows: edges of row i are [begin[i], begin[i + 1]).
struct Edges {
  std::vector<u64> begin{0};
  std::vector<u32> event;
  std::vector<u64> bytes;  // signals only
};

class TaskTable {
 public:
  //! topk_idx[pe]: [num_tokens[pe]][top_k].
  TaskTable(const Shape& shape, const Tiling& tiling, const std::vector<const std::int32_t*>& topk_idx,
            const std::vector<u32>& num_tokens, bool gate_inside)
      : shape_(shape), storage_(shape.num_pes) {
    u64 total_tokens = 0;
    for (u32 count : num_tokens) total_tokens += count;
    for (u32 pe = 0; pe < shape.num_pes; ++pe) {
      Storage& storage = storage_[pe];
      storage.words.resize(WorkspaceLayout::plan_words(shape, tiling));
      storage.entries.resize(total_tokens * shape.top_k);
      TaskGraph graph{};
      graph.shape = shape;
      graph.tiling = tiling;
      graph.pe = pe;
      graph.num_tokens = num_tokens[pe];
      graph.topk_idx = topk_idx[pe];
      graph.gate_inside = gate_inside ? 1 : 0;
      storage.scratch =
          WorkspaceLayout::bind_plan(graph.plan, shape, tiling, storage.words.data(), storage.entries.data());
      build_plan(
          graph.plan, shape, tiling, pe, [&](u32 src) { return num_tokens[src]; },
          [&](u32 src, u32 token) { return topk_idx[src] + u64{token} * shape.top_k; });
      graphs_.push_back(graph);
    }
    number_events();
    for (const TaskGraph& graph : graphs_) add_tasks(graph);
  }

  std::vector<TaskRow> tasks;
  std::vector<u64> first{0};  // [num_pes + 1] row of each PE's first task
  std::vector<u16> event_pe, event_kind;
  std::vector<u32> event_index, event_target;
  std::vector<u32> planned_event;  // [num_pes]
  Edges waits, signals;

  const std::vector<TaskGraph>& graphs() const { return graphs_; }

  //! Ids of the picks of one PE, in the order's rank.
  std::vector<u32> order(u32 pe, Order order) {
    TaskGraph& graph = graphs_[pe];
    build_sequence(graph.plan, shape_, order, pe, storage_[pe].scratch);
    const PickOrder picks(graph, order);
    std::vector<u32> ids;
    for (u32 rank = 0; rank < picks.size(); ++rank) ids.push_back(picks[rank]);
    return ids;
  }

 private:
  struct Storage {
    std::vector<u32> words;
    std::vector<Entry> entries;
    u32* scratch = nullptr;
  };

  u32 event(u32 pe, Event event) const { return event_base_[pe][static_cast<u32>(event.kind)] + event.index; }

  void number_events() {
    for (const TaskGraph& graph : graphs_) {
      const Tiling& tiling = graph.tiling;
      std::vector<u32> base;
      auto add = [&](EventKind kind, u32 count, auto target_of) {
        base.push_back(static_cast<u32>(event_pe.size()));
        for (u32 index = 0; index < count; ++index) {
          event_pe.push_back(static_cast<u16>(graph.pe));
          event_kind.push_back(static_cast<u16>(kind));
          event_index.push_back(index);
          event_target.push_back(target_of(index));
        }
      };
      add(EventKind::gated, graph.num_route(),
          [&](u32) { return graph.gate_inside ? tiling.gate_tiles(shape_) : 0; });
      add(EventKind::routed, graph.num_route(), [](u32) { return 1u; });
      planned_event.push_back(static_cast<u32>(event_pe.size()));
      add(EventKind::planned, 1, [&](u32) { return planned_target(graph.pe); });
      add(EventKind::upped, graph.plan.num_blocks(),
          [&](u32) { return graph.whole_experts() ? 0u : graph.up_per_block(); });
      add(EventKind::result, result_words(graph), [&](u32 word) { return result_target(graph, word); });
      event_base_.push_back(base);
    }
  }

  u32 planned_target(u32 pe) const {
    u32 target = 0;
    for (const TaskGraph& graph : graphs_) {
      target += graph.pe == pe ? graph.num_route() : graph.tiling.dispatch_blocks(graph.num_tokens);
    }
    return target;
  }

  u32 result_words(const TaskGraph& graph) const {
    if (graph.whole_experts()) return graph.num_tokens * shape_.top_k;
    if (!graph.by_rows()) return shape_.num_experts;
    return graph.tiling.has_combine(shape_) ? shape_.num_pes * graph.tiling.groups(shape_) : 0;
  }

  //! Signals that a result word of this PE gets: from every tile of the expert (or group) that has one of its
  //! tokens.
  u32 result_target(const TaskGraph& graph, u32 word) const {
    if (graph.whole_experts()) return graph.topk_idx[word] >= 0 ? 1 : 0;
    const u32 groups = graph.tiling.groups(shape_);
    const u32 owner = graph.by_rows() ? word / groups : shape_.owner(word);
    const Plan& plan = graphs_[owner].plan;
    if (graph.by_rows()) {
      const bool sends = plan.group_rows[word % groups * shape_.num_pes + graph.pe] > 0;
      return sends ? graph.tiling.down_tiles(shape_) : 0;
    }
    const u32 local = word - owner * plan.num_local;
    for (u32 i = plan.entry_offset[local]; i < plan.entry_offset[local + 1]; ++i) {
      if (plan.entries[i].src == graph.pe) return plan.expert_blocks(local) * graph.down_per_block();
    }
    return 0;
  }

  void add_tasks(const TaskGraph& graph) {
    for (u32 id = graph.first_task(); id < graph.end_task(); ++id) {
      const Task task = graph.decode(id);
      const Work work = work_of(graph, task);
      TaskRow row{};
      row.pe = static_cast<u16>(graph.pe);
      row.kind = static_cast<u16>(task.kind);
      row.task_id = id;
      row.expert = static_cast<std::int32_t>(task.expert);
      row.tile = static_cast<std::int32_t>(task.tile);
      row.block = static_cast<std::int32_t>(task.block);
      row.num_tokens = task.kind == TaskKind::dispatch ? graph.rows_to(task.peer, task.first, task.num_tokens)
                                                       : task.num_tokens;
      row.peer = static_cast<std::int32_t>(task.peer);
      row.chain = graph.chain(id);
      row.weight_bytes = work.weight_bytes;
      row.io_bytes = work.io_bytes;
      row.flops = work.flops;
      u32 last_wait = none;  // a token's experts repeat within a combine block: name each event once
      const std::size_t first_wait = waits.event.size();
      graph.for_each_wait(task, [&](Event wait) {
        const u32 number = event(graph.pe, wait);
        bool known = number == last_wait;
        for (std::size_t i = first_wait; i < waits.event.size() && !known; ++i)
          known = waits.event[i] == number;
        last_wait = number;
        if (!known) waits.event.push_back(number);
      });
      graph.for_each_signal(task, [&](u32 pe, Event signal, u64 bytes) {
        signals.event.push_back(event(pe, signal));
        signals.bytes.push_back(bytes);
        row.link_bytes += bytes;
      });
      waits.begin.push_back(waits.event.size());
      signals.begin.push_back(signals.event.size());
      tasks.push_back(row);
    }
    first.push_back(tasks.size());
  }

  Shape shape_;
  std::vector<Storage> storage_;
  std::vector<TaskGraph> graphs_;
  std::vector<std::vector<u32>> event_base_;  // [pe][kind]
};

}  // namespace flashmoe
