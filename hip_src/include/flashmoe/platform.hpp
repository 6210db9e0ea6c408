// Atomics by scope, pause, clock: what differs between host threads and devices. This is the host's side.
#pragma once
#include <sched.h>
#include <time.h>

#include <cstdint>

#include "flashmoe/macros.hpp"

namespace flashmoe {

//! Who must see a memory operation: the workers of one PE, or every PE.
enum class Scope { device, system };

// The compiler builtins rather than std::atomic: queue and heap words live in plain memory that a layout
// carves, as they do on a device. On the host both scopes are the same; a device build tells them apart.

template <Scope, class T>
FLASHMOE_FN T load_relaxed(const T* address) {
  return __atomic_load_n(address, __ATOMIC_RELAXED);
}

template <Scope, class T>
FLASHMOE_FN T load_acquire(const T* address) {
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}

template <Scope, class T>
FLASHMOE_FN void store_relaxed(T* address, T value) {
  __atomic_store_n(address, value, __ATOMIC_RELAXED);
}

template <Scope, class T>
FLASHMOE_FN void store_release(T* address, T value) {
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
}

template <Scope, class T>
FLASHMOE_FN T fetch_add_relaxed(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

//! Both halves: releases what this worker wrote, and the last to arrive acquires what all others wrote.
template <Scope, class T>
FLASHMOE_FN T fetch_add_acq_rel(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}

//! One attempt; true when *address was expected and is now desired.
template <Scope, class T>
FLASHMOE_FN bool compare_swap_acquire(T* address, T expected, T desired) {
  return __atomic_compare_exchange_n(address, &expected, desired, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

//! Steady clock [ns], common to all workers of all PEs.
FLASHMOE_FN std::uint64_t clock_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000u + static_cast<std::uint64_t>(now.tv_nsec);
}

//! Gives the core away: there may be many more workers than cores, and the one waited for needs a turn.
FLASHMOE_FN void pause() { sched_yield(); }

}  // namespace flashmoe
