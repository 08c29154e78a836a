"""What the trainer asks of an algorithm, and how an algorithm is saved: exactly, and never as a pickle."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from potstill.envs import Envs, Past
from potstill.errors import InputError, printable
from potstill.networks import Policy


class Progress(NamedTuple):
    """What an algorithm yields now and then."""

    step: int  # agent steps so far; for a stored data set, as many as the gradient steps so far stand for
    score: float  # mean of the last 100 finished games, sampled actions, unclipped; nan before the first
    games: int
    metrics: dict[str, float]  # empty where games so far are played again
    branches: Mapping[str, dict[str, Any]] = MappingProxyType(
        {}
    )  # states of runs that leave here, current as it yields


class Cost(NamedTuple):
    """What a network computed in training."""

    policy: Policy
    seen: int  # observations forward, to act or to label
    learned: int  # observations forward and backward
    batch: int  # observations at a time


class Algorithm(Protocol):
    """A way to make a policy. Whoever holds one drives it, saves it between two steps and goes on with it."""

    @property
    def policy(self) -> Policy:
        """What is deployed."""
        ...

    @property
    def total(self) -> int:
        """Agent steps of the whole training."""
        ...

    @property
    def done(self) -> int:
        """Agent steps so far."""
        ...

    @property
    def gradient_steps(self) -> int: ...

    def steps(self) -> Iterator[Progress]:
        """Trains to the end; the state is current whenever it yields. After a load it first plays again what it must.

        Raises:
            DivergedError: a loss or a weight is no longer a finite number.
        """
        ...

    def costs(self) -> list[Cost]: ...

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on exactly: tensors, and values for JSON."""
        ...

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Makes a fresh algorithm what it was when it was saved.

        Raises:
            InputError: another version of potstill saved it, with other contents.
        """
        ...


def _plain(method: Any) -> Any:
    return getattr(method, "__wrapped__", method)


class Adam(torch.optim.Adam):
    """torch's, fused, bit for bit; it does not call torch's compiler, whose import alone takes a second."""

    def __init__(self, network: nn.Module, rate: float, eps: float = 1e-8) -> None:
        super().__init__(network.parameters(), lr=rate, eps=eps, fused=True)

    add_param_group = _plain(torch.optim.Optimizer.add_param_group)
    zero_grad = _plain(torch.optim.Optimizer.zero_grad)
    state_dict = _plain(torch.optim.Optimizer.state_dict)
    load_state_dict = _plain(torch.optim.Optimizer.load_state_dict)
    step = torch.no_grad()(_plain(torch.optim.Adam.step))


def _fields(state: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(state, field.name)) for field in fields(state) if field.init]


def pack(state: Any) -> dict[str, Any]:
    """The fields that a dataclass is made from, as tensors and values for JSON, by names that begin with theirs."""
    saved: dict[str, Any] = {}
    for name, value in _fields(state):
        if isinstance(value, nn.Module):
            saved |= {f"{name}.{key}": tensor for key, tensor in value.state_dict().items()}
            if isinstance(value, Policy) and value.memory is not None:  # of the games it plays
                saved[f"{name}.memory"] = value.memory
        elif isinstance(value, torch.optim.Optimizer):
            for index, slots in value.state_dict()["state"].items():
                saved |= {f"{name}.{index}.{slot}": tensor for slot, tensor in slots.items()}
        elif isinstance(value, torch.Generator):
            saved[name] = value.get_state()
        elif isinstance(value, deque):
            saved[name] = list(value)
        elif isinstance(value, Tensor):
            saved |= {name: value} if value.numel() else {}  # none, of what has no memory
        else:
            saved[name] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    return saved


def unpack(state: Any, saved: dict[str, Any]) -> None:
    """Makes `state`, fresh, what it was when it was packed.

    Raises:
        InputError: another version of potstill packed it, with other contents.
    """

    def under(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}

    try:
        for name, value in _fields(state):
            if isinstance(value, nn.Module):
                own = under(f"{name}.")
                if isinstance(value, Policy) and value.remembers and "memory" in own:
                    value.memory = own.pop("memory").to(value.scale)
                    if value.memory.shape != (saved["env.log"].shape[1], value.actor.in_features):
                        raise ValueError(f"{name} remembers {tuple(value.memory.shape)}")
                value.load_state_dict(own)
            elif isinstance(value, torch.optim.Optimizer):
                value.load_state_dict(value.state_dict() | {"state": _slots(value, under(f"{name}."))})
            elif isinstance(value, torch.Generator):
                value.set_state(saved[name])
            elif isinstance(value, deque):
                setattr(state, name, deque(_numbers(name, saved[name]), maxlen=value.maxlen))
            elif isinstance(value, Tensor):
                if value.numel():
                    value.copy_(saved[name])
            elif is_dataclass(value) and not isinstance(value, type):
                _numbers(name, saved[name].values())
                setattr(state, name, type(value)(**saved[name]))
            else:
                _numbers(name, [saved[name]])
                if isinstance(value, int) and (type(saved[name]) is not int or saved[name] < 0):
                    raise ValueError(f"{name} is {saved[name]}")
                setattr(state, name, saved[name])
        _numbers("seconds", [saved.get("seconds", 0.0)])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        versions = saved.get("versions")
        made_by = versions.get("potstill") if isinstance(versions, dict) else None
        why = printable(error, 120)
        raise InputError(
            f"the run was saved by potstill {made_by or 'an unknown version'} and cannot go on with this one: {why}"
        ) from error


def _numbers(name: str, values: Any) -> Any:
    if not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{name} is no number")
    return values


def _slots(optimizer: torch.optim.Optimizer, stored: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Adam's state by parameter. Its kernel trusts these shapes, so that others would be read out of bounds.

    Raises:
        ValueError: they are not those of its parameters.
    """
    slots: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        shapes = {"step": torch.Size([]), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        mine = {slot: stored.pop(f"{index}.{slot}") for slot in shapes if f"{index}.{slot}" in stored}
        if mine:  # there is none before the first gradient step
            slots[index] = mine
        if mine and {slot: (t.shape, t.dtype) for slot, t in mine.items()} != {
            slot: (shape, torch.float32) for slot, shape in shapes.items()
        }:
            raise ValueError(f"the optimiser's state of parameter {index} is of another shape")
    if stored:
        raise ValueError(f"the optimiser has no {next(iter(stored))}")
    return slots


def pack_games(envs: Envs, past: Past | None = None) -> dict[str, Any]:
    """How the games came to where they are, which is the environments' state, or to where they were in the `past`."""
    past = past or envs.state()
    found = {"env_seed": past.seed, "env_checksum": past.checksum, "inexact": envs.inexact}
    return found | {"env.log": torch.from_numpy(past.actions)}


def unpack_games(envs: Envs, saved: dict[str, Any]) -> Past:
    """The games so far, as `Envs.replay` takes them. Says in `envs` whether they are inexact already.

    Raises:
        InputError: they are not of these environments.
    """
    seed, log, checksum = saved.get("env_seed"), saved.get("env.log"), saved.get("env_checksum")
    like = torch.from_numpy(envs.random_actions(np.random.default_rng(0), 1))
    if (
        type(seed) is not int
        or seed < 0
        or type(checksum) not in (int, type(None))  # the first resume states had none
        or not isinstance(log, Tensor)
        or log.shape[1:] != like.shape[1:]
        or log.dtype != torch.from_numpy(np.empty(0, envs.action_dtype)).dtype
        or (
            not envs.continuous and bool((log.long() < 0).any() or (log.long() >= torch.tensor(envs.num_actions)).any())
        )
        or (envs.continuous and not bool(log.isfinite().all()))
    ):
        raise InputError("the run cannot go on: what it saved of its games is not of its environments")
    envs.inexact = saved.get("inexact") is True
    return Past(seed, log.numpy(), checksum)
