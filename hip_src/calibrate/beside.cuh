#pragma once
// Streams of weights beside what a benchmark measures.
#include "streams.cuh"

enum class Streams : u32 { none, others, all };
inline const char* name_of(Streams streams) {
  return streams == Streams::none     ? "idle"
         : streams == Streams::others ? "other SMs stream"
                                      : "all SMs stream";
}

//! Streams that run beside the signals, and the time that the kernel takes.
struct Background {
  Stream stream;
  Streams who;
  u64 warm_ns, window_ns;
  SmCount* out;
};

//! The streaming half of a block, by one thread; busy: this block is measured.
__device__ __forceinline__ void stream_beside(const Background& background, const Block& block, bool busy) {
  Count count{0, 0, 0};
  if (background.who == Streams::all || (background.who == Streams::others && !busy)) {
    wait_until_ns(block.start_ns);
    const u64 begin_ns = block.start_ns + background.warm_ns;
    count = stream_until(background.stream, block, begin_ns, begin_ns + background.window_ns);
  }
  background.out[blockIdx.x] = {count, 0, 0, 0, sm_id(), 0};
}

//! GB/s of the streams that ran.
inline double background_rate(const DeviceArray<SmCount>& out) {
  double total = 0;
  for (const SmCount& each : out.read()) {
    if (each.count.chunks > 0) total += bytes_per_ns(each.count);
  }
  return total;
}
