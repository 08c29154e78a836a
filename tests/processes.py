"""Real processes: forked from a server that has imported potstill once, so that each costs a moment."""

import multiprocessing
import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import DEVNULL
from types import SimpleNamespace

from small_runs import RUNTIME

from potstill.cli import main
from potstill.evaluation import EvalConfig
from potstill.storage import runs
from potstill.storage.runs import Run
from potstill.study import local, worker
from potstill.training.runtime import Runtime
from potstill.training.trainer import Interrupted, execute

SUDO = [] if os.geteuid() == 0 else ["sudo", "-n"]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["pytest", "potstill.commands", "potstill.commands.studying", "torch._dynamo"])

OPTIONS = ["--device", "cpu", "--threads", "1", "--quiet", "--evaluate", "0", "--save-every", "0"]  # RUNTIME in words


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(disk: Path) -> None:
    """Leaves no byte free on a file system."""
    with open(disk / "full", "ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    assert os.statvfs(disk).f_bfree == 0


class Forked:
    """A process that calls `target(*words)`, with the face of a `subprocess.Popen`."""

    stdin = None

    def __init__(self, target, *words) -> None:
        # What the server forked forks for itself: it has imported as much.
        context = _SERVER if multiprocessing.parent_process() is None else multiprocessing.get_context("fork")
        self.process = context.Process(target=target, args=words, daemon=True)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code; minus the signal's number where one killed it; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.process), timeout or 0.0)
        return self.returncode


class Child(Forked):
    """A process whose output is in a file, and its errors in another where one is named."""

    def __init__(self, target, *words, output: Path, errors: Path | None = None) -> None:
        self.output = output
        super().__init__(_call, target, words, output, errors or output)

    def wait(self, timeout: float | None = 60) -> int:
        try:
            return super().wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.join()
            raise AssertionError(f"still running after {timeout} s; it said: {self.said}") from None

    @property
    def said(self) -> str:
        return self.output.read_text()


class Here:
    """A run in this very process: the study's `start` where nothing is to be killed."""

    returncode = 0

    def __init__(self, run: Run, runtime: Runtime, eval_config: EvalConfig, data: Path) -> None:
        execute(run, runtime, eval_config, data)

    def poll(self) -> int:
        return 0

    def last_sign(self) -> float:
        return time.time()

    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def close(self, patience: float) -> None: ...


class Server(Forked):
    """What forks a study's workers, itself forked where `subprocess.Popen` would start Python and import torch anew."""

    def __init__(self, command, *, stdin, stdout, stderr, env, start_new_session) -> None:
        assert (command, stdout, stderr, start_new_session) == (COMMAND, DEVNULL, DEVNULL, True)
        with Connection(os.dup(stdin)) as asked:
            super().__init__(_serve, asked, os.getcwd(), env)


COMMAND = [sys.executable, "-m", "potstill.study.worker"]
WARM = SimpleNamespace(**vars(subprocess) | {"Popen": Server})
"""For `local.subprocess`: what forks a study's workers is forked."""


def warm(*words: object) -> None:
    """`potstill` with such workers, to be called in a child."""
    local.subprocess = WARM
    potstill(*words)


def _serve(asked: Connection, folder: str, env: dict[str, str]) -> None:
    os.dup2(asked.fileno(), 0)
    os.closerange(3, 256)  # as Popen does: while another held the study's end, a worker would outlive it
    os.setsid()
    os.environ.update(env)
    os.chdir(folder)
    sys.path[:0] = [folder, *env.get("PYTHONPATH", "").split(os.pathsep)]  # as `python -m` has it
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    worker.serve()
    _redirect(1, 2)  # the log
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    worker.main()


def call(target, *words, output: Path) -> tuple[int, str]:
    """Exit code and output of a `Child` that has ended."""
    child = Child(target, *words, output=output)
    return child.wait(), child.said


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for is dead."""
    return runs._born(pid) not in (None, 0)


def gone(pid: int) -> None:
    """Waits for the end of a process that is nobody's child here, and sees to it."""
    try:
        until(lambda: not alive(pid))
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        raise


def potstill(*words: object) -> None:
    """The command line, to be called in a child."""
    main([str(word) for word in words])


def python(code: str, environ: dict[str, str], *words: object) -> None:
    """As `python -c` in an environment of its own, to be called in a child."""
    os.environ.update(environ)
    sys.argv[1:] = map(str, words)
    exec(code, {"__name__": "__main__"})


def surrounded(before: Callable[[], object], *words: object) -> None:
    """`potstill` after `before`, which changes what is around it."""
    before()
    potstill(*words)


def go_on(path: Path, *blow) -> None:
    """Does or goes on with a run, to be called in a child, `strike` at hand; exits as the command would."""
    if blow:
        strike(*blow)
    try:
        execute(Run.open(path), RUNTIME)
    except Interrupted as stop:
        sys.exit(stop.code)


def strike(where: str, count: int, number: int, after: bool = False) -> None:
    """Makes this process's call number `count` of `where`, such as os.fsync, send it a signal: before or after."""
    at(where, count, lambda: os.kill(os.getpid(), number), after)


def at(where: str, count: int, do, after: bool = False, patch=setattr) -> None:
    """Makes call number `count` of `where` `do` something first, or `after` its work; `patch` may be pytest's."""
    place, _, name = where.rpartition(".")
    owner, calls = pkgutil.resolve_name(place), 0
    real = getattr(owner, name)

    def struck(*words: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        now = calls == count
        if now and not after:
            do()
        result = real(*words, **options)
        if now and after:
            do()
        return result

    patch(owner, name, struck)


def _call(target, words: tuple[object, ...], output: Path, errors: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background may ignore it
    multiprocessing.current_process().daemon = False  # or it could have no children
    with open(output, "ab") as file, open(errors, "ab") as other:
        _redirect(file.fileno(), other.fileno())
    target(*words)


def _redirect(output: int, errors: int) -> None:
    """Lets this process print to files."""
    os.dup2(output, 1)
    os.dup2(errors, 2)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
