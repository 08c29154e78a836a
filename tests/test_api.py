"""What a user of Python types. The command line does the same, to the last bit."""

import asyncio
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import own_tasks
import pytest
import torch

import potstill as ps
from potstill.cli import main
from potstill.envs import EnvConfig, Envs
from potstill.networks import NetworkConfig, Policy
from potstill.options import describe_value
from potstill.policies import save_policy
from potstill.storage.checkpoints import load as read_tensors

QUICK = Path(__file__).parents[1] / "plans/quick.toml"
HERE = {"device": "cpu", "threads": 1, "quiet": True, "episodes": 4}
TRAIN = {"total_timesteps": np.int64(2_048), "width": "1/8", "seed": np.int32(1)}
DISTILL = {"total_timesteps": 512, "num_envs": 8, "warmup_steps": 64, "batch_size": 32, "width": "1/32"}
# The only figures that may differ, and hashes of files that hold them.
CLOCK = {"wall_seconds", "latency_ms", "latency_p95_ms", "command", "policy_hash", "metrics_digest", "digest"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return ps.train("cartpole", out=tmp_path_factory.mktemp("api") / "teacher", **TRAIN, **HERE)


@pytest.fixture(scope="module")
def student(teacher):
    return ps.distill(teacher, out=teacher.path.parent / "student", **DISTILL, **HERE)


def flags(settings):
    settings = settings | {"device": "cpu", "threads": 1, "evaluate": 4}
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def same(mine, theirs):
    (weights, _), (others, _) = (read_tensors(run / "policy.safetensors") for run in (mine, theirs))
    assert weights.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())
    result, other = (json.loads((run / "result.json").read_text()) for run in (mine, theirs))
    assert {k: v for k, v in result.items() if k not in CLOCK} == {k: v for k, v in other.items() if k not in CLOCK}


def test_the_command_line_does_the_same_to_the_last_bit(teacher, student, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        main(["train", "--env", "cartpole", "--out", "teacher", "--quiet", *flags(TRAIN)])
        assert f"score                     {describe_value(teacher.result['score'])}" in capsys.readouterr().out
        main(["distill", str(teacher.path), "--out", "student", "--quiet", *flags(DISTILL)])
    same(teacher.path, tmp_path / "teacher")
    same(student.path, tmp_path / "student")


def test_a_run_has_its_policy_and_result(teacher, student):
    assert teacher.result["env_steps"] == 2_048
    assert teacher.config["config"]["network"]["width"] == "1/8"
    logits = student.policy.logits(student.policy.prepare(torch.zeros(3, 4)))
    assert logits.shape == (3, 2)
    assert student.result["parameters"] == student.policy.size().parameters < teacher.policy.size().parameters
    assert str(student.path) in str(student)


def test_an_evaluation_tells_its_figures_in_words_and_in_a_notebook(teacher, student):
    record = ps.evaluate(student, teacher=teacher, episodes=4, seed=np.int64(1), threads=1, quiet=True)
    assert record["mean"] == np.mean(record["returns"]) == ps.evaluate(student.path, episodes=4, quiet=True)["mean"]
    assert (record["episodes"], record["distinct"]) == (4, 4)
    assert 0 <= record["agreement"] <= 1
    assert "distinct games            4" in str(record)
    assert "<td>distinct games</td><td>4</td>" in record._repr_html_()
    assert not {"returns", "point win rate", "share of games below 0"} & {name for name, _ in record.rows()}
    of_pong = ps.Record(env="pong", ci95=[16.0625, -112.625], p_negative=0.0625, latency_ms=None)
    assert of_pong.rows()[1:] == [("95 % interval", "16.06 to -112.6"), ("share of games below 0", "0.062")]
    json.dumps(record, allow_nan=False)
    assert "<script>" not in ps.Record(name="<script>")._repr_html_()


def test_a_policy_that_was_loaded_is_as_good_as_its_run(teacher, student, tmp_path):
    loaded = ps.load(teacher)
    assert loaded.hash == ps.load(str(teacher.path)).hash == ps.load(loaded).hash
    again = ps.distill(loaded, out=tmp_path / "again", **DISTILL, **HERE | {"episodes": 0})
    (weights, _), (others, _) = (read_tensors(run.policy_path) for run in (student, again))
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


def test_a_thread_and_a_running_loop_of_events_may_train(tmp_path):
    small = TRAIN | {"total_timesteps": 1_024} | HERE | {"episodes": 0}

    async def both():
        ps.train("cartpole", out=tmp_path / "loop", **small)
        await asyncio.to_thread(ps.train, "cartpole", out=tmp_path / "thread", **small)
        await asyncio.to_thread(main, ["evaluate", str(tmp_path / "thread"), "--episodes", "2", "--json"])

    asyncio.run(both())
    same(tmp_path / "loop", tmp_path / "thread")


PLAN = """
env = "cartpole"
widths = ["1/32"]
seeds = [3]
teachers = ["teacher"]
[evaluation]
episodes = 2
[arms.deep]
method = "distill"
network = "mlp"
network-options = { layers = [8, 4, 4] }
total-timesteps = 512
num-envs = 8
warmup-steps = 64
batch-size = 32
[arms.flat]
method = "distill"
network = "linear"
total-timesteps = 512
num-envs = 8
warmup-steps = 64
batch-size = 32
"""


def test_a_study_in_a_thread_shows_its_table_and_takes_the_numbers_of_numpy(teacher):
    plan = teacher.path.parent / "plan.toml"
    plan.write_text(PLAN)
    options = {"out": plan.with_name("study"), "workers": np.int64(1), "runtime": ps.Runtime(quiet=True)}
    study = asyncio.run(asyncio.to_thread(ps.study, plan, **options))
    assert (study.failed, study.ran) == ({}, 2)
    row, flat = sorted(study.table().iter_rows(named=True), key=lambda row: row["arm"])
    assert (row["arm"], row["status"], row["episodes"]) == ("deep", "done", 2)
    assert (flat["arm"], flat["parameters"]) == ("flat", 4 * 2 + 2)  # linear: no hidden layer
    assert f"{row['parameters']:,} (1/32)" in str(study)
    assert f"<td>{row['parameters']}</td>" in study._repr_html_()
    page = study.report(plan.with_name("page.html"), resamples=50)
    assert "deep" in page.read_text()
    assert ps.study(plan, **options).ran == 0


def test_a_compression_of_code_on_a_task_of_ones_own_is_small_plays_as_well_and_shows_what_it_found(tmp_path):
    found = ps.compress(
        own_tasks.copies, env=own_tasks.Copy, out=tmp_path / "small", network="linear", keep=np.float64(0.9),
        budget=1.0, games=np.int64(8), confirm_games=8, total_timesteps=2_048, num_envs=8, warmup_steps=64,
        batch_size=32, device="cpu", threads=1, quiet=True,
    )  # fmt: skip
    assert found.reached
    assert found.result["reached"]
    assert found.policy.size().parameters == found.result["parameters"] == 3 * 3 + 3
    assert found.result["share"] > 0.9
    assert ps.evaluate(found, env=own_tasks.Copy, episodes=32, quiet=True)["mean"] == 8 == found.result["score"]
    assert found.claim in str(found)
    assert "<td>found</td>" in found._repr_html_()
    assert (found.result["kind"], found.result["keep"]) == ("compress", 0.9)


def test_a_student_may_be_of_another_family_and_depth_by_the_same_names_as_on_the_command_line(teacher, tmp_path):
    flat = ps.distill(teacher, out=tmp_path / "flat", network="linear", **DISTILL, **HERE | {"episodes": 0})
    assert flat.policy.size().parameters == 4 * 2 + 2
    deep = ps.distill(
        teacher, out=tmp_path / "deep", network="mlp", options={"layers": [64, 32, 32]}, **DISTILL, **HERE
    )
    assert [tuple(layer.weight.shape) for layer in deep.policy.trunk.linears] == [(2, 4), (1, 2), (1, 1)]
    words = ["--network", "mlp", "--network-option", "layers=64,32,32", "--quiet", *flags(DISTILL)]
    main(["distill", str(teacher.path), "--out", str(tmp_path / "same"), *words])
    same(deep.path, tmp_path / "same")


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: ps.train("cartpole", widht="1/8"), "there is no setting 'widht': did you mean width?"),
        (lambda: ps.train("cartpole", total_timesteps="many"), "cannot be 'many'; by default it is 60000"),
        (lambda: ps.train("cartpole", total_timesteps=0), "total-timesteps must be at least 1, not 0"),
        (lambda: ps.train("carpole"), "did you mean cartpole"),
        (lambda: ps.distill("nowhere"), "cannot read nowhere: no such file"),
        (lambda: ps.load("model.zip"), "model.zip does not name its task"),
        (lambda: ps.load(Policy(NetworkConfig(), (4,), 2)), "a policy alone does not know its task: hand over its run"),
        (lambda: ps.load("run", env="pong"), "cannot read run: no such file"),
        (lambda: ps.study("plan.toml"), "plan.toml"),
        (
            lambda: ps.study(QUICK, env=EnvConfig("CartPole-v1", max_frames=400)),
            "CartPole-v1 alone is another than EnvConfig",
        ),
        (lambda: ps.compress("run", keep=2.0), "keep is a share above 0 and at most 1"),
    ],
)
def test_bad_input_is_one_clear_line(call, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ps.InputError, match=line.replace("?", r"\?")):
        call()
    assert list(tmp_path.iterdir()) == []


def test_potstill_is_imported_without_what_is_slow_and_lists_what_is_public():
    code = "import sys, potstill; assert not {'torch', 'polars', 'gymnasium'} & {*sys.modules}; print(*dir(potstill))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"train", "distill", "evaluate", "compress", "load", "study", "PPOConfig", "InputError"} <= {*told}
    for name in told:
        assert getattr(ps, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = ps.trian


def test_a_public_name_is_the_function_whatever_module_of_that_name_was_imported_before():
    code = "import potstill as ps; from potstill.distill import start; from potstill.study import plan; import inspect;"
    code += "print(*(inspect.isfunction(each) for each in (ps.distill, ps.study, ps.compress, ps.load, start)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["True"] * 5


@pytest.mark.parametrize("role", ["teacher", "start"])
def test_policies_that_play_other_actions_are_not_put_side_by_side(role, tmp_path):
    for name, actions in (("mine", (0, 2)), ("other", (0, 1))):
        env = EnvConfig("Acrobot-v1", actions=actions)
        with closing(Envs(env, 1)) as envs:
            probe, policy = envs.reset(0), Policy(NetworkConfig(width="1/8"), **envs.spaces)
        (tmp_path / name).mkdir()
        save_policy(tmp_path / name / "policy.safetensors", policy, env, probe, {})
    other = {"teacher": tmp_path / "other", "start": f"{tmp_path / 'other'}:5"}[role]
    with pytest.raises(ps.InputError, match=r"plays the actions \(0, 1\) of Acrobot-v1, .* those of \(0, 2\)"):
        ps.evaluate(tmp_path / "mine", episodes=1, threads=1, quiet=True, **{role: other})
