// Gate, top-k and the plan: each work-group makes its own copy of the plan in shared memory, all of them
// equal.
#pragma once
#include "flashmoe/policy.hpp"
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
struct Planner {
  const Group& group;
  const Tiling& tiling;
  u32 thread, warp, lane;
  std::int32_t given_expert = -1;  // words, routing given: this thread's pair
  float given_weight = 0;

  __device__ __forceinline__ Planner(const Group& of, const Tiling& cut) : group(of), tiling(cut) {
    thread = threadIdx.x;
    warp = thread / 32;
    lane = thread % 32;
  }
  __device__ __forceinline__ u32 num_tokens() const { return group.params.num_tokens; }
  __device__ __forceinline__ u32 mask_words() const {
    return mode == Mode::words ? 1 : SharedLayout::mask_words(num_tokens());
  }
  __device__ __forceinline__ static void meet() { sm90::named_barrier<math_barrier, math_threads>(); }
  //! As meet(), after stores to where the ring will be: the copy engine writes there next.
  __device__ __forceinline__ static void hand_over() {
    if constexpr (mode != Mode::words) sm90::fence_before_copies();
    meet();
  }

  //! Before the first task.
  __device__ __forceinline__ void clear() const {
    u32* mask = group.in_shared<u32>(group.at.mask);
    for (u32 i = thread; i < num_experts * mask_words(); i += math_threads) mask[i] = 0;
  }

  //! Once the thread has begun: the trip to memory is under way while the picking thread hands on the first
  //! item.
  __device__ __forceinline__ void ask_for_given() {
    static_assert(max_words_tokens * top_k <= math_threads);
    const Params& params = group.params;
    if (mode != Mode::words || params.given_idx == nullptr || thread >= num_tokens() * top_k) return;
    given_expert = params.given_idx[thread];
    given_weight = params.given_weights[thread];
  }

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
    meet();
    if (thread < count * logit_replicas) {
      const auto* parts = group.in_shared<float4>(group.at.partial) + thread / logit_replicas * 2;
      const float4 a = parts[0], b = parts[1];
      publish_logit(first_token + thread / logit_replicas, expert,
                    ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w)), thread % logit_replicas);
    }
    meet();
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
    meet();
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
    meet();
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

  __device__ __forceinline__ void set_pair(u32 pair, u32 expert, float weight) const {
    group.in_shared<u16>(group.at.topk)[pair] = static_cast<u16>(expert);
    if (mode != Mode::tiles) group.in_shared<float>(group.at.weights)[pair] = weight;
    if (expert < num_experts) {
      const u32 token = pair / top_k;
      atomicOr(group.in_shared<u32>(group.at.mask) + expert * mask_words() + token / 32, 1u << token % 32);
    }
  }

  //! Counts, prefix sums, lists and the policy's sequence, as build_plan and build_sequence make them.
  //! Complete when the warps that add up are done.
  __device__ void build(Plan& plan, Order order) const {
    const u32* mask = group.in_shared<u32>(group.at.mask);
    u32* count = group.in_shared<u32>(group.at.key);
    u16* before = group.in_shared<u16>(group.at.before);  // tokens of an expert before each word of its mask
    const u32 words = mask_words();
    const bool is_sorted = !is_by_id(order);
    meet();  // the masks are clear
    gather_routing();
    if constexpr (mode == Mode::words) {
      __syncwarp();
      sm90::arrive_if(group.gathered(), lane == 0);
    }
    if (words > 1) {
      meet();
      for (u32 expert = thread; expert < num_experts; expert += math_threads) {
        u32 sum = 0;
        for (u32 w = 0; w < words; ++w) {
          before[expert * words + w] = static_cast<u16>(sum);
          sum += __popc(mask[expert * words + w]);
        }
        count[expert] = sum;
      }
    }
    hand_over();
    if (warp < adding_warps) {
      add_up(plan, words > 1 ? count : mask, words > 1);
    } else if (warp == math_warps - 1 && !is_sorted) {
      prefetch_weights(words > 1 ? count : mask);
    }
    if constexpr (mode == Mode::words) {  // so few pairs that who has added up makes the lists as well
      if (warp < adding_warps) {
        sm90::named_barrier<plan_barrier, 32 * adding_warps>();
        make_lists(plan, mask, before, 32 * adding_warps);
      }
      if (!is_sorted) return;
    } else {
      meet();
      make_lists(plan, mask, before, math_threads);
    }
    meet();
    if (is_sorted) sort_sequence(plan, order);
  }

 private:
  //! Experts and weights of all tokens, into shared memory. A dropped slot is `not_routed`.
  __device__ void gather_routing() const {
    const u32 pairs = num_tokens() * top_k;
    const Params& params = group.params;
    if (mode == Mode::words && params.given_idx != nullptr) {
      if (thread < pairs)
        set_pair(thread, given_expert < 0 ? not_routed : static_cast<u32>(given_expert), given_weight);
    } else if (params.given_idx != nullptr) {
      for (u32 i = thread; i < pairs; i += math_threads) {
        const std::int32_t expert = params.given_idx[i];
        set_pair(i, expert < 0 ? not_routed : static_cast<u32>(expert), params.given_weights[i]);
      }
    } else if constexpr (mode == Mode::words) {
      // each work-group does the top-k of all tokens: one trip instead of two
      if (warp < num_tokens()) {
        u32 expert;
        float weight, logits[lane_experts];
        load_logits(warp, group.worker % logit_replicas, none, logits);
        choose(logits, expert, weight);
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
            all = all && is_of(group.epoch(), word[j]);
          }
        } while (!all && group.keep_waiting(turns, since_ns, none, EventKind::routed, base / top_k, 0,
                                            group.epoch()));
#pragma unroll
        for (u32 j = 0; j < batch; ++j) {
          const u32 i = base + j * math_threads;
          if (i < pairs && all)
            set_pair(i, static_cast<u32>(word[j] >> 32) & 0x3ffu, __uint_as_float(static_cast<u32>(word[j])));
        }
      }
    }
  }

  //! Asks for the weights of the first up tasks, whoever will have them, while the plan is still being made:
  //! the memory has a start on the work-groups, which are faster.
  __device__ __forceinline__ void prefetch_weights(const u32* of_expert) const {
    const u32 tiles = ceil_div(d_ff, tiling.up_rows), row_tiles = tiling.up_rows / 8;
    // where the layer is short, more would only delay what is needed first
    constexpr u32 work_group_bytes = mode == Mode::words ? up_tile_bytes : 8 * weight_bytes;
    u32 left = work_group_bytes / row_tiles;  // of each row tile
    for (u32 task = group.worker; left > 0; task += group.params.num_workers) {
      const u32 bytes = left < up_tile_bytes ? left : up_tile_bytes;
      left -= bytes;
      const u32 row_tile = task % tiles * row_tiles + lane,
                expert = Group::active_expert(of_expert, task / tiles);
      if (expert == none) return;
      if (lane >= row_tiles || row_tile >= d_ff / 8) continue;
      sm90::bulk_prefetch(static_cast<const char*>(group.params.gate_up) +
                              (u64{expert} * (d_ff / 8) + row_tile) * up_tile_bytes,
                          bytes);
    }
  }

  //! To each value those that the lanes before have.
  template <u32 size>
  __device__ __forceinline__ void add_lanes_before(u32 (&values)[size]) const {
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
#pragma unroll
      for (u32& value : values) {
        const u32 other = __shfl_up_sync(~0u, value, step);
        if (lane >= step) value += other;
      }
    }
  }

  //! Prefix sums over the experts: a warp has 32 of them, and adds up those before. With one PE all tokens
  //! are its own: most orders are that of the ids. `count`: tokens, or a bit for each.
  __device__ __forceinline__ void add_up(Plan& plan, const u32* count, bool is_counted) const {
    constexpr u32 sums = mode == Mode::words ? 1 : 2;  // words: every active expert has one block
    for (u32 own = warp; own < lane_experts; own += adding_warps) {
      u32 before[sums] = {}, mine[sums] = {}, columns = 0;  // pairs, active experts above them; blocks
#pragma unroll
      for (u32 i = 0; i < lane_experts; ++i) {
        const u32 found = i * 32 + lane < num_experts ? count[i * 32 + lane] : 0;
        const u32 tokens = is_counted ? found : __popc(found);
        const u32 value[2] = {tokens | (tokens > 0 ? 1u << 16 : 0u), ceil_div(tokens, tiling.block_tokens)};
#pragma unroll
        for (u32 s = 0; s < sums; ++s) {
          if (i < own) before[s] += value[s];
          if (i == own) mine[s] = value[s];
        }
        if (i == own) columns = found;
      }
#pragma unroll
      for (u32 s = 0; s < sums; ++s) before[s] = __reduce_add_sync(~0u, before[s]);
      u32 up_to[sums];
#pragma unroll
      for (u32 s = 0; s < sums; ++s) up_to[s] = mine[s];
      add_lanes_before(up_to);
      const u32 expert = own * 32 + lane;
      if (expert >= num_experts) continue;
#pragma unroll
      for (u32 s = 0; s < sums; ++s) before[s] += up_to[s];  // with its own
      const auto blocks_of = [&](const u32(&sum)[sums]) { return sums == 1 ? sum[0] >> 16 : sum[sums - 1]; };
      const u32 tokens = mine[0] & 0xffffu, entry = (before[0] & 0xffffu) - tokens,
                active = (before[0] - mine[0]) >> 16, block = blocks_of(before) - blocks_of(mine);
      plan.entry_offset[expert] = entry;
      plan.block_offset[expert] = block;
      plan.active_offset[expert] = active;
      if (tokens > 0) {
        plan.active[active] = plan.sequence[active] = expert;
        plan.sequence_offset[active] = block;
        if (mode == Mode::words) group.in_shared<u32>(group.at.columns)[active] = columns;
      }
      if (expert == num_experts - 1) {
        const u32 all_active = before[0] >> 16;
        plan.entry_offset[num_experts] = before[0] & 0xffffu;
        plan.block_offset[num_experts] = plan.sequence_offset[all_active] = blocks_of(before);
        plan.active_offset[num_experts] = all_active;
      }
    }
  }

  //! Each pair to its place among its expert's, which are by token.
  __device__ __forceinline__ void make_lists(const Plan& plan, const u32* mask, const u16* before,
                                             u32 threads) const {
    const u16* topk = group.in_shared<u16>(group.at.topk);
    u16* entries = group.in_shared<u16>(group.at.entries);
    for (u32 pair = thread; pair < num_tokens() * top_k; pair += threads) {
      const u32 expert = topk[pair], token = pair / top_k;
      if (expert >= num_experts) continue;
      const u32 word = expert * mask_words() + token / 32;
      const u32 place = (mask_words() > 1 ? before[word] : 0) + __popc(mask[word] & ((1u << token % 32) - 1));
      entries[plan.entry_offset[expert] + place] = static_cast<u16>(pair);
    }
  }

  __device__ void sort_sequence(Plan& plan, Order order) const {
    const u16* entries = group.in_shared<u16>(group.at.entries);
    const u32 active = plan.num_active();
    u32* key = group.in_shared<u32>(group.at.key);
    for (u32 i = thread; i < active; i += math_threads) {
      const u32 expert = plan.active[i];
      const u32 first = entries[plan.entry_offset[expert]];
      key[i] = order == Order::lpt ? ~plan.expert_tokens(expert) : (first / top_k) << 10 | first % top_k;
    }
    hand_over();
    for (u32 i = thread; i < active; i += math_threads) {
      u32 place = 0;
      for (u32 j = 0; j < active; ++j) place += key[j] < key[i] || (key[j] == key[i] && j < i) ? 1 : 0;
      plan.sequence[place] = plan.active[i];
    }
    meet();
    if (warp != 0) return;
    u32 before = 0;  // blocks before each place
    for (u32 base = 0; base < active; base += 32) {
      const u32 i = base + lane;
      const u32 blocks = i < active ? plan.expert_blocks(plan.sequence[i]) : 0;
      u32 sum[1] = {blocks};
      add_lanes_before(sum);
      if (i < active) plan.sequence_offset[i] = before + sum[0] - blocks;
      before += __shfl_sync(~0u, sum[0], 31);
    }
    if (lane == 0) plan.sequence_offset[active] = before;
  }
};

}  // namespace flashmoe::pipeline
