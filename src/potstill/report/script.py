"""What the scripts under `figures/` share: one table, or a study's answers, in, and one figure out."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import polars as pl
from matplotlib.figure import Figure

from potstill.errors import InputError
from potstill.report.answers import Answers, answer
from potstill.report.figures import save
from potstill.report.page import read_study
from potstill.results import read_table


def main(draw: Callable[[pl.DataFrame], Figure], columns: tuple[str, ...], argv: Sequence[str] | None = None) -> None:
    """Draws one figure of a table and prints where it went; bad input is one line on stderr and exit code 2.

    Args:
        draw: a function of `report.figures`.
        columns: of the table it takes: TABLE, EPISODES or CURVES.
        argv: the arguments; None takes the command line's.
    """

    def make(source: Path, arms: list[str] | None) -> Figure:
        table = read_table(source, columns)
        _check_arms(arms, table["arm"].drop_nulls().unique())
        return draw(table if arms is None else table.filter(pl.col("arm").is_in(arms)))

    _main(draw, make, "a folder of runs, or a CSV made from one", argv)


def main_of_study(draw: Callable[[Answers], Figure], argv: Sequence[str] | None = None) -> None:
    """As `main`, of what `potstill report` computes from a study's records.

    Args:
        draw: a function of `report.scaling_figures`.
        argv: the arguments; None takes the command line's.
    """

    def make(source: Path, arms: list[str] | None) -> Figure:
        study = read_study(source)
        _check_arms(arms, {str(record.get("arm")) for record in study.records})
        records = [record for record in study.records if arms is None or record.get("arm") in arms]
        return draw(answer(records, targets=study.scores))

    _main(draw, make, "a folder of a study's records", argv)


def _check_arms(arms: list[str] | None, known: Iterable[str]) -> None:
    """Raises InputError where an arm that is asked for has no run."""
    for arm in arms or ():
        if arm not in known:
            raise InputError(f"no run of the arm {arm!r}: there are {', '.join(sorted(known))}")


def _main(
    draw: Callable[..., Figure],
    make: Callable[[Path, list[str] | None], Figure],
    source: str,
    argv: Sequence[str] | None,
) -> None:
    parser = argparse.ArgumentParser(description=(draw.__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, metavar="FOLDER_OR_CSV" if "CSV" in source else "FOLDER", help=source)
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="draw these alone; default: all")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f".png or .svg; default: {draw.__name__}.png beside it"
    )
    options = parser.parse_args(argv)
    folder = options.source if options.source.is_dir() else options.source.parent
    out = options.out or folder / f"{draw.__name__}.png"
    try:
        save(make(options.source, options.arms), out)
    except InputError as error:
        print(f"potstill: {error}", file=sys.stderr)
        sys.exit(2)
    print(out)
