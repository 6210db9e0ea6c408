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
  auto pack_one = [&](auto kernel, void* matrices, u32 expert, u64 elements, u32 num_rows, u32 k) {
    u16* matrix = static_cast<u16*>(matrices) + expert * elements;
    (void)GPU(MemcpyAsync)(scratch, matrix, elements * 2, GPU(MemcpyDeviceToDevice), stream);
    const u32 blocks = static_cast<u32>(std::min<u64>(elements / 256, 264));
    kernel<<<blocks, 256, 0, stream>>>(static_cast<const u16*>(scratch), matrix, num_rows, k);
  };
  for (u32 expert = 0; expert < built::num_experts; ++expert) {
    pack_one(pack_expert<true>, gate_up, expert, up_elements, 2 * d_ff, d_model);
    pack_one(pack_expert<false>, down, expert, down_elements, d_model, d_ff);
  }
}

}  // namespace flashmoe
