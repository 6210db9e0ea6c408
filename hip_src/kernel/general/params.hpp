// What a launch of the general kernel is told: one argument, by value.
#pragma once
#include "launch.hpp"

namespace flashmoe::general {

constexpr u32 max_pes = 8;

struct Params {
  Launch launch;
  LaunchPe pes[max_pes];
  char* heaps[max_pes];
  float* sums;              // down="rows": [num_pes * num_workers][num_pes * max_tokens][down_rows]
  TraceSummary* summaries;  // [num_pes * num_workers]; traced only
  TraceRecord* records;     // [num_pes * num_workers][trace_capacity]
  u32 trace_capacity;
};

//! Everything but the pointers of one launch.
inline Launch launch_of(const Shape& shape, const Tiling& tiling, const Policy& policy, u32 max_tokens,
                        u32 num_workers, u32 num_domains, u64 deadline_ns) {
  Launch launch{};
  launch.shape = shape;
  launch.tiling = tiling;
  launch.policy = policy;
  launch.limits = Limits::of(shape, tiling, max_tokens);
  launch.heap = HeapLayout::of(shape, tiling, launch.limits);
  launch.workspace = WorkspaceLayout::of(shape, tiling, launch.limits, num_domains);
  launch.num_workers = num_workers;
  launch.num_domains = num_domains;
  launch.deadline_ns = deadline_ns;
  return launch;
}

//! Floats of a worker's running sums.
inline u64 sums_of_worker(const Launch& launch) {
  if (launch.tiling.down != Down::rows) return 0;
  return u64{launch.shape.num_pes} * launch.limits.max_tokens * launch.tiling.down_rows;
}

}  // namespace flashmoe::general
