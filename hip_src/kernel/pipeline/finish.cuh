// The finish warps: add up the partial sums of a row tile, do what follows (SwiGLU, weights, stores) and
// signal. All fences are theirs, so that none ever holds up the warps that free the ring.
#pragma once
#include "math.cuh"

namespace flashmoe::pipeline {

template <u32 columns, bool words_mode, bool traced>
class Finisher {
 public:
  __device__ Finisher(const Group& group, const TaskGraph& graph)
      : group_(group), graph_(graph), warp_(threadIdx.x / 32 - math_warps), lane_(threadIdx.x % 32) {}

  __device__ void run() {
    for (;;) {
      group_.wait(group_.item_full(items_.slot), items_.parity);
      if (group_.stopped()) return;
      const Item& item = group_.in_shared<Item>(group_.at.items)[items_.slot];
      if (item.kind == ItemKind::end) return;
      if (item.kind == ItemKind::task) {
        if (item.task_kind == TaskKind::up) {
          up(item);
          record(item);
        } else if (item.task_kind == TaskKind::down) {
          words_mode ? down_words(item) : down_lists(item);
          record(item);
        }
        ++num_tasks_;
      }
      __syncwarp();
      sm90::arrive_if(group_.item_free(items_.slot), lane_ == 0);
      items_.advance(num_items);
    }
  }

 private:
  //! Waits for a row tile's partial sums.
  __device__ __forceinline__ void next_partial() {
    group_.wait(group_.partial_full(partials_.slot), partials_.parity);
    __syncwarp();
  }
  __device__ __forceinline__ void free_partial() {
    __syncwarp();
    sm90::arrive_if(group_.partial_free(partials_.slot), lane_ == 0);
    partials_.advance(2);
  }
  //! Sum over the math warps, in their order: rows lane/4 and lane/4 + 8, columns 2 (lane%4) and the next.
  __device__ __forceinline__ float4 sum_of(u32 j) const {
    const auto* partial = group_.in_shared<float4>(group_.at.partial) +
                          (partials_.slot * columns + j) * math_warps * 32 + lane_;
    float4 sum = partial[0];
#pragma unroll
    for (u32 i = 1; i < math_warps; ++i) {
      const float4 other = partial[i * 32];
      sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
    }
    return sum;
  }
  __device__ __forceinline__ static float swiglu(float gate, float up) {
    return gate / (1.0f + __expf(-gate)) * up;
  }

  __device__ void up(const Item& item) {
    const Plan& plan = graph_.plan;
    const u32 groups = words_mode ? 1 : ceil_div(item.num_tokens, 8);
    const u16* pairs = words_mode ? group_.in_shared<u16>(group_.at.columns) +
                                        plan.active_offset[item.expert] * max_words_tokens
                                  : group_.in_shared<u16>(group_.at.entries) + item.first;
    const u32 count = words_mode ? max_words_tokens : item.num_tokens;
    const float* weights = group_.in_shared<float>(group_.at.weights);
    for (u32 tile = 0; tile < item.row_tiles; ++tile) {
      next_partial();
      const u32 row = item.tile * group_.params.tiling.up_rows + tile * 8 + lane_ / 4;
      for (u32 j = (warp_ + num_tiles_) % finish_warps; j < groups; j += finish_warps) {
        const float4 sum = sum_of(j);
        const u32 column = j * 8 + lane_ % 4 * 2;
        const u32 pair0 = column < count ? pairs[column] : 0xffffu;
        const u32 pair1 = column + 1 < count ? pairs[column + 1] : 0xffffu;
        float h0 = swiglu(sum.x, sum.z), h1 = swiglu(sum.y, sum.w);
        if constexpr (words_mode) {
          if (pair0 != 0xffffu) h0 *= weights[pair0];
          if (pair1 != 0xffffu) h1 *= weights[pair1];
          const float below0 = __shfl_down_sync(~0u, h0, 4), below1 = __shfl_down_sync(~0u, h1, 4);
          if (lane_ / 4 % 2 == 0) {
            u64* hidden = group_.in_workspace<u64>(group_.params.layout.hidden);
            const u64 tag = u64{group_.epoch} << 32;
            // relaxed: the word is the data, and the epoch in it says that it is there
            if (pair0 != 0xffffu)
              store_relaxed<Scope::device>(hidden + u64{pair0} * (d_ff / 2) + row / 2,
                                           tag | sm90::as_bf16_pair(h0, below0));
            if (pair1 != 0xffffu)
              store_relaxed<Scope::device>(hidden + u64{pair1} * (d_ff / 2) + row / 2,
                                           tag | sm90::as_bf16_pair(h1, below1));
          }
        } else {
          auto* hidden = group_.in_workspace<__nv_bfloat16>(group_.params.layout.hidden);
          if (pair0 != 0xffffu) hidden[u64{pair0} * d_ff + row] = __float2bfloat16(h0);
          if (pair1 != 0xffffu) hidden[u64{pair1} * d_ff + row] = __float2bfloat16(h1);
        }
      }
      ++num_tiles_;
      free_partial();
    }
    if constexpr (!words_mode) {
      // release: this warp's rows; down waits for both warps of all of the block's tasks
      if (lane_ == 0) sm90::add_release(group_.in_workspace<u32>(group_.counters.upped) + item.block);
    }
  }

  //! The chain's last item brings the sums of all experts.
  __device__ void down_words(const Item& item) {
    if (!ends_chain(item)) return;
    for (u32 tile = 0; tile < item.row_tiles; ++tile) {
      next_partial();
      if (tile % finish_warps == warp_) {
        const float4 sum = sum_of(0);
        const u32 row = item.tile * group_.params.tiling.down_rows + tile * 16 + lane_ / 4;
        const u32 token = lane_ % 4 * 2;
        store(item, token, row, sum.x), store(item, token + 1, row, sum.y);
        store(item, token, row + 8, sum.z), store(item, token + 1, row + 8, sum.w);
      }
      free_partial();
    }
    end_chain(item);
  }

  //! Adds one expert's rows: rows 0-7 of a tile are the first warp's, 8-15 the second's, so that a cell has
  //! one writer and the experts' order is fixed.
  __device__ void down_lists(const Item& item) {
    const u32 rows = group_.params.tiling.down_rows;
    float* sums = group_.in_shared<float>(group_.at.sums);
    const u32 finish_thread = warp_ * 32 + lane_;
    if (is_chain_start(item)) {
      for (u32 i = finish_thread; i < group_.params.num_tokens * rows; i += finish_threads) sums[i] = 0;
      sm90::named_barrier<finish_barrier, finish_threads>();
    }
    const float* weights = group_.in_shared<float>(group_.at.weights);
    for (u32 first = 0; first < item.num_tokens; first += 8 * columns) {
      const u32 rest = item.num_tokens - first, count = rest < 8 * columns ? rest : 8 * columns;
      const u16* pairs = group_.in_shared<u16>(group_.at.entries) + item.first + first;
      for (u32 tile = 0; tile < item.row_tiles; ++tile) {
        next_partial();
        {
          const auto* partial = reinterpret_cast<const float2*>(group_.in_shared<float4>(group_.at.partial) +
                                                                partials_.slot * columns * math_warps * 32) +
                                warp_;
          const u32 row = tile * 16 + warp_ * 8 + lane_ / 4;
          for (u32 j = 0; j < ceil_div(count, 8); ++j) {
            float2 sum = partial[(j * math_warps * 32 + lane_) * 2];
#pragma unroll
            for (u32 i = 1; i < math_warps; ++i) {
              const float2 other = partial[((j * math_warps + i) * 32 + lane_) * 2];
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
    }
    if (!ends_chain(item)) return;
    sm90::named_barrier<finish_barrier, finish_threads>();
    const u32 width = item.row_tiles * 16;
    for (u32 i = finish_thread; i < group_.params.num_tokens * width / 2; i += finish_threads) {
      const u32 token = i / (width / 2), row = i % (width / 2) * 2;
      const u32 pair = sm90::as_bf16_pair(sums[token * rows + row], sums[token * rows + row + 1]);
      *reinterpret_cast<u32*>(out_cell(item, token, item.tile * rows + row)) = pair;
    }
    end_chain(item);
  }

  __device__ __forceinline__ __nv_bfloat16* out_cell(const Item& item, u32 token, u32 row) const {
    const Tiling& tiling = group_.params.tiling;
    if (!tiling.has_combine(graph_.shape))
      return static_cast<__nv_bfloat16*>(group_.params.out) + u64{token} * d_model + row;
    const u32 groups = tiling.groups(graph_.shape);
    return group_.in_workspace<__nv_bfloat16>(group_.params.layout.results) +
           (u64{token} * groups + tiling.group_of(item.expert)) * d_model + row;
  }
  __device__ __forceinline__ void store(const Item& item, u32 token, u32 row, float value) const {
    if (token < group_.params.num_tokens) *out_cell(item, token, row) = __float2bfloat16(value);
  }
  __device__ __forceinline__ u32 place_of(const Item& item) const {
    return graph_.plan.active_offset[item.expert];
  }
  __device__ __forceinline__ bool is_chain_start(const Item& item) const {
    return place_of(item) == item.chain_first;
  }
  __device__ __forceinline__ bool ends_chain(const Item& item) const {
    return place_of(item) + 1 == item.chain_end;
  }

  __device__ void end_chain(const Item& item) const {
    if (!group_.params.tiling.has_combine(graph_.shape)) return;
    sm90::named_barrier<finish_barrier, finish_threads>();
    // release: the barrier has brought the other warps' stores before this one's signal
    if (warp_ == 0 && lane_ == 0)
      sm90::add_release(group_.in_workspace<u32>(group_.counters.done) +
                        group_.params.tiling.group_of(item.expert));
  }

  __device__ __forceinline__ void record(const Item& item) const {
    if constexpr (traced) {
      if (warp_ == 0 && lane_ == 0 && num_tasks_ < group_.params.trace_capacity) {
        const u64 start_ns = item.ticket_ns + item.start_delta;
        group_.params.records[u64{group_.worker} * group_.params.trace_capacity + num_tasks_] =
            TraceRecord{start_ns,
                        delta(start_ns, clock_ns()),
                        item.id,
                        item.start_delta,
                        item.start_delta - item.ready_delta,
                        static_cast<u16>(group_.worker),
                        0xffff,
                        static_cast<u16>(group_.worker % group_.params.num_domains),
                        0};
      }
    }
  }

  const Group& group_;
  const TaskGraph& graph_;
  u32 warp_, lane_;
  u32 num_tasks_ = 0, num_tiles_ = 0;
  Turn items_{0}, partials_{0};
};

}  // namespace flashmoe::pipeline
