"""A disk that is full, a folder that may not be written or is gone: one clear line, old data intact, and on it goes."""

import ctypes
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from processes import OPTIONS, SUDO, at, call, fill, go_on, names, potstill
from small_runs import RUNTIME, outcome, small_run

from potstill.errors import InputError
from potstill.storage import checkpoints
from potstill.storage.runs import Run
from potstill.training.trainer import execute

PLACES = {
    "the save": "potstill.storage.checkpoints.save",
    "the policy": "potstill.training.trainer.save_policy",
    "the result": "potstill.storage.runs.Run.write_result",
}
FILES = {"the save": "resume.safetensors", "the policy": "policy.safetensors", "the result": "result.json"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["cartpole", "student"])
@pytest.mark.parametrize("what", PLACES)
def test_a_disk_that_fills_up_is_one_line_and_with_room_again_the_run_ends_the_same(
    name, what, teacher, disk, tmp_path, monkeypatch
):
    whole = small_run(name, teacher, tmp_path / "whole")
    execute(whole, RUNTIME)
    run = small_run(name, teacher, disk / "run")
    before = {}

    def fill_now() -> None:
        before.update(contents(run.path))
        fill(disk)

    at(PLACES[what], 3 if what == "the save" else 1, fill_now, patch=monkeypatch.setattr)
    with pytest.raises(InputError) as error:
        execute(run, RUNTIME)
    monkeypatch.undo()
    file = run.path / FILES[what]
    assert str(error.value) == f"cannot write {file}: no space left on device; nothing was changed"
    assert contents(run.path) == {key: value for key, value in before.items() if key != "run.lock"}
    fill(disk)  # what the lock took is free again
    with pytest.raises(InputError, match=f"cannot lock {run.path}: no space left on device"):
        execute(run, RUNTIME)
    (disk / "full").unlink()
    execute(run, RUNTIME)
    assert outcome(run) == outcome(whole)


def test_a_line_of_metrics_that_a_full_disk_tears_is_written_again(disk, tmp_path, monkeypatch):
    whole, run = (small_run("cartpole", tmp_path, folder / "run") for folder in (tmp_path, disk))
    execute(whole, RUNTIME)

    def leave_a_few_bytes() -> None:
        with open(run.metrics_path, "ab") as file:  # up to the end of a page: the next line needs another
            file.write(b'{"step": 512, "pad": "' + b" " * (4070 - run.metrics_path.stat().st_size) + b'"}\n')
        fill(disk)

    at("potstill.telemetry.Metrics.write", 2, leave_a_few_bytes, patch=monkeypatch.setattr)
    with pytest.raises(InputError, match=r"cannot write .*metrics.jsonl: no space left .*; earlier lines are intact"):
        execute(run, RUNTIME)
    monkeypatch.undo()
    lines = run.metrics_path.read_bytes().split(b"\n")
    run.metrics_path.write_bytes(b"\n".join([lines[0], *lines[2:]]))  # the padding goes, the torn line stays
    (disk / "full").unlink()
    execute(run, RUNTIME)
    assert outcome(run) == outcome(whole)


def test_a_data_set_that_does_not_fit_is_one_line_before_it_is_recorded(teacher, disk, tmp_path):
    words = ["distill", teacher, "--lead", "teacher", "--total-timesteps", "200000", "--out", disk / "run", *OPTIONS]
    code, said = call(potstill, *words, output=tmp_path / "log")
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith(f"potstill: cannot record 200,000 states in {disk / 'data'}/CartPole-v1-")
    assert said.endswith(": no space left on device\n")
    assert names(disk / "data") == []
    assert Run.open(disk / "run").status == "new"


def test_a_run_is_not_half_made_on_a_full_disk(disk, tmp_path):
    fill(disk)
    code, said = call(potstill, "train", "--env", "cartpole", "--out", disk / "run", *OPTIONS, output=tmp_path / "log")
    assert (code, said) == (2, f"potstill: cannot make {disk / 'run'}: no space left on device; choose another --out\n")
    assert names(disk) == ["full"]


@pytest.mark.parametrize("name", ["cartpole", "student"])
def test_a_limit_of_file_sizes_is_one_clear_line_too_and_what_was_saved_stands(name, teacher, tmp_path):
    whole, run = (small_run(name, teacher, tmp_path / out) for out in ("whole", "run"))
    execute(whole, RUNTIME)
    assert (
        call(go_on, run.path, "potstill.telemetry.Metrics.write", 1, signal.SIGTERM, output=tmp_path / "log")[0] == 143
    )
    before = contents(run.path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["resume.safetensors"]), hard))
    try:
        with pytest.raises(InputError) as error:
            execute(run, RUNTIME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == f"cannot write {run.resume_path}: file too large; nothing was changed"
    after = contents(run.path)
    assert after.pop("metrics.jsonl").startswith(before.pop("metrics.jsonl"))
    assert after == before
    execute(run, RUNTIME)
    assert outcome(run) == outcome(whole)


def give_up_roots_rights() -> None:
    """Permissions count for root too, once it has dropped CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b110
    assert libc.capset(header, sets) == 0


def forbid_and_go_on(path: Path) -> None:
    give_up_roots_rights()
    at("potstill.storage.checkpoints.save", 2, lambda: path.chmod(0o500))
    potstill("train", "--resume", path, *OPTIONS)


def train_without_rights(out: Path) -> None:
    give_up_roots_rights()
    potstill("train", "--env", "cartpole", "--out", out, *OPTIONS)


def test_a_folder_that_may_not_be_written_any_more_is_one_line_and_the_run_goes_on_when_it_may(tmp_path):
    whole, run = (small_run("cartpole", tmp_path, tmp_path / out) for out in ("whole", "run"))
    execute(whole, RUNTIME)
    code, said = call(forbid_and_go_on, run.path, output=tmp_path / "log")
    run.path.chmod(0o700)
    assert (code, said) == (2, f"potstill: cannot write {run.resume_path}: permission denied; nothing was changed\n")
    assert checkpoints.load(run.resume_path)[1]["update"] == 1
    assert run.status == "interrupted"
    execute(run, RUNTIME)
    assert outcome(run) == outcome(whole)


def test_a_folder_that_may_not_be_written_at_all_is_one_line(tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o500)
    code, said = call(train_without_rights, tmp_path / "theirs" / "run", output=tmp_path / "log")
    assert (code, said.count("\n")) == (2, 1)
    assert f"cannot make {tmp_path / 'theirs' / 'run'}: permission denied; choose another --out" in said
    assert names(tmp_path / "theirs") == []


def test_a_read_only_disk_is_one_line_and_its_run_is_as_it_was(disk, tmp_path):
    run = small_run("cartpole", tmp_path, disk / "run")
    subprocess.run([*SUDO, "mount", "-o", "remount,ro", str(disk)], check=True)
    code, said = call(potstill, "train", "--resume", run.path, *OPTIONS, output=tmp_path / "log")
    assert (code, said) == (2, f"potstill: cannot lock {run.path}: read-only file system\n")


def vanish_and_go_on(path: Path) -> None:
    at("potstill.storage.checkpoints.save", 2, lambda: shutil.rmtree(path), after=True)
    potstill("train", "--resume", path, *OPTIONS)


def test_a_folder_that_vanishes_is_one_line(tmp_path):
    run = small_run("cartpole", tmp_path, tmp_path / "run")
    code, said = call(vanish_and_go_on, run.path, output=tmp_path / "log")
    assert (code, said) == (2, f"potstill: {run.path} has vanished: this process stops, and what was there is lost\n")
    assert not run.path.exists()
