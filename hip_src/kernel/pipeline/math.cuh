// The math warps: weights from the ring times tokens in registers. K is shared out over the warps; each
// leaves its partial sums of a row tile to the finish warps, and goes on.
#pragma once
#include "plan.cuh"

namespace flashmoe::pipeline {

__device__ __forceinline__ u32 delta(u64 from_ns, u64 to_ns) {
  return to_ns > from_ns ? static_cast<u32>(to_ns - from_ns) : 0u;
}

//! Tokens as the matrix instruction's right-hand side: `units` chunks of a warp, `columns` groups of 8
//! tokens.
template <u32 units, u32 columns>
struct Tokens {
  u32 words[units][columns][4];
};

template <u32 columns, bool words_mode, bool traced>
class Mathematician {
 public:
  __device__ Mathematician(const Group& group, TaskGraph& graph)
      : group_(group), graph_(graph), planner_(group), warp_(threadIdx.x / 32), lane_(threadIdx.x % 32) {}

  __device__ void run() {
    if constexpr (words_mode) load_own_tokens();
    for (;;) {
      // What is derived from these two is worked out anew for each item: kept over the loop, the addresses of
      // all kinds of tasks together would not leave registers enough for the products.
      asm volatile("" : "+r"(lane_), "+r"(warp_));
      group_.wait(group_.item_full(items_.slot), items_.parity);
      if (group_.stopped()) return;
      Item& item = group_.in_shared<Item>(group_.at.items)[items_.slot];
      if (item.kind == ItemKind::end) return;
      if (item.kind == ItemKind::plan) {
        make_plan();
        done_with_item();
      } else if (item.task_kind == TaskKind::down) {
        down_chain();
      } else {
        stamp(item, true);
        run_task(item);
        done_with_item();
      }
    }
  }

 private:
  __device__ void run_task(const Item& item) {
    switch (item.task_kind) {
      case TaskKind::gate:
        planner_.gate<words_mode>(item);
        record(item);
        return;
      case TaskKind::route:
        route(item);
        record(item);
        return;
      case TaskKind::up:
        up(item);
        return;
      case TaskKind::combine:
        combine(item);
        record(item);
        return;
      default:
        return;
    }
  }

  __device__ void make_plan() {
    planner_.build<words_mode>(graph_.plan, group_.params.order);
    has_plan_ = true;
    if (graph_.plan.num_active() == 0 && !graph_.tiling.has_combine(graph_.shape)) write_zeros();
    __syncwarp();
    sm90::arrive_if(group_.planned(), lane_ == 0);
  }
  //! Every slot of every token was dropped: nobody owns the output.
  __device__ void write_zeros() const {
    for (u32 token = group_.worker; token < group_.params.num_tokens; token += group_.params.num_workers)
      for (u32 i = threadIdx.x; i < d_model / 8; i += math_threads)
        static_cast<uint4*>(group_.params.out)[u64{token} * (d_model / 8) + i] = make_uint4(0, 0, 0, 0);
  }

  //! Keeps what was chosen for whoever asks afterwards; where tokens are many, tells the other work-groups.
  __device__ void route(const Item& item) {
    const Params& params = group_.params;
    auto* kept_idx = group_.in_workspace<std::int32_t>(params.layout.topk_idx);
    auto* kept_weights = group_.in_workspace<float>(params.layout.topk_weights);
    for (u32 i = warp_; i < item.num_tokens; i += math_warps) {
      const u32 token = item.first + i;
      const u64 pair = u64{token} * top_k + lane_;
      if (params.given_idx != nullptr) {
        if (lane_ < top_k) {
          kept_idx[pair] = params.given_idx[pair];
          kept_weights[pair] = params.given_weights[pair];
        }
        continue;
      }
      u32 expert;
      float weight;
      planner_.choose(token, 0, item.id, expert, weight);
      if (lane_ < top_k) {
        kept_idx[pair] = static_cast<std::int32_t>(expert);
        kept_weights[pair] = weight;
        if constexpr (!words_mode) {
          // relaxed: the word is the data
          store_relaxed<Scope::device>(group_.in_workspace<u64>(params.layout.routing) + pair,
                                       routing_word(group_.epoch, expert, weight));
        }
      }
    }
  }

  // --- products

  template <u32 k>
  static constexpr u32 units_of = (k / 32 + math_warps - 1) / math_warps;

  //! One row tile: c += weights x tokens for this warp's chunks. `groups`: groups of 8 tokens in use.
  template <u32 k>
  __device__ __forceinline__ void multiply(const Tokens<units_of<k>, columns>& tokens, u32 groups,
                                           float (&c)[columns][4]) {
    constexpr u32 units = units_of<k>;
    const u32 num_chunks = k / 32;
    float d[columns][4];  // a second chain of additions where there is but one group
#pragma unroll
    for (u32 j = 0; j < columns; ++j)
      for (u32 i = 0; i < 4; ++i) d[j][i] = 0;
#pragma unroll
    for (u32 begin = 0; begin < units; begin += slot_units) {
      group_.wait(group_.slot_full(slots_.slot), slots_.parity);
      __syncwarp();
      const auto* a =
          reinterpret_cast<const uint4*>(group_.shared + group_.at.ring + slots_.slot * slot_bytes) +
          warp_ * (chunk_bytes / 16) + lane_;
      uint4 low[slot_units], high[slot_units];
      u32 seen = 0;
#pragma unroll
      for (u32 q = 0; q < slot_units; ++q) {
        if (begin + q >= units) continue;
        low[q] = a[q * (unit_bytes / 16)];
        high[q] = a[q * (unit_bytes / 16) + 32];
        seen ^= low[q].x ^ high[q].w * 3u;
      }
      // The slot may be filled again only when its weights are in registers: the arrival depends on them. (An
      // arrival that is merely placed after the loads does not wait for them, and lets wrong weights in.)
      __syncwarp();
      sm90::arrive_if(group_.slot_free(slots_.slot), lane_ == 0 && seen != 0x9e3779b9u);
      if (seen == 0x9e3779b9u && lane_ == 0) sm90::arrive(group_.slot_free(slots_.slot));
      slots_.advance(group_.params.ring_slots);
#pragma unroll
      for (u32 q = 0; q < slot_units; ++q) {
        if (begin + q >= units) continue;
        const u32 unit = begin + q;
        if (num_chunks % math_warps != 0 && unit == units - 1 && unit * math_warps + warp_ >= num_chunks)
          continue;
#pragma unroll
        for (u32 j = 0; j < columns; ++j)
          if (j < groups)
            sm90::mma(c[j], low[q].x, low[q].y, low[q].z, low[q].w, tokens.words[unit][j][0],
                      tokens.words[unit][j][1]);
#pragma unroll
        for (u32 j = 0; j < columns; ++j)
          if (j < groups)
            sm90::mma(columns == 1 ? d[j] : c[j], high[q].x, high[q].y, high[q].z, high[q].w,
                      tokens.words[unit][j][2], tokens.words[unit][j][3]);
      }
    }
    if (columns == 1)
      for (u32 i = 0; i < 4; ++i) c[0][i] += d[0][i];
  }

  __device__ __forceinline__ void put_partial(const float (&c)[columns][4], u32 groups) {
    group_.wait(group_.partial_free(partials_.slot), partials_.parity);
    __syncwarp();
    auto* partial = group_.in_shared<float4>(group_.at.partial) + partials_.slot * math_warps * columns * 32;
#pragma unroll
    for (u32 j = 0; j < columns; ++j)
      if (j < groups)
        partial[(j * math_warps + warp_) * 32 + lane_] = make_float4(c[j][0], c[j][1], c[j][2], c[j][3]);
    __syncwarp();
    sm90::arrive_if(group_.partial_full(partials_.slot), lane_ == 0);
    partials_.advance(2);
  }

  //! Loads 16 bytes of a row for each of this warp's chunks; row nullptr: zeros. unchanging: nobody writes
  //! the row during the launch, so that L1 may keep it.
  template <u32 k, bool unchanging>
  __device__ __forceinline__ void load_row(Tokens<units_of<k>, columns>& tokens, u32 j,
                                           const void* row) const {
#pragma unroll
    for (u32 u = 0; u < units_of<k>; ++u) {
      uint4 value = make_uint4(0, 0, 0, 0);
      const u32 chunk = u * math_warps + warp_;
      if (row != nullptr && chunk < k / 32) {
        const uint4* from = static_cast<const uint4*>(row) + chunk * 4 + lane_ % 4;
        value = unchanging ? __ldg(from) : __ldcg(from);
      }
      tokens.words[u][j][0] = value.x, tokens.words[u][j][1] = value.y;
      tokens.words[u][j][2] = value.z, tokens.words[u][j][3] = value.w;
    }
  }

  __device__ void load_own_tokens() {
    const u32 token = lane_ / 4;
    const auto* x = static_cast<const char*>(group_.params.x);
    load_row<d_model, true>(own_, 0,
                            token < group_.params.num_tokens ? x + u64{token} * d_model * 2 : nullptr);
  }

  __device__ void up(const Item& item) {
    if constexpr (words_mode) {
      up_tiles(item, own_, 1);
    } else {
      Tokens<up_units, columns> tokens;
      const u32 groups = ceil_div(item.num_tokens, 8);
      const u16* entries = group_.in_shared<u16>(group_.at.entries) + item.first;
#pragma unroll
      for (u32 j = 0; j < columns; ++j) {
        if (j >= groups) continue;
        const u32 column = j * 8 + lane_ / 4;
        const char* row = nullptr;
        if (column < item.num_tokens)
          row = static_cast<const char*>(group_.params.x) + u64{entries[column] / top_k} * d_model * 2;
        load_row<d_model, true>(tokens, j, row);
      }
      up_tiles(item, tokens, groups);
    }
  }
  __device__ __forceinline__ void up_tiles(const Item& item, const Tokens<up_units, columns>& tokens,
                                           u32 groups) {
    for (u32 tile = 0; tile < item.row_tiles; ++tile) {
      float c[columns][4] = {};
      multiply<d_model>(tokens, groups, c);
      put_partial(c, groups);
    }
  }

  // --- down: all experts of a group for some rows of the output

  __device__ void down_chain() {
    if constexpr (words_mode)
      down_chain_of_words();
    else
      down_chain_of_lists();
  }

  static constexpr u32 ahead = down_units <= 3 ? 3 : 1;  // experts whose hidden words are on their way
  static constexpr u32 max_row_tiles = 2;

  __device__ __forceinline__ void load_hidden_words(u64 (&words)[down_units][4], u32 place) const {
    const u32 pair = group_.in_shared<u16>(group_.at.columns)[place * max_words_tokens + lane_ / 4];
    const u64* hidden = group_.in_workspace<u64>(group_.params.layout.hidden) + u64{pair} * (d_ff / 2) +
                        warp_ * 16 + lane_ % 4 * 4;
#pragma unroll
    for (u32 u = 0; u < down_units; ++u) {
      if (pair != 0xffffu && u * math_warps + warp_ < d_ff / 32) {
        sm90::load_words(hidden + u * math_warps * 16, words[u][0], words[u][1]);
        sm90::load_words(hidden + u * math_warps * 16 + 2, words[u][2], words[u][3]);
      } else {
        for (u32 i = 0; i < 4; ++i) words[u][i] = u64{group_.epoch} << 32;
      }
    }
  }

  //! Tokens are columns and their weights are in the hidden rows: one set of sums for all experts.
  __device__ void down_chain_of_words() {
    const Item& head = group_.in_shared<Item>(group_.at.items)[items_.slot];
    const u32 first = head.chain_first, end = head.chain_end, row_tiles = head.row_tiles;
    float sums[max_row_tiles][columns][4] = {};
    u64 words[ahead][down_units][4];
#pragma unroll
    for (u32 z = 0; z < ahead; ++z)
      if (first + z < end) load_hidden_words(words[z], first + z);
    for (u32 base = first; base < end; base += ahead) {
#pragma unroll
      for (u32 z = 0; z < ahead; ++z) {
        const u32 place = base + z;
        if (place >= end) continue;
        group_.wait(group_.item_full(items_.slot), items_.parity);
        Item& item = group_.in_shared<Item>(group_.at.items)[items_.slot];
        stamp(item, false);
        u32 turns = 0;
        u64 since_ns = 0;
        for (;;) {
          bool all = true;
#pragma unroll
          for (u32 u = 0; u < down_units; ++u)
            for (u32 i = 0; i < 4; ++i) all = all && epoch_of(words[z][u][i]) == group_.epoch;
          if (__all_sync(~0u, all)) break;
          const bool go_on =
              group_.keep_waiting(turns, since_ns, item.id, EventKind::upped, item.block, 0, group_.epoch);
          if (!__all_sync(~0u, go_on)) break;
          load_hidden_words(words[z], place);
        }
        Tokens<down_units, columns> tokens;
#pragma unroll
        for (u32 u = 0; u < down_units; ++u)
          for (u32 i = 0; i < 4; ++i) tokens.words[u][0][i] = static_cast<u32>(words[z][u][i]);
        if (place + ahead < end) load_hidden_words(words[z], place + ahead);
        stamp(item, true);
#pragma unroll
        for (u32 r = 0; r < max_row_tiles; ++r)
          if (r < row_tiles) multiply<d_ff>(tokens, 1, sums[r]);
        if (place + 1 == end) {
#pragma unroll
          for (u32 r = 0; r < max_row_tiles; ++r)
            if (r < row_tiles) put_partial(sums[r], 1);
        }
        done_with_item();
      }
    }
  }

  //! Experts one after the other, each for its own tokens; the finish warps add them up.
  __device__ void down_chain_of_lists() {
    const Item head = group_.in_shared<Item>(group_.at.items)[items_.slot];
    Tokens<down_units, columns> tokens[2];
    u32 place = head.chain_first;
    const Plan& plan = graph_.plan;
    const u32 first_block = head.block;
    const u32 end_block = plan.block_offset[plan.active[head.chain_end - 1] + 1];
    u32 known = first_block;  // blocks before this one are ready
    u32 loaded = 0;           // bit z: tokens[z] hold the block that is next for them
    u32 expert = head.expert, pass = 0;
    auto look = [&] {
      const u32 target = graph_.up_per_block() * finish_warps;
      const u32 block = known + lane_;
      bool ready = block < end_block;
      // acquire: pairs with the finish warps' add_release; __syncwarp hands it on to the other lanes
      if (ready)
        ready =
            load_acquire<Scope::device>(group_.in_workspace<u32>(group_.counters.upped) + block) == target;
      const u32 ballot = __ballot_sync(~0u, ready);
      __syncwarp();
      known += ballot == ~0u ? 32 : __ffs(static_cast<int>(~ballot)) - 1;
    };
    auto load = [&](Tokens<down_units, columns>& into, u32 of_expert, u32 of_pass) {
      const u32 first = plan.entry_offset[of_expert] + of_pass * 8 * columns;
      const u32 count = plan.entry_offset[of_expert + 1] - first;
      const u16* entries = group_.in_shared<u16>(group_.at.entries) + first;
#pragma unroll
      for (u32 j = 0; j < columns; ++j) {
        if (j * 8 >= count) continue;
        const u32 column = j * 8 + lane_ / 4;
        const char* row = nullptr;
        if (column < count)
          row = group_.in_workspace<char>(group_.params.layout.hidden) + u64{entries[column]} * d_ff * 2;
        load_row<d_ff, false>(into, j, row);
      }
    };
    for (u32 base = first_block; base < end_block; base += 2) {
#pragma unroll
      for (u32 z = 0; z < 2; ++z) {
        const u32 block = base + z;
        if (block >= end_block) continue;
        group_.wait(group_.item_full(items_.slot), items_.parity);
        Item& item = group_.in_shared<Item>(group_.at.items)[items_.slot];
        const u32 passes = plan.expert_blocks(expert);
        if (pass == 0) stamp(item, false);
        if (!(loaded >> z & 1)) {
          u32 turns = 0;
          u64 since_ns = 0;
          while (known <= block) {
            look();
            if (known > block) break;
            const bool go_on = group_.keep_waiting(turns, since_ns, item.id, EventKind::upped, block, 0,
                                                   graph_.up_per_block());
            if (!__all_sync(~0u, go_on)) break;
          }
          load(tokens[z], expert, pass);
        }
        loaded &= ~(1u << z);
        const bool same = pass + 1 < passes;
        const u32 next_expert = same ? expert : block + 1 < end_block ? plan.active[place + 1] : expert;
        if (block + 1 < end_block) {
          if (known <= block + 1) look();
          if (known > block + 1) {
            load(tokens[z ^ 1], next_expert, same ? pass + 1 : 0);
            loaded |= 1u << (z ^ 1);
          }
        }
        if (pass == 0) stamp(item, true);
        const u32 rest = plan.expert_tokens(expert) - pass * 8 * columns;
        const u32 groups = rest < 8 * columns ? ceil_div(rest, 8) : columns;
        for (u32 r = 0; r < head.row_tiles; ++r) {
          float c[columns][4] = {};
          multiply<d_ff>(tokens[z], groups, c);
          put_partial(c, groups);
        }
        if (same) {
          ++pass;
        } else {
          done_with_item();
          pass = 0;
          expert = next_expert;
          ++place;
        }
      }
    }
  }

  // --- combine: a token's groups in their order

  __device__ void combine(const Item& item) {
    const Params& params = group_.params;
    const u32 groups = params.tiling.groups(graph_.shape);
    const u32 target = params.tiling.down_tiles(graph_.shape);
    u32 turns = 0;
    u64 since_ns = 0;
    for (u32 g = 0; g < groups; ++g) {
      if (graph_.group_begin(g) == graph_.group_begin(g + 1)) continue;
      // acquire, by every thread that reads: pairs with the finish warps' add_release
      const u32* done = group_.in_workspace<u32>(group_.counters.done) + g;
      while (load_acquire<Scope::device>(done) != target) {
        if (!group_.keep_waiting(turns, since_ns, item.id, EventKind::result, g, 0, target)) return;
      }
    }
    const auto* results = group_.in_workspace<uint4>(params.layout.results);
    constexpr u32 row_vectors = d_model / 8;
    for (u32 i = threadIdx.x; i < item.num_tokens * row_vectors; i += math_threads) {
      const u64 token = item.first + i / row_vectors;
      float sum[8] = {};
      for (u32 g = 0; g < groups; ++g) {
        if (graph_.group_begin(g) == graph_.group_begin(g + 1)) continue;
        const uint4 row = __ldcg(results + (token * groups + g) * row_vectors + i % row_vectors);
        const u32 pairs[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
        for (u32 q = 0; q < 4; ++q) {
          const float2 p = sm90::as_floats(pairs[q]);
          sum[2 * q] += p.x;
          sum[2 * q + 1] += p.y;
        }
      }
      static_cast<uint4*>(params.out)[token * row_vectors + i % row_vectors] =
          make_uint4(sm90::as_bf16_pair(sum[0], sum[1]), sm90::as_bf16_pair(sum[2], sum[3]),
                     sm90::as_bf16_pair(sum[4], sum[5]), sm90::as_bf16_pair(sum[6], sum[7]));
    }
  }

  // --- items and records

  __device__ __forceinline__ void done_with_item() {
    if (group_.in_shared<Item>(group_.at.items)[items_.slot].kind == ItemKind::task) ++num_tasks_;
    __syncwarp();
    sm90::arrive_if(group_.item_free(items_.slot), lane_ == 0);
    items_.advance(num_items);
  }
  //! started false: the worker turns to the task; true: its inputs are there.
  __device__ __forceinline__ void stamp(Item& item, bool started) const {
    if constexpr (traced) {
      if (threadIdx.x == 0) {
        const u32 now = delta(item.ticket_ns, clock_ns());
        item.ready_delta = now;
        if (started) item.start_delta = now;
      }
    }
  }
  //! Of the tasks that the finish warps have no part in.
  __device__ __forceinline__ void record(const Item& item) const {
    if constexpr (traced) {
      sm90::named_barrier<math_barrier, math_threads>();
      if (threadIdx.x == 0 && num_tasks_ < group_.params.trace_capacity) {
        const u64 start_ns = item.ticket_ns + item.start_delta;
        group_.params.records[u64{group_.worker} * group_.params.trace_capacity + num_tasks_] =
            TraceRecord{start_ns, delta(start_ns, clock_ns()),
                        item.id,  item.start_delta,
                        0,        static_cast<u16>(group_.worker),
                        0xffff,   static_cast<u16>(group_.worker % group_.params.num_domains),
                        0};
      }
    }
  }

  const Group& group_;
  TaskGraph& graph_;
  Planner planner_;
  u32 warp_, lane_;
  u32 num_tasks_ = 0;
  bool has_plan_ = false;
  Turn items_{0}, slots_{0}, partials_{1};
  Tokens<up_units, columns> own_;  // tokens as columns, for the whole launch
};

}  // namespace flashmoe::pipeline
