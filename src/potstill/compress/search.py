"""The search, from top to bottom: distil shapes, screen them, confirm one, go on downward until the budget is spent."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, repeat, zip_longest
from typing import NamedTuple

import numpy as np

from potstill import evaluation, telemetry
from potstill.compress.budget import TimeUp, deadline, training_seconds
from potstill.compress.config import CompressConfig
from potstill.compress.confirmation import NOTHING, Sample, keeps, measure, share, share_low
from potstill.compress.shapes import cost_of, shapes, ways
from potstill.distill import DistillConfig
from potstill.envs import EnvConfig, Episode
from potstill.errors import InputError
from potstill.evaluation import Evaluation, Start
from potstill.export import c
from potstill.load import load, origin_in
from potstill.networks import resolve_device
from potstill.storage.checkpoints import write_atomically
from potstill.storage.files import read_json
from potstill.storage.runs import Run, read_document
from potstill.study.execute import execute
from potstill.study.plan import RunSpec
from potstill.tasks import task_of
from potstill.training.runtime import Runtime

SEEDS = {"screen": 1, "confirm": 2, "teacher": 3, "random": 4}  # of the games: no student is confirmed by those it saw
FINISHING = 0.1  # share of the budget kept for ONNX, card, film and page
SLACK = 1.1  # on every estimate of time: what is begun and does not end in time is cut, and lost to this call
ANYTIME = 1 / 3  # share of the budget after which a first answer is to be there
SCREENING = (0.25, 1, 4)  # times its games: each where the student may do by those before, and where there is time
CHEAP = 0.02  # share of the budget for games that are no more than welcome
AMPLE = 15  # times smaller than a teacher, students mostly keep its score (Rusu et al. 2015, "Policy Distillation")
PRUNED = 2  # times as small, those may be of which most weights are zero
HALF = 0.6  # of a size is about a half of it, where sizes are half an octave apart
PROMPT = 2  # times as long as the quickest training, those of a first round may take
LOOKS = 5  # at a confirmation, each after twice as many games as the one before
FIRST = 2 / 3  # of the error rate that is left, for the next confirmation
EARLY = 0.1  # of a confirmation's error rate, for all its looks but the last
FEWEST = 0.1  # of the steps, where there is no time for all of them


class Trial(NamedTuple):
    """A shape, distilled in one way."""

    place: int  # of the shape, from the cheapest
    way: int


class Confirmation(NamedTuple):
    """What a student's fresh games came to, when they had been played."""

    name: str  # of the trial
    share: float
    low: float  # not below -99, for JSON has no infinity
    risk: float  # the error rate it was given
    passed: bool


class News(NamedTuple):
    """What a step of the search found."""

    kind: str  # teacher, random, train, screen, confirm, time or end
    line: str


def steps(state: "Search") -> Iterator[News]:
    """Looks for the cheapest student. Whenever it yields, `state` holds what was found so far.

    The teacher plays. Then, round by round, as many trials as there are cores are trained and screened. One that
    promises to do is confirmed: at once where nothing is confirmed yet, and then the dearest, or where that takes next
    to no time, else when no shape is left to bisect. So it goes on downward until the budget is spent or nothing is
    left to try. Where no time is left to train, one is confirmed that may do, though its games do not promise it.

    Raises:
        InputError: the teacher is no better than random play, or there is no time for its games.
    """
    try:
        for kind, least in (("teacher", state.config.confirm_games), ("random play", state.config.games)):
            name = kind.partition(" ")[0]
            if not (state.points and name == "random"):
                state.play(name, least)
                yield News(name, _scored(kind, state.play(name, max(least, state.cheap(least << LOOKS - 1)))))
    except TimeUp:
        raise InputError(
            f"a budget of {state.config.budget:g} minutes is too short: the teacher's games alone take longer here"
        ) from None
    if state.samples("teacher")[0].value <= state.random.value:
        raise InputError("the teacher is no better than random play: there is nothing to keep")
    while True:
        trials, bisecting = state.next_trials()
        hope, soon = state.hope(), 0 < state.confirming() <= CHEAP * 60 * state.config.budget
        if hope is not None and (state.chosen is None or soon or not (trials and bisecting)):
            try:
                state.confirm(hope)
            except TimeUp:
                state.stopped = "budget"
                break
            yield News("confirm", state.told(hope))
        elif trials:
            if due := [trial for trial in trials if not state.trained(trial)]:
                few = "" if state.rates["steps"] == 1 else f", in {state.rates['steps']:.0%} of the steps"
                yield News("train", f"training {' and '.join(map(state.label, due))}{few}")
            try:
                state.train(trials)
                for trial in sorted(trials, reverse=state.chosen is None):
                    state.screen(trial)
                    yield News("screen", state.told(trial))
                    if trial == state.hope():  # others play where its confirmation fails, or then
                        break
            except TimeUp:
                yield News("time", "time is up for this round: what it began is kept for a larger budget")
        else:
            break
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
        self.teacher_cost = cost_of(self.teacher.policy, config)
        self.points = has_points(self.teacher.env)
        self.games: dict[str, Evaluation] = {}
        self._samples: dict[tuple[str, int], Sample] = {}  # by name and number of games
        self.errors: dict[str, str] = {}  # by trial: why it could not be trained; the next call tries again
        self.confirmations: list[Confirmation] = []
        # Seconds a game and to start a process; seconds of a training over what was foreseen; share of the steps.
        self.rates = {"game": 0.0, "start": 0.0, "training": 1.0, "steps": 1.0}
        self.stopped = "exhausted"  # or budget, where that left something untried
        self.seconds: float = 0.0
        self._foreseen: list[float] = []  # seconds to train those of the least and the most work, as asked for
        self._began: float = time.monotonic() if began is None else began
        self._path = run.path / "games.json"
        if self._path.exists():
            self._load()

    # What to do next

    def next_trials(self) -> tuple[list[Trial], bool]:
        """What to train, one to a core, and whether it bisects. Nothing where no time is left for any.

        What is trained and has not played comes before all. While nothing will do: a first round, which on one core
        takes two; then the most promising another way, and untried ones from the dearest down. Below one that will do:
        the untried shapes above the dearest that will not are bisected. Then, for score need not grow with size, shapes
        below that and further ways are tried, the nearest and the least tried first.
        """
        cores, every = self.runtime.cores, len(self.shapes)
        bound = min((place for place in range(every) if self.will_do(place)), default=every)
        candidates = [trial for trial in self.untried() if trial.place < bound]
        seen, confirming = [trial.way for trial in candidates if trial.way], self.confirming()
        fits = [trial for trial in candidates if self.time_for(self.duration(trial), confirming)]
        first: list[Trial] = []
        if bound == every and len(seen) < 2:
            first = self.first_round([trial for trial in (fits if seen else candidates) if not trial.way])
            if not seen and self.left > 0 and not set(first) <= set(fits):  # so that something is tried
                self.shorten(first)
                fits = first
        self.stopped = "budget" if candidates and not fits else "exhausted"
        if ready := [trial for trial in fits if self.trained(trial)]:
            return ready, True
        if first and set(first) <= set(fits):
            return first, True
        untried = [trial for trial in fits if not trial.way]
        if bound == every:
            again = sorted((t for t in fits if t.way), key=lambda t: (-self._best_share(t.place), -t.place))
            fresh = list(reversed(untried))
            turns = (fresh, again) if len(seen) <= sum(seen) - len(seen) + 1 else (again, fresh)
            both = chain.from_iterable(zip_longest(*turns))
            return [trial for trial in both if trial is not None][:cores], False
        low = max((place for place in range(bound) if self.tried(place)), default=-1)
        if between := [trial for trial in untried if trial.place > low]:
            return [between[at] for at in spread(len(between), cores)], True
        return sorted(fits, key=lambda t: (bound - t.place + t.way, t.way))[:cores], False

    def first_round(self, untried: list[Trial]) -> list[Trial]:
        """Of these, and of those that are soon trained, the simplest shape and some in the middle.

        Of an image, of which a budget is a few rounds, the dearest that is much smaller than the teacher, which is
        likely to do, the dearest of about half its size, and so on.
        """
        seconds, cores = {trial: self.duration(trial) for trial in untried}, self.runtime.cores
        soon = [trial for trial in untried if seconds[trial] <= PROMPT * min(seconds.values())]
        if simplest := [trial for trial in soon if self.shapes[trial.place].name == "linear"]:
            rest = [trial for trial in soon if trial not in simplest]
            return [*simplest, *(rest[place] for place in spread(len(rest), cores - 1))]
        most = self.teacher_cost / (AMPLE * (PRUNED if self.shapes[0].sparsity else 1))
        small = [trial for trial in soon if self.shapes[trial.place].cost <= most] or soon
        found = [trial for trial in map(Trial, range(len(self.shapes)), repeat(0)) if self.tried(trial.place)]
        for trial in reversed(small):  # on one core after the one found
            if not found or self.shapes[trial.place].cost <= HALF * self.shapes[found[-1].place].cost:
                found.append(trial)
        return sorted([trial for trial in found if trial in untried][:cores])

    def shorten(self, trials: list[Trial]) -> None:
        """All trainings from now on take fewer steps, so that there is time for these; unless one was begun."""
        if not any(map(self.begun, trials)):
            longest = max(map(self.foresee, trials)) * self.rates["training"]
            beside = max(map(self.duration, trials)) - longest
            self.rates["steps"] *= min(1.0, max(FEWEST, (self.left / SLACK - beside) / longest))
            self.plan()
            self.save()  # before a run is made with these steps

    def plan(self) -> None:
        """The ways, in as many steps as there is time for."""
        steps = math.ceil(self.rates["steps"] * self.config.base.total_timesteps)
        self.ways = ways(replace(self.config.base, total_timesteps=steps))

    def hope(self) -> Trial | None:
        """The student to confirm: the dearest that promises to do, for it is the likeliest, and then the cheapest.

        Where no other is trained any more, the best of those that may do.
        """
        found = [trial for trial in self._unconfirmed() if self.needed(trial) is not None]
        if found:
            return found[-1 if self.chosen is None else 0]
        if self.more:
            return None
        may = [
            t
            for t in self._unconfirmed()
            if self.confirmation(t) is None and self.may_do(t) and self.look(self.affordable(t), 0)
        ]
        return max(may, key=lambda trial: self.shares(f"screen {self.name(trial)}", self.risk)[0], default=None)

    def _unconfirmed(self) -> list[Trial]:
        """Screened students that are cheaper than the chosen one, the cheapest first."""
        places = range(len(self.shapes) if self.chosen is None else self.chosen.place)
        trials = [Trial(place, way) for place in places for way in range(self.tried(place))]
        return [trial for trial in trials if f"screen {self.name(trial)}" in self.games]

    @property
    def chosen(self) -> Trial | None:
        """The cheapest student that is confirmed."""
        trials = (Trial(place, way) for place in range(len(self.shapes)) for way in range(len(self.ways)))
        return next((trial for trial in trials if self._confirmed(trial)), None)

    @property
    def reason(self) -> str:
        """Why the search ended."""
        if self.stopped == "budget":
            return f"stopped: what is left of {self.config.budget:g} minutes is too short for another student"
        if self.chosen is not None and self.chosen.place == 0:
            return "stopped: the smallest shape of all will do"
        return f"stopped: every shape that is left was tried in {len(self.ways)} ways"

    def untried(self) -> list[Trial]:
        """The next way of each shape that is cheaper than the chosen one, the cheapest first."""
        places = range(len(self.shapes) if self.chosen is None else self.chosen.place)
        return [Trial(place, way) for place in places if (way := self.tried(place)) < len(self.ways)]

    @property
    def more(self) -> bool:
        """Whether there is time to train another student."""
        return any(self.time_for(self.duration(trial), 0.0) for trial in self.untried() if not self.trained(trial))

    def tried(self, place: int) -> int:
        """In how many ways a shape was tried."""
        names = (self.name(Trial(place, way)) for way in range(len(self.ways)))
        return sum(f"screen {name}" in self.games or name in self.errors for name in names)

    def will_do(self, place: int) -> bool:
        """Whether a shape is confirmed, or promises to be."""
        trials = [Trial(place, way) for way in range(self.tried(place))]
        return any(self._confirmed(trial) or self.needed(trial) is not None for trial in trials)

    def confirmation(self, trial: Trial) -> Confirmation | None:
        """Its last one."""
        return next((each for each in reversed(self.confirmations) if each.name == self.name(trial)), None)

    def _confirmed(self, trial: Trial) -> bool | None:
        """Whether its confirmation passed; None before it."""
        found = self.confirmation(trial)
        return None if found is None else found.passed

    def _best_share(self, place: int) -> float:
        found = (self.screened(Trial(place, way)) for way in range(self.tried(place)))
        return max((each[0] for each in found if each is not None), default=-math.inf)

    # How it is decided

    @property
    def risk(self) -> float:
        """Error rate of the next confirmation. That of one that passed is handed on: all keep to 1 - confidence.

        Source: the fallback procedure of Wiens 2003, as Tian and Ramdas 2021, "Online control of the familywise error
        rate", section 3, have it, with weights 2/3, 2/9, 2/27 ...
        """
        left, risk = 1.0 - self.config.confidence, FIRST * (1.0 - self.config.confidence)
        for each in self.confirmations:
            left *= 1.0 - FIRST
            risk = FIRST * left + (risk if each.passed else 0.0)
        return risk

    @property
    def random(self) -> Sample:
        return NOTHING if self.points else self._sample("random")

    def samples(self, name: str, count: int = 0) -> tuple[Sample, Sample, Sample]:
        """What student, teacher and random play score, after `count` games of the first two if they go on like these.

        Where games repeat themselves, more would tell no more.
        """
        return self._sample(name, count), self._sample("teacher", count), self.random

    def keeps(self, name: str, risk: float, count: int = 0) -> bool:
        return keeps(self.config.keep, *self.samples(name, count), 1.0 - risk)

    def shares(self, name: str, risk: float, count: int = 0) -> tuple[float, float]:
        """The share of the teacher's score that these games kept, and its lower bound."""
        samples = self.samples(name, count)
        return share(*samples), share_low(*samples, 1.0 - risk)

    def screened(self, trial: Trial) -> tuple[float, float] | None:
        """The share, and the bound that a confirmation would find if its games went like these; None before them."""
        name = f"screen {self.name(trial)}"
        if name not in self.games:
            return None
        return self.shares(name, self.risk, self.needed(trial) or self.config.confirm_games)

    def may_do(self, trial: Trial) -> bool:
        """Whether its screening leaves that open: by its upper bound, as far above as the lower one below."""
        value, low = self.shares(f"screen {self.name(trial)}", self.risk)
        return 2 * value - low >= self.config.keep

    def needed(self, trial: Trial) -> int | None:
        """After how many games a confirmation would pass, if they went like those so far; None where it would not.

        One that did not pass may with more games, at the error rate of its next try.
        """
        name, first = f"confirm {self.name(trial)}", self.config.confirm_games
        have = self.played(name)
        name = name if have else f"screen {self.name(trial)}"
        if name not in self.games or self._confirmed(trial):
            return None
        most, risk = self.affordable(trial), self.risk * (1.0 - EARLY)
        counts = sorted({most, *(first << look for look in range(LOOKS))})
        return next((n for n in counts if max(have, first - 1) < n <= most and self.keeps(name, risk, n)), None)

    def affordable(self, trial: Trial) -> int:
        """How many games of a student and of the teacher there is time for, those included that they have played."""
        least = SLACK * self.rates["game"] * (self.config.confirm_games + 1)  # the teacher has played as many
        left = min(self.left, max(least, ANYTIME * 60 * self.config.budget)) if self.more else self.left
        room = left / (SLACK * self.rates["game"] or 1e-9)
        own, theirs = self.played(f"confirm {self.name(trial)}"), self.played("teacher")
        count = own + room if own + room <= theirs else (own + room + theirs) / 2
        return int(min(count, self.config.confirm_games << LOOKS - 1))

    def look(self, most: int, count: int) -> int:
        """After how many games of `most` a confirmation is looked at next, after so many; 0 where these are all.

        Twice as many, or all where these are not a half more than that.
        """
        wanted = max(2 * count, self.config.confirm_games)
        if most < wanted + wanted // 2:
            wanted = most
        return wanted if wanted > max(self.config.confirm_games - 1, 1.1 * count) else 0

    def _sample(self, name: str, count: int = 0) -> Sample:
        played = self.games[name]
        key = name, len(played.episodes)
        if key not in self._samples:  # the search asks again and again
            self._samples[key] = measure(played, self.points)
        known = self._samples[key]
        fewer = name.startswith("screen") and 0 < count < key[1]  # of a confirmation, which counts its own games
        if known.df + 1 < key[1] or (count <= key[1] and not fewer):
            return known
        return Sample(known.value, known.error * math.sqrt(key[1] / count), count - 1.0)

    # What is done: each step is kept, and known to the next call

    def train(self, trials: Sequence[Trial]) -> None:
        """Distils students side by side, one per core.

        Raises:
            TimeUp: they did not end with time to spare for a confirmation, and are saved.
        """
        began, folder = time.monotonic(), self.run.path / "runs"
        foreseen = {self.name(trial): self.foresee(trial) for trial in trials}
        specs = [
            RunSpec(self.name(t), f"distill-{self.ways[t.way].lead}", self.distillation(t), self.origin) for t in trials
        ]
        begun = any(map(self.begun, trials))  # by an earlier call: the clock tells nothing
        for ended in execute(specs, folder, self.runtime, study=self.run, until=self.until(self.confirming())):
            if ended.error is not None:
                self.errors[ended.spec.name] = ended.error
        if not all(self.name(trial) in self.errors or self.trained(trial) for trial in trials):
            raise TimeUp
        took = {
            name: read_document(folder / name / "result.json")["wall_seconds"]
            for name in foreseen
            if name not in self.errors
        }
        if took and not begun:
            name = max(took, key=lambda name: took[name])
            self.rates |= {"start": time.monotonic() - began - took[name], "training": took[name] / foreseen[name]}
        self.save()

    def screen(self, trial: Trial) -> None:
        """Plays a student's first games: a few, and others where it may do and there is time. Raises TimeUp."""
        if self.name(trial) in self.errors:
            return
        for times in SCREENING:
            count = math.ceil(times * self.config.games)
            if (times > 1 or (times == 1 and not self.more)) and count > self.cheap(count):
                return
            self.play(f"screen {self.name(trial)}", count, self.confirming())
            if not self.may_do(trial):
                return

    def confirm(self, trial: Trial) -> None:
        """Teacher and student play fresh games, those of an earlier confirmation included, until it is decided.

        It passes at any of several looks, which share its error rate (a union bound): at most EARLY of it for all but
        the last. When they come is for numbers of games and the clock to say, never for scores. It is given up where
        the student has kept less than it is to keep.

        Raises:
            TimeUp: there is no time for any games.
        """
        name, risk = f"confirm {self.name(trial)}", self.risk
        have, most = self.played(name), self.affordable(trial)  # once, so that its looks are few and known before
        if not (count := self.look(most, have)):
            raise TimeUp
        while True:
            try:
                self.play("teacher", count)
                self.play(name, count)
                count = self.look(most, count)
            except TimeUp:
                count = 0
            if self.played(name) == have:
                raise TimeUp
            last = not count or share(*self.samples(name)) < self.config.keep
            part = risk * (1.0 - EARLY if last else EARLY / (LOOKS - 1))
            value, low = self.shares(name, part)
            passed = self.keeps(name, part)
            if passed or last:
                break
        self.confirmations.append(Confirmation(self.name(trial), value, max(low, -99.0), part, passed))
        self.save()

    def play(self, name: str, count: int, keep: float = 0.0) -> Evaluation:
        """At least `count` games of `teacher`, of `random` play, or `screen` or `confirm` of a trial, known ones first.

        Raises:
            TimeUp: they did not end with `keep` seconds to spare.
        """
        kind, _, trial = name.partition(" ")
        known = self.games.get(name)
        before = [] if known is None else known.episodes
        if known is not None and len(before) >= count:
            return known
        place = self.run.path / "runs" / trial if trial else self.origin
        loaded = load(place, device=str(resolve_device(self.runtime.device)))
        began, episodes = time.monotonic(), count - len(before)
        bits = self.config.base.bits if trial else 32
        games = evaluation.play(
            c.player(loaded, bits) if bits < 32 else loaded.policy,  # integers are scored as they are written
            loaded.env,
            episodes=episodes,
            seed=SEEDS[kind] + 10 * len(before),
            start=Start(self.teacher.env.max_frames) if kind == "random" else None,  # to the end of any game
            threads=self.runtime.cores,
            alone=loaded.alone,
            most=min(32, max(8, episodes // 4)),
        )
        with (
            telemetry.Progress(f"play {name}", episodes, quiet=self.runtime.quiet, unit="games") as bar,
            deadline(loaded.policy, self.until(keep)),
        ):
            for so_far in games:
                bar.update(len(so_far.episodes), score=so_far.score)
                self.run.touch_lock()
                if time.monotonic() > self.until(keep):
                    raise TimeUp
        if kind != "random" and episodes >= self.config.games:  # a few in parallel take longer, each
            self.rates["game"] = max(self.rates["game"], (time.monotonic() - began) / episodes)
        so_far.episodes[:0] = before
        self.games[name] = so_far
        self.save()
        return so_far

    # Time

    @property
    def spent(self) -> float:
        """Seconds of this call and earlier ones."""
        return self.seconds + time.monotonic() - self._began

    def until(self, keep: float = 0.0) -> float:
        """When the search has to be over, as `time.monotonic()` counts, `keep` seconds to spare."""
        return self._began - self.seconds + 60 * self.config.budget * (1 - FINISHING) - keep

    @property
    def left(self) -> float:
        """Seconds."""
        return 60 * self.config.budget * (1 - FINISHING) - self.spent

    def time_for(self, seconds: float, keep: float) -> bool:
        return SLACK * seconds + keep <= self.left

    def duration(self, trial: Trial) -> float:
        """About how long a trial takes, from its training to a confirmation of few games."""
        games = self.config.games + self.config.confirm_games
        return self.foresee(trial) * self.rates["training"] + self.rates["start"] + self.rates["game"] * games

    def foresee(self, trial: Trial) -> float:
        """Seconds to train, before this machine's speed is counted in; none where an earlier call has done it.

        Those of the shapes with the fewest and the most multiply-adds are measured; others lie between.
        """
        if self.trained(trial):
            return 0.0
        ordered = sorted(range(len(self.shapes)), key=lambda place: self.shapes[place].size.macs)
        ends, steps = (ordered[0], ordered[-1]), self.config.base.total_timesteps
        if not self._foreseen:
            asked = (replace(self.distillation(Trial(place, 0)), total_timesteps=steps) for place in ends)
            self._foreseen = [training_seconds(config, self.teacher, self.runtime) for config in asked]
        work = [self.shapes[place].size.macs for place in ends]
        seconds = float(np.interp(self.shapes[trial.place].size.macs, work, sorted(self._foreseen)))
        return seconds * self.ways[trial.way].total_timesteps / steps

    def cheap(self, count: int) -> int:
        """Of so many games, those that take but a small share of the budget."""
        return int(min(count, CHEAP * 60 * self.config.budget / (self.rates["game"] or 1e-9)))

    def played(self, name: str) -> int:
        return len(self.games[name].episodes) if name in self.games else 0

    def confirming(self) -> float:
        """Seconds kept for the confirmation that is due, for the games of both that are not played yet."""
        hope = self.hope()
        if hope is None or (count := self.needed(hope)) is None:
            return 0.0
        names = f"confirm {self.name(hope)}", "teacher"
        return SLACK * self.rates["game"] * sum(max(0, count - self.played(name)) for name in names)

    # Names, and what is kept

    def name(self, trial: Trial) -> str:
        """Of its run directory and its games."""
        return f"{self.shapes[trial.place].name}_way-{trial.way + 1}"

    def label(self, trial: Trial) -> str:
        shape = self.shapes[trial.place]
        return f"{shape.name}, {shape.size.parameters:,} parameters, way {trial.way + 1}"

    def distillation(self, trial: Trial) -> DistillConfig:
        shape = self.shapes[trial.place]
        return replace(self.ways[trial.way], network=shape.network, sparsity=shape.sparsity)

    def trained(self, trial: Trial) -> bool:
        path = self.run.path / "runs" / self.name(trial)
        return path.exists() and Run.open(path).status == "done"

    def begun(self, trial: Trial) -> bool:
        return (self.run.path / "runs" / self.name(trial)).exists()

    def told(self, trial: Trial) -> str:
        """What is known of a trial, in one line."""
        name, label = self.name(trial), self.label(trial)
        if name in self.errors:
            return f"{label}: failed: {self.errors[name]}"
        confirmed = self.confirmation(trial)
        found = self.screened(trial) if confirmed is None else (confirmed.share, confirmed.low)
        assert found is not None
        bound = f"at least {found[1]:.1%}" if math.isfinite(found[1]) else "no telling how little"
        return f"{label}: keeps {found[0]:.1%}, {bound}: {self.outcome(trial)}"

    def outcome(self, trial: Trial) -> str:
        """Of a trial that has played."""
        if (confirmed := self._confirmed(trial)) is not None:
            return "confirmed" if confirmed else "not confirmed"
        return "promising" if self.needed(trial) else "undecided" if self.may_do(trial) else "too little"

    def save(self) -> None:
        games = {name: [list(episode) for episode in played.episodes] for name, played in self.games.items()}
        document = {"seconds": self.spent, "rates": self.rates, "games": games}
        document["confirmations"] = [each._asdict() for each in self.confirmations]
        write_atomically(self._path, json.dumps(document, allow_nan=False).encode())

    def _load(self) -> None:
        try:
            document = read_json(self._path)
            self.seconds = float(document["seconds"])
            self.rates |= {key: float(value) for key, value in document["rates"].items()}
            self.plan()
            self.confirmations = [Confirmation(**row) for row in document["confirmations"]]
            for name, rows in document["games"].items():
                seed = SEEDS[name.partition(" ")[0]]
                self.games[name] = Evaluation(self.teacher.env, "greedy", seed, 0, [Episode(*row) for row in rows])
        except (InputError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self._path} is damaged: choose another --out") from error


def spread(places: int, count: int) -> list[int]:
    """Up to `count` of so many places, from 0: each part left is about as large."""
    count = min(count, places)
    return [round((places + 1) * (i + 1) / (count + 1)) - 1 for i in range(count)]


def has_points(env: EnvConfig) -> bool:
    return env.atari and task_of(env).two_sided


def _scored(who: str, played: Evaluation) -> str:
    summary = played.summary()
    low, high = summary["ci95"] or (math.nan, math.nan)
    return f"{who}: {summary['mean']:.2f} ({low:.2f} to {high:.2f}) in {summary['distinct']} distinct games"
