"""Points evaluated in many processes: on this machine's cores, or on a Dask cluster. None is lost with its process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from itertools import chain, islice
from typing import Any

from flashmoe.points import Point, version

Row = dict[str, Any]
Rows = Generator[list[Row], None, None]

_CHUNK_S = 0.2  # of work sent to a process at a time: long beside the sending, short for whoever watches
_MOST_POINTS = 64  # of a chunk
_RETRIES = 3  # of a Dask task that raises, or whose worker is gone: Dask's own allowance for the latter
_CONNECT_S = 10  # until a scheduler answers
_PATIENCE_S = 30  # until it has a worker


def on_cores(points: Sequence[Point], processes: int | None = None) -> Rows:
    """Evaluate points on this machine; yields their rows as they come, in any order.

    processes: by default as many as this process may use cores; 1: in this process, and a crash is its own.
    The points under way when a process dies are tried again one by one; one that kills its process then has an error.
    Raises: ValueError naming a bad number of processes.
    """
    if processes is None:
        processes = len(os.sched_getaffinity(0))
    if processes < 1:
        raise ValueError(f"processes={processes} (must be at least 1)")
    if processes == 1 or not points:
        for point in points:
            yield [point.evaluate()]
        return
    waiting = iter(points)
    while lost := (yield from _until_one_dies(waiting, processes)):
        yield from _one_by_one(lost)


def _until_one_dies(waiting: Iterator[Point], processes: int) -> Generator[list[Row], None, list[Point]]:
    """Returns: the points that were under way when a process died; none when all are done."""
    running: dict[Future[list[Row]], list[Point]] = {}
    lost: list[Point] = []
    size = 1  # of a chunk
    pool = _new_pool(processes)
    try:
        while True:
            # for each process a chunk to work on, and one that it will not have to wait for
            while not lost and len(running) < 2 * processes and (chunk := list(islice(waiting, size))):
                running[_submit(pool, chunk)] = chunk
            if not running:
                return lost
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                chunk = running.pop(future)
                try:
                    rows = future.result()
                except BrokenProcessPool:
                    lost += chunk
                    continue
                yield rows
                size = int(_CHUNK_S * len(rows) / max(sum(row["wall_s"] for row in rows), 1e-9))
                size = min(max(size, 1), _MOST_POINTS)
    finally:
        pool.shutdown(cancel_futures=True)


def _one_by_one(points: Sequence[Point]) -> Rows:
    pool = None
    try:
        for point in points:
            pool = pool or _new_pool(1)
            try:
                yield _submit(pool, [point]).result()
            except BrokenProcessPool:
                pool.shutdown()
                pool = None
                yield [{**point.row, "error": "its process died: a crash, or out of memory", "wall_s": None}]
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, points: Sequence[Point]) -> Future[list[Row]]:
    try:
        return pool.submit(_evaluate_all, points)
    except BrokenProcessPool as error:
        future: Future[list[Row]] = Future()
        future.set_exception(error)
        return future


def _new_pool(processes: int) -> ProcessPoolExecutor:
    # not a fork of this process, whose threads (a progress bar's) may hold locks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flashmoe.points"])
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker)
    try:
        pool.submit(os.getpid).result()
    except BrokenProcessPool:
        raise RuntimeError(
            "worker processes end as soon as they start; a script must keep its own calls under "
            "if __name__ == '__main__': for they import it, too"
        ) from None
    return pool


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that hands out the points
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # else a killed parent would leave workers that wait for it forever


def _evaluate_all(points: Sequence[Point]) -> list[Row]:
    return [point.evaluate() for point in points]


def on_dask(points: Sequence[Point], scheduler: str) -> Rows:
    """Evaluate points on the workers of a Dask cluster; yields their rows as they come, in any order.

    scheduler: its address, tcp://HOST:PORT or HOST:PORT. The workers need this version of flashmoe; when one is lost,
    the others take over its points.
    Raises: ImportError without Dask; OSError when no scheduler answers there or it has no worker; ValueError when it
    is no such address or a worker has another version.
    """
    try:
        distributed: Any = import_module("distributed")
    except ImportError as error:
        raise ImportError("a Dask scheduler needs Dask: pip install 'flashmoe[distributed]'") from error
    _check_answers(scheduler)
    waiting = iter(points)
    with distributed.Client(scheduler, timeout=_CONNECT_S, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=_PATIENCE_S)
        for worker, theirs in client.run(version).items():
            if theirs != version():
                raise ValueError(f"worker {worker} has flashmoe {theirs} (must be {version()}, as here)")
        under_way: dict[str, Point] = {}

        def submit(number: int) -> list[Any]:
            futures = []
            for point in islice(waiting, number):
                future = client.submit(_evaluate_all, [point], key=f"flashmoe-{point.digest}", retries=_RETRIES)
                under_way[future.key] = point
                futures.append(future)
            return futures

        # enough for every thread to have the next points at hand, not so many that the scheduler holds them all
        first = submit(max(64, 8 * sum(client.nthreads().values())))
        for batch in (finished := distributed.as_completed(first, loop=client.loop)).batches():
            yield list(chain.from_iterable(_rows_of(future, under_way.pop(future.key)) for future in batch))
            finished.update(submit(len(batch)))


def _check_answers(scheduler: str) -> None:
    """Raise before Dask does: a client that found nobody complains once more, a minute later, when it is deleted."""
    comm: Any = import_module("distributed.comm")
    try:
        host, port = comm.get_address_host_port(scheduler)
    except ValueError as error:
        raise ValueError(f"scheduler={scheduler!r} (must be tcp://HOST:PORT: {error})") from None
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ConnectionError(f"no Dask scheduler answers at {scheduler} ({error})") from error


def _rows_of(future: Any, point: Point) -> list[Row]:
    """Of a Dask task that is done; if its worker has gone with the result, waits until another has made it again."""
    try:
        rows: list[Row] = future.result()
        return rows
    except CancelledError:
        raise ConnectionError("the Dask scheduler is gone, or has cancelled the work") from None
    except Exception as problem:  # the task killed every worker that had it, for one
        return [{**point.row, "error": f"{type(problem).__name__}: {problem}", "wall_s": None}]
