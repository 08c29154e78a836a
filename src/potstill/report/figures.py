"""Tables -> figures. Each function takes one of `results`' tables and returns a matplotlib Figure; `save` writes it."""

from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from matplotlib.transforms import Bbox

from potstill.arms import look_of, order_of
from potstill.errors import InputError
from potstill.storage.checkpoints import write_atomically

Colour = str | tuple[float, float, float, float]

WIDTH = 7.2  # inches: 10 pt text is 13 px high where the figure is shown 700 px wide
GREY = "#555555"
STYLE: Any = {  # matplotlib types the name of every setting
    "font.size": 10.0,
    "axes.labelsize": 10.0,
    "axes.labelcolor": "#222222",
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#999999",
    "ytick.color": "#999999",
    "xtick.labelcolor": "#222222",
    "ytick.labelcolor": "#222222",
    "xtick.minor.bottom": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
    "svg.hashsalt": "potstill",  # the same table, the same file
}


def learning_curves(curves: pl.DataFrame) -> Figure:
    """Score, and agreement with the teacher, against agent steps: a panel per arm, a line per run, colour by size.

    Args:
        curves: columns `results.CURVES`.

    Raises:
        InputError: nothing to draw, or several tasks.
    """
    task = _task(curves)
    arms = _arms(curves)
    rows = [name for name in ("score", "agreement") if curves[name].is_not_null().any()]
    if not rows:
        raise InputError("the curves have neither scores nor agreement yet: nothing to draw")
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.4 + (2.9 if len(rows) == 1 else 2.1 * len(rows))))
        grid = figure.subplots(len(rows), len(arms), sharex="col", sharey="row", squeeze=False)
        _title(figure, f"Score while learning, {task}", "one line per run (seed), coloured by width")
        colours = _size_colours(curves)
        for axes, name in zip(grid, rows, strict=True):
            for ax, arm in zip(axes, arms, strict=True):
                _draw_curves(ax, curves.filter(pl.col("arm") == arm, pl.col(name).is_not_null()), name, colours)
            axes[0].set_ylabel({"score": "mean score,\nlast 100 games", "agreement": "agreement\nwith teacher"}[name])
            if name == "agreement":
                axes[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        for ax, arm in zip(grid[0], arms, strict=True):
            ax.set_title(look_of(arm).short if len(arms) > 2 else look_of(arm).short.replace("\n", " "), fontsize=10)
        for ax in grid[-1]:
            ax.xaxis.set_major_locator(MaxNLocator(4 if len(arms) > 1 else 8))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            ax.set_xlabel("agent steps")
            ax.set_xlim(left=0.0)
        key = [Line2D([], [], color=colour, linewidth=2.5, label=width) for width, colour in reversed(colours.items())]
        figure.legend(handles=key, loc="outside right upper", title="width", frameon=False, handlelength=1.0)
    return figure


def size_score(table: pl.DataFrame) -> Figure:
    """Score against the size of the deployed actor: a dot per run, a line per arm through the means over its seeds.

    Args:
        table: columns `results.TABLE`; teachers and a random policy are drawn as lines where they are known.

    Raises:
        InputError: no run has a score, or several tasks.
    """
    done = _scored(table, "parameters")
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.4))
        ax = figure.subplots()
        note = f"dot: a run, with its 95 % interval over games; line: mean of the runs{_left_out(table, done)}"
        _title(figure, f"Score against size, {_task(done)}", note)
        ax.set_xscale("log")
        labels = _reference_lines(ax, done)
        for arm in _arms(done):
            runs = done.filter(pl.col("arm") == arm)
            ax.scatter(
                runs["parameters"], runs["score"], s=34, c=look_of(arm).colour, marker=look_of(arm).marker, alpha=0.75,
                linewidths=0, zorder=3, label=arm,
            )  # fmt: skip
            ends = runs.drop_nulls(["ci95_low", "ci95_high"])
            ax.vlines(
                ends["parameters"], ends["ci95_low"], ends["ci95_high"],
                color=look_of(arm).colour, alpha=0.35, linewidth=1.2, zorder=1,
            )  # fmt: skip
            means = runs.group_by("parameters").agg(pl.col("score").mean()).sort("parameters")
            ax.plot(means["parameters"], means["score"], color=look_of(arm).colour, linewidth=1.6, zorder=2)
            labels.append((means["score"][-1], look_of(arm).short, look_of(arm).colour))
        _size_ticks(ax, done)
        ax.set_xlabel("parameters of the deployed actor (log scale), and width")
        ax.set_ylabel("mean score of a game")
        ax.margins(x=0.06, y=0.08)
        _label_right(ax, labels)
    return figure


def score_distributions(episodes: pl.DataFrame, width: float = WIDTH) -> Figure:
    """Scores of single games by size and arm: every game a dot over a violin, the median a bar, P(score < 0) on top.

    Args:
        episodes: columns `results.EPISODES`; the games of a cell's seeds are pooled.
        width: of the figure, in inches.

    Raises:
        InputError: there are no games, or several tasks.
    """
    if episodes.is_empty():
        raise InputError("no run has been evaluated yet: no games to draw")
    arms = _arms(episodes)
    sizes = episodes.group_by("width").agg(pl.col("parameters").max()).sort("parameters")
    rng = np.random.default_rng(0)
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 4.4))
        ax = figure.subplots()
        _title(figure, f"Scores of single games, {_task(episodes)}", "one dot per game, seeds pooled; bar: median")
        slot = min(0.84 / len(arms), 0.5)
        labels: dict[str, tuple[float, str, Colour]] = {}
        for order, arm in enumerate(arms):
            look = look_of(arm)
            for place, size in enumerate(sizes["width"]):
                scores = episodes.filter(pl.col("arm") == arm, pl.col("width") == size)["score"].to_numpy()
                if not scores.size:
                    continue
                x = place + (order - (len(arms) - 1) / 2) * slot
                bodies: Any = ax.violinplot(scores, [x], widths=0.9 * slot, showextrema=False)["bodies"]
                for body in bodies:
                    body.set(facecolor=look.colour, alpha=0.22, linewidth=0)
                spread = x + rng.uniform(-0.25, 0.25, scores.size) * slot
                ax.scatter(
                    spread, scores, s=7, c=look.colour, marker=look.marker, alpha=0.5, linewidths=0, zorder=3,
                    rasterized=True,  # thousands of dots
                )  # fmt: skip
                median = float(np.median(scores))
                ax.plot([x - 0.4 * slot, x + 0.4 * slot], [median, median], color="black", linewidth=1.6, zorder=4)
                ax.annotate(
                    f"{100 * np.mean(scores < 0):.0f}", (x, 1.0), (0, 3), ha="center", va="bottom", fontsize=8.5,
                    xycoords=ax.get_xaxis_transform(), textcoords="offset points", color=look.colour,
                )  # fmt: skip
                labels[arm] = (median, look.short, look.colour)  # beside its largest size
        ax.annotate(
            "P(score < 0), %", (1.0, 1.0), (6, 3), "axes fraction", "offset points", va="bottom", fontsize=8.5,
            color=GREY,
        )  # fmt: skip
        ax.set_xticks(range(len(sizes)), [f"{short(p)}\n{w}" for w, p in sizes.iter_rows()])
        ax.set_xlabel("parameters of the deployed actor, and width")
        ax.set_ylabel("score of a game")
        ax.grid(visible=False, axis="x")
        ax.set_xlim(-0.55, len(sizes) - 0.45)
        _label_right(ax, list(labels.values()))
    return figure


def agreement_score(table: pl.DataFrame) -> Figure:
    """Score against agreement with the teacher on the student's own states: a dot per run, its width beside it.

    Args:
        table: columns `results.TABLE`.

    Raises:
        InputError: no run has been compared with a teacher, or several tasks.
    """
    table = table.filter(~pl.col("arm").str.starts_with("rl"))  # without a teacher, nothing is missing
    done = _scored(table, "agreement")
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.4))
        ax = figure.subplots()
        title = f"Score against agreement with the teacher, {_task(done)}"
        _title(figure, title, f"one dot per run (seed), widths beside{_left_out(table, done)}")
        labels = _reference_lines(ax, done)
        names: list[tuple[tuple[float, float], str, Colour]] = []
        for arm in _arms(done):
            look = look_of(arm)
            runs = done.filter(pl.col("arm") == arm)
            ax.scatter(
                runs["agreement"], runs["score"], s=34, c=look.colour, marker=look.marker, alpha=0.75, linewidths=0,
                zorder=3, label=arm,
            )  # fmt: skip
            cells = runs.group_by("width", maintain_order=True).agg(pl.col("agreement", "score").mean())
            names += [((agreement, score), width, look.colour) for width, agreement, score in cells.iter_rows()]
            labels.append((runs.sort("agreement")["score"][-1], look.short, look.colour))
        # What matters is how many of the disagreements are gone: 99 % is as far from 90 % as 90 % from 0.
        nines = (lambda a: -np.log10(np.clip(1.001 - a, 1e-4, None)), lambda x: 1.001 - 10**-x)
        ax.set_xscale("function", functions=nines)
        ax.margins(x=0.06, y=0.1)
        low, high = ax.get_xlim()
        ax.set_xticks(
            [
                tick
                for tick in (0.0, 0.5, 0.7, 0.8, 0.85, 0.88, 0.9, 0.92, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)
                if low <= tick <= high
            ]
        )
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
        ax.set_xlabel("states where both would act the same (greedy, on the student's own states)")
        ax.set_ylabel("mean score of a game")
        _label_right(ax, labels)
        _label_points(ax, names)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes PNG (200 dpi) or SVG, as the suffix of `path` says, atomically; an older file there is replaced.

    Raises:
        InputError: another suffix, or the file cannot be written.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise InputError(f"{path}: figures are written as .png or .svg")
    data = BytesIO()
    with rc_context(STYLE):
        figure.savefig(data, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
    write_atomically(Path(path), data.getvalue())


def short(count: float) -> str:
    """A count in the fewest characters that tell sizes apart: 2.0k, 28k, 424k, 1.7M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * unit:
            value = count / unit
            return f"{value:.1f}{name}" if value < 9.95 else f"{value:.0f}{name}"
    return f"{count:g}"


def _task(frame: pl.DataFrame) -> str:
    """The one task of a table, for a title."""
    tasks = sorted(frame["env"].drop_nulls().unique())
    if len(tasks) > 1:
        raise InputError(f"the runs are of several tasks ({', '.join(tasks)}): their scores do not share an axis")
    name = tasks[0] if tasks else "unknown task"
    return name.replace("_", " ").title() if name.islower() else name


def _arms(frame: pl.DataFrame) -> list[str]:
    """The arms in a table, in the order of `ARMS`, unknown ones last."""
    return sorted(frame["arm"].drop_nulls().unique(), key=order_of)


def _scored(table: pl.DataFrame, column: str) -> pl.DataFrame:
    done = table.filter(pl.col("status") == "done", pl.col("score").is_not_null(), pl.col(column).is_not_null())
    if done.is_empty():
        raise InputError(f"no run is done and has a score and {column}: nothing to draw")
    return done


def _left_out(table: pl.DataFrame, done: pl.DataFrame) -> str:
    missing = len(table) - len(done)
    return f"; {missing} run{'s' if missing > 1 else ''} left out, not measured" if missing else ""


def _title(figure: Figure, title: str, note: str) -> None:
    """The title, and below it, in grey, how to read the figure; the blank second line keeps its place."""
    figure.suptitle(title + "\n", x=0.015, ha="left", fontsize=13, fontweight="bold")
    figure.text(0.015, 1 - 0.35 / figure.get_figheight(), note, va="top", fontsize=9, color=GREY)


def _reference_lines(ax: Axes, done: pl.DataFrame) -> list[tuple[float, str, str]]:
    """Horizontal lines for the teachers and a random policy, and their labels (height, words, colour)."""
    labels = []
    teachers = done.group_by("teacher").agg(pl.col("teacher_score").mean())["teacher_score"].drop_nulls().sort()
    for score in teachers:
        ax.axhline(score, color="black", linewidth=1.0, linestyle=(0, (5, 3)), zorder=1)
    if len(teachers) == 1:
        labels.append((teachers[0], f"teacher {teachers[0]:.1f}", "black"))
    elif len(teachers) > 1:
        labels.append((teachers[-1], f"{len(teachers)} teachers\n{teachers[0]:.1f} to {teachers[-1]:.1f}", "black"))
    random = done["random_score"].drop_nulls()
    if len(random):
        ax.axhline(random[0], color=GREY, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
        labels.append((random[0], f"random {random[0]:.1f}", GREY))
    return labels


def _size_ticks(ax: Axes, done: pl.DataFrame) -> None:
    """A tick per size, with its width; one too near its larger neighbour to be read stays without."""
    sizes = done.group_by("parameters").agg(pl.col("width").first()).sort("parameters", descending=True)
    span = max(np.ptp(np.log(sizes["parameters"].to_numpy())), 1e-9)
    ticks: list[tuple[int, str]] = []
    for parameters, width in sizes.iter_rows():
        if not ticks or np.log(ticks[-1][0] / parameters) > 0.08 * span:
            ticks.append((parameters, f"{short(parameters)}\n{width}"))
    ax.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
    ax.set_xticks([], minor=True)
    if len(sizes) == 1:
        ax.set_xlim(sizes["parameters"][0] / 2, sizes["parameters"][0] * 2)


def _size_colours(curves: pl.DataFrame) -> dict[str, Colour]:
    """Width -> colour, small to large, light to dark: viridis without its yellow end, too pale for lines on white."""
    sizes = sorted(curves["width"].unique(), key=Fraction)
    return {width: colormaps["viridis"](0.85 * (1 - (i + 1) / len(sizes))) for i, width in enumerate(sizes)}


def _draw_curves(ax: Axes, curves: pl.DataFrame, name: str, colours: dict[str, Colour]) -> None:
    """One panel: a line per run."""
    if curves.is_empty():
        ax.text(0.5, 0.5, f"no {name}\nwhile learning", transform=ax.transAxes, ha="center", va="center", color=GREY)
    for _, run in curves.sort("step").group_by("run", maintain_order=True):
        ax.plot(run["step"], run[name], color=colours[run["width"][0]], linewidth=1.2)


def _label_right(ax: Axes, labels: Sequence[tuple[float, str, Colour]]) -> None:
    """Writes (height in data, words, colour) to the right of the axes, moved apart where they would overlap."""
    low, high = ax.get_ylim()
    line = ax.figure.get_figure(root=True).get_figheight()
    ordered = sorted(labels, key=lambda label: label[0])
    heights = [13.0 * (1 + words.count("\n")) / (0.7 * 72 * line) for _, words, _ in ordered]  # axes' fraction
    centres = _spread([(value - low) / (high - low) for value, _, _ in ordered], heights)
    for (_, words, colour), centre in zip(ordered, centres, strict=True):
        ax.annotate(
            words, (1.0, centre), (6, 0), "axes fraction", "offset points", va="center", color=colour, linespacing=1.05,
            annotation_clip=False,
        )  # fmt: skip
    ax.set_ylim(low, high)


def _label_points(ax: Axes, names: Sequence[tuple[tuple[float, float], str, Colour]]) -> None:
    """Writes (point in data, words, colour) beside the point, where it covers no dot and no earlier label if it can."""
    figure = ax.figure.get_figure(root=True)
    figure.draw_without_rendering()  # the layout settles where data lie on the page
    dots = [ax.transData.transform(dots.get_offsets()) for dots in ax.collections]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for group in dots for x, y in group]
    for point, words, colour in names:
        best, fewest = None, np.inf
        for dx, dy in (
            (0, -13),
            (0, 13),
            (20, 0),
            (-20, 0),
            (18, -14),
            (-18, -14),
            (18, 14),
            (-18, 14),
            (0, -26),
            (0, 26),
        ):
            x, y = ax.transData.transform(point) + np.array([dx, dy]) * figure.dpi / 72
            box = Bbox.from_bounds(x - 4 * len(words), y - 7, 8 * len(words), 14)
            covered = box.count_overlaps(taken)
            if covered < fewest:
                best, fewest = ((dx, dy), box), covered
        assert best is not None
        taken.append(best[1])
        ax.annotate(
            words, point, best[0], textcoords="offset points", ha="center", va="center", color=colour, fontsize=9
        )


def _spread(centres: list[float], heights: list[float]) -> list[float]:
    """Moves intervals apart: upwards in their order, then down again from the top, which is 1."""
    placed = list(centres)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + (heights[i - 1] + heights[i]) / 2)
    top = 1.0
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], top - heights[i] / 2)
        top = placed[i] - heights[i] / 2
    return placed
