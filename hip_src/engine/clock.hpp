// The event list of the native engine: a hierarchical timing wheel.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "flashmoe/shape.hpp"

namespace flashmoe::engine {

using i64 = std::int64_t;

constexpr i64 never = INT64_MAX;

//! What happens at a time: a kind and two numbers, for the engine to interpret.
struct Item {
  u32 kind;
  u32 who;
  u64 what;
};

//! Items come back by time, and at one time in the order in which they were scheduled; those scheduled without
//! delay come after all others of that time.
//!
//! Level l has 64 slots of 64^l ps. An item lies on the level of the highest 6-bit digit in which its time differs
//! from now, so the first slot in use on the lowest level in use holds the next one. When time reaches a slot of a
//! higher level, its items move down; each level keeps their order, so that ties need no sequence number.
//! Source: Varghese and Lauck 1987, SOSP.
class Clock {
 public:
  enum class Turn { item, channel, end };

  i64 now() const { return now_; }

  void at(i64 time_ps, Item item) {
    if (time_ps == now_) {
      fifo_.push_back(item);
    } else {
      append(level_slot(time_ps), allocate(time_ps, item));
    }
  }
  void at_once(Item item) { fifo_.push_back(item); }

  //! Goes to whatever is next: an item, or the moment `channel_ps`, which comes before items of the same time.
  Turn step(i64 channel_ps, Item& item) {
    for (;;) {
      if (channel_ps <= now_) return Turn::channel;
      if (due_ != nil) {
        item = release(due_);
        return Turn::item;
      }
      if (fifo_next_ < fifo_.size()) {
        item = fifo_[fifo_next_++];
        if (fifo_next_ == fifo_.size()) {
          fifo_.clear();
          fifo_next_ = 0;
        }
        return Turn::item;
      }
      if (levels_in_use_ == 0) {
        if (channel_ps == never) return Turn::end;
        now_ = channel_ps;
        return Turn::channel;
      }
      const u32 level = static_cast<u32>(__builtin_ctz(levels_in_use_));
      const u32 slot = static_cast<u32>(__builtin_ctzll(used_[level]));
      const u32 shift = level * digit_bits;
      const i64 slot_ps = (((now_ >> shift) & ~i64{63}) | slot) << shift;
      if (channel_ps < slot_ps || (level == 0 && channel_ps == slot_ps)) {
        now_ = channel_ps;
        return Turn::channel;
      }
      List& list = slots_[level * 64 + slot];
      if (list.first == list.last && nodes_[list.first].time_ps < channel_ps) {
        now_ = nodes_[list.first].time_ps;
        due_ = take(level, slot);
        continue;
      }
      now_ = slot_ps;
      u32 node = take(level, slot);
      if (level == 0) {
        due_ = node;
        continue;
      }
      while (node != nil) {
        const u32 next = nodes_[node].next;
        nodes_[node].next = nil;
        // the slot's first picosecond is now: such items belong to level 0
        append(level_slot(nodes_[node].time_ps), node);
        node = next;
      }
    }
  }

 private:
  static constexpr u32 digit_bits = 6, num_levels = 11, nil = ~u32{0};  // 11 digits hold 63 bits

  struct Node {
    i64 time_ps;
    Item item;
    u32 next;
  };
  struct List {
    u32 first = nil, last = nil;
  };

  u32 level_slot(i64 time_ps) const {
    const u64 differs = static_cast<u64>(time_ps ^ now_) | 1;
    const u32 level = (63 - static_cast<u32>(__builtin_clzll(differs))) / digit_bits;
    return level * 64 + static_cast<u32>((time_ps >> (level * digit_bits)) & 63);
  }

  void append(u32 place, u32 node) {
    List& list = slots_[place];
    if (list.first == nil) {
      list.first = node;
      used_[place / 64] |= u64{1} << (place % 64);
      levels_in_use_ |= 1u << (place / 64);
    } else {
      nodes_[list.last].next = node;
    }
    list.last = node;
  }

  //! Empties a slot; returns its first node.
  u32 take(u32 level, u32 slot) {
    List& list = slots_[level * 64 + slot];
    const u32 first = list.first;
    list = List{};
    used_[level] &= ~(u64{1} << slot);
    if (used_[level] == 0) levels_in_use_ &= ~(1u << level);
    return first;
  }

  u32 allocate(i64 time_ps, Item item) {
    if (free_ == nil) {
      nodes_.push_back(Node{time_ps, item, nil});
      return static_cast<u32>(nodes_.size() - 1);
    }
    const u32 node = free_;
    free_ = nodes_[node].next;
    nodes_[node] = Node{time_ps, item, nil};
    return node;
  }

  //! Takes the first node off a list and frees it.
  Item release(u32& list) {
    const u32 node = list;
    list = nodes_[node].next;
    nodes_[node].next = free_;
    free_ = node;
    return nodes_[node].item;
  }

  i64 now_ = 0;
  u32 due_ = nil;  // list of items whose time is now
  std::vector<Item> fifo_;
  std::size_t fifo_next_ = 0;
  std::vector<Node> nodes_;
  u32 free_ = nil;
  u32 levels_in_use_ = 0;
  std::array<u64, num_levels> used_{};
  std::array<List, num_levels * 64> slots_{};
};

}  // namespace flashmoe::engine
