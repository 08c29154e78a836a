"""Measures what the README promises, with the commands a user types, and writes it to benchmarks/results/.

python benchmarks/targets.py expert [--seeds 0 1 2]          `python pong.py` with its defaults: score, minutes, memory
python benchmarks/targets.py student data/experts/pong/seed-2     width 1/8, one core: share of its point-win rate kept
python benchmarks/targets.py help                            seconds until `potstill --help` has answered

Run it on an otherwise quiet machine; runs go to a temporary folder and stay there. Seeds may be measured one by one, or
at the same time with `--threads 1` on a core each: the record of a seed replaces that of the same seed only.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, Row, child, commit, others, publish, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    expert = what.add_parser("expert")
    expert.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    expert.add_argument("--threads", type=int, default=0, help="of each run; 0: one per core")
    student = what.add_parser("student")
    student.add_argument("teacher", type=Path)
    student.add_argument("--seeds", type=int, nargs="+", default=[0])
    what.add_parser("help")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="potstill-"))
    if options.what == "expert":
        threads = ["--threads", str(options.threads)] if options.threads else []
        for seed in options.seeds:
            row = _run(["pong.py", "--seed", str(seed), *threads], folder / f"seed-{seed}")
            row |= {"who": "expert", "seed": seed, "commit": commit()}
            row |= {"threads": options.threads or "all", "low": row["ci95"][0], "high": row["ci95"][1]}
            rows = sorted([*others("expert", "expert", seed), row], key=lambda each: int(each["seed"]))
            save("expert", rows)
        keys = ["threads", "score", "low", "high", "score_sampled", "score_nosticky", "commit"]
    elif options.what == "student":
        command = ["distill.py", os.path.relpath(options.teacher, ROOT), "--width", "1/8", "--threads", "1"]
        rows = [_run([*command, "--seed", str(seed)], folder / f"seed-{seed}") for seed in options.seeds]
        for row in rows:
            row["kept"] = row["point_win_rate"] / row["teacher_point_win_rate"]
        keys = ["kept", "score", "teacher_score"]
    else:
        rows, keys = [_help()], []
    publish(options.what, rows, ["seed", "minutes", "peak_gib", *keys] if keys else ["seconds"])


def _run(command: list[str], out: Path) -> Row:
    """One run to its end; its result with the minutes of training and the peak memory of the process."""
    _, peak = child([*command, "--out", out])
    result: Row = json.loads((out / "result.json").read_text())
    del result["returns"]
    result["command"] = shlex.join(["python", *command])  # the folder is gone tomorrow
    return result | {"minutes": result["wall_seconds"] / 60, "peak_gib": peak}


def _help() -> Row:
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "potstill", "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begin)
    return {"seconds": sorted(times)[2], "command": "potstill --help"}


if __name__ == "__main__":
    main()
