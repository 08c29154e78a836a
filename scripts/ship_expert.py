"""Puts a finished training run among the experts that ship: its files and a card made from its result.

python scripts/ship_expert.py pong_run/RUN experts/pong/seed-0
"""

import json
import shutil
import sys
from pathlib import Path

CARD = """# {name}

A {env} expert: PPO from scratch, width {width}, {parameters:,} parameters, {env_steps:,} agent steps, seed {seed}.

| evaluation | mean score |
|---|---|
| greedy, sticky actions {sticky} ({episodes} games, {distinct} distinct) | **{score:.2f}** ({low:.2f} to {high:.2f}) |
| sampled, sticky actions {sticky} ({episodes} games) | {score_sampled:.2f} |
| greedy, no sticky actions | {score_nosticky:.2f} |

In brackets the 95 % interval. It loses {p_negative:.0%} of its games and wins {point_win_rate:.1%} of the points.

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
    config = json.loads((run / "config.json").read_text())["config"]
    folder.mkdir(parents=True)
    for name in ("policy.safetensors", "config.json", "metrics.jsonl", "result.json"):
        shutil.copyfile(run / name, folder / name)
    low, high = result["ci95"]
    words = result | {
        "name": f"{config['env']['id']} expert, {folder.name}",
        "sticky": config["env"]["sticky"],
        "low": low,
        "high": high,
        "minutes": result["wall_seconds"] / 60,
        "folder": folder,
    }
    (folder / "README.md").write_text(CARD.format(**words))
    print(folder)


if __name__ == "__main__":
    main()
