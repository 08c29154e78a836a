"""The smallest student that keeps a share of its teacher's score: distil a few widths, bracket, bisect, confirm.

Screening is cheap and decides where to look; it proves nothing. What is claimed rests on a confirmation with fresh
games of the one student that screening chose, and on as many more confirmations as it takes, each at a stricter level.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import optimize, stats

from potstill import distill, evaluation, telemetry
from potstill.analysis.statistics import welch
from potstill.checkpoints import write_atomically
from potstill.distill import DistillConfig
from potstill.envs import EnvConfig, Envs, Episode
from potstill.errors import InputError
from potstill.evaluation import Evaluation
from potstill.interop.sb3 import import_sb3, load_sb3
from potstill.jobs import Machine, file_hash
from potstill.networks import Policy, parse_width, resolve_device
from potstill.policies import LoadedPolicy, load_policy
from potstill.runs import Run
from potstill.study.execute import execute
from potstill.study.grid import Grid

SEEDS = {"screen": 1, "confirm": 2, "teacher": 3, "random": 4}  # of the games: no student is confirmed by those it saw
FINISHING = 0.1  # share of the budget kept for ONNX, film and page
SLACK = 1.2  # on every estimate of time
ARTEFACTS = ("report.html", "card.md", "game.mp4", "policy.onnx", "policy.safetensors", "result.json")
FILM_STEPS = 900  # agent steps, a minute of Atari


@dataclass(frozen=True)
class CompressConfig:
    """What to look for, and how long."""

    keep: float = 0.95
    """Share of the teacher's score that the student must keep, above 0 and at most 1."""
    confidence: float = 0.95
    """Of a student that keeps less, the chance to be let through all the same is at most 1 less this."""
    max_parameters: int | None = None
    """Largest student to consider. Default: anything smaller than the teacher."""
    budget: float = 15.0
    """Minutes of training and playing at most, of all calls together. What cannot end in time is not begun."""
    games: int = 32
    """Games each width is screened with."""
    confirm_games: int = 64
    """Games the chosen student is confirmed with, and games the teacher plays."""
    base: DistillConfig = field(default_factory=DistillConfig)
    """How every student is distilled."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise InputError(f"keep is a share above 0 and at most 1, such as 0.95, not {self.keep}")
        if not 0.5 <= self.confidence < 1:
            raise InputError(f"confidence lies between 0.5 and 1, such as 0.95, not {self.confidence}")
        if not 0 < self.budget < math.inf:
            raise InputError(f"budget is a positive number of minutes, not {self.budget}")
        for name in ("games", "confirm_games"):
            if getattr(self, name) < 2:
                raise InputError(f"{name.replace('_', '-')} must be at least 2, not {getattr(self, name)}")


class Sample(NamedTuple):
    """A mean over games, and how well it is known."""

    value: float
    error: float  # standard; infinite where one game only was seen
    df: float  # degrees of freedom


NOTHING = Sample(0.0, 0.0, math.inf)  # what random play gets of a point-win rate's scale, which has a zero of its own


def measure(played: Evaluation, points: bool) -> Sample:
    """The point-win rate of games, or their mean return, with the standard error of the games' own interval.

    The rate is a ratio of sums, sum(won) / sum(won + lost); its error is that of the residuals won - rate (won + lost)
    over the mean points of a game (Cochran 1977, "Sampling Techniques", 6.4). Repeated games count once.
    """
    summary = played.summary()
    scores = np.array([[episode.won, episode.lost] for episode in played.episodes])
    if points:
        value = summary["point_win_rate"] or 0.0
        total = scores.sum(axis=1)
        deviations = (scores[:, 0] - value * total) / (total.mean() or 1.0)
    else:
        value = summary["mean"]
        deviations = scores[:, 0] - scores[:, 1]
    if summary["distinct"] < 2:
        return Sample(value, math.inf, 1.0)
    return Sample(value, float(deviations.std(ddof=1)) / math.sqrt(summary["distinct"]), summary["distinct"] - 1.0)


def share(student: Sample, teacher: Sample, random: Sample) -> float:
    """(student - random) / (teacher - random): 0 is random play, 1 the teacher, whatever the sign of the scores."""
    return (student.value - random.value) / (teacher.value - random.value)


def share_low(student: Sample, teacher: Sample, random: Sample, confidence: float) -> float:
    """Lower bound of the share, one-sided: that of the true share it lies above is `confidence` at least.

    Fieller 1954: the smallest r for which "student - r teacher - (1 - r) random = 0" is not refused in favour of
    "above 0" by Student's t, with all three errors and the degrees of freedom of Welch 1947. -inf where the games do
    not tell.
    """

    def beyond(r: float) -> float:
        weights = np.array([1.0, r, 1.0 - r])
        parts = (student, teacher, random)
        variances = [float(w * part.error) ** 2 if w else 0.0 for w, part in zip(weights, parts, strict=True)]
        gain = student.value - r * teacher.value - (1.0 - r) * random.value
        if not math.isfinite(sum(variances)):
            return -math.inf
        df = welch(variances, [part.df for part in parts])
        return gain - float(stats.t.ppf(confidence, df)) * math.sqrt(sum(variances))

    value = share(student, teacher, random)
    if beyond(value) >= 0:  # no variance at all
        return value
    for below in (1.0, 10.0, 100.0):
        if beyond(value - below) > 0:
            return float(optimize.brentq(beyond, value - below, value, xtol=1e-12))
    return -math.inf


def ladder(policy: Policy, max_parameters: int | None) -> list[tuple[str, int]]:
    """Widths smaller than a policy's with their parameters, smallest first, about half an octave apart: 1/8 3/16 1/4.

    Raises:
        InputError: there is none.
    """
    found: dict[int, str] = {}
    for width in sorted({Fraction(top, 2**k) for top in (2, 3) for k in range(8)} | {Fraction(2**k) for k in range(5)}):
        if width <= parse_width(policy.config.width):
            config = replace(policy.config, width=str(width), family=policy.family, critic="shared")
            student = Policy(config, policy.observation_shape, policy.num_actions, policy.continuous)
            found.setdefault(student.size().parameters, str(width))  # the smallest widths round to the same network
    smaller = [(width, parameters) for parameters, width in found.items() if parameters < policy.size().parameters]
    if not smaller:
        raise InputError("the teacher is the smallest of its family already")
    allowed = [(w, parameters) for w, parameters in smaller if max_parameters is None or parameters <= max_parameters]
    if max_parameters is not None and not allowed:
        raise InputError(f"max-parameters {max_parameters:,}: the smallest student has {smaller[0][1]:,}")
    return allowed


def between(low: int, high: int, count: int) -> list[int]:
    """Up to `count` places that part those strictly between `low` and `high` evenly."""
    count = min(count, high - low - 1)
    return [low + round((high - low) * (i + 1) / (count + 1)) for i in range(count)]


def open_compression(
    teacher: Path, config: CompressConfig, out: Path, machine: Machine, teacher_env: EnvConfig | None = None
) -> Run:
    """The directory of a compression: a new one, or one begun with the same settings, whose budget may have grown.

    Args:
        teacher_env: the task of a Stable-Baselines3 zip, which is imported into the directory.

    Raises:
        InputError: nothing smaller than the teacher is asked for, `out` is something else's, a package is missing, or
            the budget would not train even the smallest student. Nothing is made then.
    """
    for package in ("onnx", "onnxruntime"):
        if find_spec(package) is None:
            raise InputError(f"compress needs {package}: pip install 'potstill[onnx]'")
    loaded = load_policy(teacher) if teacher_env is None else load_sb3(teacher, teacher_env)
    widths = ladder(loaded.policy, config.max_parameters)
    settings = asdict(config)
    del settings["budget"]
    document = {"kind": "compress", "teacher": str(teacher), "teacher_hash": file_hash(loaded.path), "config": settings}
    document |= {"teacher_env": asdict(teacher_env)} if teacher_env is not None else {}
    if os.path.lexists(out):
        run = Run.open(out)
        if run.config.get("kind") != "compress":
            raise InputError(f"{out} exists and is no compression: choose another --out")
        if {key: run.config.get(key) for key in document} != json.loads(json.dumps(document)):
            raise InputError(f"{out} is a compression with other settings or another teacher: choose another --out")
    else:
        minutes = _training_seconds(_student(config, loaded, widths[0][0]), loaded, machine) / 60
        if minutes > config.budget:
            raise InputError(
                f"a budget of {config.budget:g} minutes is too short: the smallest student alone takes {minutes:.1f} to"
                " train here"
            )
        run = Run.create(out, document)
    if teacher_env is not None and not (run.path / "teacher").exists():
        import_sb3(teacher, teacher_env, run.path / "teacher")
    return run


class Search:
    """What is known so far: games played, and what follows from them. Kept in games.json after every step."""

    def __init__(self, run: Run, config: CompressConfig, machine: Machine) -> None:
        own = run.path / "teacher"
        self.run, self.config, self.machine = run, config, replace(machine, evaluate=0)
        self.teacher_path = own if own.exists() else Path(run.config["teacher"])
        self.teacher = load_policy(self.teacher_path)
        self.ladder = ladder(self.teacher.policy, config.max_parameters)
        self.points = _has_points(self.teacher.env)
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
                student = _student(self.config, self.teacher, width)
                self._foreseen[width] = _training_seconds(student, self.teacher, self.machine)
        return max(self._foreseen[width] for width in widths)

    def cell_name(self, width: str) -> str:
        return self._grid([width]).cells()[0].name

    def _grid(self, widths: Sequence[str]) -> Grid:
        base = _student(self.config, self.teacher, widths[0])
        return Grid((self.teacher_path,), tuple(widths), (base.lead,), (base.seed,), base)

    def _load(self) -> None:
        try:
            document = json.loads(self._path.read_bytes())
            self.seconds, self.pace = (
                float(document["seconds"]),
                {key: float(value) for key, value in document["pace"].items()},
            )
            self.confirmed = list(document["confirmed"])
            for name, rows in document["games"].items():
                seed = SEEDS[name.partition(" ")[0]]
                played = Evaluation(self.teacher.env, "greedy", seed, 0, [Episode(*row) for row in rows])
                self.games[name] = played
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._path} is damaged: choose another --out") from error


class News(NamedTuple):
    """What a step of the search found."""

    kind: str  # teacher, random, train, screen or confirm
    width: str
    words: str


def search(run: Run, config: CompressConfig, machine: Machine) -> Iterator[News]:
    """Looks for the smallest student; at the end, result.json says what was found. The caller holds the run's lock.

    Each round trains as many widths as there are cores, evenly spread over what is undecided. When nothing is, or no
    time is left, the smallest that screened well is confirmed; if that fails, the search goes on above it.

    Raises:
        InputError: the teacher is no better than random play.
        StudyInterrupted, KeyboardInterrupt: the same call goes on with it.
    """
    known = _result(run)
    if known is not None and not (known["stopped"] == "budget" and config.budget > known["budget"]):
        return
    for name in ARTEFACTS:
        (run.path / name).unlink(missing_ok=True)
    machine.settle()
    state = Search(run, config, machine)
    try:
        yield from _steps(state)
    finally:
        state.save()
    run.write_result(_record(state))


def _steps(state: Search) -> Iterator[News]:
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


def _record(state: Search) -> dict[str, Any]:
    """What result.json holds; docs/compress.md lists it."""
    config, teacher = state.config, state.teacher
    chosen = next((width for width in state.confirmed if state.keeps("confirm", width)), None)
    theirs, size = state.games["teacher"].summary(), teacher.policy.size()
    record: dict[str, Any] = {
        "status": "done",
        "kind": "compress",
        "reached": chosen is not None,
        "stopped": "budget" if state.open else "decided",
        "keep": config.keep,
        "confidence": config.confidence,
        "measure": "point-win rate" if state.points else "return above random play",
        "max_parameters": config.max_parameters,
        "budget": config.budget,
        "seconds": state.spent,
        "env": teacher.env.id,
        "sticky": teacher.env.sticky,
        "teacher": state.run.config["teacher"],
        "teacher_score": theirs["mean"],
        "teacher_point_win_rate": theirs["point_win_rate"],
        "teacher_size": size._asdict() | {"width": teacher.policy.config.width},
        "teacher_games": {key: theirs[key] for key in ("mean", "ci95", "distinct", "episodes", "point_win_rate")},
        "teacher_latency": evaluation.latency(teacher.policy),
        "random_score": None if state.points else state.games["random"].summary()["mean"],
        "trials": [
            _trial(state, width, parameters) for width, parameters in state.ladder if state.verdict(width) is not None
        ],
    }
    if chosen is None:
        return record
    loaded = load_policy(state.run.path / "runs" / state.cell_name(chosen))
    trained = json.loads(loaded.path.with_name("result.json").read_bytes())
    found, games = state.share("confirm", chosen), state.games[f"confirm {chosen}"].summary()
    assert found is not None
    record |= {key: trained[key] for key in trained if key not in ("status", "kind", "teacher")}
    record |= evaluation.latency(loaded.policy) | {"share": found[0], "share_low": found[1]}
    keys = ("ci95", "median", "std", "p_negative", "distinct", "episodes", "point_win_rate", "returns")
    return record | {"score": games["mean"]} | {key: games[key] for key in keys}


def _trial(state: Search, width: str, parameters: int) -> dict[str, Any]:
    trial: dict[str, Any] = {"width": width, "parameters": parameters, "run": f"runs/{state.cell_name(width)}"}
    trial |= {"error": state.errors.get(width), "will_do": state.verdict(width)}
    for kind in ("screen", "confirm"):
        found = state.share(kind, width) if kind == "screen" or width in state.confirmed else None
        if found is None:
            trial[kind] = None
            continue
        games = state.games[f"{kind} {width}"].summary()
        trial[kind] = {key: games[key] for key in ("mean", "ci95", "distinct", "episodes", "point_win_rate")}
        trial[kind] |= {"share": found[0], "share_low": found[1] if math.isfinite(found[1]) else None}
    return trial


def finish(run: Run, machine: Machine) -> dict[str, Any]:
    """Writes what the search found, the page last; what is there already is left alone. Returns result.json.

    Of a search that reached nothing, card and page only.
    """
    from potstill.interop import onnx
    from potstill.report import compression
    from potstill.watch import film

    record = _result(run)
    assert record is not None
    if (run.path / "report.html").exists():
        return record
    for name in ("policy.onnx", "game.mp4"):  # of a call that was stopped here
        (run.path / name).unlink(missing_ok=True)
    exported, moving, missing = None, None, None
    if record["reached"]:
        chosen = next(trial for trial in record["trials"] if trial["width"] == record["width"])
        temporary = run.path / ".policy.tmp"
        shutil.copyfile(run.path / chosen["run"] / "policy.safetensors", temporary)
        os.replace(temporary, run.policy_path)
        student = load_policy(run.policy_path)
        exported = onnx.export(student, run.path / "policy.onnx", threads=machine.cores, quiet=machine.quiet)
        own = run.path / "teacher"
        teacher = load_policy(own if own.exists() else Path(run.config["teacher"]))
        try:
            pair = [("teacher", teacher), ("student", student)]
            film(pair, run.path / "game.mp4", seed=1, max_steps=FILM_STEPS, quiet=machine.quiet)
            moving = (run.path / "game.mp4").read_bytes()
        except InputError as error:  # a task that draws no pictures: the student stands without
            missing = str(error)
    write_atomically(run.path / "card.md", compression.card(record, exported).encode())
    page = compression.page(record, exported, moving, missing)
    write_atomically(run.path / "report.html", page.encode())
    return record


def _result(run: Run) -> dict[str, Any] | None:
    if not run.result_path.exists() or run.status != "done":
        return None
    record: dict[str, Any] = json.loads(run.result_path.read_bytes())
    return record


def _has_points(env: EnvConfig) -> bool:
    from potstill.watch import TWO_SIDED

    return env.atari and env.id in TWO_SIDED


def _student(config: CompressConfig, teacher: LoadedPolicy, width: str) -> DistillConfig:
    network = replace(config.base.network, width=width, family=teacher.policy.family)
    return replace(config.base, network=network)


def _training_seconds(config: DistillConfig, teacher: LoadedPolicy, machine: Machine) -> float:
    """About how long a distillation takes on one core: its first steps, gradient steps among them, are timed."""
    first = replace(config, lead="student", noise=0.0, warmup_steps=config.batch_size)
    device = resolve_device(machine.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taught = teacher.policy.to(device)
        state = distill.start(first, taught, device)
        with closing(Envs(teacher.env, first.num_envs)) as envs:
            began, counted, most = time.perf_counter(), 0, first.vector_steps - first.warmup_vector_steps - 1
            for _ in distill.distill(first, state, taught, envs, every=1):
                if state.vector_steps <= first.warmup_vector_steps:
                    began = time.perf_counter()
                    continue
                counted = state.vector_steps - first.warmup_vector_steps
                if counted >= min(64, most) or time.perf_counter() - began > 5.0:
                    break
            return (time.perf_counter() - began) / max(1, counted) * config.vector_steps
    finally:
        torch.set_num_threads(threads)
        teacher.policy.to("cpu")
