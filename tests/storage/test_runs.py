import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from potstill.errors import InputError
from potstill.storage import runs
from potstill.storage.runs import LockLostError, Run, config_hash, next_directory, read_document, stop_on_signals


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", {"seed": 0})


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write_lock(run: Run, **changes: object) -> None:
    """A lock file that no process has locked."""
    holder = {"pid": os.getpid(), "host": "here", "machine": runs._machine(), "nonce": "0", "started": "then"}
    run.lock_path.write_text(json.dumps(holder | {"born": runs._born(os.getpid())} | changes))


@pytest.fixture
def no_flock(monkeypatch):
    """A file system without kernel locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr("fcntl.flock", refuse)


def age_lock(run: Run, seconds: float) -> None:
    os.utime(run.lock_path, (time.time() - seconds,) * 2)


def test_a_created_run_opens_as_it_was_created(tmp_path):
    created = Run.create(tmp_path / "a" / "b", {"sizes": (1, 2), "env": {"name": "pong"}})
    assert created.config == {"sizes": [1, 2], "env": {"name": "pong"}}
    assert Run.open(tmp_path / "a" / "b") == created
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["config.json"]


def test_an_existing_directory_or_file_is_never_used(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "link"):
        with pytest.raises(InputError, match=f"{name} exists: choose another --out$"):
            Run.create(tmp_path / name, {})
    assert (tmp_path / "file").read_text() == "mine"
    assert not list((tmp_path / "folder").iterdir())


def test_resuming_is_offered_where_there_is_something_to_resume(run):
    run.resume_path.touch()
    with pytest.raises(InputError, match=f"choose another --out, or continue it with --resume {run.path}"):
        Run.create(run.path, {})
    run.write_result({"status": "done"})
    with pytest.raises(InputError, match=r"choose another --out$"):
        Run.create(run.path, {})


def test_a_parent_that_is_a_file_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot make .*run: .*choose another --out"):
        Run.create(tmp_path / "file" / "run", {})


def test_a_parent_that_may_not_be_written_is_one_clear_line(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"cannot make .*run: permission denied; choose another --out"):
        Run.create(tmp_path / "run", {})


def test_a_full_disk_leaves_no_half_made_run(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match=r"cannot make .*new/run: no space left on device"):
        Run.create(tmp_path / "runs" / "of" / "new" / "run", {})
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]  # of the parents those that were there


def test_a_config_that_is_not_strict_json_makes_no_directory(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        Run.create(tmp_path / "run", {"rate": float("inf")})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.touch(), "is a file, not a run directory"),
        (lambda path: path.mkdir(), "has no config.json"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text('{"se')), "config.json is damaged"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("[]")), "config.json is damaged"),
    ],
)
def test_what_is_not_a_run_says_what_is_missing(tmp_path, make, message):
    make(tmp_path / "run")
    with pytest.raises(InputError, match=message):
        Run.open(tmp_path / "run")


def test_a_fresh_directory_is_never_one_that_exists(tmp_path, monkeypatch):
    class Stopped(runs.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 11, 22, 16, 5, 10)

    monkeypatch.setattr(runs, "datetime", Stopped)
    names = []
    for _ in range(3):
        path = next_directory(tmp_path / "pong_run", "seed-0")
        path.mkdir(parents=True)
        names.append(path.name)
    stamp = "2026-11-22T16-05-10_seed-0"
    assert names == [stamp, f"{stamp}_2", f"{stamp}_3"]


def test_a_life_is_new_running_interrupted_and_done(run):
    assert run.status == "new"
    with run.lock():
        assert run.status == "running"
        run.resume_path.touch()
        assert run.status == "running"
    assert run.status == "interrupted"
    run.write_result({"status": "done", "score": 20.5})
    assert run.status == "done"
    run.write_result({"status": "failed", "error": "loss is not finite"})
    assert run.status == "failed"


def test_the_lock_of_a_dead_process_is_no_life(run):
    write_lock(run, pid=dead_pid())
    assert run.status == "new"


@pytest.mark.parametrize("record", [{}, {"status": "running"}])
def test_a_result_without_an_outcome_is_refused(run, record):
    with pytest.raises(ValueError, match="status must be 'done' or 'failed'"):
        run.write_result(record)
    run.result_path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="should be 'done' or 'failed'"):
        run.status  # noqa: B018


def test_a_result_that_is_not_strict_json_leaves_the_older_one(run):
    run.write_result({"status": "done", "score": 1.0})
    with pytest.raises(ValueError, match="Out of range float"):
        run.write_result({"status": "done", "score": float("nan")})
    assert read_document(run.result_path) == {"format": 1, "status": "done", "score": 1.0}


def test_the_lock_is_given_back_after_an_error(run):
    with pytest.raises(ZeroDivisionError), run.lock():
        1 / 0  # noqa: B018
    assert not run.lock_path.exists()


def test_a_process_cannot_lock_twice(run):
    with run.lock():
        with pytest.raises(InputError, match="in use"), run.lock():
            pass
        assert run.lock_path.exists()


def test_the_lock_of_a_dead_process_is_taken_over(run):
    write_lock(run, pid=dead_pid(), started="x" * 1000)
    with run.lock():
        assert json.loads(run.lock_path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("left", [{}, {"host": "elsewhere", "machine": "other"}, {"born": None}])
def test_a_lock_file_that_no_process_has_locked_is_no_lock_whatever_it_says_and_however_young(run, left):
    write_lock(run, **left)
    assert run.status == "new"
    with run.lock():
        assert run.status == "running"


def test_a_lock_is_held_whatever_the_host_is_called_and_the_clock_says(run, monkeypatch):
    with run.lock():
        age_lock(run, 1e6)
        monkeypatch.setattr(socket, "gethostname", lambda: "renamed")
        run.touch_lock()
        assert run.status == "running"
        with pytest.raises(InputError, match="in use by process"), run.lock():
            pass
    assert not run.lock_path.exists()


def test_a_lock_ends_with_its_process(run):
    script = "import os, sys; from pathlib import Path; from potstill.storage.runs import Run\n"
    script += "with Run(Path(sys.argv[1]), {}).lock(): print(flush=True); sys.stdin.read(); os._exit(9)"
    with subprocess.Popen([sys.executable, "-c", script, run.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as p:
        p.stdout.readline()
        assert run.status == "running"
        p.stdin.close()
        os.waitid(os.P_PID, p.pid, os.WEXITED | os.WNOWAIT)  # a zombie, for nobody has waited for it
        assert run.lock_path.exists()
        assert run.status == "new"


def test_who_only_looks_refuses_nobody(run, monkeypatch):
    run.lock_path.touch()
    with open(run.lock_path, "rb") as looker:
        assert runs._flock(looker, shared=True)
        monkeypatch.setattr(runs.time, "sleep", lambda _: looker.close())
        with run.lock():
            assert run.status == "running"


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")


@needs_proc
def test_without_kernel_locks_a_process_holds_its_lock_while_it_lives(run, no_flock):
    with run.lock():
        assert run.status == "running"
        with pytest.raises(InputError, match="in use by process"), run.lock():
            pass
    write_lock(run, pid=dead_pid())
    assert run.status == "new"
    with run.lock():
        assert json.loads(run.lock_path.read_text())["pid"] == os.getpid()


@needs_proc
def test_without_kernel_locks_a_process_that_got_the_pid_of_a_dead_holder_is_not_taken_for_it(run, no_flock):
    write_lock(run, pid=os.getppid(), born=runs._born(os.getppid()))
    assert run.status == "running"
    write_lock(run, pid=os.getppid(), born=runs._born(os.getppid()) - 1)
    assert run.status == "new"


@needs_proc
def test_without_kernel_locks_a_killed_holder_that_nobody_has_waited_for_is_dead(run, no_flock):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    write_lock(run, pid=process.pid, born=runs._born(process.pid))
    assert run.status == "running"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert run.status == "new"
    process.wait()


@pytest.mark.parametrize("machine", ["another boot", None])
def test_without_kernel_locks_another_machine_holds_its_lock_until_the_grace_has_passed(run, no_flock, machine):
    write_lock(run, pid=dead_pid(), host="elsewhere", machine=machine)
    age_lock(run, 550)
    with pytest.raises(InputError, match="on elsewhere"), run.lock():
        pass
    age_lock(run, 650)
    assert run.status == "new"
    with run.lock():
        pass


@pytest.mark.parametrize("text", ["", '{"pid": 1', "[]", '{"pid": 0, "host": "a", "started": "b", "born": null}'])
def test_without_kernel_locks_a_torn_lock_is_respected_while_young_and_taken_over_when_old(run, no_flock, text):
    run.lock_path.write_text(text)
    with pytest.raises(InputError, match="in use by a process"), run.lock():
        pass
    age_lock(run, 15)
    assert run.status == "running"
    age_lock(run, 25)
    with run.lock():
        pass


def test_touching_the_lock_is_a_sign_of_life(run):
    with run.lock():
        age_lock(run, 650)
        run.touch_lock()
        assert time.time() - run.lock_path.stat().st_mtime < 60


def test_a_holder_whose_lock_was_taken_stops_and_leaves_that_of_the_other(run):
    with run.lock():
        run.lock_path.unlink()
        with pytest.raises(LockLostError, match=r"run.lock was removed: this process stops"):
            run.touch_lock()
        write_lock(run, pid=os.getppid())
        with open(run.lock_path, "rb") as other:
            assert runs._flock(other)
            with pytest.raises(LockLostError, match=f"taken over by process {os.getppid()} on here"):
                run.touch_lock()
    assert json.loads(run.lock_path.read_text())["pid"] == os.getppid()


def test_of_many_that_find_the_lock_of_the_dead_one_gets_it(run):
    for _ in range(5):
        write_lock(run, pid=2**22 + 1)  # beyond the largest pid of Linux
        barrier = threading.Barrier(8)

        def attempt(_: int, barrier: threading.Barrier = barrier) -> object:
            barrier.wait()
            try:
                return runs._try_lock(run.lock_path)
            except InputError:
                return None

        with ThreadPoolExecutor(8) as pool:
            got = [file for file in pool.map(attempt, range(8)) if file is not None]
        assert len(got) == 1
        got[0].close()


def test_a_directory_that_has_gone_cannot_be_locked(tmp_path):
    with pytest.raises(InputError, match="cannot lock"), Run(tmp_path / "gone", {}).lock():
        pass


def test_a_config_has_one_hash_whatever_the_order_of_its_keys():
    assert config_hash({"b": [1, 2], "a": 0.5}) == config_hash({"a": 0.5, "b": (1, 2)}) == "e6ed64e48f9b"
    assert config_hash({"a": 0.5, "b": [2, 1]}) != config_hash({"a": 0.5, "b": [1, 2]})
    assert re.fullmatch("[0-9a-f]{12}", config_hash({}))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_and_the_handlers_come_back(number):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signals() as stop:
        assert stop.requested is None
        signal.raise_signal(number)
        assert stop.requested is number
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested is number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_nothing_is_requested_and_nothing_fails():
    def work() -> object:
        with stop_on_signals() as stop:
            return stop.requested

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() is None
