import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from potstill.analysis.scaling import (
    budget_law,
    convergence,
    isotonic,
    pareto_front,
    size_bounds,
    size_ratio,
    slope,
    steps_to_pass,
)
from potstill.analysis.statistics import resample_curve
from potstill.errors import InputError

SIZES = np.array([1e3, 4e3, 16e3, 64e3, 256e3, 1024e3])


def rng(seed=0):
    return np.random.default_rng(seed)


def groups(means, noise=0.0, seeded=None, teachers=1, seeds=5):
    """A curve of arms with these means, their runs a normal noise apart."""
    seeded = seeded or rng()
    return [[[mean + noise * seeded.normal(size=1) for _ in range(seeds)] for _ in range(teachers)] for mean in means]


@given(st.lists(st.floats(-21, 21), min_size=2, max_size=8))
def test_the_isotonic_curve_is_scipy_s(scores):
    assert isotonic(scores) == pytest.approx(optimize.isotonic_regression(scores).x, abs=1e-9)


def test_it_takes_all_resamples_at_once():
    scores = rng().normal(size=(50, 6))
    assert np.allclose(isotonic(scores), [optimize.isotonic_regression(row).x for row in scores])


@pytest.mark.parametrize(
    ("target", "low", "high"),
    [(5, math.sqrt(10), math.sqrt(10)), (10, 10, 10), (20, 100, 100), (20.1, 100, math.inf), (0, 0, 1), (-3, 0, 1)],
)
def test_the_size_a_score_takes_is_exact_on_a_known_curve_and_bounded_beyond_it(target, low, high):
    assert size_bounds([1, 10, 100], [0.0, 10.0, 20.0], target) == (pytest.approx(low), pytest.approx(high))


def test_each_resample_may_have_a_score_of_its_own_to_reach():
    low, high = size_bounds([1, 10, 100], [[0.0, 10.0, 20.0]] * 3, [5.0, 20.1, -1.0])
    assert low == pytest.approx([math.sqrt(10), 100, 0])
    assert high == pytest.approx([math.sqrt(10), math.inf, 1])


def test_a_dip_is_levelled_and_the_smallest_size_on_the_level_counts():
    low, high = size_bounds([1, 10, 100, 1000], [0.0, 12.0, 8.0, 20.0], 10)
    assert low == high == pytest.approx(10)


@given(st.lists(st.integers(-21, 21).map(float), min_size=6, max_size=6), st.integers(-21, 21))
def test_bounds_are_never_nan_and_hold_the_size_at_which_the_curve_reaches_the_score(scores, target):
    low, high = size_bounds(SIZES, scores, target)
    assert 0 <= low <= high
    if low == high:
        assert np.interp(np.log(low), np.log(SIZES), isotonic(scores)) == pytest.approx(target, abs=1e-6)


def test_the_ratio_of_a_curve_to_itself_is_one():
    same = groups([-20, -10, 0, 10, 15, 20])
    ratio = size_ratio(SIZES, same, same, 5, rng(), resamples=100)
    assert (ratio.low, ratio.high, ratio.interval) == (1, 1, pytest.approx((1, 1)))


def test_a_curve_shifted_by_one_size_needs_that_much_more():
    rl, distilled = groups([-20, -10, 0, 10, 15, 20]), groups([-10, 0, 10, 15, 20, 20.5])
    assert size_ratio(SIZES, rl, distilled, 5, rng(), resamples=100).low == pytest.approx(4)


@pytest.mark.parametrize(
    ("rl", "distilled", "low", "high"),
    [
        ([0, 1, 2], [0, 10, 20], 10, math.inf),  # 100 / 10
        ([0, 10, 20], [0, 1, 2], 0, 0.1),
        ([0, 10, 20], [11, 12, 13], 10, math.inf),  # 10 / 1
        ([11, 12, 13], [0, 10, 20], 0, 0.1),
        ([0, 1, 2], [11, 12, 13], 100, math.inf),
        ([11, 12, 13], [0, 1, 2], 0, 0.01),
        ([0, 1, 2], [0, 1, 2], 0, math.inf),
        ([11, 12, 13], [11, 12, 13], 0, math.inf),
    ],
)
def test_a_score_out_of_reach_leaves_a_bound_of_the_ratio(rl, distilled, low, high):
    ratio = size_ratio([1, 10, 100], groups(rl), groups(distilled), 10, rng(), resamples=100)
    assert (ratio.low, ratio.high) == (pytest.approx(low), pytest.approx(high))
    assert ratio.interval == (pytest.approx(low), pytest.approx(high))
    assert [ratio.exact, ratio.above, ratio.below, ratio.unknown].count(1.0) == 1


def test_resamples_that_do_not_cross_the_score_are_counted_and_open_the_interval():
    seeded = rng()
    curve = groups([-20, -15, -10, 0, 5, 11], noise=2, seeded=seeded)
    size = steps_to_pass(SIZES, curve, [[np.array([10.0])] * 2], rng())
    assert 0.2 < size.above < 0.8
    assert size.exact + size.above + size.below + size.unknown == pytest.approx(1)
    assert size.interval[0] > SIZES[3]
    assert size.interval[1] == math.inf


def test_the_seed_decides_a_ratio_s_interval():
    curves = [groups([-20, -10, 0, 10, 15, 20], noise=2, seeded=rng(seed)) for seed in (1, 2)]
    one, same, other = (size_ratio(SIZES, *curves, 5, rng(seed), resamples=500).interval for seed in (0, 0, 1))
    assert one == same != other


def test_teachers_shared_by_all_sizes_are_drawn_together():
    """Teachers that shift the whole curve: the steps between its sizes are certain, whatever they are."""
    curve = [[[mean + skill + np.zeros(1)] * 2 for skill in (-3.0, 0.0, 4.0)] for mean in (-2.0, -1.0, 0.0)]
    deviations = resample_curve(curve, rng(), 500).deviations
    assert deviations[:, 1:] == pytest.approx(deviations[:, :-1])
    assert deviations.std() > 0.5
    with pytest.raises(InputError, match=r"the same teachers must be at every size: found \[3, 3, 2\] of them"):
        resample_curve([*curve[:2], curve[2][:2]], rng())


@pytest.mark.parametrize("teachers", [1, 3])
def test_the_interval_of_a_ratio_holds_the_truth_in_at_least_93_of_100_studies(teachers):
    seeded, held = rng(), 0
    means = -18 + 6 * np.log(SIZES / SIZES[0]) / np.log(4)
    for _ in range(300):
        rl = groups(means, 1.5, seeded)
        distilled = groups(means + 3, 1.5, seeded, teachers)  # half a size to the left
        ratio = size_ratio(SIZES, rl, distilled, 4, seeded, resamples=500)
        held += ratio.interval[0] <= 2 <= ratio.interval[1]
    assert held >= 279


# Deviations of runs as recorded: Pong at 1,964 and 7,197 parameters and above, 5 of RL and 3 of students.
RL_SPREAD, STUDENT_SPREAD = np.array([8.2, 1.0, 0.6, 0.3]), np.array([2.5, 0.6, 0.3, 0.2])


def study(means, spread, seeded, seeds=5):
    """A curve of five runs at each mean, of one game each."""
    return [[[mean + s * seeded.normal(size=1) for _ in range(seeds)]] for mean, s in zip(means, spread, strict=True)]


@pytest.mark.parametrize("target", [5.0, 12.0])
def test_with_five_runs_of_the_spreads_seen_the_interval_of_a_ratio_holds_the_truth(target):
    seeded, held = rng(), 0
    sizes = np.array([2e3, 8e3, 32e3, 128e3])
    rl, students = np.array([-2.0, 10.0, 14.0, 17.0]), np.array([4.0, 14.0, 17.0, 18.0])
    truth = np.divide(*(size_bounds(sizes, means, target)[0] for means in (rl, students)))
    for _ in range(100):
        curves = study(rl, RL_SPREAD, seeded), study(students, STUDENT_SPREAD, seeded)
        low, high = size_ratio(sizes, *curves, target, seeded, resamples=300).interval
        held += low <= truth <= high
    assert held >= 92


def test_the_steps_after_which_rl_passes_a_student_are_found_on_a_known_curve():
    rl, student = groups([-20.0, 0.0, 10.0, 15.0]), [[np.array([5.0])] * 3]
    passed = steps_to_pass([1e6, 2e6, 4e6, 8e6], rl, student, rng(), resamples=100)
    assert passed.low == passed.high == pytest.approx(2e6 * math.sqrt(2))
    never = steps_to_pass([1e6, 2e6], groups([-20.0, 0.0]), student, rng(), resamples=100)
    assert (never.low, never.high) == (2e6, math.inf)


@pytest.mark.parametrize("branches", [True, False])
def test_with_five_runs_the_interval_of_these_steps_holds_the_truth_in_93_of_100_studies(branches):
    seeded, held = rng(), 0
    steps, means = np.array([1e6, 2e6, 4e6, 8e6]), np.array([0.0, 5.0, 10.0, 15.0])
    for _ in range(100):
        common = 2.0 * seeded.normal(size=5) * branches  # what the branches of one run share
        curve = [[[np.array([mean + c + 1.5 * seeded.normal()])] for c in common] for mean in means]
        curve = curve if branches else [[[run for (run,) in group]] for group in curve]
        student = [[7.5 + 1.0 * seeded.normal(size=1) for _ in range(5)]]
        low, high = steps_to_pass(steps, curve, student, seeded, resamples=300).interval
        held += low <= 2e6 * math.sqrt(2) <= high
    assert held >= 92


def law(size, steps, limit=30.0, power=0.5):
    return limit * math.log10(size) * (1 - (steps / (2e8 / size)) ** -power)


def budgets(score, seeded, noise=1.0):
    return {
        size: {steps: score(size, steps) + noise * seeded.normal(size=5) for steps in (1e6, 2e6, 4e6, 8e6)}
        for size in (500, 2_000, 8_000, 32_000)
    }


def test_the_law_of_budgets_is_found_where_it_holds_and_its_test_errs_as_often_as_it_says():
    seeded = rng()
    fits = [budget_law(budgets(law, seeded)) for _ in range(100)]
    assert np.median([fit.power for fit in fits]) == pytest.approx(0.5, abs=0.1)
    limits = [fit.sizes[32_000][0] for fit in fits]
    assert np.median(limits) == pytest.approx(30 * math.log10(32_000), rel=0.1)
    assert np.mean([fit.p < 0.05 for fit in fits]) <= 0.12


def test_a_law_that_does_not_hold_is_told_by_its_lack_of_fit():
    def jump(size, steps):  # learns nothing, then all at once
        return 20.0 if steps >= 4e6 else 1.0

    fit = budget_law(budgets(jump, rng()))
    assert fit.lack > 5
    assert fit.p < 1e-3


def test_too_few_budgets_or_runs_have_no_law():
    two = {size: dict(list(of.items())[:2]) for size, of in budgets(law, rng()).items()}
    assert budget_law(two) is None
    assert (
        budget_law({size: {at: runs[:1] for at, runs in of.items()} for size, of in budgets(law, rng()).items()})
        is None
    )
    assert budget_law(budgets(law, rng(), noise=0.0)) is None


def test_sizes_and_cells_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="positive and increase"):
        size_bounds([1, 1], [0.0, 1.0], 0.5)
    with pytest.raises(InputError, match="a group for each"):
        size_bounds([1, 2, 3], [0.0, 1.0], 0.5)
    with pytest.raises(InputError, match="two runs or more at every size"):
        size_ratio([1, 2], groups([0, 1], seeds=1), groups([0, 1]), 0.5, rng())


def test_the_slope_of_a_line_is_known_exactly():
    assert slope(np.arange(20), 3 - 2 * np.arange(20)) == pytest.approx((-2, -2, -2))


def test_points_that_do_not_depend_on_each_other_give_the_ordinary_interval():
    x = np.arange(40.0)
    y = 0.1 * x + (-1) ** np.arange(40)  # each residual opposite to the last: counts as no dependence
    ordinary = stats.linregress(x, y)
    half = stats.t.ppf(0.975, 38) * ordinary.stderr
    assert slope(x, y) == pytest.approx((ordinary.slope, ordinary.slope - half, ordinary.slope + half))


@pytest.mark.parametrize("r", [0.0, 0.5, 0.8])
def test_the_interval_of_a_slope_holds_the_truth_although_points_depend_on_each_other(r):
    seeded, held = rng(), 0
    for _ in range(1_000):
        noise = seeded.normal(size=100)
        noise[0] /= math.sqrt(1 - r**2)
        for i in range(1, 100):
            noise[i] += r * noise[i - 1]
        _, low, high = slope(np.arange(100), 0.05 * np.arange(100) + noise)
        held += low <= 0.05 <= high
    assert 930 <= held <= 970


def test_too_few_points_leave_the_slope_open_and_fewer_are_refused():
    assert slope([1, 2, 3, 4, 5], [0, 1, 0, 1, 0])[1:] == (-math.inf, math.inf)
    with pytest.raises(InputError, match="3 points or more"):
        slope([1, 2], [0, 1])
    with pytest.raises(InputError, match="must increase"):
        slope([1, 1, 2], [0, 1, 2])


STEPS = np.arange(1, 201) * 5_000
NOISE = rng(3).normal(size=200)


@pytest.mark.parametrize(
    ("scores", "gain", "verdict"),
    [
        (np.minimum(STEPS / 25_000, 20) + NOISE, 0.2, "converged"),  # flat since half the budget
        (np.minimum(STEPS / 25_000, 20) + NOISE, -3.0, "converged"),
        (np.minimum(STEPS / 25_000, 20) + NOISE, 0.5, "not converged"),
        (np.minimum(STEPS / 25_000, 20) + NOISE, None, "unknown"),
        (STEPS / 50_000 + NOISE, 0.2, "not converged"),  # still climbing
        (STEPS / 50_000 + NOISE, None, "not converged"),
        (-STEPS / 50_000 + NOISE, 0.2, "not converged"),  # coming down
        (np.sin(STEPS / 250_000), 0.2, "unknown"),  # so smooth that its last quarter is one point
    ],
)
def test_a_run_has_converged_where_its_curve_is_flat_and_more_steps_gain_nothing(scores, gain, verdict):
    certificate = convergence(STEPS, scores, gain)
    assert certificate.verdict == verdict
    assert certificate.gain == gain


def test_only_the_last_quarter_counts():
    late = STEPS > 750_000
    assert convergence(STEPS, NOISE + ~late * 50).slope == slope(STEPS[late], NOISE[late])


def test_the_pareto_front_is_what_no_other_point_beats():
    costs, scores = [1, 2, 2, 3, 4, 1], [5, 9, 7, 9, 10, 5]
    assert pareto_front(costs, scores).tolist() == [True, True, False, False, True, True]  # the twin of a point stays


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=10))
def test_every_point_off_the_front_is_beaten_by_one_on_it(points):
    costs, scores = np.array(points).T
    front = pareto_front(costs, scores)
    assert front.any()
    for cost, score in zip(costs[~front], scores[~front], strict=True):
        assert ((costs[front] <= cost) & (scores[front] >= score)).any()
