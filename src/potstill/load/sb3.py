"""Stable-Baselines3 policies in: a zip read as data, never as code, into a policy of ours that computes the same.

SB3's own loader unpickles members of the zip, which runs whatever they hold. Here the JSON member `data` is read for
names and shapes alone, its pickles are left as the text they are, and `policy.pth` is read by torch's `weights_only`
unpickler, which builds tensors and nothing else. stable-baselines3 itself is not needed.
"""

import os
import re
import shutil
import struct
import zlib
from contextlib import closing, suppress
from dataclasses import replace
from fractions import Fraction
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import torch
from torch import Tensor

from potstill.envs import EnvConfig, Envs
from potstill.errors import InputError, reason
from potstill.files import parse_json, read_bytes
from potstill.networks import NetworkConfig, Policy
from potstill.policies import LoadedPolicy, save_policy

#: Divides Q-values into logits. Rusu et al. 2015 distil a DQN's softmax(Q / 0.01): nearly greedy, as the DQN plays.
Q_TEMPERATURE = 0.01

MAX_BYTES = 1 << 30  # of the file, and of all its members unpacked: a width-1 Nature-CNN with Adam's state takes 20 MB
MAX_MEMBER_BYTES = 1 << 28
MAX_DATA_BYTES = 1 << 26
MAX_RECORDS = 4_096  # members, those of the .pth zips inside included: about four per tensor
MAX_RATIO = 100  # SB3 and torch store without compression

_DAMAGE = (BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, ValueError)
_POLICIES = {"stable_baselines3.common.policies", "stable_baselines3.dqn.policies"}
_KNOWN = {("normalize_images", "True")}
_KNOWN |= {
    ("features_extractor_class", f"stable_baselines3.common.torch_layers.{name}")
    for name in ("NatureCNN", "FlattenExtractor")
}
_KNOWN |= {("use_sde", "False"), ("squash_output", "False")}
_OTHERS = {"sac": "SAC", "td3": "TD3 or DDPG"}
_ACTIVATIONS = {"Tanh": "tanh", "ReLU": "relu"}
#: policy_kwargs that the weights show anyway, or that such a policy does not use once it is trained.
_HARMLESS = {"net_arch", "share_features_extractor", "features_extractor_kwargs", "optimizer_class", "optimizer_kwargs"}
_HARMLESS |= {"ortho_init", "log_std_init", "full_std", "use_expln"}


def as_sb3(env: EnvConfig) -> EnvConfig:
    """`env` as SB3 makes it: an ALE game with all its actions, frame skip 4, 4 frames, 30 no-ops, FIRE, nothing sticky.

    Source: `AtariWrapper` and `make_atari_env` of stable-baselines3 2.9. The RL Zoo uses them for its Atari policies.
    """
    return EnvConfig(env.id, atari=True, fire_on_reset=True) if env.atari else env


def load_sb3(path: Path, env: EnvConfig, device: str = "cpu", temperature: float = Q_TEMPERATURE) -> LoadedPolicy:
    """Reads a PPO, A2C or DQN zip with MlpPolicy or CnnPolicy, without running anything in it.

    The logits are those of SB3's action distribution, or Q / `temperature`; of continuous actions, SB3's Gaussian in
    units of half their range, by which head and deviations are divided. The value is SB3's; of a DQN it is the mean of
    its Q-values: that of one uniformly random action and the greedy policy after it.

    Args:
        path: the zip; `LoadedPolicy.path` is the same, so that a hash of the file is a hash of the zip.
        env: the task, as it is to be played; `as_sb3` makes it what SB3 trains on.
        temperature: of a DQN's logits. Its greedy play does not depend on it.

    Raises:
        InputError: not a zip of SB3's, damaged, or too large; a policy our families cannot represent; a pickle where
            tensors belong; observations or actions that are not those of `env`; normalisation statistics beside it.
    """
    path = Path(path)
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature must be positive and finite, not {temperature}")
    _refuse_statistics(path)
    content = read_bytes(path, MAX_BYTES, follow=True)
    envs = Envs(env, 1)
    envs.close()  # its shapes are all that is needed
    try:
        archive = _unzip(content)
        data = _read_data(archive)
        activation = _activation(data)
        _check_actions(data, envs)
        policy, q_values = _build(_read_state(archive), activation, envs, temperature)
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
        "algorithm": "DQN" if q_values else ("PPO" if "clip_range" in data else "A2C"),
        "sb3_version": sb3_version,
        "env_steps": steps if type(steps) is int else None,
    }
    provenance |= {"temperature": temperature} if q_values else {}
    return LoadedPolicy(policy.to(device).eval(), env, {"kind": "policy", "provenance": provenance}, path)


def import_sb3(path: Path, env: EnvConfig, out: Path, temperature: float = Q_TEMPERATURE) -> LoadedPolicy:
    """Reads a zip as `load_sb3` does and saves it as a policy of ours, `policy.safetensors` in a new directory `out`.

    Raises:
        InputError: as `load_sb3`; or `out` exists, or cannot be written: nothing is left there.
    """
    out = Path(out)
    loaded = load_sb3(path, env, temperature=temperature)
    with closing(Envs(env, 1)) as envs:
        random = envs.random_actions(np.random.default_rng(0), 150)
        seen = [envs.reset(0), *(envs.step(actions).observations for actions in random)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.mkdir()
    except OSError as error:
        if os.path.lexists(out):
            raise InputError(f"{out} exists: choose another --out") from error
        raise InputError(f"cannot make {out}: {reason(error)}; choose another --out") from error
    try:
        probe = np.concatenate(seen[::10])
        save_policy(out / "policy.safetensors", loaded.policy, env, probe, loaded.document["provenance"])
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return loaded


def _refuse_statistics(path: Path) -> None:
    """VecNormalize's statistics are part of a policy, but lie beside its zip: there, or where the RL Zoo puts them."""
    folders = {path.parent, path.parent / path.stem, path.parent / re.sub(r"_\d+$", "", path.parent.name)}
    with suppress(OSError):  # what cannot be listed cannot be read either
        for file in sorted(file for folder in folders for file in folder.glob("*.pkl")):
            if "vecnormalize" in file.name.lower().replace("_", ""):
                raise InputError(
                    f"{file} lies beside {path.name}: such a policy needs its statistics, and a pickle is code that"
                    " potstill does not run; fold them into the weights as docs/sb3.md shows, or, if they do not belong"
                    " to it or normalise rewards only, move the zip to a folder of its own"
                )


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
        inner = ZipFile(BytesIO(content))
        if any(member.compress_type != ZIP_STORED for member in inner.infolist()):  # or torch would unpack a bomb
            raise InputError("policy.pth is compressed inside, which torch does not do")
        state = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # a hostile or damaged pickle raises whatever its instructions run into
        asked = re.search(r"GLOBAL ([\w.]{1,60})", str(error))
        why = f"it asks for {asked[1]}, which is not run" if asked else "or it is damaged, or of torch before 1.6"
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


def _activation(data: dict[str, Any]) -> str:
    """The activation of a MlpPolicy; refuses by name what the weights would not show."""
    space, policy_class = _described(data, "observation_space"), _described(data, "policy_class")
    if not space[":type:"].endswith("box.Box'>"):
        raise InputError(f"the observation space {space[':type:'][:80]!r} is not read: only Box is")
    module = str(policy_class.get("__module__"))
    if other := re.fullmatch(r"stable_baselines3\.(sac|td3)\.policies", module):
        raise InputError(f"a policy of {_OTHERS[other[1]]} is not read: only those of PPO, A2C and DQN are")
    if module not in _POLICIES:
        raise InputError(
            f"a policy class of {module[:80]!r} is not read: only MlpPolicy and CnnPolicy of SB3 itself are"
        )
    if data.get("use_sde"):
        raise InputError("it explores by its state (use_sde, gSDE), which is not read: only a plain Gaussian is")
    options = data.get("policy_kwargs") or {}
    if not isinstance(options, dict):
        raise InputError("policy_kwargs is not an object")
    options = {name: value for name, value in options.items() if not name.startswith(":")}
    # Of SB3's own policies, only DQN's takes ReLU if nothing is said.
    activation = "ReLU" if module.endswith("dqn.policies") else "Tanh"
    for name, value in options.items():
        text = re.sub(r"<class '(.*)'>", r"\1", str(value))
        if name == "activation_fn" and text.startswith("torch.nn.modules.activation."):
            activation = text.rpartition(".")[2]
        elif name not in _HARMLESS and (name, text) not in _KNOWN:
            raise InputError(f"policy_kwargs has {name[:40]!r}: {text[:80]!r}, which potstill's families do not have")
    if activation not in _ACTIVATIONS:
        raise InputError(f"activation_fn {activation[:40]!r} is not read: only Tanh and ReLU are")
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


def _build(state: dict[str, Tensor], activation: str, envs: Envs, temperature: float) -> tuple[Policy, bool]:
    """The policy of ours that `state` describes, and whether it is a Q-network. Every key and shape is checked."""
    q_values = "q_net.q_net.0.weight" in state
    convolves = f"{'q_net.' if q_values else ''}features_extractor.cnn.0.weight" in state
    family = "nature" if convolves else "mlp"
    names, copies = _layout(state, family, q_values)
    expected = {f"{layer}.{kind}" for layer in [*names.values(), *copies] for kind in ("weight", "bias")}
    expected |= {"log_std"} if envs.continuous else set()
    if missing := sorted(expected - set(state)):
        raise InputError(f"policy.pth has no {missing[0]}: it is no MlpPolicy or CnnPolicy of PPO, A2C or DQN")
    if unknown := sorted(set(state) - expected):
        raise InputError(f"policy.pth has {unknown[0]}, for which potstill's {family} family has no place")
    actions = state[f"{names['actor']}.bias"].numel()
    if actions != envs.num_actions:
        does = "takes {} actions at once" if envs.continuous else "chooses among {} actions"
        raise InputError(f"the policy {does.format(actions)}, {envs.config.id} has {envs.num_actions}")
    shape = tuple(envs.observation_shape)
    image = len(shape) == 3 and envs.observation_dtype == np.uint8
    if image != (family == "nature"):
        what = "CnnPolicy reads uint8 images" if family == "nature" else "MlpPolicy reorders the pixels of images"
        raise InputError(f"{envs.config.id} shows {shape} {envs.observation_dtype}: SB3's {what}")

    config = NetworkConfig(family="nature", critic="split" if "critic_trunk.convs.0" in names else "shared")
    if family != "nature":
        config = NetworkConfig(_width(state, names, "trunk"), family, options=(f"activation={activation}",))
        if not q_values:
            config = replace(config, critic="split", critic_width=_width(state, names, "critic_trunk"))
    policy = Policy(config, **envs.spaces)
    layers = dict(policy.named_modules())
    ours = {theirs: layer for layer, theirs in names.items()}
    for theirs in [*ours, *copies]:
        layer = layers[ours[copies.get(theirs, theirs)]]
        for kind in ("weight", "bias"):
            wanted, given = getattr(layer, kind).shape, state[f"{theirs}.{kind}"].shape
            if given != wanted:
                raise InputError(
                    f"{theirs}.{kind} is {tuple(given)}; for observations {shape} of {envs.config.id} and the"
                    f" {family} family it would be {tuple(wanted)}"
                )
    if policy.log_std is not None and state["log_std"].shape != policy.log_std.shape:
        raise InputError(f"log_std is {tuple(state['log_std'].shape)}: not a deviation for each of {actions} actions")
    if infinite := [name for name in sorted(state) if not state[name].isfinite().all()]:
        raise InputError(f"{infinite[0]} in policy.pth is not finite")

    with torch.no_grad():
        for theirs, name in ours.items():
            for kind in ("weight", "bias"):
                getattr(layers[name], kind).copy_(state[f"{theirs}.{kind}"])
        if family == "nature":
            policy.scale.fill_(1 / 255)
        if envs.bounds is not None and policy.log_std is not None:
            # SB3's mean is in the environment's units, and so is its deviation; ours are in units of half the range.
            low, high = (torch.from_numpy(bound).double() for bound in envs.bounds)
            centre, half = (low + high) / 2, (high - low) / 2
            policy.actor.weight.copy_(policy.actor.weight.double() / half[:, None])
            policy.actor.bias.copy_((policy.actor.bias.double() - centre) / half)
            policy.log_std.copy_(state["log_std"].double() - half.log())
        if q_values:
            policy.critic.weight.copy_(policy.actor.weight.mean(0, keepdim=True))
            policy.critic.bias.copy_(policy.actor.bias.mean(0, keepdim=True))
            policy.actor.weight.div_(temperature)
            policy.actor.bias.div_(temperature)
            if not all(parameter.isfinite().all() for parameter in policy.actor.parameters()):
                raise InputError(f"a temperature of {temperature} is too low: the logits are not finite")
    return policy, q_values


def _layout(state: dict[str, Tensor], family: str, q_values: bool) -> tuple[dict[str, str], dict[str, str]]:
    """SB3's name for each layer of ours; and for each layer it saves a second time, the name of the first."""
    parts = {"linears.0": "0", "linears.1": "2"}
    if family == "nature":
        parts = {"convs.0": "cnn.0", "convs.1": "cnn.2", "convs.2": "cnn.4", "linears.0": "linear.0"}

    def under(prefix: str) -> dict[str, str]:
        return {ours: f"{prefix}.{theirs}" for ours, theirs in parts.items()}

    if q_values:
        trunk = under("q_net.features_extractor" if family == "nature" else "q_net.q_net")
        names = {f"trunk.{ours}": theirs for ours, theirs in trunk.items()}
        names["actor"] = f"q_net.q_net.{0 if family == 'nature' else 4}"
        return names, {theirs.replace("q_net.", "q_net_target.", 1): theirs for theirs in names.values()}

    trunk = under("features_extractor" if family == "nature" else "mlp_extractor.policy_net")
    critic = under("vf_features_extractor" if family == "nature" else "mlp_extractor.value_net")
    names = {f"trunk.{ours}": theirs for ours, theirs in trunk.items()} | {"actor": "action_net", "critic": "value_net"}
    if family != "nature":
        return names | {f"critic_trunk.{ours}": theirs for ours, theirs in critic.items()}, {}
    copies: dict[str, str] = {}
    for second in (under("pi_features_extractor"), critic):  # older zips have neither
        if _equal(state, second, trunk):
            copies |= {second[ours]: trunk[ours] for ours in parts}
    if critic["convs.0"] not in copies and f"{critic['convs.0']}.weight" in state:
        names |= {f"critic_trunk.{ours}": theirs for ours, theirs in critic.items()}
    return names, copies


def _equal(state: dict[str, Tensor], second: dict[str, str], first: dict[str, str]) -> bool:
    pairs = [(f"{second[ours]}.{kind}", f"{first[ours]}.{kind}") for ours in first for kind in ("weight", "bias")]
    return all(a in state and b in state and torch.equal(state[a], state[b]) for a, b in pairs)


def _width(state: dict[str, Tensor], names: dict[str, str], trunk: str) -> str:
    units = [state[f"{names[f'{trunk}.linears.{i}']}.bias"].numel() for i in (0, 1)]
    if units[0] != units[1]:
        raise InputError(f"net_arch {units} is not read: the mlp family has two layers of equal size")
    return str(Fraction(units[0], 64))
