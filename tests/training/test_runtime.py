import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch

from potstill import evaluation
from potstill.envs import EnvConfig
from potstill.networks import NetworkConfig, Policy, torch_threads
from potstill.training import runtime
from potstill.training.runtime import Runtime, provenance


@pytest.mark.parametrize(
    ("started", "command"),
    [
        ("/home/me/pong.py", "python pong.py --seed 1 --out 'a b'"),
        ("/venv/bin/potstill", "potstill --seed 1 --out 'a b'"),
        ("/venv/lib/potstill/__main__.py", "potstill --seed 1 --out 'a b'"),
    ],
)
def test_a_run_remembers_the_command_that_would_repeat_it(started, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started, "--seed", "1", "--out", "a b"])
    assert provenance(Runtime(device="cpu", threads=1))["command"] == command


def test_a_command_tells_nothing_of_where_on_a_machine_it_ran(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        f"{tmp_path}/plans/a.toml",
        "--out",
        "/scratch/me/runs",
        "--data=/scratch/me/d",
        "--width",
        "1/8",
        "-x=/a/b",
    ]
    monkeypatch.setattr(sys, "argv", ["potstill", "study", "run", *words])
    command = provenance(Runtime(device="cpu", threads=1))["command"]
    assert command == "potstill study run plans/a.toml --out runs --data=d --width 1/8 -x=b"


@pytest.mark.parametrize(("threads", "words"), [(1, ", 1 thread, cpu, "), (2, ", 2 threads, cpu, ")])
def test_a_run_remembers_how_many_threads_it_had(threads, words):
    where = provenance(Runtime(device="cpu", threads=threads))["machine"]
    assert f"({torch.backends.cpu.get_cpu_capability()}){words}" in where


def test_the_commit_is_that_of_the_checkout_and_of_no_other_around_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "venv" / "potstill" / "runtime.py"
    package.parent.mkdir(parents=True)
    package.touch()

    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me", *words], check=True)

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "a paper")
    monkeypatch.setattr(runtime, "__file__", str(package))
    commit = runtime.commit.__wrapped__  # which is asked once in a process
    assert commit() is None
    git("add", ".")
    git("commit", "--quiet", "--message", "the package itself")
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert commit() == head.stdout[:12]
    package.write_text("# changed")
    assert commit() == head.stdout[:12] + "+"


def test_the_threads_asked_for_are_the_cores_whatever_the_system(monkeypatch):
    assert Runtime(threads=3).cores == 3
    assert Runtime().cores == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert Runtime(threads=3).cores == 3
    assert Runtime().cores == os.cpu_count()


MINIBATCHES = """
import resource, torch
from potstill.training.runtime import Runtime
from potstill.networks import NetworkConfig, Policy
Runtime(device="cpu", threads=1).apply()
policy = Policy(NetworkConfig("1/8"), (4, 84, 84), 3).initialise(torch.Generator().manual_seed(0))
raw = torch.zeros((512, 4, 84, 84), dtype=torch.uint8)
for _ in range(16):
    logits, values = policy.heads(policy.prepare(raw))
    (logits.sum() + values.sum()).backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_memory_that_one_minibatch_frees_serves_the_next_without_a_page_fault():
    # A process of its own: where much has been freed before, there is memory for anything.
    done = subprocess.run([sys.executable, "-c", MINIBATCHES], capture_output=True, text=True, check=True)
    faults = np.diff([int(line) for line in done.stdout.split()])
    # Each minibatch has some 60,000 where the memory goes back to the system. One of them may still find the heap too
    # scattered for its largest tensor, which depends on where the system put the heap, and make it larger for good.
    assert np.sort(faults[-8:])[:-1].sum() < 1_000


def test_threads_of_torch_follow_the_size_of_the_network_and_what_it_reads_at_a_time(monkeypatch):
    """On a busy core, threads that wait for each other in small layers take many times as long as one."""
    computed = []
    logits_of = Policy.logits

    def logits(policy, inputs):
        computed.append(torch.get_num_threads())
        return logits_of(policy, inputs)

    monkeypatch.setattr(Policy, "logits", logits)
    torch.set_num_threads(2)
    small = Policy(NetworkConfig(), (4,), 2)
    list(evaluation.play(small, EnvConfig("CartPole-v1"), episodes=32, seed=0, threads=2))
    assert set(computed) == {1}
    assert torch.get_num_threads() == 2
    large = Policy(NetworkConfig(), (4, 84, 84), 6)  # 9.3 million multiply-adds an observation
    for batch, most, expected in ((1, 4, 1), (32, 4, 1), (256, 2, 2), (256, 16, 8)):
        with torch_threads(most, large.size().macs * batch):
            assert torch.get_num_threads() == expected


def test_torch_computes_on_one_thread_where_nobody_counted_the_work():
    torch.set_num_threads(2)
    Runtime(threads=2).apply()
    assert torch.get_num_threads() == 1
