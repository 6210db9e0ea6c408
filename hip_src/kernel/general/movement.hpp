// Work that multiplies nothing: copies, dispatch, combine.
#pragma once
#include "dispatch.hpp"
#include "flashmoe/bf16.hpp"
#include "group.hpp"

namespace flashmoe::general {

//! `rank` of `size` threads copy 4-byte words, or 16 bytes at a time where everything allows it.
FLASHMOE_DEVICE void copy_words(void* to, const void* from, u64 bytes, u32 rank, u32 size) {
  const bool wide = ((reinterpret_cast<u64>(to) | reinterpret_cast<u64>(from) | bytes) & 15) == 0;
  if (wide) {
    for (u64 at = rank * 16; at < bytes; at += size * 16)
      arch::store(static_cast<char*>(to) + at, arch::load(static_cast<const char*>(from) + at));
  } else {
    for (u64 i = rank; i < bytes / 4; i += size) static_cast<u32*>(to)[i] = static_cast<const u32*>(from)[i];
  }
}

//! `bytes` is a multiple of 8, as is `to`.
FLASHMOE_DEVICE void zero(Hand& hand, const Command& command) {
  for (u64 i = hand.thread; i < command.bytes / 8; i += crew_threads) static_cast<u64*>(command.to)[i] = 0;
}

//! A wave a token.
FLASHMOE_DEVICE void dispatch(Hand& hand, const Task& task) {
  const u32 rows =
      dispatch_rows(task, hand.view, hand.wave, crew_waves, [&](void* to, const void* from, u64 bytes) {
        copy_words(to, from, bytes, hand.lane, arch::wave_size);
      });
  if (hand.lane == 0) arch::add_in_group(&hand.group.result, rows);
}

//! How many rows of a PE have landed.
FLASHMOE_DEVICE void landed_rows(Hand& hand, u32 src) {
  const u32 count = hand.view.num_tokens(src);
  u32 rows = 0;
  for (u32 token = hand.thread; token < count; token += crew_threads)
    rows += hand.view.has_landed(src, token) ? 1 : 0;
  arch::add_in_group(&hand.group.result, rows);
}

FLASHMOE_DEVICE void add_pair(u32 pair, float weight, float& low, float& high) {
  low += weight * to_float(bf16{static_cast<u16>(pair)});
  high += weight * to_float(bf16{static_cast<u16>(pair >> 16)});
}

//! Adds up a token's results in the order of their slots: top-k order, or PE by PE.
FLASHMOE_DEVICE void combine(Hand& hand, const Task& task) {
  const PeView& view = hand.view;
  const TaskGraph& graph = view.graph;
  constexpr u32 top_k = built::top_k, octets = built::d_model / 8, batch = crew_threads / 16;
  static_assert(top_k <= 16 && batch * 16 <= scratch_words);
  u32* slots = hand.group.words;  // [batch][16] slots with a result, ascending; then none
  const bool by_rows = graph.by_rows();
  for (u32 begin = 0; begin < task.num_tokens; begin += batch) {
    const u32 rest = task.num_tokens - begin, count = rest < batch ? rest : batch;
    const u32 first = task.first + begin;
    const u32 k = hand.thread % 16, member = hand.thread / 16;
    hand.sync();
    slots[hand.thread] = none;
    hand.sync();
    if (k < top_k && member < count) {
      const u32 token = first + member;
      const std::int32_t* experts = graph.topk_idx + u64{token} * top_k;
      auto slot_of = [&](u32 i) {
        if (experts[i] < 0) return none;
        return by_rows ? graph.result_word(token, i, static_cast<u32>(experts[i])) : i;
      };
      const u32 mine = slot_of(k);
      bool again = mine == none;  // by rows several experts share a slot
      u32 place = 0;
      for (u32 i = 0; i < top_k; ++i) {
        const u32 other = slot_of(i);
        again |= other == mine && i < k;
        bool counts = other < mine;
        for (u32 j = 0; counts && j < i; ++j) counts = slot_of(j) != other;
        place += counts ? 1 : 0;
      }
      if (!again) slots[member * 16 + place] = mine;
    }
    hand.sync();
    for (u32 i = hand.thread; i < count * octets; i += crew_threads) {
      const u32 in_batch = i / octets, octet = i % octets, token = first + in_batch;
      const float* weights = view.topk_weights() + u64{token} * top_k;
      float sum[8] = {};
#pragma unroll
      for (u32 n = 0; n < top_k; ++n) {
        const u32 slot = slots[in_batch * 16 + n];
        if (slot == none) break;
        // by rows the weights are in the sums already
        const float weight = by_rows ? 1.0f : weights[slot];
        const arch::Words row = arch::load(view.heap(view.pe).result_row(token, slot) + octet * 16);
        add_pair(row.x, weight, sum[0], sum[1]);
        add_pair(row.y, weight, sum[2], sum[3]);
        add_pair(row.z, weight, sum[4], sum[5]);
        add_pair(row.w, weight, sum[6], sum[7]);
      }
      u32 pairs[4];
#pragma unroll
      for (u32 j = 0; j < 4; ++j)
        pairs[j] = u32{to_bf16(sum[2 * j]).bits} | u32{to_bf16(sum[2 * j + 1]).bits} << 16;
      arch::store(static_cast<char*>(view.out(token)) + octet * 16,
                  arch::Words{pairs[0], pairs[1], pairs[2], pairs[3]});
    }
  }
}

}  // namespace flashmoe::general
