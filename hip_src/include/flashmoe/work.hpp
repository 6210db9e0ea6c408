// How much a task has to do: bytes and operations, by kind. The simulators' cost models start here.
#pragma once
#include "flashmoe/task_graph.hpp"

namespace flashmoe {

struct Work {
  u64 weight_bytes;  // streamed from memory once
  u64 io_bytes;      // activations and results, read and written
  u64 flops;         // multiplications and additions
  u32 matrix_rows;   // rows of weights in a matrix product with the tokens; 0: there is none
};

FLASHMOE_FN Work work_of(const TaskGraph& graph, const Task& task) {
  const Shape& s = graph.shape;
  const u64 n = task.num_tokens, element = s.element_bytes(), model = s.d_model, ff = s.d_ff;
  switch (task.kind) {
    case TaskKind::gate: {
      const u32 rest = s.num_experts - task.tile * graph.tiling.gate_experts;
      const u64 rows = rest < graph.tiling.gate_experts ? rest : graph.tiling.gate_experts;
      return Work{rows * model * element, n * model * element + n * rows * 4, 2 * n * rows * model,
                  static_cast<u32>(rows)};
    }
    case TaskKind::route:
      return Work{0, n * (u64{s.num_experts} * 4 + u64{s.top_k} * 8), 0, 0};
    case TaskKind::dispatch:
      return Work{0, graph.rows_to(task.peer, task.first, task.num_tokens) * graph.dispatch_row_bytes(), 0,
                  0};
    case TaskKind::up: {
      const u64 rows = graph.up_width(task.tile);
      return Work{2 * rows * model * element, n * (model + rows) * element, 4 * n * rows * model,
                  static_cast<u32>(2 * rows)};
    }
    case TaskKind::down: {
      const u64 rows = graph.down_width(task.tile);
      return Work{rows * ff * element, n * (ff + rows) * element, 2 * n * rows * ff, static_cast<u32>(rows)};
    }
    case TaskKind::expert:
      return Work{3 * model * ff * element, n * 2 * (model + ff) * element, 6 * n * model * ff, s.d_model};
    case TaskKind::combine: {
      const u64 rows = n * graph.tiling.result_slots(s);
      return Work{0, (rows + n) * model * element, 2 * rows * model, 0};
    }
  }
  return Work{};
}

}  // namespace flashmoe
