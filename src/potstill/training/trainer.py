"""One run from config to result.json: what `potstill train`, `potstill distill` and a study's workers do."""

import json
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from potstill import evaluation, ppo, telemetry
from potstill.algorithm import Algorithm, Cost, Progress
from potstill.arms import arm_of
from potstill.distill import Distillation, DistillConfig, fitted
from potstill.distill import start as start_distillation
from potstill.envs import Array, Envs
from potstill.errors import DivergedError, InputError, Stopped, TaskError, Terminated
from potstill.evaluation import NOT_EVALUATED, EvalConfig
from potstill.imports import remember_makers
from potstill.load import Place, check_own, load, origin_in, origin_of
from potstill.networks import Precision, fitting_precision, resolve_device, resolve_precision, torch_threads
from potstill.policies import LoadedPolicy, load_policy, rebuild, save_policy
from potstill.storage import checkpoints
from potstill.storage.runs import LockLostError, Run, branch_name, stop_on_signals
from potstill.training.assessment import assess
from potstill.training.runtime import Runtime, provenance
from potstill.training.teacher_data import teacher_data
from potstill.views import part

KEEP_EVERY = 1.0  # seconds between two copies of the state, kept in case that the task raises


class Interrupted(Stopped):
    """The run was asked to stop, and is saved."""

    def __init__(self, run: Run, number: signal.Signals) -> None:
        self.number, self.code = number, 128 + number
        super().__init__(f"stopped by {number.name}; continue with --resume {run.path}")


def new_run(
    config: Any, out: Path, runtime: Runtime, *, labels: dict[str, str] | None = None, **origins: Place | None
) -> Run:
    """The directory of a run, with everything that decides its outcome in config.json.

    Args:
        labels: what a study calls the run: its `arm` and `identity`.
        origins: by role: the `teacher` to learn from, the `initial` policy whose weights to begin with.

    Raises:
        InputError: these do not fit together, or `out` exists. Nothing is made then.
    """
    name, kind = next((name, kind) for name, kind in KINDS.items() if type(config) is kind.config)
    found: dict[str, LoadedPolicy] = {}
    document: dict[str, Any] = {}
    for role, place in origins.items():
        if place is None:
            continue
        if not kind.foreign:
            check_own(place)
        origin = origin_of(place)
        found[role] = load(origin)
        document |= origin.document(role) | {f"{role}_hash": found[role].hash}
    fit = kind.fit(config, found)
    if kind.foreign and fit.objective != config.objective and not runtime.quiet:
        print(f"potstill: teacher {document['teacher']} tells actions: --objective {fit.objective}", file=sys.stderr)
    document |= {"kind": name, "config": resolved(fit, runtime)}
    return Run.create(out, document | provenance(runtime) | (labels or {}))


def _fit_training(config: ppo.PPOConfig, origins: dict[str, LoadedPolicy]) -> ppo.PPOConfig:
    """The config; what does not fit is refused before anything is made."""
    for role, loaded in origins.items():
        # What of a frame is hidden comes with the policy's normalisation, which is inherited: it is not the task's.
        # And a student may see otherwise than its teacher, though not than the policy it begins with.
        task = replace(loaded.env, view=config.env.view) if role == "teacher" else loaded.env
        if asdict(task) | {"hidden_rows": config.env.hidden_rows} != asdict(config.env):
            raise InputError(f"{loaded.path} was made for another task: {loaded.env}, not {config.env}")
    with closing(Envs(config.env, 1)) as envs:
        policies = {role: loaded.policy for role, loaded in origins.items()}
        state = ppo.start(replace(config, normalise_inputs=0), envs, torch.device("cpu"), **policies)
    return replace(config, precision=fitting_precision(config.precision, state.policy.layout))


def _fit_distillation(config: DistillConfig, origins: dict[str, LoadedPolicy]) -> DistillConfig:
    """As `_fit_training`, with what fits the teacher."""
    if config.mode == "buffer" and min(config.total_timesteps, config.buffer_size) < 8 * config.num_envs:
        raise InputError(f"total-timesteps and buffer-size must be at least 8 x num-envs, {8 * config.num_envs}")
    teacher, task = origins["teacher"].policy, config.task_of(origins["teacher"].env)
    config = fitted(config, teacher)
    with ExitStack() as stack:
        other = task.view != teacher.view
        envs = stack.enter_context(closing(Envs(task, 1))) if other else None
        student = start_distillation(config, teacher, torch.device("cpu"), envs, observations=0).student
    return replace(config, precision=fitting_precision(config.precision, student.layout))


class Kind(NamedTuple):
    """A kind of run, by the algorithm that makes it."""

    config: type[Any]
    algorithm: Callable[..., Algorithm]
    fit: Callable[[Any, dict[str, LoadedPolicy]], Any]
    """The config that is recorded, from the one asked for and the run's origins; refuses what does not fit."""
    methods: tuple[str, ...]  # what plans and tables call it, by what it begins with
    foreign: bool = False  # whether its origins may be other than policies of potstill's


KINDS = {
    "train": Kind(ppo.PPOConfig, ppo.PPO, _fit_training, ("rl", "ppd", "finetune")),
    "distill": Kind(DistillConfig, Distillation, _fit_distillation, ("distill",), foreign=True),
}
"""By the `kind` of config.json. A new algorithm has its line here, and can be a plan's method then."""
CONFIGS = {method: kind.config for kind in KINDS.values() for method in kind.methods}


def new_branch(trunk: Run, share: str, out: Path, labels: dict[str, str] | None = None) -> Run:
    """The directory of the run of a share of `trunk`'s budget, which goes on from where it branched off.

    What the trunk kept for it there moves into it. Without that the run begins at its beginning, and ends the same.
    """
    config = rebuild(ppo.PPOConfig, trunk.config.get("config")).of_share(share)
    document = trunk.config | {"config": json.loads(json.dumps(asdict(config))), "branch": share}
    run = Run.create(out, document | (labels or {}))
    if kept := _saved(trunk, trunk.branch_path(share)):
        with open(trunk.metrics_path, "rb") as lines, open(run.metrics_path, "xb") as copy:
            copy.write(lines.read(kept["metrics"]["bytes"]))
        checkpoints.save(run.resume_path, *_parts(kept | {"run": run.identity}))
        trunk.branch_path(share).unlink()
    return run


def branches_of(run: Run) -> dict[str, Path]:
    """Where the runs of the shares of this one's budget lie, by the share: beside it."""
    shares = run.config.get("config", {}).get("branch", [])
    return {share: run.path.with_name(branch_name(run.path.name, share)) for share in shares}


def resolved(config: ppo.PPOConfig | DistillConfig, runtime: Runtime) -> dict[str, Any]:
    """The config as config.json holds it: with the precision that `auto` comes to here."""
    dtype = resolve_precision(config.precision, resolve_device(runtime.device))
    named: Precision = "bfloat16" if dtype == torch.bfloat16 else "float32"
    document: dict[str, Any] = json.loads(json.dumps(asdict(replace(config, precision=named))))
    return document


def execute(
    run: Run, runtime: Runtime, eval_config: EvalConfig = NOT_EVALUATED, data_root: Path | None = None,
    origins: dict[str, Path] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Does a run, or goes on with one, and returns its result.

    Args:
        data_root: where teacher-led runs keep the data sets they share.
        origins: where the `teacher` and the `initial` policy lie here, if not where config.json says.

    Raises:
        Interrupted: SIGINT or SIGTERM; the state is saved.
        DivergedError: the run is marked failed; its last checkpoint stands.
        TaskError: the task's own code raised; the run is marked failed and its state saved.
        InputError: the run is finished, held by another process, or its directory cannot be written.
    """
    kind = run.config.get("kind")
    if kind not in KINDS:
        raise InputError(f"{run.path} is not a run of potstill's: its config.json is of another kind")
    runtime.apply()
    config = run.config.get("config")
    if isinstance(config, dict) and isinstance(config.get("env"), dict):
        remember_makers(str(config["env"].get("id")), run.config.get("imports"))
    run = replace(run, config=run.config | {f"{role}_here": str(path) for role, path in (origins or {}).items()})
    with run.lock():
        if run.status == "done":
            run.tidy()  # of a process that was killed as it finished
            raise InputError(f"{run.path} is finished: its result is in result.json")
        run.result_path.unlink(missing_ok=True)  # of an attempt that failed
        try:
            return _train(run, runtime, eval_config, data_root or run.path.parent / "data")
        except (DivergedError, TaskError) as error:
            run.write_result({"status": "failed", "kind": kind, "error": str(error)})
            raise
        except KeyboardInterrupt as stop:  # while recording, replaying or evaluating: what was saved is enough
            raise Interrupted(run, signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT) from stop


def _train(run: Run, runtime: Runtime, eval_config: EvalConfig, data_root: Path) -> dict[str, Any]:
    kind = KINDS[run.config["kind"]]
    config: Any = rebuild(kind.config, run.config.get("config"))
    device = resolve_device(runtime.device)
    roles: list[str] = [role for role in ("teacher", "initial") if role in run.config]
    if isinstance(config, DistillConfig) and "teacher" not in roles:
        raise InputError(f"{run.path / 'config.json'} is damaged: it names no teacher")
    origins = {role: _load_origin(run.config, role, str(device)) for role in roles}
    # An origin's normalisation, which says what is hidden, is the run's: what is hidden is the only difference.
    env = config.task_of([*origins.values()][-1].env) if origins else config.env
    beside = origins["teacher"].env.view if "teacher" in origins else None
    saved = _saved(run, run.resume_path)
    cores = 1 if getattr(config, "overlap", False) else runtime.cores  # of two that work at the same time, one each
    with closing(Envs(env, config.num_envs, threads=cores, beside=beside)) as envs:
        options: dict[str, Any] = {role: loaded.policy for role, loaded in origins.items()}
        if getattr(config, "lead", "") == "teacher":
            options["data"] = teacher_data(run, config, origins["teacher"], envs, data_root, runtime.quiet)
        algorithm = kind.algorithm(config, envs, device, tolerant=runtime.inexact, **options)
        if saved:
            algorithm.load_state_dict(saved)
        if not runtime.quiet:  # an observation that is misread shows here
            told = Console(stderr=True, soft_wrap=not sys.stderr.isatty(), highlight=False, markup=False)
            pruned = f", {sparsity:.0%} of whose weights go" if (sparsity := getattr(config, "sparsity", 0.0)) else ""
            told.print(f"potstill: {algorithm.policy}{pruned}")
        title = f"{run.config['kind']} {env.id}, width {config.network.width}"
        work = max(cost.policy.size().macs * cost.batch for cost in algorithm.costs())
        with torch_threads(cores, work):
            seconds = _drive(run, runtime, algorithm, title, saved)
        probe = _probe(envs)
    origin = _provenance_of(run, config.seed, algorithm.total, seconds)
    save_policy(run.policy_path, algorithm.policy, env, probe, origin)
    record = {"arm": arm_of(run.config), "seed": config.seed, "teacher": run.config.get("teacher")}
    record |= {name: getattr(config, name) for name in ("lead", "objective", "mode") if hasattr(config, name)}
    record |= {"view": " ".join(env.view)} if env.view else {}
    record |= {"env_steps": algorithm.total, "gradient_steps": algorithm.gradient_steps, "wall_seconds": seconds}
    record |= {"training_macs": sum(map(_training_macs, algorithm.costs()))}
    record |= {"branch": run.config["branch"]} if "branch" in run.config else {}
    record |= {"inexact": True} if envs.inexact else {}
    return _finish(run, runtime, eval_config, record, origins.get("teacher"))


def _saved(run: Run, path: Path) -> dict[str, Any]:
    """What `_drive` saved of a run at `path`. Empty where that is nothing or, which is told, damaged.

    Raises:
        InputError: it is another run's.
    """
    if not path.exists():
        return {}
    try:
        tensors, document = checkpoints.load(path)
    except checkpoints.DamagedError as error:
        print(f"potstill: {error}; without a copy, the run is begun again", file=sys.stderr)
        return {}
    if document.get("run") != run.identity:
        raise InputError(
            f"{path} was saved by a run with another config.json than the one beside it: put back the file"
            " that was changed, or begin again with another --out"
        )
    kept = document.get("metrics")
    if not (isinstance(kept, dict) and type(kept.get("bytes")) is int and isinstance(kept.get("digest"), str)):
        raise InputError(f"{path} does not say what it keeps of metrics.jsonl")
    return tensors | document


def _drive(run: Run, runtime: Runtime, algorithm: Algorithm, title: str, before: dict[str, Any]) -> float:
    """Trains to the end: metrics, progress, saves, signals. Returns the seconds it has taken in all.

    Args:
        before: what it goes on from, as `_saved` tells: what of metrics.jsonl to keep, and the seconds so far.
    """
    done, total = algorithm.done, algorithm.total
    began: float = time.perf_counter() - before.get("seconds", 0.0)
    saved = time.perf_counter()
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        bar = stack.enter_context(telemetry.Progress(title, total, done, runtime.quiet))
        metrics = stack.enter_context(telemetry.Metrics(run.metrics_path, before.get("metrics")))
        others = telemetry.sinks(runtime.track, run.path, run.config, done)
        outputs: list[telemetry.Sink] = [metrics, *(stack.enter_context(closing(sink)) for sink in others)]

        def about() -> dict[str, Any]:
            return {"kind": "resume", "run": run.identity, "seconds": time.perf_counter() - began}

        def save(tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
            document |= about()
            try:
                run.touch_lock()
            except LockLostError as lost:
                config = {key: value for key, value in run.config.items() if not key.endswith("_here")}
                rescued = Run.create(run.path.with_name(f"{run.path.name}.lost-{secrets.token_hex(4)}"), config)
                metrics.copy(rescued.metrics_path)
                checkpoints.save(rescued.resume_path, tensors, document)
                raise InputError(f"{lost}; its state is saved: continue it with --resume {rescued.path}") from lost
            metrics.sync()
            checkpoints.save(run.resume_path, tensors, document)

        for progress in _saving_what_raises(run, algorithm, metrics, save):
            if progress.step <= done and not progress.metrics:  # played again, to go on from there
                run.touch_lock()
                bar.update(done, again=progress.step)
                if stop.requested:
                    raise Interrupted(run, stop.requested)
                continue
            elapsed = time.perf_counter() - began
            record = {"step": progress.step, "seconds": elapsed, "score": progress.score, "games": progress.games}
            for output in outputs:
                output.write(record | progress.metrics)
            for share, state in progress.branches.items():
                metrics.sync()
                checkpoints.save(run.branch_path(share), *_parts(state | {"metrics": metrics.written} | about()))
            score = None if np.isnan(progress.score) else progress.score
            bar.update(progress.step, score=score, agreement=progress.metrics.get("agreement"))
            if stop.requested or time.perf_counter() - saved > runtime.save_every or progress.step >= total:
                save(*_parts(algorithm.state_dict() | {"metrics": metrics.written}))
                saved = time.perf_counter()
            if stop.requested:
                raise Interrupted(run, stop.requested)
    return time.perf_counter() - began


def _parts(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The two parts of a checkpoint: tensors, and a document."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def _saving_what_raises(
    run: Run, algorithm: Algorithm, metrics: telemetry.Metrics, save: Callable[..., None]
) -> Iterator[Progress]:
    """The same, where an error says how far it came, and one of the task's own code leaves a state to go on from.

    A task may raise amid a rollout, when the state is no longer one to go on from: one of a second ago at most is kept.
    """
    kept: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    kept_at, done = -np.inf, algorithm.done
    try:
        for progress in algorithm.steps():
            yield progress  # its line is written meanwhile
            done = progress.step
            if progress.metrics and time.perf_counter() - kept_at > KEEP_EVERY:
                tensors, document = _parts(algorithm.state_dict() | {"metrics": metrics.written})
                kept = {name: tensor.clone() for name, tensor in tensors.items()}, document
                kept_at = time.perf_counter()
    except DivergedError as error:
        raise DivergedError(f"after {done:,} agent steps: {error}") from error
    except TaskError as error:
        if kept is not None:
            save(*kept)
        told = f"after {done:,} agent steps: {error}"
        raise TaskError(told + f"; go on with --resume {run.path}" * run.resume_path.exists()) from error


def _finish(
    run: Run, runtime: Runtime, eval_config: EvalConfig, record: dict[str, Any], teacher: LoadedPolicy | None
) -> dict[str, Any]:
    """Evaluates the policy as it lies on disk, writes result.json, and drops what only an unfinished run needs."""
    loaded = load_policy(run.policy_path)
    record = {"status": "done", "kind": run.config["kind"]} | record
    record |= {"env": loaded.env.id, "width": loaded.policy.config.width, **loaded.policy.size()._asdict()}
    record |= evaluation.latency(loaded.policy)
    here, begun = provenance(runtime), run.config.get("machine")
    record |= {key: run.config.get(key) for key in ("command", "commit")} | {"threads": here["threads"]}
    record["machine"] = here["machine"] + (f"; begun on {begun}" if begun not in (None, here["machine"]) else "")
    record |= {"precision": run.config["config"]["precision"]}
    record |= {"config_hash": run.identity, "policy_hash": loaded.hash}
    record |= {"metrics_digest": telemetry.digest(run.metrics_path)}
    if eval_config.episodes:
        other = _load_origin(run.config, "teacher") if teacher is not None else None  # on the CPU, as `loaded` is
        record |= assess(loaded, runtime, eval_config, other, run)
    run.write_result(record)
    run.tidy()
    return record


def _load_origin(config: dict[str, Any], role: str, device: str = "cpu") -> LoadedPolicy:
    """The `teacher` or the `initial` policy that a run's config.json names.

    Raises:
        InputError: it is gone, or another one lies there now.
    """
    loaded = load(origin_in(config, role), device=device)
    if loaded.hash != config.get(f"{role}_hash", loaded.hash):
        raise InputError(f"{loaded.path} is no longer the {role} this run began with")
    return loaded


def _provenance_of(run: Run, seed: int, env_steps: int, seconds: float) -> dict[str, Any]:
    """Where a policy comes from, as its checkpoint tells."""
    keys = ("command", "commit", "machine", "imports", "teacher", "teacher_hash", "initial", "initial_hash")
    facts = {key: run.config[key] for key in keys if key in run.config}
    num_envs = run.config["config"]["num_envs"]
    return facts | {"seed": seed, "env_steps": env_steps, "seconds": seconds, "num_envs": num_envs}


def _probe(envs: Envs) -> Array:
    """Sixteen observations from the first seconds of play, (16, *observation shape)."""
    rows = part(envs.random_play(64), envs.config.view)
    probe: Array = rows[np.linspace(0, len(rows) - 1, 16).astype(int)]
    return probe


def _training_macs(cost: Cost) -> int:
    """Multiply-adds of a network in a training."""
    policy = cost.policy
    device = policy.mean.device
    inputs = policy.prepare(torch.zeros((1, *policy.observation_shape), device=device))
    memory = torch.zeros((1, policy.actor.in_features), device=device) if policy.remembers else None
    with FlopCounterMode(display=False) as forward:
        logits, value = policy.heads(inputs, memory)
    with FlopCounterMode(display=False) as backward:
        (logits.sum() + value.sum()).backward()
    policy.zero_grad()
    once, back = (int(counter.get_total_flops()) // 2 for counter in (forward, backward))
    once += policy.look.macs if policy.look is not None else 0
    return cost.seen * once + cost.learned * (once + back)
