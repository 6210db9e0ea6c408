// The streaming warp: asks for the weights of the items in turn, as far ahead as the ring has room.
#pragma once
#include "group.cuh"

namespace flashmoe::pipeline {

template <Mode mode>
class Streamer {
 public:
  __device__ Streamer(Group& group, const Tiling& tiling)
      : group_(group), tiling_(tiling), lane_(threadIdx.x % 32), policy_(sm90::evict_first_policy()) {}

  __device__ void run() {
    const Params& params = group_.params;
    for (;;) {
      if (!group_.wait_for_item(group_.item_full(items_.slot), items_.parity)) break;
      const Work work = group_.work(items_.slot);
      if (work.kind == end_item) break;
      if (lane_ == 0) sm90::arrive(group_.item_begun(items_.slot));
      if (work.is(TaskKind::up)) {
        const u64 first = u64{work.expert} * (d_ff / 8) + work.tile * (tiling_.up_rows / 8);
        stream<d_model>(work, static_cast<const char*>(params.gate_up) + first * up_tile_bytes);
      } else if (work.is(TaskKind::down)) {
        const u64 first = u64{work.expert} * (d_model / 16) + work.tile * (tiling_.down_rows / 16);
        // by rows: the weights are read again for each block of the tokens
        const u32 block_tokens = mode == Mode::rows ? tiling_.block_tokens : work.num_tokens;
        for (u32 done = 0; done < work.num_tokens; done += block_tokens)
          stream<d_ff>(work, static_cast<const char*>(params.down) + first * down_tile_bytes);
      }
      __syncwarp();
      if (lane_ == 0) sm90::arrive(group_.item_free(items_.slot));
      items_.advance(num_items);
    }
    wait_for_copies();
  }

 private:
  //! Row tiles of 16 rows x k, one after the other in memory; a lane copies its tile's part of a slot.
  template <u32 k>
  __device__ __forceinline__ void stream(const Work& work, const char* tiles) {
    const Split split = work.template split<mode>(tiling_);
    const u32 slot_tile_bytes = split.tile_chunks() * chunk_bytes;
    const u32 row_tiles = mode == Mode::words ? 1 : work.row_tiles;
    const char* from = tiles + lane_ * (16 * k * 2);
    for (u32 done = 0; done < 16 * k * 2; done += slot_tile_bytes) {
      const u32 rest = 16 * k * 2 - done, bytes = rest < slot_tile_bytes ? rest : slot_tile_bytes;
      group_.wait(group_.slot_free(slots_.slot), slots_.parity);
      if (group_.warp_stopped()) return;
      const u32 full = group_.slot_full(slots_.slot);
      if (lane_ == 0) sm90::arrive_and_expect(full, row_tiles * bytes);
      __syncwarp();
      if (lane_ < row_tiles)
        sm90::bulk_copy(group_.weights_of(slots_.slot) + lane_ * slot_tile_bytes, from + done, bytes, full,
                        policy_);
      ++num_slots_;
      slots_.advance(group_.params.ring_slots);
    }
  }

  //! The copies under way write this work-group's shared memory: it must not end before them. They take
  //! microseconds; the limit is for a slot whose loading warp has given up.
  __device__ void wait_for_copies() const {
    const u32 slots = group_.params.ring_slots;
    for (u32 slot = 0; slot < slots && slot < num_slots_; ++slot) {
      const u32 uses = (num_slots_ - slot + slots - 1) / slots;
      const u64 since_ns = clock_ns();
      while (!sm90::phase_is_over(group_.slot_full(slot), (uses - 1) & 1) &&
             clock_ns() - since_ns < 1'000'000) {
      }
    }
  }

  Group& group_;
  const Tiling& tiling_;
  u32 lane_;
  u64 policy_;
  Turn items_{0}, slots_{1};
  u32 num_slots_ = 0;
};

}  // namespace flashmoe::pipeline
