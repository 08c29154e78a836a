"""Puts a finished training run among the policies that ship: its files and a card made from its result.

python scripts/ship_expert.py pong_run/RUN data/experts/pong/seed-0
"""

import json
import re
import shutil
import sys
from pathlib import Path

from potstill.load import load
from potstill.storage import checkpoints
from potstill.storage.runs import Run, config_hash, read_document

CARD = """# {name}

A {env} {kind}: PPO {start}, width {width}, {parameters:,} parameters, {env_steps:,} agent steps, seed {seed}.

| evaluation | mean score |
|---|---|
| greedy, sticky actions {sticky} ({episodes} games, {distinct} distinct) | **{score:.2f}** ({low:.2f} to {high:.2f}) |
| sampled, sticky actions {sticky} ({secondary_games} games) | {score_sampled:.2f} |{nosticky}

In brackets the 95 % interval.{points}

- Command: `{command}`
- Commit: `{commit}`
- Time: {minutes:.0f} minutes of training on {machine}
- Latency: {latency_ms:.2f} ms for one observation on one core (median)

Score it again: `potstill evaluate {folder} --episodes {episodes} --seed 1`
"""


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    run, folder = Path(sys.argv[1]), Path(sys.argv[2])
    result = json.loads((run / "result.json").read_text())
    made = json.loads((run / "config.json").read_text())
    config = made["config"]
    result["command"] = _anywhere(result["command"])
    result.setdefault(
        "secondary_games", result["episodes"]
    )  # as it was before a run could have other numbers of the two
    folder.mkdir(parents=True)
    shutil.copyfile(run / "metrics.jsonl", folder / "metrics.jsonl")
    tensors, document = checkpoints.load(run / "policy.safetensors")
    document["provenance"]["command"] = _anywhere(document["provenance"]["command"])
    checkpoints.save(folder / "policy.safetensors", tensors, document)
    for name in ("config.json", "result.json"):
        document = read_document(run / name)
        document["command"] = _anywhere(document["command"])
        if name == "result.json":  # which knows the other files, and itself, by their hashes
            document["config_hash"] = Run.open(folder).identity
            document["policy_hash"] = load(folder).hash
            document["digest"] = config_hash(document)
        (folder / name).write_text(json.dumps(document, indent=2) + "\n")
    low, high = result["ci95"]
    against = result["point_win_rate"] is not None and result["point_win_rate"] < 1  # somebody else scores too
    lost, won = f"{result['p_negative']:.0%}", f"{result['point_win_rate']:.1%}" if against else ""
    words = result | {
        "nosticky": f"\n| greedy, no sticky actions | {alone:.2f} |" if (alone := result["score_nosticky"]) else "",
        "points": f" It loses {lost} of its games and wins {won} of the points." if against else "",
        "kind": (kind := "student" if "initial" in made else "expert"),
        "start": f"from a student on, {Path(made['initial']).name}" if "initial" in made else "from scratch",
        "name": f"{config['env']['id']} {kind}, {folder.name}",
        "sticky": config["env"]["sticky"],
        "low": low,
        "high": high,
        "minutes": result["wall_seconds"] / 60,
        "folder": folder,
    }
    (folder / "README.md").write_text(CARD.format(**words))
    print(folder)


def _anywhere(command: str) -> str:
    """The command without the directory it wrote to, which is nobody else's."""
    return re.sub(r" --out \S+", "", command)


if __name__ == "__main__":
    main()
