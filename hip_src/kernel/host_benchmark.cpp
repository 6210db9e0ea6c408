#include "host_benchmark.hpp"

#include <atomic>
#include <thread>
#include <vector>

#include "flashmoe/platform.hpp"
#include "host_math.hpp"

namespace flashmoe::host {

namespace {

//! Calls step() until the time is over; returns calls per ns. step() should take far longer than reading the
//! clock.
template <class Step>
double rate_per_ns(double seconds, Step step) {
  const u64 start_ns = clock_ns();
  const u64 end_ns = start_ns + static_cast<u64>(seconds * 1e9);
  u64 calls = 0, now_ns = start_ns;
  do {
    step();
    ++calls;
    now_ns = clock_ns();
  } while (now_ns < end_ns);
  return static_cast<double>(calls) / static_cast<double>(now_ns - start_ns);
}

//! Bytes of weights per ns when `num_threads` threads each multiply rows of their own with one token.
double stream_rate(double seconds, u32 num_threads, const std::vector<bf16>& weights, u32 columns) {
  std::vector<double> rates(num_threads);
  std::vector<std::thread> threads;
  const std::size_t rows = weights.size() / columns / num_threads;
  for (u32 i = 0; i < num_threads; ++i) {
    threads.emplace_back([&, i] {
      const std::vector<bf16> token(columns, from_float<bf16>(0.5f));
      volatile float sink = 0;
      std::size_t row = 0;
      const double calls = rate_per_ns(seconds, [&] {
        for (u32 n = 0; n < 16; ++n, row = (row + 1) % rows) {
          sink = dot(weights.data() + (i * rows + row) * columns, token.data(), columns);
        }
      });
      rates[i] = calls * 16 * columns * sizeof(bf16);
    });
  }
  for (std::thread& thread : threads) thread.join();
  double sum = 0;
  for (double rate : rates) sum += rate;
  return sum;
}

//! One way from a release store to the acquire load that sees it, between two threads that yield [ns].
double signal_ns(double seconds) {
  std::atomic<u64> word{0}, stop{0};
  std::thread echo([&] {
    u64 seen = 0;
    while (stop.load(std::memory_order_relaxed) == 0) {
      const u64 value = word.load(std::memory_order_acquire);
      if (value % 2 == 1 && value != seen) {
        seen = value + 1;
        word.store(seen, std::memory_order_release);
      }
      pause();
    }
  });
  const double round_trips = rate_per_ns(seconds, [&] {
    const u64 next = word.load(std::memory_order_relaxed) + 1;
    word.store(next, std::memory_order_release);
    const u64 deadline_ns = clock_ns() + 1'000'000'000u;
    while (word.load(std::memory_order_acquire) == next && clock_ns() < deadline_ns) pause();
  });
  stop.store(1, std::memory_order_relaxed);
  echo.join();
  return 0.5 / round_trips;
}

double ticket_ns(double seconds, u32 num_threads) {
  u32 counter = 0;
  std::vector<double> rates(num_threads);
  std::vector<std::thread> threads;
  for (u32 i = 0; i < num_threads; ++i) {
    threads.emplace_back([&, i] {
      rates[i] = 64 * rate_per_ns(seconds, [&] {
                   for (u32 n = 0; n < 64; ++n) fetch_add_relaxed<Scope::device>(&counter, 1u);
                 });
    });
  }
  for (std::thread& thread : threads) thread.join();
  double sum = 0;
  for (double rate : rates) sum += rate;
  return num_threads / sum;
}

//! How long a thread runs before the system takes its core away for another one, with two threads a core
//! [ns].
double slice_ns(double seconds, u32 num_cores) {
  constexpr u64 gap_ns = 100'000;  // longer than an interrupt, shorter than a slice
  std::vector<u64> ran(2 * num_cores), gaps(2 * num_cores);
  std::vector<std::thread> threads;
  for (u32 i = 0; i < 2 * num_cores; ++i) {
    threads.emplace_back([&, i] {
      const u64 end_ns = clock_ns() + static_cast<u64>(seconds * 1e9);
      for (u64 last = clock_ns(), now = last; now < end_ns; last = now) {
        now = clock_ns();
        if (now - last > gap_ns) {
          ++gaps[i];
        } else {
          ran[i] += now - last;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  u64 total_ran = 0, total_gaps = 1;
  for (u32 i = 0; i < 2 * num_cores; ++i) {
    total_ran += ran[i];
    total_gaps += gaps[i];
  }
  return static_cast<double>(total_ran) / static_cast<double>(total_gaps);
}

//! Softmax and top-k of a route task of the common tiling: 8 tokens, 128 experts, top 8 [ns].
double route_ns(double seconds) {
  constexpr u32 tokens = 8, experts = 128, top_k = 8;
  std::vector<float> logits(tokens * experts);
  for (u32 i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i * 37 % 101) * 0.05f;
  std::int32_t topk_idx[top_k];
  float topk_weights[top_k];
  return 1 / rate_per_ns(seconds, [&] {
           for (u32 token = 0; token < tokens; ++token) {
             route_token(logits.data() + token * experts, experts, top_k, true, topk_idx, topk_weights);
           }
         });
}

}  // namespace

std::map<std::string, double> benchmark(double seconds, u32 num_threads) {
  constexpr u32 columns = 2048;
  const double part = seconds / 9;
  // larger than any cache that one thread could keep it in
  const std::vector<bf16> weights(std::size_t{64} << 20, from_float<bf16>(0.25f));
  std::map<std::string, double> result;
  result["stream_bytes_per_ns"] = stream_rate(part, 1, weights, columns);
  result["stream_all_bytes_per_ns"] = stream_rate(part, num_threads, weights, columns);

  const std::vector<bf16> small(weights.begin(), weights.begin() + 16 * columns);
  result["flops_per_ns"] = stream_rate(part, 1, small, columns);  // 2 flops for 2 bytes

  std::vector<char> target(std::size_t{16} << 20);
  std::size_t offset = 0;
  result["copy_bytes_per_ns"] =
      65536 * rate_per_ns(part, [&] {
        std::memcpy(target.data() + offset, reinterpret_cast<const char*>(weights.data()) + offset, 65536);
        offset = (offset + 65536) % target.size();
      });
  result["signal_ns"] = signal_ns(part);
  result["ticket_ns"] = ticket_ns(part, num_threads);
  result["route_ns"] = route_ns(part);
  result["slice_ns"] = slice_ns(part, num_threads);
  result["thread_start_ns"] = 1 / rate_per_ns(part, [] { std::thread([] {}).join(); });
  return result;
}

}  // namespace flashmoe::host
