import json
import re
import runpy
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from potstill import results
from potstill.errors import InputError
from potstill.load import load
from potstill.policies import recorded_result
from potstill.results import COLUMNS, CURVES, EPISODES, TABLE

DATA = Path(__file__).parents[1] / "data"


def write_run(path: Path, result: dict[str, Any] | None, config: dict[str, Any] | None = None) -> Path:
    path.mkdir(parents=True)
    plan = {"seed": 3, "lead": "student", "network": {"width": "1/8", "critic": "shared"}, "env": {"id": "pong"}}
    document = {"kind": "distill", "config": plan | (config or {}), "teacher": "data/experts/pong/seed-0"}
    (path / "config.json").write_text(json.dumps(document))
    if result is not None:
        (path / "result.json").write_text(json.dumps(result))
    return path


RESULT = {
    "status": "done", "kind": "distill", "arm": "distill-student", "env": "pong", "width": "1/8", "parameters": 27_544,
    "seed": 3, "score": 18.5, "ci95": [17.25, 19.75], "returns": [18, 19.0], "agreement": None, "unheard_of": [1, 2],
}  # fmt: skip


def test_a_run_is_a_row_named_by_its_directory_with_its_interval_in_two_columns(tmp_path):
    write_run(tmp_path / "a", RESULT)
    (row,) = results.runs_table(tmp_path).to_dicts()
    expected = {"run": "a", "status": "done", "arm": "distill-student", "parameters": 27_544, "score": 18.5}
    expected |= {"ci95_low": 17.25, "ci95_high": 19.75, "agreement": None}
    assert {name: row[name] for name in expected} == expected


def test_a_run_that_is_shipped_is_read_as_any_other_and_again_where_it_is_shipped_on(tmp_path, monkeypatch):
    shipped = sorted(DATA.glob("*/*/seed-*"))
    monkeypatch.setattr("sys.argv", ["ship_expert.py", str(DATA / "students" / "pong" / "seed-1"), str(tmp_path / "a")])
    runpy.run_path(str(DATA.parent / "scripts" / "ship_expert.py"), run_name="__main__")
    for run in [*shipped, tmp_path / "a"]:
        (record,) = results.read_runs(run)
        assert record["status"] == "done"
        assert recorded_result(load(run))["score"] == record["score"]


def test_a_run_without_a_result_is_a_row_with_its_status_and_its_plan(tmp_path):
    write_run(tmp_path / "a", None)
    (write_run(tmp_path / "b", None) / "resume.safetensors").touch()
    rows = results.runs_table(tmp_path).to_dicts()
    assert [(row["run"], row["status"], row["arm"], row["width"], row["seed"], row["score"]) for row in rows] == [
        ("a", "new", "distill-student", "1/8", 3, None),
        ("b", "interrupted", "distill-student", "1/8", 3, None),
    ]


def test_a_failed_run_is_a_row_with_its_reason_and_its_plan(tmp_path):
    write_run(tmp_path / "a", {"status": "failed", "kind": "distill", "error": "the loss is not finite"})
    (row,) = results.runs_table(tmp_path).to_dicts()
    assert (row["status"], row["error"], row["width"]) == ("failed", "the loss is not finite", "1/8")


def test_a_training_run_with_a_critic_of_its_own_is_another_arm(tmp_path):
    path = write_run(tmp_path / "a", None)
    network = {"width": "1/8", "critic": "split"}
    document = {"kind": "train", "config": {"seed": 0, "network": network, "env": {"id": "pong"}}}
    (path / "config.json").write_text(json.dumps(document))
    assert results.runs_table(tmp_path)["arm"].to_list() == ["rl-split"]


def test_every_game_is_a_row_of_the_episodes(tmp_path):
    write_run(tmp_path / "a", RESULT)
    write_run(tmp_path / "b", None)
    assert results.episodes_frame(results.read_runs(tmp_path)).rows() == [
        ("a", "distill-student", "pong", "1/8", 27_544, 3, 0, 18.0),
        ("a", "distill-student", "pong", "1/8", 27_544, 3, 1, 19.0),
    ]


def test_the_curves_of_an_unfinished_run_are_there_up_to_its_last_whole_line(tmp_path):
    path = write_run(tmp_path / "a", None)
    lines = ['{"step": 100, "seconds": 2, "score": null, "loss": 0.5}', '{"step": 200, "score": -20.5}', '{"step": 3']
    (path / "metrics.jsonl").write_text("\n".join(lines))
    curves = results.curves_table(tmp_path).to_dicts()
    assert [(row["step"], row["seconds"], row["score"], row["loss"]) for row in curves] == [
        (100, 2.0, None, 0.5),
        (200, None, -20.5, None),
    ]
    assert {(row["run"], row["arm"], row["width"], row["seed"]) for row in curves} == {
        ("a", "distill-student", "1/8", 3)
    }


def test_every_column_of_every_table_is_described():
    assert set(TABLE) | set(EPISODES) | set(CURVES) == set(COLUMNS)
    assert all(column.help for column in COLUMNS.values())


def test_a_written_table_is_read_back_as_it_was(tmp_path):
    write_run(tmp_path / "a", RESULT)
    (write_run(tmp_path / "b", None) / "metrics.jsonl").write_text('{"step": 1, "score": -1.5}\n')
    results.write_tables(tmp_path)
    for name, columns in (("table", TABLE), ("episodes", EPISODES), ("curves", CURVES)):
        assert tuple(pl.read_csv(tmp_path / f"{name}.csv").columns) == columns


def test_a_run_may_be_read_by_itself(tmp_path):
    write_run(tmp_path / "a", RESULT)
    assert results.runs_table(tmp_path / "a").equals(results.runs_table(tmp_path))


def test_folders_that_are_no_runs_are_passed_over(tmp_path):
    write_run(tmp_path / "a", RESULT)
    (tmp_path / "data").mkdir()
    assert results.runs_table(tmp_path)["run"].to_list() == ["a"]


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda p: p, "is not a folder: a folder of runs is needed"),
        (lambda p: p.mkdir(), "holds no runs: no record, and no directory with a config.json or a result.json"),
        (lambda p: write_run(p / "a", {}) and (p / "a" / "result.json").write_text("{"), "damaged: it is not JSON"),
        (lambda p: write_run(p / "a", RESULT | {"score": "high"}), "result.json is damaged: its score is 'high'"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused_in_one_line(tmp_path, make, line):
    make(tmp_path / "runs")
    with pytest.raises(InputError, match=line) as caught:
        results.runs_table(tmp_path / "runs")
    assert "\n" not in str(caught.value)


def test_every_start_is_a_column_in_the_order_of_the_steps(tmp_path):
    starts = {"1000": {"score": 3.0}, "100": {"score": 12.5}}
    write_run(tmp_path / "a", RESULT | {"starts": starts})
    write_run(tmp_path / "b", RESULT)
    table = results.runs_table(tmp_path)
    assert [name for name in table.columns if name not in TABLE] == ["score_start_100", "score_start_1000"]
    assert table["score_start_100"].to_list() == [12.5, None]


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda runs: (runs / "b/config.json").write_text('{"kind": '), "b/config.json is damaged: it is not JSON"),
        (lambda runs: (runs / "b/result.json").write_text(""), "b/result.json is damaged: it is not JSON"),
        (
            lambda runs: (runs / "b/result.json").write_text('{"status": "done", "score": "high"}'),
            "its score is 'high'",
        ),
    ],
)
def test_a_damaged_run_is_named_once_and_the_others_are_there(tmp_path, capsys, spoil, line):
    write_run(tmp_path / "a", RESULT)
    write_run(tmp_path / "b", RESULT)
    spoil(tmp_path)
    for frame in (results.runs_frame, results.episodes_frame, results.curves_frame):
        assert set(frame(results.read_runs(tmp_path))["run"]) <= {"a"}
    told = capsys.readouterr().err
    assert told.startswith("potstill: left out: ")
    assert line in told
    assert told.count("\n") == 1


def test_a_bad_line_of_metrics_costs_that_run_its_curve_alone(tmp_path, capsys):
    (write_run(tmp_path / "a", RESULT) / "metrics.jsonl").write_text('{"step": 1, "score": 2.0}\n')
    (write_run(tmp_path / "b", RESULT) / "metrics.jsonl").write_text('{"step": 1}\nno\n{"step": 2}\n')
    assert results.curves_table(tmp_path)["run"].to_list() == ["a"]
    assert results.runs_table(tmp_path)["run"].to_list() == ["a", "b"]
    assert capsys.readouterr().err == f"potstill: left out: {tmp_path}/b/metrics.jsonl, line 2: not a JSON object" + (
        " with an integer 'step'\n"
    )


def test_json_that_is_no_record_is_ignored_with_a_line_and_a_torn_record_is_left_out(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps({"run": "a", **RESULT}))
    (tmp_path / "notes.json").write_text('{"todo": []}')
    (tmp_path / "torn.json").write_text('{"run": "to')
    (tmp_path / "empty.json").write_text("")
    assert results.runs_table(tmp_path)["run"].to_list() == ["a"]
    assert capsys.readouterr().err.splitlines() == [
        f"potstill: left out: {tmp_path}/empty.json is damaged: it is not JSON",
        f"potstill: left out: {tmp_path}/torn.json is damaged: it is not JSON",
        f"potstill: ignored: {tmp_path}/notes.json is no record of a run of a study",
    ]


def test_no_committed_record_tells_where_on_a_machine_its_command_ran():
    documents = [json.loads(path.read_text()) for path in (Path(__file__).parents[1] / "data").rglob("*.json")]
    commands = {str(document.get("command")) for document in documents if isinstance(document, dict)}
    assert len(commands) > 20
    assert not [command for command in commands if re.search(r"(^|[ ='\"])[/~]", command)]


def test_a_curve_keeps_its_points_in_columns_and_gives_them_back():
    points = [{"step": 5, "score": None, "seconds": 0.5}, {"step": 7, "score": 1.5}]
    curve = results.Curve(points)
    assert list(curve) == [{"step": 5, "seconds": 0.5}, {"step": 7, "score": 1.5}]
    assert (len(curve), curve[-1], curve[::-1]) == (2, curve[1], [curve[1], curve[0]])
    assert type(curve[0]["step"]) is int
    with pytest.raises(IndexError):
        curve[2]
