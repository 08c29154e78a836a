"""On a real Ray of two machines, which run here: one of them is lost, and a study is stopped."""

import os
import signal
import tempfile
import threading
import time

import pytest
import ray
from polars.testing import assert_frame_equal
from processes import Here, until
from ray.cluster_utils import Cluster
from soak import TIMES

from potstill.results import curves_frame, episodes_frame, read_runs, runs_frame
from potstill.study import cluster
from potstill.study.execute import StudyInterrupted
from potstill.study.planfile import read_plan
from potstill.study.records import run_study, status
from potstill.study.remote import RemoteRun
from potstill.training.runtime import Runtime

pytestmark = pytest.mark.timeout(600)

RUNTIME = Runtime(device="cpu", threads=1, quiet=True, save_every=0.0)
NAMES = ("rl_width-1_32_seed-0", "student_width-1_32_teacher-expert_seed-0")
NAMES += ("finetune_width-1_32_teacher-expert_seed-0",)
LONG = NAMES[0]
PLAN = """\
env = "cartpole"
widths = ["1/32"]
seeds = [0]
teachers = ["expert"]

[evaluation]
episodes = 4

[arms.rl]
total-timesteps = 40_960
num-steps = 64

[arms.student]
method = "distill"
total-timesteps = 1024
num-envs = 8
batch-size = 32
warmup-steps = 64
value-coefficient = 0.5

[arms.finetune]
from = "student"
total-timesteps = 2048
"""
ENDLESS = PLAN.partition("[arms.student]")[0].replace("40_960", "100_000_000").replace("teachers", "# teachers")
ALONE = {"include_log_monitor": False}  # what a test's nodes need not have: each such process imports Ray
HEAD = {"num_cpus": 0, "include_dashboard": False, "no_monitor": True}


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    """The temporary folder of the machines, in which runs leave something while they go on."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", tempfile.gettempdir())  # whose sockets must have short names
        patch.setenv("TMPDIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def machines(temporary):
    """A cluster whose head runs nothing, and two machines of one CPU each."""
    nodes = Cluster(initialize_head=True, head_node_args=HEAD | ALONE)
    for _ in range(2):
        nodes.add_node(num_cpus=1, **ALONE)
    assert cluster.connect(nodes.address) == 2
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def plan_of(folder, save_teacher, text=PLAN):
    save_teacher(folder / "expert")
    (folder / "plan.toml").write_text(text)
    return read_plan(folder / "plan.toml")


def test_a_study_that_loses_a_process_and_then_its_machine_ends_with_the_same_table(
    machines, temporary, tmp_path, save_teacher, capfd, monkeypatch
):
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.2)  # so that the run may be short
    plan, out, lost = plan_of(tmp_path, save_teacher), tmp_path / "ray", []

    def start(run, runtime, eval_config, data):
        """The long run's first process is killed when a save of its has arrived, its second loses the machine."""
        began, process = time.time_ns(), cluster.RemoteProcess(run, runtime, eval_config, data)
        poll = process.poll

        def poll_and_lose():
            code = poll()
            saved = run.resume_path.exists() and run.resume_path.stat().st_mtime_ns > began
            if run.path.name == LONG and code is None and saved and len(lost) < 2 and process not in lost:
                assert status(plan, out)["running"] >= 1
                lost.append(process)
                if len(lost) == 1:
                    process._actor.stop.remote(int(signal.SIGKILL))
                else:
                    asked = process._actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
                    where = ray.get(asked)
                    (node,) = (node for node in machines.worker_nodes if node.node_id == where)
                    machines.remove_node(node, allow_graceful=False)
                    machines.add_node(num_cpus=1, **ALONE)
            return code

        process.poll = poll_and_lose
        return process

    ended = list(run_study(plan, out, RUNTIME, workers=2, start=start, retries=3))
    assert {each.spec.name: each.error for each in ended} == dict.fromkeys(NAMES)
    assert len(lost) == 2
    assert len(list(temporary.glob("potstill-*"))) <= 1  # the lost machine's own; those of runs that ended are gone
    assert capfd.readouterr().err.count(f"study  {LONG}: killed by SIGKILL") == 2
    list(run_study(plan, tmp_path / "here", RUNTIME, workers=1, start=Here))
    for frame in (runs_frame, episodes_frame, curves_frame):
        there, here = (frame(read_runs(tmp_path / name)).drop(TIMES, strict=False) for name in ("ray", "here"))
        assert_frame_equal(there, here)
    assert not [path for pattern in ("run.lock", ".*.tmp", "resume.*") for path in out.rglob(pattern)]


class Elsewhere(RemoteRun):
    """Of a module that no other machine can import."""


@pytest.mark.parametrize(
    ("what", "value", "told"),
    [
        ("environment", lambda: {"A": "\0"}, "exit code 1: on the cluster: embedded null byte"),
        ("RemoteRun", Elsewhere, "killed by SIGKILL: on the cluster: ModuleNotFoundError: No module named "),
    ],
    ids=["the process", "the actor"],
)
def test_a_worker_that_cannot_begin_says_why(what, value, told, machines, tmp_path, save_teacher, monkeypatch):
    monkeypatch.setattr(cluster, what, value)
    plan = plan_of(tmp_path, save_teacher, ENDLESS)
    options = {"workers": 1, "start": cluster.RemoteProcess, "retries": 0}
    (ended,) = run_study(plan, tmp_path / "ray", RUNTIME, **options)
    assert ended.error.startswith(told)
    assert "\n" not in ended.error


def test_the_process_of_a_stopped_study_leaves_nothing_behind(machines, temporary, tmp_path, save_teacher):
    plan = plan_of(tmp_path, save_teacher, ENDLESS)
    before, looks = set(temporary.glob("potstill-*")), []  # a lost machine leaves its own
    generator = run_study(plan, tmp_path / "ray", RUNTIME, workers=1, start=cluster.RemoteProcess)
    resume = tmp_path / "ray" / "runs" / LONG / "resume.safetensors"

    def interrupt():
        until(resume.exists, 200)
        looks.append({path.parent for path in temporary.glob("potstill-*/run")} - before)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(StudyInterrupted):
        list(generator)
    assert resume.exists()
    assert len(looks[0]) == 1  # this is where it would be left
    assert set(temporary.glob("potstill-*")) == before
