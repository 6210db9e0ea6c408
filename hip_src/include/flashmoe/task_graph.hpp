// The task graph of one PE, as arithmetic: id -> task, task -> what it waits for, task -> what it signals.
// Nothing is stored but the plan's prefix sums; kernel, CPU backend and simulators all call this.
//
// Ids of a PE, in this order:   gate | route | dispatch | up or expert | down | combine
// The first three depend on the number of tokens alone (stage A); the others need the plan (stage B). Gate
// tasks keep their ids when routing is given from outside; they are then not part of the launch.
#pragma once
#include "flashmoe/plan.hpp"
#include "flashmoe/shape.hpp"
#include "flashmoe/task.hpp"

namespace flashmoe {

struct TaskGraph {
  Shape shape;
  Tiling tiling;
  Plan plan;
  const std::int32_t* topk_idx;  // [num_tokens][top_k] of the PE's own tokens; needed by dispatch and combine
  u32 pe;
  u32 num_tokens;
  u32 gate_inside;

  // --- sizes
  // ---------------------------------------------------------------------------------------------------
  FLASHMOE_FN bool whole_experts() const { return tiling.granularity == Granularity::token; }
  FLASHMOE_FN bool by_rows() const { return tiling.down == Down::rows; }
  FLASHMOE_FN u32 num_route() const { return tiling.route_blocks(num_tokens); }
  FLASHMOE_FN u32 num_gate() const { return num_route() * tiling.gate_tiles(shape); }
  FLASHMOE_FN u32 num_dispatch() const { return tiling.dispatch_blocks(num_tokens) * (shape.num_pes - 1); }
  FLASHMOE_FN u32 up_per_block() const { return whole_experts() ? 1 : tiling.up_tiles(shape); }
  FLASHMOE_FN u32 down_per_block() const {
    return whole_experts() || by_rows() ? 0 : tiling.down_tiles(shape);
  }
  FLASHMOE_FN u32 num_up() const { return plan.num_blocks() * up_per_block(); }
  FLASHMOE_FN u32 num_down() const {
    return by_rows() ? tiling.down_tiles(shape) * plan.num_active() : plan.num_blocks() * down_per_block();
  }
  FLASHMOE_FN u32 num_combine() const {
    return tiling.has_combine(shape) ? ceil_div(num_tokens, tiling.combine_tokens) : 0;
  }

  // --- id ranges
  // -----------------------------------------------------------------------------------------------
  FLASHMOE_FN u32 first_task() const { return gate_inside ? 0 : num_gate(); }
  FLASHMOE_FN u32 first_route() const { return num_gate(); }
  FLASHMOE_FN u32 first_dispatch() const { return first_route() + num_route(); }
  FLASHMOE_FN u32 first_up() const { return first_dispatch() + num_dispatch(); }  // stage B starts here
  FLASHMOE_FN u32 first_down() const { return first_up() + num_up(); }
  FLASHMOE_FN u32 first_combine() const { return first_down() + num_down(); }
  FLASHMOE_FN u32 end_task() const { return first_combine() + num_combine(); }

  // --- id -> task
  // ----------------------------------------------------------------------------------------------
  //! Needs the plan from first_up() on.
  FLASHMOE_FN Task decode(u32 id) const {
    if (id < first_route()) {
      const u32 block = id / tiling.gate_tiles(shape);
      return token_block(id, TaskKind::gate, block, tiling.gate_tokens, id % tiling.gate_tiles(shape));
    }
    if (id < first_dispatch())
      return token_block(id, TaskKind::route, id - first_route(), tiling.gate_tokens);
    if (id < first_up()) {
      const u32 index = id - first_dispatch();
      Task task = token_block(id, TaskKind::dispatch, index / (shape.num_pes - 1), tiling.dispatch_tokens);
      // each PE starts with its right-hand neighbour, so that not all send to PE 0 first
      task.peer = (pe + 1 + index % (shape.num_pes - 1)) % shape.num_pes;
      return task;
    }
    if (id < first_down()) {
      const u32 index = id - first_up();
      if (whole_experts()) return expert_block(id, TaskKind::expert, index, none);
      return expert_block(id, TaskKind::up, index / up_per_block(), index % up_per_block());
    }
    if (id < first_combine()) {
      const u32 index = id - first_down();
      if (!by_rows())
        return expert_block(id, TaskKind::down, index / down_per_block(), index % down_per_block());
      const u32 local = plan.active[index % plan.num_active()];
      return Task{id,
                  TaskKind::down,
                  pe * plan.num_local + local,
                  index / plan.num_active(),
                  plan.block_offset[local],
                  plan.entry_offset[local],
                  plan.expert_tokens(local),
                  none};
    }
    return token_block(id, TaskKind::combine, id - first_combine(), tiling.combine_tokens);
  }

  //! Tasks that one pick takes: 1, or with down="rows" the active experts of a group; 0 inside such a chain.
  FLASHMOE_FN u32 chain(u32 id) const {
    if (!by_rows() || id < first_down() || id >= first_combine()) return 1;
    const u32 place = (id - first_down()) % plan.num_active();
    const u32 group = tiling.group_of(plan.active[place]);
    if (place != group_begin(group)) return 0;
    return group_begin(group + 1) - place;
  }
  //! A task of a block of the PE's own tokens.
  FLASHMOE_FN Task token_block(u32 id, TaskKind kind, u32 block, u32 block_tokens, u32 tile = none) const {
    const u32 first = block * block_tokens;
    const u32 rest = num_tokens - first;
    return Task{id, kind, none, tile, block, first, rest < block_tokens ? rest : block_tokens, none};
  }
  //! A task of a block whose expert is known.
  FLASHMOE_FN Task expert_task(u32 id, TaskKind kind, u32 local, u32 block, u32 tile) const {
    const u32 skipped = (block - plan.block_offset[local]) * tiling.block_tokens;
    const u32 rest = plan.expert_tokens(local) - skipped;
    return Task{id,
                kind,
                pe * plan.num_local + local,
                tile,
                block,
                plan.entry_offset[local] + skipped,
                rest < tiling.block_tokens ? rest : tiling.block_tokens,
                none};
  }
  //! The task after `task` in its chain: as decode(task.id + 1), without a division.
  FLASHMOE_FN Task next_in_chain(Task task) const {
    const u32 local = plan.active[plan.active_offset[task.expert - pe * plan.num_local] + 1];
    ++task.id;
    task.expert = pe * plan.num_local + local;
    task.block = plan.block_offset[local];
    task.first = plan.entry_offset[local];
    task.num_tokens = plan.expert_tokens(local);
    return task;
  }
  //! First place of a group in the list of active experts.
  FLASHMOE_FN u32 group_begin(u32 group) const {
    return plan.active_offset[tiling.group_first_expert(shape, group)];
  }

  // --- what a task waits for
  // ------------------------------------------------------------------------------------
  //! Event index of the results of one (token, slot k); tokens of this PE.
  FLASHMOE_FN u32 result_word(u32 token, u32 k, u32 expert) const {
    if (whole_experts()) return token * shape.top_k + k;
    if (!by_rows()) return expert;
    const u32 owner = shape.owner(expert);
    return owner * tiling.groups(shape) + tiling.group_of(expert - owner * shape.experts_per_pe());
  }

  //! Calls visit(Event) for each event of this PE that the task waits for; an event may come more than once.
  template <class Visit>
  FLASHMOE_FN void for_each_wait(const Task& task, Visit visit) const {
    switch (task.kind) {
      case TaskKind::gate:
        break;
      case TaskKind::route:
        if (gate_inside) visit(Event{EventKind::gated, task.block});
        break;
      case TaskKind::dispatch:
        if (task.num_tokens > 0) visit(Event{EventKind::routed, task.first / tiling.gate_tokens});
        break;
      case TaskKind::up:
      case TaskKind::expert:
        visit(Event{EventKind::planned, 0});
        break;
      case TaskKind::down: {
        const u32 blocks = by_rows() ? ceil_div(task.num_tokens, tiling.block_tokens) : 1;
        for (u32 block = 0; block < blocks; ++block) visit(Event{EventKind::upped, task.block + block});
        break;
      }
      case TaskKind::combine:
        // also where every slot was dropped: ids of this stage exist only with the plan
        visit(Event{EventKind::planned, 0});
        for (u32 token = task.first; token < task.first + task.num_tokens; ++token) {
          for (u32 k = 0; k < shape.top_k; ++k) {
            const std::int32_t expert = topk_idx[token * shape.top_k + k];
            if (expert >= 0) visit(Event{EventKind::result, result_word(token, k, static_cast<u32>(expert))});
          }
        }
        break;
    }
  }

  // --- what a task signals
  // --------------------------------------------------------------------------------------
  //! Bytes of a token row with its experts and weights, as dispatch sends it.
  FLASHMOE_FN u64 dispatch_row_bytes() const {
    return u64{shape.d_model} * shape.element_bytes() + u64{shape.top_k} * 8;
  }
  //! Rows of tokens [first, first + count) that have an expert on `dst`.
  FLASHMOE_FN u32 rows_to(u32 dst, u32 first, u32 count) const {
    u32 rows = 0;
    for (u32 token = first; token < first + count; ++token) rows += goes_to(token, dst) ? 1 : 0;
    return rows;
  }
  FLASHMOE_FN bool has_experts(const std::int32_t* experts_of_tokens, u32 token) const {
    for (u32 k = 0; k < shape.top_k; ++k)
      if (experts_of_tokens[token * shape.top_k + k] >= 0) return true;
    return false;
  }
  FLASHMOE_FN bool goes_to(u32 token, u32 dst) const {
    for (u32 k = 0; k < shape.top_k; ++k) {
      const std::int32_t expert = topk_idx[token * shape.top_k + k];
      if (expert >= 0 && shape.owner(static_cast<u32>(expert)) == dst) return true;
    }
    return false;
  }

  //! Calls visit(dst_pe, Event at that PE, bytes sent along) for each event that the task adds one to.
  template <class Visit>
  FLASHMOE_FN void for_each_signal(const Task& task, Visit visit) const {
    const u64 width = task.tile == none ? shape.d_model : down_width(task.tile);
    const u64 piece = width * shape.element_bytes();  // of one result row, as down and expert send it
    switch (task.kind) {
      case TaskKind::gate:
        visit(pe, Event{EventKind::gated, task.block}, u64{0});
        break;
      case TaskKind::route:
        visit(pe, Event{EventKind::routed, task.block}, u64{0});
        visit(pe, Event{EventKind::planned, 0}, u64{0});
        break;
      case TaskKind::dispatch:
        visit(task.peer, Event{EventKind::planned, 0},
              rows_to(task.peer, task.first, task.num_tokens) * dispatch_row_bytes());
        break;
      case TaskKind::up:
        visit(pe, Event{EventKind::upped, task.block}, u64{0});
        break;
      case TaskKind::expert: {
        const Entry& entry = plan.entries[task.first];
        visit(entry.src, Event{EventKind::result, entry.token * shape.top_k + entry.k},
              entry.src == pe ? 0 : piece);
        break;
      }
      case TaskKind::down:
        if (by_rows()) {
          signal_rows(task, piece, visit);
        } else {
          signal_tile(task, piece, visit);
        }
        break;
      case TaskKind::combine:
        break;
    }
  }

  FLASHMOE_FN u32 down_width(u32 tile) const {
    const u32 first = tile * tiling.down_rows;
    return shape.d_model - first < tiling.down_rows ? shape.d_model - first : tiling.down_rows;
  }
  FLASHMOE_FN u32 up_width(u32 tile) const {
    const u32 first = tile * tiling.up_rows;
    return shape.d_ff - first < tiling.up_rows ? shape.d_ff - first : tiling.up_rows;
  }
  //! Group of a down="rows" task, and whether the task is the last of its chain.
  FLASHMOE_FN u32 group_of(const Task& task) const {
    return tiling.group_of(task.expert - pe * plan.num_local);
  }
  FLASHMOE_FN bool ends_chain(const Task& task) const {
    const u32 place = (task.id - first_down()) % plan.num_active();
    return place + 1 == group_begin(group_of(task) + 1);
  }

 private:
  FLASHMOE_FN Task expert_block(u32 id, TaskKind kind, u32 block, u32 tile) const {
    return expert_task(id, kind, bucket_of(plan.block_offset, plan.num_local, block), block, tile);
  }

  //! down="tile": every source PE with a token of this *expert* hears of each of its tiles, so that the
  //! number of signals is the same for all of them; bytes are those of the block's own rows.
  template <class Visit>
  FLASHMOE_FN void signal_tile(const Task& task, u64 piece, Visit visit) const {
    const u32 local = task.expert - pe * plan.num_local;
    plan.for_each_source(local, [&](u32 src) {
      u64 rows = 0;
      for (u32 j = task.first; j < task.first + task.num_tokens; ++j)
        rows += plan.entries[j].src == src ? 1 : 0;
      visit(src, Event{EventKind::result, task.expert}, src == pe ? 0 : rows * piece);
    });
  }

  template <class Visit>
  FLASHMOE_FN void signal_rows(const Task& task, u64 piece, Visit visit) const {
    if (!tiling.has_combine(shape) || !ends_chain(task)) return;
    const u32 group = group_of(task);
    for (u32 src = 0; src < shape.num_pes; ++src) {
      const u32 rows = plan.group_rows[group * shape.num_pes + src];
      if (rows == 0) continue;
      visit(src, Event{EventKind::result, pe * tiling.groups(shape) + group}, src == pe ? 0 : rows * piece);
    }
  }
};

}  // namespace flashmoe
