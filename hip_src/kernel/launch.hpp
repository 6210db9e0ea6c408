// What one launch is told. Plain data: the same struct for threads and devices.
#pragma once
#include "flashmoe/fault.hpp"
#include "flashmoe/layout.hpp"
#include "flashmoe/policy.hpp"
#include "flashmoe/trace.hpp"

namespace flashmoe {

//! One PE's part. x and out: [num_tokens][d_model] of the layer's dtype.
struct LaunchPe {
  char* workspace;
  const void* x;
  void* out;
  const std::int32_t* topk_idx;  // routing given from outside, else nullptr
  const float* topk_weights;
  u32 num_tokens;
  const u32* replay_offset;  // [num_workers + 1] into replay_ids; queue `replay` only
  const u32* replay_ids;     // first tasks of picks
  u64 replay_digest;         // of the plan that the lists were made for
};

struct Launch {
  Shape shape;
  Tiling tiling;
  Policy policy;
  Limits limits;
  HeapLayout heap;
  WorkspaceLayout workspace;
  u32 num_workers;  // per PE
  u32 num_domains;
  u32 gate_inside;
  u64 deadline_ns;  // of a single wait
  u64 start_ns;
  const void* gate;     // [num_experts][d_model]
  const void* gate_up;  // [num_experts][2 d_ff][d_model], gate rows first
  const void* down;     // [num_experts][d_model][d_ff]
  FaultReport* fault;
};

}  // namespace flashmoe
