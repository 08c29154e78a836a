"""A policy as C99 for a microcontroller: raw observation in, the environment's own greedy action out.

One .c and one .h, without heap or libraries (`math.h` where a float network has tanh). The float32 version computes
what PyTorch does. The integer versions have weights of 8 or 4 bits with a scale per output, which a student that was
distilled for them has already, and 16-bit activations whose ranges are those of recorded play; activations take so
many levels that no sum overflows 32 bits.

Source of the arithmetic: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-
Arithmetic-Only Inference", section 2.2: a sum is brought to the next layer's scale by an integer product and a shift.
"""

import ctypes
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor, nn

from potstill import __version__
from potstill.envs import Array
from potstill.errors import InputError
from potstill.export.actor import BITS, Actor, Exported, Versions, actor, demands, in_order, verify
from potstill.networks import GRU, FramewiseConv, Policy
from potstill.policies import LoadedPolicy
from potstill.quantisation import MARGIN, WIDEST, activation_levels, centred, is_on_grid
from potstill.quantisation import scales as weight_scales

FLAGS = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Werror")


class Block(NamedTuple):
    """A convolution, a linear layer or a memory with the activation after it."""

    layer: nn.Conv2d | nn.Linear | GRU
    activation: type[nn.Module] | None
    shape: tuple[int, ...]  # of its input: (channels, rows, columns) or (features,)
    weight: Tensor  # (outputs, inputs of each), float32
    bias: Tensor
    outputs: int  # numbers that it gives
    padding: tuple[int, int] = (0, 0)  # rows and columns of zeros around its input
    frames: int = 1  # read one by one with the same weights
    bound: float | None = None  # of the activation's outputs


def versions(deployed: Actor, paths: Mapping[str, Path]) -> Versions:
    """A policy as a .c and a .h for each name of `actor.BITS`, after the compiled code has computed what PyTorch does.

    Raises:
        InputError: there is no C compiler, a name is none of C, a layer has no C, or the code computes something else.
    """
    deployed.check_listed()
    facts: dict[str, dict[str, Any]] = {}
    players, files = {}, {}
    with TemporaryDirectory() as folder:
        for name, path in paths.items():
            if not re.fullmatch(r"[\w.-]+", path.name, re.ASCII):
                raise InputError(f"{path}: the name of a C file is letters, digits, _, - and .")
            source, header, sizes = build(deployed, path.stem, BITS[name])
            library = Library(source, header, path.stem, deployed, Path(folder))
            players[name] = Exported(deployed, library.outputs)
            facts[name] = sizes | {"flash": library.flash, "stack": library.stack}
            content = {path: source.encode(), path.with_suffix(".h"): header.encode()}
            files[name] = lambda _, content=content: content
            if name == "float32":
                seen = deployed.observations
                outputs = in_order(deployed, library.outputs)
                difference, tied = verify(deployed, outputs, library.actions(seen), "the compiled C")
    return Versions(deployed, difference, tied, players, facts, files)


def player(loaded: LoadedPolicy, bits: int, threads: int = 1) -> Exported:
    """A policy as its compiled integer file plays it."""
    deployed = actor(loaded, threads)
    with TemporaryDirectory() as folder:
        return Exported(
            deployed, Library(*build(deployed, "policy", bits)[:2], "policy", deployed, Path(folder)).outputs
        )


def blocks(actor: Actor) -> list[Block]:
    """The layers as C computes them.

    Raises:
        InputError: the network is not a plain stack of convolutions and linear layers of ReLU or tanh, clipped or not.
    """
    shape = actor.policy.seen_shape
    if actor.policy.layout == "last":
        shape = (shape[2], *shape[:2])
    elif actor.policy.layout == "first":
        shape = actor.policy.input_shape
    found: list[Block] = []
    for layer in actor.layers:
        match layer:
            case nn.Conv2d(dilation=(1, 1), padding=(int(), int()), padding_mode="zeros"):
                sides = zip(shape[1:], layer.kernel_size, layer.stride, layer.padding, strict=True)
                after: tuple[int, ...] = (layer.out_channels, *(_positions(*each) for each in sides))
            case nn.Linear() if len(shape) == 1:
                after = (layer.out_features,)
            case GRU():
                after = (layer.recall.in_features,)
            case nn.Flatten():
                shape = (int(np.prod(shape)),)
                continue
            case nn.ReLU() | nn.Tanh() if found and found[-1].activation is None:
                found[-1] = found[-1]._replace(activation=type(layer))
                continue
            case nn.Hardtanh() if found and found[-1].activation is nn.Tanh and layer.min_val == -layer.max_val:
                found[-1] = found[-1]._replace(bound=layer.max_val)
                continue
            case _:
                raise InputError(f"C is written for plain stacks of Conv2d, Linear, ReLU and Tanh: not for {layer}")
        read = layer.read if isinstance(layer, GRU) else layer
        weight = read.weight.detach().flatten(1)
        if isinstance(layer, nn.Conv2d):  # of groups a dense one, whose zeros are not stored
            weight = torch.block_diag(*weight.chunk(layer.groups))
        bias = read.bias.detach() if read.bias is not None else torch.zeros(len(weight))
        padding: Any = layer.padding if isinstance(layer, nn.Conv2d) else (0, 0)
        frames = shape[0] if isinstance(layer, FramewiseConv) else 1
        after = (after[0] * frames, *after[1:])
        found.append(Block(layer, None, shape, weight, bias, int(np.prod(after)), padding, frames))
        shape = after
    return found


def _positions(size: int, kernel: int, stride: int, padding: Any) -> int:
    """How many places a kernel has along one side."""
    count: int = (size + 2 * padding - kernel) // stride + 1
    return count


def build(actor: Actor, name: str, bits: int = 32) -> tuple[str, str, dict[str, int]]:
    """The .c, the .h, and how many bytes their constants and the activations take.

    Args:
        name: of the files, without .c; what is called has it in front, as an identifier.
        bits: of a weight: 32 of a float; 8 or 4 of an integer, and 16 of an activation then.
    """
    integer, remembers = bits < 32, actor.policy.remembers
    if integer and remembers:
        raise InputError("a memory is written in float32: leave out --int8 and --int4")
    stack, prefix = blocks(actor), identifier(name)
    if (raw := _TYPES.get(actor.observations.dtype.name)) is None:
        raise InputError(f"C has no {actor.observations.dtype} for these observations")
    if actor.bounds is None and np.abs(actor.actions).max() >= 1 << 31:
        raise InputError(f"C tells actions in 32 bits, and these are {actor.actions[0]} and more")
    own = "int32_t" if actor.bounds is None else _TYPES[actor.bounds.dtype.name]
    unit, sizes = ("int16_t", 2) if integer else ("float", 4)
    shape, seen = actor.policy.observation_shape, actor.policy.seen_shape
    if actor.policy.layout in ("first", "stack") and len(shape) == 3 and isinstance(stack[0].layer, nn.Linear):
        stack[0] = _reordered(stack[0], seen)
    first_is_linear = isinstance(stack[0].layer, nn.Linear)
    constants: list[tuple[str, str, Array]] = []
    if integer and actor.bounds is None and not is_on_grid(stack[-1].weight, bits):
        weight, bias = centred(stack[-1].weight, stack[-1].bias)
        stack[-1] = stack[-1]._replace(weight=weight, bias=bias)
    scaled: list[_Scales] | list[None] = _quantise(actor, stack, bits) if integer else [None] * len(stack)
    folds = first_is_linear and not integer and actor.policy.clip == float("inf")
    if folds:
        stack[0] = stack[0]._replace(weight=stack[0].weight * actor.policy.scale.flatten())
    value, steps = _input(actor, folds, constants, raw, scaled[0])
    view = _view(actor.policy, constants)
    layers: list[dict[str, Any]] = []
    rooms = [0, int(np.prod(stack[0].shape)) if first_is_linear else 0]  # of the two buffers, which layers use in turn
    for number, (block, scales) in enumerate(zip(stack, scaled, strict=True)):
        final = block is stack[-1]
        source = ("b", "a")[number % 2] if number or first_is_linear else "observation"
        target = "outputs" if final else ("a", "b")[number % 2]
        reads = raw if source == "observation" else unit
        writes = ("int32_t" if integer else "float") if final else unit
        if not final:
            rooms[number % 2] = max(rooms[number % 2], block.outputs)
        values: Array = block.weight.numpy() if scales is None else scales.weight
        few = _sparse(values, bits) if not isinstance(block.layer, GRU) else None
        if few is not None:
            values = few.values
            constants.append((f"gap{number}", "uint8_t", few.gaps))
            constants.append((f"count{number}", "uint16_t", few.counts))
        if scales is None:
            constants.append((f"weight{number}", "float", values))
            constants.append((f"bias{number}", "float", block.bias.numpy()))
            if isinstance(block.layer, GRU):
                constants.append((f"recall{number}", "float", block.layer.recall.weight.detach().numpy()))
                constants.append((f"recalled{number}", "float", block.layer.recall.bias.detach().numpy()))
        else:
            packed = ("uint8_t", _packed(values)) if bits == 4 else ("int8_t", values)
            constants.append((f"weight{number}", *packed))
            constants.append((f"bias{number}", "int32_t", scales.bias))
            constants.append((f"product{number}", "int32_t", scales.product))
        layer = _layer(number, block, scales, reads != unit, actor.policy.layout == "last")
        layer |= {"source": source, "target": target, "reads": reads, "writes": writes, "sparse": few is not None}
        layers.append(layer)
    tanh = any(block.activation is nn.Tanh for block in stack)
    if integer and tanh:
        constants.append(("tanh_table", "int16_t", np.round(32_767 * np.tanh(np.arange(257) / 32)).astype(np.int16)))
    patches = max((block.weight.shape[1] for block in stack if isinstance(block.layer, nn.Conv2d)), default=0)
    count = actor.policy.actor.out_features
    needed = {"constants": sum(values.nbytes for _, _, values in constants)}
    needed["activations"] = sizes * (sum(rooms) + patches) + 4 * count
    observed = f"const {raw} observation[{prefix.upper()}_OBSERVATION]"
    observed += f", float memory[{prefix.upper()}_MEMORY]" if remembers else ""
    if actor.bounds is None:
        signature = f"int32_t {prefix}_act({observed})"
        meaning = "logits, less their mean" if integer else "logits"
        constants.append(("actions", "int32_t", np.array(actor.actions, np.int32)))
    else:
        signature = f"void {prefix}_act({observed}, {own} action[{count}])"
        meaning = "means, in units of half the range"
        constants += [(key, "float", each) for key, each in zip(("centre", "half"), actor.units, strict=True)]
        constants += [(key, own, each) for key, each in zip(("low", "high"), actor.bounds, strict=True)]
    known = {
        "name": name, "version": __version__, "prefix": prefix, "bits": bits, "integer": integer, "tanh": tanh,
        "what": f"{bits}-bit weights, 16-bit activations" if integer else "float32", "layers": layers, "needed": needed,
        "parameters": actor.policy.size().parameters, "told": demands(actor.policy),
        "memory": actor.policy.actor.in_features if remembers else 0, "passed": "memory, " if remembers else "",
        "count": count, "raw": raw, "size": int(np.prod(shape)), "shape": tuple(shape), "signature": signature,
        "meaning": meaning, "own": own, "outputs": f"void {prefix}_outputs({observed}, float output[{count}])",
        "unit": unit, "value": value, "view": view, "wide": _wide(actor.policy),
        "declared": "\n".join(_declare(*constant) for constant in constants), "steps": steps,
        "total": "int32_t" if integer else "float", "result": "int32_t" if integer else "float",
        "rooms": list(zip("ab", rooms, strict=True)), "bounded": actor.bounds is not None,
        "unscale": f" * {_float(scaled[-1].unit)}" if scaled[-1] is not None else "",
    }  # fmt: skip
    beside = FileSystemLoader(Path(__file__).parent)
    templates = Environment(loader=beside, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source_text, header = (templates.get_template(f"policy.{end}").render(known) + "\n" for end in "ch")
    return source_text, header, needed


_TYPES = {f"{kind}{bits}": f"{kind}{bits}_t" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
_TYPES |= {"bool": "uint8_t", "float32": "float", "float64": "double"}


class _Scales(NamedTuple):
    """A layer in integers: sum(weight * input) + bias, times product / 2^shift, is its output in the next unit."""

    weight: Array  # int8, of the bits that are asked for
    bias: Array  # int32
    product: Array  # int32, one per output channel
    shift: int
    levels: int  # greatest input
    unit_in: float  # what 1 of its input stands for
    limit: int  # greatest output; 0 of the last, which keeps 32 bits
    unit: float  # what 1 of its output stands for


@torch.no_grad()
def _quantise(actor: Actor, stack: list[Block], bits: int) -> list[_Scales]:
    """Scales from the largest inputs of each layer on the recorded observations, and as much again for others."""
    x = actor.policy.prepare(torch.from_numpy(actor.observations)).float()
    reach, levels, seen = [], [], x
    for layer in actor.layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            reach.append(MARGIN * seen.abs().max().item() or 1.0)
            levels.append(activation_levels(bits, layer.weight[0].numel()))
        seen = layer(seen)
    if actor.bounds is None:
        seen = seen - seen.mean(1, keepdim=True)
    reach.append(MARGIN * seen.abs().max().item() or 1.0)
    units = []
    for number in range(len(stack)):
        before = stack[number - 1].activation if number else None
        units.append((1.0 if before is nn.Tanh else reach[number]) / levels[number])
    units.append(1 / (2**31 - 1) if stack[-1].activation is nn.Tanh else reach[-1] / 2**28)  # of tanh all 31 bits
    found = []
    for at, block in enumerate(stack):
        scale = torch.maximum(weight_scales(block.weight, bits), block.bias.abs().double() / (units[at] * WIDEST))
        tanh = block.activation is nn.Tanh
        target = 1 / 8192 if tanh else units[at + 1]
        ratio = (scale * units[at] / target).numpy()
        shift = int(np.clip(30 - np.ceil(np.log2(ratio.max())), 1, 62))
        found.append(
            _Scales(
                (block.weight.double() / scale[:, None]).round().numpy().astype(np.int8),
                (block.bias.double() / (scale * units[at])).round().numpy().astype(np.int32),
                np.round(ratio * 2.0**shift).clip(0, 2**31 - 1).astype(np.int32),
                shift,
                levels[at],
                units[at],
                0 if block is stack[-1] else levels[at + 1],
                units[at + 1],
            )
        )
    return found


def _input(
    actor: Actor, folds: bool, constants: list[tuple[str, str, Array]], raw: str, scales: _Scales | None
) -> tuple[str, list[str]]:
    """What normalises one number of an observation, and the steps that bound it and, in integers, count its levels."""
    policy = actor.policy
    mean, scale = policy.mean.flatten(), policy.scale.flatten()
    whole, wide = int(np.prod(policy.seen_shape)), _wide(policy)
    at = "i" if len(mean) == whole else f"i / {whole // len(mean)}" if policy.layout == "first" else f"i % {len(mean)}"
    value = "seen(x, i)" if policy.look is not None else "x[i]" if raw == wide else f"({wide})x[i]"
    if mean.any():
        small = torch.equal(mean, mean.clamp(0, 255).byte().to(mean.dtype))
        constants.append(("mean", "uint8_t", mean.byte().numpy()) if small else ("mean", wide, mean.numpy()))
        value = f"({value} - mean[{at}])"
    value = value if wide == "float" else f"(float){value}"
    if not folds and (scale != 1).any():
        few, kind = scale.unique(return_inverse=True)
        if len(few) == 1:
            value = f"{value} * {_float(few.item())}"
        elif len(few) <= 256 and len(scale) > 4 * len(few):
            constants += [("few", "float", few.numpy()), ("kind", "uint8_t", kind.byte().numpy())]
            value = f"{value} * few[kind[{at}]]"
        else:
            constants.append(("scale", "float", scale.numpy()))
            value = f"{value} * scale[{at}]"
    limits = [policy.clip] * (policy.clip < float("inf")) + ([float(scales.levels)] if scales is not None else [])
    steps = []
    for number, limit in enumerate(limits):
        if scales is not None and number == len(limits) - 1:
            steps.append(f"value *= {_float(1 / scales.unit_in)};")
        steps += [f"value = value > -{_float(limit)} ? value : -{_float(limit)};"]
        steps += [f"value = value < {_float(limit)} ? value : {_float(limit)};"]
    return value, steps


def _wide(policy: Policy) -> str:
    """The type in which a number of an observation is read: a float64 may lie far from zero."""
    return "double" if policy.mean.dtype == torch.float64 else "float"


def _view(policy: Policy, constants: list[tuple[str, str, Array]]) -> dict[str, Any] | None:
    """How number `i` of what a policy sees is made from an observation: a sum of shares of some of its numbers, in a
    loop for each axis that the view weighs. None where it sees all."""
    if policy.look is None:
        return None
    index, loops, shares = "", [], []
    for axis, (size, raw) in enumerate(zip(policy.seen_shape, policy.observation_shape, strict=True)):
        place = f"i / {int(np.prod(policy.seen_shape[axis + 1 :]))}" + (f" % {size}" if axis else "")
        if (step := policy.look.axes.get(axis)) is not None:
            if step.ndim == 2:
                rows, places = np.nonzero(step)
                begins = np.searchsorted(rows, np.arange(size + 1)).astype(np.int32)
                constants += [(f"begin{axis}", "int32_t", begins), (f"share{axis}", "float", step[rows, places])]
                n, first, step = f"n{axis}", f"begin{axis}[{place}", places
                loops.append(f"for (int {n} = {first}]; {n} < {first} + 1]; {n}++)")
                shares.append(f"share{axis}[{n}] * ")
                place = n
            constants.append((f"shown{axis}", "int32_t", step.astype(np.int32)))
            place = f"shown{axis}[{place}]"
        index = f"({index}) * {raw} + {place}" if index else place
    return {"loops": loops, "sum": f"{''.join(shares)}({_wide(policy)})x[{index}]"}


def _layer(number: int, block: Block, scales: _Scales | None, unlike: bool, last: bool) -> dict[str, Any]:
    """What the template writes of a layer and its activation.

    Args:
        unlike: whether it reads what is not of the network's own type.
        last: whether an observation's channels come last.
    """
    known: dict[str, Any] = {"number": number, "linear": isinstance(block.layer, nn.Linear), "frames": block.frames}
    known["gru"] = isinstance(block.layer, GRU)
    known |= {"relu": block.activation is nn.ReLU, "tanh": block.activation is nn.Tanh, "outputs": block.outputs}
    known |= {"inputs": block.weight.shape[1], "filters": len(block.weight)}
    if scales is not None:
        known |= {"shift": scales.shift, "limit": scales.limit or 2**31 - 1}
        known["most"] = known["limit"] if block.bound is None else round(known["limit"] * block.bound)
    else:
        known["most"] = None if block.bound is None else _float(block.bound)
    if isinstance(block.layer, nn.Conv2d):
        (channels, rows, columns), (above, left) = block.shape, block.padding
        (height, width), (down, right) = block.layer.kernel_size, block.layer.stride
        index = f"(r * {columns} + s) * {channels} + c" if number == 0 and last else f"(c * {rows} + r) * {columns} + s"
        value = f"input(x, {index})" if unlike or number == 0 else f"x[{index}]"
        if above or left:
            value = f"r < 0 || r >= {rows} || s < 0 || s >= {columns} ? 0 : {value}"
        known |= {"channels": channels, "height": height, "width": width, "down": down, "right": right, "value": value}
        known |= {"above": above, "left": left, "high": _positions(rows, height, down, above)}
        known["wide"] = _positions(columns, width, right, left)
    return known


class _Sparse(NamedTuple):
    """The weights of a layer that are not zero, output by output, and zeros where two of them lie too far apart."""

    values: Array
    gaps: Array  # uint8, from the input that the one before multiplies, or from the first, to its own
    counts: Array  # uint16, how many each output has


def _sparse(weight: Array, bits: int) -> _Sparse | None:
    """Of weights (outputs, inputs), each of so many bits, those that are not zero; None where all take no more room."""
    outputs, places = weight.nonzero()
    first = np.diff(outputs, prepend=-1) > 0
    gaps = np.diff(places, prepend=0)
    gaps[first] = places[first]
    between = (gaps - 1).clip(0) // 255
    ends = np.cumsum(between + 1) - 1
    counts = np.bincount(outputs, between + 1, len(weight))
    values, steps = np.zeros(counts.sum().astype(int), weight.dtype), np.full(counts.sum().astype(int), 255, np.uint8)
    values[ends], steps[ends] = weight[outputs, places], gaps - 255 * between
    smaller = len(values) * (bits / 8 + 1) + 2 * len(counts) < weight.size * bits / 8
    return _Sparse(values, steps, counts.astype(np.uint16)) if smaller and 0 < counts.max() < 1 << 16 else None


def _packed(weights: Array) -> Array:
    """Integers of 4 bits, two to a byte, the first in the lower half."""
    flat = (weights.flatten() + 8).astype(np.uint8)
    flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
    packed: Array = flat[::2] | flat[1::2] << 4
    return packed


def _float(value: float) -> str:
    return f"{np.float32(value)}f"


def _declare(name: str, kind: str, values: Array) -> str:
    """A constant array; decimals are the shortest that are read back to the same bits."""
    end = "f" if kind == "float" else ""
    numbers = [f"{text}{end}" for text in values.flatten().astype(str)]
    lines = [", ".join(numbers[at : at + 12]) for at in range(0, len(numbers), 12)]
    return f"static const {kind} {name}[{len(numbers)}] = {{\n    " + ",\n    ".join(lines) + "};"


class Library:
    """Compiled C, called from Python."""

    def __init__(self, source: str, header: str, name: str, actor: Actor, folder: Path) -> None:
        """Compiles in `folder` with `cc`, or what the environment variable CC names.

        Raises:
            InputError: there is no compiler, or it refuses the code.
        """
        compiler = shlex.split(os.environ.get("CC", "cc"))
        if not compiler or shutil.which(compiler[0]) is None:
            raise InputError("export compiles the C that it writes, to check it: install gcc or clang, or set CC")
        for end, text in ((".c", source), (".h", header)):
            (folder / f"{name}{end}").write_text(text)
        once = [*FLAGS, "-fPIC", "-fstack-usage", "-c", f"{name}.c"]  # large arrays take a compiler its time
        for options in (once, ["-shared", "-o", f"{name}.so", f"{name}.o", "-lm"]):
            words = [*compiler, *options]
            done = subprocess.run(words, check=False, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise InputError(f"{compiler[0]} does not compile what was written: {done.stderr.strip()[:200]}")
        library = ctypes.CDLL(str(folder / f"{name}.so"))
        prefix = identifier(name)
        self._act, self._outputs = getattr(library, f"{prefix}_act"), getattr(library, f"{prefix}_outputs")
        self._actor = actor
        #: Bytes of code and constants, as compiled here; None where there is no `size`.
        self.flash: int | None = None
        if shutil.which("size"):
            told = subprocess.run(["size", f"{name}.o"], cwd=folder, capture_output=True, text=True, check=True).stdout
            text, data = told.splitlines()[1].split()[:2]
            self.flash = int(text) + int(data)

        #: Bytes of stack at most, of `act` and all that it calls, as the compiler tells.
        self.stack: int | None = None
        if (usage := folder / f"{name}.su").exists():
            sizes = {
                line.split()[0].rpartition(":")[2]: int(line.split()[1]) for line in usage.read_text().splitlines()
            }
            layers = [size for function, size in sizes.items() if function.startswith("layer")]
            self.stack = sum(sizes.values()) - sum(layers) + max(layers, default=0)

    def outputs(self, observations: Array, *memory: Array) -> Any:
        """(N, *shape) raw to (N, A) logits, or (N, d) means in units of half the range, float32; of a memory, with it
        before and after, (N, H)."""
        outputs = np.empty((len(observations), self._actor.policy.actor.out_features), np.float32)
        observations = np.ascontiguousarray(observations, self._actor.observations.dtype).reshape(len(outputs), -1)
        held = [each.copy() for each in memory]
        for rows in zip(observations, *held, outputs, strict=True):
            self._outputs(*(ctypes.c_void_p(row.ctypes.data) for row in rows))
        return (outputs, *held) if held else outputs

    def act(self, observation: Array, *memory: Array) -> Any:
        """One raw observation to the environment's own action; a memory (H,) is brought up to date."""
        shown = np.ascontiguousarray(observation, self._actor.observations.dtype)
        given = [ctypes.c_void_p(each.ctypes.data) for each in (shown, *memory)]
        if self._actor.bounds is None:
            return self._act(*given)
        action = np.empty(self._actor.policy.actor.out_features, self._actor.bounds.dtype)
        self._act(*given, ctypes.c_void_p(action.ctypes.data))
        return action

    def actions(self, observations: Array) -> Array:
        """(N, *shape) raw to what `verify` compares: indices, or actions as the environment counts."""
        policy = self._actor.policy
        memory = [np.zeros(policy.actor.in_features, np.float32)] if policy.remembers else []
        own = [self.act(observation, *memory) for observation in observations]
        return np.array(own if self._actor.bounds is not None else [self._actor.actions.index(each) for each in own])


def identifier(name: str) -> str:
    """What functions in a file of this name begin with."""
    return re.sub(r"\W|^(?=\d)", "_", name, flags=re.ASCII)


def _reordered(block: Block, shape: tuple[int, ...]) -> Block:
    """A linear layer, which reads the channels of a pixel together, over an image whose channels come first."""
    channels, rows, columns = shape
    weight = block.weight.view(-1, rows, columns, channels).permute(0, 3, 1, 2).flatten(1).contiguous()
    return block._replace(weight=weight)
