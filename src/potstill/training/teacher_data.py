"""A teacher's stored play, made once and shared by the students that learn from it."""

import re
import sys
import time
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from potstill import telemetry
from potstill.buffer import Dataset, new_dataset, open_dataset
from potstill.distill import DistillConfig, record
from potstill.envs import Envs
from potstill.errors import InputError, reason
from potstill.imports import source_of
from potstill.policies import LoadedPolicy
from potstill.storage.runs import InUseError, Run, config_hash, hold, sweep, touch
from potstill.views import sensed


def teacher_data(
    run: Run, config: DistillConfig, teacher: LoadedPolicy, envs: Envs, root: Path, quiet: bool
) -> Dataset:
    """The stored play of a teacher, made the first time a student asks for it."""
    states = config.vector_steps * config.num_envs
    seed = 0  # one data set per teacher: students differ by their own seed
    played = {key: value for key, value in asdict(teacher.env).items() if key != "view"}  # whole observations
    description = {"teacher_hash": teacher.hash, "env": played, "states": states, "seed": seed}
    description |= {"view": seen} if (seen := sensed(config.task_of(teacher.env).view)) else {}
    code = [sha256(source_of(each)).hexdigest()[:12] for each in seen if ":" in each]
    description |= {"code": code} if code else {}
    description |= {name: getattr(config, name) for name in ("num_envs", "noise", "precision")}
    folder = root / f"{re.sub('[/:]', '-', teacher.env.id)}-{config_hash(description)}"
    lock = root / f".{folder.name}.lock"
    said = quiet
    while not folder.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make {root}: {reason(error)}") from error
        try:
            with hold(lock):
                if folder.exists():
                    break
                sweep(root, folder.name)
                title = f"record {teacher.env.id}, width {teacher.policy.config.width}"
                with (
                    new_dataset(folder, envs, states, description | {"teacher": str(teacher.path)}) as data,
                    telemetry.Progress(title, states, quiet=quiet) as bar,
                ):
                    for progress in record(config, teacher.policy, envs, data, seed):
                        bar.update(progress.step)
                        run.touch_lock()
                        touch(lock)
        except InUseError:  # another student's run records it: wait, and take over if that one dies
            if not said:
                print(f"potstill: another run records {folder}: waiting for it", file=sys.stderr)
                said = True
            run.touch_lock()
            time.sleep(0.2)
    return open_dataset(folder, envs, description)
