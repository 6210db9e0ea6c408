#pragma once
// The GPU as the benchmarks use it: a buffer far larger than L2, and launches of one block an SM.
#include "device.cuh"
#include "report.cuh"

//! Random bits: zeros can be read faster and use less power.
__global__ void fill(uint4* data, u64 size) {
  for (u64 i = blockIdx.x * u64{blockDim.x} + threadIdx.x; i < size; i += u64{gridDim.x} * blockDim.x) {
    u64 low = (i + 1) * 0x9e3779b97f4a7c15u;
    low = (low ^ (low >> 29)) * 0xbf58476d1ce4e5b9u;
    const u64 high = (low ^ (low >> 32)) * 0x94d049bb133111ebu;
    data[i] = make_uint4(static_cast<u32>(low), static_cast<u32>(low >> 32), static_cast<u32>(high),
                         static_cast<u32>(high >> 32));
  }
}

class Lab {
 public:
  static constexpr u64 kDataBytes = u64{16} << 30;
  static constexpr u64 kNumChunks = kDataBytes / kSlotBytes;

  Lab(Report& report, u32 num_sms)
      : report(report), num_sms(num_sms), data_(kDataBytes), start_(1), ticket_(1) {
    fill<<<8 * num_sms, 512>>>(reinterpret_cast<uint4*>(data_.data()), kDataBytes / sizeof(uint4));
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
  }

  const unsigned char* data() const { return data_.data(); }
  Start* start() const { return start_.data(); }

  //! A stream that goes on where no launch has read for a while.
  Stream stream(u32 slots, bool ticket = false, u64 work_chunks = ~u64{0}) {
    first_chunk_ = (first_chunk_ + 250'000) % kNumChunks;
    return {
        data_.data(), kNumChunks, first_chunk_, work_chunks, ticket ? ticket_.data() : nullptr, slots, 1, 0};
  }

  //! The same, but two SMs read each chunk, one of them `lag_chunks` after the other.
  Stream stream_twice(u32 slots, u64 lag_chunks) {
    Stream twice = stream(slots);
    twice.readers = 2;
    twice.lag_chunks = lag_chunks;
    return twice;
  }

  //! Runs a kernel of one block an SM to its end.
  template <class... Parameters, class... Arguments>
  void run(void (*kernel)(Parameters...), u32 blocks, u32 threads, Arguments... arguments) {
    if (blocks > num_sms) throw std::runtime_error("more blocks than SMs would wait for each other for ever");
    start_.zero();
    ticket_.zero();
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    kernel<<<blocks, threads, kSharedBytes>>>(arguments...);
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
  }

  Report& report;
  const u32 num_sms;

 private:
  DeviceArray<unsigned char> data_;
  DeviceArray<Start> start_;
  DeviceArray<u32> ticket_;
  u64 first_chunk_ = 0;
};
