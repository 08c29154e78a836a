"""The search: distil a few widths, screen them, bracket, bisect, confirm the smallest that will do."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from potstill import evaluation, telemetry
from potstill.compress.budget import TimeUp, deadline, training_seconds
from potstill.compress.config import CompressConfig, ladder, student_config
from potstill.compress.confirmation import NOTHING, Sample, measure, share, share_low
from potstill.envs import EnvConfig, Episode
from potstill.errors import InputError
from potstill.evaluation import Evaluation
from potstill.networks import resolve_device
from potstill.policies import load_policy
from potstill.storage.checkpoints import write_atomically
from potstill.storage.files import read_json
from potstill.storage.runs import Run
from potstill.study.execute import execute
from potstill.study.grid import Grid
from potstill.tasks import task_of
from potstill.training.runtime import Runtime

SEEDS = {"screen": 1, "confirm": 2, "teacher": 3, "random": 4}  # of the games: no student is confirmed by those it saw
FINISHING = 0.1  # share of the budget kept for ONNX, film and page
SLACK = 1.1  # on every estimate of time: what is begun and does not end in time is cut, and lost to this call


class Search:
    """What is known so far: games played, and what follows from them. Kept in games.json after every step.

    Args:
        began: when this call began, as `time.monotonic()` counts; its budget runs from there. Default: now.
    """

    def __init__(self, run: Run, config: CompressConfig, runtime: Runtime, began: float | None = None) -> None:
        own = run.path / "teacher"
        self.run, self.config, self.runtime = run, config, runtime
        self.teacher_path = own if own.exists() else Path(run.config["teacher"])
        self.teacher = load_policy(self.teacher_path)
        self.ladder = ladder(self.teacher.policy, config.max_parameters)
        self.points = has_points(self.teacher.env)
        self.games: dict[str, Evaluation] = {}
        self.errors: dict[str, str] = {}  # by width: why it could not be trained; the next call tries again
        self.confirmed: list[str] = []  # widths, in this order
        self.rates = {"game": 0.0, "training": 1.0}  # seconds a game; seconds a training over what was foreseen
        self._foreseen: list[float] = []  # seconds to train the smallest and the largest
        self.open = False  # whether the budget left widths untried that matter
        self.seconds: float = 0.0
        self._began: float = time.monotonic() if began is None else began
        self._path = run.path / "games.json"
        if self._path.exists():
            self._load()

    @property
    def spent(self) -> float:
        """Seconds of this call and earlier ones."""
        return self.seconds + time.monotonic() - self._began

    def until(self, keep: float = 0.0) -> float:
        """When the search has to be over, as `time.monotonic()` counts, `keep` seconds to spare."""
        return self._began - self.seconds + 60 * self.config.budget * (1 - FINISHING) - keep

    def save(self) -> None:
        games = {name: [list(episode) for episode in played.episodes] for name, played in self.games.items()}
        document = {"seconds": self.spent, "rates": self.rates, "confirmed": self.confirmed}
        write_atomically(self._path, json.dumps(document | {"games": games}, allow_nan=False).encode())

    def play(self, kind: str, width: str = "", keep: float = 0.0) -> Evaluation:
        """The games of the teacher, of random play, or of a student; played where they are not known yet.

        Raises:
            TimeUp: they did not end with `keep` seconds to spare.
        """
        name = f"{kind} {width}".strip()
        if name in self.games:
            return self.games[name]
        path = self.run.path / "runs" / self.run_name(width) if width else self.teacher_path
        loaded = load_policy(path, str(resolve_device(self.runtime.device)))
        episodes = self.config.games if kind in ("screen", "random") else self.config.confirm_games
        began = time.monotonic()
        start = evaluation.Start(self.teacher.env.max_frames) if kind == "random" else None  # to the end of any game
        games = evaluation.play(
            loaded.policy,
            loaded.env,
            episodes=episodes,
            seed=SEEDS[kind],
            start=start,
            threads=self.runtime.cores,
            alone=loaded.alone,
        )
        with (
            telemetry.Progress(f"play {name}", episodes, quiet=self.runtime.quiet, unit="games") as bar,
            deadline(loaded.policy, self.until(keep)),
        ):
            for so_far in games:
                bar.update(len(so_far.episodes), score=so_far.score)
                self.run.touch_lock()
        if kind != "random":
            self.rates["game"] = max(self.rates["game"], (time.monotonic() - began) / episodes)
        self.games[name] = so_far
        self.save()
        return so_far

    def train(self, widths: Sequence[str], foreseen: float, keep: float = 0.0) -> None:
        """Distils students side by side, one per core.

        Raises:
            TimeUp: they did not end with `keep` seconds to spare, and are saved.
        """
        began, folder = time.monotonic(), self.run.path / "runs"
        specs = self._grid(widths).specs()
        begun = any((folder / spec.name).exists() for spec in specs)  # by an earlier call: the clock tells nothing
        for ended in execute(specs, folder, self.runtime, study=self.run, until=self.until(keep)):
            if ended.error is not None:
                self.errors[ended.spec.config.network.width] = ended.error
        if not all(width in self.errors or self.trained(width) for width in widths):
            raise TimeUp
        if not begun:
            self.rates["training"] = (time.monotonic() - began) / foreseen
        self.save()

    def trained(self, width: str) -> bool:
        path = self.run.path / "runs" / self.run_name(width)
        return path.exists() and Run.open(path).status == "done"

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
        """Whether a width will do as far as is known; None where it has not been tried, or could not be."""
        if width in self.confirmed:
            return self.keeps("confirm", width)
        return self.keeps("screen", width) if f"screen {width}" in self.games else None

    def bracket(self) -> tuple[list[str], str | None]:
        """The widths still undecided, above the largest that will not do, and the smallest that will; None if none."""
        widths = [width for width, _ in self.ladder if width not in self.errors]
        verdicts = [self.verdict(width) for width in widths]
        high = verdicts.index(True) if True in verdicts else len(verdicts)
        low = max((place for place in range(high) if verdicts[place] is False), default=-1)
        return widths[low + 1 : high], widths[high] if high < len(widths) else None

    def affordable(self, undecided: Sequence[str], known: bool) -> tuple[list[str], float]:
        """The widths to train next, one per core, and the seconds foreseen; fewer or lower where time is short.

        Args:
            known: whether a larger width will do.
        """
        for places, count in product(range(len(undecided), 0, -1), range(self.runtime.cores, 0, -1)):
            widths = [undecided[place] for place in spread(places, count, known)]
            playing = self.rates["game"] * (self.config.games * len(widths) + self.config.confirm_games)
            foreseen = max(self.foresee(width) for width in widths)
            if self.time_for(foreseen * self.rates["training"] + playing):
                return widths, foreseen
        return [], 0.0

    def time_for(self, seconds: float) -> bool:
        return self.spent + SLACK * seconds <= 60 * self.config.budget * (1 - FINISHING)

    def foresee(self, width: str) -> float:
        """Seconds to train a width before this machine's speed is counted in, none where an earlier call has done it.

        Those of the smallest and the largest are measured; in between they grow with the parameters.
        """
        ends = (self.ladder[0], self.ladder[-1])
        if not self._foreseen:
            configs = (student_config(self.config, self.teacher, end) for end, _ in ends)
            self._foreseen = [training_seconds(config, self.teacher, self.runtime) for config in configs]
        if self.trained(width):
            return 0.0
        return float(np.interp(dict(self.ladder)[width], [size for _, size in ends], self._foreseen))

    def run_name(self, width: str) -> str:
        return self._grid([width]).specs()[0].name

    def _grid(self, widths: Sequence[str]) -> Grid:
        base = student_config(self.config, self.teacher, widths[0])
        return Grid((self.teacher_path,), None, tuple(widths), (base.lead,), (base.seed,), base)

    def _load(self) -> None:
        try:
            document = read_json(self._path)
            self.seconds, self.rates = (
                float(document["seconds"]),
                {key: float(value) for key, value in document["rates"].items()},
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

    kind: str  # teacher, random, train, screen, confirm or time
    width: str
    words: str


def steps(state: Search) -> Iterator[News]:
    """Looks for the smallest student. When it ends, `state` holds what was found.

    Each round trains as many widths as there are cores. When nothing is undecided, or no time is left, the smallest
    that screened well is confirmed; if that fails, the search goes on above it.

    Raises:
        InputError: the teacher is no better than random play, or there is no time for its games.
    """
    try:
        yield News("teacher", "", _scored("teacher", state.play("teacher")))
        if not state.points:
            yield News("random", "", _scored("random play", state.play("random")))
    except TimeUp:
        raise InputError(
            f"a budget of {state.config.budget:g} minutes is too short: the teacher's games alone take longer here"
        ) from None
    if measure(state.games["teacher"], state.points).value <= state.random.value:
        raise InputError("the teacher is no better than random play: there is nothing to keep")
    while True:
        undecided, chosen = state.bracket()
        confirming = SLACK * state.config.confirm_games * state.rates["game"]
        widths, foreseen = state.affordable(undecided, known=chosen is not None)
        if widths:
            yield News("train", "", f"training width {' and '.join(widths)}")
            keep = confirming if chosen is not None else 0.0
            try:
                state.train(widths, foreseen, keep)
                for width in widths:
                    if width not in state.errors:
                        state.play("screen", width, keep)
                    yield News("screen", width, _tried(state, width))
                continue
            except TimeUp:
                yield News("time", "", "time is up for this round: what it began is kept for a larger budget")
                undecided, chosen = state.bracket()
        state.open = bool(undecided)
        if chosen is None:
            return
        try:
            if not state.time_for(confirming / SLACK):
                raise TimeUp
            state.play("confirm", chosen)
        except TimeUp:
            state.open = True
            return
        state.confirmed.append(chosen)
        state.save()
        yield News("confirm", chosen, _tried(state, chosen, "confirm"))
        if state.keeps("confirm", chosen):
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


def spread(places: int, count: int, known: bool) -> list[int]:
    """Up to `count` of so many places to try, from 0.

    Evenly where something larger is known to do: each part left is about as large. Else the last is among them, for
    nothing would do if that did not, and the others lie evenly in the upper two thirds below: the smallest seldom do.
    """
    count = min(count, places)
    if known:
        return [round((places + 1) * (i + 1) / (count + 1)) - 1 for i in range(count)]
    below = (places - 1) // 3 if places - 1 - (places - 1) // 3 >= count - 1 else 0
    return [below + place for place in spread(places - 1 - below, count - 1, known=True)] + [places - 1]


def has_points(env: EnvConfig) -> bool:
    return env.atari and task_of(env).two_sided
