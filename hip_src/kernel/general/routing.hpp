// gate and route: router logits, softmax and top-k.
#pragma once
#include "flashmoe/bf16.hpp"
#include "group.hpp"

namespace flashmoe::general {

FLASHMOE_DEVICE float as_float(u32 bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
FLASHMOE_DEVICE u32 as_bits(float value) {
  u32 bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

//! Over all lanes of a wave, in an order that is always the same.
FLASHMOE_DEVICE float sum_over_wave(float value) {
#pragma unroll
  for (u32 mask = 1; mask < arch::wave_size; mask *= 2)
    value += as_float(arch::from_lane_xor(as_bits(value), mask));
  return value;
}

//! Dot product of two pairs of bf16.
FLASHMOE_DEVICE float dot_pair(u32 a, u32 b, float sum) {
  sum += as_float(a << 16) * as_float(b << 16);
  return sum + as_float(a & 0xffff0000u) * as_float(b & 0xffff0000u);
}

//! A wave a logit.
FLASHMOE_DEVICE void gate(Hand& hand, const Task& task) {
  const PeView& view = hand.view;
  const u32 first = task.tile * view.launch.tiling.gate_experts;
  const u32 rest = built::num_experts - first;
  const u32 experts = rest < view.launch.tiling.gate_experts ? rest : view.launch.tiling.gate_experts;
  auto* logits = view.at<float>(view.launch.workspace.logits);
  const auto* x = static_cast<const char*>(view.own.x);
  const auto* router = static_cast<const char*>(view.launch.gate);
  for (u32 i = hand.wave; i < task.num_tokens * experts; i += crew_waves) {
    const u32 token = task.first + i / experts, expert = first + i % experts;
    float sum = 0;
#pragma unroll 4
    for (u32 octet = hand.lane; octet < built::d_model / 8; octet += arch::wave_size) {
      const arch::Words a = arch::load(x + (u64{token} * built::d_model + octet * 8) * 2);
      const arch::Words b = arch::load(router + (u64{expert} * built::d_model + octet * 8) * 2);
      sum = dot_pair(a.x, b.x, sum);
      sum = dot_pair(a.y, b.y, sum);
      sum = dot_pair(a.z, b.z, sum);
      sum = dot_pair(a.w, b.w, sum);
    }
    sum = sum_over_wave(sum);
    // rounded to the layer's dtype, as a linear layer of a bf16 model does: it decides near-ties
    if (hand.lane == 0) logits[u64{token} * built::num_experts + expert] = to_float(to_bf16(sum));
  }
}

//! Grows with the logit, and for equal ones with falling expert; 0 is below all. A NaN ranks as the lowest.
FLASHMOE_DEVICE u64 rank_of(float logit, u32 expert) {
  const u32 bits = as_bits(logit != logit ? -INFINITY : logit + 0.0f);  // + 0: a zero has one sign
  return u64{bits >> 31 ? ~bits : bits | 1u << 31} << 32 | (~expert);
}

//! A wave a token. Ties go to the lower expert; a NaN logit ranks last but makes the weights NaN.
FLASHMOE_DEVICE void route(Hand& hand, const Task& task) {
  const PeView& view = hand.view;
  constexpr u32 per_lane = (built::num_experts + arch::wave_size - 1) / arch::wave_size;
  for (u32 token = task.first + hand.wave; token < task.first + task.num_tokens; token += crew_waves) {
    const float* logits = view.at<float>(view.launch.workspace.logits) + u64{token} * built::num_experts;
    auto* topk_idx = view.at<std::int32_t>(view.launch.workspace.topk_idx) + u64{token} * built::top_k;
    auto* topk_weights = view.at<float>(view.launch.workspace.topk_weights) + u64{token} * built::top_k;
    float mine[per_lane];
    u64 rank[per_lane];
#pragma unroll
    for (u32 i = 0; i < per_lane; ++i) {
      const u32 expert = i * arch::wave_size + hand.lane;
      mine[i] = expert < built::num_experts ? logits[expert] : -INFINITY;
      rank[i] = expert < built::num_experts ? rank_of(mine[i], expert) : 0;
    }
    u32 chosen[built::top_k];
#pragma unroll
    for (u32 k = 0; k < built::top_k; ++k) {
      u64 best = 0;
#pragma unroll
      for (u32 i = 0; i < per_lane; ++i) best = rank[i] > best ? rank[i] : best;
#pragma unroll
      for (u32 mask = 1; mask < arch::wave_size; mask *= 2) {
        const u64 other = u64{arch::from_lane_xor(static_cast<u32>(best >> 32), mask)} << 32 |
                          arch::from_lane_xor(static_cast<u32>(best), mask);
        best = other > best ? other : best;
      }
      chosen[k] = ~static_cast<u32>(best);
#pragma unroll
      for (u32 i = 0; i < per_lane; ++i) rank[i] = rank[i] == best ? 0 : rank[i];
    }
    const float highest = logits[chosen[0]];
    float total = 0;
#pragma unroll
    for (u32 i = 0; i < per_lane; ++i) {
      if (i * arch::wave_size + hand.lane < built::num_experts) total += expf(mine[i] - highest);
    }
    total = sum_over_wave(total);
    float weight[built::top_k], kept = 0;
#pragma unroll
    for (u32 k = 0; k < built::top_k; ++k) {
      weight[k] = expf(logits[chosen[k]] - highest) / total;
      kept += weight[k];
    }
    if (hand.lane != 0) continue;
#pragma unroll
    for (u32 k = 0; k < built::top_k; ++k) {
      topk_idx[k] = static_cast<std::int32_t>(chosen[k]);
      topk_weights[k] = built::norm_topk ? weight[k] / kept : weight[k];
    }
  }
}

}  // namespace flashmoe::general
