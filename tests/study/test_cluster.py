"""What goes between a study and a run on a cluster. A real Ray is in tests/faults/test_ray.py."""

import subprocess

import pytest

from potstill.errors import InputError
from potstill.study import cluster
from potstill.study.remote import KEPT, RemoteRun


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
