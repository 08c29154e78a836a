"""Where a study's workers come from, and what is seen of their ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import WARM, alive, gone, until

from potstill import imports
from potstill.envs import EnvConfig
from potstill.study import local

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each is started")
MINE = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv
gymnasium.register("Mine/Cart-v0", entry_point=CartPoleEnv)
print("imported")
"""


@pytest.fixture(params=["started", "forked"])
def server(request, monkeypatch):
    """What forks workers is started as a user's is, or forked."""
    monkeypatch.setattr(local, "_servers", [])
    monkeypatch.setattr(local, "subprocess", WARM if request.param == "forked" else subprocess)
    yield
    local._close_servers()


forked = pytest.mark.parametrize("server", ["forked"], indirect=True)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_workers_come_from_one_process_with_one_thread_and_tell_how_they_ended(server, tmp_path):
    with open(tmp_path / "log", "wb") as log:
        workers = [local._start(log, {}) for _ in range(3)]
    (process,) = [each.process for each in local._servers]
    assert {parent(parent(worker.pid)) for worker in workers} == {process.pid}
    assert len(os.listdir(f"/proc/{process.pid}/task")) == 1
    first, second, third = workers
    assert [worker.poll() for worker in workers] == [None] * 3
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(0.01)
    first.kill()
    assert first.wait() == first.returncode == -signal.SIGKILL
    second.stdin.close()
    assert second.wait() == 1
    assert (tmp_path / "log").read_text() == "potstill: the study ended before it said what to do\n"
    os.kill(parent(third.pid), signal.SIGKILL)  # who would tell of it
    assert third.wait() == -signal.SIGKILL
    first.send_signal(signal.SIGTERM)  # to nobody
    first.stdin.close()
    third.stdin.close()
    gone(third.pid)


@forked
def test_a_server_that_was_killed_is_replaced_and_its_workers_go_on(server, tmp_path):
    with open(tmp_path / "log", "wb") as log:
        worker = local._start(log, {})
        (before,) = local._servers
        os.kill(before.process.pid, signal.SIGKILL)
        until(lambda: not alive(before.process.pid))
        other = local._start(log, {})
    assert local._servers[0].process.pid != before.process.pid
    assert worker.poll() is None
    for each in (worker, other):
        each.stdin.close()
        assert each.wait() == 1


@forked
def test_what_one_study_imports_the_next_does_not_know(server, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.setattr(imports, "_named", {"mine": str(tmp_path / "mine.py")})
    assert local.check(EnvConfig("Mine/Cart-v0")) is None
    monkeypatch.setattr(imports, "_named", {})
    assert local.check(EnvConfig("Mine/Cart-v0")).startswith("no task is registered as 'Mine/Cart-v0'")


def test_each_worker_has_chances_of_its_own(server, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        f"{MINE}\nimport numpy as np\nopen('drawn', 'a').write(f'{{np.random.rand()}}\\n')"
    )
    monkeypatch.setattr(imports, "_named", {"mine": str(tmp_path / "mine.py")})
    monkeypatch.chdir(tmp_path)
    assert [local.check(EnvConfig("Mine/Cart-v0")) for _ in range(2)] == [None, None]
    first, second = (tmp_path / "drawn").read_text().split()
    assert first != second


@forked
def test_a_worker_whose_task_is_never_made_ends_when_the_study_is_stopped(server, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import os, time\nopen('pid', 'w').write(f'{os.getpid()}\\n')\ntime.sleep(60)")
    monkeypatch.setattr(imports, "_named", {"mine": str(tmp_path / "mine.py")})
    monkeypatch.chdir(tmp_path)
    pid, waited, wait = tmp_path / "pid", [], local.Forked.wait

    def stop(self, *timeout):
        waited.append(self)
        if len(waited) > 1:
            return wait(self, *timeout)
        until(lambda: pid.exists() and pid.read_text().endswith("\n"))
        raise KeyboardInterrupt

    monkeypatch.setattr(local.Forked, "wait", stop)
    with pytest.raises(KeyboardInterrupt):
        local.check(EnvConfig("Mine/Cart-v0"))
    until(lambda: not alive(int(pid.read_text())))


@forked
def test_a_server_ends_with_the_process_that_started_it(server, tmp_path):
    with open(tmp_path / "log", "wb") as log:
        worker = local._start(log, {})
    (process,) = [each.process for each in local._servers]
    began = time.monotonic()
    local._close_servers()
    assert not alive(process.pid)
    assert time.monotonic() - began < 5
    assert worker.poll() is None
    worker.stdin.close()
    assert worker.wait() == 1


def test_where_nothing_starts_it_is_said_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(local, "_servers", [])
    monkeypatch.setattr(local, "subprocess", subprocess)
    monkeypatch.setattr(local, "COMMAND", [sys.executable, "-c", "raise SystemExit(1)"])
    with (
        open(tmp_path / "log", "wb") as log,
        pytest.raises(local.InputError, match=r"no worker can be started: .*Exit"),
    ):
        local._start(log, {})
    assert not local._servers


def test_where_to_fork_is_not_safe_a_worker_is_started(monkeypatch, tmp_path):
    monkeypatch.setattr(local, "subprocess", subprocess)
    monkeypatch.setattr(sys, "platform", "darwin")
    with open(tmp_path / "log", "wb") as log:
        worker = local._start(log, {})
    assert isinstance(worker, subprocess.Popen)
    worker.communicate()
    assert worker.returncode == 1
    assert (tmp_path / "log").read_text() == "potstill: the study ended before it said what to do\n"
