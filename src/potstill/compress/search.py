"""The search, from top to bottom: distil shapes, screen them, confirm one, go on downward until the budget is spent."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
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
SCREENING = (
    0.25,
    1,
    4,
)  # times its games: what is far too little plays no more, and most play on where it costs little
CHEAP = 0.02  # share of the budget for games that are no more than welcome
AMPLE = 15  # times smaller than a teacher, students mostly keep its score (Rusu et al. 2015, "Policy Distillation")
PROMPT = 2  # times as long as the quickest training, those of a first round may take
COUNTS = (1, 2, 4, 8, 16)  # times the games of a confirmation


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

    The teacher plays. Then, round by round, as many trials as there are cores are trained and screened. The cheapest
    that promises to do is confirmed: at once where nothing is confirmed yet, else when no shape is left to bisect. So
    it goes on downward until the budget is spent or nothing is left to try. What time is left is given to the
    confirmation of a student that may do, though its games so far do not promise it.

    Raises:
        InputError: the teacher is no better than random play, or there is no time for its games.
    """
    try:
        for kind, least in (("teacher", state.config.confirm_games), ("random play", state.config.games)):
            name = kind.partition(" ")[0]
            if not (state.points and name == "random"):
                state.play(name, least)
                yield News(name, _scored(kind, state.play(name, max(least, state.cheap(COUNTS[-1] * least)))))
    except TimeUp:
        raise InputError(
            f"a budget of {state.config.budget:g} minutes is too short: the teacher's games alone take longer here"
        ) from None
    if state.samples("teacher")[0].value <= state.random.value:
        raise InputError("the teacher is no better than random play: there is nothing to keep")
    while True:
        trials, bisecting = state.next_trials()
        hope, count = state.hope()
        if hope is None and not trials:
            hope, count = state.chance()
        if hope is not None and (state.chosen is None or not (trials and bisecting)):
            try:
                state.confirm(hope, count)
            except TimeUp:
                state.stopped = "budget"
                break
            yield News("confirm", state.told(hope))
        elif trials:
            yield News("train", f"training {' and '.join(map(state.label, trials))}")
            try:
                for trial in sorted(state.train(trials)):
                    state.screen(trial)
                    yield News("screen", state.told(trial))
                    if state.needed(trial) is not None:  # the dearer ones play where its confirmation fails
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
        # Seconds a game and to start a process; seconds of a training over what was foreseen.
        self.rates = {"game": 0.0, "start": 0.0, "training": 1.0}
        self.stopped = "exhausted"  # or budget, where that left something untried
        self.seconds: float = 0.0
        self._foreseen: list[float] = []  # seconds to train those of the least and the most work, in the first way
        self._began: float = time.monotonic() if began is None else began
        self._path = run.path / "games.json"
        if self._path.exists():
            self._load()

    # What to do next

    def next_trials(self) -> tuple[list[Trial], bool]:
        """What to train, one to a core, and whether it bisects. Nothing where no time is left for any.

        While nothing will do: first the simplest shape and one in the middle, or of an image the dearest of those
        that are much smaller than the teacher, and one of half its size; then the most promising another way, and
        untried ones from the dearest down. Below one that will do: the untried shapes above the dearest that will not
        are bisected. Then, for score need not grow with size, shapes below that and further ways are tried, the nearest
        and the least tried first.
        """
        cores, every = self.runtime.cores, len(self.shapes)
        bound = min((place for place in range(every) if self.will_do(place)), default=every)
        candidates = [Trial(place, way) for place in range(bound) if (way := self.tried(place)) < len(self.ways)]
        confirming = self._confirming()
        games = self.config.games + (0 if confirming else self.config.confirm_games)
        around = self.rates["start"] + self.rates["game"] * games
        seconds = {trial: self.foresee(trial) * self.rates["training"] + around for trial in candidates}
        fits = [trial for trial in candidates if self.time_for(seconds[trial], confirming)]
        self.stopped = "budget" if candidates and not fits else "exhausted"
        untried = [trial for trial in fits if not trial.way]
        seen = [trial.way for trial in candidates if trial.way]
        if bound == every and len(seen) < 2:  # the first round, which on one core takes two
            early = [
                t for t in untried if self.spent + SLACK * seconds[t] <= ANYTIME * 60 * self.config.budget
            ] or untried
            simplest = [trial for trial in early if self.shapes[trial.place].name == "linear"]
            rest = [trial for trial in early if trial not in simplest]
            if not simplest:  # of images a budget is a few rounds
                soon = PROMPT * min(seconds.values(), default=0.0)
                small = [t for t in rest if AMPLE * self.shapes[t.place].cost <= self.teacher_cost]
                rest = [t for t in small if seconds[t] <= soon] or rest
            picked = [rest[at] for at in spread(len(rest), cores - len(simplest), bool(simplest))]
            if picked and self.shapes[picked[0].place].size.conv:
                known = [Trial(place, 0) for place in range(bound) if self.tried(place)]  # of this round, on one core
                row = self.halving(sorted({*known, *rest}, key=lambda t: t.place))
                picked = [trial for trial in row if trial in rest][:cores]
            if first := [*simplest, *picked]:
                return first, True
        if bound == every:
            tried = sorted((t for t in fits if t.way), key=lambda t: (-self._best_share(t.place), -t.place))
            fresh = list(reversed(untried))
            turns = (fresh, tried) if len(seen) <= sum(seen) - len(seen) + 1 else (tried, fresh)
            both = chain.from_iterable(zip_longest(*turns))
            return [trial for trial in both if trial is not None][:cores], False
        low = max((place for place in range(bound) if self.tried(place)), default=-1)
        if between := [trial for trial in untried if trial.place > low]:
            return [between[at] for at in spread(len(between), cores, known=True)], True
        return sorted(fits, key=lambda t: (bound - t.place + t.way, t.way))[:cores], False

    def halving(self, trials: list[Trial]) -> list[Trial]:
        """Of these, the cheapest first, the dearest, the dearest of at most half its cost, and so on."""
        found: list[Trial] = []
        for trial in reversed(trials):
            if not found or 2 * self.shapes[trial.place].cost <= self.shapes[found[-1].place].cost:
                found.append(trial)
        return found

    def hope(self) -> tuple[Trial | None, int]:
        """A student that promises to be confirmed, and after how many games of its own and the teacher's.

        The first is to be the surest, the one that needs the fewest games, and after that the cheapest.
        """
        found = [(trial, count) for trial in self._unconfirmed() if (count := self.needed(trial)) is not None]
        if self.chosen is None:
            return min(found, key=lambda each: each[1], default=(None, 0))
        return found[0] if found else (None, 0)

    def chance(self) -> tuple[Trial | None, int]:
        """The student that is the nearest to being confirmed, and how many games there is time for.

        One that kept too little so far is none, nor one for which there is no time.
        """
        theirs = len(self.games["teacher"].episodes)
        room = (60 * self.config.budget * (1 - FINISHING) - self.spent) / (SLACK * self.rates["game"] or 1e-9)
        count = int(min(room if room <= theirs else (room + theirs) / 2, COUNTS[-1] * self.config.confirm_games))
        seen = {t: self.screened(t) or (0.0, 0.0) for t in self._unconfirmed() if self._confirmed(t) is None}
        near = [trial for trial, (kept, _) in seen.items() if kept >= self.config.keep]
        if not near or count < self.config.confirm_games:
            return None, 0
        return max(near, key=lambda trial: seen[trial][1]), count

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
        rate", section 3, have it, with weights 1/2, 1/4, 1/8 ...
        """
        risk = 0.0
        for number in range(len(self.confirmations) + 1):
            kept = risk if number and self.confirmations[number - 1].passed else 0.0
            risk = math.ldexp(1.0 - self.config.confidence, -number - 1) + kept
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

    def needed(self, trial: Trial) -> int | None:
        """After how many games a confirmation would pass, if they went like those so far; None where it would not.

        One that did not pass may with more games, at the error rate of its next try.
        """
        name, first, risk = f"confirm {self.name(trial)}", self.config.confirm_games, self.risk
        have = len(self.games[name].episodes) if name in self.games else 0
        name = name if have else f"screen {self.name(trial)}"
        if name not in self.games or self._confirmed(trial):
            return None
        left = 60 * self.config.budget * (1 - FINISHING) - self.spent
        room = left if self.chosen is None else min(left, ANYTIME * 60 * self.config.budget)
        counts = (n for n in (times * first for times in COUNTS) if n > have)
        return next(
            (n for n in counts if (n == first or self.confirming(trial, n) <= room) and self.keeps(name, risk, n)), None
        )

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

    def train(self, trials: Sequence[Trial]) -> list[Trial]:
        """Distils students side by side, one per core. Returns those that are not known to be screened.

        Raises:
            TimeUp: they did not end with time to spare for a confirmation, and are saved.
        """
        began, folder = time.monotonic(), self.run.path / "runs"
        foreseen = {self.name(trial): self.foresee(trial) for trial in trials}
        specs = [
            RunSpec(self.name(t), f"distill-{self.ways[t.way].lead}", self.distillation(t), self.origin) for t in trials
        ]
        begun = any((folder / spec.name).exists() for spec in specs)  # by an earlier call: the clock tells nothing
        for ended in execute(specs, folder, self.runtime, study=self.run, until=self.until(self._confirming())):
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
        return list(trials)

    def screen(self, trial: Trial) -> None:
        """Plays a student's first games: a few, and the others where it may do. Raises TimeUp."""
        name, keep = f"screen {self.name(trial)}", self._confirming()
        if self.name(trial) in self.errors:
            return
        for count in (math.ceil(times * self.config.games) for times in SCREENING):
            if count > self.config.games and count > self.cheap(count):
                return
            self.play(name, count, keep)
            value, low = self.shares(name, self.risk)
            if 2 * value - low < self.config.keep and math.isfinite(low):  # its upper bound, as far above
                return

    def confirm(self, trial: Trial, count: int) -> None:
        """Plays so many fresh games of the student, those of an earlier confirmation included, and of the teacher.

        Raises:
            TimeUp: there is no time for them.
        """
        risk = self.risk
        if not self.time_for(0.0, self._confirming()):
            raise TimeUp
        self.play("teacher", count)
        name = f"confirm {self.name(trial)}"
        self.play(name, count)
        value, low = self.shares(name, risk)
        self.confirmations.append(Confirmation(self.name(trial), value, max(low, -99.0), risk, self.keeps(name, risk)))
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

    def time_for(self, seconds: float, keep: float) -> bool:
        return self.spent + SLACK * seconds + keep <= 60 * self.config.budget * (1 - FINISHING)

    def foresee(self, trial: Trial) -> float:
        """Seconds to train, before this machine's speed is counted in; none where an earlier call has done it.

        Those of the shapes with the fewest and the most multiply-adds are measured; others lie between.
        """
        if self.trained(trial):
            return 0.0
        ordered = sorted(range(len(self.shapes)), key=lambda place: self.shapes[place].size.macs)
        ends = ordered[0], ordered[-1]
        if not self._foreseen:
            configs = (self.distillation(Trial(place, 0)) for place in ends)
            self._foreseen = [training_seconds(config, self.teacher, self.runtime) for config in configs]
        work = [self.shapes[place].size.macs for place in ends]
        seconds = float(np.interp(self.shapes[trial.place].size.macs, work, sorted(self._foreseen)))
        return seconds * self.ways[trial.way].total_timesteps / self.ways[0].total_timesteps

    def cheap(self, count: int) -> int:
        """Of so many games, those that take but a small share of the budget."""
        return int(min(count, CHEAP * 60 * self.config.budget / (self.rates["game"] or 1e-9)))

    def confirming(self, trial: Trial, count: int) -> float:
        """Seconds that a confirmation with so many games takes: those of both that are not played yet."""
        played = (self.games.get(name) for name in (f"confirm {self.name(trial)}", "teacher"))
        left = sum(max(0, count - (0 if known is None else len(known.episodes))) for known in played)
        return SLACK * self.rates["game"] * left

    def _confirming(self) -> float:
        """Seconds kept for the confirmation that is due."""
        hope, count = self.hope()
        return 0.0 if hope is None else self.confirming(hope, count)

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

    def told(self, trial: Trial) -> str:
        """What is known of a trial, in one line."""
        name, label = self.name(trial), self.label(trial)
        if name in self.errors:
            return f"{label}: failed: {self.errors[name]}"
        confirmed = self.confirmation(trial)
        if confirmed is not None:
            found, word = (confirmed.share, confirmed.low), "confirmed" if confirmed.passed else "not confirmed"
        else:
            screened = self.screened(trial)
            assert screened is not None
            found, word = screened, "too little" if self.needed(trial) is None else "promising"
        bound = f"at least {found[1]:.1%}" if math.isfinite(found[1]) else "no telling how little"
        return f"{label}: keeps {found[0]:.1%}, {bound}: {word}"

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
            self.confirmations = [Confirmation(**row) for row in document["confirmations"]]
            for name, rows in document["games"].items():
                seed = SEEDS[name.partition(" ")[0]]
                self.games[name] = Evaluation(self.teacher.env, "greedy", seed, 0, [Episode(*row) for row in rows])
        except (InputError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self._path} is damaged: choose another --out") from error


def spread(places: int, count: int, known: bool) -> list[int]:
    """Up to `count` of so many places to try, from 0.

    Evenly where something larger is known to do: each part left is about as large. Else the last is among them, and
    the others lie evenly in the upper two thirds below: the smallest seldom do.
    """
    count = min(count, places)
    if count < 1:
        return []
    if known:
        return [round((places + 1) * (i + 1) / (count + 1)) - 1 for i in range(count)]
    below = (places - 1) // 3 if places - 1 - (places - 1) // 3 >= count - 1 else 0
    return [below + place for place in spread(places - 1 - below, count - 1, known=True)] + [places - 1]


def has_points(env: EnvConfig) -> bool:
    return env.atari and task_of(env).two_sided


def _scored(who: str, played: Evaluation) -> str:
    summary = played.summary()
    low, high = summary["ci95"] or (math.nan, math.nan)
    return f"{who}: {summary['mean']:.2f} ({low:.2f} to {high:.2f}) in {summary['distinct']} distinct games"
