"""Runs -> tables: a row per run, per game and per metrics record. Figures and reports read nothing else.

A folder holds run directories, or a study's records: one JSON file per run, `<run>.json`, beside `study.json`.
"""

import math
import re
import sys
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from polars.datatypes import DataTypeClass

from potstill import telemetry
from potstill.analysis.scaling import Convergence, convergence
from potstill.analysis.statistics import FloatArray
from potstill.arms import arm_of, method_of
from potstill.errors import InputError, printable
from potstill.storage.checkpoints import write_atomically
from potstill.storage.runs import Run, read_document

TEXT, WHOLE, NUMBER = pl.String, pl.Int64, pl.Float64


class Column(NamedTuple):
    """A column of the tables."""

    name: str
    dtype: DataTypeClass
    help: str  # what it holds, and its unit where it has one


_COLUMNS = (
    Column("run", TEXT, "directory name"),
    Column("status", TEXT, "done, failed, interrupted, running or new; only a run that is done has scores"),
    Column("kind", TEXT, "train or distill"),
    Column("arm", TEXT, "a study's name for how the policy came to be, or a name of `arms.ARMS`"),
    Column("method", TEXT, "rl, distill, ppd or finetune"),
    Column("env", TEXT, "the task: an ALE ROM or a Gymnasium id"),
    Column("view", TEXT, "what the policy sees of its task, where that is not all; of distillation, the student"),
    Column("width", TEXT, "multiplier on the units of every hidden layer, as a fraction"),
    Column("parameters", WHOLE, "parameters of the deployed actor: trunk and action head"),
    Column("conv", WHOLE, "of these, in convolutions"),
    Column("linear", WHOLE, "of these, in linear layers"),
    Column("macs", WHOLE, "multiply-adds of the deployed actor for one observation"),
    Column("bytes", WHOLE, "size of the deployed actor: float32 parameters and normalisation"),
    Column("latency_ms", NUMBER, "milliseconds from one raw observation to its logits, batch 1, one thread: median"),
    Column("latency_p95_ms", NUMBER, "the same, 95th percentile"),
    Column("seed", WHOLE, "the run's seed"),
    Column("teacher", TEXT, "where the teacher lay; empty for an arm without one"),
    Column("lead", TEXT, "who acted during distillation: student, teacher or mixed"),
    Column("objective", TEXT, "distillation loss"),
    Column("mode", TEXT, "when the student was updated"),
    Column("env_steps", WHOLE, "agent steps played in training"),
    Column("gradient_steps", WHOLE, "optimiser steps"),
    Column("training_macs", WHOLE, "multiply-adds of the training: acting, labels, forward and backward passes"),
    Column("branch", TEXT, "share of the arm's budget that was this run's whole; empty where that is all of it"),
    Column("teacher_env_steps", WHOLE, "agent steps the teacher itself was trained for"),
    Column("teacher_gradient_steps", WHOLE, "optimiser steps of the teacher's own training"),
    Column("teacher_training_macs", WHOLE, "multiply-adds of the teacher's own training"),
    Column("initial_env_steps", WHOLE, "agent steps of the distillation a finetune began with"),
    Column("initial_gradient_steps", WHOLE, "optimiser steps of that distillation"),
    Column("initial_training_macs", WHOLE, "multiply-adds of that distillation"),
    Column("wall_seconds", NUMBER, "seconds of training, evaluation not included"),
    Column("score", NUMBER, "mean of whole greedy games, sticky as trained; in curves.csv of the last 100 in training"),
    Column("ci95_low", NUMBER, "lower end of the 95 % interval of score, over distinct games of this one run"),
    Column("ci95_high", NUMBER, "its upper end"),
    Column("median", NUMBER, "median score of a game"),
    Column("std", NUMBER, "standard deviation of a game's score"),
    Column("p_negative", NUMBER, "share of games with a score below 0"),
    Column("distinct", WHOLE, "distinct games: repeats of a game are counted once"),
    Column("episodes", WHOLE, "games played for the evaluation"),
    Column("point_win_rate", NUMBER, "points scored of all points played, 0 to 1"),
    Column("score_sampled", NUMBER, "mean score with sampled actions, sticky as trained"),
    Column("score_nosticky", NUMBER, "mean greedy score without sticky actions; Atari only"),
    Column("secondary_games", WHOLE, "games behind score_sampled, and behind score_nosticky, there 30 at most"),
    Column("converged", TEXT, "of an RL run with a learning curve, in a study: converged, not converged or unknown"),
    Column("teacher_score", NUMBER, "the teacher's mean score, greedy, sticky as trained"),
    Column("teacher_parameters", WHOLE, "parameters of the teacher's actor"),
    Column("teacher_point_win_rate", NUMBER, "the teacher's share of the points"),
    Column("random_score", NUMBER, "mean score of a uniformly random policy, where it was measured"),
    Column("agreement", NUMBER, "share of its own states with the teacher's greedy action; in curves.csv of a batch"),
    Column("kl", NUMBER, "KL(teacher || policy) on its own states, nats; in curves.csv of PPO between old and new"),
    Column("agreement_teacher_states", NUMBER, "agreement on the teacher's states"),
    Column("kl_teacher_states", NUMBER, "KL(teacher || policy) on the teacher's states, nats"),
    Column("action_difference", NUMBER, "from the teacher's greedy action, on own states, in units of half the range"),
    Column("action_difference_teacher_states", NUMBER, "the same on the teacher's states"),
    Column("command", TEXT, "what was run"),
    Column("commit", TEXT, "the code's commit"),
    Column("machine", TEXT, "where it ran"),
    Column("threads", WHOLE, "CPU threads it used"),
    Column("precision", TEXT, "arithmetic in training: float32 or bfloat16"),
    Column("error", TEXT, "why the run failed"),
    Column("game", WHOLE, "number of the game within the run's evaluation, from 0"),
    Column("step", WHOLE, "agent steps so far"),
    Column("seconds", NUMBER, "seconds of training so far"),
    Column("games", WHOLE, "games finished so far"),
    Column("loss", NUMBER, "distillation loss of a batch"),
    Column("policy_loss", NUMBER, "PPO's clipped policy loss"),
    Column("value_loss", NUMBER, "loss of the value head"),
    Column("entropy", NUMBER, "entropy of the policy, nats"),
    Column("clip_fraction", NUMBER, "share of samples whose probability ratio was clipped"),
    Column("grad_norm", NUMBER, "norm of the gradient before clipping"),
    Column("learning_rate", NUMBER, "the optimiser's"),
    Column("return_scale", NUMBER, "unit of the value head: running deviation of the returns"),
)
COLUMNS = {column.name: column for column in _COLUMNS}
"""Every column of every table by name, but those of starts: `score_start_50`, a NUMBER, is the mean greedy score after
50 steps of a random policy, sticky as trained; a table has one for each start that its runs were scored from."""

_NAMES = tuple(COLUMNS)
TABLE = _NAMES[: _NAMES.index("game")]
CURVE_POINTS = 200  # of a record's learning curve, at most
EPISODES: tuple[str, ...] = ("run", "arm", "env", "width", "parameters", "seed", "game", "score")
CURVES: tuple[str, ...] = ("run", "arm", "env", "width", "parameters", "seed", "step", "seconds", "games", "score")
CURVES += ("agreement", "kl", "action_difference", *_NAMES[_NAMES.index("loss") :])
_LABELS = {"arm", "method", "env", "width"}


class Found(NamedTuple):
    """What a folder of runs or of records holds."""

    records: list[dict[str, Any]]
    damaged: dict[str, str]  # why a run cannot be read, by its name
    ignored: list[str]  # JSON files that are no records, a line for each


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """One record per run, by directory name: `run`, `path`, `status`, what config.json knows, and result.json's keys.

    Unfinished and failed runs are there too, with their status; folders that are no runs are not. A damaged run, and
    JSON that is no record, is named on stderr, once, and left out. `folder` may itself be a run.

    Raises:
        InputError: no run there, or none that can be read.
    """
    found = find_runs(folder)
    if not found.records and found.damaged:
        more = f"; so are {len(found.damaged) - 1} others" if len(found.damaged) > 1 else ""
        raise InputError(f"{next(iter(found.damaged.values()))}{more}")
    if not found.records:
        raise InputError(f"{folder} holds no runs: no record, and no directory with a config.json or a result.json")
    tell(found)
    return found.records


def find_runs(folder: Path) -> Found:
    """As `read_runs`, silently and with what is left out. Raises InputError where `folder` is no folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: a folder of runs is needed")
    files = [] if _is_run(folder) else [path for path in sorted(folder.glob("*.json")) if path.name != "study.json"]
    found = Found([], {}, [])
    for path in files:
        try:
            if (record := _read_record(path)) is not None:
                found.records.append(record)
            else:
                found.ignored.append(f"{path} is no record of a run of a study")
        except InputError as error:
            found.damaged[path.stem] = str(error)
    if found.records or found.damaged:
        return found
    inside = sorted(path for path in folder.iterdir() if path.name[0] != "." and _is_run(path))
    for path in [folder] if _is_run(folder) else inside:
        try:
            found.records.append(_read_run(path))
        except InputError as error:
            found.damaged[path.name] = str(error)
    return found


def tell(found: Found) -> None:
    """Names on stderr what is left out of a folder: a line each, and once in a process."""
    for line in found.damaged.values():
        _tell(f"left out: {line}")
    for line in found.ignored:
        _tell(f"ignored: {line}")


@cache
def _tell(line: str) -> None:
    print(f"potstill: {line}", file=sys.stderr)


def as_record(path: Path) -> dict[str, Any]:
    """The run in directory `path` as one JSON-ready record: what `read_runs` tells of it, and its learning curve.

    Raises:
        InputError: as `read_runs`.
    """
    record = _read_run(path)
    del record["path"], record["ci95_low"], record["ci95_high"]
    record.pop("config_hash", None)  # of the directory, which names places
    points = _curve(path / "metrics.jsonl", record, CURVE_POINTS)
    keys = ("step", "seconds", "score", "agreement")
    return record | {"curve": [{key: point[key] for key in keys if key in point} for point in points]}


def runs_table(folder: Path) -> pl.DataFrame:
    """A row per run, columns `TABLE`; what a run does not know is null. Raises InputError as `read_runs` does."""
    return runs_frame(read_runs(folder))


def curves_table(folder: Path) -> pl.DataFrame:
    """A row per metrics.jsonl record of all runs, unfinished ones included, columns `CURVES`; a damaged one is named.

    Raises:
        InputError: as `read_runs`.
    """
    return curves_frame(read_runs(folder))


def write_tables(folder: Path) -> None:
    """Writes table.csv, episodes.csv and curves.csv into `folder`, each atomically, from the runs in it.

    Raises:
        InputError: as `curves_table`, or the folder cannot be written.
    """
    records = read_runs(folder)
    frames = {"table": runs_frame(records), "episodes": episodes_frame(records), "curves": curves_frame(records)}
    for name, frame in frames.items():
        write_atomically(Path(folder) / f"{name}.csv", frame.write_csv().encode())


def convergence_of(records: Iterable[dict[str, Any]]) -> dict[str, Convergence]:
    """Whether each RL run had learned what it would, by the run's name; those without a learning curve are left out.

    Args:
        records: as `read_runs` gives them. What a run of the same arm, width and seed gained with twice the agent steps
            counts: a larger branch, or one of `<arm>-long`.
    """
    done = [record for record in records if record["status"] == "done" and record.get("method") == "rl"]
    kin: dict[Any, list[dict[str, Any]]] = {}
    for record in done:
        kin.setdefault(_kind(record), []).append(record)
    certificates: dict[str, Convergence] = {}
    for record in done:
        gains = [
            other["score"] - record["score"]
            for other in kin[_kind(record)]
            if None not in (other.get("score"), record.get("score"))
            and 1.9 < (other.get("env_steps") or 0) / (record.get("env_steps") or 1) < 2.1
        ]
        gain = gains[0] if gains else None
        with suppress(InputError):  # too short a curve, or none
            certificates[record["run"]] = convergence(*learning_curve(record), gain)
    return certificates


def learning_curve(record: dict[str, Any]) -> tuple[FloatArray, FloatArray]:
    """Agent steps and scores along a run's learning curve, where it has scores."""
    curve = record.get("curve") or Curve([])
    steps, scores = (curve if isinstance(curve, Curve) else Curve(curve)).columns("step", "score")
    return steps[np.isfinite(scores)], scores[np.isfinite(scores)]


def _kind(record: dict[str, Any]) -> tuple[Any, ...]:
    """What runs of several budgets have in common."""
    return str(record.get("arm")).removesuffix("-long"), record.get("width"), record.get("seed")


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", "result.json"))


def _read_run(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = {"run": path.resolve().name, "path": path, "status": "done"}
    if (path / "config.json").is_file():
        run = Run.open(path)
        record |= {"status": run.status, **_checked(_planned(run.config, path), path / "config.json")}
    if (path / "result.json").is_file():
        record |= _checked(read_document(path / "result.json"), path / "result.json")
        if (path / "config.json").is_file() and record.get("config_hash", run.identity) != run.identity:
            raise InputError(f"{path}/config.json is not the one its result.json belongs to: restore it from a copy")
    return _with_interval(record)


def _read_record(path: Path) -> dict[str, Any] | None:
    """The record at `path`; None where it is no record, but JSON of another kind."""
    record = read_document(path)
    if "run" not in record and "status" not in record:
        return None
    record = _checked(record, path)
    if record.get("run") != path.stem or record.get("status") is None:
        raise InputError(f"{path} is no record of a study's run: it does not say that it is {path.stem}")
    record = {key: sys.intern(value) if type(value) is str else value for key, value in record.items()}
    compact: dict[str, Any] = {"returns": array("d", record["returns"])} if record.get("returns") else {}
    compact |= {"curve": Curve(record["curve"])} if record.get("curve") else {}
    return _with_interval(record | compact | {"path": path})


class Curve(Sequence[dict[str, Any]]):
    """The points of a learning curve, kept as columns: of 20,000 records as dicts they would take 2 GB."""

    def __init__(self, points: Sequence[dict[str, Any]]) -> None:
        names = dict.fromkeys(key for point in points for key in point if key in COLUMNS)
        self._columns = {
            name: array("d", (math.nan if point.get(name) is None else point[name] for point in points))
            for name in names
        }
        self._length = len(points)

    def __len__(self) -> int:
        return self._length

    def columns(self, *names: str) -> list[FloatArray]:
        """Each of length `len(self)`, NaN where a point has no such value."""
        nothing = array("d", [math.nan]) * self._length
        return [np.array(self._columns.get(name, nothing)) for name in names]

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(self._length))]
        values = ((name, column[at]) for name, column in self._columns.items())
        return {name: int(value) if COLUMNS[name].dtype == WHOLE else value for name, value in values if value == value}


def _with_interval(record: dict[str, Any]) -> dict[str, Any]:
    low, high = record.get("ci95") or (None, None)
    return record | {"ci95_low": low, "ci95_high": high}


def _planned(document: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a run's config.json tells before there is a result: enough to know the row that is missing."""
    config = document.get("config", {})
    if not isinstance(config, dict) or not all(isinstance(config.get(key, {}), dict) for key in ("network", "env")):
        raise InputError(f"{path / 'config.json'} is damaged: its config is not one of a run's")
    facts = {key: document.get(key) for key in ("kind", "teacher", "command", "commit", "machine", "threads")}
    facts |= {key: config.get(key) for key in ("seed", "lead", "objective", "mode", "precision")}
    facts |= {"width": config.get("network", {}).get("width"), "env": config.get("env", {}).get("id")}
    return facts | {"arm": arm_of(document), "method": method_of(document)}


def _checked(facts: dict[str, Any], path: Path) -> dict[str, Any]:
    if "beside_games" in facts:  # as the first study's records have it
        facts["secondary_games"] = facts.pop("beside_games")
    for key, value in facts.items():
        if not _is_allowed(key, value):
            raise InputError(f"{path} is damaged: its {key} is {printable(repr(value), 80)}")
    return facts


def _is_allowed(key: str, value: Any) -> bool:
    """Whether a result may hold `value` under `key`: what a table shows or a report computes with is of one type."""
    if value is None:
        return True
    if key in COLUMNS:
        return _fits(COLUMNS[key], value)
    if key in ("ci95", "returns"):
        return isinstance(value, list) and all(map(_is_number, value)) and (key == "returns" or len(value) == 2)
    if key == "starts":
        return isinstance(value, dict) and all(
            isinstance(each, dict) and _is_allowed("score", each.get("score", "")) for each in value.values()
        )
    if key == "curve":
        return isinstance(value, list) and _is_curve(value)
    return True


def _is_curve(points: list[Any]) -> bool:
    """Whether each point has a step, and numbers or None by the names of columns."""
    if not all(isinstance(point, dict) and point.get("step") is not None for point in points):
        return False
    for name in {key for point in points for key in point} & COLUMNS.keys():
        values = [value for point in points if (value := point.get(name)) is not None]
        if {type(value) for value in values} - {int, float}:
            return False
        ends = (min(values), max(values)) if values else ()
        if not all(_fits(COLUMNS[name], end) for end in ends):
            return False
        if COLUMNS[name].dtype == WHOLE and any(value % 1 for value in values):
            return False
    return True


def _fits(column: Column, value: Any) -> bool:
    if column.dtype == TEXT:
        return isinstance(value, str)
    return _is_number(value) and (column.dtype == NUMBER or value == int(value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1 << 63


def runs_frame(records: list[dict[str, Any]]) -> pl.DataFrame:
    """`runs_table` of records that were read."""
    certificates = convergence_of(records)
    rows, starts = [], set[int]()
    for record in records:
        told = (record.get("starts") or {}).items()
        after = {int(k): each["score"] for k, each in told if re.fullmatch(r"[0-9]{1,18}", k)}
        starts |= after.keys()
        certificate = certificates.get(record["run"])
        row = record | {"converged": certificate.verdict if certificate is not None else None}
        rows.append(row | {f"score_start_{steps}": score for steps, score in after.items()})
    at = TABLE.index("secondary_games") + 1  # behind the other scores
    return _frame(rows, (*TABLE[:at], *(f"score_start_{steps}" for steps in sorted(starts)), *TABLE[at:]))


def episodes_frame(records: list[dict[str, Any]]) -> pl.DataFrame:
    """A row per game of the main evaluations of records that were read, columns `EPISODES`."""
    games = [
        record | {"game": game, "score": score}
        for record in records
        for game, score in enumerate(record.get("returns") or [])
    ]
    return _frame(games, EPISODES)


def curves_frame(records: list[dict[str, Any]]) -> pl.DataFrame:
    """`curves_table` of records that were read."""
    whose = ("run", "arm", "env", "width", "parameters", "seed")
    points = [{key: record.get(key) for key in whose} | point for record in records for point in curve_of(record)]
    return _frame(points, CURVES)


def curve_of(record: dict[str, Any], most: int | None = None) -> Sequence[dict[str, Any]]:
    """The learning curve of a record that was read; of a run's own metrics so many points at most. One that cannot be
    read is named on stderr."""
    if "curve" in record:
        return record["curve"] or []
    try:
        return _curve(record["path"] / "metrics.jsonl", record, most)
    except InputError as error:  # the other runs have curves
        _tell(f"left out: {error}")
        return []


def _curve(metrics: Path, record: dict[str, Any], most: int | None = None) -> list[dict[str, Any]]:
    """The metrics beside a run's result, none where there is no file. Raises InputError where they are not its own."""
    if not metrics.is_file():
        return []
    if "metrics_digest" in record and telemetry.digest(metrics) != record["metrics_digest"]:
        raise InputError(f"{metrics} is not the one that the run beside it wrote: restore it from a copy")
    return telemetry.read(metrics, most)


def check_labels(records: list[dict[str, Any]]) -> None:
    """Refuses, with an InputError, records with an arm, a task or a width that a figure cannot be told."""
    _frame(records, tuple(sorted(_LABELS)))


def _frame(records: list[dict[str, Any]], columns: tuple[str, ...]) -> pl.DataFrame:
    schema = {name: COLUMNS[name].dtype if name in COLUMNS else NUMBER for name in columns}
    try:
        frame = pl.DataFrame([{name: record.get(name) for name in columns} for record in records], schema=schema)
    except (TypeError, OverflowError, pl.exceptions.PolarsError) as error:
        raise InputError(f"the runs' records do not fit a table: {str(error).splitlines()[0]}") from error
    for column in _LABELS.intersection(frame.columns):  # which are written into figures, and those read TeX
        values = frame[column].drop_nulls()
        if odd := values.filter(~values.str.contains(r"^[\w./:+ -]{1,80}$")).to_list():
            raise InputError(f"the runs' records do not fit a table: one has the {column} {odd[0][:80]!r}")
    return frame
