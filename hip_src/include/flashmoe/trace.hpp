// What a worker leaves behind for each task: 32 bytes in a buffer of its own, no atomics.
#pragma once
#include <type_traits>

#include "flashmoe/shape.hpp"

namespace flashmoe {

struct TraceRecord {
  u64 start_ns;     // since the launch
  u32 duration_ns;  // end - start
  u32 task_id;
  u32 ticket_delta;  // start - ticket [ns]
  u32 ready_delta;   // start - the moment the worker saw the inputs complete [ns]
  u16 worker;
  u16 peer;  // 0xffff: none
  u16 domain;
  u16 flags;  // see TraceFlag
};
static_assert(sizeof(TraceRecord) == 32 && std::is_trivially_copyable_v<TraceRecord>);

enum TraceFlag : u16 {
  trace_waited = 1,        // inputs were not there when the worker first looked
  trace_out_of_order = 2,  // run while an older pick of the same worker waited (look-ahead)
  trace_stolen = 4,        // taken from another domain's counter
  trace_from_cache = 8,    // simulated: its weights lay in the cache
};

//! A worker's buffer. Records past the capacity are counted, not kept.
struct TraceBuffer {
  static constexpr bool enabled = true;
  TraceRecord* records;
  u32 capacity;
  u32 size;
  u32 drops;

  FLASHMOE_FN void add(const TraceRecord& record) {
    if (size < capacity) {
      records[size++] = record;
    } else {
      ++drops;
    }
  }
};

//! No trace: nothing of it is left in the code.
struct NoTrace {
  static constexpr bool enabled = false;
  FLASHMOE_FN void add(const TraceRecord&) {}
};

//! What a worker's buffer holds after a launch on a device.
struct TraceSummary {
  u64 begin_ns;  // when the worker began
  u32 size, drops;
};

}  // namespace flashmoe
