import math

import pytest
import torch
from torch.distributions import Categorical, Normal

from potstill.distributions import CATEGORICAL, GAUSSIAN
from potstill.errors import DivergedError

BOTH = pytest.mark.parametrize("kind", [CATEGORICAL, GAUSSIAN], ids=["categorical", "gaussian"])


def random_logits(batch=5, numbers=6, seed=0):
    return torch.randn(batch, numbers, generator=torch.Generator().manual_seed(seed))


def drawn(kind, logits, seed):
    return kind.sample(logits, torch.Generator().manual_seed(seed))


# Categorical


def test_actions_are_drawn_as_often_as_they_are_probable():
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log().expand(20_000, 3)
    shares = drawn(CATEGORICAL, logits, 0).bincount(minlength=3) / len(logits)
    assert torch.allclose(shares, torch.tensor([0.1, 0.2, 0.7]), atol=0.01)  # about three standard errors


def test_the_log_probability_and_entropy_of_a_softmax_are_torchs_own():
    logits, actions = random_logits(), torch.tensor([0, 5, 2, 2, 1])
    log_probs, entropy = CATEGORICAL.log_prob_and_entropy(logits, actions)
    theirs = Categorical(logits=logits)
    assert torch.allclose(log_probs, theirs.log_prob(actions))
    assert torch.allclose(entropy, theirs.entropy())


def test_the_greedy_action_is_the_first_of_the_most_probable():
    assert CATEGORICAL.greedy(torch.tensor([[0.0, 2.0, 2.0], [3.0, 2.0, 2.0]])).tolist() == [1, 0]


def test_two_policies_agree_where_their_greedy_actions_are_the_same():
    mine, theirs = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[5.0, 6.0], [1.0, 0.0]])
    assert CATEGORICAL.agreement(mine, theirs)["agreement"].tolist() == [1.0, 0.0]


# Gaussian


def test_a_gaussians_log_probability_and_entropy_worked_out_by_hand():
    logits = torch.tensor([[0.0, 1.0, 0.0, math.log(2.0)]])  # means 0 and 1, deviations 1 and 2
    log_prob, entropy = GAUSSIAN.log_prob_and_entropy(logits, torch.tensor([[1.0, 5.0]]))
    # Half of 1 squared and half of 2 squared, and the two constants.
    assert log_prob.item() == pytest.approx(-0.5 - 2.0 - math.log(2.0) - math.log(2 * math.pi), abs=1e-6)
    assert entropy.item() == pytest.approx(1.0 + math.log(2 * math.pi) + math.log(2.0), abs=1e-6)


def test_they_are_torchs_own_summed_over_actions():
    logits = random_logits()
    theirs, actions = Normal(logits[:, :3], logits[:, 3:].exp()), drawn(GAUSSIAN, logits, 1)
    log_prob, entropy = GAUSSIAN.log_prob_and_entropy(logits, actions)
    assert torch.allclose(log_prob, theirs.log_prob(actions).sum(-1), atol=1e-5)
    assert torch.allclose(entropy, theirs.entropy().sum(-1), atol=1e-5)


def test_a_gaussian_is_sampled_with_its_mean_and_deviation_and_not_clipped():
    logits = torch.tensor([[0.9, -3.0, math.log(0.5), math.log(0.1)]]).expand(40_000, 4)
    actions = drawn(GAUSSIAN, logits, 0)
    assert actions.shape == (40_000, 2)
    assert torch.allclose(actions.mean(0), torch.tensor([0.9, -3.0]), atol=0.01)
    assert torch.allclose(actions.std(0), torch.tensor([0.5, 0.1]), atol=0.01)


def test_the_greedy_action_is_the_mean_within_the_bounds():
    logits = torch.tensor([[0.25, -3.0, 1.5, 0.0, 0.0, 0.0]])
    assert GAUSSIAN.greedy(logits).tolist() == [[0.25, -1.0, 1.0]]


def test_greedy_actions_beyond_the_same_bound_do_not_differ():
    mine, theirs = torch.tensor([[2.0, 0.5, 0.0, 0.0]]), torch.tensor([[7.0, 0.25, 1.0, 1.0]])
    assert GAUSSIAN.agreement(mine, theirs)["action_difference"].tolist() == [0.125]


# Both


@BOTH
def test_the_generator_decides_the_draw(kind):
    logits = torch.zeros(100, 4)
    first, again, other = (drawn(kind, logits, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first.shape, first.dtype) == (((100,), torch.int64) if kind is CATEGORICAL else ((100, 2), torch.float32))


def test_uniform_actions_are_uniform_whatever_the_logits_say():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[9.0, 0.0, 0.0, -9.0]]).expand(20_000, 4)
    shares = CATEGORICAL.uniform(logits, generator).bincount(minlength=4) / len(logits)
    assert torch.allclose(shares, torch.full((4,), 0.25), atol=0.01)
    actions = GAUSSIAN.uniform(logits, generator)
    assert actions.shape == (20_000, 2)
    assert actions.abs().max() <= 1.0
    assert torch.allclose(actions.var(0), torch.full((2,), 1 / 3), atol=0.01)


@BOTH
def test_logits_that_are_no_numbers_are_no_policy(kind):
    for broken in (float("nan"), float("inf")):
        with pytest.raises(DivergedError, match="logits are no longer finite numbers: lower --learning-rate"):
            kind.sample(torch.tensor([[0.0, broken]]), None)


def test_an_impossible_action_is_never_drawn():
    assert CATEGORICAL.sample(torch.tensor([[0.0, -float("inf")]]), None).tolist() == [0]
