// What the pipelined kernel is told, and where its state lies. One PE, bf16, the shape fixed at compile time.
#pragma once
#include "flashmoe/fault.hpp"
#include "flashmoe/layout.hpp"
#include "flashmoe/policy.hpp"
#include "flashmoe/trace.hpp"

namespace flashmoe::pipeline {

// the shape that this library was built for
constexpr u32 d_model = FLASHMOE_D_MODEL, d_ff = FLASHMOE_D_FF, num_experts = FLASHMOE_NUM_EXPERTS,
              top_k = FLASHMOE_TOP_K;
constexpr bool norm_topk = FLASHMOE_NORM_TOPK != 0;

// --- the work-group: 8 warps multiply, 2 finish tiles, a thread takes picks, and a thread streams weights
constexpr u32 math_warps = 8, finish_warps = 2, pick_warp = math_warps + finish_warps,
              stream_warp = pick_warp + 1;
constexpr u32 num_threads = 32 * (stream_warp + 1);
constexpr u32 math_threads = 32 * math_warps, finish_threads = 32 * finish_warps;

// --- weights: chunks of 16 rows x 32 k; chunk c of a row tile belongs to warp c % 8
constexpr u32 chunk_bytes = 1024, unit_bytes = math_warps * chunk_bytes;
constexpr u32 up_units = (d_model / 32 + math_warps - 1) / math_warps;  // chunks of a warp in an up row tile
constexpr u32 down_units = (d_ff / 32 + math_warps - 1) / math_warps;
constexpr u32 slot_units = 3, slot_bytes = slot_units * unit_bytes;
constexpr u32 up_tile_bytes = 16 * d_model * 2, down_tile_bytes = 16 * d_ff * 2;

constexpr u32 max_words_tokens = 8;  // up to here tokens are columns, and hidden rows travel as tagged words
constexpr u32 logit_replicas = 8;
constexpr u32 sizeof_item = 64;
constexpr u32 num_items = 8;  // tasks between the picking thread and the others

struct Counters {
  u64 heads, upped, done;  // tickets by domain; [max_blocks] finish warps that are done; [groups] down picks
  u64 begin, end;
};

struct Layout {
  Counters counters[2];  // by parity of the epoch; the idle half is zeroed while the other is in use
  u64 epoch;             // [num_workers] last epoch that each worker has ended
  u64 logits;            // tagged words [replica][token][expert]
  u64 routing;           // tagged words [token][k]
  u64 topk_idx, topk_weights;
  u64 hidden;   // bf16 [token][k][d_ff], or tagged words of two
  u64 results;  // bf16 [token][group][d_model]
  u64 bytes;

  static Layout of(const Shape& s, const Tiling& t, u32 max_tokens, u32 num_workers, u32 num_domains) {
    Layout w{};
    Carver carver;
    const Limits limits = Limits::of(s, t, max_tokens);
    for (Counters& c : w.counters) {
      c.begin = c.heads = carver.take(num_domains * line_bytes);
      c.upped = carver.take(u64{limits.max_blocks} * 4);
      c.done = carver.take(u64{t.groups(s)} * 4);
      c.end = carver.size();
    }
    const u64 pairs = u64{max_tokens} * s.top_k;
    w.epoch = carver.take(u64{num_workers} * 4);
    w.logits = carver.take(u64{logit_replicas} * max_tokens * s.num_experts * 8);
    w.routing = carver.take(pairs * 8);
    w.topk_idx = carver.take(pairs * 4);
    w.topk_weights = carver.take(pairs * 4);
    w.hidden = carver.take(pairs * s.d_ff * 4);
    w.results = carver.take(u64{max_tokens} * t.groups(s) * s.d_model * 2);
    w.bytes = carver.size();
    return w;
  }
};

struct Params {
  Tiling tiling;
  QueueKind queue;
  Order order;
  Layout layout;
  char* workspace;
  const void *x, *gate, *gate_up, *down;
  void* out;
  const std::int32_t* given_idx;  // routing from outside, else nullptr
  const float* given_weights;
  const u32 *replay_offset, *replay_ids;
  u64 replay_digest;
  u32 num_tokens, num_workers, num_domains;
  u32 ring_slots;
  u64 deadline_ns;
  FaultReport* fault;
  TraceRecord* records;  // [num_workers][trace_capacity]
  u64* begin_ns;         // [num_workers] when each began
  u32 trace_capacity;
};

//! What lies where in shared memory, from its start.
struct SharedLayout {
  u32 ring, partial, sums, topk, weights, mask, entries, columns, plan, key, items, barriers, scratch, bytes;

  //! `columns`: most groups of 8 tokens in a task; `words`: tokens are columns.
  FLASHMOE_FN static SharedLayout of(const Tiling& t, u32 num_tokens, u32 ring_slots, u32 columns,
                                     bool words) {
    SharedLayout l{};
    u32 size = 0;
    auto take = [&](u32 bytes) {
      const u32 begin = size;
      size += (bytes + 15) / 16 * 16;
      return begin;
    };
    const u32 pairs = num_tokens * top_k;
    l.ring = take(ring_slots * slot_bytes);
    l.partial = take(2 * math_warps * columns * 512);
    l.sums = take(words ? 0 : num_tokens * t.down_rows * 4);
    l.topk = take(pairs * 2);
    l.weights = take(pairs * 4);
    l.mask = take(num_experts * ceil_div(num_tokens + 1, 32) * 4);
    l.entries = take(pairs * 2);
    l.columns = take(words ? num_experts * max_words_tokens * 2 : 0);
    l.plan = take(7 * (num_experts + 1) * 4);
    l.key = take(num_experts * 4);
    l.items = take(num_items * sizeof_item);
    l.barriers = take((2 * ring_slots + 3 * num_items + 4 + 1) * 8);
    l.scratch = take(256);
    l.bytes = size;
    return l;
  }
};

}  // namespace flashmoe::pipeline
