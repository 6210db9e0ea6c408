"""Two traces of the same tasks side by side: usually simulated on the left, measured on the right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.trace import KINDS, Trace

__all__ = ["Comparison", "compare"]

# Traces that differ in one of these do not hold the same tasks; whatever joins all the same is joined.
SAME_TASKS_KEYS = ("model", "routing", "tiling", "ep_size", "layers", "gate_inside")
OPTIONAL_KEYS = ("layers", "gate_inside")  # not every executor says them

COMPONENTS = ("wait_for_inputs_us", "wait_for_worker_us", "wait_to_start_us", "execute_us")

NUM_UNMATCHED_NAMED = 5

Number = float | None  # None where a figure does not exist: JSON has no NaN


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two traces, joined by (layer, pe, task_id). Errors are of left against right: right is taken for the truth.

    matched_left, matched_right: (matched,) TRACE_DTYPE by (layer, pe, task_id); row i of both is the same task.
    unmatched_left, unmatched_right: TRACE_DTYPE, tasks of one trace only.
    by_kind: {kind: {count, left_mean_us, right_mean_us, bias_pct, mape_pct, p95_abs_us}} over end - start.
        bias_pct: 100 (left mean - right mean) / right mean.
        mape_pct: mean of 100 |left - right| / right, without the tasks that took no time on the right.
        p95_abs_us: 95th percentile of |left - right|.
    components: {kind: {"left" | "right": means of
        wait_for_inputs_us: max(0, ready - ticket), wait_for_worker_us: max(0, ticket - ready),
        wait_to_start_us: from the later of ready and ticket to start, execute_us: end - start}}.
    start_order_correlation: Spearman's rank correlation of the start times of matched tasks, in -1..1.
    warnings: one sentence for each reason to doubt the comparison.
    """

    left_name: str
    right_name: str
    matched_left: NDArray[np.void]
    matched_right: NDArray[np.void]
    unmatched_left: NDArray[np.void]
    unmatched_right: NDArray[np.void]
    makespan_us: dict[str, float]
    by_kind: dict[str, dict[str, Any]]
    components: dict[str, dict[str, dict[str, float]]]
    start_order_correlation: Number
    warnings: list[str]

    @property
    def matched(self) -> int:
        return len(self.matched_left)

    @property
    def makespan_gap_us(self) -> float:
        return self.makespan_us["left"] - self.makespan_us["right"]

    @property
    def makespan_gap_pct(self) -> Number:
        return _percent(self.makespan_gap_us, self.makespan_us["right"])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and None, for JSON; the unmatched tasks as counts."""
        return {
            "matched": self.matched,
            "unmatched_left": len(self.unmatched_left),
            "unmatched_right": len(self.unmatched_right),
            "makespan_us": self.makespan_us,
            "by_kind": self.by_kind,
            "makespan_gap_us": self.makespan_gap_us,
            "makespan_gap_pct": self.makespan_gap_pct,
            "start_order_correlation": self.start_order_correlation,
            "components": self.components,
            "warnings": self.warnings,
        }

    def table(self) -> str:
        """The comparison as plain text for a terminal."""
        errors = [["kind", "tasks", "left µs", "right µs", "bias %", "MAPE %", "p95 |error| µs"]]
        for kind, row in self.by_kind.items():
            means = [_text(row[key]) for key in ("left_mean_us", "right_mean_us")]
            percents = [_text(row["bias_pct"], "+.1f"), _text(row["mape_pct"], ".1f")]
            errors.append([kind, str(row["count"]), *means, *percents, _text(row["p95_abs_us"])])
        split = [["kind", "side", "wait for inputs", "wait for worker", "wait to start", "execute"]]
        for kind, sides in self.components.items():
            for side, parts in sides.items():
                split.append([kind, side, *(_text(parts[name]) for name in COMPONENTS)])
        blocks = [
            [f"left:  {self.left_name}", f"right: {self.right_name}"],
            [f"warning: {warning}" for warning in self.warnings],
            [self._matched_in_words()],
            ["Time per task, mean by kind (errors of left against right):", *_columns(errors)] * bool(self.by_kind),
            ["Where a task's time goes, mean in µs:", *_columns(split, num_names=2)] * bool(self.components),
            [self._makespan_in_words()],
        ]
        return "\n\n".join("\n".join(block) for block in blocks if block)

    def _matched_in_words(self) -> str:
        lines = [f"{self.matched} tasks in both, joined by (layer, pe, task_id)."]
        for side, tasks in (("left", self.unmatched_left), ("right", self.unmatched_right)):
            if len(tasks):
                named = "; ".join(_task_in_words(task) for task in tasks[:NUM_UNMATCHED_NAMED])
                more = len(tasks) - NUM_UNMATCHED_NAMED
                lines.append(f"Only on the {side}, {len(tasks)}: {named}{f'; and {more} more' if more > 0 else ''}.")
        return "\n".join(lines)

    def _makespan_in_words(self) -> str:
        left, right = self.makespan_us["left"], self.makespan_us["right"]
        sentence = f"Makespan: left {left:.2f} µs, right {right:.2f} µs"
        gap_pct = self.makespan_gap_pct
        if gap_pct is None:
            sentence += "."
        elif self.makespan_gap_us == 0:
            sentence += ": the same."
        else:
            word = "longer" if self.makespan_gap_us > 0 else "shorter"
            sentence += f": left is {abs(self.makespan_gap_us):.2f} µs ({abs(gap_pct):.1f} %) {word}."
        if self.start_order_correlation is not None:
            sentence += f"\nOrder of starts: rank correlation {self.start_order_correlation:.3f} (1: the same order)."
        return sentence


def compare(left: Trace, right: Trace) -> Comparison:
    """Join two traces by (layer, pe, task_id) and measure how far left is from right.

    Raises: ValueError naming the first task that a trace holds twice.
    """
    left_key, right_key = _keys(left, "left"), _keys(right, "right")
    _, left_rows, right_rows = np.intersect1d(left_key, right_key, assume_unique=True, return_indices=True)
    a, b = left.records[left_rows], right.records[right_rows]
    warnings = _header_warnings(left, right)
    same_kind = a["kind"] == b["kind"]
    if not same_kind.all():
        warnings.append(
            f"{int((~same_kind).sum())} joined tasks are of another kind on the right, first: "
            f"{_task_in_words(a[~same_kind][0])} is {KINDS[b[~same_kind][0]['kind']]} there; not in by_kind"
        )
    by_kind: dict[str, dict[str, Any]] = {}
    components: dict[str, dict[str, dict[str, float]]] = {}
    for index, kind in enumerate(KINDS):
        rows = same_kind & (a["kind"] == index)
        if rows.any():
            by_kind[kind], num_without_time = _errors(_execute_us(a[rows]), _execute_us(b[rows]))
            components[kind] = {"left": _components(a[rows]), "right": _components(b[rows])}
            if num_without_time:
                warnings.append(f"{num_without_time} {kind} tasks took no time on the right; left out of its MAPE")
    return Comparison(
        left_name=left.describe(),
        right_name=right.describe(),
        matched_left=a,
        matched_right=b,
        unmatched_left=_without(left, left_rows),
        unmatched_right=_without(right, right_rows),
        makespan_us={"left": left.makespan_us, "right": right.makespan_us},
        by_kind=by_kind,
        components=components,
        start_order_correlation=_rank_correlation(a["start_ps"], b["start_ps"]),
        warnings=warnings,
    )


def _keys(trace: Trace, side: str) -> NDArray[np.uint64]:
    records = trace.records
    place = records["layer"].astype(np.uint64) << np.uint64(16) | records["pe"]
    keys: NDArray[np.uint64] = place << np.uint64(32) | records["task_id"]
    values, first, counts = np.unique(keys, return_index=True, return_counts=True)
    if len(values) < len(keys):
        twice = records[first[counts > 1][0]]
        raise ValueError(
            f"{side} trace holds {_place_in_words(twice)} more than once: "
            f"{counts[counts > 1][0]} times (each task must be there once)"
        )
    return keys


def _without(trace: Trace, rows: NDArray[np.intp]) -> NDArray[np.void]:
    records = np.delete(trace.records, rows)
    in_order: NDArray[np.void] = records[np.lexsort((records["task_id"], records["pe"], records["layer"]))]
    return in_order


def _header_warnings(left: Trace, right: Trace) -> list[str]:
    warnings = []
    for key in SAME_TASKS_KEYS:
        a, b = left.header.get(key), right.header.get(key)
        if a == b or (key in OPTIONAL_KEYS and None in (a, b)):
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
            a, b = ({name: side.get(name) for name in names} for side in (a, b))
        warnings.append(f"{key} differs: {a} on the left, {b} on the right")
    return warnings


def _errors(left_us: NDArray[np.float64], right_us: NDArray[np.float64]) -> tuple[dict[str, Any], int]:
    """One row of by_kind, and how many tasks took no time on the right."""
    error = np.abs(left_us - right_us)
    timed = right_us > 0
    row = {
        "count": len(left_us),
        "left_mean_us": float(left_us.mean()),
        "right_mean_us": float(right_us.mean()),
        "bias_pct": _percent(float(left_us.mean() - right_us.mean()), float(right_us.mean())),
        "mape_pct": float(np.mean(100 * error[timed] / right_us[timed])) if timed.any() else None,
        "p95_abs_us": float(np.percentile(error, 95)),
    }
    return row, int((~timed).sum())


def _components(records: NDArray[np.void]) -> dict[str, float]:
    ready, ticket, start = records["ready_ps"], records["ticket_ps"], records["start_ps"]
    parts = (
        np.maximum(0, ready - ticket),
        np.maximum(0, ticket - ready),
        np.maximum(0, start - np.maximum(ready, ticket)),
        records["end_ps"] - start,
    )
    return {name: float(part.mean()) / 1e6 for name, part in zip(COMPONENTS, parts, strict=True)}


def _execute_us(records: NDArray[np.void]) -> NDArray[np.float64]:
    duration_us: NDArray[np.float64] = (records["end_ps"] - records["start_ps"]) / 1e6
    return duration_us


def _rank_correlation(left: NDArray[np.int64], right: NDArray[np.int64]) -> Number:
    """Spearman's rho, equal values sharing their mean rank; None where one side has a single value."""
    a, b = _ranks(left), _ranks(right)
    a, b = a - a.mean() if len(a) else a, b - b.mean() if len(b) else b
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else None


def _ranks(values: NDArray[np.int64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return ranks


def _percent(part: float, whole: float) -> Number:
    return 100 * part / whole if whole else None


def _task_in_words(task: np.void) -> str:
    expert = f", expert {task['expert']} tile {task['tile']}" if task["expert"] >= 0 else ""
    return f"{_place_in_words(task)} ({KINDS[task['kind']]}{expert})"


def _place_in_words(task: np.void) -> str:
    layer = f"layer {task['layer']} " if task["layer"] > 0 else ""  # most traces are of one layer
    return f"{layer}PE {task['pe']} task {task['task_id']}"


def _text(value: Number, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _columns(rows: list[list[str]], num_names: int = 1) -> list[str]:
    """Rows as lines of aligned columns: the first num_names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < num_names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
