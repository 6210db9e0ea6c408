// One PE in one epoch: where its tasks, counters, rows and results lie.
#pragma once
#include "flashmoe/exchange.hpp"
#include "flashmoe/task_graph.hpp"
#include "launch.hpp"

namespace flashmoe {

struct PeView {
  const Launch& launch;
  const LaunchPe* pes;  // [num_pes]
  char* const* heaps;   // [num_pes] symmetric heaps
  const LaunchPe& own;
  u32 pe;
  u32 epoch;
  WorkspaceLayout::Counters counters;
  TaskGraph graph{};
  u32* key_scratch;

  FLASHMOE_FN PeView(const Launch& of_launch, const LaunchPe* all_pes, char* const* all_heaps, u32 of_pe)
      : launch(of_launch), pes(all_pes), heaps(all_heaps), own(all_pes[of_pe]), pe(of_pe) {
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
  FLASHMOE_FN T* at(u64 offset) const {
    return reinterpret_cast<T*>(own.workspace + offset);
  }
  FLASHMOE_FN Heap heap(u32 of_pe) const {
    return Heap{heaps[of_pe],
                &launch.heap,
                &launch.shape,
                launch.limits.max_tokens,
                launch.tiling.result_slots(launch.shape),
                epoch % 2};
  }
  FLASHMOE_FN u64 row_bytes() const { return u64{launch.shape.d_model} * launch.shape.element_bytes(); }
  //! The token row of an entry: own tokens are read in place, others where they landed.
  FLASHMOE_FN const void* row(const Entry& entry) const {
    if (entry.src == pe) return static_cast<const char*>(own.x) + entry.token * row_bytes();
    return heap(pe).row(entry.src, entry.token);
  }
  FLASHMOE_FN float weight(const Entry& entry) const {
    if (entry.src == pe) return topk_weights()[u64{entry.token} * launch.shape.top_k + entry.k];
    return heap(pe).weights(entry.src, entry.token)[entry.k];
  }
  // --- what every PE sent here; needs all of it to have landed
  FLASHMOE_FN LandedWord landed(u32 src) const {
    // relaxed: who found everything landed has acquired it
    return LandedWord::unpack(load_relaxed<Scope::system>(heap(pe).landed(src)));
  }
  FLASHMOE_FN u32 num_tokens(u32 src) const { return src == pe ? own.num_tokens : landed(src).num_tokens; }
  FLASHMOE_FN bool has_landed(u32 src, u32 token) const { return *heap(pe).tag(src, token) == epoch; }
  //! The experts of a token, or nullptr when it has none here.
  FLASHMOE_FN const std::int32_t* topk_of(u32 src, u32 token) const {
    if (src == pe) return graph.topk_idx + u64{token} * launch.shape.top_k;
    return has_landed(src, token) ? heap(pe).experts(src, token) : nullptr;
  }

  FLASHMOE_FN const float* topk_weights() const { return at<float>(launch.workspace.topk_weights); }
  FLASHMOE_FN void* hidden(u32 entry_idx) const {
    return at<char>(launch.workspace.hidden) +
           u64{entry_idx} * launch.shape.d_ff * launch.shape.element_bytes();
  }
  FLASHMOE_FN void* out(u32 token) const { return static_cast<char*>(own.out) + token * row_bytes(); }
};

}  // namespace flashmoe
