"""A policy as one ONNX file: raw observations in, logits (or means) and the greedy action out, without PyTorch."""

import json
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from potstill import __version__, checkpoints, evaluation, telemetry
from potstill.collect import Inputs, collect
from potstill.envs import Array, Envs
from potstill.errors import InputError
from potstill.networks import Policy
from potstill.policies import LoadedPolicy, recorded_result

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 23  # of 2025: nothing in the graph needs a newer one, and older runtimes refuse those
TOLERANCE = 1e-4  # largest difference allowed between the logits of the file and PyTorch's, or their means


def export(
    loaded: LoadedPolicy,
    out: Path,
    *,
    int8: bool = False,
    episodes: int = 20,
    seed: int = 1,
    threads: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes a policy to `out`, after the file has computed what PyTorch does on recorded observations.

    Args:
        loaded: on the CPU.
        out: .onnx; must not exist. It appears when it has been checked.
        int8: writes a quantised model beside it too (`policy.int8.onnx`), and plays games with both.
        episodes: whole games each of the two plays, greedy, through onnxruntime.
        seed: of these games.
        threads: for the environments; the models run on one.

    Returns:
        `observations` compared and the `max_difference` of their logits, or of their means in units of half the range;
        under `models`, for `float32` and `int8`, the `path`, `bytes`, `latency_ms`, `latency_p95_ms` (as
        `evaluation.latency` measures them) and, where games were played, the `score`: `mean`, `ci95`, `episodes`.
        JSON-ready.

    Raises:
        InputError: a package is missing, a file exists or cannot be written, or the file computes something else than
            PyTorch. No file is left then, nor where the games are interrupted.
    """
    small = out.with_suffix(".int8.onnx")
    if out.suffix != ".onnx":
        raise InputError(f"{out}: ONNX files are written as .onnx")
    for path in (out, small) if int8 else (out,):
        if path.exists():
            raise InputError(f"{path} exists: choose another --out")
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise InputError(f"export needs {error.name}: pip install 'potstill[onnx]'") from error
    observations, bounds = _record(loaded, threads)
    model = build(loaded.policy, observations.dtype, bounds)
    known = recorded_result(loaded)
    score = {"mean": known["score"], "ci95": known["ci95"], "episodes": known["episodes"]} if known else None
    data = _serialise(model, loaded, observations.dtype, bounds, score)
    difference = verify(data, loaded.policy, observations, bounds)
    checkpoints.write_atomically(out, data)
    try:
        files, players = {"float32": out}, {"float32": Exported(data, loaded.policy, observations.dtype, bounds)}
        scores: dict[str, dict[str, Any]] = {}
        if int8:
            quantised = _quantise(model)
            files["int8"] = small
            players["int8"] = Exported(quantised.SerializeToString(), loaded.policy, observations.dtype, bounds)
            for name, player in players.items():
                with telemetry.Progress(f"play {files[name].name}", episodes, quiet=quiet, unit="games") as bar:
                    for played in evaluation.play(player, loaded.env, episodes=episodes, seed=seed, threads=threads):
                        bar.update(len(played.episodes))
                summary = played.summary()
                scores[name] = {"score": {key: summary[key] for key in ("mean", "ci95", "episodes")}}
            data = _serialise(quantised, loaded, observations.dtype, bounds, scores["int8"]["score"])
            checkpoints.write_atomically(small, data)
        models = {
            name: {"path": str(path), "bytes": path.stat().st_size}
            | evaluation.latency(players[name])
            | scores.get(name, {})
            for name, path in files.items()
        }
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    return {
        "env": loaded.env.id,
        "opset": OPSET,
        "observations": len(observations),
        "max_difference": difference,
        "models": models,
    }


def build(policy: Policy, dtype: "np.dtype[Any]", bounds: Array | None = None) -> "ModelProto":
    """The deployed actor as an ONNX graph, from its layers: the value head, or a split critic, stays behind.

    Input `observation` (N, *observation shape) of `dtype`, raw. Outputs `logits` (N, A) float32 and `action` (N,)
    int64, the index of the greatest logit, the first of equal ones. N is free.

    Of continuous actions within `bounds` (2, d): outputs `mean` (N, d) float32 as the network gives it and `action`
    (N, d) float32, the same clipped to the bounds, both as the environment counts.
    """
    from onnx import NodeProto, TensorProto, checker, helper, numpy_helper

    nodes: list[NodeProto] = []
    weights: list[TensorProto] = []

    def stored(name: str, value: Tensor) -> str:
        weights.append(numpy_helper.from_array(value.detach().contiguous().numpy(), name))
        return name

    def node(operator: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        out = out or f"{operator.lower()}_{len(nodes)}"
        nodes.append(helper.make_node(operator, inputs, [out], **attributes))
        return out

    def layer(operator: str, x: str, name: str, module: Any, out: str | None = None, **attributes: Any) -> str:
        parameters = stored(f"{name}.weight", module.weight), stored(f"{name}.bias", module.bias)
        return node(operator, x, *parameters, out=out, **attributes)

    x = node("Cast", "observation", to=TensorProto.FLOAT)
    x = node("Sub", x, stored("observation.mean", policy.mean))
    x = node("Mul", x, stored("observation.scale", policy.scale))
    if policy.clip < float("inf"):
        limits = (stored(name, torch.tensor(value)) for name, value in (("low", -policy.clip), ("high", policy.clip)))
        x = node("Clip", x, *limits)
    if policy.family == "minatar":
        x = node("Transpose", x, perm=[0, 3, 1, 2])
    for number, conv in enumerate(policy.trunk.convs):
        x = layer("Conv", x, f"conv{number}", conv, strides=conv.stride, kernel_shape=conv.kernel_size)
        x = node("Relu", x)
    x = node("Flatten", x)
    for number, linear in enumerate(policy.trunk.linears):
        x = layer("Gemm", x, f"linear{number}", linear, transB=1)
        x = node("Tanh" if policy.family == "mlp" else "Relu", x)
    if bounds is None:
        logits = layer("Gemm", x, "actor", policy.actor, out="logits", transB=1)
        action = node("ArgMax", logits, out="action", axis=1, keepdims=0)
        outputs = [
            helper.make_tensor_value_info(logits, TensorProto.FLOAT, ["N", policy.num_actions]),
            helper.make_tensor_value_info(action, TensorProto.INT64, ["N"]),
        ]
    else:
        x = layer("Gemm", x, "actor", policy.actor, transB=1)
        units = [stored(name, torch.from_numpy(y)) for name, y in zip(("centre", "half"), _units(bounds), strict=True)]
        clipped = node("Clip", x, stored("least", torch.tensor(-1.0)), stored("greatest", torch.tensor(1.0)))
        node("Add", node("Mul", x, units[1]), units[0], out="mean")
        node("Add", node("Mul", clipped, units[1]), units[0], out="action")
        outputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", policy.num_actions])
            for name in ("mean", "action")
        ]
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    graph = helper.make_graph(
        nodes,
        "policy",
        [helper.make_tensor_value_info("observation", kind, ["N", *policy.observation_shape])],
        outputs,
        weights,
    )
    opset = [helper.make_opsetid("", OPSET)]
    version = helper.find_min_ir_version_for(opset)  # the newest would shut out runtimes that know the opset
    model = helper.make_model(
        graph, opset_imports=opset, ir_version=version, producer_name="potstill", producer_version=__version__
    )
    checker.check_model(model, full_check=True)
    return model


def verify(data: bytes, policy: Policy, observations: Array, bounds: Array | None = None) -> float:
    """Runs a model in onnxruntime and holds it against PyTorch; the largest difference of a logit, or of a mean.

    Actions whose logits are nearer to each other than twice the tolerance count as tied: either is the greedy one.

    Args:
        data: the file's bytes.
        observations: (B, *observation shape), raw.

    Raises:
        InputError: a logit differs by more than 1e-4, or the action is not a greedy one of PyTorch's; of continuous
            actions, a mean or an action differs by more than 1e-4 of half its range.
    """
    logits, actions = (torch.from_numpy(y) for y in _session(data).run(None, {"observation": observations}))
    with torch.no_grad():
        expected, _ = policy(torch.from_numpy(observations))
    if bounds is not None:
        centre, half = (torch.from_numpy(y) for y in _units(bounds))
        greedy, mean = policy.distribution.greedy(expected), expected[:, : policy.num_actions]
        pairs = ((logits, mean, "means"), (actions, greedy, "actions"))
        differences = {what: ((mine - centre) / half - theirs).abs().max().item() for mine, theirs, what in pairs}
        for what, largest in differences.items():
            if not largest <= TOLERANCE:  # which NaN is not
                raise InputError(
                    f"onnxruntime computes other {what} than PyTorch (largest difference {largest:.2g} of half the"
                    f" range, allowed {TOLERANCE:g}): no file is left"
                )
        return differences["means"]
    difference: float = (logits - expected).abs().max().item()
    short = (expected.amax(1) - expected.gather(1, actions[:, None]).squeeze(1)).max().item()
    if not difference <= TOLERANCE:  # which NaN is not
        raise InputError(
            f"onnxruntime computes other logits than PyTorch (largest difference {difference:.2g}, allowed"
            f" {TOLERANCE:g}): no file is left"
        )
    if not short <= 2 * TOLERANCE:
        raise InputError(f"onnxruntime chooses an action {short:.2g} below PyTorch's greedy one: no file is left")
    return difference


class Exported(Policy):
    """An ONNX model in the place of the policy it was made from, for the games and the clock that measure policies."""

    def __init__(self, data: bytes, policy: Policy, dtype: "np.dtype[Any]", bounds: Array | None = None) -> None:
        super().__init__(policy.config, policy.observation_shape, policy.num_actions, policy.continuous)
        self.log_std = policy.log_std
        self.bounds = bounds
        self.family = "mlp"  # `Inputs` is to hand on whole observations, not frames that it normalised
        self.session = _session(data)
        self.dtype = torch.from_numpy(np.zeros(0, dtype)).dtype

    def prepare(self, observations: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Observations as they are: the graph normalises them."""
        return observations.to(self.dtype)

    def logits(self, ready: Tensor) -> Tensor:
        if self.bounds is None:
            (logits,) = self.session.run(["logits"], {"observation": ready.numpy()})
            return torch.from_numpy(logits)
        (mean,) = self.session.run(["mean"], {"observation": ready.numpy()})
        centre, half = _units(self.bounds)
        return self._with_deviations(torch.from_numpy((mean - centre) / half))


def _units(bounds: Array) -> tuple[Array, Array]:
    """Centre and half the range of each continuous action, both (d,), of its bounds (2, d)."""
    low, high = bounds
    return (low + high) / 2, (high - low) / 2


def _session(data: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def _record(loaded: LoadedPolicy, threads: int) -> tuple[Array, Array | None]:
    """Raw observations from the policy's own sampled play and the checkpoint's probe; the bounds of its actions."""
    policy = loaded.policy
    generator = torch.Generator().manual_seed(0)
    with closing(Envs(loaded.env, 8, threads=threads)) as envs:
        evaluation.check_fit(policy, envs)
        seen = []
        draw = policy.distribution.sample
        play = collect(envs, Inputs(policy), envs.reset(0), lambda ready: draw(policy.logits(ready), generator))
        for number, transition in zip(range(128), play, strict=False):
            if number % 8 == 0:  # neighbours look alike
                seen.append(transition.observations.copy())
        dtype, bounds = envs.observation_dtype, envs.bounds
    if "network" in loaded.document:  # a checkpoint of ours, which has a probe
        seen.append(checkpoints.load(loaded.path)[0]["probe.observations"].numpy())
    return np.concatenate(seen).astype(dtype), bounds


def _quantise(model: "ModelProto") -> "ModelProto":
    """Linear layers in 8 bits, their inputs quantised as they come; the few parameters of convolutions stay float32.

    Unsigned weights, for those of either sign overflow on x86 processors without VNNI.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    with TemporaryDirectory() as folder:  # onnxruntime quantises from file to file
        plain, ready, quantised = (Path(folder, f"{name}.onnx") for name in ("plain", "ready", "quantised"))
        onnx.save(model, plain)
        quant_pre_process(plain, ready, skip_optimization=True, skip_symbolic_shape=True)
        quantize_dynamic(ready, quantised, op_types_to_quantize=["MatMul"], weight_type=QuantType.QUInt8)
        return onnx.load(quantised)


def _serialise(
    model: "ModelProto",
    loaded: LoadedPolicy,
    dtype: "np.dtype[Any]",
    bounds: Array | None,
    score: dict[str, Any] | None,
) -> bytes:
    """The file's bytes, with all that a program needs to know to play with it; docs/onnx.md lists the keys."""
    from ale_py.registration import rom_id_to_name
    from onnx import helper

    env, log_std = loaded.env, loaded.policy.log_std
    actions: Any = list(env.actions if env.actions is not None else range(loaded.policy.num_actions))
    if bounds is not None and log_std is not None:
        deviation = _units(bounds)[1] * log_std.detach().exp().numpy()
        actions = {"low": bounds[0].tolist(), "high": bounds[1].tolist(), "deviation": deviation.tolist()}
    metadata = {
        "actions": actions,
        "observation": {
            "shape": list(loaded.policy.observation_shape),
            "dtype": dtype.name,
            "frame_skip": env.frame_skip if env.atari else 1,
            "frame_stack": env.frame_stack if env.atari else 1,
            "resize": "INTER_AREA" if env.atari else None,
        },
        "env": {"id": f"ALE/{rom_id_to_name(env.id)}-v5" if env.atari else env.id, "sticky": env.sticky}
        | ({"noop_max": env.noop_max, "fire_on_reset": env.fire_on_reset} if env.atari else {})
        | {"max_frames": env.max_frames},
    }
    if score:
        metadata["score"] = score
    texts = {name: json.dumps(value, allow_nan=False) for name, value in metadata.items()}
    helper.set_model_props(model, texts | {"potstill": __version__})
    data: bytes = model.SerializeToString()
    return data
