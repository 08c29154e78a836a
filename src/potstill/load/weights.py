"""State dicts of others in: tensors read as data, never as code, and laid into a policy of ours by their names."""

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import torch
from torch import Tensor

from potstill.envs import Array, EnvConfig, Envs
from potstill.errors import InputError
from potstill.networks import NetworkConfig, Policy
from potstill.policies import LoadedPolicy, save_policy
from potstill.rollout import Preparer, collect
from potstill.storage.checkpoints import new_folder

#: Divides Q-values into logits. Rusu et al. 2015 distil a DQN's softmax(Q / 0.01): nearly greedy, as the DQN plays.
Q_TEMPERATURE = 0.01
WATCHED = 500  # greedy steps of a policy that normalises no numbers
DETERMINISTIC = 0.1  # deviation in half ranges of a policy that has none: the action noise of Fujimoto et al. 2018, TD3
_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number in files of before 1.6


def read_tensors(content: bytes, what: str) -> dict[str, Tensor]:
    """What `torch.save` wrote of a state dict, of a tuple that begins with one, or of a dict that holds one: names and
    plain float32 tensors.

    torch's `weights_only` unpickler builds tensors and nothing else; what it builds is checked again.

    Args:
        what: the file's name, for messages.

    Raises:
        InputError: it holds something else, or is damaged.
    """
    try:
        if not content.startswith(_BEFORE_ZIP):
            inner = ZipFile(BytesIO(content))
            if any(member.compress_type != ZIP_STORED for member in inner.infolist()):  # or torch would unpack a bomb
                raise InputError(f"{what} is compressed inside, which torch does not do")
        state = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # a hostile or damaged pickle raises whatever its instructions run into
        asked = re.search(r"GLOBAL ([\w.]{1,60})", str(error))
        why = f"it asks for {asked[1]}, which is not run: save a state_dict()" if asked else "or it is damaged"
        raise InputError(f"{what} holds something else than tensors: {why}") from error
    state = state[0] if isinstance(state, tuple) and state else state
    if isinstance(state, dict) and not any(isinstance(each, Tensor) for each in state.values()):
        dicts = {name: each for name, each in state.items() if isinstance(each, dict) and each}
        states = {name: each for name, each in dicts.items() if all(isinstance(t, Tensor) for t in each.values())}
        if len(states) > 1:
            raise InputError(f"{what} holds several state dicts, {', '.join(map(str, states))}: save the actor's alone")
        state = next(iter(states.values()), state)  # of a checkpoint, which has an optimizer and more beside it
    if not isinstance(state, dict) or not state:
        raise InputError(f"{what} is not a state dict")
    for name, tensor in state.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.]{1,120}", name, re.ASCII):
            raise InputError(f"{what} names a tensor {str(name)[:80]!r}")
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.dtype != torch.float32 or tensor.is_meta or tensor.is_nested:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"{name} in {what} is not a plain float32 tensor, but {kind}")
        if 4 * tensor.numel() > len(content):  # one number seen from everywhere, at no cost until it is used
            raise InputError(f"{name} in {what} claims a shape of {tuple(tensor.shape)}")
    return {name.replace("_orig_mod.", ""): tensor.detach() for name, tensor in state.items()}  # of torch.compile


def check_layers(state: Mapping[str, Tensor], layers: Iterable[str], what: str) -> None:
    """Raises InputError where one of these is missing, or has the weight of no linear layer and no convolution."""
    for layer in layers:
        if missing := [part for part in ("weight", "bias") if f"{layer}.{part}" not in state]:
            raise InputError(f"{what} has no {layer}.{missing[0]}")
        weight = state[f"{layer}.weight"]
        if weight.dim() not in (2, 4) or not weight.numel():
            raise InputError(f"{layer}.weight in {what} is {tuple(weight.shape)}: that is no layer")


def check_finite(state: Mapping[str, Tensor], what: str) -> None:
    if infinite := [name for name in sorted(state) if not state[name].isfinite().all()]:
        raise InputError(f"{infinite[0]} in {what} is not finite")


def chain(state: Mapping[str, Tensor], prefix: str) -> list[str]:
    """The layers `prefix.0`, `prefix.2`, ... in order."""
    found = [re.fullmatch(re.escape(prefix) + r"\.(\d{1,3})\.weight", name) for name in state]
    return [f"{prefix}.{number}" for number in sorted(int(match[1]) for match in found if match)]


def mlp_of(
    state: Mapping[str, Tensor], layers: Iterable[str], activation: str, critic: Iterable[str] | None = None
) -> NetworkConfig:
    """The multilayer perceptron that has these layers; of two equal ones, 64 units are width 1. It is split where the
    layers of a `critic` make one of the same kind."""
    units = [size for layer in layers for size in state[f"{layer}.weight"].shape[:1]]
    options = () if activation == "tanh" else (f"activation={activation}",)
    if not units:
        config = NetworkConfig(family="linear")
    elif len(units) == 2 and units[0] == units[1]:
        config = NetworkConfig(str(Fraction(units[0], 64)), "mlp", options=options)
    else:
        config = NetworkConfig(family="mlp", options=(f"layers={','.join(map(str, units))}", *options))
    beside = mlp_of(state, critic, activation) if critic is not None else None
    if beside is None or (beside.family, beside.options) != (config.family, config.options):
        return config
    return replace(config, critic="split", critic_width=beside.width)


def lay(policy: Policy, state: Mapping[str, Tensor], names: Mapping[str, str], task: str, what: str) -> None:
    """Copies weights and biases into the policy's layers, `names` from its own name of a layer to theirs. A critic that
    is not among them says 0.

    Raises:
        InputError: a layer is missing or has another shape, or the policy's answers are not finite.
    """
    layers = dict(policy.named_modules())
    with torch.no_grad():
        for ours, theirs in names.items():
            for part in ("weight", "bias"):
                given, target = state.get(f"{theirs}.{part}"), getattr(layers[ours], part)
                if given is None:
                    raise InputError(f"{what} has no {theirs}.{part}")
                if given.shape != target.shape:
                    both = given.dim() == target.dim() == 2 and len(given) == len(target)
                    if both and not given.shape[1] % target.shape[1]:
                        times = given.shape[1] // target.shape[1]
                        task += f" (FrameStackObservation(env, {times}, padding_type='zero') would show as many)"
                    raise InputError(
                        f"{theirs}.{part} is {tuple(given.shape)}; for observations {policy.observation_shape} of"
                        f" {task} and the {policy.family} family it would be {tuple(target.shape)}"
                    )
                target.copy_(given)
        if "critic" not in names:
            policy.critic.weight.zero_()
            policy.critic.bias.zero_()
        if not policy(torch.zeros(1, *policy.observation_shape))[0].isfinite().all():
            raise InputError(f"{what} holds weights so large that what the policy answers is not finite")


def half_ranges(envs: Envs) -> tuple[Tensor, Tensor]:
    """Centre and half the range of each continuous action, float64."""
    assert envs.bounds is not None
    low, high = (torch.from_numpy(bound).double() for bound in envs.bounds)
    return (low + high) / 2, (high - low) / 2


@torch.no_grad()
def in_half_ranges(policy: Policy, envs: Envs, squash: float | None) -> Tensor:
    """Means in the environment's units become those of half the range; those that go through tanh, and then not beyond
    `squash`, have that unit. Returns what deviations are divided by, (d,) float64."""
    centre, half = half_ranges(envs)
    if squash is not None:
        policy.squash = torch.tensor(squash)
        return torch.ones_like(half)
    policy.actor.weight.copy_(policy.actor.weight.double() / half[:, None])
    policy.actor.bias.copy_((policy.actor.bias.double() - centre) / half)
    return half


@torch.no_grad()
def sharpen(policy: Policy, temperature: float) -> None:
    """Q-values, as the actor gives them, become logits, and their mean the value."""
    policy.critic.weight.copy_(policy.actor.weight.mean(0, keepdim=True))
    policy.critic.bias.copy_(policy.actor.bias.mean(0, keepdim=True))
    policy.actor.weight.div_(temperature)
    policy.actor.bias.div_(temperature)
    if not all(parameter.isfinite().all() for parameter in policy.actor.parameters()):
        raise InputError(f"a temperature of {temperature} is too low: the logits are not finite")


@torch.no_grad()
def observe(policy: Policy, env: EnvConfig) -> None:
    """Plays `WATCHED` greedy steps of a policy that normalises no numbers, to tell its students by what they should.

    They learn little from numbers far from 1, such as MountainCar's velocity, which is 0.07 at most. What does not
    change there is left alone.
    """
    raw = bool((policy.scale == 1).all()) and not policy.mean.any() and policy.clip == math.inf
    if not raw or policy.layout != "flat" or not policy.dtype.startswith("float"):
        return
    with closing(Envs(env, 1)) as envs:
        greedy = policy.distribution.greedy
        play = collect(envs, Preparer(policy), envs.reset(0), lambda inputs: greedy(policy.logits(inputs)))
        seen = np.concatenate(
            [transition.observations.copy() for _, transition in zip(range(WATCHED), play, strict=False)]
        )
    mean, deviation = (torch.as_tensor(each(seen.astype(np.float64), 0)) for each in (np.mean, np.std))
    still = deviation < 1e-6
    policy.seen_mean = mean.masked_fill(still, 0.0).to(policy.mean.dtype)
    policy.seen_deviation = deviation.masked_fill(still, 1.0).float()


def random_play(env: EnvConfig) -> Array:
    """Observations of 150 random steps, (151, *observation shape)."""
    with closing(Envs(env, 1)) as envs:
        return envs.random_play(150)


def save_import(loaded: LoadedPolicy, out: Path) -> None:
    """Saves a policy of others as one of ours, `policy.safetensors` in a new directory `out`.

    Raises:
        InputError: `out` exists, or cannot be written, or no family of ours has such a network: nothing is left there.
    """
    with new_folder(out) as folder:
        write_import(loaded, folder)


def write_import(loaded: LoadedPolicy, folder: Path) -> None:
    """As `save_import`, into a folder that is there."""
    if loaded.policy.sees_raw:
        raise InputError(
            f"{loaded.path} is no network of potstill's families ({loaded.document['provenance']['algorithm']}): it"
            " plays and teaches as the zip it is; distil it"
        )
    probe = random_play(loaded.env)[::10]
    save_policy(folder / "policy.safetensors", loaded.policy, loaded.env, probe, loaded.document["provenance"])
