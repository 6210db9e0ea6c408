// The plan, made by a whole crew: the same as build_plan and build_sequence make, word for word.
#pragma once
#include "group.hpp"

namespace flashmoe::general {

//! The (token, slot) pairs that one PE sent here, in order.
struct Pairs {
  const PeView& view;
  u32 src;
  const std::int32_t* experts;  // [num_tokens][top_k]
  u32 size;

  FLASHMOE_DEVICE Pairs(const PeView& of_view, u32 of_src) : view(of_view), src(of_src) {
    experts = src == view.pe ? view.graph.topk_idx : view.heap(view.pe).experts(src, 0);
    size = view.num_tokens(src) * built::top_k;
  }
  //! The expert of a pair, counted from this PE's first; none when it is not here, or was dropped.
  FLASHMOE_DEVICE u32 local(u32 pair) const {
    if (src != view.pe && !view.has_landed(src, pair / built::top_k)) return none;
    const std::int32_t expert = experts[pair];
    const u32 index = static_cast<u32>(expert) - view.pe * view.graph.plan.num_local;
    return expert >= 0 && index < view.graph.plan.num_local ? index : none;
  }
};

FLASHMOE_DEVICE void count_pairs(Hand& hand, u32* counts) {
  const PeView& view = hand.view;
  const Plan& plan = view.graph.plan;
  const Tiling& tiling = view.launch.tiling;
  const u32 num_pes = view.launch.shape.num_pes;
  for (u32 i = hand.thread; i < plan.num_local; i += crew_threads) counts[i] = 0;
  for (u32 i = hand.thread; i < tiling.groups(view.launch.shape) * num_pes; i += crew_threads)
    plan.group_rows[i] = 0;
  hand.sync();
  for (u32 src = 0; src < num_pes; ++src) {
    const Pairs pairs(view, src);
    for (u32 pair = hand.thread; pair < pairs.size; pair += crew_threads) {
      const u32 local = pairs.local(pair);
      if (local == none) continue;
      arch::add_in_group(counts + local, 1);
      bool counted = false;  // a token with two experts in the group gets one row back
      for (u32 earlier = pair / built::top_k * built::top_k; earlier < pair; ++earlier) {
        const u32 other = pairs.local(earlier);
        counted |= other != none && tiling.group_of(other) == tiling.group_of(local);
      }
      // relaxed: met again at the barrier
      if (!counted)
        fetch_add_relaxed<Scope::device>(plan.group_rows + tiling.group_of(local) * num_pes + src, 1u);
    }
  }
  hand.sync();
}

//! A wave an expert: it looks through all pairs in order, and its lanes place what they find side by side.
FLASHMOE_DEVICE void place_entries(Hand& hand, const u32* offset) {
  const PeView& view = hand.view;
  const Plan& plan = view.graph.plan;
  const u64 below = (u64{1} << hand.lane) - 1;
  for (u32 local = hand.wave; local < plan.num_local; local += crew_waves) {
    u32 place = offset[local];
    if (place == offset[local + 1]) continue;
    for (u32 src = 0; src < view.launch.shape.num_pes; ++src) {
      const Pairs pairs(view, src);
      constexpr u32 at_once = 4;  // loads in flight
      for (u32 first = hand.lane; first - hand.lane < pairs.size; first += at_once * arch::wave_size) {
        bool found[at_once];
#pragma unroll
        for (u32 i = 0; i < at_once; ++i) {
          const u32 pair = first + i * arch::wave_size;
          found[i] = pair < pairs.size && pairs.local(pair) == local;
        }
#pragma unroll
        for (u32 i = 0; i < at_once; ++i) {
          const u32 pair = first + i * arch::wave_size;
          const u64 lanes = arch::ballot(found[i]);
          if (found[i]) {
            plan.entries[place + arch::count_bits(lanes & below)] =
                Entry{pair / built::top_k, static_cast<u16>(src), static_cast<u16>(pair % built::top_k)};
          }
          place += arch::count_bits(lanes);
        }
      }
    }
  }
}

FLASHMOE_DEVICE void plan(Hand& hand) {
  const PeView& view = hand.view;
  const Plan& plan = view.graph.plan;
  u32* offset = hand.group.words;  // [num_local + 1]: counts, then the entries before each expert
  count_pairs(hand, offset);
  if (hand.thread == 0) {
    u32 entries = 0, blocks = 0, active = 0;
    for (u32 local = 0; local <= plan.num_local; ++local) {
      const u32 count = local < plan.num_local ? offset[local] : 0;
      offset[local] = entries;
      plan.entry_offset[local] = entries;
      plan.block_offset[local] = blocks;
      plan.active_offset[local] = active;
      if (count > 0) plan.active[active++] = local;
      entries += count;
      blocks += ceil_div(count, view.launch.tiling.block_tokens);
    }
  }
  hand.sync();
  place_entries(hand, offset);
  hand.sync();
  u32* key = hand.group.words;  // [num_active]
  const u32 active = plan.num_active();
  for (u32 i = hand.thread; i < active; i += crew_threads)
    key[i] = expert_key(plan, view.launch.shape, view.launch.policy.order, view.pe, plan.active[i]);
  hand.sync();
  for (u32 i = hand.thread; i < active; i += crew_threads) {
    u32 place = 0;
    for (u32 j = 0; j < active; ++j) place += key[j] < key[i] || (key[j] == key[i] && j < i) ? 1 : 0;
    plan.sequence[place] = plan.active[i];
  }
  hand.sync();
  if (hand.thread != 0) return;
  u32 blocks = 0;
  for (u32 i = 0; i < active; ++i) {
    plan.sequence_offset[i] = blocks;
    blocks += plan.expert_blocks(plan.sequence[i]);
  }
  plan.sequence_offset[active] = blocks;
}

}  // namespace flashmoe::general
