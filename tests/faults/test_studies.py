"""Workers and drivers of a study killed, stopped, starved of memory: nothing lost, and the others go on."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from processes import Child, Here, call, fill, until, warm

from potstill.errors import InputError
from potstill.storage.runs import Run, is_alive
from potstill.study import local
from potstill.study.execute import StudyInterrupted, open_or_create
from potstill.study.local import LocalProcess
from potstill.study.planfile import read_plan
from potstill.study.records import run_study, status
from potstill.training.runtime import Runtime

RUNTIME = Runtime(device="cpu", threads=1, quiet=True, save_every=0.0)
STUDENT, RL = "student_width-1_32_teacher-expert_seed-0", "rl_width-1_32_seed-0"
PLAN = """\
env = "cartpole"
widths = ["1/32"]
seeds = [0]
teachers = ["expert"]

[evaluation]
episodes = 4

[arms.student]
method = "distill"
total-timesteps = 2048
num-envs = 8
batch-size = 32
warmup-steps = 64

[arms.rl]
total-timesteps = 8192
num-steps = 32
"""
MEASURED = {"wall_seconds", "latency_ms", "latency_p95_ms", "command", "commit", "policy_hash", "metrics_digest"}


@pytest.fixture(scope="module")
def peace(tmp_path_factory, save_teacher):
    """The study left in peace, each run in this process."""
    folder = tmp_path_factory.mktemp("studies")
    save_teacher(folder / "expert")
    (folder / "plan.toml").write_text(PLAN)
    plan, out = read_plan(folder / "plan.toml"), folder / "peace"
    assert [ended.error for ended in run_study(plan, out, RUNTIME, start=Here, workers=1)] == [None, None]
    return SimpleNamespace(folder=folder, plan=plan, out=out, outcome=outcome(out))


def outcome(out):
    """What the records tell but for how long things took."""
    found = {}
    for path in out.glob("*_*.json"):
        record = {key: value for key, value in json.loads(path.read_bytes()).items() if key not in MEASURED}
        record["curve"] = [{k: v for k, v in point.items() if k != "seconds"} for point in record["curve"]]
        found[path.stem] = record
    return found


def disturbed(deeds):
    """A study's `start`: what `deeds` has for a run is done to its first worker once that has saved."""
    left = dict(deeds)

    def start(run, runtime, eval_config, data):
        process = LocalProcess(run, runtime, eval_config, data)
        poll, name = process.poll, run.path.name

        def poll_and_disturb():
            if name in left and poll() is None and run.resume_path.exists() and run.status == "running":
                left.pop(name)(process)
            return poll()

        process.poll = poll_and_disturb
        return process

    return start


def words(plan, out, workers):
    """A study's command line."""
    options = ["--workers", workers, "--quiet", "--device", "cpu", "--save-every", "0"]
    return ["study", "run", plan, "--out", out, *options]


def test_a_killed_and_a_hung_worker_are_named_and_go_on_from_their_last_save(peace, tmp_path, capfd):
    told = {}

    def kill(process):
        before = status(peace.plan, tmp_path)
        process.process.kill()
        process.process.wait()
        told["killed"] = (before, status(peace.plan, tmp_path), process.run.lock_path.exists())

    def stop(process):
        """Stops a worker; from here on a quarter of an hour seems to have passed without a sign of life."""
        os.kill(process.process.pid, signal.SIGSTOP)
        told["stopped"] = status(peace.plan, tmp_path)
        process.last_sign = lambda: LocalProcess.last_sign(process) - 900

    start = disturbed({RL: kill, STUDENT: stop})
    assert [ended.error for ended in run_study(peace.plan, tmp_path, RUNTIME, workers=2, start=start)] == [None, None]
    lines = capfd.readouterr().err.splitlines()
    assert f"study  {RL}: killed by SIGKILL; started again" in lines
    assert f"study  {STUDENT}: no sign of life for 900 s; started again" in lines
    assert outcome(tmp_path) == peace.outcome
    before, after, locked = told["killed"]
    assert locked  # by nobody who lives
    assert (after["running"], after["interrupted"]) == (before["running"] - 1, before["interrupted"] + 1)
    assert told["stopped"]["running"] >= 1


def test_a_run_whose_directory_vanishes_is_made_again(peace, tmp_path, capfd):
    # Moved away, which takes one moment: while it is emptied file by file its worker may put another one there.
    start = disturbed({RL: lambda process: process.run.path.rename(tmp_path / "gone")})
    assert [ended.error for ended in run_study(peace.plan, tmp_path, RUNTIME, workers=1, start=start)] == [None, None]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"study  {RL}: exit code 1")
    assert line.endswith("; started again")
    assert outcome(tmp_path) == peace.outcome


def test_a_log_that_is_a_link_is_not_written_through_and_the_other_runs_go_on(peace, tmp_path):
    run = open_or_create(peace.plan.specs()[0], tmp_path / "runs", RUNTIME)
    (tmp_path / "theirs").touch()
    (run.path / "log.txt").symlink_to(tmp_path / "theirs")
    refused, done = run_study(peace.plan, tmp_path, RUNTIME, workers=1)
    assert refused.error == f"cannot write {run.path / 'log.txt'}: too many levels of symbolic links"
    assert (done.spec.name, done.error) == (RL, None)
    assert status(peace.plan, tmp_path)["failures"] == {STUDENT: refused.error}
    assert (tmp_path / "theirs").read_bytes() == b""


def test_a_disk_that_fills_up_under_a_study_stops_it_and_with_room_again_it_goes_on(peace, disk, tmp_path):
    out = disk / "out"
    driver = Child(warm, *words(peace.folder / "plan.toml", out, 1), output=tmp_path / "log")
    until((out / "runs" / RL / "resume.safetensors").exists, 100)
    fill(disk)
    full = "no space left on device; nothing was changed"
    assert driver.wait() == 2
    assert driver.said.splitlines()[-1] == f"potstill: cannot write {out / RL}.json: {full}"
    before = (out / f"{STUDENT}.json").read_bytes()
    (disk / "full").unlink()
    assert [ended.error for ended in run_study(peace.plan, out, RUNTIME, workers=1, start=Here)] == [None]
    assert (out / f"{STUDENT}.json").read_bytes() == before
    assert outcome(out) == peace.outcome


def test_a_worker_that_never_shows_life_is_killed_and_named(peace, tmp_path, monkeypatch):
    sleeper = [sys.executable, "-c", "import time; time.sleep(100)"]
    monkeypatch.setattr(local, "launch", lambda *_: subprocess.Popen(sleeper))
    ended = list(run_study(peace.plan, tmp_path, RUNTIME, retries=0, patience=1))
    assert [each.error for each in ended] == ["no sign of life for 1 s"] * 2
    assert outcome(tmp_path)[RL]["error"] == "no sign of life for 1 s"
    assert set(status(peace.plan, tmp_path)["failures"].values()) == {"no sign of life for 1 s"}


def with_little_memory(*words):
    resource.setrlimit(resource.RLIMIT_DATA, (1_500_000 << 10, resource.RLIM_INFINITY))
    warm(*words)


def test_a_run_without_memory_is_named_and_tried_again_and_the_others_finish(peace, tmp_path):
    hungry = PLAN.replace("total-timesteps = 2048", "total-timesteps = 100_000_000\nbuffer-size = 100_000_000")
    (peace.folder / "hungry.toml").write_text(hungry)
    ended = call(with_little_memory, *words(peace.folder / "hungry.toml", tmp_path, 2), output=tmp_path / "log")
    why = "exit code 1: potstill: out of memory: Unable to allocate"
    assert ended[0] == 1
    first, counted, reason = [line for line in ended[1].splitlines() if STUDENT in line or "failed" in line]
    assert first.startswith(f"study  {STUDENT}: {why}")
    assert first.endswith("; started again")
    assert counted == "potstill: 1 of 2 runs failed (see log.txt there):"
    assert reason.startswith(f"  {STUDENT}: {why}")
    records = outcome(tmp_path)
    assert (records[STUDENT]["status"], records[STUDENT]["error"].startswith(why)) == ("failed", True)
    assert records[RL] == peace.outcome[RL]
    report = status(read_plan(peace.folder / "hungry.toml"), tmp_path)
    assert (report["done"], report["failed"], list(report["failures"])) == (1, 1, [STUDENT])


def test_workers_of_a_killed_study_save_and_stop_and_the_next_call_runs_what_is_left(peace, tmp_path):
    run, record = tmp_path / "runs" / RL, tmp_path / f"{STUDENT}.json"
    driver = Child(warm, *words(peace.folder / "plan.toml", tmp_path, 1), output=tmp_path / "log")
    try:
        until((run / "resume.safetensors").exists, 100)
        worker = json.loads((run / "run.lock").read_text())["pid"]
        assert status(peace.plan, tmp_path)["running"] == 1
    finally:
        driver.kill()
        driver.wait()
    until(lambda: not is_alive(worker))  # whoever its parent is now may not have waited for it yet
    assert "stopped by SIGTERM" in (run / "log.txt").read_text()
    report = status(peace.plan, tmp_path)
    assert (report["done"], report["interrupted"], report["running"]) == (1, 1, 0)
    written = record.stat().st_mtime_ns
    (ended,) = run_study(peace.plan, tmp_path, RUNTIME, workers=1, start=Here)
    assert (ended.spec.name, ended.error) == (RL, None)
    assert record.stat().st_mtime_ns == written
    assert outcome(tmp_path) == peace.outcome
    assert not [path for pattern in ("run.lock", ".*.tmp", "resume.*") for path in tmp_path.rglob(pattern)]


def test_what_a_worker_of_a_killed_study_still_holds_is_waited_for(peace, tmp_path):
    first = open_or_create(peace.plan.specs()[0], tmp_path / "runs", RUNTIME)
    ended = run_study(peace.plan, tmp_path, RUNTIME, workers=1, start=Here)  # to begin a run that is held is refused
    with first.lock():
        assert next(ended).spec.name == RL
    assert next(ended).spec.name == STUDENT
    assert list(ended) == []
    assert outcome(tmp_path) == peace.outcome


def test_a_worker_that_does_not_stop_when_asked_does_not_keep_the_study_from_stopping(peace, tmp_path, monkeypatch):
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(100)"
    deaf = []

    def launch(*_):
        deaf.append(subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE))
        deaf[-1].stdout.readline()
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return deaf[-1]

    monkeypatch.setattr(local, "launch", launch)
    with pytest.raises(StudyInterrupted):
        list(run_study(peace.plan, tmp_path, RUNTIME, workers=1, patience=2))
    deaf[0].stdout.close()
    assert [process.returncode for process in deaf] == [-signal.SIGKILL]


def test_a_result_whose_study_was_killed_before_it_was_recorded_is_recorded_and_not_run_again(peace, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(peace.out, out)
    (out / f"{RL}.json").unlink()
    left = [out / "runs" / RL / name for name in ("resume.safetensors", ".result.json.0.tmp", "run.lock", "games.json")]
    left.append(out / f".{RL}.json.0.tmp")
    for path in left:
        path.write_text('{"pid": 4194305, "host": "', "ascii")
    os.utime(left[2], (0, 0))
    (ended,) = run_study(peace.plan, out, RUNTIME, start=None)
    assert (ended.spec.name, ended.error) == (RL, None)
    assert outcome(out) == peace.outcome
    assert not any(path.exists() for path in left)


def test_a_directory_that_a_killed_study_had_only_just_made_is_used_and_any_other_is_left(peace, tmp_path):
    spec = peace.plan.specs()[0]
    (tmp_path / STUDENT).mkdir()
    (tmp_path / STUDENT / ".config.json.0.tmp").write_text("{")
    assert Run.open(open_or_create(spec, tmp_path, RUNTIME).path).status == "new"
    assert sorted(path.name for path in (tmp_path / STUDENT).iterdir()) == ["config.json"]
    (tmp_path / STUDENT / "config.json").rename(tmp_path / STUDENT / "notes.txt")
    with pytest.raises(InputError, match="is not a run directory: it has no config"):
        open_or_create(spec, tmp_path, RUNTIME)
    assert (tmp_path / STUDENT / "notes.txt").exists()


def test_the_reason_of_a_failure_is_known_before_it_is_recorded(peace, tmp_path):
    run = open_or_create(peace.plan.specs()[0], tmp_path / "runs", RUNTIME)
    run.write_result({"status": "failed", "kind": "distill", "error": "the loss is not finite"})
    assert status(peace.plan, tmp_path)["failures"] == {STUDENT: "the loss is not finite"}
