"""Studies' records -> one HTML page that needs nothing beside it: answers first, then figures, tables and methods."""

import base64
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
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
from potstill.report.figures import STYLE, WIDTH, score_distributions
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


class Section(NamedTuple):
    """A heading, how to read what follows, then figures and tables; what a study lacks is a line of its own."""

    title: str
    lead: str
    figures: Sequence[Markup] = ()
    tables: Sequence[Table] = ()
    lacks: Sequence[str] = ()


def write(folders: Sequence[Path], out: Path, seed: int = 0, resamples: int = 10_000) -> None:
    """Makes one page of the studies in `folders` and writes it to `out`, atomically; an older one there is replaced.

    Raises:
        InputError: no runs there, a file of one is damaged, two studies are of one task, or `out` cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{out}: a report is written as .html")
    write_atomically(out, render([read_study(folder) for folder in folders], seed, resamples).encode())


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


def render(studies: Sequence[Study], seed: int = 0, resamples: int = 10_000) -> str:
    """The page, as HTML. The same studies and seed make the same page.

    Args:
        studies: of `read_study`, each of tasks of its own.
        seed: of all that is drawn.
        resamples: of every bootstrap.

    Raises:
        InputError: two studies are of one task.
    """
    asked, resamples = resamples, min(resamples, max(MOST_DRAWN // max(1, sum(len(s.records) for s in studies)), 400))
    each: list[tuple[Answers, int | None]] = []  # with the runs planned, where the study says so
    for study in studies:
        tasks = list(dict.fromkeys(str(record["env"]) for record in study.records if record.get("env"))) or [""]
        if twice := {answers.task for answers, _ in each} & set(tasks):
            raise InputError(f"two of the studies are of {twice.pop()}: their runs would be counted as one study's")
        planned = study.document.get("planned") if len(tasks) == 1 else None
        for task in tasks:
            records = [record for record in study.records if (record.get("env") or tasks[0]) == task]
            each.append((answer(records, seed, resamples, study.scores), planned if isinstance(planned, int) else None))
    records = [record for study in studies for record in study.records]
    statuses = [str(record.get("status")) for record in records]
    full = tables.runs(records, [answers for answers, _ in each])
    shown = full._replace(rows=full.rows[:SHOWN])
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("template.html").render(
        name=", ".join(study.name for study in studies),
        version=__version__,
        status=[(status, statuses.count(status)) for status in dict.fromkeys(sorted(statuses))],
        total=sum(max(planned or 0, len(answers.records)) for answers, planned in each),
        across=tables.across(each) if len(each) > 1 else None,
        tasks=[
            {
                "task": conclusions.task(answers),
                "replies": conclusions.replies(answers),
                "unknown": conclusions.unknown(answers, planned, alone=len(each) == 1),
                "hero": _of(answers, "", "", [drawn.iqm_by_size]),
                "sections": list(_sections(answers)),
            }
            for answers, planned in each
        ],
        runs=shown,
        more=_as_json(full.rows[SHOWN:]),
        films=[
            (title, "data:video/mp4;base64," + base64.b64encode(data).decode())
            for study in studies
            for title, data in study.films
        ],
        facts=_facts(studies, seed, resamples, asked),
        plans=[plan for study in studies if (plan := str(study.document.get("plan") or ""))],
    )


def _sections(answers: Answers) -> Iterable[Section]:
    yield _of(
        answers,
        "Sizes and scores",
        "Every arm at every size; the interval is of the interquartile mean over runs, teachers included.",
        side=[tables.sizes(answers), tables.scores(answers.records)],
    )
    yield _of(
        answers,
        "Size needed for a score",
        "How many times the parameters RL needs to reach a score, from monotone curves of score in log size. A curve"
        " that reaches it below the smallest size or not at all leaves a bound only: the ratio is censored.",
        [drawn.size_ratios],
        [tables.ratios(answers)],
    )
    yield _of(
        answers,
        "Difference at equal size",
        "The arm's interquartile mean less that of RL from scratch. p is that of the exact permutation test of the"
        " difference of means, corrected over the arm's sizes by Holm's method; equivalent: the 90 % interval lies"
        f" within {answers.scale.margin:.2g} of no difference. The"
        " probability is that of a run of the arm scoring above one of RL. <=: RL is not shown to have converged, so"
        " the difference may be smaller.",
        [drawn.differences],
        [tables.differences(answers)],
    )
    yield _of(
        answers,
        "Score and size needed by budget",
        "RL beside each critic after so many agent steps, against students. Ratios are of RL's size over the student's"
        " at a score; in brackets RL's size over that at the budget before. S(N, D) = S_inf (1 - (D / D0)^-b) is told"
        " where its lack of fit is not significant.",
        [drawn.budgets],
        [tables.ratios_by_budget(answers), tables.passings(answers), tables.laws(answers)],
    )
    yield _of(
        answers,
        "Growth with size",
        "Between each two neighbouring sizes, as no one law fits them; paired over the teachers that both sizes have.",
        [drawn.growth],
        [tables.growths(answers)],
    )
    yield _of(
        answers,
        "Learning",
        "RL is called converged where the slope of its last quarter includes 0 and twice the budget gains less than"
        " half a point; else its score is a lower bound.",
        side=[tables.convergence(answers), tables.budgets(answers)],
    )
    yield _of(answers, "Cost of deployment", "Measured on one thread, for one observation.", [drawn.cost_fronts])
    yield _of(
        answers,
        "Bad starts",
        "A random policy plays the first k steps of each game, then the network. Where random play loses a game within"
        " k steps, there is nothing left to play, and every network scores what random play does.",
        [drawn.bad_starts],
    )
    yield _of(
        answers,
        "Covariate shift",
        "A student that imitates well where its teacher goes may not where it goes itself.",
        [drawn.covariate_shift],
    )
    first = ("rl", "distill-student", "distill-teacher")
    groups = [first, tuple(arm for arm in ARMS if arm not in first)]
    figures, lacks = [], []
    for group in groups:
        present = [arm for arm in group if answers.of(arm)]
        if present:
            figures.append(
                _wide_and_narrow([_games(answers, present)], [_games(answers, [arm], PHONE) for arm in present])
            )
    if not figures:
        lacks = ["No game was played: no run is done and has a score."]
    yield Section(
        "Scores of single games", "A mean can hide games lost: P(score < 0) stands on top.", figures, (), lacks
    )
    if answers.ablations:
        yield Section(
            "Ablations",
            "Arms of this study's own, at each size below the protocol's arm that they are a change of. The difference"
            " to it, with its 95 % interval, is over the teachers that both have, and takes two runs of each."
            " Seconds are medians of training, on machines that may differ from run to run.",
            tables=[tables.ablations(answers)],
        )


def _of(
    answers: Answers,
    title: str,
    lead: str,
    draws: Sequence[Callable[[Answers, float], Figure]] = (),
    side: Sequence[Table] = (),
) -> Section:
    figures, lacks = [], []
    for draw in draws:
        try:
            figures.append(_wide_and_narrow([draw(answers, WIDTH)], [draw(answers, PHONE)]))
        except InputError as error:
            lacks.append(f"No figure: {error}.")
    full = [table for table in side if table.rows]
    if not (figures or full or lacks):
        lacks.append("No run is done and has a score.")
    return Section(title, lead, figures, full, lacks)


def _games(answers: Answers, arms: Sequence[str], width: float = WIDTH) -> Figure:
    groups = [group for arm in arms for group in answers.of(arm)]
    scores = [np.concatenate([run for runs in group.games for run in runs]) for group in groups]
    counts = [len(each) for each in scores]
    columns = {
        "arm": np.repeat([group.arm for group in groups], counts),
        "env": np.repeat([answers.task] * len(groups), counts),
        "width": np.repeat([group.width for group in groups], counts),
        "parameters": np.repeat([group.parameters for group in groups], counts),
        "score": np.concatenate(scores),
    }
    return score_distributions(pl.DataFrame(columns), width)


def _wide_and_narrow(wide: Sequence[Figure], narrow: Sequence[Figure]) -> Markup:
    """Both sizes of a figure; the style sheet shows the one that fits the screen."""
    parts = [
        Markup('<div class="{}" role="img" aria-label="{}">').format(kind, figures[0].get_suptitle().strip())
        + Markup("".join(map(_svg, figures)) + "</div>")  # matplotlib escapes what it draws
        for kind, figures in (("wide", wide), ("narrow", narrow))
    ]
    return Markup("<figure>") + Markup("").join(parts) + Markup("</figure>")


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
