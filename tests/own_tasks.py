"""A user's own tasks, which tests import by name; nothing is registered."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Copy(gymnasium.Env):
    """Eight steps; the observation tells the right action. Perfect play scores 8."""

    action_space, observation_space = spaces.Discrete(3), spaces.Box(0, 1, (3,), np.float32)

    def observe(self):
        self.right = int(self.np_random.integers(3))
        return np.eye(3, dtype=np.float32)[self.right]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        reward, self.t = float(action == self.right), self.t + 1
        return self.observe(), reward, self.t == 8, False, {}


def copies(observations):
    """Plays `Copy` without a mistake."""
    return observations.argmax(-1)


class Picture(Copy):
    """The same as an image of 6 x 6 grey pixels, whose brightness tells."""

    observation_space = spaces.Box(0, 255, (6, 6), np.uint8)

    def observe(self):
        return np.full((6, 6), 80 * int(np.argmax(super().observe())), np.uint8)


class Photo(Picture):
    """The same in colour, the channels last. It draws itself."""

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.full((6, 6, 3), 80 * self.right, np.uint8)

    observation_space = spaces.Box(0, 255, (6, 6, 3), np.uint8)

    def observe(self):
        return np.repeat(super().observe()[..., None], 3, -1)


def sees(photos):
    """Plays `Photo` without a mistake."""
    return photos[:, 0, 0, 0] // 80


class Dimmed(gymnasium.ObservationWrapper):
    """A view of a user's own: half of every number."""

    def observation(self, observation):
        return observation / 2


class Cue(gymnasium.Env):
    """Shows at first which of two actions is right, asks for it four steps later, and pays for nothing else.

    What does not remember the cue is right every other time."""

    action_space, observation_space = spaces.Discrete(2), spaces.Box(0, 1, (3,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.right = 0, int(self.np_random.integers(2))
        return np.eye(3, dtype=np.float32)[self.right], {}

    def step(self, action):
        self.t += 1
        shown = np.float32([0, 0, self.t == 4])
        return shown, float(self.t == 5 and action == self.right), self.t == 5, False, {}


class Recalls:
    """Plays `Cue` without a mistake."""

    def reset(self, begun):
        self.right = np.zeros(len(begun), int) if begun.all() else np.where(begun, 0, self.right)

    def __call__(self, observations):
        self.right = np.where(observations[:, :2].any(1), observations[:, 1], self.right).astype(int)
        return self.right
