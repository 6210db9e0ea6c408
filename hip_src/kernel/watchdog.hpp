// Ends waits that take too long: every spin of a worker turns through here.
#pragma once
#include "pe_view.hpp"

namespace flashmoe {

class Watchdog {
 public:
  FLASHMOE_FN Watchdog(const PeView& view, u32 worker) : view_(view), worker_(worker) {}

  //! True when the launch cannot go on, here or anywhere else: the worker leaves.
  FLASHMOE_FN bool stopped() const { return stopped_; }
  FLASHMOE_FN void stop() { stopped_ = true; }
  //! The worker has something to do again.
  FLASHMOE_FN void reset() { waiting_since_ = 0; }

  //! One turn of a wait: gives the core away, ends the launch when the wait is past its deadline.
  FLASHMOE_FN void keep_waiting(u32 id, const Missing& missing) {
    const u64 now_ns = clock_ns();
    if (waiting_since_ == 0) waiting_since_ = now_ns;
    if (now_ns - waiting_since_ > view_.launch.deadline_ns) {
      raise(FaultKind::deadline, id, missing, now_ns - waiting_since_);
    }
    if (view_.launch.fault->raised()) stopped_ = true;
    pause();
  }

  FLASHMOE_FN void raise(FaultKind kind, u32 id, const Missing& missing, u64 waited_ns) {
    stopped_ = true;
    FaultReport& fault = *view_.launch.fault;
    if (!fault.claim()) return;
    fault.kind = kind;
    fault.pe = view_.pe;
    fault.worker = worker_;
    fault.task_id = id;
    fault.epoch = view_.epoch;
    fault.missing = missing;
    fault.waited_ns = waited_ns;
  }

 private:
  const PeView& view_;
  u32 worker_;
  bool stopped_ = false;
  u64 waiting_since_ = 0;
};

}  // namespace flashmoe
