// A work-group as one worker: a leader, alone in its wave, that schedules, and a crew that does what it says.
// They share this memory and one barrier, and both take part in every barrier, as gfx942 has no other.
#pragma once
#include <new>

#include "arch/arch.hpp"
#include "built_shape.hpp"
#include "params.hpp"
#include "worker.hpp"

namespace flashmoe::general {

constexpr u32 crew_threads = 256, crew_waves = crew_threads / arch::wave_size;
constexpr u32 num_threads = crew_threads + arch::wave_size;  // the leader's wave is the last
constexpr u32 pass_columns = 32;                             // tokens that a row tile meets at once
constexpr u32 row_stride = 17;                               // 16 rows; odd, against bank conflicts

constexpr u32 scratch_words = built::num_experts < crew_threads ? crew_threads : built::num_experts + 1;

enum class Work : u32 {
  end,
  gate,
  route,
  dispatch,
  up,
  down,
  down_rows,
  combine,
  copy,
  zero,
  landed_rows,
  plan,
  publish_planned
};

struct Command {
  Work work;
  u32 tile;   // up, down; landed_rows: source PE; publish_planned: first slot
  u32 group;  // down_rows, and whether the task starts or ends its chain
  u32 starts, ends;
  Task task;
  void* to;  // copy, zero
  const void* from;
  u64 bytes;
};

//! In shared memory (LDS).
struct Group {
  alignas(WorkerMemory) char worker[sizeof(WorkerMemory)];
  Command command;
  u32 result;
  u32 done[2];  // by parity of the barriers since the command: the crew is through with the last one
  union {
    float partial[2][crew_waves][pass_columns][row_stride];  // sums of each wave's share of k
    u32 words[scratch_words];                                // of everything else
  };

  FLASHMOE_DEVICE WorkerMemory& memory() { return *reinterpret_cast<WorkerMemory*>(worker); }
};

//! One thread of the crew, for one command.
struct Hand {
  Group& group;
  const Params& params;
  const PeView& view;
  u32 thread, wave, lane;
  u32 barriers = 0;  // since the command

  FLASHMOE_DEVICE Hand(Group& of_group, const Params& of_params)
      : group(of_group),
        params(of_params),
        view(of_group.memory().view),
        thread(arch::thread()),
        wave(arch::wave_of(thread)),
        lane(thread % arch::wave_size) {}

  FLASHMOE_DEVICE void sync() {
    arch::barrier();
    ++barriers;
  }
};

}  // namespace flashmoe::general
