"""A comparison from the command line: teachers x widths x leads x seeds, each one distillation."""

from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from potstill.distill import DistillConfig, Lead
from potstill.errors import InputError
from potstill.load import nameless, origin_of
from potstill.networks import parse_width
from potstill.study.plan import RunSpec


@dataclass(frozen=True)
class Grid:
    """A comparison of distillations. Every combination is run once."""

    teachers: tuple[Path, ...] = (Path("data/experts/pong/seed-0"),)
    """Run directories, expert directories, checkpoints, Stable-Baselines3 zips, ONNX files, or module:name."""
    env: str | None = None
    """The task of those that do not name it."""
    widths: tuple[str, ...] = ("1/4", "1/8", "1/16")
    """Widths of the students."""
    leads: tuple[Lead, ...] = ("student",)
    """Whose states the students learn from."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the students."""
    base: DistillConfig = field(default_factory=DistillConfig)
    """What all runs have in common."""

    def specs(self) -> list[RunSpec]:
        """Every combination, largest students last so that a table fills from the quick end.

        Raises:
            InputError: an axis of the grid is empty or names something twice.
        """
        for name in ("teachers", "widths", "leads", "seeds"):
            values = getattr(self, name)
            meant = {parse_width(value) if name == "widths" else value for value in values}  # 1/8 is 0.125
            if not values or len(meant) < len(values):
                what = " ".join(map(str, values)) or "none"
                raise InputError(f"{name} must name at least one, and none twice: {what}")
        specs, widths = [], sorted(self.widths, key=parse_width)
        for width, lead, (number, teacher), seed in product(widths, self.leads, enumerate(self.teachers), self.seeds):
            named = f"teacher-{number}_" * (len(self.teachers) > 1)
            name = f"{named}width-{width.replace('/', '_')}_{lead}_seed-{seed}"
            config = replace(self.base, network=replace(self.base.network, width=width), lead=lead, seed=seed)
            origin = origin_of(teacher, self.env if nameless(teacher) else None)
            specs.append(RunSpec(name, f"distill-{lead}", config, origin))
        return specs
