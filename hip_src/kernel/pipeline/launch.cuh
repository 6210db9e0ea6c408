// What the pipelined kernel is told, and where its state lies. One PE, bf16, the shape fixed at compile time.
#pragma once
#include "built_shape.hpp"
#include "flashmoe/fault.hpp"
#include "flashmoe/layout.hpp"
#include "flashmoe/policy.hpp"
#include "flashmoe/trace.hpp"
#include "tile_map.hpp"

namespace flashmoe::pipeline {

using namespace built;  // the shape that this library was built for

//! How rows and results travel, by what the tokens are few or many enough for.
enum class Mode : u32 {
  words,  // at most 8 tokens, down by rows, a row tile a task, all experts in a pick: hidden rows as words
          // that carry their epoch, one sum over all experts
  rows,   // down by rows: an expert's rows added to sums in shared memory
  tiles,  // down by tile: results in memory, then combine
};
constexpr u32 max_words_tokens = 8, words_up_rows = 8, words_down_rows = 16;

FLASHMOE_FN Mode mode_of(const Tiling& t, u32 num_tokens) {
  if (t.down == Down::tile) return Mode::tiles;
  const bool is_small = t.up_rows == words_up_rows && t.down_rows == words_down_rows &&
                        (t.experts_per_pick == 0 || t.experts_per_pick >= num_experts);
  return is_small && num_tokens <= max_words_tokens ? Mode::words : Mode::rows;
}

// --- the work-group. 8 warps multiply, one takes picks, one streams weights; the others by mode: words are
// polled, which takes many loads at once, so that each slot of the ring has a loading warp; where rows are
// many, their stores and the fences after them take time.
constexpr u32 math_warps = 8, math_threads = 32 * math_warps;
template <Mode mode>
struct Roles {
  static constexpr u32 finish_warps = mode == Mode::words ? 1 : 3, load_warps = mode == Mode::words ? 3 : 2,
                       signal_warps = mode == Mode::words ? 0 : 1;
  static constexpr u32 most_rows = mode == Mode::words ? 8 : mode == Mode::rows ? 32 : 64;  // of a block
  static constexpr u32 finish_threads = 32 * finish_warps;
  static constexpr u32 pick = math_warps + finish_warps, stream = pick + 1, load = stream + 1,
                       signal = load + load_warps;
  static constexpr u32 num_threads = 32 * (signal + signal_warps);
};
FLASHMOE_FN constexpr u32 num_threads(Mode mode) {
  return mode == Mode::words  ? Roles<Mode::words>::num_threads
         : mode == Mode::rows ? Roles<Mode::rows>::num_threads
                              : Roles<Mode::tiles>::num_threads;
}

// --- the ring. Weights come in chunks of 16 rows x 32 k. A slot holds the same k of all row tiles of a task,
// 3 chunks for each math warp, and the tokens' elements of that k.
constexpr u32 warp_chunks = 3, slot_chunks = warp_chunks * math_warps,
              weight_bytes = slot_chunks * chunk_bytes;
//! More bytes in flight than the memory needs only queue in front of everything else.
FLASHMOE_FN constexpr u32 ring_slots(Mode mode) { return mode == Mode::words ? 3 : 4; }
constexpr u32 most_ring_slots = ring_slots(Mode::tiles);

//! How a slot is shared out when a task has so many row tiles: a warp has one of them, and a part of k.
struct Split {
  u32 log_tiles;  // row tiles, rounded up to 1, 2, 4 or 8

  FLASHMOE_FN constexpr explicit Split(u32 row_tiles)
      : log_tiles(row_tiles > 4   ? 3
                  : row_tiles > 2 ? 2
                  : row_tiles > 1 ? 1
                                  : 0) {}
  FLASHMOE_FN constexpr u32 tiles() const { return 1u << log_tiles; }
  FLASHMOE_FN constexpr u32 parts() const { return math_warps >> log_tiles; }
  //! Of a row tile in a slot.
  FLASHMOE_FN constexpr u32 tile_chunks() const { return slot_chunks >> log_tiles; }
  FLASHMOE_FN constexpr u32 slot_k() const { return tile_chunks() * chunk_k; }
  //! Bytes from token to token in a slot: 64 more than a multiple of 128, so that the 8 lanes that the shared
  //! memory serves at once (2 tokens, 64 bytes of each) find 8 different groups of banks.
  FLASHMOE_FN constexpr u32 pitch_bytes() const {
    const u32 bytes = slot_k() * 2;
    return bytes % 128 == 0 ? bytes + 64 : bytes;
  }
};

constexpr u32 logit_replicas = 8;
constexpr u32 sizeof_item = 48;
constexpr u32 num_items = 8;  // tasks between the picking thread and the others
constexpr u32 num_ready =
    8;  // tasks of a chain that the loading warps may be ahead of the math warps, and more
constexpr u32 num_barriers = 2 * most_ring_slots + 4 * num_items + 6;
// What is asked for all the time lies first in shared memory, at addresses that the compiler knows.
constexpr u32 items_at = 0, barriers_at = num_items * sizeof_item, ready_at = barriers_at + num_barriers * 8,
              stop_at = ready_at + num_ready * 4;

//! A tiling of powers of two, as their logarithms: what is divided by them is shifted.
struct LogTiling {
  u32 gate_tokens, gate_experts, up_rows, down_rows, block_tokens, combine_tokens;
  u32 experts_per_pick;
  Down down;

  static u32 log(u32 value) {
    u32 result = 0;
    while (value >> (result + 1) != 0) ++result;
    return result;
  }
  static bool is_power(u32 value) { return value != 0 && (value & (value - 1)) == 0; }
  static bool fits(const Tiling& t) {
    return is_power(t.gate_tokens) && is_power(t.gate_experts) && is_power(t.up_rows) &&
           is_power(t.down_rows) && is_power(t.block_tokens) && is_power(t.combine_tokens);
  }
  static LogTiling of(const Tiling& t) {
    return LogTiling{log(t.gate_tokens),  log(t.gate_experts),   log(t.up_rows),     log(t.down_rows),
                     log(t.block_tokens), log(t.combine_tokens), t.experts_per_pick, t.down};
  }
  FLASHMOE_FN Tiling tiling() const {
    return Tiling{Granularity::tile,
                  down,
                  1u << gate_tokens,
                  1u << gate_experts,
                  1u,
                  1u << up_rows,
                  1u << down_rows,
                  1u << block_tokens,
                  experts_per_pick,
                  1u << combine_tokens};
  }
};

struct Counters {
  u64 heads, upped, done;   // tickets by domain; [max_blocks] up tasks; [groups] or [experts] down tasks
  u64 tail, cursor, gated;  // push: slots; groups of tasks; [route blocks] gate tasks
  u64 begin, end;
};

struct Layout {
  Counters counters[2];  // by parity of the epoch; the idle half is zeroed while the other is in use
  u64 epoch;             // [num_workers] last epoch that each worker has ended, a line each
  u64 logits;            // tagged words [replica][token][expert]
  u64 routing;           // tagged words [token][k]
  u64 topk_idx, topk_weights;
  u64 hidden;   // bf16 [token][k][d_ff], or tagged words of two
  u64 results;  // bf16 [token][group or k][d_model]
  u64 slots;    // push: [picks] task ids with the epoch they belong to
  u64 bytes;

  static Layout of(const Shape& s, const Tiling& t, u32 max_tokens, u32 num_workers, u32 num_domains,
                   QueueKind queue) {
    Layout w{};
    Carver carver;
    const Limits limits = Limits::of(s, t, max_tokens);
    for (Counters& c : w.counters) {
      c.begin = c.heads = carver.take(num_domains * line_bytes);
      c.upped = carver.take(u64{limits.max_blocks} * 4);
      c.done = carver.take(u64{s.num_experts} * 4);
      c.tail = carver.take(4);
      c.cursor = carver.take(4);
      c.gated = carver.take(u64{t.route_blocks(max_tokens)} * 4);
      c.end = carver.size();
    }
    const u64 pairs = u64{max_tokens} * s.top_k;
    w.epoch = carver.take(u64{num_workers} * line_bytes);
    w.logits = carver.take(u64{logit_replicas} * max_tokens * s.num_experts * 8);
    w.routing = carver.take(pairs * 8);
    w.topk_idx = carver.take(pairs * 4);
    w.topk_weights = carver.take(pairs * 4);
    w.hidden = carver.take(pairs * s.d_ff * 4);
    w.results = carver.take(u64{max_tokens} * t.result_slots(s) * s.d_model * 2);
    w.slots = carver.take(queue == QueueKind::push ? u64{limits.max_picks} * 8 : 0);
    w.bytes = carver.size();
    return w;
  }
};

//! What lies where in shared memory, from its start.
struct SharedLayout {
  u32 ring, slot_bytes, partial, sums, weights, entries, plan;
  u32 columns;  // words: [active experts] bit t: token t has the expert
  // while the plan is made, in the ring, which is empty then; for words before it, and they stay
  u32 topk, mask, before, key;
  u32 bytes;

  //! `groups`: most groups of 8 tokens in a block.
  static SharedLayout of(const Tiling& t, u32 num_tokens, u32 groups, Mode mode) {
    SharedLayout l{};
    u32 size = 0;
    auto take = [&](u32 bytes) {
      const u32 begin = size;
      size += (bytes + 127) / 128 * 128;
      return begin;
    };
    take(stop_at + 4);
    l.ring = size;
    const u32 pairs = num_tokens * top_k;
    const u32 up_pitch = Split(t.up_rows / 8).pitch_bytes(),
              down_pitch = Split(t.down_rows / 16).pitch_bytes();
    const u32 columns = mode == Mode::words ? num_tokens : (t.block_tokens + 7) / 8 * 8;
    l.slot_bytes = weight_bytes + columns * (up_pitch > down_pitch ? up_pitch : down_pitch);
    l.slot_bytes = (l.slot_bytes + 127) / 128 * 128;
    l.topk = take(pairs * 2);
    l.mask = take(num_experts * mask_words(num_tokens) * 4);
    l.before = take(num_experts * mask_words(num_tokens) * 2);
    l.key = take(num_experts * 4);
    const u32 ring_bytes = ring_slots(mode) * l.slot_bytes;
    if (mode == Mode::words) l.ring = size;
    size = size < l.ring + ring_bytes ? l.ring + ring_bytes : size;
    l.partial = take(num_partials(groups) * math_warps * partial_pitch(groups) * 16);
    l.sums = take(mode == Mode::rows ? num_tokens * t.down_rows * 4 : 0);
    l.weights = take(mode == Mode::tiles ? 0 : pairs * 4);
    l.entries = take(pairs * 2);
    l.plan = take(6 * (num_experts + 1) * 4);
    l.columns = take(mode == Mode::words ? num_experts * 4 : 0);
    l.bytes = size;
    return l;
  }
  //! Of a math warp's partial sums, in vectors of 4. One more than they need: rows of the same number in
  //! different row tiles lie in different banks.
  FLASHMOE_FN static constexpr u32 partial_pitch(u32 groups) { return groups * 32 + 1; }
  FLASHMOE_FN static constexpr u32 num_partials(u32 groups) { return groups > 4 ? 1 : 2; }
  FLASHMOE_FN static u32 mask_words(u32 num_tokens) { return ceil_div(num_tokens + 1, 32); }
};

struct Params {
  sm90::TileMap up_tiles, down_tiles;  // of gate_up and down: a slot's worth of a task's row tiles
  LogTiling cut;
  QueueKind queue;
  Order order;
  Layout layout;
  SharedLayout at;
  char* workspace;
  const void *x, *gate, *gate_up, *down;
  void* out;
  const std::int32_t* given_idx;  // routing from outside, else nullptr
  const float* given_weights;
  const u32 *replay_offset, *replay_ids;
  u64 replay_digest;
  u32 num_tokens, num_workers, num_domains;
  u32 nothing;  // 0, which the compiler does not know
  u64 deadline_ns;
  FaultReport* fault;
  TraceRecord* records;     // [num_workers][trace_capacity]
  TraceSummary* summaries;  // [num_workers]
  u32 trace_capacity;
};

}  // namespace flashmoe::pipeline
