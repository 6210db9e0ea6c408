"""The two engines agree: the same records for any layer, policy and machine, the same sums, the same errors.

FLASHMOE_PARITY_EXAMPLES=10000 looks for new differences; without it the same few hundred examples are run each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sim.strategies import machines, random_layer, runs
from sim.tables import HandPolicy

from flashmoe.machine import parameter_units
from flashmoe.sim import ENGINES, DeadlockError, evaluate, simulate

MORE = int(os.environ.get("FLASHMOE_PARITY_EXAMPLES", "0"))


def parity(examples: int) -> Any:
    return settings(
        max_examples=MORE or examples,
        derandomize=not MORE,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def outcome(run: Callable[[], Any]) -> Any:
    """What a run gives, or how it fails."""
    try:
        return run()
    except (ValueError, DeadlockError) as error:
        return type(error), str(error)


def assert_same_records(expected: Any, got: Any) -> None:
    """Names the first task that differs."""
    for name in expected.dtype.names:
        differs = np.flatnonzero(expected[name] != got[name])
        if len(differs):
            row = differs[0]
            raise AssertionError(
                f"{name} of {len(differs)} tasks differs, first row {row}: {expected[row]}, {got[row]}"
            )


def times_that_count(time_ps: dict[str, int], records: Any) -> dict[str, int]:
    """What a worker waited for before two tasks without a duration, at one moment, depends on which was first.

    Records do not tell.
    """
    instant = records[records["start_ps"] == records["end_ps"]][["pe", "worker", "start_ps"]]
    if len(np.unique(instant)) == len(instant):
        return time_ps
    return {name: time_ps[name] for name in ("stream", "compute", "overhead", "send")}


def assert_same(simpy: Any, native: Any) -> None:
    """Two outcomes: the same records, or the same error."""
    if isinstance(simpy, tuple) or isinstance(native, tuple):
        assert simpy == native
    else:
        assert_same_records(simpy, native)


def test_machines_differ_in_every_parameter():
    values: dict[str, set[Any]] = {name: set() for name in parameter_units()}

    @given(machines())
    @settings(max_examples=200, derandomize=True, database=None)
    def collect(machine):
        for name, seen in values.items():
            seen.add(getattr(machine, name))

    collect()
    assert [name for name, seen in values.items() if len(seen) == 1] == ["num_cus", "num_pes_max"]


@given(runs())
@parity(300)
def test_any_run(run):
    model, arguments = run
    simpy, native = (
        outcome(lambda engine=engine: simulate(model, engine=engine, **arguments)) for engine in ("simpy", "native")
    )
    totals = outcome(lambda: evaluate(model, engine="native", **arguments))
    if isinstance(simpy, tuple):
        assert simpy == native == totals
        return
    assert not isinstance(native, tuple), native
    assert_same_records(simpy.records, native.records)
    # the sums: listed tasks through Python, through C++, and classes of tasks that were never listed
    names = ["layers", "layer_end_ps", "bounds_ps", "bound_ps", "headroom"]
    names += ["hbm_bytes", "link_bytes", "distinct_weight_bytes"]
    expected = {name: simpy.header[name] for name in names}
    assert {name: native.header[name] for name in names} == expected
    assert not isinstance(totals, tuple), totals
    assert {name: getattr(totals, name) for name in names} == expected
    assert (totals.makespan_ps, totals.num_tasks) == (simpy.makespan_ps, len(simpy.records))
    assert native.header["time_ps"] == simpy.header["time_ps"]
    assert times_that_count(totals.time_ps, simpy.records) == times_that_count(simpy.header["time_ps"], simpy.records)


@given(
    seed=st.integers(0, 10**6),
    num_pes=st.integers(1, 3),
    down=st.sampled_from(["tile", "rows"]),
    broken=st.sampled_from([0.0, 0.05, 0.3]),
    layers=st.integers(1, 2),
    machine=machines(),
    queue=st.sampled_from(["push", "ticket", "domain", "static"]),
    look_ahead=st.sampled_from([0, 1, 3, 15]),
    workers=st.integers(1, 9),
    gap_ps=st.sampled_from([None, 0, 3_000]),
)
@parity(300)
def test_any_table_even_one_that_deadlocks(
    seed, num_pes, down, broken, layers, machine, queue, look_ahead, workers, gap_ps
):
    tables = [random_layer(seed + layer, num_pes, down, broken=broken) for layer in range(layers)]
    policy = HandPolicy(queue=queue, look_ahead=look_ahead, sorts=seed % 2 == 0)
    simpy, native = (
        outcome(lambda run=run: run(tables, machine, policy, workers, gap_ps=gap_ps))
        for run in (ENGINES["simpy"], ENGINES["native"])
    )
    assert_same(simpy, native)


@given(
    seed=st.integers(0, 10**6),
    num_pes=st.integers(1, 2),
    down=st.sampled_from(["tile", "rows"]),
    machine=machines(),
    look_ahead=st.sampled_from([0, 1, 3]),
    workers=st.integers(1, 3),
    changes=st.integers(0, 2),
)
@parity(150)
def test_any_replay_even_one_that_lacks_a_task_or_runs_it_twice(
    seed, num_pes, down, machine, look_ahead, workers, changes
):
    table, rng = random_layer(seed, num_pes, down), np.random.default_rng(seed)
    lists: list[list[list[int]]] = []
    for ids in HandPolicy().picks(table):
        shuffled = rng.permutation(ids).tolist() if rng.random() < 0.2 else list(ids)
        for _ in range(changes if shuffled else 0):
            shuffled[int(rng.integers(len(shuffled)))] = shuffled[int(rng.integers(len(shuffled)))]
        lists.append([shuffled[worker::workers] for worker in range(workers)])
    policy = HandPolicy(queue="replay", look_ahead=look_ahead)
    simpy, native = (
        outcome(lambda run=run: run(table, machine, policy, workers, lists))
        for run in (ENGINES["simpy"], ENGINES["native"])
    )
    assert_same(simpy, native)
