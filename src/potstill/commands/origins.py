"""A policy that a command was given: one of potstill's, or a Stable-Baselines3 zip and its task."""

from pathlib import Path

from potstill.envs import EnvConfig
from potstill.errors import InputError
from potstill.load import sb3
from potstill.policies import LoadedPolicy, load_policy
from potstill.tasks import find_env


def zip_env(name: str | None, *policies: Path | None) -> EnvConfig | None:
    """The task that `--env` names for the Stable-Baselines3 zips among `policies`; None where there is none."""
    zips = [path for path in policies if path is not None and path.suffix == ".zip"]
    if zips and name is None:
        raise InputError(f"{zips[0]} does not name its task: add --env, such as --env pong")
    if name is not None and not zips:
        raise InputError("--env names the task of a Stable-Baselines3 zip; policies of potstill's carry theirs")
    return sb3.as_sb3(find_env(name)) if name is not None else None


def load(path: Path, task: EnvConfig | None, device: str) -> LoadedPolicy:
    """The policy at `path`; `task` is that of the zips, as `zip_env` found it."""
    return sb3.load_sb3(path, task, device) if task and path.suffix == ".zip" else load_policy(path, device)
