"""What the environment shows of a step: noise, delays, a console's memory, a wrapper of the user's own."""

from contextlib import closing
from dataclasses import replace
from itertools import islice

import gymnasium
import numpy as np
import pytest
import torch
from own_tasks import Copy
from small_runs import CONFIGS, RUNTIME, cut, learned, small_run

import potstill
from potstill.distill import DistillConfig, distill, start
from potstill.envs import EnvConfig, Envs
from potstill.errors import InputError
from potstill.evaluation import play
from potstill.export import export
from potstill.imports import allow
from potstill.networks import NetworkConfig, Policy
from potstill.policies import load_policy, save_policy
from potstill.rollout import Preparer, collect, input_statistics
from potstill.tasks import TASKS
from potstill.training.trainer import execute
from potstill.views import name_of, part

CARTPOLE, PONG = TASKS["cartpole"].env, TASKS["pong"].env
SHORT = replace(PONG, max_frames=60)


class Counter(gymnasium.Env):
    """Shows how many steps it has made in all, and in this game; games have eight."""

    observation_space = gymnasium.spaces.Box(0, 1e6, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.age = 0
        return self.shown(), {}

    def step(self, action):
        self.steps, self.age = self.steps + 1, self.age + 1
        return self.shown(), 1.0, self.age == 8, False, {}

    def shown(self):
        return np.array([self.steps, self.age], np.float32)


class Negative(gymnasium.ObservationWrapper):
    """Also writes into what it is given, which is nobody else's business."""

    def observation(self, observation):
        observation *= -1
        return observation


class Chancy(gymnasium.ObservationWrapper):
    """Draws from what it takes for the game's chances."""

    def observation(self, observation):
        return observation + self.np_random.integers(2)


class Greedy(gymnasium.Wrapper):
    """Plays twice."""

    def step(self, action):
        self.env.step(action)
        return self.env.step(action)


class Divided(gymnasium.ObservationWrapper):
    """Divides by 255, and keeps the space of bytes."""

    def observation(self, observation):
        return observation / 255


class One(gymnasium.ObservationWrapper):
    """Shows one number where its space says as many as there were."""

    def observation(self, observation):
        return observation[:1]


class Rows(gymnasium.ObservationWrapper):
    """A picture's means, row by row."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gymnasium.spaces.Box(0, 255, (84,), np.float32)

    def observation(self, observation):
        return observation.mean(axis=1, dtype=np.float32)


class Stack(gymnasium.Env):
    """Shows two frames of a counter."""

    observation_space = gymnasium.spaces.Box(0, 255, (4, 4), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.age = 0
        return np.full((4, 4), 100, np.uint8), {}

    def step(self, action):
        self.age += 1
        return np.full((4, 4), 100 + self.age, np.uint8), 1.0, self.age == 8, False, {}


def stacked():
    return gymnasium.wrappers.FrameStackObservation(Stack(), 2)


def shown_in(config, steps, beside=None, num_envs=2):
    """Observations, one vector step after another, of random play."""
    with closing(Envs(config, num_envs, beside=beside)) as envs:
        rng = np.random.default_rng(0)
        return [envs.reset(3), *(envs.step(envs.random_actions(rng)).observations for _ in range(steps))]


def both(config, steps, beside):
    """The same, of each of two views."""
    seen = shown_in(config, steps, beside)
    return [np.stack([part(each, view) for each in seen]) for view in (config.view, beside)]


COUNTER = EnvConfig(allow(Counter))


@pytest.mark.parametrize("delay", [1, 3, 20])
def test_a_delay_shows_what_was_so_many_steps_ago_and_the_teacher_sees_the_same_step_as_it_is(delay):
    late, now = both(replace(COUNTER, view=(f"delay={delay}",)), 30, ())
    steps = np.arange(31)
    assert (now[:, 0, 0] == steps).all()
    assert (now[:, 0, 1] == steps % 8).all()
    began = steps - steps % 8  # of each game, when
    assert (late[:, 0, 0] == np.maximum(steps - delay, began)).all()


def test_two_views_of_one_step_never_mix():
    wrapper = allow(Negative)
    mine, whole = both(replace(COUNTER, view=(wrapper,)), 30, ())
    assert (mine == -whole).all()
    late, negative = both(replace(COUNTER, view=("delay=2",)), 30, (wrapper, "delay=2"))
    assert (late == -negative).all()
    assert (np.stack(shown_in(replace(COUNTER, view=(wrapper,)), 30)) == mine).all()


def test_what_a_wrapper_draws_at_random_leaves_the_game_alone():
    for view in ((allow(Chancy),), ("noise=0.5",), ("delay=1",)):
        plain = np.stack(shown_in(CARTPOLE, 60))
        _, teachers = both(replace(CARTPOLE, view=view), 60, ())
        assert (plain == teachers).all()


def test_noise_is_a_share_of_each_feature_s_deviation_and_the_same_from_the_same_seed():
    task = replace(CARTPOLE, view=("noise=0.5",))
    noisy, plain = both(task, 1_500, ())
    noise = (noisy - plain).reshape(-1, 4)
    ratios = noise.std(0) / plain.reshape(-1, 4).std(0)
    assert np.allclose(ratios, 0.5, rtol=0.25)
    assert np.abs(noise.mean(0) / noise.std(0)).max() < 0.1
    assert noisy.dtype == np.float32
    again, _ = both(task, 1_500, ())
    assert (again == noisy).all()


def test_noise_of_images_stays_within_their_numbers():
    noisy, plain = both(replace(PONG, view=("noise=2",)), 20, ())
    assert (noisy.dtype, noisy.shape) == (np.uint8, plain.shape)
    assert (noisy != plain).mean() > 0.5
    assert (noisy[1:, :, 0] == noisy[:-1, :, 1]).all()  # a frame is as noisy in every stack that holds it


@pytest.mark.parametrize("view", ["ram", "objects"])
def test_the_memory_of_a_game_is_shown_of_the_very_step_of_the_picture(view):
    memory, pictures = both(replace(PONG, view=(view,), max_frames=1_200), 200, ())
    assert (memory.shape[2:], pictures.shape[2:]) == ((4, 1, 128 if view == "ram" else 4), (4, 84, 84))
    ball = memory[:, :, -1, 0, 49 if view == "ram" else 0].astype(int)
    height = memory[:, :, -1, 0, 54 if view == "ram" else 1].astype(int)
    found, wanted = [], []
    for picture, x, y in zip(pictures[:, :, -1].reshape(-1, 84, 84), ball.flat, height.flat, strict=True):
        field = picture[14:77, 12:72].astype(int)  # between the paddles
        rows, columns = np.nonzero(np.abs(field - np.median(field)) > 40)
        if 0 < len(rows) < 12 and y:
            found.append((columns.mean(), rows.mean()))
            wanted.append((x, y))
    found, wanted = np.array(found).T, np.array(wanted).T
    assert found.shape[1] > 50
    assert min(np.corrcoef(found[axis], wanted[axis])[0, 1] for axis in (0, 1)) > 0.99


def test_a_game_played_alone_is_the_game_of_the_vector_environment():
    alone = np.concatenate(both(replace(PONG, view=("ram",)), 60, ())[1])
    together = np.concatenate(shown_in(PONG, 60))
    assert alone.shape == together.shape
    for seen in (alone, together):  # not the same chances, but the same court at the same places
        assert len(np.unique(seen[:, -1, :14])) > 1
    assert np.abs(np.median(alone[:, -1], 0) - np.median(together[:, -1], 0)).max() <= 1


def test_rows_are_hidden_of_pictures_alone():
    with closing(Envs(replace(SHORT, view=(allow(Rows),)), 2)) as envs:
        policy = Policy(NetworkConfig(), **envs.spaces)
    policy.hide(10)
    assert (policy.scale == 1).all()


def test_what_changes_older_frames_is_read_whole():
    with closing(Envs(EnvConfig(allow(stacked), view=("noise=3",)), 2)) as envs:
        policy = Policy(NetworkConfig(family="mlp", width="1/8"), **envs.spaces)
        policy.scale.fill_(0.01)  # within the bound of what is normalised
        preparer = Preparer(policy)
        for transition in islice(collect(envs, preparer, envs.reset(0), lambda x: torch.zeros(len(x)).long()), 5):
            assert torch.equal(transition.next_inputs, preparer.first(transition.step.observations))


# Refusals


@pytest.mark.parametrize(
    ("env", "view", "complaint"),
    [
        (CARTPOLE, ("noise",), "--view noise of observations .4,.: write it as noise=0.1"),
        (CARTPOLE, ("delay=0",), "write it as delay=2"),
        (CARTPOLE, ("ram",), "it is for Atari games"),
        (replace(PONG, id="breakout", actions=None), ("objects",), "where things are is known of pong alone"),
        (TASKS["minatar-breakout"].env, ("noise=1",), "it is for numbers"),
        (CARTPOLE, ("somewhere:Wrapper",), "--view somewhere:Wrapper is code of module somewhere: allow it"),
        (CARTPOLE, (allow(Counter),), "cannot be made: TypeError"),
        (COUNTER, (allow(Greedy),), "a view asked for a second step"),
        (TASKS["minatar-breakout"].env, (allow(Divided),), r"shows float64 \(10, 10, 4\), and its space says bool"),
        (CARTPOLE, (allow(One),), r"shows float32 \(1,\), and its space says float32 \(4,\)"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_a_line(env, view, complaint):
    with pytest.raises((InputError, potstill.errors.TaskError), match=complaint):
        shown_in(replace(env, view=view), 1)


def test_what_the_environment_shows_is_named_first():
    for view, first in ((("mask=0", "noise=0.1"), "mask=0"), (("42x42", "ram"), "42x42")):
        shape = (4,) if first == "mask=0" else (4, 84, 84)
        with pytest.raises(InputError, match=f"is shown by the environment: name it before {first}"):
            Policy(NetworkConfig(family="mlp"), shape, 2, view=view)


def test_a_policy_plays_only_where_it_is_shown_what_it_learned_from():
    policy = Policy(NetworkConfig(family="linear"), (4,), 2, dtype="float32")
    with pytest.raises(InputError, match=r"the policy sees full, CartPole-v1 shows noise=0\.1 here"):
        list(play(policy, replace(CARTPOLE, view=("noise=0.1",)), episodes=1, seed=0))


# Learning


def decided():
    """Plays `Copy` without a mistake."""
    policy = Policy(NetworkConfig(family="linear"), (3,), 3, dtype="float32")
    with torch.no_grad():
        policy.actor.weight.copy_(8 * torch.eye(3))
        policy.actor.bias.zero_()
    return policy


LEARN = DistillConfig(
    network=NetworkConfig(family="linear"), total_timesteps=3_000, num_envs=8, batch_size=64, warmup_steps=160,
    learning_rate=2e-2, precision="float32",
)  # fmt: skip
COPY = EnvConfig(allow(Copy))


@pytest.mark.parametrize("lead", ["student", "teacher", "mixed"])
def test_the_teacher_says_what_it_sees_whoever_leads(lead):
    """The right action is in the present observation alone: whoever mixes up steps or views learns nothing."""
    _, agrees = learned(replace(LEARN, view=("noise=0.1",), lead=lead), decided(), COPY)
    assert agrees["agreement"] > 0.98
    negative, agrees = learned(replace(LEARN, view=(allow(Negative),), lead=lead), decided(), COPY)
    assert agrees["agreement"] > 0.98
    assert (negative.actor.weight.diagonal() < 0).all()
    _, differs = learned(replace(LEARN, view=("delay=1",), lead=lead), decided(), COPY)
    assert differs["agreement"] < 0.5


def test_reward_teaches_what_the_view_shows_beside_a_teacher_that_sees_more(tmp_path):
    save_policy(tmp_path / "policy.safetensors", decided(), COPY, np.eye(3, dtype=np.float32), {})
    settings = {"total_timesteps": 8_192, "num_envs": 8, "num_steps": 32, "minibatch_size": 64, "precision": "float32"}
    settings |= {"device": "cpu", "threads": 1, "quiet": True, "episodes": 16, "family": "linear"}
    settings |= {"normalise_inputs": 200, "secondary_games": 0}
    made = potstill.train(teacher=tmp_path, view=("noise=0.1",), out=tmp_path / "run", **settings)
    assert made.result["agreement"] > 0.9
    assert made.result["score"] > 7
    assert made.loaded.env.view == ("noise=0.1",)


def memory_player():
    """Follows Pong's ball by what the memory says."""
    with closing(Envs(replace(SHORT, view=("objects",)), 2)) as envs:
        policy = Policy(NetworkConfig(family="linear"), **envs.spaces)
    with torch.no_grad():
        newest = torch.zeros(3, 1, 4, 4)  # rows, columns, frames: as images are read that are not convolved
        newest[:, 0, :, 3] = torch.tensor([[0.0, 0, 0, 0], [0.0, -1.0, 1.0, 0], [0.0, 1.0, -1.0, 0]])
        policy.actor.weight.copy_(newest.flatten(1))
        policy.actor.bias.zero_()
    policy.normalise_by(torch.full((1, 4), 100.0), torch.full((1, 4), 30.0))
    return policy


def test_pixels_learn_from_a_teacher_that_reads_the_memory():
    config = replace(LEARN, network=NetworkConfig("1/32"), total_timesteps=640, batch_size=32, warmup_steps=64)
    config = replace(config, view=("42x42", "frames=1"), learning_rate=1e-2, num_envs=4)
    teacher, task = memory_player(), replace(PONG, max_frames=400, view=("objects",))
    with closing(Envs(config.task_of(task), 4, beside=teacher.view)) as envs:
        state = start(config, teacher, torch.device("cpu"), envs, observations=100)
        progress = [line for line in distill(config, state, teacher, envs, every=20) if line.metrics]
    assert state.student.observation_shape == (4, 84, 84)
    assert state.student.seen_shape == (1, 42, 42)
    assert progress[-1].metrics["loss"] < 0.7 * progress[0].metrics["loss"]


# Runs


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("student", "noise=0.3"),
        ("student", "own_tasks:Dimmed"),
        ("teacher", "delay=2 mask=0"),
        ("ppd", "delay=2 mask=0"),
        ("cartpole", "noise=0.3"),
    ],
)
def test_a_run_goes_on_to_the_same_bits_and_its_files_are_played_as_it_was(name, view, tmp_path, monkeypatch):
    view = tuple(view.split())
    if view == ("own_tasks:Dimmed",):
        import own_tasks

        view = (allow(own_tasks.Dimmed),)
    teacher = Policy(NetworkConfig(width="1/8"), (4,), 2, dtype="float32").initialise(torch.Generator().manual_seed(0))
    (tmp_path / "expert").mkdir()
    probe = np.random.default_rng(0).normal(0, 0.1, (4, 4)).astype(np.float32)
    save_policy(tmp_path / "expert" / "policy.safetensors", teacher, CARTPOLE, probe, {})
    distils = isinstance(CONFIGS[name], DistillConfig)
    changes = {"view": view} if distils else {"env": replace(CARTPOLE, view=view)}
    whole, other = (small_run(name, tmp_path / "expert", tmp_path / each, **changes) for each in ("whole", "other"))
    execute(whole, RUNTIME)
    assert "inexact" not in cut(other, monkeypatch)
    first, second = (load_policy(run.policy_path).policy.state_dict() for run in (whole, other))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    loaded = load_policy(whole.policy_path)
    assert loaded.env.view == view
    if name == "student":
        assert export(loaded, tmp_path / "policy.onnx")["max_difference"] <= 1e-4


def test_a_policy_of_the_memory_trains_plays_is_filmed_and_exported(tmp_path):
    env = replace(SHORT, view=("ram", "frames=2"))
    with closing(Envs(env, 2)) as envs:
        policy = Policy(NetworkConfig(width="1/8"), **envs.spaces).initialise(torch.Generator().manual_seed(1))
        policy.normalise_by(*input_statistics(envs, 40, 0, policy.look))
        policy.hide(envs.config.hidden_rows)
        shown = envs.reset(0)
    assert (policy.family, policy.input_shape, policy.clip) == ("mlp", (2, 1, 128), 5.0)
    assert (policy.scale > 0).all()  # there is no scoreboard to hide
    save_policy(tmp_path / "policy.safetensors", policy, env, shown, {})
    loaded = load_policy(tmp_path / "policy.safetensors")
    assert export(loaded, tmp_path / "policy.c")["max_difference"] <= 1e-4
    with pytest.raises(InputError, match="--raw prepares Atari's frames"):
        export(loaded, tmp_path / "policy.onnx", raw=True)
    from potstill.watch import film

    film([("RAM", loaded)], tmp_path / "film.gif", seed=0, max_steps=12, quiet=True)
    assert (tmp_path / "film.gif").stat().st_size > 1_000
    assert name_of(env.view) == "ram"
