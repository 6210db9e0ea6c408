// The shape that this library is built for: constants, so that loops unroll and divisions vanish.
#pragma once
#include "flashmoe/shape.hpp"

namespace flashmoe::built {

constexpr u32 d_model = FLASHMOE_D_MODEL, d_ff = FLASHMOE_D_FF, num_experts = FLASHMOE_NUM_EXPERTS,
              top_k = FLASHMOE_TOP_K;
constexpr bool norm_topk = FLASHMOE_NORM_TOPK != 0;

inline Shape shape(u32 num_pes) {
  return Shape{d_model, d_ff, num_experts, top_k, num_pes, norm_topk ? 1u : 0u, DType::bf16};
}

// --- packed weights: row tiles of 16 rows, in chunks of 16 rows x 32 k
constexpr u32 chunk_bytes = 1024, chunk_k = 32;
constexpr u32 up_tile_bytes = 16 * d_model * 2, down_tile_bytes = 16 * d_ff * 2;

}  // namespace flashmoe::built
