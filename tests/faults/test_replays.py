"""A resumed run plays its games again and compares: what comes out otherwise is refused, or the result says so."""

import itertools
import json
import signal
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from processes import OPTIONS, at
from small_runs import CONFIGS, RUNTIME, outcome, small_run

from potstill.cli import main
from potstill.envs import EnvConfig, Envs
from potstill.errors import InputError
from potstill.storage.runs import Run
from potstill.training.trainer import Interrupted, execute

LINE = "potstill.telemetry.Metrics.write"
DRAWS = itertools.count()


def unseeded(below: int) -> int:
    """A number that no seed of the run decides."""
    return int(np.random.default_rng(next(DRAWS)).integers(below))


class Task(gymnasium.Env):
    """Ten steps; the observation holds what a seed does not decide, of the kind `strange`."""

    action_space = gymnasium.spaces.Discrete(2)
    observation_space = gymnasium.spaces.Box(-10.0, 10.0, (4,), np.float32)

    def __init__(self, strange: str) -> None:
        self.strange, self.games = strange, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.age, self.games = 0, self.games + 1
        return self.shown(), {}

    def step(self, action):
        self.age += 1
        reward = unseeded(7) if self.strange == "reward" else 1.0
        ended = self.age >= (8 + unseeded(3) if self.strange == "end" else 10)
        return self.shown(), reward, ended, False, {}

    def shown(self):
        own = {"observation": unseeded(7), "last games": self.games % 5}.get(self.strange, 0)
        return np.array([*self.np_random.normal(size=2).clip(-5, 5), self.age, own], np.float32)


for kind in ("observation", "reward", "end", "last games"):
    gymnasium.register(f"Strange/{kind.replace(' ', '-')}-v0", Task, kwargs={"strange": kind})


def interrupted(run: Run, monkeypatch) -> Run:
    """A run cut after its second line."""
    with monkeypatch.context() as patch:
        at(LINE, 2, lambda: signal.raise_signal(signal.SIGTERM), patch=patch.setattr)
        with pytest.raises(Interrupted):
            execute(run, RUNTIME)
    return Run.open(run.path)


@pytest.mark.parametrize("name", ["cartpole", "student"])
@pytest.mark.parametrize("kind", ["observation", "reward", "end"])
def test_a_task_that_is_no_function_of_its_seed_and_actions_is_noticed(kind, name, teacher, tmp_path, monkeypatch):
    if name == "student":  # its task is its teacher's
        changes = {"env": EnvConfig(f"Strange/{kind}-v0")}
        run = small_run("cartpole", teacher, tmp_path / "teacher", **changes)
        execute(run, RUNTIME)
        run = small_run("student", run.policy_path, tmp_path / "run")
    else:
        run = small_run(name, teacher, tmp_path / "run", env=EnvConfig(f"Strange/{kind}-v0"))
    run = interrupted(run, monkeypatch)
    saved = run.resume_path.read_bytes()
    with pytest.raises(InputError, match=f"Strange/{kind}-v0 is not a function of its seed and actions.*--inexact"):
        execute(run, RUNTIME)
    assert run.resume_path.read_bytes() == saved
    assert execute(run, replace(RUNTIME, inexact=True))["inexact"] is True
    assert json.loads(run.result_path.read_text())["inexact"] is True


def test_a_run_that_was_inexact_once_says_so_at_its_end(teacher, tmp_path, monkeypatch, capsys):
    run = interrupted(small_run("cartpole", teacher, tmp_path / "run", env=EnvConfig("Strange/reward-v0")), monkeypatch)
    with monkeypatch.context() as patch:
        at(LINE, 1, lambda: signal.raise_signal(signal.SIGTERM), patch=patch.setattr)
        with pytest.raises(SystemExit):
            main(["train", "--resume", str(run.path), "--inexact", *OPTIONS])
    real = Envs.replay
    monkeypatch.setattr(Envs, "replay", lambda self, past, _: real(self, past._replace(checksum=None)))  # as exact
    assert execute(Run.open(run.path), RUNTIME)["inexact"] is True


SEGMENTS = {"reseed_every": CONFIGS["cartpole"].batch_size * 2}


@pytest.mark.parametrize("task", ["Strange/last-games-v0", "BipedalWalker-v3"])
def test_what_a_task_remembers_of_other_games_ends_with_a_reset(task, teacher, tmp_path, monkeypatch):
    """Box2D's world outlives a seeded reset: the games after one would depend on those before."""
    if task.startswith("Bipedal"):
        pytest.importorskip("Box2D", reason="no wheel of Box2D for Python 3.14 and later")
    changes = {"env": EnvConfig(task), **SEGMENTS}
    whole, cut = (small_run("cartpole", teacher, tmp_path / name, **changes) for name in ("whole", "cut"))
    assert "inexact" not in execute(whole, RUNTIME)
    with monkeypatch.context() as patch:
        at(LINE, 3, lambda: signal.raise_signal(signal.SIGTERM), patch=patch.setattr)
        with pytest.raises(Interrupted):
            execute(cut, RUNTIME)
    assert "inexact" not in execute(Run.open(cut.path), RUNTIME)
    assert outcome(cut) == outcome(whole)
