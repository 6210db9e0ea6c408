// The kinds of work a layer is made of, and one decoded task.
#pragma once
#include <cstdint>

#include "flashmoe/shape.hpp"

namespace flashmoe {

enum class TaskKind : u32 {
  gate = 0,      // router logits of a block of tokens, for a tile of experts
  route = 1,     // softmax and top-k of a block of tokens
  dispatch = 2,  // rows of a block of tokens to one other PE
  up = 3,        // gate and up projection + SwiGLU: a tile of one expert, for a block of its tokens
  down = 4,      // down projection: a tile of one expert; results to the tokens' owners
  combine = 5,   // weighted sum of a token's results, in fixed order
  expert = 6,    // granularity="token": a whole expert (up and down) for one token
};
constexpr u32 none = ~u32{0};

//! Does a task of this kind wait for work of its own PE only? Else it waits for other PEs, too.
FLASHMOE_FN bool waits_for_own_pe(TaskKind kind) {
  return kind == TaskKind::route || kind == TaskKind::dispatch || kind == TaskKind::down;
}

//! A task, decoded from its id. Fields that do not apply hold `none`.
struct Task {
  u32 id;
  TaskKind kind;
  u32 expert;      // global
  u32 tile;        // of router rows (gate), row pairs (up), output rows (down)
  u32 block;       // gate, route, dispatch, combine: of the PE's tokens; up, down, expert: of the PE's expert
                   // blocks
  u32 first;       // first token of the block; for up, down, expert: first entry of the plan
  u32 num_tokens;  // tokens (entries) covered
  u32 peer;        // dispatch: destination PE
};

//! What tasks wait for: a counter that reaches its target, once a launch.
enum class EventKind : u32 {
  gated = 0,    // [route block] all router logits of the block are there
  routed = 1,   // [route block] the block's experts and weights are known
  planned = 2,  // [0] own tokens are routed, all PEs' rows have landed: tokens per expert are known
  upped = 3,    // [expert block] the hidden rows of the block are complete
  result = 4,   // [result word] a set of results has landed at the tokens' owner
};
constexpr u32 num_event_kinds = 5;
// only in reports:
constexpr EventKind push_slot{num_event_kinds};  // a slot of the push queue that nobody fills
constexpr EventKind warp_barrier{num_event_kinds +
                                 1};  // a barrier within a work-group (index: its byte offset)

struct Event {
  EventKind kind;
  u32 index;
};

}  // namespace flashmoe
