import json
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import own_tasks
import pytest
import torch
from safetensors.torch import load_file

import potstill as ps
from potstill import imports
from potstill.compress import outcome
from potstill.compress.search import Search
from potstill.envs import EnvConfig, Envs
from potstill.errors import InputError
from potstill.load import Origin
from potstill.load.callables import LOG_STD, Foreign, load_foreign
from potstill.training import trainer
from potstill.training.trainer import Interrupted

CARTPOLE = EnvConfig("CartPole-v1")
CODE = """
import signal

import numpy as np
import torch

LEAN = np.array([0.05, 0.1, 1, 1], np.float32)

def act(observations):
    return (observations @ LEAN > 0).astype(int)

def soft(observations):
    lean = 20 * observations @ LEAN
    return np.stack([-lean, lean], 1)

class Network(torch.nn.Module):
    def forward(self, observations):
        return (observations @ torch.from_numpy(LEAN))[:, None] * torch.tensor([-20.0, 20.0])

class Remembering:
    '''Balances, and notes what it was told: how many games began, how old each is.'''
    made = []
    stop_at = None

    def __init__(self):
        self.masks, self.ages = [], []
        self.made.append(self)

    def reset(self, begun):
        assert begun.dtype == bool
        if begun.all():
            self.age = np.zeros(len(begun), int)
        self.masks.append(begun.copy())
        self.age[begun] = 0

    def __call__(self, observations):
        self.ages.append(self.age.copy())
        if len(self.ages) == self.stop_at:
            signal.raise_signal(signal.SIGINT)
        self.age += 1
        return act(observations) ^ (self.age % 3 == 0)

def push(observations):
    return np.clip(-2.0 * observations[:, 2:3] - observations[:, 1:2], -2, 2)

def three(observations):
    return np.zeros((len(observations), 3))

def far(observations):
    return np.full(len(observations), 5)

def words(observations):
    return ["left"] * len(observations)

def infinite(observations):
    return np.full((len(observations), 2), np.inf)

def broken(observations):
    raise ValueError("no idea\\nat all")

def leaves(observations):
    raise SystemExit(0)

def late(observations):
    return act(observations) if np.abs(observations).max() < 1 else act(observations)[:, None]

class Needy:
    def __init__(self, knob):
        pass
"""
TINY = ["--total-timesteps", 3_000, "--num-envs", 8, "--network", "mlp", "--width", "1/4", "--device", "cpu"]
TINY += ["--warmup-steps", 256, "--evaluate", 0, "--precision", "float32"]


@pytest.fixture
def controller(tmp_path, monkeypatch):
    """The module of the code above, as the user imports it."""
    monkeypatch.setenv(imports.VARIABLE, "")
    monkeypatch.chdir(tmp_path)
    Path("my_controller.py").write_text(CODE)
    return tmp_path / "my_controller.py"


def teacher(name, env=CARTPOLE):
    ps.import_modules(["./my_controller.py"])
    return load_foreign(Path(f"my_controller:{name}"), env)


def agreement(folder):
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["agreement"]


@pytest.mark.parametrize("name", ["act", "soft", "Network"])
def test_a_student_learns_from_code(name, controller, call):
    words = ["distill", f"my_controller:{name}", "--env", "cartpole", "--import", "./my_controller.py", "--out", "run"]
    code, _, said = call(*words, *TINY)
    assert code == 0, said
    assert agreement("run") > 0.9
    assert ps.evaluate("run", episodes=4, device="cpu", quiet=True)["mean"] == 500
    told = "potstill: teacher my_controller:act tells actions: --objective greedy-cross-entropy"
    assert (told in said.splitlines()) == (name == "act")
    config = json.loads(Path("run", "config.json").read_text())
    assert config["config"]["objective"] == ("greedy-cross-entropy" if name == "act" else "forward-kl")
    assert config["teacher"] == f"my_controller:{name}"
    assert config["teacher_hash"] == teacher(name).hash


def test_a_chosen_objective_is_kept(controller, call):
    words = ["distill", "my_controller:act", "--env", "cartpole", "--import", "./my_controller.py", "--out", "run"]
    code, _, said = call(*words, *TINY, "--objective", "reverse-kl", "--total-timesteps", 1_000)
    assert code == 0, said
    assert json.loads(Path("run", "config.json").read_text())["config"]["objective"] == "reverse-kl"


def test_code_is_evaluated(controller, call):
    words = ["evaluate", "my_controller:act", "--env", "cartpole", "--import", "./my_controller.py", "--episodes", 8]
    code, out, said = call(*words, "--json")
    assert code == 0, said
    assert json.loads(out)["mean"] == 500
    assert "parameters" not in json.loads(out)


def test_a_teacher_leads(controller):
    ps.import_modules(["./my_controller.py"])
    run = ps.distill(
        sys.modules["my_controller"].act, env="cartpole", out="run", lead="teacher", total_timesteps=3_000, num_envs=8,
        width="1/4", device="cpu", quiet=True, episodes=0, warmup_steps=256,
    )  # fmt: skip
    assert agreement(run.path) > 0.8


PLAN = """
imports = ["./my_controller.py"]
env = "cartpole"
widths = ["1/4"]
seeds = [0]
teachers = ["my_controller:act"]
[evaluation]
episodes = 2
[arms.distill-student]
total-timesteps = 1_000
warmup-steps = 256
num-envs = 8
"""


def test_a_plan_names_code_as_its_teacher(controller):
    Path("plan.toml").write_text(PLAN)
    for ran in (1, 0):  # the second call finds it done
        study = ps.study("plan.toml", out="study", runtime=ps.Runtime(device="cpu", quiet=True))
        assert (study.failed, study.ran) == ({}, ran)
    row = study.table().row(0, named=True)
    assert (row["run"], row["teacher"]) == (
        "distill-student_width-1_4_teacher-my_controller.act_seed-0",
        "my_controller.act",
    )
    assert row["objective"] == "greedy-cross-entropy"
    assert row["teacher_score"] == 500


def test_what_is_handed_over_teaches_in_this_process_and_is_refused_where_workers_would_need_it(controller):
    settings = {"total_timesteps": 512, "num_envs": 8, "device": "cpu", "quiet": True, "episodes": 0}
    run = ps.distill(lambda seen: seen @ np.ones((4, 2)), env="cartpole", out="run", warmup_steps=256, **settings)
    assert run.config["teacher"].startswith("python:")
    with pytest.raises(InputError, match="was handed over in Python, and workers cannot import it"):
        ps.compress(lambda seen: seen @ np.ones((4, 2)), env="cartpole", out="small", device="cpu", quiet=True)


def test_code_is_compressed_whatever_its_size_may_be(controller):
    ps.import_modules(["./my_controller.py"])
    origin, runtime = Origin(Path("my_controller:act"), CARTPOLE), ps.Runtime(device="cpu", threads=1, quiet=True)
    config = ps.CompressConfig(games=2, confirm_games=2)
    run = outcome.open_compression(origin, config, Path("small"), runtime)
    state = Search(run, config, runtime)
    assert state.teacher.policy.sees_raw
    assert len(state.shapes) > 10
    with run.lock():
        assert state.play("teacher", 2).score == 500
    assert outcome.open_compression(origin, config, Path("small"), runtime).config == run.config


def test_code_is_not_exported(controller, call):
    words = ["export", "my_controller:act", "--env", "cartpole", "--import", "./my_controller.py", "--out", "new.onnx"]
    code, _, said = call(*words)
    assert code == 2
    assert "distil it, export the student" in said


def test_an_onnx_file_teaches_as_the_policy_it_was_made_from(controller, call, save_teacher):
    save_teacher(Path("expert"))
    assert call("export", "expert", "--out", "teacher.onnx", "--episodes", 0)[0] == 0
    loaded = ps.load("teacher.onnx", env="cartpole").policy
    observations = torch.randn(64, 4)
    torch.testing.assert_close(loaded(observations)[0], ps.load("expert").policy(observations)[0], rtol=1e-4, atol=1e-4)
    code, _, said = call("distill", "teacher.onnx", "--env", "cartpole", "--out", "run", *TINY)
    assert code == 0, said
    assert agreement("run") > 0.9


def test_what_has_a_memory_is_told_which_games_begin(controller):
    loaded = teacher("Remembering", CARTPOLE)
    memory = loaded.policy.answer
    done = len(memory.masks), len(memory.ages)
    evaluated = ps.evaluate(loaded, env=CARTPOLE, episodes=4, device="cpu", quiet=True)
    masks, ages = memory.masks[done[0] :], memory.ages[done[1] :]
    assert masks[0].all()
    assert all(mask.any() for mask in masks)
    # Every game is as old as its controller was told, whether or not its neighbours have begun again.
    assert sum(age == 0 for row in ages for age in row) == sum(mask.sum() for mask in masks)
    assert max(map(max, ages)) + 1 == max(evaluated["returns"])
    assert len(masks) > 1


@pytest.mark.parametrize("mode", ["buffer", "stepwise"])
def test_a_resumed_run_has_the_same_bits(mode, controller):
    """A teacher with a memory is asked of the games before the interruption again, in order."""
    ps.import_modules(["./my_controller.py"])
    settings = {
        "env": "cartpole", "mode": mode, "total_timesteps": 2_000, "num_envs": 8, "width": "1/4", "device": "cpu",
        "quiet": True, "episodes": 0, "warmup_steps": 1_000, "precision": "float32",
    }  # fmt: skip
    remembering = sys.modules["my_controller"].Remembering
    whole = ps.distill(remembering, out="whole", **settings)

    remembering.stop_at = 2 * len(remembering.made[-1].ages) // 3  # steps: it is asked once more before a run
    with pytest.raises(Interrupted):
        ps.distill(remembering, out="stopped", **settings)
    remembering.stop_at = None
    resumed = ps.resume("stopped", device="cpu", quiet=True, episodes=0)
    mine, theirs = (load_file(run.path / "policy.safetensors") for run in (whole, resumed))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_continuous_actions_are_in_the_units_of_the_environment(controller):
    loaded = teacher("push", EnvConfig("Pendulum-v1"))
    observations = np.array([[1.0, 0.2, 0.3], [0.0, 0.5, -9.0]], np.float32)
    logits = loaded.policy(torch.from_numpy(observations))[0]
    expected = [[-0.4, LOG_STD], [1.0, LOG_STD]]  # -0.8 and 2 of a torque between -2 and 2
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    assert loaded.policy.hard_objective == "logit-mse"
    run = ps.distill(
        loaded, out="run", total_timesteps=2_000, num_envs=8, width="1/4", device="cpu", quiet=True, episodes=0
    )
    assert run.config["config"]["objective"] == "logit-mse"


def test_the_students_take_the_statistics_of_random_play(controller):
    policy = teacher("act").policy
    envs = Envs(CARTPOLE, 1)
    rng = np.random.default_rng(0)
    envs.reset(0)
    seen = [envs.step(envs.random_actions(rng)).observations[0] for _ in range(2_000)]
    np.testing.assert_allclose(policy.mean, np.mean(seen, 0), atol=1e-5)
    np.testing.assert_allclose(policy.scale, 1 / np.std(seen, 0), rtol=1e-3)
    assert isinstance(policy, Foreign)


WRONG = {
    "three": "answers float64 (8, 3) to 8 observations of shape (4,); it should be float logits (8, 2) or int actions",
    "far": "chooses action 5, not of [0, 1]",
    "words": "it should be float logits (8, 2) or int actions (8,)",
    "infinite": "answers numbers that are not finite",
    "broken": "raised ValueError: no idea",
    "leaves": "raised SystemExit: 0",
    "Needy": "raised TypeError",
    "nothing": "my_controller defines no function or class 'nothing'",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_teacher_is_one_line(name, controller, call):
    words = ["distill", f"my_controller:{name}", "--env", "cartpole", "--import", "./my_controller.py", "--out", "run"]
    code, out, said = call(*words, *TINY)
    assert (code, out) == (2, "")
    assert len(said.splitlines()) == 1
    assert f"teacher my_controller:{name}" in said
    assert WRONG[name] in said
    assert not Path("run").exists()


def test_one_that_answers_otherwise_later_is_one_line(controller, call):
    words = ["distill", "my_controller:late", "--env", "cartpole", "--import", "./my_controller.py", "--out", "run"]
    code, _, said = call(*words, *TINY)
    assert code == 2
    assert "it should be int actions (8,), as at first" in said.splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["my_controller:act", "--env", "cartpole"], "allow it with --import my_controller"),
        (["my_controller:act", "--import", "./my_controller.py"], "does not name its task: add --env"),
        (["gone.onnx", "--env", "cartpole"], "cannot read gone.onnx: no such file"),
        (["my_controller.py", "--env", "cartpole"], "--env names the task of"),
        (
            ["my_controller:act", "--env", "cartpole", "--import", "./my_controller.py", "--value-coefficient", "1"],
            "leave --value-coefficient at 0",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(words, why, controller, call):
    code, _, said = call("distill", *words, "--out", "run")
    assert code == 2
    assert why in said
    assert len(said.splitlines()) == 1


def test_a_run_whose_code_changed_is_not_resumed(controller):
    ps.import_modules(["./my_controller.py"])
    origin = {"teacher": "my_controller:act", "teacher_env": {"id": "CartPole-v1"}, "teacher_hash": "0" * 12}
    with pytest.raises(InputError, match="is no longer the teacher this run began with"):
        trainer._load_origin(origin, "teacher")


def test_code_teaches_from_photos_whose_channels_come_last_and_its_size_is_not_told(tmp_path):
    student = ps.distill(
        own_tasks.sees, env=own_tasks.Photo, out=tmp_path / "student", total_timesteps=512, num_envs=8,
        warmup_steps=64, batch_size=32, width="1/8", episodes=4, device="cpu", threads=1, quiet=True,
    )  # fmt: skip
    assert student.policy.layout == "last"
    assert (student.result["teacher_score"], student.result["teacher_parameters"]) == (8, None)


class Likely:
    """Says how likely each action is, as a softmax does or a classifier's `predict_proba`."""

    def __call__(self, observations):
        logits = 3 * observations @ np.float32([[1, -1], [0, 0], [2, -2], [1, -1]])
        self.shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return self.shares


def test_probabilities_are_told_from_logits_and_taught_as_they_are():
    with closing(Envs(CARTPOLE, 4)) as envs:
        foreign = Foreign("likely", likely := Likely(), envs)
        logits = foreign.logits(torch.from_numpy(envs.reset(1)))
    np.testing.assert_allclose(logits.softmax(-1), likely.shares, atol=1e-6)
    assert foreign.hard_objective is None


class Alternating(torch.nn.Module):
    """Goes left and right in turns, and is told which games begin."""

    def reset(self, begun):
        self.age = np.where(begun, 0, self.age if begun.sum() < len(begun) else 0)

    def forward(self, observations):
        self.age = self.age + 1
        return torch.eye(2)[self.age % 2]


def test_a_module_that_plays_beside_itself_has_two_memories():
    module = Alternating()
    found = ps.evaluate(module, env="cartpole", teacher=module, episodes=2, device="cpu", quiet=True)
    assert (found["agreement"], found["agreement_teacher_states"]) == (1, 1)


def test_a_module_answers_without_dropout_and_goes_on_learning_with_it():
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(8).eval())
    module.append(torch.nn.Linear(8, 2))
    policy = ps.load(module, env="cartpole").policy
    module(torch.ones(2, 4)).sum().backward()
    assert torch.equal(policy.logits(torch.ones(1, 4)), policy.logits(torch.ones(1, 4)))
    assert [each.training for each in module.modules()] == [True, True, True, False, True]


def test_actions_that_are_ruled_out_are_hardly_ever_taught():
    ruled_out = np.float32([[0, -np.inf], [-np.inf, -50], [1, 2]])
    with closing(Envs(CARTPOLE, 1)) as envs:
        foreign = Foreign("masked", lambda seen: np.resize(ruled_out, (len(seen), 2)), envs)
        logits = foreign.logits(torch.zeros(3, 4))
    np.testing.assert_allclose(logits.softmax(-1), [[1, 0], [0, 1], [0.269, 0.731]], atol=1e-3)


@pytest.mark.parametrize("name", ["FLOAT16", "DOUBLE", "UINT8"])
def test_a_file_of_another_dtype_is_given_the_same_numbers_or_refused(name, tmp_path):
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [helper.make_node("Cast", ["seen"], ["all"], to=kinds.FLOAT)]
    nodes += [helper.make_node("MatMul", ["all", "weight"], ["logits"])]
    infos = [helper.make_tensor_value_info("seen", kinds.DataType.Value(name), ["N", 4])]
    infos += [helper.make_tensor_value_info("logits", kinds.FLOAT, ["N", 2])]
    weight = onnx.numpy_helper.from_array(np.eye(4, 2, dtype=np.float32), "weight")
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6), tmp_path / "it.onnx")
    if name == "UINT8":
        with pytest.raises(InputError, match="raised TypeError: Cannot cast array data from dtype"):
            ps.load(tmp_path / "it.onnx", env="cartpole")
        return
    policy = ps.load(tmp_path / "it.onnx", env="cartpole").policy
    assert policy.logits(torch.tensor([[0.5, -0.25, 0, 0]])).tolist() == [[0.5, -0.25]]
    if name == "FLOAT16":
        with pytest.raises(InputError, match="its input of float16 does not hold the observations"):
            policy.logits(torch.tensor([[70_000.0, 0, 0, 0]]))


def test_a_file_with_a_value_before_its_action_acts(tmp_path):
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weights = {"first": np.float32([[1], [0], [0]]), "second": np.float32([[0], [1], [0]])}
    nodes = [helper.make_node("MatMul", ["seen", name], [out]) for name, out in (("first", "value"), ("second", "act"))]
    infos = [helper.make_tensor_value_info(name, kind, ["N", n]) for name, n in (("seen", 3), ("value", 1), ("act", 1))]
    stored = [onnx.numpy_helper.from_array(each, name) for name, each in weights.items()]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6)
    onnx.save(model, tmp_path / "policy.onnx")
    policy = ps.load(tmp_path / "policy.onnx", env="pendulum").policy
    assert policy.logits(torch.tensor([[0.5, 1.0, 0.0]]))[0, 0].item() == pytest.approx(0.5)

    onnx.save(model, tmp_path / "apart.onnx", save_as_external_data=True, size_threshold=0)
    with pytest.raises(InputError, match=r"its weights lie in a file beside it: onnx.save.onnx.load.'apart.onnx'"):
        ps.load(tmp_path / "apart.onnx", env="pendulum")
    onnx.save(onnx.load(tmp_path / "apart.onnx"), tmp_path / "whole.onnx")
    assert ps.load(tmp_path / "whole.onnx", env="pendulum").policy.logits(torch.ones(1, 3))[0, 0].item() == 0.5
