"""Files of a run that are swapped, cut or changed: refused by name with what to do, or the run is begun again."""

import json
import shutil

import pytest
from processes import call, go_on
from small_runs import RUNTIME, outcome, small_run
from test_torn_files import AFTER_TWO_LINES

from potstill.buffer import open_dataset
from potstill.envs import Envs
from potstill.errors import InputError
from potstill.policies import load_policy, recorded_result
from potstill.results import as_record, curves_table, runs_table
from potstill.storage.runs import Run
from potstill.tasks import TASKS
from potstill.training.trainer import execute


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of two seeds: a run that was stopped after two lines, and whole."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        run = small_run("cartpole", root, root / f"cut-{seed}", seed=seed)
        assert call(go_on, run.path, *AFTER_TWO_LINES, output=root / "log")[0] == 143
        shutil.copytree(run.path, root / f"whole-{seed}")
        execute(Run.open(root / f"whole-{seed}"), RUNTIME)
    return root


@pytest.fixture
def copied(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


def zero(path):
    """Sets a tenth of a file's bytes to zero, in the middle."""
    data = bytearray(path.read_bytes())
    start, length = len(data) // 2, max(1, len(data) // 10)
    data[start : start + length] = bytes(length)
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def edit(path):
    document = json.loads(path.read_bytes())
    document["config"]["gamma"] = 0.9
    path.write_text(json.dumps(document))


def swap(path):
    shutil.copy(path.parent.with_name(path.parent.name.replace("-0", "-1")) / path.name, path)


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        ("resume.safetensors", swap, "resume.safetensors was saved by a run with another config.json"),
        ("config.json", swap, "resume.safetensors was saved by a run with another config.json"),
        ("config.json", edit, "resume.safetensors was saved by a run with another config.json"),
        ("config.json", cut, "config.json is damaged"),
        ("config.json", zero, "config.json is damaged"),
        ("metrics.jsonl", swap, "metrics.jsonl is not the one that this run had written"),
        ("metrics.jsonl", cut, "metrics.jsonl is not the one that this run had written"),
        ("metrics.jsonl", zero, "metrics.jsonl is not the one that this run had written"),
    ],
)
def test_a_run_does_not_go_on_from_files_that_are_not_its_own(copied, name, harm, words):
    harm(copied / "cut-0" / name)
    before = {path.name: path.read_bytes() for path in (copied / "cut-0").iterdir()}
    with pytest.raises(InputError, match=words):
        execute(Run.open(copied / "cut-0"), RUNTIME)
    assert {path.name: path.read_bytes() for path in (copied / "cut-0").iterdir()} == before


@pytest.mark.parametrize("harm", [cut, zero, lambda path: path.write_bytes(b"")])
def test_a_run_whose_saved_state_is_damaged_is_begun_again_and_says_so(copied, harm, capsys):
    run = Run.open(copied / "cut-0")
    harm(run.resume_path)
    execute(run, RUNTIME)
    said = capsys.readouterr().err
    assert said.startswith(f"potstill: {run.resume_path} is ")
    assert said.endswith("the run is begun again\n")
    assert outcome(run) == outcome(Run.open(copied / "whole-0"))


@pytest.mark.parametrize(
    ("name", "harm", "read", "words"),
    [
        ("metrics.jsonl", swap, as_record, "metrics.jsonl is not the one that the run beside it wrote"),
        ("metrics.jsonl", zero, as_record, "metrics.jsonl is not the one that the run beside it wrote"),
        ("config.json", swap, runs_table, "config.json is not the one its result.json belongs to"),
        ("config.json", edit, runs_table, "config.json is not the one its result.json belongs to"),
        ("policy.safetensors", zero, load_policy, "policy.safetensors is damaged"),
        ("policy.safetensors", swap, lambda path: recorded_result(load_policy(path)), "is of another policy than"),
        ("result.json", swap, lambda path: recorded_result(load_policy(path)), "is of another policy than"),
    ],
)
def test_what_reads_a_finished_run_compares_its_files(copied, name, harm, read, words):
    read(copied / "whole-0")
    harm(copied / "whole-0" / name)
    with pytest.raises(InputError, match=words):
        read(copied / "whole-0")


def test_a_curve_that_is_another_runs_is_named_and_left_out(copied, capsys):
    swap(copied / "whole-0" / "metrics.jsonl")
    assert len(curves_table(copied / "whole-1")) == 4
    assert len(curves_table(copied / "whole-0")) == 0
    path = copied / "whole-0" / "metrics.jsonl"
    words = f"potstill: left out: {path} is not the one that the run beside it wrote: restore it from a copy\n"
    assert capsys.readouterr().err == words


@pytest.fixture(scope="module")
def recorded(teacher, tmp_path_factory):
    root = tmp_path_factory.mktemp("recorded")
    execute(small_run("teacher", teacher, root / "run"), RUNTIME)
    return next((root / "data").iterdir())


@pytest.mark.parametrize("name", ["frames", "ages", "logits", "values"])
def test_a_data_set_that_is_damaged_is_refused(recorded, tmp_path, name):
    folder = tmp_path / "data"
    shutil.copytree(recorded, folder)
    document = json.loads((folder / "dataset.json").read_bytes())
    envs = Envs(TASKS["cartpole"].env, document["num_envs"])
    open_dataset(folder, envs)
    data = bytearray((folder / f"{name}.npy").read_bytes())
    data[-8:] = bytes(byte ^ 1 for byte in data[-8:])
    (folder / f"{name}.npy").write_bytes(data)
    with pytest.raises(InputError, match=f"{name}.npy is damaged: delete the data set, and it is recorded again"):
        open_dataset(folder, envs)


@pytest.mark.parametrize("key", ["teacher_hash", "precision", "noise", "seed", "env"])
def test_a_data_set_of_another_origin_is_refused(recorded, teacher, tmp_path, key):
    run = small_run("teacher", teacher, tmp_path / "run")
    shutil.copytree(recorded, tmp_path / "data" / recorded.name)
    path = tmp_path / "data" / recorded.name / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {key: "another"}))
    with pytest.raises(InputError, match=f"it is of another {key}: delete it, and it is recorded again"):
        execute(run, RUNTIME)
