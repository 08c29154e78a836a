"""Answers -> sentences: each question answered in one, with its number and interval, and what is not known."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from potstill.analysis.statistics import Estimate
from potstill.arms import REWARD, STUDENTS
from potstill.report.answers import Answers
from potstill.report.cells import learning_curve, name, steps_to_reach
from potstill.report.comparisons import ENOUGH, Difference, Ratio, Scaling
from potstill.report.figures import short

QUESTIONS = (
    "Does learning from reward need a bigger network than supervised learning, for the same performance?",
    "Can a distilled network beat an RL agent of the same size?",
    "How do both scale with size?",
)
LEVEL = 0.05


class Reply(NamedTuple):
    """A question answered."""

    question: str
    verdict: str
    """A word or two: Yes, No, Not shown, Cannot be said, ..."""
    sentence: str
    notes: tuple[str, ...] = ()
    """What the sentence depends on."""
    figure: str = ""
    """The sentence's number and its interval alone; empty where there is none."""


def replies(answers: Answers) -> tuple[Reply, Reply, Reply]:
    """The three questions and their answers, by rules that were fixed before the runs (docs/report.md)."""
    bigger, equal, scaling = QUESTIONS
    return _overhead(bigger, answers), _equal_size(equal, answers), _laws(scaling, answers)


def headline(answers: Answers) -> Ratio | None:
    """The ratio that answers the first question: that of the highest score with an interval of two ends, else one.

    None where no ratio of RL from scratch to the distilled arm has a bound.
    """
    ours = [ratio for ratio in answers.ratios if (ratio.reward, ratio.student) == ("rl", answers.student)]
    for ends in (2, 1):
        bounded = [r for r in ours if (r.size.interval[0] > 0) + math.isfinite(r.size.interval[1]) >= ends]
        if bounded:
            return bounded[-1]
    return None


def headline_laws(answers: Answers) -> tuple[Scaling, Scaling] | None:
    """RL's law of size and the distilled arm's: of the kind that predicts the left-out sizes of both better."""
    found = {(each.arm, each.law): each for each in answers.scalings}
    pairs = [
        (found["rl", law], found[answers.student, law])
        for law in ("sigmoid", "power")
        if ("rl", law) in found and answers.student is not None and (answers.student, law) in found
    ]
    errors = [sum((each.held_out or 0.0) ** 2 for each in pair) for pair in pairs]
    return pairs[errors.index(min(errors))] if pairs else None


def unknown(answers: Answers, planned: int | None = None, alone: bool = True) -> list[str]:
    """What is not known, a sentence each, what weighs most first.

    Args:
        answers: of one task.
        planned: runs that the study's plan makes; None where there is no plan.
        alone: no other task is reported beside it.
    """
    return list(_unknown(answers, planned, alone))


def ratio_text(ratio: Ratio) -> str:
    """2.3, more than 4.0, at most 0.50, unknown."""
    size = ratio.size
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


def reach(answers: Answers, arm: str, target: float) -> list[tuple[str, str]]:
    """(width, '0.9M (5 of 5)') for each size of an arm: median agent steps until its learning curve reached it.

    '-' where no run has a learning curve.
    """
    rows = []
    for cell in answers.of(arm):
        played = [run for run in cell.runs if learning_curve(run)]  # a teacher-led run plays no games of its own
        if not played:
            rows.append((cell.width, "-"))
            continue
        steps = sorted(step for run in played if (step := steps_to_reach(run, target)) is not None)
        runs = len(played)
        # The median over all runs, those that never reached it counting as longest.
        middle = short(steps[runs // 2]) if len(steps) > runs // 2 else "never"
        rows.append((cell.width, f"{middle} ({len(steps)} of {runs})"))
    return rows


def twice(answers: Answers) -> str:
    """What the first two answers become where RL has twice the budget; empty where its runs do not say."""
    told = [_longer_ratios(answers, " times for ")]
    if found := _longer_differences(answers):
        most = max(found, key=lambda each: each.score.value)
        above = sum(_significant(each) and each.score.value > 0 for each in found)
        told.append(f"{most.score.value:+.1f} at {short(most.parameters)}; higher at {above} of {len(found)} sizes")
    return "; ".join(filter(None, told))


def _overhead(question: str, answers: Answers) -> Reply:
    if missing := _missing(answers):
        return Reply(question, "Cannot be said", missing)
    assert answers.student is not None
    ours = [ratio for ratio in answers.ratios if (ratio.reward, ratio.student) == ("rl", answers.student)]
    if not ours:
        return Reply(
            question,
            "Cannot be said",
            "A ratio of sizes takes two sizes or more at which both RL from scratch and"
            f" {name(answers.student)} have two runs or more; this study has fewer.",
        )
    ratio = headline(answers)
    scores = ", ".join(f"{target:g}" for target in answers.scale.targets)
    if ratio is None:
        return Reply(
            question,
            "Cannot be said",
            f"At none of the scores asked for ({scores}) do the runs bound the ratio of sizes: RL from scratch or"
            f" {name(answers.student)} reaches them beyond the sizes measured, or too near their ends.",
        )
    low, high = ratio.size.interval
    budgets = [budget for budget in answers.budgets if budget.student == answers.student]
    fair = sum(budget.no_less for budget in budgets)
    unfair = sum(budget.alone is not None and budget.alone[1] <= 1 / ENOUGH for budget in budgets)
    bound = any(cell.lower_bound for cell in answers.of("rl"))
    if low > 1:
        verdict = ("Yes, at this budget" if bound else "Yes") if fair >= 2 else "Not claimed"
    elif high < 1:
        verdict = "No: a smaller one" if unfair >= 2 else "Not claimed"
    else:
        verdict = "Not shown"
    sentence = (
        f"To reach {_score(answers, ratio.target)}, RL from scratch needs {ratio_text(ratio)} times the parameters that"
        f" {name(answers.student)} needs (95 % interval {span(low, high)})"
    )
    sentence += "." if low > 1 or high < 1 else ": the interval includes 1, which is no difference."
    beyond = sum(each.size.interval[0] > 1 for each in ours)
    below = sum(each.size.interval[1] < 1 for each in ours)
    notes = [
        f"Of {len(ours)} scores asked for ({scores}), the interval lies above 1 at {beyond} and below 1 at {below}."
    ]
    if bound:
        notes.append("RL has sizes not shown to have converged: with more training its ratio may be smaller.")
    if again := _longer_ratios(answers, " at "):
        notes.append(f"With twice the budget for RL the ratio is {again}.")
    given, to, fairly = ("the student", "RL", unfair) if high < 1 else ("RL", "the student", fair)
    notes.append(
        f"Of three budgets (agent steps, gradient steps, multiply-adds) {given} had no less than {to} of {fairly}, the"
        " teacher's cost left out; a claim takes two."
    )
    figure = f"{ratio_text(ratio)} times for {_score(answers, ratio.target)} ({span(low, high)})"
    return Reply(question, verdict, sentence, tuple(notes), figure)


def _equal_size(question: str, answers: Answers) -> Reply:
    if missing := _missing(answers):
        return Reply(question, "Cannot be said", missing)
    ours = [each for each in answers.differences if each.arm == answers.student]
    tested = [each for each in ours if each.p is not None]
    if not tested:
        common = f"{len(ours)} size{'s' * (len(ours) != 1)}" if ours else "no size"
        return Reply(
            question,
            "Cannot be said",
            f"A test takes two runs or more of both arms at one size; they share {common}, none with so many.",
        )
    assert answers.student is not None
    arm = name(answers.student)
    higher = [each for each in tested if _significant(each) and each.score.value > 0]
    lower = [each for each in tested if _significant(each) and each.score.value < 0]
    of = f"{len(tested)} size{'s' * (len(tested) > 1)}"
    shown = max(higher or lower or tested, key=lambda each: abs(each.score.value))
    effect = (
        f"the largest difference is {shown.score.value:+.1f} at {short(shown.parameters)} parameters"
        f" (95 % interval {span(shown.score.low, shown.score.high, '+.1f')})."
    )
    if higher and lower:
        verdict = "At some sizes"
        sentence = f"{_capital(arm)} scores higher than RL from scratch at {len(higher)} of {of}, lower at {len(lower)}"
    elif higher:
        verdict = "Yes, at this budget" if all(each.lower_bound for each in higher) else "Yes"
        sentence = f"{_capital(arm)} scores higher than RL from scratch at {len(higher)} of {of}"
    elif lower:
        verdict = "No"
        sentence = f"RL from scratch scores higher than {arm} at {len(lower)} of {of}, {arm} at none"
    else:
        verdict = "Not shown"
        sentence = f"Between {arm} and RL from scratch no difference is significant at any of {of}"
    sentence += f"; {effect}"
    equal = sum(each.equivalent for each in tested)
    notes = [
        f"Tests are corrected over {of} by Holm's method; at {equal or 'none'} of them the two are shown to be"
        f" equivalent, within {answers.scale.margin:.2g}{' points' * answers.scale.points}."
    ]
    apart = {each.parameters: gap for each in tested if (gap := _sampled_gap(answers, each)) is not None}
    if shown.parameters in apart:
        notes.append(
            f"With actions sampled, not greedy, the student's median less that of RL is above 0 at"
            f" {sum(gap > 0 for gap in apart.values())} of {len(apart)} sizes, and {apart[shown.parameters]:+.1f} at"
            f" {short(shown.parameters)} parameters."
        )
    if again := _longer_differences(answers):
        above = [_significant(each) and each.score.value > 0 for each in again]
        notes.append(
            f"With twice the budget for RL the student scores higher at {sum(above)} of {len(again)} sizes; the"
            f" differences are {', '.join(f'{each.score.value:+.1f}' for each in again)} from the smallest on."
        )
    if bounds := [short(each.parameters) for each in tested if each.lower_bound]:
        notes.append(f"RL not shown to have converged at {', '.join(bounds)}: there the difference is an upper bound.")
    ends = span(shown.score.low, shown.score.high, "+.1f")
    figure = f"{shown.score.value:+.1f} at {short(shown.parameters)} ({ends}); higher at {len(higher)} of {of}"
    return Reply(question, verdict, sentence, tuple(notes), figure)


def _sampled_gap(answers: Answers, each: Difference) -> float | None:
    """Median score of a difference's arm less that of RL, actions sampled; None where it was not played."""
    arm, rl = (
        next((cell.middle("score_sampled") for cell in answers.of(arm) if cell.parameters == each.parameters), None)
        for arm in (each.arm, "rl")
    )
    return arm - rl if arm is not None and rl is not None else None


def _longer_ratios(answers: Answers, at: str) -> str:
    """Those with a bound where RL has twice the budget: '7.7 at a score of 22.4 (from 3.5, no upper end), ...'."""
    found = [each for each in answers.longer.ratios if each.size.interval != (0.0, math.inf)] if answers.longer else []
    return ", ".join(
        f"{ratio_text(each)}{at}{_score(answers, each.target)} ({span(*each.size.interval)})" for each in found
    )


def _longer_differences(answers: Answers) -> list[Difference]:
    """Those with a test where RL has twice the budget, from the smallest size on."""
    return [each for each in answers.longer.differences if each.p is not None] if answers.longer else []


def _laws(question: str, answers: Answers) -> Reply:
    if missing := _missing(answers):
        return Reply(question, "Cannot be said", missing)
    pair = headline_laws(answers)
    if pair is None:
        return Reply(
            question,
            "Cannot be said",
            "A law of size takes two sizes or more with two runs or more, in both arms; this study has fewer.",
        )
    rl, student = pair
    quantity = "the score"
    if answers.scale.points:
        quantity = "the odds of losing a point" if rl.law == "sigmoid" else "the share of points lost"
    low, high = _gap(rl, student)
    verdict = "At different rates" if low > 0 or high < 0 else "No difference in rate shown"
    sentence = (
        f"Every doubling of the parameters multiplies {quantity} by {_doubling(rl)} in RL from scratch, and by"
        f" {_doubling(student)} in {name(student.arm)} (95 % intervals)."
    )
    notes = [f"{_law(rl.law)} in size; the exponents' difference has the 95 % interval {span(low, high, '+.2f')}."]
    errors = {
        law: [e.held_out for e in answers.scalings if (e.law, e.arm) in ((law, rl.arm), (law, student.arm))]
        for law in dict.fromkeys(each.law for each in answers.scalings)
    }
    told = [
        f"{_law(law).lower()} {' and '.join(f'{e:.2g}' for e in both)}"
        for law, found in errors.items()
        if len(both := [e for e in found if e is not None]) == 2
    ]
    if len(told) == 2:
        notes.append(f"Error at sizes left out of the fit, RL and student: {'; '.join(told)} (root mean square).")
    if any(cell.lower_bound for cell in answers.of("rl")):
        notes.append("RL has sizes not shown to have converged: its law is that of this budget.")
    figure = f"{quantity} x {_doubling(rl)} by RL, x {_doubling(student)} distilled, per doubling"
    return Reply(question, verdict, sentence, tuple(notes), figure)


def _unknown(answers: Answers, planned: int | None, alone: bool) -> Iterable[str]:
    records = answers.records
    failed = sum(record.get("status") == "failed" for record in records)
    undone = sum(record.get("status") not in ("done", "failed") for record in records)
    absent = max((planned or 0) - len(records), 0)
    if failed or undone or absent:
        parts = [f"{failed} failed"] * bool(failed) + [f"{undone} unfinished"] * bool(undone)
        parts += [f"{absent} not started"] * bool(absent)
        yield f"Of {max(planned or 0, len(records))} runs, {', '.join(parts)}: what they would have said is missing."
    if missing := [name(arm) for arm in (*REWARD, *STUDENTS) if not answers.of(arm) and arm != "distill-mixed"]:
        yield f"No finished run of: {'; '.join(missing)}."
    if answers.of("rl") and not answers.of("rl-split"):
        yield "Without RL beside a full-size critic, an overhead may be the critic's burden on the shared trunk."
    verdicts = [certificate.verdict for certificate in answers.certificates]
    if open_ := len(verdicts) - verdicts.count("converged"):
        yield (
            f"{open_} of {len(verdicts)} RL runs are not shown to have converged: {verdicts.count('not converged')} had"
            f" not, of {verdicts.count('unknown')} it cannot be told. Their scores are lower bounds (arrows below)."
        )
    taught = [cell for cell in answers.cells if cell.arm in STUDENTS]
    teachers = {teacher for cell in taught for teacher in cell.teachers if teacher}
    if taught and len(teachers) < 3:
        yield f"{'Two teachers' if len(teachers) > 1 else 'One teacher'} only: students of others may score otherwise."
    if thin := [cell for cell in answers.cells if len(cell.runs) < 3]:
        arms = [
            f"{name(arm)} ({', '.join(cell.width for cell in thin if cell.arm == arm)})"
            for arm in dict.fromkeys(cell.arm for cell in thin)
        ]
        yield f"Fewer than 3 runs, so that intervals are wide or none, at widths of {', '.join(arms)}."
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
    return answers.task.replace("_", " ").title() if answers.task.islower() else answers.task


def _missing(answers: Answers) -> str:
    """Why a comparison of RL with distillation is out of the question; empty where it is not."""
    lacking = [] if answers.of("rl") else ["RL from scratch"]
    lacking += [] if answers.student else ["a distilled network"]
    return f"The study has no finished run of {' or of '.join(lacking)}." if lacking else ""


def _significant(each: Difference) -> bool:
    return each.p is not None and each.p < LEVEL


def _gap(rl: Scaling, student: Scaling) -> tuple[float, float]:
    """95 % interval of RL's exponent less the student's: the two were drawn independently."""
    value = rl.exponent.value - student.exponent.value
    _, low, high = Estimate(value, rl.exponent.resamples - student.exponent.resamples).interval()
    return low, high


def _doubling(law: Scaling) -> str:
    value, low, high = (2.0**each for each in law.exponent.interval())
    return f"{value:.2f} ({span(low, high, '.2f')})"


def _law(law: str) -> str:
    return {"sigmoid": "Sigmoid", "power": "Power law"}[law]


def _score(answers: Answers, target: float) -> str:
    return f"{target:g} points" if answers.scale.points else f"a score of {target:g}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
