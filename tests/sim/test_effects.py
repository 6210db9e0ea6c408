"""Each effect of the model can be switched off, alone, and then it is gone."""

import json
import math

import pytest

from flashmoe.machine import Machine, parameter_units
from flashmoe.sim.effects import EFFECTS, UNLIMITED, without

OVERHEADS = {key: 0 for key in parameter_units() if key.endswith("_overhead_ps")}
# what a machine without the effect has, worked out by hand
NEUTRAL = {
    "memory_sharing": {"hbm_bytes_per_ns": UNLIMITED},
    "knee": {"knee": 0},
    "prefetch": {"prefetch": False},
    "launch_ramp": {"launch_ps": 0, "launch_domain_ps": 0, "launch_step_ps": 0, "prologue_ps": 0},
    "ticket": {"ticket_ps": 0, "ticket_far_ps": 0, "ticket_service_ps": 0, "ticket_far_service_ps": 0},
    "signal": {"signal_ps": 0, "signal_near_ps": 0},
    "signal_load": {"signal_load_factor": 1},
    "signal_distance": {"signal_near_ps": 600_000},
    "release": {"release_ps": 0},
    "release_load": {"release_load_factor": 1},
    "finish_beside": {"finish_beside": False},
    "words": {"word_tokens": 0},
    "plan": {"plan_ps": 0, "plan_token_ps": 0, "sort_ps": 0, "sort_expert_ps": 0},
    "link_latency": {"put_ps": 0},
    "link_bandwidth": {"link_bytes_per_ns": UNLIMITED, "port_bytes_per_ns": 0, "link_message_ps": 0},
    "remote_stores": {"store_bytes_per_ns": UNLIMITED},
    "activations": {"cache_bytes_per_ns": UNLIMITED, "cache_idle_bytes_per_ns": 0},
    "first_given": {"first_given": False},
    "in_order": {"in_order": False},
    "ask_early": {"ask_early": False},
    "reuse": {"cache_bytes": 0},
    "feed": {"feed_bytes_per_ns": 0},
    "matrix_rate": {"cu_flops_per_ns": UNLIMITED},
    "matrix_padding": {"matrix_tokens": 1, "matrix_rows": 1},
    "overhead": OVERHEADS,
    "jitter": {"jitter": 0, "jitter_bytes": 0},
    "stalls": {"stall_probability": 0, "stall_ps": 0},
    "pe_spread": {"pe_spread": 0},
    "bookkeeping": {"gap_ps": 0},
}


def everything():
    """A machine that has every effect."""
    more = {
        "port_bytes_per_ns": 300,
        "link_message_ps": 5_000,
        "gap_ps": 7_000,
        "stall_ps": 10,
        "stall_probability": 0.1,
        "prologue_ps": 400,
        "release_ps": 900,
        "release_load_factor": 3.0,
        "finish_beside": True,
        "word_tokens": 8,
        "cache_idle_bytes_per_ns": 200.0,
        "feed_bytes_per_ns": 60.0,
        "cache_bytes": 10_000_000,
        "ask_early": True,
        "first_given": True,
        "in_order": True,
        "plan_ps": 2_000,
        "plan_token_ps": 20,
        "sort_ps": 300,
        "sort_expert_ps": 10,
    }
    machine = Machine.preset("mi300x")
    return Machine(**(machine.to_dict() | more), origins=machine.origins)


def test_every_effect_is_explained():
    assert EFFECTS.keys() == NEUTRAL.keys()
    for effect in EFFECTS.values():
        assert "Without: " in effect.what
        assert effect.what.endswith(".")


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_switch_changes_its_own_parameters_and_nothing_else(name):
    machine = everything()
    simpler = without(machine, [name])
    changed = {key for key in parameter_units() if getattr(simpler, key) != getattr(machine, key)}
    assert changed == set(NEUTRAL[name])
    assert {key: getattr(simpler, key) for key in changed} == NEUTRAL[name]
    assert without(simpler, [name]) == simpler
    assert simpler.name == machine.name


@pytest.mark.parametrize("preset", ["mi300x", "h200"])
def test_all_switches_together_leave_streams(preset):
    machine = Machine.preset(preset)
    simpler = without(machine, EFFECTS)
    kept = {"num_cus", "num_domains", "num_pes_max", "cu_bytes_per_ns", "num_cores", "slice_ps"}
    for key in parameter_units().keys() - kept:
        assert getattr(simpler, key) in (0, 1, False, UNLIMITED), key
    assert {key: getattr(simpler, key) for key in kept} == {key: getattr(machine, key) for key in kept}


def test_nothing_off_is_the_machine_itself():
    assert without(everything(), []) == everything()


def test_what_was_switched_off_has_no_origin():
    machine = everything()
    simpler = without(machine, ["overhead", "prefetch"])
    assert machine.origins.keys() - simpler.origins.keys() == {"prefetch", *OVERHEADS}
    assert simpler.origins["put_ps"] == machine.origins["put_ps"]


def test_an_unlimited_rate_costs_less_than_a_picosecond_and_is_standard_json():
    machine = without(everything(), EFFECTS)
    assert 1e15 / machine.cu_flops_per_ns * 1000 < 1e-3  # a PFLOP, in ps; engines count 0.001 ps as none
    # however many workers there are and whatever the knee, a stream runs at its cap to the last bit
    cap, share = machine.cu_bytes_per_ns, machine.hbm_bytes_per_ns / 100_000
    assert min(cap, share) == cap
    assert all(cap * (1 + (cap / share) ** knee) ** (-1 / knee) == cap for knee in (1.0, 4.5, 100.0))
    as_json = json.loads(json.dumps(machine.to_dict(), allow_nan=False))
    assert Machine(**as_json) == machine
    assert math.isfinite(as_json["hbm_bytes_per_ns"])


@pytest.mark.parametrize("name", ["gravity", "", "Knee"])
def test_an_unknown_effect_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"unknown effect '{name}' \(effects: memory_sharing, .*bookkeeping\)"):
        without(everything(), ["knee", name])
