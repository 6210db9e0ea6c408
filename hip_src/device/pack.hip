// Puts the weights of all experts into the order in which the matrix instruction wants them, expert by expert
// and in place: an expert is copied aside, and from there back in the new order.
#include "arch/arch.hpp"
#include "built_shape.hpp"
#include "layer.hpp"

namespace flashmoe {

namespace {

using built::d_ff;
using built::d_model;

constexpr u64 up_elements = u64{2} * d_ff * d_model, down_elements = u64{d_model} * d_ff;

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
    const u64 chunk = u64{tile} * (k / built::chunk_k) + column / built::chunk_k;
    to[chunk * (built::chunk_bytes / 2) + arch::place_in_chunk(in_tile, column % built::chunk_k)] = from[i];
  }
}

}  // namespace

u64 pack_scratch_bytes() { return 2 * std::max(up_elements, down_elements); }

void pack(void* gate_up, void* down, void* scratch, Stream stream) {
  for (u32 expert = 0; expert < built::num_experts; ++expert) {
    u16* up = static_cast<u16*>(gate_up) + expert * up_elements;
    (void)GPU(MemcpyAsync)(scratch, up, up_elements * 2, GPU(MemcpyDeviceToDevice), stream);
    pack_expert<true><<<264, 256, 0, stream>>>(static_cast<const u16*>(scratch), up, 2 * d_ff, d_model);
    u16* rows = static_cast<u16*>(down) + expert * down_elements;
    (void)GPU(MemcpyAsync)(scratch, rows, down_elements * 2, GPU(MemcpyDeviceToDevice), stream);
    pack_expert<false><<<264, 256, 0, stream>>>(static_cast<const u16*>(scratch), rows, d_model, d_ff);
  }
}

}  // namespace flashmoe
