// The device library: memory, packing, layers. See api.h.
#include <cstdarg>
#include <cstring>
#include <memory>
#include <vector>

#include "built_shape.hpp"
#include "layer.hpp"

namespace flashmoe {

namespace {
char error_text[512];
}

int fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error_text, sizeof error_text, format, arguments);
  va_end(arguments);
  return 1;
}
int check(GPU(Error_t) status, const char* what) {
  return status == GPU(Success) ? 0 : fail("%s: %s", what, GPU(GetErrorString)(status));
}

int read_trace(const TraceSummary* summaries_device, const TraceRecord* records_device, u64 num_workers,
               u64 index, u32 capacity, TraceRecord* records, u32* size, u32* drops) {
  std::vector<TraceSummary> all(num_workers);
  if (flashmoe_copy(all.data(), summaries_device, num_workers * sizeof(TraceSummary))) return 1;
  u64 begin_ns = all[0].begin_ns;
  for (const TraceSummary& summary : all) begin_ns = std::min(begin_ns, summary.begin_ns);
  *size = all[index].size;
  *drops = all[index].drops;
  if (flashmoe_copy(records, records_device + index * capacity, *size * sizeof(TraceRecord))) return 1;
  for (u32 i = 0; i < *size; ++i) records[i].start_ns -= begin_ns;
  return 0;
}

//! 1, with the reason, for what no kernel can do.
static int refuse(const FlashmoeConfig& c, const Tiling& t) {
  if (c.max_tokens > 1024) return fail("max_tokens=%u (accepted: 0..1024)", c.max_tokens);
  if (c.queue > static_cast<u32>(QueueKind::replay)) return fail("queue=%u (accepted: 0..4)", c.queue);
  if (c.order > static_cast<u32>(Order::arrival)) return fail("order=%u (accepted: 0..5)", c.order);
  if (c.look_ahead > max_look_ahead)
    return fail("look_ahead=%u (accepted: 0..%u)", c.look_ahead, max_look_ahead);
  if (c.num_domains < 1) return fail("num_domains=0 (must be at least 1)");
  for (u32 size : {t.gate_tokens, t.gate_experts, t.dispatch_tokens, t.block_tokens, t.combine_tokens})
    if (size == 0) return fail("a size of the tiling is 0 (all but experts_per_pick must be at least 1)");
  if (t.gate_tokens % t.dispatch_tokens != 0)
    return fail("dispatch_tokens=%u (must divide gate_tokens=%u)", t.dispatch_tokens, t.gate_tokens);
  return 0;
}

}  // namespace flashmoe

using namespace flashmoe;

extern "C" {

int flashmoe_abi(void) { return FLASHMOE_ABI; }
const char* flashmoe_error(void) { return error_text; }
void flashmoe_shape(FlashmoeShape* shape) {
  const Shape s = built::shape(1);
  *shape = FlashmoeShape{s.d_model, s.d_ff, s.num_experts, s.top_k, 1, s.norm_topk_prob, 0};
}

int flashmoe_device(FlashmoeDevice* device) {
  int ordinal = 0;
  DeviceProperties properties;
  if (check(GPU(GetDevice)(&ordinal), "no GPU")) return 1;
  if (check(GPU(GetDeviceProperties)(&properties, ordinal), "device properties")) return 1;
  std::memset(device, 0, sizeof *device);
  std::snprintf(device->name, sizeof device->name, "%.63s", properties.name);
  print_arch(properties, device->arch, sizeof device->arch);
  device->num_cus = static_cast<u32>(properties.multiProcessorCount);
  device->shared_bytes_per_wg = static_cast<u32>(shared_bytes(properties));
  device->memory_bytes = properties.totalGlobalMem;
  device->l2_bytes = static_cast<u64>(properties.l2CacheSize);
  return 0;
}

uint64_t flashmoe_pack_scratch(void) { return pack_scratch_bytes(); }
int flashmoe_pack(void* gate_up_device, void* down_device, void* scratch_device, void* stream) {
  pack(gate_up_device, down_device, scratch_device, static_cast<Stream>(stream));
  return check(GPU(GetLastError)(), "packing");
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
  enum { best, general_one, pipelined };
  if (config->kernel > pipelined) return fail("kernel=%u (accepted: 0, 1, 2)", config->kernel);
  if (refuse(*config, tiling)) return 1;
  const bool pipeline_can = config->kernel != general_one && pipeline::refuse(*config, tiling) == 0;
  if (!pipeline_can && (config->kernel == pipelined || general::refuse(*config, tiling))) return 1;
  FlashmoeDevice device;
  if (flashmoe_device(&device)) return 1;
  std::unique_ptr<FlashmoeLayer> layer(pipeline_can ? pipeline::make_layer() : general::make_layer());
  layer->config = *config;
  layer->weights = *weights;
  layer->tiling = tiling;
  if (layer->create(device) || flashmoe_reset(layer.get())) return 1;
  *result = layer.release();
  return 0;
}
void flashmoe_destroy(FlashmoeLayer* layer) { delete layer; }

uint64_t flashmoe_workspace_bytes(const FlashmoeLayer* layer) { return layer->workspace_bytes(); }
uint32_t flashmoe_num_workers(const FlashmoeLayer* layer) { return layer->num_workers; }
const char* flashmoe_kernel_name(const FlashmoeLayer* layer) { return layer->kernel_name(); }

int flashmoe_launch(FlashmoeLayer* layer, const FlashmoeInput* input, void* stream) {
  for (u32 pe = 0; pe < layer->config.num_pes; ++pe) {
    if (input->num_tokens[pe] > layer->config.max_tokens)
      return fail("%u tokens (the layer has room for %u)", input->num_tokens[pe], layer->config.max_tokens);
    if ((reinterpret_cast<u64>(input->x_device[pe]) | reinterpret_cast<u64>(input->out_device[pe])) % 16 != 0)
      return fail("PE %u: x or out is not aligned to 16 bytes", pe);
    layer->last_num_tokens[pe] = input->num_tokens[pe];
  }
  return layer->launch(*input, static_cast<Stream>(stream));
}

int flashmoe_fault(FlashmoeLayer* layer, FlashmoeFault* result) {
  FaultReport f{};
  if (flashmoe_copy(&f, layer->fault(), sizeof f)) return 1;
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
  if (check(GPU(DeviceSynchronize)(), "launches before the reset")) return 1;
  return layer->reset() || check(GPU(Memset)(layer->fault(), 0, sizeof(FaultReport)), "fault report") ||
         flashmoe_synchronize();
}

int flashmoe_routing(FlashmoeLayer* layer, uint32_t pe, int32_t* topk_idx, float* topk_weights) {
  if (pe >= layer->config.num_pes) return fail("PE %u (there are %u)", pe, layer->config.num_pes);
  return layer->routing(pe, topk_idx, topk_weights);
}

int flashmoe_trace(FlashmoeLayer* layer, uint32_t pe, uint32_t worker, void* records, uint32_t* size,
                   uint32_t* drops) {
  if (pe >= layer->config.num_pes || worker >= layer->num_workers)
    return fail("PE %u worker %u (there are %u PEs with %u workers)", pe, worker, layer->config.num_pes,
                layer->num_workers);
  return layer->trace(pe, worker, static_cast<TraceRecord*>(records), size, drops);
}

int flashmoe_malloc(void** pointer_device, uint64_t bytes) {
  return check(GPU(Malloc)(pointer_device, bytes == 0 ? 1 : bytes), "device memory");
}
int flashmoe_free(void* pointer_device) { return check(GPU(Free)(pointer_device), "free"); }
int flashmoe_copy(void* to, const void* from, uint64_t bytes) {
  return bytes == 0 ? 0 : check(GPU(Memcpy)(to, from, bytes, GPU(MemcpyDefault)), "copy");
}
int flashmoe_synchronize(void) { return check(GPU(DeviceSynchronize)(), "synchronise"); }

}  // extern "C"
