"""Schedules and durations of two traces, put together again."""

import numpy as np
import pytest

import flashmoe as fm
from flashmoe.blame import Replayable, blame
from flashmoe.tasks import TaskTable

MODEL = fm.MoEModel(d_model=64, d_ff=48, num_experts=8, top_k=2)


def simulated(policy, seed=0, **options):
    routing = fm.Routing.zipf(MODEL, [5, 3], 2, seed=1)
    trace = fm.simulate(MODEL, machine="mi300x", routing=routing, policy=policy, workers=3, seed=seed, **options)
    return TaskTable(MODEL, routing, fm.Tiling(**trace.header["tiling"])), trace


@pytest.mark.parametrize("policy", ["ticket", "domain_steal", "static_phase", "push", "ancestor"])
def test_a_trace_gives_back_its_own_makespan(policy):
    table, trace = simulated(policy)
    replayable = Replayable(table, trace)
    assert replayable.makespan_ps(replayable.duration_ps) == trace.makespan_ps
    assert (replayable.duration_ps >= 0).all()


def test_longer_tasks_take_longer():
    table, trace = simulated("ticket")
    replayable = Replayable(table, trace)
    assert replayable.makespan_ps(2 * replayable.duration_ps) == 2 * trace.makespan_ps
    assert replayable.makespan_ps(0 * replayable.duration_ps) == 0


def test_both_parts_add_up_to_the_error():
    table, here = simulated("ticket", seed=1)
    _, there = simulated("static_phase", seed=2)
    found = blame(table, here, there)
    assert found.error_us == pytest.approx(here.makespan_us - there.makespan_us)
    assert found.durations_us + found.schedule_us == pytest.approx(found.error_us)
    assert found.by_kind.keys() == {"gate", "route", "dispatch", "up", "down", "combine"}


def test_with_the_same_schedule_durations_have_all_the_blame():
    table, here = simulated("static_phase", seed=1)
    _, there = simulated("static_phase", seed=1, without=["overhead"])
    found = blame(table, here, there)
    assert found.schedule_us == 0
    assert found.durations_us == found.error_us > 0


def test_with_itself_nothing_is_to_blame():
    table, trace = simulated("ticket")
    found = blame(table, trace, trace)
    assert (found.error_us, found.durations_us, found.schedule_us) == (0, 0, 0)
    assert set(found.by_kind.values()) == {0}


def test_an_incomplete_trace_is_refused():
    table, trace = simulated("ticket")
    partial = fm.Trace(trace.records[1:], trace.header, np.zeros(0, np.int64))
    with pytest.raises(ValueError, match=r"must be the \d+ of the table, each once"):
        Replayable(table, partial)
