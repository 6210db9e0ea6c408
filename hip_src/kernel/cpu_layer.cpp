#include "cpu_layer.hpp"

#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>

#include "host_math.hpp"
#include "worker.hpp"

namespace flashmoe::host {

namespace {

//! Plays a Disturbance for one worker.
class Disturber {
 public:
  Disturber(const Disturbance& disturbance, u32 pe, u32 worker)
      : max_delay_ns_(u64{disturbance.max_delay_us} * 1000),
        random_(disturbance.seed * 0x9e3779b97f4a7c15u + (u64{pe} << 32 | worker) + 1),
        tasks_left_(disturbance.dead_pe == pe && disturbance.dead_worker == worker ? disturbance.dead_after
                                                                                   : none) {}

  //! False when the worker dies here.
  bool before(const Task&) {
    delay();
    return tasks_left_ == none || tasks_left_-- > 0;
  }
  void between() { delay(); }

 private:
  void delay() {
    if (max_delay_ns_ == 0) return;
    random_ ^= random_ << 13;  // xorshift
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    if (random_ % 4 != 0) return;
    const u64 end_ns = clock_ns() + (random_ >> 8) % max_delay_ns_;
    while (clock_ns() < end_ns) pause();
  }

  u64 max_delay_ns_;
  u64 random_;
  u32 tasks_left_;
};

template <class Element>
void run_worker(const Launch& launch, const LaunchPe* pes, char* const* heaps, u32 pe, u32 worker,
                TraceBuffer& trace, const Disturbance& disturbance) {
  WorkerMemory memory{PeView(launch, pes, heaps, pe), {}};
  Math<Element> math(memory.view);
  Disturber disturber(disturbance, pe, worker);
  Watchdog watchdog(memory.view, worker);
  Worker<Math<Element>, Disturber, TraceBuffer>(memory, watchdog, worker, trace, math, disturber).run();
}

}  // namespace

RawMemory::RawMemory(u64 bytes)
    : size_(bytes), data_(static_cast<char*>(std::calloc(bytes == 0 ? 1 : bytes, 1))) {
  if (data_ == nullptr) throw std::bad_alloc();
}
void RawMemory::zero() { std::memset(data_.get(), 0, size_); }
void RawMemory::Free::operator()(char* data) const { std::free(data); }

CpuLayer::CpuLayer(const LayerConfig& config, const void* gate, const void* gate_up, const void* down)
    : config_(config) {
  launch_.shape = config.shape;
  launch_.tiling = config.tiling;
  launch_.policy = config.policy;
  launch_.limits = Limits::of(config.shape, config.tiling, config.max_tokens);
  launch_.heap = HeapLayout::of(config.shape, config.tiling, launch_.limits);
  launch_.workspace = WorkspaceLayout::of(config.shape, config.tiling, launch_.limits, config.num_domains);
  launch_.num_workers = config.num_workers;
  launch_.num_domains = config.num_domains;
  launch_.deadline_ns = config.deadline_ns;
  launch_.gate = gate;
  launch_.gate_up = gate_up;
  launch_.down = down;
  for (u32 pe = 0; pe < config.shape.num_pes; ++pe) {
    workspaces_.emplace_back(launch_.workspace.bytes);
    heaps_.emplace_back(launch_.heap.bytes);
    heap_bases_.push_back(heaps_.back().data());
    for (u32 worker = 0; worker < config.num_workers; ++worker) {
      trace_memory_.emplace_back(u64{config.trace_capacity} * sizeof(TraceRecord));
      auto* records = reinterpret_cast<TraceRecord*>(trace_memory_.back().data());
      traces_.push_back(TraceBuffer{records, config.trace_capacity, 0, 0});
    }
  }
  launch_.fault = &fault_;
}

void CpuLayer::reset() {
  for (RawMemory& memory : workspaces_) memory.zero();
  for (RawMemory& memory : heaps_) memory.zero();
}

void CpuLayer::begin(const std::vector<PeInput>& inputs, bool gate_inside) {
  inputs_ = inputs;
  pes_.clear();
  for (u32 pe = 0; pe < config_.shape.num_pes; ++pe) {
    const PeInput& input = inputs_[pe];
    pes_.push_back(LaunchPe{workspaces_[pe].data(), input.x, input.out, input.topk_idx, input.topk_weights,
                            input.num_tokens, input.replay_offset.data(), input.replay_ids.data(),
                            input.replay_digest});
  }
  launch_.gate_inside = gate_inside ? 1 : 0;
  for (TraceBuffer& trace : traces_) trace.size = trace.drops = 0;
  fault_ = FaultReport{};
  launch_.start_ns = clock_ns();
}

void CpuLayer::give_up(u32 pe, u32 worker) {
  if (!fault_.claim()) return;
  fault_.kind = FaultKind::no_resources;
  fault_.pe = pe;
  fault_.worker = worker;
}

void CpuLayer::run_pe(u32 pe, const Disturbance& disturbance) {
  if (pe == disturbance.absent_pe) return;
  auto work = [this, pe, &disturbance](u32 worker) {
    TraceBuffer& trace = traces_[pe * config_.num_workers + worker];
    try {
      if (config_.shape.dtype == DType::bf16) {
        run_worker<bf16>(launch_, pes_.data(), heap_bases_.data(), pe, worker, trace, disturbance);
      } else {
        run_worker<float>(launch_, pes_.data(), heap_bases_.data(), pe, worker, trace, disturbance);
      }
    } catch (const std::bad_alloc&) {
      give_up(pe, worker);
    }
  };
  std::vector<std::thread> threads;
  for (u32 worker = 0; worker < config_.num_workers; ++worker) {
    try {
      threads.emplace_back(work, worker);
    } catch (const std::system_error&) {  // those that did start see the fault and leave
      give_up(pe, worker);
      break;
    }
  }
  for (std::thread& thread : threads) thread.join();
}

bool CpuLayer::run(const std::vector<PeInput>& inputs, bool gate_inside, const Disturbance& disturbance) {
  begin(inputs, gate_inside);
  std::vector<u32> epochs;
  for (u32 pe = 0; pe < config_.shape.num_pes; ++pe) epochs.push_back(epoch(pe));
  std::vector<std::thread> pes;
  for (u32 pe = 0; pe < config_.shape.num_pes; ++pe) {
    try {
      pes.emplace_back([this, pe, &disturbance] { run_pe(pe, disturbance); });
    } catch (const std::system_error&) {
      give_up(pe, 0);
      break;
    }
  }
  for (std::thread& thread : pes) thread.join();
  unfinished_.clear();
  for (u32 pe = 0; pe < config_.shape.num_pes; ++pe) {
    if (epoch(pe) != epochs[pe] + 1) unfinished_.push_back(pe);
  }
  const bool complete = fault_.kind == FaultKind::nothing && unfinished_.empty();
  if (!complete) reset();
  return complete;
}

u32 CpuLayer::epoch(u32 pe) const {
  return *reinterpret_cast<const u32*>(workspaces_[pe].data() + launch_.workspace.epoch);
}
const std::int32_t* CpuLayer::topk_idx(u32 pe) const {
  return reinterpret_cast<const std::int32_t*>(workspaces_[pe].data() + launch_.workspace.topk_idx);
}
const float* CpuLayer::topk_weights(u32 pe) const {
  return reinterpret_cast<const float*>(workspaces_[pe].data() + launch_.workspace.topk_weights);
}
u64 CpuLayer::workspace_bytes() const {
  return config_.shape.num_pes * (launch_.workspace.bytes + launch_.heap.bytes);
}

}  // namespace flashmoe::host
