// Memory bandwidth shared by the workers that stream: capped processor sharing in virtual time.
// flashmoe/sim/bandwidth.py explains it and does the same operations in the same order.
#pragma once
#include <algorithm>
#include <cmath>
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

class Channel {
 public:
  //! rates[n]: of each of n streams [bytes/ps].
  explicit Channel(const double* rates) : rates_(rates) {}

  u32 num_streams() const { return static_cast<u32>(streams_.size()); }
  //! When the next stream ends, or never.
  i64 next_ps() const { return next_ps_; }

  void start(i64 now_ps, double num_bytes, u32 worker) {
    advance(now_ps);
    streams_.push_back(Stream{clock_ + num_bytes, sequence_++, worker});
    std::push_heap(streams_.begin(), streams_.end(), Later{});
    change_rate(now_ps);
  }

  //! At next_ps(): takes out the streams that have ended, in the order in which they do.
  void finish(i64 now_ps, std::vector<u32>& workers) {
    advance(now_ps);
    // rounding leaves the clock a hair before the end that next_ps was computed for
    clock_ = std::max(clock_, streams_.front().end);
    while (!streams_.empty() && streams_.front().end <= clock_) {
      workers.push_back(streams_.front().worker);
      std::pop_heap(streams_.begin(), streams_.end(), Later{});
      streams_.pop_back();
    }
    change_rate(now_ps);
  }

 private:
  struct Stream {
    double end;  // what the clock shows then [bytes]
    u32 sequence;
    u32 worker;
  };
  struct Later {
    bool operator()(const Stream& a, const Stream& b) const {
      // sequence numbers wrap; streams in flight are far fewer than 2^31
      return a.end > b.end || (a.end == b.end && static_cast<std::int32_t>(a.sequence - b.sequence) > 0);
    }
  };

  void advance(i64 now_ps) {
    if (streams_.empty()) {
      clock_ = 0.0;
    } else {
      clock_ += rate_ * static_cast<double>(now_ps - last_ps_);
    }
    last_ps_ = now_ps;
  }

  void change_rate(i64 now_ps) {
    if (streams_.empty()) {
      next_ps_ = never;
      return;
    }
    rate_ = rates_[streams_.size()];
    next_ps_ = now_ps + std::max(i64{0}, ceil_ps((streams_.front().end - clock_) / rate_));
  }

  const double* rates_;
  std::vector<Stream> streams_;
  double clock_ = 0.0;  // [bytes]
  double rate_ = 0.0;   // of the clock [bytes/ps]
  i64 last_ps_ = 0, next_ps_ = never;
  u32 sequence_ = 0;
};

}  // namespace flashmoe::engine
