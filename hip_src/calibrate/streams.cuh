#pragma once
// What the memory gives: clocks, bandwidth of few and of all SMs, latency of one copy, jitter of equal tasks.
#include <map>
#include <set>

#include "lab.cuh"

// ---- clocks

__global__ void timer_kernel(u64* times_ns, u32 size) {
  for (u32 i = 0; i < size; ++i) times_ns[i] = now_ns();
}

inline void measure_timer(Lab& lab) {
  DeviceArray<u64> times(4096);
  timer_kernel<<<1, 1>>>(times.data(), 4096);
  CHECK(cudaGetLastError());
  CHECK(cudaDeviceSynchronize());
  const std::vector<u64> read = times.read();
  Samples steps;
  for (std::size_t i = 1; i < read.size(); ++i) {
    if (read[i] != read[i - 1]) steps.push_back(static_cast<double>(read[i] - read[i - 1]));
  }
  lab.report.add("timer", "step", "ns", steps);
  std::printf("timer: step %.0f ns (min %.0f), %zu steps in %zu reads\n", median(steps), quantile(steps, 0),
              steps.size(), read.size());
}

// ---- bandwidth

struct SmCount {
  Count count;
  u64 end_ns, cycles, elapsed_ns;
  u32 sm, padding;
};

__global__ void __launch_bounds__(32, 1)
    stream_kernel(Stream stream, Start* start, u64 warm_ns, u64 window_ns, SmCount* out) {
  const Block block = open_block(start);
  if (threadIdx.x != 0) return;
  wait_until_ns(block.start_ns);
  const u64 first_ns = now_ns(), first_cycle = now_cycles();
  const u64 begin_ns = block.start_ns + warm_ns;
  const Count count = stream_until(stream, block, begin_ns, begin_ns + window_ns);
  const u64 end_ns = now_ns();
  out[blockIdx.x] = {count, end_ns - block.start_ns, now_cycles() - first_cycle, end_ns - first_ns, sm_id(),
                     0};
}

constexpr u64 kWarmNs = 200'000;
constexpr u64 kWindowNs = 1'000'000;

inline double bytes_per_ns(const Count& count) {
  if (count.last_ns <= count.first_ns) throw std::runtime_error("a stream moved nothing in its window");
  return static_cast<double>(count.chunks) * kSlotBytes / static_cast<double>(count.last_ns - count.first_ns);
}

//! Each SM's rate in a common window of time [bytes/ns].
inline Samples sm_rates(const std::vector<SmCount>& counts) {
  Samples rates;
  for (const SmCount& each : counts) rates.push_back(bytes_per_ns(each.count));
  return rates;
}

inline double sum(const Samples& x) { return mean(x) * static_cast<double>(x.size()); }

//! Rate of n streams when each gets (cap^-p + (total / n)^-p)^(-1/p).
inline double soft_knee(double n, double cap, double total, double p) {
  return n * std::pow(std::pow(cap, -p) + std::pow(total / n, -p), -1 / p);
}

//! Least squares of log rate over the exponent and the total; the cap is what one SM got.
inline void fit_knee(Lab& lab, u32 slots, const std::map<u32, double>& total_by_sms) {
  const double cap = total_by_sms.begin()->second, top = total_by_sms.rbegin()->second;
  double best = HUGE_VAL, best_p = 0, best_total = 0;
  for (double p = 1; p <= 40; p *= 1.02) {
    for (double total = top; total <= 1.5 * top; total += 0.002 * top) {
      double error = 0;
      for (const auto& [n, rate] : total_by_sms) {
        const double miss = std::log(soft_knee(n, cap, total, p) / rate);
        error += miss * miss / static_cast<double>(total_by_sms.size());
      }
      if (error < best) best = error, best_p = p, best_total = total;
    }
  }
  const Conditions conditions = Conditions().with("slots", slots);
  lab.report.add("knee_fit", "cap", "GB/s", {cap}, conditions);
  lab.report.add("knee_fit", "total", "GB/s", {best_total}, conditions);
  lab.report.add("knee_fit", "exponent", "1", {best_p}, conditions);
  lab.report.add("knee_fit", "rms_log_error", "1", {std::sqrt(best)}, conditions);
  lab.report.add("knee_fit", "hard_knee", "SMs", {top / cap}, conditions);
  std::printf(
      "  %u slots: cap %.1f GB/s an SM, all %.0f GB/s, hard knee %.1f SMs; soft knee p %.2f, total %.0f, "
      "rms log error %.3f\n",
      slots, cap, top, top / cap, best_p, best_total, std::sqrt(best));
}

inline void measure_bandwidth(Lab& lab) {
  constexpr u32 kRepeats = 7;
  const std::vector<u32> slots_list = {1, 2, 3, 4, 6};
  std::vector<u32> sms_list = {1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, lab.num_sms};
  DeviceArray<SmCount> out(lab.num_sms);
  std::ofstream csv = lab.report.open("read_bandwidth.csv");
  csv << "slots,sms,repeat,total_gb_s,sm_min_gb_s,sm_mean_gb_s,sm_max_gb_s,distinct_sm_pairs\n";
  std::map<u32, std::map<u32, double>> total_by_slots;
  for (u32 slots : slots_list) {
    for (u32 sms : sms_list) {
      Samples totals, shares;
      for (u32 repeat = 0; repeat < kRepeats; ++repeat) {
        lab.run(stream_kernel, sms, 32, lab.stream(slots), lab.start(), kWarmNs, kWindowNs, out.data());
        std::vector<SmCount> counts = out.read();
        counts.resize(sms);
        std::set<u32> pairs;
        for (const SmCount& each : counts) pairs.insert(each.sm / 2);
        const Samples rates = sm_rates(counts);
        totals.push_back(sum(rates));
        shares.push_back(mean(rates));
        csv << slots << ',' << sms << ',' << repeat << ',' << sum(rates) << ',' << quantile(rates, 0) << ','
            << mean(rates) << ',' << quantile(rates, 1) << ',' << pairs.size() << '\n';
      }
      const Conditions conditions = Conditions().with("slots", slots).with("sms", sms);
      lab.report.add("read_bandwidth", "total", "GB/s", totals, conditions);
      lab.report.add("read_bandwidth", "per_sm", "GB/s", shares, conditions);
      total_by_slots[slots][sms] = median(totals);
    }
  }
  std::printf("read bandwidth, total GB/s by SMs (rows) and 24 KB slots in flight an SM (columns)\n  SMs ");
  for (u32 slots : slots_list) std::printf("%9u", slots);
  for (u32 sms : sms_list) {
    std::printf("\n  %3u ", sms);
    for (u32 slots : slots_list) std::printf("%9.1f", total_by_slots[slots][sms]);
  }
  std::printf("\n");
  for (u32 slots : slots_list) fit_knee(lab, slots, total_by_slots[slots]);
}

// ---- weights that two SMs read

//! Every chunk is read by two SMs, one of them some bytes of memory traffic after the other: while it lies in
//! L2, the memory is read for the first only.
inline void measure_reuse(Lab& lab) {
  constexpr u32 kRepeats = 5, kSlots = 3;
  DeviceArray<SmCount> out(lab.num_sms);
  std::printf("%u SMs, each chunk read by two, GB/s by MB between them:", lab.num_sms);
  for (u64 lag_mb : {0u, 4u, 8u, 12u, 16u, 20u, 24u, 28u, 32u, 36u, 40u, 48u, 56u, 64u, 96u}) {
    Samples totals;
    for (u32 repeat = 0; repeat < kRepeats; ++repeat) {
      lab.run(stream_kernel, lab.num_sms, 32, lab.stream_twice(kSlots, lag_mb * 1'000'000 / kSlotBytes),
              lab.start(), kWarmNs, kWindowNs, out.data());
      totals.push_back(sum(sm_rates(out.read())));
    }
    lab.report.add("reuse", "total", "GB/s", totals,
                   Conditions().with("slots", kSlots).with("sms", lab.num_sms).with("lag_mb", lag_mb));
    std::printf(" %llu: %.0f", static_cast<unsigned long long>(lag_mb), median(totals));
  }
  std::printf("\n");
}

//! How uneven SMs are: bytes each got in equal time, and when each ended an equal share of a fixed work.
inline void measure_evenness(Lab& lab) {
  constexpr u32 kRepeats = 25;
  constexpr u64 kWorkChunks = 49'152;  // 1208 MB
  DeviceArray<SmCount> out(lab.num_sms);
  std::ofstream csv = lab.report.open("sm_bandwidth.csv");
  csv << "slots,ticket,repeat,block,sm,gb_s\n";
  for (u32 slots : {2u, 3u}) {
    for (bool ticket : {false, true}) {
      const Conditions conditions = Conditions().with("slots", slots).with("ticket", ticket);
      Samples low, high, spread, ghz;
      std::map<u32, Samples> shares;  // of an SM, in the mean of its launch
      for (u32 repeat = 0; repeat < kRepeats; ++repeat) {
        lab.run(stream_kernel, lab.num_sms, 32, lab.stream(slots, ticket), lab.start(), kWarmNs, kWindowNs,
                out.data());
        const std::vector<SmCount> counts = out.read();
        const Samples rates = sm_rates(counts);
        low.push_back(quantile(rates, 0) / mean(rates));
        high.push_back(quantile(rates, 1) / mean(rates));
        spread.push_back(deviation(rates) / mean(rates));
        for (u32 i = 0; i < counts.size(); ++i) {
          shares[counts[i].sm].push_back(rates[i] / mean(rates));
          ghz.push_back(static_cast<double>(counts[i].cycles) / static_cast<double>(counts[i].elapsed_ns));
          csv << slots << ',' << ticket << ',' << repeat << ',' << i << ',' << counts[i].sm << ',' << rates[i]
              << '\n';
        }
      }
      Samples persistent, passing;
      for (const auto& [sm, share] : shares) {
        persistent.push_back(mean(share));
        passing.push_back(deviation(share));
      }
      lab.report.add("sm_evenness", "min_over_mean", "1", low, conditions);
      lab.report.add("sm_evenness", "max_over_mean", "1", high, conditions);
      lab.report.add("sm_evenness", "std_over_mean", "1", spread, conditions);
      lab.report.add("sm_evenness", "persistent_std_of_sms", "1", {deviation(persistent)}, conditions);
      lab.report.add("sm_evenness", "passing_std_of_one_sm", "1", passing, conditions);
      lab.report.add("sm_evenness", "sm_clock", "GHz", ghz, conditions);

      Samples makespan, first, deviations;
      for (u32 repeat = 0; repeat < kRepeats; ++repeat) {
        lab.run(stream_kernel, lab.num_sms, 32, lab.stream(slots, ticket, kWorkChunks), lab.start(), u64{0},
                u64{100'000'000}, out.data());
        Samples ends_us;
        for (const SmCount& each : out.read()) ends_us.push_back(static_cast<double>(each.end_ns) * 1e-3);
        makespan.push_back(quantile(ends_us, 1));
        first.push_back(quantile(ends_us, 0));
        deviations.push_back(deviation(ends_us));
      }
      const double work_bytes = static_cast<double>(kWorkChunks * kSlotBytes);
      lab.report.add("fixed_work_1208MB", "last_sm_ends", "us", makespan, conditions);
      lab.report.add("fixed_work_1208MB", "first_sm_ends", "us", first, conditions);
      lab.report.add("fixed_work_1208MB", "std_of_ends", "us", deviations, conditions);
      std::printf(
          "SM evenness, %u slots, %s: share min %.3f max %.3f std %.4f (persistent %.4f, passing %.4f); "
          "1208 MB: first SM %.1f last %.1f us (%.0f GB/s); %.2f GHz\n",
          slots, ticket ? "ticket" : "static", median(low), median(high), median(spread),
          deviation(persistent), median(passing), median(first), median(makespan),
          work_bytes / (median(makespan) * 1e3), median(ghz));
    }
  }
}

// ---- latency of one copy

__global__ void __launch_bounds__(32, 1)
    latency_kernel(const unsigned char* data, u64 span_bytes, u32 bytes, bool in_cache, u32 seed,
                   Start* start, u32* cycles, u32 size, u64* elapsed) {
  const Block block = open_block(start);
  if (threadIdx.x != 0) return;
  const u64 policy = in_cache ? keep_policy() : sm90::evict_first_policy();
  const u32 ring = sm90::shared_address(block.ring);
  u64 state = seed;
  const u64 first_ns = now_ns(), first_cycle = now_cycles();
  for (u32 i = 0; i < size + 1; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const u64 offset = in_cache ? 0 : (state >> 20) % (span_bytes / kSlotBytes) * kSlotBytes;
    const u64 before = now_cycles();
    bulk_copy(ring, data + offset, bytes, block.barriers, policy);
    barrier_wait(block.barriers, i & 1);
    const u64 after = now_cycles();
    if (i > 0) cycles[i - 1] = static_cast<u32>(after - before);  // the first one warms up
  }
  elapsed[0] = now_cycles() - first_cycle;
  elapsed[1] = now_ns() - first_ns;
}

inline void measure_latency(Lab& lab) {
  constexpr u32 kSize = 1024;
  DeviceArray<u32> cycles(kSize);
  DeviceArray<u64> elapsed(2);
  u32 seed = 1;
  std::printf("latency of one bulk copy on an idle GPU, issue to barrier, ns: median (p01..p99)\n");
  struct Place {
    const char* name;
    u64 span_bytes;
  };
  for (const Place& place : {Place{"L2", 0}, Place{"DRAM, 1 GiB span", u64{1} << 30},
                             Place{"DRAM, 16 GiB span", Lab::kDataBytes}}) {
    std::printf("  %-18s", place.name);
    for (u32 bytes : {16u, 1024u, 8192u, 24576u}) {
      Samples ns;
      for (u32 repeat = 0; repeat < 3; ++repeat) {
        lab.run(latency_kernel, 1, 32, lab.data(), place.span_bytes, bytes, place.span_bytes == 0, ++seed,
                lab.start(), cycles.data(), kSize, elapsed.data());
        const std::vector<u64> all = elapsed.read();
        const double ns_per_cycle = static_cast<double>(all[1]) / static_cast<double>(all[0]);
        for (u32 each : cycles.read()) ns.push_back(each * ns_per_cycle);
      }
      lab.report.add("copy_latency", "issue_to_complete", "ns", ns,
                     Conditions().with("place", place.name).with("bytes", bytes));
      std::printf("  %5u B %.0f (%.0f..%.0f)", bytes, median(ns), quantile(ns, 0.01), quantile(ns, 0.99));
    }
    std::printf("\n");
  }
}

// ---- jitter of equal tasks

constexpr u32 kTaskBytes = 64 * 1024;
constexpr u32 kTaskSlots = 3;  // 24 + 24 + 16 KB
constexpr u32 kNumTasks = 2000;

//! Every block reads kNumTasks tasks. Drained: a task's copies start when the task before has arrived, and
//! its duration runs from there. Else the ring is refilled at once and the duration runs from arrival to
//! arrival.
__global__ void __launch_bounds__(32, 1)
    task_kernel(const unsigned char* data, u64 num_tasks_in_data, u64 first_task, bool drained, Start* start,
                u32* task_cycles, u64* elapsed) {
  const Block block = open_block(start);
  if (threadIdx.x != 0) return;
  // Behind the ring, so that nothing is stored to memory while the tasks run.
  u32* kept = reinterpret_cast<u32*>(block.ring + kTaskSlots * kSlotBytes);
  const u64 policy = sm90::evict_first_policy();
  const u32 ring = sm90::shared_address(block.ring);
  u64 task = (first_task + blockIdx.x) % num_tasks_in_data;
  auto slot_bytes = [](u32 slot) {
    return slot + 1 == kTaskSlots ? kTaskBytes - slot * kSlotBytes : kSlotBytes;
  };
  auto issue = [&](u64 which, u32 slot) {
    bulk_copy(ring + slot * kSlotBytes, data + which * kTaskBytes + slot * kSlotBytes, slot_bytes(slot),
              block.barriers + 8 * slot, policy);
  };
  auto after = [&](u64 which) {
    which += gridDim.x;
    return which >= num_tasks_in_data ? which - num_tasks_in_data : which;
  };
  wait_until_ns(block.start_ns);
  const u64 first_ns = now_ns(), first_cycle = now_cycles();
  u64 last_cycle = first_cycle;
  for (u32 slot = 0; slot < kTaskSlots; ++slot) issue(task, slot);
  for (u32 i = 0; i < kNumTasks; ++i) {
    const u64 next = after(task);
    for (u32 slot = 0; slot < kTaskSlots; ++slot) {
      barrier_wait(block.barriers + 8 * slot, i & 1);
      if (!drained && i + 1 < kNumTasks) issue(next, slot);
    }
    const u64 cycle = now_cycles();
    kept[i] = static_cast<u32>(cycle - last_cycle);
    last_cycle = cycle;
    if (drained && i + 1 < kNumTasks) {
      for (u32 slot = 0; slot < kTaskSlots; ++slot) issue(next, slot);
    }
    task = next;
  }
  elapsed[2 * blockIdx.x] = now_cycles() - first_cycle;
  elapsed[2 * blockIdx.x + 1] = now_ns() - first_ns;
  for (u32 i = 0; i < kNumTasks; ++i) task_cycles[blockIdx.x * kNumTasks + i] = kept[i];
}

inline void measure_jitter(Lab& lab) {
  constexpr u32 kRepeats = 3, kTrim = 100, kTogether = 32;
  const u64 num_tasks_in_data = Lab::kDataBytes / kTaskBytes;
  DeviceArray<u32> cycles(lab.num_sms * std::size_t{kNumTasks});
  DeviceArray<u64> elapsed(2 * lab.num_sms);
  for (bool drained : {false, true}) {
    const char* mode = drained ? "drained" : "pipelined";
    const Conditions conditions = Conditions().with("mode", mode).with("task_bytes", kTaskBytes);
    Samples all_ns, log_std, log_std_within, log_std_together, lag_one;
    for (u32 repeat = 0; repeat < kRepeats; ++repeat) {
      lab.run(task_kernel, lab.num_sms, 32, lab.data(), num_tasks_in_data, u64{repeat * 90'000u}, drained,
              lab.start(), cycles.data(), elapsed.data());
      const std::vector<u32> read = cycles.read();
      const std::vector<u64> total = elapsed.read();
      std::ofstream csv;
      if (repeat == 0) csv = lab.report.open(std::string("tasks_") + mode + "_ns.csv");
      Samples logs, within, together;
      double product = 0, square = 0;
      for (u32 block = 0; block < lab.num_sms; ++block) {
        const double ns_per_cycle =
            static_cast<double>(total[2 * block + 1]) / static_cast<double>(total[2 * block]);
        Samples own;
        // Both ends are left out: all start at once, and the last ones run beside fewer streams.
        for (u32 i = 0; i < kNumTasks; ++i) {
          const double ns = read[block * std::size_t{kNumTasks} + i] * ns_per_cycle;
          if (csv.is_open()) csv << (i ? "," : "") << std::lround(ns);
          if (i < kTrim || i >= kNumTasks - 2 * kTrim) continue;
          all_ns.push_back(ns);
          own.push_back(std::log(ns));
        }
        if (csv.is_open()) csv << '\n';
        const double centre = mean(own);
        for (std::size_t i = 0; i < own.size(); ++i) {
          logs.push_back(own[i]);
          within.push_back(own[i] - centre);
          square += (own[i] - centre) * (own[i] - centre);
          if (i > 0) product += (own[i] - centre) * (own[i - 1] - centre);
        }
        Samples sums;
        for (std::size_t i = 0; i + kTogether <= own.size(); i += kTogether) {
          double ns = 0;
          for (std::size_t j = i; j < i + kTogether; ++j) ns += std::exp(own[j]);
          sums.push_back(std::log(ns));
        }
        for (double sum : sums) together.push_back(sum - mean(sums));
      }
      log_std.push_back(deviation(logs));
      log_std_within.push_back(deviation(within));
      log_std_together.push_back(deviation(together));
      lag_one.push_back(product / square);
    }
    lab.report.add("task_jitter", "duration", "ns", all_ns, conditions);
    lab.report.add("task_jitter", "log_std", "1", log_std, conditions);
    lab.report.add("task_jitter", "log_std_within_an_sm", "1", log_std_within, conditions);
    lab.report.add("task_jitter", "log_std_of_32_tasks_within_an_sm", "1", log_std_together, conditions);
    lab.report.add("task_jitter", "lag_one_correlation", "1", lag_one, conditions);
    std::printf(
        "64 KB tasks, %s: %.0f ns (p01 %.0f p99 %.0f max %.0f), std of log %.4f (within an SM %.4f, of 32 "
        "in a row %.4f, lag-1 correlation %.2f)\n",
        mode, median(all_ns), quantile(all_ns, 0.01), quantile(all_ns, 0.99), quantile(all_ns, 1),
        median(log_std), median(log_std_within), median(log_std_together), median(lag_one));
  }
}
