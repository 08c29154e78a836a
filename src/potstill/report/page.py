"""Studies' records -> one HTML page that needs nothing beside it: answers first, then figures, tables and methods."""

import base64
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from potstill import __version__
from potstill.arms import ARMS
from potstill.errors import InputError, printable
from potstill.report import conclusions, tables
from potstill.report import scaling_figures as drawn
from potstill.report.answers import Answers, answer
from potstill.report.figures import STYLE, WIDTH
from potstill.report.groups import Record
from potstill.report.tables import Table
from potstill.results import CURVE_POINTS, curves_table, read_runs, runs_frame
from potstill.storage.checkpoints import write_atomically
from potstill.storage.files import read_bytes, read_json

PHONE = 3.9  # inches: 10 pt text is 13 px high on a screen 390 px wide
FILM_LIMIT = 1_000_000  # bytes
SHOWN = 1_000  # runs in the page's table; a search reaches the others
MOST_DRAWN = 8_000_000  # resamples x runs: of more runs fewer resamples are drawn, but never fewer than 400
FINEST = 20_000  # points of lines, or ten times those of dots, that a part of a figure draws; more become a picture


class Study(NamedTuple):
    """What a page is made of."""

    name: str
    records: list[Record]
    document: dict[str, Any]
    """Of study.json; empty where there is none."""
    films: list[tuple[str, bytes]]
    """Name and content of each .mp4 in the folder that is small enough."""

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


class Section(NamedTuple):
    """A heading, how to read what follows, then figures and tables."""

    title: str
    lead: str
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


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
    runs_frame(records)  # refuses what is no number where one is meant
    if any("curve" not in record for record in records):
        curves = curves_table(folder).select("run", "step", "seconds", "score").drop_nulls("step")
        by_run = {run: frame.drop("run").to_dicts() for (run,), frame in curves.group_by("run", maintain_order=True)}
        for record in (record for record in records if record["run"] in by_run):
            points = by_run[record["run"]]
            record.setdefault("curve", points[::-1][:: math.ceil(len(points) / CURVE_POINTS)][::-1])
    document = read_json(folder / "study.json") if (folder / "study.json").is_file() else {}
    films = []
    for path in sorted(folder.glob("*.mp4")):
        with suppress(InputError):  # a large one; or no film, but a link to what is not to be published
            films.append((path.stem, read_bytes(path, FILM_LIMIT - 1)))
    called = printable(document.get("name") or folder.resolve().name, 200)
    for record in records:
        record |= {key: printable(text, 500) for key, text in record.items() if isinstance(text, str)}
    plan = "\n".join(printable(line) for line in str(document.get("plan") or "").splitlines())
    return Study(called, records, document | {"plan": plan}, films)


class TaskAnswers(NamedTuple):
    """One task of a page."""

    answers: Answers
    planned: int | None
    """Runs that its study plans; None where there is no plan, or one of several tasks."""
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
            each.append(
                TaskAnswers(
                    answer(records, seed, resamples, study.scores), planned if isinstance(planned, int) else None, films
                )
            )
    return each


def _drawn(studies: Sequence[Study], resamples: int) -> int:
    """How many resamples of those asked for are drawn of so many runs."""
    return min(resamples, max(MOST_DRAWN // max(1, sum(len(study.records) for study in studies)), 400))


def render(
    studies: Sequence[Study], seed: int = 0, resamples: int = 10_000, each: Sequence[TaskAnswers] | None = None
) -> str:
    """The page, as HTML. The same studies and seed make the same page.

    Args:
        studies: of `read_study`, each of tasks of its own.
        seed: of all that is drawn.
        resamples: of every bootstrap.
        each: what `answers_of` says of them; None computes it.

    Raises:
        InputError: two studies are of one task.
    """
    each = answers_of(studies, seed, resamples) if each is None else each
    records = [record for study in studies for record in study.records]
    statuses = [str(record.get("status")) for record in records]
    full = tables.runs(records, [answers for answers, *_ in each])
    shown = full._replace(rows=full.rows[:SHOWN])
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("template.html").render(
        name=", ".join(study.name for study in studies),
        version=__version__,
        status=[(status, statuses.count(status)) for status in dict.fromkeys(sorted(statuses))],
        total=sum(max(planned or 0, len(answers.records)) for answers, planned, _ in each),
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
    return {
        "task": conclusions.task(answers),
        "headline": conclusions.headline(answers),
        "said": said,
        "unknown": list(dict.fromkeys(unsaid)) + conclusions.unknown(answers, found.planned, alone),
        "hero": _picture(both, drawn.size_score),
        "kept": tables.kept(answers),
        "sections": [section for section in _sections(answers) if section.pictures or section.tables],
        "films": [(title, "data:video/mp4;base64," + base64.b64encode(data).decode()) for title, data in found.films],
    }


def _sections(answers: Answers) -> Iterable[Section]:
    yield _section(
        answers,
        "Every arm and size",
        "The interval is of the interquartile mean over runs, teachers included.",
        [drawn.size_score] if len(set(answers.arms) & {*ARMS}) > 2 else [],
        [tables.sizes(answers), tables.scores(answers.records)],
        wide=True,
    )
    yield _section(
        answers,
        "Size and score in numbers",
        "The ratio says how many times the parameters RL needs to reach a score, from monotone curves of score in log"
        " size; one that gets there beyond the sizes measured is censored, and a bound. A difference is the arm's"
        " interquartile mean less that of RL. p is that of the exact permutation test of the difference of means,"
        " corrected over the arm's sizes by Holm's method; equivalent: the 90 % interval lies within"
        f" {answers.scale.margin:.2g} of no difference. The probability is that of a run of the arm scoring above one"
        " of RL. <=: RL is not shown to have converged, so the difference may be smaller. A doubling's points are"
        " between neighbouring sizes, paired over the teachers that both have.",
        [drawn.size_ratios, drawn.differences] if len({each.arm for each in answers.differences}) > 1 else [],
        [tables.ratios(answers), tables.differences(answers), tables.growths(answers)],
        wide=True,
    )
    yield _section(
        answers,
        "Score and size needed by budget",
        "RL beside each critic after so many agent steps, against students. Ratios are of RL's size over the student's"
        " at a score; in brackets RL's size over that at the budget before. S(N, D) = S_inf (1 - (D / D0)^-b) is told"
        " where its lack of fit is not significant.",
        [drawn.budgets],
        [tables.ratios_by_budget(answers), tables.passings(answers), tables.laws(answers)],
        wide=True,
    )
    yield _section(
        answers,
        "Learning",
        "RL is called converged where the slope of its last quarter includes 0 and twice the budget gains less than"
        " half a point; else its score is a lower bound. Scores here are means of the last 100 training games.",
        [drawn.learning_curves],
        [tables.convergence(answers), tables.budgets(answers)],
        wide=True,
    )
    yield _section(
        answers, "Cost of deployment", "Measured on one thread, for one observation.", [drawn.cost_fronts], wide=True
    )
    yield _section(
        answers,
        "Bad starts",
        "A random policy plays the first k steps of each game, then the network. Where random play loses a game within"
        " k steps, there is nothing left to play, and every network scores what random play does.",
        [drawn.bad_starts],
        wide=True,
    )
    yield _section(
        answers,
        "Covariate shift",
        "A student that imitates well where its teacher goes may not where it goes itself.",
        [drawn.covariate_shift],
        wide=True,
    )
    lost = " The number over each column is the share of games lost." if answers.scale.points else ""
    yield _section(
        answers,
        "Scores of single games",
        f"A mean can hide games that went wrong.{lost}",
        [drawn.score_distributions],
        wide=True,
    )
    if answers.ablations:
        yield Section(
            "Ablations",
            "Arms of this study's own, at each size below the protocol's arm that they are a change of. The difference"
            " to it, with its 95 % interval, is over the teachers that both have, and takes two runs of each."
            " Seconds are medians of training, on machines that may differ from run to run.",
            tables=[tables.ablations(answers)],
        )


def _section(
    answers: Answers,
    title: str,
    lead: str,
    draws: Sequence[Callable[[Answers, float], Figure]] = (),
    beside: Sequence[Table] = (),
    wide: bool = False,
) -> Section:
    pictures = [picture for draw in draws if (picture := _picture(answers, draw, wide)) is not None]
    return Section(title, lead, pictures, [table for table in beside if table.rows])


def _picture(answers: Answers, draw: Callable[[Answers, float], Figure], wide: bool = False) -> Picture | None:
    """A figure in the sizes that it is shown in; None where there is nothing to draw."""
    try:
        figure = draw(answers, PHONE)
    except InputError:
        return None
    broad = Markup(_svg(draw(answers, WIDTH))) if wide else None  # matplotlib escapes what it draws
    return Picture(figure.get_suptitle().strip(), Markup(_svg(figure)), broad)


def _svg(figure: Figure) -> str:
    """A figure as an element of a page: no prologue, and names that no other figure on the page has."""
    text = StringIO()
    for axes in figure.axes:
        points = sum(np.size(line.get_xdata()) for line in axes.lines)
        if points + 10 * sum(len(np.asarray(dots.get_offsets())) for dots in axes.collections) > FINEST:
            for artist in (*axes.lines, *axes.collections):
                artist.set_rasterized(True)
    with rc_context(STYLE):
        figure.savefig(
            text, format="svg", dpi=130, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = f"f{zlib.crc32(svg.encode()):08x}-"
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{prefix}", svg)
    opening, rest = svg.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", opening) + ">" + rest  # as wide as the page lets it be


def _as_json(rows: Sequence[Sequence[str | tables.Value]]) -> Markup:
    """Rows of a table for the page's script: a cell is what it shows, with what it is sorted by where that differs."""
    cells = [
        [cell if isinstance(cell, str) else cell.text if _says(cell) else list(cell) for cell in row] for row in rows
    ]
    return Markup(json.dumps(cells, separators=(",", ":")).replace("<", "\\u003c"))


def _says(cell: tables.Value) -> bool:
    """Whether the script can read what a cell is sorted by from what it shows: a number, with commas."""
    return isinstance(cell.key, float) and re.fullmatch(r"-?[\d,]+(\.\d+)?", cell.text) is not None


def _facts(studies: Sequence[Study], seed: int, resamples: int, asked: int) -> list[tuple[str, str]]:
    def seen(key: str) -> str:
        values = dict.fromkeys(str(run[key]) for study in studies for run in study.records if run.get(key) is not None)
        shown = list(values)[:6]
        return "; ".join(shown) + (f"; and {len(values) - len(shown)} more" if len(values) > len(shown) else "")

    facts = {
        "Games per run": seen("episodes"),
        "Arithmetic in training": seen("precision"),
        "Threads per run": seen("threads"),
        "Machines": seen("machine"),
        "Commits": seen("commit"),
        "potstill at the runs": "; ".join(
            dict.fromkeys(str(study.document.get("potstill") or "") for study in studies)
        ),
        "Commands of the runs": seen("command"),
        "This page": f"potstill {__version__}, seed {seed}, {resamples:,} resamples"
        + (f" instead of {asked:,}, for there are so many runs" if resamples < asked else ""),
    }
    return [(what, value or "not recorded") for what, value in facts.items()]
