"""A task, a network, a loss and a teacher of your own. Commands take them by --import ./examples/my_tasks.py."""

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

LENGTH = 10


class Corridor(gym.Env[NDArray[np.float32], np.int64]):
    """Ten cells in a row. Action 1 goes right, 0 left; the last cell gives a point and ends the game."""

    observation_space = gym.spaces.Box(0, LENGTH, (2,), np.float32)  # the place, and the steps so far in tens
    action_space = gym.spaces.Discrete(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.steps = int(self.np_random.integers(3)), 0
        return self._seen(), {}

    def step(self, action: np.int64) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        self.place, self.steps = max(self.place + (1 if action else -1), 0), self.steps + 1
        there = self.place == LENGTH - 1
        return self._seen(), float(there), there, self.steps == 50, {}

    def _seen(self) -> NDArray[np.float32]:
        return np.array([self.place, self.steps / 10], np.float32)


gym.register("Corridor-v0", lambda **_: Corridor())


def wide(observation_shape: tuple[int, ...], width: float, units: str = "64") -> nn.Module:
    """Features (B, F) of observations (B, D). `--network-option units=128` gives other units."""
    return nn.Sequential(nn.Linear(observation_shape[0], round(int(units) * width)), nn.SiLU())


def hellinger(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Logits (B, L) of both -> one loss per state, (B,)."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return 1 - (p * q).sqrt().sum(-1)


def controller(observations: NDArray[np.float32]) -> NDArray[np.int64]:
    """A teacher without a network. Actions (N,) of observations (N, D); floats (N, A) would be logits."""
    return np.ones(len(observations), np.int64)
