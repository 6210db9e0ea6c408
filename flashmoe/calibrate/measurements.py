"""What the microbenchmarks of a GPU (hip_src/calibrate) have written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Measured(NamedTuple):
    """One quantity under one set of conditions. spread: half the width from the 1st to the 99th percentile."""

    median: float
    mean: float
    spread: float
    unit: str
    samples: int

    def __str__(self) -> str:
        unit = "" if self.unit == "1" else f" {self.unit}"
        return f"{self.median:.4g} ± {self.spread:.2g}{unit} ({self.samples} samples)"


@dataclass(frozen=True)
class Measurements:
    """about: the device, drivers and clocks. results: one dict a quantity and set of conditions."""

    about: dict[str, str]
    results: list[dict[str, Any]]

    @classmethod
    def load(cls, path: str | Path) -> Measurements:
        """Read a calibrate.json. Raises: ValueError naming the file that is not there or is something else."""
        try:
            told = json.loads(Path(path).read_text(encoding="utf-8"))
            measurements = cls(dict(told["about"]), list(told["results"]))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror} (a calibrate.json was expected)") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a calibrate.json ({error})") from error
        if stopped := measurements.about.get("stopped_by"):
            raise ValueError(f"{path}: the microbenchmarks did not end: {stopped}")
        return measurements

    def one(self, benchmark: str, quantity: str, **conditions: object) -> Measured:
        """The quantity that these conditions (or its unit) single out. Raises: ValueError unless there is just one."""
        found = self._matching(benchmark, quantity, conditions)
        if len(found) != 1:
            raise ValueError(f"{benchmark} {quantity} {conditions}: {len(found)} results (must be 1)")
        return _measured(found[0])

    def over(self, condition: str, benchmark: str, quantity: str, **conditions: object) -> dict[int, Measured]:
        """The quantity for each value of one more condition. Raises: ValueError when there is none."""
        found = self._matching(benchmark, quantity, conditions)
        if not found:
            raise ValueError(f"{benchmark} {quantity} {conditions}: 0 results (must be one for each {condition})")
        return {int(result["conditions"][condition]): _measured(result) for result in found}

    def _matching(self, benchmark: str, quantity: str, conditions: dict[str, object]) -> list[dict[str, Any]]:
        return [
            result
            for result in self.results
            if (result["benchmark"], result["quantity"]) == (benchmark, quantity)
            and all({**result["conditions"], "unit": result["unit"]}.get(key) == conditions[key] for key in conditions)
        ]


def _measured(result: dict[str, Any]) -> Measured:
    median = float(result["median"])
    spread = (float(result.get("p99", median)) - float(result.get("p01", median))) / 2
    return Measured(median, float(result.get("mean", median)), spread, str(result["unit"]), int(result["samples"]))
