"""A zip held against Stable-Baselines3 itself, where that is installed: the same actions for the same observations."""

import re
from contextlib import closing
from importlib import import_module, metadata
from typing import Any

import gymnasium
import numpy as np
import torch

from potstill.envs import Array, Envs
from potstill.errors import InputError, first_line
from potstill.load.sb3 import KINDS, open_zip
from potstill.load.statistics import read_statistics
from potstill.policies import LoadedPolicy

STEPS = 200  # of play, half of them random
CLOSE = 1e-4  # in half ranges, or of the largest logit: what rounding may do


def check_sb3(loaded: LoadedPolicy) -> str:
    """Plays 200 steps, and asks SB3's own `predict` at each. Returns what was found, in words.

    SB3's policy is built from its class and filled with the zip's tensors: no pickle in the zip is run.

    Raises:
        InputError: SB3 is not installed or does not make such a policy, or it acts otherwise.
    """
    kind, algorithm, data, state, _ = open_zip(loaded.path.read_bytes())
    try:
        module = import_module(next(name for name, known in KINDS.items() if known == kind))
    except ImportError as error:
        raise InputError(f"--check needs {error.name}: pip install stable-baselines3 sb3-contrib") from error
    with closing(Envs(loaded.env, 1)) as envs:
        policy = _rebuilt(module, algorithm, data, state, envs)
        different = sum(_differs(envs, theirs, ours) for theirs, ours in _actions(policy, loaded, envs))
    version = f"stable-baselines3 {metadata.version('stable-baselines3')}"
    if different:
        raise InputError(f"{loaded.path} acts otherwise than in {version} at {different} of {STEPS} steps")
    return f"the actions of {version} at {STEPS} steps"


def _rebuilt(module: Any, algorithm: str, data: dict[str, Any], state: Any, envs: Envs) -> Any:
    named = re.match(r"<function (\w+)\.__init__", str(data["policy_class"].get("__init__")))
    cls = getattr(module, named[1] if named else "", None)
    options = {name: value for name, value in (data.get("policy_kwargs") or {}).items() if not name.startswith(":")}
    activation = str(options.pop("activation_fn", "")).rpartition(".")[2].removesuffix("'>")
    options = {name: value for name, value in options.items() if isinstance(value, bool | int | float | list | dict)}
    options = {name: value for name, value in options.items() if not isinstance(value, dict) or ":type:" not in value}
    options = {name: value for name, value in options.items() if not name.startswith("optimizer")}
    options |= {"activation_fn": getattr(torch.nn, activation)} if hasattr(torch.nn, activation) and activation else {}
    options |= {"use_sde": True} if data.get("use_sde") is True else {}
    seen: Any = envs.parts or gymnasium.spaces.Box(-np.inf, np.inf, envs.observation_shape)
    if _images(envs):
        seen = gymnasium.spaces.Box(0, 255, _first(np.empty((1, *envs.observation_shape)), envs).shape[1:], np.uint8)
    rate = () if algorithm == "ARS" else (lambda _: 0.0,)
    try:
        policy = cls(seen, envs.action_space, *rate, **options)  # type: ignore[misc]  # None is refused below
        missing, unexpected = policy.load_state_dict(state, strict=False)
    except Exception as error:  # SB3 raises whatever it likes
        raise InputError(f"stable-baselines3 does not make such a policy: {first_line(error)}") from error
    if unexpected or any(not name.startswith(("pi_features", "vf_features")) for name in missing):
        raise InputError(f"stable-baselines3 of today has other layers: {next(iter([*unexpected, *missing]))}")
    return policy


def _actions(policy: Any, loaded: LoadedPolicy, envs: Envs) -> Any:
    """At each step, SB3's action and ours, both as the environment takes them; and how close ours was to another."""
    statistics = read_statistics(loaded.statistics) if loaded.statistics is not None else None
    mean, deviation = statistics.of(envs.parts) if statistics is not None else (0.0, 1.0)
    clip = statistics.clip if statistics is not None else np.inf
    rng, state, observations = np.random.default_rng(0), None, envs.reset(0)
    for step in range(STEPS):
        begun = envs.ages == 0
        loaded.policy.restart(begun)
        with torch.no_grad():
            logits = loaded.policy.logits(loaded.policy.prepare(torch.from_numpy(observations)))
        ours = loaded.policy.distribution.greedy(logits).numpy()
        given: Any = np.clip((observations - mean) / deviation, -clip, clip).astype(np.float32)
        if statistics is None:
            given = _first(observations, envs)
        if envs.parts is not None:
            given = _unflattened(envs.parts, given)
        try:
            theirs, state = policy.predict(given, state, begun, deterministic=True)
        except Exception as error:  # SB3 raises whatever it likes
            raise InputError(f"stable-baselines3 reads no such observations: {first_line(error)}") from error
        yield theirs, (ours, logits)
        observations = envs.step(ours if step >= STEPS // 2 else envs.random_actions(rng)).observations


def _differs(envs: Envs, theirs: Array, ours: tuple[Array, torch.Tensor]) -> bool:
    actions, logits = ours
    own = envs.own_actions(actions)
    if envs.bounds is not None:
        half = (envs.bounds[1] - envs.bounds[0]) / 2
        return bool((np.abs(theirs.reshape(own.shape) - own).reshape(1, -1) > CLOSE * half).any())
    best = logits.topk(2).values[0]
    tied = bool(best[0] - best[1] <= CLOSE * logits.abs().max())
    return not tied and not np.array_equal(np.ravel(theirs), np.ravel(own))


def _first(observations: Array, envs: Envs) -> Array:
    """Images with their channels first, as SB3's networks read them."""
    return observations.transpose(0, 3, 1, 2) if envs.layout == "last" and _images(envs) else observations


def _images(envs: Envs) -> bool:
    """Whether SB3 takes observations for pictures."""
    return len(envs.observation_shape) == 3 and envs.observation_dtype == np.uint8


def _unflattened(parts: "gymnasium.Space[Any]", rows: Array) -> Any:
    if isinstance(parts, gymnasium.spaces.Box):
        return rows.reshape(-1, *parts.shape)
    if not isinstance(parts, gymnasium.spaces.Dict):
        return np.array([gymnasium.spaces.unflatten(parts, rows[0])])
    found, at = {}, 0
    for key, part in parts.spaces.items():
        size = gymnasium.spaces.flatdim(part)
        piece = rows[:, at : at + size]
        found[key] = _unflattened(part, piece)
        at += size
    return found
