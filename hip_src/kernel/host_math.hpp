// arch/host: the numbers of a task, in plain loops. bf16 or f32 in memory, f32 in between, and always the
// same order of additions, so that a result's bits depend on its inputs alone.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "dispatch.hpp"
#include "flashmoe/bf16.hpp"
#include "flashmoe/policy.hpp"
#include "signals.hpp"

namespace flashmoe::host {

using flashmoe::bf16;
using flashmoe::to_float;

template <class Element>
Element from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bf16 from_float<bf16>(float value) {
  return to_bf16(value);
}

//! Dot product of length n: 16 running sums, added up as a tree.
template <class Element>
float dot(const Element* a, const Element* b, u32 n) {
  constexpr u32 lanes = 16;
  float sum[lanes] = {};
  u32 i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (u32 lane = 0; lane < lanes; ++lane) sum[lane] += to_float(a[i + lane]) * to_float(b[i + lane]);
  }
  for (u32 lane = 0; i + lane < n; ++lane) sum[lane] += to_float(a[i + lane]) * to_float(b[i + lane]);
  for (u32 width = lanes / 2; width > 0; width /= 2) {
    for (u32 lane = 0; lane < width; ++lane) sum[lane] += sum[lane + width];
  }
  return sum[0];
}

inline float silu(float value) { return value / (1.0f + std::exp(-value)); }

//! Top-k of one token. Ties go to the lower expert; a NaN logit ranks last but makes the weights NaN.
inline void route_token(const float* logits, u32 num_experts, u32 top_k, bool renormalise,
                        std::int32_t* topk_idx, float* topk_weights) {
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  auto rank_of = [&](u32 expert) { return std::isnan(logits[expert]) ? lowest : logits[expert]; };
  float previous = std::numeric_limits<float>::infinity();
  u32 previous_expert = 0;
  for (u32 k = 0; k < top_k; ++k) {
    u32 best = num_experts;
    for (u32 expert = 0; expert < num_experts; ++expert) {
      const float rank = rank_of(expert);
      const bool taken = k > 0 && (rank > previous || (rank == previous && expert <= previous_expert));
      if (!taken && (best == num_experts || rank > rank_of(best))) best = expert;
    }
    topk_idx[k] = static_cast<std::int32_t>(best);
    previous = rank_of(best);
    previous_expert = best;
  }
  const float highest = logits[topk_idx[0]];
  float total = 0;
  for (u32 expert = 0; expert < num_experts; ++expert) total += std::exp(logits[expert] - highest);
  float kept = 0;
  for (u32 k = 0; k < top_k; ++k) {
    topk_weights[k] = std::exp(logits[topk_idx[k]] - highest) / total;
    kept += topk_weights[k];
  }
  for (u32 k = 0; renormalise && k < top_k; ++k) topk_weights[k] /= kept;
}

//! The math of one worker thread.
template <class Element>
class Math {
 public:
  explicit Math(const PeView& view)
      : launch_(view.launch), shape_(view.launch.shape), tiling_(view.launch.tiling) {
    if (tiling_.down != Down::rows) return;
    const std::size_t tokens = std::size_t{shape_.num_pes} * launch_.limits.max_tokens;
    sums_.resize(tokens * tiling_.down_rows);
    touched_.resize(tokens);
  }

  void gate(const Task& task, const PeView& view) const {
    auto* logits = view.at<float>(launch_.workspace.logits);
    const u32 first = task.tile * tiling_.gate_experts;
    const u32 rest = shape_.num_experts - first;
    const u32 end = first + (rest < tiling_.gate_experts ? rest : tiling_.gate_experts);
    for (u32 token = task.first; token < task.first + task.num_tokens; ++token) {
      const Element* row = static_cast<const Element*>(view.own.x) + std::size_t{token} * shape_.d_model;
      for (u32 expert = first; expert < end; ++expert) {
        const float logit = dot(matrix_row(launch_.gate, expert, shape_.d_model), row, shape_.d_model);
        // rounded to the layer's dtype, as a linear layer of a bf16 model does: it decides near-ties
        logits[std::size_t{token} * shape_.num_experts + expert] = to_float(from_float<Element>(logit));
      }
    }
  }

  void route(const Task& task, const PeView& view) const {
    for (std::size_t token = task.first; token < task.first + task.num_tokens; ++token) {
      route_token(view.at<float>(launch_.workspace.logits) + token * shape_.num_experts, shape_.num_experts,
                  shape_.top_k, shape_.norm_topk_prob != 0,
                  view.at<std::int32_t>(launch_.workspace.topk_idx) + token * shape_.top_k,
                  view.at<float>(launch_.workspace.topk_weights) + token * shape_.top_k);
    }
  }

  u32 dispatch(const Task& task, const PeView& view) const { return dispatch_rows(task, view, 0, 1, copy); }

  void up(const Task& task, u32 tile, const PeView& view) const {
    const u32 first = tile * tiling_.up_rows;
    const u32 end = first + view.graph.up_width(tile);
    const u32 gate_row = task.expert * 2 * shape_.d_ff;
    for (u32 n = task.first; n < task.first + task.num_tokens; ++n) {
      const auto* row = static_cast<const Element*>(view.row(view.graph.plan.entries[n]));
      auto* hidden = static_cast<Element*>(view.hidden(n));
      for (u32 i = first; i < end; ++i) {
        const float gate =
            dot(matrix_row(launch_.gate_up, gate_row + i, shape_.d_model), row, shape_.d_model);
        const float up =
            dot(matrix_row(launch_.gate_up, gate_row + shape_.d_ff + i, shape_.d_model), row, shape_.d_model);
        hidden[i] = from_float<Element>(silu(gate) * up);
      }
    }
  }

  //! Unweighted results, straight into the slots of the tokens' owners.
  void down(const Task& task, u32 tile, const PeView& view) const {
    const u32 first = tile * tiling_.down_rows;
    const u32 end = first + view.graph.down_width(tile);
    for (u32 n = task.first; n < task.first + task.num_tokens; ++n) {
      const Entry& entry = view.graph.plan.entries[n];
      const auto* hidden = static_cast<const Element*>(view.hidden(n));
      auto* result = reinterpret_cast<Element*>(view.heap(entry.src).result_row(entry.token, entry.k));
      for (u32 i = first; i < end; ++i) {
        result[i] = from_float<Element>(dot(down_row(task.expert, i), hidden, shape_.d_ff));
      }
    }
  }

  //! down="rows": adds this expert to the running sums of the tile's rows; the chain's last task sends them.
  void down_rows(const Task& task, const PeView& view) {
    const TaskGraph& graph = view.graph;
    const u32 first = task.tile * tiling_.down_rows;
    const u32 width = graph.down_width(task.tile);
    const u32 group = graph.group_of(task);
    const u32 place = (task.id - graph.first_down()) % graph.plan.num_active();
    if (place == graph.group_begin(group)) std::fill(touched_.begin(), touched_.end(), u16{0});
    for (u32 n = task.first; n < task.first + task.num_tokens; ++n) {
      const Entry& entry = graph.plan.entries[n];
      const auto* hidden = static_cast<const Element*>(view.hidden(n));
      const float weight = view.weight(entry);
      const std::size_t slot = std::size_t{entry.src} * launch_.limits.max_tokens + entry.token;
      float* sums = sums_.data() + slot * tiling_.down_rows;
      if (!touched_[slot]) std::fill(sums, sums + width, 0.0f);
      touched_[slot] = 1;
      for (u32 i = 0; i < width; ++i)
        sums[i] += weight * dot(down_row(task.expert, first + i), hidden, shape_.d_ff);
    }
    if (!graph.ends_chain(task)) return;
    const bool straight_out = !tiling_.has_combine(shape_);
    const u32 result_slot = graph.pe * tiling_.groups(shape_) + group;
    for (u32 src = 0; src < shape_.num_pes; ++src) {
      for (u32 token = 0; token < view.num_tokens(src); ++token) {
        const std::size_t slot = std::size_t{src} * launch_.limits.max_tokens + token;
        if (!touched_[slot]) continue;
        auto* row = static_cast<Element*>(straight_out ? view.out(token)
                                                       : view.heap(src).result_row(token, result_slot));
        for (u32 i = 0; i < width; ++i) {
          row[first + i] = from_float<Element>(sums_[slot * tiling_.down_rows + i]);
        }
      }
    }
  }

  //! Adds up a token's results in the order of their slots: top-k order, or PE by PE.
  void combine(const Task& task, const PeView& view) const {
    const TaskGraph& graph = view.graph;
    const Heap heap = view.heap(graph.pe);
    std::vector<float> sum(shape_.d_model);
    std::vector<u16> present(tiling_.result_slots(shape_));
    for (u32 token = task.first; token < task.first + task.num_tokens; ++token) {
      const std::int32_t* experts = graph.topk_idx + std::size_t{token} * shape_.top_k;
      std::fill(sum.begin(), sum.end(), 0.0f);
      std::fill(present.begin(), present.end(), u16{0});
      for (u32 k = 0; k < shape_.top_k; ++k) {
        if (experts[k] < 0) continue;
        present[graph.by_rows() ? graph.result_word(token, k, static_cast<u32>(experts[k])) : k] = 1;
      }
      for (u32 slot = 0; slot < present.size(); ++slot) {
        if (!present[slot]) continue;
        // by rows the weights are in the sums already
        const float weight =
            graph.by_rows() ? 1.0f : view.topk_weights()[std::size_t{token} * shape_.top_k + slot];
        const auto* row = reinterpret_cast<const Element*>(heap.result_row(token, slot));
        for (u32 i = 0; i < shape_.d_model; ++i) sum[i] += weight * to_float(row[i]);
      }
      auto* out = static_cast<Element*>(view.out(token));
      for (u32 i = 0; i < shape_.d_model; ++i) out[i] = from_float<Element>(sum[i]);
    }
  }

  static void copy(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
  static void zero(void* to, std::size_t bytes) { std::memset(to, 0, bytes); }

  u32 landed_rows(u32 src, const PeView& view) const {
    u32 rows = 0;
    for (u32 token = 0; token < view.num_tokens(src); ++token) rows += view.has_landed(src, token) ? 1 : 0;
    return rows;
  }

  void publish_planned(u32 place, const PeView& view) const { flashmoe::publish_planned(view, place, 0, 1); }

  void plan(const PeView& view) const {
    build_plan(
        view.graph.plan, shape_, tiling_, view.pe, [&](u32 src) { return view.num_tokens(src); },
        [&](u32 src, u32 token) { return view.topk_of(src, token); });
    build_sequence(view.graph.plan, shape_, launch_.policy.order, view.pe, view.key_scratch);
  }

 private:
  static const Element* matrix_row(const void* matrix, std::size_t row, u32 columns) {
    return static_cast<const Element*>(matrix) + row * columns;
  }
  const Element* down_row(u32 expert, u32 row) const {
    return matrix_row(launch_.down, std::size_t{expert} * shape_.d_model + row, shape_.d_ff);
  }

  const Launch& launch_;
  const Shape& shape_;
  const Tiling& tiling_;
  std::vector<float> sums_;   // [num_pes][max_tokens][down_rows]
  std::vector<u16> touched_;  // [num_pes][max_tokens] tokens with an expert in the group
};

}  // namespace flashmoe::host
