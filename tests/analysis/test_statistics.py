import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from potstill.analysis.statistics import (
    Estimate,
    bootstrap,
    difference,
    holm,
    iqm,
    permutation_test,
    probability_of_improvement,
    resample_curve,
    welch,
)
from potstill.errors import InputError

POINTS = st.lists(st.integers(-21, 21).map(float), min_size=2, max_size=6)


def rng(seed=0):
    return np.random.default_rng(seed)


def runs(*scores):
    """An arm without teachers, each run of one episode."""
    return [[np.array([float(score)]) for score in scores]]


def study(seeded, teachers, seeds, of_teachers=0.0, of_runs=1.0, of_episodes=1.0, mean=0.0):
    """An arm whose true interquartile mean is `mean`, from the three levels' standard deviations."""
    skills = mean + of_teachers * seeded.normal(size=teachers)
    return [
        [skill + of_runs * seeded.normal() + of_episodes * seeded.normal(size=10) for _ in range(seeds)]
        for skill in skills
    ]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([7], 7),
        ([0, 4], 2),
        ([0, 3, 12], 4),  # (0.25 * 0 + 3 + 0.25 * 12) / 1.5
        ([0, 2, 4, 100], 3),
        ([0, 1, 2, 10, 50], 4.1),  # (0.75 * 1 + 2 + 0.75 * 10) / 2.5
    ],
)
def test_the_interquartile_mean_is_that_of_the_middle_half_with_fractional_weights(scores, expected):
    assert iqm(scores[::-1]) == pytest.approx(expected)


def test_it_is_the_trimmed_mean_of_scipy_and_rliable_where_4_divides_the_number_of_scores():
    scores = rng().normal(size=20)
    for n in (4, 8, 20):
        assert iqm(scores[:n]) == pytest.approx(stats.trim_mean(scores[:n], 0.25))
    assert iqm(scores[:3]) != pytest.approx(stats.trim_mean(scores[:3], 0.25))


@given(POINTS, st.integers(-5, 5), st.integers(1, 3))
def test_it_moves_and_scales_with_the_scores_and_lies_among_them(scores, shift, factor):
    moved = [factor * score + shift for score in scores]
    assert iqm(moved) == pytest.approx(factor * iqm(scores) + shift)
    assert min(scores) - 1e-9 <= iqm(scores) <= max(scores) + 1e-9
    assert iqm([scores[0]] * len(scores)) == pytest.approx(scores[0])


def test_it_is_taken_of_each_row_and_nan_is_no_score():
    assert iqm([[0, math.nan, 4, 2, 100], [7, math.nan, math.nan, math.nan, math.nan]]).tolist() == [3, 7]


def test_bad_scores_are_refused_rather_than_skipped():
    with pytest.raises(InputError, match="every teacher needs a run"):
        bootstrap([[np.zeros(2)], []], rng())
    with pytest.raises(InputError, match="list of episode scores"):
        bootstrap([[np.zeros(0)]], rng())
    with pytest.raises(InputError, match="not a finite number"):
        bootstrap(runs(1, math.inf), rng())


def test_the_estimate_is_of_runs_not_of_episodes():
    arm = [[np.zeros(1), np.array([0.0, 2.0] * 50)], [np.full(3, 9.0)]]
    assert bootstrap(arm, rng()).value == pytest.approx(iqm([0, 1, 9]))


def test_the_seed_decides_the_resamples():
    arm = study(rng(), 3, 2)
    assert np.array_equal(bootstrap(arm, rng(1)).resamples, bootstrap(arm, rng(1)).resamples)
    assert not np.array_equal(bootstrap(arm, rng(1)).resamples, bootstrap(arm, rng(2)).resamples)


def test_with_one_level_the_hierarchical_bootstrap_is_the_ordinary_one():
    scores = rng().normal(size=7)
    ordinary = [iqm(scores[picked]) - iqm(scores) for picked in rng(1).integers(0, 7, (10_000, 7))]
    deviations = resample_curve([runs(*scores), runs(*scores)], rng(2), 10_000).deviations
    assert stats.ks_2samp(deviations[:, 0], ordinary).pvalue > 0.01
    assert deviations[:, 0].std() == pytest.approx(np.std(ordinary), rel=0.03)


def test_teachers_of_one_run_each_are_the_same_sample_as_runs_without_teachers():
    flat = study(rng(), 1, 4)
    nested = [[run] for run in flat[0]]
    assert np.array_equal(bootstrap(flat, rng(1)).resamples, bootstrap(nested, rng(1)).resamples)


def test_the_spread_of_an_arm_is_that_of_its_teachers_however_many_runs_repeat_them():
    skills = [np.array([score]) for score in (0.0, 1.0, 5.0)]
    few, many = ([[skill] * n for skill in skills] for n in (2, 40))
    curves = [resample_curve([arm, arm], rng(), 2_000).deviations[:, 0].std() for arm in (few, many)]
    assert curves[1] == pytest.approx(curves[0], rel=0.05)


def test_noise_of_episodes_is_counted_once():
    """Runs of equal skill: their means spread as their episodes make them, and no further."""
    arm = [list(rng().normal(size=(40, 25)))]
    spread = resample_curve([arm, arm], rng(), 5_000).deviations[:, 0].std()
    means = np.array([run.mean() for run in arm[0]])
    ordinary = np.std([iqm(means[picked]) for picked in rng(1).integers(0, 40, (5_000, 40))])
    assert spread == pytest.approx(ordinary, rel=0.05)


def test_one_run_says_nothing_about_others():
    value, low, high = bootstrap(runs(20), rng()).interval()
    assert (value, low, high) == (20, -math.inf, math.inf)
    apart = difference(runs(20), runs(0, 1, 2), rng())
    assert apart.interval()[1:] == (-math.inf, math.inf)
    assert probability_of_improvement(runs(20), runs(0, 1, 2)) == 1


def test_runs_that_all_score_the_same_have_an_interval_of_no_width():
    assert bootstrap(runs(-21, -21, -21), rng()).interval() == (-21, -21, -21)
    assert difference(runs(-21, -21), runs(-21, -21), rng()).interval() == (0, 0, 0)


# The arms of the study: RL with 3, 5 and 10 seeds; students of 3 teachers that differ not at all, somewhat, and much.
@pytest.mark.parametrize(
    ("teachers", "seeds", "of_teachers"), [(1, 3, 0), (1, 5, 0), (1, 10, 0), (3, 5, 0), (3, 5, 0.5), (3, 2, 1)]
)
def test_a_95_percent_interval_holds_the_truth_in_93_to_97_of_100_studies(teachers, seeds, of_teachers):
    seeded, held = rng(), 0
    for _ in range(1_000):
        _, low, high = bootstrap(study(seeded, teachers, seeds, of_teachers), seeded, 500).interval()
        held += low <= 0 <= high
    assert 930 <= held <= 970


@pytest.mark.parametrize(("seeds", "of_runs"), [(3, 1), (5, 1), (5, 4), (10, 1)])
def test_that_of_a_difference_holds_it_in_93_to_98(seeds, of_runs):
    seeded, held = rng(), 0
    for _ in range(1_000):
        x, y = study(seeded, 1, seeds, of_runs=of_runs, mean=2), study(seeded, 1, 5)
        _, low, high = difference(x, y, seeded, resamples=500).interval()
        held += low <= 2 <= high
    assert 930 <= held <= 980


def test_the_plain_percentile_interval_would_not():
    seeded, held = rng(), 0
    for _ in range(1_000):
        scores = seeded.normal(size=5)
        curve = resample_curve([runs(*scores)] * 2, seeded, 500)
        low, high = np.quantile(curve.values[0] + curve.deviations[:, 0], [0.025, 0.975])
        held += low <= 0 <= high
    assert held < 920


def test_what_pairs_share_cancels():
    x, y = runs(1, 5, 9, 20), runs(0, 4, 8, 19)
    paired = difference(x, y, rng(), paired=True).interval()
    assert paired == pytest.approx((1, 1, 1))
    _, low, high = difference(x, y, rng()).interval()
    assert low < -5
    assert high > 7


def test_differences_change_sign_with_their_sides():
    x, y = study(rng(1), 3, 2, 1), study(rng(2), 1, 5)
    one, other = difference(x, y, rng()).interval(), difference(y, x, rng()).interval()
    assert one.value == pytest.approx(-other.value)
    assert one.low == pytest.approx(-other.high, rel=0.15)


def test_pairs_of_unequal_number_are_refused():
    with pytest.raises(InputError, match=r"same teachers, or the same seeds: found \[2, 3\]"):
        difference(runs(1, 2), runs(1, 2, 3), rng(), paired=True)


def test_degrees_of_freedom_are_welch_s():
    assert welch([1, 1], [4, 4]) == pytest.approx(8)
    assert welch([4, 1], [2, 10]) == pytest.approx(25 / (16 / 2 + 1 / 10))
    assert welch([1, 0], [4, 9]) == pytest.approx(4)
    assert welch([0, 0], [4, 2]) == 2


def test_an_interval_is_read_off_the_resamples():
    assert Estimate(0.0, np.linspace(-1, 1, 2001)).interval() == pytest.approx((0, -0.95, 0.95))


def test_equivalence_is_the_90_percent_interval_within_the_margin():
    estimate = Estimate(0.0, np.linspace(-1, 1, 2001))
    assert estimate.equivalent(0.91)
    assert not estimate.equivalent(0.89)
    assert not Estimate(0.5, estimate.resamples + 0.5).equivalent(0.91)
    with pytest.raises(InputError, match="margin must be positive"):
        estimate.equivalent(0)


def test_improvement_counts_pairs_and_half_the_ties():
    assert probability_of_improvement(runs(3, 4), runs(1, 3)) == pytest.approx(3.5 / 4)


def test_holm_s_steps():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert holm([0.03]) == pytest.approx([0.03])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_no_correction_and_bonferroni_s_and_keeps_the_order(p):
    adjusted = holm(p)
    assert (adjusted >= np.array(p)).all()
    assert (adjusted <= np.minimum(np.array(p) * len(p), 1) + 1e-12).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


def test_a_permutation_test_is_scipys_over_every_split():
    seeded = rng()
    for m, n in ((3, 3), (5, 5), (5, 3), (2, 4)):
        x, y = seeded.normal(1, 1, m), seeded.normal(0, 2, n)
        reference = stats.permutation_test((x, y), lambda a, b: abs(a.mean() - b.mean()), n_resamples=np.inf,
                                           alternative="greater")  # fmt: skip
        assert permutation_test(x, y, rng()) == pytest.approx(reference.pvalue)


def test_the_least_that_a_permutation_test_can_say_is_that_of_the_observed_split_and_its_mirror():
    assert permutation_test([1, 2, 3], [7, 8, 9], rng()) == pytest.approx(0.1)
    assert permutation_test([1, 2, 3, 4, 5], [6, 7, 8, 9, 10], rng()) == pytest.approx(2 / 252)
    assert permutation_test([0.1, 0.2], [0.1, 0.2], rng()) == 1.0
    assert permutation_test([0.1] * 3, [0.1] * 3, rng()) == 1.0


@pytest.mark.parametrize(("spread", "most"), [(8.0, 0.06), (2.4, 0.09)])
def test_a_permutation_tests_false_alarms_at_five_runs_with_the_spreads_seen(spread, most):
    # On Pong at 1,964 parameters RL's runs have a deviation of 8 points, students' 2.4. Means are equal, so each p
    # below 0.05 is a false alarm: 4.6 % where the spreads are equal, 7.5 % where they are not, as the test is exact for
    # two arms of one distribution only.
    seeded = rng(1)
    p = [permutation_test(8.0 * seeded.normal(size=5), spread * seeded.normal(size=5), seeded) for _ in range(1000)]
    assert 0.03 < np.mean(np.array(p) < 0.05) < most


def test_of_too_many_splits_a_permutation_test_draws_some_which_the_seed_decides():
    x, y = rng(2).normal(0.5, 1, 8), rng(3).normal(0, 1, 8)
    exact, drawn = permutation_test(x, y, rng()), permutation_test(x, y, rng(), limit=10_000)
    assert drawn == pytest.approx(exact, abs=0.03)
    assert drawn == permutation_test(x, y, rng(), limit=10_000) != permutation_test(x, y, rng(1), limit=10_000)
    assert permutation_test(np.arange(30), np.arange(100, 130), rng()) == pytest.approx(1 / 20_000)


def test_of_many_runs_fewer_splits_are_drawn():
    x, y = rng(0).normal(size=300), rng(1).normal(0.1, size=300)
    p = permutation_test(x, y, rng(5))
    assert p == pytest.approx(stats.ttest_ind(x, y).pvalue, abs=0.03)
    assert p * 6_990 == pytest.approx(round(p * 6_990))  # 2^22 numbers in rows of 600
    assert permutation_test(np.arange(3_000), np.arange(9_000, 12_000), rng()) == pytest.approx(1 / 1_000)
