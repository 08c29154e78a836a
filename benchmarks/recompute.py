"""Computes the front page's numbers again from the JSON records, with numpy and json only, and prints both.

python benchmarks/recompute.py         # exits with 1 where a number on a page is not the one computed here

It shares no code with potstill, so a fault of the analysis shows here. A number agrees if it is that of the page once
it is rounded as the page rounds it.
"""

import itertools
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

ROOT = Path(__file__).resolve().parent.parent
GAMES = {"Pong": "first/pong", "Breakout": "first/minatar-breakout", "Space Invaders": "first/minatar-space-invaders"}
PAGES = ("README.md", "docs/results.md", "data/results/first/README.md")
PLAYS = {"greedy": "score", "sampled": "score_sampled"}
ARMS = {"RL": "rl", "RL, twice the steps": "rl-long", "student": "distill-student"}


@cache
def records(study: str) -> list[dict[str, Any]]:
    folder = ROOT / "data" / "results" / study
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.name != "study.json"]
    return [record for record in found if record["status"] == "done"]


def runs(study: str, arm: str, size: int, play: str) -> FloatArray:
    kept = [r for r in records(study) if (r["arm"], r["parameters"]) == (arm, size)]
    if play == "greedy":  # from the games themselves, not from the record's own mean
        return np.array([np.mean(r["returns"]) for r in kept])
    return np.array([r[PLAYS[play]] for r in kept])


def permutation_p(x: FloatArray, y: FloatArray) -> float:
    both, seen = np.concatenate([x, y]), abs(x.mean() - y.mean())
    splits = list(itertools.combinations(range(len(both)), len(x)))
    apart = [abs(both[list(s)].mean() - np.delete(both, s).mean()) for s in splits]
    return float(np.mean(np.array(apart) >= seen - 1e-9))


def rows(text: str, name: str) -> tuple[list[str], list[list[str]]]:
    block = re.findall(f"<!-- {name}: .*?-->(.*?)<!-- end of {name} -->", text, re.DOTALL)[0]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in block.strip().splitlines()]
    return cells[0], cells[2:]


def tables(page: str) -> Iterator[tuple[str, str, str]]:
    """(what, number computed, number on the page) of the two tables of docs/results.md and the records' README."""
    headings, body = rows(page, "side by side")
    for game, size, *cells in body:
        for heading, cell in zip(headings[2:], cells, strict=True):
            who, play = heading.rsplit(", ", 1)
            scores = runs(GAMES[game], ARMS[who], int(size.replace(",", "")), play)
            computed = f"{scores.mean():.1f} ({len(scores)})" if len(scores) else "-"
            yield f"{game} {size} {heading}", computed, cell
    for game, who, sizes, *cells in rows(page, "growth per doubling")[1]:
        low, high = (int(size.replace(",", "")) for size in sizes.split(" to "))
        for play, cell in zip(PLAYS, cells, strict=True):
            gain = runs(GAMES[game], ARMS[who], high, play).mean() - runs(GAMES[game], ARMS[who], low, play).mean()
            yield f"{game} {who} {sizes} per doubling, {play}", f"{gain / np.log2(high / low):+.1f}", cell


def iqm(x: FloatArray) -> float:
    rank, n = np.arange(len(x)), len(x)
    weights = np.clip(np.minimum(rank + 1, 0.75 * n) - np.maximum(rank, 0.25 * n), 0, None)
    return float(np.sort(x) @ weights / weights.sum())


def crossing(sizes: list[int], scores: list[float], target: float) -> tuple[float, float]:
    """Bounds of the size at which the monotone curve through the scores, linear in log size, reaches the target."""
    pools = [[score] for score in scores]
    while falls := [i for i, (a, b) in enumerate(itertools.pairwise(pools)) if np.mean(a) > np.mean(b)]:
        pools[falls[0] : falls[0] + 2] = [pools[falls[0]] + pools[falls[0] + 1]]
    curve = [float(np.mean(pool)) for pool in pools for _ in pool]
    at = next((i for i, score in enumerate(curve) if score >= target), None)
    if not at:
        return (sizes[-1], np.inf) if at is None else (0.0, sizes[0])
    share = (target - curve[at - 1]) / (curve[at] - curve[at - 1])
    exact = float(sizes[at - 1] * (sizes[at] / sizes[at - 1]) ** share)
    return exact, exact


def ratios(page: str) -> Iterator[tuple[str, str, str]]:
    """(what, number computed, number on the page): ratios of sizes, and tests corrected by Holm's method."""
    for game, arm, play, steps, told, tests in rows(page, "ratios by budget")[1]:
        study, budget, what = GAMES[game], float(steps.rstrip("M")) * 1e6, f"{game} {arm} {play} {steps}"
        found = [
            r for r in records(study) if r["arm"] in (arm, f"{arm}-long") and abs(r["env_steps"] / budget - 1) < 0.05
        ]
        pairs = {n: (runs(study, found[0]["arm"], n, play), runs(study, "distill-student", n, play))
                 for n in sorted({r["parameters"] for r in found})}  # fmt: skip
        pairs = {n: pair for n, pair in pairs.items() if min(map(len, pair)) > 1}
        curves = [[iqm(pair[i]) for pair in pairs.values()] for i in (0, 1)]
        for value, target in (cell.split(" at ") for cell in told.split("; ") if cell != "-"):
            (low, high), (least, most) = (crossing(list(pairs), curve, float(target)) for curve in curves)
            low, high = low / most, high / least if least else np.inf
            words = f"{low:.3g}" if low == high else f"> {low:.3g}" if low else f"<= {high:.3g}"
            yield f"{what}, ratio at {target}", words, value
        raw = {n: permutation_p(*pair) for n, pair in pairs.items()}
        order = sorted(raw, key=lambda n: raw[n])
        p = np.maximum.accumulate([min(1.0, raw[n] * (len(order) - i)) for i, n in enumerate(order)])
        corrected = dict(zip(order, p, strict=True))
        yield f"{what}, tests", "; ".join(f"{corrected[n]:.3f} at {n:,}" for n in pairs), tests


def sentences(page: str) -> Iterator[tuple[str, str, str]]:
    """(what, words computed, the same or "not there") of the sentences of README and docs/results.md."""
    said = {
        f"Breakout 2,189 {arm}": " and ".join(f"{runs(GAMES['Breakout'], arm, 2189, p).mean():.1f} {p}" for p in PLAYS)
        for arm in ("distill-value", "finetune", "rl-long")
    }
    for play in PLAYS:
        higher, sizes = 0, 0
        for study in GAMES.values():
            both = [{r["parameters"] for r in records(study) if r["arm"] == arm} for arm in ("rl", "distill-student")]
            means = [[runs(study, arm, n, play).mean() for n in both[0] & both[1]] for arm in ("rl", "distill-student")]
            higher, sizes = higher + sum(b > a for a, b in zip(*means, strict=True)), sizes + len(means[0])
        said[f"sizes at which students lead, {play}"] = f"at {higher} of {sizes} sizes"
        for name, first, size in (("pilot-pong", "first/pong", 1964), ("pilot-breakout", "pilot-breakout", 8471)):
            if (ROOT / "data" / "results" / name).is_dir():
                wide, small = (runs(*arm, size, play) for arm in ((name, "rl-split"), (first, "rl")))
                if len(wide) and len(small):
                    said[f"{name}, larger critic, {play}"] = f"from {small.mean():.1f} to {wide.mean():.1f} "
                if min(len(wide), len(small)) >= 5:  # else none is told
                    said[f"{name}, p, {play}"] = f"exact test, p = {permutation_p(wide, small):.3f}"
    for what, words in said.items():
        yield what, words, words if words in page else "not there"


def main() -> int:
    pages = "".join((ROOT / page).read_text() for page in PAGES)
    found = [*sentences(pages), *tables(pages), *ratios(pages)]
    wrong = [what for what, computed, page in found if computed != page]
    for what, computed, page in found:
        print(f"{what}: {computed}; on the page {page}" + ("  <-- differs" if what in wrong else ""))
    print(f"{len(found) - len(wrong)} of {len(found)} agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
