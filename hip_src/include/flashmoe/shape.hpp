// What a layer is (Shape) and how it is cut into tasks (Tiling).
#pragma once
#include <cstdint>

#include "flashmoe/macros.hpp"

namespace flashmoe {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

FLASHMOE_FN constexpr u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }

enum class DType : u32 { bf16 = 0, f32 = 1 };
enum class Granularity : u32 { tile = 0, token = 1 };
enum class Down : u32 { tile = 0, rows = 1 };

struct Shape {
  u32 d_model, d_ff, num_experts, top_k, num_pes;
  u32 norm_topk_prob;
  DType dtype;

  FLASHMOE_FN u32 element_bytes() const { return dtype == DType::bf16 ? 2 : 4; }
  //! Experts are assigned linearly; num_experts is a multiple of num_pes.
  FLASHMOE_FN u32 experts_per_pe() const { return num_experts / num_pes; }
  FLASHMOE_FN u32 owner(u32 expert) const { return expert / experts_per_pe(); }
};

struct Tiling {
  Granularity granularity;
  Down down;
  u32 gate_tokens;       // tokens per gate and route task
  u32 gate_experts;      // router rows per gate task
  u32 dispatch_tokens;   // tokens per dispatch task; divides gate_tokens
  u32 up_rows;           // gate/up row pairs per up task
  u32 down_rows;         // rows of the output per down task
  u32 block_tokens;      // most tokens of one expert in an up or down task
  u32 experts_per_pick;  // down="rows": experts that one pick adds up; 0 = all of the PE
  u32 combine_tokens;    // tokens per combine task

  FLASHMOE_FN u32 gate_tiles(const Shape& s) const { return ceil_div(s.num_experts, gate_experts); }
  FLASHMOE_FN u32 up_tiles(const Shape& s) const { return ceil_div(s.d_ff, up_rows); }
  FLASHMOE_FN u32 down_tiles(const Shape& s) const { return ceil_div(s.d_model, down_rows); }
  FLASHMOE_FN u32 route_blocks(u32 num_tokens) const { return ceil_div(num_tokens, gate_tokens); }
  //! At least one: a PE without tokens announces that, too.
  FLASHMOE_FN u32 dispatch_blocks(u32 num_tokens) const {
    return num_tokens == 0 ? 1 : ceil_div(num_tokens, dispatch_tokens);
  }
  //! down="rows": groups of experts whose sums are kept apart.
  FLASHMOE_FN u32 groups(const Shape& s) const {
    return experts_per_pick == 0 ? 1 : ceil_div(s.experts_per_pe(), experts_per_pick);
  }
  FLASHMOE_FN u32 group_first_expert(const Shape& s, u32 group) const {
    const u32 first = experts_per_pick == 0 ? group * s.experts_per_pe() : group * experts_per_pick;
    return first < s.experts_per_pe() ? first : s.experts_per_pe();
  }
  FLASHMOE_FN u32 group_of(u32 local_expert) const {
    return experts_per_pick == 0 ? 0 : local_expert / experts_per_pick;
  }
  //! Rows that a token gets back: one a top-k slot, or one a group of experts that were added up already.
  FLASHMOE_FN u32 result_slots(const Shape& s) const {
    return down == Down::rows ? s.num_pes * groups(s) : s.top_k;
  }
  //! A single, finished row is written straight to the output.
  FLASHMOE_FN bool has_combine(const Shape& s) const { return down == Down::tile || result_slots(s) > 1; }
};

}  // namespace flashmoe
