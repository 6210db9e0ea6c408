// The loading warps: bring the tokens' rows into the slots of the ring, where their inputs are there. They
// take the slots in turn, so that several trips to memory are under way at once.
#pragma once
#include "group.cuh"

namespace flashmoe::pipeline {

template <Mode mode, bool traced>
class Loader {
  using R = Roles<mode>;

 public:
  __device__ Loader(Group& group, const TaskGraph& graph)
      : group_(group), graph_(graph), warp_(threadIdx.x / 32 - R::load), lane_(threadIdx.x % 32) {}

  __device__ void run() {
    for (;;) {
      if (!group_.wait_for_item(group_.item_full(items_.slot), items_.parity)) break;
      Work work = group_.work(items_.slot);
      group_.template complete<mode>(work, graph_.plan);
      if (work.kind == end_item) break;
      load(work, group_.item(items_.slot));
      __syncwarp();
      sm90::arrive_if(group_.item_free(items_.slot), lane_ == 0);
      items_.advance(num_items);
    }
    sm90::wait_for_async_copies();  // they write this work-group's shared memory
  }

 private:
  __device__ __forceinline__ void load(const Work& work, Item& item) {
    const u32 block_tokens = graph_.tiling.block_tokens;
    if (work.is(TaskKind::up)) {
      load_rows<d_model>(work, item, work.first, work.count, none,
                         mode == Mode::words ? group_.masks()[work.expert] : 0);
    } else if (work.is(TaskKind::down)) {
      if constexpr (mode == Mode::words) {
        for (u32 i = 0; i < work.count; ++i) load_words(graph_.plan.active[work.first + i], item);
      } else {
        u32 block = item.block;
        for (u32 done = 0; done < work.count; done += block_tokens) {
          const u32 rest = work.count - done;
          load_rows<d_ff>(work, item, work.first + done, rest < block_tokens ? rest : block_tokens, block++);
        }
      }
    }
  }

  //! Rows of x (block none) or hidden rows, for each slot that their weights fill. Some lanes share a row:
  //! all, where there is one, and four where there are five or more.
  template <u32 k>
  __device__ __forceinline__ void load_rows(const Work& work, Item& item, u32 first, u32 count, u32 block,
                                            u32 mask = 0) {
    const Split split = work.template split<mode>(graph_.tiling);
    const u32 pitch = split.pitch_bytes();
    const u16* entries = group_.template in_shared<u16>(group_.at.entries) + first;
    const char* rows = block == none ? static_cast<const char*>(group_.params.x)
                                     : group_.template in_workspace<char>(group_.params.layout.hidden);
    const u32 log_sharing = count > 4 ? 2 : count > 2 ? 3 : count > 1 ? 4 : 5, at_once = 32u >> log_sharing;
    const u32 row = lane_ >> log_sharing, vector = lane_ & ((1u << log_sharing) - 1);
    u32 offset[R::most_rows / 8];  // bytes to a lane's rows: at most 2^14 of 2^14
#pragma unroll
    for (u32 i = 0; i < R::most_rows / 8; ++i) {
      const u32 mine = row + i * at_once;
      u32 from = 0;
      if constexpr (mode == Mode::words)  // the lists may not be there yet
        from = nth_bit(mask, mine);
      else if (mine < count)
        from = block == none ? entries[mine] / top_k : entries[mine];
      offset[i] = from * (k * 2);
    }
#pragma unroll 1
    for (u32 k0 = 0; k0 < k; k0 += split.slot_k()) {
      if (is_mine()) {
        if (block != none) wait_for_block(item, block);
        if (k0 == 0) stamp_ready(item);
        group_.wait(group_.slot_free(slots_.slot), slots_.parity);
        if (group_.warp_stopped()) return;
        const u32 vectors = (k - k0 < split.slot_k() ? k - k0 : split.slot_k()) / 8;
        const char* from = rows + k0 * 2;
        const u32 to = group_.tokens_of(slots_.slot) + row * pitch;
#pragma unroll
        for (u32 i = 0; i < R::most_rows / 8; ++i) {
          if (i * at_once >= count) break;
          if (row + i * at_once >= count) continue;
#pragma unroll 3
          for (u32 v = vector; v < vectors; v += 1u << log_sharing)
            sm90::async_copy(to + i * at_once * pitch + v * 16, from + offset[i] + v * 16);
        }
        sm90::arrive_after_async_copies(group_.slot_full(slots_.slot));
      }
      slots_.advance(ring_slots(mode));
    }
  }

  //! Of the bits that are set, of at most 8; or 0.
  __device__ __forceinline__ static u32 nth_bit(u32 mask, u32 n) {
#pragma unroll 1
    for (u32 i = 0; i < n; ++i) mask &= mask - 1;
    return mask == 0 ? 0 : __ffs(static_cast<int>(mask)) - 1;
  }

  //! Hidden rows as words: each is looked at until it is of this epoch; its elements go to their token's
  //! column. A lane has every 32nd pair of words of a row, and asks for all it has at once.
  __device__ __forceinline__ void load_words(u32 expert, const Item& item) {
    constexpr Split split(1);
    constexpr u32 pairs = (d_ff < split.slot_k() ? d_ff : split.slot_k()) / 4, batch = ceil_div(pairs, 32);
    const u32 first = graph_.plan.entry_offset[expert], count = graph_.plan.entry_offset[expert + 1] - first;
    const u16* entries = group_.template in_shared<u16>(group_.at.entries) + first;
    const u64* hidden = group_.template in_workspace<u64>(group_.params.layout.hidden) + lane_ * 2;
    const u32 epoch = group_.epoch();
    for (u32 k0 = 0; k0 < d_ff; k0 += split.slot_k()) {
      if (is_mine()) {
        for (u32 i = 0; i < count; ++i) {
          const u32 entry = entries[i];
          const u64* from = hidden + entry * (d_ff / 2) + k0 / 2;
          u64 words[batch][2];
          u32 turns = 0;
          u64 since_ns = 0;
          for (;;) {
            // relaxed: the word is the data, and the epoch in it says that it is there
#pragma unroll
            for (u32 b = 0; b < batch; ++b)
              if (has_pair(k0, b)) sm90::load_words(from + b * 64, words[b][0], words[b][1]);
            u32 other = 0;  // bits that are not this epoch's
#pragma unroll
            for (u32 b = 0; b < batch; ++b)
              if (has_pair(k0, b)) other |= (epoch_of(words[b][0]) ^ epoch) | (epoch_of(words[b][1]) ^ epoch);
            if (__all_sync(~0u, other == 0)) break;
            const bool go_on = group_.keep_waiting(turns, since_ns, item.id, EventKind::upped,
                                                   graph_.plan.block_offset[expert], 0, group_.epoch());
            if (!__all_sync(~0u, go_on)) return;
          }
          if (i == 0) {
            if (traced && k0 == 0 && lane_ == 0) group_.ready_ns(num_words_) = sm90::timer_ns();
            group_.wait(group_.slot_free(slots_.slot), slots_.parity);
            if (group_.warp_stopped()) return;
          }
          const u32 to = group_.tokens_of(slots_.slot) + entry / top_k * split.pitch_bytes() + lane_ * 8;
#pragma unroll
          for (u32 b = 0; b < batch; ++b)
            if (has_pair(k0, b))
              sm90::store_shared(to + b * 256, static_cast<u32>(words[b][0]), static_cast<u32>(words[b][1]));
        }
        sm90::arrive(group_.slot_full(slots_.slot));
      }
      slots_.advance(ring_slots(mode));
    }
    ++num_words_;
  }

  //! Has this lane a b-th pair of words, in the slot that begins at k0? All lanes do where rows are a
  //! multiple.
  __device__ __forceinline__ bool has_pair(u32 k0, u32 b) const {
    constexpr u32 slot_k = Split(1).slot_k();
    if constexpr (d_ff % 128 == 0 && (d_ff % slot_k == 0 || d_ff < slot_k)) return true;
    return k0 + (b * 32 + lane_) * 4 < d_ff && (b * 32 + lane_) * 4 < slot_k;
  }

  //! Until all up tasks of an expert block have brought their rows. Looks at 32 blocks at once: most are
  //! there.
  __device__ __forceinline__ void wait_for_block(const Item& item, u32 block) {
    const u32 target = graph_.up_per_block();
    u32 turns = 0;
    u64 since_ns = 0;
    while (block < ready_begin_ || block >= ready_end_) {
      const u32 mine = block + lane_;
      bool ready = mine < graph_.plan.num_blocks();
      // acquire: pairs with the signal warp's add_release; __syncwarp hands it on to the other lanes
      if (ready)
        ready = load_acquire<Scope::device>(group_.template in_workspace<u32>(group_.counters().upped) +
                                            mine) == target;
      const u32 ballot = __ballot_sync(~0u, ready);
      __syncwarp();
      if (ballot & 1u) {
        ready_begin_ = block;
        ready_end_ = block + (ballot == ~0u ? 32 : __ffs(static_cast<int>(~ballot)) - 1);
        return;
      }
      const bool go_on = group_.keep_waiting(turns, since_ns, item.id, EventKind::upped, block, 0, target);
      if (!__all_sync(~0u, go_on)) return;
    }
  }

  //! Always the same warp's: when it comes to the slot again, the last use of it is over.
  __device__ __forceinline__ bool is_mine() const {
    // a slot is below the ring's size, which the compiler does not see
    if constexpr (ring_slots(mode) == R::load_warps) return slots_.slot == warp_;
    return slots_.slot % R::load_warps == warp_;
  }
  __device__ __forceinline__ void stamp_ready(Item& item) const {
    if constexpr (traced) {
      if (lane_ == 0) item.ready_ns = sm90::timer_ns();
    }
  }

  Group& group_;
  const TaskGraph& graph_;
  u32 warp_, lane_;
  u32 num_words_ = 0;                    // tasks that took words
  u32 ready_begin_ = 0, ready_end_ = 0;  // blocks known to be there
  Turn items_{0}, slots_{1};
};

}  // namespace flashmoe::pipeline
