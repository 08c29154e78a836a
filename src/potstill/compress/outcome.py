"""The folder of a compression: opened, searched for, and filled with what was found."""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from potstill import evaluation
from potstill.compress.budget import FINISHING, training_seconds
from potstill.compress.choice import Trial
from potstill.compress.config import CompressConfig
from potstill.compress.search import FEWEST, News, Search, steps
from potstill.compress.shapes import shapes
from potstill.errors import InputError, need
from potstill.evaluation import Evaluation
from potstill.export import export
from potstill.imports import check_shared
from potstill.load import Place, load, origin_in, origin_of
from potstill.policies import LoadedPolicy, load_policy
from potstill.report import compression
from potstill.storage.checkpoints import write_atomically
from potstill.storage.runs import Run, read_document
from potstill.training.assessment import KEYS
from potstill.training.runtime import Runtime, provenance
from potstill.watch import film

ARTEFACTS = ("report.html", "card.md", "card.json", "game.mp4", "policy.onnx", "result.json")
FILM_STEPS = 900  # agent steps, a minute of Atari
DISTURBED = 20  # games of a policy under each disturbance, fewer where time is short


def open_compression(teacher: Place, config: CompressConfig, out: Path, runtime: Runtime) -> Run:
    """The directory of a compression: a new one, or one begun with the same settings, whose budget may have grown.

    Args:
        teacher: of code and ONNX files, whose size is unknown, students are as large as the default network at most.

    Raises:
        InputError: nothing smaller than the teacher is asked for, `out` is something else's, a package is missing, or
            the budget would not train even the smallest student, in the fewest steps. Nothing is made then.
    """
    need("compress", "onnx", "onnx", "onnxruntime")
    origin = origin_of(teacher)
    check_shared(str(origin.path))
    loaded = load(origin)
    smallest = shapes(loaded.policy, config)[0]
    settings = asdict(config)
    del settings["budget"]
    document = {"kind": "compress", **origin.document("teacher"), "teacher_hash": loaded.hash, "config": settings}
    if os.path.lexists(out):
        run = Run.open(out) if (Path(out) / "config.json").is_file() else None
        if run is None or run.config.get("kind") != "compress":
            raise InputError(f"{out} exists and is no compression: choose another --out")
        if {key: run.config.get(key) for key in document} != json.loads(json.dumps(document)):
            raise InputError(
                f"{out} is a compression with other settings, by another potstill or of another teacher: choose another"
                " --out"
            )
    else:
        minutes = FEWEST * training_seconds(replace(config.base, network=smallest.network), loaded, runtime) / 60
        if minutes > config.budget:
            raise InputError(
                f"a budget of {config.budget:g} minutes is too short: {FEWEST:.0%} of the steps of the smallest student"
                f" alone take {minutes:.2g} to train here; try --budget {math.ceil(20 * minutes)}"
            )
        run = Run.create(out, document | provenance(runtime))
    return run


def search(run: Run, config: CompressConfig, runtime: Runtime, began: float | None = None) -> Iterator[News]:
    """Searches, unless that is done; at the end, result.json says what was found. The caller holds the run's lock.

    Meanwhile policy.safetensors is the smallest student that is confirmed so far, and card.md and card.json say what is
    known.

    Args:
        began: when the call began, as `time.monotonic()` counts. Default: now.

    Raises:
        InputError: the teacher is no better than random play, or there is no time for its games.
        StudyInterrupted, KeyboardInterrupt: the same call goes on with it.
    """
    known = result(run)
    if known is not None and not (known["stopped"] == "budget" and config.budget > known["budget"]):
        return
    for name in ARTEFACTS:
        (run.path / name).unlink(missing_ok=True)
    runtime.apply()
    state = Search(run, config, runtime, began)
    try:
        for news in steps(state):
            if news.kind in ("screen", "confirm"):
                _keep_answer(state)
                _write_card(run, _record(state) | {"why": "the search goes on"}, {})
            yield news
    finally:
        state.save()
    _keep_answer(state)
    run.write_result(_record(state))


def _keep_answer(state: Search) -> None:
    if state.chosen is not None:
        student = state.run.path / "runs" / state.name(state.chosen) / "policy.safetensors"
        write_atomically(state.run.policy_path, student.read_bytes())


def _write_card(run: Run, record: dict[str, Any], measured: dict[str, Any]) -> None:
    write_atomically(run.path / "card.md", compression.card(record, measured).encode())
    document = {key: value for key, value in record.items() if key != "returns"} | {"measured": measured}
    write_atomically(run.path / "card.json", json.dumps(document, indent=2, allow_nan=False).encode())


def _record(state: Search) -> dict[str, Any]:
    """What result.json holds."""
    config, teacher, chosen = state.config, state.teacher, state.chosen
    theirs, size = state.games["teacher"], teacher.policy.size()
    record: dict[str, Any] = {
        "status": "done",
        "kind": "compress",
        "reached": chosen is not None,
        "stopped": state.stopped,
        "why": state.reason,
        "floor": chosen is not None and chosen.place == 0,
        **{key: getattr(config, key) for key in ("keep", "confidence", "minimise", "max_parameters", "budget")},
        "measure": "point-win rate" if state.points else "return above random play",
        "seconds": state.clock.spent,
        "game_seconds": state.clock.game,
        "env": teacher.env.id,
        "sticky": teacher.env.sticky,
        "teacher": state.run.config["teacher"],
        "teacher_score": theirs.summary()["mean"],
        "teacher_point_win_rate": theirs.summary()["point_win_rate"],
        "teacher_size": None if teacher.policy.sees_raw else size._asdict() | {"network": str(teacher.policy)},
        "teacher_games": _told(theirs),
        "teacher_latency": evaluation.latency(teacher.policy),
        "random_score": None if state.points else state.games["random"].summary()["mean"],
        "trials": [_trial(state, t) for t in state.every if t in state.errors or state.played("screen", t)],
    }
    made_by = provenance(state.runtime)
    if chosen is None:
        return record | made_by
    loaded = load_policy(state.run.path / "runs" / state.name(chosen))
    trained = read_document(loaded.path.with_name("result.json"))
    found, games = state.confirmed(chosen), state.games[f"confirm {state.name(chosen)}"].summary()
    assert found is not None
    record |= {key: trained[key] for key in trained if key not in ("status", "kind", "teacher")} | made_by
    record |= {"shape": state.shapes[chosen.place].name, "network": str(loaded.policy), "way": chosen.way + 1}
    record |= evaluation.latency(loaded.policy) | {"share": found.share, "share_low": found.low}
    worst = min(games["returns"])
    return record | {"score": games["mean"], "worst": worst} | {key: games[key] for key in KEYS}


def _told(played: Evaluation) -> dict[str, Any]:
    games = played.summary()
    keys = ("mean", "ci95", "distinct", "episodes", "point_win_rate")
    return {key: games[key] for key in keys} | {"worst": min(games["returns"])}


def _trial(state: Search, trial: Trial) -> dict[str, Any]:
    name, shape, config = state.name(trial), state.shapes[trial.place], state.distillation(trial)
    record: dict[str, Any] = {"shape": shape.name, "way": trial.way + 1, "parameters": shape.size.parameters}
    record |= {"cost": shape.cost, "run": f"runs/{name}", "error": state.errors.get(trial)}
    record |= {"screen": None, "confirm": None}
    record |= {key: getattr(config, key) for key in ("total_timesteps", "lead", "objective", "seed")}
    if trial not in state.errors:
        kept, low = state.screened(trial)
        found = {"share": kept, "share_low": low if math.isfinite(low) else None}
        record |= {"screen": _told(state.games[f"screen {name}"]) | found, "outcome": state.outcome(trial)}
    if (confirmed := state.confirmed(trial)) is not None:
        found = {"share": confirmed.share, "share_low": confirmed.low, "passed": confirmed.passed}
        record["confirm"] = _told(state.games[f"confirm {name}"]) | found
    return record


def finish(run: Run, runtime: Runtime) -> dict[str, Any]:
    """Writes what the search found, the page last; what is there already is left alone. Returns result.json.

    Of a search that reached nothing, card and page only. Film and measurements are cut where they would take longer
    than what is left of the budget, of which a share is kept for all this.
    """
    record = result(run)
    assert record is not None
    if (run.path / "report.html").exists():
        return record
    budget = 60 * record["budget"]
    until = time.monotonic() + max(FINISHING * budget, budget - record["seconds"])
    for path in (*run.path.glob("policy*.[ch]"), run.path / "policy.onnx", run.path / "game.mp4"):
        path.unlink(missing_ok=True)  # of a call that was stopped here
    measured, moving, missing = {}, None, None
    if record["reached"]:
        student = load_policy(run.policy_path)
        teacher = load(origin_in(run.config, "teacher"))
        # A half of the time, for four times as many games of both.
        episodes = int(min(DISTURBED, (until - time.monotonic()) / 16 / record["game_seconds"]))
        bits = run.config["config"]["base"].get("bits", 32)
        measured["student"] = measure(student, run.path, episodes, runtime, bits)
        with TemporaryDirectory() as folder:
            measured["teacher"] = measure(teacher, Path(folder), episodes, runtime, stem="teacher")
        try:
            pair = [("teacher", teacher), ("student", student)]
            film(pair, run.path / "game.mp4", seed=1, max_steps=FILM_STEPS, until=until, quiet=runtime.quiet)
            moving = (run.path / "game.mp4").read_bytes()
        except InputError as error:  # a task that draws no pictures: the student stands without
            missing = str(error)
    _write_card(run, record, measured)
    page = compression.page(record, measured, moving, missing)
    write_atomically(run.path / "report.html", page.encode())
    return record


def measure(
    loaded: LoadedPolicy, folder: Path, episodes: int, runtime: Runtime, bits: int = 32, stem: str = "policy"
) -> dict[str, Any]:
    """Writes `stem`.onnx and `stem`.c into `folder`, and tells what the card says of them.

    Args:
        episodes: games of the ONNX file, or of C where there is none or `bits` ask for integers.

    Returns:
        `onnx` and `c`, as their exports have them, or None; by name, `why` not.
    """
    found: dict[str, Any] = {"why": {}}
    for name in ("onnx", "c"):
        integers = bits if name == "c" else 32
        games = 0 if integers != bits or (bits == 32 and found.get("onnx")) else episodes
        try:
            done = export(
                loaded,
                folder / f"{stem}.{name}",
                int8=integers == 8,
                int4=integers == 4,
                episodes=games,
                threads=runtime.cores,
                quiet=runtime.quiet,
                card=False,
            )
            found["why"] |= done["left_out"]
            model = done["models"].get(f"int{integers}", done["models"]["float32"])
            found[name] = model | {"path": Path(model["path"]).name}
        except InputError as error:  # a network that has no such file, or no compiler is there
            found[name] = None
            found["why"][name] = str(error)
    return found


def result(run: Run) -> dict[str, Any] | None:
    if not run.result_path.exists() or run.status != "done":
        return None
    return read_document(run.result_path)
