"""On a real Ray, started here."""

import json
import os
import signal
import subprocess
import tempfile
import threading
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from potstill.errors import InputError
from potstill.study import cluster
from potstill.study.execute import StudyInterrupted
from potstill.study.planfile import read_plan
from potstill.study.records import run_study
from potstill.study.remote import KEPT, RemoteRun
from potstill.training.runtime import Runtime

pytestmark = pytest.mark.timeout(300)

RUNTIME = Runtime(device="cpu", quiet=True, save_every=0.0)
PLAN = """\
env = "cartpole"
widths = ["1/32"]
seeds = [0]
teachers = ["expert"]

[evaluation]
episodes = 4

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
LONG = """\
env = "cartpole"
widths = ["1/32"]
seeds = [0]

[evaluation]
episodes = 4

[arms.rl]
total-timesteps = 81920
"""
SAME = ("score", "returns", "env_steps", "gradient_steps", "training_macs", "identity", "starts", "teacher_score")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_teacher):
    folder = tmp_path_factory.mktemp("cluster")
    save_teacher(folder / "expert")
    return folder


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    """The temporary folder of the machines, in which runs leave something while they go on."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", tempfile.gettempdir())  # whose sockets must have short names
        patch.setenv("TMPDIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def two_machines(temporary):
    """Two nodes of one CPU each, in one process group here; the first is the head."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = nodes.add_node(num_cpus=1)
    assert cluster.connect(nodes.address) == 2
    yield nodes, second
    ray.shutdown()
    nodes.shutdown()


def plan_of(folder, text, name):
    (folder / f"{name}.toml").write_text(text)
    return read_plan(folder / f"{name}.toml")


def records(out):
    return {path.stem: json.loads(path.read_bytes()) for path in out.glob("*_*.json")}


def on_ray(plan, out, **options):
    return list(run_study(plan, out, RUNTIME, workers=2, start=cluster.RemoteProcess, **options))


def wait_for(path, seconds=200.0):
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.exists()


def test_a_study_on_two_machines_comes_to_the_same_records_as_here(folder, two_machines, temporary, tmp_path):
    plan = plan_of(folder, PLAN, "small")
    assert [ended.error for ended in on_ray(plan, tmp_path / "ray")] == [None, None]
    list(run_study(plan, tmp_path / "here", RUNTIME, workers=1))
    there, here = records(tmp_path / "ray"), records(tmp_path / "here")
    assert there.keys() == here.keys()
    for name in here:
        assert {key: there[name].get(key) for key in SAME} == {key: here[name].get(key) for key in SAME}
    assert list(temporary.glob("potstill-*")) == []


def test_a_save_between_two_looks_never_brings_a_state_without_its_metrics(monkeypatch):
    run, saved, look = RemoteRun(), [], RemoteRun._version
    run.path.mkdir()

    def save():
        saved.append(len(saved))
        with (run.path / "metrics.jsonl").open("a") as metrics:
            metrics.write(f"{saved[-1]}\n")
        (run.path / "resume.safetensors").write_text(str(saved[-1]))
        (run.path / "games.json").write_text(str(saved[-1]))

    def look_while_it_saves(run, name):
        found = look(run, name)
        save()
        return found

    save()
    monkeypatch.setattr(RemoteRun, "_version", look_while_it_saves)
    here = {}
    run.process = subprocess.Popen(["sleep", "100"], stdin=subprocess.PIPE)
    try:
        for _ in range(20):
            code, files, _ = run.poll()
            here |= files
            assert code is None
            assert int(here["metrics.jsonl"].splitlines()[-1]) >= int(here["resume.safetensors"])
            assert list(files) == [name for name in KEPT if name in files]
        assert int(here["games.json"]) > 0  # what was played is not lost with the machine
    finally:
        run.close()
    assert not run.folder.exists()


def test_what_a_branch_goes_on_from_comes_back_once_with_the_metrics_it_counts_on():
    run = RemoteRun()
    run.path.mkdir()
    run.process = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    try:
        for name in ("branch-1_8.safetensors", "metrics.jsonl", "resume.safetensors"):
            (run.path / name).write_bytes(b"1")
        seen = [list(run.poll()[1]) for _ in range(2)]
    finally:
        run.close()
    assert seen == [["metrics.jsonl", "branch-1_8.safetensors", "resume.safetensors"], []]


def test_a_cluster_that_does_not_answer_is_refused():
    with pytest.raises(InputError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        cluster.connect("127.0.0.1:1")


def test_the_process_of_a_stopped_study_leaves_nothing_behind(folder, two_machines, temporary, tmp_path):
    plan = plan_of(folder, LONG.replace("81920", "100_000_000"), "endless")
    generator = run_study(plan, tmp_path / "ray", RUNTIME, workers=1, start=cluster.RemoteProcess)
    resume = tmp_path / "ray/runs/rl_width-1_32_seed-0/resume.safetensors"

    looks = []

    def interrupt():
        wait_for(resume)
        looks.append(list(temporary.glob("potstill-*/run")))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(StudyInterrupted):
        list(generator)
    assert resume.exists()
    assert len(looks[0]) == 1  # this is where it would be left
    assert list(temporary.glob("potstill-*")) == []
