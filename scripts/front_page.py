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
from matplotlib.ticker import NullLocator
from numpy.random import default_rng

from potstill.analysis.scaling import Bounded
from potstill.analysis.statistics import permutation_test
from potstill.arms import look_of
from potstill.report import tables
from potstill.report.answers import answer
from potstill.report.drawing import canvas, key_of, legend, same_heights
from potstill.report.figures import STYLE, WIDTH, save, short
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
PAGES = ("README.md", "docs/results.md", "data/results/first/README.md")
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
    print("\n".join(f"{page}: tables renewed" for page in stale) or "tables hold")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
