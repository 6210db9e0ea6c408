// The fabric between PEs and the ticket counters: servers that serve one at a time; flashmoe/sim/servers.py.
#pragma once
#include <vector>

#include "parameters.hpp"
#include "sharing.hpp"

namespace flashmoe::engine {

//! A word that workers fetch-and-add.
struct Counter {
  u32 value = 0;
  i64 free_ps = 0;

  //! When the answer is known; `ticket` is what the word was before.
  i64 add(i64 now_ps, i64 service_ps, i64 latency_ps, u32 amount, u32& ticket) {
    ticket = value;
    value += amount;
    free_ps = std::max(now_ps, free_ps) + service_ps;
    return free_ps + latency_ps;
  }
};

//! A message between two PEs, on its way to the destination's port.
struct Message {
  u32 layer, event, destination;
  i64 head_ps, tail_ps, at_port_ps;
};

class Links {
 public:
  explicit Links(const Parameters& p)
      : num_pes_(p.num_pes),
        put_ps_(p.put_ps),
        message_ps_(p.link_message_ps),
        link_bytes_per_ps_(p.link_bytes_per_ns / 1000.0),
        port_bytes_per_ps_(p.port_bytes_per_ns / 1000.0),
        egress_free_ps_(p.num_pes),
        ingress_free_ps_(p.num_pes),
        link_free_ps_(u64{p.num_pes} * p.num_pes) {}

  bool has_ports() const { return port_bytes_per_ps_ != 0.0; }

  //! Without ports: when the signal is seen.
  i64 send(i64 now_ps, u32 source, u32 destination, u64 num_bytes) {
    i64& free_ps = link_free_ps_[source * num_pes_ + destination];
    free_ps = std::max(now_ps, free_ps) + busy_ps(num_bytes, link_bytes_per_ps_);
    return free_ps + put_ps_;
  }

  //! With ports: the message reaches the destination's port at its head_ps.
  void leave(i64 now_ps, u32 source, u64 num_bytes, Message& message) {
    const i64 on_link_ps = busy_ps(num_bytes, link_bytes_per_ps_);
    message.at_port_ps = busy_ps(num_bytes, port_bytes_per_ps_);
    i64 head_ps = std::max(now_ps, egress_free_ps_[source]);
    egress_free_ps_[source] = head_ps + message.at_port_ps;
    i64& link_free_ps = link_free_ps_[source * num_pes_ + message.destination];
    head_ps = std::max(head_ps, link_free_ps);
    link_free_ps = head_ps + on_link_ps;
    message.head_ps = head_ps;
    message.tail_ps = head_ps + std::max(on_link_ps, message.at_port_ps);
  }

  //! At head_ps: when the signal is seen.
  i64 enter(const Message& message) {
    i64& free_ps = ingress_free_ps_[message.destination];
    free_ps = std::max(message.head_ps, free_ps) + message.at_port_ps;
    return std::max(free_ps, message.tail_ps) + put_ps_;
  }

 private:
  i64 busy_ps(u64 num_bytes, double bytes_per_ps) const {
    return message_ps_ + ceil_ps(static_cast<double>(num_bytes) / bytes_per_ps);
  }

  u32 num_pes_;
  i64 put_ps_, message_ps_;
  double link_bytes_per_ps_, port_bytes_per_ps_;
  std::vector<i64> egress_free_ps_, ingress_free_ps_, link_free_ps_;
};

}  // namespace flashmoe::engine
