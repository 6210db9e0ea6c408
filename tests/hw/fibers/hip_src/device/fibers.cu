// The scheduler, and all that threads wait for.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <map>
#include <unordered_map>

#include "fibers.hpp"

namespace fibers {

namespace {

constexpr std::size_t stack_bytes = 64 * 1024;
constexpr u64 step_ns = 10, most_steps_without_progress = 8'000'000;

struct Group;
struct Piece {
  u32 to, bytes;
  const char* from;
  std::vector<char> early;  // what was there when it was asked for, else it is read at the end
};
struct Fiber {
  Group* group;
  u32 thread;
  char* stack;
  bool is_started = false;
  jmp_buf context;
  u32 looks = 0;                 // at memory, since it last did something else
  std::vector<Piece> asked_for;  // by async_copy, since it last handed them to a barrier
};
struct Warp {
  u32 generation = 0, arrived = 0;
  const char* what = nullptr;  // they meet for
  u64 values[2][32];           // by parity of the generation: who is late still reads the one before
  Operands operands[2][32];
  std::vector<Fiber*> waiting;
  bool is_slow = false;
};
struct Meeting {
  u32 arrived = 0, threads = 0;
  std::vector<Fiber*> waiting;
};
struct Barrier {
  u32 arrivals, pending, phase = 0;
  std::int64_t bytes = 0;  // expected and not there yet
  std::vector<Fiber*> waiting;
};
struct Group {
  u32 index, alive;
  std::size_t shared_bytes;
  std::vector<u64> shared_words;
  char* shared;
  std::vector<Warp> warps;
  Meeting meetings[16];
  std::unordered_map<u32, Barrier> barriers;
};
struct Copy {
  Group* group;
  Fiber* arrives;  // the thread that has done so when the copy ends; nullptr: its bytes were expected
  u32 barrier;
  std::vector<Piece> pieces;
};

u64 random_state = 1;
std::vector<Group> groups;
std::vector<Fiber> all;
std::vector<Fiber*> ready, looking;
std::vector<Copy> copies;
Fiber* current;
jmp_buf scheduler;
const std::function<void()>* body;
u64 now_ns, steps, last_progress, copy_delay;
u32 num_alive;
char error[4096];
std::map<const char*, std::size_t> allocations;
std::vector<char*> stacks;

u64 random_below(u64 end) {  // splitmix64
  u64 z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return (z ^ z >> 31) % end;
}
template <class T>
T take_any(std::vector<T>& from) {
  std::swap(from[random_below(from.size())], from.back());
  T taken = std::move(from.back());
  from.pop_back();
  return taken;
}
void make_ready(std::vector<Fiber*>& waiting) {
  ready.insert(ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

// --- switching
__attribute__((noinline)) void leave() {
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}
void wait_in(std::vector<Fiber*>& list) {
  list.push_back(current);
  leave();
}
void complete_copy();
void enter() {
  (*body)();
  note_progress();
  --num_alive;
  Group* group = current->group;
  if (--group->alive == 0)
    for (const Copy& copy : copies)
      if (copy.group == group) fail("work-group %u has ended before its copies", group->index);
  _longjmp(scheduler, 1);
}
__attribute__((noinline)) void run(Fiber* fiber) {
  current = fiber;
  threadIdx.x = fiber->thread;
  blockIdx.x = fiber->group->index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber->is_started) _longjmp(fiber->context, 1);
  fiber->is_started = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber->stack;
  start.uc_stack.ss_size = stack_bytes;
  start.uc_link = nullptr;
  makecontext(&start, enter, 0);
  setcontext(&start);
}

Warp& warp_of(const Fiber& fiber) { return fiber.group->warps[fiber.thread / 32]; }
//! Some warps are slow for a while: what they alone hold up is seen.
Fiber* next_fiber() {
  if (steps % 4096 == 0)
    for (Group& group : groups)
      for (Warp& warp : group.warps) warp.is_slow = random_below(4) == 0;
  // who only looks comes seldom, but comes
  Fiber* chosen = take_any(!looking.empty() && random_below(16) == 0 ? looking : ready);
  for (u32 i = 0; i < 8 && warp_of(*chosen).is_slow && !ready.empty(); ++i) {
    ready.push_back(chosen);
    chosen = take_any(ready);
  }
  return chosen;
}

//! Who waits for what, as far as there is room.
const char* tell_stuck() {
  std::size_t size = 0;
  auto tell = [&](const char* format, auto... values) {
    if (size < sizeof error) size += std::snprintf(error + size, sizeof error - size, format, values...);
  };
  tell("nobody gets on: %zu threads run, %zu look at memory", ready.size(), looking.size());
  for (Group& group : groups) {
    for (auto& [address, barrier] : group.barriers)
      if (!barrier.waiting.empty())
        tell("; work-group %u thread %u ... at mbarrier %u, phase %u, %u arrivals and %lld bytes short",
             group.index, barrier.waiting[0]->thread, address, barrier.phase, barrier.pending,
             static_cast<long long>(barrier.bytes));
    for (u32 i = 0; i < 16; ++i)
      if (group.meetings[i].arrived > 0)
        tell("; work-group %u: %u of %u at barrier %u", group.index, group.meetings[i].arrived,
             group.meetings[i].threads, i);
    for (u32 i = 0; i < group.warps.size(); ++i)
      if (group.warps[i].arrived > 0)
        tell("; work-group %u warp %u: %u lanes at %s", group.index, i, group.warps[i].arrived,
             group.warps[i].what);
  }
  return error;
}

//! Nobody can run: time passes until a copy ends, or those who look may see something, or a wait returns
//! early, as it may.
void idle() {
  if (!copies.empty()) return complete_copy();
  const bool look = !looking.empty();
  make_ready(looking);
  if (!look || random_below(64) == 0)
    for (Group& group : groups)
      for (auto& [address, barrier] : group.barriers) make_ready(barrier.waiting);
  if (ready.empty()) tell_stuck();
}

// --- mbarriers
u64 cookie_of(u32 address) { return 0xba881e50ba881e50u ^ address; }
Barrier& barrier_at(Group& group, u32 address) {
  const auto found = group.barriers.find(address);
  if (found == group.barriers.end()) fail("no mbarrier at %u", address);
  u64 word;
  std::memcpy(&word, group.shared + address, 8);
  if (word != cookie_of(address)) fail("the mbarrier at %u was overwritten", address);
  return found->second;
}
void end_phase_if_over(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  note_progress();
  make_ready(barrier.waiting);
}

void complete(const Copy& copy) {
  Barrier& barrier = copy.group->barriers.at(copy.barrier);
  for (const Piece& piece : copy.pieces) {
    std::memcpy(copy.group->shared + piece.to, piece.early.empty() ? piece.from : piece.early.data(),
                piece.bytes);
    if (copy.arrives == nullptr) barrier.bytes -= piece.bytes;
  }
  if (copy.arrives != nullptr && barrier.pending-- == 0) fail("too many arrivals after copies");
  end_phase_if_over(barrier);
}
void complete_copy() { complete(take_any(copies)); }

//! May write at once, and is not there before its end.
Piece piece_of(u32 to_shared, const void* from, u32 bytes) {
  Group& group = *current->group;
  if (to_shared % 16 != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0 || bytes % 16 != 0)
    fail("copy of %u bytes to %u is not aligned to 16 bytes", bytes, to_shared);
  if (u64{to_shared} + bytes > group.shared_bytes)
    fail("copy of %u bytes to %u is too long", bytes, to_shared);
  if (!is_allocated(from, bytes)) fail("copy of %u bytes from where there is no memory", bytes);
  for (const Copy& copy : copies) {
    if (copy.group != &group || copy.arrives == current) continue;
    for (const Piece& other : copy.pieces)
      if (to_shared < other.to + other.bytes && other.to < to_shared + bytes)
        fail("two copies to %u at once", to_shared);
  }
  std::memset(group.shared + to_shared, 0xff, bytes);
  const char* source = static_cast<const char*>(from);
  Piece piece{to_shared, bytes, source, {}};
  if (random_below(2) == 0) piece.early.assign(source, source + bytes);
  return piece;
}

//! Work-groups whose shared memory holds what a launch before may have left: anything.
void make_groups(u32 num_groups, u32 num_threads, std::size_t shared_bytes) {
  groups = std::vector<Group>(num_groups);
  all.clear();
  all.reserve(std::size_t{num_groups} * num_threads);
  const bool all_ones = random_below(2) == 0;
  for (Group& group : groups) {
    group.index = static_cast<u32>(&group - groups.data());
    group.alive = num_threads;
    group.shared_bytes = shared_bytes;
    group.shared_words.resize(shared_bytes / 8 + 16);
    for (u64& word : group.shared_words) word = all_ones ? ~u64{0} : random_below(~u64{0});
    auto base = reinterpret_cast<std::uintptr_t>(group.shared_words.data());
    group.shared = reinterpret_cast<char*>((base + 127) / 128 * 128);
    group.warps.resize(num_threads / 32);
    for (u32 thread = 0; thread < num_threads; ++thread) {
      if (stacks.size() == all.size())
        stacks.push_back(static_cast<char*>(
            mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
      Fiber fiber{};
      fiber.group = &group;
      fiber.thread = thread;
      fiber.stack = stacks[all.size()];
      all.push_back(fiber);
      ready.push_back(&all.back());
    }
  }
  num_alive = num_groups * num_threads;
}

}  // namespace

void set_seed(u32 seed) { random_state = seed; }

const char* launch(u32 num_groups, u32 num_threads, std::size_t shared_bytes,
                   const std::function<void()>& thread) {
  ready.clear();
  looking.clear();
  copies.clear();
  make_groups(num_groups, num_threads, shared_bytes);
  blockDim = dim3(num_threads);
  gridDim = dim3(num_groups);
  body = &thread;
  error[0] = 0;
  last_progress = steps;
  copy_delay = u64{2} << random_below(10);
  while (num_alive > 0 && error[0] == 0) {
    ++steps;
    now_ns += step_ns;
    if (steps - last_progress > most_steps_without_progress) return tell_stuck();
    if (!copies.empty() && random_below(copy_delay) == 0) complete_copy();
    if (ready.empty())
      idle();
    else
      run(next_fiber());
  }
  return error[0] == 0 ? nullptr : error;
}

void fail(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error, sizeof error, format, arguments);
  va_end(arguments);
  const std::size_t size = std::strlen(error);
  std::snprintf(error + size, sizeof error - size, " (work-group %u, thread %u)", blockIdx.x, threadIdx.x);
  _longjmp(scheduler, 1);
}

void note_progress() {
  last_progress = steps;
  current->looks = 0;
}
u64 clock_ns() { return now_ns; }
char* shared_memory() { return current->group->shared; }
u32 shared_address(const void* pointer) {
  return static_cast<u32>(static_cast<const char*>(pointer) - current->group->shared);
}

void interleave() {
  if (random_below(4) == 0) wait_in(ready);
}
void look() {
  constexpr u32 few = 64;
  if (++current->looks > few)
    wait_in(looking);
  else if (random_below(4) == 0)
    wait_in(ready);
}

namespace {
//! Gives the parity of the buffer with what the lanes brought; `bring` puts this one's there.
template <class Bring>
u32 meet(const char* what, Bring bring) {
  Warp& warp = warp_of(*current);
  if (warp.arrived == 0) warp.what = what;
  if (warp.what != what) fail("lanes of a warp meet at %s and %s", warp.what, what);
  const u32 parity = warp.generation % 2;
  bring(warp, parity, current->thread % 32);
  if (++warp.arrived < 32) {
    wait_in(warp.waiting);
  } else {
    warp.arrived = 0;
    ++warp.generation;
    make_ready(warp.waiting);
  }
  return parity;
}
}  // namespace

const u64* meet_lanes(const char* what, u64 value) {
  const u32 parity = meet(what, [&](Warp& warp, u32 p, u32 lane) { warp.values[p][lane] = value; });
  return warp_of(*current).values[parity];
}
const Operands* meet_lanes(const Operands& operands) {
  const u32 parity = meet("mma", [&](Warp& warp, u32 p, u32 lane) { warp.operands[p][lane] = operands; });
  return warp_of(*current).operands[parity];
}

void meet_threads(u32 barrier, u32 threads) {
  current->looks = 0;
  Meeting& meeting = current->group->meetings[barrier];
  if (meeting.arrived == 0) meeting.threads = threads;
  if (meeting.threads != threads) fail("barrier %u of %u and %u threads", barrier, meeting.threads, threads);
  if (++meeting.arrived < threads) return wait_in(meeting.waiting);
  meeting.arrived = 0;
  make_ready(meeting.waiting);
}

void barrier_init(u32 address, u32 arrivals) {
  const u64 cookie = cookie_of(address);
  std::memcpy(shared_memory() + address, &cookie, 8);
  Barrier barrier{};
  barrier.arrivals = barrier.pending = arrivals;
  if (!current->group->barriers.emplace(address, barrier).second) fail("two mbarriers at %u", address);
}

void arrive(u32 address, u32 bytes_to_expect) {
  interleave();
  Barrier& barrier = barrier_at(*current->group, address);
  if (barrier.pending == 0) fail("more than %u arrivals at the mbarrier at %u", barrier.arrivals, address);
  barrier.bytes += bytes_to_expect;
  --barrier.pending;
  current->looks = 0;
  end_phase_if_over(barrier);
}

bool phase_is_over(u32 address, u32 parity) {
  interleave();
  Barrier& barrier = barrier_at(*current->group, address);
  if (barrier.phase % 2 == parity) wait_in(barrier.waiting);
  return barrier.phase % 2 != parity;
}

void bulk_copy(u32 to_shared, const void* from, u32 bytes, u32 barrier) {
  interleave();
  barrier_at(*current->group, barrier);
  copies.push_back(Copy{current->group, nullptr, barrier, {piece_of(to_shared, from, bytes)}});
}

void async_copy(u32 to_shared, const void* from, u32 bytes) {
  current->asked_for.push_back(piece_of(to_shared, from, bytes));
}
void arrive_after_async_copies(u32 barrier) {
  interleave();
  barrier_at(*current->group, barrier);
  copies.push_back(Copy{current->group, current, barrier, std::move(current->asked_for)});
  current->asked_for.clear();
}
void wait_for_async_copies() {
  for (std::size_t i = 0; i < copies.size();) {
    if (copies[i].arrives != current) {
      ++i;
      continue;
    }
    const Copy copy = std::move(copies[i]);
    copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(i));
    complete(copy);
  }
}

// --- memory; what is read before it is written shall not be zero by chance
void* allocate(std::size_t bytes) {
  void* pointer = nullptr;
  if (posix_memalign(&pointer, 256, bytes) != 0) return nullptr;
  std::memset(pointer, 0xab, bytes);
  allocations[static_cast<char*>(pointer)] = bytes;
  return pointer;
}
void release(void* pointer) {
  allocations.erase(static_cast<char*>(pointer));
  std::free(pointer);
}
bool is_allocated(const void* pointer, std::size_t bytes) {
  const char* begin = static_cast<const char*>(pointer);
  auto after = allocations.upper_bound(begin);
  if (after == allocations.begin()) return false;
  --after;
  return begin + bytes <= after->first + after->second;
}

}  // namespace fibers
