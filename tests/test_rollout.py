from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from potstill.envs import Envs
from potstill.networks import NetworkConfig, Policy
from potstill.rollout import Preparer, collect, input_statistics
from potstill.tasks import TASKS

SHORT = replace(TASKS["pong"].env, max_frames=60)  # games of 15 agent steps
EACH = pytest.mark.parametrize(
    "config", [SHORT, TASKS["cartpole"].env, TASKS["minatar-breakout"].env], ids=["pong", "cartpole", "minatar"]
)


def normalised_policy(envs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    policy = Policy(NetworkConfig(width="1/32"), envs.observation_shape, envs.num_actions).initialise(generator)
    shape = policy.normalised_shape
    policy.normalise_by(200 * torch.rand(shape, generator=generator), 1 + 60 * torch.rand(shape, generator=generator))
    return policy


def randomly(envs, seed=0):
    """Acts uniformly at random."""
    generator = torch.Generator().manual_seed(seed)
    return lambda inputs: torch.randint(0, envs.num_actions, (len(inputs),), generator=generator)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_made_from_the_newest_frame_alone_equal_those_of_the_whole_stack_bit_for_bit(config, dtype):
    envs = Envs(config, 3)
    preparer = Preparer(normalised_policy(envs), dtype)
    resets = 0
    for transition in islice(collect(envs, preparer, envs.reset(0), randomly(envs)), 50):
        whole = preparer.first(transition.step.observations)
        assert transition.next_inputs.dtype == dtype
        assert torch.equal(transition.next_inputs, whole)
        assert transition.next_inputs.stride() == whole.stride()
        resets += len(transition.step.episodes)
    assert resets >= 3


@EACH
def test_a_transition_holds_what_the_action_was_chosen_from_and_what_it_led_to(config):
    envs, again = Envs(config, 2), Envs(config, 2)
    preparer = Preparer(normalised_policy(envs))
    seen, asked = again.reset(0), []

    def act(inputs):
        asked.append(inputs)
        return torch.tensor([len(asked) % 2, 1])

    for t, transition in enumerate(islice(collect(envs, preparer, envs.reset(0), act), 20)):
        assert transition.actions.tolist() == [(t + 1) % 2, 1]
        assert np.array_equal(transition.observations, seen)
        assert transition.inputs is asked[-1]
        assert torch.equal(transition.inputs, preparer.first(seen))
        seen = again.step(transition.actions.numpy()).observations
        assert np.array_equal(transition.step.observations, seen)


def test_no_more_steps_are_played_than_transitions_are_taken():
    envs = Envs(TASKS["cartpole"].env, 2)
    transitions = collect(envs, Preparer(normalised_policy(envs)), envs.reset(0), randomly(envs))
    taken = list(islice(transitions, 7))
    assert len(taken) == len(envs.state()[1]) == 7
    assert envs.state()[1].tolist() == [transition.actions.tolist() for transition in taken]


def test_earlier_inputs_are_left_alone():
    envs = Envs(SHORT, 2)
    transitions = islice(collect(envs, Preparer(normalised_policy(envs)), envs.reset(0), randomly(envs)), 20)
    kept = [(transition.inputs, transition.inputs.clone()) for transition in transitions]
    assert all(torch.equal(inputs, copy) for inputs, copy in kept)


@EACH
def test_inputs_are_made_where_they_are_kept_and_later_ones_elsewhere(config):
    envs, again = Envs(config, 2), Envs(config, 2)
    preparer = Preparer(normalised_policy(envs))
    whole = preparer.first(again.reset(0))
    storage = torch.stack([torch.zeros_like(whole)] * 5)
    if whole.dim() == 4 and whole.stride(1) == 1:  # channels last
        storage = torch.zeros(5, 2, *whole.shape[2:], whole.shape[1]).permute(0, 1, 4, 2, 3)
    kept = []
    for transition in islice(collect(envs, preparer, envs.reset(0), randomly(envs), storage), 20):
        kept.append(transition.inputs)
        assert torch.equal(transition.inputs, whole)
        whole = preparer.first(again.step(transition.actions.numpy()).observations)
        assert torch.equal(transition.next_inputs, whole)
    assert [inputs.data_ptr() for inputs in kept[:5]] == [row.data_ptr() for row in storage]
    assert torch.equal(storage, torch.stack(kept[:5]))
    assert storage.data_ptr() not in [inputs.data_ptr() for inputs in kept[5:]]


@EACH
def test_input_statistics_are_the_mean_and_deviation_of_random_play(config):
    mean, deviation = input_statistics(Envs(config, 4), 200, seed=3)
    envs, rng = Envs(config, 4), np.random.default_rng(3)
    envs.reset(3)
    steps = [envs.step(rng.integers(0, envs.num_actions, 4)).observations for _ in range(50)]
    frames = np.concatenate([seen[:, -1] if config.atari else seen for seen in steps]).astype(np.float64)
    assert mean.dtype == torch.float64
    assert np.allclose(mean, frames.mean(axis=0), atol=1e-4)
    assert np.allclose(deviation, frames.std(axis=0), atol=1e-4)


def test_the_seed_decides_the_input_statistics():
    envs = Envs(SHORT, 2)
    first, again, other = (input_statistics(envs, 60, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
