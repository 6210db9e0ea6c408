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

//! Shared memory while a plan is made. The pairs of all PEs, one PE after the other, are cut into a piece for
//! each wave: so pairs keep their order when waves place them side by side.
struct PlanScratch {
  u32* count;   // [num_local] entries of each expert; then keys of the sequence
  u32* places;  // [crew_waves][num_local] entries of each wave's piece; then where its next one goes

  FLASHMOE_DEVICE explicit PlanScratch(u32* words) : count(words), places(words + built::num_experts) {}
};
static_assert(scratch_words >= (1 + crew_waves) * built::num_experts);

//! Calls visit(pairs, pair) for the pairs of this wave's piece, in order, a lane each; visits by whole waves
//! with pair >= pairs.size for lanes that have none.
template <class Visit>
FLASHMOE_DEVICE void visit_piece(const Hand& hand, Visit visit) {
  const u32 num_pes = hand.view.launch.shape.num_pes;
  u32 total = 0;
  for (u32 src = 0; src < num_pes; ++src) total += hand.view.num_tokens(src) * built::top_k;
  const u32 piece = ceil_div(total, crew_waves), begin = hand.wave * piece;
  u32 passed = 0;
  for (u32 src = 0; src < num_pes; ++src) {
    const Pairs pairs(hand.view, src);
    const u32 first = begin > passed ? begin - passed : 0;
    const u32 reach = begin + piece > passed ? begin + piece - passed : 0;
    const u32 end = reach < pairs.size ? reach : pairs.size;
    for (u32 pair = first + hand.lane; pair - hand.lane < end; pair += arch::wave_size)
      visit(pairs, pair < end ? pair : pairs.size);
    passed += pairs.size;
  }
}

FLASHMOE_DEVICE void count_pairs(Hand& hand, const PlanScratch& scratch) {
  const PeView& view = hand.view;
  const Plan& plan = view.graph.plan;
  const Tiling& tiling = view.launch.tiling;
  const u32 num_pes = view.launch.shape.num_pes;
  for (u32 i = hand.thread; i < crew_waves * plan.num_local; i += crew_threads) scratch.places[i] = 0;
  for (u32 i = hand.thread; i < tiling.groups(view.launch.shape) * num_pes; i += crew_threads)
    plan.group_rows[i] = 0;
  hand.sync();
  visit_piece(hand, [&](const Pairs& pairs, u32 pair) {
    const u32 local = pair < pairs.size ? pairs.local(pair) : none;
    if (local == none) return;
    arch::add_in_group(scratch.places + hand.wave * plan.num_local + local, 1);
    bool counted = false;  // a token with two experts in the group gets one row back
    for (u32 earlier = pair / built::top_k * built::top_k; earlier < pair; ++earlier) {
      const u32 other = pairs.local(earlier);
      counted |= other != none && tiling.group_of(other) == tiling.group_of(local);
    }
    // relaxed: met again at the barrier
    if (!counted)
      fetch_add_relaxed<Scope::device>(plan.group_rows + tiling.group_of(local) * num_pes + pairs.src, 1u);
  });
  hand.sync();
}

//! Offsets of experts: each thread adds up what lies before its own.
FLASHMOE_DEVICE void add_up(Hand& hand, const PlanScratch& scratch) {
  const Plan& plan = hand.view.graph.plan;
  const u32 num_local = plan.num_local, block_tokens = hand.view.launch.tiling.block_tokens;
  for (u32 local = hand.thread; local < num_local; local += crew_threads) {
    u32 count = 0;
    for (u32 wave = 0; wave < crew_waves; ++wave) count += scratch.places[wave * num_local + local];
    scratch.count[local] = count;
  }
  hand.sync();
  for (u32 local = hand.thread; local <= num_local; local += crew_threads) {
    u32 entries = 0, blocks = 0, active = 0;
    for (u32 before = 0; before < local; ++before) {
      const u32 count = scratch.count[before];
      entries += count;
      blocks += ceil_div(count, block_tokens);
      active += count > 0 ? 1 : 0;
    }
    plan.entry_offset[local] = entries;
    plan.block_offset[local] = blocks;
    plan.active_offset[local] = active;
    if (local == num_local) continue;
    if (scratch.count[local] > 0) plan.active[active] = local;
    for (u32 wave = 0; wave < crew_waves; ++wave) {
      u32& place = scratch.places[wave * num_local + local];
      const u32 count = place;
      place = entries;
      entries += count;
    }
  }
  hand.sync();
}

FLASHMOE_DEVICE void place_entries(Hand& hand, const PlanScratch& scratch) {
  const Plan& plan = hand.view.graph.plan;
  u32* places = scratch.places + hand.wave * plan.num_local;
  visit_piece(hand, [&](const Pairs& pairs, u32 pair) {
    const u32 local = pair < pairs.size ? pairs.local(pair) : none;
    u64 mine = 0;  // lanes with the same expert
    for (u64 left = arch::ballot(local != none); left != 0;) {
      const u32 expert = arch::from_lane(local, arch::lowest_bit(left));
      const u64 same = arch::ballot(local == expert);
      if (local == expert) mine = same;
      left &= ~same;
    }
    const u64 below = (u64{1} << hand.lane) - 1;
    u32 place = 0;
    if (local != none) {
      place = places[local] + arch::count_bits(mine & below);
      plan.entries[place] =
          Entry{pair / built::top_k, static_cast<u16>(pairs.src), static_cast<u16>(pair % built::top_k)};
    }
    arch::sync_wave();
    if (local != none && (mine >> hand.lane) == 1) places[local] = place + 1;  // the last of them
    arch::sync_wave();
  });
  hand.sync();
}

//! Sorts the active experts: each thread finds the places of its own, and the blocks before them.
FLASHMOE_DEVICE void sort_experts(Hand& hand, u32* key, u32* blocks) {
  const PeView& view = hand.view;
  const Plan& plan = view.graph.plan;
  const u32 active = plan.num_active();
  for (u32 i = hand.thread; i < active; i += crew_threads) {
    key[i] = expert_key(plan, view.launch.shape, view.launch.policy.order, view.pe, plan.active[i]);
    blocks[i] = plan.expert_blocks(plan.active[i]);
  }
  hand.sync();
  for (u32 i = hand.thread; i < active; i += crew_threads) {
    u32 place = 0, blocks_before = 0;
    for (u32 j = 0; j < active; ++j) {
      const bool before = key[j] < key[i] || (key[j] == key[i] && j < i);
      place += before ? 1 : 0;
      blocks_before += before ? blocks[j] : 0;
    }
    plan.sequence[place] = plan.active[i];
    plan.sequence_offset[place] = blocks_before;
  }
  if (hand.thread == 0) plan.sequence_offset[active] = plan.num_blocks();
}

FLASHMOE_DEVICE void plan(Hand& hand) {
  const PlanScratch scratch(hand.group.words);
  count_pairs(hand, scratch);
  add_up(hand, scratch);
  place_entries(hand, scratch);
  sort_experts(hand, scratch.count, scratch.places);
}

}  // namespace flashmoe::general
