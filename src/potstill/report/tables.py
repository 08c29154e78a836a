"""Answers -> the report's tables."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import attrgetter
from statistics import median
from typing import Any, NamedTuple

from potstill.arms import LONG, REWARD, STUDENTS
from potstill.report import conclusions
from potstill.report.answers import Answers
from potstill.report.budgets import AtBudget, Law
from potstill.report.comparisons import Ablation
from potstill.report.figures import short
from potstill.report.groups import Group, Record, name, number, scored, share_kept
from potstill.tasks import task_of

BUDGETS = {"env_steps": "agent steps", "gradient_steps": "gradient steps", "training_macs": "multiply-adds"}


class Value(NamedTuple):
    """A table's cell: what it shows, and what it is sorted by where that differs."""

    text: str
    key: float | str


Columns = dict[str, Callable[[Any], str | Value]]
"""By heading, what an item shows there."""


class Table(NamedTuple):
    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str | Value]]
    sortable: bool = False
    less: Sequence[str] = ()  # headings of columns that are left out in print


def across(each: Sequence[tuple[Answers, int | None]]) -> Table:
    """What each task answers to each question, side by side, and the runs that its study plans, None without a plan."""

    def row(answers: Answers, planned: int | None) -> list[str | Value]:
        done = sum(record.get("status") == "done" for record in answers.records)
        said = [f"{r.verdict}. {r.short}" if r.answered else "-" for r in conclusions.replies(answers)]
        best = conclusions.kept(answers)
        keeps = f"{100 * best.share:.0f} % of the points, with {best.parameters:,} parameters" if best else "-"
        return [conclusions.task(answers), *said, keeps, f"{done} of {max(planned or 0, len(answers.records))}"]

    rows = [row(answers, planned) for answers, planned in each]
    headings = ("task", *conclusions.SHORT, "What does a student keep of its teacher?", "runs so far")
    return Table("Answers by task", headings, rows)


def scores(records: Sequence[Record]) -> Table:
    """Score of every run that has one, seed after seed, greedy / sampled: an arm a row, a size a column."""
    runs = sorted(filter(scored, records), key=lambda run: (number(run, "seed") or 0.0, str(run.get("run"))))
    sizes = sorted({(int(run["parameters"]), str(run.get("width"))) for run in runs})
    known = [*REWARD, *STUDENTS]

    def place(arm: str) -> tuple[int, str]:
        base = LONG.get(arm, arm)  # beside what it is the longer of
        return (known.index(base) if base in known else len(known), arm)

    def told(arm: str, size: tuple[int, str]) -> str:
        found = [run for run in runs if (run.get("arm"), int(run["parameters"]), run.get("width")) == (arm, *size)]
        return ", ".join(f"{run['score']:.1f} / {_number(number(run, 'score_sampled'), '.1f')}" for run in found)

    rows = [[arm, *(told(arm, size) for size in sizes)] for arm in sorted({str(r.get("arm")) for r in runs}, key=place)]
    headings = ("arm", *(f"{w} ({short(parameters)})" for parameters, w in sizes))
    return Table("Scores of the runs, greedy / sampled, seed by seed", headings, rows)


def kept(answers: Answers) -> Table:
    """The first table: what a student of each size keeps, and what RL of that size scores."""
    two = [group for group in answers.groups if group.arm in ("rl", answers.student)]
    at = {(group.arm, group.parameters): group for group in two}

    def score(arm: str, parameters: int) -> str:
        group = at.get((arm, parameters))
        return f"{group.score.value:.1f}" if group is not None else "-"

    student = answers.student or ""
    columns: Columns = {
        "parameters": _integer,
        "RL scores": lambda parameters: score("rl", parameters),
        "a student scores": lambda parameters: score(student, parameters),
        "and keeps": lambda parameters: _kept(at.get((student, parameters))),
    }
    return _measured("Scores and what is kept", columns, sorted({group.parameters for group in two}))


def sizes(answers: Answers) -> Table:
    """Every arm at every size, beside its teacher; without columns in which nothing was measured."""
    columns: Columns = {
        "arm": lambda group: name(group.arm),
        "width": lambda group: _width(group.width),
        "parameters": lambda group: _integer(group.parameters),
        "runs": lambda group: f"{len(group.runs)}" + f" of {len(group.teachers)} teachers" * (len(group.teachers) > 1),
        "score": lambda group: (">= " if group.lower_bound else "") + f"{group.score.value:.1f}",
        "95 % interval": lambda group: _interval(group.score.low, group.score.high),
        "teacher's score": lambda group: _number(group.middle("teacher_score"), ".1f"),
        "teacher's parameters": lambda group: _number(group.middle("teacher_parameters"), ",.0f"),
        "keeps": _kept,
        "sampled": lambda group: _number(group.middle("score_sampled"), ".1f"),
        "not sticky": lambda group: _number(group.middle("score_nosticky"), ".1f"),
        "P(score < 0)": lambda group: _number(group.mean("p_negative") if answers.scale.points else None, ".0%"),
        "distinct games": lambda group: _number(group.middle("distinct"), ".0f"),
    }
    return _measured("Scores, per arm and size", columns, answers.groups)


def _kept(group: Group | None) -> str:
    teacher = group.middle("teacher_score") if group is not None else None
    share = share_kept(group.score.value, teacher) if group is not None and teacher is not None else None
    return f"{100 * share:.0f} %" if share is not None else "-"


def _measured(title: str, columns: Columns, items: Iterable[Any], **options: Any) -> Table:
    """A row per item; a column in which all have a dash is left out."""
    rows = [[show(item) for show in columns.values()] for item in items]
    kept = [at for at in range(len(columns)) if any(row[at] != "-" for row in rows)]
    return Table(title, [list(columns)[at] for at in kept], [[row[at] for at in kept] for row in rows], **options)


def ratios(answers: Answers) -> Table:
    columns: Columns = {
        "size of": lambda ratio: f"{name(ratio.reward)} / {name(ratio.student)}",
        "score": lambda ratio: f"{ratio.target:g}",
        "ratio": lambda ratio: conclusions.ratio_text(ratio.size),
        "95 % interval": lambda ratio: conclusions.span(*ratio.size.interval),
        "resamples not censored": lambda ratio: f"{ratio.size.exact:.0%}",
    }
    return _measured("Ratios of sizes", columns, answers.ratios)


def differences(answers: Answers) -> Table:
    columns: Columns = {
        "arm": lambda each: name(each.arm),
        "width": lambda each: _width(each.width),
        "difference": lambda each: ("<= " if each.lower_bound else "") + _signed(each.score.value),
        "95 % interval": lambda each: _interval(each.score.low, each.score.high, "+.1f"),
        "p (Holm)": lambda each: _number(each.p, ".4f"),
        "equivalent": lambda each: "yes" if each.equivalent else "not shown",
        "probability of improvement": lambda each: f"{each.improvement:.2f}",
    }
    return _measured("Differences to RL from scratch", columns, answers.differences)


def ratios_by_budget(answers: Answers) -> Table:
    """RL's size over the student's at each score, and over RL's own at the budget before."""

    def told(at: AtBudget, target: float) -> str:
        size = next(ratio.size for ratio in at.ratios if ratio.target == target)
        if size.interval == (0.0, math.inf):
            return "not bounded"
        before = next((f" [x {conclusions.ratio_text(bounded)}]" for s, bounded in at.shrunk if s == target), "")
        return f"{conclusions.ratio_text(size)} ({conclusions.span(*size.interval)}){before}"

    columns: Columns = {"RL": _critic, "play": attrgetter("play"), "agent steps": lambda at: _cost(at.steps)}
    columns |= {f"{target:g}": partial(told, target=target) for target in answers.scale.targets}
    each = filter(attrgetter("ratios"), answers.at_budgets)
    return _measured("Ratio of sizes by budget, at each score", columns, each)


def passings(answers: Answers) -> Table:
    columns: Columns = {
        "RL": _critic,
        "play": attrgetter("play"),
        "width": lambda each: _width(each.width),
        "passes the student after": lambda each: conclusions.steps_text(each.steps.low, each.steps.high),
        "95 % interval": lambda each: conclusions.steps_text(*each.steps.interval),
        "student's and teacher's steps": lambda each: _cost(each.spent),
    }
    return _measured("Agent steps after which RL passes a student of its size", columns, answers.passings)


def laws(answers: Answers) -> Table:
    def row(each: Law) -> list[str | Value]:
        fits = each.law.p >= conclusions.LEVEL
        limits = ", ".join(f"{limit:.1f} at {short(size)}" for size, (limit, _) in each.law.sizes.items())
        told = [f"{each.law.power:.2f}", limits] if fits else ["does not fit", "-"]
        return [name(each.reward), each.play, f"{each.law.lack:.1f}", f"{each.law.p:.3f}", *told]

    headings = ("RL", "play", "F of lack of fit", "p", "b", "S_inf")
    return Table("S(N, D) = S_inf (1 - (D / D0)^-b)", headings, [row(each) for each in answers.laws])


def growths(answers: Answers) -> Table:
    columns: Columns = {
        "arm": lambda each: name(each.arm),
        "parameters": lambda each: "{:,} to {:,}".format(*each.sizes),
        "points per doubling": lambda each: _signed(each.score.value),
        "95 % interval": lambda each: _interval(each.score.low, each.score.high, "+.1f"),
    }
    return _measured("Points gained per doubling of the parameters", columns, answers.growths)


def convergence(answers: Answers) -> Table:
    rows = []
    for arm in REWARD:
        for group in answers.of(arm):
            names = {str(run.get("run")) for run in group.runs}
            mine = [certificate for certificate in answers.certificates if certificate.run in names]
            verdicts = [certificate.verdict for certificate in mine]
            gains = [c.convergence.gain for c in mine if c.convergence is not None and c.convergence.gain is not None]
            runs = "1 run" if len(gains) == 1 else f"{len(gains)} runs"
            counts = [f"{verdicts.count(verdict)}" for verdict in ("converged", "not converged", "unknown")]
            gained = f"{_signed(median(gains))} ({runs})" if gains else "not extended"
            rows.append([name(arm), _width(group.width), *counts, gained])
    headings = ("arm", "width", "converged", "not converged", "unknown", "gain of twice the budget")
    return Table("Convergence of RL", headings, rows)


def budgets(answers: Answers) -> Table:
    def cost(key: str) -> Callable[[Group], str | Value]:
        return lambda group: _cost(group.middle(key))

    columns: Columns = {"arm": lambda group: name(group.arm), "width": lambda group: _width(group.width)}
    columns |= {words: cost(key) for key, words in BUDGETS.items()}
    columns |= {"seconds": lambda group: _number(group.middle("wall_seconds"), ",.0f")}
    columns |= {f"teacher's {words}": cost(f"teacher_{key}") for key, words in BUDGETS.items()}
    return _measured("Budgets per run: medians", columns, answers.groups)


def ablations(answers: Answers) -> Table:
    """Of the arms that are not the protocol's, by size, below the protocol's arm that they are a change of."""

    def less(each: Ablation) -> str:
        found = each.less_base
        return f"{_signed(found.value)} ({_interval(found.low, found.high, '+.1f')})" if found else ""

    columns: Columns = {
        "arm": lambda each: each.group.arm,
        "width": lambda each: _width(each.group.width),
        "runs": lambda each: f"{len(each.group.runs)}",
        "score": lambda each: f"{each.group.score.value:.1f}",
        "95 % interval": lambda each: _interval(each.group.score.low, each.group.score.high),
        "less the protocol's arm": less,
        "sampled": lambda each: _number(each.group.middle("score_sampled"), ".1f"),
        "seconds": lambda each: _number(each.group.middle("wall_seconds"), ",.0f"),
    }
    by_base: dict[tuple[int, str], list[Ablation]] = {}
    for each in answers.ablations:
        base = each.base
        first = [Ablation(base, None, None)] if base else []
        by_base.setdefault((each.group.parameters, base.arm if base else ""), first).append(each)
    return _measured("Scores and seconds", columns, [each for _, group in sorted(by_base.items()) for each in group])


def runs(records: Sequence[Record], each: Sequence[Answers]) -> Table:
    verdicts = {certificate.run: certificate.verdict for answers in each for certificate in answers.certificates}
    columns: Columns = {
        "run": lambda run: str(run.get("run")),
        "status": lambda run: ": ".join(str(run[key]) for key in ("status", "error") if run.get(key)),
        "arm": lambda run: str(run.get("arm") or "-"),
        "width": lambda run: _width(str(run.get("width") or "-")),
        "parameters": lambda run: _integer(number(run, "parameters")),
        "seed": lambda run: _integer(number(run, "seed")),
        "teacher": lambda run: str(run.get("teacher") or "-"),
        "score": lambda run: _sorted(number(run, "score"), ".1f"),
        "sampled": lambda run: _sorted(number(run, "score_sampled"), ".1f"),
        "not sticky": lambda run: _sorted(number(run, "score_nosticky"), ".1f"),
        "P(score < 0)": lambda run: _sorted(
            number(run, "p_negative") if task_of(str(run.get("env"))).two_sided else None, ".0%"
        ),
        "converged": lambda run: verdicts.get(str(run.get("run")), "-"),
        "agent steps": lambda run: _cost(number(run, "env_steps")),
        "gradient steps": lambda run: _cost(number(run, "gradient_steps")),
        "multiply-adds": lambda run: _cost(number(run, "training_macs")),
        "seconds": lambda run: _sorted(number(run, "wall_seconds"), ",.0f"),
        "ms": lambda run: _sorted(number(run, "latency_ms"), ".2f"),
    }
    order = sorted(records, key=lambda run: (run.get("arm") in LONG, str(run.get("run"))))
    less = ("sampled", "not sticky", "gradient steps", "multiply-adds", "ms", "teacher", "seed", "arm", "width")
    return _measured("All runs", columns, order, sortable=True, less=less)


def _critic(each: Any) -> str:
    return name(each.reward)


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # never -0.0


def _interval(low: float, high: float, form: str = ".1f") -> str:
    return f"{low:{form}} to {high:{form}}" if math.isfinite(low) and math.isfinite(high) else "-"


def _width(text: str) -> str | Value:
    above, _, below = text.partition("/")
    try:
        return Value(text, float(above) / float(below or 1))
    except (ValueError, ZeroDivisionError):
        return text


def _integer(value: float | None) -> str | Value:
    return _sorted(value, ",.0f")


def _number(value: float | None, form: str) -> str:
    return f"{value:{form}}" if value is not None else "-"


def _cost(value: float | None) -> str | Value:
    if value is None:
        return "-"
    return Value(f"{value / 1e12:.3g}T" if value >= 1e12 else short(value), value)


def _sorted(value: float | None, form: str) -> str | Value:
    return Value(f"{value:{form}}", value) if value is not None else "-"
