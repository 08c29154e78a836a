"""The state of an unfinished run: packed into tensors and JSON, and unpacked so that it goes on as if never stopped."""

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from potstill import telemetry
from potstill.distill import DistillState
from potstill.envs import Array, Envs
from potstill.errors import InputError
from potstill.ppo import ReturnScale, TrainState

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
        document["env_seed"], log = envs.state()
        tensors["env.log"] = torch.from_numpy(log)
    return tensors, document


def unpack(state: State, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
    """Makes `state`, fresh, what it was when it was packed.

    Raises:
        InputError: another version of potstill packed it, with other contents.
    """

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    policy = state.policy if isinstance(state, TrainState) else state.student
    optimizer = state.optimizer.state_dict()
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in under("optimizer.").items():
        index, slot = name.split(".")
        slots.setdefault(int(index), {})[slot] = tensor
    try:
        policy.load_state_dict(under("policy."))
        state.optimizer.load_state_dict(optimizer | {"state": slots})
        state.generator.set_state(tensors["generator"])
        state.games, state.gradient_steps = document["games"], document["gradient_steps"]
        state.recent = deque(document["recent"], maxlen=100)
        if isinstance(state, TrainState):
            state.average.load_state_dict(under("average."))
            state.update, state.returns = document["update"], ReturnScale(**document["returns"])
            state.learning_rate, state.rate_bound = document["learning_rate"], document["rate_bound"]
        else:
            state.vector_steps = document["vector_steps"]
    except (KeyError, TypeError, RuntimeError) as error:
        made_by = document.get("versions", {}).get("potstill", "an unknown version")
        why = " ".join(str(error).split())[:120]
        raise InputError(f"the run was saved by potstill {made_by} and cannot go on with this one: {why}") from error


def replay(envs: Envs, tensors: dict[str, Tensor], document: dict[str, Any], quiet: bool) -> Iterator[Array]:
    """Plays the games so far again; yields the observations before each step, and last those to go on from."""
    log = tensors["env.log"].numpy()
    with telemetry.Progress("play the games so far again", len(log) * envs.num_envs, quiet=quiet) as bar:
        for step, observations in enumerate(envs.replay(document["env_seed"], log)):
            bar.update(step * envs.num_envs)
            yield observations
