// How a launch that cannot go on says so: the first worker to notice fills the report, all others leave.
#pragma once
#include "flashmoe/platform.hpp"
#include "flashmoe/task.hpp"

namespace flashmoe {

enum class FaultKind : u32 {
  nothing = 0,
  deadline = 1,         // a wait took too long
  landed_mismatch = 2,  // fewer or more rows in the landing slots than the sender says it sent
  replay_mismatch = 3,  // the replay list was made for another routing
  no_resources = 4,     // a worker could not start: no thread or memory left
};

//! What a worker waits for, as its event stands.
struct Missing {
  EventKind event;
  u32 index;
  u32 src;  // planned: PE whose dispatch has not landed; else none
  u64 seen, wanted;
};

struct FaultReport {
  u32 claimed;
  FaultKind kind;
  u32 pe, worker,
      task_id;  // task_id none: the worker has a ticket that it cannot decode yet, or an empty slot
  u32 epoch;
  Missing missing;
  u64 waited_ns;

  FLASHMOE_FN bool raised() const { return load_relaxed<Scope::system>(&claimed) != 0; }
  //! True for the one worker that may fill the rest.
  FLASHMOE_FN bool claim() { return compare_swap_acquire<Scope::system>(&claimed, 0u, 1u); }
};

}  // namespace flashmoe
