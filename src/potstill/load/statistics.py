"""VecNormalize's statistics: where they lie, and what they do to an observation. Read as data, never as code."""

import re
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from potstill.envs import Array
from potstill.errors import InputError
from potstill.load.pickles import MAX_BYTES, Inert, array, read_pickle
from potstill.storage.files import read_bytes

NAMES = ("vecnormalize.pkl", "vec_normalize.pkl")


class Statistics(NamedTuple):
    """clip((observation - mean) / deviation, -clip, clip), as SB3's `VecNormalize.normalize_obs` has it."""

    moments: dict[str, tuple[Array, Array]]  # mean and deviation, float64, by the key of a Dict; "" is of no Dict
    clip: float
    path: Path
    sha256: str

    def of(self, parts: "gymnasium.Space[Any] | None") -> tuple[Array, Array]:
        """Mean and deviation of an observation, where one of a Dict is flattened from `parts`.

        Raises:
            InputError: they are of other parts; or one that is not normalised may lie beyond the clip, which is of all.
        """
        if not isinstance(parts, gymnasium.spaces.Dict):
            if "" not in self.moments:
                raise InputError(f"{self.path} normalises {', '.join(self.moments)} of a Dict, which this task has not")
            return self.moments[""]
        if unknown := self.moments.keys() - parts.spaces.keys():
            raise InputError(f"{self.path} normalises {min(unknown)!r}, which the task's Dict has not")
        means, deviations = [], []
        for key, part in parts.spaces.items():
            size = gymnasium.spaces.flatdim(part)
            flat: Any = gymnasium.spaces.flatten_space(part)
            if key not in self.moments and not (np.abs([flat.low, flat.high]) <= self.clip).all():
                raise InputError(f"{self.path} clips at {self.clip}, which {key!r}, not normalised, may pass")
            mean, deviation = self.moments.get(key, (np.zeros(size), np.ones(size)))
            if mean.size != size:
                raise InputError(f"{self.path} normalises {mean.size} numbers of {key!r}, the task has {size}")
            means.append(mean.ravel())
            deviations.append(deviation.ravel())
        return np.concatenate(means), np.concatenate(deviations)


def find_statistics(path: Path) -> Path | None:
    """The statistics that lie beside a zip: by SB3's and the RL Zoo's names, or by those of a checkpoint's steps.

    Raises:
        InputError: files are there of which any may be meant.
    """
    folders = [path.parent, path.parent / path.stem, path.parent / re.sub(r"_\d+$", "", path.parent.name)]
    steps = re.fullmatch(r"(.+)_(\d+_steps)", path.stem)
    names = [f"{steps[1]}_vecnormalize_{steps[2]}.pkl"] if steps else []
    with suppress(OSError):  # what cannot be listed cannot be read either
        files = {file for folder in dict.fromkeys(folders) for file in folder.glob("*.pkl")}
        for wanted in (names, NAMES):
            found = [file for file in sorted(files) if file.name in wanted]
            if len({file.read_bytes() for file in found if file.stat().st_size <= MAX_BYTES}) == 1:
                return found[0]
            if found:
                break
        if others := sorted(file for file in files if "vecnormalize" in file.name.lower().replace("_", "")):
            raise InputError(
                f"{others[0]} may hold the statistics that {path.name} was trained with: settle it with"
                " --statistics FILE or --statistics none"
            )
    return None


def read_statistics(path: Path) -> Statistics | None:
    """VecNormalize's statistics from the pickle it saved; None where it normalised rewards only.

    Raises:
        InputError: no such pickle, a damaged one, or numbers that cannot be.
    """
    content = read_bytes(path, MAX_BYTES, follow=True)
    try:
        saved = read_pickle(content)
        state = saved.state if isinstance(saved, Inert) else None
        if not isinstance(state, dict) or not {"norm_obs", "clip_obs", "epsilon"} <= state.keys():
            raise InputError("it is no VecNormalize of Stable-Baselines3")
        if state["norm_obs"] is False:
            return None
        rms = state.get("obs_rms")
        clip, epsilon = (_number(state[name]) for name in ("clip_obs", "epsilon"))
        if not (clip > 0 and 0 <= epsilon < np.inf):
            raise InputError(f"its clip_obs is {clip}, its epsilon {epsilon}")
        moments = {
            str(key): _moments(each, epsilon) for key, each in (rms if isinstance(rms, dict) else {"": rms}).items()
        }
        if not moments:
            raise InputError("it holds no mean and variance of observations")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return Statistics(moments, clip, path, sha256(content).hexdigest())


def _number(value: Any) -> float:
    read = array(value)
    if read.size != 1:
        raise InputError(f"it holds an array of {read.size} numbers where one belongs")
    return float(read.item())


def _moments(rms: Any, epsilon: float) -> tuple[Array, Array]:
    state = rms.state if isinstance(rms, Inert) else None
    if not isinstance(state, dict) or not {"mean", "var"} <= state.keys():
        raise InputError("it holds no mean and variance of observations")
    mean, variance = array(state["mean"]), array(state["var"])
    if mean.shape != variance.shape or not (np.isfinite(mean).all() and np.isfinite(variance).all()):
        raise InputError("its mean and variance are not finite numbers of one shape")
    if not (variance + epsilon > 0).all():
        raise InputError(f"its least variance is {variance.min()}")
    return mean, np.sqrt(variance + epsilon)
