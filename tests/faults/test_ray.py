"""A machine of a real Ray cluster is lost."""

import signal
import time

import pytest
import ray
from polars.testing import assert_frame_equal
from processes import Here
from ray.cluster_utils import Cluster
from soak import TIMES

from potstill.results import curves_table, episodes_table, runs_table
from potstill.study import cluster
from potstill.study.planfile import read_plan
from potstill.study.records import run_study, status
from potstill.training.runtime import Runtime

pytestmark = pytest.mark.timeout(600)

RUNTIME = Runtime(device="cpu", threads=1, quiet=True, save_every=0.0)
LONG, SHORT = "rl_width-1_32_seed-0", "student_width-1_32_teacher-expert_seed-0"
PLAN = """\
env = "cartpole"
widths = ["1/32"]
seeds = [0]
teachers = ["expert"]

[evaluation]
episodes = 4

[arms.rl]
total-timesteps = 81920

[arms.student]
method = "distill"
total-timesteps = 1024
num-envs = 8
batch-size = 32
warmup-steps = 64
"""


@pytest.fixture
def machines():
    """A cluster whose head runs nothing, and the one machine of two CPUs where everything runs."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    node = nodes.add_node(num_cpus=2)
    assert cluster.connect(nodes.address) == 2
    yield nodes, node
    ray.shutdown()
    nodes.shutdown()


def test_a_study_that_loses_a_process_and_then_its_machine_ends_with_the_same_table(
    machines, tmp_path, save_teacher, capfd
):
    nodes, node = machines
    save_teacher(tmp_path / "expert")
    (tmp_path / "plan.toml").write_text(PLAN)
    plan, out = read_plan(tmp_path / "plan.toml"), tmp_path / "ray"
    lost = []

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
                    nodes.remove_node(node, allow_graceful=False)
                    nodes.add_node(num_cpus=2)
            return code

        process.poll = poll_and_lose
        return process

    ended = list(run_study(plan, out, RUNTIME, workers=2, start=start, retries=3))
    assert {each.spec.name: each.error for each in ended} == {LONG: None, SHORT: None}
    assert len(lost) == 2
    assert capfd.readouterr().err.count(f"study  {LONG}: killed by SIGKILL") == 2
    list(run_study(plan, tmp_path / "here", RUNTIME, workers=1, start=Here))
    for table in (runs_table, episodes_table, curves_table):
        there, here = (table(tmp_path / name).drop(TIMES, strict=False) for name in ("ray", "here"))
        assert_frame_equal(there, here)
    assert not [path for pattern in ("run.lock", ".*.tmp", "resume.*") for path in out.rglob(pattern)]
