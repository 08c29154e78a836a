"""Stable-Baselines3 policies in: a zip read as data, never as code, into a policy of ours that computes the same.

SB3's own loader unpickles members of the zip, which runs whatever they hold. Here the JSON member `data` is read for
names and shapes alone, its pickles are left as the text they are, and `policy.pth` is read by torch's `weights_only`
unpickler, which builds tensors and nothing else. stable-baselines3 itself is not needed.
"""

import math
import re
import struct
import zlib
from contextlib import closing
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import gymnasium
import numpy as np
import torch
from torch import Tensor

from potstill import networks
from potstill.envs import EnvConfig, Envs
from potstill.errors import InputError, first_line
from potstill.load import weights
from potstill.load.callables import Foreign, LoadedForeign, Network
from potstill.load.stacked import Stacked
from potstill.load.statistics import Statistics, find_statistics, read_statistics
from potstill.load.weights import DETERMINISTIC, Q_TEMPERATURE
from potstill.networks import NetworkConfig, Policy
from potstill.policies import LoadedPolicy
from potstill.storage.files import parse_json, read_bytes

MAX_BYTES = 1 << 30  # of the file, and of all its members unpacked: a width-1 Nature-CNN with Adam's state takes 20 MB
MAX_MEMBER_BYTES = 1 << 28
MAX_DATA_BYTES = 1 << 26
MAX_RECORDS = 4_096  # members, those of the .pth zips inside included: about four per tensor
MAX_RATIO = 100  # SB3 and torch store without compression

_DAMAGE = (BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, ValueError)
NO_STATISTICS = Path("none")
_TORCH_LAYERS = "stable_baselines3.common.torch_layers."
_EXTRACTORS = ("NatureCNN", "FlattenExtractor", "CombinedExtractor")
_KNOWN = {("features_extractor_class", _TORCH_LAYERS + name) for name in _EXTRACTORS}
_KNOWN |= {("normalize_images", "True"), ("sde_net_arch", "None"), ("lstm_kwargs", "None")}
_ACTIVATIONS = {name.replace("_", ""): name for name in networks.ACTIVATIONS}  # by torch's name in small letters
#: policy_kwargs that the weights show anyway, that are read elsewhere, or that a trained policy does not use.
_HARMLESS = {
    "net_arch", "share_features_extractor", "features_extractor_kwargs", "optimizer_class", "optimizer_kwargs",
    "ortho_init", "log_std_init", "full_std", "use_expln", "use_sde", "clip_mean", "squash_output", "with_bias",
    "n_critics", "n_quantiles", "device", "lstm_hidden_size", "n_lstm_layers", "shared_lstm", "enable_critic_lstm",
}  # fmt: skip


class Kind(NamedTuple):
    """Where the actor of one module's policies lies among its weights."""

    algorithm: str  # `_algorithm` tells apart those that share a module
    trunk: str  # prefix of the hidden layers, of the head too where that is the last of them
    head: str | None  # prefix of the action head
    extractor: str = ""  # prefix of the feature extractor
    aside: tuple[str, ...] = ()  # prefixes of what a deployed actor does without
    lstm: str = ""  # of a policy with a memory, its name


KINDS = {
    "stable_baselines3.common.policies": Kind("PPO", "mlp_extractor.policy_net", "action_net"),
    "stable_baselines3.dqn.policies": Kind("DQN", "q_net.q_net", None, "q_net.", ("q_net_target.",)),
    "stable_baselines3.sac.policies": Kind("SAC", "actor.latent_pi", "actor.mu", "actor.", ("critic",)),
    "stable_baselines3.td3.policies": Kind("TD3", "actor.mu", None, "actor.", ("actor_target.", "critic")),
    "sb3_contrib.qrdqn.policies": Kind(
        "QRDQN", "quantile_net.quantile_net", None, "quantile_net.", ("quantile_net_target.",)
    ),
    "sb3_contrib.tqc.policies": Kind("TQC", "actor.latent_pi", "actor.mu", "actor.", ("critic",)),
    "sb3_contrib.ars.policies": Kind("ARS", "action_net", None),
    "sb3_contrib.common.recurrent.policies": Kind(
        "RecurrentPPO",
        "mlp_extractor.policy_net",
        "action_net",
        aside=("mlp_extractor.value_net.", "value_net.", "lstm_critic.", "critic.", "vf_features_extractor."),
        lstm="lstm_actor",
    ),
}
_ON_POLICY = ("PPO", "A2C", "TRPO", "RecurrentPPO")
_REFUSED = {
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
        _, algorithm, data, _, sb3_version = opened = open_zip(content)
        betrayed = algorithm in (*_ON_POLICY, "ARS") and data.get("_last_original_obs") is not None
        if betrayed and beside is None:
            raise InputError(
                "it was trained with VecNormalize, whose statistics are part of the policy and do not lie beside it:"
                " settle it with --statistics FILE, or --statistics none if it normalised rewards only"
            )
        _check_observations(data, envs)
        _check_actions(data, envs)
        policy, exact = _build(opened, envs, temperature, normalised, path)
        weights.observe(policy, env)
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
    as_loaded = LoadedForeign if isinstance(policy, Foreign) else LoadedPolicy
    return as_loaded(policy.to(device).eval(), env, document, path, normalised.path if normalised else None)


class Opened(NamedTuple):
    """What a zip says of its policy."""

    kind: Kind
    algorithm: str
    data: dict[str, Any]  # of JSON
    state: dict[str, Tensor]
    version: str | None  # of SB3; the oldest do not tell


def open_zip(content: bytes) -> Opened:
    """Raises InputError where it is no zip of SB3's, damaged or too large, or where a pickle is instead of tensors."""
    archive = _unzip(content)
    try:  # what SB3 could not write as JSON is an object with a pickle, and beside it plain text to read
        data = parse_json(_read(archive, "data", MAX_DATA_BYTES))
    except ValueError as error:
        raise InputError("its member 'data' is not JSON") from error
    if not isinstance(data, dict):
        raise InputError("its member 'data' is not a JSON object")
    kind, algorithm = _algorithm(data)
    state = weights.read_tensors(_read(archive, "policy.pth", MAX_MEMBER_BYTES), "policy.pth")
    name, version = "_stable_baselines3_version", None
    if name in archive.namelist():
        version = _read(archive, name, 100).decode(errors="replace").strip()
    return Opened(kind, algorithm, data, state, version)


def _unzip(content: bytes) -> ZipFile:
    """A zip in memory that is safe to read: flat names, few members, no bomb."""
    if content.count(b"PK\x01\x02") > MAX_RECORDS:  # before zipfile makes an object of each
        raise InputError(f"it holds more than {MAX_RECORDS:,} members: Stable-Baselines3 writes six")
    try:
        archive = ZipFile(BytesIO(content))
    except _DAMAGE as error:
        raise InputError("it is not a zip file, or not a whole one") from error
    members = archive.infolist()
    if min((member.header_offset for member in members), default=0):  # of one cut short, a zip within is found
        raise InputError("it is not a whole zip file: it begins with something else, or its end is missing")
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


def _algorithm(data: dict[str, Any]) -> tuple[Kind, str]:
    """Where the actor lies, and the algorithm's own name."""
    module = str(_described(data, "policy_class").get("__module__"))
    if module in _REFUSED:
        raise InputError(_REFUSED[module])
    if module not in KINDS:
        raise InputError(
            f"a policy class of {module[:80]!r} is not read: only MlpPolicy and CnnPolicy of SB3 itself are"
        )
    name = KINDS[module].algorithm
    if name == "PPO" and "clip_range" not in data:
        name = "TRPO" if "cg_max_steps" in data else "A2C"
    if name == "TD3" and data.get("policy_delay") == 1 and _options(data).get("n_critics") == 1:
        name = "DDPG"
    return KINDS[module], name


def _options(data: dict[str, Any]) -> dict[str, Any]:
    options = data.get("policy_kwargs") or {}
    if not isinstance(options, dict):
        raise InputError("policy_kwargs is not an object")
    return {name: value for name, value in options.items() if not name.startswith(":")}


def _activation(data: dict[str, Any], algorithm: str) -> str:
    """The activation of a MlpPolicy, as `networks` calls it; refuses by name what the weights would not show."""
    activation = "Tanh" if algorithm in _ON_POLICY else "ReLU"  # if nothing is said
    for name, value in _options(data).items():
        text = re.sub(r"<class '(.*)'>", r"\1", str(value))
        if name == "activation_fn" and text.startswith("torch.nn.modules.activation."):
            activation = text.rpartition(".")[2]
        elif name not in _HARMLESS and (name, text) not in _KNOWN:
            raise InputError(f"policy_kwargs has {name[:40]!r}: {text[:80]!r}, which potstill's families do not have")
    if activation.lower() not in _ACTIVATIONS:
        raise InputError(f"activation_fn {activation[:40]!r} is not read: {', '.join(networks.ACTIVATIONS)} are")
    return _ACTIVATIONS[activation.lower()]


def _check_observations(data: dict[str, Any], envs: Envs) -> None:
    """Refuses observations that SB3 joins into one vector otherwise than Gymnasium's `flatten`, which is ours."""
    space = _described(data, "observation_space")
    kind = space[":type:"].rpartition(".")[2].removesuffix("'>")
    if kind not in ("Box", "Dict", "Discrete", "MultiDiscrete", "MultiBinary"):
        raise InputError(f"the observation space {space[':type:'][:80]!r} is not read: Box, Dict and Discrete are")
    if kind != "Dict":
        return
    keys = list(envs.parts.spaces) if isinstance(envs.parts, gymnasium.spaces.Dict) else []
    told = str(space.get("spaces"))
    found = [match.start() for key in keys if (match := re.search(rf"'{re.escape(key)}'[:,]", told))]
    if not keys or len(found) < len(keys) or found != sorted(found):
        shows = f"a Dict of {', '.join(keys)}, in this order" if keys else "no Dict"
        raise InputError(f"the policy reads {told[:200]}; {envs.config.id} shows {shows}")


def _check_actions(data: dict[str, Any], envs: Envs) -> None:
    """Refuses actions that are not the task's: of another kind, or continuous ones of another range."""
    space = _described(data, "action_space")
    kind, name = space[":type:"], envs.config.id
    continuous = kind.endswith("box.Box'>")
    if not continuous and not kind.endswith(("discrete.Discrete'>", "multi_discrete.MultiDiscrete'>")):
        raise InputError(f"the action space {kind[:80]!r} is not read: only Discrete, MultiDiscrete and Box are")
    if not continuous and ("multi" in kind) == isinstance(envs.num_actions, int):
        raise InputError(f"the policy has actions {kind[:80]}, {name} has {envs.num_actions}")
    counts = re.findall(r"\d+", str(space.get("nvec"))) if not continuous and "multi" in kind else []
    if counts and counts != list(map(str, np.ravel(envs.num_actions))):
        raise InputError(f"its choices have {space['nvec']!s:.80} actions, those of {name} {envs.num_actions}")
    if not continuous and str(space.get("start", 0)).strip("[0. ]"):
        raise InputError(f"its actions start at {str(space['start'])[:20]!r}, not at 0")
    if continuous != envs.continuous:
        kinds = ["continuous" if it else "discrete" for it in (continuous, envs.continuous)]
        raise InputError(f"the policy has {kinds[0]} actions, {name} has {kinds[1]} ones")
    if envs.bounds is None:
        return
    for end, wanted in zip(("low", "high"), envs.bounds, strict=True):
        text = str(space.get(end))[:10_000]  # as numpy writes arrays, to eight digits: [-2. 0.5]
        try:
            given = np.array([float(number) for number in re.sub(r"[][]", " ", text).split()])
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
    opened: Opened, envs: Envs, temperature: float, statistics: Statistics | None, path: Path
) -> tuple[Policy, bool]:
    """The policy of ours that a zip describes, and whether its sampled play is SB3's. Every key and shape is checked.

    Raises:
        InputError: a layer is missing, has another shape, or has no place.
    """
    kind, algorithm, data, state, _ = opened
    activation = _activation(data, algorithm)
    cnn = f"{kind.extractor}features_extractor.cnn.0.weight" in state
    names, critic, behind = _layout(state, kind, cnn)
    if f"{names['actor']}.weight" not in state:
        raise InputError(f"policy.pth has no {names['actor']}.weight: it is no MlpPolicy or CnnPolicy of {algorithm}")
    aside = kind.aside
    features = state.get(f"{names.get('trunk.linears.0')}.bias")
    stacked = bool(kind.lstm or (cnn and (behind or (features is not None and features.numel() != 512))))
    if cnn:
        config = NetworkConfig(family="nature", critic="split" if critic else "shared")
    elif not stacked:
        hidden = [theirs for ours, theirs in names.items() if ours != "actor"]
        config = weights.mlp_of(state, hidden, activation, critic.values() if critic else None)
        if algorithm in _ON_POLICY and (hidden or critic) and config.critic == "shared":  # it may be of another kind
            critic, aside = {}, (*aside, "mlp_extractor.value_net.", "value_net.")
    if stacked:
        critic, aside = {}, (*aside, "mlp_extractor.value_net.", "value_net.", "vf_features_extractor.")
    names |= critic
    if algorithm in _ON_POLICY and "value_net." not in aside:
        names["critic"] = "value_net"
    deviations = [name for name in state if re.fullmatch(r"(actor\.)?log_std(\.weight|\.bias)?", name)]
    for layer in names.values():
        if algorithm == "ARS" and f"{layer}.weight" in state and f"{layer}.bias" not in state:  # with_bias=False
            state[f"{layer}.bias"] = torch.zeros(len(state[f"{layer}.weight"]))
    expected = {f"{layer}.{part}" for layer in (*names.values(), *behind) for part in ("weight", "bias")}
    expected |= {name for name in state if kind.lstm and name.startswith(f"{kind.lstm}.")}
    if missing := sorted(expected - set(state)):
        raise InputError(f"policy.pth has no {missing[0]}: it is no MlpPolicy or CnnPolicy of {algorithm}")
    aside = (*aside, *(_copies(state, names) if cnn else ()))
    unknown = set(state) - expected - (set(deviations) if envs.continuous else set())
    if unknown := {name for name in unknown if not name.startswith(aside)}:
        raise InputError(f"policy.pth has {min(unknown)}, for which potstill's families have no place")
    quantiles = data.get("n_quantiles") if algorithm == "QRDQN" else 1
    head = f"{names['actor']}.weight", f"{names['actor']}.bias"
    outputs = state[head[1]].numel()
    if type(quantiles) is not int or quantiles < 1 or outputs % quantiles:
        raise InputError(f"its {outputs} outputs are not those of {str(quantiles)[:20]} quantiles for each action")
    actions = np.sum(envs.num_actions)
    if outputs // quantiles != actions:
        does = "takes {} actions at once" if envs.continuous else "chooses among {} actions"
        raise InputError(f"the policy {does.format(outputs // quantiles)}, {envs.config.id} has {envs.num_actions}")
    weights.check_layers(state, (*names.values(), *behind), "policy.pth")
    weights.check_finite(state, "policy.pth")
    shape = tuple(envs.observation_shape)
    image = len(shape) == 3 and envs.observation_dtype == np.uint8
    if image != cnn:
        what = "CnnPolicy reads uint8 images" if cnn else "MlpPolicy reorders the pixels of images"
        raise InputError(f"{envs.config.id} shows {shape} {envs.observation_dtype}: SB3's {what}")
    for part in head if quantiles > 1 else ():  # its outputs are (quantiles, actions)
        state[part] = state[part].unflatten(0, (quantiles, -1)).mean(0)

    # An MlpPolicy reads the numbers of an image as they come, clipped by nothing.
    read = envs.spaces | ({} if cnn or len(shape) < 2 else {"layout": "flat"})
    policy = Policy(NetworkConfig(family="linear") if stacked else config, **read)
    if cnn:
        policy.scale.fill_(1 / 255)
    if statistics is not None:
        _normalise(policy, statistics, envs)
    if stacked:
        return _stacked(policy, opened, envs, names, behind, temperature, path), False
    weights.lay(policy, state, names, envs.config.id, "policy.pth")
    with torch.no_grad():
        if algorithm in ("DQN", "QRDQN"):
            weights.sharpen(policy, temperature)
        exact = algorithm != "ARS"
        if envs.continuous:
            exact = _act_continuously(policy, opened, envs)
    return policy, exact


def _stacked(
    inputs: Policy, opened: Opened, envs: Envs, names: dict[str, str], behind: list[str], temperature: float, path: Path
) -> Policy:
    """A policy with a memory, or with layers behind its convolutions: it plays and teaches, and is not saved."""
    kind, algorithm, data, state, _ = opened
    centre, half = torch.zeros(1), torch.ones(1)
    squash = None
    if envs.continuous and (squash := _squash(opened)) is not None:
        centre, half = (each.float() for each in weights.half_ranges(envs))
    if squash not in (None, 1.0):
        raise InputError("gSDE's bound on the mean is not read of a CnnPolicy with layers behind its convolutions")
    if algorithm in ("DQN", "QRDQN"):
        half = half / temperature
    try:
        module = Stacked(
            inputs,
            state,
            convs=[names[f"trunk.convs.{number}"] for number in range(3)] if "trunk.convs.0" in names else [],
            features=names.get("trunk.linears.0", ""),
            lstm=kind.lstm,
            linears=behind,
            head=names["actor"],
            activation=_activation(data, algorithm),
            scale=half,
            centre=centre,
            squash=squash is not None,
        )
    except (KeyError, IndexError, TypeError, RuntimeError, ValueError) as error:
        raise InputError(f"policy.pth does not hold the layers of one network: {first_line(error)}") from error
    with closing(Envs(envs.config, 1)) as games:
        return Foreign(path.name, Network(module), games)


def _squash(opened: Opened) -> float | None:
    """The bound of the tanh of a mean; None where means are in the environment's units."""
    _, algorithm, data, state, _ = opened
    options = _options(data)
    linear_ars = "ARSLinearPolicy" in str(data["policy_class"].get("__init__"))
    squashed = options.get("squash_output", algorithm == "ARS" and not linear_ars)
    if algorithm not in ("SAC", "TQC", "TD3", "DDPG") and squashed is not True:
        return None
    if algorithm in ("SAC", "TQC") and "actor.log_std" in state:  # gSDE, which bounds the mean before the tanh
        clip_mean = options.get("clip_mean", 2.0)
        if type(clip_mean) not in (int, float):
            raise InputError("clip_mean in policy_kwargs is not a number")
        return math.tanh(clip_mean) if clip_mean > 0 else 1.0
    return 1.0


def _act_continuously(policy: Policy, opened: Opened, envs: Envs) -> bool:
    """Means and deviations in units of half the range; whether the deviations are SB3's in every state.

    SB3 squashes a mean by tanh into the range, or leaves it in the environment's units and clips it to the bounds.
    """
    assert policy.log_std is not None
    _, algorithm, data, state, _ = opened
    half = weights.in_half_ranges(policy, envs, _squash(opened))
    if algorithm in ("TD3", "DDPG", "ARS"):
        policy.log_std.fill_(math.log(DETERMINISTIC))
        return False
    log_std = state.get("log_std", state.get("actor.log_std"))
    if log_std is not None and log_std.shape == policy.log_std.shape and not data.get("use_sde"):
        policy.log_std.copy_(log_std.double() - half.log())
        return True
    latents = policy.trunk(policy.prepare(torch.from_numpy(weights.random_play(envs.config)))).double()
    heads = state.get("actor.log_std.weight"), state.get("actor.log_std.bias")
    if log_std is not None and tuple(log_std.shape) in [(latents.shape[1], n) for n in (1, len(half))]:
        std = log_std.double().exp()
        if _options(data).get("use_expln") is True:
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


def _normalise(policy: Policy, statistics: Statistics, envs: Envs) -> None:
    """Puts VecNormalize's statistics in the place of the policy's own normalisation."""
    if policy.layout != "flat":
        raise InputError("statistics of images are not read: SB3's CnnPolicy divides by 255")
    mean, deviation = statistics.of(envs.parts)
    if mean.shape != policy.observation_shape:
        raise InputError(f"{statistics.path} normalises {mean.shape}, not {policy.observation_shape}")
    policy.mean.copy_(torch.from_numpy(mean))
    policy.scale.copy_(1 / torch.from_numpy(deviation))
    policy.input_clip = torch.tensor(statistics.clip)
    if not policy.mean.isfinite().all() or not policy.scale.isfinite().all():
        raise InputError(f"{statistics.path} holds statistics beyond float32")


def _layout(state: dict[str, Tensor], kind: Kind, cnn: bool) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """SB3's name for each layer of our actor, for each hidden layer of a critic of its own, and those of ours that come
    behind convolutions or a memory."""

    def under(ours: str, layers: list[str]) -> dict[str, str]:
        return {f"{ours}.linears.{number}": layer for number, layer in enumerate(layers)}

    def convolved(ours: str, prefix: str) -> dict[str, str]:
        parts = {"convs.0": "cnn.0", "convs.1": "cnn.2", "convs.2": "cnn.4", "linears.0": "linear.0"}
        return {f"{ours}.{mine}": f"{prefix}.{theirs}" for mine, theirs in parts.items()}

    shared = weights.chain(state, "mlp_extractor.shared_net")  # of net_arch before SB3 1.8
    hidden, head = shared + weights.chain(state, kind.trunk), kind.head
    if head is None:
        head = hidden.pop() if hidden else f"{kind.trunk}.0"
    elif f"{head}.0.weight" in state:  # gSDE's mean, with its bound behind it
        head += ".0"
    actor_critic = kind.algorithm == "PPO"
    if cnn:
        names = convolved("trunk", f"{kind.extractor}features_extractor") | {"actor": head}
        critic = convolved("critic_trunk", "vf_features_extractor")
        own = "vf_features_extractor.cnn.0.weight" in state and not _same(state, critic, names)
        return names, critic if actor_critic and own else {}, hidden
    if kind.lstm:
        return {"actor": head}, {}, hidden
    critic = under("critic_trunk", shared + weights.chain(state, "mlp_extractor.value_net")) if actor_critic else {}
    return under("trunk", hidden) | {"actor": head}, critic, []


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
