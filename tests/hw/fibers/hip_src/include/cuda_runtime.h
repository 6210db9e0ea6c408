// What CUDA adds to C++, and its runtime, as far as the pipelined kernel uses them.
#pragma once
// all of these before __noinline__ becomes a macro
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "fibers.hpp"

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// --- a thread
template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) <= 8 && sizeof(From) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &from, sizeof from);
  To to;
  std::memcpy(&to, &bits, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float value) { return bits_as<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return bits_as<float>(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __expf(float x) { return std::exp(x); }
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
inline unsigned atomicOr(unsigned* word, unsigned bits) {
  const unsigned before = *word;
  *word |= bits;
  return before;
}

// --- a warp
inline void __syncwarp() { fibers::meet_lanes("__syncwarp", 0); }
template <class T>
T __shfl_sync(unsigned, T value, unsigned lane) {
  return bits_as<T>(fibers::meet_lanes("__shfl_sync", bits_as<std::uint64_t>(value))[lane]);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  const unsigned lane = threadIdx.x % 32;
  return bits_as<T>(fibers::meet_lanes("__shfl_xor_sync", bits_as<std::uint64_t>(value))[lane ^ mask]);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
  const unsigned lane = threadIdx.x % 32;
  const auto* all = fibers::meet_lanes("__shfl_up_sync", bits_as<std::uint64_t>(value));
  return bits_as<T>(all[lane >= step ? lane - step : lane]);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned step) {
  const unsigned lane = threadIdx.x % 32;
  const auto* all = fibers::meet_lanes("__shfl_down_sync", bits_as<std::uint64_t>(value));
  return bits_as<T>(all[lane + step < 32 ? lane + step : lane]);
}
inline unsigned __ballot_sync(unsigned, bool condition) {
  const auto* all = fibers::meet_lanes("__ballot_sync", condition);
  unsigned ballot = 0;
  for (unsigned i = 0; i < 32; ++i) ballot |= static_cast<unsigned>(all[i]) << i;
  return ballot;
}
inline bool __all_sync(unsigned mask, bool condition) { return __ballot_sync(mask, condition) == ~0u; }
inline bool __any_sync(unsigned mask, bool condition) { return __ballot_sync(mask, condition) != 0; }
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const auto* all = fibers::meet_lanes("__reduce_max_sync", value);
  return static_cast<unsigned>(*std::max_element(all, all + 32));
}
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  const auto* all = fibers::meet_lanes("__reduce_add_sync", value);
  return std::accumulate(all, all + 32, 0u,
                         [](unsigned sum, auto x) { return sum + static_cast<unsigned>(x); });
}
inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  const auto* all = fibers::meet_lanes("__reduce_or_sync", value);
  return std::accumulate(all, all + 32, 0u,
                         [](unsigned bits, auto x) { return bits | static_cast<unsigned>(x); });
}

// --- a work-group
inline void __syncthreads() { fibers::meet_threads(0, blockDim.x); }

// --- the runtime: everything is done at once, so there is nothing to wait for
enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation, cudaErrorLaunchFailure };
using cudaStream_t = struct CUstream_st*;
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount, l2CacheSize;
  std::size_t sharedMemPerBlockOptin, totalGlobalMem;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

//! Keeps the text for cudaGetErrorString; nullptr: all went well.
cudaError_t launched(const char* error);
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  return launched(fibers::launch(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
                                 [&] { kernel(arguments...); }));
}
//! kernel<<<blocks, threads>>>(arguments), of a kernel whose threads never meet: one after the other.
template <class... Parameters, class... Arguments>
void launch_apart(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, int, cudaStream_t,
                  const Arguments&... arguments) {
  gridDim.x = blocks;
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(arguments...);
}

cudaError_t cudaMalloc(void** pointer, std::size_t bytes);
cudaError_t cudaFree(void* pointer);
cudaError_t cudaMemset(void* to, int value, std::size_t bytes);
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
