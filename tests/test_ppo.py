import math
import time
from copy import deepcopy
from dataclasses import replace
from itertools import islice

import gymnasium
import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from potstill import ppo
from potstill.envs import EnvConfig, Envs
from potstill.errors import DivergedError, InputError
from potstill.networks import NetworkConfig
from potstill.ppo import (
    PPO,
    PPOConfig,
    ReturnScale,
    Rollout,
    _decay,
    _follow_kl,
    gae,
    rollout,
    start,
    train,
    update,
)
from potstill.quantisation import prune
from potstill.rollout import Preparer, input_statistics
from potstill.tasks import TASKS

CPU = torch.device("cpu")
CARTPOLE = PPOConfig(
    env=TASKS["cartpole"].env,
    network=NetworkConfig(width="1"),
    total_timesteps=40_000,
    num_envs=8,
    num_steps=128,
    epochs=4,
    minibatch_size=256,
    learning_rate=1e-3,
    max_learning_rate=5e-3,
    anneal_from=0.0,
    entropy=0.0,
    normalise_inputs=2_000,
    precision="float32",
)
TINY = replace(
    CARTPOLE, total_timesteps=6 * 64, num_envs=4, num_steps=16, minibatch_size=32, epochs=2, normalise_inputs=200
)
TINY_PONG = replace(
    TINY,
    env=replace(TASKS["pong"].env, max_frames=80),
    network=NetworkConfig(width="1/32"),
    precision="bfloat16",
    normalise_inputs=60,
    num_envs=2,  # each emulator takes a tenth of a second to begin
    num_steps=32,
)
TINY_PENDULUM = replace(TINY, env=TASKS["pendulum"].env)
BOTH = pytest.mark.parametrize("config", [TINY, TINY_PONG], ids=["cartpole", "pong"])


class Clock(gymnasium.Env):
    """Shows how much of the game is over, in tenths, and pays 3 for every step, whatever one does."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (1,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, ends_at=None):
        self.ends_at = ends_at

    def seen(self):
        return np.array([self.time / 10], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.seen(), {}

    def step(self, action):
        self.time += 1
        return self.seen(), 3.0, self.time == self.ends_at, False, {}


gymnasium.register("Truncated-v0", Clock, max_episode_steps=10)
gymnasium.register("Terminated-v0", Clock, kwargs={"ends_at": 10})


def clock_config(name):
    return replace(TINY, env=EnvConfig(name), num_steps=25, minibatch_size=50, gamma=0.9, normalise_inputs=0)


def begin(config, teacher=None):
    envs = Envs(config.env, config.num_envs)
    return envs, start(config, envs, CPU, teacher=teacher)


def trained(config):
    envs, state = begin(config)
    list(train(config, state, envs))
    return state


def same_weights(policy, other):
    return all(torch.equal(mine, other.state_dict()[name]) for name, mine in policy.state_dict().items())


def column(*numbers):
    return torch.tensor(numbers)[:, None]


# Generalised advantage estimation


def test_gae_of_three_steps_worked_out_by_hand():
    advantages, returns = gae(column(1.0, 0.0, 2.0), column(0.5, 1.0, 1.5, 2.0), torch.zeros(3, 1), 0.9, 0.8)
    # TD errors 1.4, 0.35, 2.3; each advantage adds 0.72 of the next.
    assert torch.allclose(advantages, column(1.4 + 0.72 * 2.006, 0.35 + 0.72 * 2.3, 2.3))
    assert torch.allclose(returns, advantages + column(0.5, 1.0, 1.5))


def test_the_end_of_a_game_cuts_the_trace_and_the_next_value():
    advantages, _ = gae(column(1.0, 0.0, 2.0), column(0.5, 1.0, 1.5, 2.0), column(0.0, 1.0, 0.0), 0.9, 0.8)
    assert torch.allclose(advantages, column(1.4 + 0.72 * -1.0, -1.0, 2.3))


def random_play(seed=0, steps=12, envs=3):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(n, envs, generator=generator) for n in (steps, steps + 1))
    return rewards, values, (torch.rand(steps, envs, generator=generator) < 0.2).float()


def test_with_lambda_0_the_advantage_is_the_td_error():
    rewards, values, dones = random_play()
    advantages, _ = gae(rewards, values, dones, 0.97, 0.0)
    assert torch.allclose(advantages, rewards + 0.97 * (1 - dones) * values[1:] - values[:-1])


def test_with_lambda_1_the_target_is_the_discounted_return_of_the_game():
    rewards, values, dones = random_play()
    expected, following = torch.empty_like(rewards), values[-1]
    for t in reversed(range(len(rewards))):
        expected[t] = following = rewards[t] + 0.97 * (1 - dones[t]) * following
    assert torch.allclose(gae(rewards, values, dones, 0.97, 1.0)[1], expected, atol=1e-6)


def test_what_happens_after_a_game_does_not_matter_to_it():
    rewards, values, _ = random_play()
    dones = torch.zeros_like(rewards)
    dones[5] = 1.0
    other_rewards, other_values = rewards.clone(), values.clone()
    other_rewards[6:] += 10.0
    other_values[6:] -= 10.0
    advantages, others = (gae(r, v, dones, 0.97, 0.9)[0] for r, v in ((rewards, values), (other_rewards, other_values)))
    assert torch.equal(advantages[:6], others[:6])
    assert not torch.equal(advantages[6:], others[6:])


# The unit of the value head


def test_the_return_scale_is_the_deviation_of_all_targets_so_far():
    scale, rng = ReturnScale(), np.random.default_rng(0)
    batches = [rng.normal(loc, 1.0, (7, n)) for loc, n in ((5.0, 4), (-3.0, 1), (0.0, 9))]
    for so_far in range(1, 4):
        deviation = scale.include(torch.from_numpy(batches[so_far - 1]))
        assert deviation == pytest.approx(np.concatenate([b.ravel() for b in batches[:so_far]]).std())


def test_targets_that_are_all_alike_still_have_a_unit():
    assert ReturnScale().include(torch.zeros(5, 2)) == 0.01


# Learning rate and decay


@pytest.mark.parametrize(
    ("kl", "rate", "then"),
    [
        (0.041, 1e-3, 1e-3 / 1.3),
        (0.039, 1e-3, 1e-3),
        (0.011, 1e-3, 1e-3),
        (0.009, 1e-3, 1.3e-3),
        (0.009, 2e-3, 2.5e-3),
        (0.041, 1e-6, 1e-6),
    ],
)
def test_the_learning_rate_holds_the_kl_near_its_target(kl, rate, then):
    assert _follow_kl(rate, kl, PPOConfig(target_kl=0.02, max_learning_rate=2.5e-3)) == pytest.approx(then)


def test_the_decay_waits_then_falls_linearly_to_zero():
    assert [_decay(progress, 0.5) for progress in (0.0, 0.49, 0.5, 0.75, 1.0)] == [1.0, 1.0, 1.0, 0.5, 0.0]
    assert [_decay(progress, 0.0) for progress in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    assert _decay(0.99, 1.0) == 1.0


# Rollouts


@BOTH
def test_a_rollout_holds_the_policys_own_probabilities_and_values(config):
    envs, state = begin(config)
    state.policy.return_scale.fill_(3.0)
    preparer = Preparer(state.policy, torch.float32)
    batch, _, observations, _ = rollout(config, state, envs, preparer, envs.reset(0), None)
    with torch.no_grad():
        for t in range(config.num_steps):
            logits, values = state.policy.heads(batch.inputs[t])
            log_probs = logits.log_softmax(-1).gather(1, batch.actions[t, :, None]).squeeze(1)
            assert torch.allclose(batch.log_probs[t], log_probs, atol=1e-6)
            assert torch.allclose(batch.values[t], 3.0 * values, atol=1e-5)
        last = state.policy(torch.from_numpy(observations))[1]
    assert torch.allclose(batch.values[-1], last, atol=1e-5)
    assert np.array_equal(envs.state()[1], batch.actions.numpy())


def test_a_rollout_of_continuous_actions_holds_them_unclipped_with_their_own_density():
    envs, state = begin(TINY_PENDULUM)
    batch, *_ = rollout(TINY_PENDULUM, state, envs, Preparer(state.policy), envs.reset(0), None)
    assert batch.actions.shape == (16, 4, 1)
    assert batch.actions.abs().max() > 1  # the environment clips, the density does not
    logits = state.policy.logits(batch.inputs.flatten(0, 1)).detach()
    expected = torch.distributions.Normal(logits[:, :1], logits[:, 1:].exp()).log_prob(batch.actions.flatten(0, 1))
    assert torch.allclose(batch.log_probs.flatten(), expected.squeeze(1), atol=1e-5)
    assert np.array_equal(envs.state()[1], batch.actions.numpy())


def test_a_truncated_game_is_worth_what_its_last_state_promises():
    config = clock_config("Truncated-v0")
    envs, state = begin(config)
    state.policy.return_scale.fill_(5.0)
    batch, _, _, scores = rollout(config, state, envs, Preparer(state.policy), envs.reset(0), None)
    promised = state.policy(torch.ones(1, 1))[1].item()  # the final observation, not the first of the next game
    expected = torch.ones(25, 4)
    expected[[9, 19]] += 0.9 * promised
    assert abs(promised) > 0.01
    assert torch.allclose(batch.rewards, expected)
    assert batch.dones.sum(1).nonzero().flatten().tolist() == [9, 19]
    assert scores == [30.0] * 8  # never clipped, never bootstrapped


def test_a_terminated_game_is_worth_nothing_more():
    config = clock_config("Terminated-v0")
    envs, state = begin(config)
    batch, _, _, _ = rollout(config, state, envs, Preparer(state.policy), envs.reset(0), None)
    assert torch.equal(batch.rewards, torch.ones(25, 4))
    assert batch.dones.sum(1).nonzero().flatten().tolist() == [9, 19]


def test_rewards_are_clipped_only_where_asked():
    config = replace(clock_config("Terminated-v0"), clip_rewards=False)
    envs, state = begin(config)
    batch, _, _, _ = rollout(config, state, envs, Preparer(state.policy), envs.reset(0), None)
    assert torch.equal(batch.rewards, torch.full((25, 4), 3.0))


@pytest.mark.parametrize(
    ("name", "worth"), [("Truncated-v0", [10.0] * 10), ("Terminated-v0", [10 * (1 - 0.9**k) for k in range(10, 0, -1)])]
)
def test_values_come_to_what_the_game_is_worth(name, worth):
    config = replace(clock_config(name), total_timesteps=10_000, learning_rate=5e-3, max_learning_rate=5e-3)
    state = trained(config)
    values = state.policy(torch.arange(10.0)[:, None] / 10)[1]
    assert torch.allclose(values, torch.tensor(worth), atol=1.0)


# Updates


def one_state(policy, advantage_of_action_0):
    """32 times the same state, each action in half of them."""
    inputs = torch.full((8, 4, 4), 0.5)
    actions = torch.arange(32).view(8, 4) % 2
    log_probs = policy.logits(inputs[0, :1]).log_softmax(-1).detach().flatten()[actions]
    batch = Rollout(inputs, actions, log_probs, torch.zeros(9, 4), torch.zeros(8, 4), torch.zeros(8, 4))
    return batch, torch.where(actions == 0, advantage_of_action_0, -advantage_of_action_0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_update_makes_the_better_action_likelier_but_only_about_as_far_as_the_clip_allows(sign):
    probability = {}
    for clip in (0.2, 1e6):
        config = replace(TINY, clip=clip, epochs=100, num_steps=8, minibatch_size=32, value_coefficient=0.0)
        state = begin(config)[1]
        state.learning_rate = 3e-4
        batch, advantages = one_state(state.policy, torch.tensor(sign))
        update(config, state, batch, advantages, torch.zeros(8, 4), decay=1.0)
        probability[clip] = state.policy.logits(batch.inputs[0, :1]).softmax(-1)[0, 0 if sign > 0 else 1].item()
    assert 0.58 < probability[0.2] < 0.66  # it was 0.5: the ratio passes 1.2 and stops
    assert probability[1e6] > 0.8


def test_the_first_pass_over_a_rollout_sees_no_divergence():
    config = replace(TINY, epochs=1, minibatch_size=64)
    envs, state = begin(config)
    metrics = next(train(config, state, envs)).metrics
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["clip_fraction"] == 0.0
    assert metrics["entropy"] == pytest.approx(math.log(2), abs=1e-2)
    assert state.gradient_steps == 1


def test_the_rate_used_is_bounded_by_its_decaying_maximum():
    config = replace(TINY, learning_rate=1e-3, max_learning_rate=1e-3, target_kl=1e3)  # a KL always far below target
    envs, state = begin(config)
    rates = [progress.metrics["learning_rate"] for progress in train(config, state, envs)]
    assert rates == pytest.approx([1e-3 * (1 - k / 6) for k in range(6)])
    assert state.optimizer.param_groups[0]["lr"] == rates[-1]


def test_the_rate_falls_from_where_it_stood_when_annealing_began():
    config = replace(TINY, learning_rate=1e-3, target_kl=1e3, anneal_from=0.5)  # it grows by 1.3 until then
    envs, state = begin(config)
    rates = [progress.metrics["learning_rate"] for progress in train(config, state, envs)]
    grown = 1e-3 * 1.3**3
    assert rates == pytest.approx([1e-3, 1.3e-3, 1.69e-3, grown, grown * 2 / 3, grown / 3])


@pytest.mark.parametrize(
    ("over", "weights"), [(0.0, [0, 0, 0, 1]), (1.0, [1 / 4] * 4), (0.5, [1 / 8, 1 / 8, 1 / 4, 1 / 2])]
)
def test_what_is_deployed_is_the_moving_average_of_the_weights(over, weights):
    config = replace(TINY, total_timesteps=4 * 64, average_over=over)
    envs, state = begin(config)
    seen = [parameters_to_vector(state.policy.parameters()).detach().clone() for _ in train(config, state, envs)]
    expected = sum(weight * vector for weight, vector in zip(weights, seen, strict=True))
    assert torch.allclose(parameters_to_vector(state.average.parameters()), expected, atol=1e-6)
    assert state.average.return_scale == state.policy.return_scale
    assert not torch.equal(seen[0], seen[-1])


def test_the_average_does_not_act_in_training():
    assert same_weights(
        trained(replace(TINY, average_over=0.0)).policy, trained(replace(TINY, average_over=1.0)).policy
    )


# A teacher beside the reward, and weights to begin with


def sharp(config, seed=7):
    """A teacher with strong opinions, normalised by random play."""
    envs = Envs(config.env, config.num_envs)
    policy = start(replace(config, seed=seed), envs, CPU).policy
    torch.nn.init.orthogonal_(policy.actor.weight, 5.0, generator=torch.Generator().manual_seed(seed))
    policy.return_scale.fill_(3.0)
    return policy


def teacher_logits(config, teacher):
    envs, state = begin(config, teacher)
    return state, [progress.metrics["teacher_kl"] for progress in train(config, state, envs, teacher=teacher)]


@BOTH
def test_a_policy_moves_towards_its_teacher_the_more_the_heavier_the_teacher_weighs(config):
    teacher = sharp(config)
    config = replace(config, total_timesteps=14 * 64, learning_rate=3e-3, target_kl=1e3, anneal_from=1.0)
    last = {weight: teacher_logits(replace(config, teacher_coefficient=weight), teacher)[1] for weight in (0.0, 10.0)}
    assert last[10.0][-1] < 0.5 * last[10.0][0]
    assert last[10.0][-1] < 0.5 * last[0.0][-1]


def test_a_teacher_that_weighs_nothing_changes_nothing():
    teacher = sharp(TINY, seed=TINY.seed)  # normalised as the student would be
    teacher.return_scale.fill_(1.0)
    config = replace(TINY, teacher_coefficient=0.0)
    assert same_weights(teacher_logits(config, teacher)[0].policy, trained(TINY).policy)


def test_what_a_teacher_weighs_falls_to_zero():
    config = replace(TINY, teacher_coefficient=1.0, total_timesteps=2 * 64)
    kept, faded = (teacher_logits(replace(config, anneal_teacher_from=share), sharp(TINY))[0] for share in (1.0, 0.0))
    assert not same_weights(kept.policy, faded.policy)


@pytest.mark.parametrize(("ratio", "weight"), [(1.0, 1.0), (3.0, 3.0), (0.1, 0.8)])
def test_the_teachers_divergence_is_weighed_by_the_ratio_bounded_from_below(ratio, weight):
    norms = {}
    for likelier in (1.0, ratio):  # than under the policy that acted
        config = replace(TINY, epochs=1, num_steps=8, minibatch_size=32, value_coefficient=0.0, clip=0.2)
        state = begin(config)[1]
        batch, advantages = one_state(state.policy, torch.tensor(0.0))
        teacher_logits = torch.tensor([2.0, 0.0]).expand(8, 4, 2)
        batch = batch._replace(teacher_logits=teacher_logits, log_probs=batch.log_probs - math.log(likelier))
        metrics = update(config, state, batch, advantages, torch.zeros(8, 4), decay=1.0)
        norms[likelier] = metrics["grad_norm"]
        p = torch.tensor([2.0, 0.0]).softmax(0)
        assert metrics["teacher_kl"] == pytest.approx((p * (p / 0.5).log()).sum().item(), abs=1e-2)
    assert norms[ratio] == pytest.approx(weight * norms[1.0], rel=0.02)


def test_training_goes_on_from_given_weights_with_their_normalisation_and_value_unit():
    initial = sharp(TINY)
    state = start(TINY, Envs(TINY.env, TINY.num_envs), CPU, initial=initial)
    assert same_weights(state.policy, initial)
    list(train(replace(TINY, total_timesteps=64), state, Envs(TINY.env, TINY.num_envs)))
    assert not same_weights(state.policy, initial)
    assert state.policy.return_scale == pytest.approx(3.0, rel=0.2)  # ten rollouts' worth of evidence for the old unit
    assert torch.equal(state.policy.mean, initial.mean)


def test_what_was_pruned_stays_so_when_reward_goes_on():
    initial = sharp(TINY)
    prune(initial, 0.75)
    envs = Envs(TINY.env, TINY.num_envs)
    state = start(TINY, envs, CPU, initial=initial)
    list(train(TINY, state, envs))
    for before, after in zip(initial.trunk.linears, state.policy.trunk.linears, strict=True):
        assert not torch.equal(before.weight, after.weight)
        assert torch.equal(before.weight == 0, after.weight == 0)
    assert state.average.size() == initial.size()


def test_weights_of_another_shape_are_refused():
    envs = Envs(TINY.env, TINY.num_envs)
    with pytest.raises(
        InputError, match="the policy to start from is of another shape: use --width 1 --critic shared --network mlp"
    ):
        start(replace(TINY, network=NetworkConfig(width="1/2")), envs, CPU, initial=sharp(TINY))


def test_a_teacher_that_sees_the_task_otherwise_than_the_policy_to_start_from_is_refused():
    envs, teacher = Envs(TINY.env, TINY.num_envs), sharp(TINY)
    start(TINY, envs, CPU, initial=sharp(TINY), teacher=teacher)
    teacher.scale[0] = 0.0
    with pytest.raises(InputError, match="the teacher normalises its inputs otherwise than the policy to start from"):
        start(TINY, envs, CPU, initial=sharp(TINY), teacher=teacher)


def test_a_teacher_of_another_family_is_refused():
    envs = Envs(TINY.env, TINY.num_envs)
    with pytest.raises(
        InputError, match=r"the teacher reads observations \(4, 84, 84\) as stack, this task.s are \(\(4,\), .flat.\)"
    ):
        start(TINY, envs, CPU, teacher=sharp(TINY_PONG))


# Training


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlap"])
def test_it_learns_to_balance_the_cartpole(overlap):
    config = replace(CARTPOLE, overlap=overlap)
    envs, state = begin(config)
    progress = list(train(config, state, envs))
    assert progress[-1].score > 150  # mean of the last 100 games; a random policy has 22
    assert progress[-1].step == state.update * CARTPOLE.batch_size >= CARTPOLE.total_timesteps
    assert progress[-1].games == state.games > 100
    assert len(progress) == state.update == 40


@pytest.mark.parametrize("config", [TINY, TINY_PONG, TINY_PENDULUM], ids=["cartpole", "pong", "pendulum"])
def test_a_repeated_run_ends_with_the_same_weights_and_another_seed_with_others(config):
    first, again, other = (trained(c) for c in (config, config, replace(config, seed=1)))
    assert same_weights(first.policy, again.policy)
    assert not torch.equal(first.policy.actor.weight, other.policy.actor.weight)


def test_torchs_global_generator_has_no_say():
    torch.manual_seed(1)
    first = trained(TINY)
    torch.manual_seed(2)
    assert same_weights(first.policy, trained(TINY).policy)


@pytest.mark.parametrize(
    ("config", "stop_after"),
    [
        (TINY, 3),
        (replace(TINY, reseed_every=128), 2),
        (replace(TINY, reseed_every=128), 3),
        (TINY_PONG, 3),
        (TINY_PENDULUM, 3),
        (replace(TINY, overlap=True, reseed_every=128), 1),
        (replace(TINY, overlap=True, reseed_every=128), 2),
        (replace(TINY_PONG, overlap=True), 3),
    ],
    ids=["cartpole", "between segments", "amid one", "pong", "pendulum", "overlap", "into a segment", "pong overlap"],
)
def test_a_run_that_is_interrupted_ends_exactly_as_one_that_is_not(config, stop_after):
    envs = Envs(config.env, config.num_envs)
    whole = PPO(config, envs, CPU)
    progress = list(whole.steps())

    stopped = PPO(config, envs, CPU)
    before = list(islice(stopped.steps(), stop_after))
    again = PPO(config, Envs(config.env, config.num_envs), CPU)
    again.load_state_dict({name: deepcopy(value) for name, value in stopped.state_dict().items()})
    after = [each for each in again.steps() if each.metrics]

    assert [repr(p) for p in before + after] == [repr(p) for p in progress]  # repr: nan equals nan
    state, end = again.state, whole.state
    assert same_weights(state.policy, end.policy)
    assert same_weights(state.average, end.average)
    assert (state.returns, state.learning_rate, state.recent) == (end.returns, end.learning_rate, end.recent)
    assert torch.equal(state.generator.get_state(), end.generator.get_state())


@pytest.mark.parametrize("slow", ["update", "rollout"])
def test_which_of_two_that_overlap_is_slower_changes_nothing(slow, monkeypatch):
    config = replace(TINY, overlap=True)
    first = trained(config)
    real = getattr(ppo, slow)
    monkeypatch.setattr(ppo, slow, lambda *arguments: (time.sleep(0.02), real(*arguments))[1])
    assert same_weights(first.policy, trained(config).policy)


def test_a_rollout_that_overlaps_is_by_the_policy_of_one_update_before():
    config = replace(TINY, overlap=True)
    envs, state = begin(config)
    at_begin, played = [deepcopy(state.policy)], []
    following = ppo._ahead(config, state, envs, None, None)
    for batch, _ in following:
        played.append((batch.inputs.clone(), batch.actions, batch.log_probs))
        advantages, returns = gae(batch.rewards, batch.values, batch.dones, config.gamma, config.gae_lambda)
        update(config, state, batch, advantages, returns, 1.0)
        at_begin.append(deepcopy(state.policy))
    assert len(played) == config.updates
    for k, (inputs, actions, log_probs) in enumerate(played):
        by = [
            policy.distribution.log_prob_and_entropy(policy.logits(inputs.flatten(0, 1)), actions.flatten())[0]
            for policy in at_begin
        ]
        alike = [i for i, each in enumerate(by) if torch.allclose(each, log_probs.flatten(), atol=1e-6)]
        assert alike == [max(0, k - 1)]


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_run_that_diverges_says_so_and_keeps_the_last_finite_weights(epochs):
    config = replace(TINY, learning_rate=1e20, max_learning_rate=1e20, epochs=epochs, minibatch_size=64)
    envs, state = begin(config)
    with pytest.raises(DivergedError, match=r"no longer finite at update [01] .* lower --learning-rate"):
        list(train(config, state, envs))
    assert all(parameter.isfinite().all() for parameter in state.policy.parameters())


def test_a_policy_that_overflows_while_playing_says_so_too():
    config = replace(TINY_PONG, learning_rate=1e20, max_learning_rate=1e20, epochs=1, minibatch_size=64)
    envs, state = begin(config)
    with pytest.raises(DivergedError, match="no longer finite"):
        list(train(config, state, envs))


def test_a_network_with_a_split_critic_trains():
    state = trained(replace(TINY, network=NetworkConfig(width="1/4", critic="split")))
    assert state.gradient_steps == 6 * 2 * 2


def test_inputs_are_normalised_by_the_statistics_of_random_play_and_stay_so():
    mean, deviation = input_statistics(Envs(TINY.env, TINY.num_envs), TINY.normalise_inputs, TINY.seed)
    policy = trained(TINY).policy
    assert torch.equal(policy.mean, mean.float())
    assert torch.allclose(policy.scale, 1 / deviation.float())


def test_a_policy_does_not_see_the_hidden_rows_and_sees_the_next():
    config = replace(TINY_PONG, env=replace(TINY_PONG.env, hidden_rows=10))
    envs = Envs(config.env, config.num_envs)
    policy = start(config, envs, torch.device("cpu")).policy
    seen = torch.from_numpy(envs.reset(0))
    elsewhere, below = seen.clone(), seen.clone()
    elsewhere[:, :, :10] = 255 - elsewhere[:, :, :10]
    below[:, :, 10] = 255 - below[:, :, 10]
    assert torch.equal(policy.prepare(elsewhere), policy.prepare(seen))
    assert not torch.equal(policy.prepare(below), policy.prepare(seen))


# Bad input


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"total_timesteps": 0}, "total-timesteps must be at least 1, not 0"),
        ({"total_timesteps": -5}, "total-timesteps must be at least 1, not -5"),
        ({"num_envs": 0}, "num-envs must be at least 1"),
        ({"minibatch_size": 4_097}, "minibatch-size 4097 exceeds the rollout of 4096 samples"),
        ({"gamma": 1.1}, r"gamma and gae-lambda lie in \[0, 1\], not 1.1 and 0.95"),
        ({"gae_lambda": -0.1}, "gamma and gae-lambda"),
        ({"learning_rate": 0.0}, "learning-rate must be positive and finite, not 0.0"),
        ({"learning_rate": math.nan}, "learning-rate must be positive and finite, not nan"),
        ({"max_learning_rate": -1.0}, "max-learning-rate must be positive"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"entropy": -0.1}, "entropy must not be negative"),
        ({"anneal_from": 1.5}, "anneal-from is a share between 0 and 1, not 1.5"),
        ({"average_over": -0.1}, "average-over is a share between 0 and 1, not -0.1"),
        ({"anneal_teacher_from": -0.5}, "anneal-teacher-from is a share between 0 and 1, not -0.5"),
        ({"teacher_coefficient": -1.0}, "teacher-coefficient must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, complaint):
    with pytest.raises(InputError, match=complaint):
        PPOConfig(**settings)


def test_a_negative_seed_is_refused():
    with pytest.raises(InputError, match="seed must not be negative, but is -1"):
        PPOConfig(seed=-1)
