"""Microbenchmarks as parameters: a recorded run of one H200, and numbers that are made up."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from flashmoe.calibrate.device import SLOTS, device_parameters, fit_knee, mean_lag, soft_knee
from flashmoe.calibrate.measurements import Measurements
from flashmoe.machine import parameter_units

RECORDED = Path(__file__).parents[2] / "results" / "2026-11-27-h200-validation" / "calibration" / "calibrate.json"


@pytest.fixture(scope="module")
def recorded():
    return Measurements.load(RECORDED)


def raw(benchmark, quantity, **conditions):
    """A result as the file has it, without the code that is tested."""
    (found,) = [
        result
        for result in json.loads(RECORDED.read_text())["results"]
        if (result["benchmark"], result["quantity"]) == (benchmark, quantity)
        and conditions.items() <= result["conditions"].items()
    ]
    return found


def test_every_parameter_is_one_of_the_model_with_its_spread_and_source(recorded):
    parameters = device_parameters(recorded)
    assert parameters.keys() < parameter_units().keys()
    assert len(parameters) == 17
    for name, parameter in parameters.items():
        assert parameter.value > 0, name
        assert parameter.spread >= 0
        assert parameter.origin in ("measured", "fitted")
        assert len(parameter.source) > 20


def test_bandwidth_is_right_for_one_cu_and_for_all(recorded):
    parameters = device_parameters(recorded)
    total, cap, knee = (parameters[name].value for name in ("hbm_bytes_per_ns", "cu_bytes_per_ns", "knee"))
    assert cap == 78.6
    # (c^-p + (B / n)^-p)^(-1/p) for each of 132
    together = 132 * (cap**-knee + (total / 132) ** -knee) ** (-1 / knee)
    assert together == pytest.approx(raw("read_bandwidth", "total", slots=SLOTS, sms=132)["median"], rel=1e-3)
    for cus in (8, 32, 64, 96):
        measured = raw("read_bandwidth", "total", slots=SLOTS, sms=cus)["median"]
        assert cus * (cap**-knee + (total / cus) ** -knee) ** (-1 / knee) == pytest.approx(measured, rel=0.05)


def test_luck_is_that_of_many_tasks(recorded):
    many = raw("task_jitter", "log_std_of_32_tasks_within_an_sm", mode="pipelined")["median"]
    assert device_parameters(recorded)["jitter"].value == pytest.approx(many * math.sqrt(32), abs=1e-4)
    one = raw("task_jitter", "log_std", mode="pipelined")["median"]
    assert many * math.sqrt(32) < one < many * 32


def test_an_idle_cache_is_faster(recorded):
    parameters = device_parameters(recorded)
    assert parameters["cache_idle_bytes_per_ns"].value > 2 * parameters["cache_bytes_per_ns"].value


def test_a_release_is_what_an_add_takes_longer_than_a_word(recorded):
    def mean(streams, signal, payload):
        slots = 0 if streams == "idle" else SLOTS
        conditions = {"streams": streams, "slots": slots, "signal": signal, "payload_bytes": payload}
        return raw("signal", "one_way", **conditions)["mean"]

    word, loaded_word = mean("idle", "st.relaxed", 0), mean("all SMs stream", "st.relaxed", 0)
    add, loaded_add = mean("idle", "red.release", 512), mean("all SMs stream", "red.release", 512)
    parameters = device_parameters(recorded)
    assert parameters["signal_ps"].value == round(1000 * word)
    assert parameters["release_ps"].value == round(1000 * (add - word))
    # the load with all SMs streaming is 4633 of the fitted total; the model's factor is for a load of 1
    load = raw("read_bandwidth", "total", slots=SLOTS, sms=132)["median"] / parameters["hbm_bytes_per_ns"].value
    for name, idle, loaded in (("signal", word, loaded_word), ("release", add - word, loaded_add - loaded_word)):
        factor = parameters[f"{name}_load_factor"].value
        assert idle * (1 + (factor - 1) * load) == pytest.approx(loaded, rel=2e-3)


def test_times_are_medians_in_ps(recorded):
    parameters = device_parameters(recorded)
    assert parameters["launch_ps"].value == 768_000
    assert parameters["launch_step_ps"].value == round(32_000 / 131)
    loaded_ticket = raw("ticket", "latency", what="one in 2 us each", streams="all SMs stream")
    assert parameters["ticket_ps"].value == parameters["ticket_far_ps"].value == round(1000 * loaded_ticket["median"])


@pytest.mark.parametrize("exponent", [1.5, 3.0, 8.0])
def test_a_knee_is_found_again(exponent):
    cus = np.array([1, 2, 8, 32, 64, 132])
    # with a cap that is not quite what one CU gets, as it is measured
    rates = soft_knee(cus.astype(float), 100.0, 4800.0, exponent)
    found, total, error = fit_knee(dict(zip(cus.tolist(), rates.tolist(), strict=True)))
    assert found == pytest.approx(exponent, rel=0.02)
    assert total == pytest.approx(4800, rel=0.01)
    assert error < 2e-3


def test_without_contention_there_is_no_knee():
    assert fit_knee({1: 10.0, 2: 20.0, 4: 40.0}) == (0.0, 40.0, 0.0)


def test_how_long_a_cache_keeps_what_was_read():
    assert mean_lag({0: 8.0, 30: 8.0, 31: 4.0, 90: 4.0}, 4.0) == pytest.approx(30.5)  # all leaves at about 30
    assert mean_lag({40: 4.5, 0: 8.5, 20: 6.5}, 4.5) == pytest.approx(20)  # evenly between 0 and 40
    assert mean_lag({0: 8.0, 10: 8.2, 20: 3.9}, 4.0) == pytest.approx(15)  # rates are measured: none below 0 or above 1


@pytest.mark.parametrize("by_cus", [{1: 10.0, 2: 20.0}, {2: 20.0, 4: 40.0, 8: 80.0}])
def test_too_few_numbers_of_cus_are_refused(by_cus):
    with pytest.raises(ValueError, match="must be 1 and at least two more"):
        fit_knee(by_cus)


def test_a_quantity_must_be_singled_out(recorded):
    assert recorded.one("launch", "gap_last_end_to_first_ready", programmatic=True).median == 512
    with pytest.raises(ValueError, match=r"signal one_way \{\}: 25 results .must be 1"):
        recorded.one("signal", "one_way")
    with pytest.raises(ValueError, match=r"nothing total .* 0 results .must be one for each sms"):
        recorded.over("sms", "nothing", "total")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "not a calibrate.json"),
        ("no json", "not a calibrate.json"),
        ('{"about": {"stopped_by": "a wait"}, "results": []}', "the microbenchmarks did not end: a wait"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "calibrate.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Measurements.load(path)
    with pytest.raises(ValueError, match="No such file"):
        Measurements.load(tmp_path / "other.json")
