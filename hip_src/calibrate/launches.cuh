#pragma once
// How a grid of one block an SM comes up, and the gap to the grid before it in a CUDA graph.
#include "lab.cuh"

constexpr u32 kLaunchThreads = 384;
constexpr u32 kLaunchesInGraph = 24;

struct BlockTimes {
  u64 first_ns;  // first instruction
  u64 ready_ns;  // allowed to touch what the grid before wrote
  u64 last_ns;   // all threads done
  u32 sm, padding;
};

__global__ void __launch_bounds__(kLaunchThreads, 1) launch_kernel(u64 body_ns, BlockTimes* out) {
  const u64 first_ns = now_ns();
  // Both are no-ops unless the launch carries the programmatic attribute.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const u64 ready_ns = now_ns();
  // No wait_until: its message needs a stack, which a launch has to set up.
  for (u32 i = 0; i < 1'000'000 && now_ns() < first_ns + body_ns; ++i) continue;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = {first_ns, ready_ns, now_ns(), sm_id(), 0};
}

inline void measure_launches(Lab& lab) {
  constexpr u32 kReplays = 24, kWarmReplays = 3;
  constexpr u64 kBodyNs = 20'000;
  DeviceArray<BlockTimes> out(kLaunchesInGraph * std::size_t{lab.num_sms});
  CHECK(cudaFuncSetAttribute(launch_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  std::ofstream csv = lab.report.open("launches.csv");
  csv << "programmatic,replay,launch,block,sm,first_ns,ready_ns,last_ns\n";
  for (bool programmatic : {false, true}) {
    cudaStream_t stream;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (u32 launch = 0; launch < kLaunchesInGraph; ++launch) {
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
      cudaLaunchConfig_t config{};
      config.gridDim = lab.num_sms;
      config.blockDim = kLaunchThreads;
      config.dynamicSmemBytes = kSharedBytes;
      config.stream = stream;
      config.attrs = &attribute;
      config.numAttrs = programmatic && launch > 0 ? 1 : 0;
      CHECK(cudaLaunchKernelEx(&config, launch_kernel, kBodyNs,
                               out.data() + launch * std::size_t{lab.num_sms}));
    }
    cudaGraph_t graph;
    cudaGraphExec_t replayable;
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&replayable, graph, 0));

    Samples ramp, last_block, gap, gap_ready, same_sm_gap;
    for (u32 replay = 0; replay < kWarmReplays + kReplays; ++replay) {
      CHECK(cudaGraphLaunch(replayable, stream));
      CHECK(cudaStreamSynchronize(stream));
      if (replay < kWarmReplays) continue;
      const std::vector<BlockTimes> all = out.read();
      std::vector<u64> sm_last(1024, 0);
      u64 grid_last = 0;
      u64 origin = ~u64{0};
      for (u32 i = 0; i < lab.num_sms; ++i) origin = std::min(origin, all[i].first_ns);
      for (u32 launch = 0; launch < kLaunchesInGraph; ++launch) {
        const BlockTimes* grid = all.data() + launch * std::size_t{lab.num_sms};
        u64 first = ~u64{0}, ready = ~u64{0}, slowest = 0, last = 0;
        for (u32 i = 0; i < lab.num_sms; ++i) {
          first = std::min(first, grid[i].first_ns);
          ready = std::min(ready, grid[i].ready_ns);
          slowest = std::max(slowest, grid[i].ready_ns);
          last = std::max(last, grid[i].last_ns);
        }
        // A programmatic launch comes up while the grid before still runs: only from `ready` on can it work.
        last_block.push_back(static_cast<double>(slowest - (programmatic ? ready : first)));
        for (u32 i = 0; i < lab.num_sms; ++i) {
          ramp.push_back(
              static_cast<double>((programmatic ? grid[i].ready_ns - ready : grid[i].first_ns - first)));
          if (launch > 0 && sm_last.at(grid[i].sm) != 0) {
            same_sm_gap.push_back(static_cast<double>(grid[i].first_ns) -
                                  static_cast<double>(sm_last[grid[i].sm]));
          }
          if (replay < kWarmReplays + 4) {
            csv << programmatic << ',' << replay - kWarmReplays << ',' << launch << ',' << i << ','
                << grid[i].sm << ',' << grid[i].first_ns - origin << ',' << grid[i].ready_ns - origin << ','
                << grid[i].last_ns - origin << '\n';
          }
        }
        if (launch > 0) {
          gap.push_back(static_cast<double>(first) - static_cast<double>(grid_last));
          gap_ready.push_back(static_cast<double>(ready) - static_cast<double>(grid_last));
        }
        for (u32 i = 0; i < lab.num_sms; ++i) sm_last.at(grid[i].sm) = grid[i].last_ns;
        grid_last = last;
      }
    }
    const Conditions conditions = Conditions()
                                      .with("programmatic", programmatic)
                                      .with("threads", kLaunchThreads)
                                      .with("shared_bytes", kSharedBytes);
    lab.report.add("launch", "block_after_first_block", "ns", ramp, conditions);
    lab.report.add("launch", "last_block_after_first", "ns", last_block, conditions);
    lab.report.add("launch", "gap_last_end_to_first_start", "ns", gap, conditions);
    lab.report.add("launch", "gap_last_end_to_first_ready", "ns", gap_ready, conditions);
    lab.report.add("launch", "gap_on_the_same_sm", "ns", same_sm_gap, conditions);
    std::printf(
        "launch in a graph%s: blocks after the first: median %.0f, last %.0f ns; gap last end to first start "
        "%.0f (min %.0f max %.0f), to first ready %.0f, on the same SM %.0f ns\n",
        programmatic ? ", programmatic" : "", median(ramp), median(last_block), median(gap), quantile(gap, 0),
        quantile(gap, 1), median(gap_ready), median(same_sm_gap));
    CHECK(cudaGraphExecDestroy(replayable));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaStreamDestroy(stream));
  }
}
