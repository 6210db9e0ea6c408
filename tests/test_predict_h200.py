"""The model against layers measured on an H200, which none of its parameters was fitted to."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "predict_h200.py"


@pytest.fixture(scope="module")
def h200():
    spec = importlib.util.spec_from_file_location("predict_h200", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cells(h200):
    return h200.predict_all(seeds=4)


def test_the_best_kernels_are_predicted_within_11_percent(h200, cells):
    tuned = [cell for cell in cells if h200.CASES[cell.case].tuned and cell.measured_us is not None]
    assert len(tuned) == 9 + 9 + 4  # fused, given, plain launches
    assert max(abs(cell.error) for cell in tuned) < 0.11
    assert h200.mape(tuned) < 0.04


def test_policies_and_tilings_are_predicted_within_17_percent(h200, cells):
    others = [cell for cell in cells if not h200.CASES[cell.case].tuned]
    assert len(others) == 6 + 8  # by rows, by tile
    assert max(abs(cell.error) for cell in others) < 0.17
    assert h200.mape(others) < 0.07


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_policies_and_tilings_are_ranked_almost_as_measured(h200, cells, tokens):
    assert h200.kendall_tau(h200.policies_at(cells, tokens)) > 0.3


def test_all_sizes_of_the_best_kernel_are_predicted_in_order(cells):
    fused = [cell.predicted_us for cell in cells if cell.case == "fused"]
    assert len(fused) == 10
    assert fused == sorted(fused)


def test_kendall_tau_counts_pairs_in_the_same_order(h200):
    def cell(predicted_us, measured_us):
        return h200.Cell("tile, push", 1, predicted_us, 0.0, measured_us)

    # of the pairs of 1, 2, 3 against 10, 30, 20 only the last two are swapped
    assert h200.kendall_tau([cell(1, 10), cell(2, 30), cell(3, 20)]) == pytest.approx(1 / 3)
    assert h200.kendall_tau([cell(1, 10), cell(2, 30), cell(3, None)]) == 1
    assert h200.mape([cell(11, 10), cell(24, 30), cell(1, None)]) == pytest.approx(0.15)


def test_a_calibrated_quantity_must_be_singled_out(h200):
    assert h200.calibrated("launch", "gap_last_end_to_first_ready", programmatic=True) == 512
    with pytest.raises(ValueError, match=r"signal one_way \{\}: 25 results .must be 1"):
        h200.calibrated("signal", "one_way")
