"""What each `potstill` command does with its options: parse, call a room, print."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from potstill.distill import DistillConfig
from potstill.envs import PRESETS, EnvConfig, find_env, with_sticky
from potstill.errors import InputError
from potstill.interop import sb3
from potstill.jobs import Interrupted, Machine, execute, new_distillation, new_training
from potstill.networks import resolve_device
from potstill.policies import LoadedPolicy
from potstill.ppo import PPO_PRESETS, PPOConfig
from potstill.runs import Run, next_directory
from potstill.study.plan import Plan

if TYPE_CHECKING:
    import polars as pl

T = TypeVar("T")


@dataclass(frozen=True)
class _Train:
    env: str = "pong"
    """The task: a preset (pong, breakout, cartpole, acrobot, lunarlander, minatar-breakout, minatar-space-invaders), an
    ALE game as ale/<rom>, or a Gymnasium id. The other defaults shown are this task's."""
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

    name = _peek(arguments, "--env", "pong")
    env, network = find_env(name), None
    start_from, teacher = _peek(arguments, "--start-from", ""), _peek(arguments, "--teacher", "")
    if start_from or teacher:
        origin = load_policy(Path(start_from or teacher))
        if not _peek(arguments, "--env", ""):  # else a task that differs is refused below
            env = origin.env
            name = next((preset for preset, known in PRESETS.items() if known.id == env.id), env.id)
        network = origin.policy.config if start_from else None
    config = replace(PPO_PRESETS.get(name, PPOConfig()), env=env)
    config = replace(config, network=network) if network is not None else config
    options = _parse(_Train, arguments, "train", _Train(env=name, config=config))
    if options.resume is not None:
        run = Run.open(options.resume)
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
    options = _parse(_Distill, arguments, "distill", _Distill())
    if options.resume is not None:
        run = Run.open(options.resume)
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
class _Compare:
    out: Path | None = None
    """Folder of the comparison. Where it exists, only what is missing is run. Default: a new one under distill_run/."""
    workers: int = 0
    """Runs at a time, each on one core; 0 takes all cores."""
    plan: OmitArgPrefixes[Plan] = field(default_factory=Plan)
    machine: OmitArgPrefixes[Machine] = field(default_factory=Machine)


def compare(arguments: Sequence[str]) -> None:
    """`potstill compare`: a grid of distillations, then its tables and figures."""
    from potstill.report import figures
    from potstill.results import curves_table, episodes_table, runs_table, write_tables
    from potstill.study.execute import StudyInterrupted
    from potstill.study.execute import execute as execute_study

    for one in ("--width", "--lead", "--seed"):
        if _peek(arguments, one, ""):
            raise InputError(f"{one} is of a single distillation: write {one}s and what to compare")
    options = _parse(_Compare, arguments, "compare", _Compare())
    out = options.out or next_directory(Path("distill_run"), "comparison")
    cells = options.plan.cells()
    try:
        failed = execute_study(cells, out, options.machine, options.workers)
    except StudyInterrupted as stop:
        print(f"potstill: {stop}: --out {out}", file=sys.stderr)
        sys.exit(stop.code)
    write_tables(out)
    _print_table(runs_table(out))
    done = runs_table(out).filter(status="done").height
    for draw, table in (
        (figures.size_score, runs_table),
        (figures.learning_curves, curves_table),
        (figures.score_distributions, episodes_table),
        (figures.agreement_score, runs_table),
    ):
        if done:
            path = out / f"{draw.__name__}.png"
            try:
                figures.save(draw(table(out)), path)
                print(path)
            except InputError as error:  # not evaluated, or of several tasks: the table stands without the figure
                print(f"potstill: no {path}: {error}", file=sys.stderr)
    if failed:
        print(
            f"potstill: {len(failed)} of {len(cells)} runs failed: {', '.join(failed)} (see log.txt there)",
            file=sys.stderr,
        )
        sys.exit(1)


def _print_table(table: "pl.DataFrame") -> None:
    from rich.console import Console
    from rich.table import Table

    shown = {
        "run": "run",
        "parameters": "parameters",
        "score": "score",
        "ci95_low": "from",
        "ci95_high": "to",
        "score_sampled": "sampled",
        "score_nosticky": "not sticky",
        "teacher_score": "teacher",
        "agreement": "agreement",
        "p_negative": "P(score<0)",
        "latency_ms": "ms",
        "wall_seconds": "seconds",
        "status": "status",
    }
    output = Table(title="greedy, 95 % interval over distinct games", title_justify="left")
    for name, heading in shown.items():
        output.add_column(heading, justify="left" if name in ("run", "status") else "right")
    for row in table.sort("parameters", nulls_last=True).iter_rows(named=True):
        output.add_row(*(_describe_value(row.get(name)) for name in shown))
    Console(width=1_000).print(output)  # as wide as it comes: a run's name cut short is no name


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

    options = _parse(_Evaluate, arguments, "evaluate")
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
    print(json.dumps(record, allow_nan=False) if options.json else _describe(record))


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
    options = _parse(_ImportSb3, arguments, "import-sb3")
    loaded = sb3.import_sb3(options.model, sb3.as_sb3(find_env(options.env)), options.out, options.temperature)
    print(options.out)
    facts = {"parameters": loaded.policy.size().parameters, "family": loaded.policy.family}
    print(_describe({key: loaded.document["provenance"][key] for key in ("algorithm", "sb3_version")} | facts))


@dataclass(frozen=True)
class _Watch:
    policies: Positional[tuple[Path, ...]]
    """One policy, or several to stand side by side: run directories, expert directories or checkpoints."""
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
    from potstill.policies import load_policy
    from potstill.watch import film

    options = _parse(_Watch, arguments, "watch")
    if not options.policies:
        raise InputError("name a policy to watch, or several to stand side by side")
    loaded = [load_policy(path) for path in options.policies]
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
class _Export:
    policy: Positional[Path]
    """A run directory, an expert directory or a checkpoint."""
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
    from potstill.policies import load_policy

    options = _parse(_Export, arguments, "export")
    machine = Machine(threads=options.threads)
    machine.settle()
    record = onnx.export(
        load_policy(options.policy),
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
            table.add_row(name.replace("_", " "), *(_describe_value(column[name]) for column in columns))
    Console(width=1_000).print(table)
    print(f"logits within {record['max_difference']:.1g} of PyTorch's on {record['observations']} observations")


def info(arguments: Sequence[str]) -> None:
    """`potstill info`."""
    import platform
    from importlib import metadata

    import torch

    from potstill import __version__
    from potstill.networks import resolve_precision

    _parse(_Info, arguments, "info")
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
        print(_describe({key: result[key] for key in keys if key in result}))


def _describe(record: dict[str, Any]) -> str:
    """A record for people: a line per figure, lists left out but for the interval."""

    shown = {name: value for name, value in record.items() if name != "returns" and value is not None}
    return "\n".join(f"{name.replace('_', ' '):<26}{_describe_value(value)}" for name, value in shown.items())


def _describe_value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.3f}".rstrip("0").rstrip(".")
    if isinstance(value, list):
        return " to ".join(_describe_value(item) for item in value)
    return f"{value:,}" if type(value) is int else str(value)


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


def _parse(cls: type[T], arguments: Sequence[str], command: str, default: Any = None) -> T:
    keywords = {} if default is None else {"default": default}
    options: T = tyro.cli(cls, args=list(arguments), prog=f"potstill {command}", **keywords)
    return options


def _peek(arguments: Sequence[str], flag: str, default: str) -> str:
    """The value of `flag`, before the defaults that depend on it are known."""
    for word, following in reversed(list(zip(arguments, [*arguments[1:], None], strict=True))):  # the last one counts
        if word == flag and following is not None:
            return following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return default
