"""How score goes with size: the size a score takes, ratios of such sizes, convergence, the Pareto front."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from potstill.analysis import statistics
from potstill.analysis.statistics import Arm, Curve, FloatArray, Interval
from potstill.errors import InputError


@dataclass(frozen=True)
class Bounded:
    """A positive quantity (a size, a ratio of sizes) that may be known by a bound only."""

    low: float
    high: float  # with low, what the runs say: equal where it is known; 0 or infinite where nothing bounds it there
    interval: tuple[float, float]
    """Of the resamples' lower bounds the lower percentile, of their upper bounds the upper one: whatever the unmeasured
    sizes hide, the interval is not too narrow."""
    exact: float
    above: float
    below: float
    unknown: float
    """Shares of the resamples, of sum 1: known exactly; from below only (> x); from above only (<= x); not at all."""


@dataclass(frozen=True)
class Convergence:
    """Whether an RL run had learned what it would."""

    verdict: Literal["converged", "not converged", "unknown"]
    slope: Interval  # of the last quarter of the learning curve, in score per step
    gain: float | None  # score that the extension of the budget added; None where there was none


class BudgetLaw(NamedTuple):
    """S(N, D) = S_inf(N) (1 - (D / D0(N))^-b), as `budget_law` fits it."""

    sizes: dict[int, tuple[float, float]]  # by size N, S_inf in points and D0 in agent steps
    power: float  # b
    lack: float  # F of the lack of fit
    p: float  # of that test: below 0.05 the law does not hold, and neither do its numbers


def isotonic(scores: ArrayLike) -> FloatArray:
    """Nearest non-decreasing curve in least squares, each size weighing the same; (..., S) -> (..., S).

    By the max-min formula, max over a <= i of min over b >= i of mean(scores[a..b]), because it takes all resamples at
    once; the result is that of `scipy.optimize.isotonic_regression`.

    Source: Barlow et al. 1972, "Statistical Inference under Order Restrictions", section 1.4.
    """
    scores = np.asarray(scores, dtype=np.float64)
    n = scores.shape[-1]
    fitted = np.full_like(scores, -np.inf)
    for a in range(n):
        means = np.cumsum(scores[..., a:], axis=-1) / np.arange(1, n - a + 1)
        least = np.minimum.accumulate(means[..., ::-1], axis=-1)[..., ::-1]  # over b >= i
        fitted[..., a:] = np.maximum(fitted[..., a:], least)
    return fitted


def size_bounds(sizes: ArrayLike, scores: ArrayLike, target: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Bounds of N(p), the smallest size whose score is p, from the isotonic curve, linear in log size between sizes.

    Args:
        sizes: (S,) parameters (or bytes, or agent steps), increasing.
        scores: (..., S), in points.
        target: p, in points, one or (...,).

    Returns:
        (...,) lower and upper bound, in the units of `sizes`. Equal where the curve crosses p; (largest, inf) where it
        never reaches p; (0, smallest) where the smallest size does already.

    Raises:
        InputError: sizes that are not positive and increasing, or not one for each score.
    """
    sizes, curve = _sizes(sizes, np.shape(scores)[-1]), isotonic(scores)
    mark = np.asarray(target, dtype=np.float64)
    reached = curve >= mark[..., None]
    right = np.argmax(reached, axis=-1)  # the first that reaches it
    left = np.maximum(right - 1, 0)
    y0, y1 = (np.take_along_axis(curve, at[..., None], axis=-1)[..., 0] for at in (left, right))
    inside = reached[..., -1] & (right > 0)
    share = np.divide(mark - y0, y1 - y0, out=np.zeros_like(y0), where=inside)
    exact = np.where(share == 1, sizes[right], sizes[left] * (sizes[right] / sizes[left]) ** share)
    low = np.where(reached[..., -1], np.where(inside, exact, 0.0), sizes[-1])
    high = np.where(reached[..., -1], np.where(inside, exact, sizes[0]), np.inf)
    return low, high


def size_ratio(
    sizes: ArrayLike, rl: Sequence[Arm], distilled: Sequence[Arm], target: float, rng: np.random.Generator,
    resamples: int = 10_000,
) -> Bounded:  # fmt: skip
    """rho(p) = N_rl(p) / N_distilled(p): how much bigger a network learning from reward must be to reach `target`.

    Where a curve does not cross p the ratio is bounded by what the other one says: rl never reaches p while the
    distilled one does at n, so rho > largest / n. Both out of reach, or both within reach of the smallest: unknown.
    "Overhead" is the claim that the interval lies above 1. An rl group that had not converged makes N_rl an upper
    bound, and then rho too: the caller must say so.

    Args:
        sizes: (S,) parameters of the deployed actor, increasing.
        rl, distilled: S arms each, one per size; the two curves are drawn independently.
        target: p, in points.

    Raises:
        InputError: as `size_bounds` and `statistics.resample_curve`.
    """
    curves = [statistics.resample_curve(groups, rng, resamples) for groups in (rl, distilled)]
    spreads = [_log_spread(sizes, curve, target) for curve in curves]
    df = statistics.welch(spreads, [_crossing_df(curve, target) for curve in curves])
    both = statistics.widen(np.stack([curve.deviations for curve in curves]).swapaxes(0, 1), df, rng)
    drawn = [curve.values + both[:, i] for i, curve in enumerate(curves)]
    return _bounded(
        _ratio(*(size_bounds(sizes, curve.values, target) for curve in curves)),
        _ratio(*(size_bounds(sizes, scores, target) for scores in drawn)),
    )


def steps_to_pass(
    steps: ArrayLike, rl: Sequence[Arm], student: Arm, rng: np.random.Generator, resamples: int = 10_000
) -> Bounded:
    """D*(N): the agent steps after which RL scores what a student of its size does.

    Args:
        steps: (D,) budgets of RL, increasing.
        rl: D arms, one per budget. Branches of the same runs are drawn together where each run is a "teacher" of its
            own.
        student: of two runs or more.

    Raises:
        InputError: as `size_bounds` and `statistics.resample_curve`.
    """
    curve, mark = statistics.resample_curve(rl, rng, resamples), statistics.bootstrap(student, rng, resamples)
    drawn = curve.values + statistics.widen(curve.deviations, _crossing_df(curve, mark.value), rng)
    return _bounded(size_bounds(steps, curve.values, mark.value), size_bounds(steps, drawn, mark.resamples))


def budget_law(scores: Mapping[int, Mapping[float, ArrayLike]]) -> BudgetLaw | None:
    """Fits S(N, D) = S_inf(N) (1 - (D / D0(N))^-b), one b for all sizes, by least squares, and tests its lack of fit.

    The test holds what the law leaves of the means against the spread of runs at one size and budget. Branches of one
    run are counted as independent, so that p is approximate. None where there are too few budgets or runs to tell.

    Source of the test: Draper and Smith 1998, "Applied Regression Analysis", section 2.1.
    """
    sizes = list(scores)
    groups = [(i, d, np.asarray(runs, dtype=np.float64)) for i, n in enumerate(sizes) for d, runs in scores[n].items()]
    at, steps = np.array([group[0] for group in groups]), np.array([group[1] for group in groups])
    means, counts = (np.array([f(runs) for *_, runs in groups], dtype=np.float64) for f in (np.mean, len))
    of_law, of_runs = len(groups) - 2 * len(sizes) - 1, int(counts.sum()) - len(groups)
    pure = sum(float(((runs - runs.mean()) ** 2).sum()) for *_, runs in groups)
    if of_law < 1 or of_runs < 1 or not any(np.ptp(runs) for *_, runs in groups):
        return None

    def rest(guess: FloatArray) -> FloatArray:
        limits, starts = guess[: len(sizes)], guess[len(sizes) : -1]
        law = limits[at] * (1 - np.exp(-np.exp(guess[-1]) * (np.log(steps) - starts[at])))
        return np.asarray(np.sqrt(counts) * (law - means))

    first = [means[at == i].max() * 1.2 for i in range(len(sizes))]
    first += [math.log(steps[at == i].min() / 2) for i in range(len(sizes))]
    fitted = optimize.least_squares(rest, [*first, math.log(0.5)], x_scale="jac", max_nfev=5_000)
    lack = 2 * float(fitted.cost) / of_law / (pure / of_runs)
    by_size = {n: (float(fitted.x[i]), math.exp(fitted.x[len(sizes) + i])) for i, n in enumerate(sizes)}
    return BudgetLaw(by_size, math.exp(fitted.x[-1]), lack, float(stats.f.sf(lack, of_law, of_runs)))


def slope(steps: ArrayLike, scores: ArrayLike) -> Interval:
    """Least-squares slope of a learning curve whose points depend on their neighbours.

    With r the lag-1 autocorrelation of the residuals, n points are worth n (1 - r) / (1 + r); that number replaces n in
    the residual variance and in Student's degrees of freedom. First r is corrected for its bias: of residuals from a
    line it falls short of the truth rho by (2 + 5 rho) / n, so r becomes (n r + 2) / (n - 5); below 0 it counts as 0.

    Args:
        steps: (n,) increasing, evenly spaced.
        scores: (n,) in points.

    Returns:
        Points per step. The 95 % interval is infinite where there are 5 points or fewer, or worth 2 or fewer.

    Raises:
        InputError: fewer than 3 points, unequal lengths, steps that do not increase, or numbers that are not finite.

    Source: Santer et al. 2000, "Statistical significance of trends and trend differences", section 5 (AdjSE + AdjDF);
    the bias correction is ours.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 3:
        raise InputError(f"a slope needs 3 points or more, and a step for each score: got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (np.diff(x) > 0).all()):
        raise InputError("a learning curve's steps must increase, and its numbers be finite")
    x, y, n = x - x.mean(), y - y.mean(), len(x)
    value = float(x @ y / (x @ x))
    residuals = y - value * x
    squares = float(residuals @ residuals)
    r = float(residuals[1:] @ residuals[:-1]) / squares if squares > 0 else 0.0
    r = min(max((n * r + 2) / (n - 5), 0.0), 1.0) if n > 5 else 1.0
    df = n * (1 - r) / (1 + r) - 2
    if df <= 0:
        return Interval(value, -math.inf, math.inf)
    half = float(special.stdtrit(df, 0.975)) * math.sqrt(squares / df / float(x @ x))
    return Interval(value, value - half, value + half)


def convergence(steps: ArrayLike, scores: ArrayLike, gain: float | None = None) -> Convergence:
    """Certificate that an RL run had learned what it would; without it the run's score is a lower bound.

    Converged: the slope of the last quarter of the learning curve has an interval that includes 0, *and* twice the
    budget gained less than half a point. Either failing: not converged. No extension, or a slope that cannot be told
    from so few points: unknown, unless the other fails.

    Args:
        steps: (n,) of the learning curve, evenly spaced.
        scores: (n,) in points.
        gain: score after twice the budget less score after the budget; None where it was not extended.

    Raises:
        InputError: as `slope`, of the last quarter.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    late = x > 0.75 * x[-1] if len(x) else np.zeros(0, dtype=bool)
    last = slope(x[late], y[late])
    if not last.low <= 0 <= last.high or (gain is not None and gain >= 0.5):
        return Convergence("not converged", last, gain)
    return Convergence("unknown" if gain is None or math.isinf(last.high) else "converged", last, gain)


def pareto_front(costs: ArrayLike, scores: ArrayLike) -> NDArray[np.bool_]:
    """Which of N points no other one beats: as cheap and as good, and better in either; (N,) bool.

    Args:
        costs: (N,) less is better: parameters, multiply-adds, milliseconds.
        scores: (N,) more is better.
    """
    cost, score = np.asarray(costs, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    no_worse = (cost[:, None] <= cost) & (score[:, None] >= score)
    better = (cost[:, None] < cost) | (score[:, None] > score)
    return np.asarray(~(no_worse & better).any(axis=0))


def _sizes(sizes: ArrayLike, count: int) -> FloatArray:
    sizes = np.asarray(sizes, dtype=np.float64)
    if sizes.shape != (count,) or count < 2:
        raise InputError(f"a curve needs 2 sizes or more, and a group for each: got {sizes.size} and {count}")
    if not (sizes[0] > 0 and np.isfinite(sizes).all() and (np.diff(sizes) > 0).all()):
        raise InputError("sizes must be positive and increase")
    return sizes


def _crossing_df(curve: Curve, target: float) -> float:
    """Degrees of freedom of N(p): those of the two sizes that the curve crosses p between, or of the one at its end."""
    if curve.shared:
        return float(curve.df[0])
    right = int(np.searchsorted(isotonic(curve.values), target))
    near = slice(max(right - 1, 0), right + 1)
    return statistics.welch(curve.deviations[:, near].var(axis=0), curve.df[near])


def _log_spread(sizes: ArrayLike, curve: Curve, target: float) -> float:
    """Variance of ln N(p) over a curve's resamples, those beyond the measured sizes put at the nearest of them."""
    sizes = np.asarray(sizes, dtype=np.float64)
    low, _ = size_bounds(sizes, curve.values + curve.deviations, target)
    return float(np.log(low.clip(sizes[0], sizes[-1])).var())


def _ratio(above: tuple[FloatArray, FloatArray], below: tuple[FloatArray, FloatArray]) -> tuple[FloatArray, FloatArray]:
    """Bounds of a quotient from those of its parts. x / 0 is inf and x / inf is 0: unbounded, never NaN."""
    with np.errstate(divide="ignore"):
        return np.asarray(above[0] / below[1]), np.asarray(above[1] / below[0])


def _bounded(value: tuple[FloatArray, FloatArray], drawn: tuple[FloatArray, FloatArray]) -> Bounded:
    lows, highs = drawn
    bare, topless = lows == 0, np.isinf(highs)
    shares = (float(found.mean()) for found in (~bare & ~topless, ~bare & topless, bare & ~topless, bare & topless))
    return Bounded(float(value[0]), float(value[1]), statistics.percentiles(lows, highs, 0.95), *shares)
