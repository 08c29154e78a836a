"""Network families by width, and the policy around them: raw observations in, action logits and a value out."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from potstill.distributions import CATEGORICAL, GAUSSIAN, Distribution
from potstill.errors import InputError

Family = Literal["auto", "nature", "minatar", "mlp", "mlp-relu"]
Critic = Literal["shared", "split"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class NetworkConfig:
    """One member of a family: the layers are fixed, `width` scales how many units each has."""

    width: str = "1"
    """Multiplier on the units of every hidden layer, such as 1/8 or 0.5."""
    family: Family = "auto"
    """nature: Nature-CNN (Mnih et al. 2015), conv 32w-64w-64w, linear 512w. minatar: conv 16w, linear 128w (Young and
    Tian 2019). mlp: two layers of 64w tanh units; mlp-relu: of ReLU units. auto: by the shape of the observation."""
    critic: Critic = "shared"
    """shared: the value head sits on the actor's trunk. split: the critic is a network of its own."""
    critic_width: str = "1"
    """Width of the critic where it is split."""


class Size(NamedTuple):
    """Size of the deployed actor: trunk and action head. The value head, or a split critic, stays behind, and so do the
    deviations of continuous actions."""

    parameters: int
    conv: int  # parameters in convolutions
    linear: int  # parameters in linear layers
    macs: int  # multiply-adds for one observation
    bytes: int  # float32 parameters and the normalisation buffers


def parse_width(text: str) -> Fraction:
    """`1/8`, `0.125` or `2` as a fraction.

    Raises:
        InputError: not a number, or not positive.
    """
    # Fraction reads more than that: spaces, which would end up in names of files, and 1e999999999, digit by digit.
    if not re.fullmatch(r"-?\d{1,20}(/0*[1-9]\d{0,19}|\.\d{0,20})?|\.\d{1,20}", text, re.ASCII):
        raise InputError(f"width {text!r} is not a number; write 1/8 or 0.125")
    width = Fraction(text)
    if not 0 < width <= 16:
        raise InputError(f"width must be above 0 and at most 16, not {text}")
    return width


class Trunk(nn.Module):
    """The hidden layers of one family at one width: prepared observations (B, ...) to features (B, `features`)."""

    def __init__(self, family: Family, width: Fraction, observation_shape: tuple[int, ...]) -> None:
        super().__init__()

        def units(full: int) -> int:
            return max(1, round(full * width))

        self.family = family
        if family == "nature":
            frames, rows, columns = observation_shape
            convs = [
                nn.Conv2d(frames, units(32), 8, stride=4),
                nn.Conv2d(units(32), units(64), 4, stride=2),
                nn.Conv2d(units(64), units(64), 3),
            ]
            flat = _flat_size(convs, rows, columns)
            self.features = units(512)
        elif family == "minatar":
            rows, columns, channels = observation_shape
            convs = [nn.Conv2d(channels, units(16), 3)]
            flat = _flat_size(convs, rows, columns)
            self.features = units(128)
        else:
            convs = []
            flat = int(torch.Size(observation_shape).numel())
            self.features = units(64)
        self.convs = nn.ModuleList(convs)
        linears = [nn.Linear(flat, self.features)]
        if family in ("mlp", "mlp-relu"):
            linears.append(nn.Linear(self.features, self.features))
        self.linears = nn.ModuleList(linears)

    def forward(self, ready: Tensor) -> Tensor:
        x = ready
        for conv in self.convs:
            x = relu(conv(x))
        x = x.flatten(1)
        for linear in self.linears:
            x = torch.tanh(linear(x)) if self.family == "mlp" else relu(linear(x))
        return x


class Policy(nn.Module):
    """Actor and critic with the input normalisation inside.

    `forward` takes raw observations. Training calls `prepare` once per observation and `heads` as often as it needs:
    preparing costs more than a small network's own pass.

    Buffers (saved with the weights): `mean` and `scale`, per pixel or feature, shared by the frames of a stack (a scale
    of zero hides what is there); `return_scale`, the unit of the value head in units of reward.

    `distribution` says what the logits mean. Those of continuous actions are means, then log standard deviations: the
    deviations are parameters of the policy (`log_std`), the same in every state.
    """

    mean: Tensor
    scale: Tensor
    return_scale: Tensor

    def __init__(
        self, config: NetworkConfig, observation_shape: tuple[int, ...], num_actions: int, continuous: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.observation_shape = tuple(observation_shape)
        self.num_actions = num_actions
        self.continuous = continuous
        self.distribution: Distribution = GAUSSIAN if continuous else CATEGORICAL
        self.log_std = nn.Parameter(torch.zeros(num_actions)) if continuous else None
        self.family: Family = _resolve_family(config.family, self.observation_shape)
        width = parse_width(config.width)
        self.trunk = Trunk(self.family, width, self.observation_shape)
        self.actor = nn.Linear(self.trunk.features, num_actions)
        self.critic_trunk: Trunk | None = None
        if config.critic == "split":
            self.critic_trunk = Trunk(self.family, parse_width(config.critic_width), self.observation_shape)
        self.critic = nn.Linear((self.critic_trunk or self.trunk).features, 1)
        self.register_buffer("mean", torch.zeros(self.normalised_shape))
        self.register_buffer("scale", torch.ones(self.normalised_shape))
        self.register_buffer("return_scale", torch.ones(()))

    @property
    def normalised_shape(self) -> tuple[int, ...]:
        """Shape of what is normalised together: one frame of a stack, or the whole observation."""
        return self.observation_shape[1:] if self.family == "nature" else self.observation_shape

    @property
    def num_logits(self) -> int:
        """L: one per action, or a mean and a deviation of each continuous one."""
        return num_logits(self.num_actions, self.continuous)

    @property
    def clip(self) -> float:
        """Bound of a normalised input: pixels that a random policy never lit would otherwise be huge."""
        return 5.0 if self.family == "nature" else float("inf")

    def initialise(self, generator: torch.Generator) -> "Policy":
        """Orthogonal weights, zero biases; gain sqrt(2) for hidden layers, 0.01 for the actor, 1 for the critic.

        Source: Huang et al. 2022, "The 37 Implementation Details of PPO", detail 2.
        """
        heads = {self.actor: 0.01, self.critic: 1.0}
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(layer.weight, heads.get(layer, 2**0.5), generator=generator)  # type: ignore[arg-type]
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        return self

    def normalise_by(self, mean: Tensor, deviation: Tensor, floor: float) -> None:
        """Sets the input normalisation; `floor` keeps a pixel that hardly ever changes from dividing by nothing."""
        self.mean.copy_(mean)
        self.scale.copy_(1.0 / deviation.clamp(min=floor))

    def normalise_as(self, other: "Policy") -> None:
        """Takes over another policy's normalisation of inputs and values.

        Raises:
            InputError: it is of another family or reads other observations.
        """
        if (self.family, self.observation_shape) != (other.family, other.observation_shape):
            raise InputError(f"the teacher is of the {other.family} family: use --family {other.family}")
        self.mean.copy_(other.mean)
        self.scale.copy_(other.scale)
        self.return_scale.copy_(other.return_scale)

    def sees_as(self, other: "Policy") -> bool:
        """Whether an observation prepared for the one is prepared for the other, too."""
        pairs = ((self.mean, other.mean), (self.scale, other.scale))
        return self.family == other.family and all(torch.equal(mine.cpu(), theirs.cpu()) for mine, theirs in pairs)

    def hide(self, rows: int) -> None:
        """Sets the first `rows` rows of every normalised frame to zero, whatever they show."""
        self.scale[:rows] = 0.0

    def prepare(self, observations: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Raw observations (B, *observation_shape) to normalised inputs for `heads`, channels last where convolved."""
        x = ((observations.to(torch.float32) - self.mean) * self.scale).clamp_(-self.clip, self.clip).to(dtype)
        if self.family == "nature":
            return x.contiguous(memory_format=torch.channels_last)
        return x.permute(0, 3, 1, 2) if self.family == "minatar" else x.flatten(1)

    def heads(self, ready: Tensor) -> tuple[Tensor, Tensor]:
        """Prepared inputs to logits (B, L) and value (B,), both float32, the value in units of `return_scale`.

        The dtype of `ready` decides the arithmetic: bfloat16 inputs run under autocast.
        """
        with torch.autocast(ready.device.type, torch.bfloat16, enabled=ready.dtype == torch.bfloat16):
            features = self.trunk(ready)
            logits = self.actor(features)
            value = self.critic(self.critic_trunk(ready) if self.critic_trunk is not None else features)
        return self._with_deviations(logits.float()), value.squeeze(-1).float()

    def logits(self, ready: Tensor) -> Tensor:
        """Prepared inputs to logits (B, L) float32: what the deployed actor computes."""
        with torch.autocast(ready.device.type, torch.bfloat16, enabled=ready.dtype == torch.bfloat16):
            logits: Tensor = self.actor(self.trunk(ready))
        return self._with_deviations(logits.float())

    def _with_deviations(self, logits: Tensor) -> Tensor:
        return logits if self.log_std is None else torch.cat([logits, self.log_std.expand_as(logits)], dim=-1)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Raw observations (B, *observation_shape) to logits (B, L) and value (B,) in units of reward, float32."""
        logits, value = self.heads(self.prepare(observations))
        return logits, value * self.return_scale

    def size(self) -> Size:
        """Counts the deployed actor."""
        convs = list(self.trunk.convs)
        linears = [*self.trunk.linears, self.actor]
        conv = sum(p.numel() for layer in convs for p in layer.parameters())
        linear = sum(p.numel() for layer in linears for p in layer.parameters())
        macs = sum(layer.weight.numel() for layer in linears)
        x = self.prepare(torch.zeros((1, *self.observation_shape), device=self.mean.device))
        for layer in convs:
            x = layer(x)
            macs += layer.weight.numel() * x.shape[2] * x.shape[3]  # type: ignore[operator]
        stored = conv + linear + self.mean.numel() + self.scale.numel()
        return Size(conv + linear, conv, linear, int(macs), 4 * stored)


def num_logits(num_actions: int, continuous: bool) -> int:
    return 2 * num_actions if continuous else num_actions


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
    with one_thread():
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
def one_thread() -> Iterator[None]:
    """Torch computes on one thread for as long as this lasts: what is timed then depends least on other programs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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


def _resolve_family(family: Family, shape: tuple[int, ...]) -> Family:
    if family == "auto":
        family = "mlp" if len(shape) != 3 else ("nature" if min(shape[1:]) >= 36 else "minatar")
    if family in ("mlp", "mlp-relu") and len(shape) == 3 and min(shape[1:]) >= 36:
        raise InputError(f"the {family} family reads features or small grids, not images: use nature")
    if family in ("nature", "minatar") and len(shape) != 3:
        raise InputError(f"the {family} family reads images; this task's observations have shape {shape}: use mlp")
    return family


def _flat_size(convs: list[nn.Conv2d], rows: int, columns: int) -> int:
    x = torch.zeros(1, convs[0].in_channels, rows, columns)
    for conv in convs:
        x = conv(x)
    return x.numel()
