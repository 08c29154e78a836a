"""A policy as one ONNX file: raw observations in, logits (or means) and the greedy action out, without PyTorch."""

import io
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from potstill import __version__
from potstill.envs import Array, emulator
from potstill.errors import InputError, first_line
from potstill.export.actor import Actor, Exported, Versions, axes, in_order, verify
from potstill.export.raw import check as check_raw
from potstill.export.raw import wrap
from potstill.load.callables import onnx_session
from potstill.networks import GRU, FramewiseConv
from potstill.policies import LoadedPolicy, recorded_result
from potstill.views import sensed

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 11  # of 2019, the lowest that the graph allows: before it, Clip had its limits as attributes
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "Relu",
    nn.Tanh: "Tanh",
    nn.ELU: "Elu",
    nn.LeakyReLU: "LeakyRelu",
}
_LAYERS = (nn.Conv2d, nn.Linear, GRU, nn.Flatten, nn.Hardtanh, *_ACTIVATIONS)


def check_opset(opset: int | None = None) -> None:
    """Raises InputError where the package does not know it."""
    import onnx

    if opset is not None and not OPSET <= opset <= onnx.defs.onnx_opset_version():
        raise InputError(f"--opset is {OPSET} to {onnx.defs.onnx_opset_version()} here, not {opset}")


def versions(
    loaded: LoadedPolicy, deployed: Actor, paths: Mapping[str, Path], opset: int = OPSET, raw: bool = False
) -> Versions:
    """A policy as a model for each name, after float32 has computed what PyTorch does. The file of float32 tells the
    score that lies beside the policy, or what it played itself.

    Raises:
        InputError: `raw` is asked for of another task or in integers, or the model computes something else.
    """
    if raw and ("int8" in paths or not loaded.env.atari or sensed(loaded.env.view)):
        raise InputError("--raw prepares Atari's frames, in float32: leave it out for other tasks and with --int8")
    if deployed.policy.remembers and (raw or "int8" in paths):
        raise InputError("--raw and --int8 have no place for a memory: leave them out")
    listed = deployed.layers and all(isinstance(layer, _LAYERS) for layer in deployed.layers)
    model = build(deployed, opset) if listed else trace(deployed, opset)
    plain = model.SerializeToString()
    difference, tied = check(plain, deployed)
    models, players = {"float32": model}, {"float32": player(plain, deployed)}
    facts: dict[str, dict[str, Any]] = {name: {"opset": opset} for name in paths}
    if raw:
        models["float32"] = whole = wrap(model, emulator(loaded.env).observation_space.shape[:2])
        proved = check_raw(onnx_session(whole.SerializeToString()), onnx_session(plain), loaded.env, deployed.actions)
        facts["float32"]["raw"] = proved
    if "int8" in paths:
        models["int8"] = _quantise(model)
        players["int8"] = player(models["int8"].SerializeToString(), deployed)
    known = recorded_result(loaded)
    score = {"mean": known["score"], "ci95": known["ci95"], "episodes": known["episodes"]} if known else None
    files = {}
    for name, path in paths.items():
        files[name] = partial(_written, path, models[name], loaded, deployed, score if name == "float32" else None)
        facts[name]["bytes"] = len(files[name](None)[path])
    return Versions(deployed, difference, tied, players, facts, files)


def build(actor: Actor, opset: int = OPSET) -> "ModelProto":
    """The deployed actor as an ONNX graph, from its layers.

    Input `observation` (N, *observation shape), raw, of the environment's own dtype. Outputs `logits` (N, A) float32
    and `action` (N,) int64, the index of the greatest logit, the first of equal ones. N is free.

    Of continuous actions: outputs `mean` (N, d) float32 as the network gives it and `action` (N, d), the same within
    the bounds, in the dtype of their space; both as the environment counts.

    Of a memory: input `state` (N, H) float32, zeros where a game begins, and output `next_state`, which the next step
    is given.

    Raises:
        InputError: the network has a layer that the graph has no operator for.
    """
    from onnx import NodeProto, TensorProto, checker, helper, numpy_helper

    policy = actor.policy
    nodes: list[NodeProto] = []
    weights: list[TensorProto] = []

    def stored(name: str, value: Tensor) -> str:
        weights.append(numpy_helper.from_array(value.detach().contiguous().numpy(), name))
        return name

    def parameters(number: int, module: Any) -> tuple[str, str]:
        return stored(f"{number}.weight", module.weight), stored(f"{number}.bias", module.bias)

    def node(operator: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        out = out or f"{operator.lower()}_{len(nodes)}"
        nodes.append(helper.make_node(operator, inputs, [out], **attributes))
        return out

    # The mean is subtracted as the policy does it: a float64 observation may lie far from zero.
    kinds = {torch.float32: TensorProto.FLOAT, torch.float64: TensorProto.DOUBLE}
    x = node("Cast", "observation", to=kinds[policy.mean.dtype])
    for axis, step in policy.look.axes.items() if policy.look is not None else ():
        if step.ndim == 1:
            x = node("Gather", x, stored(f"view.{axis}", torch.from_numpy(step)), axis=axis + 1)
            continue
        turned = [*range(len(policy.seen_shape) + 1)]
        turned[axis + 1], turned[-2] = turned[-2], turned[axis + 1]
        whole = np.pad(step, ((0, 0), (0, policy.observation_shape[axis] - step.shape[1])))  # of a crop it ends early
        weights_of = stored(f"view.{axis}", torch.from_numpy(whole).to(policy.mean.dtype))
        x = node("Transpose", node("MatMul", weights_of, node("Transpose", x, perm=turned)), perm=turned)
    x = node("Sub", x, stored("observation.mean", policy.mean))
    if policy.mean.dtype != torch.float32:
        x = node("Cast", x, to=TensorProto.FLOAT)
    x = node("Mul", x, stored("observation.scale", policy.scale))
    if policy.clip < float("inf"):
        ends = {"observation.low": -policy.clip, "observation.high": policy.clip}
        limits = (stored(name, torch.tensor(value)) for name, value in ends.items())
        x = node("Clip", x, *limits)
    if (order := axes(policy)) is not None:
        x = node("Transpose", x, perm=order)
    if policy.layout == "first" and len(policy.seen_shape) == 2:  # it has no channel
        x = node("Reshape", x, stored("observation.single", torch.tensor([-1, *policy.input_shape])))
    for number, layer in enumerate(actor.layers):
        last = layer is actor.layers[-1] and actor.bounds is None
        out = "logits" if last else None
        if isinstance(layer, nn.Conv2d):
            pads = (*layer.padding, *layer.padding)
            sizes: dict[str, Any] = {"strides": layer.stride, "kernel_shape": layer.kernel_size, "pads": pads}
            sizes["group"] = layer.groups
            framewise = isinstance(layer, FramewiseConv)
            x = node("Reshape", x, stored(f"{number}.single", torch.tensor([-1, 1, 0, 0]))) if framewise else x
            x = node("Conv", x, *parameters(number, layer), out=out, **sizes)
            if framewise:  # all frames of an observation together again
                channels = policy.input_shape[0] * layer.out_channels
                x = node("Reshape", x, stored(f"{number}.together", torch.tensor([-1, channels, 0, 0])))
        elif isinstance(layer, nn.Linear):
            x = node("Gemm", x, *parameters(number, layer), out=out, transB=1)
        elif isinstance(layer, GRU):
            sizes = {"step": layer.read.in_features, "memory": (units := layer.recall.in_features)}
            x, before = (
                node("Reshape", each, stored(f"{number}.{name}", torch.tensor([1, -1, size])))
                for each, (name, size) in zip((x, "state"), sizes.items(), strict=True)
            )
            parts = {"read": layer.read, "recall": layer.recall}
            given = [stored(f"{number}.{name}", _gates(part.weight)) for name, part in parts.items()]
            bias = stored(f"{number}.bias", torch.cat([_gates(part.bias) for part in parts.values()], 1))
            x = node("GRU", x, *given, bias, "", before, hidden_size=units, linear_before_reset=1)
            x = node("Reshape", x, stored(f"{number}.single", torch.tensor([-1, units])), out="next_state")
        elif isinstance(layer, nn.Flatten):
            x = node("Flatten", x)
        elif isinstance(layer, nn.Hardtanh):
            limits = (stored(f"{number}.{name}", torch.tensor(getattr(layer, name))) for name in ("min_val", "max_val"))
            x = node("Clip", x, *limits)
        else:
            if type(layer) not in _ACTIVATIONS:
                raise InputError(f"ONNX of these runtimes has no {type(layer).__name__}: no file is written")
            slope: dict[str, Any] = {"alpha": layer.negative_slope} if isinstance(layer, nn.LeakyReLU) else {}
            x = node(_ACTIVATIONS[type(layer)], x, **slope)
    if actor.bounds is None:
        action = node("ArgMax", x, out="action", axis=1, keepdims=0)
        outputs = [
            helper.make_tensor_value_info(x, TensorProto.FLOAT, ["N", policy.actor.out_features]),
            helper.make_tensor_value_info(action, TensorProto.INT64, ["N"]),
        ]
    else:
        centre, half = (stored(n, torch.from_numpy(y)) for n, y in zip(("centre", "half"), actor.units, strict=True))
        own = helper.np_dtype_to_tensor_dtype(actor.bounds.dtype)
        means = node("Add", node("Mul", x, half), centre, out="mean")
        # By Min and Max, for Clip takes no vectors. Rounding would put some actions just outside their bounds.
        low, high = (stored(n, torch.from_numpy(y)) for n, y in zip(("low", "high"), actor.bounds, strict=True))
        x = means if own == TensorProto.FLOAT else node("Cast", means, to=own)
        node("Min", node("Max", x, low), high, out="action")
        outputs = [
            helper.make_tensor_value_info(name, kind, ["N", policy.actor.out_features])
            for name, kind in (("mean", TensorProto.FLOAT), ("action", own))
        ]
    kind = helper.np_dtype_to_tensor_dtype(actor.observations.dtype)
    inputs = [helper.make_tensor_value_info("observation", kind, ["N", *policy.observation_shape])]
    if policy.remembers:
        held = ("state", inputs), ("next_state", outputs)
        for name, infos in held:
            infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", policy.actor.in_features]))
    graph = helper.make_graph(nodes, "policy", inputs, outputs, weights)
    imports = [helper.make_opsetid("", opset)]
    version = helper.find_min_ir_version_for(imports)  # the newest would shut out runtimes that know the opset
    model = helper.make_model(
        graph, opset_imports=imports, ir_version=version, producer_name="potstill", producer_version=__version__
    )
    checker.check_model(model, full_check=True)
    return model


def _gates(parameter: Tensor) -> Tensor:
    """A GRU's reset gate, update gate and new memory in the order of ONNX, (1, 3 H, ...)."""
    reset, update, new = parameter.chunk(3)
    return torch.cat([update, reset, new])[None]


class _Deployed(nn.Module):
    """A policy whose outputs are those of the file."""

    def __init__(self, actor: Actor) -> None:
        super().__init__()
        self.policy, self.actor = actor.policy, actor

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        policy, bounds = self.policy, self.actor.bounds
        logits = policy.logits(policy.prepare(observations))
        if bounds is None:
            counts = policy.num_actions
            chosen = [part.argmax(-1) for part in logits.split(counts, -1)] if isinstance(counts, tuple) else []
            return logits, torch.stack(chosen, -1) if chosen else logits.argmax(-1)
        centre, half = (torch.from_numpy(each) for each in self.actor.units)
        mean = logits.chunk(2, -1)[0] * half + centre
        low, high = (torch.from_numpy(each) for each in bounds)
        action = torch.minimum(torch.maximum(mean.to(low.dtype), low), high)
        return mean, action.reshape(-1, *self.actor.action_space.shape)


def trace(actor: Actor, opset: int = OPSET) -> "ModelProto":
    """As `build`, by PyTorch's own exporter, of a policy that no list of layers describes: a user's own network, or
    several choices at once, whose `logits` are (N, sum of A) and whose `action` is (N, K).

    Raises:
        InputError: the exporter does not know what the network does.
    """
    import onnx

    outputs = ["logits" if actor.bounds is None else "mean", "action"]
    buffer, dynamic = io.BytesIO(), {name: {0: "N"} for name in ("observation", *outputs)}
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # that this exporter is the older one; the other needs another package
            torch.onnx.export(
                _Deployed(actor),
                (torch.from_numpy(actor.observations[:2]),),
                buffer,  # type: ignore[arg-type]  # this exporter takes files, too
                input_names=["observation"],
                output_names=outputs,
                dynamic_axes=dynamic,
                opset_version=opset,
                dynamo=False,
            )
    except Exception as error:  # of a dozen kinds
        raise InputError(f"PyTorch's exporter cannot write {actor.policy.family}: {first_line(error)}") from error
    return onnx.load_from_string(buffer.getvalue())


def check(data: bytes, actor: Actor) -> tuple[float, int]:
    """Runs a model in onnxruntime and holds it against PyTorch, as `actor.verify` says."""
    try:
        outputs, actions = in_order(actor, _runs(data, actor))
    except Exception as error:  # of a dozen kinds: a network of the user's own that holds only for some batches, say
        raise InputError(f"onnxruntime cannot run the file of {actor.policy.family}: {first_line(error)}") from error
    return verify(actor, outputs, actions, "onnxruntime")


def player(data: bytes, actor: Actor) -> Exported:
    """A model in the place of its policy."""
    names = ["logits" if actor.bounds is None else "mean", *["next_state"] * actor.policy.remembers]
    running = _runs(data, actor, names)

    def run(observations: Array, *memory: Array) -> Any:
        outputs, *after = running(observations, *memory)
        return (outputs, *after) if memory else outputs

    return Exported(actor, run)


def _runs(data: bytes, actor: Actor, names: list[str] | None = None) -> Callable[..., Any]:
    """A model as a function of raw observations, and of a memory: its outputs of these names, or all. Its means are in
    units of half the range."""
    running = onnx_session(data)

    def run(observations: Array, *memory: Array) -> Any:
        given = {"observation": observations} | dict(zip(("state",), memory, strict=False))
        outputs, *others = running.run(names, given)
        if actor.bounds is not None:
            centre, half = actor.units
            outputs = (outputs - centre) / half
        return outputs, *others

    return run


def _quantise(model: "ModelProto") -> "ModelProto":
    """Linear layers in 8 bits, their inputs quantised as they come; the few parameters of convolutions stay float32.

    Unsigned weights, for those of either sign overflow on x86 processors without VNNI.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    with TemporaryDirectory() as folder:  # onnxruntime quantises from file to file
        plain, prepared, quantised = (Path(folder, f"{name}.onnx") for name in ("plain", "prepared", "quantised"))
        onnx.save(model, plain)
        quant_pre_process(plain, prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantize_dynamic(prepared, quantised, op_types_to_quantize=["MatMul"], weight_type=QuantType.QUInt8)
        return onnx.load(quantised)


def _written(
    path: Path, model: "ModelProto", loaded: LoadedPolicy, actor: Actor, known: Any, played: Any
) -> dict[Path, bytes]:
    """The file's bytes, with all that a program needs to know to play with it; docs/howto/export.md lists the keys. The
    score is the one that is `known`, or else what the file `played`."""
    from ale_py.registration import rom_id_to_name
    from onnx import helper

    env, log_std = loaded.env, loaded.policy.log_std
    actions: Any = actor.actions
    if actor.bounds is not None and log_std is not None:
        low, high = actor.bounds.tolist()
        actions = {"low": low, "high": high, "deviation": (actor.units[1] * log_std.detach().exp().numpy()).tolist()}
    metadata = {
        "actions": actions,
        "observation": {
            "shape": list(loaded.policy.observation_shape),
            "dtype": actor.observations.dtype.name,
            "frame_skip": env.frame_skip if env.atari else 1,
            "frame_stack": env.frame_stack if env.atari else 1,
            "resize": "INTER_AREA" if env.atari else None,
        },
        **({"state": {"shape": [loaded.policy.actor.in_features]}} if loaded.policy.remembers else {}),
        "env": {"id": f"ALE/{rom_id_to_name(env.id)}-v5" if env.atari else env.id, "sticky": env.sticky}
        | ({"noop_max": env.noop_max, "fire_on_reset": env.fire_on_reset} if env.atari else {})
        | {"max_frames": env.max_frames}
        | ({"view": sensed(env.view)} if sensed(env.view) else {}),
    }
    if score := known or played:
        metadata["score"] = score
    texts = {name: json.dumps(value, allow_nan=False) for name, value in metadata.items()}
    helper.set_model_props(model, texts | {"potstill": __version__})
    return {path: model.SerializeToString()}
