"""Records -> answers: what the runs of a study say of its questions, on one task. Pure, seeded; no files, no plots."""

from collections.abc import Sequence
from dataclasses import dataclass

from potstill.errors import InputError
from potstill.report.comparisons import (
    Ablation,
    Budget,
    Comparison,
    Difference,
    Growth,
    Ratio,
    ablations,
    budgets,
    differences,
    front,
    growths,
    longer,
    ratios,
    sampled,
    ways,
)
from potstill.report.groups import Certificate, Group, Record, Scale, certificates_of, groups_of, scale_of, student_arm


@dataclass(frozen=True)
class Answers:
    """All that is computed of one task's runs."""

    task: str
    records: tuple[Record, ...]
    scale: Scale
    groups: tuple[Group, ...]
    certificates: tuple[Certificate, ...]
    ratios: tuple[Ratio, ...]
    differences: tuple[Difference, ...]
    ways: tuple[Difference, ...]
    """The other distilled arms less `student`."""
    budgets: tuple[Budget, ...]
    growths: tuple[Growth, ...]
    front: dict[str, tuple[bool, ...]]
    """Of each cost, which of `groups` no other beats in cost and score; False for a group without that cost."""
    ablations: tuple[Ablation, ...]
    sampled: Comparison | None
    """With actions sampled: as much an answer as the greedy one. None where that was not played."""
    longer: Comparison | None
    """None where RL was not given twice the budget."""
    notes: tuple[str, ...]
    """What was left out of a computation, and why."""

    def of(self, arm: str) -> list[Group]:
        """An arm's groups, small to large."""
        return [group for group in self.groups if group.arm == arm]

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(group.arm for group in self.groups))

    @property
    def student(self) -> str | None:
        """The distilled arm that the answers are about: the student-led one, else the first there is."""
        return student_arm(self.arms)


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
    certificates = tuple(certificates_of(records))
    scale = scale_of(task, records)
    groups = tuple(groups_of(records, certificates, scale, seed, resamples))
    by_arm = {
        arm: [group for group in groups if group.arm == arm] for arm in dict.fromkeys(group.arm for group in groups)
    }
    return Answers(
        task,
        tuple(records),
        scale,
        groups,
        certificates,
        tuple(ratios(by_arm, scale, seed, resamples, notes)),
        tuple(differences(by_arm, scale, seed, resamples)),
        tuple(ways(by_arm, scale, seed, resamples)),
        tuple(budgets(by_arm)),
        tuple(growths(by_arm, seed, resamples)),
        {cost: front(groups, cost) for cost in ("latency_ms", "bytes", "macs")},
        tuple(ablations(groups, scale, seed, resamples)),
        sampled(records, scale, seed, resamples),
        longer(records, by_arm, scale, seed, resamples),
        tuple(dict.fromkeys(notes)),
    )
