"""A run in a process of its own on this machine."""

import atexit
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from potstill import imports
from potstill.errors import InputError, reason
from potstill.storage.files import open_append
from potstill.storage.runs import Run

if TYPE_CHECKING:  # which bring torch along
    from potstill.envs import EnvConfig
    from potstill.evaluation import EvalConfig
    from potstill.training.runtime import Runtime


COMMAND = [sys.executable, "-m", "potstill.study.worker"]


class Forked:
    """A worker that was forked by a server of this process, with the face of a `subprocess.Popen`."""

    def __init__(self, server: socket.socket, log: int) -> None:
        """Raises EOFError or OSError where the server is gone."""
        self.returncode: int | None = None
        (stdin, writing), (told, telling) = os.pipe(), os.pipe()
        self.stdin, self._told = open(writing, "wb"), open(told, "rb", buffering=0)  # noqa: SIM115
        try:
            try:
                socket.send_fds(server, [b"w"], [stdin, log, telling])
            finally:  # else the end of the server would not be the end of what is read
                os.close(stdin)
                os.close(telling)
            self.pid = self._number()
        except BaseException:
            self.stdin.close()
            self._told.close()
            raise

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("worker", timeout or 0.0)
            self.returncode = -signal.SIGKILL  # where who was to tell it was killed, too
            with self._told, suppress(EOFError):
                self.returncode = self._number()
                self._told.read()  # until that process has ended, too
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _number(self) -> int:
        told = self._told.read(4)
        if len(told) < 4:
            raise EOFError
        return int(struct.unpack("i", told)[0])


Worker = Forked | subprocess.Popen[bytes]


class Server(NamedTuple):
    """A process that has imported what workers need, and forks them."""

    place: tuple[Any, ...]  # its folder and its environment, which its workers have
    process: "subprocess.Popen[bytes]"
    asked: socket.socket

    def close(self) -> None:
        """Ends it; workers go on."""
        self.asked.close()
        self.process.wait()


_servers: list[Server] = []  # one, or none before the first worker


@atexit.register
def _close_servers() -> None:
    while _servers:
        _servers.pop().close()


def _server(environment: dict[str, str]) -> Server:
    place = (os.getcwd(), *sorted(environment.items()))
    if not _servers or _servers[0].place != place or _servers[0].process.poll() is not None:
        _close_servers()
        ours, its = socket.socketpair()
        with its:
            quiet = subprocess.DEVNULL  # a pipe of the study's should not be held open
            process = subprocess.Popen(
                COMMAND, stdin=its.fileno(), stdout=quiet, stderr=quiet, env=environment, start_new_session=True
            )
        _servers.append(Server(place, process, ours))
    return _servers[0]


def _start(log: IO[bytes], environment: Mapping[str, str]) -> Worker:
    """A worker with `environment` besides this process's own, which waits for its line.

    Its session is not that of this process: Ctrl-C reaches this one alone, which then asks its workers to save.
    """
    whole = {**os.environ, **environment}
    if sys.platform != "linux":  # where to fork after torch was imported is not safe, or not possible
        return subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=log, stderr=log, env=whole, start_new_session=True
        )
    why: Exception | None = None
    for _ in range(2):
        try:
            return Forked(_server(whole).asked, log.fileno())
        except (EOFError, OSError) as error:  # the server was killed, or ended because nobody had asked for long
            why = error
        _close_servers()
    told = f", {reason(why)}" if isinstance(why, OSError) else ""
    raise InputError(f"no worker can be started: {' '.join(COMMAND)} failed{told}")


def launch(
    run: Path,
    runtime: dict[str, Any],
    eval_config: dict[str, Any],
    data: Path,
    origins: Mapping[str, Path],
    environment: Mapping[str, str],
) -> Worker:
    """Starts `potstill.study.worker`, whose output goes to log.txt in the run's directory.

    Args:
        environment: of `imports.environment()` in the study's own process, which may be on another machine.

    Raises:
        InputError: that cannot be written, or is a link.
    """
    places = {role: str(path) for role, path in origins.items()}
    job = {"run": str(run), "runtime": runtime, "eval": eval_config, "data": str(data), "origins": places}
    try:
        log = open_append(run / "log.txt")
    except OSError as error:
        raise InputError(f"cannot write {run / 'log.txt'}: {reason(error)}") from error
    with log:
        process = _start(log, {**environment, "OMP_NUM_THREADS": str(runtime["threads"])})
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it died at once: its exit code and log tell
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
    return process


def check(env: "EnvConfig") -> str | None:
    """Why a worker cannot make a task; None where it can."""
    with TemporaryFile() as log:
        worker = _start(log, imports.environment() | {"OMP_NUM_THREADS": "1"})
        assert worker.stdin is not None
        with worker.stdin, suppress(BrokenPipeError):
            worker.stdin.write(json.dumps({"check": asdict(env)}).encode() + b"\n")
        try:
            code = worker.wait()
        except BaseException:  # asked to stop, and a task may never be made
            worker.kill()
            worker.wait()
            raise
        log.seek(0)
        said = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return (said or ["no reason given"])[-1].removeprefix("potstill: ") if code else None


class LocalProcess:
    """A worker on this machine."""

    def __init__(self, run: Run, runtime: "Runtime", eval_config: "EvalConfig", data: Path) -> None:
        self.run = run
        self.began = time.time()
        self.process = launch(run.path, asdict(runtime), asdict(eval_config), data, {}, imports.environment())

    @property
    def returncode(self) -> int | None:
        return self.process.returncode

    def poll(self) -> int | None:
        """The exit code, or None while the run goes on."""
        return self.process.poll()

    def last_sign(self) -> float:
        """Seconds since 1970 of the last sign of life."""
        seen = self.began
        for path in (self.run.lock_path, self.run.metrics_path, self.run.path / "log.txt"):
            with suppress(FileNotFoundError):  # a lock comes and goes
                seen = max(seen, path.stat().st_mtime)
        return seen

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.process.kill()

    def close(self, patience: float) -> None:
        """Waits for the end; a process that has not come to it after `patience` seconds is killed."""
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):  # the process is gone, and what was not written is lost with it
                self.process.stdin.close()
