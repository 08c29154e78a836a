"""State dicts in: those of CleanRL's files, which their names tell apart, and others whose network the user names.

Source: CleanRL's ppo, ppo_continuous_action, ppo_atari, dqn, dqn_atari, sac_continuous_action, sac_atari, td3 and ddpg
(vwxyzjn/cleanrl). They divide pixels by 255, squash SAC's and TD3's means by tanh, and leave those of PPO in the
environment's units.
"""

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from potstill.envs import EnvConfig, Envs
from potstill.errors import InputError
from potstill.load import weights
from potstill.load.weights import DETERMINISTIC, Q_TEMPERATURE
from potstill.networks import NetworkConfig, Policy
from potstill.policies import LoadedPolicy
from potstill.storage.files import read_bytes

SUFFIXES = (".cleanrl_model", ".pt", ".pth")
MAX_BYTES = 1 << 28


class _Found(NamedTuple):
    """Where the actor lies in a state dict, by the names of its layers."""

    algorithm: str
    hidden: list[str]
    head: str
    activation: str = "relu"
    critic: tuple[str, ...] = ()  # hidden layers of its own
    value: str = ""
    squashed: bool = False
    aside: tuple[str, ...] = ()  # beginnings of names that a deployed actor does without


def load_weights(
    path: Path,
    env: EnvConfig,
    device: str = "cpu",
    network: NetworkConfig | None = None,
    statistics: Path | None = None,
) -> LoadedPolicy:
    """A state dict as a policy of ours: logits as they are, Q-values / 0.01, means in units of half the range.

    Args:
        path: what `torch.save` wrote. It is read as data.
        network: of one that is not CleanRL's: a family, with mlp's `activation`; its layers are those of the file, in
            their order, without those whose names speak of a critic, a value or a target. Or `module:name`, a network
            as `NetworkConfig` has it whose features are the logits or the means: the state dict is that module's.
        statistics: Path("none") says that nothing normalised the observations of CleanRL's ppo_continuous_action, whose
            wrapper does and does not save by what.

    Raises:
        InputError: a pickle where tensors belong, a damaged file; layers that no network here has, or of another task.
    """
    if statistics not in (None, Path("none")):
        raise InputError(f"--statistics of {path}, a state dict, are none: VecNormalize's belong to a zip")
    content = read_bytes(path, MAX_BYTES, follow=True)
    envs = Envs(env, 1)
    envs.close()  # its shapes are all that is needed
    try:
        state = weights.read_tensors(content, path.name)
        weights.check_finite(state, path.name)
        algorithm = "state dict"
        if network is not None and ":" in network.family:
            policy = _own(state, network, envs, path.name)
        else:
            found = _found(state) if network is None else _plain(state, network)
            if found.algorithm == "PPO" and "actor_logstd" in state and statistics is None:
                raise InputError(
                    "CleanRL's ppo_continuous_action normalises observations and does not save by what: if yours did"
                    " not, settle it with --statistics none"
                )
            policy, algorithm = _laid(state, found, envs, path.name), found.algorithm
        weights.observe(policy, env)
    except InputError as error:
        raise InputError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
    source = "cleanrl" if network is None else "state dict"
    provenance = {"source": source, "file": path.name, "sha256": sha256(content).hexdigest(), "algorithm": algorithm}
    document = {"kind": "policy", "provenance": provenance}
    return LoadedPolicy(policy.to(device).eval(), env, document, path)


def _found(state: Mapping[str, Tensor]) -> _Found:
    """Which of CleanRL's files wrote it."""
    critic = weights.chain(state, "critic")
    own = {"critic": tuple(critic[:-1]), "value": critic[-1]} if critic else {}
    for prefix in ("actor", "actor_mean"):
        if layers := weights.chain(state, prefix):
            return _Found("PPO", layers[:-1], layers[-1], "tanh", aside=("actor_logstd",), **own)  # type: ignore[arg-type]
    if (layers := weights.chain(state, "network")) and "actor.weight" in state:
        return _Found("PPO", layers, "actor", value="critic")
    if layers:
        return _Found("DQN", layers[:-1], layers[-1])
    hidden = [*weights.chain(state, "conv"), *(name for name in ("fc1", "fc2") if f"{name}.weight" in state)]
    for head, algorithm in (("fc_mean", "SAC"), ("fc_mu", "TD3"), ("fc_logits", "SAC")):
        if f"{head}.weight" in state:
            aside = ("fc_logstd.", "action_scale", "action_bias")
            return _Found(algorithm, hidden, head, squashed=head != "fc_logits", aside=aside)
    raise InputError(f"it is none of CleanRL's files (it has {min(state)}): potstill import-weights --network names it")


def _plain(state: Mapping[str, Tensor], network: NetworkConfig) -> _Found:
    options = dict(option.partition("=")[::2] for option in network.options)
    other = [name for name in state if re.search(r"critic|value|vf|target|qf", name, re.IGNORECASE)]
    layers = [name.removesuffix(".weight") for name in state if name.endswith(".weight") and name not in other]
    if not layers:
        raise InputError("it holds no layer: names that end in .weight")
    aside = (*other, *(name for name in state if "log_std" in name or "logstd" in name))
    return _Found("state dict", layers[:-1], layers[-1], options.get("activation", "tanh"), aside=aside)


def _laid(state: dict[str, Tensor], found: _Found, envs: Envs, what: str) -> Policy:
    known = {f"{name}.{part}" for name in (*found.hidden, found.head, *found.critic) for part in ("weight", "bias")}
    known |= {f"{found.value}.weight", f"{found.value}.bias"}
    if unknown := [name for name in state if name not in known and not name.startswith(found.aside or ("\0",))]:
        raise InputError(f"{what} has {unknown[0]}, for which there is no place")
    own = [found.value] if found.value else []
    weights.check_layers(state, (*found.hidden, found.head, *found.critic, *own), what)
    convs = [name for name in found.hidden if state[f"{name}.weight"].dim() == 4]
    linears = [name for name in found.hidden if name not in convs]
    names = {f"trunk.convs.{number}": name for number, name in enumerate(convs)}
    names |= {f"trunk.linears.{number}": name for number, name in enumerate(linears)} | {"actor": found.head}
    if convs:
        width = Fraction(state[f"{convs[0]}.weight"].shape[0], 32)
        config = NetworkConfig(str(width), "nature")
        names |= {"critic": found.value} if found.value else {}
    else:
        config = weights.mlp_of(state, linears, found.activation, found.critic if found.value else None)
        if config.critic == "split":
            names |= {f"critic_trunk.linears.{number}": name for number, name in enumerate(found.critic)}
            names["critic"] = found.value
    actions = envs.num_actions if isinstance(envs.num_actions, int) else sum(envs.num_actions)
    outputs = len(state[f"{found.head}.weight"])
    if outputs != actions:
        raise InputError(f"its {outputs} outputs are not the {actions} of {envs.config.id}")
    # Without convolutions the numbers of an image are read as they come.
    plain = len(envs.observation_shape) > 1 and not convs
    policy = Policy(config, **envs.spaces | ({"layout": "flat"} if plain else {}))
    if policy.family == "nature":
        policy.scale.fill_(1 / 255)
    weights.lay(policy, state, names, envs.config.id, what)
    with torch.no_grad():
        if found.algorithm == "DQN":
            weights.sharpen(policy, Q_TEMPERATURE)
        if policy.log_std is not None:
            log_std = state.get("actor_logstd", torch.full((actions,), math.log(DETERMINISTIC)))
            for name, wanted in zip(("action_bias", "action_scale"), weights.half_ranges(envs), strict=True):
                theirs = state.get(name, wanted).flatten().double()
                if theirs.shape != wanted.shape or not torch.allclose(theirs, wanted, rtol=1e-5, atol=1e-6):
                    told = f"its {name} is {theirs.tolist()}, that of {envs.config.id} {wanted.tolist()}"
                    raise InputError(f"{told}: its actions have another range")
            _act_continuously(policy, envs, 1.0 if found.squashed else None, log_std)
    return policy


def _own(state: dict[str, Tensor], network: NetworkConfig, envs: Envs, what: str) -> Policy:
    """A network of the user's, whole, with an action head that hands its outputs on."""
    policy = Policy(network, **envs.spaces)
    policy.input_clip = torch.tensor(math.inf)  # it was given pixels as they are
    try:
        policy.trunk.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{what} does not fit --network {network.family}: {' '.join(str(error).split())}") from error
    if policy.actor.in_features != policy.actor.out_features:
        raise InputError(
            f"--network {network.family} gives {policy.actor.in_features} numbers; {envs.config.id} takes"
            f" {policy.actor.out_features}: a whole network is wanted"
        )
    with torch.no_grad():
        policy.actor.weight.copy_(torch.eye(policy.actor.in_features))
        for part in (policy.actor.bias, policy.critic.weight, policy.critic.bias):
            part.zero_()
        if policy.log_std is not None:
            _act_continuously(policy, envs, None, torch.full_like(policy.log_std, math.log(DETERMINISTIC)))
    return policy


def _act_continuously(policy: Policy, envs: Envs, squash: float | None, log_std: Tensor) -> None:
    """As `in_half_ranges`; deviations (1, d) are in the same units as the means, and those (d,) in half ranges."""
    assert policy.log_std is not None
    if log_std.numel() != len(policy.log_std):
        raise InputError(f"its {log_std.numel()} deviations are not those of {len(policy.log_std)} actions")
    half = weights.in_half_ranges(policy, envs, squash)
    policy.log_std.copy_(log_std.reshape(-1).double() - (half.log() if log_std.dim() > 1 else 0))
