"""Plays whole games of an exported policy: compiled C and Gymnasium, nothing of potstill."""

import argparse
import ctypes
import re
from pathlib import Path

import gymnasium
import numpy as np


def play(library: Path, task: str, seed: int) -> float:
    """The score of one game."""
    act = ctypes.CDLL(str(library.resolve()))[f"{library.stem}_act"]
    remembers = re.search(r"_MEMORY (\d+)", library.with_suffix(".h").read_text())
    memory = [np.zeros(int(remembers[1]), np.float32)] if remembers else []
    game = gymnasium.make(task)
    observation, _ = game.reset(seed=seed)
    space, score, over = game.action_space, 0.0, False
    while not over:
        shown, action = np.ascontiguousarray(observation), np.zeros(space.shape or (), space.dtype or np.float32)
        chosen = act(*(ctypes.c_void_p(each.ctypes.data) for each in (shown, *memory, action)))
        own = action if isinstance(space, gymnasium.spaces.Box) else chosen
        observation, reward, terminated, truncated, _ = game.step(own)
        score, over = score + float(reward), terminated or truncated
    return score


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path, help="the compiled policy, such as policy.so")
    parser.add_argument("task", help="the Gymnasium id of its task, such as CartPole-v1")
    parser.add_argument("--games", type=int, default=1, help="whole games to play, of seeds 0, 1, ... (default: 1)")
    options = parser.parse_args()
    scores = [play(options.library, options.task, seed) for seed in range(options.games)]
    print(f"mean {sum(scores) / len(scores):g} of {scores}")
