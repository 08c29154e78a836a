"""Answers -> sentences: each question answered in one, with its number and interval, and what is not known."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from potstill.analysis.scaling import Bounded
from potstill.arms import REWARD, STUDENTS
from potstill.report.answers import Answers
from potstill.report.budgets import PLAYS
from potstill.report.comparisons import Difference, Ratio
from potstill.report.figures import short
from potstill.report.groups import name, share_kept

QUESTIONS = (
    "Does learning from reward need a bigger network than supervised learning, for the same performance?",
    "Can a distilled network beat an RL agent of the same size?",
    "How do both scale with size?",
)
SHORT = (
    "Does RL need a bigger network for the same score?",
    "Can a student beat RL of its size?",
    "How do both scale with size?",
)
LEVEL = 0.05
ENOUGH_KEPT = 0.75
STILL_LEARNING = " RL may still have been learning, so more steps may change this."


class Reply(NamedTuple):
    """A question answered."""

    question: str
    verdict: str  # a word or two: Yes, No, Not shown, Cannot be said and so on
    sentence: str  # all that the answer rests on
    notes: tuple[str, ...] = ()  # what the sentence depends on
    short: str = ""
    """Its one number, for who reads one sentence only; empty where nothing can be said."""

    @property
    def answered(self) -> bool:
        return bool(self.short)

    @property
    def spoken(self) -> str:
        """Question and answer in one line; empty where nothing can be said."""
        return f"{SHORT[QUESTIONS.index(self.question)]} {self.verdict}. {self.short}" if self.short else ""


class Kept(NamedTuple):
    """How much of its teacher's points a student keeps, and at what size."""

    share: float
    parameters: int
    score: float
    teacher_score: float
    teacher_parameters: int | None  # None where the records do not tell

    @property
    def smaller(self) -> str:
        """', 59 times smaller than its teacher of 424,019'"""
        if (whole := self.teacher_parameters) is None:
            return ""
        return f", {times(whole / self.parameters)} times smaller than its teacher of {whole:,},"


def kept(answers: Answers) -> Kept | None:
    """The smallest size at which the student keeps three quarters of its teacher's points, or else the best of them.

    None where no student is compared with a teacher that has points to keep.
    """
    found = []
    for group in answers.of(answers.student or ""):
        teacher, size = group.middle("teacher_score"), group.middle("teacher_parameters")
        share = share_kept(group.score.value, teacher) if teacher is not None else None
        if teacher is not None and share is not None:
            whole = int(size) if size is not None else None
            found.append(Kept(share, group.parameters, group.score.value, teacher, whole))
    return next((each for each in found if each.share >= ENOUGH_KEPT), max(found, default=None))


def headline(answers: Answers) -> str:
    """What the study found in one sentence; empty where it has no student."""
    found = kept(answers)
    if found is None:
        return ""
    return (
        f"A student of {found.parameters:,} parameters{found.smaller} keeps {100 * found.share:.0f} % of the teacher's"
        f" points: {found.score:.1f} of {found.teacher_score:.1f}."
    )


def replies(answers: Answers) -> tuple[Reply, ...]:
    """The three questions and their answers, by rules that were fixed before the runs (docs/howto/report.md)."""
    bigger, equal, scaling = QUESTIONS
    lacking = [] if answers.of("rl") else ["RL from scratch"]
    lacking += [] if answers.student else ["a distilled network"]
    if lacking:
        missing = f"The study has no finished run of {' or of '.join(lacking)}."
        return tuple(Reply(question, "Cannot be said", missing) for question in QUESTIONS)
    return _overhead(bigger, answers), _equal_size(equal, answers), _growth(scaling, answers)


def ratio_text(size: Bounded) -> str:
    """2.3, more than 4.0, at most 0.50, unknown."""
    if size.low == size.high:
        return times(size.low)
    if size.low == 0:
        return f"at most {times(size.high)}" if math.isfinite(size.high) else "unknown"
    return f"more than {times(size.low)}"


def span(low: float, high: float, form: str | None = None) -> str:
    """'1.9 to 5.0'; an end that nothing bounds is said in words. Without a form, of ratios, which 0 does not bound."""
    first, last = (times(end) if form is None else f"{end:{form}}" for end in (low, high))
    if math.isfinite(low) and math.isfinite(high) and not (low == 0 and form is None):
        return f"{first} to {last}"
    if math.isfinite(high):
        return f"up to {last}, no lower end"
    if math.isfinite(low) and low != 0:
        return f"from {first}, no upper end"
    return "without ends"


def times(ratio: float) -> str:
    """To two figures, which is what so few runs carry, and a third where two would say 1; never as a power of ten."""
    text = f"{ratio:#.2g}" if float(f"{ratio:.2g}") != 1 else f"{ratio:#.3g}"
    return text.rstrip(".") if ratio < 99.5 else f"{float(text):,.0f}"


def steps_text(low: float, high: float) -> str:
    """'1.2M', 'more than 2.0M', 'before 1.0M', '1.0M to 2.0M'."""
    if low == high:
        return short(low)
    if low == 0:
        return f"before {short(high)}" if math.isfinite(high) else "not known"
    return f"{short(low)} to {short(high)}" if math.isfinite(high) else f"more than {short(low)}"


def _overhead(question: str, answers: Answers) -> Reply:
    student = answers.student or ""
    ours = [ratio for ratio in answers.ratios if (ratio.reward, ratio.student) == ("rl", student)]
    scores = ", ".join(f"{target:g}" for target in answers.scale.targets)
    told = [ratio for ratio in ours if _bounded(ratio)]
    if not told:
        why = (
            f"At none of the scores asked for ({scores}) do the runs bound the ratio of sizes: RL from scratch or"
            f" {name(student)} reaches them beyond the sizes measured, or too near their ends. {_wanted(answers)}"
            if ours
            else f"A ratio of sizes takes two sizes or more at which both RL from scratch and {name(student)} have two"
            " runs or more; this study has fewer."
        )
        return Reply(question, "Cannot be said", why)
    soft = [ratio for ratio in answers.sampled.ratios if _bounded(ratio)] if answers.sampled else []
    open_ = any(group.lower_bound for group in answers.of("rl"))
    plays = [told, soft] if answers.sampled else [told]
    larger = [found for reward in REWARD[1:] if (found := _plays(answers, reward))]
    whole = [found for reward in REWARD if (found := _plays(answers, reward, whole=True))]
    if _beyond(plays, 1):
        if any(map(_level, larger)):
            verdict = "The critic"
        elif all(map(_level, whole)):
            verdict = "The budget"
        elif not all(_beyond(found, 1) for found in larger):
            verdict = "Not shown"
        else:
            verdict = "Yes" if not open_ else "Yes, at this budget" if answers.longer else "Open"
    else:
        verdict = "No: a smaller one" if _beyond(plays, -1) else "Not shown"
    played = f"{_ratios(told, ' times at ', answers)} in greedy play"
    played += f"; with actions sampled {_ratios(soft, ' times at ', answers)}" if soft else ""
    sentence = (
        f"For the same score RL from scratch needs this many times the parameters of {name(student)} (95 % intervals):"
        f" {played}."
    )
    notes = [
        "A claim takes an interval on one side of 1, greedy and sampled, and none of two ends that holds 1. Scores"
        f" asked for: {scores}."
    ]
    if open_:
        notes.append("RL is not shown to have converged: more steps, or a larger critic, may make its ratio smaller.")
    for reward in REWARD[1:]:
        at = answers.at(reward, "greedy")
        if at and (again := _ratios([r for r in at.ratios if _bounded(r)], " times at ", answers)):
            notes.append(f"{_capital(name(reward))} after {short(at.steps)} agent steps, greedy: {again}.")
    if answers.longer and (again := _ratios([r for r in answers.longer.ratios if _bounded(r)], " times at ", answers)):
        notes.append(f"With {short(answers.longer.steps)} agent steps for RL, greedy: {again}.")
    notes += [_wanted(answers)] * (len(told) < len(ours))
    best = max(told, key=lambda each: (each.size.interval[0] > 0 and each.size.interval[1] < math.inf, each.target))
    short_sentence = (
        f"To reach {_score(answers, best.target)}, RL from scratch needs {ratio_text(best.size)} times the parameters"
        f" of a student (95 % interval: {span(*best.size.interval)}).{STILL_LEARNING * (verdict == 'Open')}"
    )
    return Reply(question, verdict, sentence, tuple(notes), short_sentence)


def _wanted(answers: Answers) -> str:
    """Which sizes would bound what these do not: larger ones where an arm stays below a score, smaller ones where its
    smallest is above it already."""
    groups = [groups for arm in ("rl", answers.student or "") if (groups := answers.of(arm))]
    most, least = min(each[-1].score.value for each in groups), max(each[0].score.value for each in groups)
    above = [f"{target:g}" for target in answers.scale.targets if target > most]
    below = [f"{target:g}" for target in answers.scale.targets if target <= least]
    told = [f"above {groups[0][-1].parameters:,} parameters for {', '.join(above)}"] * bool(above)
    told += [f"below {groups[0][0].parameters:,} for {', '.join(below)}"] * bool(below)
    return f"Sizes that would tell more: {'; '.join(told)}." if told else "More runs would tell more."


def _equal_size(question: str, answers: Answers) -> Reply:
    student = answers.student or ""
    ours = [each for each in answers.differences if each.arm == student]
    tested = [each for each in ours if each.p is not None]
    if not tested:
        common = f"{len(ours)} size{'s' * (len(ours) != 1)}" if ours else "no size"
        why = f"A test takes two runs or more of both arms at one size; they share {common}, none with so many."
        return Reply(question, "Cannot be said", why)
    soft = [each for each in answers.sampled.differences if each.p is not None] if answers.sampled else []
    plays = [("played greedily", tested)] + [("with actions sampled", soft)] * bool(soft)
    higher, lower = (
        [[each for each in found if _significant(each) and sign * each.score.value > 0] for _, found in plays]
        for sign in (1, -1)
    )
    if any(higher) and any(lower):
        verdict = "At some sizes"
    elif all(higher):
        verdict = "Open" if all(each.lower_bound for each in higher[0]) else "Yes"
    elif all(lower):
        verdict = "No"
    else:
        verdict = "Only greedily" if higher[0] else "Only sampled" if any(higher) else "Not shown"
    sentences = []
    for (how, found), above, below in zip(plays, higher, lower, strict=True):
        most = max(above or below or found, key=lambda each: abs(each.score.value))
        sentences.append(
            f"{_capital(how)}, {name(student)} scores higher than RL from scratch at {len(above)} of {len(found)}"
            f" sizes and lower at {len(below)}; the largest difference is {most.score.value:+.1f} at"
            f" {most.parameters:,} parameters (95 % interval {span(most.score.low, most.score.high, '+.1f')}; p ="
            f" {most.p:.3f})."
        )
    equal = sum(each.equivalent for each in tested)
    notes = [
        f"Exact permutation tests, corrected over the sizes by Holm's method; at {equal or 'none'} of them the two are"
        f" shown to be equivalent, within {answers.scale.margin:.2g}{' points' * answers.scale.points}."
    ]
    if (least := _least(answers, tested)) >= LEVEL:
        notes.append(f"With so few runs no test can show a difference: its p is {min(least, 1.0):.2f} at least.")
    longer = answers.longer
    if longer and (again := [each for each in longer.differences if each.p is not None]):
        above_long = sum(_significant(each) and each.score.value > 0 for each in again)
        notes.append(
            f"With {short(longer.steps)} agent steps for RL the student scores higher at {above_long} of {len(again)}"
            f" sizes; the differences, from the smallest on, are"
            f" {', '.join(f'{each.score.value:+.1f}' for each in again)}."
        )
    if passed := [each for each in answers.passings if (each.reward, each.play) == ("rl", "greedy")]:
        when = "; ".join(f"{steps_text(p.steps.low, p.steps.high)} at {p.parameters:,} parameters" for p in passed)
        notes.append(f"Agent steps after which RL passes the student of its size, greedy: {when}.")
    if bounds := [f"{each.parameters:,}" for each in tested if each.lower_bound]:
        where = f"{'; '.join(bounds)} parameters"
        notes.append(f"RL is not shown to have converged at {where}: there the difference is an upper bound.")
    most = max(higher[0] or lower[0] or tested, key=lambda each: abs(each.score.value))
    short_sentence = (
        f"A student is shown to score higher than RL at {len(higher[0])} of {len(tested)} sizes"
        f"{f', and lower at {len(lower[0])}' if lower[0] else ''}; the largest difference is {most.score.value:+.1f}"
        f" points, at {most.parameters:,} parameters."
        f"{' So few runs cannot show a difference.' if _least(answers, tested) >= LEVEL else ''}"
        f"{STILL_LEARNING * (verdict == 'Open')}"
    )
    return Reply(question, verdict, " ".join(sentences), tuple(notes), short_sentence)


def _least(answers: Answers, tested: list[Difference]) -> float:
    """The smallest p that the tests could have had, corrected: of the split that is observed, and of its mirror."""
    least = []
    for each in tested:
        m, n = (
            next(len(group.runs) for group in answers.of(arm) if group.parameters == each.parameters)
            for arm in (each.arm, "rl")
        )
        least.append((1 + (m == n)) / math.comb(m + n, m) * len(tested))
    return min(least)


def _bounded(ratio: Ratio) -> bool:
    return ratio.size.interval != (0.0, math.inf)


def _plays(answers: Answers, reward: str, whole: bool = False) -> list[list[Ratio]]:
    """The ratios of RL of this critic to the students that have a bound, in each way of playing."""
    each = [at for play in PLAYS if (at := answers.at(reward, play, whole))]
    return [[ratio for ratio in at.ratios if _bounded(ratio)] for at in each]


def _beyond(plays: list[list[Ratio]], side: int) -> bool:
    """Whether each play has an interval above 1 (`side` 1) or below (-1), and none has one on the other side, or one of
    two ends that holds 1."""
    spans = [[ratio.size.interval for ratio in found] for found in plays]
    there, other = (
        [any(low > 1 if sign > 0 else high < 1 for low, high in found) for found in spans] for sign in (side, -side)
    )
    holding = any(0 < low <= 1 <= high < math.inf for found in spans for low, high in found)
    return all(there) and not any(other) and not holding


def _level(plays: list[list[Ratio]]) -> bool:
    """Whether each play has an interval that lies below 1, or has two ends and holds 1, and none one above."""
    spans = [[ratio.size.interval for ratio in found] for found in plays]
    level = all(any(high < 1 or 0 < low <= 1 <= high < math.inf for low, high in found) for found in spans)
    return level and not any(low > 1 for found in spans for low, _ in found)


def _ratios(found: Iterable[Ratio], at: str, answers: Answers) -> str:
    """'7.7 times at a score of 22.4 (from 3.5, no upper end), ...'"""
    return ", ".join(f"{ratio_text(r.size)}{at}{_score(answers, r.target)} ({span(*r.size.interval)})" for r in found)


def _growth(question: str, answers: Answers) -> Reply:
    both = {arm: [g for g in answers.growths if g.arm == arm] for arm in ("rl", answers.student or "")}
    told = {arm: found for arm, found in both.items() if found}
    spans = [(found[0].score, found[-1].score) for found in told.values() if len(found) > 1]
    known = [end for pair in spans for end in pair if math.isfinite(end.low)]
    if len(told) < 2 or len(spans) < 2 or len(known) < 4:
        return Reply(question, "Cannot be said", "It takes three sizes or more with two runs or more, in both arms.")
    falls, rises = ([sign * (first.value - last.value) > 0 for first, last in spans] for sign in (1, -1))
    disjoint = [first.low > last.high or last.low > first.high for first, last in spans]
    verdict = "Not shown"
    if all(disjoint) and (all(falls) or all(rises)):
        verdict = "Less and less" if all(falls) else "More and more"
    elif any(disjoint):
        verdict = "By different rates"
    each = [f"{name(arm)} {', '.join(f'{g.score.value:+.1f}' for g in found)}" for arm, found in told.items()]
    sentence = f"A doubling of the parameters gains, in points from smallest sizes to largest: {'; '.join(each)}."
    notes = [
        f"{_capital(name(arm))}: between {g.sizes[0]:,} and {g.sizes[1]:,} parameters a doubling gains"
        f" {g.score.value:+.1f} points ({span(g.score.low, g.score.high, '+.1f')})."
        for arm, found in told.items()
        for g in (found[0], found[-1])
    ]
    if any(group.lower_bound for group in answers.of("rl")):
        notes.append("RL has sizes not shown to have converged: its growth is that of this budget.")
    gains = [
        f"{first.value:+.1f} points among the smallest and {last.value:+.1f} among the largest" for first, last in spans
    ]
    short_sentence = f"A doubling of the parameters gains RL {gains[0]}; it gains a student {gains[1]}."
    return Reply(question, verdict, sentence, (*notes, "The intervals are of 95 %, in greedy play."), short_sentence)


def unknown(answers: Answers, planned: int | None = None, alone: bool = True) -> Iterator[str]:
    """What is not known, a sentence each, what weighs most first.

    Args:
        planned: runs that the study's plan makes; None where there is no plan.
        alone: no other task is reported beside it.
    """
    records = answers.records
    precisions = {str(r["precision"]): name(str(r.get("arm"))) for r in records if r.get("precision") is not None}
    if len(precisions) > 1:
        which = "; ".join(f"{precision} in {arm}" for precision, arm in sorted(precisions.items()))
        yield f"The runs were trained in more than one precision ({which}): a difference may be the arithmetic's."
    failed = sum(record.get("status") == "failed" for record in records)
    undone = sum(record.get("status") not in ("done", "failed") for record in records)
    absent = max((planned or 0) - len(records), 0)
    if failed or undone or absent:
        parts = [f"{failed} failed"] * bool(failed) + [f"{undone} unfinished"] * bool(undone)
        parts += [f"{absent} not started"] * bool(absent)
        yield f"Of {max(planned or 0, len(records))} runs some have no score ({', '.join(parts)})."
    if missing := [name(arm) for arm in (*REWARD, *STUDENTS) if not answers.of(arm) and arm != "distill-mixed"]:
        yield f"These arms have no finished run: {'; '.join(missing)}."
    if answers.of("rl") and not answers.of("rl-split"):
        yield "Without RL beside a full-size critic, an overhead may be the critic's burden on the shared trunk."
    verdicts = [certificate.verdict for certificate in answers.certificates]
    if open_ := len(verdicts) - verdicts.count("converged"):
        yield (
            f"{open_} of {len(verdicts)} RL runs are not shown to have converged: {verdicts.count('not converged')} had"
            f" not, of {verdicts.count('unknown')} it cannot be told. Their scores are lower bounds (arrows below)."
        )
    distilled = [group for group in answers.groups if group.arm in STUDENTS]
    teachers = {teacher for group in distilled for teacher in group.teachers if teacher}
    if distilled and len(teachers) < 3:
        few = "Two teachers" if len(teachers) > 1 else "One teacher"
        yield f"{few} taught all: students of others may score otherwise."
    if thin := [group for group in answers.groups if len(group.runs) < 3]:
        arms = [
            f"{name(arm)} ({', '.join(group.width for group in thin if group.arm == arm)})"
            for arm in dict.fromkeys(group.arm for group in thin)
        ]
        yield f"Widths with fewer than 3 runs have a wide interval or none: {', '.join(arms)}."
    student = answers.student
    ours = [ratio for ratio in answers.ratios if (ratio.reward, ratio.student) == ("rl", student)]
    if censored := [f"{r.target:g}" for r in ours if r.size.interval == (0.0, math.inf) or r.size.low != r.size.high]:
        yield f"The ratio of sizes at {', '.join(censored)} is censored: a curve gets there beyond the sizes measured."
    for arm in dict.fromkeys(each.arm for each in answers.differences):
        tested = [each for each in answers.differences if each.arm == arm and each.p is not None]
        if tested and arm != student and not any(map(_significant, tested)):
            yield f"{_capital(name(arm))}: no difference to RL from scratch is shown at any size."
    yield from answers.notes
    if alone:
        yield f"All of this is about {task(answers)}; whether it holds for other tasks is not known from this study."


def task(answers: Answers) -> str:
    """In words: Pong, MinAtar Space Invaders, CartPole-v1."""
    if answers.task.startswith("MinAtar/"):
        return "MinAtar " + re.sub(r"(?<=[a-z])(?=[A-Z])", " ", answers.task[8:].removesuffix("-v1"))
    return answers.task.replace("_", " ").title() if answers.task.islower() else answers.task


def _significant(each: Difference) -> bool:
    return each.p is not None and each.p < LEVEL


def _score(answers: Answers, target: float) -> str:
    return f"{target:g} points" if answers.scale.points else f"a score of {target:g}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
