// The pipelined kernel: launches of its instances.
#include "layer.hpp"
#include "pipeline.hpp"
#include "pipeline/sm90.cuh"

namespace flashmoe::pipeline {

namespace {

Instances instances_of(Mode mode, QueueKind queue) {
  const bool is_pushed = queue == QueueKind::push;
  if (mode == Mode::words) return is_pushed ? pushed_words() : words();
  if (mode == Mode::rows) return is_pushed ? pushed_rows() : rows();
  return is_pushed ? pushed_tiles() : tiles();
}

//! The first that fits is taken.
const Instance& instance_for(const Tiling& tiling, u32 num_tokens, QueueKind queue) {
  const Mode mode = mode_of(tiling, num_tokens);
  const Instances instances = instances_of(mode, queue);
  for (u32 i = 0; i < instances.size; ++i)
    if (mode == Mode::words || tiling.block_tokens <= 8 * instances.first[i].groups)
      return instances.first[i];
  return instances.first[0];  // refused when the layer was made
}

SharedLayout shared_layout(const Tiling& tiling, u32 num_tokens) {
  const Instance& chosen = instance_for(tiling, num_tokens, QueueKind::ticket);  // of all queues the same
  return SharedLayout::of(tiling, num_tokens, chosen.groups, chosen.mode);
}
constexpr u32 most_shared_bytes = 227 * 1024;  // of a work-group on sm_90

struct Layer : FlashmoeLayer {
  Layout layout;
  sm90::TileMap up_tiles, down_tiles;
  DeviceMemory workspace, report, records, summaries;

  int create(const FlashmoeDevice& device) override {
    num_workers = config.num_workers == 0 ? device.num_cus : config.num_workers;
    if (num_workers > device.num_cus)
      return fail("%u workers (the card has %u SMs, and all workers must run at once)", num_workers,
                  device.num_cus);
    layout = Layout::of(built::shape(1), tiling, config.max_tokens, num_workers, config.num_domains, queue());
    if (workspace.allocate(layout.bytes, "workspace") ||
        report.allocate(sizeof(FaultReport), "fault report") ||
        records.allocate(u64{num_workers} * config.trace_capacity * sizeof(TraceRecord), "trace") ||
        summaries.allocate(num_workers * sizeof(TraceSummary), "trace"))
      return 1;
    const Split up(tiling.up_rows / 8), down(tiling.down_rows / 16);
    for (const char* error :
         {sm90::describe(up_tiles, weights.gate_up_device, chunk_bytes, num_experts * (d_ff / 8),
                         d_model / chunk_k, up.tiles(), up.tile_chunks()),
          sm90::describe(down_tiles, weights.down_device, chunk_bytes, num_experts * (d_model / 16),
                         d_ff / chunk_k, down.tiles(), down.tile_chunks())})
      if (error != nullptr) return fail("%s", error);
    for (Mode mode : {Mode::words, Mode::rows, Mode::tiles}) {
      const Instances instances = instances_of(mode, queue());
      for (u32 i = 0; i < instances.size; ++i) {
        for (Kernel kernel : {instances.first[i].kernel, instances.first[i].traced}) {
          if (check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                         cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(most_shared_bytes)),
                    "shared memory"))
            return 1;
        }
      }
    }
    return 0;
  }

  u64 workspace_bytes() const override { return workspace.bytes() + report.bytes() + records.bytes(); }
  const char* kernel_name() const override { return instance_for(tiling, config.max_tokens, queue()).name; }
  QueueKind queue() const { return static_cast<QueueKind>(config.queue); }

  int launch(const FlashmoeInput& input, Stream stream) override {
    const u32 num_tokens = input.num_tokens[0];
    if (num_tokens == 0) return 0;
    const Instance& chosen = instance_for(tiling, num_tokens, queue());
    Params p{};
    p.up_tiles = up_tiles;
    p.down_tiles = down_tiles;
    p.cut = LogTiling::of(tiling);
    p.queue = queue();
    p.order = static_cast<Order>(config.order);
    p.layout = layout;
    p.at = shared_layout(tiling, num_tokens);
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
    p.summaries = summaries.as<TraceSummary>();
    p.trace_capacity = config.trace_capacity;
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(num_workers);
    launch.blockDim = dim3(num_threads(chosen.mode));
    launch.dynamicSmemBytes = p.at.bytes;
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
    *size = *drops = 0;
    if (last_num_tokens[0] == 0) return 0;  // nothing ran
    return read_trace(summaries.as<TraceSummary>(), records.as<TraceRecord>(), num_workers, worker,
                      config.trace_capacity, mine, size, drops);
  }
};

}  // namespace

int refuse(const FlashmoeConfig& c, const Tiling& t) {
  if (c.num_pes != 1) return fail("%u PEs on one card (the pipelined kernel does 1)", c.num_pes);
  if (t.granularity != Granularity::tile)
    return fail("granularity 'token' (the pipelined kernel does 'tile')");
  if (!LogTiling::fits(t)) return fail("tiling (the pipelined kernel does powers of two)");
  if (t.up_rows < 8 || t.up_rows > 64) return fail("up_rows=%u (the pipelined kernel does 8..64)", t.up_rows);
  if (t.down_rows < 16 || t.down_rows > 128)
    return fail("down_rows=%u (the pipelined kernel does 16..128)", t.down_rows);
  const u32 most_tokens = t.down == Down::rows ? 32 : 64;
  if (t.block_tokens > most_tokens)
    return fail("block_tokens=%u (the pipelined kernel does 1..%u)", t.block_tokens, most_tokens);
  if (t.down == Down::rows && t.groups(built::shape(1)) > 32)
    return fail("experts_per_pick=%u (the pipelined kernel does up to 32 groups)", t.experts_per_pick);
  for (u32 tokens : {c.max_tokens, c.max_tokens < max_words_tokens ? c.max_tokens : max_words_tokens}) {
    const u32 bytes = shared_layout(t, tokens).bytes;
    if (bytes > most_shared_bytes)
      return fail("%u tokens need %u bytes of shared memory (the pipelined kernel has %u)", tokens, bytes,
                  most_shared_bytes);
  }
  return 0;
}

FlashmoeLayer* make_layer() { return new Layer; }

}  // namespace flashmoe::pipeline
