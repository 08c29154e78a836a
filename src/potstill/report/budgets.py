"""Records -> the axis of budgets: RL beside each critic after so many agent steps, against students. Pure, seeded."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from potstill.analysis.scaling import Bounded, BudgetLaw, budget_law, steps_to_pass
from potstill.analysis.statistics import Arm
from potstill.arms import REWARD
from potstill.report.comparisons import Difference, Ratio, differences, ratios, size_ratios
from potstill.report.groups import (
    Certificate,
    Group,
    Record,
    Scale,
    by_budget,
    generator,
    groups_of,
    number,
    student_arm,
)

PLAYS = ("greedy", "sampled")
"""Ways to play, neither above the other."""


class AtBudget(NamedTuple):
    """RL of one critic after so many agent steps, in one way of playing, against the students that answers are of."""

    reward: str
    play: str
    steps: float  # agent steps of a run, to two figures
    groups: tuple[Group, ...]  # RL's, small to large
    students: tuple[Group, ...]
    ratios: tuple[Ratio, ...]
    differences: tuple[Difference, ...]
    shrunk: tuple[tuple[float, Bounded], ...]
    """By score, the size RL needs over the one it needed at the budget before; empty at the first."""


class Passing(NamedTuple):
    """D*(N): when RL passes the student of its size."""

    reward: str
    play: str
    width: str
    parameters: int
    steps: Bounded
    spent: float | None  # agent steps of the student and its teacher together


class Law(NamedTuple):
    """What one law says of RL's score in size and budget."""

    reward: str
    play: str
    law: BudgetLaw


def at_budgets(
    records: Sequence[Record], certificates: Sequence[Certificate], scale: Scale, seed: int, resamples: int
) -> Iterable[AtBudget]:
    """RL against the students, by play, critic and budget; none where one of the two was not played so."""
    for play in PLAYS:
        runs = _played(records, play)
        student = student_arm({str(run.get("arm")) for run in runs})
        distilled = [run for run in runs if student is not None and run.get("arm") == student]
        students = list(groups_of(distilled, certificates, scale, seed, resamples))
        for reward in REWARD if students else ():
            before: list[Group] = []
            for steps, mine in by_budget(runs, reward).items():
                rl = list(groups_of(mine, certificates, scale, seed, resamples))
                pair = {reward: rl, students[0].arm: students}
                rng = ("shrunk", reward, play, steps)
                yield AtBudget(
                    reward, play, steps, tuple(rl), tuple(students),
                    ratios=tuple(ratios(pair, scale, seed, resamples, [])),
                    differences=tuple(differences(pair, scale, seed, resamples, reward)),
                    shrunk=tuple(size_ratios(rl, before, scale.targets, seed, rng, resamples, []) if before else ()),
                )  # fmt: skip
                before = rl


def passings(each: Sequence[AtBudget], seed: int, resamples: int) -> Iterable[Passing]:
    """D*(N) at every size that has two runs or more of the student, and of RL at two budgets or more."""
    for _, at in _curves(each):
        for student in (group for group in at[0].students if group.units > 1):
            found = [(budget.steps, group) for budget in at for group in budget.groups]
            found = [(d, group) for d, group in found if group.parameters == student.parameters and group.units > 1]
            if len(found) < 2:
                continue
            steps, groups = zip(*found, strict=True)
            kind = at[0].reward, at[0].play
            rng = generator(seed, "passing", *kind, student.parameters)
            own, teacher = student.middle("env_steps"), student.middle("teacher_env_steps")
            spent = own + teacher if own is not None and teacher is not None else None
            passed = steps_to_pass(steps, _by_seed(groups), student.games, rng, resamples)
            yield Passing(*kind, student.width, student.parameters, passed, spent)


def laws(each: Sequence[AtBudget]) -> Iterable[Law]:
    """S(N, D) of each critic and play; none where the budgets are too few to show a lack of fit."""
    for (reward, play), at in _curves(each):
        scores: dict[int, dict[float, list[float]]] = {}
        for budget in at:
            for group in budget.groups:
                scores.setdefault(group.parameters, {})[budget.steps] = [float(run["score"]) for run in group.runs]
        whole = {size: by_steps for size, by_steps in scores.items() if len(by_steps) > 2}
        if whole and (law := budget_law(whole)) is not None:
            yield Law(reward, play, law)


def _played(records: Sequence[Record], play: str) -> list[Record]:
    if play == "greedy":
        return list(records)
    known = [run for run in records if number(run, "score_sampled") is not None]
    return [run | {"score": run["score_sampled"], "returns": None} for run in known]


def _curves(each: Sequence[AtBudget]) -> list[tuple[tuple[str, str], list[AtBudget]]]:
    """The budgets of each critic and play, small to large."""
    keys = dict.fromkeys((at.reward, at.play) for at in each)
    return [(key, [at for at in each if (at.reward, at.play) == key]) for key in keys]


def _by_seed(groups: Sequence[Group]) -> list[Arm]:
    """Runs of the same seeds at every budget, which are branches of one, as units that are drawn together."""
    seeds = [[run.get("seed") for run in group.runs] for group in groups]
    if len({frozenset(found) for found in seeds}) > 1 or any(len(set(found)) < len(found) for found in seeds):
        return [group.games for group in groups]
    flat = [
        dict(zip(found, (run for runs in group.games for run in runs), strict=True))
        for found, group in zip(seeds, groups, strict=True)
    ]
    return [[[runs[seed]] for seed in flat[0]] for runs in flat]
