#pragma once
// Words that SMs share: a signal from one to another, a counter that many add to, the ticket of a task queue.
// Warp 0 of a block signals; a thread of warp 1 streams weights, or not.
#include "beside.cuh"

constexpr u32 kSignalThreads = 64, kStreamLane = 32;
constexpr u32 kKeptSlot = 4;      // of the ring: the streams beside keep below it
constexpr u32 kWordStride = 128;  // words; each shared word has 512 bytes for itself

// ---- one signal

//! word: the signal is the data, a relaxed store and relaxed polls.
enum class Signal : u32 { store, add, word };
inline const char* name_of(Signal signal) {
  return signal == Signal::store ? "st.release" : signal == Signal::add ? "red.release" : "st.relaxed";
}

struct PingPong {
  u32 ping_block, pong_block;
  u32* words;  // [0] from ping to pong, [kWordStride] back; zeroed
  Signal signal;
  bool payload;     // each signal follows 512 bytes stored by the warp
  uint4* payloads;  // 2 x 32
  u32 size;         // round trips at most
  u32* cycles;      // of each
  u64* summary;     // round trips made, cycles and ns of them together
};

__global__ void __launch_bounds__(kSignalThreads, 1)
    ping_pong_kernel(PingPong game, Background background, Start* start) {
  constexpr u32 kOver = 1u << 31;
  const Block block = open_block(start);
  const bool ping = blockIdx.x == game.ping_block, player = ping || blockIdx.x == game.pong_block;
  if (threadIdx.x == kStreamLane) stream_beside(background, block, player);
  if (threadIdx.x >= 32 || !player) return;

  const u32 lane = threadIdx.x;
  u32* mine = game.words + (ping ? 0 : kWordStride);
  u32* theirs = game.words + (ping ? kWordStride : 0);
  auto send = [&](u32 value, bool over) {
    if (game.payload) {
      game.payloads[(ping ? 0 : 32) + lane] = make_uint4(value, lane, 0, 0);
      __syncwarp();
    }
    if (lane != 0) return;
    if (game.signal == Signal::word) {
      store_relaxed<Scope::device>(mine, over ? kOver : value);
    } else if (game.signal == Signal::add) {
      add_release(mine, over ? kOver : 1);
    } else {
      store_release<Scope::device>(mine, over ? kOver : value);
    }
  };
  auto receive = [&](u32 value) {
    u32 seen = 0;
    if (lane == 0) {
      if (game.signal == Signal::word) {
        wait_until([&] { return (seen = load_relaxed<Scope::device>(theirs)) >= value; }, "a signal");
      } else {
        wait_until([&] { return (seen = load_acquire<Scope::device>(theirs)) >= value; }, "a signal");
      }
    }
    return (__shfl_sync(~0u, seen, 0) & kOver) != 0;
  };
  if (!ping) {
    for (u32 i = 1; !receive(i); ++i) send(i, false);
    return;
  }
  wait_until_ns(block.start_ns + background.warm_ns);
  const u64 end_ns = block.start_ns + background.warm_ns + background.window_ns;
  // In shared memory: the next release would wait for a store to global memory.
  u32* kept = reinterpret_cast<u32*>(block.ring + kKeptSlot * kSlotBytes);
  const u64 first_ns = now_ns(), first_cycle = now_cycles();
  u32 made = 0;
  u64 last_cycle = first_cycle, last_ns = first_ns;
  while (made < game.size && __shfl_sync(~0u, last_ns, 0) < end_ns) {
    send(made + 1, false);
    receive(made + 1);
    const u64 cycle = now_cycles();
    last_ns = now_ns();
    if (lane == 0) kept[made] = static_cast<u32>(cycle - last_cycle);
    last_cycle = cycle;
    ++made;
  }
  if (lane == 0) {
    game.summary[0] = made;
    game.summary[1] = last_cycle - first_cycle;
    game.summary[2] = last_ns - first_ns;
    for (u32 i = 0; i < made; ++i) game.cycles[i] = kept[i];
  }
  send(made + 1, true);
}

inline void measure_ping_pong(Lab& lab) {
  constexpr u32 kSize = 256;
  constexpr u32 kPairs = 30;
  // the words lie in as many places as there are pairs: how far a slice of L2 is matters
  constexpr std::size_t kPlaceWords = (std::size_t{1} << 18) + 4 * kWordStride;
  DeviceArray<u32> words(kPairs * kPlaceWords), cycles(kSize);
  DeviceArray<uint4> payloads(64);
  DeviceArray<u64> summary(3);
  DeviceArray<SmCount> out(lab.num_sms);
  std::printf("signal, one way (half a round trip), ns: median (p01..p99)\n");
  for (Streams who : {Streams::none, Streams::others, Streams::all}) {
    for (u32 slots : {2u, 3u}) {
      if (who == Streams::none && slots != 3) continue;
      for (Signal signal : {Signal::store, Signal::add, Signal::word}) {
        for (bool payload : {false, true}) {
          if (payload && signal == Signal::word) continue;  // nothing would order the payload
          Samples ns, of_pair, rate;
          words.zero();
          for (u32 pair = 0; pair < kPairs; ++pair) {
            const u32 ping = 7 * pair % lab.num_sms, pong = (ping + 1 + 13 * pair) % lab.num_sms;
            const PingPong game{ping,
                                pong == ping ? (ping + 1) % lab.num_sms : pong,
                                words.data() + pair * kPlaceWords,
                                signal,
                                payload,
                                payloads.data(),
                                kSize,
                                cycles.data(),
                                summary.data()};
            const Background background{lab.stream(slots), who, kWarmNs, 1'500'000, out.data()};
            lab.run(ping_pong_kernel, lab.num_sms, kSignalThreads, game, background, lab.start());
            const std::vector<u64> made = summary.read();
            const std::vector<u32> read = cycles.read();
            const double ns_per_cycle = static_cast<double>(made[2]) / static_cast<double>(made[1]);
            Samples own;
            for (u64 i = 1; i < made[0]; ++i) own.push_back(0.5 * read[i] * ns_per_cycle);
            of_pair.push_back(median(own));
            ns.insert(ns.end(), own.begin(), own.end());
            rate.push_back(background_rate(out));
          }
          const Conditions conditions = Conditions()
                                            .with("streams", name_of(who))
                                            .with("slots", who == Streams::none ? 0u : slots)
                                            .with("signal", name_of(signal))
                                            .with("payload_bytes", payload ? 512 : 0);
          lab.report.add("signal", "one_way", "ns", ns, conditions);
          lab.report.add("signal", "median_one_way_of_a_pair", "ns", of_pair, conditions);
          lab.report.add("signal", "streams_beside", "GB/s", rate, conditions);
          std::printf(
              "  %-17s %u slots, %-11s payload %3u B: %6.0f (%.0f..%.0f), pairs %.0f..%.0f; %.0f GB/s "
              "beside\n",
              name_of(who), who == Streams::none ? 0u : slots, name_of(signal), payload ? 512 : 0, median(ns),
              quantile(ns, 0.01), quantile(ns, 0.99), quantile(of_pair, 0), quantile(of_pair, 1),
              median(rate));
        }
      }
    }
  }
}

// ---- a counter that many SMs add to

constexpr u32 kAdders = 96;  // tiles of an expert

struct Counter {
  u32* words;         // [0] counter, [kWordStride] flag of the last arriver; zeroed
  bool last_arriver;  // waiters look at the flag, else at the counter
  u32 num_waiters;    // blocks kAdders .. kAdders + num_waiters - 1
  u32 rounds;
  u64 period_ns;
  u64* issued_ns;  // rounds x kAdders: just before each add
  u64* seen_ns;    // rounds x num_waiters
  u64* last_ns;    // rounds: the last arriver knows that it is the last
};

__global__ void __launch_bounds__(kSignalThreads, 1)
    counter_kernel(Counter counter, Background background, Start* start) {
  const Block block = open_block(start);
  const u32 waiter = blockIdx.x - kAdders;  // wraps for adders
  const bool adds = blockIdx.x < kAdders, waits = !adds && waiter < counter.num_waiters;
  if (threadIdx.x == kStreamLane) stream_beside(background, block, adds || waits);
  if (threadIdx.x != 0 || !(adds || waits)) return;
  u32* flag = counter.words + kWordStride;
  for (u32 round = 0; round < counter.rounds; ++round) {
    const u64 begin_ns = block.start_ns + background.warm_ns + round * counter.period_ns;
    const u32 full = kAdders * (round + 1);
    if (adds) {
      wait_until_ns(begin_ns);
      const u64 issued_ns = now_ns();
      if (!counter.last_arriver) {
        add_release(counter.words, 1);
      } else if (fetch_add_acq_rel<Scope::device>(counter.words, 1u) == full - 1) {
        const u64 last_ns = now_ns();
        store_release<Scope::device>(flag, round + 1);
        counter.last_ns[round] = last_ns;
      }
      counter.issued_ns[round * kAdders + blockIdx.x] = issued_ns;
    } else {
      // Polling from half a period before, as a consumer that came early does.
      wait_until_ns(begin_ns - counter.period_ns / 2);
      const u32* word = counter.last_arriver ? flag : counter.words;
      const u32 wanted = counter.last_arriver ? round + 1 : full;
      wait_until([&] { return load_acquire<Scope::device>(word) >= wanted; }, "a counter");
      counter.seen_ns[round * counter.num_waiters + waiter] = now_ns();
    }
  }
}

inline void measure_counter(Lab& lab) {
  constexpr u32 kRounds = 64;
  constexpr u64 kPeriodNs = 25'000;
  const u32 most_waiters = lab.num_sms - kAdders;
  DeviceArray<u32> words(2 * kWordStride);
  DeviceArray<u64> issued(kRounds * kAdders), seen(kRounds * most_waiters), last(kRounds);
  DeviceArray<SmCount> out(lab.num_sms);
  std::printf("counter of %u SMs' adds, from the last add issued, ns: median (p99)\n", kAdders);
  for (Streams who : {Streams::none, Streams::all}) {
    for (bool last_arriver : {false, true}) {
      for (u32 waiters : {1u, most_waiters}) {
        words.zero();
        const Counter counter{words.data(), last_arriver,  waiters,     kRounds,
                              kPeriodNs,    issued.data(), seen.data(), last.data()};
        const Background background{lab.stream(3), who, kWarmNs, kRounds * kPeriodNs, out.data()};
        lab.run(counter_kernel, lab.num_sms, kSignalThreads, counter, background, lab.start());
        const std::vector<u64> issued_ns = issued.read(), seen_ns = seen.read(), last_ns = last.read();
        Samples all, slowest, arrival, skew;
        for (u32 round = 0; round < kRounds; ++round) {
          const auto adds = issued_ns.begin() + round * kAdders;
          const double final_add = static_cast<double>(*std::max_element(adds, adds + kAdders));
          skew.push_back(final_add - static_cast<double>(*std::min_element(adds, adds + kAdders)));
          Samples delays;
          for (u32 i = 0; i < waiters; ++i) {
            delays.push_back(static_cast<double>(seen_ns[round * waiters + i]) - final_add);
          }
          all.insert(all.end(), delays.begin(), delays.end());
          slowest.push_back(quantile(delays, 1));
          if (last_arriver) arrival.push_back(static_cast<double>(last_ns[round]) - final_add);
        }
        const Conditions conditions = Conditions()
                                          .with("streams", name_of(who))
                                          .with("adders", kAdders)
                                          .with("waiters", waiters)
                                          .with("last_arriver", last_arriver);
        lab.report.add("counter", "last_add_to_seen", "ns", all, conditions);
        lab.report.add("counter", "last_add_to_seen_by_all", "ns", slowest, conditions);
        lab.report.add("counter", "skew_of_adds", "ns", skew, conditions);
        if (last_arriver) lab.report.add("counter", "last_add_to_last_arriver", "ns", arrival, conditions);
        std::printf("  %-17s %-22s %2u waiters: seen %.0f (%.0f), by all %.0f (%.0f)", name_of(who),
                    last_arriver ? "last arriver sets flag," : "waiters poll counter,", waiters, median(all),
                    quantile(all, 0.99), median(slowest), quantile(slowest, 0.99));
        if (last_arriver)
          std::printf(", last arriver knows %.0f (%.0f)", median(arrival), quantile(arrival, 0.99));
        std::printf("; adds within %.0f\n", median(skew));
      }
    }
  }
}

// ---- the ticket

struct Tickets {
  u32* word;        // zeroed
  u32 first, last;  // blocks that take tickets
  u32 size;         // tickets a block
  u64 pace_ns;      // at most one ticket a block in this time; 0: back to back
  u32* cycles;      // blocks x size
  u64* summary;     // blocks x (first ns, last ns, cycles)
};

__global__ void __launch_bounds__(kSignalThreads, 1)
    ticket_kernel(Tickets tickets, Background background, Start* start) {
  const Block block = open_block(start);
  const bool takes = blockIdx.x >= tickets.first && blockIdx.x <= tickets.last;
  if (threadIdx.x == kStreamLane) stream_beside(background, block, takes);
  if (!takes) return;
  // Keeps the two conditions apart: the compiler then knows that one lane adds, and makes no vote and shuffle
  // of it.
  __syncwarp();
  if (threadIdx.x != 0) return;
  wait_until_ns(block.start_ns + background.warm_ns);
  const u64 first_ns = now_ns(), first_cycle = now_cycles();
  u64 last_cycle = first_cycle;
  for (u32 i = 0; i < tickets.size; ++i) {
    if (tickets.pace_ns > 0) {
      wait_until_ns(first_ns + i * tickets.pace_ns);
      last_cycle = now_cycles();
    }
    // No ticket is this large: the branch makes the clock wait for the value.
    if (fetch_add_relaxed<Scope::device>(tickets.word, 1u) == ~0u) give_up("a ticket");
    const u64 cycle = now_cycles();
    tickets.cycles[blockIdx.x * tickets.size + i] = static_cast<u32>(cycle - last_cycle);
    last_cycle = cycle;
  }
  tickets.summary[3 * blockIdx.x] = first_ns;
  tickets.summary[3 * blockIdx.x + 1] = now_ns();
  tickets.summary[3 * blockIdx.x + 2] = now_cycles() - first_cycle;
}

inline void measure_tickets(Lab& lab) {
  constexpr u32 kSize = 256, kWords = 8;
  DeviceArray<u32> words(std::size_t{kWords} << 20), cycles(lab.num_sms * kSize);
  DeviceArray<u64> summary(3 * lab.num_sms);
  DeviceArray<SmCount> out(lab.num_sms);
  std::printf("ticket: latency ns median (p01..p99), tickets per us overall\n");
  auto measure = [&](u32 first, u32 takers, u64 pace_ns, Streams who, u32 word, Samples& ns, Samples& per_us,
                     Samples& beside) {
    words.zero();
    summary.zero();
    // Words a MB and a bit apart: other slices of L2.
    const Tickets tickets{words.data() + word * ((std::size_t{1} << 20) - 4096 - 32 * word),
                          first,
                          first + takers - 1,
                          kSize,
                          pace_ns,
                          cycles.data(),
                          summary.data()};
    const Background background{lab.stream(3), who, kWarmNs, 1'500'000, out.data()};
    lab.run(ticket_kernel, lab.num_sms, kSignalThreads, tickets, background, lab.start());
    const std::vector<u32> read = cycles.read();
    const std::vector<u64> total = summary.read();
    u64 begin_ns = ~u64{0}, end_ns = 0;
    for (u32 block = first; block < first + takers; ++block) {
      begin_ns = std::min(begin_ns, total[3 * block]);
      end_ns = std::max(end_ns, total[3 * block + 1]);
      const double ns_per_cycle = static_cast<double>(total[3 * block + 1] - total[3 * block]) /
                                  static_cast<double>(total[3 * block + 2]);
      for (u32 i = 8; i < kSize; ++i) ns.push_back(read[block * kSize + i] * ns_per_cycle);
    }
    per_us.push_back(static_cast<double>(takers) * kSize * 1e3 / static_cast<double>(end_ns - begin_ns));
    beside.push_back(background_rate(out));
  };
  auto tell = [&](const char* what, u32 takers, u64 pace_ns, Streams who, const Samples& ns,
                  const Samples& per_us, const Samples& beside) {
    const Conditions conditions = Conditions()
                                      .with("what", what)
                                      .with("takers", takers)
                                      .with("pace_ns", pace_ns)
                                      .with("streams", name_of(who));
    lab.report.add("ticket", "latency", "ns", ns, conditions);
    lab.report.add("ticket", "throughput", "tickets/us", per_us, conditions);
    lab.report.add("ticket", "streams_beside", "GB/s", beside, conditions);
    std::printf("  %-26s %3u takers, %-16s %6.0f (%.0f..%.0f), %.1f per us; %.0f GB/s beside\n", what, takers,
                name_of(who), median(ns), quantile(ns, 0.01), quantile(ns, 0.99), median(per_us),
                median(beside));
  };
  {
    Samples ns, of_word, per_us, beside;
    for (u32 word = 0; word < kWords; ++word) {
      for (u32 block : {0u, 1u, 17u, 40u, 77u, 100u, 131u}) {
        if (block >= lab.num_sms) continue;
        Samples own;
        measure(block, 1, 0, Streams::none, word, own, per_us, beside);
        of_word.push_back(median(own));
        ns.insert(ns.end(), own.begin(), own.end());
      }
    }
    tell("one SM, words and SMs vary", 1, 0, Streams::none, ns, per_us, beside);
    lab.report.add("ticket", "median_latency_of_word_and_sm", "ns", of_word);
    std::printf("    medians by word and SM: %.0f..%.0f\n", quantile(of_word, 0), quantile(of_word, 1));
  }
  struct Case {
    const char* what;
    u32 takers;
    u64 pace_ns;
    Streams who;
  };
  const u32 all = lab.num_sms;
  for (const Case& each :
       {Case{"back to back", 2, 0, Streams::none}, Case{"back to back", 8, 0, Streams::none},
        Case{"back to back", 32, 0, Streams::none}, Case{"back to back", 64, 0, Streams::none},
        Case{"back to back", all, 0, Streams::none}, Case{"one in 2 us each", all, 2000, Streams::none},
        Case{"back to back", 1, 0, Streams::others}, Case{"back to back", all, 0, Streams::all},
        Case{"one in 2 us each", all, 2000, Streams::all}}) {
    Samples ns, per_us, beside;
    for (u32 word = 0; word < 5; ++word) {
      measure(0, each.takers, each.pace_ns, each.who, word, ns, per_us, beside);
    }
    tell(each.what, each.takers, each.pace_ns, each.who, ns, per_us, beside);
  }
}
