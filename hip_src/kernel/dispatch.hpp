// What a dispatch sends: token rows with their experts and weights, into the landing slots of another PE.
#pragma once
#include "pe_view.hpp"

namespace flashmoe {

//! Sends every `size`-th token of a task, from the one at `rank` on; returns how many rows that are.
//! copy(to, from, bytes) has 4-byte words to copy.
template <class Copy>
FLASHMOE_FN u32 dispatch_rows(const Task& task, const PeView& view, u32 rank, u32 size, Copy copy) {
  const Heap peer = view.heap(task.peer);
  const u32 top_k = view.launch.shape.top_k;
  u32 rows = 0;
  for (u32 token = task.first + rank; token < task.first + task.num_tokens; token += size) {
    if (!view.graph.goes_to(token, task.peer)) continue;
    copy(peer.row(view.pe, token), static_cast<const char*>(view.own.x) + token * view.row_bytes(),
         view.row_bytes());
    copy(peer.experts(view.pe, token), view.graph.topk_idx + u64{token} * top_k, u64{top_k} * 4);
    copy(peer.weights(view.pe, token), view.topk_weights() + u64{token} * top_k, u64{top_k} * 4);
    copy(peer.tag(view.pe, token), &view.epoch, 4);
    ++rows;
  }
  return rows;
}

}  // namespace flashmoe
