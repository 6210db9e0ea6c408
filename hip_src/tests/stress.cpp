// Stress test of queues and exchange on threads, made for ThreadSanitizer: random delays, skewed routing,
// every queue and tiling. PEs run several epochs with nothing to keep them together but the exchange itself.
//
//   stress [rounds] [max_delay_us] [seed]     exit status 0: all results right, bit for bit
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "../engine/task_table.hpp"
#include "cpu_layer.hpp"
#include "host_math.hpp"

using namespace flashmoe;
using host::bf16;

namespace {

constexpr u32 num_epochs = 4;

struct Case {
  Shape shape;
  Tiling tiling;
  QueueKind queue;
  Order order;
  u32 look_ahead, num_workers, num_domains;
  std::vector<u32> num_tokens;
  bool given;  // routing from outside, else from the gate
};

struct Data {
  std::vector<bf16> gate, gate_up, down;
  std::vector<std::vector<std::vector<bf16>>> x;    // [epoch][pe]
  std::vector<std::vector<std::int32_t>> topk_idx;  // [pe]
  std::vector<std::vector<float>> topk_weights;
};

class Random {
 public:
  explicit Random(u64 seed) : engine_(seed) {}
  u32 below(u32 end) { return static_cast<u32>(engine_() % end); }
  template <class T>
  T pick(std::initializer_list<T> from) {
    return from.begin()[below(static_cast<u32>(from.size()))];
  }
  std::vector<bf16> numbers(std::size_t count) {
    std::vector<bf16> values(count);
    std::uniform_real_distribution<float> uniform(-0.3f, 0.3f);
    for (bf16& value : values) value = host::from_float<bf16>(uniform(engine_));
    return values;
  }

 private:
  std::mt19937_64 engine_;
};

Case make_case(Random& random) {
  const u32 num_pes = random.pick({1u, 2u, 4u});
  Case c{};
  c.shape = Shape{32, 24, 8, random.pick({1u, 2u, 5u}), num_pes, random.below(2), DType::bf16};
  const bool token = random.below(5) == 0;
  c.tiling = Tiling{token ? Granularity::token : Granularity::tile,
                    !token && random.below(2) ? Down::rows : Down::tile,
                    4,
                    random.pick({3u, 8u}),
                    random.pick({1u, 2u, 4u}),
                    random.pick({5u, 24u}),
                    random.pick({7u, 32u}),
                    token ? 1 : random.pick({1u, 2u, 64u}),
                    random.pick({0u, 1u, 3u}),
                    random.pick({1u, 2u})};
  c.queue = static_cast<QueueKind>(random.below(5));
  c.order = static_cast<Order>(random.below(6));
  c.look_ahead = random.pick({0u, 1u, 3u});
  c.num_workers = random.pick({1u, 2u, 5u});
  c.num_domains = random.pick({1u, 2u, 4u});
  for (u32 pe = 0; pe < num_pes; ++pe) c.num_tokens.push_back(random.pick({0u, 1u, 3u, 9u}));
  c.given = c.queue == QueueKind::replay || random.below(2) == 0;
  return c;
}

Data make_data(const Case& c, Random& random) {
  const Shape& s = c.shape;
  Data data;
  data.gate = random.numbers(std::size_t{s.num_experts} * s.d_model);
  data.gate_up = random.numbers(std::size_t{s.num_experts} * 2 * s.d_ff * s.d_model);
  data.down = random.numbers(std::size_t{s.num_experts} * s.d_model * s.d_ff);
  data.x.resize(num_epochs);
  for (auto& x : data.x) {
    for (u32 tokens : c.num_tokens) x.push_back(random.numbers(std::size_t{tokens} * s.d_model));
  }
  const bool hot = random.below(2) == 0;  // every token on the same experts
  for (u32 tokens : c.num_tokens) {
    std::vector<std::int32_t> experts;
    std::vector<float> weights;
    for (u32 token = 0; token < tokens; ++token) {
      const u32 first = hot ? 0 : random.below(s.num_experts);
      for (u32 k = 0; k < s.top_k; ++k) {
        const bool dropped = random.below(20) == 0;
        experts.push_back(dropped ? -1 : static_cast<std::int32_t>((first + k) % s.num_experts));
        weights.push_back(1.0f / static_cast<float>(s.top_k + k));
      }
    }
    data.topk_idx.push_back(experts);
    data.topk_weights.push_back(weights);
  }
  return data;
}

host::LayerConfig config_of(const Case& c) {
  return host::LayerConfig{c.shape,
                           c.tiling,
                           Policy{c.queue, c.order, c.look_ahead},
                           9,
                           c.num_workers,
                           c.num_domains,
                           u64{20} * 1'000'000'000u,
                           4096};
}

std::vector<host::PeInput> inputs_of(const Case& c, Data& data, u32 epoch,
                                     std::vector<std::vector<bf16>>& out) {
  std::vector<host::PeInput> inputs;
  out.clear();
  for (u32 tokens : c.num_tokens) out.emplace_back(std::size_t{tokens} * c.shape.d_model, bf16{0});
  for (u32 pe = 0; pe < c.shape.num_pes; ++pe) {
    host::PeInput input{};
    input.x = data.x[epoch][pe].data();
    input.out = out[pe].data();
    input.num_tokens = c.num_tokens[pe];
    if (c.given) {
      input.topk_idx = data.topk_idx[pe].data();
      input.topk_weights = data.topk_weights[pe].data();
    }
    inputs.push_back(input);
  }
  if (c.queue != QueueKind::replay) return inputs;
  std::vector<const std::int32_t*> topk_idx;
  for (const auto& experts : data.topk_idx) topk_idx.push_back(experts.data());
  TaskTable table(LayerPlan(c.shape, c.tiling, topk_idx, c.num_tokens, false));
  for (u32 pe = 0; pe < c.shape.num_pes; ++pe) {
    const std::vector<u32> ids = table.order(pe, c.order);
    host::PeInput& input = inputs[pe];
    input.replay_offset.push_back(0);
    for (u32 worker = 0; worker < c.num_workers; ++worker) {
      for (std::size_t i = worker; i < ids.size(); i += c.num_workers) input.replay_ids.push_back(ids[i]);
      input.replay_offset.push_back(static_cast<u32>(input.replay_ids.size()));
    }
    const Plan& plan = table.plan.graphs()[pe].plan;
    input.replay_digest = plan_digest(plan.entry_offset, plan.num_local);
  }
  return inputs;
}

bool same(const std::vector<bf16>& a, const std::vector<bf16>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(bf16)) == 0);
}

//! What one worker a PE makes of it, epoch by epoch.
std::vector<std::vector<std::vector<bf16>>> expected_outputs(Case c, Data& data) {
  c.queue = QueueKind::ticket;
  c.order = Order::phase;
  c.num_workers = 1;
  host::CpuLayer layer(config_of(c), data.gate.data(), data.gate_up.data(), data.down.data());
  std::vector<std::vector<std::vector<bf16>>> outputs(num_epochs);
  for (u32 epoch = 0; epoch < num_epochs; ++epoch) {
    if (!layer.run(inputs_of(c, data, epoch, outputs[epoch]), !c.given, host::Disturbance{})) std::abort();
  }
  return outputs;
}

bool run_case(const Case& c, Data& data, u32 max_delay_us, u64 seed) {
  const auto expected = expected_outputs(c, data);
  host::CpuLayer layer(config_of(c), data.gate.data(), data.gate_up.data(), data.down.data());
  std::vector<std::vector<bf16>> out;
  std::vector<std::vector<bf16>> x = data.x[0];  // each PE puts its tokens of the next epoch here
  std::vector<host::PeInput> inputs = inputs_of(c, data, 0, out);
  for (u32 pe = 0; pe < c.shape.num_pes; ++pe) inputs[pe].x = x[pe].data();
  layer.begin(inputs, !c.given);
  std::vector<std::thread> pes;
  std::vector<u32> right(c.shape.num_pes, 0);
  for (u32 pe = 0; pe < c.shape.num_pes; ++pe) {
    pes.emplace_back([&, pe] {
      for (u32 epoch = 0; epoch < num_epochs && layer.epoch(pe) == epoch; ++epoch) {
        std::copy(data.x[epoch][pe].begin(), data.x[epoch][pe].end(), x[pe].begin());
        std::fill(out[pe].begin(), out[pe].end(), bf16{0});
        host::Disturbance disturbance{};
        disturbance.max_delay_us = max_delay_us;
        disturbance.seed = seed + epoch;
        layer.run_pe(pe, disturbance);
        right[pe] += same(out[pe], expected[epoch][pe]) ? 1 : 0;
      }
    });
  }
  for (std::thread& thread : pes) thread.join();
  const FaultReport& fault = layer.fault();
  if (fault.kind != FaultKind::nothing) {
    std::printf("fault %u: PE %u worker %u task %u event %u[%u] seen %llu wanted %llu\n",
                static_cast<u32>(fault.kind), fault.pe, fault.worker, fault.task_id,
                static_cast<u32>(fault.missing.event), fault.missing.index,
                static_cast<unsigned long long>(fault.missing.seen),
                static_cast<unsigned long long>(fault.missing.wanted));
    return false;
  }
  bool all = true;
  for (u32 pe = 0; pe < c.shape.num_pes; ++pe) all = all && right[pe] == num_epochs;
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  const u32 rounds = argc > 1 ? static_cast<u32>(std::atoi(argv[1])) : 100;
  const u32 max_delay_us = argc > 2 ? static_cast<u32>(std::atoi(argv[2])) : 100;
  const u64 seed = argc > 3 ? static_cast<u64>(std::atoll(argv[3])) : 1;
  for (u32 round = 0; round < rounds; ++round) {
    Random random(seed * 1'000'003 + round);
    const Case c = make_case(random);
    Data data = make_data(c, random);
    if (run_case(c, data, max_delay_us, round)) continue;
    std::printf(
        "wrong: round %u of seed %llu: %u PEs, %u workers, queue %u, order %u, granularity %u, down %u\n",
        round, static_cast<unsigned long long>(seed), c.shape.num_pes, c.num_workers,
        static_cast<u32>(c.queue), static_cast<u32>(c.order), static_cast<u32>(c.tiling.granularity),
        static_cast<u32>(c.tiling.down));
    return 1;
  }
  std::printf("%u rounds right\n", rounds);
  return 0;
}
