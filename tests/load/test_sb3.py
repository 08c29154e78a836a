import io
import json
import os
import re
import shutil
import zipfile
from hashlib import sha256
from pathlib import Path

import ale_py
import gymnasium
import numpy as np
import onnxruntime
import pytest
import torch
from edited_zips import imported, rewrite, with_data, with_state
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.atari_wrappers import MaxAndSkipEnv, NoopResetEnv, WarpFrame
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecTransposeImage

from potstill.envs import EnvConfig, Envs
from potstill.errors import InputError
from potstill.load import load, weights
from potstill.load.sb3 import as_sb3, load_sb3
from potstill.policies import load_policy
from potstill.tasks import TASKS

gymnasium.register_envs(ale_py)

CARTPOLE = TASKS["cartpole"].env
PONG = as_sb3(TASKS["pong"].env)
SMALL = {"n_steps": 64, "device": "cpu", "seed": 0}


class CustomExtractor(FlattenExtractor):
    pass


@pytest.fixture(scope="module")
def models(frames):
    """SB3's own policies, a little trained, by name. Their heads are set so that their actions differ."""
    pong = VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=2, seed=0), 4)
    small = {"n_steps": 16, "n_epochs": 1, "batch_size": 32, "device": "cpu", "seed": 0}
    wide = {"activation_fn": torch.nn.ReLU, "net_arch": {"pi": [32, 32], "vf": [128, 128]}}
    apart = {"share_features_extractor": False}
    made = {
        "ppo": PPO("MlpPolicy", "CartPole-v1", **SMALL).learn(1_024),
        "a2c": A2C("MlpPolicy", "CartPole-v1", device="cpu", seed=0).learn(200),
        "dqn": DQN("MlpPolicy", "CartPole-v1", learning_starts=50, device="cpu", seed=0).learn(300),
        "relu": PPO("MlpPolicy", "CartPole-v1", policy_kwargs=wide, **SMALL).learn(64),
        "pong-ppo": PPO("CnnPolicy", pong, **small).learn(32),
        "pong-a2c": A2C("CnnPolicy", pong, learning_rate=1e-5, policy_kwargs=apart, device="cpu", seed=0).learn(10),
        "pong-dqn": DQN("CnnPolicy", pong, buffer_size=50, learning_starts=10, device="cpu", seed=0).learn(30),
    }
    for name, model in made.items():
        observations = some_observations(name, frames)
        head = model.policy.q_net.q_net[-1] if isinstance(model, DQN) else model.policy.action_net
        with torch.no_grad():
            head.weight *= 0.05 / heads(model, observations)[0].std(0).mean()
            head.bias -= heads(model, observations)[0].mean(0)
    pong.close()
    return made


@pytest.fixture(scope="module")
def zips(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zips")
    for name, model in models.items():
        model.save(folder / f"{name}.zip")
    return folder


@pytest.fixture(scope="module")
def frames():
    """Recorded observations of Pong, (300, 4, 84, 84)."""
    envs = Envs(PONG, 2)
    rng = np.random.default_rng(0)
    seen = [envs.reset(0), *(envs.step(rng.integers(0, 6, 2)).observations for _ in range(149))]
    envs.close()
    return np.concatenate(seen)


@torch.no_grad()
def heads(model, observations):
    """SB3's own logits (Q-values for a DQN) and values, before any softmax."""
    policy = model.policy
    policy.set_training_mode(False)
    inputs, _ = policy.obs_to_tensor(observations)
    if isinstance(model, DQN):
        q = policy.q_net(inputs)
        return q, q.mean(1)
    caught = []
    hook = policy.action_net.register_forward_hook(lambda module, inputs, output: caught.append(output))
    policy.get_distribution(inputs)
    hook.remove()
    return caught[0], policy.predict_values(inputs).squeeze(1)


def some_observations(name, frames):
    return frames[::10] if name.startswith("pong") else np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)


def task(name):
    return PONG if name.startswith("pong") else CARTPOLE


def one_line(error):
    return "\n" not in str(error.value)


# The same policy


@pytest.mark.parametrize("name", ["ppo", "a2c", "dqn", "relu", "pong-ppo", "pong-a2c", "pong-dqn"])
def test_logits_and_values_are_those_of_sb3(models, zips, frames, name):
    observations = some_observations(name, frames)
    logits, values = load_sb3(zips / f"{name}.zip", task(name), temperature=1.0).policy(torch.from_numpy(observations))
    expected, expected_values = heads(models[name], observations)
    assert expected.std() > 1e-2  # else any policy would do
    assert torch.allclose(logits, expected, rtol=0, atol=1e-5)
    assert torch.allclose(values, expected_values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ppo", "a2c", "dqn", "relu"])
def test_greedy_actions_are_those_of_sb3_over_whole_games_of_cartpole(models, zips, name):
    policy = load_sb3(zips / f"{name}.zip", CARTPOLE).policy
    env = gymnasium.make("CartPole-v1")
    steps = 0
    for seed in range(3):
        observation, over = env.reset(seed=seed)[0], False
        while not over:
            action, _ = models[name].predict(observation, deterministic=True)
            logits, _ = policy(torch.from_numpy(observation)[None])
            assert logits.argmax() == int(action)
            observation, _, terminated, truncated, _ = env.step(int(action))
            over = terminated or truncated
            steps += 1
    assert steps > 20


@pytest.mark.parametrize("name", ["pong-ppo", "pong-a2c", "pong-dqn"])
def test_greedy_actions_are_those_of_sb3_on_recorded_pong(models, zips, frames, name):
    actions, _ = models[name].predict(frames, deterministic=True)
    logits, _ = load_sb3(zips / f"{name}.zip", PONG).policy(torch.from_numpy(frames))
    assert np.array_equal(logits.argmax(-1).numpy(), actions)
    assert len(set(actions)) > 1


def test_the_observations_of_pong_are_those_of_sb3s_wrappers():
    """Same stacks from the fourth observation on, given the same start: one frame before the first action."""

    def make():
        noops = NoopResetEnv(gymnasium.make("PongNoFrameskip-v4"))
        noops.override_num_noops = 1
        return WarpFrame(MaxAndSkipEnv(noops, 4))

    theirs = VecTransposeImage(VecFrameStack(DummyVecEnv([make]), 4))
    ours = Envs(EnvConfig("pong", atari=True, noop_max=1, fire_on_reset=True), 1)
    ours.reset(0)
    theirs.reset()
    for step, action in enumerate(np.random.default_rng(0).integers(0, 6, (200, 1)), 1):
        mine = ours.step(action)
        observations, rewards, _, _ = theirs.step(action)
        assert np.array_equal(mine.rewards, rewards)
        assert np.array_equal(mine.observations[:, -1], observations[:, -1]), step
        if step >= 3:
            assert np.array_equal(mine.observations, observations), step
    ours.close()
    theirs.close()


def test_sb3_plays_atari_with_all_actions_nothing_sticky_and_nothing_hidden():
    assert as_sb3(TASKS["pong"].env) == EnvConfig("pong", atari=True, fire_on_reset=True)
    assert (PONG.frame_skip, PONG.frame_stack, PONG.noop_max, PONG.sticky, PONG.actions) == (4, 4, 30, 0.0, None)
    assert as_sb3(CARTPOLE) == CARTPOLE


def test_pixels_are_divided_by_255_and_never_clipped(zips):
    policy = load_sb3(zips / "pong-ppo.zip", PONG).policy
    inputs = policy.prepare(torch.full((1, 4, 84, 84), 255, dtype=torch.uint8))
    assert torch.allclose(inputs, torch.ones(1, 4, 84, 84))


def test_the_sizes_of_the_networks_choose_the_width(zips):
    config = load_sb3(zips / "relu.zip", CARTPOLE).policy.config
    assert (config.family, config.width, config.critic, config.critic_width) == ("mlp", "1/2", "split", "2")
    assert config.options == ("activation=relu",)
    assert load_sb3(zips / "ppo.zip", CARTPOLE).policy.config.family == "mlp"
    assert load_sb3(zips / "pong-ppo.zip", PONG).policy.config.critic == "shared"
    assert load_sb3(zips / "pong-a2c.zip", PONG).policy.config.critic == "split"


def test_the_temperature_divides_the_q_values_and_leaves_the_value_and_the_greedy_action(models, zips):
    observations = some_observations("dqn", None)
    q, mean = heads(models["dqn"], observations)
    for temperature in (0.01, 5.0):
        policy = load_sb3(zips / "dqn.zip", CARTPOLE, temperature=temperature).policy
        logits, values = policy(torch.from_numpy(observations))
        assert torch.allclose(logits, q / temperature, rtol=1e-4, atol=1e-5 / temperature)
        assert torch.allclose(values, mean, rtol=0, atol=1e-5)
    default, _ = load_sb3(zips / "dqn.zip", CARTPOLE).policy(torch.from_numpy(observations))
    assert torch.allclose(default, q / 0.01, rtol=1e-4, atol=1e-3)


def test_a_zip_of_an_older_layout_without_second_copies_is_the_same_policy(models, zips, frames, tmp_path):
    def drop(state):
        return {name: tensor for name, tensor in state.items() if not name.startswith(("pi_", "vf_"))}

    old = rewrite(zips / "pong-ppo.zip", tmp_path / "old.zip", with_state(drop))
    with zipfile.ZipFile(old) as archive:
        assert len(torch.load(io.BytesIO(archive.read("policy.pth")), weights_only=True)) == 12
    logits, values = load_sb3(old, PONG).policy(torch.from_numpy(frames[::10]))
    expected, expected_values = heads(models["pong-ppo"], frames[::10])
    assert torch.allclose(logits, expected, rtol=0, atol=1e-5)
    assert torch.allclose(values, expected_values, rtol=0, atol=1e-5)


# Saved as ours


@pytest.mark.parametrize("name", ["ppo", "dqn", "pong-ppo"])
def test_an_imported_policy_loads_as_any_other_and_tells_where_it_comes_from(models, zips, frames, tmp_path, name):
    file = zips / f"{name}.zip"
    imported(file, task(name), tmp_path / "new" / "run")
    loaded = load_policy(tmp_path / "new" / "run")  # compares the probe
    assert loaded.env == task(name)
    provenance = loaded.document["provenance"]
    assert provenance["file"] == file.name
    assert provenance["sha256"] == sha256(file.read_bytes()).hexdigest()
    assert provenance["algorithm"] == name.removeprefix("pong-").upper()
    assert provenance["sb3_version"] == "2.9.2"
    assert provenance["env_steps"] == models[name].num_timesteps
    assert provenance.get("temperature") == (0.01 if name == "dqn" else None)
    observations = torch.from_numpy(some_observations(name, frames))
    assert torch.equal(loaded.policy(observations)[0], load_sb3(file, task(name)).policy(observations)[0])


def test_an_import_leaves_nothing_where_it_fails(zips, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"reads|chooses"):
        imported(zips / "ppo.zip", PONG, tmp_path / "new" / "out")
    (tmp_path / "full").mkdir()
    with pytest.raises(InputError, match="full exists: choose another --out"):
        imported(zips / "ppo.zip", CARTPOLE, tmp_path / "full")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot make .*; choose another --out"):
        imported(zips / "ppo.zip", CARTPOLE, tmp_path / "file" / "out")

    def fail(*arguments):
        raise InputError("cannot write: no space left on device")

    monkeypatch.setattr(weights, "save_policy", fail)
    with pytest.raises(InputError, match="no space left"):
        imported(zips / "ppo.zip", CARTPOLE, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


# Policies that no family represents


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"net_arch": [1088, 1088]}, "width must be above 0 and at most 16, not 17"),
        ({"activation_fn": torch.nn.Tanhshrink}, "activation_fn 'Tanhshrink' is not read: tanh, relu, elu"),
        ({"features_extractor_class": CustomExtractor}, "policy_kwargs has 'features_extractor_class': .*CustomExtr"),
        ({"normalize_images": False}, "policy_kwargs has 'normalize_images': 'False'"),
    ],
)
def test_a_network_that_is_not_of_our_families_is_refused_by_name(tmp_path, options, words):
    PPO("MlpPolicy", "CartPole-v1", policy_kwargs=options, **SMALL).save(tmp_path / "model.zip")
    with pytest.raises(InputError, match=words) as error:
        load_sb3(tmp_path / "model.zip", CARTPOLE)
    assert one_line(error)


def test_options_that_change_nothing_are_taken(tmp_path):
    options = {"ortho_init": False, "net_arch": [16, 16], "features_extractor_class": FlattenExtractor}
    model = PPO("MlpPolicy", "CartPole-v1", policy_kwargs=options, **SMALL)
    model.save(tmp_path / "model.zip")
    observations = some_observations("ppo", None)
    logits, _ = load_sb3(tmp_path / "model.zip", CARTPOLE).policy(torch.from_numpy(observations))
    assert torch.allclose(logits, heads(model, observations)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy_class": {":type:": "t", "__module__": "sb3_contrib.common.maskable.policies"}}, "MaskablePPO is not"),
        ({"policy_class": {":type:": "t", "__module__": "my.policies"}}, "a policy class of 'my.policies' is not"),
        (
            {"action_space": {":type:": "<class 'gymnasium.spaces.multi_discrete.MultiDiscrete'>"}},
            "Multi.*, CartPole-v1 has 2",
        ),
        ({"action_space": {":type:": "<class 'gymnasium.spaces.multi_binary.MultiBinary'>"}}, "MultiBinary.* is not"),
        ({"action_space": {":type:": "<class 'gymnasium.spaces.discrete.Discrete'>", "start": "1"}}, "start at '1'"),
        (
            {"observation_space": {":type:": "<class 'gymnasium.spaces.tuple.Tuple'>"}},
            "observation space .*Tuple.* is not",
        ),
    ],
)
def test_spaces_and_classes_that_are_not_read_are_refused_by_name(zips, tmp_path, changes, words):
    file = rewrite(zips / "ppo.zip", tmp_path / "model.zip", with_data(**changes))
    with pytest.raises(InputError, match=words) as error:
        load_sb3(file, CARTPOLE)
    assert one_line(error)


@pytest.mark.parametrize(
    ("name", "env", "words"),
    [
        ("ppo", "acrobot", "the policy chooses among 2 actions, Acrobot-v1 has 3"),
        ("ppo", "mountaincar", r"chooses among 2 actions, MountainCar-v0 has 3"),
        ("ppo", "pendulum", "the policy has discrete actions, Pendulum-v1 has continuous ones"),
        ("pong-ppo", "cartpole", "chooses among 6 actions, CartPole-v1 has 2"),
        ("pong-dqn", "cartpole", "chooses among 6 actions, CartPole-v1 has 2"),
    ],
)
def test_a_policy_of_another_task_is_refused(zips, name, env, words):
    config = TASKS[env].env if env in TASKS else EnvConfig("MountainCar-v0")
    with pytest.raises(InputError, match=words):
        load_sb3(zips / f"{name}.zip", as_sb3(config))


def test_a_pipe_is_not_opened_and_a_zip_without_its_ending_is_told_which_it_may_have(zips, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="--env names the task of a Stable"):  # and nothing waits for a writer
        load(tmp_path / "pipe", env="cartpole")
    shutil.copyfile(zips / "ppo.zip", tmp_path / "model.bin")
    with pytest.raises(
        InputError, match=r"is a zip: give its name the ending \.zip, or \.pt where torch\.save wrote it"
    ):
        load(tmp_path / "model.bin", env="cartpole")


def test_observations_of_another_task_are_refused(zips, tmp_path):
    def narrow(state):
        return state | {f"mlp_extractor.{net}.0.weight": torch.zeros(64, 3) for net in ("policy_net", "value_net")}

    file = rewrite(zips / "ppo.zip", tmp_path / "model.zip", with_state(narrow))
    words = r"policy_net\.0\.weight is \(64, 3\); for observations \(4,\) of CartPole-v1 and the mlp family it would be"
    with pytest.raises(InputError, match=words):
        load_sb3(file, CARTPOLE)
    with pytest.raises(InputError, match=r"pong shows \(4, 84, 84\) uint8: SB3's MlpPolicy reorders the pixels"):
        load_sb3(zips / "ppo.zip", EnvConfig("pong", atari=True, actions=(2, 3)))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_is_refused(zips, temperature):
    with pytest.raises(InputError, match="temperature must be positive and finite"):
        load_sb3(zips / "dqn.zip", CARTPOLE, temperature=temperature)


def test_a_temperature_that_leaves_the_finite_numbers_is_refused(zips):
    with pytest.raises(InputError, match="a temperature of 1e-44 is too low"):
        load_sb3(zips / "dqn.zip", CARTPOLE, temperature=1e-44)


# The command line


RUNTIME = ["--device", "cpu", "--threads", "1"]
TINY = ["--total-timesteps", 256, "--num-envs", 4, "--batch-size", 16, "--warmup-steps", 16]
TINY += ["--precision", "float32", "--quiet", *RUNTIME]


def test_evaluate_plays_a_zip_like_the_policy_imported_from_it(call, zips, tmp_path):
    assert call("import-sb3", zips / "dqn.zip", "--env", "cartpole", "--out", tmp_path / "dqn")[0] == 0
    words = ["--episodes", 4, "--json", *RUNTIME]
    code, out, _ = call("evaluate", zips / "dqn.zip", "--env", "cartpole", *words)
    direct, imported = json.loads(out), json.loads(call("evaluate", tmp_path / "dqn", *words)[1])
    assert code == 0
    assert direct["returns"] == imported["returns"]
    beside = call("evaluate", tmp_path / "dqn", "--teacher", zips / "dqn.zip", "--env", "cartpole", *words)
    assert json.loads(beside[1])["agreement"] == 1.0


def test_distill_learns_from_a_zip_and_names_it_by_its_own_hash(call, zips, tmp_path):
    file, run = zips / "dqn.zip", tmp_path / "run"
    words = [
        "distill",
        file,
        "--env",
        "cartpole",
        "--lead",
        "teacher",
        "--network-option",
        "activation=relu",
        *TINY,
        "--out",
        run,
    ]
    code, out, err = call(*words, "--evaluate", 2)
    assert (code, err) == (0, "")
    assert out.startswith(f"{run}\n")
    config = json.loads((run / "config.json").read_text())
    assert config["teacher"] == str(file)
    assert config["teacher_hash"] == sha256(file.read_bytes()).hexdigest()[:12]
    assert config["teacher_env"]["id"] == "CartPole-v1"
    assert json.loads((run / "result.json").read_text())["teacher_score"] > 0
    assert load_policy(run).document["provenance"]["teacher_hash"] == config["teacher_hash"]


def test_export_and_watch_take_a_zip_and_its_task(call, zips, models, tmp_path):
    words = [zips / "ppo.zip", "--env", "cartpole"]
    code, out, _ = call("export", *words, "--out", tmp_path / "ppo.onnx", "--threads", 1, "--json")
    assert (code, json.loads(out)["env"]) == (0, "CartPole-v1")
    observations = some_observations("ppo", None)
    session = onnxruntime.InferenceSession(tmp_path / "ppo.onnx")
    (logits,) = session.run(["logits"], {"observation": observations})
    np.testing.assert_allclose(logits, heads(models["ppo"], observations)[0], atol=1e-4)

    film = tmp_path / "game.gif"
    imported(zips / "ppo.zip", CARTPOLE, tmp_path / "imported")
    code, out, _ = call("watch", zips / "ppo.zip", tmp_path / "imported", *words[1:], "--out", film, "--max-steps", 3)
    assert (code, out) == (0, f"{film}\n")
    assert film.read_bytes().startswith(b"GIF89a")


def test_a_run_goes_on_with_the_zip_it_began_with_and_no_other(call, zips, tmp_path):
    file = Path(shutil.copy(zips / "ppo.zip", tmp_path / "model.zip"))
    run = tmp_path / "run"
    assert call("distill", file, "--env", "cartpole", *TINY, "--evaluate", 0, "--out", run)[0] == 0
    (run / "result.json").unlink()  # as if it had been stopped
    shutil.copy(zips / "a2c.zip", file)
    code, _, err = call("distill", "--resume", run)
    assert (code, err) == (2, f"potstill: {file} is no longer the teacher this run began with\n")
    shutil.copy(zips / "ppo.zip", file)
    assert call("distill", "--resume", run, "--evaluate", 0, "--quiet", *RUNTIME)[0] == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["evaluate", "ppo.zip"], r"ppo\.zip does not name its task: add --env"),
        (["distill", "ppo.zip", "--out", "new"], r"ppo\.zip does not name its task: add --env"),
        (["evaluate", "imported", "--env", "cartpole"], "--env names the task of a Stable-Baselines3 zip"),
        (["distill", "imported", "--env", "cartpole", "--out", "new"], "--env names the task of a Stable-Baselines3"),
        (["export", "ppo.zip", "--out", "new.onnx"], r"ppo\.zip does not name its task: add --env"),
        (["train", "--env", "cartpole", "--teacher", "ppo.zip"], r"ppo\.zip is no policy of potstill's, as trainings"),
        (["watch", "imported", "ppo.zip", "--out", "new.gif"], r"ppo\.zip does not name its task: add --env"),
        (
            ["export", "imported", "--env", "cartpole", "--out", "new.onnx"],
            "--env names the task of a Stable-Baselines3",
        ),
        (["watch", "imported", "--env", "cartpole", "--out", "new.gif"], "--env names the task of a Stable-Baselines3"),
        (["evaluate", "ppo.zip", "--env", "cartpol"], "did you mean cartpole"),
        (["evaluate", "ppo.zip", "--env", "PongNoFrameskip-v4"], "write ale/pong"),
        (["evaluate", "ppo.zip", "--env", "pong"], "the policy chooses among 2 actions, pong has 6"),
        (["evaluate", "none.zip", "--env", "pong"], r"cannot read none\.zip: no such file"),
        (["evaluate", "ppo", "--env", "cartpole"], r"ppo is no policy; did you mean ppo\.zip\?"),
        (["evaluate", "none", "--env", "cartpole"], "cannot read none: no such file"),
        (["evaluate", ".", "--env", "cartpole"], r"holds no policy\.safetensors: name the zip in it, dqn\.zip"),
        (["evaluate", "bare", "--env", "cartpole"], r"bare is a zip: give its name the ending \.zip"),
        (["import-sb3", "ppo.zip", "--env", "acrobot", "--out", "new"], "chooses among 2 actions, Acrobot-v1 has 3"),
        (["import-sb3", "ppo.zip", "--env", "cartpole", "--out", "imported"], "imported exists: choose another --out"),
        (["import-sb3", "dqn.zip", "--env", "cartpole", "--out", "new", "--temperature", "0"], "must be positive"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(call, zips, tmp_path, monkeypatch, words, expected):
    for name in ("ppo.zip", "dqn.zip"):
        shutil.copy(zips / name, tmp_path)
    shutil.copy(zips / "ppo.zip", tmp_path / "bare")
    imported(zips / "ppo.zip", CARTPOLE, tmp_path / "imported")
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert re.search(expected, err)
    assert err.startswith("potstill: ")
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "dqn.zip", "imported", "ppo.zip"]
