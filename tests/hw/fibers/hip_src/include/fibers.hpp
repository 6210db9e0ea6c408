// Threads of a launch as fibers of one host thread: run in a random order that a seed decides, switched
// wherever they could see each other. A mistake that a GPU need not tell ends the launch with a text.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace fibers {

using u32 = std::uint32_t;
using u64 = std::uint64_t;

//! Decides the order of the launches from here on.
void set_seed(u32 seed);
//! Runs a launch to its end, all work-groups side by side. Gives nullptr, or what went wrong.
const char* launch(u32 num_groups, u32 num_threads, std::size_t shared_bytes,
                   const std::function<void()>& thread);
//! Ends the launch.
[[noreturn]] void fail(const char* format, ...);

// --- for the threads
//! Another thread may run.
void interleave();
//! The same, by a thread that may wait for memory to change.
void look();
//! The launch gets on: a store that another work-group may wait for.
void note_progress();
u64 clock_ns();
//! The work-group's shared memory; addresses count from it.
char* shared_memory();
u32 shared_address(const void* pointer);

//! Waits for all lanes of the warp. Gives what each brought: valid until the thread meets them again.
const u64* meet_lanes(const char* what, u64 value);
struct Operands {
  u32 a[4], b[2];
};
const Operands* meet_lanes(const Operands& operands);
//! Waits for so many threads of the work-group.
void meet_threads(u32 barrier, u32 threads);

// --- mbarriers, as PTX has them
void barrier_init(u32 address, u32 arrivals);
void arrive(u32 address, u32 bytes_to_expect = 0);
bool phase_is_over(u32 address, u32 parity);
//! A copy that ends some time later.
void bulk_copy(u32 to_shared, const void* from, u32 bytes, u32 barrier);
//! Ends no later than the arrival of this thread that is asked for next.
void async_copy(u32 to_shared, const void* from, u32 bytes);
void arrive_after_async_copies(u32 barrier);
void wait_for_async_copies();

// --- device memory
void* allocate(std::size_t bytes);
void release(void* pointer);
bool is_allocated(const void* pointer, std::size_t bytes);

}  // namespace fibers
