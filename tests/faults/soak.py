"""A study under random kills and other ills until it is done, beside the same study left in peace.

    python tests/faults/soak.py --runs 200 --seed 0

The runs are CartPole trainings, distillations of a teacher made first, and fine-tunings of students, of about a second
each. Workers, and in the first half the driver, die by SIGKILL or SIGTERM: at their start, while they train, while they
save, while they are scored. The host is renamed again and again, if this process may do so. Which of them, how and when
is drawn from the seed. The driver is then started again, at once, until it ends by itself. JSON that is no record lies
in the records' folder. Once, between two drivers, files of runs change places, and locks of another host lie in their
directories; after a call that must name each such file they are put back.

It prints what was done and what was found at the end; exit code 1 if anything was lost, left, or passed over in
silence. No process is killed but the driver it started and that driver's own children.
"""

import argparse
import ctypes
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import polars as pl

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest has it
from processes import Child, Here, warm

from potstill.evaluation import EvalConfig
from potstill.networks import NetworkConfig
from potstill.ppo import PPOConfig
from potstill.results import curves_frame, episodes_frame, find_runs, read_runs, runs_frame
from potstill.study.planfile import read_plan
from potstill.study.records import run_study
from potstill.tasks import TASKS
from potstill.training import trainer
from potstill.training.runtime import Runtime
from potstill.training.trainer import new_run

RUNTIME = Runtime(device="cpu", threads=1, quiet=True, save_every=0.0)  # saves after every update
TIMES = ("seconds", "wall_seconds", "latency_ms", "latency_p95_ms", "command", "commit")  # of a table: when, how fast
# A run's first optimiser makes torch import its compiler, 80 MiB. Here that is done at once: what grows then is ours.
DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
import torch._dynamo
from soak import drive; from processes import potstill
drive(potstill, *sys.argv[2:])
"""
NEWUTS = 0x04000000  # of sched.h
GROWTH = 4.0  # MiB by which a driver's memory may differ between the second and the last tenth of its life
STRAYS = {"notes.json": '{"buy": "milk"}', "list.json": "[1, 2]", "torn.json": '{"run": "to'}  # among the records
PLAN = """\
env = "cartpole"
widths = ["1/16"]
teachers = ["teacher"]

[evaluation]
episodes = 4
starts = [20]

[arms.rl]
seeds = {rl}
total-timesteps = 2048
num-steps = 32

[arms.student]
method = "distill"
seeds = {student}
total-timesteps = 1024
num-envs = 8
batch-size = 32
warmup-steps = 64
value-coefficient = 0.5

[arms.distill-teacher]
seeds = {teacher}
total-timesteps = 1024
num-envs = 8
batch-size = 32

[arms.finetune]
from = "student"
seeds = {finetune}
total-timesteps = 1024
num-steps = 32
"""


@dataclass
class Victim:
    """A worker, and what is to become of it."""

    handle: int  # a pidfd: it never means another process
    run: Path
    number: signal.Signals | None  # None: it is spared
    phase: str
    delay: float
    armed: float | None = None  # when it entered the phase in which it is to die


@dataclass
class Soak:
    """What happened, and what was found."""

    planned: int = 0
    calls: int = 0
    workers_killed: dict[str, int] = field(default_factory=lambda: {"SIGKILL": 0, "SIGTERM": 0})
    drivers_killed: dict[str, int] = field(default_factory=lambda: {"SIGKILL": 0, "SIGTERM": 0})
    workers: int = 0
    resumed: int = 0
    failed_for_a_while: int = 0
    renamed: int = 0
    swapped: list[str] = field(default_factory=list)
    locked: int = 0
    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)  # files out of place that no line told of
    memory: list[list[float]] = field(default_factory=list)  # MiB, of each driver while it has runs
    seconds: float = 0.0

    @property
    def early_and_late(self) -> tuple[float, float]:
        """MiB of the driver that lived longest, while it has runs: medians of the second and the last tenth."""
        longest = max(self.memory, key=len) or [0.0]
        tenth = max(1, len(longest) // 10)
        return statistics.median(longest[tenth : 2 * tenth] or longest), statistics.median(longest[-tenth:])

    @property
    def grows(self) -> bool:
        early, late = self.early_and_late
        return late - early > GROWTH

    @property
    def passed(self) -> bool:
        return not (self.lost or self.different or self.left or self.unnamed or self.grows)

    def __str__(self) -> str:
        early, late = self.early_and_late
        killed = [" and ".join(f"{n} by {name}" for name, n in each.items()) for each in self._kills()]
        return "\n".join(
            [
                f"runs                    {self.planned} planned, {self.workers} workers started, {self.calls} calls",
                f"kills of workers        {killed[0]}",
                f"kills of drivers        {killed[1]}",
                f"resumed from a save     {self.resumed}",
                f"failed until next call  {self.failed_for_a_while}",
                f"renamings of the host   {self.renamed}",
                f"files out of place      {len(self.swapped)} {' '.join(self.swapped)}",
                f"locks of another host   {self.locked}",
                f"lost                    {len(self.lost)} {' '.join(self.lost[:5])}",
                f"tables that differ      {len(self.different)} {' '.join(self.different[:5])}",
                f"left over               {len(self.left)} {' '.join(self.left[:5])}",
                f"not named               {len(self.unnamed)} {' '.join(self.unnamed[:5])}",
                f"driver's memory         {early:.1f} MiB early, {late:.1f} MiB late",
                f"seconds                 {self.seconds:.0f}",
            ]
        )

    def _kills(self) -> tuple[dict[str, int], dict[str, int]]:
        return self.workers_killed, self.drivers_killed


def soak(
    folder: Path, runs: int, seed: int, workers: int = 2, minutes: float = 90.0, quiet: bool = True, forked: bool = True
) -> Soak:
    """Both studies in `folder`, which must be empty; compares them.

    Args:
        forked: drivers and workers are forked from a process that has imported all they need; else each is started as a
            user's are, which takes some seconds of a core.

    Raises:
        TimeoutError: the study was not done after so many minutes; its processes are stopped.
        RuntimeError: a driver ended as none should.
    """
    began, soaked = time.monotonic(), Soak()
    plan = _prepare(folder, runs)
    peace, storm = folder / "peace", folder / "storm"
    names = [spec.name for spec in read_plan(plan).specs()]
    soaked.planned = len(names)
    for ended in run_study(read_plan(plan), peace, RUNTIME, start=Here, workers=1):
        assert ended.error is None, ended
    storm.mkdir()
    for name, text in STRAYS.items():
        (storm / name).write_text(text)
    _Storm(soaked, plan, storm, seed, workers, began + 60 * minutes, quiet, forked).rage()
    found = find_runs(storm)
    told = [*found.ignored, *found.damaged.values()]
    soaked.unnamed += [name for name in STRAYS if not any(f"/{name} is " in line for line in told)]
    for name in STRAYS:
        (storm / name).unlink()
    soaked.lost = [name for name in names if not _is_done(storm / f"{name}.json")]
    for frame in (runs_frame, episodes_frame, curves_frame):
        calm, shaken = (frame(read_runs(out)).drop(TIMES, strict=False) for out in (peace, storm))
        if not calm.equals(shaken):
            soaked.different.append(f"{frame.__name__}: {_differing(calm, shaken)}")
    for pattern in ("*.lock", "*.tmp", "resume.safetensors", "games.json"):
        soaked.left += [str(path.relative_to(folder)) for path in folder.rglob(pattern)]
    soaked.seconds = time.monotonic() - began
    return soaked


def drive(command: Callable[..., None], *words: str) -> None:
    """`command`, on a host of its own whose name SIGURG changes, if this process may have one."""
    names = itertools.count()
    signal.signal(signal.SIGURG, lambda *_: socket.sethostname(f"host-{next(names)}"))  # ignored before and after
    if ctypes.CDLL(None).unshare(NEWUTS):
        signal.signal(signal.SIGURG, signal.SIG_IGN)
    command(*words)


class _Storm:
    """Drivers, one after the other, and what is done to them."""

    def __init__(
        self,
        soaked: Soak,
        plan: Path,
        out: Path,
        seed: int,
        workers: int,
        deadline: float,
        quiet: bool,
        forked: bool,
    ) -> None:
        self.soaked, self.plan, self.out, self.seed = soaked, plan, out.resolve(), seed
        self.workers, self.deadline, self.quiet, self.forked = workers, deadline, quiet, forked
        self.log = self.out.with_name("driver.log")
        self.victims: dict[int, Victim] = {}
        self.attempts: dict[str, int] = {}
        self.spared: set[str] = set()
        self.driver_kills = max(2, soaked.planned // 20)
        self.printed = time.monotonic()

    def rage(self) -> None:
        code = None
        while code != 0:
            self.soaked.calls += 1
            if self.soaked.calls == self.driver_kills + 1:
                with self._misplaced():
                    code = self._call()
            else:
                code = self._call()
        self._wait_for_the_last()

    def _call(self) -> int:
        """One driver, to its end."""
        self.soaked.memory.append([])
        words = ["study", "run", str(self.plan), "--out", str(self.out), "--workers", str(self.workers)]
        words += ["--save-every", "0", "--device", "cpu", "--quiet"]
        driver: Child | subprocess.Popen[bytes]
        if self.forked:
            driver = Child(drive, warm, *words, output=self.log)
        else:
            command = [sys.executable, "-c", DRIVER, str(Path(__file__).parent), *words]
            with self.log.open("ab") as log:
                driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            killed = self._watch(driver)
        finally:  # what it started stops by itself
            driver.kill()
            code = driver.wait()
        if code not in (0, 1) and not killed:
            raise RuntimeError(f"the driver ended with {code}: {self.log.read_text()[-2000:]}")
        if code == 1 and not killed:
            self.soaked.failed_for_a_while += sum(not _is_done(path) for path in self.out.glob("*_*.json"))
        return code

    @contextmanager
    def _misplaced(self) -> Iterator[None]:
        """Files of runs in each other's place, and locks of another host beside them; every file must be named."""
        self._wait_for_the_last()
        fate, said = random.Random(f"{self.seed} misplaced"), len(self.log.read_bytes())
        records = sorted(path for path in self.out.glob("*_*.json"))
        begun = sorted(path.parent for path in self.out.glob("runs/*/resume.safetensors"))
        pairs = [fate.sample(records, 2)] if len(records) > 1 else []
        refused = {path.stem for pair in pairs for path in pair}  # such a run is not gone on with
        begun = [run for run in begun if run.name not in refused]
        if len(begun) > 1:
            name = fate.choice(("resume.safetensors", "metrics.jsonl"))
            pairs.append([run / name for run in fate.sample(begun, 2)])
        for run in begun:
            lock = {"pid": os.getpid(), "host": "another", "machine": "another boot", "nonce": "0", "born": 1}
            lock |= {"started": datetime.now().astimezone().isoformat(timespec="seconds")}
            (run / "run.lock").write_text(json.dumps(lock))
        self.soaked.locked += len(begun)
        files = [path for pair in pairs for path in pair]
        self.spared = {path.parent.name for path in files}
        for pair in pairs:
            _exchange(*pair)
        yield
        for pair in pairs:
            _exchange(*pair)
        self.spared = set()
        told = self.log.read_bytes()[said:].decode()
        names = [str(path.relative_to(self.out)) for path in files]
        self.soaked.swapped += names
        self.soaked.unnamed += [name for name in names if f"/{name} " not in told]

    def _watch(self, driver: "Child | subprocess.Popen[bytes]") -> bool:
        """Follows one driver to its end; whether that end was brought about here."""
        fate, killed = random.Random(f"{self.seed} driver {self.soaked.calls}"), False
        doomed, met = self.soaked.calls <= self.driver_kills, self.soaked.workers
        at_start = self.soaked.calls < self.driver_kills and fate.random() < 0.3  # the last one leaves records
        number = fate.choice((signal.SIGKILL, signal.SIGTERM))
        target = self._recorded() + fate.randint(1, max(1, self.soaked.planned // (2 * self.driver_kills)))
        target = max(target, 2 * (self.soaked.calls == self.driver_kills))
        due = time.monotonic() + fate.uniform(0, 6) if at_start else None
        here, movable, renamed = os.readlink("/proc/self/ns/uts"), False, time.monotonic()
        while driver.poll() is None:
            time.sleep(0.05)
            now = time.monotonic()
            if now > self.deadline:
                raise TimeoutError(f"not done in time: {self._recorded()} of {self.soaked.planned} recorded")
            if now - renamed > 0.5:
                renamed, movable = now, movable or _elsewhere(driver.pid, here)
                self.soaked.renamed += movable
                driver.send_signal(signal.SIGURG)
            self._strike_workers(driver.pid)
            # Its start is over and its end not begun: the table that it prints then takes memory, once.
            if self.soaked.workers > met and self._recorded() < self.soaked.planned:
                self._remember_memory(driver.pid)
            if doomed and not killed:
                if due is None and self._recorded() >= target:
                    due = now + fate.uniform(0, 1)
                if due is not None and now >= due:
                    driver.send_signal(number)  # not waited for yet: the pid is its own
                    killed = True
                    self.soaked.drivers_killed[number.name] += 1
            if not self.quiet and now - self.printed > 30:
                self.printed = now
                kills = [sum(each.values()) for each in self.soaked._kills()]
                words = f"{self._recorded()}/{self.soaked.planned} recorded, {kills[0]} workers and {kills[1]} drivers"
                memory = f"driver {self.soaked.memory[-1][-1]:.1f} MiB" if self.soaked.memory[-1] else "driver starting"
                print(f"soak  {words} killed, {memory}", file=sys.stderr, flush=True)
        return killed

    def _strike_workers(self, driver: int) -> None:
        for pid in _descendants(driver):
            if pid not in self.victims and (run := self._run_of(pid)) is not None:
                self._meet(pid, run)
        for pid, victim in list(self.victims.items()):
            now = time.monotonic()
            if victim.armed is None and _in_phase(victim):
                victim.armed = now
            if victim.armed is not None and victim.number is not None and now >= victim.armed + victim.delay:
                try:
                    signal.pidfd_send_signal(victim.handle, victim.number)
                    self.soaked.workers_killed[victim.number.name] += 1
                    victim.number = None
                except ProcessLookupError:  # it was quicker
                    victim.number = None
            if not Path(f"/proc/{pid}").exists():
                os.close(victim.handle)
                del self.victims[pid]

    def _meet(self, pid: int, run: Path) -> None:
        """Draws what is to become of a worker; the same for the same attempt at the same run."""
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        if self._run_of(pid) != run:  # looked at again, now that the handle is bound to it
            os.close(handle)
            return
        attempt = self.attempts[run.name] = self.attempts.get(run.name, 0) + 1
        fate = random.Random(f"{self.seed} {run.name} {attempt}")
        number = fate.choice((signal.SIGKILL, signal.SIGTERM)) if fate.random() < 0.4 else None
        number = None if run.name in self.spared else number  # it is to say which file is not its own
        phase = fate.choice(("start", "train", "train", "finish"))
        longest = 0.2 if self.forked else 3.0 if phase == "start" else 0.5  # a forked one starts at once
        self.victims[pid] = Victim(handle, run, number, phase, fate.uniform(0, longest))
        self.soaked.workers += 1
        self.soaked.resumed += (run / "resume.safetensors").exists()

    def _run_of(self, pid: int) -> Path | None:
        """The run directory of one of this soak's workers, by its log; None for any other process."""
        log = _log_of(pid)
        return log.parent if log is not None and log.name == "log.txt" and log.is_relative_to(self.out) else None

    def _remember_memory(self, driver: int) -> None:
        try:
            lines = Path(f"/proc/{driver}/status").read_text().splitlines()
        except OSError:
            return
        self.soaked.memory[-1] += [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")]

    def _recorded(self) -> int:
        return sum(1 for _ in self.out.glob("*_*.json"))

    def _wait_for_the_last(self) -> None:
        """Processes of the soak that are still there a while after its end are left over."""
        deadline = time.monotonic() + 30
        while (pids := self._mine()) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.soaked.left += [f"process {pid}" for pid in pids]

    def _mine(self) -> list[int]:
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        logs = [(pid, _log_of(pid)) for pid in pids]
        return [pid for pid, log in logs if log is not None and (log == self.log or log.is_relative_to(self.out))]


def _prepare(folder: Path, runs: int) -> Path:
    """A teacher, barely trained, and the plan."""
    config = replace(
        PPOConfig.for_task(TASKS["cartpole"].env), network=NetworkConfig(width="1/8"), total_timesteps=4_096
    )
    trainer.execute(new_run(config, folder / "teacher", RUNTIME), RUNTIME, EvalConfig(episodes=4))
    parts = {"finetune": runs // 4, "teacher": runs // 4, "student": runs // 4}
    parts["rl"] = runs - sum(parts.values())
    seeds = {name: str(list(range(count))) for name, count in parts.items()}
    (folder / "plan.toml").write_text(PLAN.format(**seeds))
    return folder / "plan.toml"


def _in_phase(victim: Victim) -> bool:
    """Whether a worker has come to where it is to die."""
    if victim.phase == "start":
        return True
    return (victim.run / {"train": "resume.safetensors", "finish": "policy.safetensors"}[victim.phase]).exists()


def _descendants(pid: int) -> list[int]:
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [*children, *(each for child in children for each in _descendants(child))]
    except OSError:  # it is gone
        return []


def _log_of(pid: int) -> Path | None:
    """Where a process's stderr goes; None where it is gone, or another user's."""
    try:
        return Path(os.readlink(f"/proc/{pid}/fd/2"))
    except OSError:
        return None


def _elsewhere(pid: int, here: str) -> bool:
    """Whether a process has a host name of its own."""
    try:
        return os.readlink(f"/proc/{pid}/ns/uts") != here
    except OSError:
        return False


def _exchange(one: Path, other: Path) -> None:
    between = one.with_name(f".{one.name}.exchanged")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def _is_done(record: Path) -> bool:
    return record.exists() and json.loads(record.read_bytes())["status"] == "done"


def _differing(calm: pl.DataFrame, shaken: pl.DataFrame) -> str:
    if calm.shape != shaken.shape:
        return f"{calm.shape} and {shaken.shape}"
    return ", ".join(name for name in calm.columns if not calm[name].equals(shaken[name], null_equal=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="A study under random kills, beside the same one left in peace.")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=90.0, help="give up after so many")
    parser.add_argument(
        "--forked", action="store_true", help="fork processes as the tests do, in place of starting them"
    )
    parser.add_argument("--keep", type=Path, help="work in this folder, which must not exist, and keep it")
    options = parser.parse_args()
    if options.keep is not None:
        options.keep.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soaked = soak(
            options.keep or Path(folder), options.runs, options.seed, options.workers, options.minutes, quiet=False,
            forked=options.forked,
        )  # fmt: skip
    print(soaked)
    sys.exit(0 if soaked.passed else 1)


if __name__ == "__main__":
    main()
