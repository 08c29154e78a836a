"""A run in a process of its own on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from potstill import imports
from potstill.errors import InputError, reason
from potstill.storage.files import open_append
from potstill.storage.runs import Run

if TYPE_CHECKING:  # which bring torch along
    from potstill.envs import EnvConfig
    from potstill.evaluation import EvalConfig
    from potstill.training.runtime import Runtime


class Process(Protocol):
    """A run that goes on somewhere."""

    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def last_sign(self) -> float: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def close(self, patience: float) -> None: ...


def launch(
    run: Path,
    runtime: dict[str, Any],
    eval_config: dict[str, Any],
    data: Path,
    origins: Mapping[str, Path],
    environment: Mapping[str, str],
) -> "subprocess.Popen[bytes]":
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
        # Its own session: Ctrl-C reaches this process alone, which then asks its workers to save.
        process = subprocess.Popen(
            [sys.executable, "-m", "potstill.study.worker"],
            stdout=log,
            stderr=log,
            stdin=subprocess.PIPE,
            env={**os.environ, **environment, "OMP_NUM_THREADS": str(runtime["threads"])},
            start_new_session=True,
        )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it died at once: its exit code and log tell
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
    return process


def check(env: "EnvConfig") -> str | None:
    """Why a worker cannot make a task; None where it can."""
    worker = subprocess.run(
        [sys.executable, "-m", "potstill.study.worker"],
        input=json.dumps({"check": asdict(env)}) + "\n",
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **imports.environment()},
    )
    said = [line for line in worker.stderr.splitlines() if line.strip()] or ["no reason given"]
    return said[-1].removeprefix("potstill: ") if worker.returncode else None


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
