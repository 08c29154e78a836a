"""What the documents tell of the studies, from the committed records: tables in place, figures beside them.

python scripts/front_page.py           # after new records; `make report` runs it
python scripts/front_page.py --check   # only says whether the tables are those of the records

A table stands between `<!-- NAME: of the records, by scripts/front_page.py -->` and `<!-- end of NAME -->`.
"""

import json
import re
import sys
from pathlib import Path

from potstill.report import tables, words
from potstill.report.answers import Answers, answer
from potstill.report.figures import save, size_score
from potstill.report.page import read_study
from potstill.report.scaling_figures import iqm_by_size
from potstill.report.tables import Table, Value
from potstill.results import runs_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
IMAGES = ROOT / "docs" / "images"
STUDIES = ("pong", "minatar-breakout", "minatar-space-invaders")
PAGES = ("README.md", "docs/results.md")
BLOCK = "<!-- {name}: of the records, by scripts/front_page.py -->\n\n{text}\n\n<!-- end of {name} -->"


def markdown(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"

    rows = [[cell.text if isinstance(cell, Value) else cell for cell in row] for row in table.rows]
    return "\n".join([line(list(table.headings)), "|" + "---|" * len(table.headings), *map(line, rows)])


def turned(table: Table) -> Table:
    """Rows as columns: few tasks beside each other, with room for what each says."""
    headings, *rows = zip(*([table.headings, *table.rows]), strict=True)
    return Table(table.title, ("", *headings[1:]), rows)


def blocks(told: dict[str, Answers]) -> dict[str, str]:
    """Each table, by its name."""
    planned = {name: json.loads((RESULTS / name / "study.json").read_text())["planned"] for name in told}
    each = [(answers, planned[name]) for name, answers in told.items()]
    runs = {f"runs of {words.task(answers)}": markdown(tables.scores(answers)) for answers in told.values()}
    return {"answers": markdown(turned(tables.across(each)))} | runs


def put(page: str, name: str, text: str) -> str:
    """A page with `text` where the table of this name stands, if it has one."""
    block = BLOCK.format(name=name, text=text)
    opening, closing = block.partition("\n")[0], block.rpartition("\n")[2]
    return re.sub(f"{re.escape(opening)}.*?{re.escape(closing)}", lambda _: block, page, flags=re.DOTALL)


def draw(told: dict[str, Answers]) -> None:
    """The documents' figures of the studies."""
    runs = runs_table(RESULTS / "pong")
    save(size_score(runs.filter(runs["arm"].is_in(("rl", "distill-student")))), IMAGES / "size_score.png")
    for name in STUDIES[1:]:
        save(iqm_by_size(told[name]), IMAGES / f"{name.replace('-', '_')}.png")


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        sys.exit(__doc__)
    told = {name: answer(read_study(RESULTS / name).records) for name in STUDIES}
    made = blocks(told)
    stale, homeless = [], set(made)
    for page in PAGES:
        was = now = (ROOT / page).read_text(encoding="utf-8")
        for name, text in made.items():
            now = put(now, name, text)
            homeless -= {name} if BLOCK.format(name=name, text=text) in now else set()
        if now != was:
            stale.append(page)
            if not arguments:
                (ROOT / page).write_text(now, encoding="utf-8")
    if homeless:
        sys.exit(f"no page has a place for {', '.join(sorted(homeless))}: see the first lines of {Path(__file__).name}")
    if arguments:
        print("\n".join(f"{page}: a table is not what the records say: make report" for page in stale) or "tables hold")
        return 1 if stale else 0
    draw(told)
    print("\n".join(f"{page}: tables renewed" for page in stale) or "tables hold")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
