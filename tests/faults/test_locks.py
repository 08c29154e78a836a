"""Two at once: one works, the other is refused with who holds it, or waits; the lock of the dead is taken over."""

import json
import os
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from processes import OPTIONS, Child, at, call, go_on, names, potstill, until
from small_runs import RUNTIME, outcome, small_run

from potstill import evaluation, ppo
from potstill.errors import InputError
from potstill.evaluation import EvalConfig
from potstill.storage import runs
from potstill.storage.runs import Run
from potstill.training import teacher_data
from potstill.training.trainer import execute

LINE = "potstill.telemetry.Metrics.write"
ENDLESS = ["train", "--env", "cartpole", "--total-timesteps", "100000000", *OPTIONS]
PLAN = """\
env = "cartpole"
widths = ["1/32"]
seeds = [0]
[arms.rl]
"""


def holder(child: Child) -> str:
    return f"in use by process {child.pid} on {socket.gethostname()} (since "


def locked_by(folder: Path) -> int:
    return json.loads((folder / "run.lock").read_text())["pid"]


def test_of_two_trainings_in_one_directory_one_works_and_the_other_is_told_who(tmp_path):
    run = tmp_path / "run"
    first = Child(potstill, *ENDLESS, "--out", run, output=tmp_path / "log")
    until((run / "resume.safetensors").exists)
    for words in ([*ENDLESS, "--out", run], ["train", "--resume", run, *OPTIONS]):
        code, said = call(potstill, *words, output=tmp_path / "second")
        assert code == 2
        assert holder(first) in said.splitlines()[-1]
    assert len((tmp_path / "second").read_text().splitlines()) == 2
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (run / "run.lock").exists()
    second = Child(potstill, "train", "--resume", run, *OPTIONS, output=tmp_path / "log")
    until(lambda: locked_by(run) == second.pid)  # the lock of the dead
    second.send_signal(signal.SIGTERM)
    assert second.wait() == 143


def test_of_two_trainings_that_start_at_once_exactly_one_works(tmp_path):
    words = ["train", "--env", "cartpole", "--total-timesteps", "512", *OPTIONS, "--out", tmp_path / "run"]
    children = [Child(potstill, *words, output=tmp_path / f"log-{number}") for number in range(3)]
    assert sorted(child.wait() for child in children) == [0, 2, 2]
    assert Run.open(tmp_path / "run").status == "done"
    assert names(tmp_path) == ["log-0", "log-1", "log-2", "run"]


def test_of_two_comparisons_in_one_folder_the_second_is_refused(tmp_path, teacher):
    with runs.working_in(tmp_path / "out"):
        words = ["compare", "--teachers", teacher, "--out", tmp_path / "out", *OPTIONS]
        code, said = call(potstill, *words, output=tmp_path / "log")
    assert code == 2
    assert f"{tmp_path / 'out'} is in use by process {os.getpid()} " in said
    assert not (tmp_path / "out").exists()  # nothing came of it


def take(lock: Path, told: list) -> None:
    """Puts another's lock in the place of one, as who has removed it as stale would."""
    lock.unlink()
    told.append(runs._try_lock(lock))
    lock.write_text(lock.read_text().replace(runs._NONCE, "another's"))


def test_a_run_that_has_lost_its_lock_saves_beside_and_says_where(tmp_path, teacher, monkeypatch):
    whole, run = (small_run("cartpole", teacher, tmp_path / name) for name in ("whole", "run"))
    told = []
    with monkeypatch.context() as patch:
        at(LINE, 2, lambda: take(run.lock_path, told), patch=patch.setattr)
        with pytest.raises(InputError, match=r"was taken over by process \d+ .*: continue it with") as error:
            execute(run, RUNTIME)
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    beside = Run.open(Path(str(error.value).rpartition("--resume ")[2]))
    execute(whole, RUNTIME)
    execute(beside, RUNTIME)
    assert outcome(beside) == outcome(whole)
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before
    told[0].close()


def record_slowly(path: Path) -> None:
    real = teacher_data.record

    def slow(*words: object):
        for progress in real(*words):
            (path / "recording").touch()
            time.sleep(1000)
            yield progress

    teacher_data.record = slow
    go_on(path)


def test_of_two_students_that_want_the_same_data_one_records_and_the_other_waits_and_takes_over(teacher, tmp_path):
    first, second = (small_run("teacher", teacher, tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    recording = Child(record_slowly, first.path, output=tmp_path / "first")
    until((first.path / "recording").exists)
    waiting = Child(go_on, second.path, output=tmp_path / "second")
    until(second.lock_path.exists)
    time.sleep(0.5)
    assert len(names(tmp_path / "data")) == 2  # one recording and its lock
    assert not second.metrics_path.exists()
    recording.send_signal(signal.SIGKILL)
    recording.wait()
    assert waiting.wait() == 0
    data = names(tmp_path / "data")
    assert len(data) == 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    assert call(go_on, first.path, output=tmp_path / "first")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before


@pytest.mark.parametrize(("name", "expected"), [("teacher", "record"), ("student", "distill"), ("cartpole", "steps")])
def test_a_lock_gets_signs_of_life_whatever_a_run_does(name, expected, teacher, tmp_path, monkeypatch):
    run = small_run(name, teacher, tmp_path / "run")
    if name != "teacher":  # its games so far will be played again
        assert call(go_on, run.path, LINE, 1, signal.SIGTERM, output=tmp_path / "log")[0] == 143
    signs = Counter()

    def watch(module, phase):
        generator = getattr(module, phase)

        def watched(*words, **options):
            for progress in generator(*words, **options):
                os.utime(run.lock_path, (0, 0))
                yield progress
                signs[phase] += run.lock_path.stat().st_mtime > 0

        monkeypatch.setattr(module, phase, watched)

    phases = {"record": teacher_data, "distill": sys.modules["potstill.distill"], "steps": ppo.PPO, "play": evaluation}
    for phase, module in phases.items():
        watch(module, phase)
    execute(run, RUNTIME, EvalConfig(episodes=2))
    # The last yield of each is followed by none. 4 of a recording; 1 again and 3 more lines; 65 steps of 8 games.
    assert signs[expected] >= {"record": 3, "distill": 3, "steps": 64}[expected]
    assert signs["play"] >= 2
