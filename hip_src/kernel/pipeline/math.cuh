// The math warps: weights times tokens, both from the ring. Each warp has a row tile of the task and a part
// of k, and leaves its sums to the finish warps.
#pragma once
#include <type_traits>

#include "plan.cuh"
#include "push.cuh"

namespace flashmoe::pipeline {

template <u32 groups, Mode mode, bool traced, bool pushed>
class Mathematician {
  static constexpr u32 num_chains = 2 * warp_chunks;  // products that do not wait for each other

 public:
  __device__ Mathematician(Group& group, TaskGraph& graph)
      : group_(group),
        graph_(graph),
        router_(group, graph.tiling),
        planner_(group, graph.tiling),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32) {}

  __device__ __forceinline__ void run() {
    planner_.clear();
    begin();
    if (make_plan()) do_tasks();
  }

 private:
  __device__ __forceinline__ void begin() {
    group_.template begin<false>();
    planner_.ask_for_given();
    if constexpr (traced) group_.begin_ns = clock_ns();  // takes a while; the routing is on its way
    // by the thread that says when tasks begin
    if (traced && threadIdx.x == 0) group_.params.summaries[group_.worker].begin_ns = group_.begin_ns;
  }

  //! What comes before the plan, and the plan. False: there is nothing more to do.
  __device__ __forceinline__ bool make_plan() {
    const bool is_given = begin_given();
    u32 end_ns = now();  // of what was given: its end is not when its item comes
    Work work;
    for (;; ++num_tasks_) {
      if (!next_item(work)) return false;
      if (work.kind == plan_item) break;
      Item& item = group_.item(items_.slot);
      if (num_tasks_ > 0 || !is_given) {
        stamp_turn(item);
        if (work.is(TaskKind::gate)) {
          router_.gate(
              Task{item.id, TaskKind::gate, none, work.tile, item.block, work.first, work.count, none});
          if constexpr (pushed) push_route(group_, graph_, item.block);
        } else {
          route(work, item);
          if constexpr (traced) meet_math_warps();  // a gate ends with one
        }
        end_ns = now();
      }
      note(item, end_ns);
      done_with_item();
    }
    planner_.build(graph_.plan, group_.params.order, router_);
    __syncwarp();
    if (warp_ < adding_warps) sm90::arrive_if(group_.planned(), lane_ == 0);
    group_.wait(group_.planned(), 0);
    keep_noted();
    if (graph_.plan.num_active() == 0 && !graph_.tiling.has_combine(graph_.shape)) write_zeros();
    if constexpr (pushed) push_planned(group_, graph_);
    done_with_item();
    return true;
  }

  //! A gate task that is given with the launch begins before anybody has picked it. Code of its own: the
  //! first instructions of a launch come from afar, and the sooner the fewer there are.
  __device__ __forceinline__ bool begin_given() {
    const Params& params = group_.params;
    const bool is_given = !pushed && params.queue != QueueKind::replay;  // its number is its first rank
    if (!graph_.gate_inside || !is_given || group_.worker >= graph_.num_gate()) return false;
    const u32 tiles = graph_.tiling.gate_tiles(graph_.shape);
    const u32 block = group_.worker / tiles, tile = group_.worker % tiles;
    router_.gate(graph_.token_block(group_.worker, TaskKind::gate, block, graph_.tiling.gate_tokens, tile));
    return true;
  }

  __device__ __forceinline__ void do_tasks() {
    clear_sums();
    for (Work work; next_item(work);) {
      group_.template complete<mode>(work, graph_.plan);
      if (mode != Mode::words || work.kind != plan_item) do_task(work, group_.item(items_.slot));
      done_with_item();
    }
  }

  __device__ __forceinline__ void do_task(const Work& work, Item& item) {
    stamp_turn(item);
    if (traced && mode == Mode::words && threadIdx.x == 0 && work.is(TaskKind::up)) {
      item.block = graph_.plan.block_offset[work.expert];
      item.id = graph_.first_up() + item.block * graph_.up_per_block() + work.tile;
    }
    if (work.is(TaskKind::up)) {
      if (mode != Mode::words) clear_sums();
      // words: a slot has room for as many columns as there are tokens
      multiply<d_model>(work, work.count, lane_ / 4 < work.count);
      put_partial(ceil_div(work.count, 8));
    } else if (work.is(TaskKind::down)) {
      down(work, item);
    } else if constexpr (mode != Mode::words) {
      combine(work, item);
      record(item);
    }
    ++num_tasks_;
  }

  //! False: there is none.
  __device__ __forceinline__ bool next_item(Work& work) const {
    if (!group_.wait_for_item(group_.item_full(items_.slot), items_.parity)) return false;
    work = group_.work(items_.slot);
    return work.kind != end_item;
  }
  __device__ __forceinline__ void done_with_item() {
    __syncwarp();
    sm90::arrive_if(group_.item_free(items_.slot), lane_ == 0);
    items_.advance(num_items);
  }
  //! Every slot of every token was dropped: nobody owns the output.
  __device__ void write_zeros() const {
    for (u32 token = group_.worker; token < group_.params.num_tokens; token += group_.params.num_workers)
      for (u32 i = threadIdx.x; i < d_model / 8; i += math_threads)
        static_cast<uint4*>(group_.params.out)[u64{token} * (d_model / 8) + i] = make_uint4(0, 0, 0, 0);
  }

  //! Keeps what was chosen for whoever asks afterwards; where tokens are many, tells the other work-groups.
  __device__ __forceinline__ void route(const Work& work, Item& item) {
    const Params& params = group_.params;
    auto* kept_idx = group_.in_workspace<std::int32_t>(params.layout.topk_idx);
    auto* kept_weights = group_.in_workspace<float>(params.layout.topk_weights);
    for (u32 i = warp_; i < work.count; i += math_warps) {
      const u32 token = work.first + i;
      const u64 pair = u64{token} * top_k + lane_;
      if (params.given_idx != nullptr) {
        if (lane_ < top_k) {
          kept_idx[pair] = params.given_idx[pair];
          kept_weights[pair] = params.given_weights[pair];
        }
        continue;
      }
      u32 expert;
      float weight, logits[lane_experts];
      router_.load_logits(token, 0, item.id, logits);
      stamp_turn(item);
      router_.choose(logits, expert, weight);
      if (lane_ < top_k) {
        kept_idx[pair] = static_cast<std::int32_t>(expert);
        kept_weights[pair] = weight;
        if constexpr (mode != Mode::words) {
          // relaxed: the word is the data
          store_relaxed<Scope::device>(group_.in_workspace<u64>(params.layout.routing) + pair,
                                       routing_word(group_.epoch(), expert, weight));
        }
      }
    }
  }

  // --- products

  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (u32 j = 0; j < groups; ++j)
      for (u32 i = 0; i < 4; ++i) sums_[j][i] = 0;
    if (mode == Mode::words)
      for (auto& chain : chains_)
        for (u32 i = 0; i < 4; ++i) chain[i] = 0;
  }

  //! Adds this warp's row tile and part of k, times the tokens, to its sums. Words: a column that this lane
  //! does not have counts as zeros.
  template <u32 k>
  __device__ __forceinline__ void multiply(const Work& work, u32 count, bool has_column = true) {
    switch_over<1>(ceil_div(count, 8),
                   [&](auto number) { multiply_groups<k, decltype(number)::value>(work, has_column); });
  }
  //! Calls with the number as a constant: the products of all groups are one straight piece of code.
  template <u32 first, class Call>
  __device__ __forceinline__ static void switch_over(u32 number, Call call) {
    if constexpr (first == groups) {
      call(std::integral_constant<u32, first>{});
    } else {
      if (number <= first) return call(std::integral_constant<u32, first>{});
      switch_over<first + (first < 4 ? 1 : 2)>(number, call);
    }
  }

  template <u32 k, u32 used>
  __device__ __forceinline__ void multiply_groups(const Work& work, bool has_column) {
    const Split split = work.template split<mode>(graph_.tiling);
    const u32 tile = warp_ & (split.tiles() - 1), part = warp_ >> split.log_tiles,
              log_parts = 3 - split.log_tiles;
    const u32 pitch = split.pitch_bytes();
    const u32 weights = group_.at.ring + (tile * split.tile_chunks() + part) * chunk_bytes + lane_ * 16;
    const u32 tokens = group_.at.ring + weight_bytes + lane_ / 4 * pitch + part * 64 + lane_ % 4 * 16;
    const bool has_tile = mode == Mode::words || tile < work.row_tiles;
    // where there is but one group, products wait for none before
    float new_chains[mode != Mode::words && used == 1 ? num_chains : 1][4] = {};
    auto sums_of = [&](u32 j, u32 chain) -> float(&)[4] {
      if constexpr (used > 1) return sums_[j];
      if constexpr (mode == Mode::words) return chains_[chain];
      return new_chains[chain];
    };
    // `rest`: k that is left
    auto take_slot = [&](u32 rest) {
      const u32 slot = slots_.slot * group_.at.slot_bytes;
      const u32 from = sm90::known_now(weights + slot), tokens_from = sm90::known_now(tokens + slot);
      u32 seen = 0;
      auto multiply_chunk = [&](u32 q) {
        const u32 chunk = q << log_parts;  // after `part`
        const uint4 low = *group_.in_shared<uint4>(from + chunk * chunk_bytes),
                    high = *group_.in_shared<uint4>(from + chunk * chunk_bytes + chunk_bytes / 2);
        if (used <= 2) seen ^= low.x ^ high.x;
        uint4 b[used];
#pragma unroll
        for (u32 j = 0; j < used; ++j) {
          const auto* mine = group_.in_shared<uint4>(tokens_from + chunk * 64 + j * 8 * pitch);
          b[j] = mode == Mode::words ? sm90::load_shared_if(has_column, sm90::shared_address(mine)) : *mine;
          if (used <= 2) seen ^= b[j].x;
        }
#pragma unroll
        for (u32 j = 0; j < used; ++j)
          sm90::mma(sums_of(j, 2 * q), low.x, low.y, low.z, low.w, b[j].x, b[j].y);
#pragma unroll
        for (u32 j = 0; j < used; ++j)
          sm90::mma(sums_of(j, 2 * q + 1), high.x, high.y, high.z, high.w, b[j].z, b[j].w);
      };
      group_.wait(group_.slot_full(slots_.slot), slots_.parity);
      __syncwarp();
      if (has_tile && rest >= split.slot_k()) {
#pragma unroll
        for (u32 q = 0; q < warp_chunks; ++q) multiply_chunk(q);
      } else if (has_tile) {
#pragma unroll
        for (u32 q = 0; q < warp_chunks; ++q)
          if ((mode == Mode::words && (q + 1) * math_warps <= rest / chunk_k) ||
              (q << log_parts) + part < rest / chunk_k)
            multiply_chunk(q);
      }
      // An arrival that is merely placed after the loads does not wait for them, and lets other weights in:
      // its address is made of what they brought, or of their products, where these are many.
      if (used > 2)
        for (u32 j = 0; j < used; ++j) seen ^= __float_as_uint(sums_[j][0]);
      __syncwarp();
      sm90::arrive_if(group_.slot_free(slots_.slot) + (seen & group_.params.nothing), lane_ == 0);
      slots_.advance(ring_slots(mode));
    };
    if constexpr (mode == Mode::words) {  // a whole slot's code once, and what is left over
      constexpr u32 slot_k = Split(1).slot_k();
#pragma unroll 1
      for (u32 k0 = 0; k0 + slot_k <= k; k0 += slot_k) take_slot(slot_k);
      if constexpr (k % slot_k != 0) take_slot(k % slot_k);
    } else {
      for (u32 k0 = 0; k0 < k; k0 += split.slot_k()) take_slot(k - k0);
    }
    if constexpr (mode != Mode::words && used == 1) add_chains(new_chains);
  }

  __device__ __forceinline__ void add_chains(const float (&chains)[num_chains][4]) {
    static_assert(num_chains == 6);
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
      sums_[0][i] =
          ((chains[0][i] + chains[1][i]) + (chains[2][i] + chains[3][i])) + (chains[4][i] + chains[5][i]);
  }

  __device__ __forceinline__ void put_partial(u32 used) {
    group_.wait(group_.partial_free(partials_.slot), partials_.parity);
    __syncwarp();
    if constexpr (mode == Mode::words) add_chains(chains_);
    auto* partial = group_.in_shared<float4>(group_.at.partial) +
                    (partials_.slot * math_warps + warp_) * SharedLayout::partial_pitch(groups);
#pragma unroll
    for (u32 j = 0; j < groups; ++j)
      if (j < used) partial[j * 32 + lane_] = make_float4(sums_[j][0], sums_[j][1], sums_[j][2], sums_[j][3]);
    __syncwarp();
    sm90::arrive_if(group_.partial_full(partials_.slot), lane_ == 0);
    partials_.advance(SharedLayout::num_partials(groups));
    if (mode == Mode::words) clear_sums();  // here it holds up nobody
  }

  __device__ __forceinline__ void down(const Work& work, Item& item) {
    if constexpr (mode == Mode::words) {
      // Tokens are columns: all that any expert of the chain makes is one sum.
      const u32* columns = group_.in_shared<u32>(group_.at.columns) + work.first;
      u32 next_column = columns[0];
      for (u32 i = 0; i < work.count; ++i) {
        const u32 column = next_column;
        next_column = columns[i + 1 < work.count ? i + 1 : i];
        if (i > 0) stamp_turn(item);
        multiply<d_ff>(work, 1, (column >> lane_ / 4 & 1) != 0);
        if constexpr (traced) {
          if (threadIdx.x == 0) item.ready_ns = group_.ready_ns(num_words_);
          ++num_words_;
          // the finish warps have a part in the last task only
          if (i + 1 == work.count) break;
          if (threadIdx.x == 0) group_.keep_record(item, item.id + i, num_tasks_);
          ++num_tasks_;
        }
      }
      put_partial(1);
    } else {
      const u32 block_tokens = graph_.tiling.block_tokens;
      for (u32 first = 0; first < work.count; first += block_tokens) {
        const u32 rest = work.count - first, count = rest < block_tokens ? rest : block_tokens;
        clear_sums();
        multiply<d_ff>(work, count);
        put_partial(ceil_div(count, 8));
      }
    }
  }

  // --- combine: a token's results in their order

  __device__ void combine(const Work& work, Item& item) {
    const Params& params = group_.params;
    const u32 slots = graph_.tiling.result_slots(graph_.shape);  // at most 32
    const auto* results = group_.in_workspace<uint4>(params.layout.results);
    constexpr u32 row_vectors = d_model / 8, batch = 8;
    // Nobody reads results and hidden rows again, and what is written back to the memory holds up the weights
    // by many times its bytes. Where it is little, to discard it takes longer: the end of the layer waits for
    // that.
    const bool discards = params.num_tokens > 32;
    for (u32 token = work.first; token < work.first + work.count; ++token) {
      // every warp for itself, a lane for each slot
      const Result result = lane_ < slots ? result_of(router_, graph_, token, lane_) : Result{0, 0, 0};
      const u32* done = group_.in_workspace<u32>(group_.counters().done) + result.counter;
      u32 turns = 0, seen = 0;
      u64 since_ns = 0;
      // acquire: pairs with the signal warp's (words: the finish warps') add_release; __syncwarp hands it on
      // to the other lanes
      while (result.target != 0 && (seen = load_acquire<Scope::device>(done)) != result.target)
        if (!group_.keep_waiting(turns, since_ns, item.id, EventKind::result, result.counter, seen,
                                 result.target))
          break;
      __syncwarp();
      if (group_.warp_stopped()) return;
      if (token == work.first) stamp_turn(item);
      const u32 present = __ballot_sync(~0u, result.target != 0);
      for (u32 base = warp_ * 32; base < row_vectors; base += math_threads) {
        const u32 i = base + lane_;
        float sum[8] = {};
        for (u32 first = 0; first < slots; first += batch) {
          uint4 rows[batch];
#pragma unroll
          for (u32 z = 0; z < batch; ++z)
            rows[z] = present >> (first + z) & 1 && i < row_vectors
                          ? __ldcg(results + (u64{token} * slots + first + z) * row_vectors + i)
                          : make_uint4(0, 0, 0, 0);
#pragma unroll
          for (u32 z = 0; z < batch; ++z) {
            const float weight = __shfl_sync(~0u, result.weight, (first + z) % 32);
            if (!(present >> (first + z) & 1)) continue;
            const u32 pairs[4] = {rows[z].x, rows[z].y, rows[z].z, rows[z].w};
#pragma unroll
            for (u32 q = 0; q < 4; ++q) {
              const float2 p = sm90::as_floats(pairs[q]);
              sum[2 * q] += weight * p.x;
              sum[2 * q + 1] += weight * p.y;
            }
          }
        }
        if (i < row_vectors) static_cast<uint4*>(params.out)[u64{token} * row_vectors + i] = as_bf16(sum);
        // Other lanes have read theirs of these lines.
        __syncwarp();
        for (u32 line = lane_; discards && line < 4 * slots; line += 32) {
          const u32 slot = line / 4, first = base + line % 4 * 8;
          if ((present >> slot & 1) != 0 && first < row_vectors)
            sm90::discard(results + (u64{token} * slots + slot) * row_vectors + first);
        }
      }
      if (mode == Mode::tiles && discards) {
        // Whoever told of a result had read the hidden row that it is made of.
        constexpr u32 row_lines = d_ff * 2 / line_bytes;
        const auto* hidden = group_.in_workspace<char>(params.layout.hidden) + u64{token} * slots * d_ff * 2;
        for (u32 line = threadIdx.x; line < slots * row_lines; line += math_threads)
          if ((present >> line / row_lines & 1) != 0) sm90::discard(hidden + line * line_bytes);
      }
    }
  }

  // --- times

  __device__ __forceinline__ void stamp_turn(Item& item) const {
    if constexpr (traced) {
      if (threadIdx.x == 0) item.turn_ns = sm90::timer_ns();
    }
  }
  // Of the tasks that the finish warps have no part in. Those before the plan, which everybody waits for, are
  // noted and kept later.
  __device__ __forceinline__ void record(const Item& item) const {
    if constexpr (traced) {
      meet_math_warps();
      if (threadIdx.x == 0) group_.keep_record(item, item.id, num_tasks_);
    }
  }
  __device__ __forceinline__ void note(const Item& item, u32 end_ns) {
    if constexpr (traced) {
      keep_noted();
      noted_ = item;
      noted_end_ns_ = end_ns;
    }
  }
  //! With the trace on.
  __device__ __forceinline__ static u32 now() { return traced ? sm90::timer_ns() : 0; }
  //! The last one.
  __device__ __forceinline__ void keep_noted() const {
    if (traced && threadIdx.x == 0 && noted_end_ns_ != 0)
      group_.keep_record(noted_, noted_.id, num_tasks_ - 1, noted_end_ns_);
  }

  Group& group_;
  TaskGraph& graph_;
  Router<mode, groups <= 4 ? 1 : 2> router_;  // more tokens in a block, more in a gate task
  Planner<mode> planner_;
  u32 warp_, lane_;
  Item noted_{};
  u32 noted_end_ns_ = 0;
  u32 num_tasks_ = 0;
  u32 num_words_ = 0;  // tasks of chains that are one item
  Turn items_{0}, slots_{0}, partials_{1};
  float sums_[groups][4];
  float chains_[mode == Mode::words ? num_chains : 1][4];  // words: instead of the sums
};

}  // namespace flashmoe::pipeline
