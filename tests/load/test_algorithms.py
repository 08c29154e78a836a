"""Every algorithm of Stable-Baselines3 and sb3-contrib that potstill reads acts as SB3's own `predict`."""

from collections import OrderedDict

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation
from sb3_contrib import ARS, QRDQN, TQC, TRPO, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from potstill.envs import Envs
from potstill.errors import InputError
from potstill.load import load
from potstill.load.check import check_sb3
from potstill.load.sb3 import load_sb3
from potstill.tasks import TASKS


def make(algorithm, off_policy=False, **more):
    """A function from a task to a fresh model with two layers of 32 units."""

    def build(env):
        sizes = {"buffer_size": 10} if off_policy else {"n_steps": 128} if algorithm in (PPO, TRPO) else {}
        options = {"net_arch": [32, 32]} | more.get("policy_kwargs", {})  # SB3 adds to it
        return algorithm("MlpPolicy", env, device="cpu", seed=0, **sizes | more | {"policy_kwargs": options})

    return build


ELU = {"net_arch": {"pi": [24, 40], "vf": [8]}, "activation_fn": torch.nn.ELU}
MADE = {
    "PPO of any layers": make(PPO, policy_kwargs=ELU),
    "A2C of one layer": make(A2C, policy_kwargs={"net_arch": [16], "activation_fn": torch.nn.SiLU}),
    "DDPG of two layers": make(DDPG, True, policy_kwargs={"net_arch": [40, 30]}),
    "TRPO": make(TRPO),
    "QRDQN": make(QRDQN, True, policy_kwargs={"n_quantiles": 5}),
    "DQN": make(DQN, True),
    "ARS": make(ARS),
    "SAC": make(SAC, True),
    "SAC gSDE": make(SAC, True, use_sde=True),
    "TQC": make(TQC, True),
    "TD3": make(TD3, True),
    "DDPG": make(DDPG, True),
    "PPO gSDE": make(PPO, use_sde=True),
    "A2C gSDE": make(A2C, use_sde=True),
    "PPO gSDE squashed": make(PPO, use_sde=True, policy_kwargs={"squash_output": True}),
}
DISCRETE = ("TRPO", "QRDQN", "DQN", "ARS")
CASES = [("cartpole", name) for name in (*DISCRETE, "PPO of any layers")] + [
    ("pendulum", name) for name in MADE if name[-3:] != "DQN"
]


def made(task, name):
    """A fresh model whose actions differ from state to state: its last layer is made larger."""
    model = MADE[name](TASKS[task].env.id)
    state = model.policy.state_dict()
    heads = ("action_net.weight", "action_net.4.weight", "actor.mu.weight", "actor.mu.0.weight", "actor.mu.4.weight")
    with torch.no_grad():
        if name == "ARS":  # which begins with weights of zero
            generator = torch.Generator().manual_seed(1)
            for tensor in state.values():
                tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
        for head in (*heads, "q_net.q_net.4.weight", "quantile_net.quantile_net.4.weight"):
            if head in state and not (head == "actor.mu.0.weight" and "actor.mu.4.weight" in state):
                state[head].mul_(20 if head == "action_net.weight" else 5)
    return model


def observations(task):
    rng = np.random.default_rng(0)
    scale = 1.0 if task == "cartpole" else [1.0, 1.0, 8.0]
    return (rng.uniform(-1, 1, (200, 4 if task == "cartpole" else 3)) * scale).astype(np.float32)


@pytest.mark.parametrize(("task", "name"), CASES)
def test_greedy_actions_are_those_of_predict(tmp_path, task, name):
    model, seen, env = made(task, name), observations(task), TASKS[task].env
    model.save(tmp_path / "model.zip")
    expected, _ = model.predict(seen, deterministic=True)
    loaded = load_sb3(tmp_path / "model.zip", env)
    with torch.no_grad():
        actions = loaded.policy.distribution.greedy(loaded.policy(torch.from_numpy(seen))[0]).numpy()
    envs = Envs(env, 1)
    envs.close()
    actions = envs.own_actions(actions)
    assert len(np.unique(np.round(expected, 3))) > 1  # else any policy would do
    if task == "cartpole":
        assert np.array_equal(actions, expected)
    else:
        np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-5)
    provenance = loaded.document["provenance"]
    assert provenance["algorithm"] == name.split()[0]
    exact = name in ("TRPO", "QRDQN", "DQN", "PPO of any layers", "A2C of one layer")
    assert ("sampled" in provenance) != exact


@pytest.mark.parametrize("name", ["PPO gSDE", "SAC"])
@torch.no_grad()
def test_a_deviation_that_depends_on_the_state_becomes_one_of_its_size(tmp_path, name):
    model, seen = made("pendulum", name), observations("pendulum")
    model.save(tmp_path / "model.zip")
    policy = load_sb3(tmp_path / "model.zip", TASKS["pendulum"].env).policy
    inputs, _ = model.policy.obs_to_tensor(seen)
    if name == "SAC":
        mean, log_std, _ = model.actor.get_action_dist_params(inputs)
        deviation = log_std.exp() * (1 - mean.tanh().square())
    else:
        deviation = model.policy.get_distribution(inputs).distribution.stddev / 2
    assert deviation.min() < policy.log_std.exp().item() < deviation.max()


@pytest.mark.parametrize("name", ["SAC", "TD3"])
def test_a_student_of_a_squashed_teacher_learns_what_it_does(call, tmp_path, name):
    made("pendulum", name).save(tmp_path / "model.zip")
    words = ["distill", tmp_path / "model.zip", "--env", "pendulum", "--total-timesteps", 4096, "--num-envs", 8]
    words += [
        "--batch-size",
        64,
        "--warmup-steps",
        64,
        "--width",
        "1/2",
        "--network-option",
        "activation=relu",
        "--quiet",
    ]
    words += ["--precision", "float32", "--device", "cpu", "--threads", 1, "--evaluate", 2, "--out", tmp_path / "run"]
    code, _, err = call(*words)
    assert (code, err) == (0, "")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, last = (float(line.split('"action_difference": ')[1].split(",")[0]) for line in (lines[0], lines[-1]))
    assert last < 0.2 * first
    assert call("export", tmp_path / "run", "--out", tmp_path / "student.onnx", "--threads", 1)[0] == 0


def test_a_teacher_without_a_value_refuses_to_teach_one(call, tmp_path):
    made("pendulum", "SAC").save(tmp_path / "model.zip")
    words = ["distill", tmp_path / "model.zip", "--env", "pendulum", "--network-option", "activation=relu", "--quiet"]
    code, _, err = call(*words, "--value-coefficient", 0.5, "--out", tmp_path / "run", "--device", "cpu")
    assert code == 2
    assert "the teacher has no value head" in err


class Dicts(gymnasium.Env):
    """Shows a Dict of vectors, its keys not in the order of the alphabet."""

    observation_space = spaces.Dict(
        OrderedDict(
            speed=spaces.Box(-9, 9, (2,)), gear=spaces.Discrete(3), arms=spaces.Box(-9, 9, (3,)),
            lamps=spaces.MultiBinary(2),
        )
    )  # fmt: skip
    action_space = spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, self.np_random.random() < 0.2, {}


class Images(Dicts):
    observation_space = spaces.Box(0, 255, (40, 40, 3), np.uint8)


class Several(Dicts):
    action_space = spaces.MultiDiscrete([2, 3])


class Wheel(Dicts):
    observation_space = spaces.MultiDiscrete([3, 2])


class Grey(Dicts):
    observation_space = spaces.Box(0, 255, (20, 21), np.uint8)


class Table(Dicts):
    observation_space = spaces.Box(-9, 9, (3,), np.float32)
    action_space = spaces.Box(np.float32([[-2, 0], [0, 1]]), np.float32([[1, 1], [3, 4]]))


class Numbers(Dicts):
    observation_space = spaces.Box(0, 1, (6, 7), np.float32)


def frames():
    return FrameStackObservation(Numbers(), 3)


class Alphabet(Dicts):
    observation_space = spaces.Dict({key: Dicts.observation_space[key] for key in sorted(Dicts.observation_space)})


def recurrent(env, **options):
    return RecurrentPPO("MlpLstmPolicy", env, n_steps=8, batch_size=8, seed=0, device="cpu", policy_kwargs=options)


ODD = {
    "a memory": (lambda: recurrent("CartPole-v1", lstm_hidden_size=8), "CartPole-v1"),
    "a shared memory of two layers": (
        lambda: recurrent(
            "Pendulum-v1", lstm_hidden_size=8, n_lstm_layers=2, shared_lstm=True, enable_critic_lstm=False, net_arch=[8]
        ),
        "Pendulum-v1",
    ),
    "a Dict": (lambda: PPO("MultiInputPolicy", Dicts(), n_steps=8, batch_size=8, seed=0, device="cpu"), Dicts),
    "several choices": (lambda: A2C("MultiInputPolicy", Several(), seed=0, device="cpu"), Several),
    "layers behind convolutions": (
        lambda: PPO(
            "CnnPolicy", Images(), n_steps=8, batch_size=8, seed=0, device="cpu",
            policy_kwargs={"net_arch": [16], "features_extractor_kwargs": {"features_dim": 32}},
        ),
        Images,
    ),
    "frames of numbers": (
        lambda: PPO("MlpPolicy", frames(), n_steps=8, batch_size=8, seed=0, device="cpu"),
        frames,
    ),
    "a grey picture": (lambda: A2C("MlpPolicy", Grey(), seed=0, device="cpu"), Grey),
    "choices that are seen": (lambda: A2C("MlpPolicy", Wheel(), seed=0, device="cpu"), Wheel),
    "a value without layers": (
        lambda: A2C("MlpPolicy", "CartPole-v1", seed=0, policy_kwargs={"net_arch": {"pi": [8], "vf": []}}),
        "CartPole-v1",
    ),
    "a table of actions": (lambda: A2C("MlpPolicy", Table(), seed=0, device="cpu"), Table),
    "odd units": (
        lambda: DQN("MlpPolicy", "CartPole-v1", buffer_size=10, policy_kwargs={"activation_fn": torch.nn.Mish}),
        "CartPole-v1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_networks_and_observations_act_as_in_sb3(name, tmp_path):
    make_it, env = ODD[name]
    model = make_it()
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.mul_(3)  # so that actions differ from state to state
    model.save(tmp_path / "model.zip")
    loaded = load(tmp_path / "model.zip", env)
    assert check_sb3(loaded).endswith("at 200 steps")
    if not loaded.policy.sees_raw:
        loaded.policy.actor.weight.data *= -1
        with pytest.raises(InputError, match="acts otherwise than in stable-baselines3"):
            check_sb3(loaded)


def test_a_memory_ends_with_its_game(tmp_path):
    recurrent("CartPole-v1", lstm_hidden_size=8).save(tmp_path / "model.zip")
    policy = load(tmp_path / "model.zip", "CartPole-v1").policy
    seen = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    begin = np.array([True, True])
    policy.restart(begin)
    first, second = policy.logits(seen), policy.logits(seen)
    assert not torch.allclose(first, second)
    policy.restart(np.array([True, False]))
    third = policy.logits(seen)
    assert torch.equal(third[0], first[0])
    assert not torch.allclose(third[1], second[1])


def test_a_policy_with_a_memory_teaches_and_is_not_imported(call, tmp_path):
    recurrent("CartPole-v1", lstm_hidden_size=8).save(tmp_path / "model.zip")
    words = ["--total-timesteps", 512, "--num-envs", 8, "--warmup-steps", 256, "--evaluate", 0, "--device", "cpu"]
    code, _, err = call("distill", tmp_path / "model.zip", "--env", "cartpole", "--out", tmp_path / "run", *words)
    assert code == 0, err
    assert "tells actions" not in err  # it tells logits
    code, _, err = call("import-sb3", tmp_path / "model.zip", "--env", "cartpole", "--out", tmp_path / "new")
    assert code == 2
    assert "(RecurrentPPO): it plays and teaches as the zip it is" in err


def test_a_dict_of_other_keys_is_refused(tmp_path):
    PPO("MultiInputPolicy", Dicts(), n_steps=8, batch_size=8, device="cpu").save(tmp_path / "model.zip")
    with pytest.raises(InputError, match="shows a Dict of arms, gear, lamps, speed, in this order"):
        load(tmp_path / "model.zip", Alphabet)
    with pytest.raises(InputError, match="CartPole-v1 shows no Dict"):
        load(tmp_path / "model.zip", "CartPole-v1")


def test_choices_of_other_counts_are_refused(tmp_path):
    class Swapped(Several):
        action_space = spaces.MultiDiscrete([3, 2])

    A2C("MultiInputPolicy", Several(), device="cpu").save(tmp_path / "model.zip")
    with pytest.raises(InputError, match=r"its choices have \[2 3\] actions, those of .* \(3, 2\)"):
        load(tmp_path / "model.zip", Swapped)


@pytest.mark.parametrize("clip", [10.0, 5.0])
def test_statistics_of_a_dict_reach_the_keys_they_are_of(tmp_path, clip):
    venv = VecNormalize(DummyVecEnv([Dicts]), norm_obs_keys=["arms"], clip_obs=clip)
    model = PPO("MultiInputPolicy", venv, n_steps=16, batch_size=16, seed=0, device="cpu").learn(16)
    model.save(tmp_path / "model.zip")
    venv.save(tmp_path / "vecnormalize.pkl")
    if clip == 5.0:  # ours clips all of an observation, theirs the normalised keys alone
        with pytest.raises(InputError, match=r"clips at 5\.0, which 'speed', not normalised, may pass"):
            load(tmp_path / "model.zip", Dicts)
        return
    assert check_sb3(load(tmp_path / "model.zip", Dicts)).endswith("at 200 steps")


def test_check_is_told(call, tmp_path):
    made("cartpole", "TRPO").save(tmp_path / "model.zip")
    words = ["import-sb3", tmp_path / "model.zip", "--env", "cartpole", "--out", tmp_path / "new", "--check"]
    code, out, err = call(*words)
    assert code == 0, err
    assert "the actions of stable-baselines3" in out


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: MaskablePPO("MlpPolicy", "CartPole-v1", device="cpu"), "MaskablePPO is not read: .* masks"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_name_with_the_reason(tmp_path, build, words):
    build().save(tmp_path / "model.zip")
    with pytest.raises(InputError, match=words):
        load_sb3(tmp_path / "model.zip", TASKS["cartpole"].env)
