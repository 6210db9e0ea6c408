// Atomics by scope, pause, clock: what differs between host threads, CUDA and HIP.
#pragma once
#include <cstdint>

#include "flashmoe/macros.hpp"

#if !defined(__CUDA_ARCH__) && !defined(__HIP_DEVICE_COMPILE__)
  #include <sched.h>
  #include <time.h>
#endif

namespace flashmoe {

//! Who must see a memory operation: the workers of one PE, or every PE.
enum class Scope { device, system };

// Compiler builtins and PTX rather than std::atomic: queue and heap words live in plain memory that a layout
// carves. On the host both scopes are the same.

#if defined(__CUDA_ARCH__)

namespace ptx {
// One instruction of each kind, by width and scope. "memory" keeps the compiler from moving accesses across.
  #define FLASHMOE_PTX_LOAD(name, order)                                                               \
    template <Scope scope>                                                                             \
    FLASHMOE_FN std::uint32_t name(const std::uint32_t* address) {                                     \
      std::uint32_t value;                                                                             \
      if (scope == Scope::device)                                                                      \
        asm volatile("ld." order ".gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory"); \
      else                                                                                             \
        asm volatile("ld." order ".sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory"); \
      return value;                                                                                    \
    }                                                                                                  \
    template <Scope scope>                                                                             \
    FLASHMOE_FN std::uint64_t name(const std::uint64_t* address) {                                     \
      std::uint64_t value;                                                                             \
      if (scope == Scope::device)                                                                      \
        asm volatile("ld." order ".gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory"); \
      else                                                                                             \
        asm volatile("ld." order ".sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory"); \
      return value;                                                                                    \
    }
  #define FLASHMOE_PTX_STORE(name, order)                                                            \
    template <Scope scope>                                                                           \
    FLASHMOE_FN void name(std::uint32_t* address, std::uint32_t value) {                             \
      if (scope == Scope::device)                                                                    \
        asm volatile("st." order ".gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory"); \
      else                                                                                           \
        asm volatile("st." order ".sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory"); \
    }                                                                                                \
    template <Scope scope>                                                                           \
    FLASHMOE_FN void name(std::uint64_t* address, std::uint64_t value) {                             \
      if (scope == Scope::device)                                                                    \
        asm volatile("st." order ".gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory"); \
      else                                                                                           \
        asm volatile("st." order ".sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory"); \
    }
  #define FLASHMOE_PTX_ADD(name, order)                                           \
    template <Scope scope>                                                        \
    FLASHMOE_FN std::uint32_t name(std::uint32_t* address, std::uint32_t value) { \
      std::uint32_t before;                                                       \
      if (scope == Scope::device)                                                 \
        asm volatile("atom." order ".gpu.global.add.u32 %0, [%1], %2;"            \
                     : "=r"(before)                                               \
                     : "l"(address), "r"(value)                                   \
                     : "memory");                                                 \
      else                                                                        \
        asm volatile("atom." order ".sys.global.add.u32 %0, [%1], %2;"            \
                     : "=r"(before)                                               \
                     : "l"(address), "r"(value)                                   \
                     : "memory");                                                 \
      return before;                                                              \
    }                                                                             \
    template <Scope scope>                                                        \
    FLASHMOE_FN std::uint64_t name(std::uint64_t* address, std::uint64_t value) { \
      std::uint64_t before;                                                       \
      if (scope == Scope::device)                                                 \
        asm volatile("atom." order ".gpu.global.add.u64 %0, [%1], %2;"            \
                     : "=l"(before)                                               \
                     : "l"(address), "l"(value)                                   \
                     : "memory");                                                 \
      else                                                                        \
        asm volatile("atom." order ".sys.global.add.u64 %0, [%1], %2;"            \
                     : "=l"(before)                                               \
                     : "l"(address), "l"(value)                                   \
                     : "memory");                                                 \
      return before;                                                              \
    }
FLASHMOE_PTX_LOAD(load_relaxed, "relaxed")
FLASHMOE_PTX_LOAD(load_acquire, "acquire")
FLASHMOE_PTX_STORE(store_relaxed, "relaxed")
FLASHMOE_PTX_STORE(store_release, "release")
FLASHMOE_PTX_ADD(fetch_add_relaxed, "relaxed")
FLASHMOE_PTX_ADD(fetch_add_acq_rel, "acq_rel")
  #undef FLASHMOE_PTX_LOAD
  #undef FLASHMOE_PTX_STORE
  #undef FLASHMOE_PTX_ADD
}  // namespace ptx

template <Scope scope, class T>
FLASHMOE_FN T load_relaxed(const T* address) {
  return ptx::load_relaxed<scope>(address);
}
template <Scope scope, class T>
FLASHMOE_FN T load_acquire(const T* address) {
  return ptx::load_acquire<scope>(address);
}
template <Scope scope, class T>
FLASHMOE_FN void store_relaxed(T* address, T value) {
  ptx::store_relaxed<scope>(address, value);
}
template <Scope scope, class T>
FLASHMOE_FN void store_release(T* address, T value) {
  ptx::store_release<scope>(address, value);
}
template <Scope scope, class T>
FLASHMOE_FN T fetch_add_relaxed(T* address, T value) {
  return ptx::fetch_add_relaxed<scope>(address, value);
}
template <Scope scope, class T>
FLASHMOE_FN T fetch_add_acq_rel(T* address, T value) {
  return ptx::fetch_add_acq_rel<scope>(address, value);
}
template <Scope scope>
FLASHMOE_FN bool compare_swap_acquire(std::uint32_t* address, std::uint32_t expected, std::uint32_t desired) {
  std::uint32_t seen;
  if (scope == Scope::device)
    asm volatile("atom.acquire.gpu.global.cas.b32 %0, [%1], %2, %3;"
                 : "=r"(seen)
                 : "l"(address), "r"(expected), "r"(desired)
                 : "memory");
  else
    asm volatile("atom.acquire.sys.global.cas.b32 %0, [%1], %2, %3;"
                 : "=r"(seen)
                 : "l"(address), "r"(expected), "r"(desired)
                 : "memory");
  return seen == expected;
}
//! Before several stores that publish the same writes: one fence, then relaxed stores.
template <Scope scope>
FLASHMOE_FN void release_fence() {
  if (scope == Scope::device)
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
  else
    asm volatile("fence.acq_rel.sys;" ::: "memory");
}
template <Scope scope, class T>
FLASHMOE_FN void store_after_fence(T* address, T value) {
  ptx::store_relaxed<scope>(address, value);
}
//! The device's clock [ns], common to all its SMs; it advances in steps of 32 ns on H200.
FLASHMOE_FN std::uint64_t clock_ns() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}
FLASHMOE_FN void pause() { __nanosleep(20); }

#elif defined(__HIP_DEVICE_COMPILE__)

template <Scope scope>
constexpr int hip_scope = scope == Scope::device ? __HIP_MEMORY_SCOPE_AGENT : __HIP_MEMORY_SCOPE_SYSTEM;

//! Before several stores that publish the same writes: one fence, then relaxed stores. Of this wave's writes.
template <Scope scope>
FLASHMOE_FN void release_fence() {
  if constexpr (scope == Scope::device)
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent");
  else
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "");
  // vmcnt(0), for the write-back of L2 itself: LLVM before 23 leaves this wait out where it knows of no store
  // of this wave that is under way (llvm-project#178316)
  __builtin_amdgcn_s_waitcnt(0x0F70);
}

template <Scope scope, class T>
FLASHMOE_FN T load_relaxed(const T* address) {
  return __hip_atomic_load(address, __ATOMIC_RELAXED, hip_scope<scope>);
}
template <Scope scope, class T>
FLASHMOE_FN T load_acquire(const T* address) {
  return __hip_atomic_load(address, __ATOMIC_ACQUIRE, hip_scope<scope>);
}
template <Scope scope, class T>
FLASHMOE_FN void store_relaxed(T* address, T value) {
  __hip_atomic_store(address, value, __ATOMIC_RELAXED, hip_scope<scope>);
}
template <Scope scope, class T>
FLASHMOE_FN void store_release(T* address, T value) {
  release_fence<scope>();
  store_relaxed<scope>(address, value);
}
template <Scope scope, class T>
FLASHMOE_FN T fetch_add_relaxed(T* address, T value) {
  return __hip_atomic_fetch_add(address, value, __ATOMIC_RELAXED, hip_scope<scope>);
}
template <Scope scope, class T>
FLASHMOE_FN T fetch_add_acq_rel(T* address, T value) {
  release_fence<scope>();
  return __hip_atomic_fetch_add(address, value, __ATOMIC_ACQUIRE, hip_scope<scope>);
}
template <Scope scope, class T>
FLASHMOE_FN bool compare_swap_acquire(T* address, T expected, T desired) {
  return __hip_atomic_compare_exchange_strong(address, &expected, desired, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED,
                                              hip_scope<scope>);
}
template <Scope scope, class T>
FLASHMOE_FN void store_after_fence(T* address, T value) {
  __hip_atomic_store(address, value, __ATOMIC_RELAXED, hip_scope<scope>);
}
//! The device's clock [ns], common to all its CUs: s_memrealtime ticks at 100 MHz.
FLASHMOE_FN std::uint64_t clock_ns() { return __builtin_amdgcn_s_memrealtime() * 10; }
FLASHMOE_FN void pause() { __builtin_amdgcn_s_sleep(4); }

#else

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

//! Before several stores that publish the same writes. Here each of them releases: that costs nothing more,
//! and ThreadSanitizer knows no fences.
template <Scope>
FLASHMOE_FN void release_fence() {}
template <Scope, class T>
FLASHMOE_FN void store_after_fence(T* address, T value) {
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
}

//! Steady clock [ns], common to all workers of all PEs.
FLASHMOE_FN std::uint64_t clock_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000u + static_cast<std::uint64_t>(now.tv_nsec);
}

//! Gives the core away: there may be many more workers than cores, and the one waited for needs a turn.
FLASHMOE_FN void pause() { sched_yield(); }

#endif

}  // namespace flashmoe
