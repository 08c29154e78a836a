"""What each `potstill` command does with its options: parse, call a room, print."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from potstill.compress import CompressConfig
from potstill.distill import DistillConfig
from potstill.envs import PRESETS, EnvConfig, find_env, with_sticky
from potstill.errors import InputError
from potstill.interop import sb3
from potstill.jobs import Interrupted, Machine, execute, new_distillation, new_training
from potstill.networks import resolve_device
from potstill.options import describe, describe_value, parse, peek
from potstill.policies import LoadedPolicy
from potstill.ppo import PPOConfig
from potstill.presets import PPO_PRESETS
from potstill.runs import Run, next_directory


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
    run's."""
    start_from: Path | None = None
    """A policy whose weights to begin with, such as a distilled student: fine-tuning. Its task and shape are
    the run's."""
    config: OmitArgPrefixes[PPOConfig] = field(default_factory=PPOConfig)
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)


def train(arguments: Sequence[str]) -> None:
    """`potstill train`."""
    from potstill.policies import load_policy

    name = peek(arguments, "--env", "pong")
    env, network = find_env(name), None
    start_from, teacher = peek(arguments, "--start-from", ""), peek(arguments, "--teacher", "")
    if start_from or teacher:
        origin = load_policy(Path(start_from or teacher))
        if not peek(arguments, "--env", ""):  # else a task that differs is refused below
            env = origin.env
            name = next((preset for preset, known in PRESETS.items() if known.id == env.id), env.id)
        network = origin.policy.config if start_from else None
    config = replace(PPO_PRESETS.get(name, PPOConfig()), env=env)
    config = replace(config, network=network) if network is not None else config
    options = parse(_Train, arguments, "train", _Train(env=name, config=config))
    if options.resume is not None:
        run = _resumed(options.resume, options.out)
    else:
        out = options.out or next_directory(Path(f"{name.replace('/', '-')}_run"), f"seed-{options.config.seed}")
        run = new_training(options.config, out, options.machine, options.teacher, options.start_from)
    _run(run, options.machine)


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
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)


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
        teacher_env = _zip_env(options.env, options.teacher)
        run = new_distillation(options.config, options.teacher, out, options.machine, teacher_env)
    _run(run, options.machine, options.data)


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
    from potstill import compress as room
    from potstill.report.compression import claim
    from potstill.study.execute import StudyInterrupted

    if peek(arguments, "--width", ""):
        raise InputError("--width is what compress looks for: bound it with --max-parameters")
    options = parse(_Compress, arguments, "compress")
    out = options.out or next_directory(Path("distill_run"), "compression")
    machine = Machine(device=options.device, threads=options.threads, quiet=options.quiet)
    run = room.open_compression(options.teacher, options.config, out, machine, _zip_env(options.env, options.teacher))
    try:
        with run.lock():
            for news in room.search(run, options.config, machine):
                if not options.quiet:
                    print(news.words, file=sys.stderr, flush=True)
            record = room.finish(run, machine)
    except StudyInterrupted as stop:
        print(f"potstill: {stop}: --out {out}", file=sys.stderr)
        sys.exit(stop.code)
    print(claim(record))
    print(out / "report.html")
    sys.exit(0 if record["reached"] else 1)


@dataclass(frozen=True)
class _Evaluate:
    policy: Positional[Path]
    """A run directory, an expert directory, a checkpoint, or a Stable-Baselines3 .zip."""
    env: str | None = None
    """The task of a Stable-Baselines3 zip, policy or teacher, which does not name it."""
    episodes: int = 100
    """Whole games to play."""
    sticky: float | None = None
    """Probability of a sticky action; default: as the policy was trained."""
    actions: Annotated[str, arg(metavar="greedy|sampled")] = "greedy"
    """The most probable action, or one drawn from the policy."""
    start: str | None = None
    """Who plays the first k steps of each game: random:200, or POLICY:200."""
    teacher: Path | None = None
    """Report agreement with, and KL divergence from, this policy too."""
    seed: int = 1
    """Seeds the games and the sampling."""
    device: str = "auto"
    """cuda, mps or cpu."""
    threads: int = 0
    """CPU threads; 0 takes all cores."""
    json: bool = False
    """Print one JSON object on stdout and nothing else."""


def evaluate(arguments: Sequence[str]) -> None:
    """`potstill evaluate`."""

    from potstill import evaluation, telemetry

    options = parse(_Evaluate, arguments, "evaluate")
    if options.actions not in ("greedy", "sampled"):
        raise InputError(f"actions are greedy or sampled, not {options.actions!r}")
    device = str(resolve_device(options.device))
    machine = Machine(threads=options.threads)
    machine.settle()
    threads = machine.cores
    task = _zip_env(options.env, options.policy, options.teacher)
    loaded = _load(options.policy, task, device)
    teacher = _load(options.teacher, task, device) if options.teacher else None
    env = with_sticky(loaded.env, options.sticky)
    start = _start(options.start, device)
    beside = {}  # first: a teacher of another task is refused before the games
    if teacher is not None:
        beside = evaluation.compare(loaded.policy, teacher.policy, env, seed=options.seed, threads=threads)
    title = f"evaluate {env.id} {loaded.policy.config.width}"
    quiet = options.json and not sys.stderr.isatty()
    with telemetry.Progress(title, options.episodes, quiet=quiet, unit="games") as bar:
        games = evaluation.play(
            loaded.policy,
            env,
            episodes=options.episodes,
            seed=options.seed,
            actions=options.actions,  # type: ignore[arg-type]  # checked above
            start=start,
            threads=threads,
        )
        for so_far in games:
            bar.update(len(so_far.episodes))
    size = loaded.policy.size()
    record = so_far.summary() | {"parameters": size.parameters, "macs": size.macs, "bytes": size.bytes}
    record |= evaluation.latency(loaded.policy) | beside
    print(json.dumps(record, allow_nan=False) if options.json else describe(record))


@dataclass(frozen=True)
class _ImportSb3:
    model: Positional[Path]
    """The .zip that Stable-Baselines3 saved: PPO, A2C or DQN with MlpPolicy or CnnPolicy."""
    env: str
    """Its task, which it does not name: cartpole, pong, an ALE game as ale/<rom>, or a Gymnasium id."""
    out: Path
    """Directory of the policy; must not exist."""
    temperature: float = sb3.Q_TEMPERATURE
    """Divides the Q-values of a DQN into logits. Its greedy play does not depend on it."""


def import_sb3(arguments: Sequence[str]) -> None:
    """`potstill import-sb3`."""
    options = parse(_ImportSb3, arguments, "import-sb3")
    loaded = sb3.import_sb3(options.model, sb3.as_sb3(find_env(options.env)), options.out, options.temperature)
    print(options.out)
    facts = {"parameters": loaded.policy.size().parameters, "family": loaded.policy.family}
    print(describe({key: loaded.document["provenance"][key] for key in ("algorithm", "sb3_version")} | facts))


@dataclass(frozen=True)
class _Watch:
    policies: Positional[tuple[Path, ...]]
    """One policy, or several to stand side by side: run directories, expert directories, checkpoints, or
    Stable-Baselines3 .zips."""
    env: str | None = None
    """The task of a Stable-Baselines3 zip, which does not name it; other policies know theirs."""
    out: Path = Path("game.mp4")
    """The film, .mp4 or .gif; must not exist."""
    seed: int = 1
    """Seeds the game."""
    max_steps: int = 3_000
    """Agent steps to film at most (15 a second of play)."""
    actions: Annotated[str, arg(metavar="greedy|sampled")] = "greedy"
    """The most probable action, or one drawn from the policy."""


def watch(arguments: Sequence[str]) -> None:
    """`potstill watch`."""
    from potstill.watch import film

    options = parse(_Watch, arguments, "watch")
    if not options.policies:
        raise InputError("name a policy to watch, or several to stand side by side")
    task = _zip_env(options.env, *options.policies)
    loaded = [_load(path, task, "cpu") for path in options.policies]
    titles = [f"{path.name}" for path in options.policies]
    film(
        list(zip(titles, loaded, strict=True)),
        options.out,
        seed=options.seed,
        max_steps=options.max_steps,
        actions=options.actions,  # type: ignore[arg-type]  # film refuses other words
    )
    print(options.out)


@dataclass(frozen=True)
class _Report:
    study: Positional[Path]
    """Folder of the study's records, such as results/pong, or of run directories."""
    out: Path | None = None
    """The page, .html; an older one there is replaced. Default: report.html in the study's folder."""
    resamples: int = 10_000
    """Resamples of every bootstrap."""
    seed: int = 0
    """Seeds the resamples."""


def report(arguments: Sequence[str]) -> None:
    """`potstill report`."""
    from potstill.report import page

    options = parse(_Report, arguments, "report")
    if options.resamples < 100:
        raise InputError(f"resamples must be 100 or more, not {options.resamples}: percentiles are read from them")
    if options.seed < 0:
        raise InputError(f"seed must be 0 or more, not {options.seed}")
    out = options.out or options.study / "report.html"
    page.write(options.study, out, options.seed, options.resamples)
    print(out)


@dataclass(frozen=True)
class _Export:
    policy: Positional[Path]
    """A run directory, an expert directory, a checkpoint, or a Stable-Baselines3 .zip."""
    env: str | None = None
    """The task of a Stable-Baselines3 zip, which does not name it; other policies know theirs."""
    out: Path = Path("policy.onnx")
    """The file; must not exist."""
    format: Literal["onnx"] = "onnx"
    """ONNX with the normalisation inside."""
    int8: bool = False
    """Write a quantised model beside it too (policy.int8.onnx), and play games with both."""
    episodes: int = 20
    """Whole games each of the two plays, greedy."""
    seed: int = 1
    """Seeds these games."""
    threads: int = 0
    """CPU threads for the games; 0 takes all cores."""
    json: bool = False
    """Print one JSON object on stdout and nothing else."""


def export(arguments: Sequence[str]) -> None:
    """`potstill export`."""
    from potstill.interop import onnx

    options = parse(_Export, arguments, "export")
    machine = Machine(threads=options.threads)
    machine.settle()
    record = onnx.export(
        _load(options.policy, _zip_env(options.env, options.policy), "cpu"),
        options.out,
        int8=options.int8,
        episodes=options.episodes,
        seed=options.seed,
        threads=machine.cores,
        quiet=options.json and not sys.stderr.isatty(),
    )
    if options.json:
        print(json.dumps(record, allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", *record["models"], box=None)
    columns = [model | model.get("score", {}) for model in record["models"].values()]
    for name in ("path", "bytes", "latency_ms", "latency_p95_ms", "mean", "ci95", "episodes"):
        if name in columns[0]:
            table.add_row(name.replace("_", " "), *(describe_value(column[name]) for column in columns))
    Console(width=1_000).print(table)
    print(f"outputs within {record['max_difference']:.1g} of PyTorch's on {record['observations']} observations")


@dataclass(frozen=True)
class _Push:
    policy: Positional[Path]
    """A run directory, an expert directory or a checkpoint."""
    repo_id: Positional[Annotated[str, arg(metavar="REPO_ID")]]
    """USER/NAME on the Hub; made where it does not exist."""
    private: bool = False
    """Make it private."""
    film: Path | None = None
    """An .mp4 of a game, such as `potstill watch` makes, which the Hub plays on the policy's page."""
    message: str = ""
    """The commit's message. Default: task and width."""
    license: str = "mit"
    """The licence you give it, by the Hub's name for it."""


def push(arguments: Sequence[str]) -> None:
    """`potstill push`."""
    from potstill.interop import hub

    options = parse(_Push, arguments, "push")
    print(
        hub.push(
            options.policy,
            options.repo_id,
            private=options.private,
            film=options.film,
            message=options.message,
            licence=options.license,
        )
    )


@dataclass(frozen=True)
class _Pull:
    repo_id: Positional[Annotated[str, arg(metavar="REPO_ID")]]
    """USER/NAME on the Hub."""
    out: Path
    """Directory of the policy; must not exist."""
    revision: str = "main"
    """A branch, a tag or a commit."""


def pull(arguments: Sequence[str]) -> None:
    """`potstill pull`."""
    from potstill.interop import hub
    from potstill.policies import recorded_result

    options = parse(_Pull, arguments, "pull")
    loaded, commit = hub.pull(options.repo_id, options.out, options.revision)
    size, known = loaded.policy.size(), recorded_result(loaded) or {}
    print(options.out)
    facts = {"env": loaded.env.id, "width": loaded.policy.config.width, "parameters": size.parameters}
    print(describe(facts | {key: known[key] for key in ("score", "ci95") if key in known} | {"commit": commit}))


def info(arguments: Sequence[str]) -> None:
    """`potstill info`."""
    import platform
    from importlib import metadata

    import torch

    from potstill import __version__
    from potstill.networks import resolve_precision

    parse(_Info, arguments, "info")
    cpu = torch.device("cpu")
    print(f"potstill    {__version__}")
    print(f"python      {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "ale-py", "gymnasium", "numpy", "scipy", "polars", "safetensors", "tyro", "matplotlib"):
        print(f"{package:<11} {metadata.version(package)}")
    for package in ("minatar", "Box2D", "tensorboard", "wandb", "onnx", "onnxruntime"):
        try:
            print(f"{package:<11} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package:<11} not installed (optional)")
    print(f"cores       {Machine().cores}")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    print(f"device      {resolve_device('auto')} (cuda {cuda}, mps {mps})")
    print(f"precision   {str(resolve_precision('auto', cpu)).removeprefix('torch.')} on the CPU, as measured just now")


@dataclass(frozen=True)
class _Info:
    """Versions, devices, cores: what a bug report needs."""


def _resumed(path: Path, out: Path | None) -> Run:
    if out is not None:
        raise InputError("--resume goes on in the run's own directory, --out names a new one: leave one of them out")
    return Run.open(path)


def _run(run: Run, machine: Machine, data_root: Path | None = None) -> None:
    try:
        result = execute(run, machine, data_root)
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


def _zip_env(name: str | None, *policies: Path | None) -> EnvConfig | None:
    """The task that `--env` names for the Stable-Baselines3 zips among `policies`; None where there is none."""
    zips = [path for path in policies if path is not None and path.suffix == ".zip"]
    if zips and name is None:
        raise InputError(f"{zips[0]} does not name its task: add --env, such as --env pong")
    if name is not None and not zips:
        raise InputError("--env names the task of a Stable-Baselines3 zip; policies of potstill's carry theirs")
    return sb3.as_sb3(find_env(name)) if name is not None else None


def _load(path: Path, zip_env: EnvConfig | None, device: str) -> LoadedPolicy:
    from potstill.policies import load_policy

    return sb3.load_sb3(path, zip_env, device) if zip_env and path.suffix == ".zip" else load_policy(path, device)


def _start(text: str | None, device: str) -> Any:
    from potstill.evaluation import Start
    from potstill.policies import load_policy

    if text is None:
        return None
    who, _, steps = text.rpartition(":")
    if not who or not steps.isdecimal():
        raise InputError(f"start {text!r} is not understood; write random:200 or POLICY:200")
    return Start(int(steps), None if who == "random" else load_policy(Path(who), device).policy)
