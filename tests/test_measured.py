"""Measured layers on disk: what comes back is what was written, in few bytes."""

from pathlib import Path

import numpy as np
import pytest

import flashmoe as fm
from flashmoe.measured import MeasuredLayer

TRACES = sorted((Path(__file__).parents[1] / "results" / "2026-11-27-h200-validation" / "traces").glob("*.npz"))
MODEL = fm.MoEModel(d_model=64, d_ff=48, num_experts=8, top_k=2)


def simulated(seed=0, ep_size=1):
    routing = fm.Routing.zipf(MODEL, 5, ep_size, seed=1)
    trace = fm.simulate(MODEL, machine="h200", routing=routing, policy="ticket", workers=3, seed=seed)
    return trace, routing


@pytest.mark.parametrize("path", TRACES[:: max(1, len(TRACES) // 6)], ids=lambda path: path.stem)
def test_what_is_written_again_is_the_same(tmp_path, path):
    layer = MeasuredLayer.load(path)
    layer.save(tmp_path / "again.npz")
    again = MeasuredLayer.load(tmp_path / "again.npz")
    assert np.array_equal(np.sort(again.trace.records), np.sort(layer.trace.records))
    assert again.trace.header | {"date": ""} == layer.trace.header | {"date": ""}
    assert again.routing.digest == layer.routing.digest
    assert np.array_equal(again.makespan_us, layer.makespan_us)
    assert path.stat().st_size < 7 * len(layer.trace.records)  # bytes a task


def test_times_are_kept_in_whole_nanoseconds(tmp_path):
    trace, routing = simulated()
    MeasuredLayer(trace, routing, np.array([trace.makespan_us])).save(tmp_path / "layer.npz")
    records = np.sort(MeasuredLayer.load(tmp_path / "layer.npz").trace.records, order="task_id")
    expected = np.sort(trace.records, order="task_id")
    for name in ("start_ps", "end_ps", "ticket_ps"):
        assert (np.abs(records[name] - expected[name]) < 1_000).all()
    for name in ("task_id", "kind", "worker", "expert", "tile", "hbm_bytes"):
        assert np.array_equal(records[name], expected[name])


def test_of_several_launches_the_middle_one_is_kept():
    traces = [simulated(seed)[0] for seed in range(5)]
    layer = MeasuredLayer.of(traces, simulated()[1])
    assert layer.trace.makespan_us == np.median([trace.makespan_us for trace in traces])
    assert layer.makespan_us.tolist() == [trace.makespan_us for trace in traces]
    assert (layer.policy.name, len(layer.table)) == ("ticket", len(traces[0].records))


def test_other_files_and_other_traces_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.npz: not a measured layer"):
        MeasuredLayer.load(tmp_path / "nothing.npz")
    trace, routing = simulated()
    trace.save(tmp_path / "trace.npz")
    with pytest.raises(ValueError, match=r"trace\.npz: not a measured layer"):
        MeasuredLayer.load(tmp_path / "trace.npz")
    two, routing = simulated(ep_size=2)
    with pytest.raises(ValueError, match="trace of 2 PEs"):
        MeasuredLayer(two, routing, np.zeros(1)).save(tmp_path / "two.npz")
