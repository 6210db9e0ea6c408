"""Many simulations: grids, random points and Latin hypercubes over any input, on all cores or a cluster."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmoe.points import INPUTS, OVERRIDE_TYPES, Point, resolve, unresolved_row
from flashmoe.pool import on_cores, on_dask
from flashmoe.replicate import PERCENTILES, quantile

if TYPE_CHECKING:
    from pandas import DataFrame

    from flashmoe.study import Study

Progress = Callable[[int, int], None]  # called with (done, all)

_COMPACT_S = 60.0  # between two moves of the journal into the Parquet file: often enough to look at it meanwhile


def sweep(
    study: str | Path | Mapping[str, Any] | Study,
    out: str | Path | None = None,
    *,
    processes: int | None = None,
    scheduler: str | None = None,
    retry_failed: bool = False,
    progress: Progress | None = None,
) -> DataFrame:
    """Make every simulation of a study that `out` does not have yet.

    study: a YAML file, a dict of its entries or a Study: see `flashmoe.study`.
    out: a .parquet file for the results. They are on the disk as they come, in a journal beside it until they are
        moved, so a sweep that was killed goes on where it stopped. A simulation is known by all that it resolves to
        and the version of flashmoe; what the file has beside this study's stays there.
    processes: by default one for each core; they import the script that calls this, so it has to do so under
        if __name__ == "__main__". scheduler: the address of a Dask cluster that does the work instead.
    retry_failed: whether simulations that failed before are made again.
    Returns: a frame with a row a point and seed, in the study's order: digest; point, the same for all seeds;
        version; the inputs by name, as resolved; what sim.Totals.to_dict() has; error (None, or what went wrong: the
        other simulations go on); wall_s.
    Raises: ValueError naming what is wrong in the study, before anything runs; ImportError naming a missing extra.
    """
    try:
        from flashmoe.results import Results
        from flashmoe.study import Study
    except ImportError as error:
        raise ImportError(f"a sweep needs {error.name}: pip install 'flashmoe[sweep]'") from error

    if scheduler is not None and processes is not None:
        raise ValueError(f"processes={processes} with scheduler={scheduler!r} (accepted: one of both)")
    if out is not None and Path(out).suffix != ".parquet":
        raise ValueError(f"{out}: unknown suffix (accepted: .parquet)")
    resolved = _resolve_all(Study.load(study))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = stack.enter_context(Results(folder / "results.parquet" if out is None else Path(out)))
        known = {digest for digest, error in results.errors().items() if error is None or not retry_failed}
        missing = [made for digest, made in resolved.items() if digest not in known]
        points = [made for made in missing if isinstance(made, Point)]
        results.append([made for made in missing if not isinstance(made, Point)])
        done = len(resolved) - len(points)
        if progress is not None:
            progress(done, len(resolved))
        evaluated = on_cores(points, processes) if scheduler is None else on_dask(points, scheduler)
        compacted = time.monotonic()
        for rows in stack.enter_context(closing(evaluated)):
            results.append(rows)
            done += len(rows)
            if progress is not None:
                progress(done, len(resolved))
            if time.monotonic() - compacted > _COMPACT_S:
                results.compact()
                compacted = time.monotonic()
        frame = results.frame(list(resolved))
    # what is empty is a column of another study, or of runs that all failed
    return frame.loc[:, frame.notna().any() | frame.columns.isin([*INPUTS, "error"])]


def _resolve_all(study: Study) -> dict[str, Point | dict[str, Any]]:
    """Each point by its digest, once; or, where its inputs do not fit together, a row that says why.

    Raises: ValueError when that is so for all of them.
    """
    resolved: dict[str, Point | dict[str, Any]] = {}
    for inputs in study.points():
        try:
            point = resolve(inputs)
            resolved[point.digest] = point
        except ValueError as error:
            row = unresolved_row(inputs, error)
            resolved[row["digest"]] = row
    if not any(isinstance(made, Point) for made in resolved.values()):
        first = next(made["error"] for made in resolved.values() if not isinstance(made, Point))
        raise ValueError(f"nothing to simulate: the study's first point fails with {first}")
    return resolved


def summarise(frame: DataFrame, value: str = "makespan_us", *, level: float = 0.95) -> DataFrame:
    """Put the seeds of each point of a sweep together.

    value: the column to look at. level: confidence of the intervals.
    Returns: a frame with a row a point: its inputs without the seed; runs and failed, their numbers; mean, p50, p90
        and p99, each with _low and _high: its confidence interval, NaN where there are too few runs for that end.
        The mean's is Student's t, which takes the runs' mean as normal; the percentiles' are those of
        `replicate.quantile`, which take nothing for granted.
    Raises: ValueError naming a column that is not there.
    """
    import pandas as pd
    from scipy.stats import t

    if value not in frame:
        raise ValueError(f"no column {value!r} (columns: {', '.join(frame.columns)})")
    names = [name for name in frame if name in (*INPUTS, *OVERRIDE_TYPES) and name != "seed"]
    points = frame.groupby("point", sort=False)
    summary = points[names].first()
    summary["runs"] = points[value].count()
    summary["failed"] = points["error"].count()
    summary["mean"] = points[value].mean()
    half = t.ppf((1 + level) / 2, summary["runs"] - 1) * points[value].std() / np.sqrt(summary["runs"])
    summary["mean_low"], summary["mean_high"] = summary["mean"] - half, summary["mean"] + half
    samples = {point: sample.to_numpy() for point, sample in frame.dropna(subset=value).groupby("point")[value]}
    for name, p in PERCENTILES.items():
        estimates = {point: quantile(sample, p, level) for point, sample in samples.items()}
        for suffix, field in (("", "value"), ("_low", "low"), ("_high", "high")):
            column = {point: getattr(estimate, field) for point, estimate in estimates.items()}
            summary[f"{name}{suffix}"] = pd.Series(column, dtype=float)
    return summary.reset_index(drop=True)
