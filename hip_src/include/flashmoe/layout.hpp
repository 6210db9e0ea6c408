// Where everything lies. One struct gives size and pointers, on both sides of every language and link.
#pragma once
#include "flashmoe/exchange.hpp"
#include "flashmoe/plan.hpp"
#include "flashmoe/shape.hpp"

namespace flashmoe {

constexpr u64 line_bytes = 128;  // one writer a line: no false sharing, on host and device alike

//! Hands out ranges of a block of memory, each on a line of its own.
class Carver {
 public:
  FLASHMOE_FN u64 take(u64 bytes) {
    const u64 offset = size_;
    size_ += (bytes + line_bytes - 1) / line_bytes * line_bytes;
    return offset;
  }
  FLASHMOE_FN u64 size() const { return size_; }

 private:
  u64 size_ = 0;
};

//! Bounds that hold for every routing of at most `max_tokens` tokens a PE.
struct Limits {
  u32 max_tokens;    // per PE
  u32 max_entries;   // (token, expert) pairs at one PE
  u32 max_blocks;    // expert blocks at one PE
  u32 max_picks;     // of one PE
  u32 result_words;  // of one PE

  FLASHMOE_FN static Limits of(const Shape& s, const Tiling& t, u32 max_tokens) {
    Limits limits{};
    const u32 local = s.experts_per_pe();
    limits.max_tokens = max_tokens;
    limits.max_entries = s.num_pes * max_tokens * (s.top_k < local ? s.top_k : local);
    const u32 full = limits.max_entries / t.block_tokens + local;  // every expert may end in a partial block
    limits.max_blocks = full < limits.max_entries ? full : limits.max_entries;
    const u32 tiles = t.up_tiles(s) + t.down_tiles(s);
    limits.max_picks = t.route_blocks(max_tokens) * (t.gate_tiles(s) + 1) +
                       t.dispatch_blocks(max_tokens) * (s.num_pes - 1) + limits.max_blocks * tiles +
                       t.down_tiles(s) * t.groups(s) + ceil_div(max_tokens, t.combine_tokens);
    if (t.granularity == Granularity::token) {
      limits.result_words = max_tokens * s.top_k;
    } else {
      limits.result_words = t.down == Down::rows ? s.num_pes * t.groups(s) : s.num_experts;
    }
    return limits;
  }
};

//! The symmetric heap of a PE: everything that other PEs write. The same offsets on every PE.
struct HeapLayout {
  u64 landed[2], result[2];                      // words, by parity of the epoch
  u64 tags[2], experts[2], weights[2], rows[2];  // landing slots [src][token]
  u64 results[2];                                // [token][slot][d_model]
  u64 bytes;

  FLASHMOE_FN static HeapLayout of(const Shape& s, const Tiling& t, const Limits& limits) {
    HeapLayout h{};
    Carver carver;
    const u64 slots = u64{s.num_pes} * limits.max_tokens;
    for (u32 parity = 0; parity < 2; ++parity) {
      h.landed[parity] = carver.take(s.num_pes * line_bytes);
      h.result[parity] = carver.take(u64{limits.result_words} * sizeof(u64));
      h.tags[parity] = carver.take(slots * sizeof(u32));
      h.experts[parity] = carver.take(slots * s.top_k * sizeof(std::int32_t));
      h.weights[parity] = carver.take(slots * s.top_k * sizeof(float));
      h.rows[parity] = carver.take(slots * s.d_model * s.element_bytes());
      h.results[parity] =
          carver.take(u64{limits.max_tokens} * t.result_slots(s) * s.d_model * s.element_bytes());
    }
    h.bytes = carver.size();
    return h;
  }
};

//! A PE's symmetric heap in one epoch.
struct Heap {
  char* base;
  const HeapLayout* layout;
  const Shape* shape;
  u32 max_tokens;
  u32 result_slots;
  u32 parity;

  template <class T>
  FLASHMOE_FN T* at(u64 offset) const {
    return reinterpret_cast<T*>(base + offset);
  }
  FLASHMOE_FN u64 slot(u32 src, u32 token) const { return u64{src} * max_tokens + token; }

  FLASHMOE_FN u64* landed(u32 src) const { return at<u64>(layout->landed[parity] + src * line_bytes); }
  FLASHMOE_FN u64* result(u32 word) const { return at<u64>(layout->result[parity]) + word; }
  //! Epoch in which a landing slot was last filled: says which tokens came.
  FLASHMOE_FN u32* tag(u32 src, u32 token) const { return at<u32>(layout->tags[parity]) + slot(src, token); }
  FLASHMOE_FN std::int32_t* experts(u32 src, u32 token) const {
    return at<std::int32_t>(layout->experts[parity]) + slot(src, token) * shape->top_k;
  }
  FLASHMOE_FN float* weights(u32 src, u32 token) const {
    return at<float>(layout->weights[parity]) + slot(src, token) * shape->top_k;
  }
  FLASHMOE_FN char* row(u32 src, u32 token) const {
    return at<char>(layout->rows[parity]) + slot(src, token) * shape->d_model * shape->element_bytes();
  }
  FLASHMOE_FN char* result_row(u32 token, u32 result_slot) const {
    return at<char>(layout->results[parity]) +
           (u64{token} * result_slots + result_slot) * shape->d_model * shape->element_bytes();
  }
};

//! The workspace of a PE: what only its own workers touch.
struct WorkspaceLayout {
  // Counters come twice, by parity of the epoch: worker 0 zeroes the idle half while the other one is in use.
  struct Counters {
    u64 heads;          // [num_domains] a line each: ticket counters
    u64 tail;           // push: slots published
    u64 cursor;         // push: next group of tasks to look for, and whether somebody is at it
    u64 plan_state;     // 0 none, 1 being built, 2 ready
    u64 exits;          // workers that are done
    u64 gated, routed;  // [route blocks]
    u64 num_routed;     // route tasks done
    u64 dispatched;     // [num_pes] tasks and rows, see exchange.hpp
    u64 upped;          // [max_blocks]
    u64 done;           // [experts_per_pe or groups] down tasks done
    u64 begin, end;     // the half as a whole
  };
  Counters counters[2];
  u64 epoch;
  u64 slots;   // [max_picks] push: task ids with the epoch they belong to
  u64 logits;  // [max_tokens][num_experts]
  u64 topk_idx, topk_weights;
  u64 plan;  // arrays of Plan, then scratch for build_sequence
  u64 entries;
  u64 hidden;  // [max_entries][d_ff]
  u64 bytes;

  FLASHMOE_FN static u64 plan_words(const Shape& s, const Tiling& t) {
    return u64{7} * (s.experts_per_pe() + 1) + u64{t.groups(s)} * s.num_pes;
  }

  FLASHMOE_FN static WorkspaceLayout of(const Shape& s, const Tiling& t, const Limits& limits,
                                        u32 num_domains) {
    WorkspaceLayout w{};
    Carver carver;
    for (Counters& c : w.counters) {
      c.begin = c.heads = carver.take(num_domains * line_bytes);
      c.tail = carver.take(sizeof(u32));
      c.cursor = carver.take(sizeof(u32));
      c.plan_state = carver.take(sizeof(u32));
      c.exits = carver.take(sizeof(u32));
      c.gated = carver.take(u64{t.route_blocks(limits.max_tokens)} * sizeof(u32));
      c.routed = carver.take(u64{t.route_blocks(limits.max_tokens)} * sizeof(u32));
      c.num_routed = carver.take(sizeof(u32));
      c.dispatched = carver.take(u64{s.num_pes} * sizeof(u64));
      c.upped = carver.take(u64{limits.max_blocks} * sizeof(u32));
      c.done = carver.take(u64{s.experts_per_pe()} * sizeof(u32));
      c.end = carver.size();
    }
    w.epoch = carver.take(sizeof(u32));
    w.slots = carver.take(u64{limits.max_picks} * sizeof(u64));
    w.logits = carver.take(u64{limits.max_tokens} * s.num_experts * sizeof(float));
    w.topk_idx = carver.take(u64{limits.max_tokens} * s.top_k * sizeof(std::int32_t));
    w.topk_weights = carver.take(u64{limits.max_tokens} * s.top_k * sizeof(float));
    w.plan = carver.take(plan_words(s, t) * sizeof(u32));
    w.entries = carver.take(u64{limits.max_entries} * sizeof(Entry));
    w.hidden = carver.take(u64{limits.max_entries} * s.d_ff * s.element_bytes());
    w.bytes = carver.size();
    return w;
  }

  //! Carves the plan's arrays out of `words` [plan_words]; returns what is left as scratch [experts_per_pe].
  FLASHMOE_FN static u32* bind_plan(Plan& plan, const Shape& s, const Tiling& t, u32* words, Entry* entries) {
    const u32 n = s.experts_per_pe();
    u32** arrays[] = {&plan.entry_offset, &plan.block_offset, &plan.active_offset,
                      &plan.active,       &plan.sequence,     &plan.sequence_offset};
    for (u32** array : arrays) {
      *array = words;
      words += n + 1;
    }
    plan.group_rows = words;
    plan.entries = entries;
    plan.num_local = n;
    return words + u64{t.groups(s)} * s.num_pes;
  }
};

}  // namespace flashmoe
