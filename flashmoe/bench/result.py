"""What a benchmark measured, as rows; to and from files."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

OURS, READ = "flashmoe", "read"
TOLERANCE = 1e-2  # relative error (Frobenius norm) that a bf16 layer stays below

# gate: the whole layer. given: the routing comes from outside. alone: the whole layer (with a family's routing, given),
# a graph of its own for each layer. read: a kernel that reads as many bytes.
How = Literal["gate", "given", "alone", "read"]


def whole(routing: str) -> How:
    """As much of the layer as a routing lets be measured: only the router's own can be made inside."""
    return "gate" if routing == "gate" else "given"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One implementation at one number of tokens; times are microseconds a layer, over the replays of a graph.

    who: "flashmoe", "read", or a peer. variant: flashmoe's policy, or which kernel read. kernel: of flashmoe.
    distinct_experts, weight_bytes: of a layer, the mean over the layers; only experts that a token chose count.
    error: the largest of all layers, before and after the timed replays; None where nothing is computed.
    same_bits: whether all replays that were looked at gave the same bits.
    """

    tokens: int
    routing: str
    who: str
    how: How
    variant: str
    kernel: str = ""
    distinct_experts: float
    weight_bytes: float
    median_us: float
    p10_us: float
    p90_us: float
    replays: int
    error: float | None = None
    same_bits: bool | None = None

    @property
    def right(self) -> bool:
        return self.error is None or self.error < TOLERANCE  # NaN is not


@dataclass(frozen=True, kw_only=True)
class Missing:
    """What was not measured, and why. tokens None: at any number of them."""

    who: str
    tokens: int | None
    reason: str


@dataclass(frozen=True)
class Result:
    """header: device, driver, date, commit, command and whatever else says how the rows were made."""

    header: dict[str, Any]
    measurements: list[Measurement]
    missing: list[Missing]

    def routings(self) -> list[str]:
        return list(dict.fromkeys(row.routing for row in self.measurements))

    def tokens(self, routing: str) -> list[int]:
        return list(dict.fromkeys(row.tokens for row in self.measurements if row.routing == routing))

    def peers(self) -> list[str]:
        return list(dict.fromkeys(row.who for row in self.measurements if row.who not in (OURS, READ)))

    def of(self, routing: str, tokens: int) -> list[Measurement]:
        return [row for row in self.measurements if (row.routing, row.tokens) == (routing, tokens)]

    def ceiling(self, routing: str, tokens: int) -> Measurement:
        """The fastest of the kernels that only read. Raises: ValueError when none was measured."""
        reads = [row for row in self.of(routing, tokens) if row.who == READ]
        if not reads:
            raise ValueError(f"no read ceiling for {tokens} tokens, routing {routing}")
        return min(reads, key=lambda row: row.median_us)

    def find(
        self, routing: str, tokens: int, who: str, how: How | None = None, variant: str | None = None
    ) -> Measurement | None:
        """The first row that fits."""
        rows = (row for row in self.of(routing, tokens) if row.who == who)
        return next((row for row in rows if how in (None, row.how) and variant in (None, row.variant)), None)

    def share(self, row: Measurement) -> float:
        """The read ceiling's time for as many bytes over a row's time: 1 is as fast as the memory."""
        return self.ceiling(row.routing, row.tokens).median_us / row.median_us

    def wrong(self) -> list[Measurement]:
        return [row for row in self.measurements if not row.right]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, which has no NaN: an error that is none becomes the text "nan" or "inf"."""
        rows = [asdict(row) for row in self.measurements]
        for row in rows:
            if row["error"] is not None and not abs(row["error"]) < float("inf"):
                row["error"] = str(row["error"])
        return {"header": self.header, "measurements": rows, "missing": [asdict(row) for row in self.missing]}

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> Result:
        rows = [Measurement(**row) for row in told["measurements"]]
        rows = [row if row.error is None else replace(row, error=float(row.error)) for row in rows]
        return cls(told["header"], rows, [Missing(**row) for row in told["missing"]])

    def save(self, path: str | PathLike[str]) -> None:
        """One JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Result:
        """Raises: ValueError when the file is missing, or was not written by `save`."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"cannot read {path} as a benchmark's result ({error})") from error

    def save_csv(self, path: str | PathLike[str]) -> None:
        """The rows alone, with the share of the read ceiling; None is an empty field."""
        names = [field.name for field in fields(Measurement)]
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [*names, "share_of_ceiling"], lineterminator="\n")
            writer.writeheader()
            for row in self.measurements:
                writer.writerow({**_rounded(row), "share_of_ceiling": f"{self.share(row):.4f}"})


def _rounded(row: Measurement) -> dict[str, Any]:
    told = asdict(row)
    for name in ("median_us", "p10_us", "p90_us"):
        told[name] = f"{told[name]:.3f}"
    told["weight_bytes"] = f"{row.weight_bytes:.0f}"
    told["error"] = "" if row.error is None else f"{row.error:.2e}"
    return told
