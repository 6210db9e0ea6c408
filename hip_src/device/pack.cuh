// Puts the weights of all experts into the order in which the matrix instruction wants them, expert by expert
// and in place: an expert is copied aside, and from there back in the new order.
#pragma once
#include "pipeline/launch.cuh"

namespace flashmoe::packing {

using pipeline::d_ff;
using pipeline::d_model;
using pipeline::num_experts;

constexpr u64 up_elements = u64{2} * d_ff * d_model, down_elements = u64{d_model} * d_ff;
constexpr u64 scratch_bytes = (up_elements > down_elements ? up_elements : down_elements) * 2;

//! Element of a row tile (row < 16, k) in its chunks of 16 x 32; a chunk is two halves of 32 lanes x 8
//! elements.
FLASHMOE_FN u64 place_in_tile(u32 row, u32 k) {
  const u32 in_chunk = k % 32;
  const u32 half = in_chunk / 4 % 2, lane = row % 8 * 4 + in_chunk / 8;
  const u32 element = (in_chunk / 2 % 2 * 2 + row / 8) * 2 + in_chunk % 2;
  return u64{k / 32} * 512 + (half * 32 + lane) * 8 + element;
}

//! One expert's matrix `from` (num_rows x k, row by row) to `to`. interleave: a tile is 8 gate rows, then the
//! 8 up rows of the same hidden units.
template <bool interleave>
__global__ void pack_expert(const u16* from, u16* to, u32 num_rows, u32 k) {
  const u64 count = u64{num_rows} * k;
  for (u64 i = blockIdx.x * u64{blockDim.x} + threadIdx.x; i < count; i += u64{gridDim.x} * blockDim.x) {
    const u32 row = static_cast<u32>(i / k), column = static_cast<u32>(i % k);
    u32 tile = row / 16, in_tile = row % 16;
    if (interleave) {
      const u32 half = num_rows / 2, unit = row % half;
      tile = unit / 8;
      in_tile = unit % 8 + (row >= half ? 8 : 0);
    }
    to[u64{tile} * 16 * k + place_in_tile(in_tile, column)] = from[i];
  }
}

inline void pack(void* gate_up, void* down, void* scratch, cudaStream_t stream) {
  for (u32 expert = 0; expert < num_experts; ++expert) {
    u16* up = static_cast<u16*>(gate_up) + expert * up_elements;
    cudaMemcpyAsync(scratch, up, up_elements * 2, cudaMemcpyDeviceToDevice, stream);
    pack_expert<true><<<264, 256, 0, stream>>>(static_cast<const u16*>(scratch), up, 2 * d_ff, d_model);
    u16* rows = static_cast<u16*>(down) + expert * down_elements;
    cudaMemcpyAsync(scratch, rows, down_elements * 2, cudaMemcpyDeviceToDevice, stream);
    pack_expert<false><<<264, 256, 0, stream>>>(static_cast<const u16*>(scratch), rows, d_model, d_ff);
  }
}

}  // namespace flashmoe::packing
