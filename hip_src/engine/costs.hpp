// What each task costs on a machine, before anybody shares anything; flashmoe/sim/costs.py does the same.
#pragma once
#include <algorithm>
#include <cmath>

#include "flashmoe/work.hpp"
#include "jitter.hpp"
#include "parameters.hpp"
#include "sharing.hpp"

namespace flashmoe::engine {

//! What a task is, as far as its costs go.
struct Amounts {
  TaskKind kind;
  u32 num_tokens, num_rows;  // of the matrix product; 0 rows: none
  u64 weight_bytes, io_bytes, flops;
  u64 remote_bytes;  // stored to other PEs
};

//! Costs of one task; those of its class are those with factor 1.
struct Cost {
  double stream_bytes;
  i64 compute_ps, overhead_ps;
};

//! Costs of all tasks of a class, before jitter.
struct ClassCost {
  double weight_bytes, work_ps, kind_overhead_ps;
  double luck_left;  // share of the jitter that is left in a task of so many bytes
  i64 send_ps;
};

//! Kinds that multiply with experts' weights; what follows the arithmetic may be done by warps of its own.
inline bool is_finished_kind(u32 kind) {
  return kind == static_cast<u32>(TaskKind::up) || kind == static_cast<u32>(TaskKind::down) ||
         kind == static_cast<u32>(TaskKind::expert);
}

inline double padded_flops(const Amounts& a, const Parameters& p) {
  const bool is_matrix = a.num_rows > 0 && a.num_tokens > 0;
  if (!is_matrix) return static_cast<double>(a.flops);
  const u64 tokens = (u64{a.num_tokens} + p.matrix_tokens - 1) / p.matrix_tokens * p.matrix_tokens;
  const u64 rows = (u64{a.num_rows} + p.matrix_rows - 1) / p.matrix_rows * p.matrix_rows;
  return static_cast<double>(a.flops / (u64{a.num_tokens} * a.num_rows) * (tokens * rows));
}

inline double evened_out(double weight_bytes, const Parameters& p) {
  const auto even = static_cast<double>(p.jitter_bytes);
  return p.jitter_bytes == 0 ? 1.0 : std::sqrt(even / std::max(weight_bytes, even));
}

//! In proportion between the sizes that are given, and the time of the nearest beyond.
inline i64 between(const std::vector<std::array<i64, 2>>& times, i64 size) {
  if (size <= times.front()[0]) return times.front()[1];
  if (size >= times.back()[0]) return times.back()[1];
  std::size_t i = 0;
  while (times[i + 1][0] <= size) ++i;
  const auto [low, low_ps] = times[i];
  const auto [high, high_ps] = times[i + 1];
  return ((high - size) * low_ps + (size - low) * high_ps) / (high - low);
}

inline i64 overhead_ps(const Amounts& a, const Parameters& p) {
  const u32 kind = static_cast<u32>(a.kind);
  const i64 rows = a.num_rows, tokens = a.num_tokens;
  return between(p.overheads[kind], is_finished_kind(kind) ? rows : tokens * std::max<i64>(rows, 1));
}

//! sends_words: the PE's results are their own signal, so that half of each word of a hidden row is.
inline ClassCost class_cost(const Amounts& a, bool sends_words, const Parameters& p) {
  const double flop_ns = padded_flops(a, p) / p.cu_flops_per_ns;
  const bool is_finished = is_finished_kind(static_cast<u32>(a.kind));
  // a value of a row, 2 bytes, takes two operations with each of the weights' rows
  const u64 word_bytes = sends_words && a.kind == TaskKind::down ? a.flops / std::max<u64>(a.num_rows, 1) : 0;
  const double idle = p.cache_idle_bytes_per_ns > 0 ? p.cache_idle_bytes_per_ns : p.cache_bytes_per_ns;
  const double io_ns =
      static_cast<double>(a.io_bytes + word_bytes) / (is_finished ? p.cache_bytes_per_ns : idle);
  const auto bytes = static_cast<double>(a.weight_bytes);
  const double feed_ns = p.feed_bytes_per_ns > 0 ? bytes / p.feed_bytes_per_ns : 0.0;
  const double products_ns = std::max(feed_ns, flop_ns);
  const double work_ns = is_finished ? io_ns + products_ns : std::max(io_ns, products_ns);
  return ClassCost{bytes, work_ns * 1000.0, static_cast<double>(overhead_ps(a, p)), evened_out(bytes, p),
                   ceil_ps(static_cast<double>(a.remote_bytes) / p.store_bytes_per_ns * 1000.0)};
}

//! How much longer than usual a task takes. quantile: drawn from the table, mean 1.
inline double jitter_factor(const ClassCost& c, double quantile) {
  return 1.0 + (quantile - 1.0) * c.luck_left;
}

//! factor: of the jitter; stall_ps: extra time.
inline Cost task_cost(const ClassCost& c, double speed, double factor, i64 stall_ps) {
  const double slow = 1.0 / speed * factor;
  return Cost{c.weight_bytes * factor, ceil_ps(c.work_ps * slow),
              ceil_ps(c.kind_overhead_ps * slow) + stall_ps};
}

//! Least time of a stream, alone at a CU's cap.
inline i64 least_stream_ps(double bytes, double speed, const Parameters& p) {
  return ceil_ps(bytes / p.cu_bytes_per_ns * 1000.0 / speed);
}

}  // namespace flashmoe::engine
