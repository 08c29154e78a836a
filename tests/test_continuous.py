"""Continuous actions from a reward to an ONNX file: Pendulum, trained in seconds, then taught to smaller networks."""

import json
from contextlib import closing
from dataclasses import replace

import gymnasium
import numpy as np
import onnxruntime
import pytest
import torch
from small_runs import cut, outcome, small_run

from potstill import evaluation
from potstill.buffer import Dataset
from potstill.distill import DistillConfig, distill, record, start
from potstill.envs import Envs
from potstill.errors import InputError
from potstill.evaluation import EvalConfig
from potstill.export import export
from potstill.export import onnx as exporter
from potstill.export.actor import Actor, layers
from potstill.networks import NetworkConfig, Policy
from potstill.objectives import OBJECTIVES
from potstill.policies import load_policy, save_policy
from potstill.ppo import PPOConfig
from potstill.report import scaling_figures
from potstill.report.answers import answer
from potstill.results import read_runs, runs_table
from potstill.storage import checkpoints
from potstill.tasks import TASKS
from potstill.training.runtime import Runtime
from potstill.training.trainer import execute, new_run

PENDULUM = TASKS["pendulum"].env
RANDOM = -1_212  # mean score of uniformly random play, 128 games
RUNTIME = Runtime(device="cpu", threads=1, quiet=True)
GAMES = EvalConfig(episodes=16)
STUDENT = DistillConfig(
    network=NetworkConfig(width="1/4"), total_timesteps=9_600, num_envs=16, learning_rate=5e-3, precision="float32"
)
pytestmark = pytest.mark.timeout(600)  # the teacher is trained in seconds, but for a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of runs: a teacher, and its student."""
    folder = tmp_path_factory.mktemp("runs")
    config = replace(PPOConfig.for_task(PENDULUM), total_timesteps=60_000)
    execute(new_run(config, folder / "teacher", RUNTIME), RUNTIME, GAMES)
    execute(new_run(STUDENT, folder / "student", RUNTIME, teacher=folder / "teacher"), RUNTIME, GAMES)
    return folder


def result(folder, name):
    return json.loads((folder / name / "result.json").read_text())


def play(policy, **options):
    *_, played = evaluation.play(policy, PENDULUM, episodes=16, seed=1, **options)
    return played.summary()["mean"]


def test_ppo_learns_to_swing_the_pendulum_up(folder):
    assert result(folder, "teacher")["score"] > -300
    assert result(folder, "teacher")["score_sampled"] > -400
    deviation = load_policy(folder / "teacher").policy.log_std.exp().item()
    assert 0.1 < deviation < 0.8  # it began at 1


def test_a_student_comes_near_its_teacher_with_a_fraction_of_its_size(folder):
    student, teacher = result(folder, "student"), result(folder, "teacher")
    assert student["teacher_score"] == teacher["score"]
    assert student["score"] > teacher["score"] - 0.1 * (teacher["score"] - RANDOM)
    assert student["parameters"] < teacher["parameters"] / 8
    fresh = start(STUDENT, load_policy(folder / "teacher").policy, torch.device("cpu")).student
    assert play(fresh) < -900


@pytest.mark.parametrize(
    "settings",
    [
        *({"objective": name} for name in OBJECTIVES),
        {"lead": "mixed"},
        {"mode": "stepwise"},
    ],
    ids=lambda settings: " ".join(str(value) for value in settings.values()),
)
def test_a_student_comes_to_act_as_its_teacher_does(folder, settings):
    teacher = load_policy(folder / "teacher").policy
    config = replace(STUDENT, total_timesteps=6_400, **settings)
    with closing(Envs(PENDULUM, 16)) as envs:
        state = start(config, teacher, torch.device("cpu"))
        before = evaluation.compare(state.student, teacher, PENDULUM, steps=800)
        *_, last = distill(config, state, teacher, envs)
    after = evaluation.compare(state.student, teacher, PENDULUM, steps=800)
    assert after["action_difference_teacher_states"] < 0.4 * before["action_difference_teacher_states"]
    assert after["action_difference"] < 0.25
    assert "agreement" not in last.metrics
    assert last.metrics["action_difference"] < 0.25


def test_a_student_begins_with_its_teachers_deviations(folder):
    teacher = load_policy(folder / "teacher").policy
    student = start(STUDENT, teacher, torch.device("cpu")).student
    assert torch.equal(student.log_std, teacher.log_std)
    assert student.log_std is not teacher.log_std


def test_agreement_is_not_defined_and_the_difference_of_actions_stands_in_its_place(folder):
    student, teacher = result(folder, "student"), result(folder, "teacher")
    assert "agreement" not in teacher
    for states in ("", "_teacher_states"):
        assert student[f"agreement{states}"] is None
        assert 0 < student[f"action_difference{states}"] < 0.2
        assert 0 < student[f"kl{states}"] < 1


def test_a_policy_does_not_differ_from_itself_and_differs_by_2_from_its_opposite():
    policy, opposite = (Policy(NetworkConfig(), (3,), 1, continuous=True) for _ in range(2))
    with torch.no_grad():
        policy.actor.bias.fill_(9.0)
        opposite.actor.bias.fill_(-9.0)
    itself = evaluation.compare(policy, policy, PENDULUM, steps=32)
    assert (itself["action_difference"], itself["kl"]) == (0.0, 0.0)
    assert evaluation.compare(policy, opposite, PENDULUM, steps=32)["action_difference"] == 2.0


def test_tables_and_figures_take_runs_without_agreement(folder):
    table = runs_table(folder).sort("run")
    assert table["agreement"].to_list() == [None, None]
    assert table["action_difference"].to_list()[1] is None  # a teacher has no teacher
    assert table["action_difference"].to_list()[0] == result(folder, "student")["action_difference"]
    told = answer(read_runs(folder), resamples=100)
    scaling_figures.size_score(told)
    with pytest.raises(InputError):
        scaling_figures.agreement_score(told)


def test_greedy_play_takes_the_mean_and_sampled_play_does_not(folder):
    policy = load_policy(folder / "teacher").policy
    greedy = play(policy)
    assert play(policy) == greedy != play(policy, actions="sampled")
    with torch.no_grad():
        policy.log_std.fill_(-20.0)
    assert play(policy, actions="sampled") == pytest.approx(greedy, rel=1e-3)


def test_a_random_start_is_uniform_and_no_matter_of_the_policy(folder):
    policy = load_policy(folder / "teacher").policy
    whole_game = evaluation.Start(steps=200)
    *_, played = evaluation.play(policy, PENDULUM, episodes=64, seed=1, start=whole_game)
    assert played.summary()["mean"] == pytest.approx(RANDOM, abs=150)


@pytest.mark.parametrize(("noise", "share"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_noise_makes_that_share_of_recorded_actions_uniform_and_leaves_the_labels(noise, share):
    teacher = Policy(NetworkConfig(), (3,), 1, continuous=True)
    with torch.no_grad():
        teacher.actor.weight.zero_()
        teacher.actor.bias.fill_(0.5)
        teacher.log_std.fill_(-20.0)
    envs = Envs(PENDULUM, 32)
    data = Dataset(envs, 32 * 40)
    list(record(replace(STUDENT, lead="teacher", noise=noise), teacher, envs, data, seed=0))
    actions = envs.state()[1]
    assert (np.abs(actions - 0.5) > 1e-3).mean() == pytest.approx(share, abs=0.05)
    labels = data.batch(torch.arange(len(data)), teacher, torch.float32).logits
    assert torch.equal(labels, torch.tensor([[0.5, -20.0]]).expand(len(data), 2))


def test_a_checkpoint_keeps_the_kind_of_its_actions_and_an_older_one_is_discrete(folder, tmp_path):
    loaded = load_policy(folder / "teacher")
    assert (loaded.policy.continuous, loaded.document["continuous"]) == (True, True)
    path, probe = tmp_path / "policy.safetensors", np.zeros((2, 4), np.float32)
    save_policy(path, Policy(NetworkConfig(), (4,), 2), TASKS["cartpole"].env, probe, {})
    tensors, document = checkpoints.load(path)
    del document["continuous"]
    checkpoints.save(path, tensors, document)
    assert not load_policy(path).policy.continuous


def test_a_stopped_distillation_goes_on_exactly(folder, tmp_path, monkeypatch):  # a training: faults/test_cuts.py
    whole, stopped = (small_run("student", folder / "teacher", tmp_path / name) for name in ("whole", "stopped"))
    execute(whole, RUNTIME)
    cut(stopped, monkeypatch)
    assert outcome(stopped) == outcome(whole)


# ONNX


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_the_exported_file_gives_the_mean_and_the_action_within_its_bounds(folder, tmp_path):
    loaded, path = load_policy(folder / "teacher"), tmp_path / "policy.onnx"
    exported = export(loaded, path)
    assert exported["max_difference"] <= 1e-4
    observations = np.random.default_rng(0).normal(0, (1, 1, 8), (64, 3)).astype(np.float32)
    mean, action = session(path).run(["mean", "action"], {"observation": observations})
    with torch.no_grad():
        logits, _ = loaded.policy(torch.from_numpy(observations))
    assert (mean.shape, mean.dtype, action.shape, action.dtype) == ((64, 1), np.float32, (64, 1), np.float32)
    np.testing.assert_allclose(mean, 2.0 * logits[:, :1].numpy(), atol=2e-4)  # a torque is within -2 and 2
    assert np.array_equal(action, np.clip(mean, -2, 2))
    assert np.abs(mean).max() > 2 > np.abs(mean).min()
    told = json.loads(session(path).get_modelmeta().custom_metadata_map["actions"])
    deviation = 2.0 * loaded.policy.log_std.exp().item()
    assert told == {"low": [-2.0], "high": [2.0], "deviation": [pytest.approx(deviation)]}


def test_it_plays_in_gymnasium_without_potstill_as_well_as_with_it(folder, tmp_path):
    export(load_policy(folder / "teacher"), tmp_path / "policy.onnx")
    model, scores = session(tmp_path / "policy.onnx"), []
    with closing(gymnasium.make("Pendulum-v1")) as game:
        for seed in range(8):
            (observation, _), over, score = game.reset(seed=seed), False, 0.0
            while not over:
                (action,) = model.run(["action"], {"observation": observation[None]})
                observation, reward, terminated, truncated, _ = game.step(action[0])
                score, over = score + float(reward), terminated or truncated
            scores.append(score)
    assert np.mean(scores) > -350


def test_a_quantised_file_plays_too(folder, tmp_path, monkeypatch):
    clock = {"latency_ms": 0.0, "latency_p95_ms": 0.0}
    monkeypatch.setattr("potstill.export.latencies", lambda players: dict.fromkeys(players, clock))
    exported = export(load_policy(folder / "teacher"), tmp_path / "policy.onnx", int8=True, episodes=8)
    scores = {name: model["score"]["mean"] for name, model in exported["models"].items()}
    *_, played = evaluation.play(load_policy(folder / "teacher").policy, PENDULUM, episodes=8, seed=1)
    assert scores["float32"] == pytest.approx(played.summary()["mean"], abs=2)
    assert scores["int8"] > -400


def test_a_file_that_computes_something_else_is_refused():
    policy = Policy(NetworkConfig("1/8"), (3,), 2, continuous=True).initialise(torch.Generator().manual_seed(0))
    other = Policy(NetworkConfig("1/8"), (3,), 2, continuous=True).initialise(torch.Generator().manual_seed(1))
    bounds = np.array([[-1, 0], [3, 100]], np.float32)
    observations = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    actor = Actor(policy, layers(policy), observations, [], bounds)
    data = exporter.build(actor).SerializeToString()
    assert exporter.check(data, actor)[0] < 1e-5
    with pytest.raises(InputError, match="onnxruntime computes other means than PyTorch"):
        exporter.check(data, actor._replace(policy=other))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_stay_within_their_bounds_in_the_dtype_of_their_space(dtype):
    """Centre and half the range do not give the bounds back: 0.1 to 0.7 comes to 0.70000005."""
    policy = Policy(NetworkConfig("1/8"), (3,), 200, continuous=True).initialise(torch.Generator().manual_seed(0))
    torch.nn.init.constant_(policy.actor.bias, 9.0)
    random = np.random.default_rng(0)
    bounds = np.sort(random.normal(size=(2, 200)), axis=0).astype(dtype)
    actor = Actor(policy, layers(policy), random.normal(size=(8, 3)).astype(np.float32), [], bounds)
    data = exporter.build(actor).SerializeToString()
    exporter.check(data, actor)
    (action,) = session(data).run(["action"], {"observation": actor.observations})
    assert action.dtype == dtype
    assert (action == bounds[1]).mean() > 0.5
    assert ((bounds[0] <= action) & (action <= bounds[1])).all()
