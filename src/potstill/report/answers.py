"""Records -> answers: what the runs of a study say of its questions, on one task. Pure, seeded; no files, no plots."""

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from potstill.analysis import scaling
from potstill.analysis.scaling import Bounded, Convergence, Law
from potstill.analysis.statistics import (
    Arm,
    Estimate,
    FloatArray,
    Interval,
    bootstrap,
    difference,
    holm,
    probability_of_improvement,
)
from potstill.errors import InputError
from potstill.results import convergence_of

Record = dict[str, Any]

REWARD = ("rl", "rl-split")
LONG = {f"{arm}-long": arm for arm in REWARD}  # at twice the budget: the evidence for convergence, compared with no arm
STUDENTS = ("distill-student", "distill-teacher", "distill-mixed", "ppd", "finetune", "self-distill")
NAMES = {
    "rl": "RL from scratch",
    "rl-split": "RL with a full-size critic",
    "distill-student": "student-led distillation",
    "distill-teacher": "teacher-led distillation",
    "distill-mixed": "distillation with a mixed lead",
    "ppd": "proximal policy distillation",
    "finetune": "distillation, then RL",
    "self-distill": "self-distillation",
}
BUDGETS = {"env_steps": "agent steps", "gradient_steps": "gradient steps", "training_macs": "multiply-adds"}
ENOUGH = 0.95  # RL had no less of a budget than a student: so much of it counts as the same


class Scale(NamedTuple):
    """What a task's scores are measured against."""

    targets: tuple[float, ...]
    """Scores at which sizes are compared."""
    margin: float
    """Differences within it are as good as none."""
    points: bool
    """Games are played for points, won or lost: the score is their difference."""
    limit: float = math.inf
    """No score is further from 0, though the interval of two runs may reach further."""

    def within(self, interval: Interval, scores: int = 1) -> Interval:
        """What of an interval is possible for a score, or for the difference of two.

        Infinite ends stay: they say that there is none.
        """
        limit = scores * self.limit
        low, high = (end if math.isinf(end) else min(max(end, -limit), limit) for end in interval[1:])
        return Interval(interval.value, low, high)


class Certificate(NamedTuple):
    """Whether one RL run had learned what it would."""

    run: str
    width: str
    seed: int | None
    convergence: Convergence | None
    """None: it has no learning curve to tell from."""

    @property
    def verdict(self) -> str:
        return self.convergence.verdict if self.convergence is not None else "unknown"


@dataclass(frozen=True)
class Cell:
    """The runs of one arm at one size."""

    arm: str
    width: str
    parameters: int
    runs: tuple[Record, ...]
    teachers: tuple[str, ...]
    """Of `games`, in its order; an arm without teachers has one, ""."""
    games: Arm
    score: Interval
    """Interquartile mean of the runs; its bounds are infinite where there is one outermost unit only."""
    lower_bound: bool
    """A run from scratch among them that was not shown to have converged: more training may bring more."""

    @property
    def units(self) -> int:
        """Outermost units of the bootstrap: teachers, or the runs of a single one."""
        return _units(self.games)

    def middle(self, key: str) -> float | None:
        """Median over the runs that know `key`; None where none does."""
        values = [value for run in self.runs if (value := number(run, key)) is not None]
        return float(median(values)) if values else None


class Ratio(NamedTuple):
    """rho(p): how many times the size RL needs to reach a score."""

    reward: str
    student: str
    target: float
    size: Bounded


@dataclass(frozen=True)
class Difference:
    """An arm less RL from scratch, at equal size."""

    arm: str
    width: str
    parameters: int
    score: Interval
    p: float | None
    """Holm-corrected over the sizes of the arm; None where a cell has one outermost unit: no test."""
    equivalent: bool
    improvement: Interval
    """Probability that a run of the arm scores above one of RL."""
    lower_bound: bool
    """RL's cell is a lower bound, so the difference is an upper one."""


class Budget(NamedTuple):
    """What RL from scratch spent for each unit a student spent, least and most over the sizes that both have."""

    student: str
    measure: str
    alone: tuple[float, float] | None
    with_teacher: tuple[float, float] | None

    @property
    def no_less(self) -> bool:
        """RL had as much of it as the student, or more, at every size."""
        return self.alone is not None and self.alone[0] >= ENOUGH


@dataclass(frozen=True)
class Scaling:
    """A law of size of one arm, and how well it predicts sizes left out."""

    arm: str
    law: Law
    exponent: Estimate
    intercept: float
    held_out: float | None
    """Root mean square of the errors, in units of the quantity; None with fewer than 3 sizes."""
    sizes: tuple[int, ...]


class Ablation(NamedTuple):
    """An arm of the study's own at one size, and the protocol's arm that it is a change of."""

    cell: Cell
    base: Cell | None
    """Of the same method and size; None where there is none."""
    less_base: Interval | None
    """Their difference over the teachers that both have, which are paired; None where one has a single run."""


class Longer(NamedTuple):
    """The distilled arm that the answers are about against RL with twice the budget (the arm rl-long)."""

    ratios: tuple[Ratio, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Answers:
    """All that is computed of one task's runs."""

    task: str
    records: tuple[Record, ...]
    scale: Scale
    cells: tuple[Cell, ...]
    certificates: tuple[Certificate, ...]
    ratios: tuple[Ratio, ...]
    differences: tuple[Difference, ...]
    budgets: tuple[Budget, ...]
    scalings: tuple[Scaling, ...]
    front: dict[str, tuple[bool, ...]]
    """Of each cost, which of `cells` no other beats in cost and score; False for a cell without that cost."""
    ablations: tuple[Ablation, ...]
    longer: Longer | None
    """None where RL was not given twice the budget."""
    notes: tuple[str, ...]
    """What was left out of a computation, and why."""

    def of(self, arm: str) -> list[Cell]:
        """An arm's cells, small to large."""
        return [cell for cell in self.cells if cell.arm == arm]

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(cell.arm for cell in self.cells))

    @property
    def student(self) -> str | None:
        """The distilled arm that the answers are about: the student-led one, else the first there is."""
        return _student(self.arms)


def answer(records: Sequence[Record], seed: int = 0, resamples: int = 10_000) -> Answers:
    """Everything the report says of the runs of one task.

    Args:
        records: of `results.read_runs`, all of one task; failed and unfinished ones count as missing.
        seed: decides everything drawn. Each number has a generator of its own: an arm more changes no other's.
        resamples: of every bootstrap.

    Raises:
        InputError: records of several tasks.
    """
    tasks = sorted({str(record["env"]) for record in records if record.get("env")})
    if len(tasks) > 1:
        raise InputError(f"the runs are of several tasks ({', '.join(tasks)}): their scores are not comparable")
    task = tasks[0] if tasks else "unknown task"
    notes: list[str] = []
    certificates = tuple(_certificates(records))
    scale = _scale(task, records)
    cells = tuple(_cells(records, certificates, scale, seed, resamples))
    by_arm = {arm: [cell for cell in cells if cell.arm == arm] for arm in dict.fromkeys(cell.arm for cell in cells)}
    return Answers(
        task,
        tuple(records),
        scale,
        cells,
        certificates,
        tuple(_ratios(by_arm, scale, seed, resamples, notes)),
        tuple(_differences(by_arm, scale, seed, resamples)),
        tuple(_budgets(by_arm)),
        tuple(_scalings(by_arm, scale, seed, resamples, notes)),
        {cost: _front(cells, cost) for cost in ("latency_ms", "bytes", "macs")},
        tuple(_ablations(cells, scale, seed, resamples)),
        _longer(records, by_arm, scale, seed, resamples),
        tuple(dict.fromkeys(notes)),
    )


def name(arm: str) -> str:
    """An arm in words."""
    return NAMES.get(arm, arm)


def _student(arms: Iterable[str]) -> str | None:
    present = set(arms)
    return next((arm for arm in STUDENTS if arm in present), None)


def number(record: Record, key: str) -> float | None:
    """A record's value where it is a finite number, else None."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def scored(record: Record) -> bool:
    """Whether a run is done and was evaluated."""
    return record.get("status") == "done" and None not in (number(record, "score"), number(record, "parameters"))


def steps_to_reach(record: Record, target: float) -> float | None:
    """Agent steps after which a run's learning curve first stood at `target` or higher; None where it never did."""
    return next((step for step, score in learning_curve(record) if score >= target), None)


def learning_curve(record: Record) -> list[tuple[float, float]]:
    """(step, score) of the points of a record's `curve` that have a score."""
    points = [(number(point, "step"), number(point, "score")) for point in record.get("curve") or []]
    return [(step, score) for step, score in points if step is not None and score is not None]


def share_lost(run: Record) -> FloatArray:
    """Share of the points lost in a run of a game to 21, kept off 0 and 1; (1,)."""
    games = np.array(run.get("returns") or [run["score"]], dtype=np.float64)
    played = float((42 - np.abs(games)).sum())  # the winner has 21 points, the loser 21 less the score
    lost = float(np.where(games < 0, 21, 21 - games).sum())
    return scaling.smoothed_rate(np.array([lost]), np.array([played]))


def _scale(task: str, records: Sequence[Record]) -> Scale:
    if "pong" in task.lower():
        return Scale((0, 10, 15, 18, 20), 0.5, points=True, limit=21)
    best = [value for record in records if (value := number(record, "teacher_score")) is not None]
    best = best or [value for record in records if (value := number(record, "score")) is not None] or [1.0]
    low = next((value for record in records if (value := number(record, "random_score")) is not None), 0.0)
    span = float(np.mean(best)) - low
    # As fractions of the teacher's score over a random policy's. In Pong half a point is an eightieth of that.
    return Scale(tuple(float(f"{low + part * span:.3g}") for part in (0.25, 0.5, 0.75, 0.9)), span / 80, points=False)


def _rng(seed: int, *names: object) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(repr(names).encode())])


def _certificates(records: Sequence[Record]) -> Iterable[Certificate]:
    found = convergence_of(records)
    for run in records:
        if run.get("arm") in REWARD and scored(run):
            yield Certificate(str(run["run"]), str(run.get("width")), run.get("seed"), found.get(run["run"]))


def _cells(
    records: Sequence[Record], certificates: Sequence[Certificate], scale: Scale, seed: int, resamples: int
) -> Iterable[Cell]:
    converged = {certificate.run for certificate in certificates if certificate.verdict == "converged"}
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        if scored(record) and record.get("arm") not in LONG:
            groups.setdefault((str(record.get("arm")), int(record["parameters"])), []).append(record)
    known = [*REWARD, *STUDENTS]
    order = sorted(groups, key=lambda at: (known.index(at[0]) if at[0] in known else len(known), *at))
    for arm, parameters in order:
        runs = sorted(groups[arm, parameters], key=lambda run: (_teacher(run), str(run.get("run"))))
        teachers = tuple(dict.fromkeys(map(_teacher, runs)))
        games = [[_games(run) for run in runs if _teacher(run) == teacher] for teacher in teachers]
        score = scale.within(bootstrap(games, _rng(seed, "cell", arm, parameters), resamples).interval())
        bound = arm in REWARD and any(str(run.get("run")) not in converged for run in runs)
        yield Cell(arm, str(runs[0].get("width")), parameters, tuple(runs), teachers, games, score, bound)


def _teacher(run: Record) -> str:
    return str(run.get("teacher") or "")


def _games(run: Record) -> FloatArray:
    return np.asarray(run.get("returns") or [run["score"]], dtype=np.float64)


class _Curve(NamedTuple):
    cells: list[Cell]
    teachers: list[str]  # the same in each cell
    games: list[Arm]


def _curve(cells: Sequence[Cell], notes: list[str]) -> _Curve:
    """What a curve can be made of: the same teachers at every size. Sizes with too few teachers are left out, or else
    teachers with too few sizes, whichever keeps more runs; notes say so."""
    wide = [cell for cell in cells if cell.units > 1]
    named = sorted({teacher for cell in wide for teacher in cell.teachers})
    shared = [teacher for teacher in named if all(teacher in cell.teachers for cell in wide)]
    complete = [cell for cell in wide if len(cell.teachers) == len(named)]
    choices = [(complete, named), (wide, shared)]
    kept, teachers = max(
        choices, key=lambda choice: sum(len(runs) for cell in choice[0] for runs in _of(cell, choice[1]))
    )
    pairs = [(cell, games) for cell in kept if (games := _of(cell, teachers)) and _units(games) > 1]
    if pairs and (len(pairs) < len(cells) or len(teachers) < len(named)):
        dropped = [cell.width for cell in cells if cell.parameters not in {kept.parameters for kept, _ in pairs}]
        what = [f"width {', '.join(dropped)}"] if dropped else []
        what += [f"{len(named) - len(teachers)} of {len(named)} teachers"] if len(teachers) < len(named) else []
        notes.append(f"The curve of size of {name(cells[0].arm)} leaves out {' and '.join(what)}: too few runs there.")
    return _Curve([cell for cell, _ in pairs], teachers, [games for _, games in pairs])


def _of(cell: Cell, teachers: Sequence[str]) -> list[Sequence[FloatArray]]:
    return [runs for teacher, runs in zip(cell.teachers, cell.games, strict=True) if teacher in teachers]


def _units(games: Arm) -> int:
    return len(games) if len(games) > 1 else len(games[0])


def _ratios(arms: dict[str, list[Cell]], scale: Scale, seed: int, resamples: int, notes: list[str]) -> Iterable[Ratio]:
    for reward in (arm for arm in REWARD if arm in arms):
        for student in (arm for arm in STUDENTS if arm in arms):
            curves = [_curve(arms[name], notes) for name in (reward, student)]
            sizes = sorted(set.intersection(*({cell.parameters for cell in curve.cells} for curve in curves)))
            if len(sizes) < 2:
                continue
            rl, distilled = (
                [games for cell, games in zip(curve.cells, curve.games, strict=True) if cell.parameters in sizes]
                for curve in curves
            )
            for target in scale.targets:
                rng = _rng(seed, "ratio", reward, student, target)
                size = scaling.size_ratio(sizes, rl, distilled, target, rng, resamples=resamples)
                yield Ratio(reward, student, target, size)


def _differences(arms: dict[str, list[Cell]], scale: Scale, seed: int, resamples: int) -> Iterable[Difference]:
    baseline = {cell.parameters: cell for cell in arms.get("rl", [])}
    for arm in (arm for arm in (*REWARD[1:], *STUDENTS) if arm in arms):
        pairs = [(cell, baseline[cell.parameters]) for cell in arms[arm] if cell.parameters in baseline]
        found = [
            difference(x.games, y.games, _rng(seed, "difference", arm, x.parameters), resamples=resamples)
            for x, y in pairs
        ]
        tested = [min(x.units, y.units) > 1 for x, y in pairs]
        corrected = iter(holm([each.p_value() for each, yes in zip(found, tested, strict=True) if yes]).tolist())
        for (x, y), each, yes in zip(pairs, found, tested, strict=True):
            yield Difference(
                arm,
                x.width,
                x.parameters,
                scale.within(each.interval(), 2),
                next(corrected) if yes else None,
                yes and each.equivalent(scale.margin),
                probability_of_improvement(x.games, y.games),
                y.lower_bound,
            )


def _budgets(arms: dict[str, list[Cell]]) -> Iterable[Budget]:
    baseline = {cell.parameters: cell for cell in arms.get("rl", [])}
    for arm in (arm for arm in STUDENTS if arm in arms):
        pairs = [(cell, baseline[cell.parameters]) for cell in arms[arm] if cell.parameters in baseline]
        for measure in BUDGETS if pairs else ():
            alone: list[float] = []
            beside: list[float] = []
            for student, rl in pairs:
                own, teacher, spent = student.middle(measure), student.middle(f"teacher_{measure}"), rl.middle(measure)
                if own and spent is not None:
                    own += student.middle(f"initial_{measure}") or 0.0  # what a finetune began with
                    alone.append(spent / own)
                    beside += [spent / (own + teacher)] if teacher is not None else []
            yield Budget(
                arm,
                measure,
                (min(alone), max(alone)) if len(alone) == len(pairs) else None,
                (min(beside), max(beside)) if len(beside) == len(pairs) else None,
            )


def _scalings(
    arms: dict[str, list[Cell]], scale: Scale, seed: int, resamples: int, notes: list[str]
) -> Iterable[Scaling]:
    """Of Pong the share of points lost, by both laws; of another task the score, which has no ceiling to bend under."""
    laws: tuple[Law, ...] = ("sigmoid", "power") if scale.points else ("power",)
    for arm in (arm for arm in (*REWARD, *STUDENTS) if arm in arms):
        curve = _curve(arms[arm], notes)
        if len(curve.cells) < 2:
            continue
        measured: list[Arm] = [
            [[_quantity(run, scale) for run in cell.runs if _teacher(run) == teacher] for teacher in curve.teachers]
            for cell in curve.cells
        ]
        sizes = [cell.parameters for cell in curve.cells]
        for law in laws:
            try:
                fit = scaling.fit(sizes, measured, law, _rng(seed, "law", arm, law), resamples)
                errors = scaling.leave_one_size_out(sizes, measured, law) if len(sizes) > 2 else None
            except InputError as error:
                notes.append(f"No {law} law of {name(arm)}: {error}.")
                continue
            held_out = float(np.sqrt(np.mean(errors**2))) if errors is not None else None
            yield Scaling(arm, law, fit.exponent, fit.intercept, held_out, tuple(sizes))


def _longer(
    records: Sequence[Record], arms: dict[str, list[Cell]], scale: Scale, seed: int, resamples: int
) -> Longer | None:
    doubled = [run | {"arm": "rl"} for run in records if run.get("arm") == "rl-long"]
    cells = list(_cells(doubled, (), scale, seed, resamples))
    student = _student(arms)
    if not cells or student is None:
        return None
    pair = {"rl": cells, student: arms[student]}
    return Longer(tuple(_ratios(pair, scale, seed, resamples, [])), tuple(_differences(pair, scale, seed, resamples)))


def _ablations(cells: Sequence[Cell], scale: Scale, seed: int, resamples: int) -> Iterable[Ablation]:
    bases = {_place(cell): cell for cell in cells if cell.arm in ("rl", "distill-student")}
    for cell in (cell for cell in cells if cell.arm not in (*REWARD, *STUDENTS)):
        base, less = bases.get(_place(cell)), None
        if base is not None:
            shared = [teacher for teacher in base.teachers if teacher in cell.teachers]
            x, y = _of(cell, shared), _of(base, shared)
            if shared and min(_units(x), _units(y)) > 1:
                rng = _rng(seed, "ablation", cell.arm, cell.parameters)
                less = scale.within(difference(x, y, rng, len(shared) > 1, resamples).interval(), 2)
        yield Ablation(cell, base, less)


def _place(cell: Cell) -> tuple[str, int]:
    return str(cell.runs[0].get("method")), cell.parameters


def _quantity(run: Record, scale: Scale) -> FloatArray:
    return share_lost(run) if scale.points else np.array([run["score"]], dtype=np.float64)


def _front(cells: Sequence[Cell], cost: str) -> tuple[bool, ...]:
    known = [(i, value) for i, cell in enumerate(cells) if (value := cell.middle(cost)) is not None]
    if not known:
        return (False,) * len(cells)
    best = scaling.pareto_front([value for _, value in known], [cells[i].score.value for i, _ in known])
    front = {i for (i, _), yes in zip(known, best, strict=True) if yes}
    return tuple(i in front for i in range(len(cells)))
