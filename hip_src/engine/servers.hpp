// What serves one at a time: ticket counters, cores of a host, links; flashmoe/sim/servers.py explains them.
#pragma once
#include <algorithm>
#include <deque>
#include <vector>

#include "items.hpp"
#include "parameters.hpp"
#include "sharing.hpp"

namespace flashmoe::engine {

struct TicketCost {
  i64 service_ps, latency_ps;
};

//! A word that workers fetch-and-add.
struct Counter {
  u32 value = 0;
  i64 free_ps = 0;

  //! When the answer is known; `ticket` is what the word was before.
  i64 add(i64 now_ps, TicketCost cost, u32 amount, u32& ticket) {
    ticket = value;
    value += amount;
    free_ps = std::max(now_ps, free_ps) + cost.service_ps;
    return free_ps + cost.latency_ps;
  }
};

//! Cores of a host, shared by more workers than there are. On a device every worker has its own CU.
class Cores {
 public:
  Cores(Clock& clock, const Parameters& p)
      : clock_(clock), are_shared_(p.num_cores > 0), free_(p.num_cores), slice_ps_(p.slice_ps) {}

  bool are_shared() const { return are_shared_; }

  //! The worker resumes when it has a core.
  void acquire(u32 worker) {
    waiting_.push_back(worker);
    if (free_ > 0) {
      --free_;
      pass_on();
    }
  }

  //! Gives a core to whoever has waited longest.
  void release() {
    if (!are_shared_) return;
    if (waiting_.empty()) {
      ++free_;
    } else {
      pass_on();
    }
  }

  //! Whether a worker that got its core at that time should let another one have it.
  bool is_over(i64 since_ps) const {
    return are_shared_ && !waiting_.empty() && clock_.now() - since_ps >= slice_ps_;
  }

 private:
  void pass_on() {
    clock_.at_once(item(What::resume, waiting_.front()));
    waiting_.pop_front();
  }

  Clock& clock_;
  bool are_shared_;
  u32 free_;
  i64 slice_ps_;
  std::deque<u32> waiting_;
};

//! A signal to another PE's event.
struct Message {
  u32 layer, event, destination;
};

//! The fabric between PEs.
class Links {
 public:
  Links(Clock& clock, const Parameters& p)
      : clock_(clock),
        num_pes_(p.num_pes),
        put_ps_(p.put_ps),
        message_ps_(p.link_message_ps),
        link_bytes_per_ps_(p.link_bytes_per_ns / 1000.0),
        port_bytes_per_ps_(p.port_bytes_per_ns / 1000.0),
        egress_free_ps_(p.num_pes),
        ingress_free_ps_(p.num_pes),
        link_free_ps_(u64{p.num_pes} * p.num_pes) {}

  //! Sends a message now. Returns when its signal is seen, or never: its way through the destination's port
  //! is known only when it gets there.
  i64 send(u32 source, const Message& message, u64 num_bytes) {
    const i64 on_link_ps = busy_ps(num_bytes, link_bytes_per_ps_);
    i64& link_free_ps = link_free_ps_[source * num_pes_ + message.destination];
    if (port_bytes_per_ps_ == 0.0) {
      link_free_ps = std::max(clock_.now(), link_free_ps) + on_link_ps;
      return link_free_ps + put_ps_;
    }
    const i64 at_port_ps = busy_ps(num_bytes, port_bytes_per_ps_);
    i64 head_ps = std::max(clock_.now(), egress_free_ps_[source]);
    egress_free_ps_[source] = head_ps + at_port_ps;
    // a link serves the messages of one port only, so their order is known here
    head_ps = std::max(head_ps, link_free_ps);
    link_free_ps = head_ps + on_link_ps;
    const i64 tail_ps = head_ps + std::max(on_link_ps, at_port_ps);
    clock_.at(head_ps, item(What::ingress, keep(InFlight{message, head_ps, tail_ps, at_port_ps})));
    return never;
  }

  //! A message is at its destination's port. Returns it, and when its signal is seen.
  std::pair<Message, i64> enter(u32 number) {
    const InFlight& m = in_flight_[number];
    free_.push_back(number);
    i64& free_ps = ingress_free_ps_[m.message.destination];
    free_ps = std::max(m.head_ps, free_ps) + m.at_port_ps;
    return {m.message, std::max(free_ps, m.tail_ps) + put_ps_};
  }

 private:
  struct InFlight {
    Message message;
    i64 head_ps, tail_ps, at_port_ps;
  };

  i64 busy_ps(u64 num_bytes, double bytes_per_ps) const {
    return message_ps_ + ceil_ps(static_cast<double>(num_bytes) / bytes_per_ps);
  }

  u32 keep(const InFlight& message) {
    if (free_.empty()) {
      in_flight_.push_back(message);
      return static_cast<u32>(in_flight_.size() - 1);
    }
    const u32 number = free_.back();
    free_.pop_back();
    in_flight_[number] = message;
    return number;
  }

  Clock& clock_;
  u32 num_pes_;
  i64 put_ps_, message_ps_;
  double link_bytes_per_ps_, port_bytes_per_ps_;
  std::vector<i64> egress_free_ps_, ingress_free_ps_, link_free_ps_;
  std::vector<InFlight> in_flight_;
  std::vector<u32> free_;
};

}  // namespace flashmoe::engine
