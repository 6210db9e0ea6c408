// Kernels that only read: the best of them says what the memory gives for so many bytes.
#include "layer.hpp"
#include "pipeline/sm90.cuh"

namespace {

using namespace flashmoe;

// Never written, which the compiler cannot know: else it would drop the loads.
__device__ u32 sink;

__device__ __forceinline__ u32 folded(uint4 v) { return v.x ^ v.y ^ v.z ^ v.w; }

//! Every thread has `unroll` loads of 16 bytes under way; the bounds leave it the registers for them.
template <u32 unroll, u32 wgs_per_cu, u32 threads>
__global__ void __launch_bounds__(threads, wgs_per_cu) read_by_loads(const uint4* data, u64 size) {
  const u64 step = u64{gridDim.x} * blockDim.x;
  u64 i = u64{blockIdx.x} * blockDim.x + threadIdx.x;
  u32 all = 0;
  for (; i + (unroll - 1) * step < size; i += unroll * step) {
    uint4 v[unroll];
#pragma unroll
    for (u32 u = 0; u < unroll; ++u) v[u] = __ldcs(data + i + u * step);
#pragma unroll
    for (u32 u = 0; u < unroll; ++u) all ^= folded(v[u]);
  }
  for (; i < size; i += step) all ^= folded(__ldcs(data + i));
  if (all == 0x5eedu) sink = all;
}

constexpr u32 slot_bytes = 24 * 1024;

//! One thread a work-group keeps a ring of bulk copies under way.
template <u32 num_slots>
__global__ void __launch_bounds__(32) read_by_copies(const char* data, u64 bytes) {
  extern __shared__ __align__(128) char ring[];
  __shared__ u64 full[num_slots];
  if (threadIdx.x != 0) return;
  for (u32 slot = 0; slot < num_slots; ++slot) sm90::barrier_init(sm90::shared_address(full + slot), 1);
  sm90::barriers_initialised();
  const u64 policy = sm90::evict_first_policy();
  const u64 step = u64{gridDim.x} * slot_bytes;
  const auto copy = [&](u64 from, u32 slot) {
    const u32 size = static_cast<u32>(bytes - from < slot_bytes ? bytes - from : slot_bytes);
    const u32 barrier = sm90::shared_address(full + slot);
    sm90::arrive_and_expect(barrier, size);
    sm90::bulk_copy(sm90::shared_address(ring) + slot * slot_bytes, data + from, size, barrier, policy);
  };
  u64 next = u64{blockIdx.x} * slot_bytes;
  for (u32 slot = 0; slot < num_slots && next < bytes; ++slot, next += step) copy(next, slot);
  u32 slot = 0, parity = 0;
  for (u64 from = u64{blockIdx.x} * slot_bytes; from < bytes; from += step) {
    // The copy engine alone ends this wait, so nobody can be late: no deadline.
    while (!sm90::phase_is_over(sm90::shared_address(full + slot), parity)) {
    }
    if (next < bytes) {
      copy(next, slot);
      next += step;
    }
    if (++slot == num_slots) {
      slot = 0;
      parity ^= 1;
    }
  }
}

template <u32 unroll, u32 wgs_per_cu, u32 threads>
void launch_loads(const void* data, u64 bytes, u32 num_cus, cudaStream_t stream) {
  read_by_loads<unroll, wgs_per_cu, threads>
      <<<num_cus * wgs_per_cu, threads, 0, stream>>>(static_cast<const uint4*>(data), bytes / sizeof(uint4));
}

template <u32 num_slots>
void launch_copies(const void* data, u64 bytes, u32 num_cus, cudaStream_t stream) {
  constexpr u32 ring_bytes = num_slots * slot_bytes;
  cudaFuncSetAttribute(read_by_copies<num_slots>, cudaFuncAttributeMaxDynamicSharedMemorySize, ring_bytes);
  read_by_copies<num_slots><<<num_cus, 32, ring_bytes, stream>>>(static_cast<const char*>(data), bytes);
}

struct Variant {
  const char* name;
  void (*launch)(const void* data, u64 bytes, u32 num_cus, cudaStream_t stream);
};
const Variant variants[] = {
    {"loads, 4 a thread, 2 x 1024 threads an SM", launch_loads<4, 2, 1024>},
    {"loads, 4 a thread, 8 x 256 threads an SM", launch_loads<4, 8, 256>},
    {"loads, 8 a thread, 1 x 1024 threads an SM", launch_loads<8, 1, 1024>},
    {"loads, 8 a thread, 4 x 256 threads an SM", launch_loads<8, 4, 256>},
    {"loads, 16 a thread, 2 x 256 threads an SM", launch_loads<16, 2, 256>},
    {"bulk copies, 2 x 24 KB an SM", launch_copies<2>},
    {"bulk copies, 3 x 24 KB an SM", launch_copies<3>},
    {"bulk copies, 4 x 24 KB an SM", launch_copies<4>},
    {"bulk copies, 8 x 24 KB an SM", launch_copies<8>},
};
constexpr u32 num_variants = sizeof variants / sizeof variants[0];

}  // namespace

extern "C" {

const char* flashmoe_read_name(uint32_t variant) {
  return variant < num_variants ? variants[variant].name : nullptr;
}

int flashmoe_read(const void* data_device, uint64_t bytes, uint32_t variant, void* stream) {
  if (variant >= num_variants) return fail("variant=%u (accepted: 0..%u)", variant, num_variants - 1);
  if (bytes % sizeof(uint4) != 0)
    return fail("bytes=%llu (must be a multiple of 16)", static_cast<unsigned long long>(bytes));
  int device = 0, num_cus = 0;
  if (check(cudaGetDevice(&device), "no CUDA device")) return 1;
  if (check(cudaDeviceGetAttribute(&num_cus, cudaDevAttrMultiProcessorCount, device), "device properties"))
    return 1;
  variants[variant].launch(data_device, bytes, static_cast<u32>(num_cus), static_cast<cudaStream_t>(stream));
  return check(cudaGetLastError(), "read");
}

}  // extern "C"
