import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from potstill.objectives import (
    OBJECTIVES,
    forward_kl,
    gaussian_cloning,
    gaussian_forward_kl,
    gaussian_reverse_kl,
    greedy_cross_entropy,
    logit_mse,
    mean_mse,
    reverse_kl,
    value_mse,
)

EVERY = pytest.mark.parametrize("objective", [each.categorical for each in OBJECTIVES.values()], ids=list(OBJECTIVES))
EVERY_GAUSSIAN = pytest.mark.parametrize(
    "objective", [each.gaussian for each in OBJECTIVES.values()], ids=list(OBJECTIVES)
)


def random_logits(batch: int, actions: int, seed: int) -> Tensor:
    return 2 * torch.randn(batch, actions, generator=torch.Generator().manual_seed(seed))


def log_odds(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


# Numbers worked out by hand


def test_forward_kl_of_a_uniform_student_from_a_certain_teacher_is_the_log_of_the_number_of_actions():
    assert forward_kl(torch.zeros(1, 6), torch.tensor([[80.0, 0, 0, 0, 0, 0]])).item() == pytest.approx(math.log(6))


def test_the_two_kls_of_one_pair_of_policies_are_the_textbook_sums_and_differ():
    student, teacher = log_odds(0.5, 0.5), log_odds(0.9, 0.1)
    assert forward_kl(student, teacher).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-6)
    assert reverse_kl(student, teacher).item() == pytest.approx(-0.5 * math.log(1.8) - 0.5 * math.log(0.2), abs=1e-6)


def test_greedy_cross_entropy_is_minus_the_log_probability_of_the_teachers_best_action():
    student, teacher = log_odds(0.2, 0.7, 0.1), torch.tensor([[0.0, 1.0, 3.0]])
    assert greedy_cross_entropy(student, teacher).item() == pytest.approx(-math.log(0.1), abs=1e-6)


def test_greedy_cross_entropy_takes_the_first_of_equally_good_actions():
    student = log_odds(0.2, 0.7, 0.1)
    assert greedy_cross_entropy(student, torch.zeros(1, 3)).item() == pytest.approx(-math.log(0.2), abs=1e-6)


def test_logit_mse_centres_and_averages_over_actions():
    # Differences 3, 0, 0 have mean 1: centred 2, -1, -1, so (4 + 1 + 1) / 3.
    assert logit_mse(torch.tensor([[3.0, 0.0, 0.0]]), torch.zeros(1, 3)).item() == pytest.approx(2.0)


def test_value_mse_squares_each_difference_and_leaves_the_mean_to_the_caller():
    assert value_mse(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])).tolist() == [0.25, 9.0]


# Gradients


def test_the_gradient_of_forward_kl_is_student_minus_teacher_probability_over_temperature():
    student, teacher = random_logits(4, 3, seed=0).requires_grad_(), random_logits(4, 3, seed=1)
    forward_kl(student, teacher, 2.5).sum().backward()
    assert torch.allclose(student.grad, ((student / 2.5).softmax(-1) - (teacher / 2.5).softmax(-1)) / 2.5, atol=1e-6)


def test_the_gradient_of_reverse_kl_weighs_each_surprise_by_the_students_probability():
    student, teacher = random_logits(4, 3, seed=0).requires_grad_(), random_logits(4, 3, seed=1)
    loss = reverse_kl(student, teacher)
    loss.sum().backward()
    q, log_ratio = student.softmax(-1), student.log_softmax(-1) - teacher.log_softmax(-1)
    assert torch.allclose(student.grad, q * (log_ratio - loss[:, None]), atol=1e-6)


@pytest.mark.parametrize("objective", [forward_kl, reverse_kl, logit_mse])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
def test_a_student_with_its_teachers_policy_pays_and_moves_nothing_at_any_temperature(objective, temperature):
    teacher = random_logits(5, 4, seed=2)
    student = (teacher + 3.0).requires_grad_()
    loss = objective(student, teacher, temperature)
    loss.sum().backward()
    assert torch.allclose(loss, torch.zeros(5), atol=1e-6)
    assert torch.allclose(student.grad, torch.zeros(5, 4), atol=1e-5)


@EVERY
def test_the_teacher_gets_no_gradient_and_the_student_does(objective):
    student, teacher = random_logits(3, 4, seed=0).requires_grad_(), random_logits(3, 4, seed=1).requires_grad_()
    objective(student, teacher, 1.0).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_the_teachers_value_gets_no_gradient_and_the_students_does():
    student, teacher = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    value_mse(student, teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad.tolist() == [-2.0, -2.0]


@EVERY
def test_a_student_and_a_teacher_certain_of_opposite_actions_still_give_finite_numbers(objective):
    student = torch.tensor([[500.0, -500.0]], requires_grad=True)
    loss = objective(student, torch.tensor([[-500.0, 500.0]]), 1.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()


# Identities


@EVERY
def test_the_offset_of_either_networks_logits_does_not_matter(objective):
    student, teacher = random_logits(5, 3, seed=0), random_logits(5, 3, seed=1)
    loss = objective(student, teacher, 1.0)
    shifted = objective(student + torch.tensor([[4.0]]), teacher - torch.linspace(-9, 9, 5)[:, None], 1.0)
    assert torch.allclose(shifted, loss, rtol=1e-4, atol=1e-5)


@EVERY
def test_a_states_loss_does_not_depend_on_the_rest_of_its_batch(objective):
    student, teacher = random_logits(2, 6, seed=0), random_logits(2, 6, seed=1)
    together = objective(student, teacher, 1.5)
    apart = torch.cat([objective(student[i : i + 1], teacher[i : i + 1], 1.5) for i in range(2)])
    assert together.shape == (2,)
    assert torch.allclose(together, apart, atol=1e-6)


@EVERY
def test_temperature_divides_the_logits(objective):
    student, teacher = random_logits(4, 3, seed=0), random_logits(4, 3, seed=1)
    assert torch.allclose(objective(student, teacher, 0.5), objective(2 * student, 2 * teacher, 1.0), atol=1e-5)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_at_a_high_temperature_both_divergences_become_half_the_logit_mse(divergence):
    student, teacher = random_logits(4, 3, seed=0).double(), random_logits(4, 3, seed=1).double()
    hot = 1e4
    assert torch.allclose(hot**2 * divergence(student, teacher, hot), logit_mse(student, teacher) / 2, rtol=1e-3)


def test_at_a_low_temperature_forward_kl_becomes_greedy_cross_entropy():
    student, teacher = log_odds(0.2, 0.5, 0.3), log_odds(0.5, 0.3, 0.2)
    cold = forward_kl(student, teacher, 0.02)
    assert torch.allclose(cold, greedy_cross_entropy(student, teacher, 0.02), rtol=1e-6)
    assert 0.02 * cold.item() == pytest.approx(math.log(0.5 / 0.2), rel=1e-4)  # the margin the student gets wrong


# Continuous actions


def gaussian(means, deviations):
    return torch.tensor([[*means, *(math.log(deviation) for deviation in deviations)]])


def test_the_kls_of_two_gaussians_worked_out_by_hand():
    student, teacher = gaussian([0.0], [2.0]), gaussian([1.0], [1.0])
    assert gaussian_forward_kl(student, teacher).item() == pytest.approx(math.log(2) + (1 + 1) / 8 - 0.5, abs=1e-6)
    assert gaussian_reverse_kl(student, teacher).item() == pytest.approx(-math.log(2) + (4 + 1) / 2 - 0.5, abs=1e-6)


def test_they_are_torchs_own_summed_over_actions():
    student, teacher = 0.5 * random_logits(5, 6, seed=0), 0.5 * random_logits(5, 6, seed=1)
    q, p = (Normal(logits[:, :3], logits[:, 3:].exp()) for logits in (student, teacher))
    assert torch.allclose(gaussian_forward_kl(student, teacher), kl_divergence(p, q).sum(-1), rtol=1e-4)
    assert torch.allclose(gaussian_reverse_kl(student, teacher), kl_divergence(q, p).sum(-1), rtol=1e-4)


def test_cloning_is_minus_the_log_density_of_the_teachers_mean_whatever_the_teachers_deviation():
    student = gaussian([0.0, 1.0], [1.0, 2.0])
    expected = -Normal(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])).log_prob(torch.tensor([3.0, -1.0])).sum()
    for deviation in (0.1, 5.0):
        assert gaussian_cloning(student, gaussian([3.0, -1.0], [deviation] * 2)).item() == pytest.approx(
            expected.item()
        )


def test_the_deviation_that_clones_best_is_the_students_own_error():
    student = gaussian([0.0], [0.5]).requires_grad_()
    gaussian_cloning(student, gaussian([0.5], [9.0])).sum().backward()
    assert student.grad[0, 1].item() == pytest.approx(0.0, abs=1e-6)
    assert student.grad[0, 0].item() < 0  # the mean is still to move up


def test_the_squared_distance_of_means_is_averaged_over_actions_and_leaves_the_deviations_alone():
    student = gaussian([1.0, 3.0], [1.0, 1.0]).requires_grad_()
    loss = mean_mse(student, gaussian([0.0, 0.0], [7.0, 7.0]))
    loss.sum().backward()
    assert loss.item() == pytest.approx((1 + 9) / 2)
    assert student.grad[0, 2:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("objective", [gaussian_forward_kl, gaussian_reverse_kl, mean_mse])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
def test_a_gaussian_student_with_its_teachers_policy_pays_and_moves_nothing(objective, temperature):
    teacher = random_logits(5, 4, seed=2)
    student = teacher.clone().requires_grad_()
    loss = objective(student, teacher, temperature)
    loss.sum().backward()
    assert torch.allclose(loss, torch.zeros(5), atol=1e-6)
    assert torch.allclose(student.grad, torch.zeros(5, 4), atol=1e-5)


@pytest.mark.parametrize("objective", [gaussian_forward_kl, gaussian_reverse_kl, gaussian_cloning])
def test_a_temperature_multiplies_the_variance_of_both_gaussians(objective):
    student, teacher = 0.5 * random_logits(4, 6, seed=0), 0.5 * random_logits(4, 6, seed=1)
    wider = torch.tensor([0.0] * 3 + [0.5 * math.log(2.5)] * 3)
    assert torch.allclose(objective(student, teacher, 2.5), objective(student + wider, teacher + wider, 1.0), rtol=1e-4)


@EVERY_GAUSSIAN
def test_a_gaussian_teacher_gets_no_gradient_and_its_student_does(objective):
    student, teacher = random_logits(3, 4, seed=0).requires_grad_(), random_logits(3, 4, seed=1).requires_grad_()
    loss = objective(student, teacher, 1.0)
    loss.sum().backward()
    assert loss.shape == (3,)
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@EVERY_GAUSSIAN
def test_an_odd_count_of_numbers_is_no_gaussian(objective):
    with pytest.raises(ValueError, match="as many means as deviations, not 3 numbers"):
        objective(torch.zeros(1, 3), torch.zeros(1, 3), 1.0)


# Bad input


@EVERY
def test_different_action_sets_are_refused_by_name(objective):
    with pytest.raises(ValueError, match=r"action sets differ: student has logits \(1, 3\), teacher \(1, 6\)"):
        objective(torch.zeros(1, 3), torch.zeros(1, 6), 1.0)


@EVERY
def test_logits_without_a_batch_are_refused(objective):
    with pytest.raises(ValueError, match=r"must be \(batch, actions\), not \(3,\)"):
        objective(torch.zeros(3), torch.zeros(3), 1.0)


@EVERY
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(objective, temperature):
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        objective(torch.zeros(1, 3), torch.zeros(1, 3), temperature)


@pytest.mark.parametrize("teacher", [torch.zeros(4), torch.zeros(2, 1)], ids=["another batch", "a column"])
def test_values_that_would_broadcast_are_refused(teacher):
    with pytest.raises(ValueError, match=r"values must both be \(B,\)"):
        value_mse(torch.zeros(2), teacher)


def test_two_columns_of_values_are_refused_too():
    with pytest.raises(ValueError, match=r"values must both be \(B,\)"):
        value_mse(torch.zeros(2, 1), torch.zeros(2, 1))
