"""Files that are torn, damaged, or of another version: read where they can be, else refused by name."""

import json
import signal

import pytest
from processes import call, go_on
from small_runs import RUNTIME, outcome, small_run

from potstill.errors import InputError
from potstill.policies import load_policy, recorded_result
from potstill.results import read_runs, runs_table
from potstill.storage.runs import Run, read_document
from potstill.study.planfile import read_plan
from potstill.training.trainer import execute

AFTER_TWO_LINES = ("potstill.telemetry.Metrics.write", 2, signal.SIGTERM)


@pytest.fixture
def cut(tmp_path):
    """A run of four lines that was stopped after two."""
    run = small_run("cartpole", tmp_path, tmp_path / "run")
    assert call(go_on, run.path, *AFTER_TWO_LINES, output=tmp_path / "log")[0] == 143
    return run


def test_a_torn_last_line_is_dropped_and_the_run_ends_the_same(cut, tmp_path):
    whole = small_run("cartpole", tmp_path, tmp_path / "whole")
    execute(whole, RUNTIME)
    with open(cut.metrics_path, "ab") as file:
        file.write(cut.metrics_path.read_bytes()[:100])
    execute(cut, RUNTIME)
    assert outcome(cut) == outcome(whole)


def rewrite(path, **changes):
    """Another document in a JSON file or in a checkpoint."""
    if path.suffix == ".safetensors":  # `save` would set the format right
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        del header["__metadata__"]["digest"]  # as if saved so
        header["__metadata__"]["potstill"] = json.dumps(json.loads(header["__metadata__"]["potstill"]) | changes)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    else:
        document = json.loads(path.read_bytes())
        document.pop("digest", None)
        path.write_text(json.dumps(document | changes))


READERS = {
    "config.json": lambda run: Run.open(run.path),
    "result.json": lambda run: read_runs(run.path),
    "policy.safetensors": lambda run: load_policy(run.path),
    "resume.safetensors": lambda run: execute(run, RUNTIME),
}


@pytest.mark.parametrize(("version", "words"), [(2, "reads up to 1: upgrade potstill"), (0, "which never was")])
@pytest.mark.parametrize("name", READERS)
def test_a_file_of_a_format_that_is_not_known_is_refused_by_name(name, version, words, cut, teacher):
    run = cut
    if name in ("result.json", "policy.safetensors"):
        execute(cut, RUNTIME)
    rewrite(run.path / name, format=version)
    with pytest.raises(InputError, match=f"{run.path / name} has format {version}, .*{words}"):
        READERS[name](run)


def test_a_record_of_a_study_of_a_newer_format_is_refused_by_name(tmp_path):
    record = {"run": "rl", "status": "done", "score": 1.0}
    (tmp_path / "rl.json").write_text(json.dumps(record))
    assert runs_table(tmp_path)["score"].to_list() == [1.0]  # the first records did not say their format
    rewrite(tmp_path / "rl.json", format=1)
    assert runs_table(tmp_path)["score"].to_list() == [1.0]
    rewrite(tmp_path / "rl.json", format=2)
    with pytest.raises(InputError, match=r"rl.json has format 2, this potstill reads up to 1: upgrade potstill"):
        runs_table(tmp_path)
    rewrite(tmp_path / "rl.json", format="one")
    with pytest.raises(InputError, match=r"rl.json is damaged: its format is 'one', not a number"):
        runs_table(tmp_path)


def test_the_first_config_and_result_which_did_not_say_their_format_are_read(cut):
    execute(cut, RUNTIME)
    for path in (cut.path / "config.json", cut.result_path):
        document = read_document(path)
        assert document.pop("format") == 1
        path.write_text(json.dumps(document))
    assert Run.open(cut.path) == cut
    assert read_runs(cut.path)[0]["status"] == "done"


def test_a_teachers_result_of_a_newer_format_is_not_taken_for_its_score(cut):
    execute(cut, RUNTIME)
    rewrite(cut.result_path, score=1.0)
    assert recorded_result(load_policy(cut.path)) is not None
    rewrite(cut.result_path, format=2)
    assert recorded_result(load_policy(cut.path)) is None


def test_a_config_with_a_setting_of_a_newer_version_is_refused_by_its_name(cut):
    config = json.loads((cut.path / "config.json").read_bytes())["config"]
    rewrite(cut.path / "config.json", config=config | {"momentum": 0.9})
    with pytest.raises(InputError, match="PPOConfig has no field 'momentum': was it written by a newer potstill"):
        execute(Run.open(cut.path), RUNTIME)


def test_a_plan_with_a_setting_of_a_newer_version_is_refused_with_its_line(tmp_path):
    (tmp_path / "plan.toml").write_text('env = "cartpole"\nseeds = [0]\nwidths = ["1"]\n[arms.rl]\nmomentum = 0.9\n')
    with pytest.raises(InputError, match=r"plan.toml, line 5: .*momentum"):
        read_plan(tmp_path / "plan.toml")
