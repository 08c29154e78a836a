"""The whole road of a policy that Stable-Baselines3 trained: in as its zip, out as a small network without it."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import chdir, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import ale_py
import gymnasium
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack

from potstill import evaluation
from potstill.cli import main
from potstill.compress import outcome, search
from potstill.compress.choice import Trial
from potstill.compress.config import CompressConfig
from potstill.compress.search import Search
from potstill.distill import DistillConfig
from potstill.load import Origin
from potstill.load.sb3 import as_sb3
from potstill.policies import load_policy
from potstill.tasks import TASKS
from potstill.training.runtime import Runtime

CARTPOLE = as_sb3(TASKS["cartpole"].env)
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "play_onnx.py"
RUNTIME = ["--device", "cpu", "--threads", "1"]
SEARCH = ["--keep", "0.5", "--games", "8", "--confirm-games", "16", "--max-parameters", "10", "--budget", "3"]
SEARCH += ["--total-timesteps", "4096", "--num-envs", "8", "--batch-size", "64", "--warmup-steps", "256"]
SEARCH += ["--learning-rate", "0.01", "--updates-per-step", "2", "--precision", "float32", "--quiet", *RUNTIME]


def call(*words):
    """`potstill` in this process: its exit code and what it wrote on stdout."""
    shown, code = StringIO(), 0
    try:
        with redirect_stdout(shown):
            main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    return code, shown.getvalue()


def compress(*words):
    """The same with one way to distil, few games and a short film for the card."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "ways", lambda base: [base])
        patch.setattr(outcome, "DISTURBED", 2)
        patch.setattr(outcome, "FILM_STEPS", 30)
        return call("compress", *words)


def documented() -> list[list[str]]:
    """The five commands of docs/howto/export.md, word by word."""
    page = (ROOT / "docs" / "howto" / "export.md").read_text()
    block = re.search(r"## From a zip to C in five commands\n+```sh\n(.*?)```", page, re.DOTALL)
    return [shlex.split(line) for line in block[1].splitlines()]


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """SB3's own PPO learns CartPole for a few seconds; then the documents' commands, with shorter games and runs."""
    folder = tmp_path_factory.mktemp("road")
    options = {"n_steps": 256, "batch_size": 256, "learning_rate": 3e-3, "device": "cpu", "seed": 0}
    PPO("MlpPolicy", "CartPole-v1", **options).learn(4_096).save(folder / "model.zip")
    evaluate, search, export, compiler, player = documented()
    with chdir(folder):
        done = {
            "import-sb3": call("import-sb3", "model.zip", "--env", "cartpole", "--out", folder / "imported"),
            "evaluate": call(*evaluate[1:], "--episodes", 8, "--json", *RUNTIME),
            "compress": compress(*search[2:], *SEARCH),
            "c": call(*export[1:], "--episodes", 0, "--threads", 1),
            "onnx": call("export", "small", "--out", "small.onnx", "--json", "--episodes", 1, "--threads", 1),
        }
        subprocess.run(compiler, check=True)
        words = [sys.executable, ROOT / player[1], *player[2:], "--games", "3"]
        played = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ).stdout
    return SimpleNamespace(folder=folder, done=done, played=played)


def test_every_command_of_the_road_succeeds(road):
    assert {command: code for command, (code, _) in road.done.items()} == dict.fromkeys(road.done, 0)
    assert road.done["import-sb3"][1].splitlines()[0] == str(road.folder / "imported")


def test_the_small_network_keeps_its_share_on_the_teachers_own_task(road):
    record, found = json.loads((road.folder / "small" / "result.json").read_text()), load_policy(road.folder / "small")
    teacher = load_policy(road.folder / "imported")
    assert found.env == teacher.env == CARTPOLE
    assert (record["env"], record["sticky"]) == ("CartPole-v1", 0.0)
    assert record["reached"]
    assert record["share_low"] >= 0.5
    assert found.policy.size().parameters == record["parameters"] <= 10 < teacher.policy.size().parameters
    scored = json.loads(road.done["evaluate"][1])
    assert record["teacher_score"] == pytest.approx(scored["mean"], rel=0.5)  # other games of the same policy
    assert record["teacher"] == "model.zip"


def test_the_example_plays_the_small_network_as_pytorch_does(road):
    play = runpy.run_path(str(EXAMPLE))["play"]
    policy, env = load_policy(road.folder / "small").policy, gymnasium.make("CartPole-v1")
    for seed in range(3):
        observation, score, over = env.reset(seed=seed)[0], 0.0, False
        while not over:
            action = int(policy(torch.from_numpy(observation)[None])[0].argmax())
            observation, reward, terminated, truncated, _ = env.step(action)
            score, over = score + float(reward), terminated or truncated
        assert play(str(road.folder / "small.onnx"), seed) == play(str(road.folder / "small" / "policy.onnx"), seed)
        assert play(str(road.folder / "small.onnx"), seed) == score


def test_the_compiled_c_plays_as_the_onnx_file_does(road):
    play = runpy.run_path(str(EXAMPLE))["play"]
    scores = [play(str(road.folder / "small.onnx"), seed) for seed in range(3)]
    assert road.played == f"mean {sum(scores) / 3:g} of {scores}\n"


def test_the_example_is_a_command_that_prints_the_mean(road):
    words = [sys.executable, EXAMPLE, road.folder / "small.onnx", "--games", "2"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ)
    scores = json.loads(done.stdout.partition(" of ")[2])
    assert done.stdout == f"mean {sum(scores) / 2:g} of {scores}\n"


def test_a_pong_zip_and_its_student_are_scored_on_the_zips_own_task(tmp_path, monkeypatch):
    """Without stickiness and with all six actions, not as potstill's own Pong is played."""
    gymnasium.register_envs(ale_py)
    pong = VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=1, seed=0), 4)
    PPO("CnnPolicy", pong, n_steps=8, batch_size=8, device="cpu", seed=0).save(tmp_path / "pong.zip")
    pong.close()
    base = DistillConfig(total_timesteps=64, num_envs=2, batch_size=8, warmup_steps=8, precision="float32")
    config, machine = CompressConfig(base=base), Runtime(device="cpu", threads=1, quiet=True)
    task, played = as_sb3(TASKS["pong"].env), []
    run = outcome.open_compression(Origin(tmp_path / "pong.zip", task), config, tmp_path / "out", machine)
    state, trial = Search(run, config, machine), Trial(0, 0)
    state.foresee = lambda trial: 1.0
    with run.lock():
        state.train([trial])
        monkeypatch.setattr(evaluation, "play", lambda policy, env, **_: played.append((env, policy.num_actions)) or [])
        for name in ("teacher", f"screen {state.name(trial)}", f"confirm {state.name(trial)}"):
            with suppress(UnboundLocalError):  # no game is played
                state.play(name, 1)
    assert (task.sticky, task.actions) == (0.0, None)
    assert played == [(task, 6)] * 3
