"""The search, from top to bottom: distil shapes, screen them, confirm one, go on downward until the budget is spent."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from potstill import evaluation, telemetry
from potstill.compress import confirmation
from potstill.compress.budget import EIGHT, RATES, Clock, TimeUp, deadline, training_seconds
from potstill.compress.choice import Trial, first_round, next_round
from potstill.compress.config import CompressConfig
from potstill.compress.confirmation import LOOKS, Confirmation, Sample
from potstill.compress.shapes import shapes, ways
from potstill.distill import DistillConfig
from potstill.envs import Episode
from potstill.errors import InputError
from potstill.evaluation import Evaluation, Start
from potstill.export import c
from potstill.load import load, origin_in
from potstill.networks import resolve_device
from potstill.report.compression import floored
from potstill.storage.checkpoints import write_atomically
from potstill.storage.files import read_json
from potstill.storage.runs import Run, read_document
from potstill.study.execute import execute
from potstill.study.plan import RunSpec
from potstill.tasks import task_of
from potstill.training.runtime import Runtime

SEEDS = {"screen": 1, "confirm": 2, "teacher": 3, "random": 4}  # of the games: no student is confirmed by those it saw
ANYTIME = 1 / 3  # share of the budget that a confirmation takes at most, where others can be trained
FEWEST = 0.1  # of the steps, where there is no time for all
GAIN = 1.1  # times the games of a confirmation so far, are worth another look


class News(NamedTuple):
    """What a step of the search found."""

    kind: str  # teacher, random, train, screen, confirm, time or end
    line: str


def steps(state: "Search") -> Iterator[News]:
    """Looks for the cheapest student. Whenever it yields, `state` holds what was found so far.

    The teacher plays. Then the first of these that can be done, again and again: one is confirmed that may well pass;
    one that is trained is screened; others are trained, one a core; and that in fewer steps, if need be.

    Raises:
        InputError: the teacher is no better than random play, or there is no time for its games.
    """
    try:
        for name, least in (("teacher", state.config.confirm_games), ("random", state.config.games)):
            if not (state.points and name == "random"):
                state.play(name, least)
                played = state.play(name, max(least, min(least << LOOKS - 1, state.clock.cheap)))
                yield News(name, _scored(name, played))
    except TimeUp:
        raise InputError(
            f"a budget of {state.config.budget:g} minutes is too short: the teacher's games alone take longer here; try"
            f" --budget {4 * state.config.budget:g}"
        ) from None
    if state.sample("teacher").value <= state.sample("random").value:
        raise InputError("the teacher is no better than random play: there is nothing to keep")
    while True:
        try:
            if student := state.next_confirmed():
                state.confirm(student)
                yield News("confirm", state.told(student))
            elif student := state.next_screened():
                state.screen(student)
                yield News("screen", state.told(student))
            elif trials := state.next_trained() or state.next_trained(FEWEST):
                state.fit(trials)
                yield News("train", f"training {' and '.join(map(state.label, trials))}")
                state.train(trials)
                yield from (News("screen", state.told(trial)) for trial in trials if trial in state.errors)
            else:
                break
        except TimeUp:
            yield News("time", "time is up for this round: what it began is kept for a larger budget")
    yield News("end", state.reason)


class Search:
    """What is known so far: games played, and what follows from them. Kept in games.json after every step.

    Args:
        began: when this call began, as `time.monotonic()` counts; its budget runs from there. Default: now.
    """

    def __init__(self, run: Run, config: CompressConfig, runtime: Runtime, began: float | None = None) -> None:
        self.run, self.config, self.runtime = run, config, runtime
        self.origin = origin_in(run.config, "teacher")
        self.teacher = load(self.origin)
        self.shapes, self.ways = shapes(self.teacher.policy, config), ways(config.base)
        self.points = self.teacher.env.atari and task_of(self.teacher.env).two_sided
        self.few = math.ceil(config.games / 4)  # games show who is far too weak
        self.clock = Clock(60 * config.budget, time.monotonic() if began is None else began)
        self.games: dict[str, Evaluation] = {}
        self.steps: dict[str, int] = {}  # by trial that was begun
        self.errors: dict[Trial, str] = {}  # why they could not be trained; the next call tries again
        self.confirmations: list[Confirmation] = []
        self.every = [Trial(place, way) for place in range(len(self.shapes)) for way in range(len(self.ways))]
        self.trained = {trial for trial in self.every if self._done(trial)}
        self._foreseen: list[float] = []  # seconds to train those of the least and the most work, as asked for
        self._path = run.path / "games.json"
        if self._path.exists():
            self._load()

    # What to do next

    def next_confirmed(self) -> Trial | None:
        """The student to confirm: of those that promise to pass the dearest, as it is the likeliest, and once there is
        an answer the cheapest.

        Where no other can be trained in full, one that may pass will do: for a first answer the dearest of all, for
        the few games of a screening tell less than size does.
        """
        students = [trial for trial in self.students if self.played("screen", trial)]
        promising = [trial for trial in students if self.promises(trial)]
        may = [] if self.more else [t for t in students if self.outcome(t) == "undecided" and self.affordable(t)]
        if self.chosen is None:
            return max(may or promising, default=None)
        return min(promising or may, default=None)

    def next_screened(self) -> Trial | None:
        """The student to screen: the dearest, and once there is an answer the cheapest."""
        students = [trial for trial in self.students if not self.played("screen", trial)]
        if not students or self.clock.games(self.clock.left) < self.few:
            return None
        return students[-1 if self.chosen is None else 0]

    def next_trained(self, least: float = 1.0) -> list[Trial]:
        """What to train, one a core, where there is time for `least` of the steps and then for games."""
        bound, untried = self.bound, self.untried
        tried = {trial.place for trial in (*self.trained, *self.errors) if trial.place < bound}
        fits = {trial for trial in untried if self.part(trial) >= least}
        if self.chosen is None and not tried:
            first = first_round(self.shapes, self.teacher.policy.size().parameters, self.runtime.cores)
            if least == 1 or fits.issuperset(first):  # rather these in fewer steps than others
                return first if fits.issuperset(first) else []
        return next_round(untried, fits, bound, max(tried, default=-1), self.runtime.cores)

    @property
    def more(self) -> bool:
        """Whether there is time to train another student in full."""
        return bool(self.next_trained())

    @property
    def chosen(self) -> Trial | None:
        """The cheapest student that is confirmed."""
        passed = {each.name for each in self.confirmations if each.passed}
        return min((trial for trial in self.trained if self.name(trial) in passed), default=None)

    @property
    def bound(self) -> int:
        """Place below which shapes are cheaper than the chosen one."""
        return len(self.shapes) if self.chosen is None else self.chosen.place

    @property
    def students(self) -> list[Trial]:
        """Those that are trained and cheaper than the chosen one, the cheapest first."""
        bound = self.bound
        return sorted(trial for trial in self.trained if trial.place < bound)

    @property
    def untried(self) -> list[Trial]:
        """The next way of each shape that is cheaper than the chosen one, the cheapest first."""
        due: dict[int, Trial] = {}
        bound = self.bound
        for trial in self.every:
            if trial.place < bound and trial not in self.trained and trial not in self.errors:
                due.setdefault(trial.place, trial)
        return list(due.values())

    @property
    def unfinished(self) -> bool:
        """Whether a larger budget could find more: shapes and ways are left, or games."""
        open_ = (not self.played("screen", t) or self.outcome(t) == "undecided" for t in self.students)
        return bool(self.untried) or any(open_)

    @property
    def stopped(self) -> str:
        """What ended the search: the budget, where that left something untried, or exhausted."""
        return "budget" if self.unfinished else "exhausted"

    @property
    def reason(self) -> str:
        """Why the search ended."""
        if self.bound == 0:
            return "stopped: the smallest shape of all will do"
        if self.unfinished:
            more = "another student" if self.untried else "more games"
            return f"stopped: what is left of {self.config.budget:g} minutes is too short for {more}"
        return f"stopped: every shape that is left was tried in {len(self.ways)} ways"

    # What the games say

    def sample(self, name: str, count: int = 0) -> Sample:
        """What these games come to, or would after `count`, if they went on like this."""
        if name == "random" and self.points:
            return confirmation.NOTHING
        found = confirmation.measure(self.games[name], self.points)
        return confirmation.foreseen(found, len(self.games[name].episodes), count) if count else found

    def kept(self, name: str, risk: float, count: int = 0) -> tuple[float, float]:
        """The share of the teacher's score that these games kept, and its lower bound; or would after `count`."""
        theirs = max(count, self.played("teacher")) if count else 0
        samples = self.sample(name, count), self.sample("teacher", theirs), self.sample("random")
        return confirmation.share(*samples), confirmation.share_low(*samples, 1.0 - risk)

    def screened(self, trial: Trial) -> tuple[float, float]:
        """As `kept`, of a student's first games, which claim nothing."""
        return self.kept(f"screen {self.name(trial)}", 1.0 - self.config.confidence)

    def confirmed(self, trial: Trial) -> Confirmation | None:
        """Its last confirmation, passed or not."""
        return next((each for each in reversed(self.confirmations) if each.name == self.name(trial)), None)

    def outcome(self, trial: Trial) -> str:
        """What is known of a student that has played. By what its upper bound says, which lies as far above the share
        as the lower one below, it keeps too little, or that is undecided."""
        if (found := self.confirmed(trial)) is not None:
            return "confirmed" if found.passed else "not confirmed"
        value, low = self.screened(trial)
        return "undecided" if 2 * value - low >= self.config.keep else "too little"

    def promises(self, trial: Trial) -> bool:
        """Whether a confirmation would pass, if all the games for which there is time went like those so far. One that
        did not may pass with more games, at the error rate of its next try."""
        if not (most := self.affordable(trial)):
            return False
        kind = "confirm" if self.played("confirm", trial) else "screen"
        risk = confirmation.risk_of_look(self.risk, last=True)
        return self.kept(f"{kind} {self.name(trial)}", risk, most)[1] >= self.config.keep

    @property
    def risk(self) -> float:
        """Error rate of the next confirmation."""
        return confirmation.next_risk(self.confirmations, self.config.confidence)

    def affordable(self, trial: Trial) -> int:
        """To how many games of a student and of the teacher a confirmation can go; 0 where those are hardly more than
        it has, or too few."""
        own, theirs, fewest = self.played("confirm", trial), self.played("teacher"), self.config.confirm_games
        room = self.clock.games(self.clock.left)
        most = [own + room if own + room <= theirs else (own + room + theirs) / 2, fewest << LOOKS - 1]
        if self.more:
            most.append(max(fewest, self.clock.games(ANYTIME * self.clock.budget) / 2))
        count = int(min(most))
        count = max(fewest, count // EIGHT * EIGHT) if count >= fewest else 0
        return count if count > GAIN * own else 0

    # What is done: each step is kept, and known to the next call

    def fit(self, trials: Sequence[Trial]) -> None:
        """Says how many steps trainings take: fewer where there is no time for all, unless they were begun."""
        for trial in trials:
            way = self.ways[trial.way]
            least = min(8 * way.num_envs, way.total_timesteps)  # that a distillation takes
            steps = math.ceil(min(1.0, self.part(trial)) * way.total_timesteps)
            self.steps.setdefault(self.name(trial), max(least, steps))
        self.save()

    def train(self, trials: Sequence[Trial]) -> None:
        """Distils students side by side, one per core.

        Raises:
            TimeUp: they did not end in time, and are saved.
        """
        began, folder = time.monotonic(), self.run.path / "runs"
        begun = any((folder / self.name(trial)).exists() for trial in trials)  # before: the clock tells nothing
        specs = [
            RunSpec(self.name(t), f"distill-{self.ways[t.way].lead}", self.distillation(t), self.origin) for t in trials
        ]
        for ended in execute(specs, folder, self.runtime, study=self.run, until=self.clock.end):
            if ended.error is not None:
                self.errors |= {trial: ended.error for trial in trials if self.name(trial) == ended.spec.name}
        done = [trial for trial in trials if self._done(trial)]
        self.trained.update(done)
        if not all(trial in done or trial in self.errors for trial in trials):
            raise TimeUp
        if len(done) == len(trials) and not begun:
            took = {t: read_document(folder / self.name(t) / "result.json")["wall_seconds"] for t in done}
            longest = max(done, key=lambda trial: took[trial])
            self.clock.start = max(0.0, time.monotonic() - began - took[longest])
            self.clock.training = took[longest] / self.foresee(longest)
        self.save()

    def screen(self, trial: Trial) -> None:
        """Plays a student's first games: a few, and more where it may do and there is time to train others.

        Raises:
            TimeUp: there was not.
        """
        name = f"screen {self.name(trial)}"
        self.play(name, self.few)
        if self.more and self.outcome(trial) == "undecided":
            self.play(name, max(self.config.games, min(4 * self.config.games, self.clock.cheap)))

    def confirm(self, trial: Trial) -> None:
        """Teacher and student play fresh games, those of an earlier confirmation included, until it is decided.

        It passes at any of several looks: after given numbers of games, and when there is no time for more. Scores have
        no say in when they come, but it is given up where the student has kept less than it is to keep.

        Raises:
            TimeUp: there was no time for any games.
        """
        name, risk, have = f"confirm {self.name(trial)}", self.risk, self.played("confirm", trial)
        most = self.affordable(trial)  # once: how long games take may hang on their scores
        looks = [self.config.confirm_games << number for number in range(LOOKS)]
        for look in (look for look in looks if look > have):
            with suppress(TimeUp):
                if (count := min(look, most)) > self.played("confirm", trial):
                    self.play("teacher", count)
                    self.play(name, count)
            if (played := self.played("confirm", trial)) == have:
                raise TimeUp
            last = played < look or look == looks[-1] or self.kept(name, risk)[0] < self.config.keep
            part = confirmation.risk_of_look(risk, last)
            value, low = self.kept(name, part)
            if last or low >= self.config.keep:
                break
        passed = low >= self.config.keep
        self.confirmations.append(Confirmation(self.name(trial), value, max(low, -99.0), part, passed))
        self.save()

    def play(self, name: str, count: int) -> Evaluation:
        """At least `count` games of `teacher`, of `random` play, or `screen` or `confirm` of a trial, known ones first.

        Raises:
            TimeUp: they did not end in time.
        """
        kind, _, trial = name.partition(" ")
        known = self.games.get(name)
        before = [] if known is None else known.episodes
        if known is not None and len(before) >= count:
            return known
        place = self.run.path / "runs" / trial if trial else self.origin
        loaded = load(place, device=str(resolve_device(self.runtime.device)))
        began, episodes, until = time.monotonic(), count - len(before), self.clock.end
        bits = self.config.base.bits if trial else 32
        games = evaluation.play(
            c.player(loaded, bits) if bits < 32 else loaded.policy,  # integers are scored as they are written
            loaded.env,
            episodes=episodes,
            seed=SEEDS[kind] + 10 * len(before),
            start=Start(self.teacher.env.max_frames) if kind == "random" else None,  # to the end of any game
            threads=self.runtime.cores,
            alone=loaded.alone,
        )
        with (
            telemetry.Progress(f"play {name}", episodes, quiet=self.runtime.quiet, unit="games") as bar,
            deadline(loaded.policy, until),
        ):
            for so_far in games:
                bar.update(len(so_far.episodes), score=so_far.score)
                self.run.touch_lock()
                if time.monotonic() > until:
                    raise TimeUp
        if kind != "random" and (episodes >= self.config.games or not self.clock.game):  # of fewer, each takes longer
            self.clock.game = max(self.clock.game, (time.monotonic() - began) / episodes)
        so_far.episodes[:0] = before
        self.games[name] = so_far
        self.save()
        return so_far

    def played(self, kind: str, trial: Trial | None = None) -> int:
        """How many games of a kind there are."""
        known = self.games.get(kind if trial is None else f"{kind} {self.name(trial)}")
        return 0 if known is None else len(known.episodes)

    # How long a training takes

    def part(self, trial: Trial) -> float:
        """How much of its training there is time for, before its first games and a confirmation."""
        return self.clock.part(self.foresee(trial), self.few + self.config.confirm_games)

    def foresee(self, trial: Trial) -> float:
        """Seconds to train, before this machine's speed is counted in.

        Those of the shapes with the fewest and the most multiply-adds are measured; others lie between.
        """
        ordered = sorted(self.shapes, key=lambda shape: shape.size.macs)
        ends = ordered[0], ordered[-1]
        if not self._foreseen:
            asked = (replace(self.config.base, network=shape.network, sparsity=shape.sparsity) for shape in ends)
            self._foreseen = [training_seconds(config, self.teacher, self.runtime) for config in asked]
        work = [shape.size.macs for shape in ends]
        seconds = float(np.interp(self.shapes[trial.place].size.macs, work, sorted(self._foreseen)))
        return seconds * self.distillation(trial).total_timesteps / self.config.base.total_timesteps

    # Names, and what is kept

    def name(self, trial: Trial) -> str:
        """Of its run directory and its games."""
        return f"{self.shapes[trial.place].name}_way-{trial.way + 1}"

    def label(self, trial: Trial) -> str:
        shape, steps = self.shapes[trial.place], self.distillation(trial).total_timesteps
        return f"{shape.name}, {shape.size.parameters:,} parameters, way {trial.way + 1} of {steps:,} steps"

    def distillation(self, trial: Trial) -> DistillConfig:
        shape, way = self.shapes[trial.place], self.ways[trial.way]
        steps = self.steps.get(self.name(trial), way.total_timesteps)
        return replace(way, network=shape.network, sparsity=shape.sparsity, total_timesteps=steps)

    def told(self, trial: Trial) -> str:
        """What is known of a trial, in one line."""
        if trial in self.errors:
            return f"{self.label(trial)}: failed: {self.errors[trial]}"
        value, low = self.screened(trial) if (found := self.confirmed(trial)) is None else (found.share, found.low)
        bound = f"at least {floored(low)} %" if math.isfinite(low) else "no telling how little"
        return f"{self.label(trial)}: keeps {100 * value:.1f} %, {bound}: {self.outcome(trial)}"

    def save(self) -> None:
        games = {name: [list(episode) for episode in played.episodes] for name, played in self.games.items()}
        rates = {name: getattr(self.clock, name) for name in RATES}
        document = {"seconds": self.clock.spent, "rates": rates, "steps": self.steps, "games": games}
        document["confirmations"] = [each._asdict() for each in self.confirmations]
        write_atomically(self._path, json.dumps(document, allow_nan=False).encode())

    def _load(self) -> None:
        try:
            document = read_json(self._path)
            self.clock.began -= float(document["seconds"])
            for name in RATES:
                setattr(self.clock, name, float(document["rates"][name]))
            self.steps = {name: int(steps) for name, steps in document["steps"].items()}
            self.confirmations = [Confirmation(**row) for row in document["confirmations"]]
            for name, rows in document["games"].items():
                seed = SEEDS[name.partition(" ")[0]]
                self.games[name] = Evaluation(self.teacher.env, "greedy", seed, 0, [Episode(*row) for row in rows])
        except (InputError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self._path} is damaged: choose another --out") from error

    def _done(self, trial: Trial) -> bool:
        path = self.run.path / "runs" / self.name(trial)
        return path.exists() and Run.open(path).status == "done"


def _scored(who: str, played: Evaluation) -> str:
    summary = played.summary()
    low, high = summary["ci95"] or (math.nan, math.nan)
    return f"{who}: {summary['mean']:.2f} ({low:.2f} to {high:.2f}) in {summary['distinct']} distinct games"
