// Gate, top-k and the plan: each work-group makes its own copy of the plan in shared memory, all of them
// equal.
#pragma once
#include "flashmoe/policy.hpp"
#include "group.cuh"

namespace flashmoe::pipeline {

constexpr u32 math_lane_experts =
    (num_experts + 31) / 32;         // experts of a lane where a warp looks at all of them
constexpr u32 not_routed = 0xffffu;  // of a dropped slot

//! A routing word: 22 bits of the epoch and the expert above, the weight's bits below.
__device__ __forceinline__ u64 routing_word(u32 epoch, u32 expert, float weight) {
  return u64{epoch << 10 | expert} << 32 | __float_as_uint(weight);
}
__device__ __forceinline__ bool is_of(u32 epoch, u64 routing_word) {
  return static_cast<u32>(routing_word >> 42) == (epoch & 0x3fffffu);
}

struct Planner {
  const Group& group;
  u32 thread, warp, lane;

  __device__ __forceinline__ explicit Planner(const Group& of) : group(of) {
    thread = threadIdx.x;
    warp = thread / 32;
    lane = thread % 32;
  }
  __device__ __forceinline__ u32 num_tokens() const { return group.params.num_tokens; }

  //! Router logits of a block of tokens for a tile of experts, published as words that carry the epoch.
  template <bool Words>
  __device__ void gate(const Item& item) const {
    const u32 first_expert = item.tile * group.params.tiling.gate_experts;
    const u32 rest = num_experts - first_expert;
    const u32 experts = rest < group.params.tiling.gate_experts ? rest : group.params.tiling.gate_experts;
    if (experts == 16 && item.num_tokens <= 8) {
      gate_by_mma(item, first_expert);
    } else {
      gate_by_dots<Words>(item, first_expert, experts);
    }
  }

  __device__ __forceinline__ void publish_logit(u32 token, u32 expert, float logit, u32 replica) const {
    // rounded to the layer's dtype, as a linear layer of a bf16 model does: it decides near-ties
    const float rounded = __bfloat162float(__float2bfloat16(logit));
    u64* words = group.in_workspace<u64>(group.params.layout.logits);
    // relaxed: the word is the data, and the epoch in it says that it is there
    store_relaxed<Scope::device>(words + (u64{replica} * num_tokens() + token) * num_experts + expert,
                                 u64{group.epoch} << 32 | __float_as_uint(rounded));
  }

  template <bool Words>
  __device__ void gate_by_dots(const Item& item, u32 first_expert, u32 experts) const {
    const auto* x = static_cast<const uint4*>(group.params.x);
    const auto* rows = static_cast<const uint4*>(group.params.gate);
    constexpr u32 row_vectors = d_model / 8;
    float* sums = group.in_shared<float>(group.at.scratch) + 16;
    for (u32 base = 0; base < item.num_tokens; base += math_warps) {
      const u32 here = item.num_tokens - base < math_warps ? item.num_tokens - base : math_warps;
      u32 padded = 1;
      while (padded < here) padded *= 2;
      const u32 parts = math_warps / padded;  // warps that share a token
      const u32 token = item.first + base + warp / parts, part = warp % parts;
      for (u32 expert = first_expert; expert < first_expert + experts; ++expert) {
        float sum = 0;
        if (warp / parts < here) {
#pragma unroll 8
          for (u32 v = part * 32 + lane; v < row_vectors; v += parts * 32) {
            const uint4 a = __ldg(x + u64{token} * row_vectors + v),
                        b = __ldg(rows + u64{expert} * row_vectors + v);
            const u32 as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
              const float2 p = sm90::as_floats(as[i]), q = sm90::as_floats(bs[i]);
              sum += p.x * q.x + p.y * q.y;
            }
          }
        }
#pragma unroll
        for (u32 width = 16; width > 0; width /= 2) sum += __shfl_xor_sync(~0u, sum, width);
        if (lane == 0) sums[warp] = sum;
        sm90::named_barrier<math_barrier, math_threads>();
        constexpr u32 replicas = Words ? logit_replicas : 1;
        if (thread < here * replicas) {
          const u32 which = thread / replicas;
          float total = 0;
          for (u32 i = 0; i < parts; ++i) total += sums[which * parts + i];
          publish_logit(item.first + base + which, expert, total, thread % replicas);
        }
        sm90::named_barrier<math_barrier, math_threads>();
      }
    }
  }

  //! 16 experts x 8 tokens, K shared out over the warps.
  __device__ void gate_by_mma(const Item& item, u32 first_expert) const {
    const u32 row = lane / 4, quarter = lane % 4;
    const auto* rows =
        static_cast<const uint4*>(group.params.gate) + u64{first_expert + row} * (d_model / 8) + quarter;
    const u32 token = row < item.num_tokens ? item.first + row : item.first;
    const auto* x = static_cast<const uint4*>(group.params.x) + u64{token} * (d_model / 8) + quarter;
    float d[4] = {0, 0, 0, 0};
#pragma unroll 8
    for (u32 chunk = warp; chunk < d_model / 32; chunk += math_warps) {
      const uint4 low = __ldg(rows + chunk * 4), high = __ldg(rows + 8 * (d_model / 8) + chunk * 4),
                  b = __ldg(x + chunk * 4);
      sm90::mma(d, low.x, high.x, low.y, high.y, b.x, b.y);
      sm90::mma(d, low.z, high.z, low.w, high.w, b.z, b.w);
    }
    auto* partial =
        group.in_shared<float4>(group.at.partial);  // no tile is under way before the plan is there
    partial[warp * 32 + lane] = make_float4(d[0], d[1], d[2], d[3]);
    sm90::named_barrier<math_barrier, math_threads>();
    if (warp == 0) {
      float4 sum = partial[lane];
      for (u32 i = 1; i < math_warps; ++i) {
        const float4 other = partial[i * 32 + lane];
        sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
      }
      const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        const u32 column = 2 * quarter + i % 2;
        if (column < item.num_tokens)
          publish_logit(item.first + column, first_expert + row + 8 * (i / 2), values[i], 0);
      }
    }
    sm90::named_barrier<math_barrier, math_threads>();
  }

  //! Top-k of one token by one warp. Lane r < top_k gets the r-th expert and its weight.
  __device__ void choose(u32 token, u32 replica, u32 task_id, u32& expert, float& weight) const {
    const u64* words = group.in_workspace<u64>(group.params.layout.logits) +
                       (u64{replica} * num_tokens() + token) * num_experts;
    float logit[math_lane_experts];
    u32 turns = 0;
    u64 since_ns = 0;
    for (;;) {
      bool all = true;
#pragma unroll
      for (u32 i = 0; i < math_lane_experts; ++i) {
        const u32 e = i * 32 + lane;
        if (e >= num_experts) continue;
        const u64 word = load_relaxed<Scope::device>(words + e);
        all = all && epoch_of(word) == group.epoch;
        logit[i] = __uint_as_float(static_cast<u32>(word));
      }
      if (__all_sync(~0u, all)) break;
      const bool go_on =
          group.keep_waiting(turns, since_ns, task_id, EventKind::gated, token, 0, group.epoch);
      if (!__all_sync(~0u, go_on)) break;
    }
    // The logits are bf16: sixteen bits of order, then the lower expert of equal ones. NaN ranks last.
    u32 key[math_lane_experts];
#pragma unroll
    for (u32 i = 0; i < math_lane_experts; ++i) {
      const u32 bits = __float_as_uint(logit[i]) >> 16;
      const u32 ordered = logit[i] != logit[i] ? 0u : (bits & 0x8000u) ? (~bits & 0xffffu) : (bits | 0x8000u);
      key[i] = i * 32 + lane < num_experts ? ordered << 16 | (0xffffu - (i * 32 + lane)) : 0u;
    }
    u32 chosen = 0;
#pragma unroll
    for (u32 r = 0; r < top_k; ++r) {
      u32 best = 0;
#pragma unroll
      for (u32 i = 0; i < math_lane_experts; ++i) best = key[i] > best ? key[i] : best;
      best = __reduce_max_sync(~0u, best);
      if (lane == r) chosen = best;
#pragma unroll
      for (u32 i = 0; i < math_lane_experts; ++i) key[i] = key[i] == best ? 0u : key[i];
    }
    expert = 0xffffu - (chosen & 0xffffu);
    const u32 ordered = chosen >> 16;
    const u32 bits = (ordered & 0x8000u) ? (ordered & 0x7fffu) : (~ordered & 0xffffu);
    const float mine = __uint_as_float(bits << 16);
    const float highest = __shfl_sync(~0u, mine, 0);
    const float kept = lane < top_k ? expf(mine - highest) : 0.0f;
    float total = 0;
    if constexpr (norm_topk) {
      total = kept;
    } else {
#pragma unroll
      for (u32 i = 0; i < math_lane_experts; ++i)
        total += i * 32 + lane < num_experts ? expf(logit[i] - highest) : 0.0f;
    }
#pragma unroll
    for (u32 width = 16; width > 0; width /= 2) total += __shfl_xor_sync(~0u, total, width);
    weight = kept / total;
  }

  //! Top-k of the tokens of a route task, for all work-groups.
  __device__ void route(const Item& item) const {
    for (u32 i = warp; i < item.num_tokens; i += math_warps) {
      const u32 token = item.first + i;
      u32 expert;
      float weight;
      choose(token, 0, item.id, expert, weight);
      if (lane < top_k) {
        // relaxed: the word is the data
        store_relaxed<Scope::device>(
            group.in_workspace<u64>(group.params.layout.routing) + u64{token} * top_k + lane,
            routing_word(group.epoch, expert, weight));
      }
    }
  }

  __device__ void set_pair(u32 pair, u32 expert, float weight) const {
    group.in_shared<u16>(group.at.topk)[pair] = static_cast<u16>(expert);
    group.in_shared<float>(group.at.weights)[pair] = weight;
    if (expert < num_experts) {
      const u32 token = pair / top_k;
      atomicOr(group.in_shared<u32>(group.at.mask) + expert * mask_words() + token / 32, 1u << token % 32);
    }
  }
  __device__ __forceinline__ u32 mask_words() const { return ceil_div(num_tokens() + 1, 32); }

  //! Experts and weights of all tokens, into shared memory. A dropped slot is `not_routed`.
  template <bool Words>
  __device__ void gather_routing() const {
    const u32 pairs = num_tokens() * top_k;
    const Params& params = group.params;
    if (params.given_idx != nullptr) {
      for (u32 i = thread; i < pairs; i += math_threads) {
        const std::int32_t expert = params.given_idx[i];
        set_pair(i, expert < 0 ? not_routed : static_cast<u32>(expert), params.given_weights[i]);
      }
    } else if constexpr (Words) {  // each work-group does the top-k of all tokens: one trip instead of two
      if (warp < num_tokens()) {
        u32 expert;
        float weight;
        choose(warp, group.worker % logit_replicas, none, expert, weight);
        if (lane < top_k) set_pair(warp * top_k + lane, expert, weight);
      }
    } else {
      constexpr u32 batch = 8;  // loads in flight: each takes most of a microsecond
      const u64* words = group.in_workspace<u64>(params.layout.routing);
      u32 turns = 0;
      u64 since_ns = 0;
      for (u32 base = thread; base < pairs; base += batch * math_threads) {
        u64 word[batch];
        bool all;
        do {
          all = true;
#pragma unroll
          for (u32 j = 0; j < batch; ++j) {
            const u32 i = base + j * math_threads;
            if (i >= pairs) continue;
            word[j] = load_relaxed<Scope::device>(words + i);
            all = all && is_of(group.epoch, word[j]);
          }
        } while (!all &&
                 group.keep_waiting(turns, since_ns, none, EventKind::routed, base / top_k, 0, group.epoch));
#pragma unroll
        for (u32 j = 0; j < batch; ++j) {
          const u32 i = base + j * math_threads;
          if (i < pairs && all)
            set_pair(i, static_cast<u32>(word[j] >> 32) & 0x3ffu, __uint_as_float(static_cast<u32>(word[j])));
        }
      }
    }
  }

  //! Counts, prefix sums, lists and the policy's sequence, as build_plan and build_sequence make them.
  template <bool Words>
  __device__ void build(Plan& plan, Order order) const {
    u32* mask = group.in_shared<u32>(group.at.mask);
    const u32 words = mask_words(), pairs = num_tokens() * top_k;
    for (u32 i = thread; i < num_experts * words; i += math_threads) mask[i] = 0;
    sm90::named_barrier<math_barrier, math_threads>();
    gather_routing<Words>();
    sm90::named_barrier<math_barrier, math_threads>();
    if (warp == 0) {
      u32 tokens[math_lane_experts], total[3] = {0, 0, 0};  // pairs, blocks, active experts
#pragma unroll
      for (u32 i = 0; i < math_lane_experts; ++i) {
        const u32 expert = lane * math_lane_experts + i;
        tokens[i] = 0;
        if (expert < num_experts)
          for (u32 w = 0; w < words; ++w) tokens[i] += __popc(mask[expert * words + w]);
        total[0] += tokens[i];
        total[1] += ceil_div(tokens[i], group.params.tiling.block_tokens);
        total[2] += tokens[i] > 0 ? 1 : 0;
      }
      u32 before[3];
#pragma unroll
      for (u32 j = 0; j < 3; ++j) {
        u32 sum = total[j];
#pragma unroll
        for (u32 width = 1; width < 32; width *= 2) {
          const u32 other = __shfl_up_sync(~0u, sum, width);
          if (lane >= width) sum += other;
        }
        before[j] = sum - total[j];
      }
#pragma unroll
      for (u32 i = 0; i < math_lane_experts; ++i) {
        const u32 expert = lane * math_lane_experts + i;
        if (expert >= num_experts) continue;
        plan.entry_offset[expert] = before[0];
        plan.block_offset[expert] = before[1];
        plan.active_offset[expert] = before[2];
        if (tokens[i] > 0) plan.active[before[2]] = expert;
        before[0] += tokens[i];
        before[1] += ceil_div(tokens[i], group.params.tiling.block_tokens);
        before[2] += tokens[i] > 0 ? 1 : 0;
        if (expert == num_experts - 1) {
          plan.entry_offset[num_experts] = before[0];
          plan.block_offset[num_experts] = before[1];
          plan.active_offset[num_experts] = before[2];
        }
      }
    }
    sm90::named_barrier<math_barrier, math_threads>();
    const u16* topk = group.in_shared<u16>(group.at.topk);
    u16* entries = group.in_shared<u16>(group.at.entries);
    u16* columns = group.in_shared<u16>(group.at.columns);
    if constexpr (Words) {
      for (u32 i = thread; i < plan.num_active() * max_words_tokens; i += math_threads) columns[i] = 0xffffu;
      sm90::named_barrier<math_barrier, math_threads>();
    }
    for (u32 pair = thread; pair < pairs; pair += math_threads) {
      const u32 expert = topk[pair], token = pair / top_k;
      if (expert >= num_experts) continue;
      u32 place = plan.entry_offset[expert];
      for (u32 w = 0; w < token / 32; ++w) place += __popc(mask[expert * words + w]);
      place += __popc(mask[expert * words + token / 32] & ((1u << token % 32) - 1));
      entries[place] = static_cast<u16>(pair);
      if constexpr (Words)
        columns[plan.active_offset[expert] * max_words_tokens + token] = static_cast<u16>(pair);
    }
    sm90::named_barrier<math_barrier, math_threads>();
    build_sequence(plan, order, entries);
    sm90::named_barrier<math_barrier, math_threads>();
  }

 private:
  //! With one PE all tokens are its own: only lpt and arrival differ from the order by id.
  __device__ void build_sequence(Plan& plan, Order order, const u16* entries) const {
    const u32 active = plan.num_active();
    u32* key = group.in_shared<u32>(group.at.key);
    for (u32 i = thread; i < active; i += math_threads) {
      const u32 expert = plan.active[i];
      const u32 first = entries[plan.entry_offset[expert]];
      u32 met = ~0u;
      if (order == Order::arrival) {
        met = (first / top_k) << 10 | first % top_k;
      } else if (order == Order::lpt) {
        met = ~plan.expert_tokens(expert);
      } else {
        met = i;
      }
      key[i] = met;
    }
    sm90::named_barrier<math_barrier, math_threads>();
    for (u32 i = thread; i < active; i += math_threads) {
      u32 place = 0;
      if (order == Order::arrival || order == Order::lpt) {
        for (u32 j = 0; j < active; ++j) place += key[j] < key[i] || (key[j] == key[i] && j < i) ? 1 : 0;
      } else {
        place = i;
      }
      plan.sequence[place] = plan.active[i];
    }
    sm90::named_barrier<math_barrier, math_threads>();
    if (warp == 0) {  // blocks before each place
      u32 before = 0;
      for (u32 base = 0; base < active; base += 32) {
        const u32 i = base + lane;
        const u32 blocks = i < active ? plan.expert_blocks(plan.sequence[i]) : 0;
        u32 sum = blocks;
#pragma unroll
        for (u32 width = 1; width < 32; width *= 2) {
          const u32 other = __shfl_up_sync(~0u, sum, width);
          if (lane >= width) sum += other;
        }
        if (i < active) plan.sequence_offset[i] = before + sum - blocks;
        before += __shfl_sync(~0u, sum, 31);
      }
      if (lane == 0) plan.sequence_offset[active] = before;
    }
  }
};

}  // namespace flashmoe::pipeline
