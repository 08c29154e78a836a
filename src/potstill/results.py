"""Runs -> tables: a row per run, per game and per metrics record. Figures and reports read nothing else.

A folder holds run directories, or a study's records: one JSON file per run, `<run>.json`, beside `study.json`.
"""

import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
from polars.datatypes import DataType, DataTypeClass

from potstill import telemetry
from potstill.analysis.scaling import Convergence, convergence
from potstill.arms import arm_of, method_of
from potstill.checkpoints import write_atomically
from potstill.errors import InputError, printable
from potstill.files import read_bytes
from potstill.runs import Run, read_document

COLUMNS = {
    "run": "directory name",
    "status": "done, failed, interrupted, running or new; only a run that is done has scores",
    "kind": "train or distill",
    "arm": "a study's name for how the policy came to be, or: rl (PPO), rl-split (with a critic of its own),"
    " distill-student, distill-teacher, distill-mixed, ppd (PPO beside a teacher), finetune (PPO from a given policy)",
    "method": "rl, distill, ppd or finetune",
    "env": "the task: an ALE ROM or a Gymnasium id",
    "width": "multiplier on the units of every hidden layer, as a fraction",
    "parameters": "parameters of the deployed actor: trunk and action head",
    "conv": "of these, in convolutions",
    "linear": "of these, in linear layers",
    "macs": "multiply-adds of the deployed actor for one observation",
    "bytes": "size of the deployed actor: float32 parameters and normalisation",
    "latency_ms": "milliseconds from one raw observation to its logits, batch 1, one thread: median",
    "latency_p95_ms": "the same, 95th percentile",
    "seed": "the run's seed",
    "teacher": "where the teacher lay; empty for an arm without one",
    "lead": "who acted during distillation: student, teacher or mixed",
    "objective": "distillation loss",
    "mode": "when the student was updated",
    "env_steps": "agent steps played in training",
    "gradient_steps": "optimiser steps",
    "training_macs": "multiply-adds of the training: acting, labelling by the teacher, forward and backward passes",
    "teacher_env_steps": "agent steps the teacher itself was trained for",
    "teacher_gradient_steps": "optimiser steps of the teacher's own training",
    "teacher_training_macs": "multiply-adds of the teacher's own training",
    "initial_env_steps": "agent steps of the distillation a finetune began with",
    "initial_gradient_steps": "optimiser steps of that distillation",
    "initial_training_macs": "multiply-adds of that distillation",
    "wall_seconds": "seconds of training, evaluation not included",
    "score": "mean score of whole games, greedy, sticky as trained; in curves.csv of the last 100 training games",
    "ci95_low": "lower end of the 95 % interval of score, over distinct games of this one run",
    "ci95_high": "its upper end",
    "median": "median score of a game",
    "std": "standard deviation of a game's score",
    "p_negative": "share of games with a score below 0",
    "distinct": "distinct games: repeats of a game are counted once",
    "episodes": "games played for the evaluation",
    "point_win_rate": "points scored of all points played, 0 to 1",
    "score_sampled": "mean score with sampled actions, sticky as trained",
    "score_nosticky": "mean greedy score without sticky actions; empty where the task has none",
    "beside_games": "games behind score_sampled, and behind score_nosticky unless it is above 30: then 30",
    "score_start_50": "mean greedy score after 50 steps of a random policy, sticky as trained",
    "score_start_200": "the same after 200",
    "score_start_500": "the same after 500",
    "converged": "of an RL run with a learning curve, in a study: converged, not converged or unknown, see"
    " docs/analysis.md",
    "teacher_score": "the teacher's mean score, greedy, sticky as trained",
    "teacher_point_win_rate": "the teacher's share of the points",
    "random_score": "mean score of a uniformly random policy, where it was measured",
    "agreement": "share of the policy's own states where its greedy action is the teacher's; in curves.csv of a batch",
    "kl": "KL(teacher || policy) on the policy's own states, nats; in curves.csv of PPO between old and new policy",
    "agreement_teacher_states": "agreement on the teacher's states",
    "kl_teacher_states": "KL(teacher || policy) on the teacher's states, nats",
    "action_difference": "between greedy continuous actions and the teacher's, absolute, in units of half the range, on"
    " the policy's own states; in curves.csv of a batch",
    "action_difference_teacher_states": "the same on the teacher's states",
    "command": "what was run",
    "commit": "the code's commit",
    "machine": "where it ran",
    "threads": "CPU threads it used",
    "precision": "arithmetic in training: float32 or bfloat16",
    "error": "why the run failed",
    "game": "number of the game within the run's evaluation, from 0",
    "step": "agent steps so far",
    "seconds": "seconds of training so far",
    "games": "games finished so far",
    "loss": "distillation loss of a batch",
    "policy_loss": "PPO's clipped policy loss",
    "value_loss": "loss of the value head",
    "entropy": "entropy of the policy, nats",
    "clip_fraction": "share of samples whose probability ratio was clipped",
    "grad_norm": "norm of the gradient before clipping",
    "learning_rate": "the optimiser's",
    "return_scale": "unit of the value head: running deviation of the returns",
}
"""Every column of every table: what it holds, and its unit where it has one."""

_NAMES = tuple(COLUMNS)
TABLE = _NAMES[: _NAMES.index("game")]
TABLE_LIMIT = 1 << 30  # bytes of a CSV
CURVE_POINTS = 200  # of a record's learning curve, at most
EPISODES: tuple[str, ...] = ("run", "arm", "env", "width", "parameters", "seed", "game", "score")
CURVES: tuple[str, ...] = ("run", "arm", "env", "width", "parameters", "seed", "step", "seconds", "games", "score")
CURVES += ("agreement", "kl", "action_difference", *_NAMES[_NAMES.index("loss") :])

_TEXT = {"run", "status", "kind", "arm", "method", "converged", "env", "width", "teacher", "lead", "objective", "mode"}
_TEXT |= {"command", "commit", "machine", "precision", "error"}
_LABELS = {"arm", "method", "env", "width"}
_INTEGER = {"parameters", "conv", "linear", "macs", "bytes", "seed"}
_INTEGER |= {f"{whose}{what}" for whose in ("", "teacher_", "initial_") for what in ("env_steps", "gradient_steps")}
_INTEGER |= {"training_macs", "teacher_training_macs", "initial_training_macs"}
_INTEGER |= {"distinct", "episodes", "beside_games", "threads", "game", "games", "step"}


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """One record per run, by directory name: `run`, `path`, `status`, what config.json knows, and result.json's keys.

    Unfinished and failed runs are there too, with their status; folders that are no runs are not. `folder` may itself
    be a run.

    Raises:
        InputError: no run there, or a file of one is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: a folder of runs is needed")
    records = [] if _is_run(folder) else sorted(folder.glob("*.json"))
    if records:
        return [_read_record(path) for path in records if path.name != "study.json"]
    places = (
        [folder]
        if _is_run(folder)
        else sorted(path for path in folder.iterdir() if path.name[0] != "." and _is_run(path))
    )
    if not places:
        raise InputError(f"{folder} holds no runs: no record, and no directory with a config.json or a result.json")
    return [_read_run(path) for path in places]


def as_record(path: Path) -> dict[str, Any]:
    """The run in directory `path` as one JSON-ready record: what `read_runs` tells of it, and its learning curve.

    Raises:
        InputError: as `read_runs`.
    """
    record = _read_run(path)
    del record["path"], record["ci95_low"], record["ci95_high"]
    points = telemetry.read(path / "metrics.jsonl") if (path / "metrics.jsonl").is_file() else []
    every = max(1, math.ceil(len(points) / CURVE_POINTS))
    kept = points[::-1][::every][::-1]  # the last one is always there
    keys = ("step", "seconds", "score", "agreement")
    return record | {"curve": [{key: point[key] for key in keys if key in point} for point in kept]}


def runs_table(folder: Path) -> pl.DataFrame:
    """A row per run, columns `TABLE`; what a run does not know is null. Raises InputError as `read_runs` does."""
    return _runs_frame(read_runs(folder))


def episodes_table(folder: Path) -> pl.DataFrame:
    """A row per game of the runs' main evaluations, columns `EPISODES`. Raises InputError as `read_runs` does."""
    return _episodes_frame(read_runs(folder))


def curves_table(folder: Path) -> pl.DataFrame:
    """A row per metrics.jsonl record of all runs, unfinished ones included, columns `CURVES`.

    Raises:
        InputError: as `read_runs`, or a metrics.jsonl is damaged.
    """
    return _curves_frame(read_runs(folder))


def write_tables(folder: Path) -> None:
    """Writes table.csv, episodes.csv and curves.csv into `folder`, each atomically, from the runs in it.

    Raises:
        InputError: as `curves_table`, or the folder cannot be written.
    """
    records = read_runs(folder)
    frames = {"table": _runs_frame(records), "episodes": _episodes_frame(records), "curves": _curves_frame(records)}
    for name, frame in frames.items():
        write_atomically(Path(folder) / f"{name}.csv", frame.write_csv().encode())


def read_table(path: Path, columns: tuple[str, ...]) -> pl.DataFrame:
    """The table with `columns` (TABLE, EPISODES or CURVES) from a CSV of `write_tables`, or from a folder of runs.

    Raises:
        InputError: nothing to read there, or another table.
    """
    path = Path(path)
    if path.is_dir():
        frames = {TABLE: _runs_frame, EPISODES: _episodes_frame, CURVES: _curves_frame}
        return frames[columns](read_runs(path))
    try:
        # From bytes: polars' own file errors say less than the system's.
        frame = pl.read_csv(read_bytes(path, TABLE_LIMIT, follow=True), schema_overrides=_schema(columns))
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path} is not a table of potstill's: {str(error).splitlines()[0]}") from error
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}: name the folder of runs, and the right table is made")
    return _with_plain_labels(frame.select(columns), f"{path} is not a table of potstill's")


def convergence_of(records: Iterable[dict[str, Any]]) -> dict[str, Convergence]:
    """Whether each RL run had learned what it would, by the run's name; those without a learning curve are left out.

    Args:
        records: as `read_runs` gives them. `<arm>-long` is the same arm at twice the budget.
    """
    done = [record for record in records if record["status"] == "done" and record.get("method") == "rl"]
    scores = {tuple(map(record.get, ("arm", "width", "seed"))): record.get("score") for record in done}
    certificates: dict[str, Convergence] = {}
    for record in done:
        points = [point for point in record.get("curve") or [] if point.get("score") is not None]
        longer = scores.get((f"{record.get('arm')}-long", record.get("width"), record.get("seed")))
        gain = longer - record["score"] if longer is not None and record.get("score") is not None else None
        with suppress(InputError):  # too short a curve, or none
            steps, curve = [point["step"] for point in points], [point["score"] for point in points]
            certificates[record["run"]] = convergence(steps, curve, gain)
    return certificates


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", "result.json"))


def _read_run(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = {"run": path.resolve().name, "path": path, "status": "done"}
    if (path / "config.json").is_file():
        run = Run.open(path)
        record |= {"status": run.status, **_checked(_planned(run.config, path), path / "config.json")}
    if (path / "result.json").is_file():
        record |= _read_result(path / "result.json")
    return _with_interval(record)


def _read_record(path: Path) -> dict[str, Any]:
    record = _read_result(path)
    if record.get("run") != path.stem or record.get("status") is None:
        raise InputError(f"{path} is no record of a study's run: it does not say that it is {path.stem}")
    return _with_interval(record | {"path": path})


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


def _read_result(path: Path) -> dict[str, Any]:
    return _checked(read_document(path), path)


def _checked(facts: dict[str, Any], path: Path) -> dict[str, Any]:
    for key, value in facts.items():
        if not _is_allowed(key, value):
            raise InputError(f"{path} is damaged: its {key} is {printable(repr(value), 80)}")
    return facts


def _is_allowed(key: str, value: Any) -> bool:
    """Whether a result may hold `value` under `key`: what a table shows or a report computes with is of one type."""
    if value is None:
        return True
    if key in _TEXT or key == "status":
        return isinstance(value, str)
    if key in _INTEGER:
        return _is_whole(value)
    if key in COLUMNS:
        return _is_number(value)
    if key in ("ci95", "returns"):
        return isinstance(value, list) and all(map(_is_number, value)) and (key == "returns" or len(value) == 2)
    if key == "starts":
        return isinstance(value, dict) and all(
            isinstance(each, dict) and _is_allowed("score", each.get("score", "")) for each in value.values()
        )
    if key == "curve":
        return isinstance(value, list) and all(_is_point(point) for point in value)
    return True


def _is_point(point: Any) -> bool:
    """Of a learning curve: a step, and numbers or None by the names of columns."""
    return (
        isinstance(point, dict)
        and point.get("step") is not None
        and all(
            key not in COLUMNS or value is None or (_is_whole(value) if key in _INTEGER else _is_number(value))
            for key, value in point.items()
        )
    )


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1 << 63


def _runs_frame(records: list[dict[str, Any]]) -> pl.DataFrame:
    certificates = convergence_of(records)
    rows = []
    for record in records:
        starts = record.get("starts") or {}
        after = {f"score_start_{steps}": score["score"] for steps, score in starts.items()}
        certificate = certificates.get(record["run"])
        rows.append(record | after | {"converged": certificate.verdict if certificate is not None else None})
    return _frame(rows, TABLE)


def _episodes_frame(records: list[dict[str, Any]]) -> pl.DataFrame:
    games = [
        record | {"game": game, "score": score}
        for record in records
        for game, score in enumerate(record.get("returns") or [])
    ]
    return _frame(games, EPISODES)


def _curves_frame(records: list[dict[str, Any]]) -> pl.DataFrame:
    whose = ("run", "arm", "env", "width", "parameters", "seed")
    points = [{key: record.get(key) for key in whose} | point for record in records for point in _points(record)]
    return _frame(points, CURVES)


def _points(record: dict[str, Any]) -> list[dict[str, Any]]:
    if "curve" in record:
        return list(record["curve"] or [])
    metrics = record["path"] / "metrics.jsonl"
    return telemetry.read(metrics) if metrics.is_file() else []


def _frame(records: list[dict[str, Any]], columns: tuple[str, ...]) -> pl.DataFrame:
    schema = _schema(columns)
    try:
        frame = pl.DataFrame([{name: record.get(name) for name in columns} for record in records], schema=schema)
    except (TypeError, OverflowError, pl.exceptions.PolarsError) as error:
        raise InputError(f"the runs' records do not fit a table: {str(error).splitlines()[0]}") from error
    return _with_plain_labels(frame, "the runs' records do not fit a table")


def _with_plain_labels(frame: pl.DataFrame, otherwise: str) -> pl.DataFrame:
    """`frame`; InputError where an arm, a task or a width could not be written into a figure, which reads TeX."""
    for column in _LABELS.intersection(frame.columns):
        values = frame[column].drop_nulls()
        if odd := values.filter(~values.str.contains(r"^[\w./:+ -]{1,80}$")).to_list():
            raise InputError(f"{otherwise}: one has the {column} {odd[0][:80]!r}")
    return frame


def _schema(columns: tuple[str, ...]) -> dict[str, DataType | DataTypeClass]:
    return {c: pl.String if c in _TEXT else pl.Int64 if c in _INTEGER else pl.Float64 for c in columns}
