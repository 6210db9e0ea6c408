#include "engine_module.hpp"

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <ctime>
#include <memory>
#include <optional>
#include <queue>

#include "bounds.hpp"
#include "engine.hpp"

namespace py = pybind11;
using namespace flashmoe;
using namespace flashmoe::engine;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
std::vector<T> to_vector(const py::handle& values) {
  const auto array = py::cast<Array<T>>(values);
  return std::vector<T>(array.data(), array.data() + array.size());
}

//! Keys are those of flashmoe.sim.native_engine.
Parameters make_parameters(const py::dict& given) {
  Parameters p{};
  auto number = [&](const char* key, auto& field) {
    field = py::cast<std::decay_t<decltype(field)>>(given[key]);
  };
  number("num_pes", p.num_pes);
  number("num_workers", p.num_workers);
  number("num_domains", p.num_domains);
  number("num_cores", p.num_cores);
  number("seed", p.seed);
  number("stall_threshold", p.stall_threshold);
  number("prefetch", p.prefetch);
  number("jitters", p.jitters);
  number("finish_beside", p.finish_beside);
  number("ask_early", p.ask_early);
  number("first_given", p.first_given);
  number("in_order", p.in_order);
  number("word_tokens", p.word_tokens);
  number("plan_ps", p.plan_ps);
  number("plan_token_ps", p.plan_token_ps);
  number("sort_ps", p.sort_ps);
  number("sort_expert_ps", p.sort_expert_ps);
  number("matrix_tokens", p.matrix_tokens);
  number("jitter_bytes", p.jitter_bytes);
  number("cache_bytes", p.cache_bytes);
  number("matrix_rows", p.matrix_rows);
  number("hbm_bytes_per_ns", p.hbm_bytes_per_ns);
  number("cu_bytes_per_ns", p.cu_bytes_per_ns);
  number("cu_flops_per_ns", p.cu_flops_per_ns);
  number("cache_bytes_per_ns", p.cache_bytes_per_ns);
  number("cache_idle_bytes_per_ns", p.cache_idle_bytes_per_ns);
  number("feed_bytes_per_ns", p.feed_bytes_per_ns);
  number("store_bytes_per_ns", p.store_bytes_per_ns);
  number("link_bytes_per_ns", p.link_bytes_per_ns);
  number("port_bytes_per_ns", p.port_bytes_per_ns);
  number("ticket_ps", p.ticket_ps);
  number("ticket_far_ps", p.ticket_far_ps);
  number("ticket_service_ps", p.ticket_service_ps);
  number("ticket_far_service_ps", p.ticket_far_service_ps);
  number("put_ps", p.put_ps);
  number("link_message_ps", p.link_message_ps);
  number("gap_ps", p.gap_ps);
  number("slice_ps", p.slice_ps);
  number("stall_ps", p.stall_ps);
  number("overheads", p.overheads);
  p.speeds = to_vector<double>(given["speeds"]);
  p.start_ps = to_vector<i64>(given["start_ps"]);
  p.rates = to_vector<double>(given["rates"]);
  p.far_ps = to_vector<i64>(given["far_ps"]);
  p.near_ps = to_vector<i64>(given["near_ps"]);
  p.release_ps = to_vector<i64>(given["release_ps"]);
  p.quantiles = to_vector<double>(given["quantiles"]);
  p.stay_bytes = to_vector<double>(given["stay_bytes"]);
  return p;
}

//! What a layer's graph is made of, on demand and without Python's lock.
class LayerSource {
 public:
  virtual ~LayerSource() = default;
  virtual LayerGraph make(const Parameters& p, std::optional<Order> order) const = 0;

  //! Ids of picks, by rank or by worker, in place of an order's.
  std::vector<std::vector<u32>> ids_by_rank;
  std::vector<std::vector<std::vector<u32>>> ids_by_worker;

 protected:
  void set_picks(LayerGraph& g) const {
    auto rows = [&](u32 pe, std::vector<u32> ids) {
      for (u32& id : ids) {
        id += g.first[pe] - g.first_id[pe];
        if (id < g.first[pe] || id >= g.first[pe + 1])
          throw std::out_of_range("a pick that is no task of its PE");
      }
      return ids;
    };
    for (u32 pe = 0; pe < ids_by_rank.size(); ++pe) g.picks.by_rank.push_back(rows(pe, ids_by_rank[pe]));
    for (u32 pe = 0; pe < ids_by_worker.size(); ++pe) {
      g.picks.by_worker.emplace_back();
      for (const auto& ids : ids_by_worker[pe]) g.picks.by_worker[pe].push_back(rows(pe, ids));
    }
  }
};

//! A layer of a model: the shared task graph over a routing.
class RoutedLayer : public LayerSource {
 public:
  RoutedLayer(const Shape& shape, const Tiling& tiling, const std::vector<Array<std::int32_t>>& topk_idx,
              bool gate_inside)
      : shape_(shape), tiling_(tiling), arrays_(topk_idx), gate_inside_(gate_inside) {
    for (const auto& array : arrays_) {
      if (array.ndim() != 2 || array.shape(1) != shape.top_k)
        throw std::invalid_argument("topk_idx: not (num_tokens, top_k)");
      topk_idx_.push_back(array.data());
      num_tokens_.push_back(static_cast<u32>(array.shape(0)));
    }
  }

  LayerGraph make(const Parameters& p, std::optional<Order> order) const override {
    LayerPlan plan(shape_, tiling_, topk_idx_, num_tokens_, gate_inside_);
    LayerGraph graph = GraphBuilder::build(plan, p);
    if (order) {
      GraphBuilder::rank(graph, plan, *order);
    } else {
      set_picks(graph);
    }
    return graph;
  }

 private:
  Shape shape_;
  Tiling tiling_;
  std::vector<Array<std::int32_t>> arrays_;  // keeps them alive
  std::vector<const std::int32_t*> topk_idx_;
  std::vector<u32> num_tokens_;
  bool gate_inside_;
};

//! A layer given task by task, such as a hand-made one; every task is a class of its own.
class ListedLayer : public LayerSource {
 public:
  explicit ListedLayer(const py::dict& table)
      : by_rows_(py::cast<bool>(table["by_rows"])),
        pe_(to_vector<u32>(table["pe"])),
        kind_(to_vector<u32>(table["kind"])),
        num_tokens_(to_vector<u32>(table["num_tokens"])),
        num_rows_(to_vector<u32>(table["num_rows"])),
        weights_(to_vector<u32>(table["weights"])),
        chain_(to_vector<u32>(table["chain"])),
        first_(to_vector<u32>(table["first"])),
        first_id_(to_vector<u32>(table["first_id"])),
        event_target_(to_vector<u32>(table["event_target"])),
        planned_event_(to_vector<u32>(table["planned_event"])),
        num_active_(to_vector<u32>(table["num_active"])),
        wait_event_(to_vector<u32>(table["wait_event"])),
        signal_event_(to_vector<u32>(table["signal_event"])),
        event_pe_(to_vector<u16>(table["event_pe"])),
        weight_bytes_(to_vector<u64>(table["weight_bytes"])),
        io_bytes_(to_vector<u64>(table["io_bytes"])),
        flops_(to_vector<u64>(table["flops"])),
        wait_ptr_(to_vector<u64>(table["wait_ptr"])),
        signal_ptr_(to_vector<u64>(table["signal_ptr"])),
        signal_bytes_(to_vector<u64>(table["signal_bytes"])) {}

  LayerGraph make(const Parameters& p, std::optional<Order>) const override {
    LayerGraph g;
    g.num_pes = static_cast<u32>(planned_event_.size());
    g.by_rows = by_rows_;
    g.first = first_;
    g.first_id = first_id_;
    g.chain = chain_;
    g.event_target = event_target_;
    g.planned_event = planned_event_;
    g.outputs.assign(g.num_pes, 0);
    g.tokens.assign(g.num_pes, 0);
    g.distinct_bytes.assign(g.num_pes, 0.0);
    g.num_active = num_active_;
    std::vector<u32> waits;
    std::vector<SignalTo> signals;
    for (std::size_t row = 0; row < pe_.size(); ++row) {
      waits.assign(wait_event_.begin() + static_cast<std::ptrdiff_t>(wait_ptr_[row]),
                   wait_event_.begin() + static_cast<std::ptrdiff_t>(wait_ptr_[row + 1]));
      signals.clear();
      for (u64 i = signal_ptr_[row]; i < signal_ptr_[row + 1]; ++i)
        signals.push_back(SignalTo{signal_event_[i], event_pe_[signal_event_[i]], signal_bytes_[i]});
      const Amounts amounts{static_cast<TaskKind>(kind_[row]),
                            num_tokens_[row],
                            num_rows_[row],
                            weight_bytes_[row],
                            io_bytes_[row],
                            flops_[row],
                            0};
      const u32 number = g.add_class(pe_[row], amounts, waits, signals, p);
      g.classes[number].set_weights(static_cast<u32>(row) - weights_[row], true);
      g.add_rows(pe_[row], number, 1);
    }
    set_picks(g);
    return g;
  }

 private:
  bool by_rows_;
  std::vector<u32> pe_, kind_, num_tokens_, num_rows_, weights_, chain_, first_, first_id_, event_target_,
      planned_event_, num_active_, wait_event_, signal_event_;
  std::vector<u16> event_pe_;
  std::vector<u64> weight_bytes_, io_bytes_, flops_, wait_ptr_, signal_ptr_, signal_bytes_;
};

py::dict bounds_dict(const Bounds& b) {
  py::dict result;
  result["hbm"] = b.hbm_ps;
  result["workers"] = b.workers_ps;
  result["longest_task"] = b.longest_task_ps;
  result["critical_path"] = b.critical_path_ps;
  result["links"] = b.links_ps;
  return result;
}

py::dict result_dict(const Result& r) {
  py::dict result;
  result["num_tasks"] = r.num_tasks;
  result["tasks_done"] = r.tasks_done;
  result["makespan_ps"] = r.makespan_ps;
  result["end_ps"] = r.end_ps;
  result["hbm_bytes"] = r.hbm_bytes;
  result["link_bytes"] = r.link_bytes;
  result["layer_end_ps"] = r.layer_end_ps;
  py::dict time;
  time["ticket"] = r.time.ticket;
  time["inputs"] = r.time.inputs;
  time["stream"] = r.time.stream;
  time["compute"] = r.time.compute;
  time["overhead"] = r.time.overhead;
  time["send"] = r.time.send;
  result["time_ps"] = time;
  std::vector<Array<Record>> records;
  for (const std::vector<Record>& layer : r.records)
    records.push_back(Array<Record>(static_cast<py::ssize_t>(layer.size()), layer.data()));
  result["records"] = records;
  result["num_stuck"] = r.num_stuck;
  py::list stuck;
  for (const Stuck& s : r.stuck) {
    py::list inputs;
    for (const Stuck::Input& i : s.inputs) inputs.append(py::make_tuple(i.row, i.event, i.seen, i.wanted));
    stuck.append(py::make_tuple(s.pe, s.worker, s.layer,
                                s.slot == none ? py::object(py::none()) : py::object(py::int_(s.slot)),
                                inputs));
  }
  result["stuck"] = stuck;
  result["not_taken"] = r.not_taken;
  return result;
}

//! progress: called with the number of tasks done; raises to stop.
py::dict run_layers(const py::dict& given, const std::vector<std::shared_ptr<LayerSource>>& layers, u32 queue,
                    std::optional<u32> order, u32 look_ahead, bool sorts_experts, std::optional<i64> gap_ps,
                    bool keep_records, bool with_bounds, const std::function<void(u64)>& progress) {
  const Parameters p = make_parameters(given);
  std::optional<Order> ranked;
  if (order) ranked = static_cast<Order>(*order);
  BoundsOf bounds(p, !gap_ps, gap_ps.value_or(0));
  RunConfig config;
  config.queue = static_cast<QueueKind>(queue);
  config.look_ahead = look_ahead;
  config.sorts_experts = sorts_experts;
  config.num_layers = static_cast<u32>(layers.size());
  config.pipelined = !gap_ps;
  config.gap_ps = gap_ps.value_or(0);
  config.keep_records = keep_records;
  double distinct_bytes = 0;
  // the engine asks for layers in their order
  config.make_layer = [&](u32 number) {
    LayerGraph graph = layers[number]->make(p, ranked);
    if (with_bounds) bounds.add(graph);
    for (double bytes : graph.distinct_bytes) distinct_bytes += bytes;
    return graph;
  };
  config.progress = [&](u64 done) {
    const py::gil_scoped_acquire lock;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (progress) progress(done);
  };
  Result result;
  {
    const py::gil_scoped_release unlock;
    result = engine::run(p, config);
  }
  py::dict answer = result_dict(result);
  answer["distinct_weight_bytes"] = distinct_bytes;
  answer["busiest_link_ps"] = with_bounds ? bounds.result().busiest_link_ps : 0.0;
  answer["bounds_ps"] = with_bounds ? py::object(bounds_dict(bounds.result())) : py::object(py::none());
  return answer;
}

//! CPU seconds that a bare loop over std::priority_queue takes: workers that each hold a task for a time,
//! then take the next. What an engine can be compared with on the machine at hand.
double priority_queue_loop(u64 num_tasks, u32 num_workers) {
  const std::clock_t begin = std::clock();
  using Event = std::pair<i64, u32>;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events;
  u64 key = 1, taken = 0;
  auto take = [&](i64 now, u32 worker) {
    key = mixed(key + golden);
    events.emplace(now + 1'000'000 + static_cast<i64>(key >> 46), worker);
    ++taken;
  };
  for (u32 worker = 0; worker < num_workers && taken < num_tasks; ++worker) take(0, worker);
  while (!events.empty()) {
    const Event event = events.top();
    events.pop();
    if (taken < num_tasks) take(event.first, event.second);
  }
  return static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
}

}  // namespace

void bind_engine(py::module_& module) {
  PYBIND11_NUMPY_DTYPE(Record, worker, flags, ready_ps, asked_ps, ticket_ps, start_ps, loaded_ps, done_ps,
                       end_ps);
  py::class_<LayerSource, std::shared_ptr<LayerSource>>(module, "LayerSource")
      .def_readwrite("ids_by_rank", &LayerSource::ids_by_rank)
      .def_readwrite("ids_by_worker", &LayerSource::ids_by_worker);
  py::class_<RoutedLayer, LayerSource, std::shared_ptr<RoutedLayer>>(module, "RoutedLayer")
      .def(py::init<const Shape&, const Tiling&, const std::vector<Array<std::int32_t>>&, bool>(),
           py::arg("shape"), py::arg("tiling"), py::arg("topk_idx"), py::arg("gate_inside"));
  py::class_<ListedLayer, LayerSource, std::shared_ptr<ListedLayer>>(module, "ListedLayer")
      .def(py::init<const py::dict&>(), py::arg("table"));
  module.def("priority_queue_loop", &priority_queue_loop, py::arg("num_tasks"), py::arg("num_workers"),
             py::call_guard<py::gil_scoped_release>());
  module.def("run_layers", &run_layers, py::arg("parameters"), py::arg("layers"), py::arg("queue"),
             py::arg("order"), py::arg("look_ahead"), py::arg("sorts_experts"), py::arg("gap_ps"),
             py::arg("keep_records"), py::arg("with_bounds"), py::arg("progress"));
}
