"""Points in many processes: whatever becomes of a process, every point has one row."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed
import pytest
from distributed import KilledWorker, LocalCluster
from fatal_points import FatalPoint

from flashmoe import points, pool
from flashmoe.points import Point, resolve
from flashmoe.pool import on_cores, on_dask

TINY = {"model.d_model": 64, "model.d_ff": 32, "model.num_experts": 8, "model.top_k": 2, "ep": 2, "workers": 4}


def tiny_points(number: int) -> list[Point]:
    return [resolve({**TINY, "seed": seed, "tokens": 2}) for seed in range(number)]


def fatal(point: Point, folder: Path, times: int) -> FatalPoint:
    inputs = {**point.inputs, "counter": str(folder / point.digest), "times": times}
    return FatalPoint(inputs, point.model, point.machine, point.policy, point.recorded)


def errors(rows: Any) -> dict[str, str | None]:
    """Of each row; none may come twice."""
    held = [(row["digest"], row["error"]) for chunk in rows for row in chunk]
    assert len(held) == len(dict(held))
    return dict(held)


@pytest.mark.parametrize("processes", [1, 2])
def test_every_point_once(processes: int) -> None:
    points = tiny_points(40)
    assert errors(on_cores(points, processes)) == {point.digest: None for point in points}


def test_a_process_that_dies_takes_no_point_with_it(tmp_path: Path) -> None:
    points = tiny_points(30)
    once = fatal(points[3], tmp_path, 1)
    always = fatal(points[20], tmp_path, 99)
    mixed = [*points[:3], once, *points[4:20], always, *points[21:]]
    found = errors(on_cores(mixed, 2))
    assert set(found) == {point.digest for point in points}
    failed = {digest: error for digest, error in found.items() if error is not None}
    assert failed == {always.digest: "its process died: a crash, or out of memory"}
    assert len((tmp_path / once.digest).read_text()) == 1
    assert len((tmp_path / always.digest).read_text()) <= 2  # beside others, then alone


def test_stopping_early_ends_the_processes() -> None:
    rows = on_cores(tiny_points(500), 2)
    next(rows)
    rows.close()
    assert children_of(os.getpid()) <= helpers()


def test_bad_numbers_of_processes() -> None:
    with pytest.raises(ValueError, match="processes=0"):
        next(on_cores(tiny_points(1), 0))
    assert list(on_cores([], 2)) == []


def children_of(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def helpers() -> set[int]:
    """Processes of multiprocessing itself: the fork server and the tracker of its resources."""
    import multiprocessing.forkserver
    import multiprocessing.resource_tracker as tracker

    return {multiprocessing.forkserver._forkserver._forkserver_pid, tracker._resource_tracker._pid}


# ---- Dask


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=logging.CRITICAL) as made:
        yield made


def test_a_worker_of_another_version(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # what the workers say cannot be changed from here, so what they are compared with is
    monkeypatch.setattr(points, "metadata", SimpleNamespace(version=lambda name: "0.0.0"))
    points.version.cache_clear()
    with pytest.raises(ValueError, match=r"worker tcp://.* has flashmoe .* \(must be 0\.0\.0, model \d+, as here\)"):
        next(on_dask(tiny_points(1), cluster.scheduler_address))
    points.version.cache_clear()


def test_a_cluster_that_loses_a_worker(cluster: Any) -> None:
    many = [resolve({"tokens": 2, "seed": seed}) for seed in range(200)]
    rows: list[Any] = []
    victim = None
    for chunk in on_dask(many, cluster.scheduler_address):
        rows += chunk
        if victim is None and len(rows) >= len(many) // 2:
            assert len(rows) < len(many)
            victim = cluster.workers[0].pid
            os.kill(victim, signal.SIGKILL)
    assert victim is not None
    assert errors([rows]) == {point.digest: None for point in many}
    here = many[-1].evaluate()
    [there] = [row for row in rows if row["digest"] == many[-1].digest]
    assert {**there, "wall_s": 0} == {**here, "wall_s": 0}


def test_what_dask_gives_up_on() -> None:
    [point] = tiny_points(1)
    killed: Future[Any] = Future()
    killed.set_exception(KilledWorker("task", SimpleNamespace(address="tcp://there"), 3))
    [row] = pool._rows_of(killed, point)
    assert row["digest"] == point.digest and row["error"].startswith("KilledWorker: ")
    gone: Future[Any] = Future()
    gone.cancel()
    with pytest.raises(OSError, match="the Dask scheduler is gone"):
        pool._rows_of(gone, point)


def test_no_scheduler_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "Client", None)  # which is not even asked: it would complain when it is deleted
    with pytest.raises(OSError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:1 \("):
        next(on_dask(tiny_points(1), "tcp://127.0.0.1:1"))
    with pytest.raises(ValueError, match=r"scheduler='nope' \(must be tcp://HOST:PORT: "):
        next(on_dask(tiny_points(1), "nope"))
