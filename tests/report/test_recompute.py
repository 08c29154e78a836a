"""An independent computation of the front page's numbers agrees with it, and would tell where it did not."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "recompute.py"


@pytest.fixture(scope="module")
def again() -> dict:
    return runpy.run_path(str(SCRIPT))


def test_the_pages_numbers_are_those_computed_again(again, capsys):
    assert again["main"]() == 0, capsys.readouterr().out
    assert "differs" not in capsys.readouterr().out


def test_a_number_that_is_not_the_records_is_told(again, tmp_path):
    page = "".join((SCRIPT.parents[1] / name).read_text() for name in again["PAGES"])
    assert [what for what, computed, told in again["tables"](page.replace("| 1,964 | -2.2 (5)", "| 1,964 | -2.3 (5)"))
            if computed != told] == ["Pong 1,964 RL, greedy"]  # fmt: skip
    assert [what for what, computed, told in again["ratios"](page.replace("9.84 at 15.1", "9.85 at 15.1"))
            if computed != told] == ["Breakout rl greedy 1.0M, ratio at 15.1"]  # fmt: skip
    assert any(told == "not there" for _, _, told in again["sentences"]("an empty page"))


def test_it_uses_none_of_potstill():
    assert "potstill." not in SCRIPT.read_text().replace("potstill, so", "")
    assert "import potstill" not in SCRIPT.read_text()
