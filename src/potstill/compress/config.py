"""What to look for, and how long."""

import math
from dataclasses import dataclass, field
from typing import Literal

from potstill.configs import normalise
from potstill.distill import DistillConfig
from potstill.errors import InputError


@dataclass(frozen=True)
class CompressConfig:
    """What to look for, and how long."""

    keep: float = 0.95
    """Share of the teacher's score that the student must keep, above 0 and at most 1."""
    confidence: float = 0.95
    """Of a student that keeps less, the chance to be let through all the same is at most 1 less this."""
    minimise: Literal["parameters", "bytes", "macs", "latency"] = "parameters"
    """What is to be small. bytes: of weights and normalisation; macs: multiply-adds; latency: of PyTorch here."""
    max_parameters: int | None = None
    """Largest student to consider. Default: anything smaller than the teacher."""
    budget: float = 15.0
    """Minutes of training and playing, of all calls together: spent, unless nothing is left to try."""
    games: int = 32
    """Games each student is screened with; one that is far too weak after eight plays no more."""
    confirm_games: int = 64
    """Games a student and the teacher play for its confirmation; up to 16 times as many where it takes them."""
    base: DistillConfig = field(default_factory=lambda: DistillConfig(total_timesteps=250_000))
    """How every student is distilled first: for more steps than `distill` takes, for a larger share of the score.
    --network or --network-option keeps the search to that family's widths."""

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
