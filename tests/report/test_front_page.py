"""What README and docs tell of the studies is what the committed records say."""

import runpy
from pathlib import Path

import pytest

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
        "STUDIES": (),
        "draw": lambda _: None,
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
    for name, value in {"ROOT": tmp_path, "PAGES": ("README.md",), "STUDIES": ()}.items():
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


def test_a_table_in_markdown_and_turned(front):
    table = Table("a title", ("task", "runs"), [["Pong", Value("3 of 4", 3)], ["Breakout", ""]])
    assert front["markdown"](table) == "| task | runs |\n|---|---|\n| Pong | 3 of 4 |\n| Breakout | |"
    assert front["markdown"](front["turned"](table)) == "| | Pong | Breakout |\n|---|---|---|\n| runs | 3 of 4 | |"
