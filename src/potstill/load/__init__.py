"""The one door for policies: run and expert directories, checkpoints, Stable-Baselines3 zips, ONNX files and code."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from potstill.envs import EnvConfig
from potstill.errors import InputError
from potstill.imports import HANDED
from potstill.load.callables import is_reference, load_foreign, reference
from potstill.load.sb3 import as_sb3, load_sb3
from potstill.policies import LoadedPolicy, load_policy
from potstill.storage.runs import Run
from potstill.tasks import EnvLike, find_env

Place = str | Path | Run | LoadedPolicy | Callable[..., Any]
"""Where a policy is: a path, a run, the policy itself, or code that plays, by `module:name` or handed over."""


def load(where: Place, env: EnvLike | None = None, device: str = "cpu") -> LoadedPolicy:
    """The policy at `where`, on `device`, checked against the probe that was saved with it.

    Args:
        where: a run directory, an expert directory, a checkpoint (*.safetensors), a Stable-Baselines3 zip, which is
            read without running what it holds, an ONNX file, or code as `load.callables` describes it.
        env: the task of what does not name it, as the last three do not: a preset, ale/<rom> or a Gymnasium id. Of a
            policy of ours that was made with a task from Python, that task again.
        device: cpu, cuda or mps.

    Raises:
        InputError: there is none, it is damaged, or it comes without its task.
        ProbeMismatch: it computes other logits on this device than where it was saved.
    """
    return load_all([where], env, device)[0]


def load_all(places: Sequence[Place], env: EnvLike | None = None, device: str = "cpu") -> list[LoadedPolicy]:
    """Several policies that play side by side, as `load`; `env` is the task of those that do not name it."""
    task = own_task(env, *(path_of(place) for place in places))
    found = []
    for place in places:
        path = path_of(place)
        if isinstance(place, LoadedPolicy):
            place.policy.to(device)
            found.append(place)
        elif task is not None and path.suffix == ".zip":
            found.append(load_sb3(path, task, device))
        elif task is not None and nameless(path):
            found.append(load_foreign(path, task, device))
        else:
            found.append(load_policy(path, device))
            if task is not None:
                found[-1].env = _handed_again(found[-1].env, task)
    return found


def _handed_again(known: EnvConfig, given: EnvConfig) -> EnvConfig:
    """The task of a policy of ours, where the user hands it over, as he must where no name leads to it."""
    if given.id != known.id and not known.id.startswith(HANDED):
        raise InputError(f"the policy is of {known.id}, not {given.id}: env is for what does not name its task")
    return replace(known, id=given.id)


def path_of(place: Place) -> Path:
    """The file or directory of a policy, or the name of code."""
    if isinstance(place, str | Path):
        return Path(place)
    return place.path if isinstance(place, Run | LoadedPolicy) else reference(place)


def nameless(path: Path) -> bool:
    """Whether what lies there does not name its task."""
    return path.suffix in (".zip", ".onnx") or is_reference(path)


def own_task(env: EnvLike | None, *paths: Path) -> EnvConfig | None:
    """The task of those among these that do not name it, or one from Python; None where there are none.

    Raises:
        InputError: one of them without a task, or a task without one of them.
    """
    those = [path for path in paths if nameless(path)]
    if those and env is None:
        raise InputError(f"{those[0]} does not name its task: add --env, such as --env pong")
    if isinstance(env, str) and not those:
        raise InputError(
            "--env names the task of a Stable-Baselines3 zip, an ONNX file or code; policies of potstill's carry theirs"
        )
    task = find_env(env) if env is not None else None
    named_zip = isinstance(env, str) and any(path.suffix == ".zip" for path in those)
    return as_sb3(task) if named_zip and task is not None else task
