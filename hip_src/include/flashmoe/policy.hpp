// Policies: a queue discipline and an order. The order ranks the picks of a PE; model and kernel call this
// code.
#pragma once
#include "flashmoe/task_graph.hpp"

namespace flashmoe {

enum class QueueKind : u32 {
  push = 0,
  ticket = 1,
  domain = 2,
  stride = 3,
  replay = 4
};  // "static" is a C++ keyword

enum class Order : u32 {
  phase = 0,         // all up, then all down, experts by id
  expert = 1,        // depth first: an expert's up, then its down
  local_first = 2,   // experts with the largest share of own tokens first
  remote_first = 3,  // experts with the largest share of other PEs' tokens first: their results travel early
  lpt = 4,           // depth first, the expert with the most tokens first
  arrival = 5,       // experts as they are met, reading own tokens first, then those of the next PE, ...
};

constexpr u32 max_look_ahead = 15;

struct Policy {
  QueueKind queue;
  Order order;
  u32 look_ahead;  // picks that a worker may take while the first one waits for work of its own PE
};

//! Sort key of an active expert, lower first; ties go by expert id.
FLASHMOE_FN u32 expert_key(const Plan& plan, const Shape& shape, Order order, u32 pe, u32 local) {
  const u32 total = plan.expert_tokens(local);
  if (order == Order::phase || order == Order::expert) return local;
  if (order == Order::lpt) return ~total;
  u32 own = 0, first_met = none;
  for (u32 i = plan.entry_offset[local]; i < plan.entry_offset[local + 1]; ++i) {
    const Entry& entry = plan.entries[i];
    own += entry.src == pe ? 1 : 0;
    // up to 64 PEs of 2^16 tokens with 2^10 slots each
    const u32 met = (((entry.src + shape.num_pes - pe) % shape.num_pes) << 26) |
                    ((entry.token << 10 | entry.k) & 0x3ffffffu);
    first_met = met < first_met ? met : first_met;
  }
  const u32 own_share = static_cast<u32>((u64{own} << 16) / total);
  if (order == Order::local_first) return (1u << 16) - own_share;
  if (order == Order::remote_first) return own_share;
  return first_met;  // arrival
}

//! Sorts the active experts by the order; `key` is scratch [experts_per_pe].
FLASHMOE_FN void build_sequence(const Plan& plan, const Shape& shape, Order order, u32 pe, u32* key) {
  const u32 n = plan.num_active();
  for (u32 i = 0; i < n; ++i) {
    const u32 local = plan.active[i];
    const u32 own_key = expert_key(plan, shape, order, pe, local);
    u32 place = i;  // insertion sort: stable, in place, and there are few experts on a PE
    for (; place > 0 && key[place - 1] > own_key; --place) {
      key[place] = key[place - 1];
      plan.sequence[place] = plan.sequence[place - 1];
    }
    key[place] = own_key;
    plan.sequence[place] = local;
  }
  plan.sequence_offset[0] = 0;
  for (u32 i = 0; i < n; ++i) {
    plan.sequence_offset[i + 1] = plan.sequence_offset[i] + plan.expert_blocks(plan.sequence[i]);
  }
}

//! Rank -> id of a pick's first task, for one PE.
struct PickOrder {
  const TaskGraph& graph;
  bool depth_first;

  FLASHMOE_FN PickOrder(const TaskGraph& task_graph, Order order)
      : graph(task_graph),
        depth_first((order == Order::expert || order == Order::lpt) && !task_graph.by_rows()) {}

  //! Picks of stage A: gate (unless routing is given), route, dispatch.
  FLASHMOE_FN u32 num_early() const { return graph.first_up() - graph.first_task(); }
  //! All picks; needs the plan.
  FLASHMOE_FN u32 size() const {
    return num_early() + graph.num_up() + num_down_picks() + graph.num_combine();
  }

  //! Groups of experts (down="rows") with a token; needs the plan.
  FLASHMOE_FN u32 num_active_groups() const {
    u32 active = 0;
    for (u32 group = 0; group < graph.tiling.groups(graph.shape); ++group) active += is_active(group) ? 1 : 0;
    return active;
  }
  //! `rank` < size(); needs the plan from num_early() on.
  FLASHMOE_FN u32 operator[](u32 rank) const {
    if (rank < num_early()) return graph.first_task() + rank;
    rank -= num_early();
    const u32 num_up = graph.num_up(), num_down = num_down_picks();
    if (rank >= num_up + num_down) return graph.first_combine() + (rank - num_up - num_down);
    const u32 up = graph.up_per_block(), down = graph.down_per_block();
    if (depth_first) {
      const u32 place = place_of(rank / (up + down));
      const u32 index = rank - graph.plan.sequence_offset[place] * (up + down);
      const u32 num_expert_up = graph.plan.expert_blocks(graph.plan.sequence[place]) * up;
      return index < num_expert_up ? tile_id(graph.first_up(), place, up, index)
                                   : tile_id(graph.first_down(), place, down, index - num_expert_up);
    }
    if (rank < num_up) return up_pick(rank);
    rank -= num_up;
    if (graph.by_rows()) return row_pick(rank);
    const u32 place = place_of(rank / down);
    return tile_id(graph.first_down(), place, down, rank - graph.plan.sequence_offset[place] * down);
  }

  //! Picks that the plan alone makes ready, or lets wait for their inputs themselves: up tasks, and chains.
  FLASHMOE_FN u32 num_planned() const { return graph.num_up() + (graph.by_rows() ? num_down_picks() : 0); }
  //! First task of the index-th of them, in the order of their ranks.
  FLASHMOE_FN u32 planned(u32 index) const {
    return index < graph.num_up() ? up_pick(index) : row_pick(index - graph.num_up());
  }

 private:
  FLASHMOE_FN u32 up_pick(u32 index) const {
    const u32 up = graph.up_per_block(), place = place_of(index / up);
    return tile_id(graph.first_up(), place, up, index - graph.plan.sequence_offset[place] * up);
  }
  FLASHMOE_FN u32 place_of(u32 block) const {
    return bucket_of(graph.plan.sequence_offset, graph.plan.num_active(), block);
  }
  FLASHMOE_FN u32 tile_id(u32 first, u32 place, u32 per_block, u32 index) const {
    return first + graph.plan.block_offset[graph.plan.sequence[place]] * per_block + index;
  }
  FLASHMOE_FN bool is_active(u32 group) const {
    return graph.group_begin(group) < graph.group_begin(group + 1);
  }
  FLASHMOE_FN u32 num_down_picks() const {
    return graph.by_rows() ? graph.tiling.down_tiles(graph.shape) * num_active_groups() : graph.num_down();
  }
  FLASHMOE_FN u32 row_pick(u32 rank) const {
    const u32 active_groups = num_active_groups();
    u32 skip = rank % active_groups;
    u32 group = 0;
    while (!is_active(group) || skip-- > 0) ++group;
    return graph.first_down() + rank / active_groups * graph.plan.num_active() + graph.group_begin(group);
  }
};

//! Rank -> first task of the pick, for a worker that takes ranks one after the other: what does not depend on
//! the plan is worked out before it is there, and the expert is looked for from where the last pick's was.
class PickDecoder {
 public:
  FLASHMOE_FN explicit PickDecoder(const PickOrder& order)
      : order_(order),
        graph_(order.graph),
        early_(order.num_early()),
        first_task_(order.graph.first_task()),
        first_route_(order.graph.first_route()),
        first_dispatch_(order.graph.first_dispatch()),
        first_up_(order.graph.first_up()),
        gate_tiles_(order.graph.tiling.gate_tiles(order.graph.shape)),
        up_(order.graph.up_per_block()),
        down_(order.graph.by_rows() ? order.graph.tiling.down_tiles(order.graph.shape)
                                    : order.graph.down_per_block()),
        combine_(order.graph.num_combine()),
        one_block_(order.graph.shape.num_pes == 1 &&
                   order.graph.num_tokens <= order.graph.tiling.block_tokens &&
                   !order.graph.whole_experts()) {}

  FLASHMOE_FN u32 num_early() const { return early_; }
  //! The plan is there.
  FLASHMOE_FN void count() {
    const u32 blocks = graph_.plan.num_blocks();
    active_groups_ = graph_.by_rows() ? order_.num_active_groups() : 0;
    num_up_ = blocks * up_;
    num_down_ = down_ * (graph_.by_rows() ? active_groups_ : blocks);
    first_down_ = first_up_ + num_up_;
    size_ = early_ + num_up_ + num_down_ + combine_;
  }
  FLASHMOE_FN u32 size() const { return size_; }
  //! From this rank on, picks are of the last kind and no more than the workers: who has one is done after
  //! it, and need not ask whether there is another. The others ask until all are taken.
  FLASHMOE_FN u32 first_of_last(u32 num_workers) const {
    const u32 last_kind = combine_ > 0 ? combine_ : num_down_;
    return size_ - (last_kind < num_workers ? last_kind : num_workers);
  }

  //! No expert has more than a block: then the place of an up task in the sequence needs no plan.
  FLASHMOE_FN bool has_one_block() const { return one_block_; }
  FLASHMOE_FN u32 place_of_up(u32 rank) const { return (rank - early_) / up_; }
  FLASHMOE_FN u32 tile_of_up(u32 rank) const { return (rank - early_) % up_; }

  //! Orders by rows have all up tasks first.
  FLASHMOE_FN bool is_up(u32 rank) const { return rank >= early_ && rank < early_ + num_up_; }
  //! As graph.decode(order[rank]); needs the plan from num_early() on.
  FLASHMOE_FN Task operator()(u32 rank) {
    chain_ = 1;
    if (rank < early_) return early(first_task_ + rank);
    u32 index = rank - early_;
    if (order_.depth_first && index < num_up_ + num_down_) {
      find_place(index / (up_ + down_));
      index -= graph_.plan.sequence_offset[place_] * (up_ + down_);
      const u32 num_expert_up = graph_.plan.expert_blocks(graph_.plan.sequence[place_]) * up_;
      return index < num_expert_up ? up(index / up_, index % up_)
                                   : down((index - num_expert_up) / down_, (index - num_expert_up) % down_);
    }
    if (index < num_up_) {
      const u32 in_sequence = index / up_;
      find_place(in_sequence);
      return up(in_sequence - graph_.plan.sequence_offset[place_], index % up_);
    }
    index -= num_up_;
    if (index >= num_down_) {
      const u32 block = index - num_down_;
      return graph_.token_block(first_down_ + graph_.num_down() + block, TaskKind::combine, block,
                                graph_.tiling.combine_tokens);
    }
    if (graph_.by_rows()) return first_of_chain(index / active_groups_, index % active_groups_);
    const u32 in_sequence = index / down_;
    find_place(in_sequence);
    return down(in_sequence - graph_.plan.sequence_offset[place_], index % down_);
  }
  //! Tasks of the pick that was decoded last.
  FLASHMOE_FN u32 chain() const { return chain_; }

 private:
  FLASHMOE_FN Task early(u32 id) const {
    const u32 tokens = graph_.tiling.gate_tokens;
    if (id < first_route_)
      return graph_.token_block(id, TaskKind::gate, id / gate_tiles_, tokens, id % gate_tiles_);
    if (graph_.shape.num_pes == 1 || id < first_dispatch_)
      return graph_.token_block(id, TaskKind::route, id - first_route_, tokens);
    return graph_.decode(id);
  }
  //! The place in the sequence of the expert that has this block, counted in the sequence.
  FLASHMOE_FN void find_place(u32 block) {
    if (one_block_) {
      place_ = block;
      return;
    }
    if (block < graph_.plan.sequence_offset[place_]) place_ = 0;
    while (block >= graph_.plan.sequence_offset[place_ + 1]) ++place_;
  }
  // of the expert at place_: its block-th block
  FLASHMOE_FN Task up(u32 block_of_expert, u32 tile) const {
    const bool whole = graph_.whole_experts();
    const u32 local = graph_.plan.sequence[place_], block = graph_.plan.block_offset[local] + block_of_expert;
    return graph_.expert_task(first_up_ + block * up_ + tile, whole ? TaskKind::expert : TaskKind::up, local,
                              block, whole ? none : tile);
  }
  FLASHMOE_FN Task down(u32 block_of_expert, u32 tile) const {
    const u32 local = graph_.plan.sequence[place_], block = graph_.plan.block_offset[local] + block_of_expert;
    return graph_.expert_task(first_down_ + block * down_ + tile, TaskKind::down, local, block, tile);
  }
  FLASHMOE_FN Task first_of_chain(u32 tile, u32 skip) {
    const Plan& plan = graph_.plan;
    u32 group = 0;
    while (graph_.group_begin(group) == graph_.group_begin(group + 1) || skip-- > 0) ++group;
    const u32 place = graph_.group_begin(group), local = plan.active[place];
    chain_ = graph_.group_begin(group + 1) - place;
    return Task{first_down_ + tile * plan.num_active() + place,
                TaskKind::down,
                graph_.pe * plan.num_local + local,
                tile,
                plan.block_offset[local],
                plan.entry_offset[local],
                plan.expert_tokens(local),
                none};
  }

  const PickOrder& order_;
  const TaskGraph& graph_;
  u32 early_, first_task_, first_route_, first_dispatch_, first_up_, gate_tiles_, up_, down_, combine_;
  bool one_block_;  // has an expert, at most
  u32 num_up_ = 0, num_down_ = 0, first_down_ = 0, active_groups_ = 0, size_ = 0;
  u32 place_ = 0;  // in the sequence, of the last pick
  u32 chain_ = 1;
};

}  // namespace flashmoe
