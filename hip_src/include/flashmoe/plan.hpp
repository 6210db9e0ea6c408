// The plan of one PE for one launch: which tokens its experts have. Counts, prefix sums, and the lists behind
// them.
#pragma once
#include "flashmoe/shape.hpp"
#include "flashmoe/task.hpp"

namespace flashmoe {

//! One (token, expert) pair at the expert's PE.
struct Entry {
  u32 token;  // on its owner
  u16 src;    // PE that owns the token
  u16 k;      // which of the token's top_k slots
};
static_assert(sizeof(Entry) == 8);

//! Plans with equal digests have the same task ids, and the same edges from up to down (FNV-1a over the
//! tokens of each expert). What a combine waits for depends on which token has which expert, and is not
//! covered.
FLASHMOE_FN u64 plan_digest(const u32* entry_offset, u32 num_local) {
  u64 digest = 0xcbf29ce484222325u;
  for (u32 i = 0; i <= num_local; ++i) digest = (digest ^ entry_offset[i]) * 0x100000001b3u;
  return digest;
}

//! Index of the bucket that holds `value`, given ascending bucket starts offset[0..n]; offset[n] > value.
FLASHMOE_FN u32 bucket_of(const u32* offset, u32 n, u32 value) {
  u32 low = 0, high = n;
  while (high - low > 1) {
    const u32 middle = low + (high - low) / 2;
    if (offset[middle] <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

//! A view: the arrays belong to the workspace.
struct Plan {
  u32* entry_offset;     // [experts_per_pe + 1] first entry of each local expert
  u32* block_offset;     // [experts_per_pe + 1] first expert block of each local expert
  u32* active_offset;    // [experts_per_pe + 1] active experts before each local expert
  u32* active;           // [experts_per_pe] local experts with tokens, ascending
  u32* sequence;         // [experts_per_pe] the same experts in the policy's order
  u32* sequence_offset;  // [experts_per_pe + 1] expert blocks before each place of the sequence
  u32* group_rows;       // [groups][num_pes] tokens of each source PE with an expert in the group
  Entry* entries;        // by local expert, then source PE, then token
  u32 num_local;         // experts_per_pe

  FLASHMOE_FN u32 num_entries() const { return entry_offset[num_local]; }
  FLASHMOE_FN u32 num_blocks() const { return block_offset[num_local]; }
  FLASHMOE_FN u32 num_active() const { return active_offset[num_local]; }
  FLASHMOE_FN u32 expert_tokens(u32 local) const { return entry_offset[local + 1] - entry_offset[local]; }
  FLASHMOE_FN u32 expert_blocks(u32 local) const { return block_offset[local + 1] - block_offset[local]; }

  //! Calls visit(src) for each PE with a token of the expert, ascending: entries are sorted by source.
  template <class Visit>
  FLASHMOE_FN void for_each_source(u32 local, Visit visit) const {
    const u32 end = entry_offset[local + 1];
    for (u32 i = entry_offset[local]; i < end;) {
      const u32 src = entries[i].src;
      visit(src);
      u32 low = i, high = end;  // the first entry of another source: within (low, high]
      while (high - low > 1) {
        const u32 middle = low + (high - low) / 2;
        if (entries[middle].src == src) {
          low = middle;
        } else {
          high = middle;
        }
      }
      i = high;
    }
  }
};

//! Visits the (token, slot) pairs of one source PE that go to experts [first_expert, first_expert +
//! num_local). topk_of(token) gives the token's top_k experts or nullptr when the token has none here; -1 is
//! a dropped slot.
template <class TopkOf, class Visit>
FLASHMOE_FN void visit_pairs(u32 num_tokens, u32 top_k, u32 first_expert, u32 num_local, TopkOf topk_of,
                             Visit visit) {
  for (u32 token = 0; token < num_tokens; ++token) {
    const std::int32_t* experts = topk_of(token);
    if (experts == nullptr) continue;
    for (u32 k = 0; k < top_k; ++k) {
      // as unsigned, a dropped slot is far above every expert
      const u32 local = static_cast<u32>(experts[k]) - first_expert;
      if (experts[k] >= 0 && local < num_local) visit(token, k, local);
    }
  }
}

//! Fills the plan of PE `pe`. num_tokens(src) and topk_of(src, token) describe what each PE sent here.
template <class NumTokens, class TopkOf>
FLASHMOE_FN void build_plan(const Plan& plan, const Shape& shape, const Tiling& tiling, u32 pe,
                            NumTokens num_tokens, TopkOf topk_of) {
  const u32 num_local = plan.num_local;
  const u32 first_expert = pe * num_local;
  auto visit_all = [&](auto visit) {
    for (u32 src = 0; src < shape.num_pes; ++src) {
      visit_pairs(
          num_tokens(src), shape.top_k, first_expert, num_local,
          [&](u32 token) { return topk_of(src, token); },
          [&](u32 token, u32 k, u32 local) { visit(src, token, k, local); });
    }
  };
  u32* offset = plan.entry_offset;
  for (u32 local = 0; local <= num_local; ++local) offset[local] = 0;
  visit_all([&](u32, u32, u32, u32 local) { ++offset[local + 1]; });
  plan.block_offset[0] = plan.active_offset[0] = 0;
  for (u32 local = 0; local < num_local; ++local) {
    const u32 count = offset[local + 1];
    plan.block_offset[local + 1] = plan.block_offset[local] + ceil_div(count, tiling.block_tokens);
    plan.active_offset[local + 1] = plan.active_offset[local] + (count > 0 ? 1 : 0);
    if (count > 0) plan.active[plan.active_offset[local]] = local;
    offset[local + 1] += offset[local];
  }
  for (u32 i = 0; i < tiling.groups(shape) * shape.num_pes; ++i) plan.group_rows[i] = 0;
  // Second pass: offset[local] walks to the expert's end, then everything moves back by one expert.
  visit_all([&](u32 src, u32 token, u32 k, u32 local) {
    plan.entries[offset[local]++] = Entry{token, static_cast<u16>(src), static_cast<u16>(k)};
    const u32 group = tiling.group_of(local);
    const std::int32_t* experts = topk_of(src, token);
    bool counted = false;  // a token with two experts in the group gets one row back
    for (u32 earlier = 0; earlier < k; ++earlier) {
      const u32 other = static_cast<u32>(experts[earlier]) - first_expert;
      counted |= experts[earlier] >= 0 && other < num_local && tiling.group_of(other) == group;
    }
    if (!counted) ++plan.group_rows[group * shape.num_pes + src];
  });
  for (u32 local = num_local; local > 0; --local) offset[local] = offset[local - 1];
  offset[0] = 0;
}

}  // namespace flashmoe
