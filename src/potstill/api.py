"""What potstill does, as functions: `train, distill, evaluate, compress, load, study`. The command line calls these."""

import html
import io
import math
import re
import sys
import time
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from operator import index
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from potstill import evaluation as games
from potstill import telemetry
from potstill.arms import order_of
from potstill.compress.config import CompressConfig
from potstill.configs import filled
from potstill.distill import DistillConfig
from potstill.errors import InputError
from potstill.evaluation import EvalConfig, Start
from potstill.imports import allow
from potstill.load import Place, check_own, load, load_all, nameless, origin_of
from potstill.networks import Policy, as_options, resolve_device
from potstill.options import describe_value
from potstill.policies import LoadedPolicy
from potstill.ppo import PPOConfig
from potstill.storage import runs
from potstill.study.plan import WHOLE, Part, Plan, Pool
from potstill.study.planfile import read_plan
from potstill.tasks import TASKS, EnvLike, find_env, task_of
from potstill.training.runtime import Runtime, check_number
from potstill.training.trainer import Interrupted, branches_of, execute, new_branch, new_run
from potstill.views import chosen

if TYPE_CHECKING:  # tables, reports and searches are imported where they are asked for: a training waits for none
    import polars as pl

SHOWN = ("parameters", "score", "ci95", "score_sampled", "score_nosticky", "teacher_score", "agreement", "distinct")

NAMES = {
    "mean": "mean score", "ci95": "95 % interval", "median": "median score", "std": "standard deviation",
    "episodes": "games", "distinct": "distinct games", "p_negative": "share of games below 0",
    "truncated": "truncated games", "mean_length": "mean agent steps", "macs": "multiply-adds",
    "score_nosticky": "score not sticky", "latency_ms": "latency, ms", "latency_p95_ms": "latency p95, ms",
}  # fmt: skip
"""Of figures whose keys do not tell what they are, in words."""


class _Shown:
    """What shows itself as a table, in a terminal and in a notebook."""

    def rows(self) -> list[tuple[str, str]]:
        raise NotImplementedError

    def __rich__(self) -> Table:
        table = Table("", "", box=None, show_header=False)
        for name, value in self.rows():
            table.add_row(Text(name), Text(value))
        return table

    def __str__(self) -> str:
        return "\n".join(f"{name:<26}{value}" for name, value in self.rows())

    def _repr_html_(self) -> str:
        rows = (f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in self.rows())
        return f"<table>{''.join(rows)}</table>"


class Record(_Shown, dict[str, Any]):
    """Figures by name, JSON-ready."""

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each in words; without the list of all returns, and points lost where there are none."""
        hidden = {"returns"}
        if "env" in self and not task_of(str(self["env"])).two_sided:
            hidden |= {"p_negative", "point_win_rate"}
        shown = [(name, value) for name, value in self.items() if name not in hidden and not isinstance(value, dict)]
        return [(in_words(name), describe_value(value)) for name, value in shown if value is not None]


def in_words(key: str) -> str:
    """A figure's key as a table shows it."""
    return NAMES.get(key, key.replace("_", " "))


@dataclass(frozen=True)
class Run(_Shown, runs.Run):
    """A finished run: its directory `path`, what decided its outcome `config`, its `policy` and its `result`."""

    @cached_property
    def loaded(self) -> LoadedPolicy:
        """The policy with its task and its provenance, on the CPU."""
        return load(self.path)

    @property
    def policy(self) -> Policy:
        """The network: `policy.logits(policy.prepare(observations))` are (B, L) for raw observations (B, ...)."""
        return self.loaded.policy

    @property
    def result(self) -> Record:
        """What result.json says. Raises InputError where the run is not finished."""
        return Record(runs.read_document(self.result_path))

    @property
    def branches(self) -> "list[Run]":
        """The runs of shares of its budget, by `PPOConfig.branch`, as far as there are any yet."""
        there = (path for path in branches_of(self).values() if path.exists())
        return [Run(path, runs.Run.open(path).config) for path in there]

    def export(self, path: str | Path, **options: Any) -> Record:
        """Writes the policy as a file of others, checked against PyTorch; what is known of that file.

        Args:
            path: must not exist; its ending says the format: .onnx, .c, or .zip for Stable-Baselines3.
            options: as `export.export` has them.
        """
        from potstill.export import export

        return Record(export(self.loaded, Path(path), **options))

    def rows(self) -> list[tuple[str, str]]:
        """Its directory and the figures that matter most."""
        result = self.result if self.result_path.exists() else Record()
        return Record({"run": str(self.path)} | {key: result[key] for key in SHOWN if key in result}).rows()


def train(
    env: EnvLike | None = None,
    *,
    config: PPOConfig | None = None,
    teacher: Place | None = None,
    start_from: Place | None = None,
    out: str | Path | None = None,
    runtime: Runtime | None = None,
    evaluation: EvalConfig | None = None,
    **settings: Any,
) -> Run:
    """Trains a policy with PPO and evaluates it.

    Args:
        env: a preset such as cartpole or pong, `ale/<rom>`, a Gymnasium id or module:name; an `EnvSpec`; or a class or
            function that makes a new environment whenever it is called. Default: that of `start_from` or `teacher`,
            else pong.
        config: all settings. Default: those tuned on this task, or on Pong.
        teacher: a policy to learn from beside the reward: proximal policy distillation.
        start_from: a policy whose weights to begin with: fine-tuning.
        out: directory of the run; must not exist. Default: a new one under `<env>_run/`.
        settings: fields of `PPOConfig`, `NetworkConfig`, `EnvConfig`, `Runtime` and `EvalConfig` by name, such as
            `total_timesteps=60_000, width="1/8", device="cpu", episodes=20`; `network` and `options`, a dict, of a
            network of your own.

    Raises:
        InputError: a setting does not exist or cannot be, or what was named does not fit together.
        Interrupted: Ctrl-C, in the main thread; the run is saved, and `resume` goes on with it.
        DivergedError: a loss or weight is no longer finite.
    """
    name, default = training_config(env, teacher, start_from)
    if config is not None and config.env.id != default.env.id:
        raise InputError(f"config is for {config.env.id}, not {default.env.id}: begin with PPOConfig.for_task")
    config, runtime, evaluation = _filled(settings, config or default, runtime or Runtime(), evaluation or EvalConfig())
    folder = Path(re.sub("[/:]", "-", name) + "_run")
    out = Path(out or runs.next_directory(folder, f"seed-{config.seed}"))
    return _execute(new_run(config, out, runtime, teacher=teacher, initial=start_from), runtime, evaluation)


def training_config(
    env: EnvLike | None, teacher: Place | None = None, start_from: Place | None = None
) -> tuple[str, PPOConfig]:
    """The name of a task, and the settings that `train` takes for it where none are given."""
    network, origin = None, None
    place: Place | None = start_from if start_from is not None else teacher
    if place is not None:
        check_own(place)
        origin = load(place)
        env = env if env is not None else origin.env  # one that differs is refused later
        network = origin.policy.config if start_from is not None else None
    env = "pong" if env is None else env
    task = find_env(env)
    name = env if isinstance(env, str) else next((name for name, known in TASKS.items() if known.env == task), task.id)
    if origin is not None:
        task = replace(task, view=chosen(task.view, origin.env.view))
    config = PPOConfig.for_task(task)
    return name, config if network is None else replace(config, network=network)


def distill(
    teacher: Place,
    *,
    env: EnvLike | None = None,
    statistics: str | Path | None = None,
    config: DistillConfig | None = None,
    out: str | Path | None = None,
    data: str | Path | None = None,
    runtime: Runtime | None = None,
    evaluation: EvalConfig | None = None,
    **settings: Any,
) -> Run:
    """Teaches a student what a teacher does and evaluates it.

    Args:
        teacher: a run, a policy, the path of one, or a function or class of yours, as `load` takes them.
        env: the task of a teacher that does not name it: a Stable-Baselines3 zip, an ONNX file, or code.
        statistics: VecNormalize's file of a zip, or "none". Default: the one beside the zip.
        config: all settings. Default: those tuned on Pong.
        out: directory of the run; must not exist. Default: a new one under distill_run/.
        data: where teacher-led runs keep the data sets they share. Default: `data` beside the run's directory.
        settings: fields of `DistillConfig`, `NetworkConfig`, `Runtime` and `EvalConfig` by name, such as `width="1/8"`.

    Raises:
        InputError: as `train`.
        DivergedError: as `train`.
    """
    config = config or DistillConfig()
    config, runtime, evaluation = _filled(settings, config, runtime or Runtime(), evaluation or EvalConfig())
    origin = origin_of(teacher, env, statistics)
    stem = f"width-{config.network.width.replace('/', '_')}_{config.lead}_seed-{config.seed}"
    out = Path(out or runs.next_directory(Path("distill_run"), stem))
    return _execute(new_run(config, out, runtime, teacher=origin), runtime, evaluation, data)


def resume(
    path: str | Path,
    *,
    runtime: Runtime | None = None,
    evaluation: EvalConfig | None = None,
    data: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Goes on, exactly, with a training or distillation that was stopped in `path`.

    Args:
        settings: fields of `Runtime` and `EvalConfig` by name; what decides the outcome is the run's own.

    Raises:
        InputError: as `train`, and where the run is finished.
        DivergedError: as `train`.
    """
    runtime, evaluation = _filled(settings, runtime or Runtime(), evaluation or EvalConfig())
    return _execute(runs.Run.open(Path(path)), runtime, evaluation, data)


def _execute(run: runs.Run, runtime: Runtime, evaluation: EvalConfig, place: str | Path | None = None) -> Run:
    """The run itself, then its branches, as far as they are not done."""
    made, data = Run(run.path, run.config), Path(place) if place is not None else None
    left = {share for share, path in branches_of(run).items() if not (path / "result.json").exists()}
    if run.status != "done" or not left:
        execute(run, runtime, evaluation, data)
    for share, path in branches_of(run).items():
        branch = runs.Run.open(path) if path.exists() else new_branch(run, share, path)
        try:
            if branch.status != "done":
                execute(branch, runtime, evaluation, data)
        except Interrupted as stop:  # to go on with the others too
            raise Interrupted(run, stop.number) from stop
    return made


def evaluate(
    policy: Place,
    *,
    env: EnvLike | None = None,
    statistics: str | Path | None = None,
    teacher: Place | None = None,
    episodes: int = 100,
    actions: games.Actions = "greedy",
    sticky: float | None = None,
    start: str | Start | None = None,
    seed: int = 1,
    device: str = "auto",
    threads: int = 0,
    quiet: bool = False,
) -> Record:
    """Plays whole games and tells how they went.

    Args:
        policy: a run, a policy, or the path of one, as `load` takes them.
        env: the task of what does not name it: a Stable-Baselines3 zip, an ONNX file, or code.
        statistics: as `distill`.
        teacher: report agreement with, and KL divergence (nats) from, this policy too.
        episodes: games to play.
        actions: greedy, the most probable action; or sampled.
        sticky: probability of a sticky action. Default: as the policy was trained.
        start: who plays the first k agent steps of each game: "random:200" or "POLICY:200".
        threads: CPU threads; 0 takes all cores.

    Returns:
        The `mean` score, unclipped, its 95 % interval `ci95` over `distinct` games, all `returns`, the size, the
        `latency_ms` of one observation, and more.

    Raises:
        InputError: what was named does not fit together.
    """
    if actions not in ("greedy", "sampled"):
        raise InputError(f"actions are greedy or sampled, not {actions!r}")
    episodes, seed, threads = map(index, (episodes, seed, threads))  # of numpy too, and no text
    where = str(resolve_device(device))
    runtime = Runtime(threads=threads)
    runtime.apply()
    loaded, *others = load_all([policy, *([teacher] if teacher is not None else [])], env, where, statistics)
    task = loaded.env if sticky is None else replace(loaded.env, sticky=sticky)
    start = _start(start, where, env, loaded) if isinstance(start, str) else start
    compared = {}  # first: a teacher of another task is refused before the games
    how: dict[str, Any] = {"seed": seed, "threads": runtime.cores, "alone": loaded.alone}
    for other in others:
        _check_actions(other, loaded)
        compared = games.compare(loaded.policy, other.policy, task, steps=games.steps_beside(episodes), **how)
    title = f"evaluate {task.id}, width {loaded.policy.config.width}"
    with telemetry.Progress(title, episodes, quiet=quiet, unit="games") as bar:
        for so_far in games.play(loaded.policy, task, episodes=episodes, actions=actions, start=start, **how):
            bar.update(len(so_far.episodes), score=so_far.score)
    sizes = {}
    if not loaded.policy.sees_raw:  # of the user's own code nothing is known but how it plays
        size = loaded.policy.size()
        sizes = {"parameters": size.parameters, "macs": size.macs, "bytes": size.bytes} | games.latency(loaded.policy)
    return Record(so_far.summary() | sizes | compared)


def _start(text: str, device: str, env: EnvLike | None, beside: LoadedPolicy) -> Start:
    who, _, steps = text.rpartition(":")
    if not who or not steps.isdecimal() or len(steps) > 12:
        raise InputError(f"start {text!r} is not understood; write random:200 or POLICY:200")
    if who == "random":
        return Start(int(steps))
    player = load(who, env if nameless(Path(who)) else None, device)
    _check_actions(player, beside)
    return Start(int(steps), player.policy)


def _check_actions(other: LoadedPolicy, loaded: LoadedPolicy) -> None:
    """Refuses a policy to whom as many actions are others; another number is refused where it plays."""
    if other.policy.num_actions == loaded.policy.num_actions and other.env.actions != loaded.env.actions:
        told = f"{other.path} plays the actions {other.env.actions} of {loaded.env.id}"
        raise InputError(f"{told}, {loaded.path} those of {loaded.env.actions}")


class Compressed(Run):
    """The smallest student that keeps the score, where one was `reached`; `result` tells what was tried."""

    @property
    def reached(self) -> bool:
        return bool(self.result["reached"])

    @property
    def claim(self) -> str:
        """What was found, in one sentence or two."""
        from potstill.report import compression

        return compression.claim(self.result)

    def rows(self) -> list[tuple[str, str]]:
        return Record(folder=str(self.path), reached=self.reached, found=self.claim).rows()


def compress(
    teacher: Place,
    *,
    env: EnvLike | None = None,
    statistics: str | Path | None = None,
    config: CompressConfig | None = None,
    out: str | Path | None = None,
    runtime: Runtime | None = None,
    **settings: Any,
) -> Compressed:
    """Looks for the smallest student that keeps a share of its teacher's score.

    Args:
        teacher, env, statistics: as `distill`.
        out: folder of the result. Where it was begun before, it goes on. Default: a new one under distill_run/.
        settings: fields of `CompressConfig`, `DistillConfig` and `Runtime` by name, such as `keep=0.95, budget=15`
            (minutes).

    Raises:
        As `train`; StudyInterrupted where it was stopped: the same call goes on with it.
    """
    began = time.monotonic()
    config, runtime = _filled(settings, config or CompressConfig(), runtime or Runtime())
    from potstill.compress import outcome

    out = Path(out or runs.next_directory(Path("distill_run"), "compression"))
    run = outcome.open_compression(origin_of(teacher, env, statistics), config, out, runtime)
    with run.lock():
        for news in outcome.search(run, config, runtime, began):
            if not runtime.quiet:
                print(news.line, file=sys.stderr, flush=True)
        outcome.finish(run, runtime)
    return Compressed(run.path, run.config)


@dataclass(frozen=True)
class Study:
    """A study's records in the folder `path`, one a run."""

    path: Path
    plan: Plan
    failed: dict[str, str] = field(default_factory=dict)
    """By run, why it failed in this call."""
    ran: int = 0
    """How many runs ended in this call."""

    def table(self) -> "pl.DataFrame":
        """One row a run; `results.COLUMNS` says what the columns mean."""
        from potstill.results import runs_table

        return runs_table(self.path)

    def report(self, path: str | Path, seed: int = 0, resamples: int = 10_000) -> Path:
        """Writes the answers, figures and tables in one offline page, .html; an older one there is replaced."""
        from potstill.report import page

        page.write([self.path], Path(path), seed, resamples)
        return Path(path)

    def __rich__(self) -> Table:
        return overview(self.table())

    def __str__(self) -> str:
        console = Console(width=160, file=(text := io.StringIO()))
        console.print(self)
        return text.getvalue()

    def _repr_html_(self) -> str:
        return self.table().select("run", "status", "parameters", "score")._repr_html_()


def overview(table: "pl.DataFrame") -> Table:
    """A row per arm and size, six columns that fit 80: what is left out stands in the table's file."""
    from potstill.analysis.statistics import iqm
    from potstill.report.groups import share_kept

    groups: dict[tuple[tuple[int, str], int, str], list[dict[str, Any]]] = {}
    for run in table.iter_rows(named=True):
        groups.setdefault((order_of(run["arm"]), run["parameters"] or 0, run["width"] or "-"), []).append(run)
    several = max(map(len, groups.values())) > 1
    output = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    output.add_column("arm", overflow="ellipsis")  # a name has no space to wrap at
    for heading in ("parameters", "runs", "score", *["range of runs"] * several, "keeps"):
        output.add_column(heading, justify="right", no_wrap=True)
    for ((_, arm), parameters, width), group in sorted(groups.items()):
        scores, teachers = ([run[key] for run in group if run[key] is not None] for key in ("score", "teacher_score"))
        done = [run["status"] for run in group].count("done")
        score = float(iqm(scores)) if scores else math.nan  # as the report has it
        kept = share_kept(score, median(teachers)) if scores and teachers else None
        row = [f"{parameters:,} ({width})" if parameters else width]
        row += [f"{done}" if done == len(group) else f"{done} of {len(group)}"]
        row += [f"{score:.1f}" if scores else "-"]
        row += [f"{min(scores):.1f} to {max(scores):.1f}" if len(scores) > 1 else "-"] * several
        output.add_row(
            Text(arm), *map(Text, row), "-" if kept is None else f"{100 * kept:.0f} %"
        )  # Text reads no markup
    return output


def study(
    plan: str | Path | Plan,
    *,
    env: EnvLike | None = None,
    out: str | Path | None = None,
    part: Part = WHOLE,
    pool: Pool | None = None,
    threads: int = 1,
    runtime: Runtime | None = None,
    **settings: Any,
) -> Study:
    """Runs what a plan asks for and its folder does not hold yet, each run in a process of its own.

    Args:
        plan: a TOML file, see docs/reference/plan.md.
        env: the task, in place of the plan's. Workers import it: a class or function at the top of a module.
        out: folder of the records. Default: results/<name of the plan>.
        part: the arms, widths and seeds alone to do.
        threads: CPU threads of each run.
        settings: fields of `Pool` and `Runtime` by name: `workers` at a time, `retries`, `patience`, `executor` (local
            or ray), `ray_address` and `gpus_per_run`, as `potstill study run` has them.

    Raises:
        InputError: the plan is wrong, by its line; or the folder holds runs of other settings.
        StudyInterrupted: it was stopped; its runs are saved, and the same call goes on with them.
    """
    from potstill.study import records

    pool, runtime = _filled(settings, pool or Pool(), runtime or Runtime())
    plan = plan if isinstance(plan, Plan) else read_plan(Path(plan))
    if env is not None:
        task = find_env(env)
        name = env if isinstance(env, str) else task.id + f"@{task.layout}" * (task.layout != "auto")
        if find_env(name) != task:
            raise InputError(
                f"a plan has its task by name, and {name} alone is another than {task}: make it in a function"
            )
        plan = replace(plan, env=name, played={})
    out = Path(out) if out is not None else Path("results") / plan.name
    limits: dict[str, Any] = {name: getattr(pool, name) for name in ("workers", "retries", "patience")}
    if pool.executor == "ray":
        from potstill.study import cluster

        cores = cluster.connect(pool.ray_address)
        check_number("workers", pool.workers, cores, "cluster")
        start = partial(cluster.RemoteProcess, gpus=pool.gpus_per_run)
        limits |= {"workers": pool.workers or max(1, cores // max(1, threads)), "start": start}
    ended = list(records.run_study(plan, out, runtime, part=part, threads=threads, **limits))
    return Study(out, plan, {each.spec.name: each.error for each in ended if each.error is not None}, len(ended))


def _filled(settings: dict[str, Any], *configs: Any) -> tuple[Any, ...]:
    named: dict[str, Any] = {name: allow(value) if callable(value) else value for name, value in settings.items()}
    if isinstance(named.get("network"), str):  # as --network has it
        named["family"] = named.pop("network")
    if isinstance(named.get("options"), dict):
        named["options"] = as_options(named["options"])
    return filled(named, *configs)
