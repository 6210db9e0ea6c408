// The exchange protocol between PEs: what lies in the symmetric heap and how completeness is told.
//
// Push, never pull. Every word and every landing slot has exactly one writer an epoch. A word carries the
// epoch that it belongs to, so nothing is ever reset: a word of another epoch means "not yet". Buffers
// alternate with the parity of the epoch, and no closing barrier is needed: PE s may write epoch e + 2 (the
// same parity as e) only after its plan of e + 1 was complete, which takes a dispatch of every PE in e + 1,
// which each sends after it has ended e.
#pragma once
#include "flashmoe/platform.hpp"
#include "flashmoe/shape.hpp"

namespace flashmoe {

//! "All rows from one PE have landed": epoch, the sender's number of tokens, rows sent. Zero rows are told,
//! too.
struct LandedWord {
  u32 epoch;
  u32 num_tokens;  // < 2^16
  u32 num_rows;    // < 2^16

  FLASHMOE_FN u64 pack() const { return u64{epoch} << 32 | u64{num_tokens} << 16 | num_rows; }
  FLASHMOE_FN static LandedWord unpack(u64 word) {
    return LandedWord{static_cast<u32>(word >> 32), static_cast<u32>(word >> 16) & 0xffffu,
                      static_cast<u32>(word) & 0xffffu};
  }
};
constexpr u32 max_tokens_per_pe = 0xffff;

//! "These results have landed": the epoch and how many tasks made them.
FLASHMOE_FN u64 result_word_of(u32 epoch, u32 num_tasks) { return u64{epoch} << 32 | num_tasks; }
FLASHMOE_FN u32 epoch_of(u64 word) { return static_cast<u32>(word >> 32); }

//! Running sum of what a PE has dispatched to one other: high half arrivals (tasks done), low half rows.
FLASHMOE_FN u64 dispatched(u32 tasks, u32 rows) { return u64{tasks} << 32 | rows; }

}  // namespace flashmoe
