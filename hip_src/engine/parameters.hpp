// A machine as the engine sees it; flashmoe/sim/parameters.py works the tables out.
#pragma once
#include <array>
#include <vector>

#include "clock.hpp"

namespace flashmoe::engine {

struct Parameters {
  u32 num_pes, num_workers, num_domains, num_cores;
  u64 seed, stall_threshold;
  bool prefetch, jitters, finish_beside, ask_early, first_given, in_order;
  u32 word_tokens;
  u32 matrix_tokens, matrix_rows;
  u64 jitter_bytes, cache_bytes;
  double hbm_bytes_per_ns, cu_bytes_per_ns, cu_flops_per_ns, cache_bytes_per_ns, cache_idle_bytes_per_ns,
      feed_bytes_per_ns, store_bytes_per_ns, link_bytes_per_ns, port_bytes_per_ns;
  i64 ticket_ps, ticket_far_ps, ticket_service_ps, ticket_far_service_ps;
  i64 put_ps, link_message_ps, gap_ps, slice_ps, stall_ps, plan_ps, plan_token_ps, sort_ps, sort_expert_ps;
  // by TaskKind: sizes of tasks, ascending, and the time of each
  std::array<std::vector<std::array<i64, 2>>, 7> overheads;
  std::vector<double> speeds;                    // [num_pes]
  std::vector<i64> start_ps;                     // [num_workers]
  std::vector<double> rates;                     // [num_pes][num_streams + 1]
  std::vector<i64> far_ps, near_ps, release_ps;  // [num_streams + 1]
  std::vector<double> quantiles;                 // [4096]
  std::vector<double> stay_bytes;                // [4096]
};

}  // namespace flashmoe::engine
