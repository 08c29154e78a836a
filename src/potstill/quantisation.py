"""Fewer weights, or of 8 or 4 bits with a scale per output, as integer files hold them: how a student learns with such.

Sources: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 3 (forward passes compute with rounded numbers); Bengio et al. 2013, "Estimating or Propagating
Gradients Through Stochastic Neurons" (gradients go straight through the rounding).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import InputError
from potstill.networks import Policy

WIDEST = 2**30  # of a sum before its bias, and of the bias: together they stay within 32 bits
MARGIN = 2.0  # an activation may be so many times the largest that was seen


def greatest(bits: int) -> int:
    """The greatest integer weight; the least is its negative."""
    return int(2 ** (bits - 1)) - 1


def activation_levels(bits: int, inputs: int) -> int:
    """The greatest integer activation, of 16 bits at most, of which a sum of so many products stays within 32."""
    return min(32_767, WIDEST // (greatest(bits) * inputs))


def scales(weight: Tensor, bits: int) -> Tensor:
    """What one step of each output's integers stands for: (O, ...) weights to (O,) float64."""
    return weight.flatten(1).abs().amax(1).double().clamp(min=1e-30) / greatest(bits)


def on_grid(weight: Tensor, bits: int) -> Tensor:
    """The nearest weights that integers of so many bits hold. What lies there already stays."""
    steps = scales(weight, bits).view(-1, *[1] * (weight.dim() - 1))
    return ((weight.double() / steps).round() * steps).to(weight.dtype)


def is_on_grid(weight: Tensor, bits: int) -> bool:
    return torch.allclose(weight, on_grid(weight, bits), rtol=0.0, atol=1e-6 * float(weight.detach().abs().max()))


def deployed_layers(policy: Policy) -> list[nn.Conv2d | nn.Linear]:
    return [*policy.hidden, policy.actor]


def centred(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A last layer without what all actions have in common: it decides nothing, but would take most of the bits."""
    return weight - weight.mean(0), bias - bias.mean()


@torch.no_grad()
def round_weights(policy: Policy, bits: int) -> None:
    """Makes the deployed weights those of an integer file, for good; rounded ones stay."""
    head = policy.actor
    if not policy.continuous and isinstance(policy.num_actions, int) and not is_on_grid(head.weight, bits):
        for mine, value in zip((head.weight, head.bias), centred(head.weight, head.bias), strict=True):
            mine.copy_(value)
    for layer in deployed_layers(policy):
        layer.weight.copy_(on_grid(layer.weight, bits))


def round_statistics(policy: Policy) -> None:
    """Makes the means of pixels whole and their deviations some of 256, 2 % apart: each is stored in a byte then."""
    if policy.dtype == "uint8" and policy.layout != "flat":
        policy.mean.round_()
        shown = policy.scale > 0
        policy.scale[shown] = ((policy.scale[shown].log() * 50).round() / 50).exp()


@torch.no_grad()
def prune(policy: Policy, share: float) -> None:
    """Sets so large a share of the weights before the last layer to zero: the smallest of all these layers together.

    Weights that are zero already are the first to go, so a growing share keeps what it took.

    Raises:
        InputError: there are none.

    Source: Zhu and Gupta 2017, "To prune, or not to prune", whose schedule `distill` takes, layer by layer; all layers
    together lose less (Blalock et al. 2020, "What is the State of Neural Network Pruning?").
    """
    weights = [layer.weight for layer in policy.hidden]
    if not weights:
        raise InputError(f"the {policy.family} network has no weights before its last layer: leave sparsity at 0")
    policy.sparsity = torch.tensor(share, device=policy.mean.device)
    sizes = torch.cat([weight.abs().flatten() for weight in weights])
    if gone := int(share * len(sizes)):
        bound = sizes.kthvalue(gone).values
        for weight in weights:
            weight.masked_fill_(weight.abs() <= bound, 0.0)


def keep_pruned(policy: Policy) -> None:
    """Sees to it that an optimiser, which is new, leaves weights that are zero where they are. For good."""
    for layer in policy.hidden:
        layer.weight.register_hook(partial(torch.Tensor.masked_fill, mask=layer.weight == 0.0, value=0.0))


@contextmanager
def simulated(policy: Policy, bits: int) -> Iterator[None]:
    """In here the deployed network computes as its integer file will, activations included. Gradients go straight
    through to the exact weights, which are there again afterwards.
    """
    layers = deployed_layers(policy)
    exact = [(parameter, parameter.data) for layer in layers for parameter in layer.parameters(recurse=False)]
    hooks = [layer.register_forward_pre_hook(_rounded_input(bits)) for layer in layers]
    try:
        for parameter, data in exact:
            parameter.data = data.clone()
        round_weights(policy, bits)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, data in exact:
            parameter.data = data


def _rounded_input(bits: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    def hook(layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = inputs[0].float()
        step = MARGIN * x.detach().abs().max().clamp(min=1e-30) / activation_levels(bits, layer.weight[0].numel())
        return (x + ((x / step).round() * step - x).detach(),)

    return hook
