// The text of the last error, for flashmoe_error().
#pragma once
#include <cuda_runtime.h>

namespace flashmoe {

//! Keeps the text; returns 1, for `return fail(...)`.
int fail(const char* format, ...);

inline int check(cudaError_t status, const char* what) {
  return status == cudaSuccess ? 0 : fail("%s: %s", what, cudaGetErrorString(status));
}

}  // namespace flashmoe
