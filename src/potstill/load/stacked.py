"""SB3's networks that no family of ours has: with a memory (RecurrentPPO), or with layers behind their convolutions."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from potstill.envs import Array
from potstill.networks import ACTIVATIONS, Policy


class Activation(nn.Module):
    """One of `networks.ACTIVATIONS`, as a layer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, inputs: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](inputs)


class Stacked(nn.Module):
    """Convolutions or plain numbers, an LSTM where there is one, linear layers and a head.

    Args:
        inputs: prepares raw observations.
        convs: names of the convolutions, in order; none for plain numbers.
        features: the linear layer behind the convolutions.
        lstm: its name; "" is none.
        linears: names of the hidden layers behind that, in order.
        scale, centre: of the head's outputs; with `squash`, of their tanh.

    Raises:
        KeyError: a layer is missing.
        RuntimeError: the LSTM's weights do not fit each other.
    """

    def __init__(
        self, inputs: Policy, state: Mapping[str, Tensor], *, convs: Sequence[str], features: str, lstm: str,
        linears: Sequence[str], head: str, activation: str, scale: Tensor, centre: Tensor, squash: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.inputs = inputs
        before: list[nn.Module] = []
        for name, stride in zip(convs, (4, 2, 1), strict=False):
            weight = state[f"{name}.weight"]
            conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], stride)  # type: ignore[arg-type]
            before += [_filled(conv, state, name), nn.ReLU()]
        before += [nn.Flatten()] + ([_linear(state, features), nn.ReLU()] if convs else [])
        self.before = nn.Sequential(*before)
        self.lstm: nn.LSTM | None = None
        if lstm:
            own = {name.removeprefix(f"{lstm}."): each for name, each in state.items() if name.startswith(f"{lstm}.")}
            gates, size = own["weight_ih_l0"].shape
            self.lstm = nn.LSTM(size, gates // 4, sum(name.startswith("weight_ih_l") for name in own))
            self.lstm.load_state_dict(own)
        after = [layer for name in linears for layer in (_linear(state, name), Activation(activation))]
        self.after = nn.Sequential(*after, _linear(state, head))
        self.squash = squash
        self.register_buffer("scale", scale)
        self.register_buffer("centre", centre)
        self.memory: tuple[Tensor, Tensor] | None = None  # hidden and cell state of each game

    def reset(self, begun: Array) -> None:
        """The games (N,) bool that begin do so without a memory."""
        if self.memory is not None and self.memory[0].shape[1] == len(begun):
            kept = torch.from_numpy(~begun).float()[None, :, None]
            self.memory = self.memory[0] * kept, self.memory[1] * kept
        else:
            self.memory = None

    def forward(self, observations: Tensor) -> Tensor:
        """Raw observations (N, *shape) to logits (N, A), or actions (N, d) in the environment's units."""
        x: Tensor = self.before(self.inputs.prepare(observations))
        if self.lstm is not None:
            if self.memory is not None and self.memory[0].shape[1] != len(x):
                self.memory = None
            x, self.memory = self.lstm(x[None], self.memory)
            x = x[0]
        x = self.after(x)
        return self.centre + self.scale * (torch.tanh(x) if self.squash else x)  # type: ignore[operator]


def _linear(state: Mapping[str, Tensor], name: str) -> nn.Module:
    outputs, inputs = state[f"{name}.weight"].shape
    return _filled(nn.Linear(inputs, outputs), state, name)


def _filled(layer: nn.Module, state: Mapping[str, Tensor], name: str) -> nn.Module:
    layer.load_state_dict({part: state[f"{name}.{part}"] for part in ("weight", "bias")})
    return layer
