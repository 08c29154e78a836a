"""Policy + environments -> transitions: the only loop that steps an environment."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import count
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from potstill.envs import Array, Envs, Step
from potstill.networks import Policy
from potstill.views import part, sensed

T = TypeVar("T")


class Transition(NamedTuple):
    """One vector step: what the policy saw, what it did, what came of it."""

    inputs: Tensor  # (N, ...) prepared inputs the actions were chosen from
    observations: Array  # (N, *observation shape) the same, raw
    actions: Tensor  # (N,) int64, or (N, d) float32 in units of half the range, not yet clipped
    step: Step
    next_inputs: Tensor  # (N, ...) prepared inputs of step.observations


class Preparer:
    """Prepares the inputs of N environments step by step, normalising each frame once.

    A stack of frames differs from the one before by its newest frame alone: the older three are moved, not made again.
    """

    def __init__(self, policy: Policy, dtype: torch.dtype = torch.float32) -> None:
        self.policy = policy
        self.dtype = dtype
        self._stacked = policy.layout == "stack" and not policy.sees_raw and not sensed(policy.view)

    @torch.no_grad()
    def first(self, observations: Array) -> Tensor:
        """Prepares whole observations (N, *observation shape)."""
        return self.policy.prepare(self.policy.read(observations), self.dtype)

    @torch.no_grad()
    def following(self, inputs: Tensor, step: Step, out: Tensor | None = None) -> Tensor:
        """The inputs after `step`, given those before it; written to `out` where that is given."""
        if not self._stacked:
            whole = self.first(step.observations)
            return whole if out is None else out.copy_(whole)
        policy = self.policy
        newest = torch.from_numpy(part(step.observations, policy.view)[:, -1]).to(inputs.device)
        look = policy.look
        newest = newest if look is None else look(newest, policy.mean.dtype, framed=True)
        # Not in place at first: of float frames this is the memory of `step`.
        newest = (newest - policy.mean).float().mul_(policy.scale).clamp_(-policy.clip, policy.clip)
        moved = torch.empty_like(inputs) if out is None else out
        # Channels last: what moves every frame up by one is a plain copy from the second number on. The numbers it puts
        # where the newest frame belongs, and the last of all, are written over.
        _in_memory(moved)[:-1] = _in_memory(inputs)[1:]
        moved[:, -1] = newest.to(moved.dtype)  # to every fourth number: a plain copy is faster than one that converts
        ended = np.flatnonzero(step.terminated | step.truncated)
        if ended.size:
            moved[torch.from_numpy(ended).to(inputs.device)] = self.first(step.observations[ended])
        return moved


def _in_memory(images: Tensor) -> Tensor:
    """Channels-last images (N, C, H, W) as the row of numbers they are in memory."""
    return images.permute(0, 2, 3, 1).view(-1)


class Group(NamedTuple):
    """Environments, and who plays them."""

    envs: Envs
    preparer: Preparer
    observations: Array  # (N, *observation shape) what they showed last
    act: Callable[[Tensor], Tensor]  # prepared inputs (N, ...) to actions, (N,) int64 or (N, d) float32


def collect(
    envs: Envs,
    preparer: Preparer,
    observations: Array,
    act: Callable[[Tensor], Tensor],
    storage: Tensor | None = None,
) -> Iterator[Transition]:
    """Plays one group on for as long as the caller takes transitions.

    Args:
        storage: (T, N, ...) takes the inputs of the first T steps: made where they are kept, they need no copy.
    """
    for _, transition in in_turns([Group(envs, preparer, observations, act)], storage):
        yield transition


def in_turns(groups: Sequence[Group], storage: Tensor | None = None) -> Iterator[tuple[int, Transition]]:
    """Plays groups on, one after another: while the emulator plays one, the policy acts for the next.

    A group whose environments were closed plays no more.

    Yields:
        Which group, and its next transition.
    """
    inputs = [group.preparer.first(group.observations) for group in groups]
    if storage is not None:
        inputs[0] = storage[0].copy_(inputs[0])
    observations = [group.observations for group in groups]
    actions = [group.act(each) for group, each in zip(groups, inputs, strict=True)]
    waiting = deque(range(len(groups)))  # the first plays

    def play() -> None:
        groups[waiting[0]].envs.send(actions[waiting[0]].cpu().numpy())

    play()
    for t in count(1):
        now = waiting.popleft()
        envs, preparer, _, act = groups[now]
        step = envs.receive()
        if waiting:
            play()
        room = storage[t] if storage is not None and t < len(storage) else None
        following = preparer.following(inputs[now], step, room)
        yield now, Transition(inputs[now], observations[now], actions[now], step, following)
        if not envs.closed:
            inputs[now], observations[now] = following, step.observations
            actions[now] = act(following)
            waiting.append(now)
            if len(waiting) == 1:
                play()
        elif not waiting:
            return


def side_by_side(sources: Sequence[Iterator[T]], over: threading.Event) -> Iterator[T]:
    """What iterators yield, as it comes: each runs in a thread of its own, where there are several.

    Args:
        over: set when no more is wanted, so that they may end.
    """
    if len(sources) == 1:
        yield from sources[0]
        return
    end = object()
    with ThreadPoolExecutor(len(sources)) as pool:
        try:
            due = {pool.submit(next, source, end): source for source in sources}
            while due:
                for ready in wait(due, return_when=FIRST_COMPLETED).done:
                    source = due.pop(ready)
                    if (found := ready.result()) is not end:
                        due[pool.submit(next, source, end)] = source
                        yield found  # type: ignore[misc]
        finally:
            over.set()


def normalise_by_play(policy: Policy, envs: Envs, observations: int, seed: int) -> None:
    """Normalises the inputs of a policy by what it sees of a random policy's play, and hides what its task hides.

    Args:
        observations: as `input_statistics` has them; 0 leaves inputs as they are.
    """
    if observations and policy.dtype != "bool":  # whose inputs are 0 and 1
        policy.normalise_by(*input_statistics(envs, observations, seed, policy.look))
    policy.hide(envs.config.hidden_rows)


def input_statistics(
    envs: Envs, observations: int, seed: int, look: Callable[..., Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per pixel or feature under a uniformly random policy.

    Args:
        observations: how many (newest frames, or whole observations) to look at.
        look: what a policy sees of them, its `views.Look`.

    Returns:
        float64 and float32, shaped like one frame of a stack or like one observation.
    """
    rng = np.random.default_rng(seed)
    stacked = envs.layout == "stack"

    def newest_of(seen: Array) -> Array:
        own = part(seen, envs.config.view)
        newest = own[:, -1] if stacked else own
        if look is None:
            return newest.astype(np.float64)
        return look(torch.from_numpy(newest), torch.float64, framed=stacked).numpy()

    seen = envs.reset(seed)
    first = newest_of(seen)[0]
    kind = np.dtype(envs.observation_dtype)
    large = kind.itemsize > (4 if kind.kind == "f" else 2)  # offsets, whose squares would leave no digits
    shift = first if large else np.zeros_like(first)
    total = np.zeros_like(shift)
    squares = np.zeros_like(total)
    steps = max(1, observations // envs.num_envs)
    for _ in range(steps):
        newest = newest_of(envs.step(envs.random_actions(rng)).observations) - shift
        total += newest.sum(axis=0)
        squares += np.square(newest).sum(axis=0)
    count = steps * envs.num_envs
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - np.square(mean), 0.0))
    rounding = 8 * np.finfo(np.float64 if large else np.float32).eps * np.abs(mean + shift)
    deviation = np.where(deviation > rounding, deviation, 0.0)  # what only rounding moves stands still
    return torch.as_tensor(mean + shift), torch.as_tensor(deviation).float()
