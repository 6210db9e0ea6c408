/* What a device library offers, in plain C: built for one layer shape by nvcc or clang, loaded at run time.
 *
 * All functions that return int give 0, or an error whose text flashmoe_error() has. Pointers named *_device
 * are device memory. No function synchronises but those that say so; `stream` is a cudaStream_t or
 * hipStream_t. Field for field in flashmoe/hw/library.py. */
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLASHMOE_ABI 1
#define FLASHMOE_MAX_PES 8

/* Shape, as built in. Enumerations as in flashmoe/shape.hpp and flashmoe/policy.hpp. */
typedef struct {
  uint32_t d_model, d_ff, num_experts, top_k, num_pes, norm_topk_prob, dtype;
} FlashmoeShape;

typedef struct {
  uint32_t granularity, down, gate_tokens, gate_experts, dispatch_tokens, up_rows, down_rows, block_tokens,
      experts_per_pick, combine_tokens;
} FlashmoeTiling;

typedef struct {
  uint32_t num_pes, max_tokens; /* PEs that share the card; tokens per PE */
  FlashmoeTiling tiling;
  uint32_t queue, order, look_ahead; /* QueueKind, Order */
  uint32_t num_workers, num_domains; /* workers per PE; 0: all that the card has */
  uint32_t trace_capacity;           /* records per worker; 0: the kernel without trace points */
  uint32_t kernel;      /* 0: the best that can; 1: the general one; 2: the pipelined one, or an error */
  uint64_t deadline_ns; /* of a single wait */
} FlashmoeConfig;

/* Weights of all experts, bf16, packed by flashmoe_pack; gate stays as it is: [num_experts][d_model]. */
typedef struct {
  const void* gate_device;
  const void* gate_up_device;
  const void* down_device;
} FlashmoeWeights;

/* One launch; one element a PE. topk_* NULL: the gate is inside. replay_*: device memory, queue `replay`
 * only. */
typedef struct {
  const void* x_device[FLASHMOE_MAX_PES];
  void* out_device[FLASHMOE_MAX_PES];
  const int32_t* topk_idx_device[FLASHMOE_MAX_PES];
  const float* topk_weights_device[FLASHMOE_MAX_PES];
  const uint32_t* replay_offset_device[FLASHMOE_MAX_PES];
  const uint32_t* replay_ids_device[FLASHMOE_MAX_PES];
  uint64_t replay_digest[FLASHMOE_MAX_PES];
  uint32_t num_tokens[FLASHMOE_MAX_PES];
} FlashmoeInput;

typedef struct {
  uint32_t kind, pe, worker, task_id, epoch, event, index, src; /* FaultKind, EventKind; none = 0xffffffff */
  uint64_t seen, wanted, waited_ns;
} FlashmoeFault;

typedef struct {
  char name[64];
  char arch[32];
  uint32_t num_cus, shared_bytes_per_wg;
  uint64_t memory_bytes, l2_bytes;
} FlashmoeDevice;

typedef struct FlashmoeLayer FlashmoeLayer;

int flashmoe_abi(void);
const char* flashmoe_error(void);
void flashmoe_shape(FlashmoeShape* shape);
int flashmoe_device(FlashmoeDevice* device); /* the current one */

/* Re-orders the rows of all experts for the matrix instructions, in place; scratch_device:
 * flashmoe_pack_scratch bytes. gate_up: [num_experts][2 d_ff][d_model], gate rows first; down:
 * [num_experts][d_model][d_ff]; bf16. */
uint64_t flashmoe_pack_scratch(void);
int flashmoe_pack(void* gate_up_device, void* down_device, void* scratch_device, void* stream);

/* Allocates the workspace; flashmoe_workspace_bytes says how much. Fails with the reason where the layer
 * cannot be done with this configuration. */
int flashmoe_create(const FlashmoeConfig* config, const FlashmoeWeights* weights, FlashmoeLayer** layer);
void flashmoe_destroy(FlashmoeLayer* layer);
uint64_t flashmoe_workspace_bytes(const FlashmoeLayer* layer);
uint32_t flashmoe_num_workers(const FlashmoeLayer* layer); /* per PE */
const char* flashmoe_kernel_name(
    const FlashmoeLayer* layer); /* of the kernel that a launch of max_tokens uses */

/* Asynchronous; may be captured in a graph. After a fault every launch ends at once until flashmoe_reset. */
int flashmoe_launch(FlashmoeLayer* layer, const FlashmoeInput* input, void* stream);

/* These synchronise the device. fault->kind 0: none. The routing of the last launch: [num_tokens][top_k]. */
int flashmoe_fault(FlashmoeLayer* layer, FlashmoeFault* fault);
int flashmoe_reset(FlashmoeLayer* layer);
int flashmoe_routing(FlashmoeLayer* layer, uint32_t pe, int32_t* topk_idx, float* topk_weights);
/* Copies the records of one worker (32 bytes each, struct TraceRecord) and gives their number and the drops;
 * start_ns counts from *launch_ns, the moment that the first worker of any PE began. */
int flashmoe_trace(FlashmoeLayer* layer, uint32_t pe, uint32_t worker, void* records, uint32_t* size,
                   uint32_t* drops);

/* CUDA only. Asynchronous; may be captured. A kernel that only reads these bytes, a multiple of 16: what a
 * layer's time is held against. flashmoe_read_name: what the variant does; NULL past the last one. */
int flashmoe_read(const void* data_device, uint64_t bytes, uint32_t variant, void* stream);
const char* flashmoe_read_name(uint32_t variant);

/* Device memory without another library. */
int flashmoe_malloc(void** pointer_device, uint64_t bytes);
int flashmoe_free(void* pointer_device);
int flashmoe_copy(void* to, const void* from, uint64_t bytes); /* any direction; synchronises */
int flashmoe_synchronize(void);

#ifdef __cplusplus
}
#endif
