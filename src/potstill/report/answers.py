"""Records -> answers: what the runs of a study say of its questions, on one task. Pure, seeded; no files, no plots."""

from collections.abc import Sequence
from dataclasses import dataclass

from potstill.errors import InputError
from potstill.report import comparisons
from potstill.report.budgets import AtBudget, Law, Passing, at_budgets, laws, passings
from potstill.report.groups import (
    Certificate,
    Group,
    Record,
    Scale,
    budget_of,
    certificates_of,
    groups_of,
    headline,
    scale_of,
    student_arm,
)


@dataclass(frozen=True)
class Answers:
    """All that is computed of one task's runs."""

    task: str
    records: tuple[Record, ...]
    scale: Scale
    groups: tuple[Group, ...]
    certificates: tuple[Certificate, ...]
    ratios: tuple[comparisons.Ratio, ...]
    differences: tuple[comparisons.Difference, ...]
    growths: tuple[comparisons.Growth, ...]
    front: dict[str, tuple[bool, ...]]
    """Of each cost, which of `groups` no other beats in cost and score; False for a group without that cost."""
    ablations: tuple[comparisons.Ablation, ...]
    at_budgets: tuple[AtBudget, ...]
    """RL against `student` by play, critic and budget; the groups above are those of one budget, and greedy."""
    passings: tuple[Passing, ...]
    laws: tuple[Law, ...]
    notes: tuple[str, ...]  # what was left out of a computation, and why

    def of(self, arm: str) -> list[Group]:
        """An arm's groups, small to large."""
        return [group for group in self.groups if group.arm == arm]

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(group.arm for group in self.groups))

    def at(self, reward: str, play: str, whole: bool = False) -> AtBudget | None:
        """RL of this critic in this play against the students, at the budget that answers are of, or at the largest."""
        found = [at for at in self.at_budgets if (at.reward, at.play) == (reward, play)]
        groups = self.of(reward)
        steps = budget_of(groups[0].runs[0]) if groups else 0.0
        return found[-1] if whole and found else next((at for at in found if at.steps == steps), None)

    @property
    def sampled(self) -> AtBudget | None:
        """With actions sampled: as much an answer as the greedy one. None where that was not played."""
        return self.at("rl", "sampled")

    @property
    def longer(self) -> AtBudget | None:
        """RL at its largest budget; None where that is the one that answers are about."""
        whole = self.at("rl", "greedy", whole=True)
        return whole if whole != self.at("rl", "greedy") else None

    @property
    def student(self) -> str | None:
        """The distilled arm that the answers are about: the student-led one, else the first there is."""
        return student_arm(self.arms)


def answer(records: Sequence[Record], seed: int = 0, resamples: int = 10_000, targets: Sequence[float] = ()) -> Answers:
    """Everything the report says of the runs of one task.

    Args:
        records: of `results.read_runs`, all of one task; failed and unfinished ones count as missing.
        seed: decides everything drawn. Each number has a generator of its own: an arm more changes no other's.
        targets: scores at which sizes are compared, as the plan fixed them; empty takes the task's.

    Raises:
        InputError: records of several tasks.
    """
    tasks = sorted({str(record["env"]) for record in records if record.get("env")})
    if len(tasks) > 1:
        raise InputError(f"the runs are of several tasks ({', '.join(tasks)}): their scores are not comparable")
    task = tasks[0] if tasks else "unknown task"
    notes: list[str] = []
    certificates = tuple(certificates_of(records))
    scale = scale_of(task, records, targets)
    groups = tuple(groups_of(headline(records), certificates, scale, seed, resamples))
    arms = dict.fromkeys(group.arm for group in groups)
    by_arm = {arm: [group for group in groups if group.arm == arm] for arm in arms}
    each = tuple(at_budgets(records, certificates, scale, seed, resamples))
    return Answers(
        task, tuple(records), scale, groups, certificates,
        ratios=tuple(comparisons.ratios(by_arm, scale, seed, resamples, notes)),
        differences=tuple(comparisons.differences(by_arm, scale, seed, resamples)),
        growths=tuple(comparisons.growths(by_arm, seed, resamples)),
        front={cost: comparisons.front(groups, cost) for cost in ("latency_ms", "bytes", "macs")},
        ablations=tuple(comparisons.ablations(groups, scale, seed, resamples)),
        at_budgets=each, passings=tuple(passings(each, seed, resamples)), laws=tuple(laws(each)),
        notes=tuple(dict.fromkeys(notes)),
    )  # fmt: skip
