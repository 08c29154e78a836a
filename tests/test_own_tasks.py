"""Tasks handed over in Python: by a spec, a class or a function, wrapped or not; and who opens what they made."""

import json
import sys
from pathlib import Path

import gymnasium
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import FrameStackObservation, TransformReward
from processes import call, potstill

import potstill as ps
from potstill import imports
from potstill.cli import main
from potstill.envs import EnvConfig, Envs
from potstill.tasks import find_env

ONLY = gymnasium.make("CartPole-v1")
TASKS = Path(__file__).with_name("own_tasks.py")
HERE = {"device": "cpu", "threads": 1, "quiet": True, "episodes": 2}
TRAIN = {"total_timesteps": 256, "num_envs": 4, "num_steps": 32, "minibatch_size": 64, "normalise_inputs": 40}


@pytest.fixture(autouse=True)
def tasks():
    for known in (imports._named, imports._handed, imports._makers):
        known.clear()
    imports.import_modules([str(TASKS)])
    imports._named.clear()  # as a script has it that imports its own modules
    yield sys.modules["own_tasks"]
    del sys.modules["own_tasks"]


def trained(env, out, **settings):
    return ps.train(env, out=out, **TRAIN | HERE | settings)


def test_a_class_is_named_by_its_module_and_whoever_opens_its_policy_is_told_which(tasks, tmp_path, capsys):
    run = trained(tasks.Copy, tmp_path / "run")
    assert run.config["config"]["env"]["id"] == "own_tasks:Copy"
    assert run.config["imports"] == ["own_tasks"]
    student = ps.distill(run, out=tmp_path / "student", width="1/8", total_timesteps=512, num_envs=8, warmup_steps=64,
                         **HERE)  # fmt: skip
    assert ps.evaluate(student, env=None, episodes=2, threads=1, quiet=True)["episodes"] == 2
    told = call(potstill, "evaluate", run.path, "--episodes", "2", "--threads", "1", output=tmp_path / "log")
    assert (told[0], told[1].count("\n")) == (2, 1)
    assert "--env own_tasks:Copy is code of module own_tasks: allow it with --import own_tasks" in told[1]
    main(["evaluate", str(run.path), "--import", str(TASKS), "--episodes", "2", "--threads", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["episodes"] == 2


def test_the_command_line_takes_the_same_name(tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in TRAIN.items())
    main(f"train --import {TASKS} --env own_tasks:Copy --evaluate 0 --quiet --threads 1 {words}".split())
    assert len(list(tmp_path.glob("own_tasks-Copy_run/*seed-0/policy.safetensors"))) == 1


def test_a_registered_task_may_be_named_with_its_module_as_gymnasium_has_it(tasks):
    imports.import_modules([str(TASKS)])
    gymnasium.register("Copied-v0", tasks.Copy)
    assert find_env("own_tasks:Copied-v0") == find_env("Copied-v0") == EnvConfig("Copied-v0")


def test_a_wrapped_task_is_a_function_that_wraps_it_and_its_frames_are_seen_as_a_stack(tasks, tmp_path):
    def brighter():
        return FrameStackObservation(TransformReward(tasks.Picture(), lambda reward: 10 * reward), 4)

    task = find_env(brighter)
    assert task == EnvConfig("python:brighter")
    assert Envs(task, 1).layout == "stack"
    run = trained(brighter, tmp_path / "run", network="minatar", width="1/8")
    assert run.result["score"] % 10 == 0
    assert ps.evaluate(run, episodes=2, threads=1, quiet=True)["episodes"] == 2
    imports._handed.clear()
    with pytest.raises(ps.InputError, match="--env python:brighter was handed over in Python, where no other process"):
        ps.evaluate(run, episodes=2)
    assert ps.evaluate(run, env=brighter, episodes=2, threads=1, quiet=True)["episodes"] == 2


def test_a_spec_is_registered_once_and_two_of_one_name_are_told_apart(tasks):
    spec = EnvSpec("Own/Copy-v0", entry_point=tasks.Copy, max_episode_steps=5)
    for _ in range(2):
        assert find_env(spec) == EnvConfig("Own/Copy-v0")
    with pytest.raises(ps.InputError, match="another task is registered as Own/Copy-v0: give the spec an id"):
        find_env(EnvSpec("Own/Copy-v0", entry_point=tasks.Copy, max_episode_steps=6))


@pytest.mark.parametrize(
    ("env", "line"),
    [
        (lambda: "cartpole", "--env python:lambda makes a str: it should make a new gymnasium.Env whenever"),
        (lambda: ONLY, "makes the same environment twice: it should make a new"),
        (lambda: 1 / 0, "python:lambda cannot be made: ZeroDivisionError: division by zero"),
        (7, "env is a name, a spec or what makes an environment, not int"),
        ("own_tasks:Nothing", "--env own_tasks:Nothing is code of module own_tasks: allow it with --import own_tasks"),
    ],
)
def test_what_makes_no_task_is_one_line(env, line, tmp_path):
    with pytest.raises(ps.InputError, match=line):
        Envs(find_env(env), 2)


def test_workers_need_a_task_that_they_can_import(tasks, tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text("""
env = "cartpole"
widths = ["1/8"]
seeds = [0]
[evaluation]
episodes = 2
[arms.rl]
total-timesteps = 256
num-envs = 4
num-steps = 32
minibatch-size = 64
""")
    quiet = ps.Runtime(quiet=True)
    with pytest.raises(ps.InputError, match="python:lambda was handed over in Python, and workers cannot import it"):
        ps.study(plan, env=lambda: gymnasium.make("CartPole-v1"), out=tmp_path / "none", runtime=quiet)
    study = ps.study(plan, env=tasks.Copy, out=tmp_path / "study", runtime=quiet)
    assert study.table().select("env", "status").rows() == [("own_tasks:Copy", "done")]
