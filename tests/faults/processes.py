"""Real processes to kill: forked from a server that has imported potstill once, so that each costs a moment."""

import multiprocessing
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from small_runs import RUNTIME

from potstill.cli import main
from potstill.storage import runs
from potstill.storage.runs import Run
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


class Child:
    """A process that calls `target(*words)`, with what it prints in a file."""

    def __init__(self, target, *words, output: Path) -> None:
        self.output = output
        self.process: BaseProcess = _SERVER.Process(target=_call, args=(target, words, output), daemon=True)
        self.process.start()
        self.pid = self.process.pid

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 60) -> int:
        """Its exit code; minus the signal's number where one killed it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {seconds} s; it said: {self.said}")
        return self.process.exitcode

    @property
    def said(self) -> str:
        return self.output.read_text()


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


def _call(target, words: tuple[object, ...], output: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background may ignore it
    target(*words)
