// Stands in for libamdhip64 where there is no AMD GPU: device memory is the host's; code and launches are
// handed to whoever called emulator_listen. One device of one CU, everything in order.
#include <hip/hip_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

namespace {

//! A bundle of code objects. module: names it from now on.
using OnLoad = void (*)(const void* module, const char* bundle, size_t bytes);
//! sizes: work-groups by x, y, z, then threads of one. Gives 0, or 1 when the kernel could not be run.
using OnLaunch = int (*)(const void* module, const char* kernel, const unsigned sizes[6], void** arguments,
                         size_t lds_bytes);

OnLoad on_load;
OnLaunch on_launch;
struct Kernel {
  const void* module;
  std::string name;
};
std::map<const void*, Kernel> kernels;  // by the host's function that stands for one
struct {
  dim3 grid, block;
  size_t lds_bytes;
  hipStream_t stream;
} pushed;

hipError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t lds_bytes) {
  const auto kernel = kernels.find(function);
  if (kernel == kernels.end() || on_launch == nullptr) return hipErrorInvalidDeviceFunction;
  const unsigned sizes[6] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  const Kernel& k = kernel->second;
  return on_launch(k.module, k.name.c_str(), sizes, arguments, lds_bytes) == 0 ? hipSuccess
                                                                               : hipErrorLaunchFailure;
}

}  // namespace

extern "C" {

void emulator_listen(OnLoad load, OnLaunch launch) {
  on_load = load;
  on_launch = launch;
}

// --- what compiled code calls of its own accord
void** __hipRegisterFatBinary(const void* wrapper) {
  const char* bundle = *reinterpret_cast<const char* const*>(static_cast<const char*>(wrapper) + 8);
  // after 24 letters the number of entries; each is offset, size, length of its name, and the name
  const auto number = [bundle](size_t place) {
    std::uint64_t value;
    std::memcpy(&value, bundle + place, 8);
    return value;
  };
  size_t bytes = 0, place = 32;
  for (std::uint64_t entry = 0; entry < number(24); ++entry) {
    bytes = std::max<size_t>(bytes, number(place) + number(place + 8));
    place += 24 + number(place + 16);
  }
  on_load(bundle, bundle, bytes);
  return reinterpret_cast<void**>(const_cast<char*>(bundle));
}
void __hipUnregisterFatBinary(void**) {}
void __hipRegisterFunction(void** module, const void* function, char*, const char* kernel, unsigned, void*,
                           void*, void*, void*, int*) {
  kernels[function] = {module, kernel};
}
hipError_t __hipPushCallConfiguration(dim3 grid, dim3 block, size_t lds_bytes, hipStream_t stream) {
  pushed = {grid, block, lds_bytes, stream};
  return hipSuccess;
}
hipError_t __hipPopCallConfiguration(dim3* grid, dim3* block, size_t* lds_bytes, hipStream_t* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *lds_bytes = pushed.lds_bytes;
  *stream = pushed.stream;
  return hipSuccess;
}

// --- launches
hipError_t hipLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t lds_bytes,
                           hipStream_t) {
  return launch(function, grid, block, arguments, lds_bytes);
}
hipError_t hipLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                                      unsigned lds_bytes, hipStream_t) {
  return launch(function, grid, block, arguments, lds_bytes);
}
hipError_t hipFuncSetAttribute(const void*, hipFuncAttribute, int) { return hipSuccess; }
hipError_t hipOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return hipSuccess;
}

// --- memory; what a kernel reads before it is written shall not be zero by chance
hipError_t hipMalloc(void** pointer, size_t bytes) {
  if (posix_memalign(pointer, 4096, bytes) != 0) return hipErrorOutOfMemory;
  std::memset(*pointer, 0xAB, bytes);
  return hipSuccess;
}
hipError_t hipExtMallocWithFlags(void** pointer, size_t bytes, unsigned) { return hipMalloc(pointer, bytes); }
hipError_t hipFree(void* pointer) {
  std::free(pointer);
  return hipSuccess;
}
hipError_t hipMemcpy(void* to, const void* from, size_t bytes, hipMemcpyKind) {
  std::memcpy(to, from, bytes);
  return hipSuccess;
}
hipError_t hipMemcpyAsync(void* to, const void* from, size_t bytes, hipMemcpyKind kind, hipStream_t) {
  return hipMemcpy(to, from, bytes, kind);
}
hipError_t hipMemset(void* to, int value, size_t bytes) {
  std::memset(to, value, bytes);
  return hipSuccess;
}
hipError_t hipMemsetAsync(void* to, int value, size_t bytes, hipStream_t) {
  return hipMemset(to, value, bytes);
}

// --- the device
hipError_t hipGetDevice(int* device) {
  *device = 0;
  return hipSuccess;
}
hipError_t hipGetDeviceCount(int* count) {
  *count = 1;
  return hipSuccess;
}
hipError_t hipSetDevice(int) { return hipSuccess; }
hipError_t hipGetDeviceProperties(hipDeviceProp_t* properties, int) {
  std::memset(properties, 0, sizeof *properties);
  std::snprintf(properties->name, sizeof properties->name, "emulated MI300X");
  std::snprintf(properties->gcnArchName, sizeof properties->gcnArchName, "gfx942:sramecc+:xnack-");
  properties->multiProcessorCount = 1;
  properties->sharedMemPerBlock = 65536;
  properties->totalGlobalMem = size_t{1} << 30;
  properties->l2CacheSize = 4 << 20;
  properties->warpSize = 64;
  return hipSuccess;
}
hipError_t hipDeviceGetAttribute(int* value, hipDeviceAttribute_t attribute, int) {
  if (attribute == hipDeviceAttributeMultiprocessorCount)
    *value = 1;
  else if (attribute == hipDeviceAttributeMaxSharedMemoryPerBlock)
    *value = 65536;
  else
    return hipErrorInvalidValue;
  return hipSuccess;
}
hipError_t hipDeviceSynchronize() { return hipSuccess; }
hipError_t hipStreamSynchronize(hipStream_t) { return hipSuccess; }
hipError_t hipGetLastError() { return hipSuccess; }
hipError_t hipPeekAtLastError() { return hipSuccess; }
const char* hipGetErrorString(hipError_t error) {
  return error == hipSuccess ? "no error" : "error of the stand-in";
}

}  // extern "C"
