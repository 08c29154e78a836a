"""Policies that no list of layers describes, written by PyTorch's own exporter and held to the same parity."""

import json
import sys

import gymnasium
import numpy as np
import onnxruntime
import own_tasks
import pytest
import torch
from gymnasium import spaces
from small_runs import sharpened

from potstill import imports
from potstill.envs import Envs
from potstill.errors import InputError
from potstill.export import export
from potstill.export.actor import actor
from potstill.networks import NetworkConfig, Policy
from potstill.policies import load_policy, save_policy
from potstill.tasks import find_env


class Gated(torch.nn.Module):
    def __init__(self, inputs, units):
        super().__init__()
        self.value, self.gate = torch.nn.Linear(inputs, units), torch.nn.Linear(inputs, units)

    def forward(self, x):
        return torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x))


def gated(shape, width, units="16"):
    return Gated(shape[0], round(int(units) * width))


class OfTwo(torch.nn.Module):
    """Holds for the batch it was traced with, and for no other."""

    def forward(self, x):
        return x.flatten().reshape(len(x), -1)


def of_two(shape, width):
    return OfTwo()


class Buttons(gymnasium.Env):
    """Asserts what arrives; the actions are given to it."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r}"
        self.t += 1
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), float(np.sum(action)), self.t == 5, False, {}


SEVERAL = spaces.MultiDiscrete([3, 2], start=[5, 0])
BOX = spaces.Box(np.float32([[-2, 0], [0, 1]]), np.float32([[1, 1], [3, 4]]))


@pytest.fixture(autouse=True)
def named():
    imports.allow(gated)


def saved(folder, space, family="auto", **settings):
    env = find_env(lambda: Buttons(space))
    envs = Envs(env, 1)
    policy = sharpened(Policy(NetworkConfig(family=family, **settings), **envs.spaces), seed=1, times=100)
    folder.mkdir()
    save_policy(folder / "policy.safetensors", policy, env, envs.reset(0), {})
    return load_policy(folder)


@pytest.mark.parametrize(
    ("space", "family"),
    [
        (spaces.Discrete(4, start=7), gated),
        (SEVERAL, "mlp"),
        (SEVERAL, gated),
        (spaces.MultiBinary(3), "linear"),
        (BOX, "mlp"),
        (spaces.Box(-1.0, 2.0, (2,), np.float64), gated),
    ],
    ids=["own network", "choices", "both", "switches", "box of two axes", "own network, box"],
)
def test_the_file_plays_as_pytorch_does_with_actions_that_the_task_takes(space, family, tmp_path):
    loaded = saved(tmp_path / "run", space, imports.allow(family) if callable(family) else family)
    record = export(loaded, tmp_path / "policy.onnx", episodes=2, quiet=True)
    assert record["observations"] > 100
    assert record["models"]["float32"]["action_noise"]["episodes"] == 2
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    own = json.loads(session.get_modelmeta().custom_metadata_map["actions"])
    task = Buttons(space)
    task.reset(seed=3)
    for _ in range(5):
        seen = np.random.default_rng(0).uniform(-1, 1, (1, 3)).astype(np.float32)
        (action,) = session.run(["action"], {"observation": seen})[0]
        if isinstance(space, spaces.Discrete):
            action = np.int64(own[action])
        elif not isinstance(space, spaces.Box):
            action = np.array([each[k] for each, k in zip(own, action, strict=True)], space.dtype)
        task.step(action)


@pytest.mark.parametrize(
    ("space", "family", "reason"),
    [
        (spaces.Discrete(2), gated, "gated is a network of your own"),
        (SEVERAL, "mlp", "takes several choices at once"),
        (BOX, "mlp", r"takes actions of shape \(2, 2\)"),
    ],
)
@pytest.mark.parametrize("ending", ["c", "zip"])
def test_what_other_files_cannot_hold_is_refused_in_one_line(space, family, reason, ending, tmp_path):
    loaded = saved(tmp_path / "run", space, imports.allow(family) if callable(family) else family)
    with pytest.raises(InputError, match=f"{reason}: only an ONNX file is written of it$"):
        export(loaded, tmp_path / f"policy.{ending}")
    assert not (tmp_path / f"policy.{ending}").exists()


def test_a_network_that_holds_for_some_batches_only_leaves_no_file(tmp_path):
    loaded = saved(tmp_path / "run", spaces.Discrete(2), imports.allow(of_two))
    assert actor(loaded).unlisted == f"{__name__}:of_two is a network of your own"
    with pytest.raises(InputError, match=r"onnxruntime cannot run the file of|PyTorch's exporter cannot write"):
        export(loaded, tmp_path / "policy.onnx")
    assert not (tmp_path / "policy.onnx").exists()
    assert sys.modules[__name__].of_two is of_two


def test_whole_numbers_of_a_range_are_refused_for_no_file_rounds(tmp_path):
    loaded = saved(tmp_path / "run", spaces.Box(0, 10, (2,), np.int64), "mlp")
    for name in ("policy.onnx", "policy.c", "policy.zip"):
        with pytest.raises(InputError, match="takes whole numbers of a range, to which no file rounds"):
            export(loaded, tmp_path / name)


@pytest.mark.parametrize("network", ["auto", "mlp", "gru"])
def test_pictures_without_a_channel_are_written(network, tmp_path):
    env = find_env(own_tasks.Picture)
    envs = Envs(env, 1)
    policy = sharpened(Policy(NetworkConfig("1/8", network), **envs.spaces), seed=1, times=100)
    save_policy(tmp_path / "policy.safetensors", policy, env, envs.reset(0), {})
    for name in ("policy.onnx", "policy.c"):
        assert export(load_policy(tmp_path), tmp_path / name, quiet=True)["max_difference"] < 1e-4
