// The device library for CUDA: memory, packing, launches. See api.h.
#include <cuda_runtime.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <vector>

#include "api.h"
#include "pack.cuh"
#include "pipeline/kernel.cuh"

namespace {

using namespace flashmoe;
using pipeline::Params;

char error_text[512];

int fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error_text, sizeof error_text, format, arguments);
  va_end(arguments);
  return 1;
}
int check(cudaError_t status, const char* what) {
  return status == cudaSuccess ? 0 : fail("%s: %s", what, cudaGetErrorString(status));
}

Shape built_shape(u32 num_pes) {
  return Shape{pipeline::d_model, pipeline::d_ff, pipeline::num_experts,
               pipeline::top_k,   num_pes,        pipeline::norm_topk ? 1u : 0u,
               DType::bf16};
}

using Kernel = void (*)(Params);
struct Instance {
  Kernel kernel, traced;
  u32 groups;  // of 8 tokens in a block
  pipeline::Mode mode;
  const char* name;
};
template <u32 groups, pipeline::Mode mode>
Instance instance(const char* name) {
  return Instance{pipeline::moe_layer<groups, mode, false>, pipeline::moe_layer<groups, mode, true>, groups,
                  mode, name};
}
// The first that fits is taken.
const Instance instances[] = {
    instance<1, pipeline::Mode::words>("pipeline, words"),
    instance<2, pipeline::Mode::rows>("pipeline, rows, blocks of 16"),
    instance<4, pipeline::Mode::rows>("pipeline, rows, blocks of 32"),
    instance<2, pipeline::Mode::tiles>("pipeline, tiles, blocks of 16"),
    instance<4, pipeline::Mode::tiles>("pipeline, tiles, blocks of 32"),
    instance<8, pipeline::Mode::tiles>("pipeline, tiles, blocks of 64"),
};

}  // namespace

struct FlashmoeLayer {
  FlashmoeConfig config;
  FlashmoeWeights weights;
  Tiling tiling;
  pipeline::Layout layout;
  u32 num_workers, max_shared_bytes;
  char* workspace;
  FaultReport* fault;
  TraceRecord* records;
  pipeline::WorkerLog* logs;

  const Instance& instance_for(u32 num_tokens) const {
    const pipeline::Mode mode = pipeline::mode_of(tiling, num_tokens);
    for (const Instance& i : instances)
      if (i.mode == mode && (mode == pipeline::Mode::words || tiling.block_tokens <= 8 * i.groups)) return i;
    return instances[0];  // refused when the layer was made
  }
};

namespace {

// More bytes in flight than the memory needs only queue in front of everything else.
u32 ring_slots(pipeline::Mode mode) { return mode == pipeline::Mode::words ? 3 : 4; }

int refuse(const FlashmoeConfig& c, const Tiling& t) {
  if (c.num_pes != 1) return fail("%u PEs on one card (the pipelined kernel does 1)", c.num_pes);
  if (c.max_tokens > 1024) return fail("max_tokens=%u (accepted: 0..1024)", c.max_tokens);
  if (static_cast<QueueKind>(c.queue) == QueueKind::push)
    return fail("queue push (the pipelined kernel does ticket, domain, static and replay)");
  if (t.granularity != Granularity::tile)
    return fail("granularity 'token' (the pipelined kernel does 'tile')");
  if (t.up_rows % 8 != 0 || t.up_rows > 64) return fail("up_rows=%u (accepted: 8, 16, .. 64)", t.up_rows);
  if (t.down_rows % 16 != 0 || t.down_rows > 128)
    return fail("down_rows=%u (accepted: 16, 32, .. 128)", t.down_rows);
  if (!pipeline::LogTiling::fits(t)) return fail("tiling (the pipelined kernel does powers of two)");
  const u32 most = t.down == Down::rows ? 32 : 64;
  if (t.block_tokens > most) return fail("block_tokens=%u (accepted: 1..%u)", t.block_tokens, most);
  if (t.down == Down::rows && t.groups(built_shape(1)) > 32)
    return fail("experts_per_pick=%u (at most 32 groups of experts)", t.experts_per_pick);
  return 0;
}

}  // namespace

extern "C" {

int flashmoe_abi(void) { return FLASHMOE_ABI; }
const char* flashmoe_error(void) { return error_text; }
void flashmoe_shape(FlashmoeShape* shape) {
  const Shape s = built_shape(1);
  *shape = FlashmoeShape{s.d_model, s.d_ff, s.num_experts, s.top_k, 1, s.norm_topk_prob, 0};
}

int flashmoe_device(FlashmoeDevice* device) {
  int ordinal = 0;
  cudaDeviceProp properties;
  if (check(cudaGetDevice(&ordinal), "no CUDA device")) return 1;
  if (check(cudaGetDeviceProperties(&properties, ordinal), "device properties")) return 1;
  std::memset(device, 0, sizeof *device);
  std::snprintf(device->name, sizeof device->name, "%.63s", properties.name);
  std::snprintf(device->arch, sizeof device->arch, "sm_%d%d", properties.major, properties.minor);
  device->num_cus = static_cast<u32>(properties.multiProcessorCount);
  device->shared_bytes_per_wg = static_cast<u32>(properties.sharedMemPerBlockOptin);
  device->memory_bytes = properties.totalGlobalMem;
  device->l2_bytes = static_cast<u64>(properties.l2CacheSize);
  return 0;
}

uint64_t flashmoe_pack_scratch(void) { return packing::scratch_bytes; }
int flashmoe_pack(void* gate_up_device, void* down_device, void* scratch_device, void* stream) {
  packing::pack(gate_up_device, down_device, scratch_device, static_cast<cudaStream_t>(stream));
  return check(cudaGetLastError(), "packing");
}

void flashmoe_destroy(FlashmoeLayer* layer) {
  if (layer == nullptr) return;
  cudaFree(layer->workspace);
  cudaFree(layer->fault);
  cudaFree(layer->records);
  cudaFree(layer->logs);
  delete layer;
}

int flashmoe_create(const FlashmoeConfig* config, const FlashmoeWeights* weights, FlashmoeLayer** result) {
  const FlashmoeTiling& t = config->tiling;
  const Tiling tiling{static_cast<Granularity>(t.granularity),
                      static_cast<Down>(t.down),
                      t.gate_tokens,
                      t.gate_experts,
                      t.dispatch_tokens,
                      t.up_rows,
                      t.down_rows,
                      t.block_tokens,
                      t.experts_per_pick,
                      t.combine_tokens};
  if (refuse(*config, tiling)) return 1;
  FlashmoeDevice device;
  if (flashmoe_device(&device)) return 1;
  const u32 workers = config->num_workers == 0 ? device.num_cus : config->num_workers;
  if (workers > device.num_cus)
    return fail("%u workers (the card has %u SMs, and all workers must run at once)", workers,
                device.num_cus);
  auto* layer = new FlashmoeLayer{};
  layer->config = *config;
  layer->weights = *weights;
  layer->tiling = tiling;
  layer->num_workers = workers;
  layer->max_shared_bytes = device.shared_bytes_per_wg;
  layer->layout =
      pipeline::Layout::of(built_shape(1), tiling, config->max_tokens, workers, config->num_domains);
  const u64 trace_bytes = u64{workers} * config->trace_capacity * sizeof(TraceRecord);
  if (check(cudaMalloc(reinterpret_cast<void**>(&layer->workspace), layer->layout.bytes), "workspace") ||
      check(cudaMalloc(reinterpret_cast<void**>(&layer->fault), sizeof(FaultReport)), "fault report") ||
      check(cudaMalloc(reinterpret_cast<void**>(&layer->records), trace_bytes + 32), "trace") ||
      check(cudaMalloc(reinterpret_cast<void**>(&layer->logs), workers * sizeof(pipeline::WorkerLog)),
            "trace") ||
      flashmoe_reset(layer)) {
    flashmoe_destroy(layer);
    return 1;
  }
  for (const Instance& i : instances) {
    for (Kernel kernel : {i.kernel, i.traced}) {
      if (check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(device.shared_bytes_per_wg)),
                "shared memory")) {
        flashmoe_destroy(layer);
        return 1;
      }
    }
  }
  *result = layer;
  return 0;
}

uint64_t flashmoe_workspace_bytes(const FlashmoeLayer* layer) {
  return layer->layout.bytes + sizeof(FaultReport) +
         u64{layer->num_workers} * layer->config.trace_capacity * sizeof(TraceRecord);
}
uint32_t flashmoe_num_workers(const FlashmoeLayer* layer) { return layer->num_workers; }
const char* flashmoe_kernel_name(const FlashmoeLayer* layer) {
  return layer->instance_for(layer->config.max_tokens).name;
}

int flashmoe_launch(FlashmoeLayer* layer, const FlashmoeInput* input, void* stream) {
  const u32 num_tokens = input->num_tokens[0];
  if (num_tokens > layer->config.max_tokens)
    return fail("%u tokens (the layer has room for %u)", num_tokens, layer->config.max_tokens);
  if (num_tokens == 0) return 0;
  const Instance& chosen = layer->instance_for(num_tokens);
  Params p{};
  p.cut = pipeline::LogTiling::of(layer->tiling);
  p.queue = static_cast<QueueKind>(layer->config.queue);
  p.order = static_cast<Order>(layer->config.order);
  p.layout = layer->layout;
  p.workspace = layer->workspace;
  p.x = input->x_device[0];
  p.out = input->out_device[0];
  p.gate = layer->weights.gate_device;
  p.gate_up = layer->weights.gate_up_device;
  p.down = layer->weights.down_device;
  p.given_idx = input->topk_idx_device[0];
  p.given_weights = input->topk_weights_device[0];
  p.replay_offset = input->replay_offset_device[0];
  p.replay_ids = input->replay_ids_device[0];
  p.replay_digest = input->replay_digest[0];
  p.num_tokens = num_tokens;
  p.num_workers = layer->num_workers;
  p.num_domains = layer->config.num_domains;
  p.deadline_ns = layer->config.deadline_ns;
  p.fault = layer->fault;
  p.records = layer->records;
  p.logs = layer->logs;
  p.trace_capacity = layer->config.trace_capacity;
  p.ring_slots = ring_slots(chosen.mode);
  const u32 shared_bytes =
      pipeline::SharedLayout::of(layer->tiling, num_tokens, p.ring_slots, chosen.groups, chosen.mode).bytes;
  if (shared_bytes > layer->max_shared_bytes)
    return fail("%u tokens need %u bytes of shared memory (the card has %u)", num_tokens, shared_bytes,
                layer->max_shared_bytes);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(layer->num_workers);
  launch.blockDim = dim3(pipeline::num_threads);
  launch.dynamicSmemBytes = shared_bytes;
  launch.stream = static_cast<cudaStream_t>(stream);
  launch.attrs = &overlap;
  launch.numAttrs = 1;
  return check(
      cudaLaunchKernelEx(&launch, layer->config.trace_capacity > 0 ? chosen.traced : chosen.kernel, p),
      "launch");
}

int flashmoe_fault(FlashmoeLayer* layer, FlashmoeFault* result) {
  FaultReport f{};
  if (flashmoe_copy(&f, layer->fault, sizeof f)) return 1;
  *result = FlashmoeFault{static_cast<u32>(f.kind),
                          f.pe,
                          f.worker,
                          f.task_id,
                          f.epoch,
                          static_cast<u32>(f.missing.event),
                          f.missing.index,
                          f.missing.src,
                          f.missing.seen,
                          f.missing.wanted,
                          f.waited_ns};
  return 0;
}

int flashmoe_reset(FlashmoeLayer* layer) {
  if (check(cudaDeviceSynchronize(), "launches before the reset")) return 1;
  return check(cudaMemset(layer->workspace, 0, layer->layout.bytes), "workspace") ||
         check(cudaMemset(layer->fault, 0, sizeof(FaultReport)), "fault report") || flashmoe_synchronize();
}

int flashmoe_routing(FlashmoeLayer* layer, uint32_t pe, int32_t* topk_idx, float* topk_weights) {
  if (pe != 0) return fail("PE %u (there is 1)", pe);
  const u64 pairs = u64{layer->config.max_tokens} * pipeline::top_k;
  return flashmoe_copy(topk_idx, layer->workspace + layer->layout.topk_idx, pairs * 4) ||
         flashmoe_copy(topk_weights, layer->workspace + layer->layout.topk_weights, pairs * 4);
}

int flashmoe_trace(FlashmoeLayer* layer, uint32_t pe, uint32_t worker, void* records, uint32_t* size,
                   uint32_t* drops) {
  if (pe != 0 || worker >= layer->num_workers) return fail("PE %u worker %u", pe, worker);
  const u32 capacity = layer->config.trace_capacity;
  std::vector<pipeline::WorkerLog> logs(layer->num_workers);
  if (flashmoe_copy(logs.data(), layer->logs, logs.size() * sizeof logs[0])) return 1;
  u64 first = logs[0].begin_ns;
  for (const pipeline::WorkerLog& log : logs) first = log.begin_ns < first ? log.begin_ns : first;
  auto* mine = static_cast<TraceRecord*>(records);
  if (flashmoe_copy(mine, layer->records + u64{worker} * capacity, u64{capacity} * sizeof(TraceRecord)))
    return 1;
  const u32 tasks = static_cast<u32>(logs[worker].num_tasks);
  *size = tasks < capacity ? tasks : capacity;
  *drops = tasks - *size;
  for (u32 i = 0; i < *size; ++i) mine[i].start_ns -= first;
  return 0;
}

int flashmoe_malloc(void** pointer_device, uint64_t bytes) {
  return check(cudaMalloc(pointer_device, bytes == 0 ? 1 : bytes), "device memory");
}
int flashmoe_free(void* pointer_device) { return check(cudaFree(pointer_device), "free"); }
int flashmoe_copy(void* to, const void* from, uint64_t bytes) {
  return bytes == 0 ? 0 : check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "copy");
}
int flashmoe_synchronize(void) { return check(cudaDeviceSynchronize(), "synchronise"); }

}  // extern "C"
