"""What leaves: the deployed actor as a list of layers, what it was seen to read, and how a file of it is held to it."""

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from potstill import evaluation
from potstill.envs import Array, Envs
from potstill.errors import InputError
from potstill.networks import Policy, Trunk
from potstill.policies import LoadedPolicy
from potstill.rollout import Preparer, collect
from potstill.storage import checkpoints
from potstill.views import sensed

_ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "leaky_relu": nn.LeakyReLU, "gelu": nn.GELU}
_ACTIVATIONS |= {"silu": nn.SiLU}
ABSOLUTE, RELATIVE = 1e-4, 1e-5  # a logit may differ by so much, and by so much of the largest of its observation
LONGEST = 5_000  # steps of a game that checks a file
OBSERVED = 128  # observations of the policy's own play, beside its probe
BITS = {"float32": 32, "int8": 8, "int4": 4}  # of a weight, by the name of a version


class Actor(NamedTuple):
    """A policy as a file needs it."""

    policy: Policy
    layers: list[nn.Module]  # normalised inputs to logits, or to means in units of half the range; see `unlisted`
    observations: Array  # (B, *observation shape), raw, of the environment's own dtype
    actions: list[Any]  # the environment's own, by index; one list a choice of several; empty where continuous
    bounds: Array | None  # (2, d) of continuous actions, in their space's own dtype
    observation_space: Any = None  # of the task, as Gymnasium has them
    action_space: Any = None
    unlisted: str | None = None  # why `layers` is empty: no list of layers says what is computed

    def check_listed(self) -> None:
        """Raises InputError where there is no list of layers."""
        if self.unlisted is not None:
            raise InputError(f"{self.unlisted}: only an ONNX file is written of it")

    @property
    def units(self) -> tuple[Array, Array]:
        """Centre and half the range of each continuous action, both (d,) float32."""
        assert self.bounds is not None
        low, high = self.bounds.astype(np.float64)
        return ((low + high) / 2).astype(np.float32), ((high - low) / 2).astype(np.float32)


def demands(policy: Policy) -> list[str]:
    """What is to be known of a policy's view and memory by whoever plays it, in sentences."""
    shown, own = (" ".join(each) for each in (sensed(policy.view), policy.view[len(sensed(policy.view)) :]))
    told = [f"The environment shows it {shown}: a file reads what is so shown."] * bool(shown)
    told += [f"Of an observation it sees {own}: a file does so itself."] * bool(own)
    if policy.remembers:
        told.append(
            f"Its state of {policy.actor.in_features} numbers goes from step to step, zero where a game begins."
        )
    return told


@torch.no_grad()
def actor(loaded: LoadedPolicy, threads: int = 1) -> Actor:
    """The deployed actor of a policy, with raw observations of its own sampled play and of its probe; of one with a
    memory, those of a whole game, of `LONGEST` steps at most."""
    policy = loaded.policy.player()
    if policy.sees_raw:
        raise InputError(
            f"{loaded.path} is code, an ONNX file or a network with a memory: distil it, export the student"
        )
    generator = torch.Generator().manual_seed(0)
    one = loaded.alone or policy.remembers
    games = 1 if one else 2 if loaded.env.atari else 8  # an emulator takes as long to begin as for 300 steps
    steps = LONGEST if policy.remembers else OBSERVED if one else 8 * OBSERVED // games
    with closing(Envs(loaded.env, games, threads=threads)) as envs:
        evaluation.check_fit(policy, envs)
        seen = []

        def act(inputs: Tensor) -> Tensor:
            policy.restart(envs.ages == 0)
            return policy.distribution.sample(policy.logits(inputs), generator)

        play = collect(envs, Preparer(policy), envs.reset(0), act)
        for number, transition in zip(range(steps), play, strict=False):
            if policy.remembers or number % 8 == 0:  # neighbours look alike
                seen.append(transition.observations.copy())
            if policy.remembers and transition.step.episodes:
                break
        dtype, space, bounds = envs.observation_dtype, envs.action_space, envs.bounds
        several = [own.tolist() for own in envs.choices]
        actions = several if isinstance(envs.num_actions, tuple) else several[0] if several else []
    if "network" in loaded.document and not policy.remembers:  # a checkpoint of ours, which has a probe
        seen.append(checkpoints.load(loaded.path)[0]["probe.observations"].numpy())
    if bounds is not None and np.dtype(space.dtype).kind in "biu":
        raise InputError(f"{loaded.env.id} takes whole numbers of a range, to which no file rounds")
    listed, unlisted = [], None
    try:
        if isinstance(policy.num_actions, tuple):
            raise InputError(f"{loaded.env.id} takes several choices at once")
        if bounds is not None and len(space.shape or ()) != 1:
            raise InputError(f"{loaded.env.id} takes actions of shape {space.shape}")
        listed = layers(policy)
    except InputError as error:
        unlisted = str(error)
        if policy.remembers:
            raise InputError(f"{unlisted}, and has a memory: no file is written of it") from error
    shown = np.concatenate(seen).astype(dtype)
    return Actor(policy, listed, shown, actions, bounds, envs.observation_space, space, unlisted)


def layers(policy: Policy, critic: bool = False) -> list[nn.Module]:
    """The deployed actor's layers in order, or those of the critic, whether or not it has a trunk of its own."""
    own = policy.critic_trunk if policy.critic_trunk is not None else policy.trunk
    trunk, head = (own, policy.critic) if critic else (policy.trunk, policy.actor)
    if not isinstance(trunk, Trunk):
        raise InputError(f"{policy.family} is a network of your own")
    if trunk.activation not in _ACTIVATIONS:
        raise InputError(f"the network has {trunk.activation} units")
    activation = _ACTIVATIONS[trunk.activation]()
    convs = [layer for conv in trunk.convs for layer in (conv, nn.ReLU())]
    linears = [layer for linear in trunk.linears for layer in (linear, activation)]
    squash: list[nn.Module] = []
    if policy.squash is not None and not critic:
        bound = float(policy.squash)
        squash = [nn.Tanh()] if bound == 1.0 else [nn.Tanh(), nn.Hardtanh(-bound, bound)]
    memory = [trunk.gru] if trunk.gru is not None else []
    return [*convs, nn.Flatten(), *linears, *memory, head, *squash]


def axes(policy: Policy) -> list[int] | None:
    """How the axes of its observations are ordered anew for its first layer; None where they are not."""
    convolved = isinstance(policy.trunk, Trunk) and len(policy.trunk.convs) > 0
    if len(policy.observation_shape) == 2 or policy.layout == "flat" or (policy.layout == "last") != convolved:
        return None
    return [0, 3, 1, 2] if convolved else [0, 2, 3, 1]


class Exported(Policy):
    """A file in the place of the policy it was made from, for the games and the clock that measure policies."""

    def __init__(self, actor: Actor, run: Callable[..., Any]) -> None:
        """`run` takes raw observations (N, *shape) to logits (N, A), or to means (N, d) in units of half the range; and
        a memory (N, H) beside them to the next one, where there is one."""
        policy = actor.policy
        super().__init__(policy.config, **policy.spaces)
        self.size = policy.size  # type: ignore[method-assign]  # of what the file was made from
        self.log_std = policy.log_std
        self.layout = "flat"  # `Preparer` is to hand on whole observations, not frames that it normalised
        self.run = run
        self.raw = torch.from_numpy(actor.observations[:0]).dtype

    def prepare(self, observations: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Observations as they are: the file normalises them."""
        return observations.to(self.raw)

    def logits(self, inputs: Tensor) -> Tensor:
        if self.memory is None:
            return self._with_deviations(torch.from_numpy(self.run(inputs.numpy())))
        outputs, memory = self.run(inputs.numpy(), self.memory.numpy())
        self.memory = torch.from_numpy(memory)
        return self._with_deviations(torch.from_numpy(outputs))


def in_order(actor: Actor, run: Callable[..., Any]) -> Any:
    """What `run`, as `Exported` takes it, tells of all observations: of a memory step by step, as they were played. One
    that tells more than outputs, such as actions, gives an array of each."""
    if not actor.policy.remembers:
        return run(actor.observations)
    memory, told = np.zeros((1, actor.policy.actor.in_features), np.float32), []
    for shown in actor.observations:
        *each, memory = run(shown[None], memory)
        told.append(each)
    parts = [np.concatenate(part) for part in zip(*told, strict=True)]
    return parts if len(parts) > 1 else parts[0]


class Versions(NamedTuple):
    """A policy in one format, not written yet: what is known of each version, by its name."""

    actor: Actor
    difference: float  # as `verify` found them of float32
    tied: int
    players: Mapping[str, Exported]
    facts: Mapping[str, dict[str, Any]]
    files: Mapping[str, Callable[[dict[str, Any] | None], dict[Path, bytes]]]  # their contents, of the score it played


def verify(actor: Actor, outputs: Array, actions: Array, name: str) -> tuple[float, int]:
    """Holds what a file computed from `actor.observations` against PyTorch.

    Actions whose logits are nearer to each other than twice the tolerance count as tied: either is the greedy one.

    Args:
        outputs: (B, A) logits, or (B, d) means in units of half the range.
        actions: (B,) indices, (B, K) of several choices, or (B, *shape) as the environment counts.
        name: who computed, for the message.

    Returns:
        The largest difference of an output, and of how many observations another of tied actions was chosen.

    Raises:
        InputError: an output differs by more than 1e-4 and 1e-5 of the largest of its observation, an action is not
            a greedy one of PyTorch's, or lies outside its bounds.
    """
    policy, shown = actor.policy, torch.from_numpy(actor.observations)
    with torch.no_grad():
        if policy.remembers:
            policy.restart(np.ones(1, bool))
            logits = torch.cat([policy.logits(policy.prepare(each[None])) for each in shown])
        else:
            logits = policy(shown)[0]
    expected = logits[:, : actor.policy.actor.out_features].numpy()
    allowed = ABSOLUTE + RELATIVE * np.abs(expected).max(1)
    what = "logits" if actor.bounds is None else "means"
    difference, actions = np.abs(outputs - expected).max(1), actions.reshape(len(expected), -1)
    _refuse(difference, allowed, f"{name} computes other {what} than PyTorch")
    if actor.bounds is None:
        counts = actor.policy.num_actions if isinstance(actor.policy.num_actions, tuple) else (expected.shape[1],)
        tied = np.zeros(len(expected), bool)
        for own, logit in zip(actions.T, np.split(expected, np.cumsum(counts)[:-1], 1), strict=True):
            short = logit.max(1) - np.take_along_axis(logit, own[:, None], 1)[:, 0]
            _refuse(short, 2 * allowed, f"{name} chooses an action that is not PyTorch's greedy one")
            tied |= own != logit.argmax(1)
        return float(difference.max()), int(tied.sum())
    centre, half = actor.units
    greedy = actor.policy.distribution.greedy(logits).numpy()
    _refuse(np.abs((actions - centre) / half - greedy).max(1), allowed, f"{name} computes other actions than PyTorch")
    if not ((actions >= actor.bounds[0]) & (actions <= actor.bounds[1])).all():
        raise InputError(f"{name} computes actions outside their bounds: no file is left")
    return float(difference.max()), 0


def _refuse(differences: Array, allowed: Array, what: str) -> None:
    if not (differences <= allowed).all():  # which NaN is not
        worst = int(np.argmax(np.where(np.isnan(differences), np.inf, differences / allowed)))
        raise InputError(
            f"{what} (largest difference {differences[worst]:.2g}, allowed {allowed[worst]:.2g}): no file is left"
        )
