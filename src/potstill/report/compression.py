"""What `potstill compress` found -> a card in Markdown, and one HTML page that holds its figure and its film."""

import base64
import math
from collections.abc import Callable
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from potstill.report.figures import GREY, STYLE, WIDTH, short, svg, template

BLUE, ORANGE = "#0072b2", "#d55e00"  # Okabe & Ito 2008


def claim(record: dict[str, Any]) -> str:
    """What was found, in one or two sentences, how surely, and why the search ended."""
    keep, sure = f"{100 * record['keep']:g} %", f"{100 * record['confidence']:g} %"
    what, why = f"the teacher's {record['measure']}", f" {record['why'][:1].upper()}{record['why'][1:]}"
    if record["reached"]:
        of = ""  # a teacher whose size is known
        if record["teacher_size"]:
            part = 100 * record["parameters"] / record["teacher_size"]["parameters"]
            of = f", {part:.{0 if part >= 10 else 1 if part >= 1 else 2}f} % of the teacher's"
        why += (
            "."
            if record["stopped"] != "budget"
            else ": a smaller one may do as well; the same command with a larger --budget goes on."
        )
        return (
            f"With {sure} confidence, the student {record['shape']} keeps at least {keep} of {what}"
            f" (measured {100 * record['share']:.1f} %, at least {floored(record['share_low'])} %), with"
            f" {record['parameters']:,} parameters{of}.{why}"
        )
    bound = f" of at most {record['max_parameters']:,} parameters" if record["max_parameters"] else ""
    text = f"Not reached: no student{bound} was shown to keep {keep} of {what} with {sure} confidence."
    shares = [(trial["confirm"] or trial["screen"] or {}).get("share", 0.0) for trial in record["trials"]]
    if any(shares):
        best = record["trials"][shares.index(max(shares))]
        text += f" The nearest is {best['shape']}, measured at {100 * max(shares):.1f} %."
    return text + why + ("; the same command with a larger --budget goes on." if record["stopped"] == "budget" else ".")


def card(record: dict[str, Any], measured: dict[str, Any]) -> str:
    """Markdown for the folder the student lies in.

    Args:
        record: result.json of a compression.
        measured: of `teacher` and `student`, what `outcome.measure` returned; empty where there is no student.
    """
    return template("compression.md").render(**_said(record, measured)).rstrip() + "\n"


def page(record: dict[str, Any], measured: dict[str, Any], film: bytes | None, no_film: str | None = None) -> str:
    """One HTML page that loads nothing: as `card`, with an MP4, or why there is none."""
    moving = base64.b64encode(film).decode() if film else None
    return template("compression.html").render(
        **_said(record, measured), film=moving, no_film=no_film, figure=_figure(record)
    )


def _said(record: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """What both of them show."""
    reached, task = record["reached"], record["env"]
    task = task.replace("_", " ").title() if task.islower() else task
    origin = [("teacher", record["teacher"])]
    origin += [(key, str(record[key])) for key in ("command", "commit", "machine") if record.get(key)]
    return {
        "title": f"{task} in {record['parameters']:,} parameters" if reached else f"{task}: no smaller network found",
        "claim": claim(record), "reached": reached, "sticky": record["sticky"], "measured": measured,
        "facts": _facts(record, measured), "trials": _trials(record), "points": record["measure"] == "point-win rate",
        "chosen": [record["shape"], str(record["way"])] if reached else None, "minimise": record["minimise"],
        "origin": [*origin, ("minutes", f"{record['seconds'] / 60:.1f} of {record['budget']:g}")],
    }  # fmt: skip


def _facts(record: dict[str, Any], measured: dict[str, Any]) -> list[list[str]]:
    """Teacher beside student: a heading and a row per figure. What was not measured is a dash."""
    size, games, speed = record["teacher_size"], record["teacher_games"], record["teacher_latency"]
    columns = {"teacher": (size or {}) | games | speed}
    if record["reached"]:
        columns["student"] = record | {"mean": record["score"]}
    columns = {who: column | measured.get(who, {}) for who, column in columns.items()}
    shown: dict[str, Callable[[dict[str, Any]], str]] = {
        "network": lambda c: c["network"].partition(";")[0],
        "parameters": lambda c: f"{c['parameters']:,}",
        "multiply-adds": lambda c: f"{c['macs']:,}",
        "score, greedy": _score,
        "point-win rate": lambda c: f"{100 * c['point_win_rate']:.1f} %",
        "worst game": lambda c: f"{c['worst']:.2f}",
        "games, distinct": lambda c: f"{c['episodes']}, {c['distinct']}",
        "score, action noise": lambda c: _score(_disturbed(c, "action_noise")),
        "score, observation noise": lambda c: _score(_disturbed(c, "observation_noise")),
        "score, a step of delay": lambda c: _score(_disturbed(c, "delay")),
        "games under each": lambda c: str(_disturbed(c, "delay")["episodes"]),
        "PyTorch, bytes": lambda c: f"{c['bytes']:,}",
        "ONNX, bytes": lambda c: f"{c['onnx']['bytes']:,}",
        "C, bytes of flash": lambda c: f"{c['c']['flash']:,}",
        "C, bytes of stack": lambda c: f"{c['c']['stack']:,}",
        "latency, PyTorch": _latency,
        "latency, onnxruntime": lambda c: _latency(c["onnx"]),
        "latency, C": lambda c: _latency(c["c"]),
    }
    if record["measure"] != "point-win rate":
        del shown["point-win rate"]

    def cell(write: Callable[[dict[str, Any]], str], column: dict[str, Any]) -> str:
        try:
            return write(column)
        except (KeyError, TypeError, StopIteration):  # it was not measured, or is None
            return "-"

    rows = [[name, *(cell(write, column) for column in columns.values())] for name, write in shown.items()]
    if record["random_score"] is not None:
        rows.append(["random play, score", f"{record['random_score']:.2f}", *["-"] * (len(columns) - 1)])
    return [["", *columns], *(row for row in rows if set(row[1:]) != {"-"})]


def _trials(record: dict[str, Any]) -> list[list[str]]:
    """A heading and a row per student tried."""
    rows = [["shape", "way", "parameters", "score", "kept", "lower bound", "games", "outcome"]]
    for trial in record["trials"]:
        games = trial["confirm"] or trial["screen"]
        head = [trial["shape"], str(trial["way"]), f"{trial['parameters']:,}"]
        if games is None:
            rows.append([*head, "", "", "", "", f"failed: {trial['error']}"])
            continue
        low = "" if games["share_low"] is None else f"{floored(games['share_low'])} %"
        told = [f"{100 * games['share']:.1f} %", low, str(games["episodes"]), trial["outcome"]]
        rows.append([*head, _score(games), *told])
    return rows


def _disturbed(column: dict[str, Any], how: str) -> dict[str, Any]:
    """Games of the file that played them: ONNX, or compiled integers."""
    return next(each[how] for each in (column["onnx"], column["c"]) if how in (each or {}))


def _latency(measured: dict[str, Any]) -> str:
    return f"{measured['latency_ms']:.3f} ms (95th percentile {measured['latency_p95_ms']:.3f})"


def _score(games: dict[str, Any]) -> str:
    interval = "" if games["ci95"] is None else f" ({games['ci95'][0]:.2f} to {games['ci95'][1]:.2f})"
    return f"{games['mean']:.2f}{interval}"


def _figure(record: dict[str, Any]) -> str:
    """Share kept against parameters as SVG, a dot per student with its lower bound; empty where none was tried."""
    found = [(trial, trial["confirm"] or trial["screen"]) for trial in record["trials"]]
    found = sorted(((t, games) for t, games in found if games), key=lambda pair: pair[0]["parameters"])
    if not found:
        return ""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6))
        ax = figure.subplots()
        shares = [record["keep"], 1.0, *(games["share"] for _, games in found)]
        floor = min(shares) - 0.1
        ax.axhline(1.0, color="black", linewidth=1.0, linestyle=(0, (5, 3)), zorder=1)
        ax.axhline(record["keep"], color=ORANGE, linewidth=1.0, zorder=1)
        for trial, games in found:
            low = floor if games["share_low"] is None else max(games["share_low"], floor)
            ax.plot([trial["parameters"]] * 2, [low, games["share"]], color=BLUE, linewidth=1.6, zorder=2)
            face = "white" if trial["confirm"] is None else BLUE
            ax.plot(
                trial["parameters"], games["share"], "o", markersize=7, markerfacecolor=face, markeredgecolor=BLUE,
                zorder=3,
            )  # fmt: skip
        ax.set_xscale("log")
        sizes = [trial["parameters"] for trial, _ in found]
        ax.set_xlim(min(sizes) / 1.6, max(sizes) * 1.6)
        labels = [f"{short(trial['parameters'])}\n{trial['shape']}" for trial, _ in found]
        chosen = [(record["shape"], record["way"])] if record["reached"] else []
        first = [place for place, (trial, _) in enumerate(found) if (trial["shape"], trial["way"]) in chosen]
        kept = _apart(sizes, labels, *first)
        ax.set_xticks(sizes, [label if place in kept else "" for place, label in enumerate(labels)])
        ax.set_xticks([], minor=True)
        ax.set_ylim(floor, max(shares) + 0.05)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        ax.set_ylabel("kept of the teacher's score")
        ax.set_xlabel("parameters, and shape")
        for height, words, colour, side in (
            (1.0, "teacher", "black", "bottom"),
            (record["keep"], f"wanted: {100 * record['keep']:g} %", ORANGE, "top"),
        ):
            ax.annotate(words, (1.0, height), (6, 0), ("axes fraction", "data"), "offset points", va=side, color=colour)
        note = "dot: measured, filled where confirmed; line: down to the one-sided bound"
        ax.set_title(note, loc="left", fontsize=9, color=GREY)
    return svg(figure)


def _apart(sizes: list[int], labels: list[str], *first: int) -> list[int]:
    """Places of sizes whose labels do not run into each other on a log scale: `first` of all, then from the largest."""
    axis = math.log(1.6**2 * max(sizes) / min(sizes))
    wide = [
        0.005 + 0.0078 * max(map(len, label.splitlines())) for label in labels
    ]  # half of it, as a share of the axis
    kept: list[int] = []
    for place in (*first, *sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)):
        gaps = [abs(math.log(sizes[other] / sizes[place])) - axis * (wide[place] + wide[other]) for other in kept]
        if min(gaps, default=1.0) > 0:
            kept.append(place)
    return kept


def floored(share: float) -> str:
    """A bound in per cent, rounded down: it must not promise more than it holds."""
    return f"{int(1000 * share // 1) / 10:.1f}"
