"""The files are read back by code that knows nothing of the writer, with decimals kept exact."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from traces import layer_trace, make_trace

from flashmoe.chrome import write_chrome
from flashmoe.trace import TRACE_DTYPE, Trace

Event = dict[str, Any]


def written(traces: Trace | list[Trace], tmp_path: Path) -> list[Event]:
    path = tmp_path / "t.json"
    write_chrome(traces, path)
    document = json.loads(path.read_text(), parse_float=Decimal)
    events: list[Event] = document["traceEvents"]
    return events


def ns(time_us: Decimal) -> int:
    whole = time_us * 1000
    assert whole == int(whole), f"{time_us} us is not a whole number of ns"
    return int(whole)


def slices_by_track(events: list[Event]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            begin = ns(event["ts"])
            tracks[event["pid"], event["tid"]].append((begin, begin + ns(event["dur"])))
    return {track: sorted(slices) for track, slices in tracks.items()}


def assert_disjoint(events: list[Event]) -> None:
    for track, slices in slices_by_track(events).items():
        assert all(begin < end for begin, end in slices), track
        assert all(before[1] <= after[0] for before, after in pairwise(slices)), track


def assert_flows_bind(events: list[Event]) -> int:
    tracks = slices_by_track(events)
    flows: dict[int, dict[str, int]] = defaultdict(dict)
    for event in events:
        if event["ph"] in "sf":
            time = ns(event["ts"])
            assert sum(begin <= time < end for begin, end in tracks[event["pid"], event["tid"]]) == 1
            assert event["ph"] == "s" or event["bp"] == "e"
            flows[event["id"]][event["ph"]] = time
    for times in flows.values():
        assert times["s"] <= times["f"]
    return len(flows)


def tasks(events: list[Event]) -> list[Event]:
    return [event for event in events if event.get("cat") == "task"]


def test_a_layer_is_disjoint_and_its_flows_bind(tmp_path: Path) -> None:
    trace = layer_trace(ep_size=2, num_workers=9, num_domains=3)
    events = written(trace, tmp_path)
    assert_disjoint(events)
    assert assert_flows_bind(events) == len(trace.critical_path) - 1
    written_ids = [(event["pid"], event["args"]["task_id"]) for event in tasks(events)]
    assert sorted(written_ids) == sorted(zip(trace.records["pe"], trace.records["task_id"], strict=True))


def test_times_that_floats_would_round(tmp_path: Path) -> None:
    # back to back at a time where 0.1 µs is no longer exact in a float's last digits, and at odd picoseconds
    far = 10**16
    trace = make_trace(
        [
            {"start_ps": far + 1_999, "end_ps": far + 100_999},
            {"start_ps": far + 100_999, "end_ps": far + 200_001, "ticket_ps": far + 100_999},
        ]
    )
    first, second = tasks(written(trace, tmp_path))
    assert ns(first["ts"]) == far // 1000 + 1
    assert ns(first["ts"]) + ns(first["dur"]) == ns(second["ts"]) == far // 1000 + 100
    assert ns(second["dur"]) == 100


def test_a_slice_says_what_the_task_is(tmp_path: Path) -> None:
    trace = make_trace(
        [
            {
                "layer": 1, "kind": "down", "task_id": 17, "worker": 3, "expert": 5, "tile": 2, "num_tokens": 9,
                "ready_ps": 4_000, "ticket_ps": 9_000, "start_ps": 9_000, "end_ps": 1_234_567,
            }
        ]
    )  # fmt: skip
    [event] = tasks(written(trace, tmp_path))
    assert (event["ph"], event["name"], event["pid"], event["tid"]) == ("X", "down", 0, 3)
    assert (event["ts"], event["dur"]) == (Decimal("0.009"), Decimal("1.225"))
    assert event["args"] == {
        "layer": 1, "task_id": 17, "kind": "down", "expert": 5, "tile": 2, "num_tokens": 9, "ready_ns": 4,
        "ticket_ns": 9,
    }  # fmt: skip


def test_a_long_wait_is_a_slice_of_its_own(tmp_path: Path) -> None:
    trace = make_trace(
        [
            {"end_ps": 1_000_000},
            # taken at 0.2 µs, but the worker was busy until 1 µs: waits 1..3 µs
            {"ticket_ps": 200_000, "ready_ps": 3_000_000, "start_ps": 3_000_000, "end_ps": 4_000_000},
            # 99 ns are not worth a slice
            {"ticket_ps": 4_000_000, "start_ps": 4_099_000, "end_ps": 5_000_000},
        ]
    )
    events = written(trace, tmp_path)
    assert_disjoint(events)
    [wait] = [event for event in events if event["name"] == "wait"]
    assert (ns(wait["ts"]), ns(wait["dur"])) == (1_000, 2_000)
    assert wait["args"] == {"layer": 0, "task_id": 1, "for": "up"}


def test_tasks_without_a_nanosecond(tmp_path: Path) -> None:
    trace = make_trace(
        [
            {"start_ps": 5_100, "end_ps": 5_200},  # alone in its ns: gets all of it
            {"start_ps": 9_000, "end_ps": 9_000},  # shares its ns with the next: an instant
            {"start_ps": 9_000, "end_ps": 12_000},
        ],
        critical_path=[0, 1, 2],
    )
    events = written(trace, tmp_path)
    assert_disjoint(events)
    assert assert_flows_bind(events) == 1  # from task 0 to task 2
    assert [(e["ph"], ns(e["ts"]), e.get("dur")) for e in tasks(events)] == [
        ("X", 5, Decimal("0.001")),
        ("i", 9, None),
        ("X", 9, Decimal("0.003")),
    ]
    assert [e["s"] for e in events if e["ph"] == "i"] == ["p"]


def test_overlapping_tasks_are_clamped_and_say_so(tmp_path: Path) -> None:
    trace = make_trace([{"end_ps": 100_000}, {"start_ps": 60_000, "end_ps": 120_000}])
    first, second = tasks(written(trace, tmp_path))
    assert (ns(first["dur"]), first["args"]["clamped_ns"]) == (60, 40)
    assert (ns(second["ts"]), ns(second["dur"])) == (60, 60)
    assert "clamped_ns" not in second["args"]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_records_slices_stay_disjoint(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    records = np.zeros(400, TRACE_DTYPE)
    records["task_id"] = np.arange(400)
    records["pe"] = rng.integers(0, 2, 400)
    records["worker"] = rng.integers(0, 3, 400)
    records["start_ps"] = rng.integers(0, 900_000, 400)
    records["end_ps"] = records["start_ps"] + rng.choice([0, 1, 500, 1_000, 40_000, 300_000], 400)
    records["ticket_ps"] = records["start_ps"] - rng.integers(0, 400_000, 400)
    header = make_trace([], ep_size=2, num_workers=3).header
    path = rng.permutation(400)[:100].astype(np.int64)
    events = written(Trace(records, header, path), tmp_path)
    assert_disjoint(events)
    assert_flows_bind(events)
    assert len(tasks(events)) == 400


def test_names_and_order_of_tracks(tmp_path: Path) -> None:
    trace = make_trace(
        [{"worker": w, "domain": w % 2, "end_ps": 1_000} for w in range(4)], num_domains=2, num_workers=4
    )
    metadata = [event for event in written(trace, tmp_path) if event["ph"] == "M"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in metadata if e["name"] == "thread_name"}
    assert names[0, 3] == "worker 3, XCD 1"
    assert [e["args"]["name"] for e in metadata if e["name"] == "process_name"] == ["PE 0 (simulated, mi300x)"]
    order = {e["tid"]: e["args"]["sort_index"] for e in metadata if e["name"] == "thread_sort_index"}
    assert sorted(order, key=lambda tid: order[tid]) == [0, 2, 1, 3]  # XCD 0, then XCD 1


def test_one_domain_is_not_named(tmp_path: Path) -> None:
    names = [e["args"]["name"] for e in written(make_trace([]), tmp_path) if e["name"] == "thread_name"]
    assert names == ["worker 0", "worker 1", "worker 2", "worker 3"]


def test_two_traces_in_one_file(tmp_path: Path) -> None:
    simulated = layer_trace(ep_size=2, num_workers=4)
    measured = layer_trace(ep_size=2, num_workers=4, seed=1, executor="cpu", machine="host")
    events = written([simulated, measured], tmp_path)
    assert_disjoint(events)
    num_flows = len(simulated.critical_path) + len(measured.critical_path) - 2
    assert assert_flows_bind(events) == num_flows  # no id is used twice
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {
        0: "PE 0 (simulated, mi300x)",
        1: "PE 1 (simulated, mi300x)",
        100: "PE 0 (measured, host)",
        101: "PE 1 (measured, host)",
    }
    order = {e["pid"]: e["args"]["sort_index"] for e in events if e["name"] == "process_sort_index"}
    assert sorted(order, key=lambda pid: order[pid]) == [0, 100, 1, 101]
    assert len(tasks(events)) == len(simulated.records) + len(measured.records)


def test_hbm_counter_by_hand(tmp_path: Path) -> None:
    # 500 steps of 2 ns; 5000 bytes over the first 500 ns are 10 bytes a ns
    trace = make_trace([{"end_ps": 500_000, "hbm_bytes": 5_000}, {"worker": 1, "end_ps": 1_000_000}])
    counter = [e for e in written(trace, tmp_path) if e["ph"] == "C"]
    assert {e["name"] for e in counter} == {"HBM"}
    values = {ns(e["ts"]): float(e["args"]["GB/s"]) for e in counter}
    assert (values[0], values[498], values[500], values[1_000]) == (10.0, 10.0, 0.0, 0.0)
    write_chrome(trace, tmp_path / "plain.json", counters=False)
    assert '"ph":"C"' not in (tmp_path / "plain.json").read_text()


def test_gzip_by_name_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    trace = layer_trace(ep_size=1, num_workers=4)
    for name in ("a.json", "a.json.gz", "b.json.gz"):
        write_chrome(trace, tmp_path / name)
    assert gzip.decompress((tmp_path / "a.json.gz").read_bytes()) == (tmp_path / "a.json").read_bytes()
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()


def test_the_header_goes_along(tmp_path: Path) -> None:
    trace = make_trace([])
    write_chrome(trace, tmp_path / "t.json")
    document = json.loads((tmp_path / "t.json").read_text())
    assert document["otherData"]["flashmoe_headers"] == [trace.header]


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"t\.txt: unknown suffix .accepted: \.json, \.json\.gz"):
        write_chrome(make_trace([]), tmp_path / "t.txt")
    with pytest.raises(ValueError, match="traces is empty"):
        write_chrome([], tmp_path / "t.json")
