// What the items on the clock mean.
#pragma once
#include "clock.hpp"

namespace flashmoe::engine {

//! An item's kind; its `who` is a worker unless another is named.
enum class What : u32 {
  resume,    // goes on
  ticket,    // has its ticket: head of the queue, ticket
  look,      // sees the other domains' counters
  appended,  // has its slots in the push queue: whether for a group, first slot
  settle,    // looks again at the slot it waits for: slot
  give,      // sees what another worker wrote into its slot: row
  land,      // domain + 1, or 0 for everybody, sees an event: layer, event
  ingress,   // a message has reached its destination's port
  launch,    // a PE launches a layer: layer
  finish,    // has ended a task beside others: row
  release,   // has made a task's stores visible: row
  cached     // has the weights that the cache had
};

//! Two values of 32 bits travel as one of 64.
inline u64 pair_of(u32 high, u32 low) { return u64{high} << 32 | low; }
inline u32 high_of(u64 pair) { return static_cast<u32>(pair >> 32); }
inline u32 low_of(u64 pair) { return static_cast<u32>(pair); }

inline Item item(What what, u32 who, u64 value = 0) { return Item{value, who, static_cast<u32>(what)}; }

}  // namespace flashmoe::engine
