"""What the scripts under `figures/` share: a folder of runs in, and one figure out."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from potstill.errors import InputError
from potstill.report.answers import Answers, answer
from potstill.report.figures import save
from potstill.report.page import read_study


def main(draw: Callable[[Answers], Figure], argv: Sequence[str] | None = None) -> None:
    """Draws one figure of a study and prints where it went; bad input is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(description=(draw.__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder of runs, or of a study's records")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="draw these alone; default: all")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f".png or .svg; default: {draw.__name__}.png in the folder"
    )
    options = parser.parse_args(argv)
    out = options.out or options.folder / f"{draw.__name__}.png"
    try:
        study = read_study(options.folder)
        records = study.records
        known = {str(record.get("arm")) for record in records}
        for arm in options.arms or ():
            if arm not in known:
                raise InputError(f"no run of the arm {arm!r}: there are {', '.join(sorted(known))}")
        records = [run for run in records if options.arms is None or run.get("arm") in options.arms]
        save(draw(answer(records, targets=study.scores)), out)
    except InputError as error:
        print(f"potstill: {error}", file=sys.stderr)
        sys.exit(2)
    print(out)
