"""`potstill train`, `distill` and `compress`: what makes a policy."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from potstill.commands.origins import zip_env
from potstill.compress.config import CompressConfig
from potstill.distill import DistillConfig
from potstill.errors import InputError
from potstill.evaluation import EvalConfig
from potstill.jobs import Interrupted, execute, new_distillation, new_training
from potstill.options import describe, parse, peek
from potstill.policies import load_policy
from potstill.ppo import PPOConfig
from potstill.runs import Run, next_directory
from potstill.tasks import TASKS, find_env
from potstill.training.runtime import Runtime


@dataclass(frozen=True)
class _Train:
    env: str = "pong"
    """The task: a preset (pong, breakout, cartpole, acrobot, pendulum, lunarlander, lunarlander-continuous,
    minatar-breakout, minatar-space-invaders), an ALE game as ale/<rom>, or a Gymnasium id. The other defaults shown are
    this task's."""
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
    name = peek(arguments, "--env", "pong")
    env, network = find_env(name), None
    start_from, teacher = peek(arguments, "--start-from", ""), peek(arguments, "--teacher", "")
    if start_from or teacher:
        origin = load_policy(Path(start_from or teacher))
        if not peek(arguments, "--env", ""):  # else a task that differs is refused below
            env = origin.env
            name = next((preset for preset, known in TASKS.items() if known.env.id == env.id), env.id)
        network = origin.policy.config if start_from else None
    config = PPOConfig.for_task(env)
    config = replace(config, network=network) if network is not None else config
    options = parse(_Train, arguments, "train", _Train(env=name, config=config))
    if options.resume is not None:
        run = _resumed(options.resume, options.out)
    else:
        out = options.out or next_directory(Path(f"{name.replace('/', '-')}_run"), f"seed-{options.config.seed}")
        run = new_training(options.config, out, options.runtime, options.teacher, options.start_from)
    _run(run, options.runtime, options.evaluation)


@dataclass(frozen=True)
class _Distill:
    teacher: Positional[Path | None] = None
    """The teacher: a run directory, an expert directory, a checkpoint, or a Stable-Baselines3 .zip."""
    env: str | None = None
    """The task of a Stable-Baselines3 zip, which does not name it; other teachers know theirs."""
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
    options = parse(_Distill, arguments, "distill", _Distill())
    if options.resume is not None:
        run = _resumed(options.resume, options.out)
    elif options.teacher is None:
        raise InputError(
            "name the teacher: a run directory, an expert directory such as experts/pong/seed-0, or a checkpoint"
        )
    else:
        stem = (
            f"width-{options.config.network.width.replace('/', '_')}_{options.config.lead}_seed-{options.config.seed}"
        )
        out = options.out or next_directory(Path("distill_run"), stem)
        teacher_env = zip_env(options.env, options.teacher)
        run = new_distillation(options.config, options.teacher, out, options.runtime, teacher_env)
    _run(run, options.runtime, options.evaluation, options.data)


@dataclass(frozen=True)
class _Compress:
    teacher: Positional[Path]
    """A run directory, an expert directory, a checkpoint, or a Stable-Baselines3 .zip."""
    env: str | None = None
    """The task of a Stable-Baselines3 zip, which does not name it."""
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
    began = time.monotonic()
    from potstill.compress import outcome
    from potstill.report.compression import claim
    from potstill.study.execute import StudyInterrupted

    if peek(arguments, "--width", ""):
        raise InputError("--width is what compress looks for: bound it with --max-parameters")
    options = parse(_Compress, arguments, "compress")
    out = options.out or next_directory(Path("distill_run"), "compression")
    runtime = Runtime(device=options.device, threads=options.threads, quiet=options.quiet)
    run = outcome.open_compression(options.teacher, options.config, out, runtime, zip_env(options.env, options.teacher))
    try:
        with run.lock():
            for news in outcome.search(run, options.config, runtime, began):
                if not options.quiet:
                    print(news.words, file=sys.stderr, flush=True)
            record = outcome.finish(run, runtime)
    except StudyInterrupted as stop:
        print(f"potstill: {stop}: --out {out}", file=sys.stderr)
        sys.exit(stop.code)
    print(claim(record))
    print(out / "report.html")
    sys.exit(0 if record["reached"] else 1)


def _resumed(path: Path, out: Path | None) -> Run:
    if out is not None:
        raise InputError("--resume goes on in the run's own directory, --out names a new one: leave one of them out")
    return Run.open(path)


def _run(run: Run, runtime: Runtime, eval_config: EvalConfig, data_root: Path | None = None) -> None:
    try:
        result = execute(run, runtime, eval_config, data_root)
    except Interrupted as stop:
        print(f"potstill: {stop}", file=sys.stderr)
        sys.exit(stop.code)
    print(run.path)
    if "score" in result:
        keys = (
            "parameters",
            "score",
            "ci95",
            "score_sampled",
            "score_nosticky",
            "teacher_score",
            "agreement",
            "distinct",
        )
        print(describe({key: result[key] for key in keys if key in result}))
