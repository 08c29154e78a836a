"""What a student keeps of its teacher's score, and how surely: games in, a share and its lower bound out.

A confirmation passes at any of several looks at its games, and several students may be tried. All of them share one
error rate by adding up (union bounds), so that it holds however they depend on each other.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

from potstill.analysis.statistics import welch
from potstill.evaluation import Evaluation

LOOKS = 5  # at a confirmation, each after twice as many games as the one before
EARLY = 0.1  # of a confirmation's error rate, for all its looks but the last
FIRST = 2 / 3  # of the error rate that is left, for the next confirmation


class Confirmation(NamedTuple):
    """What a student's fresh games came to, when they had been played."""

    name: str  # of the trial
    share: float
    low: float  # not below -99, for JSON has no infinity
    risk: float  # the error rate of the look that decided it
    passed: bool


def next_risk(before: Sequence[Confirmation], confidence: float) -> float:
    """Error rate of the next confirmation. That of one that passed is handed on: all keep to 1 - confidence.

    Source: the fallback procedure of Wiens 2003, as Tian and Ramdas 2021, "Online control of the familywise error
    rate", section 3, have it, with weights 2/3, 2/9, 2/27 ...
    """
    left, risk = 1.0 - confidence, FIRST * (1.0 - confidence)
    for each in before:
        left *= 1.0 - FIRST
        risk = FIRST * left + (risk if each.passed else 0.0)
    return risk


def risk_of_look(risk: float, last: bool) -> float:
    """What a look has of its confirmation's error rate. The last has nine tenths, for there time is up."""
    return risk * (1.0 - EARLY if last else EARLY / (LOOKS - 1))


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


def foreseen(sample: Sample, played: int, count: int) -> Sample:
    """The sample after `count` games that go on like those played. Where these repeat themselves, more tell no more."""
    if sample.df + 1 < played:
        return sample
    return Sample(sample.value, sample.error * math.sqrt(played / count), count - 1.0)


def share(student: Sample, teacher: Sample, random: Sample) -> float:
    """(student - random) / (teacher - random): 0 is random play, 1 the teacher, whatever the sign of the scores."""
    return (student.value - random.value) / (teacher.value - random.value)


def share_low(student: Sample, teacher: Sample, random: Sample, confidence: float) -> float:
    """Lower bound of the share, one-sided: that of the true share it lies above is `confidence` at least.

    Fieller 1954: the smallest r for which "student - r teacher - (1 - r) random = 0" is not refused in favour of
    "above 0" by Student's t, with all three errors and the degrees of freedom of Welch 1947. -inf where the games do
    not tell.
    """
    parts = student, teacher, random

    def beyond(r: float) -> float:
        """How far student - r teacher - (1 - r) random lies above what chance would leave of zero."""
        weights = 1.0, -r, r - 1.0
        variances = [float(w * part.error) ** 2 if w else 0.0 for w, part in zip(weights, parts, strict=True)]
        if not math.isfinite(sum(variances)):
            return -math.inf
        gain = float(sum(w * part.value for w, part in zip(weights, parts, strict=True)))
        df = welch(variances, [part.df for part in parts])
        return gain - float(special.stdtrit(df, confidence)) * math.sqrt(sum(variances))

    value = share(*parts)
    if beyond(value) >= 0:  # no variance at all
        return value
    for below in (1.0, 10.0, 100.0):
        if beyond(value - below) > 0:
            return float(optimize.brentq(beyond, value - below, value, xtol=1e-12))
    return -math.inf
