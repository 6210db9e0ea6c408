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
  //! rates[n]: of each of n streams [bytes/ps], n up to max_streams.
  Channel(const double* rates, u32 max_streams) : rates_(rates), streams_(2 * std::size_t{max_streams} + 1) {}

  u32 num_streams() const { return end_ - first_; }
  //! Whose stream ends next, if there is one.
  u32 first_worker() const { return streams_[first_].worker; }
  //! When the next stream ends, or never.
  i64 next_ps() const { return next_ps_; }

  void start(i64 now_ps, double num_bytes, u32 worker) {
    advance(now_ps);
    // Streams of about one size end about in the order in which they start, so few have to move on; a heap takes
    // log n steps, mostly mispredicted, for each that ends.
    if (end_ == streams_.size()) move_to_front();
    const double end = clock_ + num_bytes;
    Stream* const first = streams_.data() + first_;
    Stream* place = streams_.data() + end_++;
    for (; place != first && place[-1].end > end; --place) *place = place[-1];
    *place = Stream{end, worker};
    change_rate(now_ps);
  }

  //! At next_ps(): takes out the streams that have ended, in the order in which they do.
  void finish(i64 now_ps, std::vector<u32>& workers) {
    advance(now_ps);
    // rounding leaves the clock a hair before the end that next_ps was computed for
    clock_ = std::max(clock_, streams_[first_].end);
    while (first_ != end_ && streams_[first_].end <= clock_) workers.push_back(streams_[first_++].worker);
    change_rate(now_ps);
  }

 private:
  struct Stream {
    double end;  // what the clock shows then [bytes]
    u32 worker;
  };

  void move_to_front() {
    std::copy(streams_.begin() + first_, streams_.begin() + end_, streams_.begin());
    end_ -= first_;
    first_ = 0;
  }

  void advance(i64 now_ps) {
    if (first_ == end_) {
      clock_ = 0.0;
    } else {
      clock_ += rate_ * static_cast<double>(now_ps - last_ps_);
    }
    last_ps_ = now_ps;
  }

  void change_rate(i64 now_ps) {
    if (first_ == end_) {
      next_ps_ = never;
      return;
    }
    rate_ = rates_[end_ - first_];
    next_ps_ = now_ps + std::max(i64{0}, ceil_ps((streams_[first_].end - clock_) / rate_));
  }

  const double* rates_;
  std::vector<Stream> streams_;  // [first_, end_) by their ends; those that end together in the order of their starts
  u32 first_ = 0, end_ = 0;
  double clock_ = 0.0;  // [bytes]
  double rate_ = 0.0;   // of the clock [bytes/ps]
  i64 last_ps_ = 0, next_ps_ = never;
};

}  // namespace flashmoe::engine
