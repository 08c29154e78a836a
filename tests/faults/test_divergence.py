"""What is no longer a finite number stops a run within one update; the last good checkpoint stands."""

import json
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control import CartPoleEnv
from processes import at
from small_runs import RUNTIME, TRAIN, small_run

from potstill import telemetry
from potstill.envs import EnvConfig
from potstill.errors import DivergedError
from potstill.evaluation import play
from potstill.policies import load_policy
from potstill.storage import checkpoints
from potstill.training.trainer import execute, new_run


class Poisoned(CartPoleEnv):
    """A cart pole that says something else from its 100th step on, in whichever game that is."""

    def __init__(self, reward: float = 1.0, observation: float = 0.0) -> None:
        super().__init__()
        self.poison, self.count = (reward, observation), 0

    def step(self, action):
        observation, reward, *rest = super().step(action)
        self.count += 1
        if self.count >= 100:
            reward, shift = self.poison
            observation = observation + np.float32(shift)
        return observation, reward, *rest


def poisoned(**poison: float) -> EnvConfig:
    """The task with a reward or a shift of its observations."""
    gymnasium.register("Poisoned-v0", entry_point=Poisoned, kwargs=poison, max_episode_steps=500)
    return EnvConfig("Poisoned-v0")


def diverges(run) -> str:
    with pytest.raises(DivergedError) as error:
        execute(run, RUNTIME)
    result = json.loads(run.result_path.read_text())
    assert (result["status"], result["error"]) == ("failed", str(error.value))
    assert not run.policy_path.exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("poison", "said"),
    [
        ({"reward": float("nan")}, "Poisoned-v0 returned a reward that is not finite (nan) in environment 0, "),
        ({"reward": -float("inf")}, "Poisoned-v0 returned a reward that is not finite (-inf) in environment 0, "),
        (
            {"observation": float("nan")},
            "Poisoned-v0 returned an observation that is not finite (nan) in environment 0, ",
        ),
        ({"reward": 3e38}, "the loss or its gradient is no longer finite at update 1 (loss "),
    ],
    ids=["a NaN reward", "an infinite reward", "a NaN observation", "an infinite loss"],
)
def test_a_training_stops_within_the_update_with_the_step_and_the_cause(poison, said, tmp_path):
    config = replace(TRAIN, env=poisoned(**poison), clip_rewards=False)  # 20 steps for the statistics, 64 per update
    run = new_run(config, tmp_path / "run", RUNTIME)
    assert diverges(run).startswith(f"after 512 agent steps: {said}")
    assert [record["step"] for record in telemetry.read(run.metrics_path)] == [512]
    tensors, document = checkpoints.load(run.resume_path)
    assert document["update"] == 1
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_learning_rate_of_1e20_stops_within_the_update_and_the_last_good_checkpoint_stands(tmp_path, monkeypatch):
    run = new_run(TRAIN, tmp_path / "run", RUNTIME)
    at(
        "potstill.storage.checkpoints.save",
        2,
        lambda: (_ for _ in ()).throw(KeyboardInterrupt),
        patch=monkeypatch.setattr,
    )
    with pytest.raises(Exception, match="continue with --resume"):
        execute(run, RUNTIME)
    monkeypatch.undo()
    tensors, document = checkpoints.load(run.resume_path)
    checkpoints.save(run.resume_path, tensors, document | {"learning_rate": 1e20, "rate_bound": 1e20})
    before = run.resume_path.read_bytes()
    for _ in range(2):  # and again, for it goes on from there
        assert diverges(run).startswith(
            "after 512 agent steps: the loss or its gradient is no longer finite at update 1"
        )
        assert run.resume_path.read_bytes() == before


@pytest.mark.parametrize("name", ["student", "teacher", "stepwise"])
def test_a_distillation_stops_within_the_update_too(name, teacher, tmp_path):
    run = small_run(name, teacher, tmp_path / "run", learning_rate=1e39)
    assert diverges(run).startswith("after 0 agent steps: ")
    assert not run.resume_path.exists()


def test_a_last_step_that_leaves_weights_that_are_not_finite_is_not_saved(teacher, tmp_path):
    once = {"warmup_steps": 2_040, "updates_per_step": 1.0}  # one gradient step in all
    run = small_run("student", teacher, tmp_path / "run", learning_rate=1e39, **once)
    said = diverges(run)
    assert said == "after 1,536 agent steps: a weight is no longer finite after gradient step 1: lower --learning-rate"
    assert all(tensor.isfinite().all() for tensor in checkpoints.load(run.resume_path)[0].values())


def test_an_evaluation_of_a_task_that_returns_nan_says_so(teacher):
    with pytest.raises(DivergedError, match="returned a reward that is not finite"):
        list(play(load_policy(teacher).policy, poisoned(reward=float("nan")), episodes=16, seed=0))
