"""What README and docs tell of the studies is what the committed records say."""

import json
import runpy
from pathlib import Path

import pytest
from test_figures import check_legible

from potstill.report.figures import short
from potstill.report.tables import Table, Value

SCRIPT = Path(__file__).parents[2] / "scripts" / "front_page.py"
PAGE = "before\n<!-- answers: of the records, by scripts/front_page.py -->\nold | row\n<!-- end of answers -->\nafter\n"


@pytest.fixture(scope="module")
def front() -> dict:
    return runpy.run_path(str(SCRIPT))


def test_the_tables_in_the_documents_are_those_of_the_committed_records(front, capsys):
    assert front["main"](["--check"]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out == "tables hold\n"


def test_a_table_that_the_records_do_not_say_is_told_by_its_page_and_renewed_only_where_that_is_asked_for(
    front, tmp_path, monkeypatch, capsys
):
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "other.md").write_text("no table\n")
    for name, value in {
        "ROOT": tmp_path,
        "PAGES": ("README.md", "other.md"),
        "STUDIES": {},
        "save": lambda *_: None,
        "score_by_size": lambda _: None,
        "score_by_bytes": lambda *_: None,
        "smallest": lambda: None,
    }.items():
        monkeypatch.setitem(front["main"].__globals__, name, value)
    monkeypatch.setitem(front["main"].__globals__, "blocks", lambda _: {"answers": "| new |"})
    assert front["main"](["--check"]) == 1
    assert capsys.readouterr().out == "README.md: a table is not what the records say: make report\n"
    assert (tmp_path / "README.md").read_text() == PAGE
    assert front["main"]([]) == 0
    assert (tmp_path / "README.md").read_text() == PAGE.replace("\nold | row\n", "\n\n| new |\n\n")
    assert (tmp_path / "other.md").read_text() == "no table\n"
    assert front["main"](["--check"]) == 0


def test_a_table_without_a_place_is_named(front, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(PAGE.replace("<!-- end of answers -->", ""))
    for name, value in {"ROOT": tmp_path, "PAGES": ("README.md",), "STUDIES": {}}.items():
        monkeypatch.setitem(front["main"].__globals__, name, value)
    monkeypatch.setitem(front["main"].__globals__, "blocks", lambda _: {"answers": "| new |"})
    with pytest.raises(SystemExit, match="no page has a place for answers"):
        front["main"](["--check"])


def test_only_the_table_of_that_name_is_put_and_backslashes_stay(front):
    assert front["put"](PAGE, "runs of Pong", "| x |") == PAGE
    put = front["put"](PAGE, "answers", r"| \1 |")
    assert put.startswith("before\n")
    assert put.endswith("<!-- end of answers -->\nafter\n")
    assert r"| \1 |" in put
    assert "old" not in put


def test_a_table_in_markdown(front):
    table = Table("a title", ("task", "runs"), [["Pong", Value("3 of 4", 3)], ["Breakout", ""]])
    assert front["markdown"](table) == "| task | runs |\n|---|---|\n| Pong | 3 of 4 |\n| Breakout | |"


def test_means_leads_and_growth_are_of_the_runs_of_one_arm_and_size_that_were_scored(front):
    def run(arm: str, parameters: int, seed: int, score: float, sampled: float | None, status: str = "done") -> dict:
        facts = {"run": f"{arm}-{seed}", "arm": arm, "parameters": parameters, "seed": seed, "status": status}
        return facts | {"score": score, "score_sampled": sampled}

    runs = [run("rl", 100, 2, 4.0, 1.0), run("rl", 100, 1, 2.0, 3.0), run("rl", 400, 1, 7.0, 0.0)]
    runs += [run("distill-student", 100, 1, 5.0, 1.5), run("rl", 100, 3, 90.0, 90.0, "failed")]
    scores = front["Scores"](runs)
    assert scores.runs("rl", 100) == [2.0, 4.0]
    assert scores.both("rl", 100) == "3.0 greedy and 2.0 sampled"
    assert scores.growth("rl") == [(100, 400, 2.0)]
    assert scores.growth("rl", "sampled") == [(100, 400, -1.0)]
    table = front["side_by_side"]({"Pong": scores})
    assert table.rows == [["Pong", "100", "3.0 (2)", "-", "5.0 (1)", "2.0 (2)", "-", "1.5 (1)"]]


def test_the_pilots_are_told_by_their_records_and_tested_only_once_they_are_whole(front, tmp_path, monkeypatch):
    def put(study: str, arm: str, parameters: int, scores: list[float]) -> None:
        (tmp_path / study).mkdir(exist_ok=True)
        for seed, score in enumerate(scores):
            facts = {"run": f"{arm}_{seed}", "arm": arm, "parameters": parameters, "seed": seed, "status": "done"}
            record = facts | {"score": score, "score_sampled": score - 1}
            (tmp_path / study / f"{arm}_{seed}.json").write_text(json.dumps(record))

    pilots, read = front["pilots"], front["read"]
    monkeypatch.setitem(pilots.__globals__, "RESULTS", tmp_path)
    for arm, score in (("rl", 1.0), ("distill-student", 6.0)):
        put("pong", arm, 1964, [score, score, score])
        put("breakout", arm, 8471, [score, score, score])
    first = read("pong"), read("breakout")
    assert pilots(*first) == ""
    put("pilot-pong", "rl-split", 1964, [7.0, 8.0, 9.0])
    assert pilots(*first) == (
        "On Pong, at 1,964 parameters, a larger critic moves RL from 1.0 to 8.0 points (3 of 5 runs so far);"
        " students score 6.0."
    )
    put("pilot-breakout", "rl-split", 8471, [7.0, 8.0])
    assert "8 million" not in pilots(*first), "nothing is said of one arm alone"
    put("pilot-breakout", "rl-split", 8471, [7.0, 8.0, 9.0, 8.5, 7.5])
    put("pilot-breakout", "rl", 8471, [2.0, 3.0, 4.0, 3.5, 2.5])
    assert "a larger critic moves RL from 3.0 to 8.0 bricks (exact test, p = 0.008); students score 6.0." in pilots(
        *first
    )
    assert "from 2.0 to 7.0 bricks (exact test, p = 0.008); students score 5.0." in pilots(*first, "sampled")


def test_every_size_that_was_measured_has_its_tick_in_the_first_figure(front):
    told = {game: front["read"](name) for name, game in front["STUDIES"].items()}
    figure = front["score_by_size"](told)
    check_legible(figure)
    for ax, scores in zip(figure.axes, 2 * list(told.values()), strict=True):
        labels = [label.get_text() for label in ax.get_xticklabels()]
        assert labels == [short(size) for size in scores.sizes("distill-student")]


def test_shapes_are_ordered_by_score_and_a_pruned_weight_costs_its_place_too(front):
    def run(arm: str, seed: int, score: float) -> dict:
        facts = {"run": f"{arm}-{seed}", "arm": arm, "parameters": 1000, "seed": seed, "status": "done", "macs": 5000}
        return facts | {"score": score, "score_sampled": score - 1, "latency_ms": 0.25 * seed}

    runs = [run("nature", 1, 3.0), run("nature", 3, 4.0), run("sparse-int4", 1, 9.0), run("sparse", 1, 2.0)]
    assert front["by_shape"](front["Scores"](runs)).rows == [
        ["Nature-CNN, pruned, 4 bits", "1", "1,000", "1,500", "5,000", "0.25", "9.0", "8.0"],
        ["Nature-CNN", "2", "1,000", "4,000", "5,000", "0.25", "3.5", "2.5"],
        ["Nature-CNN, pruned", "1", "1,000", "5,000", "5,000", "0.25", "2.0", "1.0"],
    ]


def test_the_figure_of_bytes_is_legible(front):
    read = front["read"]
    check_legible(
        front["score_by_bytes"](read("first/pong"), read("pilot-pong"), read("families"), front["smallest"]())
    )
