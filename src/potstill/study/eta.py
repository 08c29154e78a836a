"""How long the rest of a study takes, judged by what its runs have taken so far."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from potstill.study.plan import RunSpec

TRAINING = 0.8  # a run's training takes about this share of its time; the games take the rest
EARLY = 0.02  # share of the training before which a run tells nothing about its speed


class Underway(NamedTuple):
    """A run that is not over."""

    spec: RunSpec
    seconds: float  # since it was started, or started again
    before: float  # share of its training that was done then
    now: float  # and that is done now
    games: float | None = None  # seconds that the games of its evaluation still take; None before the first

    @property
    def whole(self) -> float | None:
        """Seconds it takes from beginning to end, by its own speed; None too early."""
        if self.games is not None:
            return (self.seconds + self.games) / max(1.0 - TRAINING * self.before, 1.0 - TRAINING)
        trained = self.now - self.before
        return self.seconds / (TRAINING * trained) if trained >= EARLY else None


class Eta:
    """What runs take from beginning to end. Those of one arm and width are alike; arms and widths are not."""

    def __init__(self) -> None:
        self._ended: list[tuple[RunSpec, float]] = []

    def ended(self, run: Underway) -> None:
        """Notes a run that is over."""
        self._ended.append((run.spec, run.seconds / max(1.0 - TRAINING * run.before, 1.0 - TRAINING)))

    def left(self, active: Sequence[Underway], waiting: Sequence[RunSpec], workers: int) -> float:
        """Seconds until all runs are over; nan before there is anything to go by.

        Per agent step, a run is taken to be like the mean of those of its arm and width, else of its arm, else of all.
        """
        known = {_kind(spec) for spec, _ in self._ended}
        own = {run.spec.name: run.whole for run in active if run.whole is not None and _kind(run.spec) not in known}
        seen = self._ended + [(run.spec, own[run.spec.name]) for run in active if run.spec.name in own]
        if not seen:
            return math.nan
        rests = [_expected(spec, seen) * (1.0 - TRAINING * spec.inherited) for spec in waiting]
        for run in active:
            whole = own.get(run.spec.name) or _expected(run.spec, seen)
            rest = max(whole * (1.0 - TRAINING * run.before) - run.seconds, 0.0)
            rests.append(rest if run.games is None else run.games)
        return max(sum(rests) / max(1, min(workers, len(rests))), *rests, 0.0)


def _kind(spec: RunSpec) -> tuple[str, str]:
    return spec.arm, spec.config.network.width


def _expected(spec: RunSpec, seen: Sequence[tuple[RunSpec, float]]) -> float:
    alike_by: tuple[Callable[[RunSpec], bool], ...] = (
        lambda other: _kind(other) == _kind(spec),
        lambda other: other.arm == spec.arm,
        lambda other: True,
    )
    alike = next(filter(None, ([each for each in seen if by(each[0])] for by in alike_by)))
    per_step = sum(seconds / other.config.total_timesteps for other, seconds in alike) / len(alike)
    return per_step * spec.config.total_timesteps
