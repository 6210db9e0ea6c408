// The picking thread: takes picks as the policy says, decodes them and hands them on, a little ahead of the
// stream.
#pragma once
#include "flashmoe/queue.hpp"
#include "item_writer.cuh"

namespace flashmoe::pipeline {

template <Mode mode, bool traced>
class Picker : ItemWriter<mode> {
  using Writer = ItemWriter<mode>;
  using Writer::drain, Writer::finish, Writer::graph_, Writer::group_, Writer::hand_on_early,
      Writer::hand_on_pick, Writer::num_pushed_, Writer::one_ahead, Writer::push, Writer::ticket_ns_;

 public:
  using Writer::Writer;

  __device__ void run() {
    pick();
    finish();
  }

 private:
  __device__ __forceinline__ void pick() {
    const Params& params = group_.params;
    RankSource source(params.queue, nullptr, group_.worker, params.num_workers, params.num_domains,
                      FirstTickets::given);
    const PickOrder order(graph_, params.order);
    PickDecoder decode(order);
    const bool replay = params.queue == QueueKind::replay;
    if (replay) begin();
    u32 place = replay ? params.replay_offset[group_.worker] : 0;
    const u32 end = replay ? params.replay_offset[group_.worker + 1] : 0;
    // Where all picks that need no plan are given with the launch, no counter has to be asked whether there
    // is another: the plan is made while the first ticket for what comes after it is on its way.
    const bool all_given = !replay && decode.num_early() <= params.num_workers;
    bool is_asked_for = false, is_planned = false;  // the plan
    u32 in_hand = none;                             // in hand: a rank, or the id of a list
    // Where tasks are short, the next ticket is asked for before the present one is looked at.
    const bool asks_ahead = mode == Mode::words && params.queue == QueueKind::ticket;
    bool has_ticket = false;
    u32 answer = 0;  // on its way, perhaps
    bool has_pick = false, is_first = true;
    for (;;) {
      if (!has_pick) {
        if (all_given && num_pushed_ > 0 && !is_asked_for) {
          push(plan_item);
          is_asked_for = true;
        }
        if (!one_ahead()) return;
        if constexpr (traced) ticket_ns_ = sm90::timer_ns();
        if (has_ticket) {
          const u32 rank = source.rank_of(answer);
          in_hand = rank < decode.size() ? rank : none;
          has_ticket = false;
        } else if (replay) {
          in_hand = place < end ? params.replay_ids[place++] : none;
        } else {
          do {
            // What is in hand may wait for a pick of another domain, and the others handle picks in turn: so
            // it must be done with before one is taken there.
            if (source.is_away() && !drain()) return;
            if (!is_first) {
              begin();
              source.bind(heads());
            }
            is_first = false;
            in_hand = source.try_next(is_planned ? decode.size() : none);
          } while (in_hand == elsewhere);
        }
        has_pick = true;
      }
      // First what the plan is made of, then the plan, which everybody needs, be it to learn that there is
      // nothing to do, and then the rest.
      if (!is_planned && (replay ? in_hand >= graph_.first_up() : in_hand >= decode.num_early())) {
        if (!is_asked_for) push(plan_item);
        is_asked_for = true;
        const bool is_early = mode == Mode::words && !replay && decode.has_one_block();
        if (is_early) hand_on_early(decode.place_of_up(in_hand), decode.tile_of_up(in_hand));
        begin();
        source.bind(heads());
        if (fault_before_ != 0) *group_.stop_flag() = Group::gave_up;
        if (asks_ahead) answer = source.ask();
        has_ticket = asks_ahead;
        if (!wait_for_plan()) return;
        decode.count();
        is_planned = true;
        has_pick = (replay || in_hand < decode.size()) && !(is_early && decode.is_up(in_hand));
        continue;
      }
      if (in_hand == none) break;
      has_pick = false;
      const bool is_last = params.queue == QueueKind::ticket && is_planned && !has_ticket &&
                           in_hand >= decode.first_of_last(params.num_workers);
      // but not past a chain: another worker may have none
      if (asks_ahead && is_planned && !has_ticket && decode.is_up(in_hand)) {
        answer = source.ask();
        has_ticket = true;
      }
      Task task;
      u32 length = 1;
      if (replay) {
        task = graph_.decode(in_hand);
        if (is_planned) length = graph_.chain(in_hand);
      } else {
        task = decode(in_hand);
        length = decode.chain();
      }
      hand_on_pick(task, length);
      if (is_last) break;
    }
  }

  //! What was given with the launch needs no memory, and was handed on before.
  __device__ __forceinline__ void begin() {
    if (has_begun_) return;
    has_begun_ = true;
    group_.template begin<false>();
    // of an earlier launch: nothing runs until the host has reset the layer
    fault_before_ = load_relaxed<Scope::system>(&group_.params.fault->claimed);
  }

  __device__ __forceinline__ char* heads() const {
    return group_.template in_workspace<char>(group_.counters().heads);
  }

  __device__ bool wait_for_plan() {
    group_.wait(group_.planned(), 0);
    const Params& params = group_.params;
    if (params.queue == QueueKind::replay && !group_.stopped()) {
      // of a size that the compiler does not know: it would unroll the loop, whoever may need it
      const u64 digest = plan_digest(graph_.plan.entry_offset, num_experts + params.nothing);
      if (digest != params.replay_digest)
        group_.give_up(none, EventKind::planned, 0, digest, params.replay_digest, 0,
                       FaultKind::replay_mismatch);
    }
    return !group_.stopped();
  }

  bool has_begun_ = false;
  u32 fault_before_ = 0;
};

}  // namespace flashmoe::pipeline
