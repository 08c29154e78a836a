"""The search: distil a few widths, screen them, bracket, bisect, confirm the smallest that will do."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from potstill import evaluation, telemetry
from potstill.checkpoints import write_atomically
from potstill.compress.budget import training_seconds
from potstill.compress.config import CompressConfig, ladder, student
from potstill.compress.confirmation import NOTHING, Sample, measure, share, share_low
from potstill.envs import EnvConfig, Episode
from potstill.errors import InputError
from potstill.evaluation import Evaluation
from potstill.files import read_json
from potstill.jobs import Machine
from potstill.networks import resolve_device
from potstill.policies import load_policy
from potstill.runs import Run
from potstill.study.execute import execute
from potstill.study.grid import Grid
from potstill.watch import TWO_SIDED

SEEDS = {"screen": 1, "confirm": 2, "teacher": 3, "random": 4}  # of the games: no student is confirmed by those it saw
FINISHING = 0.1  # share of the budget kept for ONNX, film and page
SLACK = 1.2  # on every estimate of time


class Search:
    """What is known so far: games played, and what follows from them. Kept in games.json after every step."""

    def __init__(self, run: Run, config: CompressConfig, machine: Machine) -> None:
        own = run.path / "teacher"
        self.run, self.config, self.machine = run, config, replace(machine, evaluate=0)
        self.teacher_path = own if own.exists() else Path(run.config["teacher"])
        self.teacher = load_policy(self.teacher_path)
        self.ladder = ladder(self.teacher.policy, config.max_parameters)
        self.points = has_points(self.teacher.env)
        self.games: dict[str, Evaluation] = {}
        self.errors: dict[str, str] = {}  # by width: why it could not be trained; the next call tries again
        self.confirmed: list[str] = []  # widths, in this order
        self.pace = {"game": 0.0, "training": 1.0}  # seconds a game; seconds a training over what was foreseen
        self._foreseen: dict[str, float] = {}
        self.open = False  # whether the budget left widths untried that matter
        self.seconds: float = 0.0
        self._began: float = time.monotonic()
        self._path = run.path / "games.json"
        if self._path.exists():
            self._load()

    @property
    def spent(self) -> float:
        """Seconds of this call and earlier ones."""
        return self.seconds + time.monotonic() - self._began

    def save(self) -> None:
        games = {name: [list(episode) for episode in played.episodes] for name, played in self.games.items()}
        document = {"seconds": self.spent, "pace": self.pace, "confirmed": self.confirmed}
        write_atomically(self._path, json.dumps(document | {"games": games}, allow_nan=False).encode())

    def play(self, kind: str, width: str = "") -> Evaluation:
        """The games of the teacher, of random play, or of a student; played where they are not known yet."""
        name = f"{kind} {width}".strip()
        if name in self.games:
            return self.games[name]
        path = self.run.path / "runs" / self.cell_name(width) if width else self.teacher_path
        loaded = load_policy(path, str(resolve_device(self.machine.device)))
        episodes = self.config.games if kind in ("screen", "random") else self.config.confirm_games
        began = time.monotonic()
        start = evaluation.Start(self.teacher.env.max_frames) if kind == "random" else None  # to the end of any game
        games = evaluation.play(
            loaded.policy, loaded.env, episodes=episodes, seed=SEEDS[kind], start=start, threads=self.machine.cores
        )
        with telemetry.Progress(f"play {name}", episodes, quiet=self.machine.quiet, unit="games") as bar:
            for so_far in games:
                bar.update(len(so_far.episodes))
                self.run.touch_lock()
        if kind != "random":
            self.pace["game"] = max(self.pace["game"], (time.monotonic() - began) / episodes)
        self.games[name] = so_far
        self.save()
        return so_far

    def train(self, widths: Sequence[str], foreseen: float) -> None:
        """Distils students side by side, one per core."""
        began, folder = time.monotonic(), self.run.path / "runs"
        cells = self._grid(widths).cells()
        begun = any((folder / cell.name).exists() for cell in cells)  # by an earlier call: the clock tells nothing
        for ended in execute(cells, folder, self.machine, study=self.run):
            if ended.error is not None:
                self.errors[ended.cell.config.network.width] = ended.error
        if not begun:
            self.pace["training"] = (time.monotonic() - began) / foreseen
        self.save()

    def level(self, number: int) -> float:
        """Confidence of confirmation `number`, from 0: their error rates add up to 1 - confidence at most."""
        return 1.0 - math.ldexp(1.0 - self.config.confidence, -number - 1)

    def share(self, kind: str, width: str) -> tuple[float, float] | None:
        """The share a student keeps and its lower bound; None where it has not played.

        Of a confirmation, the bound is at the level it was given. Of a screening, it is the bound that the first
        confirmation would find if its games went like these.
        """
        played = self.games.get(f"{kind} {width}")
        if played is None:
            return None
        student, level = measure(played, self.points), self.level(0)
        if kind == "confirm":
            level = self.level(self.confirmed.index(width))
        elif student.df + 1 == len(played.episodes):  # every game a new one: more would tell more
            more = self.config.confirm_games
            student = Sample(student.value, student.error * math.sqrt(len(played.episodes) / more), more - 1.0)
        others = measure(self.games["teacher"], self.points), self.random
        return share(student, *others), share_low(student, *others, level)

    @property
    def random(self) -> Sample:
        return NOTHING if self.points else measure(self.games["random"], points=False)

    def keeps(self, kind: str, width: str) -> bool:
        found = self.share(kind, width)
        return found is not None and found[1] >= self.config.keep - 1e-9

    def verdict(self, width: str) -> bool | None:
        """Whether a width will do as far as is known; None where it has not been tried."""
        if width in self.errors:
            return False
        if width in self.confirmed:
            return self.keeps("confirm", width)
        return self.keeps("screen", width) if f"screen {width}" in self.games else None

    def bracket(self) -> tuple[int, int]:
        """Places on the ladder: the largest that will not do below the smallest that will; its ends where none."""
        verdicts = [self.verdict(width) for width, _ in self.ladder]
        high = verdicts.index(True) if True in verdicts else len(verdicts)
        return max((place for place in range(high) if verdicts[place] is False), default=-1), high

    def time_for(self, seconds: float) -> bool:
        return self.spent + SLACK * seconds <= 60 * self.config.budget * (1 - FINISHING)

    def foresee(self, widths: Sequence[str]) -> float:
        """Seconds to train these side by side, before this machine's pace is counted in."""
        for width in widths:
            if width not in self._foreseen:
                config = student(self.config, self.teacher, width)
                self._foreseen[width] = training_seconds(config, self.teacher, self.machine)
        return max(self._foreseen[width] for width in widths)

    def cell_name(self, width: str) -> str:
        return self._grid([width]).cells()[0].name

    def _grid(self, widths: Sequence[str]) -> Grid:
        base = student(self.config, self.teacher, widths[0])
        return Grid((self.teacher_path,), tuple(widths), (base.lead,), (base.seed,), base)

    def _load(self) -> None:
        try:
            document = read_json(self._path)
            self.seconds, self.pace = (
                float(document["seconds"]),
                {key: float(value) for key, value in document["pace"].items()},
            )
            self.confirmed = list(document["confirmed"])
            for name, rows in document["games"].items():
                seed = SEEDS[name.partition(" ")[0]]
                played = Evaluation(self.teacher.env, "greedy", seed, 0, [Episode(*row) for row in rows])
                self.games[name] = played
        except (InputError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self._path} is damaged: choose another --out") from error


class News(NamedTuple):
    """What a step of the search found."""

    kind: str  # teacher, random, train, screen or confirm
    width: str
    words: str


def steps(state: Search) -> Iterator[News]:
    yield News("teacher", "", _scored("teacher", state.play("teacher")))
    if not state.points:
        yield News("random", "", _scored("random play", state.play("random")))
    if measure(state.games["teacher"], state.points).value <= state.random.value:
        raise InputError("the teacher is no better than random play: there is nothing to keep")
    confirming = state.config.confirm_games
    while True:
        low, high = state.bracket()
        widths = [state.ladder[place][0] for place in between(low, high, state.machine.cores)]
        undecided = bool(widths)
        while widths:
            foreseen = state.foresee(widths)
            games = state.config.games * len(widths) + confirming
            if state.time_for(foreseen * state.pace["training"] + games * state.pace["game"]):
                break
            widths.pop()  # the largest, which takes longest
        if widths:
            yield News("train", "", f"training width {' and '.join(widths)}")
            state.train(widths, foreseen)
            for width in widths:
                if width not in state.errors:
                    state.play("screen", width)
                yield News("screen", width, _tried(state, width))
            continue
        state.open = undecided
        if high == len(state.ladder):
            return
        width = state.ladder[high][0]
        if not state.time_for(confirming * state.pace["game"]):
            state.open = True
            return
        state.play("confirm", width)
        state.confirmed.append(width)
        state.save()
        yield News("confirm", width, _tried(state, width, "confirm"))
        if state.keeps("confirm", width):
            return


def _scored(who: str, played: Evaluation) -> str:
    summary = played.summary()
    low, high = summary["ci95"] or (math.nan, math.nan)
    return f"{who}: {summary['mean']:.2f} ({low:.2f} to {high:.2f}) in {summary['distinct']} distinct games"


def _tried(state: Search, width: str, kind: str = "screen") -> str:
    label = f"width {width}, {dict(state.ladder)[width]:,} parameters"
    if width in state.errors:
        return f"{label}: failed: {state.errors[width]}"
    found = state.share(kind, width)
    assert found is not None
    enough = {"screen": ("promising", "too little"), "confirm": ("confirmed", "not confirmed")}[kind]
    bound = f"at least {found[1]:.1%}" if math.isfinite(found[1]) else "no telling how little"
    return f"{label}: keeps {found[0]:.1%}, {bound}: {enough[not state.keeps(kind, width)]}"


def between(low: int, high: int, count: int) -> list[int]:
    """Up to `count` places that part those strictly between `low` and `high` evenly."""
    count = min(count, high - low - 1)
    return [low + round((high - low) * (i + 1) / (count + 1)) for i in range(count)]


def has_points(env: EnvConfig) -> bool:
    return env.atari and env.id in TWO_SIDED
