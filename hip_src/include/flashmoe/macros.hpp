// Marks functions that run on the host and on the device.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
  #define FLASHMOE_FN __host__ __device__ inline
#else
  #define FLASHMOE_FN inline
#endif
