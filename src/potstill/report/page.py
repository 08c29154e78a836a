"""Studies' records -> one HTML page that needs nothing beside it: answers first, then figures, tables and methods."""

import base64
import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.figure import Figure

from potstill import __version__
from potstill.arms import ARMS
from potstill.errors import InputError, printable
from potstill.report import conclusions, tables
from potstill.report import scaling_figures as drawn
from potstill.report.answers import Answers, answer
from potstill.report.figures import WIDTH, svg, template
from potstill.report.groups import Record
from potstill.results import CURVE_POINTS, check_labels, curve_of, read_runs
from potstill.storage.checkpoints import write_atomically
from potstill.storage.files import read_bytes, read_json

FIGURES = (
    drawn.size_score, drawn.size_ratios, drawn.differences, drawn.budgets, drawn.learning_curves, drawn.cost_fronts,
    drawn.bad_starts, drawn.covariate_shift, drawn.score_distributions,
)  # fmt: skip
TABLES = (
    tables.sizes, tables.ratios, tables.differences, tables.growths, tables.ratios_by_budget, tables.passings,
    tables.laws, tables.convergence, tables.budgets, tables.ablations,
)  # fmt: skip
"""What the template shows in detail, by the names of these functions; it says where, and how to read it."""
PHONE = 3.9  # inches: 10 pt text is 13 px high on a screen 390 px wide
FILM_LIMIT = 1_000_000  # bytes
SHOWN = 500  # runs in the page's table; a search reaches the others
MOST_DRAWN = 8_000_000  # resamples x runs: of more runs fewer resamples are drawn, but never fewer than 400


class Study(NamedTuple):
    """What a page is made of."""

    name: str
    records: list[Record]
    document: dict[str, Any]  # of study.json; empty where there is none
    films: list[tuple[str, bytes]]  # name and content of each .mp4 in the folder that is small enough

    @property
    def scores(self) -> tuple[float, ...]:
        """Those at which its plan compares sizes; empty where it leaves them to the task."""
        scores = self.document.get("scores")
        known = scores if isinstance(scores, list) else []
        return tuple(float(score) for score in known if type(score) in (int, float) and math.isfinite(score))


class Picture(NamedTuple):
    """A figure as SVG: `wide` stands where there is room for it and `narrow` elsewhere, or `narrow` everywhere."""

    words: str
    narrow: Markup
    wide: Markup | None = None


def write(folders: Sequence[Path], out: Path, seed: int = 0, resamples: int = 10_000) -> list[str]:
    """Makes one page of the studies in `folders` and writes it to `out`, atomically; an older one there is replaced.

    Returns:
        What it says, a sentence each: the headline of each task and its answers.

    Raises:
        InputError: no runs there, a file of one is damaged, two studies are of one task, or `out` cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{out}: a report is written as .html")
    studies = [read_study(folder) for folder in folders]
    each = answers_of(studies, seed, resamples)
    write_atomically(out, render(studies, seed, resamples, each).encode())
    return [
        f"{conclusions.task(answers)}: {line}" if len(each) > 1 else line
        for answers, *_ in each
        for line in (conclusions.headline(answers), *(reply.spoken for reply in conclusions.replies(answers)))
        if line
    ]


def read_study(folder: Path) -> Study:
    """Everything of a study's folder that its report shows, without control characters, and words of any length cut.

    Raises:
        InputError: as `results.read_runs`, or study.json is damaged.
    """
    folder = Path(folder)
    records = read_runs(folder)
    check_labels(records)
    for record in records:
        record["curve"] = curve_of(record, CURVE_POINTS)
    document = read_json(folder / "study.json") if (folder / "study.json").is_file() else {}
    films = []
    for path in sorted(folder.glob("*.mp4")):
        with suppress(InputError):  # a large one; or no film, but a link to what is not to be published
            films.append((path.stem, read_bytes(path, FILM_LIMIT - 1)))
    called = printable(document.get("name") or folder.resolve().name, 200)
    say = cache(partial(printable, longest=500))  # many say the same, of which one is kept
    for record in records:
        record |= {key: say(text) for key, text in record.items() if isinstance(text, str)}
    plan = "\n".join(printable(line) for line in str(document.get("plan") or "").splitlines())
    return Study(called, records, document | {"plan": plan}, films)


class TaskAnswers(NamedTuple):
    """One task of a page."""

    answers: Answers
    planned: int | None  # runs that its study plans; None where there is no plan, or one of several tasks
    films: Sequence[tuple[str, bytes]]


def answers_of(studies: Sequence[Study], seed: int = 0, resamples: int = 10_000) -> list[TaskAnswers]:
    """What each task of the studies answers. Raises InputError where two studies are of one task."""
    resamples, each = _drawn(studies, resamples), list[TaskAnswers]()
    for study in studies:
        tasks = list(dict.fromkeys(str(record["env"]) for record in study.records if record.get("env"))) or [""]
        if twice := {found.answers.task for found in each} & set(tasks):
            raise InputError(f"two of the studies are of {twice.pop()}: their runs would be counted as one study's")
        planned = study.document.get("planned") if len(tasks) == 1 else None
        for task in tasks:
            records = [record for record in study.records if (record.get("env") or tasks[0]) == task]
            films = study.films if task == tasks[0] else []
            told = answer(records, seed, resamples, study.scores)
            each.append(TaskAnswers(told, planned if isinstance(planned, int) else None, films))
    return each


def _drawn(studies: Sequence[Study], resamples: int) -> int:
    """How many resamples of those asked for are drawn of so many runs."""
    return min(resamples, max(MOST_DRAWN // max(1, sum(len(study.records) for study in studies)), 400))


def render(
    studies: Sequence[Study], seed: int = 0, resamples: int = 10_000, each: Sequence[TaskAnswers] | None = None
) -> str:
    """The page, as HTML. The same studies and seed make the same page; `each` is what `answers_of` says of them.

    Raises:
        InputError: two studies are of one task.
    """
    each = answers_of(studies, seed, resamples) if each is None else each
    records = [record for study in studies for record in study.records]
    statuses = [str(record.get("status")) for record in records]
    waiting = sum(max((planned or 0) - len(answers.records), 0) for answers, planned, _ in each)
    full = tables.runs(records, [answers for answers, *_ in each])
    shown = full._replace(rows=full.rows[:SHOWN])
    return template("study.html").render(
        name=", ".join(conclusions.task(answers) for answers, *_ in each if answers.task) or studies[0].name,
        version=__version__,
        status=[(status, statuses.count(status)) for status in sorted({*statuses})],
        waiting=waiting,
        across=tables.across([(answers, planned) for answers, planned, _ in each]) if len(each) > 1 else None,
        tasks=[_task(found, alone=len(each) == 1) for found in each],
        runs=shown,
        more=_as_json(full.rows[SHOWN:]),
        facts=_facts(studies, seed, _drawn(studies, resamples), resamples),
        plans=[plan for study in studies if (plan := str(study.document.get("plan") or ""))],
    )


def _task(found: TaskAnswers, alone: bool) -> dict[str, Any]:
    """What the template shows of one task: the question with its answer and figure first, then all else."""
    answers = found.answers
    replies = conclusions.replies(answers)
    two = ("rl", answers.student)
    both = replace(
        answers,
        groups=tuple(group for group in answers.groups if group.arm in two),
        ratios=tuple(ratio for ratio in answers.ratios if {ratio.reward, ratio.student} <= {*two}),
        differences=tuple(each for each in answers.differences if each.arm in two),
    )
    drawings = zip(replies, (drawn.size_ratios, drawn.differences, drawn.growth), strict=True)
    said = [(reply, _picture(both, draw)) for reply, draw in drawings if reply.answered]
    unsaid = [f"{reply.question} {reply.sentence}" for reply in replies if not reply.answered]
    front = {drawn.size_score} if len({*answers.arms} & {*ARMS}) < 3 else set()  # which shows all of them
    front |= {drawn.size_ratios, drawn.differences} if len({each.arm for each in answers.differences}) < 2 else set()
    details = [draw for draw in FIGURES if draw not in front]
    made = {make.__name__: make(answers) for make in TABLES} | {"scores": tables.scores(answers.records)}
    return {
        "task": conclusions.task(answers),
        "headline": conclusions.headline(answers),
        "said": said,
        "unknown": [*dict.fromkeys(unsaid), *conclusions.unknown(answers, found.planned, alone)],
        "hero": _picture(both, drawn.size_score),
        "kept": tables.kept(answers),
        "scale": answers.scale,
        "figures": {draw.__name__: shown for draw in details if (shown := _picture(answers, draw, wide=True))},
        "tables": {name: table for name, table in made.items() if table.rows},
        "films": [(title, "data:video/mp4;base64," + base64.b64encode(data).decode()) for title, data in found.films],
    }


def _picture(answers: Answers, draw: Callable[[Answers, float], Figure], wide: bool = False) -> Picture | None:
    """A figure in the sizes that it is shown in; None where there is nothing to draw."""
    try:
        figure = draw(answers, PHONE)
    except InputError:
        return None
    return Picture(figure.get_suptitle().strip(), svg(figure), svg(draw(answers, WIDTH)) if wide else None)


def _as_json(rows: Sequence[Sequence[str | tables.Value]]) -> Markup:
    """Rows of a table for the page's script: a cell is what it shows, with what it is sorted by where that differs."""
    number = re.compile(r"-?[\d,]+(\.\d+)?")  # from which the script reads what it is sorted by

    def told(cell: str | tables.Value) -> str | list[str | float]:
        if isinstance(cell, str):
            return cell
        return cell.text if isinstance(cell.key, float) and number.fullmatch(cell.text) else list(cell)

    cells = [[told(cell) for cell in row] for row in rows]
    return Markup(json.dumps(cells, separators=(",", ":")).replace("<", "\\u003c"))


def _facts(studies: Sequence[Study], seed: int, resamples: int, asked: int) -> list[tuple[str, str]]:
    def seen(key: str) -> str:
        values = dict.fromkeys(str(run[key]) for study in studies for run in study.records if run.get(key) is not None)
        shown = list(values)[:6]
        return "; ".join(shown) + (f"; and {len(values) - len(shown)} more" if len(values) > len(shown) else "")

    asked_for = f" instead of {asked:,}, for there are so many runs" if resamples < asked else ""
    facts = {
        "Games per run": seen("episodes"), "Arithmetic in training": seen("precision"),
        "Threads per run": seen("threads"), "Machines": seen("machine"), "Commits": seen("commit"),
        "potstill at the runs": "; ".join(dict.fromkeys(str(each.document.get("potstill") or "") for each in studies)),
        "Commands of the runs": seen("command"),
        "This page": f"potstill {__version__}, seed {seed}, {resamples:,} resamples{asked_for}",
    }  # fmt: skip
    return [(what, value or "not recorded") for what, value in facts.items()]
