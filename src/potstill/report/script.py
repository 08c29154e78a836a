"""What the scripts under `figures/` share: one table in, one figure out."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
from matplotlib.figure import Figure

from potstill.errors import InputError
from potstill.report.figures import save
from potstill.results import read_table


def main(draw: Callable[[pl.DataFrame], Figure], columns: tuple[str, ...], argv: Sequence[str] | None = None) -> None:
    """Draws one figure and prints where it went; bad input is one line on stderr and exit code 2.

    Args:
        draw: a function of `report.figures`.
        columns: of the table it takes: TABLE, EPISODES or CURVES.
        argv: the arguments; None takes the command line's.
    """
    parser = argparse.ArgumentParser(description=(draw.__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, metavar="FOLDER_OR_CSV", help="a folder of runs, or a CSV made from one")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f".png or .svg; default: {draw.__name__}.png beside it"
    )
    options = parser.parse_args(argv)
    folder = options.source if options.source.is_dir() else options.source.parent
    out = options.out or folder / f"{draw.__name__}.png"
    try:
        save(draw(read_table(options.source, columns)), out)
    except InputError as error:
        print(f"potstill: {error}", file=sys.stderr)
        sys.exit(2)
    print(out)
