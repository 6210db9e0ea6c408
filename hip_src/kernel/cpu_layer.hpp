// The CPU backend: PEs are groups of threads in one process, their symmetric heaps are plain memory.
#pragma once
#include <memory>
#include <vector>

#include "flashmoe/task_graph.hpp"
#include "launch.hpp"

namespace flashmoe::host {

//! For stress tests: random delays, and workers that fail to do their part.
struct Disturbance {
  u32 max_delay_us = 0;  // random, before each task and before its signals
  u64 seed = 0;
  u32 absent_pe = none;  // its workers never start
  u32 dead_pe = none;    // this worker of this PE stops after so many tasks
  u32 dead_worker = none;
  u32 dead_after = 0;
};

struct LayerConfig {
  Shape shape;
  Tiling tiling;
  Policy policy;
  u32 max_tokens;
  u32 num_workers;
  u32 num_domains;
  u64 deadline_ns;
  u32 trace_capacity;  // records per worker; 0 switches the trace off
};

//! Per-PE inputs of one launch; as LaunchPe without the workspace.
struct PeInput {
  const void* x;
  void* out;
  u32 num_tokens;
  const std::int32_t* topk_idx;  // nullptr with the gate inside
  const float* topk_weights;
  std::vector<u32> replay_offset, replay_ids;
  u64 replay_digest = 0;
};

//! Memory without initialisation: pages that are never used are never there.
class RawMemory {
 public:
  explicit RawMemory(u64 bytes);
  char* data() const { return data_.get(); }
  u64 size() const { return size_; }
  void zero();

 private:
  struct Free {
    void operator()(char* data) const;
  };
  u64 size_;
  std::unique_ptr<char, Free> data_;
};

class CpuLayer {
 public:
  CpuLayer(const LayerConfig& config, const void* gate, const void* gate_up, const void* down);

  //! Prepares a launch; run_pe must then be called once for each PE, from different threads.
  void begin(const std::vector<PeInput>& inputs, bool gate_inside);
  //! All workers of one PE, from start to end.
  void run_pe(u32 pe, const Disturbance& disturbance);
  //! All PEs at once. Returns false when the launch failed; the workspace has then been reset.
  bool run(const std::vector<PeInput>& inputs, bool gate_inside, const Disturbance& disturbance);

  const FaultReport& fault() const { return fault_; }
  //! PEs that did not end their epoch in the last launch.
  const std::vector<u32>& unfinished() const { return unfinished_; }
  u32 epoch(u32 pe) const;
  const std::vector<TraceBuffer>& traces() const { return traces_; }  // [pe][worker]
  u64 workspace_bytes() const;
  //! Routing that the last launch used, [num_tokens][top_k] of one PE.
  const std::int32_t* topk_idx(u32 pe) const;
  const float* topk_weights(u32 pe) const;
  const LayerConfig& config() const { return config_; }

 private:
  void reset();
  //! Ends the launch because a worker could not start.
  void give_up(u32 pe, u32 worker);

  LayerConfig config_;
  Launch launch_{};
  std::vector<RawMemory> workspaces_, heaps_, trace_memory_;
  std::vector<char*> heap_bases_;
  std::vector<PeInput> inputs_;
  std::vector<LaunchPe> pes_;
  std::vector<TraceBuffer> traces_;
  FaultReport fault_{};
  std::vector<u32> unfinished_;
};

}  // namespace flashmoe::host
