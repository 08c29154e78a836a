"""What a few runs say of an arm, and how surely: runs are the sample, not episodes."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from potstill.errors import InputError

FloatArray = NDArray[np.float64]

Arm = Sequence[Sequence[FloatArray]]
"""Teachers, each a list of runs, each a 1-D array of episode scores; counts may differ at every level.

An arm without teachers is a list of one: `[[run, run, ...]]`. So is one whose runs share a single teacher, and what is
said of it then holds for that teacher only.
"""

EPISODE_RESAMPLES = 1000
"""A run's mean over resampled episodes is drawn from so many made beforehand: 2 % noise in the least of the levels."""
MOST_RESAMPLES = 40_000
"""So many of these for all runs of an arm: where there are more than 40 runs, each one's noise counts the less."""
MOST_SPLIT = 1 << 22
"""Scores that are put in another order for the drawn splits of a permutation test: of many runs fewer are drawn."""


class Interval(NamedTuple):
    """An estimate between its bounds, in the units of what is estimated; infinite where there is no telling."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A number, and what resampled studies would have made of it (see `bootstrap`)."""

    value: float
    resamples: FloatArray  # (B,), widened for the few runs there are

    def interval(self, level: float = 0.95) -> Interval:
        """Percentile interval: (1 - level) / 2 of the resamples lie beyond either bound."""
        low, high = percentiles(self.resamples, self.resamples, level)
        return Interval(self.value, low, high)

    def equivalent(self, margin: float) -> bool:
        """Whether the number lies surely between -margin and margin.

        Two one-sided tests at 5 % each, which is to say: the 90 % interval lies inside the margin (Schuirmann 1987).
        False means "not shown", not "different".

        Raises:
            InputError: the margin is not positive.
        """
        if not margin > 0:
            raise InputError(f"an equivalence margin must be positive, not {margin}")
        _, low, high = self.interval(0.9)
        return -margin < low and high < margin


def iqm(scores: ArrayLike) -> FloatArray:
    """Interquartile mean, the mean of the middle half of the scores: (..., N) -> (...). NaN stands for no score.

    With fractional weights: of 5 scores a quarter is 1.25, so the second and the fourth count by 0.75. It therefore
    estimates the same quantity at every sample size. `scipy.stats.trim_mean(scores, 0.25)`, which rliable calls, trims
    whole scores only: the two agree where 4 divides the number of scores, but of 3 scores scipy takes the plain mean.

    Source: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice".
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64), axis=-1)  # NaN last
    whole = not np.isnan(ordered[..., -1]).any()
    n = np.full(1, ordered.shape[-1]) if whole else np.isfinite(ordered).sum(axis=-1, keepdims=True)
    rank = np.arange(ordered.shape[-1])
    weights = np.clip(np.minimum(rank + 1, 0.75 * n) - np.maximum(rank, 0.25 * n), 0.0, None)
    ordered = ordered if whole else np.nan_to_num(ordered)
    return np.asarray((ordered * weights).sum(axis=-1) / (0.5 * n[..., 0]))


def bootstrap(arm: Arm, rng: np.random.Generator, resamples: int = 10_000) -> Estimate:
    """Interquartile mean of an arm's runs, each the mean of its episodes, by a hierarchical bootstrap.

    Teachers are drawn with replacement, of each its runs, of each its episodes. The plain percentile interval of such
    resamples does not hold what it says: at 95 % it covers three times in four with 3 runs, nine in ten with 5. Two
    faults are mended, and docs/explanation/statistics.md has the coverage that results:

    1. A run's mean varies with its episodes already and a teacher's with its runs, so drawing at every level counts
       the lower levels' noise twice. The resamples keep their shape and are given the spread of those drawn at the
       outermost level alone (Davison & Hinkley 1997, section 3.8), times sqrt(k / (k - 1)) for k teachers. Not for
       single runs: of an interquartile mean, unlike of a mean, their resamples are not too narrow (0.96 to 1.07 of the
       true spread for 3 to 20 normal scores).
    2. The spread of k units is itself uncertain. Each resample's deviation is divided by sqrt(chi^2 / df), df = k - 1,
       drawn anew: of normal deviations this makes Student's t (Hesterberg 2015 widens the percentiles to that effect;
       we widen the resamples, so that what is computed from them inherits it).

    Returns:
        The estimate. With a single outermost unit its interval is infinite: one run says nothing about others. Runs
        that all scored the same have an interval of no width.

    Raises:
        InputError: a teacher without runs, a run without episodes, or a score that is not a finite number.
    """
    value, deviations, df = _deviations(_draw([arm], rng, resamples), np.ones(1))
    return _estimate(value, deviations, df, rng)


def difference(x: Arm, y: Arm, rng: np.random.Generator, paired: bool = False, resamples: int = 10_000) -> Estimate:
    """Interquartile mean of `x` less that of `y`, with resamples as in `bootstrap`.

    Args:
        paired: the outermost units are shared, in the same order (the same teachers; without teachers, the same seeds):
            they are drawn together, so what they share cancels. Otherwise the arms are drawn independently, with the
            degrees of freedom of Welch 1947.

    Raises:
        InputError: as `bootstrap`; or paired arms have unequal numbers of outermost units.
    """
    if paired:
        value, deviations, df = _deviations(_draw([x, y], rng, resamples), np.array([1.0, -1.0]))
        return _estimate(value, deviations, df, rng)
    parts = [_deviations(_draw([arm], rng, resamples), np.ones(1)) for arm in (x, y)]
    (one, of_one, df_one), (other, of_other, df_other) = parts
    known = min(df_one, df_other) > 0
    joint = welch([of_one.var(), of_other.var()], [df_one, df_other]) if known else 0.0
    return _estimate(one - other, of_one - of_other, joint, rng)


def probability_of_improvement(x: Arm, y: Arm) -> float:
    """P(X > Y) + P(X = Y) / 2: how often a run of `x` scores above one of `y`; runs by their means over episodes.

    Raises InputError as `bootstrap`. Source: Agarwal et al. 2021.
    """
    one, other = (np.array([run.mean() for runs in _outermost(arm) for run in runs]) for arm in (x, y))
    return float(((one[:, None] > other).mean() + (one[:, None] >= other).mean()) / 2)


def permutation_test(x: ArrayLike, y: ArrayLike, rng: np.random.Generator, limit: int = 200_000) -> float:
    """Exact two-sided p-value of the difference of means: the share of splits of all runs whose difference is as large.

    Needs no distribution, only that under the null either label could have been any run's. With m and n runs there are
    (m + n)! / (m! n!) splits, so p is never below 1 over that, and twice it where m = n: 0.10 for 3 against 3, 0.008
    for 5 against 5.

    Args:
        x, y: (m,) and (n,) one score per run, same units.
        rng: draws splits where there are too many to take all.
        limit: of the number of splits taken; of more, a tenth of `limit` is drawn, or fewer of more than 200 runs, and
            p is never below 1 over that.

    Source: Fisher 1935, "The Design of Experiments", section 21; Pitman 1937.
    """
    one, other = (np.asarray(scores, dtype=np.float64) for scores in (x, y))
    both, m, n = np.concatenate([one, other]), len(one), len(other)
    if math.comb(m + n, m) > limit:
        rows = min(limit // 10, max(1_000, MOST_SPLIT // (m + n))) - 1
        drawn = np.tile(both, (rows, 1))
        rng.permuted(drawn, axis=1, out=drawn)
        sums = np.concatenate([[one.sum()], drawn[:, :m].sum(axis=1)])
    else:
        sums = both[np.array(list(itertools.combinations(range(m + n), m)))].sum(axis=1)
    differences = np.abs(sums / m - (both.sum() - sums) / n)
    # The observed split is the first; what differs from it by rounding alone is as large.
    return float((differences >= differences[0] - 1e-9 * (1 + np.abs(both).max())).mean())


def holm(p_values: ArrayLike) -> FloatArray:
    """P-values adjusted for being one of several, (N,) in the order given: reject those below the level.

    The chance of any false rejection stays below the level however the tests depend on each other.

    Source: Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure".
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


@dataclass(frozen=True)
class Curve:
    """Interquartile means at several sizes, and their resamples before they are widened."""

    values: FloatArray  # (S,)
    deviations: FloatArray
    """(B, S) resamples less the values; `widen` them by the degrees of freedom of what is computed from them."""
    df: FloatArray  # (S,) degrees of freedom of each size's spread
    shared: bool  # whether the sizes share their teachers, and so their degrees of freedom


def resample_curve(groups: Sequence[Arm], rng: np.random.Generator, resamples: int = 10_000) -> Curve:
    """Interquartile mean of each group of a curve, and resamples as in `bootstrap`.

    Where groups have several teachers, these are the same in every group, in the same order, and are drawn together: a
    good teacher lifts the whole curve. Otherwise the groups are drawn independently.

    Raises:
        InputError: as `bootstrap`; the groups' numbers of teachers differ; or a group has one run only, which tells
            nothing of its spread.
    """
    if len({len(group) for group in groups}) != 1:
        raise InputError(f"the same teachers must be at every size: found {[len(group) for group in groups]} of them")
    if any(len(_outermost(group)) == 1 for group in groups):
        raise InputError("a curve needs two runs or more at every size: leave out the sizes that have one, and say so")
    if len(groups[0]) > 1:
        drawn = _draw(groups, rng, resamples)
        spreads = [_deviations(drawn, contrast) for contrast in np.eye(len(groups))]
    else:
        spreads = [_deviations(_draw([group], rng, resamples), np.ones(1)) for group in groups]
    values, deviations, df = zip(*spreads, strict=True)
    return Curve(np.array(values), np.stack(deviations, axis=1), np.array(df, dtype=np.float64), len(groups[0]) > 1)


def welch(variances: ArrayLike, df: ArrayLike) -> float:
    """Degrees of freedom of a sum of independent parts, from their variances and their own (Welch 1947)."""
    v, own = np.asarray(variances, dtype=np.float64), np.asarray(df, dtype=np.float64)
    return float(v.sum() ** 2 / (v**2 / own).sum()) if v.any() else float(own.min())


def widen(deviations: FloatArray, df: float, rng: np.random.Generator) -> FloatArray:
    """Deviations (B, ...) over sqrt(chi^2 / df), one draw per resample: normal ones become Student's t."""
    factor = np.sqrt(df / rng.chisquare(df, len(deviations)))
    return np.asarray(deviations * factor.reshape(-1, *[1] * (deviations.ndim - 1)))


def percentiles(lows: FloatArray, highs: FloatArray, level: float) -> tuple[float, float]:
    """Bounds that (1 - level) / 2 of `lows` and `highs`, (B,) each, lie beyond. Not interpolated: some are infinite."""
    low = np.quantile(lows, (1 - level) / 2, method="lower")
    high = np.quantile(highs, (1 + level) / 2, method="higher")
    return float(low), float(high)


class _Drawn(NamedTuple):
    value: FloatArray  # (A,) interquartile mean of each arm
    full: FloatArray  # (B, A) the same of resamples at every level
    top: FloatArray  # (B, A) of the same resamples at the outermost level alone
    units: int  # outermost units: teachers, or single runs
    lone: bool  # single runs


def _draw(arms: Sequence[Arm], rng: np.random.Generator, resamples: int) -> _Drawn:
    """Resamples arms that share their outermost units."""
    nested = [_outermost(arm) for arm in arms]
    units = len(nested[0])
    if any(len(arm) != units for arm in nested):
        raise InputError(
            f"arms drawn together must have the same teachers, or the same seeds: found {[len(arm) for arm in nested]}"
        )
    chosen = rng.integers(0, units, (resamples, units))
    columns = [_draw_arm(arm, chosen, rng) for arm in nested]
    value, full, top = (np.stack(parts, axis=-1) for parts in zip(*columns, strict=True))
    return _Drawn(value, full, top, units, all(len(runs) == 1 for arm in nested for runs in arm))


def _draw_arm(arm: Arm, chosen: NDArray[np.int64], rng: np.random.Generator) -> tuple[FloatArray, ...]:
    resamples, units = chosen.shape
    counts = np.array([len(runs) for runs in arm])
    means = np.full((units, counts.max()), np.nan)  # rows of unequal length end in NaN
    made = min(EPISODE_RESAMPLES, resamples, max(20, MOST_RESAMPLES // int(counts.sum())))
    episodes = np.full((*means.shape, made), np.nan)
    for i, runs in enumerate(arm):
        for j, run in enumerate(runs):
            means[i, j] = run.mean()
            episodes[i, j] = run[rng.integers(0, len(run), (made, len(run)))].mean(axis=1)
    shape = (resamples, units, means.shape[1])
    run = (rng.random(shape) * counts[chosen][..., None]).astype(np.int64)
    full = episodes[chosen[..., None], run, rng.integers(0, made, shape)]
    full[np.arange(shape[2]) >= counts[chosen][..., None]] = np.nan
    return iqm(means.ravel()), iqm(full.reshape(resamples, -1)), iqm(means[chosen].reshape(resamples, -1))


def _deviations(drawn: _Drawn, contrast: FloatArray) -> tuple[float, FloatArray, int]:
    """A contrast (A,) of the arms, its resamples' deviations (B,) scaled as `bootstrap` says, degrees of freedom."""
    value, full, top = (part @ contrast for part in (drawn.value, drawn.full, drawn.top))
    spread = float(full.std())
    scale = float(top.std()) / spread if spread > 0 else 0.0
    if drawn.units > 1 and not drawn.lone:
        scale *= math.sqrt(drawn.units / (drawn.units - 1))
    return float(value), (full - value) * scale, drawn.units - 1


def _estimate(value: float, deviations: FloatArray, df: float, rng: np.random.Generator) -> Estimate:
    if df == 0:
        return Estimate(value, np.resize([-math.inf, math.inf], len(deviations)))
    return Estimate(value, value + widen(deviations, df, rng))


def _outermost(arm: Arm) -> list[list[FloatArray]]:
    """The arm by its outermost units: teachers, or the runs of a single teacher, each a unit of one."""
    if not arm or not all(len(runs) for runs in arm):
        raise InputError("every teacher needs a run: leave out those that have none, and say so")
    checked = [[np.asarray(run, dtype=np.float64) for run in runs] for runs in arm]
    for run in (run for runs in checked for run in runs):
        if run.ndim != 1 or not len(run):
            raise InputError(f"a run is a list of episode scores, not an array of shape {run.shape}")
        if not np.isfinite(run).all():
            raise InputError("a score is not a finite number: leave failed runs out, and say so")
    return [[run] for run in checked[0]] if len(checked) == 1 else checked
