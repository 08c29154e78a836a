"""Stable-Baselines3 policies in: a zip read as data, never as code, into a policy of ours that computes the same.

SB3's own loader unpickles members of the zip, which runs whatever they hold. Here the JSON member `data` is read for
names and shapes alone, its pickles are left as the text they are, and `policy.pth` is read by torch's `weights_only`
unpickler, which builds tensors and nothing else. stable-baselines3 itself is not needed.
"""

import math
import os
import re
import shutil
import struct
import zlib
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import torch
from torch import Tensor

from potstill.envs import Array, EnvConfig, Envs
from potstill.errors import InputError, reason
from potstill.load.statistics import Statistics, find_statistics, read_statistics
from potstill.networks import NetworkConfig, Policy
from potstill.policies import LoadedPolicy, save_policy
from potstill.storage.files import parse_json, read_bytes

#: Divides Q-values into logits. Rusu et al. 2015 distil a DQN's softmax(Q / 0.01): nearly greedy, as the DQN plays.
Q_TEMPERATURE = 0.01

MAX_BYTES = 1 << 30  # of the file, and of all its members unpacked: a width-1 Nature-CNN with Adam's state takes 20 MB
MAX_MEMBER_BYTES = 1 << 28
MAX_DATA_BYTES = 1 << 26
MAX_RECORDS = 4_096  # members, those of the .pth zips inside included: about four per tensor
MAX_RATIO = 100  # SB3 and torch store without compression

_DAMAGE = (BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, ValueError)
NO_STATISTICS = Path("none")
_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number in files of before 1.6
_TORCH_LAYERS = "stable_baselines3.common.torch_layers."
_KNOWN = {("features_extractor_class", _TORCH_LAYERS + name) for name in ("NatureCNN", "FlattenExtractor")}
_KNOWN |= {("normalize_images", "True"), ("sde_net_arch", "None")}
_ACTIVATIONS = {"Tanh": "tanh", "ReLU": "relu", "ELU": "elu", "LeakyReLU": "leaky_relu", "SiLU": "silu", "GELU": "gelu"}
#: policy_kwargs that the weights show anyway, that are read elsewhere, or that a trained policy does not use.
_HARMLESS = {"net_arch", "share_features_extractor", "features_extractor_kwargs", "optimizer_class", "optimizer_kwargs"}
_HARMLESS |= {
    "ortho_init",
    "log_std_init",
    "full_std",
    "use_expln",
    "use_sde",
    "clip_mean",
    "squash_output",
    "with_bias",
}
_HARMLESS |= {"n_critics", "n_quantiles", "device"}
DETERMINISTIC = 0.1  # deviation in half ranges of a policy that has none: the action noise of Fujimoto et al. 2018, TD3


class _Kind(NamedTuple):
    """Where the actor of one module's policies lies among its weights."""

    algorithm: str  # `_algorithm` tells apart those that share a module
    trunk: str  # prefix of the hidden layers, of the head too where that is the last of them
    head: str | None  # prefix of the action head
    extractor: str = ""  # prefix of the feature extractor
    aside: tuple[str, ...] = ()  # prefixes of what a deployed actor does without


_KINDS = {
    "stable_baselines3.common.policies": _Kind("PPO", "mlp_extractor.policy_net", "action_net"),
    "stable_baselines3.dqn.policies": _Kind("DQN", "q_net.q_net", None, "q_net.", ("q_net_target.",)),
    "stable_baselines3.sac.policies": _Kind("SAC", "actor.latent_pi", "actor.mu", "actor.", ("critic",)),
    "stable_baselines3.td3.policies": _Kind("TD3", "actor.mu", None, "actor.", ("actor_target.", "critic")),
    "sb3_contrib.qrdqn.policies": _Kind(
        "QRDQN", "quantile_net.quantile_net", None, "quantile_net.", ("quantile_net_target.",)
    ),
    "sb3_contrib.tqc.policies": _Kind("TQC", "actor.latent_pi", "actor.mu", "actor.", ("critic",)),
    "sb3_contrib.ars.policies": _Kind("ARS", "action_net", None),
}
_REFUSED = {
    "sb3_contrib.common.recurrent.policies": "RecurrentPPO is not read: its policy has a memory, potstill's have none",
    "sb3_contrib.common.maskable.policies": "MaskablePPO is not read: potstill's tasks give no masks of actions",
    "sb3_contrib.crossq.policies": "CrossQ is not read: its batch normalisation has no place in potstill's families",
}


def as_sb3(env: EnvConfig) -> EnvConfig:
    """`env` as SB3 makes it: an ALE game with all its actions, frame skip 4, 4 frames, 30 no-ops, FIRE, nothing sticky.

    Source: `AtariWrapper` and `make_atari_env` of stable-baselines3 2.9. The RL Zoo uses them for its Atari policies.
    """
    return EnvConfig(env.id, atari=True, fire_on_reset=True) if env.atari else env


def load_sb3(
    path: Path,
    env: EnvConfig,
    device: str = "cpu",
    temperature: float = Q_TEMPERATURE,
    statistics: Path | None = None,
) -> LoadedPolicy:
    """Reads a zip of PPO, A2C, TRPO, DQN, QRDQN, SAC, TQC, TD3, DDPG or ARS, without running anything in it.

    The logits are those of SB3's action distribution, or Q / `temperature`; of continuous actions, SB3's Gaussian in
    units of half their range, by which head and deviations are divided, or the squashed mean, which has that unit. The
    value is SB3's; of a DQN it is the mean of its Q-values: that of one uniformly random action and the greedy policy
    after it; of the others that have no critic of states it is zero.

    Deviations that depend on the state (SAC, TQC, gSDE) become their root mean square over 150 steps of random play,
    for ours do not; provenance says so. Those of a deterministic policy become 0.1 of half the range.

    Args:
        path: the zip; `LoadedPolicy.path` is the same.
        env: the task, as it is to be played; `as_sb3` makes it what SB3 trains on.
        temperature: of a DQN's logits. Its greedy play does not depend on it.
        statistics: VecNormalize's pickle; None takes the one beside the zip, `NO_STATISTICS` goes without.

    Raises:
        InputError: not a zip of SB3's, damaged, or too large; a policy our families cannot represent; a pickle where
            tensors belong; observations or actions that are not those of `env`; statistics that are missing.
    """
    path = Path(path)
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature must be positive and finite, not {temperature}")
    content = read_bytes(path, MAX_BYTES, follow=True)
    beside = find_statistics(path) if statistics is None else statistics
    normalised = None if beside is None or beside == NO_STATISTICS else read_statistics(beside)
    envs = Envs(env, 1)
    envs.close()  # its shapes are all that is needed
    try:
        archive = _unzip(content)
        data = _read_data(archive)
        kind, algorithm = _algorithm(data)
        betrayed = algorithm in ("PPO", "A2C", "TRPO", "ARS") and data.get("_last_original_obs") is not None
        if betrayed and beside is None:
            raise InputError(
                "it was trained with VecNormalize, whose statistics are part of the policy and do not lie beside it:"
                " settle it with --statistics FILE, or --statistics none if it normalised rewards only"
            )
        _check_actions(data, envs)
        policy, exact = _build(_read_state(archive), kind, algorithm, data, envs, temperature)
        if normalised is not None:
            _normalise(policy, normalised)
        sb3_version = None
        if (name := "_stable_baselines3_version") in archive.namelist():  # not in the oldest
            sb3_version = _read(archive, name, 100).decode(errors="replace").strip()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    steps = data.get("num_timesteps")
    provenance: dict[str, Any] = {
        "source": "stable-baselines3",
        "file": path.name,
        "sha256": sha256(content).hexdigest(),
        "algorithm": algorithm,
        "sb3_version": sb3_version,
        "env_steps": steps if type(steps) is int else None,
    }
    if normalised is not None:
        provenance["statistics"] = {"file": normalised.path.name, "sha256": normalised.sha256}
    if algorithm in ("DQN", "QRDQN"):
        provenance["temperature"] = temperature
    elif not exact:
        provenance["sampled"] = "only greedy play is SB3's: its deviations depend on the state, or it has none"
    document = {"kind": "policy", "provenance": provenance}
    return LoadedPolicy(policy.to(device).eval(), env, document, path, normalised.path if normalised else None)


def import_sb3(
    path: Path,
    env: EnvConfig,
    out: Path,
    temperature: float = Q_TEMPERATURE,
    statistics: Path | None = None,
) -> LoadedPolicy:
    """Reads a zip as `load_sb3` does and saves it as a policy of ours, `policy.safetensors` in a new directory `out`.

    Raises:
        InputError: as `load_sb3`; or `out` exists, or cannot be written: nothing is left there.
    """
    out = Path(out)
    loaded = load_sb3(path, env, temperature=temperature, statistics=statistics)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.mkdir()
    except OSError as error:
        if os.path.lexists(out):
            raise InputError(f"{out} exists: choose another --out") from error
        raise InputError(f"cannot make {out}: {reason(error)}; choose another --out") from error
    try:
        probe = _random_play(env)[::10]
        save_policy(out / "policy.safetensors", loaded.policy, env, probe, loaded.document["provenance"])
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return loaded


def _random_play(env: EnvConfig) -> Array:
    """Observations of 150 random steps, (151, *observation shape)."""
    with closing(Envs(env, 1)) as envs:
        random = envs.random_actions(np.random.default_rng(0), 150)
        return np.concatenate([envs.reset(0), *(envs.step(actions).observations for actions in random)])


def _unzip(content: bytes) -> ZipFile:
    """A zip in memory that is safe to read: flat names, few members, no bomb."""
    if content.count(b"PK\x01\x02") > MAX_RECORDS:  # before zipfile makes an object of each
        raise InputError(f"it holds more than {MAX_RECORDS:,} members: Stable-Baselines3 writes six")
    try:
        archive = ZipFile(BytesIO(content))
    except _DAMAGE as error:
        raise InputError("it is not a zip file, or not a whole one") from error
    members = archive.infolist()
    if len({member.filename for member in members}) < len(members):
        raise InputError("it holds two members of the same name")
    for member in members:
        if not re.fullmatch(r"\w[\w.]*", member.filename, re.ASCII):
            raise InputError(f"it holds {member.filename[:80]!r}, a name that Stable-Baselines3 does not write")
        if member.compress_type not in (ZIP_STORED, ZIP_DEFLATED) or member.flag_bits & 1:
            raise InputError(f"it holds {member.filename[:80]!r}, which is encrypted or oddly compressed")
    unpacked = sum(member.file_size for member in members)
    largest = max((member.file_size for member in members), default=0)
    if unpacked > min(MAX_BYTES, MAX_RATIO * len(content)) or largest > MAX_MEMBER_BYTES:
        raise InputError(f"it would unpack to {unpacked:,} bytes: a policy does not")
    return archive


def _read(archive: ZipFile, name: str, limit: int) -> bytes:
    info = archive.NameToInfo.get(name)
    if info is None:
        raise InputError(f"it has no member {name!r} and is not a zip that Stable-Baselines3 saved")
    if info.file_size > limit:
        raise InputError(f"its member {name!r} has {info.file_size:,} bytes; {limit:,} are read at most")
    try:
        with archive.open(info) as member:
            return member.read(info.file_size)  # never read(): a size that lies would unpack without bound
    except _DAMAGE as error:
        raise InputError(f"its member {name!r} is damaged") from error


def _read_data(archive: ZipFile) -> dict[str, Any]:
    """SB3's JSON. What it could not write as JSON is an object with a pickle, and beside it plain text to read."""
    try:
        data = parse_json(_read(archive, "data", MAX_DATA_BYTES))
    except ValueError as error:
        raise InputError("its member 'data' is not JSON") from error
    if not isinstance(data, dict):
        raise InputError("its member 'data' is not a JSON object")
    return data


def _read_state(archive: ZipFile) -> dict[str, Tensor]:
    """`policy.pth` as names and float32 tensors, and nothing else."""
    content = _read(archive, "policy.pth", MAX_MEMBER_BYTES)
    try:
        if not content.startswith(_BEFORE_ZIP):
            inner = ZipFile(BytesIO(content))
            if any(member.compress_type != ZIP_STORED for member in inner.infolist()):  # or torch would unpack a bomb
                raise InputError("policy.pth is compressed inside, which torch does not do")
        state = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # a hostile or damaged pickle raises whatever its instructions run into
        asked = re.search(r"GLOBAL ([\w.]{1,60})", str(error))
        why = f"it asks for {asked[1]}, which is not run" if asked else "or it is damaged"
        raise InputError(f"policy.pth holds something else than tensors: {why}") from error
    if not isinstance(state, dict) or not state:
        raise InputError("policy.pth is not a state dict")
    for name, tensor in state.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.]{1,120}", name, re.ASCII):
            raise InputError(f"policy.pth names a tensor {str(name)[:80]!r}")
        if type(tensor) is not Tensor or tensor.dtype != torch.float32 or tensor.layout != torch.strided:
            raise InputError(f"{name} in policy.pth is not a plain float32 tensor")
        if 4 * tensor.numel() > len(content):  # one number seen from everywhere, at no cost until it is used
            raise InputError(f"{name} in policy.pth claims a shape of {tuple(tensor.shape)}")
    return state


def _algorithm(data: dict[str, Any]) -> tuple[_Kind, str]:
    """Where the actor lies, and the algorithm's own name."""
    module = str(_described(data, "policy_class").get("__module__"))
    if module in _REFUSED:
        raise InputError(_REFUSED[module])
    if module not in _KINDS:
        raise InputError(
            f"a policy class of {module[:80]!r} is not read: only MlpPolicy and CnnPolicy of SB3 itself are"
        )
    name = _KINDS[module].algorithm
    if name == "PPO" and "clip_range" not in data:
        name = "TRPO" if "cg_max_steps" in data else "A2C"
    if name == "TD3" and data.get("policy_delay") == 1 and _options(data).get("n_critics") == 1:
        name = "DDPG"
    return _KINDS[module], name


def _options(data: dict[str, Any]) -> dict[str, Any]:
    options = data.get("policy_kwargs") or {}
    if not isinstance(options, dict):
        raise InputError("policy_kwargs is not an object")
    return {name: value for name, value in options.items() if not name.startswith(":")}


def _activation(data: dict[str, Any], algorithm: str) -> str:
    """The activation of a MlpPolicy, as `networks` calls it; refuses by name what the weights would not show."""
    space = _described(data, "observation_space")
    if not space[":type:"].endswith("box.Box'>"):
        raise InputError(f"the observation space {space[':type:'][:80]!r} is not read: only Box is")
    activation = "Tanh" if algorithm in ("PPO", "A2C", "TRPO") else "ReLU"  # if nothing is said
    for name, value in _options(data).items():
        text = re.sub(r"<class '(.*)'>", r"\1", str(value))
        if name == "activation_fn" and text.startswith("torch.nn.modules.activation."):
            activation = text.rpartition(".")[2]
        elif name not in _HARMLESS and (name, text) not in _KNOWN:
            raise InputError(f"policy_kwargs has {name[:40]!r}: {text[:80]!r}, which potstill's families do not have")
    if activation not in _ACTIVATIONS:
        raise InputError(f"activation_fn {activation[:40]!r} is not read: {', '.join(_ACTIVATIONS)} are")
    return _ACTIVATIONS[activation]


def _check_actions(data: dict[str, Any], envs: Envs) -> None:
    """Refuses actions that are not the task's: of another kind, or continuous ones of another range."""
    space = _described(data, "action_space")
    kind, name = space[":type:"], envs.config.id
    continuous = kind.endswith("box.Box'>")
    if not continuous and (not kind.endswith("discrete.Discrete'>") or "multi" in kind):
        raise InputError(f"the action space {kind[:80]!r} is not read: only Discrete and Box are")
    if not continuous and str(space.get("start", 0)) != "0":
        raise InputError(f"its actions start at {str(space['start'])[:20]!r}, not at 0")
    if continuous != envs.continuous:
        kinds = ["continuous" if it else "discrete" for it in (continuous, envs.continuous)]
        raise InputError(f"the policy has {kinds[0]} actions, {name} has {kinds[1]} ones")
    if envs.bounds is None:
        return
    for end, wanted in zip(("low", "high"), envs.bounds, strict=True):
        text = str(space.get(end))[:10_000]  # as numpy writes a vector, to eight digits: [-2. 0.5]
        try:
            given = np.array([float(number) for number in text.strip("[]").split()])
        except ValueError:
            given = np.empty(0)
        if given.shape == wanted.shape and not np.allclose(given, wanted, rtol=1e-6):
            raise InputError(f"its actions have {end} {text[:80]}, those of {name} {wanted}: another range")
        if not given.size:
            raise InputError(f"its member 'data' does not tell the range of its actions: {end} is {text[:80]!r}")


def _described(data: dict[str, Any], name: str) -> dict[str, Any]:
    value = data.get(name)
    if not isinstance(value, dict) or not isinstance(value.get(":type:"), str):
        raise InputError(f"its member 'data' does not describe the {name}")
    return value


def _build(
    state: dict[str, Tensor], kind: _Kind, algorithm: str, data: dict[str, Any], envs: Envs, temperature: float
) -> tuple[Policy, bool]:
    """The policy of ours that `state` describes, and whether its sampled play is SB3's. Every key and shape is checked.

    Raises:
        InputError: a layer is missing, has another shape, or has no place.
    """
    activation = _activation(data, algorithm)
    family = "nature" if f"{kind.extractor}features_extractor.cnn.0.weight" in state else "mlp"
    names, critic = _layout(state, kind, family)
    if f"{names['actor']}.weight" not in state:
        raise InputError(f"policy.pth has no {names['actor']}.weight: it is no MlpPolicy or CnnPolicy of {algorithm}")
    aside = kind.aside
    if family == "nature":
        config = NetworkConfig(family="nature", critic="split" if critic else "shared")
    else:
        config = _network(state, names, "trunk", activation)
        beside = _network(state, critic, "critic_trunk", activation) if critic else config
        if (beside.family, beside.options) != (config.family, config.options):  # what is not deployed may differ
            critic, aside = {}, (*aside, "mlp_extractor.value_net.", "value_net.")
        elif critic:
            config = replace(config, critic="split", critic_width=beside.width)
    names |= critic
    if algorithm in ("PPO", "A2C", "TRPO") and "value_net." not in aside:
        names["critic"] = "value_net"
    shape = tuple(envs.observation_shape)
    deviations = [name for name in state if re.fullmatch(r"(actor\.)?log_std(\.weight|\.bias)?", name)]
    expected = {f"{layer}.{part}" for layer in names.values() for part in ("weight", "bias")}
    for layer in names.values():
        if algorithm == "ARS" and f"{layer}.weight" in state and f"{layer}.bias" not in state:  # with_bias=False
            state[f"{layer}.bias"] = torch.zeros(len(state[f"{layer}.weight"]))
    if missing := sorted(expected - set(state)):
        raise InputError(f"policy.pth has no {missing[0]}: it is no MlpPolicy or CnnPolicy of {algorithm}")
    aside = (*aside, *(_copies(state, names) if family == "nature" else ()))
    unknown = set(state) - expected - (set(deviations) if envs.continuous else set())
    if unknown := {name for name in unknown if not name.startswith(aside)}:
        raise InputError(f"policy.pth has {min(unknown)}, for which potstill's {family} family has no place")
    quantiles = data.get("n_quantiles") if algorithm == "QRDQN" else 1
    outputs = state[f"{names['actor']}.bias"].numel()
    if type(quantiles) is not int or quantiles < 1 or outputs % quantiles:
        raise InputError(f"its {outputs} outputs are not those of {str(quantiles)[:20]} quantiles for each action")
    if outputs // quantiles != envs.num_actions:
        does = "takes {} actions at once" if envs.continuous else "chooses among {} actions"
        raise InputError(f"the policy {does.format(outputs // quantiles)}, {envs.config.id} has {envs.num_actions}")
    if infinite := [name for name in sorted(state) if not state[name].isfinite().all()]:
        raise InputError(f"{infinite[0]} in policy.pth is not finite")
    image = len(shape) == 3 and envs.observation_dtype == np.uint8
    if image != (family == "nature"):
        what = "CnnPolicy reads uint8 images" if family == "nature" else "MlpPolicy reorders the pixels of images"
        raise InputError(f"{envs.config.id} shows {shape} {envs.observation_dtype}: SB3's {what}")

    policy = Policy(config, **envs.spaces)
    layers = dict(policy.named_modules())
    with torch.no_grad():
        for ours, theirs in names.items():
            for part in ("weight", "bias"):
                given, target = state[f"{theirs}.{part}"], getattr(layers[ours], part)
                if ours == "actor" and algorithm == "QRDQN":  # its outputs are (quantiles, actions)
                    given = given.unflatten(0, (quantiles, -1)).mean(0)
                if given.shape != target.shape:
                    raise InputError(
                        f"{theirs}.{part} is {tuple(given.shape)}; for observations {shape} of {envs.config.id} and the"
                        f" {family} family it would be {tuple(target.shape)}"
                    )
                target.copy_(given)
        if family == "nature":
            policy.scale.fill_(1 / 255)
        if algorithm in ("DQN", "QRDQN"):
            _sharpen(policy, temperature)
        elif "critic" not in names:
            policy.critic.weight.zero_()
            policy.critic.bias.zero_()
        exact = algorithm != "ARS"
        if envs.continuous:
            exact = _act_continuously(policy, {name: state[name] for name in deviations}, algorithm, data, envs)
    return policy, exact


def _sharpen(policy: Policy, temperature: float) -> None:
    """Q-values become logits, and their mean the value."""
    policy.critic.weight.copy_(policy.actor.weight.mean(0, keepdim=True))
    policy.critic.bias.copy_(policy.actor.bias.mean(0, keepdim=True))
    policy.actor.weight.div_(temperature)
    policy.actor.bias.div_(temperature)
    if not all(parameter.isfinite().all() for parameter in policy.actor.parameters()):
        raise InputError(f"a temperature of {temperature} is too low: the logits are not finite")


def _act_continuously(
    policy: Policy, deviations: dict[str, Tensor], algorithm: str, data: dict[str, Any], envs: Envs
) -> bool:
    """Means and deviations in units of half the range; whether the deviations are SB3's in every state.

    SB3 squashes a mean by tanh into the range, or leaves it in the environment's units and clips it to the bounds.
    """
    assert envs.bounds is not None
    assert policy.log_std is not None
    options = _options(data)
    low, high = (torch.from_numpy(bound).double() for bound in envs.bounds)
    centre, half = (low + high) / 2, (high - low) / 2
    linear_ars = "ARSLinearPolicy" in str(data["policy_class"].get("__init__"))
    squashed = options.get("squash_output", algorithm == "ARS" and not linear_ars)
    if algorithm in ("SAC", "TQC", "TD3", "DDPG") or squashed is True:
        bound = 1.0
        if (algorithm in ("SAC", "TQC")) and "actor.log_std" in deviations:  # gSDE bounds the mean before the tanh
            clip_mean = options.get("clip_mean", 2.0)
            if type(clip_mean) not in (int, float):
                raise InputError("clip_mean in policy_kwargs is not a number")
            bound = math.tanh(clip_mean) if clip_mean > 0 else 1.0
        policy.squash = torch.tensor(bound)
        half = torch.ones_like(half)
    else:
        policy.actor.weight.copy_(policy.actor.weight.double() / half[:, None])
        policy.actor.bias.copy_((policy.actor.bias.double() - centre) / half)
    if algorithm in ("TD3", "DDPG", "ARS"):
        policy.log_std.fill_(math.log(DETERMINISTIC))
        return False
    log_std = deviations.get("log_std", deviations.get("actor.log_std"))
    if log_std is not None and log_std.shape == policy.log_std.shape and not data.get("use_sde"):
        policy.log_std.copy_(log_std.double() - half.log())
        return True
    latents = policy.trunk(policy.prepare(torch.from_numpy(_random_play(envs.config)))).double()
    heads = deviations.get("actor.log_std.weight"), deviations.get("actor.log_std.bias")
    if log_std is not None and tuple(log_std.shape) in [(latents.shape[1], n) for n in (1, len(half))]:
        std = log_std.double().exp()
        if options.get("use_expln") is True:
            std = torch.where(log_std > 0, (log_std.double() + 1e-6).clamp(min=0).log1p() + 1, std)
        spread = (latents.square() @ std.square().expand(-1, len(half)) + 1e-6).sqrt()
    elif heads[0] is not None and heads[1] is not None and heads[0].shape == policy.actor.weight.shape:
        spread = (latents @ heads[0].double().T + heads[1].double()).clamp(-20, 2).exp()
    else:
        raise InputError(f"policy.pth has no log_std that gives a deviation to each of {len(half)} actions")
    if policy.squash is not None:  # the slope of tanh where its actions are
        spread = spread * (1 - torch.tanh(policy.actor(latents.float())).double().square())
    policy.log_std.copy_((spread / half).square().mean(0).sqrt().clamp(min=1e-2).log())
    return False


def _normalise(policy: Policy, statistics: Statistics) -> None:
    """Puts VecNormalize's statistics in the place of the policy's own normalisation."""
    if policy.family == "nature":
        raise InputError("statistics of images are not read: SB3's CnnPolicy divides by 255")
    if statistics.mean.shape != policy.observation_shape:
        raise InputError(f"{statistics.path} normalises {statistics.mean.shape}, not {policy.observation_shape}")
    policy.mean.copy_(torch.from_numpy(statistics.mean))
    policy.scale.copy_(1 / torch.from_numpy(statistics.deviation))
    policy.input_clip = torch.tensor(statistics.clip)
    if not policy.mean.isfinite().all() or not policy.scale.isfinite().all():
        raise InputError(f"{statistics.path} holds statistics beyond float32")


def _layout(state: dict[str, Tensor], kind: _Kind, family: str) -> tuple[dict[str, str], dict[str, str]]:
    """SB3's name for each layer of our actor, and for each hidden layer of a critic of its own."""

    def chain(prefix: str) -> list[str]:
        """The linear layers under a prefix, in order."""
        found = [re.fullmatch(re.escape(prefix) + r"\.(\d{1,3})\.weight", name) for name in state]
        return [f"{prefix}.{number}" for number in sorted(int(match[1]) for match in found if match)]

    def under(ours: str, layers: list[str]) -> dict[str, str]:
        return {f"{ours}.linears.{number}": layer for number, layer in enumerate(layers)}

    def cnn(ours: str, prefix: str) -> dict[str, str]:
        parts = {"convs.0": "cnn.0", "convs.1": "cnn.2", "convs.2": "cnn.4", "linears.0": "linear.0"}
        return {f"{ours}.{mine}": f"{prefix}.{theirs}" for mine, theirs in parts.items()}

    shared = chain("mlp_extractor.shared_net")  # of net_arch before SB3 1.8
    hidden, head = shared + chain(kind.trunk), kind.head
    if head is None:
        head = hidden.pop() if hidden else f"{kind.trunk}.0"
    elif f"{head}.0.weight" in state:  # gSDE's mean, with its bound behind it
        head += ".0"
    actor_critic = kind.algorithm == "PPO"
    if family == "nature":
        names = cnn("trunk", f"{kind.extractor}features_extractor") | {"actor": head}
        critic = cnn("critic_trunk", "vf_features_extractor")
        own = "vf_features_extractor.cnn.0.weight" in state and not _same(state, critic, names)
        return names, critic if actor_critic and own else {}
    critic = under("critic_trunk", shared + chain("mlp_extractor.value_net")) if actor_critic else {}
    return under("trunk", hidden) | {"actor": head}, critic


def _same(state: dict[str, Tensor], second: dict[str, str], first: dict[str, str]) -> bool:
    """Whether the layers of a second feature extractor are those of the first."""
    pairs = [
        (f"{second[name]}.{part}", f"{first[name.replace('critic_trunk', 'trunk')]}.{part}")
        for name in second
        for part in ("weight", "bias")
    ]
    return all(a in state and b in state and torch.equal(state[a], state[b]) for a, b in pairs)


def _copies(state: dict[str, Tensor], names: dict[str, str]) -> tuple[str, ...]:
    """Prefixes of the feature extractors that a CnnPolicy saves a second time; older zips have neither."""
    used = set(names.values())
    copies = []
    for prefix in ("pi_features_extractor", "vf_features_extractor"):
        second = {
            name: theirs.replace("features_extractor", prefix)
            for name, theirs in names.items()
            if name.startswith("trunk")
        }
        if not used & set(second.values()) and _same(state, second, names):
            copies.append(f"{prefix}.")
    return tuple(copies)


def _network(state: dict[str, Tensor], names: dict[str, str], trunk: str, activation: str) -> NetworkConfig:
    """The multilayer perceptron that has layers of these sizes; of two equal ones, 64 are width 1."""
    units = [state[f"{theirs}.weight"].shape[0] for ours, theirs in names.items() if ours.startswith(f"{trunk}.")]
    if not units:
        return NetworkConfig(family="linear")
    options = () if activation == "tanh" else (f"activation={activation}",)
    if len(units) == 2 and units[0] == units[1]:
        return NetworkConfig(str(Fraction(units[0], 64)), "mlp", options=options)
    return NetworkConfig(family="mlp", options=(f"layers={','.join(map(str, units))}", *options))
