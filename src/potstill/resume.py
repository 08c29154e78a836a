"""The state of an unfinished run: packed into tensors and JSON, and unpacked so that it goes on as if never stopped."""

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill import telemetry
from potstill.distill import DistillState
from potstill.envs import Array, Envs, Past
from potstill.errors import InputError, printable
from potstill.networks import Policy
from potstill.ppo import ReturnScale, TrainState
from potstill.training.runtime import Runtime

State = TrainState | DistillState


def pack(state: State, envs: Envs | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, optimiser, random numbers and counters; the environments' past too, where they matter."""
    policy = state.policy if isinstance(state, TrainState) else state.student
    tensors = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()}
    for index, slots in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in slots.items()}
    if isinstance(state, TrainState):
        tensors |= {f"average.{name}": tensor for name, tensor in state.average.state_dict().items()}
    tensors["generator"] = state.generator.get_state()
    document = {"games": state.games, "gradient_steps": state.gradient_steps, "recent": list(state.recent)}
    if isinstance(state, TrainState):
        document |= {"update": state.update, "returns": asdict(state.returns)}
        document |= {"learning_rate": state.learning_rate, "rate_bound": state.rate_bound}
    else:
        document["vector_steps"] = state.vector_steps
    if envs is not None:
        past = envs.state()
        document |= {"env_seed": past.seed, "env_checksum": past.checksum, "inexact": envs.inexact}
        tensors["env.log"] = torch.from_numpy(past.actions)
    return tensors, document


def unpack(state: State, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
    """Makes `state`, fresh, what it was when it was packed.

    Raises:
        InputError: another version of potstill packed it, with other contents.
    """

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    policy = state.policy if isinstance(state, TrainState) else state.student
    numbers = ["games", "gradient_steps", *(["update"] if isinstance(state, TrainState) else ["vector_steps"])]
    try:
        if not all(type(document[name]) is int and document[name] >= 0 for name in numbers):
            raise ValueError(f"{', '.join(numbers)} are {[document[name] for name in numbers]}")
        recent = [document.get("seconds", 0.0), *document["recent"]]
        if isinstance(state, TrainState):
            recent += [document["learning_rate"], document["rate_bound"], *document["returns"].values()]
        if not all(type(number) in (int, float) for number in recent):
            raise ValueError("a number is none")
        policy.load_state_dict(under("policy."))
        optimizer = state.optimizer.state_dict()
        state.optimizer.load_state_dict(optimizer | {"state": _slots(policy, under("optimizer."))})
        state.generator.set_state(tensors["generator"])
        state.games, state.gradient_steps = document["games"], document["gradient_steps"]
        state.recent = deque(document["recent"], maxlen=100)
        if isinstance(state, TrainState):
            state.average.load_state_dict(under("average."))
            state.update, state.returns = document["update"], ReturnScale(**document["returns"])
            state.learning_rate, state.rate_bound = document["learning_rate"], document["rate_bound"]
        else:
            state.vector_steps = document["vector_steps"]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        versions = document.get("versions")
        made_by = versions.get("potstill") if isinstance(versions, dict) else None
        why = printable(error, 120)
        raise InputError(
            f"the run was saved by potstill {made_by or 'an unknown version'} and cannot go on with this one: {why}"
        ) from error


def _slots(policy: Policy, stored: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The optimiser's state by parameter. Its kernel trusts these shapes, so that others would be read out of bounds.

    Raises:
        ValueError: they are not those of Adam's state of this policy.
    """
    slots: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(policy.parameters()):
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


def past(envs: Envs, tensors: dict[str, Tensor], document: dict[str, Any]) -> Past:
    """The games so far, as `Envs.replay` takes them. Says in `envs` whether they are inexact already.

    Raises:
        InputError: they are not of these environments.
    """
    seed, log, checksum = document.get("env_seed"), tensors.get("env.log"), document.get("env_checksum")
    like = torch.from_numpy(envs.random_actions(np.random.default_rng(0), 1))
    if (
        type(seed) is not int
        or seed < 0
        or type(checksum) not in (int, type(None))  # the first resume states had none
        or log is None
        or log.shape[1:] != like.shape[1:]
        or log.dtype != (torch.float32 if envs.continuous else torch.uint8)
        or (not envs.continuous and log.numel() > 0 and int(log.max()) >= envs.num_actions)
        or (envs.continuous and not bool(log.isfinite().all()))
    ):
        raise InputError("the run cannot go on: what it saved of its games is not of its environments")
    envs.inexact = document.get("inexact") is True
    return Past(seed, log.numpy(), checksum)


def replay(envs: Envs, past: Past, runtime: Runtime) -> Iterator[Array]:
    """Plays the games so far again; yields the observations before each step, and last those to go on from."""
    total = len(past.actions) * envs.num_envs
    with telemetry.Progress("play the games so far again", total, quiet=runtime.quiet) as bar:
        for step, observations in enumerate(envs.replay(past, runtime.inexact)):
            bar.update(step * envs.num_envs)
            yield observations
