// up and down: packed weights from memory to registers, times the tokens of a block, in passes of
// pass_columns tokens. All waves share every row tile: each multiplies its chunks of k, and the shares are
// added up in the order of the waves. So a sum depends on its row and its token alone, not on how many
// tokens, tiles or workers there are.
#pragma once
#include "flashmoe/bf16.hpp"
#include "group.hpp"

namespace flashmoe::general {

constexpr u32 column_groups = pass_columns / arch::columns;

//! The tokens of one pass, as this lane loads them: where its k's begin. Lanes without a token of their own
//! load the last one; nobody reads what they make of it.
struct PassRows {
  const char* rows[column_groups];
  u32 groups;  // in use

  template <class RowOf>
  FLASHMOE_DEVICE PassRows(u32 count, u32 lane, RowOf row_of) {
    groups = ceil_div(count, arch::columns);
#pragma unroll
    for (u32 g = 0; g < column_groups; ++g) {
      const u32 column = g * arch::columns + arch::column_of(lane);
      rows[g] = row_of(column < count ? column : count - 1) + arch::k_of(lane) * 2;
    }
  }
};

//! This wave's share of a row tile times a pass.
template <u32 k>
FLASHMOE_DEVICE void multiply_share(const char* tile, const PassRows& pass, u32 wave, u32 lane,
                                    arch::Sums (&sums)[column_groups]) {
  constexpr u32 chunks = k / built::chunk_k, in_flight = 4;
  for (u32 first = wave; first < chunks; first += crew_waves * in_flight) {
    arch::Weights weights[in_flight];
#pragma unroll
    for (u32 i = 0; i < in_flight; ++i) {
      const u32 chunk = first + i * crew_waves;
      if (chunk < chunks) weights[i] = arch::load_weights(tile + chunk * built::chunk_bytes, lane);
    }
#pragma unroll
    for (u32 i = 0; i < in_flight; ++i) {
      const u32 chunk = first + i * crew_waves;
      if (chunk >= chunks) continue;
#pragma unroll
      for (u32 g = 0; g < column_groups; ++g) {
        if (g >= pass.groups) continue;
        arch::multiply(sums[g], weights[i], arch::load(pass.rows[g] + chunk * built::chunk_k * 2));
      }
    }
  }
}

//! Products of row tiles with `count` tokens. row_of(i): the input row of token i. before(tile, first token,
//! tokens) is called before the barrier of each row tile and pass, finish(tile, first token, tokens, shares)
//! after it.
template <u32 k, class RowOf, class Before, class Finish>
FLASHMOE_DEVICE void multiply_tiles(Hand& hand, const char* weights, u32 tiles, u32 count, RowOf row_of,
                                    Before before, Finish finish) {
  u32 buffer = 0;  // two: the next row tile begins while others still read this one's shares
  for (u32 first = 0; first < count; first += pass_columns) {
    const u32 in_pass = count - first < pass_columns ? count - first : pass_columns;
    const PassRows pass(in_pass, hand.lane, [&](u32 column) { return row_of(first + column); });
    for (u32 tile = 0; tile < tiles; ++tile) {
      arch::Sums sums[column_groups] = {};
      multiply_share<k>(weights + u64{tile} * 16 * k * 2, pass, hand.wave, hand.lane, sums);
      auto& shares = hand.group.partial[buffer];
#pragma unroll
      for (u32 g = 0; g < column_groups; ++g) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
          const u32 column = g * arch::columns + arch::sum_column(hand.lane, i);
          shares[hand.wave][column][arch::sum_row(hand.lane, i)] = sums[g][i];
        }
      }
      before(tile, first, in_pass);
      hand.sync();
      finish(tile, first, in_pass, shares);
      buffer ^= 1;
    }
  }
}

using Shares = float[crew_waves][pass_columns][row_stride];

FLASHMOE_DEVICE float sum_of(const Shares& shares, u32 column, u32 row) {
  float sum = 0;
#pragma unroll
  for (u32 wave = 0; wave < crew_waves; ++wave) sum += shares[wave][column][row];
  return sum;
}

FLASHMOE_DEVICE void up(Hand& hand, const Task& task, u32 tile) {
  const PeView& view = hand.view;
  const u32 first_unit = tile * view.launch.tiling.up_rows;
  const u64 first_tile = u64{task.expert} * (built::d_ff / 8) + first_unit / 8;
  const char* weights = static_cast<const char*>(view.launch.gate_up) + first_tile * built::up_tile_bytes;
  const Entry* entries = view.graph.plan.entries + task.first;
  // 8 gate rows and the 8 up rows of the same hidden units: one result a thread
  static_assert(crew_threads == 8 * pass_columns);
  const u32 unit = hand.thread % 8, column = hand.thread / 8;
  multiply_tiles<built::d_model>(
      hand, weights, view.graph.up_width(tile) / 8, task.num_tokens,
      [&](u32 i) { return static_cast<const char*>(view.row(entries[i])); }, [](u32, u32, u32) {},
      [&](u32 row_tile, u32 first, u32 count, const Shares& shares) {
        if (column >= count) return;
        const float gate = sum_of(shares, column, unit), up = sum_of(shares, column, unit + 8);
        auto* hidden = static_cast<bf16*>(view.hidden(task.first + first + column));
        hidden[first_unit + row_tile * 8 + unit] = to_bf16(gate / (1.0f + expf(-gate)) * up);
      });
}

//! Calls finish(row, first token, tokens, shares) as above, for each of this thread's two results.
template <class Before, class Finish>
FLASHMOE_DEVICE void multiply_down(Hand& hand, const Task& task, u32 tile, Before before, Finish finish) {
  const PeView& view = hand.view;
  const u32 first_row = tile * view.launch.tiling.down_rows;
  const u64 first_tile = u64{task.expert} * (built::d_model / 16) + first_row / 16;
  const char* weights = static_cast<const char*>(view.launch.down) + first_tile * built::down_tile_bytes;
  multiply_tiles<built::d_ff>(
      hand, weights, view.graph.down_width(tile) / 16, task.num_tokens,
      [&](u32 i) { return static_cast<const char*>(view.hidden(task.first + i)); }, before, finish);
}

constexpr u32 down_results = 16 * pass_columns / crew_threads;  // of a thread, in each row tile and pass

//! Unweighted results, straight into the slots of the tokens' owners.
FLASHMOE_DEVICE void down(Hand& hand, const Task& task, u32 tile) {
  const PeView& view = hand.view;
  const u32 row = hand.thread % 16;
  multiply_down(
      hand, task, tile, [](u32, u32, u32) {},
      [&](u32 row_tile, u32 first, u32 count, const Shares& shares) {
#pragma unroll
        for (u32 i = 0; i < down_results; ++i) {
          const u32 column = hand.thread / 16 + i * (crew_threads / 16);
          if (column >= count) continue;
          const Entry entry = view.graph.plan.entries[task.first + first + column];
          auto* result = reinterpret_cast<bf16*>(view.heap(entry.src).result_row(entry.token, entry.k));
          result[tile * view.launch.tiling.down_rows + row_tile * 16 + row] =
              to_bf16(sum_of(shares, column, row));
        }
      });
}

//! Adds this expert to the running sums of the tile's rows; the chain's last task sends them.
FLASHMOE_DEVICE void down_rows(Hand& hand, const Command& command) {
  const PeView& view = hand.view;
  const Launch& launch = view.launch;
  const Task& task = command.task;
  const u32 rows = launch.tiling.down_rows, max_tokens = launch.limits.max_tokens;
  float* all_sums = hand.params.sums + arch::group() * (u64{launch.shape.num_pes} * max_tokens * rows);
  auto sums_of = [&](u32 src, u32 token) { return all_sums + (u64{src} * max_tokens + token) * rows; };
  if (command.starts != 0) {
    for (u32 src = 0; src < launch.shape.num_pes; ++src) {
      const u32 count = view.num_tokens(src) * rows;
      for (u32 i = hand.thread; i < count; i += crew_threads) sums_of(src, 0)[i] = 0;
    }
    hand.sync();
  }
  const u32 row = hand.thread % 16;
  float* places[down_results];
  float before[down_results], weight[down_results];
  multiply_down(
      hand, task, task.tile,
      [&](u32 row_tile, u32 first, u32 count) {  // asked for ahead of the barrier
#pragma unroll
        for (u32 i = 0; i < down_results; ++i) {
          const u32 column = hand.thread / 16 + i * (crew_threads / 16);
          if (column >= count) continue;
          const Entry entry = view.graph.plan.entries[task.first + first + column];
          places[i] = sums_of(entry.src, entry.token) + row_tile * 16 + row;
          before[i] = *places[i];
          weight[i] = view.weight(entry);
        }
      },
      [&](u32, u32, u32 count, const Shares& shares) {
#pragma unroll
        for (u32 i = 0; i < down_results; ++i) {
          const u32 column = hand.thread / 16 + i * (crew_threads / 16);
          if (column < count) *places[i] = before[i] + weight[i] * sum_of(shares, column, row);
        }
      });
  if (command.ends == 0) return;
  hand.sync();
  // Tokens without an expert in the group get zeros: nobody reads them, or they are the result.
  const bool straight_out = !launch.tiling.has_combine(launch.shape);
  const u32 result_slot = view.pe * launch.tiling.groups(launch.shape) + command.group;
  const u32 first_row = task.tile * rows, octets = view.graph.down_width(task.tile) / 8;
  for (u32 src = 0; src < launch.shape.num_pes; ++src) {
    const u32 count = view.num_tokens(src) * octets;
    for (u32 i = hand.thread; i < count; i += crew_threads) {
      const u32 token = i / octets, octet = i % octets;
      const float* sums = sums_of(src, token) + octet * 8;
      u32 pairs[4];
#pragma unroll
      for (u32 j = 0; j < 4; ++j)
        pairs[j] = u32{to_bf16(sums[2 * j]).bits} | u32{to_bf16(sums[2 * j + 1]).bits} << 16;
      char* to =
          straight_out ? static_cast<char*>(view.out(token)) : view.heap(src).result_row(token, result_slot);
      arch::store(to + (first_row + octet * 8) * 2, arch::Words{pairs[0], pairs[1], pairs[2], pairs[3]});
    }
  }
}

}  // namespace flashmoe::general
