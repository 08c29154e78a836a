"""Network families by width, and the policy around them: raw observations in, action logits and a value out."""

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from inspect import signature
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import relu

from potstill.distributions import Distribution, distribution_of
from potstill.errors import RAISED, InputError
from potstill.imports import find
from potstill.views import Array, Look, part, sensed

Layout = Literal["flat", "first", "last", "stack"]
"""How an observation is read: numbers without a place, an image whose channels come first (or that has none) or last,
or a stack of frames, the newest last."""
Critic = Literal["shared", "split"]
Precision = Literal["auto", "float32", "bfloat16"]
THREAD_WORK = 300_000_000  # multiply-adds: a Nature-CNN of 32 observations, some 10 ms of one core
OPTIONAL = ("input_clip", "squash", "seen_mean", "seen_deviation", "sparsity")  # buffers of a policy that most have not


@dataclass(frozen=True)
class NetworkConfig:
    """One member of a family: the layers are fixed, `width` scales how many units each has."""

    width: str = "1"
    """Multiplier on the units of every hidden layer, such as 1/8 or 0.5."""
    family: Annotated[str, tyro.conf.arg(name="network")] = "auto"
    """nature: Nature-CNN (Mnih et al. 2015), conv 32w-64w-64w, linear 512w. minatar: conv 16w, linear 128w (Young and
    Tian 2019). mlp: two layers of 64w tanh units. linear: no hidden layer. framewise: 32w filters that read each frame
    of a stack alike, then conv 32w-32w. depthwise: two filters for each frame alone, then one for each of 32w channels
    alone (MobileNet, Howard et al. 2017). gru: what auto is, then as many gated recurrent units, which remember. auto:
    by the shape of the observation. Or `module:name`, one of yours."""
    critic: Critic = "shared"
    """shared: the value head sits on the actor's trunk. split: the critic is a network of its own."""
    critic_width: str = "1"
    """Width of the critic where it is split."""
    options: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="network-option")] = ()
    """key=value, an argument of the network: of mlp `layers` (units at width 1, such as 400,300) and `activation`
    (tanh, relu, elu, leaky_relu, silu, gelu and more); of nature `hidden`, units of its linear layers at width 1
    (32,256 take half the size of 512 for as much agreement); of your own network whatever it takes. Repeatable."""

    @staticmethod
    def migrated(data: dict[str, Any]) -> dict[str, Any]:
        """The config that a file of an older version means."""
        if data.get("family") == "mlp-relu":
            return data | {"family": "mlp", "options": ["activation=relu"]}
        return data


class Size(NamedTuple):
    """Size of the deployed actor: view, trunk and action head. The value head, or a split critic, stays behind, and so
    do the deviations of continuous actions."""

    parameters: int  # without the weights that pruning took
    conv: int  # parameters in convolutions
    linear: int  # parameters in linear layers
    macs: int  # multiply-adds for one observation
    bytes: int  # float32 parameters, zeros among them, the normalisation buffers and the view's


def parse_width(text: str, what: str = "width") -> Fraction:
    """`1/8`, `0.125` or `2` as a fraction; `what` is its name in an error.

    Raises:
        InputError: not a number, or not positive.
    """
    # Fraction reads more than that: spaces, which would end up in names of files, and 1e999999999, digit by digit.
    if not re.fullmatch(r"-?\d{1,20}(/0*[1-9]\d{0,19}|\.\d{0,20})?|\.\d{1,20}", text, re.ASCII):
        raise InputError(f"{what} {text!r} is not a number; write 1/8 or 0.125")
    width = Fraction(text)
    if not 0 < width <= 16:
        raise InputError(f"{what} must be above 0 and at most 16, not {text}")
    return width


def as_options(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Keyword arguments of a network as `NetworkConfig.options` has them: by name, key=value, a list as 400,300."""
    listed = {key: value if isinstance(value, list | tuple) else [value] for key, value in values.items()}
    return tuple(f"{key}={','.join(map(str, listed[key]))}" for key in sorted(listed))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh, "relu": relu, "elu": F.elu, "leaky_relu": F.leaky_relu, "silu": F.silu, "gelu": F.gelu,
    "sigmoid": torch.sigmoid, "softplus": F.softplus, "selu": F.selu, "mish": F.mish, "relu6": F.relu6,
    "hardtanh": F.hardtanh, "softsign": F.softsign,
}  # fmt: skip


class Conv2d(nn.Conv2d):
    """torch's, of stride 1 and without padding; with few channels, on small images, in half the time.

    oneDNN pads channels to 16, of which the smallest networks use two. Here each row of the output is a dense product
    of the rows it sees, (B, h W C), with the kernel laid out along them, a band matrix (h W C, columns K): most of it
    is zero, and up to four channels it is faster all the same. The last bits differ.
    """

    def forward(self, input: Tensor) -> Tensor:
        plain = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
        if plain or self.out_channels > 4 or len(input) < 16:
            return super().forward(input)
        if (input.device.type, input.dtype) != ("cpu", torch.float32) or input.requires_grad:
            return super().forward(input)
        rows: Tensor = _Rows.apply(input.permute(0, 2, 3, 1).contiguous(), self.weight, self.bias)  # type: ignore[no-untyped-call]
        return rows.permute(0, 3, 1, 2)


class _Rows(torch.autograd.Function):
    """Images (B, H, W, C), kernel (K, C, h, w) and bias (K,) to (B, rows, columns, K)."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        (B, H, W, C), (K, _, h, w) = images.shape, weight.shape
        rows, columns = H - h + 1, W - w + 1
        ctx.sizes = rows, columns, K, C, h, w, W
        band = weight.new_zeros(h * W * C, columns * K)
        _Rows.kernels(band, ctx.sizes).copy_(weight.permute(2, 3, 1, 0))
        flat = images.view(B, -1)
        out = weight.new_empty(B, rows, columns * K)
        for i in range(rows):
            torch.mm(flat[:, i * W * C : (i + h) * W * C], band, out=out[:, i])
        ctx.save_for_backward(flat)
        return out.view(B, rows, columns, K).add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        rows, columns, K, C, h, _, W = ctx.sizes
        (flat,) = ctx.saved_tensors
        grad = grad.reshape(-1, rows, columns * K)
        band = grad.new_zeros(h * W * C, columns * K)
        for i in range(rows):
            band.addmm_(flat[:, i * W * C : (i + h) * W * C].t(), grad[:, i])
        weight = _Rows.kernels(band, ctx.sizes).sum(0).permute(3, 2, 0, 1)
        return None, weight, grad.sum((0, 1)).view(columns, K).sum(0)

    @staticmethod
    def kernels(band: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """The kernel's places in the band matrix, one for each column of the output: (columns, h, w, C, K), a view."""
        _, columns, K, C, h, w, W = sizes
        line = columns * K
        return band.as_strided((columns, h, w, C, K), (C * line + K, W * C * line, C * line, line, 1))


class GRU(nn.Module):
    """Gated recurrent units: what they give is what they remember.

    Source: Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder", with the reset gate behind the
    product with the memory, as PyTorch, cuDNN and ONNX (`linear_before_reset`) have it.
    """

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.read = nn.Linear(inputs, 3 * units)  # reset gate, update gate, new memory
        self.recall = nn.Linear(units, 3 * units)

    def forward(self, x: Tensor, memory: Tensor | None = None, begun: Tensor | None = None) -> Tensor:
        """T steps of N games, (T N, D) in the order they are played, to (T N, H), float32 in any precision.

        Args:
            memory: (N, H) before the first step; None is zeros, of one step.
            begun: (T N,) where games begin, which they do without a memory.
        """
        with torch.autocast("cpu" if x.is_meta else x.device.type, torch.bfloat16, enabled=False):
            x = x.float()
            if memory is None:
                memory = x.new_zeros(len(x), self.recall.in_features)
            kept = None if begun is None else (1.0 - begun.to(x)).view(-1, len(memory), 1)
            outputs = []
            for t, read in enumerate(self.read(x).split(len(memory))):
                before = memory if kept is None else memory * kept[t]
                (r, z, n), (u, v, w) = read.chunk(3, -1), self.recall(before).chunk(3, -1)
                new = torch.tanh(n + torch.sigmoid(r + u) * w)
                memory = new + torch.sigmoid(z + v) * (before - new)
                outputs.append(memory)
            return torch.cat(outputs)


class Trunk(nn.Module):
    """Convolutions, then linear layers, then a GRU where it remembers: prepared observations (B, ...) to features (B,
    F). Images that are not convolved are read row by row, the channels of a pixel together, wherever they came."""

    def __init__(self, convs: list[nn.Conv2d], linears: list[nn.Linear], activation: str = "relu") -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.linears = nn.ModuleList(linears)
        self.activation = activation
        self.gru: GRU | None = None

    @property
    def remembers(self) -> bool:
        return self.gru is not None

    def forward(self, inputs: Tensor, memory: Tensor | None = None, begun: Tensor | None = None) -> Tensor:
        """`memory` and `begun` as `GRU` takes them."""
        x = inputs if self.convs or inputs.dim() != 4 else inputs.permute(0, 2, 3, 1)
        for conv in self.convs:
            x = relu(conv(x))
        x = x.flatten(1)
        for linear in self.linears:
            x = ACTIVATIONS[self.activation](linear(x))
        return x if self.gru is None else self.gru(x, memory, begun)


class DepthwiseConv(nn.Conv2d):
    """Filters over each channel alone, such as each frame of a stack: (B, C, H, W) to (B, C F, H', W')."""

    def __init__(self, channels: int, filters: int, kernel: int, stride: int) -> None:
        super().__init__(channels, channels * filters, kernel, stride, groups=channels)

    def forward(self, inputs: Tensor) -> Tensor:
        return self._alone(inputs, self.weight.view(self.groups, -1, *self.kernel_size), self.bias)  # type: ignore[arg-type]

    def _alone(self, inputs: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
        """`filters` are those of each channel, (C, F, h, w)."""
        # As one convolution with zeros between the channels: in bfloat16 twice as fast there and back as one by one.
        channels = torch.eye(len(filters), device=inputs.device)
        weight = torch.einsum("mn,mfij->mfnij", channels, filters).flatten(0, 1)
        return F.conv2d(inputs, weight, bias, self.stride)


class FramewiseConv(DepthwiseConv):
    """The same filters over each channel."""

    def __init__(self, filters: int, kernel: int, stride: int) -> None:
        super().__init__(1, filters, kernel, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        filters = self.weight[:, 0].expand(inputs.shape[1], -1, -1, -1)
        return self._alone(inputs, filters, self.bias.repeat(len(filters)))  # type: ignore[union-attr]


class Family(NamedTuple):
    """One kind of network. A family is added here, as one entry of `FAMILIES`."""

    build: Callable[..., nn.Module]
    """(shape of a prepared observation, width, **options, all texts) -> module from (B, *shape) to features (B, F). One
    whose `remembers` is true takes a memory and where games begin, too, and gives what it remembers, as `GRU` does."""
    least: int = 0
    """Rows and columns an image needs; 0 reads anything."""


def _units(full: int, width: Fraction) -> int:
    return max(1, round(full * width))


def _nature(shape: tuple[int, ...], width: Fraction, hidden: str = "512") -> nn.Module:
    if not re.fullmatch(r"\d{1,5}(,\d{1,5})*", hidden, re.ASCII):
        raise InputError(f"network-option hidden={hidden[:20]}: units of linear layers at width 1, such as 32,256")
    first, second = _units(32, width), _units(64, width)
    convs = [nn.Conv2d(shape[0], first, 8, stride=4), nn.Conv2d(first, second, 4, stride=2)]
    convs.append(nn.Conv2d(second, second, 3))
    sizes = [_flat_size(convs, *shape[1:]), *(_units(int(n), width) for n in hidden.split(","))]
    return Trunk(convs, [nn.Linear(a, b) for a, b in pairwise(sizes)])


def _minatar(shape: tuple[int, ...], width: Fraction) -> nn.Module:
    convs: list[nn.Conv2d] = [Conv2d(shape[0], _units(16, width), 3)]
    return Trunk(convs, [nn.Linear(_flat_size(convs, *shape[1:]), _units(128, width))])


def _mlp(shape: tuple[int, ...], width: Fraction, layers: str = "64,64", activation: str = "tanh") -> nn.Module:
    if not re.fullmatch(r"(\d{1,5}(, ?\d{1,5})*)?", layers, re.ASCII) or activation not in ACTIVATIONS:
        raise InputError(
            f"network-option layers={layers[:40]} activation={activation[:20]}: layers are numbers such as 400,300,"
            f" activation is one of {', '.join(ACTIVATIONS)}"
        )
    sizes = [torch.Size(shape).numel(), *(_units(int(n), width) for n in layers.split(",") if n)]
    return Trunk([], [nn.Linear(a, b) for a, b in pairwise(sizes)], activation)


def _linear(shape: tuple[int, ...], width: Fraction) -> nn.Module:
    return Trunk([], [])


def _framewise(shape: tuple[int, ...], width: Fraction) -> nn.Module:
    units = _units(32, width)
    convs = [
        FramewiseConv(units, 8, stride=4),
        nn.Conv2d(shape[0] * units, units, 1),
        nn.Conv2d(units, units, 4, stride=2),
    ]
    return Trunk(convs, [])


def _depthwise(shape: tuple[int, ...], width: Fraction) -> nn.Module:
    units = _units(32, width)
    convs = [DepthwiseConv(shape[0], 2, 8, stride=4), nn.Conv2d(2 * shape[0], units, 1)]
    convs += [DepthwiseConv(units, 1, 4, stride=2), nn.Conv2d(units, units, 1)]
    return Trunk(convs, [])


def _gru(shape: tuple[int, ...], width: Fraction) -> nn.Module:
    trunk: Any = find_family("auto", shape)[1].build(shape, width)
    features = trunk.linears[-1].out_features
    trunk.gru = GRU(features, features)
    return trunk  # type: ignore[no-any-return]


FAMILIES: dict[str, Family] = {
    "nature": Family(_nature, least=36),
    "minatar": Family(_minatar, least=3),
    "mlp": Family(_mlp),
    "linear": Family(_linear),
    "framewise": Family(_framewise, least=20),
    "depthwise": Family(_depthwise, least=20),
    "gru": Family(_gru),
}


def find_family(name: str, shape: tuple[int, ...]) -> tuple[str, Family]:
    """A family and its name; `auto` is the first that reads an observation prepared to `shape`.

    Raises:
        InputError: there is none of that name, its module was not imported by the user, or it reads larger images.
    """
    size = min(shape[1:]) if len(shape) == 3 else 0
    if name == "auto":
        name = next(known for known, family in FAMILIES.items() if family.least <= size)
    if ":" in name:
        return name, Family(find(name, "--network"))
    if name not in FAMILIES:
        raise InputError(f"network {name[:60]!r} is unknown: use {', '.join(FAMILIES)}, or module:name")
    if FAMILIES[name].least > size:
        raise InputError(
            f"the {name} family reads images of at least {FAMILIES[name].least} rows and columns; this task's"
            f" observations have shape {shape}: use mlp"
        )
    return name, FAMILIES[name]


def build_network(
    name: str, shape: tuple[int, ...], width: Fraction, options: tuple[str, ...]
) -> tuple[nn.Module, int]:
    """The hidden layers, and how many features they end in.

    Args:
        shape: of a prepared observation: (C, H, W) or (D,).
        options: each key=value.

    Raises:
        InputError: the family has no such option, or a user's function gives no network that reads such observations.
    """
    given = dict(option.partition("=")[::2] for option in options)
    name, family = find_family(name, shape)
    if name in FAMILIES and (unknown := given.keys() - (known := [*signature(family.build).parameters][2:])):
        raise InputError(f"network {name} has no option {min(unknown)!r}: it has {', '.join(known) or 'none'}")
    try:
        with torch.random.fork_rng(devices=[]):  # a user's network draws its weights from here, before `initialise`
            torch.manual_seed(0)
            network = family.build(shape, width if name in FAMILIES else float(width), **given)
        if not isinstance(network, nn.Module):
            raise TypeError(f"it gives {type(network).__name__}, not a torch.nn.Module")
        at = next(iter(network.parameters()), torch.empty(0)).device
        with torch.no_grad():
            features = network(torch.zeros((1, *shape), device=at))
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != 1:
            raise TypeError(f"one observation gives {getattr(features, 'shape', type(features))}, not (1, features)")
    except InputError:
        raise
    except RAISED as error:  # a user's function raises whatever it likes
        why = str(error).partition("\n")[0]
        raise InputError(f"--network {name} for observations {shape} {' '.join(options)}: {why}") from error
    return network, features.shape[1]


class Policy(nn.Module):
    """Actor and critic with the input normalisation inside.

    `forward` takes raw observations. Training calls `prepare` once per observation and `heads` as often as it needs:
    preparing costs more than a small network's own pass.

    Buffers (saved with the weights): `mean` and `scale`, per pixel or feature, shared by the frames of a stack (a scale
    of zero hides what is there); `return_scale`, the unit of the value head in units of reward. Others are there only
    in policies from elsewhere, the first two in their students too: `input_clip`, the bound of a normalised input where
    it is not the family's own; `squash`: means of continuous actions go through tanh, and then not beyond this bound;
    `seen_mean` and `seen_deviation` of observations, where they are not normalised, which students are to do. A pruned
    one has its `sparsity`, the share of weights that are zero for good and do not count.

    `distribution` says what the logits mean. Those of continuous actions are means, then log standard deviations: the
    deviations are parameters of the policy (`log_std`), the same in every state.

    What `remembers` plays N games in order: `restart` tells it before each step which of them begin, and its `memory`
    (N, F) goes on with each call of `logits` or `heads`. Sequences are learned from with a memory that is given. Who
    plays games with a policy that others may play with too takes its `player`.
    """

    mean: Tensor
    scale: Tensor
    return_scale: Tensor
    input_clip: Tensor | None
    squash: Tensor | None
    seen_mean: Tensor | None
    seen_deviation: Tensor | None
    sparsity: Tensor | None
    sees_raw = False
    """Whether this is code of the user's own, whose `prepare` hands raw observations on: the normalisation is for
    students then, and of its network nothing is known."""
    memory: Tensor | None = None
    hard_objective: str | None = None
    """How a student learns from one that tells actions without their probabilities; None where it tells logits."""

    def __init__(
        self,
        config: NetworkConfig,
        observation_shape: tuple[int, ...],
        num_actions: int | tuple[int, ...],
        continuous: bool = False,
        layout: Layout | None = None,
        dtype: str = "",
        view: tuple[str, ...] = (),
    ) -> None:
        """Args:
        observation_shape: of raw observations, as the environment shows them.
        num_actions: to choose among; a tuple where several choices are made at once; continuous ones taken at once.
        layout: None as the first checkpoints have it, which do not tell: large images are stacks, small ones grids.
        dtype: of raw observations; "" is not told. Those of more than 24 bits are centred before they are rounded.
        """
        super().__init__()
        self.config = config
        self.observation_shape = tuple(observation_shape)
        self.num_actions = num_actions
        self.continuous = continuous
        if layout is None:
            large = len(observation_shape) == 3 and min(observation_shape[1:]) >= 36
            layout = "stack" if large else "last" if len(observation_shape) == 3 else "flat"
        self.layout: Layout = layout
        self.dtype = dtype
        self.view = view
        own = view[len(sensed(view)) :]  # what the environment does not show so already
        self.look = Look(own, self.observation_shape, layout) if own else None
        self.distribution: Distribution = distribution_of(num_actions, continuous)
        outputs = num_actions if isinstance(num_actions, int) else sum(num_actions)
        self.log_std = nn.Parameter(torch.zeros(outputs)) if continuous else None
        self.family, _ = find_family(config.family, self.input_shape)
        self.trunk, features = build_network(self.family, self.input_shape, parse_width(config.width), config.options)
        self.remembers: bool = getattr(self.trunk, "remembers", False)
        if self.remembers and config.critic == "split":
            raise InputError(f"{self.family} has one memory for actor and critic: leave out --critic split")
        self.actor = nn.Linear(features, outputs)
        self.critic_trunk: nn.Module | None = None
        if config.critic == "split":
            width = parse_width(config.critic_width)
            self.critic_trunk, features = build_network(self.family, self.input_shape, width, config.options)
        self.critic = nn.Linear(features, 1)
        precise = torch.float64 if dtype in ("float64", "int32", "int64", "uint32", "uint64") else torch.float32
        self.register_buffer("mean", torch.zeros(self.normalised_shape, dtype=precise))
        self.register_buffer("scale", torch.ones(self.normalised_shape))
        self.register_buffer("return_scale", torch.ones(()))
        for name in OPTIONAL:
            self.register_buffer(name, None)

    @property
    def spaces(self) -> dict[str, Any]:
        """What it sees and what it chooses: `Policy(config, **policy.spaces)` is another for the same task."""
        names = ("observation_shape", "num_actions", "continuous", "layout", "dtype", "view")
        return {name: getattr(self, name) for name in names}

    @property
    def seen_shape(self) -> tuple[int, ...]:
        """Shape of what its view leaves of an observation."""
        return self.observation_shape if self.look is None else self.look.shape

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a prepared observation: (C, H, W) of an image, (D,) of anything else."""
        shape = self.seen_shape
        if self.layout == "flat":
            return (torch.Size(shape).numel(),)
        if len(shape) == 2:
            return (1, *shape)
        return shape if self.layout != "last" else (shape[2], *shape[:2])

    @property
    def normalised_shape(self) -> tuple[int, ...]:
        """Shape of what is normalised together: one frame of a stack, the channels of a photo, or all there is."""
        shape = self.seen_shape
        if self.layout == "stack":
            return shape[1:]
        if self.layout == "flat" or self.dtype in ("", "bool"):  # the first checkpoints did not tell
            return shape
        if len(shape) == 2:
            return (1, 1)
        return (1, 1, shape[2]) if self.layout == "last" else (shape[0], 1, 1)

    @property
    def num_logits(self) -> int:
        """L: one per action, or a mean and a deviation of each continuous one."""
        return 2 * self.actor.out_features if self.continuous else self.actor.out_features

    @property
    def clip(self) -> float:
        """Bound of a normalised input: pixels that a random policy never lit would otherwise be huge."""
        if self.input_clip is not None:
            return float(self.input_clip)
        return 5.0 if self.layout == "stack" or self.normalised_shape != self.seen_shape else float("inf")

    def initialise(self, generator: torch.Generator) -> "Policy":
        """Orthogonal weights, zero biases; gain sqrt(2) for hidden layers, 0.01 for the actor, 1 for the critic.

        Source: Huang et al. 2022, "The 37 Implementation Details of PPO", detail 2.
        """
        heads = {self.actor: 0.01, self.critic: 1.0}
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(layer.weight, heads.get(layer, 2**0.5), generator=generator)  # type: ignore[arg-type]
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif hasattr(layer, "reset_parameters"):  # of a user's network: as torch has it, from the same seed
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
                    layer.reset_parameters()  # type: ignore[operator]  # a method
        return self

    def normalise_by(self, mean: Tensor, deviation: Tensor) -> None:
        """Sets the input normalisation from figures per pixel or feature.

        A deviation of zero, of what stood still, leaves the unit as it is. Pixels in bytes have one of 1 at least.
        """
        if mean.shape != self.mean.shape:  # of pixels, where a channel is normalised as one
            pixels = tuple(i for i, n in enumerate(self.mean.shape) if n == 1)
            squares = (deviation.square() + mean.square()).mean(pixels, keepdim=True)
            mean = mean.mean(pixels, keepdim=True)
            deviation = (squares - mean.square()).clamp(min=0).sqrt()
        if self.dtype == "uint8" and self.layout != "flat":
            deviation = deviation.clamp(min=1.0)
        deviation = deviation.masked_fill(deviation == 0, 1.0)
        self.mean.copy_(mean)
        self.scale.copy_(1.0 / deviation)

    def normalise_as(self, other: "Policy") -> None:
        """Takes over another policy's normalisation of inputs and values, or what that has for its students.

        Raises:
            InputError: it reads other observations, or reads them otherwise.
        """
        mine, theirs = ((p.observation_shape, p.layout, p.mean.shape) for p in (self, other))
        if mine != theirs:
            raise InputError(f"the teacher reads observations {theirs[0]} as {theirs[1]}, this task's are {mine[:2]}")
        self.mean.copy_(other.mean if other.seen_mean is None else other.seen_mean)
        self.scale.copy_(other.scale if other.seen_deviation is None else 1 / other.seen_deviation)
        self.return_scale.copy_(other.return_scale)
        self.input_clip = None if other.input_clip is None else other.input_clip.to(self.mean.device, copy=True)

    def sees_as(self, other: "Policy") -> bool:
        """Whether an observation prepared for the one is prepared for the other, too."""
        if self.sees_raw or other.sees_raw:
            return False
        if (self.view, self.layout, self.clip) != (other.view, other.layout, other.clip):
            return False
        return all(torch.equal(getattr(self, name).cpu(), getattr(other, name).cpu()) for name in ("mean", "scale"))

    def player(self, beside: "Sequence[Policy]" = ()) -> "Policy":
        """The same policy, of the same weights, with a memory of its own; `beside` are players of the same steps."""
        other = copy(self)
        other.memory = None
        return other

    def restart(self, begun: Any) -> None:
        """Told before each step which of N games begin, (N,) bool array, so that what has a memory may drop it."""
        if self.remembers and (
            self.memory is None or len(self.memory) != len(begun) or self.memory.device != self.mean.device
        ):
            self.memory = torch.zeros(len(begun), self.actor.in_features, device=self.mean.device)
        elif self.memory is not None and begun.any():
            self.memory = self.memory * torch.from_numpy(~begun).to(self.memory)[:, None]

    def hide(self, rows: int) -> None:
        """Sets the first `rows` rows of every normalised frame to zero, whatever they show, and whatever the view makes
        of them."""
        if not rows or self.layout != "stack" or rows >= self.observation_shape[1]:  # it is no picture
            return
        if self.look is None:
            self.scale[:rows] = 0.0
        else:
            shown = torch.ones((1, *self.observation_shape[1:]), device=self.scale.device)
            shown[:, :rows] = 0.0
            self.scale[self.look(shown, torch.float32, framed=True)[0] < 0.999] = 0.0

    def read(self, observations: Array) -> Tensor:
        """Raw observations (B, ...), of which it sees one view where there are several, as `prepare` takes them."""
        return torch.from_numpy(part(observations, self.view)).to(self.mean.device)

    def prepare(self, observations: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Raw observations (B, *observation_shape) to normalised inputs for `heads`, channels last where convolved."""
        kind = self.mean.dtype
        x = observations.to(kind) if self.look is None else self.look(observations, kind)
        x = (x - self.mean).to(torch.float32) * self.scale
        x = (x if math.isinf(self.clip) else x.clamp_(-self.clip, self.clip)).to(dtype)
        if self.layout == "flat":
            return x.reshape(x.shape[0], -1)  # by len, an exporter would take the number for a constant
        if self.layout == "last":
            return x.permute(0, 3, 1, 2)
        return x.reshape(-1, *self.input_shape).contiguous(memory_format=torch.channels_last)

    def heads(self, inputs: Tensor, memory: Tensor | None = None, begun: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Prepared inputs to logits (B, L) and value (B,), both float32, the value in units of `return_scale`.

        The dtype of `inputs` decides the arithmetic: bfloat16 inputs run under autocast.

        Args:
            memory: (N, F) before the first of B / N steps of N games; None is that of the games it plays.
            begun: (B,) where games begin, with a memory that is given.
        """
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.dtype == torch.bfloat16):
            features = self._features(inputs, memory, begun)
            logits = self.actor(features)
            value = self.critic(self.critic_trunk(inputs) if self.critic_trunk is not None else features)
        return self._with_deviations(self._squashed(logits.float())), value.squeeze(-1).float()

    def logits(self, inputs: Tensor) -> Tensor:
        """Prepared inputs to logits (B, L) float32: what the deployed actor computes."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.dtype == torch.bfloat16):
            logits: Tensor = self.actor(self._features(inputs))
        return self._with_deviations(self._squashed(logits.float()))

    def _features(self, inputs: Tensor, memory: Tensor | None = None, begun: Tensor | None = None) -> Tensor:
        if not self.remembers:
            return self.trunk(inputs)  # type: ignore[no-any-return]
        if memory is not None:
            return self.trunk(inputs, memory, begun)  # type: ignore[no-any-return]
        if self.memory is None or len(self.memory) != len(inputs):
            raise RuntimeError(f"{len(inputs)} observations, of games that `restart` was not told of")
        features: Tensor = self.trunk(inputs, self.memory)
        self.memory = features.detach()
        return features

    def remember(self, inputs: Tensor, memory: Tensor, begun: Tensor) -> Tensor:
        """The memory (N, F) after steps of N games, as `heads` takes them."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.dtype == torch.bfloat16):
            return self._features(inputs, memory, begun)[-len(memory) :]

    def _squashed(self, means: Tensor) -> Tensor:
        return means if self.squash is None else torch.clamp(torch.tanh(means), -self.squash, self.squash)

    def _with_deviations(self, logits: Tensor) -> Tensor:
        return logits if self.log_std is None else torch.cat([logits, self.log_std.expand_as(logits)], dim=-1)

    def forward(self, observations: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Raw observations (B, *observation_shape) to logits (B, L) and value (B,) in units of reward, float32.

        Args:
            memory: (B, F) before them; None where games begin with them.
        """
        if memory is None and self.remembers:
            memory = torch.zeros(len(observations), self.actor.in_features, device=self.mean.device)
        logits, value = self.heads(self.prepare(observations), memory)
        return logits, value * self.return_scale

    @property
    def hidden(self) -> list[nn.Conv2d | nn.Linear]:
        """The deployed layers but the last, whose weights may be pruned."""
        return [layer for layer in self.trunk.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]

    @property
    def stored(self) -> int:
        """How many numbers the deployed layers hold, zeros among them."""
        return sum(p.numel() for part in (self.trunk, self.actor) for p in part.parameters())

    def size(self) -> Size:
        """Counts the deployed actor, as one observation passes through it.

        Of zeros among the weights, as many do not count as pruning took. Others come of rounding, and differ by seed.
        """
        conv, linear, macs = 0, 0, 0
        zeros: dict[nn.Module, int] = {}
        gone, share = 0, 0.0  # weights that pruning took, and how much of the zeros they are
        if self.sparsity is not None:
            zeros = {layer: int((layer.weight == 0).sum()) for layer in self.hidden}
            pruned = round(float(self.sparsity.nan_to_num().clamp(0, 1)), 6)  # as it was before float32
            gone = min(int(pruned * sum(layer.weight.numel() for layer in self.hidden)), sum(zeros.values()))
            share = gone / max(1, sum(zeros.values()))

        def count(layer: nn.Module, _: Any, output: Tensor) -> None:
            nonlocal conv, linear, macs
            weight: Any = layer.weight
            own = sum(p.numel() for p in layer.parameters(recurse=False)) - round(share * zeros.get(layer, 0))
            macs += weight[0].numel() * output.numel()
            conv, linear = (conv + own, linear) if isinstance(layer, CONVS) else (conv, linear + own)

        layers = [layer for part in (self.trunk, self.actor) for layer in part.modules()]
        hooks = [each.register_forward_hook(count) for each in layers if isinstance(each, (*CONVS, nn.Linear))]
        try:
            with torch.no_grad():
                self.actor(self.trunk(torch.zeros((1, *self.input_shape), device=self.mean.device)))
        finally:
            for hook in hooks:
                hook.remove()
        kept = self.stored + self.mean.numel() + self.scale.numel()
        if self.look is not None:
            kept, macs = kept + self.look.numbers, macs + self.look.macs
        return Size(self.stored - gone, conv, linear, macs, 4 * kept)

    def __str__(self) -> str:
        """One line: the family, what it reads, its layers and its parameters."""
        shapes = [(m, next(m.parameters(recurse=False), None)) for m in [*self.trunk.modules(), self.actor]]
        shown = " - ".join(f"{type(m).__name__.lower()} {tuple(w.shape)}" for m, w in shapes if w is not None)
        reads = "" if self.layout == "flat" else f" {self.layout}"
        reads += f" as {' '.join(self.view)} {self.seen_shape}" if self.view else ""
        return f"{self.family}, reads {self.observation_shape}{reads}: {shown}; {self.size().parameters:,} parameters"


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fitting_precision(precision: Precision, layout: Layout) -> Precision:
    """The same, but `auto` of numbers is float32.

    bfloat16 has three digits, too few for a state or for the values of a DQN, and a small network gains nothing by it.
    """
    return "float32" if precision == "auto" and layout == "flat" else precision


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of inputs and activations in training; what `auto` comes to is measured once in a process."""
    if precision != "auto":
        return torch.float32 if precision == "float32" else torch.bfloat16
    return torch.float32 if device.type == "mps" else faster_precision(device)


@cache
def faster_precision(device: torch.device) -> torch.dtype:
    """The dtype in which a convolution's forward and backward pass takes less time, measured now.

    bfloat16 wins clearly where the hardware has it (AVX-512 BF16, AMX, tensor cores) and loses many times over where it
    is emulated, so the choice is stable.
    """
    conv = nn.Conv2d(32, 64, 4, stride=2).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.zeros(128, 32, 20, 20, device=device).contiguous(memory_format=torch.channels_last)

    # One thread, its own processor time, and the two in turns: on a busy machine the clock on the wall measures
    # other programs, the process's time other threads of this one, and several threads of torch wait for each other.
    now = time.perf_counter if device.type == "cuda" else time.thread_time
    best = dict.fromkeys((torch.bfloat16, torch.float32), float("inf"))
    with torch_threads(1):
        for _ in range(6):
            for dtype, so_far in best.items():
                inputs = x.to(dtype)
                start = now()
                with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                    loss = conv(inputs).square().sum()
                loss.backward()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                best[dtype] = min(so_far, now() - start)
    return torch.bfloat16 if best[torch.bfloat16] < 0.8 * best[torch.float32] else torch.float32


@contextmanager
def torch_threads(most: int, work: int = 0) -> Iterator[None]:
    """Torch computes on as many threads as `work` is worth, `most` at most, for as long as this lasts.

    Threads wait for each other in every layer. Where one is kept waiting for a core by another program, a small layer
    takes many times as long as on one thread.

    Args:
        work: multiply-adds of one pass; 0 takes one thread, so that what is timed depends least on other programs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(most, 1 + work // THREAD_WORK))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resolve_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU.

    Raises:
        InputError: the device is unknown or not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, there in available.items() if there))
    if name not in available:
        raise InputError(f"device {name!r} is unknown: use auto, cuda, mps or cpu")
    if not available[name]:
        raise InputError(f"device {name} is not available here: use --device cpu")
    return torch.device(name)


def _flat_size(convs: list[nn.Conv2d], rows: int, columns: int) -> int:
    x = torch.zeros(1, convs[0].in_channels, rows, columns)
    for conv in convs:
        x = conv(x)
    return x.numel()
