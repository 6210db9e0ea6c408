"""How fast the engines are: python benchmarks/engines.py [--out results.json]

Tasks a second on one core, beside a bare loop over std::priority_queue in the same process, which takes and gives back
one event a task. Every effect of the machine model is on. The yardstick runs before and after each row, since the
clock of a shared machine wanders; ratios are against the mean of the two.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import flashmoe as fm
from flashmoe import _native
from flashmoe.trace import stamp

MODEL = fm.MoEModel.preset("qwen3-30b-a3b")
WIDE = fm.Tiling(up_rows=64, down_rows=128)  # 128 rows of weights a tile, in both projections
WORKERS_OF_EP8 = 8 * 304


def routings(num_layers: int, ep_size: int, num_tokens: int) -> list[fm.Routing]:
    """One a layer; eight different ones in turn."""
    drawn = [fm.Routing.zipf(MODEL, num_tokens, ep_size, seed=seed) for seed in range(min(8, num_layers))]
    return [drawn[layer % 8] for layer in range(num_layers)]


def yardstick(num_workers: int) -> float:
    """Tasks a second of the bare loop."""
    num_tasks = 1_000_000
    return num_tasks / _native.priority_queue_loop(num_tasks, num_workers)


def rate(repeats: int, **arguments: Any) -> tuple[int, float]:
    """Number of tasks, and CPU seconds of the best of some runs."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.process_time()
        totals = fm.evaluate(MODEL, **arguments)
        best = min(best, time.process_time() - begin)
    return totals.num_tasks, best


def measure(name: str, repeats: int = 5, **arguments: Any) -> dict[str, Any]:
    """One row of the table."""
    before = yardstick(WORKERS_OF_EP8)
    num_tasks, seconds = rate(repeats, **arguments)
    bare = (before + yardstick(WORKERS_OF_EP8)) / 2
    return {
        "case": name,
        "tasks": num_tasks,
        "ms": seconds * 1e3,
        "tasks_per_s": num_tasks / seconds,
        "bare_loop_tasks_per_s": bare,
        "bare_loop_ratio": bare / (num_tasks / seconds),
    }


def peak_mb(num_layers: int) -> float:
    """Peak memory of a process of its own that evaluates so many layers [MB]."""
    code = f"import engines; engines.print_peak_kb({num_layers})"
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True)
    return float(done.stdout) / 1e3


def print_peak_kb(num_layers: int) -> None:
    """What that process does. The kernel's mark for this program alone: getrusage starts at the parent's."""
    fm.evaluate(MODEL, routing=routings(num_layers, 8, 8), machine="mi300x")
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def main(out: Annotated[Path | None, typer.Option(help="Also write everything to this JSON file.")] = None) -> None:
    """Measure, print a table, and write it if asked to."""
    one_layer: dict[str, Any] = {"machine": "mi300x", "routing": routings(1, 8, 8)[0]}
    ep8 = {"machine": "mi300x", "routing": routings(48, 8, 8)}
    rows = [
        measure("1 PE, 64 tokens, 48 layers, static_phase", machine="mi300x", routing=routings(48, 1, 64)),
        measure("EP 8, 8 tokens, 48 layers, static_phase", **ep8),
        measure("EP 8, 8 tokens, 48 layers, static_phase, 128-row tiles", tiling=WIDE, **ep8),
        measure("EP 8, 8 tokens, 48 layers, ticket", policy="ticket", **ep8),
        measure("EP 8, 8 tokens, 48 layers, domain_steal", policy="domain_steal", **ep8),
        measure("EP 8, 8 tokens, 48 layers, push", policy="push", **ep8),
        measure("the same on 8 H200, ticket", policy="ticket", machine="h200", routing=ep8["routing"]),
        measure("one layer, EP 8, SimPy engine", repeats=1, engine="simpy", **one_layer),
        measure("one layer, EP 8, native engine", **one_layer),
    ]
    for num_layers, num_tasks in ((1, "10^3"), (6, "10^5"), (57, "10^6"), (570, "10^7")):
        small = {"workers": 38, "tiling": WIDE, "routing": routings(1, 8, 1)} if num_layers == 1 else {}
        arguments = {"machine": "mi300x", "routing": routings(num_layers, 8, 8), **small}
        rows.append(measure(f"about {num_tasks} tasks, static_phase", repeats=2, **arguments))
    memory = {f"{layers} layers": peak_mb(layers) for layers in (8, 48, 480)}

    table = Table("case", "tasks", "time", "tasks/s", "bare loop / engine")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        speed = f"{row['tasks_per_s'] / 1e6:.2f} M"
        table.add_row(row["case"], f"{row['tasks']:,}", f"{row['ms']:.1f} ms", speed, f"{row['bare_loop_ratio']:.1f}")
    console = Console()
    console.print(table)
    simpy, native = (row for row in rows if row["case"].startswith("one layer"))
    ratio = native["tasks_per_s"] / simpy["tasks_per_s"]
    console.print(f"native over SimPy, the same layer with its set-up: {ratio:.0f}")
    console.print("peak memory [MB]: " + ", ".join(f"{name} {mb:.0f}" for name, mb in memory.items()))
    if out is not None:
        result = {**stamp(), "host": platform.processor() or platform.machine(), "rows": rows, "peak_mb": memory}
        out.write_text(json.dumps({**result, "native_over_simpy": ratio}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
