"""A study: which simulations a sweep makes. Read from YAML or a dict, and checked before anything runs.

    fixed: {model: qwen3-30b-a3b, tokens: 8}
    grid:                                       # every combination of
      policy: [static_phase, domain_steal]
      machine.num_cus: {low: 64, high: 304, num: 4}
    sample:                                     # ... with every one of these points
      method: latin_hypercube                   # or random
      points: 16
      seed: 0
      over:
        machine.signal_ps: {low: 800_000, high: 3_000_000, log: true}
        routing: ["uniform", "zipf:1"]
    replications: 5                             # each with seeds 0 to 4: the same five for every point

All three sections are optional. The names are those of `points.INPUTS` and `points.OVERRIDE_TYPES`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from scipy.stats import qmc

from flashmoe.points import INPUTS, OVERRIDE_TYPES, load_machine, load_model, load_policy

_LOADERS: dict[str, Callable[[Any], Any]] = {"model": load_model, "machine": load_machine, "policy": load_policy}


_NUMBERS = (int, int | None, float, float | None)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, entries: Any) -> Any:
        accepted = ", ".join(cls.model_fields)
        if not isinstance(entries, Mapping | cls):
            raise ValueError(f"{'nothing' if entries is None else repr(entries)} (must be entries by name: {accepted})")
        if isinstance(entries, Mapping) and (unknown := [name for name in entries if name not in cls.model_fields]):
            raise ValueError(f"unknown entry {unknown[0]!r} (accepted: {accepted})")
        return entries


class Range(_Strict):
    """Numbers from low to high, both included; log: evenly spread over their logarithms.

    num: how many a grid takes; a sample draws its own.
    """

    low: float
    high: float
    log: bool = False
    num: int | None = Field(None, ge=2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low={self.low:g} (must be less than high={self.high:g})")
        if self.log and self.low <= 0:
            raise ValueError(f"low={self.low:g} with log (must be positive)")
        return self

    def at(self, share: NDArray[np.float64], *, whole: bool) -> list[Any]:
        """The values at shares of the way, (n,) in 0..1. whole: integers, each as likely as the others."""
        low, high = (self.low, self.high + 1) if whole else (self.low, self.high)
        values = low * (high / low) ** share if self.log else low + (high - low) * share
        # at the very end of the range rounding must not leave it
        return [min(int(value), int(self.high)) if whole else min(float(value), self.high) for value in values]

    def spaced(self, *, whole: bool) -> list[Any]:
        """num values, the ends among them; integers are rounded, and none comes twice."""
        space = np.geomspace if self.log else np.linspace
        values = space(self.low, self.high, self.num or 2).tolist()
        return list(dict.fromkeys(round(value) for value in values)) if whole else values


def _list_or_range(values: Any) -> Any:
    if not isinstance(values, list | tuple | Range | Mapping):
        raise ValueError("must be a list of values, or a range {low, high}; one value for all goes under fixed")
    if isinstance(values, list | tuple) and not values:
        raise ValueError("must have at least one value")
    if not isinstance(values, Mapping):
        return values
    with _errors_in_words():
        return Range.model_validate(values)


Values = Annotated[Any, BeforeValidator(_list_or_range)]


class Sample(_Strict):
    """Points drawn from the product of lists and ranges. seed: of the draw, not of the simulations."""

    method: Literal["latin_hypercube", "random"] = "latin_hypercube"
    points: int = Field(ge=1)
    seed: int = Field(0, ge=0)
    over: dict[str, Values] = Field(min_length=1)

    def draw(self) -> list[dict[str, Any]]:
        """The points by input.

        Source: Latin hypercubes, McKay, Beckman and Conover 1979, doi:10.2307/1268522.
        """
        rng = np.random.default_rng(self.seed)
        shape = (self.points, len(self.over))
        shares = qmc.LatinHypercube(shape[1], rng=rng).random(shape[0]) if self._is_hypercube else rng.random(shape)
        columns = []
        for (name, values), share in zip(self.over.items(), shares.T, strict=True):
            if isinstance(values, Range):
                columns.append(values.at(share, whole=_is_whole(name)))
            else:
                columns.append([values[int(idx)] for idx in share * len(values)])
        return [dict(zip(self.over, row, strict=True)) for row in zip(*columns, strict=True)]

    @property
    def _is_hypercube(self) -> bool:
        return self.method == "latin_hypercube"


class Study(_Strict):
    """Which simulations a sweep makes: see this module's docstring."""

    fixed: dict[str, Any] = {}
    grid: dict[str, Values] = {}
    sample: Sample | None = None
    replications: int = Field(1, ge=1)

    @classmethod
    def load(cls, study: str | Path | Mapping[str, Any] | Study) -> Study:
        """A study as it is, as a dict, or from a YAML file.

        Raises: ValueError naming the file, the entry and what is accepted there.
        """
        if isinstance(study, Study):
            return study
        where, entries = "", study
        if isinstance(study, str | Path):
            where = f"{study}: "
            try:
                entries = yaml.safe_load(Path(study).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise ValueError(f"cannot read the study {study} ({error})") from error
        with _errors_in_words(where):
            return cls.model_validate(entries)

    @model_validator(mode="after")
    def _check(self) -> Self:
        sections: dict[str, dict[str, Any]] = {"fixed": self.fixed, "grid": self.grid}
        if self.sample is not None:
            sections["sample.over"] = self.sample.over
        seen: dict[str, str] = {}
        for section, entries in sections.items():
            for name, values in entries.items():
                if name in seen:
                    raise ValueError(f"{section}.{name}: is under {seen[name]}, too")
                seen[name] = section
                try:
                    entries[name] = _checked(name, values, section)
                except ValueError as error:
                    raise ValueError(f"{section}.{name}: {error}") from None
        if self.replications > 1 and seen.get("seed", "fixed") != "fixed":
            raise ValueError(f"{seen['seed']}.seed with replications={self.replications} (accepted: one of both)")
        return self

    def points(self) -> list[dict[str, Any]]:
        """The inputs of each simulation. Replication r has the seed of the first plus r, whatever the point.

        So points meet the same routing and the same luck, and their differences are not those of the draws (common
        random numbers: Law 2015, Simulation Modeling and Analysis, section 11.2). Replications are the outer loop.
        """
        axes = {
            name: values.spaced(whole=_is_whole(name)) if isinstance(values, Range) else values
            for name, values in self.grid.items()
        }
        drawn = [{}] if self.sample is None else self.sample.draw()
        combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        points = [{**self.fixed, **row, **combination} for row in drawn for combination in combinations]
        if self.replications == 1:
            return points
        first = self.fixed.get("seed", 0)
        return [{**point, "seed": first + r} for r in range(self.replications) for point in points]

    @property
    def varied(self) -> list[str]:
        """Names of the inputs that are not the same for all points."""
        return [*self.grid, *(self.sample.over if self.sample is not None else ())]


def _checked(name: str, values: Any, section: str) -> Any:
    """Values of an input, each of its type; what a name stands for must be there."""
    wanted = _type(name)
    if section == "fixed":
        return _one(name, values)
    if isinstance(values, Range):
        if wanted not in _NUMBERS:
            raise ValueError("takes no range, but a list of values")
        if section == "grid" and values.num is None:
            raise ValueError("a range in a grid needs num, the number of its values")
        if section != "grid" and values.num is not None:
            raise ValueError("num is for a grid; a sample has as many values as points")
        for end in (values.low, values.high):
            _one(name, end)
        return values
    return [_one(name, value) for value in values]


def _one(name: str, value: Any) -> Any:
    if name in _LOADERS:  # specs are taken as they are: pydantic would make others of their fields
        if not isinstance(value, INPUTS[name].type):
            raise ValueError(f"{value!r} (must be a name, or in Python a spec)")
        _LOADERS[name](value)
        return value
    if isinstance(value, str) and _type(name) in _NUMBERS:
        with suppress(ValueError):
            value = float(value)  # YAML takes 1e6 for a text
    with _errors_in_words():
        return TypeAdapter(_type(name)).validate_python(value)


def _type(name: str) -> Any:
    if name in INPUTS:
        return INPUTS[name].type
    if name in OVERRIDE_TYPES:
        return OVERRIDE_TYPES[name]
    part, dot, _ = name.partition(".")
    of_part = [known for known in OVERRIDE_TYPES if dot and known.startswith(f"{part}.")]
    parts = dict.fromkeys(known.partition(".")[0] for known in OVERRIDE_TYPES)
    accepted = of_part or [*INPUTS, *(f"{part}.FIELD" for part in parts)]
    raise ValueError(f"unknown input (accepted: {', '.join(accepted)})")


def _is_whole(name: str) -> bool:
    return _type(name) in _NUMBERS[:2]


@contextmanager
def _errors_in_words(where: str = "") -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise ValueError(where + "; ".join(map(_in_words, error.errors()))) from None


def _in_words(error: Any) -> str:
    """One of pydantic's errors as this package writes them: where, which value, what is accepted."""
    where = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] != "value_error" and not isinstance(error["input"], dict):
        message = f"{error['input']!r}: {message[0].lower()}{message[1:]}"
    return f"{where}: {message}" if where else message
