"""One thread for every test: the networks are tiny, and threads that wait for each other stall on a busy machine."""

import gc
import json
import os
import signal
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import emulators
import gymnasium
import numpy as np
import pytest
import torch
from processes import WARM
from small_runs import sharpened

from potstill import imports
from potstill.cli import main
from potstill.networks import NetworkConfig, Policy
from potstill.policies import save_policy
from potstill.study import local
from potstill.tasks import TASKS

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # else Ray's workers hardly run beside other tests
torch.set_num_threads(1)

LONGEST = (
    "ray",
    "soak",
    "own_code",
    "bounds",
    "wheel",
    "fuzz",
    "page",
    "cuts",
    "figures",
    "studies",
    "records",
    "road",
)
LONGEST += ("compress", "statistics", "continuous", "api", "resuming", "compare", "front_page", "quickstart", "browser")


def pytest_collection_modifyitems(items):
    """The files that take longest begin first, then those of most tests: else one worker waits for the other."""
    tests, names = Counter(item.path for item in items), [f"test_{name}" for name in LONGEST]
    place = {path: names.index(path.stem) if path.stem in names else len(names) for path in tests}
    items.sort(key=lambda item: (place[item.path], -tests[item.path]))


def pytest_collection_finish():
    gc.freeze()  # what was imported stays: to look through it for garbage again and again takes seconds


@contextmanager
def as_before(temporary):
    """What is done to this process in here ends here, whatever test comes next, of whatever file.

    A command minds SIGTERM, sets COLUMNS where a terminal is narrow, tells torch of the processor, and keeps the
    modules that are named and where they lie. A test registers tasks, hands code over, and imports what it wrote into
    the folder `temporary`, where another may write a module of the same name.
    """
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    known = [(each, dict(each)) for each in (imports._named, imports._handed, imports._makers, gymnasium.registry)]
    path, environ, modules = list(sys.path), dict(os.environ), set(sys.modules)
    yield
    for number, handler in handlers:
        signal.signal(number, handler)
    for now, before in known:
        now.clear()
        now.update(before)
    for name in sys.modules.keys() - modules:
        if (file := getattr(sys.modules[name], "__file__", None)) and Path(file).is_relative_to(temporary):
            del sys.modules[name]
    sys.path[:] = path
    changed = {name for name in {*environ, *os.environ} if environ.get(name) != os.environ.get(name)}
    for name in changed - {"PYTEST_CURRENT_TEST"}:
        if name in environ:
            os.environ[name] = environ[name]
        else:
            del os.environ[name]
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session", autouse=True)
def lent_emulators():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ale_py.vector_env.AtariVectorEnv", emulators.Lent)
        yield
    emulators.idle.clear()  # or nanobind tells of each at the end


@pytest.fixture(scope="module", autouse=True)
def module_settled(tmp_path_factory):
    """Workers of studies are forked; those of faults/test_signals.py and faults/test_wheel.py are started, as a
    user's."""
    with as_before(tmp_path_factory.getbasetemp()), pytest.MonkeyPatch.context() as patch:
        if sys.platform == "linux":  # elsewhere none is forked
            patch.setattr(local, "subprocess", WARM)
        yield


@pytest.fixture(autouse=True)
def settled(tmp_path_factory):
    with as_before(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture(scope="session")
def save_teacher():
    """Puts an expert of CartPole's, random but decided, with a result of its own at a path that must not exist."""

    def save(path, env=TASKS["cartpole"].env, seed=0):
        policy = sharpened(Policy(NetworkConfig(width="1/8"), (4,), 2), seed)
        path.mkdir()
        probe = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
        save_policy(path / "policy.safetensors", policy, env, probe, {})
        (path / "result.json").write_text(json.dumps({"score": 9.0, "point_win_rate": None, "env_steps": 77}))
        return path

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
