"""What to train next, of what is untried."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from potstill.compress.shapes import Shape

AMPLE = 15  # times smaller than a teacher, students mostly keep its score (Rusu et al. 2015, "Policy Distillation")
HALF = 0.6  # of a size is about a half of it, where sizes are half an octave apart


class Trial(NamedTuple):
    """A shape, distilled in one way."""

    place: int  # of the shape, from the cheapest
    way: int


def first_round(shapes: Sequence[Shape], parameters: int, cores: int) -> list[Trial]:
    """A linear network, where there is one, and the dearest that is much smaller than a teacher of so many parameters,
    for it is likely to do. Where there are more cores, one of half that cost, one of half of this, and so on."""
    linear = [place for place, shape in enumerate(shapes) if shape.name == "linear"]
    small = [place for place, shape in enumerate(shapes) if shape.size.parameters <= parameters / AMPLE]
    halves = [small[-1] if small else len(shapes) - 1]
    for place in reversed(range(halves[0])):
        if shapes[place].cost <= HALF * shapes[halves[-1]].cost:
            halves.append(place)
    return [Trial(place, 0) for place in sorted(list(dict.fromkeys([*linear, *halves]))[:cores])]


def next_round(untried: Sequence[Trial], fits: Collection[Trial], bound: int, low: int, cores: int) -> list[Trial]:
    """Of the untried shapes between the dearest that will not do and the cheapest that will, those that bisect.

    Where there are none: cheaper shapes, for score need not grow with size, and further ways, the nearest and the least
    tried first.

    Args:
        untried: the next way of each shape below `bound`.
        fits: for which there is time.
        bound: place of the cheapest that will do; above all shapes, where only the teacher will.
        low: place of the dearest that was tried below it, or -1.
    """
    if between := [trial for trial in untried if trial.place > low]:
        between = [trial for trial in between if trial in fits]
        return [between[at] for at in spread(len(between), cores)]
    return sorted(fits, key=lambda trial: (bound - trial.place + trial.way, trial.way))[:cores]


def spread(places: int, count: int) -> list[int]:
    """Up to `count` of so many places, from 0: each part left is about as large."""
    count = min(count, places)
    return [round((places + 1) * (i + 1) / (count + 1)) - 1 for i in range(count)]
