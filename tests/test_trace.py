from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from traces import layer_trace, make_trace

from flashmoe.trace import KINDS, TRACE_DTYPE, TRACE_FORMAT, Trace


def two_workers() -> Trace:
    """Worker 0 runs 0..400 and 600..1000; worker 1 runs 100..300 [ps]. 1000 ps in all."""
    return make_trace(
        [
            {"worker": 0, "start_ps": 0, "end_ps": 400, "hbm_bytes": 800},
            # taken at 200 while task 0 ran (look-ahead), waited for from 400 on
            {"worker": 0, "ticket_ps": 200, "ready_ps": 600, "start_ps": 600, "end_ps": 1000, "kind": "down"},
            {"worker": 1, "ticket_ps": 50, "start_ps": 100, "end_ps": 300, "hbm_bytes": 100},
        ],
        num_workers=2,
    )


def test_times_by_hand() -> None:
    trace = two_workers()
    assert trace.makespan_ps == 1000
    assert trace.makespan_us == 0.001
    assert trace.duration_ps.tolist() == [400, 400, 200]
    assert trace.busy_ps.tolist() == [1000]
    assert trace.utilisation() == 1000 / 2000
    assert trace.kind_names.tolist() == ["up", "down", "up"]


def test_waiting_starts_when_the_worker_has_nothing_else_to_run() -> None:
    # task 0 never waited; task 1 since the end of task 0, not since its ticket; task 2 since its ticket
    assert two_workers().idle_since_ps.tolist() == [0, 400, 50]


def test_spread_by_hand() -> None:
    trace = two_workers()
    # 0..200: half of 800 and half of 100; 200..400: the other halves; then nothing
    assert trace.spread(trace.records["hbm_bytes"], np.array([0, 200, 400, 1000])).tolist() == [[450, 450, 0]]
    busy_ps = trace.spread(trace.duration_ps, np.array([0, 100, 300, 600, 1000]))
    assert busy_ps.tolist() == [[100, 400, 100, 400]]


def test_spread_loses_nothing_and_keeps_pes_apart() -> None:
    trace = layer_trace(ep_size=3, num_workers=7, num_domains=2)
    spread = trace.spread(trace.records["hbm_bytes"], np.linspace(0, trace.makespan_ps, 57))
    for pe in range(3):
        expected = int(trace.records["hbm_bytes"][trace.records["pe"] == pe].sum())
        assert spread[pe].sum() == pytest.approx(expected, rel=1e-9)


def test_bytes_of_a_task_without_duration_are_counted() -> None:
    trace = make_trace([{"start_ps": 50, "end_ps": 50, "hbm_bytes": 7}, {"start_ps": 0, "end_ps": 100}])
    assert trace.spread(trace.records["hbm_bytes"], np.array([0, 40, 100])).tolist() == [[0, 7]]


def test_a_trace_without_tasks() -> None:
    trace = make_trace([])
    assert (trace.makespan_ps, trace.utilisation(), trace.busy_ps.tolist()) == (0, 0.0, [0])
    assert trace.idle_since_ps.tolist() == []
    assert trace.spread(trace.records["hbm_bytes"], np.array([0, 1])).tolist() == [[0]]


def test_domains_of_workers_come_from_the_records() -> None:
    # worker 1 was placed on XCD 0; workers 0 and 2 ran nothing, so the rule worker % num_domains stands
    trace = make_trace([{"worker": 1, "domain": 0, "end_ps": 1}], num_workers=3, num_domains=2)
    assert trace.worker_domains().tolist() == [[0, 0, 0]]


def test_more_domains_than_workers() -> None:
    assert make_trace([], num_workers=2, num_domains=8).num_domains == 2


@pytest.mark.parametrize("name", ["t.npz", "no_suffix", "t.trace"])
def test_round_trip_is_exact(tmp_path: Path, name: str) -> None:
    extremes: dict[str, Any] = {
        "worker": 3, "expert": -1, "peer": 5, "flags": 2**32 - 1, "hbm_bytes": 2**64 - 1,
        "link_bytes": 2**53 + 1, "ready_ps": -7, "start_ps": 2**62, "end_ps": 2**62 + 1,
        "kind": "expert", "task_id": 2**32 - 1,
    }  # fmt: skip
    trace = make_trace([extremes, {"end_ps": 5}], [1, 0], bounds_ps={"hbm": 0.1 + 0.2}, machine="µ-machine", drops=None)
    trace.save(tmp_path / name)
    loaded = Trace.load(tmp_path / name)
    assert loaded.records.dtype == TRACE_DTYPE
    assert loaded.records.tobytes() == trace.records.tobytes()
    assert loaded.critical_path.tolist() == [1, 0]
    assert loaded.header == trace.header
    assert loaded.header["format"] == TRACE_FORMAT
    assert loaded.header["bounds_ps"]["hbm"] == 0.1 + 0.2


def test_tuples_in_a_header_are_lists_from_the_start() -> None:
    assert make_trace([], num_tokens=(1, 2)).header["num_tokens"] == [1, 2]


def test_records_cannot_be_changed_in_place_but_the_callers_can() -> None:
    records = np.zeros(1, TRACE_DTYPE)
    trace = Trace(records, make_trace([]).header, np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="read-only"):
        trace.records["end_ps"] = 1
    records["end_ps"] = 1


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with pytest.raises(ValueError, match=r"x\.npz: no such file"):
        Trace.load(path)
    path.write_text("not a zip")
    with pytest.raises(ValueError, match=r"x\.npz: not a flashmoe trace"):
        Trace.load(path)
    with pytest.raises(ValueError, match="no such file"):
        Trace.load(tmp_path)
    np.savez(path, records=np.zeros(1, TRACE_DTYPE))
    with pytest.raises(ValueError, match=r"not a flashmoe trace \(it lacks critical_path, header"):
        Trace.load(path)

    def save_with(header: str, dtype: Any = TRACE_DTYPE) -> None:
        np.savez(path, records=np.zeros(1, dtype), critical_path=np.zeros(0, np.int64), header=np.array(header))

    header = make_trace([]).header
    save_with("{")
    with pytest.raises(ValueError, match="not a flashmoe trace"):
        Trace.load(path)
    save_with(json.dumps({"executor": "simpy"}))
    with pytest.raises(ValueError, match="names no format"):
        Trace.load(path)
    save_with(json.dumps({**header, "format": 1}))
    with pytest.raises(ValueError, match=r"x\.npz: trace format 1 .*format 2"):
        Trace.load(path)
    save_with(json.dumps(header), dtype=[("pe", "u2")])
    with pytest.raises(ValueError, match=r"x\.npz: trace records are 1-d of .*'pe'"):
        Trace.load(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    layer_trace(ep_size=1, num_workers=4).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a flashmoe trace"):
        Trace.load(path)
    broken = bytearray(whole)
    broken[len(whole) // 4] ^= 0xFF
    path.write_bytes(bytes(broken))
    with pytest.raises(ValueError, match="not a flashmoe trace"):
        Trace.load(path)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"pe": 1}, "task 0 of PE 1 has pe=1 .must be below ep_size=1"),
        ({"worker": 4}, "worker=4 .must be below 4"),
        ({"start_ps": -5}, "start_ps=-5 .*0 or more"),
        ({"start_ps": 5, "end_ps": 4}, "end_ps=4 .must not be before start_ps"),
    ],
)
def test_a_record_that_cannot_be_is_named(task: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trace([task])


def test_an_unknown_kind_is_refused() -> None:
    records = np.zeros(1, TRACE_DTYPE)
    records["kind"] = 7
    with pytest.raises(ValueError, match=r"kind=7 .must be below 7: gate, route"):
        Trace(records, make_trace([]).header, np.zeros(0, np.int64))


def test_headers_that_do_not_fit_are_refused() -> None:
    records, path = np.zeros(0, TRACE_DTYPE), np.zeros(0, np.int64)
    with pytest.raises(ValueError, match="lacks num_workers, num_domains"):
        Trace(records, {"executor": "cpu", "ep_size": 1}, path)
    with pytest.raises(ValueError, match="ep_size=0"):
        make_trace([], ep_size=0)
    with pytest.raises(ValueError, match=r"seed=.*not JSON"):
        make_trace([], seed=np.int64(3))
    with pytest.raises(ValueError, match=r"headroom=nan .not JSON"):
        make_trace([], headroom=float("nan"))
    with pytest.raises(ValueError, match=r"critical_path holds 1 .must index one of 1 records"):
        make_trace([{"end_ps": 1}], [0, 1])


def test_describe_says_what_was_run() -> None:
    assert make_trace([]).describe() == (
        "simulated (simpy), mi300x, qwen3-30b-a3b, policy static_phase, 8 tokens per PE, EP 1, seed 0"
    )
    measured = make_trace([], executor="cpu", machine="host", ep_size=2, num_tokens=[0, 1])
    assert measured.describe() == (
        "measured (cpu), host, qwen3-30b-a3b, policy static_phase, 0 to 1 token per PE, EP 2, seed 0"
    )


def test_to_pandas_names_the_kinds() -> None:
    pytest.importorskip("pandas")
    trace = two_workers()
    frame = trace.to_pandas()
    assert frame["kind"].tolist() == ["up", "down", "up"]
    assert list(frame["kind"].cat.categories) == list(KINDS)
    assert frame["end_ps"].tolist() == [400, 1000, 300]
    assert frame.attrs["header"] == trace.header


def test_to_pandas_without_pandas_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        two_workers().to_pandas()
