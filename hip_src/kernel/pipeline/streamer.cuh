// The streaming thread: asks for the weights of the items in turn, as far ahead as the ring has room.
#pragma once
#include "group.cuh"

namespace flashmoe::pipeline {

class Streamer {
 public:
  __device__ explicit Streamer(const Group& group) : group_(group), policy_(sm90::evict_first_policy()) {}

  __device__ void run() {
    const Params& params = group_.params;
    for (;;) {
      group_.wait(group_.item_full(items_.slot), items_.parity);
      if (group_.stopped()) break;
      const Item& item = group_.in_shared<Item>(group_.at.items)[items_.slot];
      if (item.kind == ItemKind::end) break;
      sm90::arrive(group_.item_begun(items_.slot));
      if (item.kind == ItemKind::task && item.task_kind == TaskKind::up) {
        const u64 first = u64{item.expert} * (d_ff / 8) + item.tile * (params.tiling.up_rows / 8);
        stream<up_tile_bytes>(static_cast<const char*>(params.gate_up) + first * up_tile_bytes,
                              item.row_tiles);
      } else if (item.kind == ItemKind::task && item.task_kind == TaskKind::down) {
        const u64 first = u64{item.expert} * (d_model / 16) + item.tile * (params.tiling.down_rows / 16);
        // an expert with more tokens than a pass can take has its weights read once a pass
        for (u32 pass = 0; pass < item.passes; ++pass)
          stream<down_tile_bytes>(static_cast<const char*>(params.down) + first * down_tile_bytes,
                                  item.row_tiles);
      }
      sm90::arrive(group_.item_free(items_.slot));
      items_.advance(num_items);
    }
    wait_for_copies();
  }

 private:
  template <u32 tile_bytes>
  __device__ __forceinline__ void stream(const char* weights, u32 row_tiles) {
    const u32 ring = sm90::shared_address(group_.shared + group_.at.ring);
    for (u32 tile = 0; tile < row_tiles; ++tile, weights += tile_bytes) {
#pragma unroll
      for (u32 offset = 0; offset < tile_bytes; offset += slot_bytes) {
        const u32 bytes = tile_bytes - offset < slot_bytes ? tile_bytes - offset : slot_bytes;
        group_.wait(group_.slot_free(slots_.slot), slots_.parity);
        if (group_.stopped()) return;
        const u32 full = group_.slot_full(slots_.slot);
        sm90::arrive_and_expect(full, bytes);
        sm90::bulk_copy(ring + slots_.slot * slot_bytes, weights + offset, bytes, full, policy_);
        ++num_copies_;
        slots_.advance(group_.params.ring_slots);
      }
    }
  }

  //! The copies under way write this work-group's shared memory: it must not end before them.
  __device__ void wait_for_copies() const {
    const u32 slots = group_.params.ring_slots;
    for (u32 slot = 0; slot < slots && slot < num_copies_; ++slot) {
      const u32 uses = (num_copies_ - slot + slots - 1) / slots;
      while (!sm90::phase_is_over(group_.slot_full(slot), (uses - 1) & 1)) {
      }
    }
  }

  const Group& group_;
  u64 policy_;
  Turn items_{0}, slots_{1};
  u32 num_copies_ = 0;
};

}  // namespace flashmoe::pipeline
