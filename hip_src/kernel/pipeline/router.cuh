// The router: a gate task's logits, the top-k of a token, and what was chosen.
#pragma once
#include "group.cuh"

namespace flashmoe::pipeline {

constexpr u32 lane_experts = (num_experts + 31) / 32;  // experts of a lane where a warp looks at all of them
constexpr u32 not_routed = 0xffffu;                    // of a dropped slot

//! A routing word: 22 bits of the epoch and the expert above, the weight's bits below.
__device__ __forceinline__ u64 routing_word(u32 epoch, u32 expert, float weight) {
  return u64{epoch << 10 | expert} << 32 | __float_as_uint(weight);
}
__device__ __forceinline__ bool is_of(u32 epoch, u64 routing_word) {
  return static_cast<u32>(routing_word >> 42) == (epoch & 0x3fffffu);
}

//! gate_groups: of 8 tokens, that a gate task multiplies at once: what it reads of the router it reads once.
template <Mode mode, u32 gate_groups>
struct Router {
  const Group& group;
  const Tiling& tiling;
  u32 thread, warp, lane;

  __device__ __forceinline__ Router(const Group& of, const Tiling& cut) : group(of), tiling(cut) {
    thread = threadIdx.x;
    warp = thread / 32;
    lane = thread % 32;
  }
  __device__ __forceinline__ u32 num_tokens() const { return group.params.num_tokens; }

  //! Router logits of a block of tokens for a tile of experts, published as words that carry the epoch.
  __device__ __forceinline__ void gate(const Task& task) const {
    const u32 begin = task.tile * tiling.gate_experts;
    const u32 end = begin + tiling.gate_experts < num_experts ? begin + tiling.gate_experts : num_experts;
    if constexpr (mode == Mode::words) {
      for (u32 expert = begin; expert < end; ++expert) gate_by_dots(task.first, task.num_tokens, expert);
    } else {
      constexpr u32 at_once = 8 * gate_groups;
      for (u32 first = 0; first < task.num_tokens; first += at_once) {
        const u32 rest = task.num_tokens - first, count = rest < at_once ? rest : at_once;
        for (u32 expert = begin; expert < end; expert += 16)
          gate_by_mma(task.first + first, count, expert, end - expert < 16 ? end - expert : 16);
      }
    }
  }

  __device__ __forceinline__ void publish_logit(u32 token, u32 expert, float logit, u32 replica) const {
    // rounded to the layer's dtype, as a linear layer of a bf16 model does: it decides near-ties
    const float rounded = __bfloat162float(__float2bfloat16(logit));
    u64* words = group.in_workspace<u64>(group.params.layout.logits);
    // relaxed: the word is the data, and the epoch in it says that it is there
    store_relaxed<Scope::device>(words + (u64{replica} * num_tokens() + token) * num_experts + expert,
                                 u64{group.epoch()} << 32 | __float_as_uint(rounded));
  }

  //! One expert x up to 8 tokens, a thread 8 of K at a time; for whoever wants them, in as many replicas.
  __device__ __forceinline__ void gate_by_dots(u32 first_token, u32 count, u32 expert) const {
    const auto* row = static_cast<const uint4*>(group.params.gate) + u64{expert} * (d_model / 8);
    const auto* x = static_cast<const uint4*>(group.params.x) + u64{first_token} * (d_model / 8);
    float sum[8] = {};
    for (u32 v = thread; v < d_model / 8; v += math_threads) {
      const uint4 weights = __ldg(row + v);
      uint4 tokens[8];
      // `break`, for a branch: as a condition of each instruction, all would be fetched and issued
#pragma unroll
      for (u32 t = 0; t < 8; ++t) {
        if (t == count) break;
        tokens[t] = __ldg(x + t * (d_model / 8) + v);
      }
#pragma unroll
      for (u32 t = 0; t < 8; ++t) {
        if (t == count) break;
        sum[t] += dot(weights.x, tokens[t].x) + dot(weights.y, tokens[t].y) + dot(weights.z, tokens[t].z) +
                  dot(weights.w, tokens[t].w);
      }
    }
    // Half of the sums go to the lanes of the other half, each time: in the end four lanes have one token's.
#pragma unroll
    for (u32 step = 0; step < 3; ++step) {
      const u32 width = 16 >> step;
      const bool is_upper = (lane & width) != 0;
#pragma unroll
      for (u32 t = 0; t < 4u >> step; ++t) {
        const float mine = is_upper ? sum[t + (4 >> step)] : sum[t],
                    other = is_upper ? sum[t] : sum[t + (4 >> step)];
        sum[t] = mine + __shfl_xor_sync(~0u, other, width);
      }
    }
    sum[0] += __shfl_xor_sync(~0u, sum[0], 2);
    sum[0] += __shfl_xor_sync(~0u, sum[0], 1);
    float* sums = group.in_shared<float>(group.at.partial);  // no task is under way before the plan is there
    if (lane % 4 == 0) sums[lane / 4 * math_warps + warp] = sum[0];
    meet_math_warps();
    if (thread < count * logit_replicas) {
      const auto* parts = group.in_shared<float4>(group.at.partial) + thread / logit_replicas * 2;
      const float4 a = parts[0], b = parts[1];
      publish_logit(first_token + thread / logit_replicas, expert,
                    ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w)), thread % logit_replicas);
    }
    meet_math_warps();
  }
  __device__ __forceinline__ static float dot(u32 a, u32 b) {
    const float2 p = sm90::as_floats(a), q = sm90::as_floats(b);
    return p.x * q.x + p.y * q.y;
  }

  //! Up to 16 experts x up to 8 gate_groups tokens, K shared out over the warps.
  __device__ __forceinline__ void gate_by_mma(u32 first_token, u32 count, u32 first_expert,
                                              u32 experts) const {
    const u32 row = lane / 4, quarter = lane % 4;
    // Rows and columns that there are not have another's values: nobody asks for their products.
    auto row_of = [&](const void* matrix, u32 first, u32 index, u32 size) {
      return static_cast<const uint4*>(matrix) + u64{first + (index < size ? index : 0)} * (d_model / 8) +
             quarter;
    };
    const uint4 *low_row = row_of(group.params.gate, first_expert, row, experts),
                *high_row = row_of(group.params.gate, first_expert, row + 8, experts), *x[gate_groups];
#pragma unroll
    for (u32 g = 0; g < gate_groups; ++g) x[g] = row_of(group.params.x, first_token, g * 8 + row, count);
    float d[gate_groups][2][4] = {};
#pragma unroll 4
    for (u32 chunk = warp; chunk < d_model / 32; chunk += math_warps) {
      const uint4 low = __ldg(low_row + chunk * 4), high = __ldg(high_row + chunk * 4);
#pragma unroll
      for (u32 g = 0; g < gate_groups; ++g) {
        const uint4 b = __ldg(x[g] + chunk * 4);
        sm90::mma(d[g][0], low.x, high.x, low.y, high.y, b.x, b.y);
        sm90::mma(d[g][1], low.z, high.z, low.w, high.w, b.z, b.w);
      }
    }
    auto* partial =
        group.in_shared<float4>(group.at.partial);  // no task is under way before the plan is there
#pragma unroll
    for (u32 g = 0; g < gate_groups; ++g)
      partial[(g * math_warps + warp) * 32 + lane] = make_float4(
          d[g][0][0] + d[g][1][0], d[g][0][1] + d[g][1][1], d[g][0][2] + d[g][1][2], d[g][0][3] + d[g][1][3]);
    meet_math_warps();
    if (warp < gate_groups) {
      const float4 sum = sum_over_warps(partial + warp * math_warps * 32 + lane, 32);
      const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        const u32 column = warp * 8 + 2 * quarter + i % 2, expert = row + 8 * (i / 2);
        if (column < count && expert < experts)
          publish_logit(first_token + column, first_expert + expert, values[i], 0);
      }
    }
    meet_math_warps();
  }

  //! A token's logits, once they are there: lane l of the warp gets those of experts l, l + 32, ...
  __device__ void load_logits(u32 token, u32 replica, u32 task_id, float (&logit)[lane_experts]) const {
    const u64* words = group.in_workspace<u64>(group.params.layout.logits) +
                       (u64{replica} * num_tokens() + token) * num_experts;
    const u32 epoch = group.epoch();
    u32 turns = 0;
    u64 since_ns = 0;
    for (;;) {
      bool all = true;
#pragma unroll
      for (u32 i = 0; i < lane_experts; ++i) {
        const u32 e = i * 32 + lane;
        if (e >= num_experts) continue;
        const u64 word = load_relaxed<Scope::device>(words + e);
        all = all && epoch_of(word) == epoch;
        logit[i] = __uint_as_float(static_cast<u32>(word));
      }
      if (__all_sync(~0u, all)) return;
      const bool go_on =
          group.keep_waiting(turns, since_ns, task_id, EventKind::gated, token, 0, group.epoch());
      if (!__all_sync(~0u, go_on)) return;
    }
  }

  //! Top-k of one token by one warp. Lane r < top_k gets the r-th expert and its weight.
  __device__ void choose(const float (&logit)[lane_experts], u32& expert, float& weight) const {
    // The logits are bf16: sixteen bits of order, then the lower expert of equal ones. NaN ranks last.
    u32 key[lane_experts];
#pragma unroll
    for (u32 i = 0; i < lane_experts; ++i) {
      const u32 bits = __float_as_uint(logit[i]) >> 16;
      const u32 ordered = logit[i] != logit[i] ? 0u : (bits & 0x8000u) ? (~bits & 0xffffu) : (bits | 0x8000u);
      key[i] = i * 32 + lane < num_experts ? ordered << 16 | (0xffffu - (i * 32 + lane)) : 0u;
    }
    // Each lane's in falling order: then the next one is the highest of the lanes' first.
#pragma unroll
    for (u32 i = 0; i < lane_experts; ++i) {
#pragma unroll
      for (u32 j = i + 1; j < lane_experts; ++j) {
        const u32 a = key[i], b = key[j];
        key[i] = a > b ? a : b;
        key[j] = a > b ? b : a;
      }
    }
    u32 chosen = 0;
#pragma unroll
    for (u32 r = 0; r < top_k; ++r) {
      const u32 best = __reduce_max_sync(~0u, key[0]);
      const bool is_mine = key[0] == best;
#pragma unroll
      for (u32 i = 0; i < lane_experts; ++i)
        key[i] = !is_mine ? key[i] : i + 1 < lane_experts ? key[i + 1] : 0u;
      if (lane == r) chosen = best;
    }
    expert = 0xffffu - (chosen & 0xffffu);
    const u32 ordered = chosen >> 16;
    const u32 bits = (ordered & 0x8000u) ? (ordered & 0x7fffu) : (~ordered & 0xffffu);
    const float mine = __uint_as_float(bits << 16);
    const float highest = __shfl_sync(~0u, mine, 0);
    const float kept = lane < top_k ? expf(mine - highest) : 0.0f;
    float total = 0;
    // the kept ones lie in the first lanes
    constexpr u32 reach = !norm_topk || top_k > 16 ? 16 : top_k > 8 ? 8 : top_k > 4 ? 4 : top_k > 2 ? 2 : 1;
    if constexpr (norm_topk) {
      total = kept;
    } else {
#pragma unroll
      for (u32 i = 0; i < lane_experts; ++i)
        total += i * 32 + lane < num_experts ? expf(logit[i] - highest) : 0.0f;
    }
#pragma unroll
    for (u32 width = reach; width > 0; width /= 2) total += __shfl_xor_sync(~0u, total, width);
    weight = kept / total;
  }

  //! What the gate, or whoever gave the routing, chose for a token's slot; for readers after the plan is
  //! made.
  __device__ __forceinline__ void choice(u32 token, u32 k, u32& expert, float& weight) const {
    const Params& params = group.params;
    const u32 pair = token * top_k + k;
    if (params.given_idx != nullptr) {
      const std::int32_t given = params.given_idx[pair];
      expert = given < 0 ? not_routed : static_cast<u32>(given);
      weight = params.given_weights[pair];
    } else {
      const u64 word = load_relaxed<Scope::device>(group.in_workspace<u64>(params.layout.routing) + pair);
      expert = static_cast<u32>(word >> 32) & 0x3ffu;
      weight = __uint_as_float(static_cast<u32>(word));
    }
  }
};

//! A result of a token: its counter and what that must reach; 0: there is none.
struct Result {
  u32 counter, target;
  float weight;
};
template <Mode mode, u32 gate_groups>
__device__ __forceinline__ Result result_of(const Router<mode, gate_groups>& router, const TaskGraph& graph,
                                            u32 token, u32 slot) {
  const u32 tiles = graph.tiling.down_tiles(graph.shape);
  if constexpr (mode == Mode::tiles) {
    u32 expert;
    float weight;
    router.choice(token, slot, expert, weight);
    if (expert >= num_experts) return Result{0, 0, 0};
    return Result{expert, graph.plan.expert_blocks(expert) * tiles, weight};
  } else {
    return Result{slot, graph.group_begin(slot) == graph.group_begin(slot + 1) ? 0 : tiles, 1.0f};
  }
}

}  // namespace flashmoe::pipeline
