"""Spaces as people write them: what a policy chooses arrives, what it reads is what is shown."""

from contextlib import closing
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation, TransformObservation

from potstill import evaluation, ppo
from potstill.distributions import several as several_choices
from potstill.envs import EnvConfig, Envs
from potstill.errors import InputError
from potstill.networks import NetworkConfig, Policy
from potstill.objectives import forward_kl
from potstill.policies import load_policy, save_policy
from potstill.tasks import find_env

SEEN: list[object] = []
KEYS = spaces.Dict({"place": spaces.Box(0, 7, (2,), np.float32), "key": spaces.Discrete(2)})


class Told(gymnasium.Env):
    """Eight steps; the observation tells the right action, which scores 1."""

    def __init__(self, actions=None, shape=(4,), dtype=np.float32, offset=0.0, axis=None, dict_=False, unit=1.0):
        self.action_space = actions if actions is not None else spaces.Discrete(3)
        self.offset, self.axis, self.dict, self.unit = offset, axis, dict_, unit
        low, high = (0, 255) if dtype == np.uint8 else (offset - 1, offset + 1)
        self.observation_space = KEYS if dict_ else spaces.Box(low, high, shape, dtype)

    def _show(self):
        self.right = int(self.np_random.integers(3))
        if self.dict:
            return {"place": np.full(2, self.right, np.float32), "key": self.right % 2}
        shown = np.zeros(self.observation_space.shape, np.float64)
        if self.axis is not None:
            np.moveaxis(shown, self.axis, 0)[0] = 60 + 60 * self.right
        else:
            shown.flat[0] = self.right / 2
        return (self.unit * shown + self.offset).astype(self.observation_space.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._show(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        SEEN.append(action)
        start = getattr(self.action_space, "start", 0)
        reward = float(isinstance(self.action_space, spaces.Discrete) and action - start == self.right)
        self.steps += 1
        return self._show(), reward, self.steps >= 8, False, {}


def told(**options):
    """The task with these options."""
    gymnasium.registry.pop("Told-v0", None)
    gymnasium.register("Told-v0", Told, kwargs=options)
    SEEN.clear()
    return find_env("Told-v0")


def trained(env, steps, **settings):
    config = ppo.PPOConfig(
        env, NetworkConfig(**settings), steps, num_envs=8, num_steps=32, minibatch_size=64, learning_rate=3e-3,
        max_learning_rate=1e-2, normalise_inputs=256, precision="float32", clip_rewards=False,
    )  # fmt: skip
    with closing(Envs(env, 8)) as envs:
        state = ppo.start(config, envs, torch.device("cpu"))
        list(ppo.train(config, state, envs))
    return state.average


def score(policy, env):
    return list(evaluation.play(policy, env, episodes=16, seed=1))[-1].summary()["mean"]


# What a policy chooses arrives


def test_the_actions_of_a_task_may_start_anywhere():
    env = told(actions=spaces.Discrete(3, start=5))
    policy = trained(env, 4_096)
    assert {int(action) for action in SEEN} == {5, 6, 7}
    assert score(policy, env) == 8


def test_a_task_may_have_more_actions_than_a_byte_counts():
    with closing(Envs(told(actions=spaces.Discrete(300)), 2)) as envs:
        envs.reset(0)
        envs.step(np.array([299, 256]))
        assert [int(action) for action in SEEN] == [299, 256]
        assert envs.state().actions.tolist() == [[299, 256]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_continuous_actions_are_never_outside_their_bounds(dtype):
    rng = np.random.default_rng(0)
    for _ in range(20):
        low = rng.uniform(-2, 0, 3).astype(dtype)
        high = (low + rng.uniform(0.1, 3, 3)).astype(dtype)
        with closing(Envs(told(actions=spaces.Box(low, high, dtype=dtype)), 3)) as envs:
            envs.reset(0)
            envs.step(np.array([[-1.0] * 3, [1.0] * 3, [5.0, -5.0, 0.3]], np.float32))
            assert len(SEEN) == 3  # each of which the task itself found in its space


def test_bounds_of_whole_numbers_and_of_truth_values_take_the_nearest():
    own = {np.bool_: [[False, True, True]], np.uint8: [[0, 1, 1]], np.int64: [[0, 1, 1]]}
    for dtype, chosen in own.items():
        with closing(Envs(told(actions=spaces.Box(0, 1, (3,), dtype)), 1)) as envs:
            assert envs.own_actions(np.array([[-0.1, 0.1, 0.9]], np.float32)).tolist() == chosen


def test_boxes_of_any_shape_and_several_choices_take_random_play():
    for space in (spaces.Box(-1, 1, (2, 3)), spaces.MultiDiscrete([3, 2], start=[1, 0]), spaces.MultiBinary(3)):
        with closing(Envs(told(actions=space), 2)) as envs:
            envs.reset(0)
            for actions in envs.random_actions(np.random.default_rng(0), 5):
                envs.step(actions)
            assert len(SEEN) == 10


def test_several_choices_are_independent_softmaxes_whose_numbers_add_up():
    several = several_choices((3, 2))
    logits, others = torch.randn(4, 5), torch.randn(4, 5)
    parts = list(zip(logits.split((3, 2), -1), others.split((3, 2), -1), strict=True))
    assert torch.allclose(several.kl(logits, others), sum(forward_kl(q, p) for q, p in parts))
    actions = several.greedy(logits)
    assert actions.tolist() == [
        [a.argmax().item(), b.argmax().item()] for a, b in zip(*logits.split((3, 2), -1), strict=True)
    ]
    log_probs, entropies = several.log_prob_and_entropy(logits, actions)
    both = [torch.distributions.Categorical(logits=part) for part, _ in parts]
    assert torch.allclose(log_probs, sum(one.log_prob(actions[:, k]) for k, one in enumerate(both)))
    assert torch.allclose(entropies, sum(one.entropy() for one in both))
    mixed = torch.stack([actions[:, 0], 1 - actions[:, 1]], -1)
    assert several.agreement(logits, logits)["agreement"].tolist() == [1.0] * 4
    assert (mixed != actions).any()


# What a policy reads is what is shown


def test_a_large_offset_is_taken_away_before_float32_rounds_it():
    env = told(offset=1.7e9, dtype=np.float64)
    assert score(trained(env, 4_096), env) == 8


def test_numbers_far_from_1_are_features_all_the_same():
    for options in ({"unit": 1e-5}, {"offset": 4 * 10**9, "dtype": np.uint32, "unit": 2}):
        env = told(**options)
        assert score(trained(env, 4_096), env) == 8


@pytest.mark.parametrize("options", [{"shape": ()}, {"dict_": True}], ids=["scalar", "dict"])
def test_scalars_and_dicts_of_vectors_are_features(options):
    env = told(**options)
    assert score(trained(env, 6_144), env) == 8


@pytest.mark.parametrize(("shape", "axis", "layout"), [((3, 40, 40), 0, "first"), ((40, 40, 3), 2, "last")])
def test_an_image_is_read_by_its_channels_wherever_they_are(shape, axis, layout):
    env = told(shape=shape, dtype=np.uint8, axis=axis)
    with closing(Envs(env, 1)) as envs:
        assert envs.layout == layout
        policy = Policy(NetworkConfig(width="1/8"), **envs.spaces)
    assert policy.size().parameters == 2_647
    assert score(trained(env, 4_096, width="1/8"), env) == 8


@pytest.mark.parametrize("shape", [(8, 8, 8), (3, 40, 3), (5, 40, 40)])
def test_an_image_that_can_be_read_in_several_ways_is_refused_with_the_option_that_settles_it(shape):
    env = told(shape=shape, dtype=np.uint8, axis=0)
    with pytest.raises(InputError, match=r"several ways: say --layout .*; or name the task so, as Told-v0@last$"):
        Envs(env, 1)
    for settled in (replace(env, layout="first"), find_env("Told-v0@first")):
        with closing(Envs(settled, 1)) as envs:
            assert envs.layout == "first"
    with pytest.raises(InputError, match="env Told-v0@top: behind @ stands how it is read, flat, first, last, stack"):
        find_env("Told-v0@top")


def test_what_a_policy_reads_and_chooses_from_comes_back_with_its_file(tmp_path):
    env = told(actions=spaces.MultiDiscrete([3, 2]), offset=1.7e9, dtype=np.float64)
    with closing(Envs(env, 2)) as envs:
        probe = envs.reset(0)
        policy = Policy(NetworkConfig(family="mlp", options=("layers=8", "activation=relu")), **envs.spaces)
    save_policy(tmp_path / "policy.safetensors", policy, env, probe, {})
    loaded = load_policy(tmp_path).policy
    assert loaded.spaces == policy.spaces
    assert loaded.config == policy.config
    assert torch.equal(loaded(torch.from_numpy(probe))[0], policy(torch.from_numpy(probe))[0])


@pytest.mark.parametrize("options", [{"shape": (0,)}, {"dtype": np.longdouble}], ids=["nothing", "longer numbers"])
def test_observations_of_nothing_and_of_more_than_64_bits_are_refused(options):
    with pytest.raises(InputError, match=r"Told-v0 has observations Box.*; potstill reads arrays, to 64 bits"):
        Envs(told(**options), 1)


def test_observations_that_are_no_vectors_are_refused():
    gymnasium.register("Told-v0", Told, kwargs={"dict_": True})
    space = KEYS.spaces["place"]
    KEYS.spaces["place"] = spaces.Box(0, 255, (8, 8, 3), np.uint8)
    try:
        with pytest.raises(InputError, match="potstill reads arrays, and Dict and Tuple of vectors"):
            Envs(EnvConfig("Told-v0"), 1)
    finally:
        KEYS.spaces["place"] = space


# Frames are those of a stack only where they are shown so


def frames(wrap=None, shape=(40, 41)):
    """A task whose last four frames are stacked, with a wrapper around the stack."""

    def make():
        stacked = FrameStackObservation(Told(shape=shape, dtype=np.uint8), 4)
        return wrap(stacked) if wrap is not None else stacked

    return find_env(make)


def turned(env):
    """The frames last, as channels."""
    space = env.observation_space
    other = spaces.Box(0, 255, (*space.shape[1:], space.shape[0]), space.dtype)
    return TransformObservation(env, lambda shown: np.moveaxis(shown, 0, -1), other)


def newest_first(env):
    return TransformObservation(env, lambda shown: shown[::-1].copy(), env.observation_space)


def test_frames_that_a_wrapper_put_last_are_channels():
    with closing(Envs(frames(), 1)) as envs:
        assert envs.layout == "stack"
    with closing(Envs(frames(turned), 1)) as envs:
        assert envs.layout == "last"


def test_stacked_photos_are_refused_as_anything_of_four_axes():
    with pytest.raises(InputError, match=r"shape \(4, 8, 8, 3\): .*@flat takes them as numbers"):
        Envs(frames(shape=(8, 8, 3)), 1)


def test_a_stack_that_does_not_move_up_is_refused_and_read_as_channels_where_the_user_says_so():
    rng = np.random.default_rng(0)
    for env in (frames(), replace(frames(newest_first), layout="first")):
        with closing(Envs(env, 4)) as envs:
            envs.reset(0)
            assert sum(len(envs.step(envs.random_actions(rng)).episodes) for _ in range(20)) == 8
    with closing(Envs(frames(newest_first), 4)) as envs:
        envs.reset(0)
        with pytest.raises(
            InputError, match="does not show the last frames of a game, the newest last: --layout first"
        ):
            [envs.step(envs.random_actions(rng)) for _ in range(8)]
