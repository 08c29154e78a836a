"""The wheel, installed into an empty environment and used from a directory that knows no checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
CLEAN |= {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
TINY = ("--total-timesteps", "256", "--num-envs", "2", "--precision", "float32", "--device", "cpu", "--threads", "1")
PLAN = """
env = "cartpole"
widths = ["1/8"]
seeds = [0]
evaluation = { episodes = 2 }
[arms.rl]
total-timesteps = 128
num-envs = 2
num-steps = 32
minibatch-size = 32
normalise-inputs = 0
precision = "float32"
"""

pytestmark = pytest.mark.timeout(600)  # pip, and processes that import torch, on a machine that may be busy


def ran(*words, cwd, code=0):
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=CLEAN, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, and an environment that holds it beside the packages it depends on, and no other potstill."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--quiet")
    ran(*pip, "wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "built", cwd=folder)
    (wheel,) = (folder / "built").glob("potstill-*.whl")
    shutil.rmtree(source)
    ran(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    ran(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    # Only now: a path that a .pth names brings its packages, but not what its own .pth files bring, our checkout.
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "work").mkdir()
    return SimpleNamespace(
        wheel=wheel, python=python, command=folder / "env" / "bin" / "potstill", work=folder / "work"
    )


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(installed):
    held = {name for name in zipfile.ZipFile(installed.wheel).namelist() if ".dist-info/" not in name}
    package = ROOT / "src" / "potstill"
    files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert held == {str(path.relative_to(ROOT / "src")) for path in files}
    assert "potstill/report/study.html" in held


ABSENT = (
    ("study", "run", "plans/quick.toml"),
    ("distill", "data/experts/pong/seed-0"),
    ("watch", "data/experts/pong/seed-0"),
)
STEPS = ("--num-steps", "32", "--minibatch-size", "32", "--normalise-inputs", "0")
BUFFER = ("--warmup-steps", "64", "--batch-size", "16", "--width", "1/32", "--evaluate", "2")
COMMANDS = (
    ("info",),
    ("train", "--env", "cartpole", "--out", "expert", *TINY, *STEPS, "--evaluate", "2"),
    ("distill", "expert", "--out", "student", *TINY, *BUFFER),
    ("study", "run", "plan.toml", "--out", "study", "--workers", "1", "--device", "cpu", "--quiet"),
    ("report", "study", "--resamples", "100"),
    *ABSENT,
)
ONE_AFTER_THE_OTHER = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from potstill.cli import main
for words in json.loads(sys.argv[1]):
    code, out, err = 0, io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(words)
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture(scope="module")
def used(installed):
    """Exit code, stdout and stderr of each of COMMANDS. One process does them all: each would import torch."""
    (installed.work / "plan.toml").write_text(PLAN)
    done = ran(installed.python, "-c", ONE_AFTER_THE_OTHER, json.dumps(COMMANDS), cwd=installed.work)
    return dict(zip(COMMANDS, map(json.loads, done.stdout.splitlines()), strict=True))


def test_an_installed_potstill_trains_distils_studies_and_reports_without_the_checkout(installed, used):
    where = ran(installed.python, "-c", "import potstill; print(potstill.__file__)", cwd=installed.work).stdout
    assert Path(where.strip()).is_relative_to(installed.python.parents[1])
    assert "potstill study" in ran(installed.command, "--help", cwd=installed.work).stdout
    assert [(words[0], used[words][0]) for words in COMMANDS if words not in ABSENT and used[words][0] != 0] == []
    assert used[("info",)][1].startswith("potstill ")
    assert "What size buys: CartPole-v1" in (installed.work / "study" / "report.html").read_text()
    for run in ("expert", "student", "study/runs/rl_width-1_8_seed-0"):
        result = json.loads((installed.work / run / "result.json").read_text())
        assert (result["status"], result["episodes"], result["commit"]) == ("done", 2, None)


def test_plans_and_experts_that_only_the_source_has_are_named_in_one_line(installed, used):
    why = "no such file or directory; the plans and experts of the documents come with potstill's source"
    for words in ABSENT:
        line = f"potstill: cannot read {words[-1]}: {why}, not with the installed package\n"
        assert used[words] == [2, "", line]
        assert not (installed.work / words[-1]).exists()
