"""`potstill train`, `distill` and `compress`: what makes a policy."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import OmitArgPrefixes, Positional

from potstill import api
from potstill.api import Record
from potstill.compress.config import CompressConfig
from potstill.distill import DistillConfig
from potstill.errors import InputError
from potstill.evaluation import EvalConfig
from potstill.options import Unnamed, fitted, lacking, parse, peek
from potstill.ppo import PPOConfig
from potstill.storage.runs import next_directory
from potstill.study.execute import StudyInterrupted
from potstill.training.runtime import Runtime
from potstill.views import FULL


@dataclass(frozen=True)
class _Train:
    env: str = "pong"
    """The task: a preset (pong, breakout, cartpole, acrobot, pendulum, lunarlander, lunarlander-continuous,
    minatar-breakout, minatar-space-invaders, minatar-asterix), an ALE game as ale/<rom>, or a Gymnasium id. The other
    defaults shown are this task's."""
    out: Path | None = None
    """Directory of the run; must not exist. Default: a new one under <env>_run/."""
    resume: Path | None = None
    """Go on with the run in this directory, exactly; other options about the training are taken from there."""
    teacher: Path | None = None
    """A policy to learn from beside the reward, by --teacher-coefficient: proximal policy distillation. Its task is the
    run's, and so is how it normalises inputs, hidden rows included."""
    start_from: Path | None = None
    """A policy whose weights to begin with, such as a distilled student: fine-tuning. Its task, its shape and how it
    normalises inputs, hidden rows included, are the run's."""
    config: OmitArgPrefixes[PPOConfig] = field(default_factory=PPOConfig)
    runtime: OmitArgPrefixes[Runtime] = field(default_factory=Runtime)
    evaluation: OmitArgPrefixes[EvalConfig] = field(default_factory=EvalConfig)


def train(arguments: Sequence[str]) -> None:
    """`potstill train`."""
    origins = (Path(name) if (name := peek(arguments, flag, "")) else None for flag in ("--teacher", "--start-from"))
    name, config = api.training_config(peek(arguments, "--env", "") or None, *origins)
    if peek(arguments, "--view", ""):  # in place of what the other policy sees, not after it
        arguments = ["--view", FULL, *arguments]
    _make(api.train, vars(parse(_Train, arguments, "train", _Train(env=name, config=config))))


@dataclass(frozen=True)
class _Distill(Unnamed):
    teacher: Positional[Path | None] = None
    """The teacher: a run directory, an expert directory, a checkpoint, a Stable-Baselines3 .zip, a .cleanrl_model, an
    .onnx file, or module:name, code of yours that answers observations (docs/howto/task.md)."""
    out: Path | None = None
    """Directory of the run; must not exist. Default: a new one under distill_run/."""
    resume: Path | None = None
    """Go on with the run in this directory, exactly; other options about the distillation are taken from there."""
    data: Path | None = None
    """Where teacher-led runs keep the data sets they share. Default: `data` beside the run's directory."""
    config: OmitArgPrefixes[DistillConfig] = field(default_factory=DistillConfig)
    runtime: OmitArgPrefixes[Runtime] = field(default_factory=Runtime)
    evaluation: OmitArgPrefixes[EvalConfig] = field(default_factory=EvalConfig)


def distill(arguments: Sequence[str]) -> None:
    """`potstill distill`."""
    options = vars(parse(_Distill, arguments, "distill", _Distill()))
    if options["resume"] is None and options["teacher"] is None:
        raise lacking("distill", "TEACHER")
    _make(api.distill, options)


@dataclass(frozen=True)
class _Compress(Unnamed):
    teacher: Positional[Path]
    """A run directory, an expert directory, a checkpoint, a Stable-Baselines3 .zip, a .cleanrl_model, an .onnx
    file, or module:name."""
    out: Path | None = None
    """Folder of the result. Where this command began it before, it goes on. Default: a new one under distill_run/."""
    config: OmitArgPrefixes[CompressConfig] = field(default_factory=CompressConfig)
    device: str = "auto"
    """cuda, mps or cpu."""
    threads: int = 0
    """CPU threads, and students trained side by side; 0 takes all cores."""
    quiet: bool = False
    """Show no progress."""


def compress(arguments: Sequence[str]) -> None:
    """`potstill compress`: exits with 1 where no student was found."""
    options = vars(parse(_Compress, arguments, "compress"))
    out = options.pop("out") or next_directory(Path("distill_run"), "compression")
    runtime = Runtime(**{name: options.pop(name) for name in ("device", "threads", "quiet")})
    try:
        found = api.compress(**options, out=out, runtime=runtime)
    except StudyInterrupted as stop:
        print(f"potstill: {stop}: --out {out}", file=sys.stderr)
        sys.exit(stop.code)
    print(fitted(found.claim))
    print(out / "report.html")
    sys.exit(0 if found.reached else 1)


def _make(make: Callable[..., api.Run], options: dict[str, Any]) -> None:
    """Makes a run, or goes on with the one that `resume` names, and prints it."""
    if (path := options.pop("resume")) is not None:
        if options["out"] is not None:
            raise InputError(
                "--resume goes on in the run's own directory, --out names a new one: leave one of them out"
            )
        kept = [name for name in ("runtime", "evaluation", "data") if name in options]
        make, options = api.resume, {"path": path} | {name: options[name] for name in kept}
    run = make(**options)
    for each in (run, *run.branches):
        print(each.path)
        if "score" in each.result:
            print(Record({key: each.result[key] for key in api.SHOWN if key in each.result}))
