// The pipelined kernel: a work-group is a worker. Some of its warps pick tasks, stream their weights, load
// their tokens, multiply, finish and signal (see Roles); they hand work on through shared memory and never
// wait for a whole work-group.
#pragma once
#include "finish.cuh"
#include "loader.cuh"
#include "math.cuh"
#include "picker.cuh"
#include "push.cuh"
#include "streamer.cuh"

namespace flashmoe::pipeline {

//! pushed: with the queue `push`, else for all others.
template <u32 groups, Mode mode, bool traced, bool pushed>
__global__ void __launch_bounds__(Roles<mode>::num_threads, 1)
    moe_layer(const __grid_constant__ Params params) {
  using R = Roles<mode>;
  extern __shared__ __align__(128) char shared[];
  sm90::let_next_launch_start();
  TaskGraph graph{};
  graph.shape = Shape{d_model, d_ff, num_experts, top_k, 1, norm_topk, DType::bf16};
  graph.tiling = params.cut.tiling();
  graph.tiling.down = mode == Mode::tiles ? Down::tile : Down::rows;  // as the compiler may know
  if constexpr (mode == Mode::words) {
    graph.tiling.up_rows = words_up_rows, graph.tiling.down_rows = words_down_rows;
    graph.tiling.experts_per_pick = 0;  // all: so there is no combine
  }
  graph.num_tokens = params.num_tokens;
  graph.gate_inside = params.given_idx == nullptr;
  Group group{params, shared, params.at, blockIdx.x, 0, 0};
  u32* words = group.in_shared<u32>(group.at.plan);
  u32** arrays[] = {&graph.plan.entry_offset, &graph.plan.block_offset, &graph.plan.active_offset,
                    &graph.plan.active,       &graph.plan.sequence,     &graph.plan.sequence_offset};
#pragma unroll
  for (u32 i = 0; i < 6; ++i) *arrays[i] = words + i * (num_experts + 1);
  graph.plan.num_local = num_experts;
  const u32 warp = threadIdx.x / 32;
  if (threadIdx.x == math_threads) {
    group.init_barriers<mode>();
    *group.stop_flag() = 0;
  }
  __syncthreads();
  // Each role does what it can before the launch before has ended, then begins.
  if (warp < math_warps) {
    Mathematician<groups, mode, traced, pushed>(group, graph).run();
  } else if (warp < R::pick) {
    if (mode == Mode::words && params.given_idx != nullptr && is_by_id(params.order))
      Planner<mode>(group, graph.tiling).prefetch_given_weights();
    group.begin<traced>();
    if (group.worker + 1 == params.num_workers) {  // the idle half of the counters, for the next launch
      const Counters& idle = params.layout.counters[(group.epoch() + 1) % 2];
      const u32 first = threadIdx.x - math_threads;
      for (u64 offset = idle.begin + first * 16; offset < idle.end; offset += R::finish_threads * 16)
        *group.in_workspace<uint4>(offset) = make_uint4(0, 0, 0, 0);
    }
    Finisher<groups, mode, traced>(group, graph).run();
  } else if (warp == R::pick) {
    using ThePicker = std::conditional_t<pushed, PushPicker<mode, traced>, Picker<mode, traced>>;
    if (threadIdx.x % 32 == 0) ThePicker(group, graph).run();
  } else if (warp == R::stream) {
    if (graph.gate_inside) {
      constexpr u32 lines = num_experts * d_model * 2 / 128;
      for (u32 i = group.worker * 32 + threadIdx.x % 32; i < lines; i += params.num_workers * 32)
        sm90::prefetch(static_cast<const char*>(params.gate) + u64{i} * 128);
    }
    group.ask_for_inputs();
    if constexpr (mode != Mode::words) {
      sm90::prefetch(params.up_tiles);
      sm90::prefetch(params.down_tiles);
      Planner<mode>(group, graph.tiling).prefetch_likely_weights();
    }
    Streamer<mode>(group, graph).run();
  } else if (warp < R::signal) {
    group.begin<false>();
    Loader<mode, traced>(group, graph).run();
  } else if (threadIdx.x % 32 == 0) {
    group.begin<false>();
    Signaller<pushed>(group, graph).run();
  }
  __syncthreads();
  if (threadIdx.x == 0 && group.stopped()) group.tell_stuck();
}

}  // namespace flashmoe::pipeline
