"""A save interrupted at any point: no partial file, the previous one loads, what was left half made is swept."""

import signal
from pathlib import Path

import pytest
import torch
from processes import call, go_on, names, strike
from small_runs import small_run

from potstill.errors import InputError
from potstill.results import read_runs
from potstill.storage import checkpoints
from potstill.storage.runs import Run

MOMENTS = {
    "before the write": ("os.open", 1, False),  # which opens the temporary file
    "after the open": ("os.open", 1, True),
    "between write and fsync": ("os.fsync", 1, False),
    "before the rename": ("os.replace", 1, False),
    "after the rename": ("os.replace", 1, True),
    "after the folder's fsync": ("os.fsync", 2, True),
}


def kill_at(moment: str) -> None:
    where, count, after = MOMENTS[moment]
    strike(where, count, signal.SIGKILL, after)


def save_and_die(path: Path, moment: str) -> None:
    run = Run.open(path)
    with run.lock():
        kill_at(moment)
        checkpoints.save(run.resume_path, {"w": torch.full((1000,), 2.0)}, {})


def finish_and_die(path: Path, moment: str) -> None:
    run = Run.open(path)
    with run.lock():
        kill_at(moment)
        run.write_result({"status": "done"})


def create_and_die(path: Path, where: str) -> None:
    strike(where, 1, signal.SIGKILL)
    Run.create(path, {"seed": 0})


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_process_killed_while_it_saves_leaves_the_old_checkpoint_or_the_new_and_the_next_sweeps(tmp_path, moment):
    run = Run.create(tmp_path / "run", {})
    checkpoints.save(run.resume_path, {"w": torch.full((1000,), 1.0)}, {})
    code, _ = call(save_and_die, run.path, moment, output=tmp_path / "log")
    assert code == -signal.SIGKILL
    renamed = moment.startswith("after the ") and "open" not in moment
    assert checkpoints.load(run.resume_path)[0]["w"].mean() == (2.0 if renamed else 1.0)
    left = list(run.path.glob(".*.tmp"))
    assert len(left) == (not renamed and moment != "before the write")
    assert run.status == "interrupted"
    with Run.open(run.path).lock():
        assert names(run.path) == ["config.json", "resume.safetensors", "run.lock"]


@pytest.mark.parametrize("moment", ["between write and fsync", "before the rename"])
def test_a_process_killed_while_it_writes_the_result_has_none(tmp_path, moment):
    run = Run.create(tmp_path / "run", {})
    assert call(finish_and_die, run.path, moment, output=tmp_path / "log")[0] == -signal.SIGKILL
    assert not run.result_path.exists()
    assert [record["status"] for record in read_runs(tmp_path)] == ["new"]


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.rename"])
def test_a_run_that_was_half_made_is_not_there_and_is_made_by_the_next(tmp_path, where):
    out = tmp_path / "runs" / "a"
    assert call(create_and_die, out, where, output=tmp_path / "log")[0] == -signal.SIGKILL
    assert len(names(tmp_path / "runs")) == 1
    with pytest.raises(InputError, match="holds no runs"):
        read_runs(tmp_path / "runs")
    Run.create(out, {"seed": 0})
    assert names(tmp_path / "runs") == ["a"]


def test_a_data_set_whose_recording_was_killed_is_recorded_by_the_next_and_the_rest_swept(tmp_path, teacher):
    run = small_run("teacher", teacher, tmp_path / "run")
    blow = ("potstill.buffer.Dataset.add", 100, signal.SIGKILL)
    assert call(go_on, run.path, *blow, output=tmp_path / "log")[0] == -signal.SIGKILL
    assert [Path(name).suffix for name in names(tmp_path / "data")] == [".tmp", ".lock"]
    assert call(go_on, run.path, output=tmp_path / "log")[0] == 0
    (data,) = names(tmp_path / "data")
    assert not data.startswith(".")
    assert run.status == "done"


def test_what_a_run_needs_no_more_goes_even_where_it_was_killed_as_it_finished(tmp_path):
    run = Run.create(tmp_path / "run", {"kind": "train", "config": {}})
    checkpoints.save(run.resume_path, {}, {})
    run.write_result({"status": "done"})
    assert call(go_on, run.path, output=tmp_path / "log")[0] == 1
    assert not run.resume_path.exists()
