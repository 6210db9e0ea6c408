"""The best policy and tiling for a layer on a machine: proposals by TPE, a decision by successive halving."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmoe.machine import Machine
from flashmoe.model import MoEModel
from flashmoe.points import Point, resolve
from flashmoe.policy import policy_names
from flashmoe.policy import resolve as resolve_policy
from flashmoe.pool import Row, on_cores
from flashmoe.replicate import Estimate, mean
from flashmoe.sim import TIME_SHARES
from flashmoe.tasks import Tiling

if TYPE_CHECKING:
    import optuna

Progress = Callable[[int, int], None]  # called with (done, all)

_ROUND = 32  # trials that are proposed together and run side by side; fixed: the number of cores decides nothing
_HALVING = 3  # a rung keeps one of so many candidates and gives it so many times the seeds


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A policy with a tiling, and what its simulations came to.

    is_usual: whether the tiling is the policy's own. same: other policies that came to the very same with this tiling,
    as stealing does where there is nothing to steal. makespans_us: one a seed, the same seeds for all candidates.
    headroom and time_us are means over them. time_us: a worker's time by sim.TIME_SHARES, adding up to the makespan.
    """

    policy: str
    tiling: Tiling
    is_usual: bool
    makespans_us: tuple[float, ...]
    headroom: float
    time_us: dict[str, float]
    same: tuple[str, ...] = ()

    @property
    def makespan_us(self) -> float:
        """The mean."""
        return float(np.mean(self.makespans_us))

    def behind(self, other: Candidate) -> Estimate:
        """How much longer the mean makespan is than the other's [µs], from the differences seed by seed."""
        return mean(np.subtract(self.makespans_us, other.makespans_us))

    def against(self, other: Candidate) -> dict[str, float]:
        """How much more of a worker's time each share takes than in the other [µs], the largest difference first."""
        differences = {name: self.time_us[name] - other.time_us[name] for name in self.time_us}
        return dict(sorted(differences.items(), key=lambda item: -abs(item[1])))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "makespan_us": self.makespan_us}


def tune(
    model: str | MoEModel = "qwen3-30b-a3b",
    *,
    machine: str | Machine = "mi300x",
    ep: int | None = None,
    tokens: int | None = None,
    routing: str = "uniform",
    layers: int | None = None,
    workers: int | None = None,
    gate: bool = True,
    trials: int = 200,
    seeds: int = 9,
    seed: int = 0,
    best: int = 5,
    processes: int | None = None,
    progress: Progress | None = None,
) -> list[Candidate]:
    """Look for the policy and the tiling with the shortest mean makespan.

    model, machine, ep, tokens, routing, layers, workers, gate: as the inputs of a sweep.
    trials: combinations to try; the built-in policies with their own tilings come first. Each is simulated with one
        seed, the same for all. Then the best third gets three times the seeds, and so on up to `seeds`.
    seed: of the proposals, and the first of the simulations; the same seed finds the same.
    best: how many to return, fewer where there are no more different ones.
    processes: by default one for each core. progress: called with (simulations, all).
    Returns: the best ones, best first, of a policy's with equal makespans the first found, policies that come to the
        very same as one; and last, unless it is among them, the best of the policies' own tilings.
    Raises: ValueError naming what is not accepted; ImportError naming the missing extra.
    Source: TPE, Bergstra et al. 2011, NeurIPS 24; successive halving, Jamieson and Talwalkar 2016, arXiv:1502.07943.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError(f"tuning needs {error.name}: pip install 'flashmoe[tune]'") from error
    for name, value in (("trials", trials), ("seeds", seeds), ("best", best)):
        if value < 1:
            raise ValueError(f"{name}={value} (must be at least 1)")
    given = {"model": model, "machine": Machine.load(machine), "ep": ep, "tokens": tokens, "routing": routing}
    given |= {"layers": layers, "workers": workers, "gate": gate}
    space = _Space(resolve(given))
    rungs = _rungs(trials, seeds, best)
    contest = _Contest(given, seed, processes, progress)
    contest.total = trials + sum(
        (num_kept + len(space.usual)) * (met - before) for (_, before), (num_kept, met) in itertools.pairwise(rungs)
    )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for usual in space.usual:
        study.enqueue_trial(space.trial_of(usual))
    found: list[_Choice] = []
    for first in range(0, trials, _ROUND):
        asked = [study.ask() for _ in range(first, min(first + _ROUND, trials))]
        choices = [space.choice_of(trial) for trial in asked]
        contest.simulate(choices, num_seeds=1)
        for trial, choice in zip(asked, choices, strict=True):
            failed = choice in contest.errors
            state = optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE
            study.tell(trial, None if failed else contest.mean_us(choice), state)
        found += choices

    ranked = contest.ranked(found)
    if not ranked:
        raise ValueError(f"nothing could be simulated: {next(iter(contest.errors.values()))}")
    own = set(space.usual)  # they stay in, to be compared with
    for num_kept, num_seeds in rungs[1:]:
        kept = [*ranked[:num_kept], *(choice for choice in ranked[num_kept:] if choice in own)]
        contest.simulate(kept, num_seeds)
        ranked = contest.ranked(kept)
    if progress is not None:
        progress(contest.total, contest.total)
    merged = _merged(contest.candidate(choice, choice in own) for choice in ranked)
    best_usual = next((rank for rank, candidate in enumerate(merged) if candidate.is_usual), 0)  # none: all failed
    return [*merged[:best], *([merged[best_usual]] if best_usual >= best else [])]


def _merged(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those of several policies that have all else in common become one, in the place of the first."""
    groups: dict[tuple[Any, ...], list[Candidate]] = {}
    for candidate in candidates:
        results = (candidate.makespans_us, candidate.headroom, *candidate.time_us.values())
        groups.setdefault((candidate.tiling, candidate.is_usual, *results), []).append(candidate)
    return [replace(first, same=tuple(other.policy for other in others)) for first, *others in groups.values()]


def _rungs(trials: int, seeds: int, best: int) -> list[tuple[int, int]]:
    """How many candidates each rung keeps, and how many seeds each of them has met after it."""
    rungs = [(trials, 1)]
    while rungs[-1][1] < seeds:
        num_kept, num_seeds = rungs[-1]
        rungs.append((max(best, math.ceil(num_kept / _HALVING)), min(_HALVING * num_seeds, seeds)))
    return rungs


@dataclass(frozen=True)
class _Choice:
    policy: str
    tiling: Tiling


class _Space:
    """What a trial may choose: a policy and, unless that takes whole experts, how it cuts the projections.

    usual: the built-in policies with their own tilings.
    """

    def __init__(self, base: Point) -> None:
        model, given = base.model, base.inputs
        # an expert has each token at most once, so longer blocks are all the same
        most_tokens = min(256, (given["tokens"] or 256) * given["ep"])
        sizes = {
            "up_rows": _powers(4, model.d_ff),
            "down_rows": _powers(4, model.d_model),
            "block_tokens": _powers(16, most_tokens),
            "combine_tokens": _powers(1, min(8, given["tokens"] or 8)),
            "experts_per_pick": _powers(1, model.experts_per_pe(given["ep"]) // 2),
        }
        if given["gate"]:
            sizes["gate_experts"] = _powers(2, model.num_experts)
        defaults = [Tiling(down="tile").to_dict(), Tiling(down="rows").to_dict()]
        self.sizes = {name: sorted({*of, *(sizes[name] for sizes in defaults)}) for name, of in sizes.items()}
        built_in = [resolve_policy(name) for name in policy_names()]
        self.usual = [_Choice(policy.name, policy.tiling) for policy in built_in if policy.rank is None]

    def choice_of(self, trial: optuna.Trial) -> _Choice:
        name = trial.suggest_categorical("policy", [usual.policy for usual in self.usual])
        own = resolve_policy(name).tiling
        if own.granularity == "token":
            return _Choice(name, own)
        down: Any = trial.suggest_categorical("down", ["tile", "rows"])
        # as places in a list: the sampler then knows that they are ordered, and takes steps between powers
        sizes = {}
        for size in self._of(down):
            sizes[size] = self.sizes[size][trial.suggest_int(size, 0, len(self.sizes[size]) - 1)]
        return _Choice(name, Tiling(down=down, **sizes))

    def trial_of(self, choice: _Choice) -> dict[str, Any]:
        """What `choice_of` has to draw for this choice."""
        if choice.tiling.granularity == "token":
            return {"policy": choice.policy}
        of = choice.tiling.to_dict()
        places = {size: self.sizes[size].index(of[size]) for size in self._of(choice.tiling.down)}
        return {"policy": choice.policy, "down": choice.tiling.down, **places}

    def _of(self, down: str) -> list[str]:
        return [size for size in self.sizes if down == "rows" or size != "experts_per_pick"]


def _powers(least: int, most: int) -> list[int]:
    """Powers of two from least, itself one, up to the first that reaches most."""
    powers = [least]
    while powers[-1] < most:
        powers.append(2 * powers[-1])
    return powers


class _Contest:
    """Choices and their simulations so far. rows: of each choice, one a seed. errors: of those that cannot run."""

    def __init__(
        self, given: Mapping[str, Any], first_seed: int, processes: int | None, progress: Progress | None
    ) -> None:
        self.given, self.first_seed, self.processes = given, first_seed, processes
        self.progress, self.done, self.total = progress, 0, 0
        self.rows: dict[_Choice, dict[int, Row]] = {}
        self.errors: dict[_Choice, str] = {}

    def simulate(self, choices: Iterable[_Choice], num_seeds: int) -> None:
        """Simulate each choice with those of the first num_seeds seeds that it has not met yet."""
        points: dict[str, Point] = {}
        choice_of: dict[str, _Choice] = {}
        for choice in dict.fromkeys(choices):
            met = self.rows.setdefault(choice, {})
            cut = {f"tiling.{name}": value for name, value in choice.tiling.to_dict().items()}
            for seed in range(self.first_seed + len(met), self.first_seed + num_seeds):
                point = resolve({**self.given, "policy": choice.policy, **cut, "seed": seed})
                points[point.digest], choice_of[point.digest] = point, choice
        for rows in on_cores(list(points.values()), self.processes):
            for row in rows:
                choice = choice_of[row["digest"]]
                self.rows[choice][row["seed"]] = row
                if row["error"] is not None:
                    self.errors[choice] = row["error"]
            self.done += len(rows)
            if self.progress is not None:
                self.progress(self.done, self.total)

    def makespans_us(self, choice: _Choice) -> tuple[float, ...]:
        return tuple(row["makespan_us"] for _, row in sorted(self.rows[choice].items()))

    def mean_us(self, choice: _Choice) -> float:
        return float(np.mean(self.makespans_us(choice)))

    def ranked(self, choices: Iterable[_Choice]) -> list[_Choice]:
        """Shortest mean first; of a policy's choices with the very same makespans only the first found."""
        working = [choice for choice in choices if choice not in self.errors]
        different = {(choice.policy, self.makespans_us(choice)): choice for choice in reversed(working)}
        return sorted(reversed(different.values()), key=self.mean_us)

    def candidate(self, choice: _Choice, is_usual: bool) -> Candidate:
        rows = list(self.rows[choice].values())
        # all workers' time of a row, to that of one worker, to µs
        num_workers = rows[0]["ep_size"] * rows[0]["num_workers"]
        return Candidate(
            policy=choice.policy,
            tiling=choice.tiling,
            is_usual=is_usual,
            makespans_us=self.makespans_us(choice),
            headroom=float(np.mean([row["headroom"] for row in rows])),
            time_us={
                name: float(np.mean([row[f"time_{name}_ps"] for row in rows])) / num_workers / 1e6
                for name in TIME_SHARES
            },
        )
