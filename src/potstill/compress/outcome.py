"""The folder of a compression: opened, searched for, and filled with what was found."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from potstill import evaluation
from potstill.compress.budget import training_seconds
from potstill.compress.config import CompressConfig, ladder, student_config
from potstill.compress.search import FINISHING, News, Search, steps
from potstill.errors import InputError
from potstill.export import onnx
from potstill.imports import check_shared
from potstill.load import Place, load, origin_of
from potstill.load.sb3 import import_sb3
from potstill.policies import load_policy
from potstill.report import compression
from potstill.storage.checkpoints import write_atomically
from potstill.storage.files import read_json
from potstill.storage.runs import Run
from potstill.training.runtime import Runtime
from potstill.watch import film

ARTEFACTS = ("report.html", "card.md", "game.mp4", "policy.onnx", "policy.safetensors", "result.json")
FILM_STEPS = 900  # agent steps, a minute of Atari


def open_compression(teacher: Place, config: CompressConfig, out: Path, runtime: Runtime) -> Run:
    """The directory of a compression: a new one, or one begun with the same settings, whose budget may have grown.

    Args:
        teacher: of which a Stable-Baselines3 zip is imported into the directory.

    Raises:
        InputError: nothing smaller than the teacher is asked for, `out` is something else's, a package is missing, or
            the budget would not train even the smallest student. Nothing is made then.
    """
    for package in ("onnx", "onnxruntime"):
        if find_spec(package) is None:
            raise InputError(f"compress needs {package}: pip install 'potstill[onnx]'")
    origin = origin_of(teacher)
    check_shared(str(origin.path))
    loaded = load(origin)
    if loaded.policy.sees_raw:
        raise InputError(f"{origin.path} has no size that a student could be smaller than: distil it, at a --width")
    widths = ladder(loaded.policy, config.max_parameters)
    settings = asdict(config)
    del settings["budget"]
    document = {"kind": "compress", **origin.document("teacher"), "teacher_hash": loaded.hash, "config": settings}
    if os.path.lexists(out):
        run = Run.open(out)
        if run.config.get("kind") != "compress":
            raise InputError(f"{out} exists and is no compression: choose another --out")
        if {key: run.config.get(key) for key in document} != json.loads(json.dumps(document)):
            raise InputError(f"{out} is a compression with other settings or another teacher: choose another --out")
    else:
        minutes = training_seconds(student_config(config, loaded, widths[0][0]), loaded, runtime) / 60
        if minutes > config.budget:
            raise InputError(
                f"a budget of {config.budget:g} minutes is too short: the smallest student alone takes {minutes:.1f} to"
                " train here"
            )
        run = Run.create(out, document)
    if origin.env is not None and not (run.path / "teacher").exists():
        import_sb3(origin.path, origin.env, run.path / "teacher", statistics=origin.statistics)
    return run


def search(run: Run, config: CompressConfig, runtime: Runtime, began: float | None = None) -> Iterator[News]:
    """Searches, unless that is done; at the end, result.json says what was found. The caller holds the run's lock.

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
        yield from steps(state)
    finally:
        state.save()
    run.write_result(_record(state))


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
            _trial(state, width, parameters)
            for width, parameters in state.ladder
            if width in state.errors or state.verdict(width) is not None
        ],
    }
    if chosen is None:
        return record
    loaded = load_policy(state.run.path / "runs" / state.run_name(chosen))
    trained = read_json(loaded.path.with_name("result.json"))
    found, games = state.share("confirm", chosen), state.games[f"confirm {chosen}"].summary()
    assert found is not None
    record |= {key: trained[key] for key in trained if key not in ("status", "kind", "teacher")}
    record |= evaluation.latency(loaded.policy) | {"share": found[0], "share_low": found[1]}
    keys = ("ci95", "median", "std", "p_negative", "distinct", "episodes", "point_win_rate", "returns")
    return record | {"score": games["mean"]} | {key: games[key] for key in keys}


def _trial(state: Search, width: str, parameters: int) -> dict[str, Any]:
    trial: dict[str, Any] = {"width": width, "parameters": parameters, "run": f"runs/{state.run_name(width)}"}
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


def finish(run: Run, runtime: Runtime) -> dict[str, Any]:
    """Writes what the search found, the page last; what is there already is left alone. Returns result.json.

    Of a search that reached nothing, card and page only. The film is cut where it would take longer than the share of
    the budget that is kept for all this.
    """
    record = result(run)
    assert record is not None
    until = time.monotonic() + 60 * FINISHING * record["budget"]
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
        exported = onnx.export(student, run.path / "policy.onnx", threads=runtime.cores, quiet=runtime.quiet)
        own = run.path / "teacher"
        teacher = load_policy(own if own.exists() else Path(run.config["teacher"]))
        try:
            pair = [("teacher", teacher), ("student", student)]
            film(pair, run.path / "game.mp4", seed=1, max_steps=FILM_STEPS, until=until, quiet=runtime.quiet)
            moving = (run.path / "game.mp4").read_bytes()
        except InputError as error:  # a task that draws no pictures: the student stands without
            missing = str(error)
    write_atomically(run.path / "card.md", compression.card(record, exported).encode())
    page = compression.page(record, exported, moving, missing)
    write_atomically(run.path / "report.html", page.encode())
    return record


def result(run: Run) -> dict[str, Any] | None:
    if not run.result_path.exists() or run.status != "done":
        return None
    return read_json(run.result_path)
