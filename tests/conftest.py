"""One thread for every test: the networks are tiny, and threads that wait for each other stall on a busy machine."""

import json
import os

import numpy as np
import pytest
import torch

from potstill import imports
from potstill.cli import main
from potstill.networks import NetworkConfig, Policy
from potstill.policies import save_policy
from potstill.tasks import TASKS

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def settled_anew(monkeypatch):
    """What a test tells torch of the processor, and the modules it names, end with it, whatever test comes next."""
    monkeypatch.setattr(imports, "_named", dict(imports._named))
    yield
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def save_teacher():
    """Puts an expert of CartPole's, random but decided, with a result of its own at a path that must not exist."""

    def save(path):
        policy = Policy(NetworkConfig(width="1/8"), (4,), 2).initialise(torch.Generator().manual_seed(0))
        with torch.no_grad():
            policy.actor.weight *= 300
        path.mkdir()
        probe = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
        save_policy(path / "policy.safetensors", policy, TASKS["cartpole"].env, probe, {})
        (path / "result.json").write_text(json.dumps({"score": 9.0, "point_win_rate": None, "env_steps": 77}))

    return save


@pytest.fixture
def call(capsys):
    """Calls `potstill` in this process; returns exit code, stdout and stderr."""

    def call(*words):
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call
