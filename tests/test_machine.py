"""Machines: presets, files, and what is refused."""

import pytest

from flashmoe.machine import Machine, parameter_meanings, parameter_units, preset_names


@pytest.mark.parametrize("name", ["mi300x", "h200"])
def test_every_parameter_of_a_preset_has_a_unit_an_origin_and_a_source(name):
    machine = Machine.load(name)
    assert machine.name == name
    assert parameter_units().keys() == parameter_meanings().keys()
    # what only a host of threads has may be left out
    host_only = {"gap_ps", "launch_step_ps", "num_cores", "slice_ps"}
    assert machine.origins.keys() == parameter_units().keys() - host_only
    for key, (unit, origin, source) in machine.origins.items():
        assert unit == parameter_units()[key]
        assert origin in ("measured", "datasheet", "estimate", "fitted")
        assert len(source) > 10


def test_presets_are_named():
    assert preset_names() == ("h200", "mi300x")


def test_values_are_scaled_to_the_units_of_the_fields():
    machine = Machine.preset("mi300x")
    assert (machine.num_cus, machine.num_domains) == (304, 8)
    assert machine.ticket_far_service_ps == 190_000  # 190 ns
    assert machine.put_ps == 2_850_000
    assert machine.hbm_bytes_per_ns == 4200
    assert Machine.preset("h200").ticket_service_ps == 800


def test_a_ticket_alone_costs_its_published_latency():
    for name, near_ps, far_ps in [("mi300x", 116_000, 202_000), ("h200", 43_400, 43_400)]:
        machine = Machine.preset(name)
        assert machine.ticket_ps + machine.ticket_service_ps == near_ps
        assert machine.ticket_far_ps + machine.ticket_far_service_ps == far_ps


def test_overhead_by_kind():
    assert Machine.preset("mi300x").overhead_ps("route") == 1_500_000
    with pytest.raises(ValueError, match=r"'idle'.*kinds: gate, route, dispatch, up, down, combine, expert"):
        Machine.preset("mi300x").overhead_ps("idle")


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
    assert machine.origins["num_cus"] == Machine.preset("mi300x").origins["num_cus"]
    assert Machine.load(str(path)) == machine == Machine.load(machine)


ENTRY = '{ value = 1, unit = "GB/s", origin = "estimate", source = "x" }'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('base = "mi300x"\nhbm = 1', r"unknown machine parameter 'hbm' \(parameters: num_cus, .*base"),
        (f"hbm_bytes_per_ns = {ENTRY}", r"'mine' lacks num_cus, .*\(give them, or a base: h200, mi300x\)"),
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
        ('base = "mi300z"', r"unknown machine 'mi300z' \(presets: h200, mi300x"),
        ("= 3", "'mine' is not TOML"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        Machine.load(write(tmp_path, text))


def test_unknown_machines_are_refused_by_name(tmp_path):
    with pytest.raises(
        ValueError, match=r"unknown machine 'mi999' \(presets: h200, mi300x; or 'host', or a .toml file\)"
    ):
        Machine.load("mi999")
    with pytest.raises(ValueError, match="no machine file"):
        Machine.load(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_cus": 0}, "num_cus=0 .*at least 1"),
        ({"signal_ps": 1.5}, "signal_ps=1.5 .*whole number"),
        ({"link_topology": "ring"}, "link_topology='ring' .*mesh or switch"),
        ({"prefetch": 1}, "prefetch=1 .*true or false"),
        ({"num_domains": 400}, "num_domains=400 .*num_cus=304"),
    ],
)
def test_bad_values_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Machine(**(Machine.preset("mi300x").to_dict() | change))


def test_to_dict_holds_all_that_makes_a_machine():
    machine = Machine.preset("h200")
    assert Machine(**machine.to_dict()) == machine
