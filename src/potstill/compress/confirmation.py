"""What a student keeps of its teacher's score, and how surely: games in, a share and its lower bound out."""

import math
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from potstill.analysis.statistics import welch
from potstill.evaluation import Evaluation


class Sample(NamedTuple):
    """A mean over games, and how well it is known."""

    value: float
    error: float  # standard; infinite where one game only was seen
    df: float  # degrees of freedom


NOTHING = Sample(0.0, 0.0, math.inf)  # what random play gets of a point-win rate's scale, which has a zero of its own


def measure(played: Evaluation, points: bool) -> Sample:
    """The point-win rate of games, or their mean return, with the standard error of the games' own interval.

    The rate is a ratio of sums, sum(won) / sum(won + lost); its error is that of the residuals won - rate (won + lost)
    over the mean points of a game (Cochran 1977, "Sampling Techniques", 6.4). Repeated games count once.
    """
    summary = played.summary()
    scores = np.array([[episode.won, episode.lost] for episode in played.episodes])
    if points:
        value = summary["point_win_rate"] or 0.0
        total = scores.sum(axis=1)
        deviations = (scores[:, 0] - value * total) / (total.mean() or 1.0)
    else:
        value = summary["mean"]
        deviations = scores[:, 0] - scores[:, 1]
    if summary["distinct"] < 2:
        return Sample(value, math.inf, 1.0)
    return Sample(value, float(deviations.std(ddof=1)) / math.sqrt(summary["distinct"]), summary["distinct"] - 1.0)


def share(student: Sample, teacher: Sample, random: Sample) -> float:
    """(student - random) / (teacher - random): 0 is random play, 1 the teacher, whatever the sign of the scores."""
    return (student.value - random.value) / (teacher.value - random.value)


def share_low(student: Sample, teacher: Sample, random: Sample, confidence: float) -> float:
    """Lower bound of the share, one-sided: that of the true share it lies above is `confidence` at least.

    Fieller 1954: the smallest r for which "student - r teacher - (1 - r) random = 0" is not refused in favour of
    "above 0" by Student's t, with all three errors and the degrees of freedom of Welch 1947. -inf where the games do
    not tell.
    """

    def beyond(r: float) -> float:
        return _beyond(r, (student, teacher, random), confidence)

    value = share(student, teacher, random)
    if beyond(value) >= 0:  # no variance at all
        return value
    for below in (1.0, 10.0, 100.0):
        if beyond(value - below) > 0:
            return float(optimize.brentq(beyond, value - below, value, xtol=1e-12))
    return -math.inf


def keeps(least: float, student: Sample, teacher: Sample, random: Sample, confidence: float) -> bool:
    """Whether the lower bound of the share comes to `least`: the same test, without the search for the bound."""
    return _beyond(least, (student, teacher, random), confidence) >= -1e-9 * abs(teacher.value - random.value)


def _beyond(r: float, parts: tuple[Sample, Sample, Sample], confidence: float) -> float:
    """How far student - r teacher - (1 - r) random lies above what chance would leave of zero."""
    weights = np.array([1.0, -r, r - 1.0])
    variances = [float(w * part.error) ** 2 if w else 0.0 for w, part in zip(weights, parts, strict=True)]
    if not math.isfinite(sum(variances)):
        return -math.inf
    gain = float(sum(w * part.value for w, part in zip(weights, parts, strict=True)))
    df = welch(variances, [part.df for part in parts])
    return gain - float(stats.t.ppf(confidence, df)) * math.sqrt(sum(variances))
