// In place of the package's: each access that other threads may race with is a moment at which they may run.
#pragma once
#include "fibers.hpp"
#include "flashmoe/macros.hpp"

namespace flashmoe {

enum class Scope { device, system };

template <Scope, class T>
T load_relaxed(const T* address) {
  fibers::look();
  return *static_cast<const volatile T*>(address);
}
template <Scope scope, class T>
T load_acquire(const T* address) {
  return load_relaxed<scope>(address);
}
template <Scope, class T>
void store_relaxed(T* address, T value) {
  fibers::interleave();
  fibers::note_progress();
  *address = value;
}
template <Scope, class T>
T fetch_add_relaxed(T* address, T value) {
  fibers::interleave();
  fibers::note_progress();
  const T before = *address;
  *address = before + value;
  return before;
}
template <Scope scope, class T>
T fetch_add_acq_rel(T* address, T value) {
  return fetch_add_relaxed<scope>(address, value);
}
template <Scope scope, class T>
void store_release(T* address, T value) {
  store_relaxed<scope>(address, value);
}
template <Scope, class T>
bool compare_swap_acquire(T* address, T expected, T desired) {
  fibers::interleave();
  if (*address != expected) return false;
  fibers::note_progress();
  *address = desired;
  return true;
}
template <Scope>
void release_fence() {}
template <Scope scope, class T>
void store_after_fence(T* address, T value) {
  store_relaxed<scope>(address, value);
}
inline std::uint64_t clock_ns() { return fibers::clock_ns(); }

}  // namespace flashmoe
