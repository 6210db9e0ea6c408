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
  u64 what;
  u32 who;
  u32 kind;
};

//! Items come back by time, and at one time in the order in which they were scheduled; those scheduled
//! without delay come after all others of that time.
//!
//! Level l has 256 slots of 256^l ps. An item lies on the level of the highest byte in which its time differs
//! from now, so the first slot in use on the lowest level in use holds the next one. When time reaches a slot
//! of a higher level, its items move down; slots keep the order in which items came, so that ties need no
//! sequence number. Source: Varghese and Lauck 1987, SOSP.
class Clock {
 public:
  enum class Turn { item, channel, end };

  //! What items' `who` is an index into.
  void keep_near(const void* first, std::size_t bytes) {
    near_ = static_cast<const char*>(first);
    near_bytes_ = bytes;
  }
  i64 now() const { return now_; }
  //! Whether no item of this moment is left.
  bool is_idle_now() const { return due_ == nil && fifo_next_ == fifo_.size(); }

  void at(i64 time_ps, Item item) {
    if (time_ps == now_) {
      fifo_.push_back(item);
    } else {
      push(allocate(time_ps, item));
    }
  }
  void at_once(Item item) { fifo_.push_back(item); }

  //! Goes to whatever is next: an item, or the moment `channel_ps`, which comes before items of the same
  //! time.
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
      const u32 slot = first_slot(level);
      const u32 shift = level * 8;
      const i64 slot_ps = (((now_ >> shift) & ~i64{255}) | slot) << shift;
      if (channel_ps < slot_ps) {
        now_ = channel_ps;
        return Turn::channel;
      }
      u32& list = slots_[level * 256 + slot];
      const Node& only = nodes_[list];
      if (only.next == nil && only.time_ps < channel_ps) {
        now_ = only.time_ps;
        item = release(list);
        clear(level, slot);
        return Turn::item;
      }
      now_ = slot_ps;
      u32 node = in_order(list);
      clear(level, slot);
      if (level == 0) {
        due_ = node;
        continue;
      }
      u32* last_due = &due_;
      while (node != nil) {
        const u32 next = nodes_[node].next;
        // whom it is for will be needed soon, and with many workers is in no near cache
        __builtin_prefetch(near_ + (nodes_[node].who_and_kind >> kind_bits) * near_bytes_, 1);
        if (nodes_[node].time_ps == now_) {
          nodes_[node].next = nil;
          *last_due = node;
          last_due = &nodes_[node].next;
        } else {
          push(node);
        }
        node = next;
      }
    }
  }

 private:
  static constexpr u32 num_levels = 8, nil = ~u32{0};

  struct Node {
    i64 time_ps;
    u64 what;
    u32 who_and_kind;
    u32 next;
  };
  static constexpr u32 kind_bits = 4;

  //! Slots are lists, the last item first: to add one touches no other.
  void push(u32 node) {
    const i64 time_ps = nodes_[node].time_ps;
    const u64 differs = static_cast<u64>(time_ps ^ now_) | 1;
    const u32 level = (63 - static_cast<u32>(__builtin_clzll(differs))) / 8;
    const u32 slot = static_cast<u32>(time_ps >> (level * 8)) & 255;
    u32& list = slots_[level * 256 + slot];
    nodes_[node].next = list;
    list = node;
    used_[level][slot / 64] |= u64{1} << (slot % 64);
    words_in_use_[level] |= 1u << (slot / 64);
    levels_in_use_ |= 1u << level;
  }

  u32 first_slot(u32 level) const {
    const auto word = static_cast<u32>(__builtin_ctz(words_in_use_[level]));
    return word * 64 + static_cast<u32>(__builtin_ctzll(used_[level][word]));
  }

  void clear(u32 level, u32 slot) {
    slots_[level * 256 + slot] = nil;
    if ((used_[level][slot / 64] &= ~(u64{1} << (slot % 64))) != 0) return;
    if ((words_in_use_[level] &= ~(1u << (slot / 64))) == 0) levels_in_use_ &= ~(1u << level);
  }

  //! Turns a slot's list round.
  u32 in_order(u32 node) {
    u32 before = nil;
    while (node != nil) {
      const u32 next = nodes_[node].next;
      nodes_[node].next = before;
      before = node;
      node = next;
    }
    return before;
  }

  u32 allocate(i64 time_ps, const Item& item) {
    const Node made{time_ps, item.what, item.who << kind_bits | item.kind, nil};
    if (free_ == nil) {
      nodes_.push_back(made);
      return static_cast<u32>(nodes_.size() - 1);
    }
    const u32 node = free_;
    free_ = nodes_[node].next;
    nodes_[node] = made;
    return node;
  }

  //! Takes the first node off a list and frees it.
  Item release(u32& list) {
    Node& node = nodes_[list];
    const u32 number = list;
    list = node.next;
    node.next = free_;
    free_ = number;
    return Item{node.what, node.who_and_kind >> kind_bits, node.who_and_kind & ((1u << kind_bits) - 1)};
  }

  const char* near_ = nullptr;
  std::size_t near_bytes_ = 0;
  i64 now_ = 0;
  u32 due_ = nil;  // list of items whose time is now, in order
  std::vector<Item> fifo_;
  std::size_t fifo_next_ = 0;
  std::vector<Node> nodes_;
  u32 free_ = nil;
  u32 levels_in_use_ = 0;
  std::array<std::array<u64, 4>, num_levels> used_{};  // a bit a slot
  std::array<u32, num_levels> words_in_use_{};         // a bit a word of those
  std::vector<u32> slots_ = std::vector<u32>(num_levels * 256, nil);
};

}  // namespace flashmoe::engine
