#pragma once
// The rate of matrix instructions fed from shared memory, and reads of activations that lie in L2.
#include "beside.cuh"

// ---- matrix instructions

constexpr u32 kMatrixWarps = 8;
constexpr u32 kFragments = kSlotBytes / 512 / kMatrixWarps;  // 16 x 16 bf16 each, of one slot, a warp
constexpr double kFlopPerMma = 2.0 * 16 * 8 * 16;

__device__ __forceinline__ void mma(float (&c)[4], const uint4& a, const uint2& b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

__device__ __forceinline__ uint4 load_shared(u32 address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address));
  return value;
}

//! Two bf16 of random sign and mantissa near 2^-7: finite whatever the bits were.
__device__ __forceinline__ u32 small_pair(u32 bits) { return (bits & 0x807f807fu) | 0x3c003c00u; }

struct MatrixTime {
  u64 cycles, ns;
};

//! Each warp multiplies its fragments of slot after slot with kTokenTiles x 8 tokens held in registers.
//! kChains: independent accumulators a token tile. Not kFromShared: the weights stay in registers too.
template <u32 kTokenTiles, u32 kChains, bool kFromShared>
__global__ void __launch_bounds__(32 * kMatrixWarps, 1)
    matrix_kernel(const unsigned char* data, u32 ring_slots, u32 num_slots_read, Start* start, float* sink,
                  MatrixTime* out) {
  const Block block = open_block(start);
  for (u32 i = threadIdx.x; i < ring_slots * kSlotBytes / 16; i += blockDim.x) {
    const uint4 bits = reinterpret_cast<const uint4*>(data)[i];
    reinterpret_cast<uint4*>(block.ring)[i] =
        make_uint4(small_pair(bits.x), small_pair(bits.y), small_pair(bits.z), small_pair(bits.w));
  }
  __syncthreads();
  const u32 mine =
      sm90::shared_address(block.ring) + threadIdx.x / 32 * kFragments * 512 + threadIdx.x % 32 * 16;
  uint4 weights[kFragments];
  uint2 tokens[kFragments][kTokenTiles];
  for (u32 i = 0; i < kFragments; ++i) {
    weights[i] = load_shared(mine + i * 512);
    for (u32 j = 0; j < kTokenTiles; ++j) {
      const uint4 bits = load_shared(mine + kSlotBytes + ((i * kTokenTiles + j) % kFragments) * 512);
      tokens[i][j] = make_uint2(bits.x, bits.z ^ (j << 3));
    }
  }
  float sums[kChains][kTokenTiles][4] = {};
  __syncthreads();
  wait_until_ns(block.start_ns);
  __syncthreads();
  const u64 first_cycle = now_cycles(), first_ns = now_ns();
  // Not unrolled, and the ring's length is not known here: else fragments are loaded once and used often.
#pragma unroll 1
  for (u32 i = 0, slot = 0; i < num_slots_read; ++i) {
    if constexpr (kFromShared) {
#pragma unroll
      for (u32 j = 0; j < kFragments; ++j) weights[j] = load_shared(mine + slot * kSlotBytes + j * 512);
      if (++slot == ring_slots) slot = 0;
    }
#pragma unroll
    for (u32 j = 0; j < kFragments; ++j) {
#pragma unroll
      for (u32 k = 0; k < kTokenTiles; ++k) mma(sums[j % kChains][k], weights[j], tokens[j][k]);
    }
  }
  float sum = 0;
  for (u32 chain = 0; chain < kChains; ++chain) {
    for (u32 j = 0; j < kTokenTiles; ++j) {
      for (u32 q = 0; q < 4; ++q) sum += sums[chain][j][q];
    }
  }
  sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = {now_cycles() - first_cycle, now_ns() - first_ns};
}

template <u32 kTokenTiles, u32 kChains, bool kFromShared>
void measure_matrix_case(Lab& lab) {
  constexpr u32 kRepeats = 7, kRingSlots = 3, kSlotsRead = 6000 / kTokenTiles;
  constexpr double kFlop = kFlopPerMma * kSlotsRead * kFragments * kMatrixWarps * kTokenTiles;
  DeviceArray<float> sink(lab.num_sms * 32 * kMatrixWarps);
  DeviceArray<MatrixTime> out(lab.num_sms);
  std::printf("  %2u tokens, %u accumulators a tile, weights in %s:", 8 * kTokenTiles, kChains,
              kFromShared ? "shared memory" : "registers");
  for (u32 sms : {1u, lab.num_sms}) {
    Samples rate, per_cycle, ghz;
    for (u32 repeat = 0; repeat < kRepeats; ++repeat) {
      lab.run(matrix_kernel<kTokenTiles, kChains, kFromShared>, sms, 32 * kMatrixWarps, lab.data(),
              kRingSlots, kSlotsRead, lab.start(), sink.data(), out.data());
      std::vector<MatrixTime> times = out.read();
      times.resize(sms);
      for (const MatrixTime& time : times) {
        rate.push_back(kFlop / static_cast<double>(time.ns));
        per_cycle.push_back(kFlop / static_cast<double>(time.cycles));
        ghz.push_back(static_cast<double>(time.cycles) / static_cast<double>(time.ns));
      }
    }
    const Conditions conditions = Conditions()
                                      .with("tokens", 8 * kTokenTiles)
                                      .with("accumulators", kChains)
                                      .with("weights", kFromShared ? "shared memory" : "registers")
                                      .with("sms", sms);
    lab.report.add("mma_m16n8k16_bf16", "rate_of_an_sm", "flop/ns", rate, conditions);
    lab.report.add("mma_m16n8k16_bf16", "rate_of_an_sm", "flop/cycle", per_cycle, conditions);
    lab.report.add("mma_m16n8k16_bf16", "sm_clock", "GHz", ghz, conditions);
    std::printf(" %u SMs %.0f flop/ns (%.0f a cycle, %.0f GB/s of weights)%s", sms, median(rate),
                median(per_cycle), median(rate) / kFlopPerMma / kTokenTiles * 512, sms == 1 ? ";" : "\n");
  }
}

inline void measure_matrix(Lab& lab) {
  std::printf("bf16 mma m16n8k16, 8 warps, a SM\n");
  measure_matrix_case<1, 1, true>(lab);
  measure_matrix_case<1, 2, true>(lab);
  measure_matrix_case<1, 3, true>(lab);
  measure_matrix_case<1, 6, true>(lab);
  measure_matrix_case<2, 1, true>(lab);
  measure_matrix_case<2, 2, true>(lab);
  measure_matrix_case<4, 1, true>(lab);
  measure_matrix_case<1, 2, false>(lab);
  measure_matrix_case<4, 1, false>(lab);
}

// ---- reads from L2

constexpr u32 kReaders = 256;
constexpr u32 kStreamThread = kReaders;  // first of the warp after them
constexpr u32 kReadSlot = 4;             // of the ring: the streams beside keep below it
constexpr u32 kReadBarrier = kMaxSlots - 1;

//! Waits for all readers; each gives its value, so that what it loaded has arrived.
__device__ __forceinline__ void meet_readers(u32 value) {
  asm volatile(
      "{\n\t.reg .pred p, q;\n\t"
      "setp.eq.u32 p, %0, 0x9e3779b9;\n\t"
      "bar.red.or.pred q, 1, 256, p;\n\t}" ::"r"(value)
      : "memory");
}

__device__ __forceinline__ uint4 load_l2(const uint4* address) {
  uint4 value;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address)
               : "memory");
  return value;
}

struct Reads {
  const unsigned char* data;
  u64 block_bytes;  // from one block's region to the next; 0: all read the same one
  u32 bulk;         // by one bulk copy, else by loads of 256 threads
  u32 size;         // rounds at most
  u32* cycles;      // blocks x size
  u64* summary;     // blocks x (rounds made, cycles, ns)
};

//! Reads kLoads x 4 KB again and again; a round ends when all of it has arrived.
template <u32 kLoads>
__global__ void __launch_bounds__(kReaders + 32, 1)
    read_kernel(Reads reads, Background background, Start* start) {
  constexpr u32 kBytes = kLoads * kReaders * 16;
  static_assert(kReadSlot * kSlotBytes + kBytes <= kRingBytes);
  const Block block = open_block(start);
  if (threadIdx.x == kStreamThread) stream_beside(background, block, true);
  if (threadIdx.x >= kReaders) return;
  const unsigned char* region = reads.data + blockIdx.x * reads.block_bytes;
  const u64 policy = keep_policy();
  const u32 copy = sm90::shared_address(block.ring) + kReadSlot * kSlotBytes;
  const u32 barrier = block.barriers + 8 * kReadBarrier;
  wait_until_ns(block.start_ns + background.warm_ns);
  const u64 end_ns = block.start_ns + background.warm_ns + background.window_ns;
  u64 first_cycle = 0, first_ns = 0;
  u32 made = 0;
  u32 value = 0;
  __shared__ u32 over;
  if (threadIdx.x == 0) over = 0;
  for (;; ++made) {
    meet_readers(value);
    if (made == reads.size || over != 0) break;
    const u64 before = now_cycles();
    if (made == 0) {
      first_cycle = before;
      first_ns = now_ns();
    }
    if (reads.bulk) {
      if (threadIdx.x == 0) {
        bulk_copy(copy, region, kBytes, barrier, policy);
        barrier_wait(barrier, made & 1);
      }
    } else {
      uint4 loaded[kLoads];
#pragma unroll
      for (u32 i = 0; i < kLoads; ++i) {
        loaded[i] = load_l2(reinterpret_cast<const uint4*>(region) + i * kReaders + threadIdx.x);
      }
#pragma unroll
      for (u32 i = 0; i < kLoads; ++i) value ^= loaded[i].x ^ loaded[i].y ^ loaded[i].z ^ loaded[i].w;
    }
    meet_readers(value);
    if (threadIdx.x == 0) {
      reads.cycles[blockIdx.x * reads.size + made] = static_cast<u32>(now_cycles() - before);
      if (now_ns() >= end_ns) over = 1;
    }
  }
  if (threadIdx.x == 0) {
    reads.summary[3 * blockIdx.x] = made;
    reads.summary[3 * blockIdx.x + 1] = now_cycles() - first_cycle;
    reads.summary[3 * blockIdx.x + 2] = now_ns() - first_ns;
  }
}

constexpr u32 kReadRounds = 256;

struct ReadCase {
  u32 sms;
  bool bulk, same;
  Streams who;
};

//! Adds results of one size; returns the median time of a read [ns].
template <u32 kLoads>
double measure_read_size(Lab& lab, const ReadCase& each) {
  constexpr u32 kBytes = kLoads * kReaders * 16, kSkip = 8;
  DeviceArray<u32> cycles(lab.num_sms * kReadRounds);
  DeviceArray<u64> summary(3 * lab.num_sms);
  DeviceArray<SmCount> out(lab.num_sms);
  Samples ns, rate, beside;
  for (u32 repeat = 0; repeat < 3; ++repeat) {
    const Reads reads{lab.data(),    each.same ? u64{0} : u64{kBytes}, each.bulk, kReadRounds, cycles.data(),
                      summary.data()};
    const Background background{lab.stream(3), each.who, kWarmNs, 1'200'000, out.data()};
    out.zero();
    lab.run(read_kernel<kLoads>, each.sms, kReaders + 32, reads, background, lab.start());
    const std::vector<u32> read = cycles.read();
    const std::vector<u64> total = summary.read();
    for (u32 block = 0; block < each.sms; ++block) {
      const double ns_per_cycle =
          static_cast<double>(total[3 * block + 2]) / static_cast<double>(total[3 * block + 1]);
      for (u64 i = kSkip; i < total[3 * block]; ++i) {
        ns.push_back(read[block * kReadRounds + i] * ns_per_cycle);
        rate.push_back(kBytes / ns.back());
      }
    }
    beside.push_back(background_rate(out));
  }
  const Conditions conditions = Conditions()
                                    .with("bytes", kBytes)
                                    .with("sms", each.sms)
                                    .with("by", each.bulk ? "bulk copy" : "loads of 256 threads")
                                    .with("region", each.same ? "shared by all" : "one an SM")
                                    .with("streams", name_of(each.who));
  lab.report.add("l2_read", "time", "ns", ns, conditions);
  lab.report.add("l2_read", "rate_of_an_sm", "GB/s", rate, conditions);
  lab.report.add("l2_read", "streams_beside", "GB/s", beside, conditions);
  std::printf(" %7.0f", median(ns));
  return median(ns);
}

inline void measure_reads(Lab& lab) {
  std::printf("reads from L2, ns for 4, 8, 16, 32, 64 KB; GB/s an SM at 64 KB, and between 4 and 64 KB\n");
  const u32 all = lab.num_sms;
  for (bool bulk : {false, true}) {
    for (const ReadCase& each :
         {ReadCase{1, bulk, true, Streams::none}, ReadCase{all, bulk, true, Streams::none},
          ReadCase{all, bulk, false, Streams::none}, ReadCase{all, bulk, true, Streams::all}}) {
      std::printf("  %-6s %3u SMs, %-9s %-15s", bulk ? "bulk," : "loads,", each.sms,
                  each.same ? "same," : "own,", name_of(each.who));
      const double small_ns = measure_read_size<1>(lab, each);
      measure_read_size<2>(lab, each);
      measure_read_size<4>(lab, each);
      measure_read_size<8>(lab, each);
      const double large_ns = measure_read_size<16>(lab, each);
      const double slope = 15.0 * kReaders * 16 / (large_ns - small_ns);
      lab.report.add("l2_read", "slope_4_to_64_KB", "GB/s", {slope},
                     Conditions()
                         .with("sms", each.sms)
                         .with("by", bulk ? "bulk copy" : "loads of 256 threads")
                         .with("region", each.same ? "shared by all" : "one an SM")
                         .with("streams", name_of(each.who)));
      std::printf("; %.1f %.1f\n", 65536 / large_ns, slope);
    }
  }
}
