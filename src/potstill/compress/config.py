"""What to look for, among which widths."""

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction

from potstill.configs import normalise
from potstill.distill import DistillConfig
from potstill.errors import InputError
from potstill.networks import Policy, parse_width
from potstill.policies import LoadedPolicy


@dataclass(frozen=True)
class CompressConfig:
    """What to look for, and how long."""

    keep: float = 0.95
    """Share of the teacher's score that the student must keep, above 0 and at most 1."""
    confidence: float = 0.95
    """Of a student that keeps less, the chance to be let through all the same is at most 1 less this."""
    max_parameters: int | None = None
    """Largest student to consider. Default: anything smaller than the teacher."""
    budget: float = 15.0
    """Minutes of training and playing at most, of all calls together. What cannot end in time is not begun."""
    games: int = 32
    """Games each width is screened with."""
    confirm_games: int = 64
    """Games the chosen student is confirmed with, and games the teacher plays."""
    base: DistillConfig = field(default_factory=DistillConfig)
    """How every student is distilled."""

    def __post_init__(self) -> None:
        normalise(self)
        if not 0 < self.keep <= 1:
            raise InputError(f"keep is a share above 0 and at most 1, such as 0.95, not {self.keep}")
        if not 0.5 <= self.confidence < 1:
            raise InputError(f"confidence lies between 0.5 and 1, such as 0.95, not {self.confidence}")
        if not 0 < self.budget < math.inf:
            raise InputError(f"budget is a positive number of minutes, not {self.budget}")
        for name in ("games", "confirm_games"):
            if getattr(self, name) < 2:
                raise InputError(f"{name.replace('_', '-')} must be at least 2, not {getattr(self, name)}")


def ladder(policy: Policy, max_parameters: int | None) -> list[tuple[str, int]]:
    """Widths smaller than a policy's with their parameters, smallest first, about half an octave apart: 1/8 3/16 1/4.

    Raises:
        InputError: there is none.
    """
    found: dict[int, str] = {}
    for width in sorted({Fraction(top, 2**k) for top in (2, 3) for k in range(8)} | {Fraction(2**k) for k in range(5)}):
        if width <= parse_width(policy.config.width):
            config = replace(policy.config, width=str(width), family=policy.family, critic="shared")
            student = Policy(config, **policy.spaces)
            found.setdefault(student.size().parameters, str(width))  # the smallest widths round to the same network
    smaller = [(width, parameters) for parameters, width in found.items() if parameters < policy.size().parameters]
    if not smaller:
        raise InputError("the teacher is the smallest of its family already")
    allowed = [(w, parameters) for w, parameters in smaller if max_parameters is None or parameters <= max_parameters]
    if max_parameters is not None and not allowed:
        raise InputError(f"max-parameters {max_parameters:,}: the smallest student has {smaller[0][1]:,}")
    return allowed


def student_config(config: CompressConfig, teacher: LoadedPolicy, width: str) -> DistillConfig:
    network = replace(config.base.network, width=width)
    if network.family == "auto":
        network = replace(network, family=teacher.policy.family, options=teacher.policy.config.options)
    return replace(config.base, network=network)
