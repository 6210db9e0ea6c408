// Marks functions: FLASHMOE_FN runs on the host and on the device, FLASHMOE_DEVICE on the device alone.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
  #define FLASHMOE_FN __host__ __device__ inline
  #define FLASHMOE_DEVICE __device__ inline __attribute__((always_inline))
#else
  #define FLASHMOE_FN inline
#endif
