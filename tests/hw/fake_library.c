/* A device library without a device: memory is the host's, a launch copies x to out, and all calls are
 * counted. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api.h"

struct FlashmoeLayer {
  FlashmoeConfig config;
  int fault;
};

#ifndef ARCH
  #define ARCH "sm_90"
#endif

int fake_buffers, fake_layers, fake_packs, fake_mallocs, fake_synchronizes, fake_resets;
int fake_fails; /* the next launch */
/* the last launch */
FlashmoeConfig fake_config;
FlashmoeInput fake_input;
void* fake_stream;
static const char* error_text = "";

static int fail(const char* text) {
  error_text = text;
  return 1;
}

int flashmoe_abi(void) { return FLASHMOE_ABI; }
const char* flashmoe_error(void) { return error_text; }
void flashmoe_shape(FlashmoeShape* shape) {
  FlashmoeShape built = {FLASHMOE_D_MODEL, FLASHMOE_D_FF, FLASHMOE_NUM_EXPERTS, FLASHMOE_TOP_K, 1, 1, 0};
  *shape = built;
}
int flashmoe_device(FlashmoeDevice* device) {
  memset(device, 0, sizeof *device);
  strcpy(device->name, "Fake H200");
  strcpy(device->arch, ARCH);
  device->num_cus = 12;
  return 0;
}

uint64_t flashmoe_pack_scratch(void) { return 16; }
int flashmoe_pack(void* gate_up, void* down, void* scratch, void* stream) {
  (void)scratch, (void)stream;
  ++fake_packs;
  memset(gate_up, 1, 2);
  memset(down, 2, 2);
  return 0;
}

int flashmoe_create(const FlashmoeConfig* config, const FlashmoeWeights* weights, FlashmoeLayer** layer) {
  (void)weights;
  if (config->queue == 0) return fail("queue push (the fake kernel does not)");
  *layer = calloc(1, sizeof **layer);
  (*layer)->config = *config;
  ++fake_layers;
  return 0;
}
void flashmoe_destroy(FlashmoeLayer* layer) {
  --fake_layers;
  free(layer);
}
uint64_t flashmoe_workspace_bytes(const FlashmoeLayer* layer) { return 1000 + layer->config.max_tokens; }
uint32_t flashmoe_num_workers(const FlashmoeLayer* layer) {
  return layer->config.num_workers ? layer->config.num_workers : 12 / layer->config.num_pes;
}
const char* flashmoe_kernel_name(const FlashmoeLayer* layer) {
  (void)layer;
  return "fake";
}

int flashmoe_launch(FlashmoeLayer* layer, const FlashmoeInput* input, void* stream) {
  fake_config = layer->config;
  fake_input = *input;
  fake_stream = stream;
  if (fake_fails) layer->fault = 1;
  fake_fails = 0;
  for (uint32_t pe = 0; pe < layer->config.num_pes && !layer->fault; ++pe)
    memcpy(input->out_device[pe], input->x_device[pe], 2ull * FLASHMOE_D_MODEL * input->num_tokens[pe]);
  return 0;
}
int flashmoe_fault(FlashmoeLayer* layer, FlashmoeFault* fault) {
  FlashmoeFault found = {1, 0, 3, 7, 5, 3, 2, 0xffffffff, 10, 11, 2000000000};
  memset(fault, 0, sizeof *fault);
  if (layer->fault) *fault = found;
  return 0;
}
int flashmoe_reset(FlashmoeLayer* layer) {
  layer->fault = 0;
  ++fake_resets;
  return 0;
}
int flashmoe_routing(FlashmoeLayer* layer, uint32_t pe, int32_t* topk_idx, float* topk_weights) {
  (void)pe;
  for (uint32_t i = 0; i < layer->config.max_tokens * FLASHMOE_TOP_K; ++i) {
    topk_idx[i] = (int32_t)(i % FLASHMOE_TOP_K);
    topk_weights[i] = 1.0f / FLASHMOE_TOP_K;
  }
  return 0;
}
int flashmoe_trace(FlashmoeLayer* layer, uint32_t pe, uint32_t worker, void* records, uint32_t* size,
                   uint32_t* drops) {
  (void)layer, (void)pe, (void)worker, (void)records;
  *size = 0;
  *drops = 1;
  return 0;
}

int flashmoe_malloc(void** pointer, uint64_t bytes) {
  ++fake_buffers;
  ++fake_mallocs;
  *pointer = aligned_alloc(256, (bytes + 256) / 256 * 256);
  return *pointer == NULL ? fail("out of memory") : 0;
}
int flashmoe_free(void* pointer) {
  --fake_buffers;
  free(pointer);
  return 0;
}
int flashmoe_copy(void* to, const void* from, uint64_t bytes) {
  memcpy(to, from, bytes);
  return 0;
}
int flashmoe_synchronize(void) {
  ++fake_synchronizes;
  return 0;
}
