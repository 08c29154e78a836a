"""A policy on disk: weights, normalisation, task and a probe that proves they still compute the same."""

from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from potstill.checkpoints import load, save, verify_probe
from potstill.envs import Array, EnvConfig
from potstill.errors import InputError
from potstill.networks import NetworkConfig, Policy
from potstill.runs import read_json

T = TypeVar("T")


@dataclass
class LoadedPolicy:
    """A policy, the task it was trained on, and what its checkpoint tells of its origin."""

    policy: Policy
    env: EnvConfig
    document: dict[str, Any]
    path: Path


def save_policy(path: Path, policy: Policy, env: EnvConfig, probe: Array, provenance: dict[str, Any]) -> None:
    """Writes one file that `load_policy` reads.

    Args:
        probe: raw observations (B, *observation shape) whose logits are stored and compared on every load.
        provenance: where the policy comes from, strict JSON.
    """
    observations = torch.from_numpy(probe)
    tensors = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()}
    tensors |= {"probe.observations": observations.to(torch.uint8) if probe.dtype == bool else observations}
    tensors |= {"probe.logits": _logits(policy, observations)}
    document = {
        "kind": "policy",
        "network": asdict(policy.config),
        "observation_shape": list(policy.observation_shape),
        "num_actions": policy.num_actions,
        "continuous": policy.continuous,
        "env": asdict(env),
        "provenance": provenance,
    }
    save(path, tensors, document)


def load_policy(path: Path, device: str = "cpu") -> LoadedPolicy:
    """Reads a run directory, an expert directory or a checkpoint, and checks the probe on `device`.

    Raises:
        InputError: no policy there, or not a whole one.
        ProbeMismatch: the policy computes other logits on this device than where it was saved.
    """
    path = Path(path)
    file = path / "policy.safetensors" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        unfinished = (path / "config.json").exists()
        raise InputError(f"{path} holds no policy.safetensors" + (": the run is not finished" if unfinished else ""))
    tensors, document = load(file, device)
    if document.get("kind") != "policy":
        raise InputError(f"{file} is a potstill checkpoint but not a policy: name the run directory instead")
    try:
        env = rebuild(EnvConfig, document["env"])
        network = rebuild(NetworkConfig, document["network"])
        shape, actions = tuple(document["observation_shape"]), int(document["num_actions"])
        policy = Policy(network, shape, actions, document.get("continuous", False)).to(device)  # unknown to the oldest
        weights = {k.removeprefix("policy."): v for k, v in tensors.items() if k.startswith("policy.")}
        policy.load_state_dict(weights)
        policy.eval()
        expected, actual = tensors["probe.logits"], _logits(policy, tensors["probe.observations"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{file} does not hold the policy its own description speaks of: {why}") from error
    verify_probe(expected, actual, device, file)
    return LoadedPolicy(policy, env, document, file)


def recorded_result(loaded: LoadedPolicy) -> dict[str, Any] | None:
    """The evaluation in the result.json beside a policy; None where there is none, or one that cannot be read."""
    result = loaded.path.with_name("result.json")
    if loaded.path.name != "policy.safetensors" or not result.exists():
        return None
    try:
        record = read_json(result)
    except InputError:
        return None
    return record if "score" in record else None


def rebuild(cls: type[T], data: dict[str, Any]) -> T:
    """A frozen config from the dictionary that `asdict` and JSON made of it, nested configs and tuples included.

    Raises:
        InputError: a field this version does not know, or one it misses.
    """
    hints = get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise InputError(f"{cls.__name__} has no field {unknown[0]!r}: was it written by a newer potstill?")
    values: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name not in data:
            continue
        value, hint = data[field.name], hints[field.name]
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if is_dataclass(hint) and isinstance(value, dict):
            value = rebuild(hint, value)  # type: ignore[arg-type]
        elif isinstance(value, list) and any(get_origin(option) is tuple for option in options):
            value = tuple(value)
        values[field.name] = value
    try:
        return cls(**values)
    except TypeError as error:
        raise InputError(f"{cls.__name__} cannot be read: {error}") from error


@torch.no_grad()
def _logits(policy: Policy, observations: Tensor) -> Tensor:
    """In full float32, without autocast or TF32, so that devices can be held against each other."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        logits, _ = policy(observations.to(policy.mean.device))
    return logits.cpu()  # type: ignore[no-any-return]  # a Module's call is untyped
