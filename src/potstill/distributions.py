"""What a policy's logits say of its actions: a softmax over a list of them, several such lists, or a diagonal Gaussian.

Pure functions, one set per kind of action; `Policy.distribution` is the set that fits, so that training, distillation
and evaluation read the same for both. The logits of a Gaussian are its means, then its log standard deviations,
(B, 2d), in units of half the range of each action: -1 and 1 are the environment's bounds.
"""

import math
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from potstill import objectives
from potstill.errors import DivergedError
from potstill.objectives import Loss, Objective


class Distribution(NamedTuple):
    """The functions of one kind of action."""

    sample: Callable[[Tensor, torch.Generator | None], Tensor]  # logits -> one action per row
    greedy: Callable[[Tensor], Tensor]  # logits -> the best action of each row
    uniform: Callable[[Tensor, torch.Generator | None], Tensor]  # logits -> any action per row
    log_prob_and_entropy: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # logits, actions -> both (B,), nats
    kl: Callable[[Tensor, Tensor], Tensor]  # logits q and p -> KL(p || q), (B,), nats
    agreement: Callable[[Tensor, Tensor], dict[str, Tensor]]  # logits of two -> how their greedy actions compare, (B,)
    loss: Callable[[Objective], Loss]  # how a student is held to its teacher's logits


def sample(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One action per row from softmax(logits), (B,) int64.

    Raises:
        DivergedError: the logits are no longer finite numbers.
    """
    probabilities = logits.softmax(-1)
    if probabilities.isnan().any():
        raise DivergedError("the policy's logits are no longer finite numbers: lower --learning-rate")
    # What `torch.multinomial` does after as many checks again: exponential clocks, of which the first to ring wins.
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1)


def greedy(logits: Tensor) -> Tensor:
    """The most probable action of each row, (B,) int64; the first of equal ones."""
    return logits.argmax(-1)


def uniform(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One action per row, each as likely as any other, (B,) int64."""
    return sample(torch.zeros_like(logits), generator)


def log_prob_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Of `actions` (B,) under softmax(logits), and of softmax(logits); both (B,), in nats."""
    log_probs = logits.log_softmax(-1)
    chosen = log_probs.gather(1, actions[:, None]).squeeze(1)  # before the entropy: autograd adds up in this order
    return chosen, -(log_probs.exp() * log_probs).sum(-1)


def agreement(logits: Tensor, others: Tensor) -> dict[str, Tensor]:
    """`agreement`: 1 where the greedy actions are the same, 0 elsewhere, (B,)."""
    return {"agreement": (greedy(logits) == greedy(others)).float()}


def gaussian_sample(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One action per row, (B, d) float32, not clipped to the bounds: its density would be another.

    Raises:
        DivergedError: the logits are no longer finite numbers.
    """
    if not logits.isfinite().all():
        raise DivergedError("the policy's logits are no longer finite numbers: lower --learning-rate")
    mean, log_std = logits.chunk(2, dim=-1)
    return mean + log_std.exp() * torch.randn(mean.shape, generator=generator)


def gaussian_greedy(logits: Tensor) -> Tensor:
    """The mean of each row, clipped to the bounds, (B, d) float32."""
    return logits.chunk(2, dim=-1)[0].clamp(-1.0, 1.0)


def gaussian_uniform(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One action per row, uniform within the bounds, (B, d) float32."""
    return 2.0 * torch.rand((len(logits), logits.shape[-1] // 2), generator=generator) - 1.0


def gaussian_log_prob_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Of unclipped `actions` (B, d), and of the Gaussian itself; both (B,), in nats, summed over the d actions.

    Source: Huang et al. 2022, "The 37 Implementation Details of PPO", continuous actions, details 1 to 4: a diagonal
    Gaussian, deviations that do not depend on the state, and clipping that only the environment sees.
    """
    mean, log_std = logits.chunk(2, dim=-1)
    surprise = 0.5 * ((actions - mean) / log_std.exp()).square() + log_std + 0.5 * math.log(2 * math.pi)
    return -surprise.sum(-1), (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def gaussian_agreement(logits: Tensor, others: Tensor) -> dict[str, Tensor]:
    """`action_difference`: between greedy actions, absolute, mean over the d actions, in units of half the range, (B,).

    Two numbers are hardly ever the same, so agreement says nothing here.
    """
    return {"action_difference": (gaussian_greedy(logits) - gaussian_greedy(others)).abs().mean(-1)}


CATEGORICAL = Distribution(
    sample, greedy, uniform, log_prob_and_entropy, objectives.forward_kl, agreement, attrgetter("categorical")
)
GAUSSIAN = Distribution(
    gaussian_sample, gaussian_greedy, gaussian_uniform, gaussian_log_prob_and_entropy, objectives.gaussian_forward_kl,
    gaussian_agreement, attrgetter("gaussian"),
)  # fmt: skip


def several(choices: tuple[int, ...]) -> Distribution:
    """Of several choices made at once and independently, k of `choices[k]` options: logits (B, sum), actions (B, K).

    Log-probabilities, entropies and divergences are sums over the choices; two agree where all their choices do.
    """
    one = CATEGORICAL

    def each(pick: Callable[..., Tensor], logits: Tensor, *rest: torch.Generator | None) -> Tensor:
        return torch.stack([pick(part, *rest) for part in logits.split(choices, -1)], -1)

    def total(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        pairs = zip(student.split(choices, -1), teacher.split(choices, -1), strict=True)
        return torch.stack([loss(mine, theirs, temperature) for mine, theirs in pairs]).sum(0)

    def log_prob_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(logits.split(choices, -1), actions.unbind(-1), strict=True)
        log_probs, entropies = zip(*(one.log_prob_and_entropy(*pair) for pair in pairs), strict=True)
        return torch.stack(log_probs).sum(0), torch.stack(entropies).sum(0)

    def agreement(logits: Tensor, others: Tensor) -> dict[str, Tensor]:
        return {"agreement": (each(greedy, logits) == each(greedy, others)).all(-1).float()}

    return Distribution(
        partial(each, one.sample),
        partial(each, one.greedy),
        partial(each, one.uniform),
        log_prob_and_entropy,
        partial(total, one.kl),
        agreement,
        lambda objective: partial(total, objective.categorical),
    )


def distribution_of(num_actions: int | tuple[int, ...], continuous: bool) -> Distribution:
    """The set of functions that fits a policy's actions."""
    if continuous:
        return GAUSSIAN
    return CATEGORICAL if isinstance(num_actions, int) else several(num_actions)
