"""The one door for policies: run and expert directories, checkpoints, and Stable-Baselines3 zips."""

from collections.abc import Sequence
from pathlib import Path

from potstill.envs import EnvConfig
from potstill.errors import InputError
from potstill.load.sb3 import as_sb3, load_sb3
from potstill.policies import LoadedPolicy, load_policy
from potstill.storage.runs import Run
from potstill.tasks import find_env

Place = str | Path | Run | LoadedPolicy
"""Where a policy is: a path, a run, or the policy itself."""


def load(where: Place, env: str | EnvConfig | None = None, device: str = "cpu") -> LoadedPolicy:
    """The policy at `where`, on `device`, checked against the probe that was saved with it.

    Args:
        where: a run directory, an expert directory, a checkpoint (*.safetensors), or a Stable-Baselines3 zip, which is
            read without running what it holds.
        env: the task of a zip, which does not name it: a preset, ale/<rom> or a Gymnasium id.
        device: cpu, cuda or mps.

    Raises:
        InputError: there is none, it is damaged, or a zip comes without its task.
        ProbeMismatch: it computes other logits on this device than where it was saved.
    """
    return load_all([where], env, device)[0]


def load_all(places: Sequence[Place], env: str | EnvConfig | None = None, device: str = "cpu") -> list[LoadedPolicy]:
    """Several policies that play side by side, as `load`; `env` is the task of the zips among them."""
    task = zip_env(env, *(path_of(place) for place in places))
    found = []
    for place in places:
        path = path_of(place)
        if isinstance(place, LoadedPolicy):
            place.policy.to(device)
            found.append(place)
        elif task is not None and path.suffix == ".zip":
            found.append(load_sb3(path, task, device))
        else:
            found.append(load_policy(path, device))
    return found


def path_of(place: Place) -> Path:
    """The file or directory of a policy."""
    return place.path if isinstance(place, Run | LoadedPolicy) else Path(place)


def zip_env(env: str | EnvConfig | None, *paths: Path) -> EnvConfig | None:
    """The task of the zips among these; None where there is none.

    Raises:
        InputError: a zip without a task, or a task without a zip.
    """
    zips = [path for path in paths if path.suffix == ".zip"]
    if zips and env is None:
        raise InputError(f"{zips[0]} does not name its task: add --env, such as --env pong")
    if env is not None and not zips:
        raise InputError("--env names the task of a Stable-Baselines3 zip; policies of potstill's carry theirs")
    return as_sb3(find_env(env)) if isinstance(env, str) else env
