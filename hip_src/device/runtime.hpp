// The runtime of CUDA or HIP under one name: GPU(Malloc) is cudaMalloc or hipMalloc.
#pragma once
#include <cstdio>
#include <cstring>

#if defined(__HIP__)
  #include <hip/hip_runtime.h>
  #define GPU(name) hip##name
#else
  #include <cuda_runtime.h>
  #define GPU(name) cuda##name
#endif

namespace flashmoe {

using Stream = GPU(Stream_t);

#if defined(__HIP__)
using DeviceProperties = hipDeviceProp_t;
inline std::size_t shared_bytes(const DeviceProperties& p) { return p.sharedMemPerBlock; }
inline void print_arch(const DeviceProperties& p, char* text, std::size_t size) {
  std::snprintf(text, size, "%.*s", static_cast<int>(std::strcspn(p.gcnArchName, ":")), p.gcnArchName);
}
#else
using DeviceProperties = cudaDeviceProp;
inline std::size_t shared_bytes(const DeviceProperties& p) { return p.sharedMemPerBlockOptin; }
inline void print_arch(const DeviceProperties& p, char* text, std::size_t size) {
  std::snprintf(text, size, "sm_%d%d", p.major, p.minor);
}
#endif

}  // namespace flashmoe
