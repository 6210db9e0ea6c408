// The finish warps add up the partial sums of a row tile and do what follows (SwiGLU, weights, stores). The
// signal warp tells the other work-groups: its fences, which wait for all that is under way, hold up nobody
// else.
#pragma once
#include "math.cuh"

namespace flashmoe::pipeline {

template <u32 groups, Mode mode, bool traced>
class Finisher {
  using R = Roles<mode>;
  static constexpr u32 finish_warps = R::finish_warps, finish_threads = R::finish_threads;

 public:
  __device__ Finisher(Group& group, const TaskGraph& graph)
      : group_(group), graph_(graph), warp_(threadIdx.x / 32 - math_warps), lane_(threadIdx.x % 32) {}

  __device__ void run() {
    for (;;) {
      if (!group_.wait_for_item(group_.item_full(items_.slot), items_.parity)) return;
      Work work = group_.work(items_.slot);
      group_.template complete<mode>(work, graph_.plan);
      if (work.kind == end_item) break;
      if (work.kind != plan_item) {
        if (work.is(TaskKind::up)) {
          if constexpr (mode == Mode::words) up_words(work);
          if constexpr (mode != Mode::words) up(work);
        } else if (work.is(TaskKind::down)) {
          if constexpr (mode == Mode::words) down_words(work);
          if constexpr (mode == Mode::rows) down_rows(work);
          if constexpr (mode == Mode::tiles) down_tile(work);
        }
        if constexpr (traced) {
          const Item& item = group_.item(items_.slot);
          // of a whole chain, the last
          const u32 others = mode == Mode::words && work.is(TaskKind::down) ? work.count - 1 : 0;
          num_tasks_ += others;
          if ((work.is(TaskKind::up) || work.is(TaskKind::down)) && warp_ == 0 && lane_ == 0)
            group_.keep_record(item, item.id + others, num_tasks_);
        }
        ++num_tasks_;
      }
      __syncwarp();
      // release: this warp's stores; the signal warp, which waits for all finish warps, tells of them
      if constexpr (mode != Mode::words) sm90::arrive_if(group_.item_stored(items_.slot), lane_ == 0);
      sm90::arrive_if(group_.item_free(items_.slot), lane_ == 0);
      items_.advance(num_items);
    }
    if constexpr (traced) {
      if (warp_ == 0 && lane_ == 0) {
        TraceSummary& summary = group_.params.summaries[group_.worker];
        summary.size = num_tasks_ < group_.params.trace_capacity ? num_tasks_ : group_.params.trace_capacity;
        summary.drops = num_tasks_ - summary.size;
      }
    }
  }

 private:
  //! Waits for the partial sums of a block.
  __device__ __forceinline__ void next_partial() {
    group_.wait(group_.partial_full(partials_.slot), partials_.parity);
    __syncwarp();
  }
  __device__ __forceinline__ void free_partial() {
    __syncwarp();
    sm90::arrive_if(group_.partial_free(partials_.slot), lane_ == 0);
    partials_.advance(SharedLayout::num_partials(groups));
  }
  __device__ __forceinline__ const float4* partial_of(u32 tile, u32 j) const {
    return group_.in_shared<float4>(group_.at.partial) +
           (partials_.slot * math_warps + tile) * SharedLayout::partial_pitch(groups) + j * 32;
  }
  //! Rows 8 half .. 8 half + 7 of a row tile, one token: summed over the parts of k, in their order.
  __device__ __forceinline__ void sum_rows(const Split& split, u32 tile, u32 half, u32 column,
                                           float (&sum)[8]) const {
    const auto* partial = reinterpret_cast<const float*>(partial_of(tile, column / 8)) + column % 8 / 2 * 4 +
                          column % 2 + 2 * half;
#pragma unroll
    for (u32 row = 0; row < 8; ++row) sum[row] = partial[row * 16];
    for (u32 part = 1; part < split.parts(); ++part) {
      partial += SharedLayout::partial_pitch(groups) * 4 << split.log_tiles;
#pragma unroll
      for (u32 row = 0; row < 8; ++row) sum[row] += partial[row * 16];
    }
  }
  //! Every other vector of 8 rows of the block's tokens. Neighbouring lanes have the same token's, so that
  //! they store whole lines: pieces of lines cost the memory many times their bytes.
  template <class Visit>
  __device__ __forceinline__ void for_each_vector(u32 count, u32 vectors, Visit visit) const {
    for (u32 i = warp_ * 32 + lane_; i < count * vectors; i += finish_threads)
      visit(i / vectors, i % vectors);
  }
  __device__ __forceinline__ static float swiglu(float gate, float up) {
    return gate / (1.0f + __expf(-gate)) * up;
  }

  __device__ __forceinline__ void up(const Work& work) {
    const u16* pairs = group_.in_shared<u16>(group_.at.entries) + work.first;
    const Split split = work.template split<mode>(graph_.tiling);
    next_partial();
    for_each_vector(work.count, work.row_tiles, [&](u32 column, u32 tile) {
      float gate[8], up[8];
      sum_rows(split, tile, 0, column, gate);
      sum_rows(split, tile, 1, column, up);
#pragma unroll
      for (u32 i = 0; i < 8; ++i) gate[i] = swiglu(gate[i], up[i]);
      const u32 row = work.tile * graph_.tiling.up_rows + tile * 8;
      auto* hidden = group_.in_workspace<uint4>(group_.params.layout.hidden);
      hidden[(u64{pairs[column]} * d_ff + row) / 8] = as_bf16(gate);
    });
    free_partial();
  }

  //! Where there is one row tile and a block has at most 8 tokens: rows lane/4 and lane/4 + 8, columns
  //! 2 (lane%4) and the next, summed over all warps.
  __device__ __forceinline__ float4 sum_of_tile() const {
    return sum_over_warps(partial_of(0, 0) + lane_, SharedLayout::partial_pitch(groups));
  }

  __device__ __forceinline__ void up_words(const Work& work) {
    group_.wait(group_.planned(), 0);  // the lists: the item may have come before them
    const u16* pairs = group_.in_shared<u16>(group_.at.entries) + graph_.plan.entry_offset[work.expert];
    const float* weights = group_.in_shared<float>(group_.at.weights);
    next_partial();
    const float4 sum = sum_of_tile();
    const u32 row = work.tile * words_up_rows + lane_ / 4, column = lane_ % 4 * 2;
    const bool has0 = column < work.count, has1 = column + 1 < work.count;
    const u32 pair0 = has0 ? pairs[column] : 0, pair1 = has1 ? pairs[column + 1] : 0;
    float h0 = swiglu(sum.x, sum.z), h1 = swiglu(sum.y, sum.w);
    if (has0) h0 *= weights[pair0];
    if (has1) h1 *= weights[pair1];
    const float below0 = __shfl_down_sync(~0u, h0, 4), below1 = __shfl_down_sync(~0u, h1, 4);
    u64* hidden = group_.in_workspace<u64>(group_.params.layout.hidden);
    const u64 tag = u64{group_.epoch()} << 32;
    // relaxed: the word is the data, and the epoch in it says that it is there
    const bool is_mine = lane_ / 4 % 2 == 0;
    if (is_mine && has0)
      store_relaxed<Scope::device>(hidden + (u64{pair0} * d_ff + row) / 2,
                                   tag | sm90::as_bf16_pair(h0, below0));
    if (is_mine && has1)
      store_relaxed<Scope::device>(hidden + (u64{pair1} * d_ff + row) / 2,
                                   tag | sm90::as_bf16_pair(h1, below1));
    free_partial();
  }

  //! The sums of all experts of a chain.
  __device__ __forceinline__ void down_words(const Work& work) {
    next_partial();
    const float4 sum = sum_of_tile();
    const u32 row = work.tile * words_down_rows + lane_ / 4, token = lane_ % 4 * 2;
    store(work, token, row, sum.x), store(work, token + 1, row, sum.y);
    store(work, token, row + 8, sum.z), store(work, token + 1, row + 8, sum.w);
    free_partial();
    end_chain(work);
  }

  //! Adds one expert's rows. Eight rows are always the same warp's: a cell has one writer, and the experts'
  //! order is fixed.
  __device__ __forceinline__ void down_rows(const Work& work) {
    const u32 rows = graph_.tiling.down_rows, block_tokens = graph_.tiling.block_tokens;
    const Split split = work.template split<mode>(graph_.tiling);
    float* sums = group_.in_shared<float>(group_.at.sums);
    const u32 finish_thread = warp_ * 32 + lane_;
    if (work.chain & starts_chain) {
      for (u32 i = finish_thread; i < group_.params.num_tokens * rows; i += finish_threads) sums[i] = 0;
      sm90::named_barrier<finish_barrier, finish_threads>();
    }
    const float* weights = group_.in_shared<float>(group_.at.weights);
    for (u32 first = 0; first < work.count; first += block_tokens) {
      const u32 rest = work.count - first, count = rest < block_tokens ? rest : block_tokens;
      const u16* pairs = group_.in_shared<u16>(group_.at.entries) + work.first + first;
      next_partial();
      for (u32 half = warp_; half < 2 * work.row_tiles; half += finish_warps) {
        const u32 row = half * 8 + lane_ / 4;
        for (u32 j = 0; j < ceil_div(count, 8); ++j) {
          const auto* partial = reinterpret_cast<const float2*>(partial_of(half / 2, j) + lane_) + half % 2;
          float2 sum = partial[0];
          for (u32 part = 1; part < split.parts(); ++part) {
            const float2 other = partial[(part << split.log_tiles) * SharedLayout::partial_pitch(groups) * 2];
            sum.x += other.x, sum.y += other.y;
          }
          const u32 column = j * 8 + lane_ % 4 * 2;
          if (column < count) sums[pairs[column] / top_k * rows + row] += sum.x * weights[pairs[column]];
          if (column + 1 < count)
            sums[pairs[column + 1] / top_k * rows + row] += sum.y * weights[pairs[column + 1]];
        }
      }
      free_partial();
    }
    if (!(work.chain & ends_chain)) return;
    sm90::named_barrier<finish_barrier, finish_threads>();
    const u32 width = work.row_tiles * 16;
    for (u32 i = finish_thread; i < group_.params.num_tokens * width / 2; i += finish_threads) {
      const u32 token = i / (width / 2), row = i % (width / 2) * 2;
      *reinterpret_cast<u32*>(out_cell(work, token, work.tile * rows + row)) =
          sm90::as_bf16_pair(sums[token * rows + row], sums[token * rows + row + 1]);
    }
    sm90::named_barrier<finish_barrier, finish_threads>();  // the sums are cleared for the next chain by all
  }

  //! Unweighted results, for combine.
  __device__ __forceinline__ void down_tile(const Work& work) {
    const u16* pairs = group_.in_shared<u16>(group_.at.entries) + work.first;
    const Split split = work.template split<mode>(graph_.tiling);
    auto* results = group_.in_workspace<uint4>(group_.params.layout.results);
    next_partial();
    for_each_vector(work.count, work.row_tiles * 2, [&](u32 column, u32 vector) {
      float sum[8];
      sum_rows(split, vector / 2, vector % 2, column, sum);
      const u32 row = work.tile * graph_.tiling.down_rows + vector * 8;
      results[(u64{pairs[column]} * d_model + row) / 8] = as_bf16(sum);
    });
    free_partial();
  }

  __device__ __forceinline__ __nv_bfloat16* out_cell(const Work& work, u32 token, u32 row) const {
    const Tiling& tiling = graph_.tiling;
    if (!tiling.has_combine(graph_.shape))
      return static_cast<__nv_bfloat16*>(group_.params.out) + u64{token} * d_model + row;
    return group_.in_workspace<__nv_bfloat16>(group_.params.layout.results) +
           (u64{token} * tiling.groups(graph_.shape) + tiling.group_of(work.expert)) * d_model + row;
  }
  __device__ __forceinline__ void store(const Work& work, u32 token, u32 row, float value) const {
    if (token < group_.params.num_tokens) *out_cell(work, token, row) = __float2bfloat16(value);
  }

  __device__ __forceinline__ void end_chain(const Work& work) const {
    if (!graph_.tiling.has_combine(graph_.shape)) return;
    static_assert(finish_warps == 1 || mode != Mode::words);
    __syncwarp();
    // release: __syncwarp has brought the other lanes' stores before this one's signal
    if (lane_ == 0)
      sm90::add_release(group_.template in_workspace<u32>(group_.counters().done) +
                        graph_.tiling.group_of(work.expert));
  }

  Group& group_;
  const TaskGraph& graph_;
  u32 warp_, lane_;
  u32 num_tasks_ = 0;
  Turn items_{0}, partials_{0};
};

template <bool pushed>
class Signaller {
 public:
  __device__ Signaller(Group& group, const TaskGraph& graph) : group_(group), graph_(graph) {}

  __device__ void run() {
    for (;;) {
      if (!group_.wait_for_item(group_.item_full(items_.slot), items_.parity)) return;
      const Item& item = group_.item(items_.slot);
      const Work work = item.work();
      if (work.kind == end_item) return;
      group_.wait(group_.item_stored(items_.slot), items_.parity);
      u32* counter = counter_of(work, item.block);
      // release at device scope: what the finish warps stored, and handed on with item_stored
      if (counter != nullptr && !group_.stopped()) {
        if (pushed && work.is(TaskKind::up) && !graph_.by_rows())
          push_downs(group_, graph_, item.block);
        else
          sm90::add_release(counter);
      }
      sm90::arrive(group_.item_free(items_.slot));
      items_.advance(num_items);
    }
  }

 private:
  __device__ __forceinline__ u32* counter_of(const Work& work, u32 block) const {
    u32* done = group_.in_workspace<u32>(group_.counters().done);
    if (work.is(TaskKind::up)) return group_.in_workspace<u32>(group_.counters().upped) + block;
    if (!work.is(TaskKind::down)) return nullptr;
    if (!graph_.by_rows()) return done + work.expert;
    if (!(work.chain & ends_chain) || !graph_.tiling.has_combine(graph_.shape)) return nullptr;
    return done + graph_.tiling.group_of(work.expert);
  }

  Group& group_;
  const TaskGraph& graph_;
  Turn items_{0};
};

}  // namespace flashmoe::pipeline
