// The general kernel: its two instances, and their launches.
#include "layer.hpp"
// the runtime first: it defines what the kernel's headers are made of
#include "general/kernel.hpp"

#if defined(__HIP__)
  #define FLASHMOE_PARAMS flashmoe::general::Params
#else
  #define FLASHMOE_PARAMS const __grid_constant__ flashmoe::general::Params  // no copy in local memory
#endif
#define FLASHMOE_BOUNDS __launch_bounds__(flashmoe::general::num_threads, flashmoe::arch::occupancy)

extern "C" {

__global__ void FLASHMOE_BOUNDS flashmoe_general(FLASHMOE_PARAMS params) {
  __shared__ flashmoe::general::Group group;
  flashmoe::general::run<false>(group, flashmoe::arch::argument(params));
}
__global__ void FLASHMOE_BOUNDS flashmoe_general_traced(FLASHMOE_PARAMS params) {
  __shared__ flashmoe::general::Group group;
  flashmoe::general::run<true>(group, flashmoe::arch::argument(params));
}

}  // extern "C"

namespace flashmoe::general {

namespace {

struct Layer : FlashmoeLayer {
  Params params{};
  DeviceMemory workspaces, heaps, report, sums, summaries, records;

  const void* kernel() const {
    return config.trace_capacity > 0 ? reinterpret_cast<const void*>(flashmoe_general_traced)
                                     : reinterpret_cast<const void*>(flashmoe_general);
  }

  int create(const FlashmoeDevice& device) override {
    int per_cu = 0;
    if (check(GPU(OccupancyMaxActiveBlocksPerMultiprocessor)(&per_cu, kernel(), num_threads, 0), "occupancy"))
      return 1;
    const u32 room = device.num_cus * static_cast<u32>(per_cu) / config.num_pes;
    num_workers = config.num_workers == 0 ? room : config.num_workers;
    if (num_workers > room)
      return fail("%u workers (the card has room for %u per PE, and all workers must run at once)",
                  num_workers, room);
    const Policy policy{static_cast<QueueKind>(config.queue), static_cast<Order>(config.order),
                        config.look_ahead};
    Launch& launch = params.launch;
    launch = launch_of(built::shape(config.num_pes), tiling, policy, config.max_tokens, num_workers,
                       config.num_domains, config.deadline_ns);
    const u64 workers = u64{config.num_pes} * num_workers;
    if (workspaces.allocate(config.num_pes * launch.workspace.bytes, "workspace") ||
        heaps.allocate(config.num_pes * launch.heap.bytes, "symmetric heaps") ||
        report.allocate(sizeof(FaultReport), "fault report") ||
        sums.allocate(workers * sums_of_worker(launch) * sizeof(float), "running sums") ||
        summaries.allocate(workers * sizeof(TraceSummary), "trace") ||
        records.allocate(workers * config.trace_capacity * sizeof(TraceRecord), "trace"))
      return 1;
    launch.gate = weights.gate_device;
    launch.gate_up = weights.gate_up_device;
    launch.down = weights.down_device;
    launch.fault = fault();
    for (u32 pe = 0; pe < config.num_pes; ++pe) {
      params.pes[pe].workspace = workspaces.as<>() + pe * launch.workspace.bytes;
      params.heaps[pe] = heaps.as<>() + pe * launch.heap.bytes;
    }
    params.sums = sums.as<float>();
    params.summaries = summaries.as<TraceSummary>();
    params.records = records.as<TraceRecord>();
    params.trace_capacity = config.trace_capacity;
    return 0;
  }

  u64 workspace_bytes() const override {
    return workspaces.bytes() + heaps.bytes() + report.bytes() + sums.bytes() + summaries.bytes() +
           records.bytes();
  }
  const char* kernel_name() const override { return "general"; }

  int launch(const FlashmoeInput& input, Stream stream) override {
    Params now = params;
    const auto& given = input.topk_idx_device;
    const bool is_given =
        std::any_of(given, given + config.num_pes, [](auto* idx) { return idx != nullptr; });
    now.launch.gate_inside = is_given ? 0 : 1;
    for (u32 pe = 0; pe < config.num_pes; ++pe) {
      if (is_given && given[pe] == nullptr && input.num_tokens[pe] > 0)
        return fail("PE %u: no routing, where other PEs have theirs given", pe);
      LaunchPe& own = now.pes[pe];
      own.x = input.x_device[pe];
      own.out = input.out_device[pe];
      own.topk_idx = input.topk_idx_device[pe];
      own.topk_weights = input.topk_weights_device[pe];
      own.num_tokens = input.num_tokens[pe];
      own.replay_offset = input.replay_offset_device[pe];
      own.replay_ids = input.replay_ids_device[pe];
      own.replay_digest = input.replay_digest[pe];
    }
    void* arguments[] = {&now};
    // cooperative: workers wait for each other, so either all of them start or none
    return check(GPU(LaunchCooperativeKernel)(kernel(), dim3(config.num_pes * num_workers), dim3(num_threads),
                                              arguments, 0, stream),
                 "launch");
  }

  FaultReport* fault() const override { return report.as<FaultReport>(); }
  int reset() override {
    return workspaces.zero("workspace") || heaps.zero("symmetric heaps") || summaries.zero("trace");
  }

  int routing(u32 pe, std::int32_t* topk_idx, float* topk_weights) const override {
    const u64 pairs = u64{last_num_tokens[pe]} * built::top_k;
    const char* workspace = params.pes[pe].workspace;
    return flashmoe_copy(topk_idx, workspace + params.launch.workspace.topk_idx, pairs * 4) ||
           flashmoe_copy(topk_weights, workspace + params.launch.workspace.topk_weights, pairs * 4);
  }

  int trace(u32 pe, u32 worker, TraceRecord* mine, u32* size, u32* drops) const override {
    return read_trace(summaries.as<TraceSummary>(), records.as<TraceRecord>(),
                      u64{config.num_pes} * num_workers, u64{pe} * num_workers + worker,
                      config.trace_capacity, mine, size, drops);
  }
};

}  // namespace

int refuse(const FlashmoeConfig& c, const Tiling& t) {
  if (c.num_pes < 1 || c.num_pes > max_pes) return fail("%u PEs (accepted: 1..%u)", c.num_pes, max_pes);
  if (built::num_experts % c.num_pes != 0)
    return fail("%u PEs for %u experts (each PE must have as many)", c.num_pes, built::num_experts);
  if (t.up_rows == 0 || t.up_rows % 8 != 0) return fail("up_rows=%u (must be a multiple of 8)", t.up_rows);
  if (t.down_rows == 0 || t.down_rows % 16 != 0)
    return fail("down_rows=%u (must be a multiple of 16)", t.down_rows);
  if (t.granularity == Granularity::token && (t.down == Down::rows || t.block_tokens != 1))
    return fail("granularity 'token' (only with down 'tile' and block_tokens 1)");
  return 0;
}

FlashmoeLayer* make_layer() { return new Layer; }

}  // namespace flashmoe::general
