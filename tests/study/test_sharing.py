"""Several studies on one folder share its runs, and tell what they leave: every bad file is in test_bad_files.py."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from processes import Child, Here, warm

from potstill.cli import main
from potstill.results import runs_table
from potstill.storage.runs import hold
from potstill.study import records
from potstill.study.planfile import read_plan
from potstill.training.runtime import Runtime

RUNTIME = Runtime(device="cpu", threads=2, quiet=True)
NAMES = [f"rl_width-1_32_seed-{seed}" for seed in range(2)]
PLAN = """\
env = "cartpole"
widths = ["1/32"]
seeds = [0, 1]

[evaluation]
episodes = 2

[arms.rl]
total-timesteps = 4096
num-steps = 32
"""


MEASURED = ["wall_seconds", "latency_ms", "latency_p95_ms", "command", "commit"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The study by one process."""
    folder = tmp_path_factory.mktemp("sharing")
    (folder / "plan.toml").write_text(PLAN)
    plan = read_plan(folder / "plan.toml")
    ended = list(records.run_study(plan, folder / "alone", RUNTIME, workers=1, start=Here))
    assert [each.error for each in ended] == [None] * 2
    return SimpleNamespace(folder=folder, plan=plan, out=folder / "alone")


def table(out):
    return runs_table(out).drop(MEASURED)


def test_two_studies_on_one_folder_do_each_run_once_and_both_end_with_the_whole_table(alone, tmp_path):
    out = alone.folder / "shared"
    words = ["study", "run", alone.folder / "plan.toml", "--out", out, "--workers", "1", "--device", "cpu", "--quiet"]
    both = [Child(warm, *words, output=tmp_path / f"{n}.out", errors=tmp_path / f"{n}.err") for n in range(2)]
    assert [(child.wait(), (tmp_path / f"{n}.err").read_text()) for n, child in enumerate(both)] == [(0, "")] * 2
    assert all(re.search(r"^rl .*\(1/32\) +2 ", child.said, re.MULTILINE) for child in both)  # both runs
    assert table(out).equals(table(alone.out))
    for name in NAMES:  # a run begun twice has its steps twice in metrics.jsonl, or words in its log
        steps = [json.loads(line)["step"] for line in (out / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps))
        assert (out / "runs" / name / "log.txt").read_text() == ""
    assert not list((out / "runs").glob(".*.claim"))


def test_a_run_that_another_process_holds_is_waited_for_and_the_others_go_on(alone, tmp_path):
    out, ended = tmp_path / "out", []
    (out / "runs").mkdir(parents=True)
    with hold(out / "runs" / f".{NAMES[0]}.claim"):
        runs = records.run_study(alone.plan, out, RUNTIME, workers=1, start=Here)
        ended.append(next(runs))
        assert ended[0].spec.name == NAMES[1]
    ended += list(runs)
    assert ended[-1].spec.name == NAMES[0]
    assert table(out).equals(table(alone.out))


def test_a_damaged_record_and_json_that_is_none_are_named_and_left(alone, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(alone.out, out)
    (out / f"{NAMES[0]}.json").write_text("")
    (out / "notes.json").write_text('{"buy": "milk"}')
    (out / f"{NAMES[1]}.json").unlink()
    ended = {each.spec.name: each.error for each in records.run_study(alone.plan, out, RUNTIME, workers=1, start=Here)}
    assert ended == {NAMES[0]: f"{out}/{NAMES[0]}.json is damaged: it is not JSON", NAMES[1]: None}
    assert (out / f"{NAMES[0]}.json").read_text() == ""
    assert capsys.readouterr().err.splitlines() == [
        f"potstill: left out: {out}/{NAMES[0]}.json is damaged: it is not JSON",
        f"potstill: ignored: {out}/notes.json is no record of a run of a study",
    ]
    main(["study", "status", str(alone.folder / "plan.toml"), "--out", str(out), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["done"], report["failed"], list(report["damaged"])) == (1, 1, NAMES[:1])
    assert report["ignored"] == [f"{out}/notes.json is no record of a run of a study"]
