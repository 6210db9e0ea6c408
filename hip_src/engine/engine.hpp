// The native discrete-event engine: the same events in the same order as flashmoe/sim/simpy_engine.py, which
// explains them. A worker is a state machine instead of a generator, and nothing is allocated for a task.
#pragma once
#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "flashmoe/policy.hpp"
#include "layer_graph.hpp"

namespace flashmoe::engine {

//! A finished task, by row within its layer.
struct Record {
  u32 worker, flags;
  i64 ready_ps, asked_ps, ticket_ps, start_ps, loaded_ps, done_ps, end_ps;
};

//! What workers did with their time, summed over tasks [ps].
struct TimeShares {
  i64 ticket = 0, inputs = 0, stream = 0, compute = 0, overhead = 0, send = 0;

  //! since_ps: latest end of the worker's tasks before; what goes on beside this task until then is theirs.
  //! send_ps: time of the remote stores.
  void add(const Record& task, i64 since_ps, i64 send_ps) {
    const i64 start_ps = std::max(task.start_ps, since_ps), loaded_ps = std::max(task.loaded_ps, start_ps);
    const i64 done_ps = std::max(task.done_ps, start_ps);
    ticket += std::max(i64{0}, task.ticket_ps - std::max(task.asked_ps, since_ps));
    inputs += start_ps - std::min(start_ps, std::max(task.ticket_ps, since_ps));
    stream += loaded_ps - start_ps;
    compute += done_ps - loaded_ps;
    const i64 after_ps = std::max(task.end_ps, start_ps) - done_ps;
    send += std::min(after_ps, send_ps);
    overhead += after_ps - std::min(after_ps, send_ps);
  }
};

//! A worker that will wait for ever, for the message.
struct Stuck {
  u32 pe, worker, layer;
  u32 slot;  // of the push queue, or none
  struct Input {
    u32 row, event, seen, wanted;
  };
  std::vector<Input> inputs;
};

struct Result {
  u64 num_tasks = 0, tasks_done = 0;
  i64 makespan_ps = 0, end_ps = 0;
  u64 hbm_bytes = 0, link_bytes = 0;
  TimeShares time;
  std::vector<i64> layer_end_ps;
  std::vector<std::vector<Record>> records;  // [layer][row], if kept
  std::vector<Stuck> stuck;
  u64 num_stuck = 0;
  std::vector<std::pair<u32, u32>> not_taken;  // (layer, row) of some tasks that have not run
};

struct RunConfig {
  QueueKind queue;
  u32 look_ahead;
  bool sorts_experts;  // the policy's order is not that of their ids
  u32 num_layers;
  bool pipelined;  // one launch runs all layers
  i64 gap_ps;      // else: dense compute between two layers
  bool keep_records;
  std::function<LayerGraph(u32 layer)> make_layer;
  std::function<void(u64 tasks_done)> progress;  // called now and then; may throw to stop
};

Result run(const Parameters& parameters, const RunConfig& config);

}  // namespace flashmoe::engine
