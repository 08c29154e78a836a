"""Against made-up studies whose truth is known (synthetic.py)."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from synthetic import ARMS, RATIO, SIZES, study, write

from potstill.errors import InputError
from potstill.report import conclusions, tables
from potstill.report.answers import Answers, answer
from potstill.report.conclusions import ratio_text, replies, span, unknown
from potstill.report.groups import number
from potstill.results import runs_table

RL_AND_STUDENT = {"rl": 1.0, "distill-student": RATIO}
RESAMPLES = 1_000


def settled(records):
    """The same, with learning curves that have levelled off: whatever was extended has converged."""
    return [
        run | {"curve": [p | {"score": run["score"] + 0.1 * (-1) ** i} for i, p in enumerate(run["curve"])]}
        for run in records
    ]


def ask(records, **options) -> Answers:
    return answer(records, resamples=RESAMPLES, **options)


@pytest.fixture(scope="module")
def known() -> Answers:
    return ask(settled(study()))


def ratios(answers, student="distill-student"):
    return {ratio.target: ratio for ratio in answers.ratios if (ratio.reward, ratio.student) == ("rl", student)}


def verdicts(answers):
    return [reply.verdict for reply in replies(answers)]


def test_the_ratio_of_sizes_is_the_true_one_wherever_both_curves_reach_the_score(known):
    for target in (0, 10, 15, 18):
        low, high = ratios(known)[target].size.interval
        assert 1 < low < RATIO < high < 4.2


def test_the_first_answer_tells_every_score_whose_ratio_has_a_bound_greedy_and_sampled(known):
    reply = replies(known)[0]
    assert reply.verdict == "Yes"
    greedy, sampled = reply.sentence.split("; with actions sampled ")
    soft = {ratio.target: ratio for ratio in known.sampled.ratios}
    for target in (0, 10, 15, 18):
        for text, ratio in ((greedy, ratios(known)[target]), (sampled, soft[target])):
            ends = span(*ratio.size.interval)
            told = f"{ratio_text(ratio.size)} times at {target} points ({ends})"
            assert (told in text) == (ratio.size.interval != (0.0, math.inf))
    assert soft[10].size.low > ratios(known)[10].size.low * 0.5


def test_an_overhead_that_is_there_in_greedy_play_alone_is_not_claimed():
    records = [
        run | {"score_sampled": run["score"] - (0 if run["arm"] == "rl" else 6)}
        for run in settled(study(RL_AND_STUDENT))
    ]
    assert verdicts(ask(records))[0] == "Not shown"


@pytest.mark.parametrize(("equal", "told"), [((), "none"), ((0,), "1"), ((0, 2), "2")])
def test_the_second_answer_says_at_how_many_sizes_both_are_shown_to_be_equivalent(known, equal, told):
    ours = [each for each in known.differences if each.arm == "distill-student" and each.p is not None]
    changed = tuple(replace(each, equivalent=at in equal) for at, each in enumerate(ours))
    notes = replies(replace(known, differences=changed))[1].notes
    assert f"at {told} of them the two are shown to be equivalent, within 0.5 points." in notes[0]


def test_the_second_answer_counts_the_sizes_that_remain_significant_after_holm(known):
    ours = [each for each in known.differences if each.arm == "distill-student"]
    higher = [each for each in ours if each.p < 0.05 and each.score.value > 0]
    assert {each.width for each in higher} >= {"1/32", "1/16", "1/8", "1/4"}
    assert min(each.p for each in ours) == pytest.approx(6 * 2 / 252)  # the least of 5 against 5, times six sizes
    best = max(higher, key=lambda each: each.score.value)
    reply = replies(known)[1]
    assert reply.verdict == "Yes"
    assert f"higher than RL from scratch at {len(higher)} of 6 sizes" in reply.sentence
    assert f"{best.score.value:+.1f}" in reply.sentence
    assert f"95 % interval {best.score.low:+.1f} to {best.score.high:+.1f}" in reply.sentence


def test_three_runs_against_three_show_no_difference_and_the_answer_says_why():
    answers = ask(settled(study(RL_AND_STUDENT, widths=("1/32", "1/16", "1/8", "1/4"), seeds=3)))
    assert [each.p for each in answers.differences] == pytest.approx([0.4] * 4)
    reply = replies(answers)[1]
    assert reply.verdict == "Not shown"
    assert "With so few runs no test can show a difference: its p is 0.40 at least." in reply.notes


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, "Yes"), (-30.0, "At some sizes"), (None, "Yes")])
def test_the_second_answer_holds_for_sampled_play_too_or_says_which(shift, verdict):
    records = [
        run | {"score_sampled": None if shift is None else run["score"] + shift * (run["arm"] != "rl")}
        for run in settled(study(RL_AND_STUDENT, ("1/32", "1/16", "1/8")))
    ]
    reply = replies(ask(records))[1]
    assert reply.verdict == verdict
    assert ("With actions sampled, student-led" in reply.sentence) == (shift is not None)
    if shift:
        assert (
            "Played greedily, student-led distillation scores higher than RL from scratch at 3 of 3" in reply.sentence
        )
        assert "RL from scratch at 0 of 3 sizes and lower at 3" in reply.sentence


def test_a_difference_of_greedy_play_alone_is_told_as_one():
    records = [
        run | {"score_sampled": run["score"] - run["seed"] if run["arm"] == "rl" else 0.0}
        for run in settled(study(RL_AND_STUDENT, ("1/32", "1/16", "1/8")))
    ]
    for run in records:
        run["score_sampled"] = float(run["seed"])
    assert replies(ask(records))[1].verdict == "Only greedily"


def test_both_answers_say_what_is_left_of_them_where_rl_has_twice_the_budget():
    records = study(RL_AND_STUDENT, extended=False)
    assert ask(records).longer is None
    assert not any("agent steps for RL" in note for reply in replies(ask(records)) for note in reply.notes)
    students = [run for run in records if run["arm"] == "distill-student"]
    long = {"arm": "rl-long", "teacher": None, "env_steps": 3_000_000}
    caught_up = [run | long | {"run": f"long-{run['run']}"} for run in students]
    answers = ask(records + caught_up)
    ratio = next(each for each in answers.longer.ratios if each.target == 10)
    assert ratio.size.low == pytest.approx(1)
    assert ratio.size.interval[0] < 1 < ratio.size.interval[1]
    assert all(each.score.value == pytest.approx(0) for each in answers.longer.differences)
    first, second, _ = replies(answers)
    assert first.verdict == "The budget"
    note = next(note for note in first.notes if "With 3.0M agent steps for RL" in note)
    assert f"{ratio_text(ratio.size)} times at 10 points ({span(*ratio.size.interval)})" in note
    assert any("higher at 0 of 6 sizes" in note for note in second.notes)


def test_the_third_answer_tells_what_each_doubling_brings_and_that_it_brings_less(known):
    for arm in RL_AND_STUDENT:
        mine = [each for each in known.growths if each.arm == arm]
        scores = [group.score.value for group in known.of(arm)]
        sizes = [group.parameters for group in known.of(arm)]
        assert [each.sizes for each in mine] == list(pairwise(sizes))
        for each, (low, high) in zip(mine, pairwise(scores), strict=True):
            assert each.score.value == pytest.approx((high - low) / math.log2(each.sizes[1] / each.sizes[0]))
            assert each.score.low < each.score.value < each.score.high
    reply = replies(known)[2]
    assert reply.verdict == "Less and less"
    assert f"student-led distillation {mine[0].score.value:+.1f}, " in reply.sentence


def test_arms_that_are_alike_are_not_said_to_differ():
    answers = ask(settled(study({"rl": 1.0, "distill-student": 1.0})))
    assert verdicts(answers)[:2] == ["Not shown", "Not shown"]
    assert "scores higher than RL from scratch at 0 of 6 sizes and lower at 0" in replies(answers)[1].sentence


def test_students_that_need_more_are_said_to():
    answers = ask(settled(study({"rl": 3.0, "distill-student": 1.0})))
    assert verdicts(answers)[:2] == ["No: a smaller one", "No"]
    assert "scores higher than RL from scratch at 0 of 6 sizes and lower at" in replies(answers)[1].sentence


def test_rl_that_was_not_extended_is_a_lower_bound_and_the_answers_are_open():
    answers = ask(settled(study(RL_AND_STUDENT, extended=False)))
    assert all(group.lower_bound for group in answers.of("rl"))
    assert not any(group.lower_bound for group in answers.of("distill-student"))
    assert verdicts(answers)[:2] == ["Open", "Open"]
    assert any("30 of 30 RL runs are not shown to have converged" in line for line in unknown(answers))


def test_rl_that_was_still_learning_has_not_converged_though_its_extension_gained_nothing():
    answers = ask(study(RL_AND_STUDENT, widths=("1/8",), converged=False))
    assert {certificate.verdict for certificate in answers.certificates} == {"not converged"}


def test_an_extension_that_gained_a_point_refutes_convergence():
    records = [run | ({"score": run["score"] + 1.0} if run["arm"] == "rl-long" else {}) for run in settled(study())]
    assert {certificate.verdict for certificate in ask(records).certificates} == {"not converged"}


@pytest.mark.parametrize(
    ("points", "extended", "verdict"), [(100, True, "converged"), (100, False, "unknown"), (3, True, "unknown")]
)
def test_the_table_calls_those_runs_converged_that_the_report_does(tmp_path, points, extended, verdict):
    records = settled(study(RL_AND_STUDENT, widths=("1/16", "1/8"), seeds=2, extended=extended))
    records = [run | {"curve": run["curve"][-points:]} for run in records]
    table = runs_table(write(tmp_path / "study", records)).filter(arm="rl")
    certificates = {each.run: each.verdict for each in ask(records).certificates}
    assert dict(table.select("run", "converged").iter_rows()) == certificates
    assert set(certificates.values()) == {verdict}


def test_a_score_that_rl_never_reaches_bounds_the_ratio_from_below_and_is_reported_as_censored():
    answers = ask(settled(study(RL_AND_STUDENT, widths=("1/32", "1/16", "1/8"))))
    ratio = ratios(answers)[10]
    assert ratio_text(ratio.size).startswith("more than ")
    assert ratio.size.high == math.inf
    assert any("The ratio of sizes at 10, 15, 18, 20 is censored" in line for line in unknown(answers))


def test_one_seed_has_no_interval_and_nothing_can_be_said_from_it():
    answers = ask(settled(study(seeds=1)))
    assert all(math.isinf(group.score.low) and math.isinf(group.score.high) for group in answers.groups)
    assert all(each.p is None and not each.equivalent for each in answers.differences)
    assert verdicts(answers) == ["Cannot be said"] * 3
    assert any("fewer than 3 runs" in line for line in unknown(answers))
    assert any(line.startswith("One teacher taught all") for line in unknown(answers))


def test_intervals_of_two_runs_that_differ_end_where_pong_s_scores_do():
    two = [run for run in settled(study(RL_AND_STUDENT, seeds=2)) if run["arm"] == "rl"]
    poor = [run | {"returns": [-21.0] * 100, "score": -21.0} if run["seed"] else run for run in two]
    answers = ask(poor + [run for run in study(RL_AND_STUDENT, seeds=2) if run["arm"] == "distill-student"])
    apart = [group.score for group in answers.groups if group.arm == "rl" and group.score.value > -15]
    assert apart
    assert {(score.low, score.high) for score in apart} == {(-21.0, 21.0)}
    assert {-42.0, 42.0} & {end for each in answers.differences for end in each.score[1:]}


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ({"rl": 1.0}, "no finished run of a distilled network"),
        ({"distill-student": 3.0}, "no finished run of RL from scratch"),
        ({}, "no finished run of RL from scratch or of a distilled network"),
    ],
)
def test_a_missing_arm_is_named(arms, words):
    for reply in replies(ask(study(arms, widths=("1/8",)))):
        assert (reply.verdict, words in reply.sentence) == ("Cannot be said", True)


def test_failed_and_missing_runs_are_counted_and_left_out_of_the_scores():
    records = settled(study(RL_AND_STUDENT, widths=("1/8", "1/4"), extended=False))
    failed = [run | {"status": "failed", "score": None, "error": "diverged"} for run in records[:2]]
    answers = ask(failed + records[2:])
    assert len(answers.of("rl")[0].runs) == 3
    assert next(unknown(answers, planned=23)).startswith("Of 23 runs some have no score (2 failed, 3 not started)")


def test_runs_of_two_precisions_are_warned_of_first():
    records = settled(study(RL_AND_STUDENT, widths=("1/8",), extended=False))
    mixed = [run | {"precision": "float32" if run["arm"] == "rl" else "bfloat16"} for run in records]
    warning = next(unknown(ask(mixed)))
    assert warning.startswith("The runs were trained in more than one precision (bfloat16 in student-led distillation;")
    assert not any("precision" in line for line in unknown(ask(records)))


def test_an_arm_more_changes_no_other_s_numbers_and_the_seed_does():
    few = settled(study(RL_AND_STUDENT, widths=("1/8", "1/4")))
    more = ask(settled(study(ARMS, widths=("1/8", "1/4"))))
    assert ratios(ask(few)) == ratios(more)
    assert ratios(ask(few, seed=1)) != ratios(more)


def test_a_teacher_that_a_size_lacks_is_left_out_of_the_curve_and_that_is_said():
    records = settled(study(RL_AND_STUDENT, widths=("1/16", "1/8", "1/4")))
    answers = ask([run for run in records if (run["teacher"], run["width"]) != ("seed-2", "1/8")])
    assert any("student-led distillation leaves out 1 of 3 teachers" in note for note in answers.notes)
    assert ratios(answers)


def test_another_task_has_targets_of_its_own():
    records = [run | {"env": "minatar-breakout", "score": run["score"] + 25, "returns": [s + 25 for s in run["returns"]]} for run in settled(study(RL_AND_STUDENT))]  # fmt: skip  # noqa: E501
    records = [run | {"random_score": 1.0, "teacher_score": 41.0} for run in records]
    answers = ask(records)
    assert answers.scale.targets == (11.0, 21.0, 31.0, 37.0)
    assert answers.scale.margin == pytest.approx(0.5)


def test_the_scores_of_all_runs_stand_seed_by_seed_an_arm_a_row_and_what_is_longer_beside_what_it_is_longer_of():
    records = study({"distill-student": 3.0, "rl": 1.0}, widths=("1/16", "1/8"), seeds=3)
    for place, run in enumerate(reversed(records)):
        run |= {"score": 10.0 * run["seed"] + place / 100, "score_sampled": 1.0}
    own = [run | {"arm": "another", "run": f"another-{run['run']}"} for run in records if run["width"] == "1/8"][:1]
    undone = [run | {"arm": "ppd", "run": f"ppd-{run['run']}", "status": "failed"} for run in records[:1]]
    table = tables.scores(ask(records + own + undone).records)
    assert table.headings == ("arm", "1/16 (7.2k)", "1/8 (28k)")
    assert [row[0] for row in table.rows] == ["rl", "rl-long", "distill-student", "another"]
    assert table.rows[0][1:] == ["0.1 / 1.0, 10.1 / 1.0, 20.1 / 1.0"] * 2
    assert table.rows[3][1:] == ["", f"{own[0]['score']:.1f} / 1.0"]


def test_several_tasks_are_refused():
    with pytest.raises(InputError, match=r"several tasks \(breakout, pong\)"):
        ask([{"env": "pong"}, {"env": "breakout"}])


def test_the_pareto_front_holds_the_cheapest_and_the_best(known):
    groups = known.groups
    for cost in ("latency_ms", "bytes", "macs"):
        front = [group for group, yes in zip(groups, known.front[cost], strict=True) if yes]
        assert max(groups, key=lambda group: group.score.value) in front
        assert {group.parameters for group in front} <= set(SIZES.values())


@pytest.mark.parametrize("value", [None, "3", True, math.nan, math.inf, [1]])
def test_what_is_no_finite_number_is_none(value):
    assert number({"x": value}, "x") is None


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (1.9, 5.0, "1.9 to 5.0"),
        (2.2, math.inf, "from 2.2, no upper end"),
        (0.0, 3.0, "up to 3.0, no lower end"),
        (1.017, 8.961, "1.02 to 9.0"),
        (1.0, 10.2, "1.00 to 10"),
        (27.4, 99.4, "27 to 99"),
        (0.9961, 1234.5, "0.996 to 1,200"),
    ],
)
def test_an_interval_without_an_end_says_so(low, high, words):
    assert span(low, high) == words
    assert span(0.0, np.inf) == "without ends"


def test_an_ablation_is_compared_with_the_arm_it_changes_over_the_teachers_that_both_have():
    records = [run | {"method": "rl" if run["arm"].startswith("rl") else "distill"} for run in study(RL_AND_STUDENT)]
    students = [run for run in records if (run["arm"], run["width"]) == ("distill-student", "1/8")]
    left = students[0]["teacher"]
    lower = [
        run | {"arm": "worse", "run": f"worse-{run['run']}", "returns": [score - 2 for score in run["returns"]]}
        for run in students
        if run["teacher"] != left
    ]
    once = [run | {"arm": "once", "run": f"once-{run['run']}"} for run in students[:1]]
    alone = [run | {"arm": "other", "method": "ppd", "run": f"other-{run['run']}"} for run in students]
    found = {each.group.arm: each for each in ask(records + lower + once + alone).ablations}
    assert set(found) == {"worse", "once", "other"}
    assert found["worse"].base.arm == "distill-student"
    assert found["worse"].less_base.value == pytest.approx(-2)
    assert found["worse"].less_base.low == pytest.approx(-2)  # paired: what the teachers share cancels
    assert found["once"].less_base is None
    assert found["other"].base is None


def branched(records, scores):
    """Records of RL with branches: by share, what is added to the score of the whole budget."""
    made = []
    for run in (run for run in records if run["arm"] in ("rl", "rl-split")):
        for share, less in scores.items():
            games = [score + less for score in run["returns"]]
            facts = {"run": f"{run['run']}_branch-{share}", "branch": f"1/{share}", "env_steps": 12e6 / share}
            facts |= {"returns": games, "score": run["score"] + less, "score_sampled": run["score_sampled"] + less}
            made.append(run | facts)
    whole = [run | ({"env_steps": 12_000_000} if run["arm"] in ("rl", "rl-split") else {}) for run in records]
    return whole + made


WIDE = ("1/16", "1/8", "1/4")


def test_answers_are_of_the_budget_at_which_rl_has_as_many_steps_as_student_and_teacher_together():
    records = branched(study(RL_AND_STUDENT, WIDE, extended=False), {8: -4.0, 4: -2.0, 2: -1.0})
    tuned = [run | {"arm": "finetune", "env_steps": 9e6} for run in records if run["arm"] == "distill-student"] * 2
    answers = ask(records + tuned)  # students: 1.5M, and as many of their teachers'
    assert [(at.play, at.steps) for at in answers.at_budgets] == [
        (play, steps) for play in ("greedy", "sampled") for steps in (1.5e6, 3e6, 6e6, 12e6)
    ]
    assert {run["env_steps"] for group in answers.of("rl") for run in group.runs} == {3e6}
    assert answers.at("rl", "greedy").steps == 3e6
    assert answers.longer.steps == 12e6
    assert answers.at("rl", "greedy").ratios == tuple(r for r in answers.ratios if r.student == "distill-student")
    students = tuple(each for each in answers.differences if each.arm == "distill-student")
    assert answers.at("rl", "greedy").differences == students
    assert {certificate.convergence.gain for certificate in answers.certificates} >= {None, 1.0, 2.0}


def test_with_more_steps_rl_needs_less_size_and_the_steps_after_which_it_passes_are_told():
    records = branched(study({"rl": 1.0, "distill-student": 1.0}, WIDE, extended=False), {8: -4.0, 4: -2.0, 2: -1.0})
    answers = ask(records)
    first, *later = [at for at in answers.at_budgets if at.play == "greedy"]
    assert first.shrunk == ()
    shrunk = [dict(at.shrunk)[10].low for at in later]
    assert all(size < 1 for size in shrunk)
    for each in (each for each in answers.passings if each.play == "greedy"):
        assert each.spent == 3e6
        assert each.steps.interval[1] > 6e6  # alike at 12M alone
    assert tables.passings(answers).rows[0][5].text == "3.0M"
    assert len(tables.ratios_by_budget(answers).rows) == 8
    assert [row[4] for row in tables.laws(answers).rows if float(row[3]) < 0.05] in ([], ["does not fit"] * 2)


def test_the_scores_of_the_plan_are_those_at_which_sizes_are_compared():
    answers = ask(study(RL_AND_STUDENT, WIDE, extended=False), targets=(3.0, 12.0))
    assert {ratio.target for ratio in answers.ratios} == {3.0, 12.0}


@pytest.mark.parametrize(
    ("split", "whole", "verdict"),
    [(RATIO, 1.0, "The critic"), (1.0, RATIO, "The budget"), (1.0, 1.0, "Yes, at this budget")],
)
def test_the_first_answer_tells_size_from_critic_and_from_budget(split, whole, verdict):
    widths = ("1/32", "1/16", "1/8", "1/4")
    arms = {"rl": 1.0, "distill-student": RATIO, "rl-split": split}
    quarter = [run for run in branched(study(arms, widths, extended=False), {4: 0.0}) if "branch" in run]
    grown = {arm: whole if arm != "distill-student" else RATIO for arm in arms}
    records = [run for run in branched(study(grown, widths, extended=False), {}) if "branch" not in run]
    assert replies(ask(records + quarter))[0].verdict == verdict


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("pong", "Pong"),
        ("space_invaders", "Space Invaders"),
        ("MinAtar/SpaceInvaders-v1", "MinAtar Space Invaders"),
        ("CartPole-v1", "CartPole-v1"),
    ],
)
def test_a_task_has_a_name_in_words(task, words):
    assert conclusions.task(replace(answer([]), task=task)) == words
