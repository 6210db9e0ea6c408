// One layer on all PEs for one routing: every PE's plan and task graph, and the events numbered through.
#pragma once
#include <vector>

#include "flashmoe/layout.hpp"
#include "flashmoe/policy.hpp"

namespace flashmoe {

class LayerPlan {
 public:
  //! topk_idx[pe]: [num_tokens[pe]][top_k]; must outlive this object.
  LayerPlan(const Shape& shape, const Tiling& tiling, const std::vector<const std::int32_t*>& topk_idx,
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
  }
  LayerPlan(const LayerPlan&) = delete;  // the graphs point into the storage
  LayerPlan(LayerPlan&&) = default;

  const Shape& shape() const { return shape_; }
  const std::vector<TaskGraph>& graphs() const { return graphs_; }
  u32 event(u32 pe, Event event) const { return event_base_[pe][static_cast<u32>(event.kind)] + event.index; }

  //! Ranks the experts of one PE; PickOrder(graphs()[pe], order) holds from then on.
  void rank_experts(u32 pe, Order order) {
    build_sequence(graphs_[pe].plan, shape_, order, pe, storage_[pe].scratch);
  }

  std::vector<u16> event_pe, event_kind;
  std::vector<u32> event_index, event_target;
  std::vector<u32> planned_event;  // [num_pes]

 private:
  struct Storage {
    std::vector<u32> words;
    std::vector<Entry> entries;
    u32* scratch = nullptr;
  };

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
      add(EventKind::result, result_words(graph), [&](u32 word) { return own_result_target(graph, word); });
      event_base_.push_back(base);
    }
    if (!graphs_[0].whole_experts()) add_result_targets();
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

  //! Signals that a result word gets from a whole expert.
  static u32 own_result_target(const TaskGraph& graph, u32 word) {
    return graph.whole_experts() && graph.topk_idx[word] >= 0 ? 1 : 0;
  }

  //! A result word gets a signal from every tile of the expert (or group) that has one of the PE's tokens.
  void add_result_targets() {
    for (const TaskGraph& owner : graphs_) {
      const Plan& plan = owner.plan;
      const u32 groups = owner.tiling.groups(shape_);
      if (owner.by_rows()) {
        if (!owner.tiling.has_combine(shape_)) continue;
        for (u32 i = 0; i < groups * shape_.num_pes; ++i) {
          const u32 pe = i % shape_.num_pes, word = owner.pe * groups + i / shape_.num_pes;
          if (plan.group_rows[i] > 0)
            event_target[event(pe, Event{EventKind::result, word})] = owner.tiling.down_tiles(shape_);
        }
        continue;
      }
      for (u32 local = 0; local < plan.num_local; ++local) {
        const u32 word = owner.pe * plan.num_local + local;
        const u32 tiles = plan.expert_blocks(local) * owner.down_per_block();
        for (u32 i = plan.entry_offset[local]; i < plan.entry_offset[local + 1]; ++i)
          event_target[event(plan.entries[i].src, Event{EventKind::result, word})] = tiles;
      }
    }
  }

  Shape shape_;
  std::vector<Storage> storage_;
  std::vector<TaskGraph> graphs_;
  std::vector<std::vector<u32>> event_base_;  // [pe][kind]
};

}  // namespace flashmoe
