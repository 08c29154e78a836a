"""Records -> groups: the runs of each arm at each size, and what each record says. Pure, seeded; no files, no plots."""

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from potstill.analysis.scaling import Convergence
from potstill.analysis.statistics import Arm, FloatArray, Interval, bootstrap
from potstill.arms import LONG, REWARD, STUDENTS, look_of, order_of
from potstill.results import convergence_of
from potstill.tasks import task_of

Record = dict[str, Any]


class Scale(NamedTuple):
    """What a task's scores are measured against."""

    targets: tuple[float, ...]  # scores at which sizes are compared
    margin: float  # differences within it are as good as none
    points: bool  # games are played for points, won or lost: the score is their difference
    limits: tuple[float, float] = (-math.inf, math.inf)
    """No score lies beyond them, though the interval of two runs may reach further."""

    def within(self, interval: Interval, difference: bool = False) -> Interval:
        """What of an interval is possible for a score, or for the difference of two.

        Infinite ends stay: they say that there is none.
        """
        least, most = self.limits
        if difference:
            least, most = least - most, most - least
        low, high = (end if math.isinf(end) else min(max(end, least), most) for end in interval[1:])
        return Interval(interval.value, low, high)


class Certificate(NamedTuple):
    """Whether one RL run had learned what it would."""

    run: str
    width: str
    seed: int | None
    convergence: Convergence | None  # None: it has no learning curve to tell from

    @property
    def verdict(self) -> str:
        return self.convergence.verdict if self.convergence is not None else "unknown"


@dataclass(frozen=True)
class Group:
    """The runs of one arm at one size."""

    arm: str
    width: str
    parameters: int
    runs: tuple[Record, ...]
    teachers: tuple[str, ...]
    """Of `games`, in its order; an arm without teachers has one, ""."""
    games: Arm
    score: Interval  # interquartile mean of the runs; its bounds are infinite where there is one outermost unit only
    lower_bound: bool
    """A run from scratch among them that was not shown to have converged: more training may bring more."""

    @property
    def units(self) -> int:
        """Outermost units of the bootstrap: teachers, or the runs of a single one."""
        return units_of(self.games)

    def middle(self, key: str) -> float | None:
        """Median over the runs that know `key`; None where none does."""
        return float(median(values)) if (values := self._values(key)) else None

    def mean(self, key: str) -> float | None:
        """As `middle`, their mean."""
        return float(np.mean(values)) if (values := self._values(key)) else None

    def _values(self, key: str) -> list[float]:
        return [value for run in self.runs if (value := number(run, key)) is not None]


def name(arm: str) -> str:
    """An arm in words."""
    return look_of(arm).label


def student_arm(arms: Iterable[str]) -> str | None:
    """The distilled arm that answers are about: the first of `STUDENTS` that there is."""
    present = set(arms)
    return next((arm for arm in STUDENTS if arm in present), None)


def number(record: Record, key: str) -> float | None:
    """A record's value where it is a finite number, else None."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def share_kept(score: float, teacher: float) -> float | None:
    """What part of its teacher's points a score is; None where the teacher has none to keep."""
    return score / teacher if teacher > 0 else None


def scored(record: Record) -> bool:
    """Whether a run is done and was evaluated."""
    return record.get("status") == "done" and None not in (number(record, "score"), number(record, "parameters"))


def scale_of(task: str, records: Sequence[Record], targets: Sequence[float] = ()) -> Scale:
    """What the plan says (`targets`), or the task's entry; what they leave open, of what the teachers score over random
    play."""
    known = task_of(task)
    best = [value for record in records if (value := number(record, "teacher_score")) is not None]
    best = best or [value for record in records if (value := number(record, "score")) is not None] or [1.0]
    low = next((value for record in records if (value := number(record, "random_score")) is not None), 0.0)
    span = float(np.mean(best)) - low
    # As fractions of the teacher's score over a random policy's. In Pong half a point is an eightieth of that.
    shares = tuple(float(f"{low + part * span:.3g}") for part in (0.25, 0.5, 0.75, 0.9))
    margin = known.margin if known.margin is not None else span / 80
    return Scale(tuple(targets) or known.targets or shares, margin, known.two_sided, known.limits)


def generator(seed: int, *names: object) -> np.random.Generator:
    """A generator of its own for each number that is drawn."""
    return np.random.default_rng([seed, zlib.crc32(repr(names).encode())])


def certificates_of(records: Sequence[Record]) -> Iterable[Certificate]:
    """One for each run of RL that was evaluated."""
    found = convergence_of(records)
    for run in records:
        if run.get("arm") in REWARD and scored(run):
            yield Certificate(str(run["run"]), str(run.get("width")), run.get("seed"), found.get(run["run"]))


def budget_of(run: Record) -> float:
    """Agent steps of a run, to two figures: a rollout more or less is none; 0 where they are not known."""
    return float(f"{number(run, 'env_steps') or 0.0:.2g}")


def by_budget(records: Sequence[Record], arm: str) -> dict[float, list[Record]]:
    """An arm's runs by their agent steps, few to many, branches and longer runs of the same arm among them."""
    found: dict[float, list[Record]] = {}
    for run in records:
        if scored(run) and LONG.get(str(run.get("arm")), run.get("arm")) == arm:
            found.setdefault(budget_of(run), []).append(run if run["arm"] == arm else run | {"arm": arm})
    return dict(sorted(found.items()))


def headline(records: Sequence[Record]) -> list[Record]:
    """The records that answers are of: of an arm with branches those of one budget, the least at which it had as many
    agent steps as a student and its teacher together, else the largest; of other arms all."""
    student = student_arm({str(run.get("arm")) for run in records})
    distilled = [run for run in records if student is not None and run.get("arm") == student]
    both = [(number(run, "env_steps"), number(run, "teacher_env_steps")) for run in distilled]
    spent = [own + teacher for own, teacher in both if own is not None and teacher is not None]
    needed = 0.95 * float(median(spent)) if spent else math.inf
    branched = {str(run.get("arm")) for run in records if run.get("branch") is not None}
    chosen = {arm: list(by_budget(records, arm)) or [0.0] for arm in branched}
    budgets = {arm: next((d for d in found if d >= needed), found[-1]) for arm, found in chosen.items()}
    return [run for run in records if budgets.get(str(run.get("arm")), budget_of(run)) == budget_of(run)]


def groups_of(
    records: Sequence[Record], certificates: Sequence[Certificate], scale: Scale, seed: int, resamples: int
) -> Iterable[Group]:
    """The runs that were evaluated by arm and size: the protocol's arms in its order, then others; small to large."""
    converged = {certificate.run for certificate in certificates if certificate.verdict == "converged"}
    by_size: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        if scored(record) and record.get("arm") not in LONG:  # as `by_budget` renames them
            by_size.setdefault((str(record.get("arm")), int(record["parameters"])), []).append(record)
    order = sorted(by_size, key=lambda at: (order_of(at[0]), at[1]))
    for arm, parameters in order:
        runs = sorted(by_size[arm, parameters], key=lambda run: (teacher_of(run), str(run.get("run"))))
        teachers = tuple(dict.fromkeys(map(teacher_of, runs)))
        games = [[_games(run) for run in runs if teacher_of(run) == teacher] for teacher in teachers]
        score = scale.within(bootstrap(games, generator(seed, "cell", arm, parameters), resamples).interval())
        bound = arm in REWARD and any(str(run.get("run")) not in converged for run in runs)
        yield Group(arm, str(runs[0].get("width")), parameters, tuple(runs), teachers, games, score, bound)


def teacher_of(run: Record) -> str:
    """Whose student a run is; "" for one without a teacher."""
    return str(run.get("teacher") or "")


def _games(run: Record) -> FloatArray:
    return np.asarray(run.get("returns") or [run["score"]], dtype=np.float64)


def units_of(games: Arm) -> int:
    """Outermost units of a bootstrap over `games`: teachers, or the runs of a single one."""
    return len(games) if len(games) > 1 else len(games[0])
