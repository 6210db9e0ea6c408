// The memory channels of all PEs, and which of them is next to end a stream.
#pragma once
#include <vector>

#include "parameters.hpp"
#include "sharing.hpp"

namespace flashmoe::engine {

class Memory {
 public:
  explicit Memory(const Parameters& p) : is_shared_(p.num_cores > 0) {
    const u64 row = p.rates.size() / p.num_pes;
    const u32 num_channels = is_shared_ ? 1 : p.num_pes;
    for (u32 pe = 0; pe < num_channels; ++pe)
      channels_.emplace_back(p.rates.data() + pe * row, static_cast<u32>(row - 1));
    next_of_channel_.assign(num_channels, never);
    asked_bytes_.assign(num_channels, 0.0);
  }

  u32 num_streams(u32 pe) const { return channels_[channel_of(pe)].num_streams(); }
  //! When the next stream ends, or never.
  i64 next_ps() const { return next_ps_; }
  //! Whose stream that is, if there is one.
  u32 next_worker() const { return channels_[next_].first_worker(); }

  //! What the memory has been asked for so far.
  double asked_bytes(u32 pe) const { return asked_bytes_[channel_of(pe)]; }

  void start(i64 now_ps, u32 pe, double num_bytes, u32 worker) {
    const u32 index = channel_of(pe);
    asked_bytes_[index] += num_bytes;
    channels_[index].start(now_ps, num_bytes, worker);
    const i64 next_ps = next_of_channel_[index] = channels_[index].next_ps();
    if (next_ps < next_ps_ || (next_ps == next_ps_ && index < next_)) {
      next_ps_ = next_ps;
      next_ = index;
    } else if (index == next_) {
      find_next();
    }
  }

  //! At next_ps(): takes out the streams of the next channel that have ended.
  void finish(i64 now_ps, std::vector<u32>& workers) {
    channels_[next_].finish(now_ps, workers);
    next_of_channel_[next_] = channels_[next_].next_ps();
    find_next();
  }

 private:
  //! The cores of a host share one memory.
  u32 channel_of(u32 pe) const { return is_shared_ ? 0 : pe; }

  void find_next() {
    next_ps_ = never;
    for (u32 i = 0; i < next_of_channel_.size(); ++i) {
      if (next_of_channel_[i] < next_ps_) {
        next_ps_ = next_of_channel_[i];
        next_ = i;
      }
    }
  }

  bool is_shared_;
  std::vector<Channel> channels_;
  std::vector<i64> next_of_channel_;  // their next_ps(), side by side
  std::vector<double> asked_bytes_;
  i64 next_ps_ = never;
  u32 next_ = 0;  // channel
};

}  // namespace flashmoe::engine
