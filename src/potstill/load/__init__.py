"""The one door for policies: run and expert directories, checkpoints, Stable-Baselines3 zips, ONNX files and code."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

from potstill.envs import EnvConfig
from potstill.errors import InputError
from potstill.imports import HANDED
from potstill.load.callables import is_reference, load_foreign, reference
from potstill.load.sb3 import as_sb3, load_sb3
from potstill.load.state_dicts import SUFFIXES, load_weights
from potstill.networks import Policy
from potstill.policies import LoadedPolicy, load_policy, rebuild
from potstill.storage.runs import Run
from potstill.tasks import EnvLike, find_env


class Origin(NamedTuple):
    """Where a policy is, and what its file does not tell."""

    path: Path  # or `module:name`
    env: EnvConfig | None = None  # the task of what does not name it
    statistics: Path | None = None  # of VecNormalize, where they do not lie beside a zip

    @property
    def name(self) -> str:
        """Its last name, as part of the names of files."""
        return self.path.name.replace(":", ".")

    def document(self, role: str) -> dict[str, Any]:
        """What a run's config.json says of it; `origin_in` reads it."""
        env = {f"{role}_env": asdict(self.env)} if self.env is not None else {}
        statistics = {f"{role}_statistics": str(self.statistics)} if self.statistics is not None else {}
        return {role: str(self.path)} | env | statistics


Place = str | Path | Run | LoadedPolicy | Origin | Callable[..., Any]
"""Where a policy is: a path, a run, the policy itself, or code that plays, by `module:name` or handed over."""


def load(
    where: Place, env: EnvLike | None = None, device: str = "cpu", statistics: str | Path | None = None
) -> LoadedPolicy:
    """The policy at `where`, on `device`, checked against the probe that was saved with it.

    Args:
        where: a run directory, an expert directory, a checkpoint (*.safetensors), a Stable-Baselines3 zip, which is
            read without running what it holds, a state dict of CleanRL's, an ONNX file, or code as `load.callables`
            describes it.
        env: the task of what does not name it, as the last four do not: a preset, `ale/<rom>` or a Gymnasium id. Of a
            policy of ours that was made with a task from Python, that task again.
        device: cpu, cuda or mps.
        statistics: VecNormalize's file of a zip, or "none". Default: the one beside the zip.

    Raises:
        InputError: there is none, it is damaged, or it comes without its task.
        ProbeMismatch: it computes other logits on this device than where it was saved.
    """
    return load_all([where], env, device, statistics)[0]


def load_all(
    places: Sequence[Place],
    env: EnvLike | None = None,
    device: str = "cpu",
    statistics: str | Path | None = None,
) -> list[LoadedPolicy]:
    """Several policies that play side by side, as `load`; `env` is the task of those that do not name it."""
    found = []
    for place, origin in zip(places, origins_of(places, env, statistics), strict=True):
        if isinstance(place, LoadedPolicy):
            place.policy.to(device)
            found.append(place)
        else:
            found.append(_open(origin, device))
    return found


def origins_of(
    places: Sequence[Place], env: EnvLike | None = None, statistics: str | Path | None = None
) -> list[Origin]:
    """Where these are, with the task and the statistics of those that lack them.

    Raises:
        InputError: one comes without its task, or a task or statistics without what lacks them.
    """
    origins = [_origin(place) for place in places]
    lacking = [origin for origin in origins if nameless(origin.path)]
    files = [origin for origin in lacking if origin.path.suffix in (".zip", *SUFFIXES)]
    if env is None and (first := next((origin for origin in lacking if origin.env is None), None)):
        raise InputError(f"{first.path} does not name its task: add --env, such as --env pong")
    if isinstance(env, str) and not lacking:
        for origin in origins:
            _check_meant(origin.path)
        raise InputError(
            "--env names the task of a Stable-Baselines3 zip, an ONNX file or code; policies of potstill's carry theirs"
        )
    if statistics is not None and len(files) != 1:
        raise InputError(f"--statistics are those of one zip or state dict, but {len(files) or 'none'} is named")
    task = find_env(env) if env is not None else None
    if task is not None and isinstance(env, str) and files:
        task = as_sb3(task)
    file = Path(statistics) if statistics is not None else None
    return [
        Origin(origin.path, origin.env or task, (file if origin in files else None) or origin.statistics)
        for origin in origins
    ]


def origin_of(place: Place, env: EnvLike | None = None, statistics: str | Path | None = None) -> Origin:
    """As `origins_of`, of one."""
    return origins_of([place], env, statistics)[0]


def origin_in(document: Mapping[str, Any], role: str) -> Origin:
    """What `Origin.document` wrote; where `{role}_here` says that it lies elsewhere on this machine, there.

    Raises:
        InputError: it does not say.
    """
    here = document.get(f"{role}_here")
    path, statistics = here or document.get(role), document.get(f"{role}_statistics")
    if not isinstance(path, str) or not isinstance(statistics, str | None):
        raise InputError(f"the run's config.json does not say where its {role} lies")
    env = rebuild(EnvConfig, document[f"{role}_env"]) if f"{role}_env" in document else None
    found = here is not None and statistics != "none"  # whoever brought it here laid them beside it
    return Origin(Path(path), env, Path(statistics) if statistics and not found else None)


def check_own(place: Place) -> None:
    """Raises InputError where no training learns from this beside its reward, or begins with it."""
    if nameless(path := _origin(place).path):
        raise InputError(f"{path} is no policy of potstill's, as trainings begin with: import-sb3 or distill makes one")


def _check_meant(path: Path) -> None:
    """Raises InputError where a zip was meant, as PPO.load("model") opens model.zip, or where there is nothing."""
    beside = Path(f"{path}.zip")
    if not path.is_dir() and beside.is_file():
        raise InputError(f"{path} is no policy; did you mean {beside}?")
    if not path.exists():
        raise InputError(f"cannot read {path}: no such file or directory")
    if path.is_dir() and not (path / "policy.safetensors").exists():
        load_policy(path)  # tells what it holds instead
    if path.is_file() and is_zipfile(path):
        raise InputError(f"{path} is a zip: give its name the ending .zip, or .pt where torch.save wrote it")


def nameless(path: Path) -> bool:
    """Whether what lies there does not name its task."""
    return path.suffix in (".zip", ".onnx", *SUFFIXES) or is_reference(path)


def _origin(place: Place) -> Origin:
    match place:
        case Origin():
            return place
        case str() | Path():
            return Origin(Path(place))
        case LoadedPolicy():
            lacking = nameless(place.path)  # and what was opened without statistics is so again
            without = Path("none") if place.path.suffix in (".zip", *SUFFIXES) else None
            return Origin(place.path, place.env if lacking else None, place.statistics or without)
        case Run():
            return Origin(place.path)
        case Policy():
            raise InputError("a policy alone does not know its task: hand over its run, or what `load` gives of it")
        case _:
            return Origin(reference(place))


def _open(origin: Origin, device: str) -> LoadedPolicy:
    path, task, statistics = origin
    if task is None or not nameless(path):
        loaded = load_policy(path, device)
        if task is not None:
            loaded.env = _handed_again(loaded.env, task)
        return loaded
    if path.suffix == ".zip":
        return load_sb3(path, task, device, statistics=statistics)
    if path.suffix in SUFFIXES and not is_reference(path):
        return load_weights(path, task, device, statistics=statistics)
    return load_foreign(path, task, device)


def _handed_again(known: EnvConfig, given: EnvConfig) -> EnvConfig:
    """The task of a policy of ours, where the user hands it over, as he must where no name leads to it."""
    if given.id != known.id and not known.id.startswith(HANDED):
        raise InputError(f"the policy is of {known.id}, not {given.id}: env is for what does not name its task")
    return replace(known, id=given.id)
