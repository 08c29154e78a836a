"""What a run of any kind leaves on disk at seven moments, gone on with: the same bits as of one that was not cut.

Real kills are in test_resuming.py; here the run's directory is copied at each moment, which is what a kill leaves.
"""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from processes import at
from small_runs import CONFIGS, RUNTIME, TRAIN, outcome, small_run

from potstill import evaluation
from potstill.networks import NetworkConfig
from potstill.storage.runs import Run
from potstill.tasks import TASKS
from potstill.training.trainer import execute

pytestmark = pytest.mark.timeout(600)  # eight short runs one after the other, on a machine that may be busy

LINE, SAVE, POLICY = "potstill.telemetry.Metrics.write", "os.replace", "potstill.training.trainer.save_policy"
CUTS = {  # the call before which the directory is copied, or (True) after which
    "begun": (LINE, 1),
    "a line, no save": (LINE, 1, True),
    "a save half made": (SAVE, 1),
    "saved": (SAVE, 1, True),
    "a line more than was saved": (LINE, 3, True),
    "trained": (POLICY, 1),
    "a policy, no result": (POLICY, 1, True),
}


def small(task, **changes):
    return replace(TRAIN, env=TASKS[task].env, network=NetworkConfig(width="1/16"), **changes)


KINDS = {name: (name, {}) for name in CONFIGS} | {
    "one environment": ("cartpole", {"num_envs": 1, "num_steps": 512}),
    "many environments": ("cartpole", {"num_envs": 64, "num_steps": 8}),
    "one epoch": ("cartpole", {"epochs": 1}),
    "a minibatch as large as the rollout": ("cartpole", {"minibatch_size": 512}),
    "minibatches that leave a rest": ("cartpole", {"minibatch_size": 100}),
    "inputs as they are": ("cartpole", {"normalise_inputs": 0}),
    "games begun anew at every rollout": ("cartpole", {"reseed_every": 512}),
    "games never begun anew": ("cartpole", {"reseed_every": 1 << 30}),
    "no average of weights": ("cartpole", {"average_over": 0.0}),
    "weights averaged from the start": ("cartpole", {"average_over": 1.0}),
    "bfloat16": ("cartpole", {"precision": "bfloat16"}),
    "rewards as they are": ("cartpole", {"clip_rewards": False, "gamma": 1.0}),
    "another seed": ("cartpole", {"seed": 2**63 - 1}),
    "continuous actions": ("cartpole", vars(small("pendulum"))),
    "a task that has an end": ("cartpole", vars(small("acrobot"))),
    "frames of Pong, every rollout anew": ("pong", {"reseed_every": 64, "total_timesteps": 3 * 64, "num_envs": 1}),
    "a mixed lead until the end": ("mixed", {"beta_until": 1.0}),
    "a noisy teacher": ("teacher", {"noise": 0.3}),
    "a buffer that runs over": ("student", {"buffer_size": 100}),
    "a value head": ("student", {"value_coefficient": 0.5}),
}
assert len(KINDS) == 29


@pytest.fixture(scope="module")
def whole(request, teacher, tmp_path_factory):
    """A run of a kind, not cut: what it came to, and copies of its directory as it was at each cut."""
    name, changes = KINDS[request.param]
    run = small_run(name, teacher, tmp_path_factory.mktemp("cuts") / "whole", **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "latency", no_latency)
        for cut, moment in CUTS.items():
            copy = run.path.with_name(cut)
            at(*moment[:2], lambda copy=copy: shutil.copytree(run.path, copy), *moment[2:], patch=patch.setattr)
        execute(run, RUNTIME)
    return SimpleNamespace(folder=run.path.parent, outcome=outcome(run))


def no_latency(policy):
    """Of a network, which takes its time to measure, and is no part of the outcome."""
    return {}


def check(whole, cut, monkeypatch):
    monkeypatch.setattr(evaluation, "latency", no_latency)
    run = Run.open(whole.folder / cut)
    assert run.status == ("interrupted" if run.resume_path.exists() else "new")
    execute(run, RUNTIME)
    assert outcome(run) == whole.outcome


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("whole", CONFIGS, indirect=True)
def test_a_run_of_any_kind_cut_anywhere_ends_with_the_same_bits(whole, cut, monkeypatch):
    check(whole, cut, monkeypatch)


# A setting can be lost where a run goes on from a save amid its training. Whether it begins anew, or has nothing left
# to learn, has to do with its kind.
@pytest.mark.parametrize("cut", ["saved", "a line more than was saved"])
@pytest.mark.parametrize("whole", [name for name in KINDS if name not in CONFIGS], indirect=True)
def test_so_does_one_of_any_setting_cut_amid_its_training(whole, cut, monkeypatch):
    check(whole, cut, monkeypatch)
