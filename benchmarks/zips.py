"""Imports the RL Zoo's agents, holds each against Stable-Baselines3, and its mean score against the published one.

python benchmarks/zips.py FOLDER BENCHMARK.md [--episodes 100]

FOLDER has a folder for each agent, named ALGORITHM-TASK as the Zoo names them (ppo-CartPole-v1), with the zip in it and
VecNormalize's statistics where there are any. BENCHMARK.md is the Zoo's own table of means, benchmark.md of
DLR-RM/rl-baselines3-zoo.
"""

import argparse
from pathlib import Path

from common import Row, publish

from potstill.api import evaluate
from potstill.errors import InputError
from potstill.load import load
from potstill.load.check import check_sb3

NEWER = {"LunarLander-v2": "LunarLander-v3", "LunarLanderContinuous-v2": "LunarLanderContinuous-v3"}  # Gymnasium's own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("published", type=Path)
    parser.add_argument("--episodes", type=int, default=100, help="whole games of each, greedy")
    options = parser.parse_args()
    published: dict[str, float] = {}
    for line in options.published.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 9 and cells[4].replace(".", "").isdigit():
            published[f"{cells[1]}-{cells[2]}"] = float(cells[3])
    rows = [_row(path, published, options.episodes) for path in sorted(options.folder.rglob("*.zip"))]
    publish(
        "zips", rows, ["who", "algorithm", "parameters", "mean", "low", "high", "published", "inside", "acts as SB3"]
    )
    imported, inside = sum("mean" in row for row in rows), sum(row.get("inside") is True for row in rows)
    print(f"{imported} of {len(rows)} import; {inside} published means lie inside the 95 % interval")


def _row(path: Path, published: dict[str, float], episodes: int) -> Row:
    name = path.parent.name
    task = name.partition("-")[2]
    row: Row = {"who": name, "published": published.get(name)}
    try:
        loaded = load(path, NEWER.get(task, task))
        row |= {"algorithm": loaded.document["provenance"]["algorithm"], "acts as SB3": bool(check_sb3(loaded))}
        found = evaluate(loaded, episodes=episodes, quiet=True)
    except InputError as error:
        return row | {"error": str(error).replace(str(path), path.name)}
    row |= {key: found[key] for key in ("mean", "ci95", "distinct", "episodes", "parameters", "env") if key in found}
    low, high = found["ci95"] or (found["mean"], found["mean"])
    if row["published"] is not None:
        row["inside"] = bool(low - 0.005 <= row["published"] <= high + 0.005)  # it has two or three decimals
    return row | {"low": low, "high": high}


if __name__ == "__main__":
    main()
