// Every task of a layer and the edges between them as arrays, for Python.
#pragma once
#include <vector>

#include "flashmoe/work.hpp"
#include "layer_plan.hpp"

namespace flashmoe {

//! A task as Python sees it; TASK_DTYPE in flashmoe/tasks.py.
struct TaskRow {
  u16 pe;
  u16 kind;
  u32 task_id;
  std::int32_t expert, tile, block;  // -1: does not apply
  u32 num_tokens;                    // dispatch: rows that it sends
  std::int32_t peer;
  u32 chain;     // tasks that one pick takes; 0 inside a chain
  u32 num_rows;  // of weights, in a matrix product with the tokens; 0: there is none
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
  explicit TaskTable(LayerPlan layer) : plan(std::move(layer)) {
    for (const TaskGraph& graph : plan.graphs()) add_tasks(graph);
  }

  LayerPlan plan;
  std::vector<TaskRow> tasks;
  std::vector<u64> first{0};  // [num_pes + 1] row of each PE's first task
  Edges waits, signals;

  //! Ids of the picks of one PE, in the order's rank.
  std::vector<u32> order(u32 pe, Order order) {
    plan.rank_experts(pe, order);
    const PickOrder picks(plan.graphs()[pe], order);
    std::vector<u32> ids;
    for (u32 rank = 0; rank < picks.size(); ++rank) ids.push_back(picks[rank]);
    return ids;
  }

  //! PickDecoder::first_of_last of one PE; for tests.
  u32 first_of_last(u32 pe, Order order, u32 num_workers) {
    plan.rank_experts(pe, order);
    const PickOrder picks(plan.graphs()[pe], order);
    PickDecoder decode(picks);
    decode.count();
    return decode.first_of_last(num_workers);
  }

  //! Ranks at which a PickDecoder that steps through every `stride`-th rank says other than the graph; for
  //! tests.
  std::vector<u32> wrongly_decoded(u32 pe, Order order, u32 stride) {
    plan.rank_experts(pe, order);
    const TaskGraph& graph = plan.graphs()[pe];
    const PickOrder picks(graph, order);
    std::vector<u32> wrong;
    for (u32 start = 0; start < stride; ++start) {
      PickDecoder decode(picks);
      decode.count();
      if (decode.size() != picks.size() || decode.num_early() != picks.num_early()) wrong.push_back(none);
      for (u32 rank = start; rank < picks.size(); rank += stride) {
        const Task task = decode(rank), wanted = graph.decode(picks[rank]);
        const bool same = task.id == wanted.id && task.kind == wanted.kind && task.expert == wanted.expert &&
                          task.tile == wanted.tile && task.block == wanted.block &&
                          task.first == wanted.first && task.num_tokens == wanted.num_tokens &&
                          task.peer == wanted.peer;
        if (!same || decode.chain() != graph.chain(task.id)) wrong.push_back(rank);
      }
    }
    return wrong;
  }

 private:
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
      row.num_rows = work.matrix_rows;
      row.weight_bytes = work.weight_bytes;
      row.io_bytes = work.io_bytes;
      row.flops = work.flops;
      add_waits(graph, task);
      graph.for_each_signal(task, [&](u32 pe, Event signal, u64 bytes) {
        signals.event.push_back(plan.event(pe, signal));
        signals.bytes.push_back(bytes);
        row.link_bytes += bytes;
      });
      signals.begin.push_back(signals.event.size());
      tasks.push_back(row);
    }
    first.push_back(tasks.size());
  }

  //! A token's experts repeat within a combine block: names each event once.
  void add_waits(const TaskGraph& graph, const Task& task) {
    const std::size_t first_wait = waits.event.size();
    graph.for_each_wait(task, [&](Event wait) {
      const u32 number = plan.event(graph.pe, wait);
      for (std::size_t i = first_wait; i < waits.event.size(); ++i) {
        if (waits.event[i] == number) return;
      }
      waits.event.push_back(number);
    });
    waits.begin.push_back(waits.event.size());
  }
};

}  // namespace flashmoe
