"""Answers -> figures: what a study says of size. Each function takes `answers.Answers` and a width in inches."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from potstill.arms import ARMS, STUDENTS, look_of
from potstill.errors import InputError
from potstill.report import drawing
from potstill.report.answers import Answers
from potstill.report.conclusions import LEVEL, kept, replies, task
from potstill.report.drawing import NARROW, canvas, legend
from potstill.report.figures import GREY, STYLE, WIDTH, short
from potstill.report.groups import Group, number
from potstill.results import learning_curve

RHO = (0.05, 200.0)
"""Ratios of sizes that a figure has room for."""
LINES = 20  # learning curves of an arm at a size that are drawn: more cover each other


def size_score(answers: Answers, width: float = WIDTH) -> Figure:
    """Score against size: RL and a student in one panel, every other arm in one of its own, over these two in grey."""
    groups = _compared(answers)
    arms = list(dict.fromkeys(group.arm for group in groups))
    first = [arm for arm in ("rl", answers.student) if arm in arms]
    panels = [first, *([arm] for arm in arms if arm not in first)] if first else [[arm] for arm in arms]
    room = width / min(3 if width > NARROW else 2, len(panels))
    with rc_context(STYLE):
        note = "line: interquartile mean of the runs, 95 % interval; dot: a run"
        note += "; arrow: more training may bring more" * any(group.lower_bound for group in groups)
        heights = (1.5, 2.2) if len(panels) > 1 else (0.0, 4.6)
        found, title = kept(answers), f"Score against size, {task(answers)}"
        if found is not None:
            what = f"{short(found.parameters)} parameters keep {100 * found.share:.0f} % of the teacher's points"
            title = f"{what}, {task(answers)}"
        figure, axes, lowest = drawing.grid(title, note, width, len(panels), (3, 2), heights, "score of a game")
        for place, (ax, shown) in enumerate(zip(axes, panels, strict=True)):
            if place:
                for arm in first:
                    behind = answers.of(arm)
                    line = [group.parameters for group in behind], [group.score.value for group in behind]
                    ax.plot(*line, color="#bbbbbb", linewidth=1.2, zorder=1)
            for order, arm in enumerate(shown):
                _draw_scores(ax, [group for group in groups if group.arm == arm], drawing.dodge(order, len(shown)))
            lines = drawing.reference_lines(ax, answers)
            drawing.size_axis(ax, groups, room)
            if len(panels) > 1:
                drawing.panel_title(ax, " and ".join(look_of(arm).label for arm in shown), room)
                ax.set_xlabel("parameters" if ax in lowest else "")
        drawing.same_heights(axes)
        return legend(figure, drawing.key_of(first or arms) + lines, width)


def _draw_scores(ax: Axes, groups: Sequence[Group], beside: float) -> None:
    """One arm: its runs, the interval of each size, and a line."""
    look = look_of(groups[0].arm)
    for group in groups:
        x, scores = group.parameters * beside, [run["score"] for run in group.runs]
        ax.scatter([x] * len(scores), scores, s=12, c=look.colour, alpha=0.45, linewidths=0, zorder=2)
        drawing.interval(ax, x, group.score.low, group.score.high, look.colour)
        if group.lower_bound:
            ax.annotate(
                "", (x, group.score.value), (0, 17), textcoords="offset points", zorder=4,
                arrowprops={"arrowstyle": "<-", "color": look.colour, "shrinkA": 0, "shrinkB": 3},
            )  # fmt: skip
    points = [group.parameters * beside for group in groups], [group.score.value for group in groups]
    ax.plot(*points, color=look.colour, marker=look.marker, markersize=5.5, linewidth=1.5, zorder=3)


def score_distributions(answers: Answers, width: float = WIDTH) -> Figure:
    """Scores of single games: a panel per arm, a dot per game over a violin at each size, the median a bar."""
    groups = _compared(answers)
    arms, widths = list(dict.fromkeys(group.arm for group in groups)), _widths(groups)
    sizes = {group.width: group.parameters for group in groups}
    room = width / min(3 if width > NARROW else 1, len(arms))
    rng = np.random.default_rng(0)
    with rc_context(STYLE):
        lost = "; number: % of games lost" if answers.scale.points else ""
        title, note = f"Scores of single games, {task(answers)}", f"dot: a game, seeds pooled; bar: the median{lost}"
        figure, axes, _ = drawing.grid(title, note, width, len(arms), (3, 1), (1.2, 2.1), "score of a game")
        for ax, arm in zip(axes, arms, strict=True):
            look = look_of(arm)
            for group in answers.of(arm):
                x, scores = widths.index(group.width), np.concatenate([run for runs in group.games for run in runs])
                bodies: Any = ax.violinplot(scores, [x], points=40, widths=0.8, showextrema=False)["bodies"]
                for body in bodies:
                    body.set(facecolor=look.colour, alpha=0.22, linewidth=0)
                ax.scatter(
                    x + rng.uniform(-0.25, 0.25, scores.size), scores, s=4, c=look.colour, alpha=0.4, linewidths=0,
                    rasterized=True,  # thousands of dots
                )  # fmt: skip
                ax.plot([x - 0.35, x + 0.35], [np.median(scores)] * 2, color="black", linewidth=1.5)
                if answers.scale.points:
                    ax.annotate(
                        f"{100 * np.mean(scores < 0):.0f}", (x, 1.0), (0, 1), ha="center", va="bottom", fontsize=8,
                        xycoords=ax.get_xaxis_transform(), textcoords="offset points", color=GREY,
                    )  # fmt: skip
            drawing.panel_title(ax, look.label, room, pad=14 if answers.scale.points else None)
            ax.set_xticks(range(len(widths)), [f"{short(sizes[each])}\n{each}" for each in widths], fontsize=8)
            ax.set_xlim(-0.6, len(widths) - 0.4)
            ax.grid(visible=False, axis="x")
        drawing.same_heights(axes)
        figure.supxlabel("parameters, and width", fontsize=9)
    return figure


def agreement_score(answers: Answers, width: float = WIDTH) -> Figure:
    """Score against agreement with the teacher on the student's own states: a dot per run, larger for a larger size."""
    groups = [group for group in _compared(answers) if group.arm in STUDENTS or group.arm not in ARMS]
    runs = [(group, run) for group in groups for run in group.runs if number(run, "agreement") is not None]
    if not runs:
        raise InputError("no student was compared with its teacher")
    widths = _widths(groups)
    with rc_context(STYLE):
        note = "dot: a run; the larger the dot, the larger the network; greedy actions, on the student's own states"
        title = f"Score against agreement with the teacher, {task(answers)}"
        figure, (ax,) = canvas(title, note, width, 4.4)
        for group, run in runs:
            look, area = look_of(group.arm), 14 * (1 + widths.index(group.width))
            ax.scatter([run["agreement"]], [run["score"]], s=area, c=look.colour, marker=look.marker, alpha=0.7)
        lines = drawing.reference_lines(ax, answers)
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        ax.xaxis.set_major_locator(MaxNLocator(6))
        ax.set_xlabel("states where both would act the same")
        ax.set_ylabel("score of a game")
        return legend(figure, drawing.key_of(group.arm for group, _ in runs) + lines, width)


def size_ratios(answers: Answers, width: float = WIDTH) -> Figure:
    """rho(p), the size RL needs over the size a student needs for the same score, with intervals and censoring."""
    ratios = [ratio for ratio in answers.ratios if ratio.reward == "rl"]
    if not ratios:
        raise InputError("no two sizes at which both RL from scratch and a distilled network have two runs or more")
    arms = list(dict.fromkeys(ratio.student for ratio in ratios))
    ends = [end for ratio in ratios for end in (*ratio.size.interval, ratio.size.low, ratio.size.high)]
    finite = [end for end in ends if 0 < end < math.inf] or [1.0]
    least, most = min(*finite, 0.5) / 1.6, max(*finite, 2.0) * 1.6
    larger = [f"{r.target:g}" for r in ratios if r.student == answers.student and r.size.interval[0] > 1]
    title = "Size RL needs over size a student needs"
    if larger:
        title = f"In greedy play RL needs a larger network than a student to score {' and '.join(larger)}"
    with rc_context(STYLE):
        note = "95 % intervals; an arrow: no end within the sizes measured; hollow: known by a bound only"
        height = 1.8 + 0.13 * len(ratios) + 0.25 * len(answers.scale.targets)
        figure, (ax,) = canvas(f"{title}, {task(answers)}", note, width, height)
        for ratio in ratios:
            look, size = look_of(ratio.student), ratio.size
            spread = 0.72 * (arms.index(ratio.student) - (len(arms) - 1) / 2) / len(arms)
            y = answers.scale.targets.index(ratio.target) - spread
            low, high = size.interval
            ax.plot([max(low, least), min(high, most)], [y, y], color=look.colour, linewidth=1.6)
            for end, marker in ((low, "<"), (high, ">")):
                if not 0 < end < math.inf:
                    ax.plot([least if marker == "<" else most], [y], marker, color=look.colour, markersize=5)
            if size.low == size.high or size.low > 0 or math.isfinite(size.high):
                at = size.low if size.low > 0 else size.high
                face = look.colour if size.low == size.high else "white"
                ax.plot([at], [y], look.marker, color=look.colour, markerfacecolor=face, markersize=6.5, zorder=3)
        ax.axvline(1.0, color="black", linewidth=1.0, zorder=1)
        ax.set_xscale("log")
        ax.set_xlim(least / 1.1, most * 1.1)
        ticks = [tick for tick in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300) if least <= tick <= most]
        ticks = ticks if len(ticks) > 2 else [0.5, 1, 2]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_yticks(range(len(answers.scale.targets)), [f"{target:g}" for target in answers.scale.targets])
        ax.set_ylabel("score to reach")
        ax.set_xlabel(f"times the parameters (log scale){', ' if width > NARROW else chr(10)}above 1: RL needs more")
        return legend(figure, drawing.key_of(arms), width)


def differences(answers: Answers, width: float = WIDTH) -> Figure:
    """Score of each arm less that of RL from scratch at the same size, with Holm-corrected tests."""
    found = answers.differences
    if not found:
        raise InputError("no size at which RL from scratch and another arm both have a finished run")
    tested = [each for each in found if each.arm == answers.student and each.p is not None]
    higher = sum(each.p is not None and each.p < LEVEL and each.score.value > 0 for each in tested)
    title = "Score less that of RL at equal size"
    if higher:
        title = f"A student scores higher than RL at {higher} of {len(tested)} sizes"
    arms = list(dict.fromkeys(each.arm for each in found))
    with rc_context(STYLE):
        note = "95 % intervals; filled: significant after Holm's correction; grey band: as good as equal"
        figure, (ax,) = canvas(f"{title}, {task(answers)}", note, width, 4.2)
        ax.axhspan(-answers.scale.margin, answers.scale.margin, color="#eeeeee", zorder=0)
        ax.axhline(0.0, color="black", linewidth=1.0, zorder=1)
        for each in found:
            look = look_of(each.arm)
            x = each.parameters * drawing.dodge(arms.index(each.arm), len(arms))
            drawing.interval(ax, x, each.score.low, each.score.high, look.colour)
            face = look.colour if each.p is not None and each.p < LEVEL else "white"
            style: Any = {"color": look.colour, "markerfacecolor": face, "markersize": 6, "zorder": 3}
            ax.plot([x], [each.score.value], look.marker, **style)
        drawing.size_axis(ax, [group for group in answers.groups if group.arm == "rl"], width)
        ax.set_ylabel("difference in score")
        return legend(figure, drawing.key_of(arms), width)


def budgets(answers: Answers, width: float = WIDTH) -> Figure:
    """Score against agent steps, greedy above and sampled below; beside each, rho against RL's agent steps."""
    if not answers.at_budgets:
        raise InputError("no size at which both RL and a distilled network have a finished run")
    sizes = sorted({group.parameters for at in answers.at_budgets for group in at.groups})
    colours = {size: colormaps["viridis"](0.9 * i / max(len(sizes) - 1, 1)) for i, size in enumerate(sizes)}
    rewards = list(dict.fromkeys(at.reward for at in answers.at_budgets))
    dashes: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
    lines = dict(zip(rewards, dashes, strict=False))
    plays = list(dict.fromkeys(at.play for at in answers.at_budgets))
    told = [r for at in answers.at_budgets for r in at.ratios if r.size.interval != (0.0, math.inf)]
    bounded = [target for target in answers.scale.targets if any(r.target == target for r in told)]
    target = bounded[len(bounded) // 2] if bounded else None
    told = [ratio for ratio in told if ratio.target == target]
    with rc_context(STYLE):
        columns = 2 if width > NARROW else 1
        note = "scores: medians of RL's runs, a colour per size; dots: students, at their own and their teachers' steps"
        if target is not None:
            note += f"; ratios: RL's size over the student's at a score of {target:g}, 95 % intervals"
        rows, title = 2 * len(plays) // columns, f"Score and size needed by budget, {task(answers)}"
        figure, axes = canvas(title, note, width, 1.5 + 2.3 * rows, rows, columns)
        for place, play in enumerate(plays):
            left, right = axes[2 * place : 2 * place + 2]
            mine = [at for at in answers.at_budgets if at.play == play]
            for student in mine[0].students if mine else ():
                own, teacher = (student.middle(key) for key in ("env_steps", "teacher_env_steps"))
                if own is not None and student.parameters in colours:
                    y = student.middle("score") or 0.0
                    left.plot([own + (teacher or 0.0)], [y], "o", color=colours[student.parameters])
            for reward in rewards:
                curve = [at for at in mine if at.reward == reward]
                for size in sizes:
                    points = [(at.steps, g.middle("score")) for at in curve for g in at.groups if g.parameters == size]
                    if points:
                        style: Any = {"color": colours[size], "marker": look_of(reward).marker, "linewidth": 1.5}
                        left.plot(*zip(*points, strict=True), lines[reward], markersize=4, **style)
                look, side = look_of(reward), drawing.dodge(rewards.index(reward), len(rewards)) ** 0.4
                for steps, ratio in [(at.steps, r.size) for at in curve for r in at.ratios if r in told]:
                    low, high = (min(max(end, RHO[0]), RHO[1]) for end in ratio.interval)
                    right.plot([steps * side] * 2, [low, high], color=look.colour, linewidth=2.5)
                    if ratio.low == ratio.high:
                        right.plot([steps * side], [ratio.low], look.marker, color=look.colour)
            right.axhline(1.0, color="black", linewidth=1.0, zorder=1)
            right.set_yscale("log")
            right.set_ylim(*RHO)
            left.set_ylabel(f"score, {play}")
            right.set_ylabel(f"ratio of sizes, {play}")
            for ax in (left, right):
                ax.set_xscale("log")
                ax.xaxis.set_minor_locator(NullLocator())
                ax.yaxis.set_minor_locator(NullLocator())
                ticks = sorted({at.steps for at in mine})
                ax.set_xticks(ticks, [short(tick) for tick in ticks])
                ax.set_xlabel("agent steps (log scale)")
            right.set_xlim(left.get_xlim())  # also where no ratio is known
            right.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
        key = [Line2D([], [], color=colours[size], label=f"{short(size)} parameters") for size in sizes]
        key += [
            Line2D([], [], color=look_of(r).colour, linestyle=lines[r], label=look_of(r).short.replace("\n", " "))
            for r in rewards
        ]
        return legend(figure, key, width)


def learning_curves(answers: Answers, width: float = WIDTH) -> Figure:
    """Score while learning against agent steps: a panel per size, a line per run."""
    groups = [group for group in _compared(answers) if any(len(learning_curve(run)[0]) for run in group.runs)]
    if not groups:
        raise InputError("no run has a learning curve with scores")
    widths = _widths(groups)
    with rc_context(STYLE):
        title, note = f"Score while learning, {task(answers)}", "line: a run; its teacher's steps are left out"
        figure, axes, lowest = drawing.grid(title, note, width, len(widths), (3, 2), (1.3, 2.0), "score")
        for ax, size in zip(axes, widths, strict=True):
            for group in (group for group in groups if group.width == size):
                for curve in map(learning_curve, group.runs[:LINES]):
                    if len(curve[0]):
                        ax.plot(*curve, color=look_of(group.arm).colour, linewidth=0.9, alpha=0.75)
            ax.set_title(f"width {size}", fontsize=9)
            ax.xaxis.set_major_locator(MaxNLocator(3))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
            ax.set_xlim(left=0.0)
            ax.set_xlabel("agent steps" if ax in lowest else "")
        drawing.same_heights(axes)
        return legend(figure, drawing.key_of((group.arm for group in groups), lines=True), width)


def cost_fronts(answers: Answers, width: float = WIDTH) -> Figure:
    """Score against latency, bytes and multiply-adds of the deployed network, with the Pareto front of each."""
    groups = _compared(answers)
    costs = {"latency_ms": "latency at batch 1, ms", "bytes": "bytes", "macs": "multiply-adds"}
    drawn = {cost: words for cost, words in costs.items() if any(answers.front[cost])}
    if not drawn:
        raise InputError("no finished run knows its latency, bytes or multiply-adds")
    with rc_context(STYLE):
        title, beside = f"Score against cost of deployment, {task(answers)}", width > NARROW and len(drawn) > 1
        note = "interquartile mean of an arm at a size; line: the Pareto front, which no other point beats"
        heights = (0.0, 3.9) if beside else (1.3, 2.2)
        figure, axes, _ = drawing.grid(title, note, width, len(drawn), (len(drawn), 1), heights, "score")
        for ax, (cost, words) in zip(axes, drawn.items(), strict=True):
            front = []
            for group, best in zip(answers.groups, answers.front[cost], strict=True):
                x = group.middle(cost)
                if x is None or group not in groups:
                    continue
                look, y = look_of(group.arm), group.score.value
                ax.plot([x], [y], look.marker, color=look.colour, alpha=1 if best else 0.4, markersize=6)
                front += [(x, y)] if best else []
            if front:
                ax.step(*zip(*sorted(front), strict=True), where="post", color="black", linewidth=1.0, zorder=1)
            ax.set_xscale("log")
            ax.xaxis.set_minor_locator(NullLocator())
            low, high = ax.get_xlim()
            subs = LogLocator(subs=(1.0, 3.0) if high < 100 * low else (1.0,))
            ax.xaxis.set_major_locator(subs if high > 10 * low else MaxNLocator(3))
            ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
            digits = next((d for d in range(2, 6) if len({_count(tick, d) for tick in ticks}) == len(ticks)), 6)
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _, digits=digits: _count(value, digits)))
            ax.set_xlabel(words if beside else f"{words} (log scale)")
        drawing.same_heights(axes)
        return legend(figure, drawing.key_of(group.arm for group in groups), width)


def bad_starts(answers: Answers, width: float = WIDTH) -> Figure:
    """Score of games whose first k steps a random policy played: a panel per size, a line per arm."""
    groups = [group for group in _compared(answers) if any(_starts(run) for run in group.runs)]
    if not groups:
        raise InputError("no run was scored from other starts")
    widths = _widths(groups)
    with rc_context(STYLE):
        title, note = f"Score after a start of random play, {task(answers)}", "mean over runs; a panel per width"
        figure, axes, lowest = drawing.grid(title, note, width, len(widths), (3, 2), (1.3, 1.85), "score")
        ks = sorted({k for group in groups for run in group.runs for k in _starts(run)})
        for ax, size in zip(axes, widths, strict=False):
            for group in (group for group in groups if group.width == size):
                look = look_of(group.arm)
                means = [[s[k] for run in group.runs if k in (s := _starts(run))] for k in ks]
                points = [(place, float(np.mean(scores))) for place, scores in enumerate(means) if scores]
                ax.plot(*zip(*points, strict=True), color=look.colour, marker=look.marker, markersize=4, linewidth=1.3)
            ax.set_title(f"width {size}", fontsize=10)
            ax.set_xticks(range(len(ks)), [str(k) for k in ks])
            ax.set_xlim(-0.3, len(ks) - 0.7)
            ax.yaxis.set_major_locator(MaxNLocator(5))
            ax.set_xlabel("k, random steps first" if ax in lowest else "")
        drawing.same_heights(axes)
        return legend(figure, drawing.key_of(group.arm for group in groups), width)


def covariate_shift(answers: Answers, width: float = WIDTH) -> Figure:
    """How far a student is from its teacher on the teacher's states and on its own: disagreement and KL."""
    measures = {
        "disagreement of greedy actions": ("agreement_teacher_states", "agreement"),
        "KL(teacher || student), nats": ("kl_teacher_states", "kl"),
    }
    needed = [key for pair in measures.values() for key in pair]
    groups = [c for c in answers.groups if c.arm in STUDENTS and all(c.mean(key) is not None for key in needed)]
    if not groups:
        raise InputError("no student was compared with its teacher")
    arms = list(dict.fromkeys(group.arm for group in groups))
    with rc_context(STYLE):
        rows, columns = (1, 2) if width > NARROW else (2, 1)
        note = "hollow: on the teacher's states; filled: on the student's own; mean over runs"
        title = f"Distance from the teacher, {task(answers)}"
        figure, axes = canvas(title, note, width, 1.5 + 2.6 * rows, rows, columns)
        for ax, (words, keys) in zip(axes, measures.items(), strict=True):
            for group in groups:
                look = look_of(group.arm)
                x = group.parameters * drawing.dodge(arms.index(group.arm), len(arms))
                ends = [group.mean(key) or 0.0 for key in keys]
                ends = [1 - end for end in ends] if "agreement" in keys else ends
                ax.plot([x, x], ends, color=look.colour, linewidth=1.2, zorder=2)
                for y, face in zip(ends, ("white", look.colour), strict=True):
                    ax.plot([x], [y], look.marker, color=look.colour, markerfacecolor=face, markersize=5.5, zorder=3)
            if "agreement" in keys:
                ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
            ax.set_ylim(bottom=0.0)
            ax.set_title(words, fontsize=10)
            drawing.size_axis(ax, groups, width / columns)
        return legend(figure, drawing.key_of(arms), width)


def growth(answers: Answers, width: float = WIDTH) -> Figure:
    """Points that a doubling of the parameters brings RL and the students, between each two neighbouring sizes."""
    arms = [arm for arm in ("rl", answers.student) if arm and any(each.arm == arm for each in answers.growths)]
    if not arms:
        raise InputError("no arm has runs at two sizes")
    with rc_context(STYLE):
        note = "between neighbouring sizes, played greedily; 95 % intervals"
        verdict, title = replies(answers)[2].verdict, "Points gained per doubling of the parameters"
        if verdict in ("Less and less", "More and more"):
            title = f"A doubling of the parameters gains {verdict.lower()}"
        figure, (ax,) = canvas(f"{title}, {task(answers)}", note, width, 4.2)
        ax.axhline(0.0, color="black", linewidth=1.0, zorder=1)
        for order, arm in enumerate(arms):
            look, mine = look_of(arm), [each for each in answers.growths if each.arm == arm]
            x = [math.sqrt(math.prod(each.sizes)) * drawing.dodge(order, len(arms)) for each in mine]
            for at, each in zip(x, mine, strict=True):
                drawing.interval(ax, at, each.score.low, each.score.high, look.colour)
            ax.plot(x, [each.score.value for each in mine], color=look.colour, marker=look.marker, markersize=5.5)
        drawing.size_axis(ax, [group for group in answers.groups if group.arm in arms], width)
        ax.locator_params(axis="y", steps=(1, 2, 5, 10))  # 2.5 needs longer labels, which push the name off a phone
        ax.set_ylabel("points per doubling")
        return legend(figure, drawing.key_of(arms), width)


def _compared(answers: Answers) -> list[Group]:
    """Groups of the protocol's arms: an ablation's are in a table of their own, and drawn where there are no others."""
    groups = [group for group in answers.groups if group.arm in ARMS] or list(answers.groups)
    if not groups:
        raise InputError("no run is done and has a score")
    return groups


def _widths(groups: Sequence[Group]) -> list[str]:
    return [width for _, width in sorted({(group.parameters, group.width) for group in groups})]


def _starts(run: dict[str, Any]) -> dict[int, float]:
    starts = run.get("starts") or {}
    return {int(k): score for k, start in starts.items() if (score := number(start, "score")) is not None}


def _count(value: float, digits: int = 2) -> str:
    """A cost on an axis: 0.25, 320k, 40M, 3.2T; of small ones the digits that tell its ticks apart."""
    if value < 1000:
        return f"{value:.{digits}g}"
    return f"{value / 1e12:g}T" if value >= 1e12 else short(value)
