"""Zips of Stable-Baselines3 whose actions are continuous: a Gaussian in the environment's units becomes one in ours."""

import io
import json
import zipfile
from typing import ClassVar

import gymnasium
import numpy as np
import onnxruntime
import pytest
import torch
from edited_zips import imported
from stable_baselines3 import A2C, PPO

from potstill.distributions import gaussian_greedy, gaussian_sample
from potstill.envs import EnvConfig, Envs
from potstill.errors import InputError
from potstill.load.sb3 import load_sb3
from potstill.policies import load_policy
from potstill.tasks import TASKS

PENDULUM = TASKS["pendulum"].env
LOW, HIGH = [0.0, -3.0], [1.0, 5.0]


class Aim(gymnasium.Env):
    """Two actions whose ranges neither begin at minus their end nor are alike."""

    metadata: ClassVar = {"render_modes": ["rgb_array"]}  # which SB3 asks for
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (3,))
    action_space = gymnasium.spaces.Box(np.array(LOW, np.float32), np.array(HIGH, np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), -float(np.abs(action).sum()), False, False, {}


gymnasium.register("Aim-v0", Aim, max_episode_steps=20)
ENVS = {"ppo": PENDULUM, "a2c": PENDULUM, "aim": EnvConfig("Aim-v0")}


@pytest.fixture(scope="module")
def models():
    """SB3's own policies, a little trained; means that reach beyond the bounds, and deviations of their own."""
    small = {"n_steps": 64, "device": "cpu", "seed": 0}
    made = {
        "ppo": PPO("MlpPolicy", "Pendulum-v1", policy_kwargs={"log_std_init": -0.7}, **small).learn(128),
        "a2c": A2C("MlpPolicy", "Pendulum-v1", policy_kwargs={"activation_fn": torch.nn.ReLU}, **small).learn(128),
        "aim": PPO("MlpPolicy", "Aim-v0", **small).learn(128),
    }
    for name, model in made.items():
        with torch.no_grad():
            means = heads(model, observations(name))[0]
            spread = means.std(0)
            half = torch.as_tensor(model.action_space.high - model.action_space.low) / 2
            model.policy.action_net.weight *= (half / spread)[:, None]
            model.policy.log_std += torch.linspace(0.1, 0.3, len(half))
    return made


@pytest.fixture(scope="module")
def zips(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zips")
    for name, model in models.items():
        model.save(folder / f"{name}.zip")
    return folder


def observations(name):
    scale = [1.0, 1.0, 1.0] if name == "aim" else [1.0, 1.0, 8.0]
    return (np.random.default_rng(0).uniform(-1, 1, (64, 3)) * scale).astype(np.float32)


@torch.no_grad()
def heads(model, seen):
    """SB3's means and deviations, in the environment's units, and its values."""
    inputs, _ = model.policy.obs_to_tensor(seen)
    gaussian = model.policy.get_distribution(inputs).distribution
    return gaussian.mean, gaussian.stddev, model.policy.predict_values(inputs).squeeze(1)


def units(env):
    envs = Envs(env, 1)
    envs.close()
    low, high = (torch.from_numpy(bound) for bound in envs.bounds)
    return (low + high) / 2, (high - low) / 2


@pytest.mark.parametrize("name", ENVS)
@torch.no_grad()
def test_means_deviations_and_values_are_those_of_sb3(models, zips, name):
    loaded = load_sb3(zips / f"{name}.zip", ENVS[name])
    seen = observations(name)
    logits, values = loaded.policy(torch.from_numpy(seen))
    (centre, half), (mean, log_std) = units(ENVS[name]), logits.chunk(2, dim=-1)
    means, deviations, expected_values = heads(models[name], seen)
    assert torch.allclose(centre + half * mean, means, rtol=0, atol=1e-5)
    assert torch.allclose(half * log_std.exp(), deviations, rtol=1e-5, atol=0)
    assert torch.allclose(values, expected_values, rtol=0, atol=1e-5)
    assert loaded.document["provenance"]["algorithm"] == ("A2C" if name == "a2c" else "PPO")


@pytest.mark.parametrize("name", ENVS)
@torch.no_grad()
def test_greedy_actions_are_those_of_sb3_over_a_game_clipped_ones_too(models, zips, name):
    policy = load_sb3(zips / f"{name}.zip", ENVS[name]).policy
    envs = Envs(ENVS[name], 1)
    seen, played = envs.reset(0), []
    for _ in range(200):
        actions = gaussian_greedy(policy(torch.from_numpy(seen))[0]).numpy()
        expected, _ = models[name].predict(seen, deterministic=True)
        np.testing.assert_allclose(envs.own_actions(actions), expected, rtol=0, atol=1e-5)
        played.append(actions)
        seen = envs.step(actions).observations
    envs.close()
    clipped = (np.abs(played) == 1.0).mean()
    assert 0.0 < clipped < 1.0


@torch.no_grad()
def test_sampled_actions_have_the_means_and_deviations_of_sb3s(models, zips):
    loaded, seen = load_sb3(zips / "aim.zip", ENVS["aim"]), observations("aim")[:1].repeat(40_000, 0)
    centre, half = units(ENVS["aim"])
    drawn = centre + half * gaussian_sample(loaded.policy(torch.from_numpy(seen))[0], torch.Generator().manual_seed(0))
    means, deviations, _ = heads(models["aim"], seen[:1])
    assert torch.allclose(drawn.mean(0), means[0], atol=0.03 * deviations.max().item())
    assert torch.allclose(drawn.std(0), deviations[0], rtol=0.03)


def test_an_imported_policy_loads_as_any_other(zips, tmp_path):
    imported(zips / "aim.zip", ENVS["aim"], tmp_path / "aim")
    loaded = load_policy(tmp_path / "aim")  # compares the probe
    assert loaded.policy.continuous
    seen = torch.from_numpy(observations("aim"))
    assert torch.equal(loaded.policy(seen)[0], load_sb3(zips / "aim.zip", ENVS["aim"]).policy(seen)[0])


RUNTIME = ["--device", "cpu", "--threads", "1"]


def test_evaluate_scores_a_zip_as_sb3_plays_it(call, zips, models):
    words = ["evaluate", zips / "ppo.zip", "--env", "pendulum", "--episodes", 2, "--seed", 3, "--json", *RUNTIME]
    code, out, _ = call(*words)
    assert code == 0
    envs, scores = Envs(PENDULUM, 2), []
    seen = envs.reset(3)
    while len(scores) < 2:
        actions, _ = models["ppo"].predict(seen, deterministic=True)
        step = envs.step(actions / 2.0)
        seen = step.observations
        scores += [episode.score for episode in step.episodes]
    envs.close()
    assert json.loads(out)["returns"] == pytest.approx(scores, abs=1e-2)


def test_distill_takes_over_the_deviations_and_learns_the_means(call, zips, tmp_path):
    words = ["distill", zips / "ppo.zip", "--env", "pendulum", "--total-timesteps", 2048, "--num-envs", 8]
    words += ["--batch-size", 64, "--warmup-steps", 64, "--width", "1/4", "--precision", "float32", "--quiet", *RUNTIME]
    assert call(*words, "--evaluate", 2, "--out", tmp_path / "run")[0] == 0
    student, teacher = load_policy(tmp_path / "run").policy, load_sb3(zips / "ppo.zip", PENDULUM).policy
    assert torch.allclose(student.log_std, teacher.log_std, atol=0.2)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert last["loss"] < 0.5 * first["loss"]


def test_the_exported_file_gives_sb3s_means_and_clipped_actions(call, zips, models, tmp_path):
    words = ["export", zips / "aim.zip", "--env", "Aim-v0", "--out", tmp_path / "aim.onnx", "--json"]
    assert call(*words, "--threads", 1)[0] == 0
    session, seen = onnxruntime.InferenceSession(tmp_path / "aim.onnx"), observations("aim")
    mean, action = session.run(["mean", "action"], {"observation": seen})
    expected, deviations, _ = heads(models["aim"], seen)
    np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(action, np.clip(expected.numpy(), LOW, HIGH), rtol=0, atol=1e-4)
    actions = json.loads(session.get_modelmeta().custom_metadata_map["actions"])
    assert (actions["low"], actions["high"]) == (LOW, HIGH)
    np.testing.assert_allclose(actions["deviation"], deviations[0], rtol=1e-5)


# What is refused


def changed(source, target, data=None, state=None):
    """A copy of a zip with other entries in its JSON or among its weights."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    described = json.loads(members["data"])
    for name, change in (data or {}).items():
        described[name] = described[name] | change if isinstance(change, dict) else change
    weights = torch.load(io.BytesIO(members["policy.pth"]), weights_only=True) | (state or {})
    file = io.BytesIO()
    torch.save({name: tensor for name, tensor in weights.items() if tensor is not None}, file)
    members |= {"data": json.dumps(described).encode(), "policy.pth": file.getvalue()}
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target


@pytest.mark.parametrize(
    ("data", "state", "words"),
    [
        ({"action_space": {"high": "[1.]"}}, {}, r"its actions have high \[1\.\], those of Pendulum-v1 \[2\.\]: ano"),
        ({"action_space": {"low": None}}, {}, "does not tell the range of its actions: low is 'None'"),
        ({"action_space": {"low": "[]"}}, {}, r"does not tell the range of its actions: low is '\[\]'"),
        ({}, {"log_std": torch.zeros(63, 1)}, "no log_std that gives a deviation to each of 1 act"),
        ({}, {"log_std": torch.tensor([torch.nan])}, "log_std in policy.pth is not finite"),
        ({}, {"log_std": None}, "no log_std that gives a deviation to each of 1 actions"),
        ({"action_space": {"low": "[-2. -2.]", "high": "[2. 2.]"}}, {"action_net.bias": torch.zeros(2)}, "takes 2 act"),
    ],
)
def test_what_a_plain_gaussian_within_the_tasks_bounds_is_not_is_refused(zips, tmp_path, data, state, words):
    file = changed(zips / "ppo.zip", tmp_path / "model.zip", data, state)
    with pytest.raises(InputError, match=words) as error:
        load_sb3(file, PENDULUM)
    assert "\n" not in str(error.value)


def test_actions_of_another_kind_or_number_are_refused(zips):
    with pytest.raises(InputError, match="the policy has continuous actions, CartPole-v1 has discrete ones"):
        load_sb3(zips / "ppo.zip", TASKS["cartpole"].env)
    with pytest.raises(InputError, match="the policy takes 2 actions at once, Pendulum-v1 has 1"):
        load_sb3(zips / "aim.zip", PENDULUM)
