"""One run in a process of its own, for as long as the study that started it lives: `python -m potstill.study.worker`.

Reads one JSON line on stdin: {"run": directory, "runtime": settings, "eval": games, "data": folder, "origins": {role:
policy}}. The study keeps the other end of stdin open; when it closes, however the study ended, the run saves and stops.
Or {"check": task}: whether a worker can make that.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from potstill.envs import EnvConfig, check_task
from potstill.errors import Terminated, failure
from potstill.evaluation import EvalConfig
from potstill.imports import VARIABLE, import_modules
from potstill.policies import rebuild
from potstill.storage.runs import Run
from potstill.training.runtime import Runtime
from potstill.training.trainer import Interrupted, execute


def main() -> None:
    """Does what it reads; exits 0, or 1 with a line that says why, or 130 / 143 where it was asked to stop."""
    line = sys.stdin.readline()
    if not line.endswith("\n"):
        sys.exit("potstill: the study ended before it said what to do")
    job = json.loads(line)
    signal.signal(signal.SIGTERM, _terminate)  # where no loop waits for it
    if "check" not in job:
        threading.Thread(target=_stop_with_the_study, daemon=True).start()
    try:
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


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def _stop_with_the_study() -> None:
    sys.stdin.read()
    while True:  # an exception raised while Python cleans up is dropped: once may not be enough
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)


if __name__ == "__main__":
    main()
