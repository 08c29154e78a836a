"""Files of a network with a memory: state in, state out."""

import json
import subprocess
from contextlib import closing
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from small_runs import sharpened

from potstill import evaluation
from potstill.envs import Envs
from potstill.errors import InputError
from potstill.export import c, export
from potstill.export import onnx as exporter
from potstill.export.actor import actor, in_order
from potstill.networks import NetworkConfig, Policy
from potstill.policies import load_policy, save_policy
from potstill.tasks import TASKS

TASKS_OF = {
    "cartpole": TASKS["cartpole"].env,
    "pendulum": replace(TASKS["pendulum"].env, max_frames=200),
    "minatar": TASKS["minatar-breakout"].env,
    "one frame": replace(TASKS["pong"].env, frame_stack=1, max_frames=400),
}
MAIN = """#include <stdio.h>
#include "policy.h"
int main(void)
{
    static float observation[POLICY_OBSERVATION], memory[POLICY_MEMORY];
    float output[POLICY_ACTIONS];
    while (fread(observation, sizeof observation, 1, stdin) == 1) {
        policy_outputs(observation, memory, output);
        fwrite(output, sizeof output, 1, stdout);
    }
    return 0;
}
"""


@pytest.fixture
def saved(tmp_path):
    """A policy that remembers, of clear opinions."""

    def save(task="cartpole"):
        env = TASKS_OF[task]
        with closing(Envs(env, 2)) as envs:
            probe = envs.reset(3)
            policy = sharpened(Policy(NetworkConfig(width="1/8", family="gru"), **envs.spaces), seed=1)
        with torch.no_grad():
            for layer in (policy.trunk.gru.read, policy.trunk.gru.recall):
                layer.bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(2))
        policy.normalise_by(torch.full_like(policy.mean, 0.25), torch.full_like(policy.mean, 2.0))
        save_policy(tmp_path / "policy.safetensors", policy, env, probe, {})
        return load_policy(tmp_path)

    return save


def played(policy, env, steps=60):
    """Observations of five games abreast, which begin anew in between, where they begin, and what PyTorch says."""
    with closing(Envs(env, 5)) as envs, torch.no_grad():
        shown, rng = envs.reset(9), np.random.default_rng(0)
        for _ in range(steps):
            begun = envs.ages == 0
            policy.restart(begun)
            yield shown, begun, policy.logits(policy.prepare(torch.from_numpy(shown))).numpy()
            shown = envs.step(envs.random_actions(rng)).observations


@pytest.mark.parametrize("task", TASKS_OF)
def test_an_onnx_file_plays_on_with_the_state_it_gave(task, saved, tmp_path):
    loaded = saved(task)
    record = export(loaded, tmp_path / "policy.onnx")
    assert record["max_difference"] <= 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx", providers=["CPUExecutionProvider"])
    state = np.zeros((5, loaded.policy.actor.in_features), np.float32)
    alike = 0
    for shown, begun, logits in played(loaded.policy, loaded.env):
        state[begun] = 0
        fresh = session.run(None, {"observation": shown, "state": np.zeros_like(state)})[0]
        outputs, _, state = session.run(None, {"observation": shown, "state": state})
        expected = logits[:, : outputs.shape[1]] * (2.0 if task == "pendulum" else 1.0)  # torques, of -2 to 2
        np.testing.assert_allclose(outputs, expected, atol=1e-3)
        alike += np.allclose(fresh, outputs, atol=1e-2)
    assert alike < 30  # else a file that forgets would do


def test_a_games_observations_are_checked_in_order(saved, tmp_path, monkeypatch):
    assert export(saved("one frame"), tmp_path / "right.onnx")["observations"] == 100  # a game of 400 frames
    monkeypatch.setattr(exporter, "_gates", lambda parameter: parameter[None])
    with pytest.raises(InputError, match="onnxruntime computes other logits than PyTorch"):
        export(saved("one frame"), tmp_path / "wrong.onnx")
    assert not (tmp_path / "wrong.onnx").exists()


@pytest.mark.parametrize("name", ["policy.onnx", "policy.c"])
def test_a_file_scores_what_the_policy_scores(name, saved, tmp_path):
    loaded = saved()
    record = export(loaded, tmp_path / name, episodes=8, seed=3, quiet=True)
    *_, games = evaluation.play(loaded.policy, loaded.env, episodes=8, seed=3)
    assert record["models"]["float32"]["score"]["mean"] == games.score


@pytest.mark.parametrize("name", ["policy.onnx", "policy.c"])
def test_its_card_says_that_it_needs_its_state_and_what_it_sees(name, saved, tmp_path, monkeypatch, call):
    monkeypatch.setitem(TASKS_OF, "cartpole", replace(TASKS["cartpole"].env, view=("delay=2", "mask=1")))
    loaded = saved()
    units = loaded.policy.actor.in_features
    code, shown, _ = call("export", loaded.path, "--out", tmp_path / name, "--episodes", 0, "--threads", 1)
    told = [
        "The environment shows it delay=2: a file reads what is so shown.",
        "Of an observation it sees mask=1: a file does so itself.",
        f"Its state of {units} numbers goes from step to step, zero where a game begins.",
    ]
    assert (code, shown.splitlines()[-4:-1]) == (0, told)
    card = json.loads((tmp_path / f"{name}.json").read_text())["policy"]
    assert (card["view"], card["state"]) == (["delay=2", "mask=1"], units)
    if name == "policy.c":
        assert " ".join(told) in " ".join((tmp_path / "policy.h").read_text().split())


@pytest.mark.parametrize("task", ["cartpole", "pendulum"])
def test_strict_compilers_and_sanitizers_have_nothing_to_say_of_a_memory(task, saved, tmp_path):
    deployed = actor(saved(task))
    source, header, sizes = c.build(deployed, "policy")
    for name, text in (("policy.c", source), ("policy.h", header), ("main.c", MAIN)):
        (tmp_path / name).write_text(text)
    strict = [*c.FLAGS, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    subprocess.run(["gcc", *strict, "policy.c", "main.c", "-o", "main", "-lm"], cwd=tmp_path, check=True)
    shown = deployed.observations
    done = subprocess.run([tmp_path / "main"], input=shown.tobytes(), capture_output=True, check=True)
    assert done.stderr == b""
    policy, outputs = deployed.policy, np.frombuffer(done.stdout, np.float32).reshape(len(shown), -1)
    library = c.Library(source, header, "policy", deployed, tmp_path)
    np.testing.assert_array_equal(in_order(deployed, library.outputs), outputs)
    memory = torch.zeros(1, policy.actor.in_features)
    expected = policy.heads(policy.prepare(torch.from_numpy(shown)), memory)[0].detach().numpy()
    np.testing.assert_allclose(outputs, expected[:, : outputs.shape[1]], atol=1e-4)
    assert f"{policy.size().parameters} parameters" in header
    assert sizes["constants"] >= 4 * policy.size().parameters


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("policy.zip", {}, "Stable-Baselines3's PPO has no memory: export to .onnx or .c"),
        ("policy.onnx", {"int8": True}, "--raw and --int8 have no place for a memory"),
        ("policy.c", {"int8": True}, "a memory is written in float32: leave out --int8 and --int4"),
    ],
)
def test_what_has_no_place_for_a_memory_is_refused(name, options, words, saved, tmp_path):
    with pytest.raises(InputError, match=words):
        export(saved(), tmp_path / name, **options)
    assert not (tmp_path / name).exists()
