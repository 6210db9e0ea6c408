#include "device_memory.hpp"

// The kernel is built for one shape; its layout goes by the shape that it is given, so any will do.
#define FLASHMOE_D_MODEL 64
#define FLASHMOE_D_FF 64
#define FLASHMOE_NUM_EXPERTS 1
#define FLASHMOE_TOP_K 1
#define FLASHMOE_NORM_TOPK 0
#include "pipeline/launch.cuh"

using namespace flashmoe;

u64 device_workspace_bytes(const Shape& shape, const Tiling& tiling, u32 max_tokens, u32 num_workers,
                           u32 num_domains) {
  return pipeline::Layout::of(shape, tiling, max_tokens, num_workers, num_domains, QueueKind::ticket).bytes +
         sizeof(FaultReport);
}
