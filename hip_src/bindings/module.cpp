// flashmoe._native: the shared core and the CPU backend, for Python. Types are in flashmoe/_native.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>

#include "cpu_layer.hpp"
#include "device_memory.hpp"
#include "engine_module.hpp"
#include "host_benchmark.hpp"
#include "task_table.hpp"

namespace py = pybind11;
using namespace flashmoe;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

//! A copy of the vector as a numpy array.
template <class T>
Array<T> to_array(const std::vector<T>& values) {
  return Array<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

const std::int32_t* experts_of(const Array<std::int32_t>& topk_idx, const Shape& shape) {
  if (topk_idx.ndim() != 2 || topk_idx.shape(1) != shape.top_k)
    throw std::invalid_argument("topk_idx: not (num_tokens, top_k)");
  return topk_idx.data();
}

TaskTable make_table(const Shape& shape, const Tiling& tiling,
                     const std::vector<Array<std::int32_t>>& topk_idx, bool gate_inside) {
  std::vector<const std::int32_t*> experts;
  std::vector<u32> num_tokens;
  for (const auto& array : topk_idx) {
    experts.push_back(experts_of(array, shape));
    num_tokens.push_back(static_cast<u32>(array.shape(0)));
  }
  return TaskTable(LayerPlan(shape, tiling, experts, num_tokens, gate_inside));
}

//! Keeps the weights alive; bf16 arrays come as uint16.
struct PyCpuLayer {
  py::object gate, gate_up, down;
  host::CpuLayer layer;
};

const void* data_of(const py::object& array) { return array.is_none() ? nullptr : py::array(array).data(); }

py::dict fault_dict(const host::CpuLayer& layer) {
  const FaultReport& fault = layer.fault();
  py::dict result;
  result["kind"] = static_cast<u32>(fault.kind);
  result["pe"] = fault.pe;
  result["worker"] = fault.worker;
  result["task_id"] = fault.task_id == none ? py::object(py::none()) : py::object(py::int_(fault.task_id));
  result["epoch"] = fault.epoch;
  result["event"] = static_cast<u32>(fault.missing.event);
  result["index"] = fault.missing.index;
  result["src"] =
      fault.missing.src == none ? py::object(py::none()) : py::object(py::int_(fault.missing.src));
  result["seen"] = fault.missing.seen;
  result["wanted"] = fault.missing.wanted;
  result["waited_s"] = static_cast<double>(fault.waited_ns) * 1e-9;
  std::vector<u32> ran;
  for (const TraceBuffer& trace : layer.traces()) ran.push_back(trace.size + trace.drops);
  result["tasks_run"] = ran;  // [pe * num_workers + worker]
  result["unfinished_pes"] = layer.unfinished();
  return result;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  bind_engine(module);
  PYBIND11_NUMPY_DTYPE(TaskRow, pe, kind, task_id, expert, tile, block, num_tokens, peer, chain, num_rows,
                       weight_bytes, io_bytes, link_bytes, flops);
  PYBIND11_NUMPY_DTYPE(TraceRecord, start_ns, duration_ns, task_id, ticket_delta, ready_delta, worker, peer,
                       domain, flags);
  module.def("task_dtype", [] { return py::dtype::of<TaskRow>(); });
  module.attr("MAX_TOKENS_PER_PE") = max_tokens_per_pe;
  module.attr("MAX_LOOK_AHEAD") = max_look_ahead;

  py::class_<Shape>(module, "Shape")
      .def(py::init([](u32 d_model, u32 d_ff, u32 num_experts, u32 top_k, u32 num_pes, bool norm_topk_prob,
                       u32 dtype) {
             return Shape{d_model,
                          d_ff,
                          num_experts,
                          top_k,
                          num_pes,
                          norm_topk_prob ? 1u : 0u,
                          static_cast<DType>(dtype)};
           }),
           py::kw_only(), py::arg("d_model"), py::arg("d_ff"), py::arg("num_experts"), py::arg("top_k"),
           py::arg("num_pes"), py::arg("norm_topk_prob"), py::arg("dtype"));

  py::class_<Tiling>(module, "Tiling")
      .def(py::init([](u32 granularity, u32 down, u32 gate_tokens, u32 gate_experts, u32 dispatch_tokens,
                       u32 up_rows, u32 down_rows, u32 block_tokens, u32 experts_per_pick,
                       u32 combine_tokens) {
             return Tiling{static_cast<Granularity>(granularity),
                           static_cast<Down>(down),
                           gate_tokens,
                           gate_experts,
                           dispatch_tokens,
                           up_rows,
                           down_rows,
                           block_tokens,
                           experts_per_pick,
                           combine_tokens};
           }),
           py::kw_only(), py::arg("granularity"), py::arg("down"), py::arg("gate_tokens"),
           py::arg("gate_experts"), py::arg("dispatch_tokens"), py::arg("up_rows"), py::arg("down_rows"),
           py::arg("block_tokens"), py::arg("experts_per_pick"), py::arg("combine_tokens"));

  py::class_<TaskTable>(module, "TaskTable")
      .def(py::init(&make_table), py::arg("shape"), py::arg("tiling"), py::arg("topk_idx"),
           py::arg("gate_inside"))
      .def("tasks", [](const TaskTable& t) { return to_array(t.tasks); })
      .def("first", [](const TaskTable& t) { return to_array(t.first); })
      .def("events",
           [](const TaskTable& t) {
             return py::make_tuple(to_array(t.plan.event_pe), to_array(t.plan.event_kind),
                                   to_array(t.plan.event_index), to_array(t.plan.event_target),
                                   to_array(t.plan.planned_event));
           })
      .def(
          "waits",
          [](const TaskTable& t) { return py::make_tuple(to_array(t.waits.begin), to_array(t.waits.event)); })
      .def("signals",
           [](const TaskTable& t) {
             return py::make_tuple(to_array(t.signals.begin), to_array(t.signals.event),
                                   to_array(t.signals.bytes));
           })
      .def("order",
           [](TaskTable& t, u32 order) {
             std::vector<Array<u32>> ids;
             for (u32 pe = 0; pe < t.plan.graphs().size(); ++pe)
               ids.push_back(to_array(t.order(pe, static_cast<Order>(order))));
             return ids;
           })
      .def("first_of_last",
           [](TaskTable& t, u32 pe, u32 order, u32 num_workers) {
             return t.first_of_last(pe, static_cast<Order>(order), num_workers);
           })
      .def("wrongly_decoded",
           [](TaskTable& t, u32 pe, u32 order, u32 stride) {
             return to_array(t.wrongly_decoded(pe, static_cast<Order>(order), stride));
           })
      .def("plan_digests",
           [](const TaskTable& t) {
             std::vector<u64> digests;
             for (const TaskGraph& g : t.plan.graphs())
               digests.push_back(plan_digest(g.plan.entry_offset, g.plan.num_local));
             return digests;
           })
      .def("local_tokens", [](const TaskTable& t) {
        // tokens of the task's own PE, for expert tasks; 0 for others
        std::vector<u32> counts;
        for (const TaskRow& row : t.tasks) {
          const TaskGraph& graph = t.plan.graphs()[row.pe];
          const Task task = graph.decode(row.task_id);
          u32 own = 0;
          for (u32 i = 0; row.expert >= 0 && i < task.num_tokens; ++i) {
            own += graph.plan.entries[task.first + i].src == row.pe ? 1 : 0;
          }
          counts.push_back(own);
        }
        return to_array(counts);
      });

  py::class_<PyCpuLayer>(module, "CpuLayer")
      .def(
          py::init([](const Shape& shape, const Tiling& tiling, u32 queue, u32 order, u32 look_ahead,
                      u32 max_tokens, u32 num_workers, u32 num_domains, double deadline_s, u32 trace_capacity,
                      py::object gate, py::object gate_up, py::object down) {
            host::LayerConfig config{
                shape,
                tiling,
                Policy{static_cast<QueueKind>(queue), static_cast<Order>(order), look_ahead},
                max_tokens,
                num_workers,
                num_domains,
                static_cast<u64>(deadline_s * 1e9),
                trace_capacity};
            return std::unique_ptr<PyCpuLayer>(new PyCpuLayer{
                gate, gate_up, down, host::CpuLayer(config, data_of(gate), data_of(gate_up), data_of(down))});
          }),
          py::kw_only(), py::arg("shape"), py::arg("tiling"), py::arg("queue"), py::arg("order"),
          py::arg("look_ahead"), py::arg("max_tokens"), py::arg("num_workers"), py::arg("num_domains"),
          py::arg("deadline_s"), py::arg("trace_capacity"), py::arg("gate"), py::arg("gate_up"),
          py::arg("down"))
      .def(
          "run",
          [](PyCpuLayer& self, const std::vector<py::array>& x, std::vector<py::array>& out,
             const std::optional<std::vector<Array<std::int32_t>>>& topk_idx,
             const std::optional<std::vector<Array<float>>>& topk_weights,
             const std::optional<std::vector<std::vector<std::vector<u32>>>>& replay,
             const std::vector<u64>& digests, u32 max_delay_us, u64 seed, std::optional<u32> absent_pe,
             std::optional<std::tuple<u32, u32, u32>> dead_worker) {
            std::vector<host::PeInput> inputs;
            for (std::size_t pe = 0; pe < x.size(); ++pe) {
              host::PeInput input{};
              input.x = x[pe].data();
              input.out = out[pe].mutable_data();
              input.num_tokens = static_cast<u32>(x[pe].shape(0));
              if (topk_idx) {
                input.topk_idx = topk_idx->at(pe).data();
                input.topk_weights = topk_weights->at(pe).data();
              }
              if (replay) {
                input.replay_digest = digests.at(pe);
                input.replay_offset.push_back(0);
                for (const std::vector<u32>& ids : replay->at(pe)) {
                  input.replay_ids.insert(input.replay_ids.end(), ids.begin(), ids.end());
                  input.replay_offset.push_back(static_cast<u32>(input.replay_ids.size()));
                }
              }
              inputs.push_back(std::move(input));
            }
            host::Disturbance disturbance{};
            disturbance.max_delay_us = max_delay_us;
            disturbance.seed = seed;
            if (absent_pe) disturbance.absent_pe = *absent_pe;
            if (dead_worker) {
              std::tie(disturbance.dead_pe, disturbance.dead_worker, disturbance.dead_after) = *dead_worker;
            }
            py::gil_scoped_release release;
            return self.layer.run(inputs, !topk_idx, disturbance);
          },
          py::arg("x"), py::arg("out"), py::arg("topk_idx"), py::arg("topk_weights"), py::arg("replay"),
          py::arg("digests"), py::kw_only(), py::arg("max_delay_us"), py::arg("seed"), py::arg("absent_pe"),
          py::arg("dead_worker"))
      .def("fault", [](const PyCpuLayer& self) { return fault_dict(self.layer); })
      .def("epochs",
           [](const PyCpuLayer& self) {
             std::vector<u32> epochs;
             for (u32 pe = 0; pe < self.layer.config().shape.num_pes; ++pe)
               epochs.push_back(self.layer.epoch(pe));
             return epochs;
           })
      .def("workspace_bytes", [](const PyCpuLayer& self) { return self.layer.workspace_bytes(); })
      .def("traces",
           [](const PyCpuLayer& self) {
             std::vector<Array<TraceRecord>> traces;
             for (const TraceBuffer& trace : self.layer.traces()) {
               traces.emplace_back(static_cast<py::ssize_t>(trace.size), trace.records);
             }
             return traces;
           })
      .def("drops",
           [](const PyCpuLayer& self) {
             u64 drops = 0;
             for (const TraceBuffer& trace : self.layer.traces()) drops += trace.drops;
             return drops;
           })
      .def("routing", [](const PyCpuLayer& self, u32 pe, u32 num_tokens) {
        const auto top_k = static_cast<py::ssize_t>(self.layer.config().shape.top_k);
        const auto rows = static_cast<py::ssize_t>(num_tokens);
        return py::make_tuple(Array<std::int32_t>({rows, top_k}, self.layer.topk_idx(pe)),
                              Array<float>({rows, top_k}, self.layer.topk_weights(pe)));
      });

  module.def("device_workspace_bytes", &device_workspace_bytes, py::kw_only(), py::arg("shape"),
             py::arg("tiling"), py::arg("max_tokens"), py::arg("num_workers"), py::arg("num_domains"));
  module.def("benchmark_host", &host::benchmark, py::call_guard<py::gil_scoped_release>(), py::arg("seconds"),
             py::arg("num_threads"));
}
