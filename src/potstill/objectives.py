"""Distillation objectives: what a student pays, state by state, for not deciding as its teacher does."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from potstill.errors import InputError
from potstill.imports import find

Loss = Callable[[Tensor, Tensor, float], Tensor]
"""(student logits, teacher logits, temperature) -> loss per state, (B,). Those of a Gaussian are described in
`distributions`."""


class Objective(NamedTuple):
    """One loss, for each kind of action. A new one is a function here and its entry in `OBJECTIVES`."""

    categorical: Loss  # of one choice among actions; of several at once each is paid for
    gaussian: Loss


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) of the teacher's softmax policy p to the student's q, per state.

    Mass-covering: every action the teacher takes must be paid for, those it never takes cost little. The gradient with
    respect to the student's logits is (q - p) / temperature, bounded however far apart the two are.

    Args:
        student: logits, (B, A) float. Gradients flow here only.
        teacher: logits, (B, A) float, the same actions in the same order.
        temperature: divides both logits, so that equal logits remain the optimum at any temperature.

    Returns:
        Divergence in nats, (B,), not reduced: the caller weighs and averages.

    Raises:
        ValueError: the shapes differ or are not (B, A), or the temperature is not positive and finite.

    Source: Rusu et al. 2015, "Policy Distillation", the KL loss. They divide the teacher's logits alone, by 0.01: the
    Q-values of a DQN hardly differ between actions and have to be sharpened, PPO's logits are a policy already. Like
    Hinton et al. 2015 we divide both; unlike them we do not multiply by temperature squared: the caller may weigh.
    """
    _check_logits(student, teacher, temperature)
    log_p = log_softmax(teacher.detach() / temperature, dim=-1)
    log_q = log_softmax(student / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p) of the student's softmax policy q to the teacher's p, per state.

    Mode-seeking: a student too small to copy all of p pays for what it does and p would not, and may drop what p does
    seldom. The gradient carries a factor q, so it fades where the student is certain, right or wrong.

    Args, returns and raises: as `forward_kl`.

    Source: Gu et al. 2024, "MiniLLM", for the direction. We sum over all A actions instead of sampling one, and leave
    out the policy gradient through the states the student visits: this is the divergence at the given states, whoever
    chose them. Czarnecki et al. 2019, "Distilling Policy Distillation", show the price: a student-led update of this
    kind need not be the gradient of anything.
    """
    _check_logits(student, teacher, temperature)
    log_p = log_softmax(teacher.detach() / temperature, dim=-1)
    log_q = log_softmax(student / temperature, dim=-1)
    return (log_q.exp() * (log_q - log_p)).sum(dim=-1)


def greedy_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """-log q(a*) of the student's softmax policy q, a* the teacher's greedy action: behavioural cloning, per state.

    Ties in the teacher go to the first action. The loss never rests while the student has any doubt: its logits grow.

    Args:
        student, teacher: as `forward_kl`; of the teacher only the best action is used.
        temperature: divides the student's logits; below 1 the student is rewarded less for growing them further.

    Returns, raises: as `forward_kl`.

    Source: Rusu et al. 2015, the NLL loss, there without a temperature. It is forward KL with the teacher cooled to 0.
    """
    _check_logits(student, teacher, temperature)
    return cross_entropy(student / temperature, teacher.detach().argmax(dim=-1), reduction="none")


def logit_mse(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Squared distance of the two policies' logits, centred over actions, mean over actions, per state.

    A softmax is the same for z and z + c, so c is no part of the policy: it is where training happened to leave it. We
    subtract the mean over actions from both; else the student would spend its size on copying an accident.

    Args:
        student, teacher: as `forward_kl`.
        temperature: divides both logits: a weight of 1 / temperature squared.

    Returns:
        Squared logits, (B,), not reduced.

    Raises: as `forward_kl`.

    Source: Ba and Caruana 2014, "Do Deep Nets Really Need to be Deep?"; Rusu et al. 2015, the MSE loss, on Q-values,
    whose level does matter: neither centres over actions. At high temperatures both divergences, times temperature
    squared, tend to half of this (Hinton et al. 2015, section 2.1).
    """
    _check_logits(student, teacher, temperature)
    difference = (student - teacher.detach()) / temperature
    return (difference - difference.mean(dim=-1, keepdim=True)).square().mean(dim=-1)


def value_mse(student_value: Tensor, teacher_value: Tensor) -> Tensor:
    """Squared error of the student's value estimate, per state. Gradients flow to the student only.

    Args:
        student_value: (B,) float.
        teacher_value: (B,) float, in the same units: if one is scaled by its deviation of returns, so is the other.

    Returns:
        Squared units, (B,), not reduced.

    Raises:
        ValueError: a shape is not (B,) or they differ; (B, 1) and (B,) would silently broadcast to (B, B).
    """
    if student_value.shape != teacher_value.shape or student_value.dim() != 1:
        raise ValueError(f"values must both be (B,), not {tuple(student_value.shape)} and {tuple(teacher_value.shape)}")
    return (student_value - teacher_value.detach()).square()


def gaussian_forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) of the teacher's diagonal Gaussian p to the student's q, per state, in closed form.

    Args:
        student: means and log standard deviations, (B, 2d) float. Gradients flow here only.
        teacher: the same of the teacher.
        temperature: of p^(1/T) and q^(1/T), which are Gaussians of T times the variance. So it divides the squared
            distance of the means, and nothing else.

    Returns:
        Divergence in nats, (B,), summed over the d actions, not reduced over the batch.

    Raises:
        ValueError: the shapes differ or are not (B, 2d), or the temperature is not positive and finite.

    Source: Kullback and Leibler 1951; for two Gaussians e.g. Bishop 2006, "Pattern Recognition and Machine Learning",
    exercise 2.13.
    """
    (mean_q, log_q), (mean_p, log_p) = _gaussians(student, teacher, temperature)
    distance = (mean_p - mean_q).square() / temperature
    divergence = log_q - log_p + 0.5 * ((2 * (log_p - log_q)).exp() + distance * (-2 * log_q).exp() - 1.0)
    return divergence.sum(dim=-1)


def gaussian_reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p) of the student's diagonal Gaussian q to the teacher's p, per state. As `gaussian_forward_kl`."""
    (mean_q, log_q), (mean_p, log_p) = _gaussians(student, teacher, temperature)
    distance = (mean_p - mean_q).square() / temperature
    divergence = log_p - log_q + 0.5 * ((2 * (log_q - log_p)).exp() + distance * (-2 * log_p).exp() - 1.0)
    return divergence.sum(dim=-1)


def gaussian_cloning(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """-log q(a*) of the student's diagonal Gaussian q, a* the teacher's mean: behavioural cloning, per state.

    The student's deviation comes to the root mean square of its own error. There is no least value: a density has no
    upper bound, and a student that makes no error at all sharpens for ever.

    Args, returns and raises: as `gaussian_forward_kl`, but of the teacher only the mean is used.
    """
    (mean, log_std), (target, _) = _gaussians(student, teacher, temperature)
    surprise = 0.5 * (target - mean).square() / temperature * (-2 * log_std).exp() + log_std
    return (surprise + 0.5 * math.log(2 * math.pi * temperature)).sum(dim=-1)


def mean_mse(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Squared distance of the means, mean over actions, per state. The student's deviation gets no gradient.

    Args, returns and raises: as `gaussian_forward_kl`, but in squared units of the means, divided by temperature
    squared, as in `logit_mse`.
    """
    (mean, _), (target, _) = _gaussians(student, teacher, temperature)
    return ((mean - target) / temperature).square().mean(dim=-1)


OBJECTIVES = {
    "forward-kl": Objective(forward_kl, gaussian_forward_kl),
    "reverse-kl": Objective(reverse_kl, gaussian_reverse_kl),
    "greedy-cross-entropy": Objective(greedy_cross_entropy, gaussian_cloning),
    "logit-mse": Objective(logit_mse, mean_mse),
}


def find_objective(name: str) -> Objective:
    """The objective of that name, or a user's own as `module:name`.

    Raises:
        InputError: there is none; or what a user's own returns is not one loss per state, which its first call shows.
    """
    if ":" not in name:
        if name not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise InputError(f"no objective is called {name!r}; known: {known}, or your own as module:name")
        return OBJECTIVES[name]
    own = find(name, "--objective")

    def checked(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        loss = own(student, teacher.detach(), temperature)
        if not isinstance(loss, Tensor) or loss.shape != student.shape[:1] or not loss.is_floating_point():
            what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(f"--objective {name} returned {what}: it should be one loss per state, ({len(student)},)")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise InputError(f"--objective {name} does not depend on the student's logits: nothing could be learned")
        return loss

    return Objective(checked, checked)


def _gaussians(
    student: Tensor, teacher: Tensor, temperature: float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mean and log deviation, both (B, d), of the student and of the teacher."""
    _check_logits(student, teacher, temperature)
    if student.shape[1] % 2:
        raise ValueError(f"a Gaussian has as many means as deviations, not {student.shape[1]} numbers in all")
    (mean_q, log_q), (mean_p, log_p) = student.chunk(2, dim=-1), teacher.detach().chunk(2, dim=-1)
    return (mean_q, log_q), (mean_p, log_p)


def _check_logits(student: Tensor, teacher: Tensor, temperature: float) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"the action sets differ: student has logits {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
        )
    if student.dim() != 2:
        raise ValueError(f"logits must be (batch, actions), not {tuple(student.shape)}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
