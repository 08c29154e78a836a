"""Groups -> comparisons: arms at equal size and at equal score, what they cost, their laws of size. Pure, seeded."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress, pairwise
from typing import NamedTuple

import numpy as np

from potstill.analysis import scaling, statistics
from potstill.analysis.scaling import Bounded
from potstill.analysis.statistics import Arm, FloatArray, Interval, difference
from potstill.arms import REWARD, STUDENTS
from potstill.report.groups import Group, Scale, generator, name, units_of


class Ratio(NamedTuple):
    """rho(p): how many times the size RL needs to reach a score."""

    reward: str
    student: str
    target: float
    size: Bounded


@dataclass(frozen=True)
class Difference:
    """An arm less RL from scratch, or less another arm, at equal size."""

    arm: str
    width: str
    parameters: int
    score: Interval
    p: float | None
    """Of the permutation test of the difference of means, Holm-corrected over the arm's sizes; None where a group has
    one outermost unit: no test."""
    equivalent: bool
    improvement: float  # probability that a run of the arm scores above one of RL
    lower_bound: bool  # RL's group is a lower bound, so the difference to it is an upper one


class Growth(NamedTuple):
    """What a doubling of the parameters brings an arm between two neighbouring sizes."""

    arm: str
    sizes: tuple[int, int]
    score: Interval  # points per doubling; without ends where a size has a single run


class Ablation(NamedTuple):
    """An arm of the study's own at one size, and the protocol's arm that it is a change of."""

    group: Group
    base: Group | None  # of the same method and size; None where there is none
    less_base: Interval | None
    """Their difference over the teachers that both have, which are paired; None where one has a single run."""


def ratios(arms: dict[str, list[Group]], scale: Scale, seed: int, resamples: int, notes: list[str]) -> Iterable[Ratio]:
    """How many times the size RL needs for each of the task's scores, on curves of the sizes that both arms have.

    Args:
        arms: each arm's groups, small to large.
        notes: what a curve had to leave out is added to them.
    """
    for reward in (arm for arm in REWARD if arm in arms):
        for student in (arm for arm in STUDENTS if arm in arms):
            called = ("ratio", reward, student)
            found = size_ratios(arms[reward], arms[student], scale.targets, seed, called, resamples, notes)
            yield from (Ratio(reward, student, target, size) for target, size in found)


def size_ratios(
    rl: Sequence[Group], others: Sequence[Group], targets: Sequence[float], seed: int, called: tuple[object, ...],
    resamples: int, notes: list[str],
) -> Iterable[tuple[float, Bounded]]:  # fmt: skip
    """By score, the size that `rl` needs over the one that `others` need; `called` tells its draws from others'."""
    curves = [_curve(groups, notes) for groups in (rl, others)]
    sizes = sorted(set.intersection(*({group.parameters for group in curve.groups} for curve in curves)))
    if len(sizes) < 2:
        return
    x, y = (
        [games for group, games in zip(curve.groups, curve.games, strict=True) if group.parameters in sizes]
        for curve in curves
    )
    for target in targets:
        yield target, scaling.size_ratio(sizes, x, y, target, generator(seed, *called, target), resamples)


def differences(
    arms: dict[str, list[Group]], scale: Scale, seed: int, resamples: int, reward: str = "rl"
) -> Iterable[Difference]:
    """Each arm less RL, of the arm `reward`, at each size that both have; tests are corrected over these."""
    baseline = {group.parameters: group for group in arms.get(reward, [])}
    for arm in (arm for arm in (*REWARD, *STUDENTS) if arm in arms and arm != reward):
        pairs = [(group, baseline[group.parameters]) for group in arms[arm] if group.parameters in baseline]
        tested = [min(x.units, y.units) > 1 for x, y in pairs]
        p = []
        for x, y in compress(pairs, tested):
            rng = generator(seed, "p", "difference", arm, x.parameters)
            p.append(statistics.permutation_test(_means(x.games), _means(y.games), rng))
        corrected = iter(statistics.holm(p).tolist())
        for (x, y), yes in zip(pairs, tested, strict=True):
            rng = generator(seed, "difference", arm, x.parameters)
            found = difference(x.games, y.games, rng, resamples=resamples)
            p_value, equivalent = (next(corrected), found.equivalent(scale.margin)) if yes else (None, False)
            better = statistics.probability_of_improvement(x.games, y.games)
            score = scale.within(found.interval(), difference=True)
            yield Difference(arm, x.width, x.parameters, score, p_value, equivalent, better, y.lower_bound)


def growths(arms: dict[str, list[Group]], seed: int, resamples: int) -> Iterable[Growth]:
    """Between neighbouring sizes of each arm; paired over the teachers that both sizes have."""
    for arm in (arm for arm in (*REWARD, *STUDENTS) if arm in arms):
        for small, large in pairwise(arms[arm]):
            x, y = _with_shared(large, small)
            if not x:
                continue
            gain = difference(x, y, generator(seed, "growth", arm, small.parameters), len(x) > 1, resamples).interval()
            doublings = float(np.log2(large.parameters / small.parameters))
            yield Growth(arm, (small.parameters, large.parameters), Interval(*(each / doublings for each in gain)))


def ablations(groups: Sequence[Group], scale: Scale, seed: int, resamples: int) -> Iterable[Ablation]:
    """Every arm that the protocol does not know, with the one it is a change of."""
    bases = {_place(group): group for group in groups if group.arm in ("rl", "distill-student")}
    for group in (group for group in groups if group.arm not in (*REWARD, *STUDENTS)):
        base, less = bases.get(_place(group)), None
        if base is not None:
            x, y = _with_shared(group, base)
            if x and min(units_of(x), units_of(y)) > 1:
                rng = generator(seed, "ablation", group.arm, group.parameters)
                less = scale.within(difference(x, y, rng, len(x) > 1, resamples).interval(), difference=True)
        yield Ablation(group, base, less)


def front(groups: Sequence[Group], cost: str) -> tuple[bool, ...]:
    """Which of `groups` no other beats in `cost`, a key of their records, and in score; False without that cost."""
    known = [(i, value) for i, group in enumerate(groups) if (value := group.middle(cost)) is not None]
    if not known:
        return (False,) * len(groups)
    best = scaling.pareto_front([value for _, value in known], [groups[i].score.value for i, _ in known])
    best_groups = {i for (i, _), yes in zip(known, best, strict=True) if yes}
    return tuple(i in best_groups for i in range(len(groups)))


def _with_shared(x: Group, y: Group) -> tuple[Arm, Arm]:
    """The games of both with the teachers that both have, in one order; empty where there is none."""
    shared = [teacher for teacher in y.teachers if teacher in x.teachers]
    return _of(x, shared), _of(y, shared)


class _Curve(NamedTuple):
    groups: list[Group]
    teachers: list[str]  # the same in each group
    games: list[Arm]


def _curve(groups: Sequence[Group], notes: list[str]) -> _Curve:
    """What a curve can be made of: the same teachers at every size. Sizes with too few teachers are left out, or else
    teachers with too few sizes, whichever keeps more runs; notes say so."""
    wide = [group for group in groups if group.units > 1]
    named = sorted({teacher for group in wide for teacher in group.teachers})
    shared = [teacher for teacher in named if all(teacher in group.teachers for group in wide)]
    complete = [group for group in wide if len(group.teachers) == len(named)]
    choices = [(complete, named), (wide, shared)]
    kept, teachers = max(choices, key=lambda c: sum(len(runs) for group in c[0] for runs in _of(group, c[1])))
    pairs = [(group, games) for group in kept if (games := _of(group, teachers)) and units_of(games) > 1]
    if pairs and (len(pairs) < len(groups) or len(teachers) < len(named)):
        dropped = [group.width for group in groups if group.parameters not in {kept.parameters for kept, _ in pairs}]
        what = [f"width {', '.join(dropped)}"] if dropped else []
        what += [f"{len(named) - len(teachers)} of {len(named)} teachers"] if len(teachers) < len(named) else []
        notes.append(f"The curve of size of {name(groups[0].arm)} leaves out {' and '.join(what)}: too few runs there.")
    return _Curve([group for group, _ in pairs], teachers, [games for _, games in pairs])


def _of(group: Group, teachers: Sequence[str]) -> list[Sequence[FloatArray]]:
    return [runs for teacher, runs in zip(group.teachers, group.games, strict=True) if teacher in teachers]


def _place(group: Group) -> tuple[str, int]:
    return str(group.runs[0].get("method")), group.parameters


def _means(games: Arm) -> list[float]:
    return [float(np.mean(run)) for runs in games for run in runs]
