// The runtime's functions. Device memory is the host's.
#include <cuda_runtime.h>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {
const char* launch_error = nullptr;
}

cudaError_t launched(const char* error) {
  launch_error = error;
  return error == nullptr ? cudaSuccess : cudaErrorLaunchFailure;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure && launch_error != nullptr ? launch_error : "out of memory";
}

cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  *pointer = fibers::allocate(bytes);
  return *pointer == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  fibers::release(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, std::size_t bytes) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"fibers", 9, 0, 8, 1 << 20, 227 * 1024, std::size_t{1} << 30};
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

extern "C" void flashmoe_seed(unsigned seed) { fibers::set_seed(seed); }
