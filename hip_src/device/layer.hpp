// What the host's interface asks of a kernel, and what kernels share on the host.
#pragma once
#include <algorithm>

#include "api.h"
#include "flashmoe/fault.hpp"
#include "flashmoe/layout.hpp"
#include "flashmoe/policy.hpp"
#include "flashmoe/trace.hpp"
#include "runtime.hpp"

namespace flashmoe {

//! Sets the text of flashmoe_error(); returns 1.
int fail(const char* format, ...);
//! 0, or 1 with the runtime's text.
int check(GPU(Error_t) status, const char* what);

//! Device memory that goes with its owner.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() { (void)GPU(Free)(data_); }

  int allocate(u64 bytes, const char* what) {
    bytes_ = bytes;
    return check(GPU(Malloc)(&data_, bytes == 0 ? 1 : bytes), what);
  }
  int zero(const char* what) { return check(GPU(Memset)(data_, 0, bytes_), what); }
  u64 bytes() const { return bytes_; }
  template <class T = char>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  u64 bytes_ = 0;
};

//! The trace of worker `index` of `num_workers` in all, as flashmoe_trace gives it. A record's start is the
//! device's clock.
int read_trace(const TraceSummary* summaries_device, const TraceRecord* records_device, u64 num_workers,
               u64 index, u32 capacity, TraceRecord* records, u32* size, u32* drops);

//! Re-orders the weights for the matrix instruction, as flashmoe_pack says.
u64 pack_scratch_bytes();
void pack(void* gate_up, void* down, void* scratch, Stream stream);

}  // namespace flashmoe

//! One layer on one kernel. Functions as in api.h.
struct FlashmoeLayer {
  FlashmoeConfig config;
  FlashmoeWeights weights;
  flashmoe::Tiling tiling;
  flashmoe::u32 num_workers;                             // per PE
  flashmoe::u32 last_num_tokens[FLASHMOE_MAX_PES] = {};  // of the last launch

  virtual ~FlashmoeLayer() = default;
  //! Allocates, for a configuration that was not refused.
  virtual int create(const FlashmoeDevice& device) = 0;
  virtual flashmoe::u64 workspace_bytes() const = 0;
  virtual const char* kernel_name() const = 0;
  virtual int launch(const FlashmoeInput& input, flashmoe::Stream stream) = 0;
  virtual flashmoe::FaultReport* fault() const = 0;
  virtual int reset() = 0;
  virtual int routing(flashmoe::u32 pe, std::int32_t* topk_idx, float* topk_weights) const = 0;
  virtual int trace(flashmoe::u32 pe, flashmoe::u32 worker, flashmoe::TraceRecord* records,
                    flashmoe::u32* size, flashmoe::u32* drops) const = 0;
};

namespace flashmoe {

//! The kernels: `refuse` gives 1, with the reason, for what a kernel cannot do.
namespace general {
int refuse(const FlashmoeConfig& config, const Tiling& tiling);
FlashmoeLayer* make_layer();
}  // namespace general

namespace pipeline {
#if defined(__HIP__)
inline int refuse(const FlashmoeConfig&, const Tiling&) {
  return fail("kernel=2 (the pipelined kernel is for sm_90)");
}
inline FlashmoeLayer* make_layer() { return nullptr; }
#else
int refuse(const FlashmoeConfig& config, const Tiling& tiling);
FlashmoeLayer* make_layer();
#endif
}  // namespace pipeline

}  // namespace flashmoe
