"""What the documents tell of the studies, from the committed records: sentences, tables and a figure.

python scripts/front_page.py           # after new records; `make report` runs it
python scripts/front_page.py --check   # only says whether the texts are those of the records

A text stands between `<!-- NAME: of the records, by scripts/front_page.py -->` and `<!-- end of NAME -->`.
"""

import math
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from numpy.random import default_rng

from potstill.analysis.scaling import Bounded
from potstill.analysis.statistics import permutation_test
from potstill.arms import look_of
from potstill.report import tables
from potstill.report.answers import answer
from potstill.report.drawing import canvas, key_of, legend, same_heights
from potstill.report.figures import GREY, STYLE, WIDTH, save, short
from potstill.report.groups import Record, scored
from potstill.report.tables import Table, Value
from potstill.results import read_runs

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "results"
IMAGES = ROOT / "docs" / "images"
STUDIES = {"first/pong": "Pong", "first/minatar-breakout": "Breakout", "first/minatar-space-invaders": "Space Invaders"}
UNITS = {"Pong": "points", "Breakout": "bricks", "Space Invaders": "points"}
PLAYS = {"greedy": "score", "sampled": "score_sampled"}
PILOTED = 5  # runs of each arm of a pilot, without which no test is told
PAGES = ("README.md", "docs/results.md", "data/results/first/README.md", "benchmarks/smallest.md")
SHAPES = {
    "nature": ("Nature-CNN", 4),
    "framewise": ("framewise convolutions", 4),
    "low-rank": ("Nature-CNN, low rank", 4),
    "sparse": ("Nature-CNN, pruned", 5),
    "sparse-int4": ("Nature-CNN, pruned, 4 bits", 1.5),
    "pooled-linear": ("linear, 12 x 12 pixels", 4),
    "small-picture": ("Nature-CNN, 42 x 42 pixels", 4),
    "one-frame": ("Nature-CNN, one frame", 4),
    "one-frame-memory": ("GRU, one frame", 4),
    "objects": ("MLP, places of ball and paddles", 4),
}
"""By arm of plans/families.toml: the network in words, and bytes a weight, with its place where others were pruned."""
PUBLISHED = {
    "RL Zoo": [(1_690_000, 21.0)],
    "Mnih 2015": [(1_690_000, 18.9)],
    "Rusu 2015": [(1_690_000, 16.2), (428_000, 16.3), (113_000, 16.8), (62_000, 15.7)],
}
"""Parameters and scores, without sticky actions: PPO; DQN; another DQN and three students of it."""
BLOCK = "<!-- {name}: of the records, by scripts/front_page.py -->\n\n{text}\n\n<!-- end of {name} -->"


def markdown(table: Table) -> str:
    def line(groups: list[str]) -> str:
        return f"|{'|'.join(f' {group} ' if group else ' ' for group in groups)}|"

    rows = [[group.text if isinstance(group, Value) else group for group in row] for row in table.rows]
    return "\n".join([line(list(table.headings)), "|" + "---|" * len(table.headings), *map(line, rows)])


class Scores:
    """A study's runs by arm and size; a score is the mean over runs, in the game's points."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = [record for record in records if scored(record)]

    def runs(self, arm: str, size: int, play: str = "greedy") -> list[float]:
        """Each run's score, seed after seed; empty where there is no run."""
        found = [run for run in self.records if (run["arm"], run["parameters"]) == (arm, size)]
        scores = [run[PLAYS[play]] for run in sorted(found, key=lambda run: (run["seed"], run["run"]))]
        return [score for score in scores if score is not None]

    def mean(self, arm: str, size: int, play: str = "greedy") -> float:
        return mean(self.runs(arm, size, play))

    def sizes(self, *arms: str) -> list[int]:
        """Parameters at which each of `arms` has a run, small to large."""
        each = [{run["parameters"] for run in self.records if run["arm"] == arm} for arm in arms]
        return sorted(set.intersection(*each))

    def both(self, arm: str, size: int) -> str:
        """'13.2 greedy and 13.0 sampled'"""
        return f"{self.mean(arm, size):.1f} greedy and {self.mean(arm, size, 'sampled'):.1f} sampled"

    def growth(self, arm: str, play: str = "greedy") -> list[tuple[int, int, float]]:
        """(size, next size, points gained per doubling of the parameters between them)."""
        sizes = self.sizes(arm)
        return [
            (low, high, (self.mean(arm, high, play) - self.mean(arm, low, play)) / math.log2(high / low))
            for low, high in pairwise(sizes)
        ]


def read(name: str) -> Scores:
    """The runs of a study in `RESULTS`; none where it has no folder yet."""
    folder = RESULTS / name
    return Scores(read_runs(folder) if folder.is_dir() else [])


def smallest() -> Scores:
    """The smallest players, whose records lie beside their networks."""
    return Scores(read_runs(ROOT / "data" / "students" / "pong"))


def side_by_side(told: dict[str, Scores]) -> Table:
    """Greedy and sampled play of RL, of RL with twice the steps and of students, at each size that has both."""
    arms = {"rl": "RL", "rl-long": "RL, twice the steps", "distill-student": "student"}
    headings = ("game", "parameters", *(f"{words}, {play}" for play in PLAYS for words in arms.values()))
    rows = []
    for game, scores in told.items():
        for size in scores.sizes("rl", "distill-student"):
            groups = [scores.runs(arm, size, play) for play in PLAYS for arm in arms]
            rows.append(
                [game, f"{size:,}", *(f"{mean(group):.1f} ({len(group)})" if group else "-" for group in groups)]
            )
    return Table("", headings, rows)


def growths(told: dict[str, Scores]) -> Table:
    """Points gained per doubling of the parameters, between neighbouring sizes."""
    rows = []
    for game, scores in told.items():
        for arm, words in (("rl", "RL"), ("distill-student", "student")):
            both = zip(*(scores.growth(arm, play) for play in PLAYS), strict=True)
            rows += [
                [game, words, f"{low:,} to {high:,}", f"{greedy:+.1f}", f"{sampled:+.1f}"]
                for (low, high, greedy), (_, _, sampled) in both
            ]
    return Table("", ("game", "who", "parameters", "greedy", "sampled"), rows)


def by_budget(told: dict[str, Scores]) -> Table:
    """RL of each critic after each number of steps against students: ratios of sizes that have a bound, and tests."""
    rows = []
    for game, scores in told.items():
        for at in answer(scores.records).at_budgets:
            known = [ratio for ratio in at.ratios if ratio.size.interval != (0.0, math.inf)]
            sizes = "; ".join(f"{_three(ratio.size)} at {ratio.target:g}" for ratio in known)
            tests = "; ".join(f"{each.p:.3f} at {each.parameters:,}" for each in at.differences if each.p is not None)
            if at.ratios:
                rows.append([game, at.reward, at.play, short(at.steps), sizes or "-", tests])
    headings = ("game", "RL", "play", "agent steps", "RL's size over the student's, at a score", "p (Holm), at a size")
    return Table("", headings, rows)


def _three(size: Bounded) -> str:
    """To three figures; > and <= where only a bound is known."""
    if size.low == size.high:
        return f"{size.low:.3g}"
    return f"> {size.low:.3g}" if size.low > 0 else f"<= {size.high:.3g}"


def answers(told: dict[str, Scores]) -> str:
    """The three questions, and what the records say of each: whole sentences, with units and a comparison."""
    _, breakout, invaders = told.values()
    lead = {
        play: [sum(each) for each in zip(*(_lead(scores, play) for scores in told.values()), strict=True)]
        for play in PLAYS
    }
    spoken = {play: f"{up} of {of} sizes" for play, (up, of) in lead.items()}
    rise = {arm: [f"{gain:.0f}" for *_, gain in invaders.growth(arm)] for arm in ("rl", "distill-student")}
    return f"""\
**1. Does learning from reward need a bigger network than learning from a teacher? Not known yet.** On Breakout a
student of {2189:,} parameters clears {breakout.mean("distill-student", 2189):.1f} bricks in a game, and RL needs
{33323 / 2189:.0f} times as many parameters for {breakout.mean("rl", 33323):.1f}. [More training and a larger
critic](docs/results.md#two-pilots-with-a-larger-critic) may change that.

**2. Can a student beat RL of its own size? On average it did, but three runs cannot show it.** The
students' mean score is above RL's at {spoken["greedy"]} of the three games in greedy play, and at {spoken["sampled"]}
with sampled actions. With three runs of each at a size, that may still be chance.

**3. How do both scale with size? From some size on, a larger network gains less.** On Space Invaders, from 611 to
33,532 parameters, each doubling gains a student {_and(rise["distill-student"])} points, and RL {_and(rise["rl"])}. On
Pong nearly all of the gain lies below 7,200 parameters."""


def headline(pong: Scores, size: int = 7197, expert: int = 424019) -> str:
    """What a student of one size keeps of its teachers' points."""
    students = [run for run in pong.records if (run["arm"], run["parameters"]) == ("distill-student", size)]
    score, taught = mean(run["score"] for run in students), mean(run["teacher_score"] for run in students)
    return (
        f"On Pong a student of {size:,} parameters scores **{score:.1f} points**. Its teacher is"
        f" {expert / size:.0f} times larger and scores {taught:.1f}. Random play scores about -20.5, and a perfect game"
        " is 21."
    )


def pilots(pong: Scores, breakout: Scores, play: str = "greedy") -> str:
    """What RL scores beside a larger critic, by the pilots of the second study, and what students of its size score."""
    wide, long = read("pilot-pong"), read("pilot-breakout")
    told = []
    for place, size, game, split, small, students in (
        ("On Pong, at 1,964 parameters,", 1964, "Pong", wide, pong, pong),
        ("On Breakout, at 8,471 parameters and 8 million steps,", 8471, "Breakout", long, long, breakout),
    ):
        runs, others = split.runs("rl-split", size, play), small.runs("rl", size, play)
        if runs and others:
            whole = min(len(runs), len(others)) >= PILOTED
            p = f"exact test, p = {permutation_test(runs, others, default_rng(0)):.3f}" if whole else ""
            so_far = f"{min(len(runs), len(others))} of {PILOTED} runs so far"
            told.append(
                f"{place} a larger critic moves RL from {mean(others):.1f} to {mean(runs):.1f} {UNITS[game]}"
                f" ({p or so_far}); students score {students.mean('distill-student', size, play):.1f}."
            )
    return " ".join(told)


def held(breakout: Scores) -> str:
    """What a small network holds after a teacher, and what it finds without one."""
    return f"""\
On Breakout, with {2189:,} parameters, a student that has a value head scores {breakout.both("distill-value", 2189)}.
After 0.5 million more steps of PPO it has {breakout.both("finetune", 2189)}. PPO from scratch has
{breakout.both("rl-long", 2189)} after 2 million steps. Each is the mean of three runs, in bricks."""


def _and(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _lead(scores: Scores, play: str) -> tuple[int, int]:
    """At how many of the sizes that both have the students' mean is above RL's."""
    sizes = scores.sizes("rl", "distill-student")
    return sum(scores.mean("distill-student", at, play) > scores.mean("rl", at, play) for at in sizes), len(sizes)


def blocks(told: dict[str, Scores]) -> dict[str, str]:
    """Each text, by its name."""
    runs = {f"runs of {game}": markdown(tables.scores(scores.records)) for game, scores in told.items()}
    pong, breakout, _ = told.values()
    plays = "\n\n".join(f"**{play.capitalize()}.** {pilots(pong, breakout, play)}" for play in PLAYS)
    whole = {"headline": headline(pong), "answers": answers(told), "held": held(breakout), "pilots": plays}
    return (
        {name: re.sub(r"(?<!\n)\n(?!\n)", " ", text) for name, text in whole.items()}
        | {"side by side": markdown(side_by_side(told)), "growth per doubling": markdown(growths(told))}
        | {"ratios by budget": markdown(by_budget(told))}
        | {"shapes": markdown(by_shape(read("families")))}
        | runs
    )


def put(page: str, name: str, text: str) -> str:
    """A page with `text` where the table of this name stands, if it has one."""
    block = BLOCK.format(name=name, text=text)
    opening, closing = block.partition("\n")[0], block.rpartition("\n")[2]
    return re.sub(f"{re.escape(opening)}.*?{re.escape(closing)}", lambda _: block, page, flags=re.DOTALL)


def score_by_size(told: dict[str, Scores], width: float = WIDTH) -> Figure:
    """Score against size, a column per game: greedy play above, sampled below; a dot per run, a line through means."""
    arms = ("rl", "distill-student")
    with rc_context(STYLE):
        note = "line: mean of the runs; dot: a run; RL has a critic as small as its actor, and 2M agent steps on Pong,"
        note += " 1M on the others"
        title = "Students score higher than RL, most of all in greedy play"
        figure, axes = canvas(title, note, width, 5.6, 2, len(told))
        for place, ax in enumerate(axes):
            (game, scores), play = list(told.items())[place % len(told)], list(PLAYS)[place // len(told)]
            for arm in arms:
                look, sizes = look_of(arm), scores.sizes(arm)
                for size in sizes:
                    runs = scores.runs(arm, size, play)
                    ax.scatter([size] * len(runs), runs, s=12, c=look.colour, alpha=0.45, linewidths=0)
                means = [scores.mean(arm, size, play) for size in sizes]
                ax.plot(sizes, means, color=look.colour, marker=look.marker, markersize=4.5, linewidth=1.5)
            ax.set_xscale("log")
            ax.xaxis.set_minor_locator(NullLocator())
            sizes = sorted({size for arm in arms for size in scores.sizes(arm)})
            ax.set_xticks(sizes, [short(size) for size in sizes], fontsize=9)
            if place < len(told):
                ax.set_title(f"{game}, {UNITS[game]}", fontsize=10)
            else:
                ax.set_xlabel("parameters (log scale)")
            if place % len(told) == 0:
                ax.set_ylabel(f"score, {play}")
        for upper, lower in zip(axes, axes[len(told) :], strict=False):
            same_heights([upper, lower])
        reward, student = key_of(arms)
        reward.set_label("RL: learns from reward")
        student.set_label("student: learns from a teacher")
        return legend(figure, [reward, student], width)


def shapes(study: Scores) -> list[tuple[str, list[Record]]]:
    """Arms of `SHAPES` that have runs, best first: the network in words, and its runs."""
    found = [(arm, [run for run in study.records if run["arm"] == arm]) for arm in SHAPES]
    found.sort(key=lambda each: -mean([run["score"] for run in each[1]] or [0]))
    return [(SHAPES[arm][0], runs) for arm, runs in found if runs]


def weight_bytes(run: Record) -> float:
    """What the weights of a run take: 4 bytes each, unless `SHAPES` says other."""
    return float(run["parameters"] * SHAPES.get(run["arm"], ("", 4))[1])


def by_shape(study: Scores) -> Table:
    """What each shape costs, with the lowest latency of its runs, and scores: means of its runs."""
    headings = ("network", "runs", "parameters", "bytes of weights", "multiply-adds", "latency, ms", *PLAYS)
    rows = []
    for words, runs in shapes(study):
        costs = [f"{mean(map(weight_bytes, runs)):,.0f}", f"{runs[0]['macs']:,}"]
        costs.append(f"{min(run['latency_ms'] for run in runs):.2f}")  # others ran beside some
        scores = [f"{mean(run[key] for run in runs):.1f}" for key in PLAYS.values()]
        rows.append([words, str(len(runs)), f"{runs[0]['parameters']:,}", *costs, *scores])
    return Table("", headings, rows)


def score_by_bytes(pong: Scores, pilot: Scores, study: Scores, smallest: Scores, width: float = WIDTH) -> Figure:
    """Score on Pong against bytes of weights, with published networks; and shapes of one size beside each other."""
    kinds = {
        "RL": (look_of("rl"), [run for run in pong.records if run["arm"] == "rl"]),
        "RL, larger critic": (look_of("rl-split"), [run for run in pilot.records if run["arm"] == "rl-split"]),
        "student": (look_of("distill-student"), [run for run in pong.records if run["arm"] == "distill-student"]),
        "student of another shape": (
            look_of("distill-mixed"),
            [run for run in study.records if run["arm"] != "nature"],
        ),
        "pruned student, then RL": (look_of("finetune"), [run | {"arm": "sparse"} for run in smallest.records]),
    }
    with rc_context(STYLE):
        best = kinds["pruned student, then RL"][1]
        gained = mean(run["score"] for run in best)
        title = f"{weight_bytes(best[0]) / 1000:.1f} kB of weights score {gained:.1f} of 21 points on Pong"
        note = "Ours: means over runs of 100 whole greedy games (hollow: 30 sampled), with sticky actions of 0.25."
        note += " Published scores: without. Right: students of about 2,000 parameters."
        figure, (ax, beside) = canvas(title, note, width, 4.0, 1, 2)
        keys = []
        for label, (look, records) in kinds.items():
            for group in {(run["arm"], run["parameters"]) for run in records}:
                runs = [run for run in records if (run["arm"], run["parameters"]) == group]
                ax.plot(
                    weight_bytes(runs[0]), mean(run["score"] for run in runs), look.marker, color=look.colour,
                    markersize=6, markeredgewidth=0,
                )  # fmt: skip
            keys.append(Line2D([], [], color=look.colour, marker=look.marker, linestyle="", label=label))
        keys.append(Line2D([], [], color=GREY, marker="o", fillstyle="none", linestyle="", label="published"))
        for who, points in PUBLISHED.items():
            ax.plot(
                *zip(*[(4 * size, score) for size, score in points], strict=True), "o", color=GREY, fillstyle="none"
            )
            up = {"Rusu 2015": -13, "Mnih 2015": 0}.get(who, -3)
            ax.annotate(
                who, (4 * points[0][0], points[0][1]), (-7, up), textcoords="offset points", ha="right", fontsize=8,
                color=GREY,
            )  # fmt: skip
        ax.set(xscale="log", xlim=(100, 1.7e7), ylim=(-7, 22.5), xlabel="bytes of weights (log scale)")
        ax.set_ylabel("score, greedy")
        ax.set_xticks([10.0**power for power in range(2, 8)], ["100 B", "", "10 kB", "", "1 MB", ""])
        ax.xaxis.set_minor_locator(NullLocator())
        told = shapes(study)[::-1]
        for row, (_, runs) in enumerate(told):
            for key, fill in (("score_sampled", "none"), ("score", "full")):
                values = [run[key] for run in runs]
                beside.plot(values, [row] * len(values), "|", color=GREY, markersize=5)
                beside.plot(mean(values), row, "o", color=look_of("distill-mixed").colour, fillstyle=fill)
        beside.set_yticks(range(len(told)), [words for words, _ in told], fontsize=9)
        beside.set_ylim(-0.7, len(told) - 0.3)
        beside.set(xlabel="score (hollow: sampled)", xlim=(min(beside.get_xlim()[0], -7), 22))
        return legend(figure, keys, width)


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        sys.exit(__doc__)
    told = {game: read(name) for name, game in STUDIES.items()}
    made = blocks(told)
    stale, homeless = [], set(made)
    for page in PAGES:
        was = now = (ROOT / page).read_text(encoding="utf-8")
        for name, text in made.items():
            now = put(now, name, text)
            homeless -= {name} if BLOCK.format(name=name, text=text) in now else set()
        if now != was:
            stale.append(page)
            if not arguments:
                (ROOT / page).write_text(now, encoding="utf-8")
    if homeless:
        sys.exit(f"no page has a place for {', '.join(sorted(homeless))}: see the first lines of {Path(__file__).name}")
    if arguments:
        print("\n".join(f"{page}: a table is not what the records say: make report" for page in stale) or "tables hold")
        return 1 if stale else 0
    save(score_by_size(told), IMAGES / "size_score.png")
    save(
        score_by_bytes(read("first/pong"), read("pilot-pong"), read("families"), smallest()), IMAGES / "score_bytes.png"
    )
    print("\n".join(f"{page}: tables renewed" for page in stale) or "tables hold")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
