// The pipelined kernel: a work-group is a worker. One thread picks tasks, one streams their weights, eight
// warps multiply, two finish; they hand work on through shared memory and never wait for a whole work-group.
#pragma once
#include "finish.cuh"
#include "math.cuh"
#include "picker.cuh"
#include "streamer.cuh"

namespace flashmoe::pipeline {

template <u32 columns, bool words_mode, bool traced, u32 up_rows, u32 down_rows, u32 block_tokens>
__global__ void __launch_bounds__(num_threads, 1) moe_layer(const __grid_constant__ Params params) {
  extern __shared__ __align__(128) char shared[];
  sm90::let_next_launch_start();
  Group group{params,
              shared,
              SharedLayout::of(params.tiling, params.num_tokens, params.ring_slots, columns, words_mode),
              blockIdx.x,
              0,
              {}};
  const u32 warp = threadIdx.x / 32;
  if (threadIdx.x == math_threads) {
    group.init_barriers();
    *group.stop_flag() = 0;
  }
  sm90::wait_for_launch_before();
  // relaxed: the launch before has ended
  group.epoch = load_relaxed<Scope::device>(group.in_workspace<u32>(params.layout.epoch) + group.worker) + 1;
  group.counters = params.layout.counters[group.epoch % 2];
  TaskGraph graph{};
  graph.shape = Shape{d_model, d_ff, num_experts, top_k, 1, norm_topk, DType::bf16};
  graph.tiling = params.tiling;
  // Constants where the instance has them: the task graph is arithmetic, and divisions by variables are slow.
  if (up_rows != 0) graph.tiling.up_rows = up_rows;
  if (down_rows != 0) graph.tiling.down_rows = down_rows;
  if (block_tokens != 0) graph.tiling.block_tokens = block_tokens;
  graph.num_tokens = params.num_tokens;
  graph.gate_inside = params.given_idx == nullptr;
  u32* words = group.in_shared<u32>(group.at.plan);
  u32** arrays[] = {&graph.plan.entry_offset, &graph.plan.block_offset, &graph.plan.active_offset,
                    &graph.plan.active,       &graph.plan.sequence,     &graph.plan.sequence_offset};
#pragma unroll
  for (u32 i = 0; i < 6; ++i) *arrays[i] = words + i * (num_experts + 1);
  graph.plan.num_local = num_experts;
  if (traced && threadIdx.x == 0) params.begin_ns[group.worker] = clock_ns();
  __syncthreads();
  if (params.fault->raised())
    return;  // of an earlier launch: nothing runs until the host has reset the layer

  if (warp == pick_warp) {
    if (threadIdx.x % 32 == 0) Picker<traced>(group, graph, columns).run();
  } else if (warp == stream_warp) {
    if (threadIdx.x % 32 == 0) Streamer(group).run();
  } else if (warp >= math_warps) {
    if (group.worker + 1 == params.num_workers) {  // the idle half of the counters, for the next launch
      const Counters& idle = params.layout.counters[(group.epoch + 1) % 2];
      const u32 first = threadIdx.x - math_threads;
      for (u64 offset = idle.begin + first * 16; offset < idle.end; offset += finish_threads * 16)
        *group.in_workspace<uint4>(offset) = make_uint4(0, 0, 0, 0);
    }
    Finisher<columns, words_mode, traced>(group, graph).run();
  } else {
    Mathematician<columns, words_mode, traced>(group, graph).run();
  }
  __syncthreads();
  if (threadIdx.x == 0 && !group.stopped())
    store_relaxed<Scope::device>(group.in_workspace<u32>(params.layout.epoch) + group.worker, group.epoch);
}

}  // namespace flashmoe::pipeline
