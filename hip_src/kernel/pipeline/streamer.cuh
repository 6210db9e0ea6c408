// The streaming warp: asks for the weights of the items in turn, as far ahead as the ring has room.
#pragma once
#include "group.cuh"

namespace flashmoe::pipeline {

template <Mode mode>
class Streamer {
 public:
  __device__ Streamer(Group& group, const TaskGraph& graph)
      : group_(group),
        graph_(graph),
        tiling_(graph.tiling),
        lane_(threadIdx.x % 32),
        policy_(sm90::evict_first_policy()) {}

  __device__ void run() {
    for (;;) {
      if (!group_.wait_for_item(group_.item_full(items_.slot), items_.parity)) break;
      Work work = group_.work(items_.slot);
      group_.template complete<mode>(work, graph_.plan);
      if (work.kind == end_item) break;
      if (mode == Mode::words && work.is(TaskKind::down)) {
        stream_chain(work);
      } else {
        if (lane_ == 0) sm90::arrive(group_.item_begun(items_.slot));
        stream_task(work);
      }
      __syncwarp();
      if (lane_ == 0) sm90::arrive(group_.item_free(items_.slot));
      items_.advance(num_items);
    }
    wait_for_copies();
  }

 private:
  __device__ __forceinline__ void stream_task(const Work& work) {
    const Params& params = group_.params;
    if (work.is(TaskKind::up)) {
      stream<d_model>(work, params.up_tiles, params.gate_up,
                      work.expert * (d_ff / 8) + work.tile * (tiling_.up_rows / 8));
    } else if (mode != Mode::words && work.is(TaskKind::down)) {
      // by rows: the weights are read again for each block of the tokens
      const u32 block_tokens = mode == Mode::rows ? tiling_.block_tokens : work.count;
      for (u32 done = 0; done < work.count; done += block_tokens)
        stream<d_ff>(work, params.down_tiles, params.down,
                     work.expert * (d_model / 16) + work.tile * (tiling_.down_rows / 16));
    }
  }
  __device__ __forceinline__ void stream_chain(const Work& work) {
    for (u32 i = 0; i < work.count; ++i) {
      if (i + 1 == work.count && lane_ == 0) sm90::arrive(group_.item_begun(items_.slot));
      stream<d_ff>(work, group_.params.down_tiles, group_.params.down,
                   graph_.plan.active[work.first + i] * (d_model / 16) + work.tile);
    }
  }

  //! The row tiles of a task, the same k of all of them a slot.
  template <u32 k>
  __device__ __forceinline__ void stream(const Work& work, const sm90::TileMap& tiles, const void* packed,
                                         u32 first_tile) {
    const u32 slot_chunks_of_tile = work.template split<mode>(tiling_).tile_chunks();
#pragma unroll 1
    for (u32 chunk = 0; chunk < k / chunk_k; chunk += slot_chunks_of_tile) {
      if (num_slots_ == 0) sm90::wait_for_launch_before();  // which may have made the weights
      group_.wait(group_.slot_free(slots_.slot), slots_.parity);
      if (group_.warp_stopped()) return;
      if (lane_ == 0) {
        const u32 full = group_.slot_full(slots_.slot);
        if constexpr (mode == Mode::words) {  // a plain copy comes a little sooner
          const u32 rest = k / chunk_k - chunk,
                    bytes = (rest < slot_chunks ? rest : slot_chunks) * chunk_bytes;
          sm90::arrive_and_expect(full, bytes);
          sm90::bulk_copy(
              group_.weights_of(slots_.slot),
              static_cast<const char*>(packed) + (u64{first_tile} * (k / chunk_k) + chunk) * chunk_bytes,
              bytes, full, policy_);
        } else {
          sm90::arrive_and_expect(full, weight_bytes);
          sm90::copy_tiles(group_.weights_of(slots_.slot), tiles, first_tile, chunk, full, policy_);
        }
      }
      __syncwarp();
      ++num_slots_;
      slots_.advance(ring_slots(mode));
    }
  }

  //! The copies under way write this work-group's shared memory: it must not end before them. They take
  //! microseconds; the limit is for a slot whose loading warp has given up.
  __device__ void wait_for_copies() const {
    for (u32 slot = 0; slot < ring_slots(mode) && slot < num_slots_; ++slot) {
      const u32 uses = (num_slots_ - slot + ring_slots(mode) - 1) / ring_slots(mode);
      u64 since_ns = 0;  // not read where all are there: it takes longer than to look
      while (!sm90::phase_is_over(group_.slot_full(slot), (uses - 1) & 1)) {
        if (since_ns == 0) since_ns = clock_ns();
        if (clock_ns() - since_ns > 1'000'000) break;
      }
    }
  }

  Group& group_;
  const TaskGraph& graph_;
  const Tiling& tiling_;
  u32 lane_;
  u64 policy_;
  Turn items_{0}, slots_{1};
  u32 num_slots_ = 0;
};

}  // namespace flashmoe::pipeline
