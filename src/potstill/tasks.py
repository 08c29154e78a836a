"""Tasks by name: what each is, PPO's settings for it, and what its scores are measured against.

A task is added here, as one entry of `TASKS`. Any other Gymnasium id works without one.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import gymnasium
from gymnasium.envs.registration import EnvSpec

from potstill.envs import EnvConfig, register_minatar
from potstill.errors import InputError, meant
from potstill.imports import allow, find, imported
from potstill.networks import Layout

EnvLike = str | EnvConfig | EnvSpec | Callable[[], "gymnasium.Env[Any, Any]"]
"""A task: a preset, `ale/<rom>`, a Gymnasium id or `module:name`, behind it @first, @last, @stack or @flat where its
space does not tell how pictures are read; its config or spec; or what makes an environment."""


@dataclass(frozen=True)
class Task:
    """One task, and what is known of it."""

    env: EnvConfig  # what a policy sees and may do
    ppo: Mapping[str, Any] = field(default_factory=dict)
    """Where `PPOConfig`'s defaults, tuned on Pong, do not fit: values by field, and `width`."""
    limits: tuple[float, float] = (-math.inf, math.inf)  # the least and the greatest score that a game can have
    targets: tuple[float, ...] | None = None
    """Scores at which sizes are compared; None takes shares of what the teachers score."""
    margin: float | None = None
    """Differences within it are as good as none; None takes an eightieth of the teachers' score over a random one's."""
    two_sided: bool = False  # games are played for points against an opponent: the score is the difference
    action_names: tuple[str, ...] = ()  # where the environment does not tell them


CONTROL: Mapping[str, Any] = {
    "width": "1", "num_envs": 16, "epochs": 4, "minibatch_size": 256, "learning_rate": 1e-3, "max_learning_rate": 5e-3,
    "target_kl": 0.02, "anneal_from": 0.0, "entropy": 0.01, "normalise_inputs": 2_000,
    "precision": "float32",  # these networks are too small to gain from less
}  # fmt: skip
_MINATAR: Mapping[str, Any] = {
    "width": "1", "total_timesteps": 1_000_000, "num_envs": 64, "num_steps": 64, "epochs": 3, "learning_rate": 2e-3,
    "max_learning_rate": 1e-2, "target_kl": 0.03, "anneal_from": 0.3, "entropy": 0.01, "precision": "float32",
}  # fmt: skip
_UNKNOWN = {**CONTROL, "total_timesteps": 200_000, "clip_rewards": False}

TASKS: dict[str, Task] = {
    "pong": Task(
        # NOOP, RIGHT (up) and LEFT (down); the scoreboard is hidden
        EnvConfig("pong", atari=True, actions=(0, 2, 3), sticky=0.25, hidden_rows=10),
        limits=(-21.0, 21.0),
        targets=(0, 10, 15, 18, 20),
        margin=0.5,
        two_sided=True,
    ),
    "breakout": Task(EnvConfig("breakout", atari=True, sticky=0.25, fire_on_reset=True), limits=(0.0, 864.0)),
    "cartpole": Task(
        EnvConfig("CartPole-v1"),
        {**CONTROL, "total_timesteps": 60_000, "num_envs": 8, "entropy": 0.0},
        limits=(0.0, 500.0),
        action_names=("left", "right"),
    ),
    "acrobot": Task(EnvConfig("Acrobot-v1"), {**CONTROL, "total_timesteps": 200_000}, limits=(-500.0, 0.0)),
    "lunarlander": Task(EnvConfig("LunarLander-v3"), {**CONTROL, "total_timesteps": 500_000, "clip_rewards": False}),
    "lunarlander-continuous": Task(
        EnvConfig("LunarLanderContinuous-v3"),
        {**CONTROL, "total_timesteps": 500_000, "clip_rewards": False, "entropy": 0.0},
    ),
    # Gamma after the RL Zoo: what a swing is worth shows within some ten steps.
    "pendulum": Task(
        EnvConfig("Pendulum-v1"),
        {**CONTROL, "total_timesteps": 100_000, "clip_rewards": False, "gamma": 0.9, "entropy": 0.0},
        limits=(-math.inf, 0.0),
    ),
    "minatar-breakout": Task(EnvConfig("MinAtar/Breakout-v1", sticky=0.1), _MINATAR, limits=(0.0, math.inf)),
    "minatar-space-invaders": Task(EnvConfig("MinAtar/SpaceInvaders-v1", sticky=0.1), _MINATAR, limits=(0.0, math.inf)),
    "minatar-asterix": Task(EnvConfig("MinAtar/Asterix-v1", sticky=0.1), _MINATAR, limits=(0.0, math.inf)),
}

_TWO_SIDED = {"boxing", "double_dunk", "ice_hockey", "tennis"}  # ALE games without an entry


def task_of(env: EnvConfig | str) -> Task:
    """What is known of a task, given as its config or by the id that a record has; an unknown one has no limits."""
    name = env if isinstance(env, str) else env.id
    for task in TASKS.values():
        if task.env.id == name:
            return task
    if name in _TWO_SIDED:
        return Task(EnvConfig(name, atari=True), two_sided=True)
    if name.startswith("MinAtar/"):
        return Task(EnvConfig(name, sticky=0.1), _MINATAR, limits=(0.0, math.inf))
    atari = not isinstance(env, str) and env.atari
    return Task(EnvConfig(name, atari=atari), {} if atari else _UNKNOWN)


def find_env(name: EnvLike) -> EnvConfig:
    """The task called `name`; or that of a spec, or of a class or function which makes a new environment at each call.

    A spec is registered, where it is not.

    Raises:
        InputError: nothing goes by that name, or the user did not name its module.
    """
    if isinstance(name, EnvConfig):
        return name
    if isinstance(name, EnvSpec):
        if gymnasium.registry.setdefault(name.id, name) != name:
            raise InputError(f"another task is registered as {name.id}: give the spec an id of its own")
        return EnvConfig(name.id)
    if callable(name):
        return EnvConfig(allow(name))
    if not isinstance(name, str):
        raise InputError(f"env is a name, a spec or what makes an environment, not {type(name).__name__}")
    name, named, layout = name.partition("@")
    if named:
        if layout not in get_args(Layout):
            raise InputError(f"env {name}@{layout}: behind @ stands how it is read, {', '.join(get_args(Layout))}")
        return replace(find_env(name), layout=layout)  # type: ignore[arg-type]  # one of these
    if ":" in name:
        module, _, registered = name.partition(":")
        if registered in gymnasium.registry and module in imported():  # as Gymnasium has it: module:Name-v0
            return EnvConfig(registered)
        find(name, "--env")
        return EnvConfig(name)
    if name in TASKS:
        return TASKS[name].env
    if name.startswith("ale/"):
        return EnvConfig(name.removeprefix("ale/"), atari=True, sticky=0.25)
    register_minatar(name)
    spec = gymnasium.registry.get(name)
    if spec is not None and "ale_py" not in str(spec.entry_point):  # Gymnasium would show raw frames
        return EnvConfig(name)
    from ale_py.roms import get_all_rom_ids

    bare = re.sub(r"^ALE/|(-ram)?(NoFrameskip|Deterministic)?(-v\d+)?$", "", name)
    if (rom := re.sub(r"(?<=[a-z])(?=[A-Z])", "_", bare).lower()) in get_all_rom_ids():
        raise InputError(f"{name} is an Atari game: write ale/{rom}")
    hint = meant(name, [*TASKS, *gymnasium.registry], f"known: {', '.join(TASKS)}, ale/<rom>, any Gymnasium id")
    raise InputError(f"no environment is called {name!r}; {hint} A task of your own needs --import MODULE")
