"""Runs on the machines of a Ray cluster: an actor per run, whose files travel both ways through Ray.

No file system is shared. The actor gets the run's directory and the policies it begins with, does the run in a process
of its own, and hands back what changed whenever it is asked; so a run whose machine is lost goes on elsewhere from the
last save that arrived.
"""

import logging
import signal
import socket
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from potstill.errors import InputError, printable
from potstill.evaluation import EvalConfig
from potstill.imports import environment
from potstill.load import load, origin_in
from potstill.load.callables import is_reference
from potstill.storage.checkpoints import write_atomically
from potstill.storage.runs import Run
from potstill.study.remote import KEPT, RemoteRun
from potstill.training.runtime import Runtime

POLL_SECONDS = 1.0


def connect(address: str | None) -> int:
    """Connects to the cluster at `address`, or to one that this machine's cores make up; the CPUs it has.

    Raises:
        InputError: Ray is not installed, or nothing answers there.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("--executor ray needs Ray: pip install 'potstill[ray]'") from error
    host, _, port = (address or "").rpartition(":")
    if port.isdecimal():  # Ray itself would try for minutes
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"no Ray cluster answers at {address}: {error}") from error
    # A module of ours is found on the other machines where potstill is installed there: nothing of the code travels.
    try:
        if not ray.is_initialized():
            where = address or "local"
            ray.init(where, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}") from error
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(resources.get("CPU", 0))


class RemoteProcess:
    """A run on the cluster, seen from here; as `local.LocalProcess`."""

    def __init__(self, run: Run, runtime: Runtime, eval_config: EvalConfig, data: Path, *, gpus: float = 0.0) -> None:
        import ray

        self.run = run
        self.returncode: int | None = None
        self._seen = time.time()
        self._lock = ExitStack()  # of the directory here: it says that the run goes on, and keeps others out
        self._lock.enter_context(run.lock())
        files = {path.name: path.read_bytes() for path in run.path.iterdir() if path.name in (*KEPT, "config.json")}
        origins = {}
        for role in ("teacher", "initial"):
            if role in run.config:
                loaded = load(origin_in(run.config, role))
                if is_reference(loaded.path):  # code, which is imported there
                    continue
                origins[role] = {loaded.path.name: loaded.path.read_bytes()}
                if loaded.statistics is not None:
                    origins[role]["vecnormalize.pkl"] = loaded.statistics.read_bytes()
                result = loaded.path.with_name("result.json")
                if loaded.path.name == "policy.safetensors" and result.is_file():  # its known score: not played again
                    origins[role]["result.json"] = result.read_bytes()
        # Its own threads are the worker process's; a lost machine is ours to answer, from the last save.
        remote: Any = ray.remote(RemoteRun)
        self._actor = remote.options(num_cpus=runtime.threads, num_gpus=gpus, max_restarts=0).remote()
        self._begun = self._actor.start.remote(files, origins, asdict(runtime), asdict(eval_config), environment())
        self._asked: Any = None
        self._next = 0.0

    def poll(self) -> int | None:
        """The exit code, or None while the run goes on; what the run wrote since is written here."""
        import ray

        if self.returncode is not None:
            return self.returncode
        try:
            if self._asked is None and time.monotonic() >= self._next:
                self._asked = self._actor.poll.remote()
            if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
                _, (code, files, silence) = ray.get([self._begun, self._asked])  # why it did not begin comes first
                self._asked, self._next = None, time.monotonic() + POLL_SECONDS
                self._seen = time.time() - silence
                for name, content in files.items():
                    write_atomically(self.run.path / name, content)
                self.run.touch_lock()
                self.returncode = code
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
            self._note(error)
            self.returncode = -signal.SIGKILL  # its runtime, or its process there, is gone
        except ray.exceptions.RayTaskError as error:  # a full disk there, for instance
            self._note(error.cause)
            self.returncode = 1
        return self.returncode

    def _note(self, error: Exception) -> None:
        """Adds the last line of an error to the run's log: before it, Ray tells where it came from."""
        said = str(error).strip().splitlines() or [type(error).__name__]
        with (self.run.path / "log.txt").open("a") as log:
            log.write(f"on the cluster: {printable(said[-1], 300)}\n")

    def last_sign(self) -> float:
        """Seconds since 1970 of the last sign of life; while it waits for a runtime, now."""
        import ray

        return self._seen if ray.wait([self._begun], timeout=0)[0] else time.time()

    def terminate(self) -> None:
        self._actor.stop.remote(int(signal.SIGTERM))

    def kill(self) -> None:
        self._actor.stop.remote(int(signal.SIGKILL))
        self.returncode = -signal.SIGKILL

    def close(self, patience: float) -> None:
        """Waits for the end, `patience` seconds at most, fetches what is left, and gives the machine back."""
        import ray

        if ray.wait([self._begun], timeout=0)[0]:  # else it still waits for a runtime, and has nothing to save
            deadline = time.monotonic() + patience
            while self.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            with suppress(ray.exceptions.RayError):
                ray.get(self._actor.close.remote(), timeout=10)
        ray.kill(self._actor)
        self._lock.close()
