"""Runs, each in a process of its own, for as long as the study that started it lives: `python -m potstill.study.worker`

A worker reads one JSON line on stdin: {"run": directory, "runtime": settings, "eval": games, "data": folder, "origins":
{role: policy}}. The study keeps the other end of stdin open; when it closes, however the study ended, the run saves and
stops. Or {"check": task}: whether a worker can make that.

Importing torch takes longer than a small run. So one process imports it, and each worker is forked from there.
"""

import json
import os
import signal
import socket
import stat
import struct
import sys
import threading
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path

import numpy as np

from potstill.envs import EnvConfig, check_task
from potstill.errors import failure, terminate
from potstill.evaluation import EvalConfig
from potstill.imports import VARIABLE, import_modules
from potstill.policies import rebuild
from potstill.storage.runs import Run
from potstill.training.runtime import Runtime
from potstill.training.trainer import Interrupted, execute

IDLE = 300.0  # seconds after which a process that nobody asks for a worker ends: the next study starts another
NUMBER = struct.Struct("i")


def serve() -> None:
    """Forks workers for a study, and returns in each of them. No code of the user's is imported here.

    The study sends three descriptors for each through a socket, which is stdin: a worker's stdin, its log, and what it
    is told by, two numbers: the worker's process id, and when it has ended its exit code.
    """
    import torch._dynamo  # noqa: F401, as the first linear layer of each worker would, for a second

    study = socket.socket(fileno=os.dup(0))
    study.settimeout(IDLE)
    asked, descriptors = b"", list[int]()
    while True:
        with suppress(TimeoutError):
            asked, descriptors, *_ = socket.recv_fds(study, 1, 3)
        with suppress(ChildProcessError):  # so that their processor time counts as the study's
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not asked:
            os._exit(0)
        if os.fork() == 0:
            break
        asked = b""
        for descriptor in descriptors:
            os.close(descriptor)
    stdin, log, told = descriptors
    study.close()
    if worker := os.fork():  # this process waits for it and tells of it
        for descriptor in (0, stdin, log):
            os.close(descriptor)
        with suppress(BrokenPipeError):  # the study is gone
            os.write(told, NUMBER.pack(worker))
            os.write(told, NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])))
        os._exit(0)
    for number, descriptor in enumerate((stdin, log, log)):
        os.dup2(descriptor, number)
    for descriptor in descriptors:
        os.close(descriptor)
    np.random.seed()  # noqa: NPY002, else all workers would have the chances of the process they were forked from


def main() -> None:
    """Does what it reads; exits 0, or 1 with a line that says why, or 130 / 143 where it was asked to stop."""
    line = sys.stdin.readline()
    if not line.endswith("\n"):
        sys.exit("potstill: the study ended before it said what to do")
    job = json.loads(line)
    signal.signal(signal.SIGTERM, terminate)  # where no loop waits for it
    if "check" not in job:
        threading.Thread(target=_stop_with_the_study, daemon=True).start()
    try:
        with redirect_stdout(sys.stderr):  # a log tells in order what was said
            import_modules(filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)), VARIABLE)
            if "check" in job:
                check_task(rebuild(EnvConfig, job["check"]))
                return
        origins = {role: Path(path) for role, path in job["origins"].items()}
        runtime, eval_config = rebuild(Runtime, job["runtime"]), rebuild(EvalConfig, job["eval"])
        execute(Run.open(Path(job["run"])), runtime, eval_config, Path(job["data"]), origins)
    except Interrupted as stop:
        print(f"potstill: {stop}", file=sys.stderr)
        sys.exit(stop.code)
    except KeyboardInterrupt:  # before there was anything to save
        sys.exit(128 + signal.SIGTERM)
    except BaseException as error:
        if (told := failure(error)) is None:
            raise
        sys.exit(f"potstill: {told.line}")


def _stop_with_the_study() -> None:
    sys.stdin.read()
    while True:  # an exception raised while Python cleans up is dropped: once may not be enough
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)


if __name__ == "__main__":
    if stat.S_ISSOCK(os.fstat(0).st_mode):
        serve()
    main()
