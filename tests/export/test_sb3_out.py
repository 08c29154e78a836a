"""Zips out, opened by the real Stable-Baselines3."""

import json
from contextlib import closing
from dataclasses import replace

import gymnasium
import numpy as np
import own_tasks
import pytest
import torch
from small_runs import sharpened
from stable_baselines3 import PPO

from potstill import evaluation
from potstill.envs import Envs
from potstill.errors import InputError
from potstill.export import export
from potstill.load import load
from potstill.load.sb3 import as_sb3
from potstill.networks import NetworkConfig, Policy
from potstill.policies import load_policy, save_policy
from potstill.tasks import TASKS, find_env


def saved(folder, task, **network):
    """A policy with opinions that normalises its inputs, and values in units of its own; loaded again."""
    env = find_env(task)
    with closing(Envs(env, 2)) as envs:
        probe = envs.reset(3)
        shapes = envs.observation_shape, envs.num_actions, envs.continuous
    policy = sharpened(Policy(NetworkConfig(**network), *shapes), seed=1, times=100)
    policy.return_scale.fill_(7.0)
    if policy.log_std is not None:
        policy.log_std.data.fill_(-0.5)
    policy.normalise_by(torch.full_like(policy.mean, 0.25), torch.full_like(policy.mean, 2.0))
    save_policy(folder / "policy.safetensors", policy, env, probe, {})
    return load_policy(folder)


@pytest.mark.parametrize(
    ("task", "network"),
    [
        ("cartpole", {"width": "1/8"}),
        ("cartpole", {"width": "1/8", "options": ("activation=relu",), "critic": "split", "critic_width": "1/4"}),
        ("pendulum", {"width": "1/4"}),
        ("cartpole", {"family": "linear"}),
    ],
)
def test_ppo_opens_the_zip_and_predicts_and_values_what_we_do(tmp_path, task, network):
    loaded = saved(tmp_path, task, **network)
    record = export(loaded, tmp_path / "policy.zip")
    assert record["max_difference"] < 1e-4
    model = PPO.load(tmp_path / "policy.zip", device="cpu")
    policy, game = loaded.policy, find_env(task)
    with closing(Envs(game, 4)) as envs:
        observations = envs.reset(0)
        for _ in range(20):
            with torch.no_grad():
                logits, value = policy(torch.from_numpy(observations))
                theirs = model.policy.predict_values(torch.from_numpy(observations))
            ours = policy.distribution.greedy(logits).numpy()
            predicted, _ = model.predict(observations, deterministic=True)
            np.testing.assert_allclose(predicted, envs.own_actions(ours), atol=1e-4)
            np.testing.assert_allclose(theirs[:, 0].numpy(), value.numpy(), atol=1e-4)
            observations = envs.step(ours).observations
    again = load(tmp_path / "policy.zip", task).policy
    with torch.no_grad():
        shown = torch.from_numpy(observations)
        torch.testing.assert_close(again(shown)[0], policy(shown)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("network", [{}, {"critic": "split", "critic_width": "1/4"}])
def test_convolutions_go_into_sb3s_own_wider_ones(tmp_path, network):
    """With one normalisation for all pixels, as that of a policy from SB3 and of its students is."""
    zipped = as_sb3(TASKS["pong"].env)
    with closing(Envs(zipped, 2)) as envs:
        probe = envs.reset(3)
    policy = Policy(NetworkConfig("1/8", **network), (4, 84, 84), 6, dtype="uint8", layout="stack")
    sharpened(policy, seed=1, times=100)
    with torch.no_grad():
        policy.mean.fill_(20.0)
        policy.scale.fill_(1 / 250)
        policy.return_scale.fill_(7.0)
    save_policy(tmp_path / "policy.safetensors", policy, zipped, probe, {})
    export(load_policy(tmp_path), tmp_path / "policy.zip")
    model = PPO.load(tmp_path / "policy.zip", device="cpu")
    with torch.no_grad():
        logits, value = policy(torch.from_numpy(probe))
        theirs = model.policy.predict_values(torch.from_numpy(probe))
    np.testing.assert_allclose(theirs[:, 0].numpy(), value.numpy(), atol=1e-3)
    assert model.predict(probe, deterministic=True)[0].tolist() == logits.argmax(1).tolist()


def test_the_zip_is_timed_and_plays_and_its_card_lies_beside_it(tmp_path):
    loaded = saved(tmp_path, "cartpole", width="1/8")
    record = export(loaded, tmp_path / "policy.zip", episodes=4, seed=3, quiet=True)
    *_, played = evaluation.play(loaded.policy, loaded.env, episodes=4, seed=3)
    assert record["models"]["float32"]["score"]["mean"] == played.summary()["mean"]
    assert record["models"]["float32"]["bytes"] == (tmp_path / "policy.zip").stat().st_size
    assert {"latency_ms", "action_noise", "observation_noise", "delay"} <= record["models"]["float32"].keys()
    assert record["policy"]["parameters"] == loaded.policy.size().parameters
    assert json.loads((tmp_path / "policy.zip.json").read_text()) == record


def test_a_clip_that_no_observation_of_the_task_reaches_is_left_out_and_another_refused(tmp_path):
    loaded = saved(tmp_path, "acrobot", width="1/8")  # of speeds down to -9 pi, which becomes -14.26
    loaded.policy.input_clip = torch.tensor(14.27)
    assert export(loaded, tmp_path / "policy.zip")["max_difference"] < 1e-4
    loaded.policy.input_clip = torch.tensor(14.25)
    with pytest.raises(InputError, match=r"policy: its normalisation is clipped at 14\.25, which SB3 does outside"):
        export(loaded, tmp_path / "other.zip")


def test_squashed_means_are_refused(tmp_path):
    loaded = saved(tmp_path, "pendulum", width="1/8")
    loaded.policy.squash = torch.tensor(1.0)
    with pytest.raises(InputError, match="cannot hold this policy: its means are squashed, as PPO's are not"):
        export(loaded, tmp_path / "policy.zip")


class One(own_tasks.Copy):
    observation_space = gymnasium.spaces.Box(0, 2, (), np.float32)

    def observe(self):
        return np.float32(super().observe().argmax())


def test_what_sb3_cannot_hold_is_refused_with_the_reason(tmp_path):
    with pytest.raises(InputError, match="reads no single number: export to"):
        export(saved(tmp_path, One, width="1/8"), tmp_path / "policy.zip")
    pong = saved(tmp_path, "pong", width="1/64")
    with pytest.raises(InputError, match=r"its normalisation is clipped or another for each pixel\. Export to"):
        export(pong, tmp_path / "policy.zip")
    folder = tmp_path / "some"
    folder.mkdir()
    acrobot = saved(folder, "acrobot", width="1/8")
    policy = Policy(NetworkConfig("1/8"), acrobot.policy.observation_shape, 2)
    some = replace(acrobot, policy=policy, env=replace(acrobot.env, actions=(0, 2)), document={})
    with pytest.raises(InputError, match=r"uses the actions \[0, 2\]: SB3 would use all"):
        export(some, tmp_path / "policy.zip")
    assert not (tmp_path / "policy.zip").exists()
