"""Made-up studies whose truth is known, as records and as files. No policy was trained for any of them.

    python tests/report/synthetic.py 20000

makes so many records and prints what `potstill report` takes for them.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {"1/32": 1_981, "1/16": 7_230, "1/8": 27_544, "1/4": 107_000, "1/2": 424_000, "1": 1_690_000}
MACS = {"1/32": 70_000, "1/16": 228_000, "1/8": 640_000, "1/4": 2_100_000, "1/2": 7_500_000, "1": 28_000_000}
EXPONENT = -0.7  # of the odds of losing a point, in size: the same in every arm
HALF = 20_000  # parameters at which RL loses half the points
TEACHERS = ("seed-0", "seed-1", "seed-2")
RATIO = 3.0  # RL needs so many times the size of a student for the same score
ARMS = {"rl": 1.0, "distill-student": RATIO, "distill-teacher": 1.5}


def share_lost(parameters: float, better: float = 1.0) -> float:
    """The truth: a sigmoid in log size; an arm `better` times as good needs so many times less of it."""
    return 1 / (1 + math.exp(-EXPONENT * math.log(parameters * better / HALF)))


def score(lost: float) -> float:
    """Of a game to 21 with this share of the points lost, about."""
    return 21 * (1 - lost / (1 - lost)) if lost < 0.5 else -21 * (1 - (1 - lost) / lost)


def record(
    arm: str,
    width: str,
    seed: int,
    better: float,
    teacher: str | None = None,
    games: int = 20,
    noise: float = 0.05,
    converged: bool = True,
) -> dict[str, Any]:
    """One run that is done; `noise` is the deviation of its logit of the share lost."""
    rng = np.random.default_rng([zlib.crc32(f"{arm} {width} {teacher}".encode()), seed])
    logit = math.log(1 / share_lost(SIZES[width], better) - 1) + noise * rng.normal()
    mean = score(1 / (1 + math.exp(logit)))
    returns = np.clip(np.round(mean + rng.normal(0, 1.5, games)), -21, 21)
    steps = np.linspace(30_000, 1_500_000, 100)
    rise = 1 - np.exp(-steps / (100_000 if converged else 900_000))
    curve = -20.5 + (returns.mean() + 20.5) * rise + rng.normal(0, 0.3, steps.size)
    disagreement = 0.3 * share_lost(SIZES[width], better)
    taught = (
        {
            "teacher": teacher,
            "teacher_score": 19.0 + 0.3 * TEACHERS.index(teacher),
            "teacher_env_steps": 1_500_000,
            "teacher_gradient_steps": 35_000,
            "teacher_training_macs": 4e13,
            "agreement": 1 - disagreement,
            "agreement_teacher_states": 1 - 0.7 * disagreement,
            "kl": disagreement,
            "kl_teacher_states": 0.6 * disagreement,
        }
        if teacher
        else {"teacher": None}
    )
    points = [{"step": int(s), "seconds": s / 1000, "score": float(c)} for s, c in zip(steps, curve, strict=True)]
    return {
        "run": f"{arm}_width-{width.replace('/', '_')}_{f'teacher-{teacher}_' if teacher else ''}seed-{seed}",
        "status": "done",
        "kind": "distill" if arm.startswith("distill") else "train",
        "method": "distill" if "distill" in arm else arm.partition("-")[0],
        "arm": arm,
        "env": "pong",
        "width": width,
        "parameters": SIZES[width],
        "conv": SIZES[width] // 10,
        "linear": SIZES[width] - SIZES[width] // 10,
        "macs": MACS[width],
        "bytes": 4 * SIZES[width] + 56_448,
        "latency_ms": 0.1 + MACS[width] / 2e7 + 0.01 * rng.random(),
        "seed": seed,
        "env_steps": 1_500_000,
        "gradient_steps": 35_000,
        "training_macs": 1e7 * MACS[width],
        "wall_seconds": 1_500.0,
        "score": float(returns.mean()),
        "ci95": [float(returns.mean()) - 0.7, float(returns.mean()) + 0.7],
        "returns": returns.tolist(),
        "score_sampled": float(returns.mean()) - 1.5,
        "score_nosticky": min(21.0, float(returns.mean()) + 1),
        "p_negative": float((returns < 0).mean()),
        "point_win_rate": 1 - share_lost(SIZES[width], better),
        "distinct": games,
        "episodes": games,
        "random_score": -20.7,
        "starts": {str(k): {"score": float(returns.mean()) - k / 100} for k in (0, 50, 200, 500)},
        "curve": [point | ({"agreement": 1 - disagreement} if teacher else {}) for point in points],
        "machine": "a made-up machine",
        "commit": "0123456789ab",
        "command": "potstill study run plans/synthetic.toml",
        "precision": "float32",
        "threads": 1,
    } | taught  # fmt: skip


def study(
    arms: dict[str, float] = ARMS,
    widths: tuple[str, ...] = tuple(SIZES),
    seeds: int = 5,
    extended: bool = True,
    **made: Any,
) -> list[dict[str, Any]]:
    """Every arm at every width, students of TEACHERS in turn; rl-long beside rl if `extended`."""
    records = [
        record(arm, width, seed, better, None if arm.startswith("rl") else TEACHERS[seed % 3], **made)
        for arm, better in arms.items()
        for width in widths
        for seed in range(seeds)
    ]
    longer = [
        run | {"arm": "rl-long", "run": f"rl-long-{run['run']}", "env_steps": 2 * run["env_steps"]}
        for run in records
        if run["arm"] == "rl"
    ]
    return records + (longer if extended else [])


def write(folder: Path, records: list[dict[str, Any]], **beside: Any) -> Path:
    """A study's folder: one JSON file per run, and study.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for run in records:
        (folder / f"{run['run']}.json").write_text(json.dumps(run))
    document = {"name": "synthetic", "plan": 'name = "synthetic"\n', "potstill": "0.1.0", "planned": len(records)}
    (folder / "study.json").write_text(json.dumps(document | beside))
    return folder


def started(script: str, *words: str) -> str:
    """What Python says of a script in a process of its own."""
    command = [sys.executable, "-c", script, *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def measure(
    folder: Path, runs: int, resamples: int = 10_000, process: Callable[..., str] = started
) -> dict[str, float]:
    """What `potstill report` takes for `runs` records, which are made in `folder`, in a `process` of its own."""
    groups = 4 * len(SIZES)  # of three arms and longer runs of the first
    write(folder, study(seeds=-(-runs // groups))[:runs])
    page = folder / "report.html"
    # The kernel's own line of the peak: getrusage's begins with that of the process which started this one.
    script = """
import os, sys
from potstill.cli import main
main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(sum(os.times()[:2]), peak.split()[1])
"""
    began = time.monotonic()
    said = process(script, "report", str(folder), "--out", str(page), "--resamples", str(resamples))
    seconds, (cpu, kibibytes) = time.monotonic() - began, map(float, said.splitlines()[-1].split())
    return {"seconds": seconds, "cpu_seconds": cpu, "MB": kibibytes * 1024 / 1e6, "page_MB": page.stat().st_size / 1e6}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measures a report of made-up runs.")
    parser.add_argument("runs", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="report-") as folder:
        measured = measure(Path(folder) / "study", options.runs)
    print(", ".join(f"{value:.1f} {name.replace('_', ' ')}" for name, value in measured.items()))
