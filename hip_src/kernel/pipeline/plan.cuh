// The plan: each work-group makes its own copy in shared memory, all of them equal.
#pragma once
#include "flashmoe/policy.hpp"
#include "router.cuh"

namespace flashmoe::pipeline {

template <Mode mode>
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
  //! The math warps meet, after stores to where the ring will be: the copy engine writes there next.
  __device__ __forceinline__ static void hand_over() {
    if constexpr (mode != Mode::words) sm90::fence_before_copies();
    meet_math_warps();
  }

  //! Before the first task.
  __device__ __forceinline__ void clear() const {
    u32* mask = group.in_shared<u32>(group.at.mask);
    const u32 words = num_experts * mask_words();
    for (u32 base = 0; base < words; base += math_threads)
      if (base + thread < words) mask[base + thread] = 0;
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

  __device__ __forceinline__ void set_pair(u32 pair, u32 expert, float weight) const {
    group.in_shared<u16>(group.at.topk)[pair] = static_cast<u16>(expert);
    if (mode != Mode::tiles) group.in_shared<float>(group.at.weights)[pair] = weight;
    if (expert < num_experts) {
      const u32 token = pair / top_k;
      atomicOr(group.in_shared<u32>(group.at.mask) + expert * mask_words() + token / 32, 1u << token % 32);
    }
  }

  //! Words, routing given: asks for the weights of the first up task, by a warp that has nothing to do yet,
  //! before anybody has made the masks. It goes through its code, which comes from afar, once before the
  //! launch before has ended, as if there were no tokens.
  __device__ __forceinline__ void prefetch_given_weights() const {
    constexpr u32 lane_pairs = ceil_div(max_words_tokens * top_k, 32), tiles = ceil_div(d_ff, words_up_rows);
#pragma unroll 1
    for (u32 pairs = 0;; pairs = num_tokens() * top_k) {
      u32 of_pair[lane_pairs];
#pragma unroll
      for (u32 i = 0; i < lane_pairs; ++i) {
        const u32 pair = i * 32 + lane;
        of_pair[i] = pair < pairs ? static_cast<u32>(group.params.given_idx[pair]) : none;
      }
      const u32 expert = Group::active_expert(group.worker / tiles, [&](u32 base) {
        u32 active = 0;
#pragma unroll
        for (u32 i = 0; i < lane_pairs; ++i)
          if (of_pair[i] - base < 32 && of_pair[i] < num_experts) active |= 1u << (of_pair[i] - base);
        return __reduce_or_sync(~0u, active);
      });
      if (expert != none && lane == 0) prefetch_up_tile(expert, group.worker % tiles, up_tile_bytes);
      if (pairs > 0) return;
      sm90::wait_for_launch_before();
    }
  }

  //! Tiles and rows: asks for the weights of the first up tasks before anybody knows them, as if all experts
  //! had tokens. Most have where tokens are many, and nothing else is asked of the memory until the first
  //! tasks are known; twice as much delays those.
  __device__ __forceinline__ void prefetch_likely_weights() const {
    if (num_tokens() * top_k < num_experts || !is_by_id(group.params.order)) return;
    prefetch_first_up_tasks(4 * weight_bytes, [](u32 place) { return place < num_experts ? place : none; });
  }

  //! Counts, prefix sums, lists and the policy's sequence, as build_plan and build_sequence make them.
  //! Complete when the warps that add up are done.
  template <u32 gate_groups>
  __device__ void build(Plan& plan, Order order, const Router<mode, gate_groups>& router) const {
    const u32* mask = group.in_shared<u32>(group.at.mask);
    u32* count = group.in_shared<u32>(group.at.key);
    u16* before = group.in_shared<u16>(group.at.before);  // tokens of an expert before each word of its mask
    const u32 words = mask_words();
    const bool is_sorted = !is_by_id(order);
    meet_math_warps();  // the masks are clear
    gather_routing(router);
    if constexpr (mode == Mode::words) {
      __syncwarp();
      sm90::arrive_if(group.gathered(), lane == 0);
    }
    if (words > 1) {
      meet_math_warps();
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
    } else if (warp == math_warps - 1 && !is_sorted &&
               (mode != Mode::words || group.params.given_idx == nullptr)) {
      prefetch_weights(words > 1 ? count : mask);
    }
    if constexpr (mode == Mode::words) {  // so few pairs that who has added up makes the lists as well
      if (warp < adding_warps) {
        sm90::named_barrier<plan_barrier, 32 * adding_warps>();
        make_lists(plan, mask, before, 32 * adding_warps);
      }
      if (!is_sorted) return;
    } else {
      meet_math_warps();
      make_lists(plan, mask, before, math_threads);
    }
    meet_math_warps();
    if (is_sorted) sort_sequence(plan, order);
  }

 private:
  //! Experts and weights of all tokens, into shared memory. A dropped slot is `not_routed`.
  template <u32 gate_groups>
  __device__ void gather_routing(const Router<mode, gate_groups>& router) const {
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
        router.load_logits(warp, group.worker % logit_replicas, none, logits);
        router.choose(logits, expert, weight);
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
    // where the layer is short, more would only delay what is needed first
    prefetch_first_up_tasks(mode == Mode::words ? up_tile_bytes : 8 * weight_bytes,
                            [&](u32 place) { return Group::active_expert(place, of_expert); });
  }
  //! expert_of(place among those with tokens): an expert, or none. By a whole warp.
  template <class ExpertOf>
  __device__ __forceinline__ void prefetch_first_up_tasks(u32 work_group_bytes, ExpertOf expert_of) const {
    const u32 tiles = ceil_div(d_ff, tiling.up_rows), row_tiles = tiling.up_rows / 8;
    u32 left = work_group_bytes / row_tiles;  // of each row tile
    for (u32 task = group.worker; left > 0; task += group.params.num_workers) {
      const u32 bytes = left < up_tile_bytes ? left : up_tile_bytes;
      left -= bytes;
      const u32 row_tile = task % tiles * row_tiles + lane, expert = expert_of(task / tiles);
      if (expert == none) return;
      if (lane >= row_tiles || row_tile >= d_ff / 8) continue;
      prefetch_up_tile(expert, row_tile, bytes);
    }
  }
  __device__ __forceinline__ void prefetch_up_tile(u32 expert, u32 row_tile, u32 bytes) const {
    sm90::bulk_prefetch(static_cast<const char*>(group.params.gate_up) +
                            (u64{expert} * (d_ff / 8) + row_tile) * up_tile_bytes,
                        bytes);
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
    meet_math_warps();
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
