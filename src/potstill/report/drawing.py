"""What the figures of a study share: paper and title, keys, an axis of sizes, lines of reference."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from potstill.arms import look_of
from potstill.report.answers import Answers
from potstill.report.figures import GREY, short
from potstill.report.groups import Group, number

NARROW = 5.0  # inches: below, panels stand under each other
BESIDE = 1.8  # a logarithmic axis of sizes goes on so many times beyond the smallest and the largest
SIDE = 1.13  # on a logarithmic axis of sizes, an arm is drawn so many times beside its neighbour


def canvas(
    title: str, note: str, width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure with its title, below it in grey how to read it, and its panels, row by row."""
    titles = textwrap.wrap(title, int(8.3 * width))
    notes = textwrap.wrap(note, int(13 * width))
    figure = Figure(figsize=(width, height + 0.16 * (len(titles) + len(notes) - 2)))
    blank = math.ceil(len(notes) * 0.85)
    figure.suptitle("\n".join([*titles, *[""] * blank]), x=0.1 / width, ha="left", fontsize=13, fontweight="bold")
    top = 1 - (0.12 + 0.225 * len(titles)) / figure.get_figheight()
    figure.text(0.1 / width, top, "\n".join(notes), va="top", fontsize=9, color=GREY)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def grid(
    title: str, note: str, width: float, count: int, most: tuple[int, int], heights: tuple[float, float], ylabel: str
) -> tuple[Figure, list[Axes], list[Axes]]:
    """A canvas of `count` panels, of which the left ones have a `ylabel`; all of them, and the lowest of each column.

    Args:
        most: panels in a row, where there is room and on a phone.
        heights: inches of what is around the panels, and of a row of them.
    """
    columns = min(most[0] if width > NARROW else most[1], count)
    rows = -(-count // columns)
    figure, axes = canvas(title, note, width, heights[0] + heights[1] * rows, rows, columns)
    for ax in axes[count:]:
        ax.set_visible(False)
    for ax in axes[:count:columns]:
        ax.set_ylabel(ylabel)
    return figure, axes[:count], axes[max(count - columns, 0) : count]


def legend(figure: Figure, handles: Sequence[Line2D], width: float) -> Figure:
    """The figure with the keys below its panels, in as many columns as the width has room for."""
    longest = 0.07 * max(len(str(handle.get_label())) for handle in handles) + 0.45  # inches, with its key
    columns = min(3 if width > NARROW else 2, len(handles), max(1, int(width / longest)))
    rows = -(-len(handles) // columns)
    before = figure.get_figheight()
    figure.set_figheight(before + 0.2 * max(0, rows - 3))  # a long key takes no room from the panels
    for text in figure.texts:  # title and note stay as far from the top as they were, in inches
        text.set_y(1 - (1 - text.get_position()[1]) * before / figure.get_figheight())
    figure.legend(
        handles=handles, loc="outside lower left", ncols=columns, frameon=False,
        fontsize=9 if width > NARROW else 8.5, handlelength=1.6, columnspacing=1.0,
    )  # fmt: skip
    return figure


def panel_title(ax: Axes, words: str, width: float, **options: Any) -> None:
    """What a panel `width` inches wide shows, in as many lines as it takes."""
    ax.set_title("\n".join(textwrap.wrap(words, max(8, int(13 * (width - 0.5))))), fontsize=9, **options)


def key_of(arms: Iterable[str], lines: bool = False) -> list[Line2D]:
    """A key per arm: its colour with its marker, or with a thicker line where the curves have none."""
    looks = {arm: look_of(arm) for arm in arms}
    return [
        Line2D(
            [], [], color=look.colour, marker="" if lines else look.marker, markersize=5.5, linewidth=1.5 + 0.5 * lines,
            label=look.short.replace("-\n", "-").replace("\n", " "),
        )
        for look in looks.values()
    ]  # fmt: skip


def reference_lines(ax: Axes, answers: Answers) -> list[Line2D]:
    """Horizontal lines for the teachers and a random policy, and their keys."""
    teachers = {
        str(run.get("teacher")): score
        for group in answers.groups
        for run in group.runs
        if run.get("teacher") and (score := number(run, "teacher_score")) is not None
    }
    random = [score for run in answers.records if (score := number(run, "random_score")) is not None]
    handles = []
    for score in teachers.values():
        line = ax.axhline(score, color="black", linewidth=0.7, linestyle=(0, (5, 3)), zorder=1)
        handles = [line]
    if teachers:
        low, high = min(teachers.values()), max(teachers.values())
        text = f"teacher {low:.1f}" if len(teachers) == 1 else f"{len(teachers)} teachers {low:.1f} to {high:.1f}"
        handles[0].set_label(text)
    if random:
        handles.append(ax.axhline(random[0], color=GREY, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1))
        handles[-1].set_label(f"random {random[0]:.1f}")
    return handles


def size_axis(ax: Axes, groups: Sequence[Group], width: float) -> None:
    """A logarithmic axis of sizes: a tick per size, with its width where there is room for it."""
    sizes = sorted({(group.parameters, group.width) for group in groups})
    room = 0.27 * math.log(sizes[-1][0] / sizes[0][0] * BESIDE**2) / (width - 1.0)
    ticks: list[tuple[int, str]] = []
    for size in (sizes[-1], sizes[0], *sizes[1:-1]):  # the ends are labelled whatever lies near them
        if all(abs(math.log(size[0] / other)) > room for other, _ in ticks):
            ticks.append(size)
    ax.set_xscale("log")
    labels = [f"{short(parameters)}\n{name}" for parameters, name in ticks]
    ax.set_xticks([parameters for parameters, _ in ticks], labels, fontsize=10 if width > NARROW else 9)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(sizes[0][0] / BESIDE, sizes[-1][0] * BESIDE)
    ax.set_xlabel(f"parameters{' of the deployed actor' * (width > NARROW)} (log), and width")


def same_heights(axes: Sequence[Axes]) -> None:
    limits = [ax.get_ylim() for ax in axes if ax.lines]
    for ax in axes if limits else ():  # of a plan's own arm alone nothing is drawn
        ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def interval(ax: Axes, x: float, low: float, high: float, colour: Any) -> None:
    if math.isfinite(low) and math.isfinite(high):
        ax.plot([x, x], [low, high], color=colour, linewidth=1.4, solid_capstyle="butt", zorder=2)


def dodge(order: int, count: int) -> float:
    return float(SIDE ** (order - (count - 1) / 2))
