// What a worker is doing, and what it has taken.
#pragma once
#include <cstdint>

#include "clock.hpp"
#include "flashmoe/policy.hpp"
#include "flashmoe/task.hpp"

namespace flashmoe::engine {

struct Layer;

//! Where a worker goes on; workers.hpp.
enum class Step : std::uint8_t {
  enter,
  start,
  launch_queue,
  loop,
  get_core,
  has_core,
  execute,
  loaded,
  end,
  bookkeep,
  yield_core,
  next_in_chain,
  wait_in_chain,
  leave,
  done
};
enum class SleepsFor : std::uint8_t { nothing, pick, weights, inputs };

constexpr u32 max_held = max_look_ahead + 1;
constexpr u32 max_picks = max_held + 2;  // beside them the one that runs and the next of its chain
constexpr std::uint8_t no_pick = max_picks;

//! A task that a worker has taken.
struct Pick {
  u32 row;
  u32 before;     // event to be seen before all others: the plan, or the layer's entry; or none
  u32 next_wait;  // first input, in the class's list, that was not seen yet
  u32 serial;     // tells it from others that had its place before
  u32 quantile;   // of the jitter
  u32 stay;       // quantile of how long its weights have stayed in the cache
  bool streaming, from_cache, stalls;
  bool leads;  // the cache will have its weights when they have been read
  i64 asked_ps, ticket_ps;
  i64 loaded_ps;  // all weights are there since then; -1: not yet
};

//! One CU in two cache lines. Its picks lie elsewhere, as many as it may have at a time, and are named here
//! by their places there.
struct alignas(64) Worker {
  u32 number = 0;  // of all workers, by PE
  u16 pe = 0, index = 0;
  std::int16_t domain = 0;
  Step step = Step::enter, then = Step::enter;  // `then`: with a core
  SleepsFor sleeps_for = SleepsFor::nothing;
  bool triggered = false;  // about to be woken
  bool more = true;        // the queue has more picks for this worker
  bool is_away = false;    // its own domain has no more: it takes those of others
  bool asking = false;     // the queue is looking up the next pick, perhaps while a task runs
  std::uint8_t current = no_pick, following = no_pick, awaited = no_pick;  // awaited: its weights
  std::uint8_t num_held = 0, first_stream = 0, num_streams = 0;
  std::uint8_t held[max_held]{};  // oldest first
  // ring of picks whose weights have been asked for, the first one on its way
  std::uint8_t streams[max_picks]{};
  u32 chain_end = 0, waits_for_slot = none, used_picks = 0;
  Layer* layer = nullptr;
  i64 start_ps = 0, asked_ps = 0, ready_ps = 0, done_ps = 0, core_since_ps = 0;
  i64 last_end_ps = 0;  // may be ahead: until then warps of this worker are at the end of tasks before

  bool is_busy() const { return current != no_pick || num_held > 0; }
  void remove_held(u32 place) {
    for (u32 i = place; i + 1 < num_held; ++i) held[i] = held[i + 1];
    --num_held;
  }
  void hold_first(std::uint8_t pick) {
    for (u32 i = num_held; i > 0; --i) held[i] = held[i - 1];
    held[0] = pick;
    ++num_held;
  }
  //! Returns whether it is the only one.
  bool add_stream(std::uint8_t pick) {
    const u32 last = first_stream + num_streams;
    streams[last < max_picks ? last : last - max_picks] = pick;
    return ++num_streams == 1;
  }
  std::uint8_t end_stream() {
    const std::uint8_t pick = streams[first_stream];
    first_stream = static_cast<std::uint8_t>(first_stream + 1 == max_picks ? 0 : first_stream + 1);
    --num_streams;
    return pick;
  }
};
static_assert(sizeof(Worker) == 128);

}  // namespace flashmoe::engine
