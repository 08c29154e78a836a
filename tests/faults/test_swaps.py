"""Files of a run that are swapped, cut or changed: refused by name with what to do, or what they cost is done again."""

import json
import shutil

import pytest
from processes import call, go_on
from small_runs import RUNTIME, outcome, small_run
from test_torn_files import AFTER_TWO_LINES

from potstill.errors import InputError
from potstill.policies import load_policy, recorded_result
from potstill.results import as_record, curves_table
from potstill.storage.runs import Run
from potstill.training.trainer import execute


@pytest.fixture(scope="module")
def runs(teacher, tmp_path_factory):
    """Of two seeds: a run that was stopped after two lines, the same when whole, and a student that has not begun."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        run = small_run("cartpole", root, root / f"cut-{seed}", seed=seed)
        assert call(go_on, run.path, *AFTER_TWO_LINES, output=root / "log")[0] == 143
        shutil.copytree(run.path, root / f"whole-{seed}")
        execute(Run.open(root / f"whole-{seed}"), RUNTIME)
    for noise in (0.0, 0.3):  # each has a data set of its own
        execute(small_run("teacher", teacher, root / f"noise-{noise}", noise=noise), RUNTIME)
    small_run("teacher", teacher, root / "student-0", seed=7)  # which wants the first of them
    return root


def data_of(root):
    """The data set that `student-0` learns from."""
    (folder,) = (
        each.parent for each in root.glob("data/*/dataset.json") if json.loads(each.read_bytes())["noise"] == 0
    )
    return folder


def zero(path):
    """Sets a tenth of a file's bytes to zero, in the middle; to one where they are zero."""
    data = bytearray(path.read_bytes())
    start, length = len(data) // 2, max(1, len(data) // 10)
    zeros = bytes(length)
    data[start : start + length] = zeros if data[start : start + length] != zeros else b"\1" * length
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def empty(path):
    path.write_bytes(b"")


def gone(path):
    path.unlink()


def swap(path):
    """Puts the file of the other seed, or of the other data set, there."""
    own = path.parent
    (other,) = (each for each in own.parent.glob(f"{own.name.rpartition('-')[0]}-*") if each != own)
    shutil.copy(other / path.name, path)


def edit(key, value):
    """Sets what one key of a document says; `.` leads to a key inside."""

    def edited(path):
        document = json.loads(path.read_bytes())
        *outer, last = key.split(".")
        place = document
        for name in outer:
            place = place[name]
        assert place[last] != value
        place[last] = value
        path.write_text(json.dumps(document))

    edited.__name__ = f"edit {key}"
    return edited


@pytest.fixture
def copied(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


def go_on_with(path):
    execute(Run.open(path), RUNTIME)


def teach(path):
    recorded_result(load_policy(path))


AGAIN, SAME = "the run is begun again", "all the same"  # what comes of damage that costs work alone
FOREIGN = "resume.safetensors was saved by a run with another config.json"
CURVE = "metrics.jsonl is not the one that this run had written"
OTHERS = "metrics.jsonl is not the one that the run beside it wrote"
NOT_ITS = "config.json is not the one its result.json belongs to"
DAMAGED = "config.json is damaged"
POLICY = "is of another policy than"
DATA = "damaged: delete the data set, and it is recorded again"
STAGES = {"cut-0": go_on_with, "whole-0": as_record, "teacher": teach, "student-0": go_on_with}
FILES = [  # of a run that goes on, of one that is recorded, of one that teaches, and of what a student learns from
    ("cut-0", "resume.safetensors", swap, FOREIGN),
    ("cut-0", "resume.safetensors", cut, AGAIN),
    ("cut-0", "resume.safetensors", zero, AGAIN),
    ("cut-0", "resume.safetensors", empty, AGAIN),
    ("cut-0", "resume.safetensors", gone, SAME),
    ("cut-0", "config.json", swap, FOREIGN),
    ("cut-0", "config.json", edit("config.gamma", 0.9), FOREIGN),
    ("cut-0", "config.json", edit("config.network.width", "1/4"), FOREIGN),
    ("cut-0", "config.json", cut, DAMAGED),
    ("cut-0", "config.json", zero, DAMAGED),
    ("cut-0", "config.json", empty, DAMAGED),
    ("cut-0", "config.json", gone, "it has no config.json"),
    ("cut-0", "metrics.jsonl", swap, CURVE),
    ("cut-0", "metrics.jsonl", cut, CURVE),
    ("cut-0", "metrics.jsonl", zero, CURVE),
    ("cut-0", "metrics.jsonl", empty, CURVE),
    ("cut-0", "metrics.jsonl", gone, CURVE),
    ("whole-0", "metrics.jsonl", swap, OTHERS),
    ("whole-0", "metrics.jsonl", cut, OTHERS),
    ("whole-0", "metrics.jsonl", zero, OTHERS),
    ("whole-0", "metrics.jsonl", empty, OTHERS),
    ("whole-0", "config.json", swap, NOT_ITS),
    ("whole-0", "config.json", edit("config.gamma", 0.9), NOT_ITS),
    ("whole-0", "config.json", cut, DAMAGED),
    ("whole-0", "config.json", zero, DAMAGED),
    ("whole-0", "config.json", empty, DAMAGED),
    ("whole-0", "result.json", swap, NOT_ITS),
    ("whole-0", "result.json", edit("env_steps", 1), "result.json was changed after it was written"),
    ("whole-0", "result.json", edit("status", "failed"), "result.json was changed after it was written"),
    ("whole-0", "result.json", cut, "result.json is damaged"),
    ("whole-0", "result.json", zero, "result.json is damaged"),
    ("whole-0", "result.json", empty, "result.json is damaged"),
    ("teacher", "policy.safetensors", swap, POLICY),
    ("teacher", "policy.safetensors", cut, "policy.safetensors is truncated"),
    ("teacher", "policy.safetensors", zero, "policy.safetensors is damaged"),
    ("teacher", "policy.safetensors", empty, "policy.safetensors is empty or truncated"),
    ("teacher", "policy.safetensors", gone, "no policy.safetensors"),
    ("teacher", "result.json", swap, POLICY),
    *(("student-0", f"{name}.npy", zero, f"{name}.npy is {DATA}") for name in ("frames", "ages", "logits", "values")),
    *(("student-0", f"{name}.npy", cut, f"{name}.npy is {DATA}") for name in ("frames", "ages", "logits", "values")),
    ("student-0", "frames.npy", gone, "frames.npy"),
    ("student-0", "frames.npy", swap, f"frames.npy is {DATA}"),
    ("student-0", "dataset.json", swap, "of another noise: delete it, and it is recorded again"),
    ("student-0", "dataset.json", cut, "dataset.json is damaged"),
    ("student-0", "dataset.json", zero, "dataset.json is damaged"),
    *(
        ("student-0", "dataset.json", edit(key, "another"), f"of another {key}: delete it, and it is recorded again")
        for key in ("teacher_hash", "precision", "noise", "seed", "env")
    ),
]
assert len(FILES) >= 43


@pytest.mark.parametrize(
    ("stage", "name", "harm", "comes"), FILES, ids=[f"{row[0]} {row[1]} {row[2].__name__}" for row in FILES]
)
def test_a_file_that_is_damaged_or_anothers_is_named_or_its_work_is_done_again(
    copied, stage, name, harm, comes, capsys
):
    run = copied / ("whole-0" if stage == "teacher" else stage)
    file = (data_of(copied) if stage == "student-0" else run) / name
    harm(file)
    if comes in (AGAIN, SAME):
        go_on_with(run)
        told = capsys.readouterr().err
        assert told.endswith(f"{AGAIN}\n") == told.startswith(f"potstill: {file} is ") == (comes == AGAIN)
        assert outcome(Run.open(run)) == outcome(Run.open(copied / "whole-0"))
        return
    before = contents(copied)
    with pytest.raises(InputError, match=comes):
        STAGES[stage](run)
    assert contents(copied) == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_curve_that_is_another_runs_is_named_and_left_out(copied, capsys):
    swap(copied / "whole-0" / "metrics.jsonl")
    assert len(curves_table(copied / "whole-1")) == 4
    assert len(curves_table(copied / "whole-0")) == 0
    path = copied / "whole-0" / "metrics.jsonl"
    words = f"potstill: left out: {path} is not the one that the run beside it wrote: restore it from a copy\n"
    assert capsys.readouterr().err == words
