// The general kernel: work-groups are workers, `num_workers` in a row for each PE.
#pragma once
#include "crew.hpp"
#include "matrix.hpp"
#include "movement.hpp"
#include "plan.hpp"
#include "routing.hpp"

namespace flashmoe::general {

struct NoHooks {
  FLASHMOE_DEVICE bool before(const Task&) { return true; }
  FLASHMOE_DEVICE void between() {}
};

//! One thread of the crew, from launch to end.
FLASHMOE_DEVICE void serve(Group& group, const Params& params) {
  const Command& command = group.command;
  for (;;) {
    arch::barrier();
    if (command.work == Work::end) return;
    arch::acquire_wave();
    Hand hand(group, params);
    switch (command.work) {
      case Work::end:
        break;
      case Work::gate:
        gate(hand, command.task);
        break;
      case Work::route:
        route(hand, command.task);
        break;
      case Work::dispatch:
        dispatch(hand, command.task);
        break;
      case Work::up:
        up(hand, command.task, command.tile);
        break;
      case Work::down:
        down(hand, command.task, command.tile);
        break;
      case Work::down_rows:
        down_rows(hand, command);
        break;
      case Work::combine:
        combine(hand, command.task);
        break;
      case Work::copy:
        copy_words(command.to, command.from, command.bytes, hand.thread, crew_threads);
        break;
      case Work::zero:
        zero(hand, command);
        break;
      case Work::landed_rows:
        landed_rows(hand, command.tile);
        break;
      case Work::plan:
        plan(hand);
        break;
      case Work::publish_planned:
        publish_planned(hand.view, command.tile, hand.thread, crew_threads);
        break;
    }
    arch::release_wave();
    if (hand.thread == 0) group.done[(hand.barriers + 1) % 2] = 1;
    arch::barrier();
  }
}

template <class Trace>
FLASHMOE_DEVICE void lead(Group& group, const Params& params, Trace& trace) {
  const u32 pe = arch::group() / params.launch.num_workers;
  new (group.worker) WorkerMemory{PeView(params.launch, params.pes, params.heaps, pe), {}};
  Crew crew(group);
  // of an earlier launch: nothing runs until the host has reset the layer
  if (!params.launch.fault->raised()) {
    const u32 worker = arch::group() % params.launch.num_workers;
    Watchdog watchdog(group.memory().view, worker);
    NoHooks hooks;
    Worker<Crew, NoHooks, Trace>(group.memory(), watchdog, worker, trace, crew, hooks).run();
  }
  crew.end();
}

template <bool traced>
FLASHMOE_DEVICE void run(Group& group, const Params& params) {
  if (arch::wave_of(arch::thread()) < crew_waves) return serve(group, params);
  if (arch::thread() != crew_threads) return;
  if constexpr (traced) {
    TraceSummary& summary = params.summaries[arch::group()];
    summary.begin_ns = clock_ns();
    TraceBuffer trace{params.records + u64{arch::group()} * params.trace_capacity, params.trace_capacity, 0,
                      0};
    lead(group, params, trace);
    summary.size = trace.size;
    summary.drops = trace.drops;
  } else {
    NoTrace trace;
    lead(group, params, trace);
  }
}

}  // namespace flashmoe::general
