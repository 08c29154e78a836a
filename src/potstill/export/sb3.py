"""A policy as a Stable-Baselines3 zip, which `PPO.load` opens: its owner goes on in his own stack."""

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from potstill.errors import InputError
from potstill.export.actor import Actor, actor, layers, verify
from potstill.policies import LoadedPolicy
from potstill.storage import checkpoints


class _Task(gymnasium.Env[Any, Any]):
    """Nothing but the spaces of a task, which is all that SB3 builds a network from."""

    def __init__(self, observation_space: Any, action_space: Any) -> None:
        self.observation_space, self.action_space = observation_space, action_space


def export(loaded: LoadedPolicy, out: Path, threads: int = 1) -> dict[str, Any]:
    """Writes a PPO zip with `MlpPolicy` to `out`, after SB3 has computed from it what PyTorch does here.

    SB3 normalises nothing but images by 255, so the normalisation goes into the first layer of actor and critic. The
    optimizer starts anew.

    Args:
        loaded: on the CPU.
        out: .zip; must not exist.

    Returns:
        `observations` compared, the `max_difference` of their logits, or of their means in units of half the range,
        how many were `tied`; `models`, with the `path` and `bytes` of `float32`. JSON-ready.

    Raises:
        InputError: SB3 is missing, the file exists or cannot be written, the network is not one that MlpPolicy builds,
            the policy uses only some of its task's actions, or SB3 computes something else. No file is left then.
    """
    if out.suffix != ".zip":
        raise InputError(f"{out}: Stable-Baselines3 files are written as .zip")
    if out.exists():
        raise InputError(f"{out} exists: choose another --out")
    try:
        from stable_baselines3 import PPO
    except ImportError as error:
        raise InputError(f"export needs {error.name}: pip install 'potstill[sb3]'") from error
    deployed = actor(loaded, threads)
    deployed.check_listed()
    policy, discrete = deployed.policy, isinstance(deployed.action_space, gymnasium.spaces.Discrete)
    chains = {"pi": _linears(deployed, layers(policy)), "vf": _linears(deployed, layers(policy, critic=True))}
    if discrete and deployed.actions != list(range(int(deployed.action_space.n))):
        raise InputError(f"the policy uses the actions {deployed.actions} of its task alone: SB3 would use all")
    (activation,) = {type(layer) for layer in deployed.layers if not isinstance(layer, nn.Linear | nn.Flatten)}
    sizes = {name: [len(bias) for _, bias in chain[:-1]] for name, chain in chains.items()}
    # a critic in units of reward, a Gaussian in those of the environment
    chains["vf"][-1] = tuple(each * policy.return_scale.double() for each in chains["vf"][-1])
    if policy.log_std is not None:
        centre, half = (torch.from_numpy(each).double() for each in deployed.units)
        weight, bias = chains["pi"][-1]
        chains["pi"][-1] = weight * half[:, None], bias * half + centre
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SB3 has advice on spaces and devices
        task = _Task(deployed.observation_space, deployed.action_space)
        model = PPO("MlpPolicy", task, policy_kwargs={"net_arch": sizes, "activation_fn": activation}, device="cpu")
    theirs = model.policy
    with torch.no_grad():
        for chain, net, head in (
            (chains["pi"], theirs.mlp_extractor.policy_net, theirs.action_net),
            (chains["vf"], theirs.mlp_extractor.value_net, theirs.value_net),
        ):
            modules = [layer for layer in (*net, head) if isinstance(layer, nn.Linear)]
            for module, (weight, bias) in zip(modules, chain, strict=True):
                module.weight.copy_(weight)
                module.bias.copy_(bias)
        if policy.log_std is not None:
            theirs.log_std.copy_(policy.log_std + half.log())
    with TemporaryDirectory() as folder:
        file = Path(folder, "policy.zip")
        model.save(file)
        opened = PPO.load(file, device="cpu")
        data = file.read_bytes()
    difference, tied = _check(deployed, opened)
    checkpoints.write_atomically(out, data)
    return {
        "env": loaded.env.id,
        "observations": len(deployed.observations),
        "max_difference": difference,
        "tied": tied,
        "models": {"float32": {"path": str(out), "bytes": len(data)}},
        "left_out": {},
    }


def _linears(deployed: Actor, chain: list[nn.Module]) -> list[Any]:
    """Weights and biases of a stack of linear layers in float64, the normalisation of inputs inside the first."""
    linears = [layer for layer in chain if isinstance(layer, nn.Linear)]
    others = {type(layer) for layer in chain if not isinstance(layer, nn.Linear | nn.Flatten)}
    policy = deployed.policy
    if len(others) != 1 or others & {nn.Conv2d} or policy.clip < float("inf") or policy.squash is not None:
        raise InputError(
            "SB3's zip is written of linear layers: SB3 knows neither these convolutions nor a clipped normalisation,"
            " and its PPO does not squash its means"
        )
    found: list[tuple[Tensor, Tensor]] = [(each.weight.double(), each.bias.double()) for each in linears]
    weight = found[0][0] * policy.scale.double().flatten()
    found[0] = weight, found[0][1] - weight @ policy.mean.double().flatten()
    return found


@torch.no_grad()
def _check(deployed: Actor, model: Any) -> tuple[float, int]:
    """Holds what SB3 computes and predicts against PyTorch, as `verify` says."""
    actions, _ = model.predict(deployed.observations, deterministic=True)
    shown, _ = model.policy.obs_to_tensor(deployed.observations)
    outputs = model.policy.action_net(model.policy.mlp_extractor.forward_actor(model.policy.extract_features(shown)))
    numbers: Any = outputs.numpy()
    if deployed.bounds is not None:
        centre, half = deployed.units
        numbers = (numbers - centre) / half
    else:
        actions = actions - int(deployed.action_space.start)
    return verify(deployed, np.asarray(numbers), actions, "Stable-Baselines3")
