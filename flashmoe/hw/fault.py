"""Launches that could not go on, in words."""

from __future__ import annotations

from typing import Any

from flashmoe.tasks import EVENT_KINDS

# enum FaultKind in hip_src/include/flashmoe/fault.hpp
_DEADLINE, _LANDED_MISMATCH, _REPLAY_MISMATCH, _NO_RESOURCES = 1, 2, 3, 4


class LaunchError(RuntimeError):
    """A launch that ended without a result. The layer can be launched again.

    fault: what the first worker to notice reported: pe, worker, task_id, epoch, event, index, src, seen, wanted,
    waited_s; and tasks_run, the tasks that each worker ran [pe * num_workers + worker]; unfinished_pes.
    """

    def __init__(self, message: str, fault: dict[str, Any]) -> None:
        super().__init__(message)
        self.fault = fault


def launch_error(fault: dict[str, Any], num_workers: int) -> LaunchError:
    """The exception for a failed launch."""
    ran = fault["tasks_run"]
    per_worker = "; ".join(
        f"PE {pe}: {', '.join(str(count) for count in ran[pe * num_workers : (pe + 1) * num_workers])}"
        for pe in range(len(ran) // num_workers)
    )
    tasks_run = f"tasks run by each worker: {per_worker}"
    who = f"PE {fault['pe']} worker {fault['worker']}, epoch {fault['epoch']}"
    seen_wanted = f"seen {fault['seen']}, wanted {fault['wanted']}"
    if fault["kind"] == _DEADLINE:
        task = "no task yet" if fault["task_id"] is None else f"task {fault['task_id']}"
        message = f"{who}: waited {fault['waited_s']:.3g} s with {task} for {_what(fault)}: {seen_wanted}; {tasks_run}"
    elif fault["kind"] == _LANDED_MISMATCH:
        message = f"{who}: rows that landed from PE {fault['src']} do not match its announcement: {seen_wanted}"
    elif fault["kind"] == _REPLAY_MISMATCH:
        message = f"{who}: the replayed schedule was made for another routing (digest of its plan: {seen_wanted})"
    elif fault["kind"] == _NO_RESOURCES:
        message = f"PE {fault['pe']} worker {fault['worker']} could not start: no thread or memory left for it"
    else:
        pes = ", ".join(f"PE {pe}" for pe in fault["unfinished_pes"])
        message = f"{pes} did not finish: a worker stopped, and nobody waited for its tasks; {tasks_run}"
    return LaunchError(message, fault)


def _what(fault: dict[str, Any]) -> str:
    """The event that did not come; `planned` by what it lacks."""
    if fault["event"] == len(EVENT_KINDS):
        return f"slot {fault['index']} of the push queue (filled in this epoch)"
    if fault["event"] == len(EVENT_KINDS) + 1:
        return f"its own warps (barrier at byte {fault['index']})"
    event = EVENT_KINDS[fault["event"]]
    if event != "planned":
        return f"{event}[{fault['index']}]"
    if fault["src"] is None or fault["src"] == fault["pe"]:
        return "planned (its own PE's tokens routed)"
    return f"planned (the dispatch of PE {fault['src']}, by epoch)"
