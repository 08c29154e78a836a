"""Runs, each in a process of its own that fills one core, and goes on where an earlier call stopped."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from potstill import telemetry
from potstill.distill import DistillConfig, fitted
from potstill.envs import check_task, is_builtin
from potstill.errors import InputError, Stopped, printable
from potstill.evaluation import NOT_EVALUATED, EvalConfig
from potstill.imports import check_shared, imported
from potstill.load import Origin, load
from potstill.policies import rebuild
from potstill.ppo import PPOConfig
from potstill.storage import checkpoints
from potstill.storage.files import open_regular, read_json
from potstill.storage.runs import InUseError, Run, StopRequested, hold, read_document, stop_on_signals, sweep, touch
from potstill.study import local
from potstill.study.eta import Eta, Underway
from potstill.study.local import LocalProcess
from potstill.study.plan import RunSpec
from potstill.training.runtime import Runtime, check_number
from potstill.training.trainer import new_branch, new_run, resolved

if TYPE_CHECKING:
    from potstill.study.cluster import RemoteProcess

SAVING = 30.0  # seconds a worker has to save when time is up
SIGN = 30.0  # seconds between two signs of life on the claims
LOG_TAIL = 1 << 16  # bytes of a log that are searched for its last line


class StudyInterrupted(Stopped):
    """The study was asked to stop; its runs are saved."""

    def __init__(self, stop: StopRequested) -> None:
        assert stop.requested is not None
        self.code = 128 + stop.requested
        super().__init__(f"stopped by {stop.requested.name}; the same command goes on with it")


class Ended(NamedTuple):
    """A run that is over."""

    spec: RunSpec
    run: Run | None  # None where it could not begin
    error: str | None  # None where it is done


@dataclass
class _Worker:
    spec: RunSpec
    run: Run
    process: "LocalProcess | RemoteProcess"
    began: float  # as `time.monotonic()` counts
    before: float  # share of the training that was done then
    claim: ExitStack  # on the run, against other studies in the same folder
    played: tuple[float, float] | None = None  # when its games were first seen to go on, and the share played by then

    def underway(self, seen: "_Seen") -> Underway:
        now = time.monotonic()
        games = None
        if seen.played is not None:
            since, share = self.played or (now, seen.played)
            if seen.played < share:  # the first look was at what an earlier process had left there
                since, share = now, seen.played
            self.played = since, share
            if seen.played > share:
                games = (now - since) * (1.0 - seen.played) / (seen.played - share)
        return Underway(self.spec, now - self.began, self.before, seen.trained, games)


def execute(
    specs: Sequence[RunSpec],
    folder: Path,
    runtime: Runtime,
    eval_config: EvalConfig = NOT_EVALUATED,
    *,
    workers: int = 0,
    threads: int = 1,
    retries: int = 1,
    patience: float = 900.0,
    done: Collection[str] = (),
    study: Run | None = None,
    until: float = math.inf,
    start: "Callable[[Run, Runtime, EvalConfig, Path], LocalProcess | RemoteProcess]" = LocalProcess,
) -> Iterator[Ended]:
    """Does all runs that are not done yet, at most `workers` at a time (0: as many as fill the cores).

    Each is a process of its own: what kills one leaves the others alone. Its output goes to log.txt in its directory.
    A process that dies is named on stderr and started again from its last save; a run that failed by itself (its loss
    diverged) is not. What an earlier study's worker still holds, because it is saving, is waited for. Several processes
    may do this at once in one folder: a run belongs to who holds its claim, and the others wait for it.
    One bad file is one bad run: it ends with that error and stays as it is, but for a torn resume state, whose run
    begins again.

    Args:
        folder: of the run directories.
        threads: of each run.
        retries: how often one run is started again.
        patience: seconds without a sign of life after which a process counts as hung, and is killed; as long it may
            take to save when it is asked to stop.
        done: names of runs whose results are known. One of them is run all the same where another begins with
            its policy and that is gone.
        study: whose lock gets a sign of life while runs go on.
        until: when, as `time.monotonic()` counts, the workers save and stop; what they had not done is not yielded. One
            that has not stopped half a minute later is killed, and goes on from its last save.
        start: where a run's process goes: here, or a cluster (`cluster.RemoteProcess`).

    Yields:
        Every run as it ends, and first those that had ended without being in `done`.

    Raises:
        InputError: a run in `folder` belongs to another plan, a worker cannot make the task, or what is asked for does
            not fit. No run directory is made then.
        StudyInterrupted: SIGINT or SIGTERM; the workers have saved and stopped.
    """
    for name, value in (("workers", workers), ("retries", retries), ("patience", patience)):
        if not value >= 0:
            raise InputError(f"{name} must be 0 or more, not {value}")
    if threads < 1:
        raise InputError(f"threads must be at least 1, not {threads}")
    if start is LocalProcess:
        check_number("workers", workers)
    workers = workers or max(1, runtime.cores // threads)
    each = replace(runtime, threads=threads)
    waiting = _due(specs, folder, done)
    _check_tasks([spec for spec in waiting if not _ended(folder / spec.name)])
    over: dict[str, str | None] = {}  # what ended, and why it failed
    runs: dict[str, Run] = {}
    for spec in waiting.copy():
        if (damage := _damage(folder / spec.name)) is not None:
            waiting.remove(spec)
            over[spec.name] = damage
            yield Ended(spec, None, damage)
        elif not spec.needs or (folder / spec.name / "config.json").exists():  # else nothing to begin with
            with ExitStack() as claim:
                if _claim(claim, folder, spec):
                    runs[spec.name] = open_or_create(spec, folder, each)
    for spec in [spec for spec in waiting if spec.name in runs and runs[spec.name].status == "done"]:
        waiting.remove(spec)  # whoever ran it was stopped before this was noted
        _tidy(runs[spec.name])
        yield Ended(spec, runs[spec.name], None)
    failed_before = {name for name, run in runs.items() if run.status == "failed"}
    starts: dict[str, int] = {}
    active: list[_Worker] = []
    began, total, eta = time.monotonic(), len(waiting), Eta()
    touched = began
    console = Console(stderr=True)
    with stop_on_signals() as stop, Live(console=console, auto_refresh=False, transient=True) as live:
        printed = began
        try:
            while (waiting or active) and not stop.requested and time.monotonic() < until:
                waiting_for = {spec.name for spec in waiting} | {worker.spec.name for worker in active}
                for spec in [spec for spec in waiting if not spec.needs & waiting_for]:
                    if len(active) >= workers:
                        break
                    if spec.start_from is not None and over.get(spec.start_from.name) is not None:
                        waiting.remove(spec)
                        over[spec.name] = f"{spec.start_from.name}, which it begins with, failed"
                        yield Ended(spec, None, over[spec.name])
                        continue
                    with ExitStack() as claim:
                        if not _claim(claim, folder, spec):  # another process does it
                            continue
                        run = runs.get(spec.name)
                        try:
                            if (damage := _damage(folder / spec.name)) is not None:
                                raise InputError(damage)
                            if run is None or not run.path.exists():
                                run = open_or_create(spec, folder, each)
                        except InputError as error:  # it does not fit what it begins with, say: the others go on
                            waiting.remove(spec)
                            over[spec.name] = str(error)
                            yield Ended(spec, None, over[spec.name])
                            continue
                        runs[spec.name], status = run, run.status
                        if status == "running" and time.monotonic() - began < patience:
                            continue
                        waiting.remove(spec)
                        if status == "done" or (status == "failed" and spec.name not in {*failed_before, *starts}):
                            _tidy(run)  # by the worker of another study
                            over[spec.name] = _error(run) if status == "failed" else None
                            yield Ended(spec, run, over[spec.name])
                            continue
                        starts[spec.name] = starts.get(spec.name, 0) + 1
                        _drop_torn_state(run)
                        before = _progress(run).trained
                        try:
                            process = start(run, each, eval_config, folder / "data")
                        except InputError as error:  # its log is a link, say: the others go on
                            over[spec.name] = str(error)
                            yield Ended(spec, run, over[spec.name])
                            continue
                        active.append(_Worker(spec, run, process, time.monotonic(), before, claim.pop_all()))
                time.sleep(0.2 if active else 0.5)
                if time.monotonic() - touched > SIGN:
                    touched = time.monotonic()
                    for worker in active:
                        touch(_claim_of(folder, worker.spec))
                if study is not None:
                    study.touch_lock()
                for worker in active.copy():
                    hung = worker.process.poll() is None and time.time() - worker.process.last_sign() > patience
                    if worker.process.poll() is None and not hung:
                        continue
                    if hung:
                        worker.process.kill()
                    worker.process.close(patience)
                    active.remove(worker)
                    name = worker.spec.name
                    with worker.claim:  # until what it came to is noted
                        if (damage := _damage(worker.run.path)) is not None:
                            over[name] = damage
                            yield Ended(worker.spec, None, damage)
                            continue
                        status = worker.run.status
                        text = f"no sign of life for {patience:.0f} s" if hung else _last_line(worker)
                        if status not in ("done", "failed") and starts[name] <= retries:
                            print(f"study  {name}: {text}; started again", file=sys.stderr, flush=True)
                            waiting.insert(0, worker.spec)
                            continue
                        if status == "done":
                            _tidy(worker.run)
                            eta.ended(worker.underway(_Seen("done", 1.0)))
                        over[name] = None if status == "done" else text
                        yield Ended(worker.spec, worker.run, over[name])
                failed = sum(error is not None for error in over.values())
                looks = [_progress(worker.run) for worker in active]
                rest = [worker.underway(seen) for worker, seen in zip(active, looks, strict=True)]
                seconds = eta.left(rest, waiting, workers)
                left = telemetry.clock(seconds) if math.isfinite(seconds) else "--:--"
                if console.is_terminal:
                    live.update(_table(active, looks, len(done), total, len(waiting), failed, left), refresh=True)
                elif time.monotonic() - printed > 30 and not runtime.quiet:
                    printed = time.monotonic()
                    text = "  ".join(f"{w.spec.name} {seen.text}" for w, seen in zip(active, looks, strict=True))
                    counts = f"{len(over) - failed}/{total} done, {failed} failed"
                    print(f"study  {counts}  {text}  {left} left", file=sys.stderr, flush=True)
        finally:  # asked to stop, or failed here: no worker is left behind, and each saves first
            for worker in active:
                worker.process.terminate()
            for worker in active:  # who asked for a stop may wait for the save; a time that is up may not
                with worker.claim:
                    worker.process.close(SAVING if time.monotonic() >= until and not stop.requested else patience)
        if stop.requested:
            raise StudyInterrupted(stop)


def _ended(path: Path) -> bool:
    """Whether a run is done, although no record says so yet: it plays no more."""
    return (path / "config.json").exists() and _damage(path) is None and Run.open(path).status == "done"


def _check_tasks(specs: Sequence[RunSpec]) -> None:
    """Refuses tasks that a worker, which knows no more than the modules that the user named, could not make."""
    teachers = {spec.teacher for spec in specs if isinstance(spec.config, DistillConfig)}
    for teacher in filter(None, teachers):
        check_shared(str(teacher.path))
    tasks = {load(teacher).env for teacher in teachers if teacher is not None}
    tasks |= {spec.config.env for spec in specs if isinstance(spec.config, PPOConfig)}
    for spec in specs:
        check_shared(spec.config.network.family, getattr(spec.config, "objective", ""))
    for env in tasks:
        check_shared(env.id)
        check_task(env)
        if (imported() or not is_builtin(env)) and (said := local.check(env)) is not None:
            raise InputError(f"workers cannot play what this process can: {said}")


def open_or_create(spec: RunSpec, folder: Path, runtime: Runtime) -> Run:
    """The run directory of a specification in `folder`.

    Raises:
        InputError: a run with other settings, or another teacher, lies there.
    """
    path = folder / spec.name
    initial = folder / spec.start_from.name if spec.start_from is not None else None
    if path.is_dir() and not (path / "config.json").exists():  # a study that was killed had just made it
        sweep(path)
        with suppress(OSError):  # it is not empty, and no run's directory: said below
            path.rmdir()
    if not path.exists():
        labels = {"arm": spec.arm, "identity": identity(spec, {})} | ({"branch": spec.share} if spec.share else {})
        trunk = folder / spec.trunk.name if spec.trunk is not None else None
        if trunk is None or not (trunk / "config.json").exists():
            return new_run(spec.config, path, runtime, labels=labels, teacher=spec.teacher, initial=initial)
        new_branch(Run.open(trunk), spec.share, path, labels)
    run = Run.open(path)
    stored = run.config.get("config", {})
    config = spec.config
    if config.precision == "auto":  # measuring it again might come to something else
        config = replace(config, precision=stored.get("precision", "auto"))
    loaded = load(spec.teacher) if spec.teacher is not None else None
    if isinstance(config, DistillConfig) and loaded is not None:
        config = fitted(config, loaded.policy)
    if rebuild(type(config), stored) != rebuild(type(config), resolved(config, runtime)):
        raise InputError(f"{path} is a run with other settings: choose another --out")
    if loaded is not None and run.config.get("teacher_hash") != loaded.hash:
        raise InputError(f"{path} is a run with another teacher: choose another --out")
    return run


def _claim_of(folder: Path, spec: RunSpec) -> Path:
    return folder / f".{spec.name}.claim"


def _claim(stack: ExitStack, folder: Path, spec: RunSpec) -> bool:
    """Whether `stack` now holds the run's claim; not where another process has it. A dead one's ends with it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        stack.enter_context(hold(_claim_of(folder, spec)))
    except InUseError:
        return False
    return True


def _damage(path: Path) -> str | None:
    """Why the run in directory `path` cannot be read, if so."""
    if not (path / "config.json").exists():
        return None
    try:
        Run.open(path).status  # noqa: B018  # it is read
    except InputError as error:
        return str(error)
    return None


def _drop_torn_state(run: Run) -> None:
    """A resume state that cannot be read is no reason to fail for ever: told, and the run begins again."""
    if not run.resume_path.exists():
        return
    try:
        checkpoints.load(run.resume_path)
    except InputError as error:
        print(f"study  {run.path.name}: {error}; it begins again", file=sys.stderr, flush=True)
        for path in (run.resume_path, run.games_path, run.metrics_path):
            path.unlink(missing_ok=True)


def _error(run: Run) -> str:
    return printable(read_document(run.result_path).get("error"))


def _tidy(run: Run) -> None:
    """Takes away what a process that died with its result written has left in the run's directory."""
    with suppress(InputError), run.lock():  # refused: its process is still there, about to do the same
        run.tidy()


def identity(spec: RunSpec, hashes: dict[Origin, str]) -> str:
    """The run's identity; `hashes` remembers those of the teachers' files."""
    teacher = teacher_of_run(spec)
    if teacher is not None and teacher not in hashes:
        hashes[teacher] = load(teacher).hash
    return spec.identity(hashes[teacher] if teacher is not None else None)


def teacher_of_run(spec: RunSpec) -> Origin | None:
    """The teacher of a run, or of the student it begins with."""
    return spec.teacher if spec.start_from is None else teacher_of_run(spec.start_from)


def _due(specs: Sequence[RunSpec], folder: Path, done: Collection[str]) -> list[RunSpec]:
    """The runs to do: those not done, and those done whose policy one of them begins with and does not find."""
    due = [spec for spec in specs if spec.name not in done]
    needed = {spec.start_from.name for spec in due if spec.start_from is not None}
    missing = {name for name in needed & set(done) if not (folder / name / "policy.safetensors").exists()}
    return [spec for spec in specs if spec.name not in done or spec.name in missing]


def _last_line(worker: _Worker) -> str:
    """Why a run failed: what its result says, or the last line of its log."""
    if worker.run.status == "failed":
        return _error(worker.run)
    said = ""
    with suppress(InputError), open_regular(worker.run.path / "log.txt") as log:
        log.seek(max(0, os.fstat(log.fileno()).st_size - LOG_TAIL))
        lines = log.read().decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    code = worker.process.returncode or 0
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return printable(f"{how}: {said[:200]}" if said else how)


class _Seen(NamedTuple):
    """What can be seen of a run from outside."""

    text: str
    trained: float  # share of its training
    played: float | None = None  # share of its games; None before they are counted


def _progress(run: Run) -> _Seen:
    last = telemetry.last(run.metrics_path)
    if last is None:
        return _Seen("starting", 0.0)
    share = min(last["step"] / int(run.config["config"]["total_timesteps"]), 1.0)
    played, text = None, f"{share:.0%}"
    if share >= 1.0:
        played, text = _games(run)
    for name in ("agreement", "score"):
        if isinstance(last.get(name), int | float):
            return _Seen(f"{text}, {name} {last[name]:.3g}", share, played)
    return _Seen(text, share, played)


def _games(run: Run) -> tuple[float | None, str]:
    """The share of a run's games that is played, and how many that are."""
    with suppress(InputError):  # none yet
        document = read_json(run.games_path)
        played, games = document.get("played"), document.get("games")
        if isinstance(played, int) and isinstance(games, int) and 0 <= played <= games > 0:
            return played / games, f"{played}/{games} games"
    return None, "evaluating"


def _table(
    active: list[_Worker], looks: list[_Seen], before: int, total: int, waiting: int, failed: int, left: str
) -> Group:
    ended = total - waiting - len(active)
    done, planned = before + ended - failed, before + total
    table = Table.grid(Column(overflow="ellipsis"), Column(no_wrap=True), padding=(0, 2), pad_edge=False)
    for worker, seen in zip(active, looks, strict=True):
        table.add_row(Text(printable(worker.spec.name)), seen.text)
    return Group(f"{done} of {planned} runs done, {waiting} waiting, {failed} failed, {left} left", table)
