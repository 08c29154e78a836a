"""Tasks as people write them: harmless details do not stop a training, and what their code raises is told in a line."""

import json
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from potstill import api, imports, telemetry
from potstill.cli import main
from potstill.envs import EnvConfig, Envs, check_task
from potstill.errors import DivergedError, InputError, TaskError
from potstill.evaluation import NOT_EVALUATED, EvalConfig
from potstill.networks import NetworkConfig
from potstill.policies import load_policy
from potstill.ppo import PPOConfig
from potstill.storage.checkpoints import load
from potstill.storage.runs import Run
from potstill.study import local
from potstill.training.runtime import Runtime
from potstill.training.trainer import execute, new_run

RUNTIME = Runtime(device="cpu", threads=1, quiet=True)
SHARED = np.zeros(1, np.float32)
BROKEN = [False]  # whether the simulator fails at its 150th step


class Counter(gymnasium.Env):
    """Ten steps; the observation counts them, and is one buffer for all of them."""

    action_space, observation_space = spaces.Discrete(2), spaces.Box(0, 100, (1,), np.float32)

    def __init__(self, kind="", render_mode=None):
        self.kind, self.total, self.buffer = kind, 0, SHARED if kind == "shared" else np.zeros(1, np.float32)
        if kind == "beyond":
            self.observation_space = spaces.Box(-128, 127, (1,), np.int8)
        if kind == "unmade":
            raise ValueError("no display\nlong advice")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.kind == "no start":
            raise KeyError("map.json")
        self.t = self.buffer[0] = 0
        odd = {"blind": self.buffer * np.nan, "row": self.buffer[None], "beyond": np.array([300])}
        odd["shared"] = np.zeros(1, np.float32)  # its own, until the first step
        return odd.get(self.kind, self.buffer), {}

    def step(self, action):
        self.t, self.total = self.t + 1, self.total + 1
        self.buffer[0] = self.t
        reward, info = float(action), {}
        if self.kind == "fails" and BROKEN[0] and self.total == 150:
            raise RuntimeError("the simulator lost its licence\nsecond line")
        if self.kind == "infos":
            info = {"path": np.zeros(self.total % 3), "x": None if self.total % 2 else "a"}
        if self.kind == "array":
            reward = np.array([reward])
        if self.kind == "shared":
            self.buffer[0] = action
        if self.kind == "exits":
            raise SystemExit(0)
        if self.kind == "nothing":
            reward = None
        if self.kind == "prints":
            print("hello from the simulator")
        if self.kind == "lost" and self.t == 10:
            return self.buffer * np.nan, reward, False, True, info
        return self.buffer, reward, False, self.t >= 10, info


class Only(Counter):
    """A simulator of which only one can run."""

    open = 0

    def __init__(self, render_mode=None):
        super().__init__()
        assert Only.open == 0, "the port is taken"
        Only.open = 1

    def close(self):
        Only.open = 0


KINDS = ("", "unmade", "no start", "fails", "infos", "array", "prints", "lost", "blind", "row")
for kind in (*KINDS, "shared", "beyond", "exits", "nothing"):
    gymnasium.register(f"Others/{kind.replace(' ', '') or 'plain'}-v0", entry_point=Counter, kwargs={"kind": kind})
gymnasium.register("Others/only-v0", entry_point=Only)
gymnasium.register("Others/nowhere-v0", entry_point="no_such_simulator:Env")


def config_of(name, **changes):
    small = {"total_timesteps": 8 * 128, "num_envs": 4, "num_steps": 32, "minibatch_size": 64, "normalise_inputs": 40}
    settings = {"epochs": 1, "precision": "float32", "network": NetworkConfig(width="1/8"), "reseed_every": 4096}
    return PPOConfig(EnvConfig(f"Others/{name}-v0"), **small | settings | changes)


@pytest.mark.parametrize("name", ["infos", "array"])
def test_infos_of_any_shape_and_rewards_in_an_array_change_nothing(name):
    odd, plain = Envs(EnvConfig(f"Others/{name}-v0"), 3), Envs(EnvConfig("Others/plain-v0"), 3)
    odd.reset(0)
    plain.reset(0)
    for actions in np.random.default_rng(0).integers(0, 2, (25, 3)):
        mine, theirs = odd.step(actions), plain.step(actions)
        assert np.array_equal(mine.rewards, theirs.rewards)
        assert mine.episodes == theirs.episodes


def test_the_last_observation_of_a_game_is_not_the_buffer_that_the_next_one_writes_over():
    envs = Envs(EnvConfig("Others/plain-v0"), 2)
    envs.reset(0)
    for _ in range(10):
        step = envs.step(np.zeros(2, dtype=int))
    assert {row: last.tolist() for row, last in step.final_observations.items()} == {0: [10.0], 1: [10.0]}
    assert step.observations.tolist() == [[0.0], [0.0]]


def test_a_buffer_that_all_games_share_shows_each_row_its_own():
    envs = Envs(EnvConfig("Others/shared-v0"), 3)
    envs.reset(0)
    assert envs.step(np.array([0, 1, 0])).observations.tolist() == [[0.0], [1.0], [0.0]]


@pytest.mark.parametrize(
    ("name", "raised"), [("exits", "SystemExit: 0"), ("nothing", "TypeError: float.. argument must be a string or a")]
)
def test_what_would_end_the_process_or_is_no_reward_is_told_as_the_tasks_fault(name, raised):
    envs = Envs(EnvConfig(f"Others/{name}-v0"), 2)
    envs.reset(0)
    with pytest.raises(TaskError, match=f"^Others/{name}-v0 raised {raised}.*, in environment 0 at step 1 of each$"):
        envs.step(np.zeros(2, dtype=int))


def test_a_last_observation_that_is_no_number_is_told_where_a_game_is_cut():
    envs = Envs(EnvConfig("Others/lost-v0"), 2)
    envs.reset(0)
    for _ in range(9):
        envs.step(np.zeros(2, dtype=int))
    with pytest.raises(DivergedError, match=r"not finite \(nan\) in environment 0, 10 steps into its game"):
        envs.step(np.zeros(2, dtype=int))


def test_a_first_observation_that_is_no_number_is_told_before_anything_is_chosen_by_it():
    envs = Envs(EnvConfig("Others/blind-v0"), 2)
    with pytest.raises(DivergedError, match=r"an observation that is not finite \(nan\) in environment 0, 0 steps"):
        envs.reset(0)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("unmade", r"^Others/unmade-v0 cannot be made: ValueError: no display$"),
        ("nostart", r"^Others/nostart-v0 raised KeyError: 'map.json', when it was reset$"),
        ("row", r"^Others/row-v0 raised ValueError: it shows float32 \(1, 1\), its space says float32 \(1,\), when it"),
        ("beyond", r"^Others/beyond-v0 raised ValueError: it shows int64 \(1,\), its space says int8 \(1,\), when"),
        ("nowhere", r"^Others/nowhere-v0 needs a package that is not installed: ModuleNotFoundError: .*no_such_sim"),
        ("unknown", r"^no task is registered as 'Others/unknown-v0': a task of your own needs --import MODULE$"),
    ],
)
def test_a_task_that_cannot_be_made_is_refused_with_the_first_line_of_its_own_error(name, complaint):
    with pytest.raises(InputError, match=complaint):
        check_task(EnvConfig(f"Others/{name}-v0"))


@pytest.mark.parametrize(("every", "kept"), [(0.0, 4), (60.0, 1)])
def test_a_run_whose_task_raises_is_saved_first_and_goes_on_as_if_it_had_not(every, kept, tmp_path, monkeypatch):
    monkeypatch.setattr("potstill.training.trainer.KEEP_EVERY", every)
    config = config_of("fails")
    whole = new_run(config, tmp_path / "whole", RUNTIME)
    execute(whole, RUNTIME, NOT_EVALUATED)
    run = new_run(config, tmp_path / "run", RUNTIME)
    BROKEN[0] = True
    told = (
        r"^after 512 agent steps: Others/fails-v0 raised RuntimeError: the simulator lost its licence, in environment 0"
        r" at step 150 of each; go on with --resume .*run$"
    )
    try:
        with pytest.raises(TaskError, match=told):
            execute(run, RUNTIME, NOT_EVALUATED)
    finally:
        BROKEN[0] = False
    assert run.status == "failed"
    assert load(run.resume_path)[1]["update"] == kept
    execute(Run.open(run.path), RUNTIME, NOT_EVALUATED)
    mine, theirs = (load(each.policy_path)[0] for each in (run, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    mine, theirs = ([{**line, "seconds": 0} for line in telemetry.read(each.metrics_path)] for each in (run, whole))
    assert mine == theirs


@pytest.mark.parametrize("view", [(), ("noise=0.5", "delay=1", "noise=0.1")], ids=["as it is", "noisy"])
def test_a_simulator_of_which_only_one_can_run_is_trained_saved_and_evaluated_with_one(view, tmp_path):
    config = config_of("only", num_envs=1, num_steps=128, total_timesteps=384, reseed_every=128)
    config = replace(config, env=replace(config.env, view=view))
    run = new_run(config, tmp_path / "run", RUNTIME)
    assert execute(run, RUNTIME, EvalConfig(episodes=3))["episodes"] == 3
    assert api.evaluate(run.path, episodes=2, teacher=run.path, threads=1, quiet=True)["agreement"] == 1.0
    assert Only.open == 0
    with pytest.raises(InputError, match="the port is taken"):
        Envs(config.env, 2)
    Only.open = 0


def test_what_a_simulator_prints_is_no_part_of_the_json(tmp_path, capsys):
    run = new_run(config_of("prints", total_timesteps=128), tmp_path / "run", RUNTIME)
    execute(run, RUNTIME, NOT_EVALUATED)
    capsys.readouterr()
    main(["evaluate", str(run.path), "--episodes", "2", "--threads", "1", "--json"])
    shown = capsys.readouterr()
    assert json.loads(shown.out)["episodes"] == 2
    assert "hello from the simulator" in shown.err


def test_a_policy_names_the_module_that_its_task_was_made_with(tmp_path, monkeypatch):
    monkeypatch.setitem(imports._named, "my_tasks", "my_tasks")
    run = new_run(config_of("plain", total_timesteps=128), tmp_path / "run", RUNTIME)
    execute(run, RUNTIME, NOT_EVALUATED)
    monkeypatch.delitem(imports._named, "my_tasks")
    monkeypatch.delitem(gymnasium.registry, "Others/plain-v0")
    loaded = load_policy(run.path)
    with pytest.raises(InputError, match=r"'Others/plain-v0': it was made with --import my_tasks$"):
        Envs(loaded.env, 1)
    with pytest.raises(InputError, match=r"it was made with --import my_tasks$"):
        execute(Run.open(new_copy(run, tmp_path / "again")), RUNTIME, NOT_EVALUATED)


def new_copy(run, path):
    """A run that has its configuration and no more."""
    path.mkdir()
    (path / "config.json").write_bytes((run.path / "config.json").read_bytes())
    return path


def test_a_worker_says_why_it_cannot_make_what_this_process_alone_has_registered():
    assert local.check(EnvConfig("CartPole-v1")) is None
    said = local.check(replace(EnvConfig("Others/plain-v0")))
    assert said == "no task is registered as 'Others/plain-v0': a task of your own needs --import MODULE"


@pytest.mark.parametrize(
    ("env", "complaint"), [("Others/unmade-v0", "no display"), ("Others/plain-v0", "workers cannot")]
)
def test_a_study_of_a_task_that_cannot_be_made_stops_before_any_run(env, complaint, tmp_path, capsys):
    plan = tmp_path / "plan.toml"
    plan.write_text(f'env = "{env}"\nwidths = ["1/8"]\nseeds = [0, 1]\n[evaluation]\nepisodes = 1\n[arms.rl]\n')
    with pytest.raises(SystemExit) as stop:
        main(["study", "run", str(plan), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert complaint in said.splitlines()[-1]
    assert not (tmp_path / "out" / "runs").exists()
