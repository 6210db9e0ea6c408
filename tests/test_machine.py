"""Machines: presets, files, and what is refused."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from flashmoe.machine import Machine, parameter_meanings, parameter_units, preset_names
from flashmoe.sim.effects import without
from flashmoe.sim.parameters import resolve

ROOT = Path(__file__).parents[1]
CALIBRATION = ROOT / "results" / "2026-11-27-h200-validation" / "calibration"
PRESETS = ("b200", "h100", "h200", "mi300x", "mi325x", "mi355x")


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_of_a_preset_has_a_unit_an_origin_and_a_source(name):
    machine = Machine.load(name)
    assert machine.name == name
    assert str(machine.num_cus) in machine.description
    assert parameter_units().keys() == parameter_meanings().keys()
    assert machine.origins.keys() == parameter_units().keys() - {"num_cores", "slice_ps"}  # a host of threads has these
    for key, (unit, origin, source) in machine.origins.items():
        assert unit == parameter_units()[key]
        assert origin in ("measured", "datasheet", "estimate", "fitted")
        assert len(source) > 9


def test_presets_are_named():
    assert preset_names() == PRESETS


# CUs, HBM at its peak, bf16 at its peak, one link and all links of a PE at their peaks: data sheets
PEAKS = {
    "mi300x": (304, 5300, 1307e3, 64, 448),
    "mi325x": (304, 6000, 1307e3, 64, 448),
    "mi355x": (256, 8000, 2517e3, 76.8, 537.6),
    "h100": (132, 3350, 989e3, 450, 450),
    "h200": (132, 4800, 989e3, 450, 450),
    "b200": (148, 8000, 2250e3, 900, 900),
}


@pytest.mark.parametrize("name", PRESETS)
def test_achieved_rates_are_a_good_part_of_the_peaks(name):
    machine = Machine.preset(name)
    num_cus, hbm, flops, link, links = PEAKS[name]
    assert machine.num_cus == num_cus
    assert 0.75 < machine.hbm_bytes_per_ns / hbm < 1.02  # h200: 3201 MHz x 6144 bit are 4917
    # h200: warp-wide instructions on 16 tokens, which do not reach what large products do
    assert 0.4 < machine.num_cus * machine.cu_flops_per_ns / flops < 0.8
    assert 0.7 < machine.link_bytes_per_ns / link < 1
    assert machine.port_bytes_per_ns <= links
    # few CUs do not saturate the memory, and all of them do
    assert 0.2 < machine.hbm_bytes_per_ns / machine.num_cus / machine.cu_bytes_per_ns < 0.7


def test_few_and_many_sms_of_an_h200_stream_as_fast_as_was_measured():
    results = json.loads((CALIBRATION / "calibrate.json").read_text())["results"]
    mean_h200 = without(Machine.preset("h200"), ["pe_spread"])
    rates = resolve(mean_h200, 1, 132).rates[0] * 1000  # of each of n streams [GB/s]
    measured = {
        result["conditions"]["sms"]: result["median"]
        for result in results
        if (result["benchmark"], result["quantity"]) == ("read_bandwidth", "total")
        and result["conditions"]["slots"] == 3
    }
    assert len(measured) == 14
    for sms, total in measured.items():
        assert sms * rates[sms] == pytest.approx(total, rel=0.045)
    assert 132 * rates[132] == pytest.approx(measured[132], rel=0.001)


@pytest.mark.parametrize("name", PRESETS)
def test_the_results_that_a_preset_names_are_there(name):
    for origin in Machine.preset(name).origins.values():
        for folder in re.findall(r"results/[\w-]+", origin.source):
            assert (ROOT / folder / "README.md").is_file()


def test_what_comes_from_a_base_is_an_estimate():
    base, machine = Machine.preset("mi300x"), Machine.preset("mi325x")
    assert machine.put_ps == base.put_ps
    assert base.origins["put_ps"].origin == "measured"
    source = f"as mi300x (measured): {base.origins['put_ps'].source}"
    assert machine.origins["put_ps"] == ("ps", "estimate", source)
    assert machine.origins["cu_flops_per_ns"].origin == "measured"  # its own


def test_values_are_scaled_to_the_units_of_the_fields():
    machine = Machine.preset("mi300x")
    assert (machine.num_cus, machine.num_domains) == (304, 8)
    assert machine.ticket_far_service_ps == 190_000  # 190 ns
    assert machine.put_ps == 2_850_000
    assert machine.hbm_bytes_per_ns == 4200
    assert machine.launch_ps == 3_500_000  # 3.5 us
    assert Machine.preset("h200").ticket_service_ps == 800


def test_a_ticket_alone_costs_its_published_latency():
    for name, near_ps, far_ps in [
        ("mi300x", 116_000, 202_000),
        ("mi355x", 116_000, 202_000),
    ]:
        machine = Machine.preset(name)
        assert machine.ticket_ps + machine.ticket_service_ps == near_ps
        assert machine.ticket_far_ps + machine.ticket_far_service_ps == far_ps


def test_overhead_by_kind():
    assert Machine.preset("mi300x").overheads("route") == ((1, 1_500_000),)
    with pytest.raises(ValueError, match=r"'idle'.*kinds: gate, route, dispatch, up, down, combine, expert"):
        Machine.preset("mi300x").overheads("idle")


def test_overhead_by_size_comes_back_from_its_file(tmp_path):
    times = ((1, 500), (8, 1_000), (64, 0))
    mine = replace(Machine.preset("mi300x"), gate_overhead_ps=times)
    mine.save(tmp_path / "mine.toml")
    assert "gate_overhead_ps = { value = [[1, 0.5], [8, 1.0], [64, 0.0]]," in (tmp_path / "mine.toml").read_text()
    loaded = Machine.load(tmp_path / "mine.toml")
    assert loaded == mine
    assert loaded.overheads("gate") == times
    assert hash(loaded) == hash(mine)


@pytest.mark.parametrize(
    "times",
    [
        (),
        ((0, 5),),
        ((8, 5), (1, 5)),
        ((1, 5), (1, 6)),
        ((1, -5),),
        ((1, 0.5),),
        ((65536, 5),),
        ((1.5, 5),),
        ((1,),),
        ((1, 2, 3),),
    ],
)
def test_overheads_by_size_ascend_and_are_times(times):
    wanted = r"must be \[\[size, time\], ...\], sizes ascending in 1..65535, each time a whole number"
    with pytest.raises(ValueError, match=f"up_overhead_ps=.*{wanted}"):
        replace(Machine.preset("mi300x"), up_overhead_ps=times)


def write(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_a_file_overrides_its_base(tmp_path):
    path = write(
        tmp_path,
        'base = "mi300x"\n'
        'hbm_bytes_per_ns = { value = 5, unit = "GB/s", origin = "estimate", source = "a guess" }\n'
        'put_ps = { value = 1.5, unit = "us", origin = "measured", source = "here" }\n',
    )
    machine = Machine.load(path)
    assert (machine.name, machine.hbm_bytes_per_ns, machine.put_ps) == ("mine", 5, 1_500_000)
    assert machine.origins["put_ps"] == ("ps", "measured", "here")
    assert machine.num_cus == 304
    assert Machine.load(str(path)) == machine == Machine.load(machine)


ENTRY = '{ value = 1, unit = "GB/s", origin = "estimate", source = "x" }'


def launch(value):
    return f'base = "mi300x"\nlaunch_ps = {{ value = {value}, unit = "us", origin = "estimate", source = "x" }}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('base = "mi300x"\nhbm = 1', r"unknown machine parameter 'hbm' \(parameters: num_cus, .*base"),
        (f"hbm_bytes_per_ns = {ENTRY}", r"'mine' lacks num_cus, .*\(give them, or a base: b200, h100, .*mi355x\)"),
        (f'base = "mi300x"\nput_ps = {ENTRY}', r"put_ps has unit 'GB/s' \(accepted: ps, ns, us\)"),
        (
            'base = "mi300x"\nput_ps = 3',
            r"put_ps = 3 \(must be a table with value, unit, origin and source\)",
        ),
        (
            f'base = "mi300x"\nhbm_bytes_per_ns = {ENTRY.replace("estimate", "rumour")}',
            "origin 'rumour'.*measured, datasheet",
        ),
        (f'base = "mi300x"\nhbm_bytes_per_ns = {ENTRY.replace("1", "-1")}', "hbm_bytes_per_ns=-1 .*positive"),
        (
            f'base = "mi300x"\nnum_cus = {ENTRY.replace("1", "2.5").replace("GB/s", "count")}',
            "num_cus=2.5 .*whole number",
        ),
        (f'base = "mi300x"\nhbm_bytes_per_ns = {ENTRY.replace("1", "inf")}', "hbm_bytes_per_ns=inf .*finite number"),
        ('base = "mi300x"\nlink_topology = "mesh"', "unknown machine parameter 'link_topology' .*link_bytes_per_ns"),
        (
            f'base = "mi300x"\njitter = {ENTRY.replace("GB/s", "percent")}',
            r"jitter has unit 'percent' \(accepted: ratio\)",
        ),
        ('base = "mi300z"', r"base = 'mi300z' \(must be a preset: b200, h100, h200, mi300x"),
        ('base = "host"', r"base = 'host' \(must be a preset: b200, .*mi355x\)"),
        ('base = "mi300x"\nname = 3', r"name = 3 \(must be a text\)"),
        ("base = 3", r"base = 3 \(must be a text\)"),
        (launch("inf"), r"launch_ps=inf us \(must be a whole number, at least 0 and at most 1000000000000 \[ps\]\)"),
        (launch("nan"), r"launch_ps=nan us .*at most 1000000000000"),
        (launch("1.5e30"), r"launch_ps=1.5e\+30 us .*at most 1000000000000"),
        (launch("1.5e308"), r"launch_ps=1.5e\+308 us .*at most 1000000000000"),
        (launch("1000001"), r"launch_ps=1000001 us .*at most 1000000000000"),
        (
            'base = "mi300x"\nup_overhead_ps = { value = [1, 2], unit = "ns", origin = "estimate", source = "x" }',
            r"up_overhead_ps = \[1, 2\] \(must be a number, or \[\[size, time\], ...\]\)",
        ),
        (
            'base = "mi300x"\nput_ps = { value = [[1, 2]], unit = "ns", origin = "estimate", source = "x" }',
            r"put_ps=\[\[1, 2\]\] \(must be a whole number",
        ),
        (launch("'long'"), r"launch_ps='long' .*at most 1000000000000"),
        (launch("true"), r"launch_ps=True .*at most 1000000000000"),
        ("= 3", "'mine' is not TOML"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        Machine.load(write(tmp_path, text))


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes('description = "Größe"'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"machine file '.*mine\.toml' is not UTF-8"):
        Machine.load(path)


def test_unknown_machines_are_refused_by_name(tmp_path):
    with pytest.raises(
        ValueError, match=r"unknown machine 'mi999' \(presets: b200, .*, mi355x; or 'host', or a .toml file\)"
    ):
        Machine.load("mi999")
    with pytest.raises(ValueError, match="no machine file"):
        Machine.load(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_cus": 0}, "num_cus=0 .*at least 1"),
        ({"num_cus": 100_000}, "num_cus=100000 .*at most 65535"),
        ({"put_ps": 10**12 + 1}, "put_ps=1000000000001 .*at least 0 and at most 1000000000000 .ps"),
        ({"signal_ps": 1.5}, "signal_ps=1.5 .*whole number"),
        ({"hbm_bytes_per_ns": 0}, "hbm_bytes_per_ns=0 .*finite number, positive"),
        ({"hbm_bytes_per_ns": math.nan}, "hbm_bytes_per_ns=nan .*finite number, positive"),
        ({"port_bytes_per_ns": -1}, "port_bytes_per_ns=-1 .*at least 0 .bytes/ns"),
        ({"matrix_tokens": 0}, "matrix_tokens=0 .*at least 1"),
        ({"signal_load_factor": 0.5}, "signal_load_factor=0.5 .*at least 1"),
        ({"stall_probability": 1.5}, "stall_probability=1.5 .*at least 0 and at most 1"),
        ({"jitter": 2}, "jitter=2 .*at least 0 and at most 1"),
        ({"knee": 0.5}, "knee=0.5 .*0, or at least 1"),
        ({"signal_near_ps": 600_001}, "signal_near_ps=600001 .*signal_ps=600000"),
        ({"num_cores": 2, "pe_spread": 0.1, "prefetch": False}, "pe_spread=0.1 with num_cores > 0 .*must be 0"),
        ({"num_cores": 2, "pe_spread": 0}, "prefetch=True with num_cores > 0 .*False"),
        ({"prefetch": 1}, "prefetch=1 .*true or false"),
        ({"num_domains": 400}, "num_domains=400 .*num_cus=304"),
    ],
)
def test_bad_values_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Machine(**(Machine.preset("mi300x").to_dict() | change))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("port_bytes_per_ns", 0),
        ("knee", 0),
        ("knee", 1.5),
        ("stall_probability", 1),
        ("num_cores", 0),
        ("gap_ps", 0),
        ("num_cus", 65535),
        ("put_ps", 10**12),
    ],
)
def test_limits_are_accepted(key, value):
    assert getattr(Machine(**(Machine.preset("mi300x").to_dict() | {key: value})), key) == value


def test_the_defaults_are_a_simpler_machine():
    given = {key: value for key, value in Machine.preset("mi300x").to_dict().items() if key not in DEFAULTS}
    machine = Machine(**given)
    assert {key: getattr(machine, key) for key in DEFAULTS} == DEFAULTS


DEFAULTS = {
    "knee": 0,
    "launch_ps": 0,
    "launch_domain_ps": 0,
    "launch_step_ps": 0,
    "signal_load_factor": 1,
    "port_bytes_per_ns": 0,
    "link_message_ps": 0,
    "matrix_tokens": 1,
    "matrix_rows": 1,
    "gap_ps": 0,
    "jitter": 0,
    "stall_ps": 0,
    "stall_probability": 0,
    "pe_spread": 0,
    "num_cores": 0,
    "slice_ps": 0,
}


def test_to_dict_holds_all_that_makes_a_machine():
    machine = Machine.preset("h200")
    assert Machine(**machine.to_dict()) == machine
    assert Machine(**json.loads(json.dumps(machine.to_dict(), allow_nan=False))) == machine
