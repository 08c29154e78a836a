"""A policy as a Stable-Baselines3 zip, which `PPO.load` opens: its owner goes on in his own stack."""

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from potstill.envs import Array
from potstill.errors import InputError
from potstill.export.actor import Actor, Exported, Versions, layers, verify


class _Task(gymnasium.Env[Any, Any]):
    """Nothing but the spaces of a task, which is all that SB3 builds a network from."""

    def __init__(self, observation_space: Any, action_space: Any) -> None:
        self.observation_space, self.action_space = observation_space, action_space


def versions(deployed: Actor, paths: Mapping[str, Path]) -> Versions:
    """A PPO zip with `MlpPolicy` or `CnnPolicy`, after SB3 has computed from it what PyTorch does here.

    SB3 normalises nothing but images by 255, so the normalisation goes into the first layer of actor and critic. Its
    convolutions have 32, 64 and 64 channels: those that a narrower network lacks are zeros. The optimizer starts anew.

    Raises:
        InputError: the network is not one that SB3 builds, the policy uses only some of its task's actions, or SB3
            computes something else.
    """
    from stable_baselines3 import PPO

    deployed.check_listed()
    if deployed.policy.remembers:
        raise InputError("Stable-Baselines3's PPO has no memory: export to .onnx or .c")
    if not deployed.policy.observation_shape:
        raise InputError("Stable-Baselines3's PPO reads no single number: export to .onnx or .c")
    policy, discrete = deployed.policy, isinstance(deployed.action_space, gymnasium.spaces.Discrete)
    chains = {"pi": _weights(deployed, layers(policy)), "vf": _weights(deployed, layers(policy, critic=True))}
    if discrete and deployed.actions != list(range(int(deployed.action_space.n))):
        raise InputError(f"the policy uses the actions {deployed.actions}: SB3 would use all of its task's, from 0 on")
    # a critic in units of reward, a Gaussian in those of the environment
    chains["vf"][-1] = tuple(each * policy.return_scale.double() for each in chains["vf"][-1])
    if policy.log_std is not None:
        centre, half = (torch.from_numpy(each).double() for each in deployed.units)
        weight, bias = chains["pi"][-1]
        chains["pi"][-1] = weight * half[:, None], bias * half + centre
    images = chains["pi"][0][0].dim() == 4
    if images:
        kind, features = "CnnPolicy", max(len(chain[-2][1]) for chain in chains.values())
        options: dict[str, Any] = {"features_extractor_kwargs": {"features_dim": features}, "net_arch": []}
        options |= {"share_features_extractor": policy.critic_trunk is None}
    else:
        kind = "MlpPolicy"
        options = {"net_arch": {name: [len(bias) for _, bias in chain[:-1]] for name, chain in chains.items()}}
        options |= {"activation_fn": next(iter(_activations(deployed.layers)), nn.Tanh)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SB3 has advice on spaces and devices
        task = _Task(deployed.observation_space, deployed.action_space)
        model = PPO(kind, task, policy_kwargs=options, device="cpu")
    theirs = model.policy
    for name, head in (("pi", theirs.action_net), ("vf", theirs.value_net)):
        if images:
            net = (
                theirs.features_extractor
                if policy.critic_trunk is None
                else getattr(theirs, f"{name}_features_extractor")
            )
        else:
            net = theirs.mlp_extractor.policy_net if name == "pi" else theirs.mlp_extractor.value_net
        modules = [layer for layer in (*net.modules(), head) if isinstance(layer, nn.Linear | nn.Conv2d)]
        _put(modules, chains[name])
    if policy.log_std is not None:
        theirs.log_std.data.copy_(policy.log_std + half.log())
    with TemporaryDirectory() as folder:
        file = Path(folder, "policy.zip")
        model.save(file)
        opened = PPO.load(file, device="cpu")
        data = file.read_bytes()
    seen = deployed.observations
    actions, _ = opened.predict(seen, deterministic=True)
    difference, tied = verify(deployed, _outputs(deployed, opened, seen), np.asarray(actions), "Stable-Baselines3")
    (path,) = paths.values()
    playing = Exported(deployed, partial(_outputs, deployed, opened))
    contents = {"float32": lambda _: {path: data}}
    return Versions(deployed, difference, tied, {"float32": playing}, {"float32": {"bytes": len(data)}}, contents)


def _activations(chain: list[nn.Module]) -> set[type[nn.Module]]:
    return {type(layer) for layer in chain if not isinstance(layer, nn.Linear | nn.Conv2d | nn.Flatten)}


def _within(space: gymnasium.Space[Any], mean: Tensor, scale: Tensor, clip: float) -> bool:
    """Whether no observation of the space is clipped."""
    if not isinstance(space, gymnasium.spaces.Box):
        return False
    edges = torch.from_numpy(np.stack([space.low, space.high])).double().flatten(1)
    return bool((((edges - mean) * scale).abs() <= clip).all())


def _weights(deployed: Actor, chain: list[nn.Module]) -> list[Any]:
    """Weights and biases of a stack of layers in float64, the normalisation of inputs inside the first.

    Raises:
        InputError: it cannot go there, or SB3 has no such layers.
    """
    policy, convs = deployed.policy, [layer for layer in chain if isinstance(layer, nn.Conv2d)]
    parts: list[Any] = [each for each in chain if isinstance(each, nn.Linear | nn.Conv2d)]
    found = [(each.weight.double(), each.bias.double()) for each in parts]
    mean, scale = policy.mean.double(), policy.scale.double()
    misfit = None
    if convs:  # one number for every pixel, and no pixel is clipped
        shapes = [(conv.kernel_size, conv.stride, conv.padding) for conv in convs]
        fits = len(convs) == 3 and shapes == [((n, n), (m, m), (0, 0)) for n, m in ((8, 4), (4, 2), (3, 1))]
        fits = fits and len(policy.observation_shape) == 3
        if not fits or any(conv.out_channels > most for conv, most in zip(convs, (32, 64, 64), strict=True)):
            misfit = "its convolutions are not those of the Nature-CNN"
        reach = (torch.tensor([0.0, 255.0]) - mean.flatten()[0]) * scale.flatten()[0]
        if not (len(mean.unique()) == len(scale.unique()) == 1 and bool((reach.abs() <= policy.clip).all())):
            misfit = "its normalisation is clipped or another for each pixel"
        mean, scale = mean.flatten()[:1] / 255, scale.flatten()[:1] * 255
    else:
        mean, scale = mean.flatten(), scale.flatten()
        clips = policy.clip < float("inf") and not policy.view
        if clips and not _within(deployed.observation_space, mean, scale, policy.clip):
            misfit = f"its normalisation is clipped at {policy.clip:g}, which SB3 does outside of a zip"
    if policy.view:
        misfit = "it has a view"
    if policy.squash is not None:
        misfit = "its means are squashed, as PPO's are not"
    elif len(_activations(chain)) > 1:
        misfit = "its layers have several activations"
    if misfit is not None:
        raise InputError(f"a zip for SB3's PPO cannot hold this policy: {misfit}. Export to .onnx or .c")
    weight, bias = found[0]
    if convs:
        found[0] = weight * scale, bias - (weight * scale * mean).sum((1, 2, 3))
    else:
        found[0] = weight * scale, bias - (weight * scale) @ mean
    return found


@torch.no_grad()
def _put(modules: list[Any], chain: list[Any]) -> None:
    """Gives SB3's layers these weights; what they have more of becomes zero. A shared critic brings its head alone."""
    before, mine = None, None  # channels of the layer before, SB3's and ours
    for module, (weight, bias) in zip(modules[-len(chain) :], chain, strict=True):
        module.weight.zero_()
        module.bias.zero_()
        room, given = module.weight, weight
        if before is not None and before != mine and weight.dim() == 2:  # each channel was flattened to many numbers
            room, given = room.view(len(room), before, -1), given.view(len(given), mine, -1)
        room[tuple(slice(n) for n in given.shape)] = given.to(room.dtype)
        module.bias[: len(bias)] = bias.to(room.dtype)
        before, mine = len(module.bias), len(bias)


@torch.no_grad()
def _outputs(deployed: Actor, model: Any, observations: Array) -> Array:
    """What SB3's actor computes: logits, or means in units of half the range."""
    shown, _ = model.policy.obs_to_tensor(observations)
    features = model.policy.extract_features(shown)
    features = features[0] if isinstance(features, tuple) else features  # where the critic has its own
    outputs: Array = model.policy.action_net(model.policy.mlp_extractor.forward_actor(features)).numpy()
    if deployed.bounds is None:
        return outputs
    centre, half = deployed.units
    return (outputs - centre) / half
