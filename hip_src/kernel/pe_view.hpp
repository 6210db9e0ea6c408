// One PE in one epoch: where its tasks, counters, rows and results lie.
#pragma once
#include "flashmoe/exchange.hpp"
#include "flashmoe/task_graph.hpp"
#include "launch.hpp"

namespace flashmoe {

struct PeView {
  const Launch& launch;
  const LaunchPe& own;
  u32 pe;
  u32 epoch;
  WorkspaceLayout::Counters counters;
  TaskGraph graph{};
  u32* key_scratch;

  PeView(const Launch& of_launch, u32 of_pe) : launch(of_launch), own(of_launch.pes[of_pe]), pe(of_pe) {
    const WorkspaceLayout& w = launch.workspace;
    // relaxed: the launch itself orders this worker after the last one of the launch before
    epoch = load_relaxed<Scope::device>(at<u32>(w.epoch)) + 1;
    counters = w.counters[epoch % 2];
    graph.shape = launch.shape;
    graph.tiling = launch.tiling;
    graph.pe = pe;
    graph.num_tokens = own.num_tokens;
    graph.gate_inside = launch.gate_inside;
    graph.topk_idx = at<std::int32_t>(w.topk_idx);
    key_scratch = WorkspaceLayout::bind_plan(graph.plan, launch.shape, launch.tiling, at<u32>(w.plan),
                                             at<Entry>(w.entries));
  }

  template <class T>
  T* at(u64 offset) const {
    return reinterpret_cast<T*>(own.workspace + offset);
  }
  Heap heap(u32 of_pe) const {
    return Heap{launch.heaps[of_pe],
                &launch.heap,
                &launch.shape,
                launch.limits.max_tokens,
                launch.tiling.result_slots(launch.shape),
                epoch % 2};
  }
  //! The token row of an entry: own tokens are read in place, others where they landed.
  const void* row(const Entry& entry) const {
    const u64 row_bytes = u64{launch.shape.d_model} * launch.shape.element_bytes();
    if (entry.src == pe) return static_cast<const char*>(own.x) + entry.token * row_bytes;
    return heap(pe).row(entry.src, entry.token);
  }
  float weight(const Entry& entry) const {
    if (entry.src == pe) return topk_weights()[u64{entry.token} * launch.shape.top_k + entry.k];
    return heap(pe).weights(entry.src, entry.token)[entry.k];
  }
  const float* topk_weights() const { return at<float>(launch.workspace.topk_weights); }
  void* hidden(u32 entry_idx) const {
    return at<char>(launch.workspace.hidden) +
           u64{entry_idx} * launch.shape.d_ff * launch.shape.element_bytes();
  }
  void* out(u32 token) const {
    return static_cast<char*>(own.out) + u64{token} * launch.shape.d_model * launch.shape.element_bytes();
  }
};

}  // namespace flashmoe
