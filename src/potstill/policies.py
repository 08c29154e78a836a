"""A policy on disk: weights, normalisation, task and a probe that proves they still compute the same."""

from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from potstill.configs import fits
from potstill.envs import Array, EnvConfig
from potstill.errors import InputError
from potstill.imports import find, remember_makers
from potstill.networks import OPTIONAL, Layout, NetworkConfig, Policy
from potstill.storage.checkpoints import load, save, verify_probe
from potstill.storage.runs import read_document

MAX_PROBES = 256  # observations: a policy's activations take many times their memory
T = TypeVar("T")


@dataclass
class LoadedPolicy:
    """A policy, the task it was trained on, and what its checkpoint tells of its origin."""

    policy: Policy
    env: EnvConfig
    document: dict[str, Any]
    path: Path
    statistics: Path | None = None
    """The file that its normalisation was read from, where it is not `path`."""

    @property
    def alone(self) -> bool:
        """Whether it was trained in one environment, as on a simulator of which only one can run: so it is played."""
        provenance = self.document.get("provenance")
        return isinstance(provenance, dict) and provenance.get("num_envs") == 1

    @cached_property
    def hash(self) -> str:
        """The first 12 hexadecimal digits of its file's SHA-256, by which runs know their teacher again."""
        files = [self.path] + ([self.statistics] if self.statistics is not None else [])
        return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


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
    if env.view != policy.view:
        raise ValueError(f"the policy sees {policy.view}, its task is seen as {env.view}")
    document = {
        "kind": "policy",
        "network": asdict(policy.config),
        **{key: value for key, value in policy.spaces.items() if key != "view"},  # the task's
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
        reasons = {"card.json": ": compress found no student", "config.json": ": the run is not finished"}
        why = next((why for name, why in reasons.items() if (path / name).exists()), "")
        if not why and (zips := sorted(path.glob("*.zip"))):
            why = f": name the zip in it, {zips[0]}"
        raise InputError(f"{path} holds no policy.safetensors{why}")
    tensors, document = load(file, device, follow=True)  # the user names it, as a link of the Hub's cache may be
    if document.get("kind") != "policy":
        raise InputError(f"{file} is a potstill checkpoint but not a policy: name the run directory instead")
    network = document.get("network")
    if isinstance(network, dict) and ":" in str(family := network.get("family")):
        find(str(family), "--network")  # told as it is: the file is whole
    try:
        env = rebuild(EnvConfig, document["env"])
        if not env.id.isprintable():
            raise ValueError(f"a task is called {env.id!r}")
        policy = _empty(document, tensors, env.view).to(device)
        policy.load_state_dict({k.removeprefix("policy."): v for k, v in tensors.items() if k.startswith("policy.")})
        policy.eval()
        expected, actual = tensors["probe.logits"], _logits(policy, tensors["probe.observations"])
    except (InputError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{file} does not hold the policy its own description speaks of: {error}") from error
    verify_probe(expected, actual, device, file)
    provenance = document.get("provenance")
    remember_makers(env.id, provenance.get("imports") if isinstance(provenance, dict) else None)
    return LoadedPolicy(policy, env, document, file)


def _empty(document: dict[str, Any], tensors: dict[str, Tensor], view: tuple[str, ...]) -> Policy:
    """The policy that a checkpoint describes, before it has its weights.

    What is described is compared with the tensors that are there before memory is taken for it: a file of a few bytes
    may describe a network of terabytes.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: the description is not one, or not of these tensors.
    """
    network = rebuild(NetworkConfig, document["network"])
    shape, actions = document["observation_shape"], document["num_actions"]
    several = actions if isinstance(actions, list) and actions else [actions]
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in [*shape, *several]):
        raise ValueError(f"observations of shape {shape}, {actions} actions")
    # The oldest know of none of these.
    continuous, layout, dtype = document.get("continuous", False), document.get("layout"), document.get("dtype", "")
    axes = {"last": (3,), "first": (2, 3), "stack": (2, 3)}.get(str(layout), (len(shape),))
    known = type(continuous) is bool and isinstance(dtype, str) and layout in (None, *get_args(Layout))
    if not known or len(shape) not in axes or (continuous and isinstance(actions, list)):
        raise ValueError(
            f"continuous is {continuous!r}, layout {layout!r} of {shape}, dtype {dtype!r}, actions {actions}"
        )
    spaces = tuple(shape), tuple(actions) if isinstance(actions, list) else actions, continuous, layout, dtype, view

    probe = tensors["probe.observations"]  # before what views of such a shape would take
    if tuple(probe.shape[1:]) != tuple(shape) or not 0 < len(probe) <= MAX_PROBES:
        raise ValueError(f"it is proved by 1 to {MAX_PROBES} observations of {tuple(shape)}, not {tuple(probe.shape)}")

    def empty() -> Policy:
        policy = Policy(network, *spaces)
        like = {"seen_mean": policy.mean, "seen_deviation": policy.scale}
        for name in OPTIONAL:
            if f"policy.{name}" in tensors:
                setattr(policy, name, torch.ones_like(like[name]) if name in like else torch.ones(()))
        return policy

    with torch.device("meta"):  # shapes alone
        outline = empty()
    described = {f"policy.{name}": tensor for name, tensor in outline.state_dict().items()}
    for name in described.keys() | {name for name in tensors if name.startswith("policy.")}:
        wanted, given = described.get(name), tensors.get(name)
        if given is None or wanted is None:
            raise ValueError(f"{name} is {'missing' if given is None else 'not of this network'}")
        if (given.shape, given.dtype) != (wanted.shape, wanted.dtype):
            was, should = (f"{tuple(each.shape)} {each.dtype}" for each in (given, wanted))
            raise ValueError(f"{name} has a size mismatch: it is {was}, and should be {should}")
    if tensors["probe.logits"].dtype != torch.float32:
        raise ValueError(f"probe.logits are {tensors['probe.logits'].dtype}")
    return empty()


def recorded_result(loaded: LoadedPolicy) -> dict[str, Any] | None:
    """The evaluation in the result.json beside a policy; None where there is none, or a damaged one.

    Raises:
        InputError: it is of another policy.

    Its `score` is a number, and so are `ci95` (two), `point_win_rate` and `episodes` where they are not None.
    """
    result = loaded.path.with_name("result.json")
    if loaded.path.name != "policy.safetensors" or not result.exists():
        return None
    try:
        record = {"ci95": None, "point_win_rate": None, "episodes": None} | read_document(result)
    except InputError:
        return None
    if record.get("policy_hash", loaded.hash) != loaded.hash:  # the first results did not say
        raise InputError(f"{result} is of another policy than {loaded.path}: put back the one that was changed")
    interval = record["ci95"] if record["ci95"] is not None else [0, 0]
    if not isinstance(interval, list) or len(interval) != 2:
        return None
    optional = [record[key] for key in ("point_win_rate", "episodes") if record[key] is not None]
    return record if all(type(x) in (int, float) for x in (record.get("score"), *interval, *optional)) else None


def rebuild(cls: type[T], data: Any) -> T:
    """A frozen config from the dictionary that `asdict` and JSON made of it, nested configs and tuples included.

    Raises:
        InputError: a field this version does not know, one it misses, or one of another type.
    """
    hints = get_type_hints(cls)
    if not isinstance(data, dict):
        raise InputError(f"{cls.__name__} cannot be read: {data!r} is no object")
    data = getattr(cls, "migrated", dict)(data)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise InputError(f"{cls.__name__} has no field {unknown[0]!r}: was it written by a newer potstill?")
    values: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name not in data:
            continue
        value, hint = data[field.name], hints[field.name]
        if is_dataclass(hint):
            value = rebuild(hint, value)  # type: ignore[arg-type]
        elif isinstance(value, list):
            value = tuple(value)
        if not is_dataclass(hint) and not fits(value, hint):
            raise InputError(f"{cls.__name__} cannot be read: {field.name} is {data[field.name]!r}")
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
