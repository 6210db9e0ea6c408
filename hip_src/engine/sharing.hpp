// Memory bandwidth shared by the workers that stream: capped processor sharing in virtual time.
// flashmoe/sim/bandwidth.py explains it and does the same operations in the same order.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "clock.hpp"

namespace flashmoe::engine {

constexpr double rounding_ps = 1e-3;  // float64 noise: 25.0000000004 ps is 25 ps, not 26

//! The first whole picosecond that is not before `ps`; std::ceil is a call where SSE 4.1 is not assumed.
inline i64 ceil_ps(double ps) {
  const double shifted = ps - rounding_ps;
  const i64 whole = static_cast<i64>(shifted);
  return whole + (static_cast<double>(whole) < shifted ? 1 : 0);
}

__extension__ using u128 = unsigned __int128;

//! A heap of streams: four children a node, and no branch that depends on which of them is least.
class StreamHeap {
 public:
  explicit StreamHeap(u32 max_streams) : keys_(std::size_t{max_streams} + 5, nothing) {}

  u32 size() const { return size_; }
  //! What the clock shows when the first stream ends [bytes].
  double first_end() const {
    const u64 bits = static_cast<u64>(keys_[0] >> 64);
    double end;
    std::memcpy(&end, &bits, sizeof end);
    return end;
  }
  u32 first_worker() const { return static_cast<u32>(keys_[0]) & worker_mask; }

  void push(double end, u64 sequence, u32 worker) {
    u64 bits;  // of doubles from 0 up, in the order of the numbers
    std::memcpy(&bits, &end, sizeof bits);
    raise(size_++, u128{bits} << 64 | sequence << worker_bits | worker);
  }

  void pop() {
    const u128 last = keys_[--size_];
    keys_[size_] = nothing;
    if (size_ == 0) return;
    u32 hole = 0;
    for (u32 child = 1; child < size_; child = 4 * hole + 1) {
      const u32 left = child + (keys_[child + 1] < keys_[child] ? 1 : 0);
      const u32 right = child + (keys_[child + 3] < keys_[child + 2] ? 3 : 2);
      const u32 least = keys_[right] < keys_[left] ? right : left;
      keys_[hole] = keys_[least];
      hole = least;
    }
    raise(hole, last);
  }

 private:
  static constexpr u32 worker_bits = 24, worker_mask = (1u << worker_bits) - 1;
  static constexpr u128 nothing = ~u128{0};

  void raise(u32 hole, u128 key) {
    while (hole > 0) {
      const u32 parent = (hole - 1) / 4;
      if (keys_[parent] <= key) break;
      keys_[hole] = keys_[parent];
      hole = parent;
    }
    keys_[hole] = key;
  }

  std::vector<u128> keys_;  // end, then the order of starts, then the worker; `nothing` from size_ on
  u32 size_ = 0;
};

class Channel {
 public:
  //! rates[n]: of each of n streams [bytes/ps], n up to max_streams.
  Channel(const double* rates, u32 max_streams) : rates_(rates), streams_(max_streams) {}

  u32 num_streams() const { return streams_.size(); }
  //! Whose stream ends next, if there is one.
  u32 first_worker() const { return streams_.first_worker(); }
  //! When the next stream ends, or never.
  i64 next_ps() const { return next_ps_; }

  void start(i64 now_ps, double num_bytes, u32 worker) {
    advance(now_ps);
    streams_.push(clock_ + num_bytes, sequence_++, worker);
    change_rate(now_ps);
  }

  //! At next_ps(): takes out the streams that have ended, in the order in which they do.
  void finish(i64 now_ps, std::vector<u32>& workers) {
    advance(now_ps);
    // rounding leaves the clock a hair before the end that next_ps was computed for
    clock_ = std::max(clock_, streams_.first_end());
    while (streams_.size() > 0 && streams_.first_end() <= clock_) {
      workers.push_back(streams_.first_worker());
      streams_.pop();
    }
    change_rate(now_ps);
  }

 private:
  void advance(i64 now_ps) {
    if (streams_.size() == 0) {
      clock_ = 0.0;
    } else {
      clock_ += rate_ * static_cast<double>(now_ps - last_ps_);
    }
    last_ps_ = now_ps;
  }

  void change_rate(i64 now_ps) {
    if (streams_.size() == 0) {
      next_ps_ = never;
      return;
    }
    rate_ = rates_[streams_.size()];
    next_ps_ = now_ps + std::max(i64{0}, ceil_ps((streams_.first_end() - clock_) / rate_));
  }

  const double* rates_;
  StreamHeap streams_;
  double clock_ = 0.0;  // [bytes]
  double rate_ = 0.0;   // of the clock [bytes/ps]
  i64 last_ps_ = 0, next_ps_ = never;
  u64 sequence_ = 0;
};

}  // namespace flashmoe::engine
