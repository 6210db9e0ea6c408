// The pipelined kernel: its instances, and their launches.
#include <vector>

#include "layer.hpp"
#include "pipeline/kernel.cuh"

namespace flashmoe::pipeline {

namespace {

using Kernel = void (*)(Params);
struct Instance {
  Kernel kernel, traced;
  u32 columns;
  bool words;
  u32 up_rows, down_rows, block_tokens;  // 0: any
  const char* name;

  bool fits(const Tiling& t, bool few_tokens) const {
    return words == few_tokens && (up_rows == 0 || up_rows == t.up_rows) &&
           (down_rows == 0 || down_rows == t.down_rows) && (words || columns * 8 == t.block_tokens) &&
           (block_tokens == 0 || block_tokens == t.block_tokens);
  }
};
template <u32 columns, bool words, u32 up_rows = 0, u32 down_rows = 0, u32 block_tokens = 0>
Instance instance(const char* name) {
  return Instance{moe_layer<columns, words, false, up_rows, down_rows, block_tokens>,
                  moe_layer<columns, words, true, up_rows, down_rows, block_tokens>,
                  columns,
                  words,
                  up_rows,
                  down_rows,
                  block_tokens,
                  name};
}
// The tilings that are worth it have instances of their own; the first that fits is taken.
const Instance instances[] = {
    instance<1, true, 8, 16, 8>("pipeline, tokens as columns, tuned"),
    instance<1, true>("pipeline, tokens as columns"),
    instance<1, false, 32, 32, 8>("pipeline, lists of 8, tuned"),
    instance<1, false>("pipeline, lists of 8"),
    instance<2, false, 32, 32, 16>("pipeline, lists of 16, tuned"),
    instance<2, false>("pipeline, lists of 16"),
    instance<3, false>("pipeline, lists of 24"),
};

struct Layer : FlashmoeLayer {
  Layout layout;
  u32 max_shared_bytes;
  DeviceMemory workspace, report, records, begin_ns;

  const Instance& instance_for(u32 num_tokens) const {
    for (const Instance& i : instances)
      if (i.fits(tiling, num_tokens <= max_words_tokens)) return i;
    return instances[0];  // refused when the layer was made
  }

  int create(const FlashmoeDevice& device) override {
    num_workers = config.num_workers == 0 ? device.num_cus : config.num_workers;
    if (num_workers > device.num_cus)
      return fail("%u workers (the card has %u SMs, and all workers must run at once)", num_workers,
                  device.num_cus);
    max_shared_bytes = device.shared_bytes_per_wg;
    const Shape shape{d_model, d_ff, num_experts, top_k, 1, norm_topk ? 1u : 0u, DType::bf16};
    layout = Layout::of(shape, tiling, config.max_tokens, num_workers, config.num_domains);
    if (workspace.allocate(layout.bytes, "workspace") ||
        report.allocate(sizeof(FaultReport), "fault report") ||
        records.allocate(u64{num_workers} * config.trace_capacity * sizeof(TraceRecord), "trace") ||
        begin_ns.allocate(num_workers * sizeof(u64), "trace"))
      return 1;
    for (const Instance& i : instances) {
      for (Kernel kernel : {i.kernel, i.traced}) {
        if (check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(max_shared_bytes)),
                  "shared memory"))
          return 1;
      }
    }
    return 0;
  }

  u64 workspace_bytes() const override { return workspace.bytes() + report.bytes() + records.bytes(); }
  const char* kernel_name() const override { return instance_for(config.max_tokens).name; }

  int launch(const FlashmoeInput& input, Stream stream) override {
    const u32 num_tokens = input.num_tokens[0];
    if (num_tokens == 0) return 0;
    const Instance& chosen = instance_for(num_tokens);
    Params p{};
    p.tiling = tiling;
    p.queue = static_cast<QueueKind>(config.queue);
    p.order = static_cast<Order>(config.order);
    p.layout = layout;
    p.workspace = workspace.as<>();
    p.x = input.x_device[0];
    p.out = input.out_device[0];
    p.gate = weights.gate_device;
    p.gate_up = weights.gate_up_device;
    p.down = weights.down_device;
    p.given_idx = input.topk_idx_device[0];
    p.given_weights = input.topk_weights_device[0];
    p.replay_offset = input.replay_offset_device[0];
    p.replay_ids = input.replay_ids_device[0];
    p.replay_digest = input.replay_digest[0];
    p.num_tokens = num_tokens;
    p.num_workers = num_workers;
    p.num_domains = config.num_domains;
    p.deadline_ns = config.deadline_ns;
    p.fault = fault();
    p.records = records.as<TraceRecord>();
    p.begin_ns = begin_ns.as<u64>();
    p.trace_capacity = config.trace_capacity;
    // More bytes in flight than the memory needs only queue in front of everything else.
    p.ring_slots = chosen.words ? 3 : 4;
    const u32 shared_bytes =
        SharedLayout::of(tiling, num_tokens, p.ring_slots, chosen.columns, chosen.words).bytes;
    if (shared_bytes > max_shared_bytes)
      return fail("%u tokens need %u bytes of shared memory (the card has %u)", num_tokens, shared_bytes,
                  max_shared_bytes);
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(num_workers);
    launch.blockDim = dim3(num_threads);
    launch.dynamicSmemBytes = shared_bytes;
    launch.stream = stream;
    launch.attrs = &overlap;
    launch.numAttrs = 1;
    return check(cudaLaunchKernelEx(&launch, config.trace_capacity > 0 ? chosen.traced : chosen.kernel, p),
                 "launch");
  }

  FaultReport* fault() const override { return report.as<FaultReport>(); }
  int reset() override { return workspace.zero("workspace"); }

  int routing(u32, std::int32_t* topk_idx, float* topk_weights) const override {
    const u64 pairs = u64{last_num_tokens[0]} * top_k;
    return flashmoe_copy(topk_idx, workspace.as<>() + layout.topk_idx, pairs * 4) ||
           flashmoe_copy(topk_weights, workspace.as<>() + layout.topk_weights, pairs * 4);
  }

  int trace(u32, u32 worker, TraceRecord* mine, u32* size, u32* drops) const override {
    const u32 capacity = config.trace_capacity;
    std::vector<u64> begin(num_workers);
    if (flashmoe_copy(begin.data(), begin_ns.as<>(), begin.size() * 8)) return 1;
    u64 first = begin[0];
    for (u64 b : begin) first = b < first ? b : first;
    if (flashmoe_copy(mine, records.as<TraceRecord>() + u64{worker} * capacity,
                      u64{capacity} * sizeof(TraceRecord)))
      return 1;
    *size = *drops = 0;
    while (*size < capacity && mine[*size].start_ns >= begin[worker]) mine[(*size)++].start_ns -= first;
    return 0;
  }
};

}  // namespace

int refuse(const FlashmoeConfig& c, const Tiling& t) {
  if (c.num_pes != 1) return fail("%u PEs on one card (the pipelined kernel does 1)", c.num_pes);
  if (c.max_tokens > 1024) return fail("max_tokens=%u (accepted: 0..1024)", c.max_tokens);
  if (static_cast<QueueKind>(c.queue) == QueueKind::push)
    return fail("queue push (the pipelined kernel does ticket, domain, static and replay)");
  if (t.granularity != Granularity::tile || t.down != Down::rows)
    return fail("tiling (the pipelined kernel does granularity 'tile' with down 'rows')");
  if (t.block_tokens != 8 && t.block_tokens != 16 && t.block_tokens != 24)
    return fail("block_tokens=%u (the pipelined kernel does 8, 16 and 24)", t.block_tokens);
  if (t.up_rows % 8 != 0) return fail("up_rows=%u (must be a multiple of 8)", t.up_rows);
  if (t.down_rows % 16 != 0 || t.down_rows > 32) return fail("down_rows=%u (accepted: 16, 32)", t.down_rows);
  return 0;
}

FlashmoeLayer* make_layer() { return new Layer; }

}  // namespace flashmoe::pipeline
