"""One vector-environment contract for training, collection and evaluation: real ALE, or a Gymnasium task."""

import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any, Literal, NamedTuple, cast

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import concatenate, iterate
from gymnasium.wrappers import AtariPreprocessing, FlattenObservation, FrameStackObservation, TimeLimit
from numpy.typing import NDArray
from tyro.conf import Fixed, UseAppendAction

from potstill.configs import bounded, normalise
from potstill.errors import RAISED, DivergedError, InputError, TaskError, first_line, meant
from potstill.imports import find, makers_of
from potstill.views import Shown, chosen, measures, name_of, part, sensed, wrapped

Array = NDArray[Any]
CHECKED_EVERY = 16  # steps between two observations in the checksum: all of Pong's would cost a hundredth of its speed


@dataclass(frozen=True)
class EnvConfig:
    """What a policy sees and may do. It travels with the policy: a score is always made on the task it learned."""

    id: Annotated[str, Fixed]
    """An ALE ROM in snake_case (`atari` is true), a Gymnasium id, or `module:name`, what makes a user's own task."""
    atari: Annotated[bool, Fixed] = False
    """Whether `id` names an ALE ROM."""
    actions: tuple[int, ...] | None = None
    """The environment's own actions the policy may choose from, by index; None means all. Discrete actions only."""
    sticky: float = 0.0
    """Probability that the emulator repeats the previous action instead (Machado et al. 2018), per emulator frame."""
    frame_skip: int = 4
    """Emulator frames per agent step (Atari only)."""
    frame_stack: int = 4
    """Frames an observation holds (Atari only)."""
    noop_max: int = 30
    """Each game starts with 1 to this many no-ops (Atari only)."""
    fire_on_reset: bool = False
    """Press FIRE when a game starts (Atari only), for games that wait for it."""
    hidden_rows: int = 0
    """Rows at the top of the 84 x 84 frame that the input normalisation sets to zero (Atari only): a scoreboard does
    not help to act, but tells the games of a rollout apart, to be learned by heart (Song et al. 2020)."""
    layout: Literal["auto", "flat", "first", "last", "stack"] = "auto"
    """How observations are read, where their space does not tell: flat numbers, an image whose channels come first or
    last, or a stack of frames, the newest last. auto: refuses what can be read in more than one way. Wherever a task is
    named, NAME@last says the same."""
    view: Annotated[tuple[str, ...], UseAppendAction] = ()
    """What the policy sees of an observation, one view after another: 42x42, an image made smaller by means over areas;
    crop=10:84 or crop=10:84,0:42, these rows and columns; grey, of red, green and blue; frames=1, the newest of a
    stack; keep=0,2 or mask=1,3, these features or channels, or all others; full, everything again. Before these, what
    the environment does: noise=0.1, of each feature's deviation in random play, or of all pixels'; delay=2, agent
    steps; ram, the console's memory (Atari only); objects, their positions (Pong only); or module:Wrapper, a Gymnasium
    wrapper of yours, of which what it shows counts. May be repeated."""
    max_frames: int = 108_000
    """Emulator frames after which a game is truncated: 30 minutes of play. Other tasks that set no limit of their own
    get as many agent steps, for a policy may learn to play for ever."""

    def __post_init__(self) -> None:
        normalise(self)
        object.__setattr__(self, "view", chosen(self.view))
        bounded(self, frame_skip=1 << 16, frame_stack=1 << 8, max_frames=2**31 - 1)
        if not 0 <= self.noop_max < 2**31:
            raise InputError(f"noop-max must be 0 or more, and below 2^31, not {self.noop_max}")
        if not 0.0 <= self.sticky < 1.0:
            raise InputError(f"sticky must be a probability below 1, not {self.sticky}")
        if not 0 <= self.hidden_rows < 84 or (self.hidden_rows and not self.atari):
            raise InputError(f"hidden-rows are 0 to 83 rows of an Atari frame, not {self.hidden_rows} of {self.id}")
        if self.sticky and not self.has_sticky_actions:
            raise InputError(f"{self.id} has no sticky actions: leave sticky at 0")

    @property
    def has_sticky_actions(self) -> bool:
        return self.atari or self.id.startswith("MinAtar/")


class Episode(NamedTuple):
    """One finished game."""

    row: int
    score: float  # sum of unclipped rewards
    length: int  # agent steps
    won: float  # sum of the positive rewards: in Pong, points scored
    lost: float  # minus the sum of the negative rewards: in Pong, points conceded
    truncated: bool
    fingerprint: int  # CRC-32 chained over everything the policy saw; 0 where not asked for


class Step(NamedTuple):
    """What one vector step returned. Rows whose game ended already show the first observation of the next game."""

    observations: Array  # (N, *observation shape), raw
    rewards: Array  # (N,) float32, unclipped
    terminated: Array  # (N,) bool
    truncated: Array  # (N,) bool
    final_observations: dict[int, Array]  # row -> last observation of the game that ended there
    episodes: list[Episode]


class Past(NamedTuple):
    """How games came to where they are: what `Envs.replay` plays again."""

    seed: int  # of the last reset
    actions: Array  # since, (steps, N), (steps, N, K) or (steps, N, d)
    checksum: int | None = None  # CRC-32 chained over what they brought about; None where it was not kept


class Envs:
    """N copies of one task, stepped together, resetting on the step a game ends (SAME_STEP autoreset).

    The state of an emulator cannot be read, but it is a function of the seed and of the actions since: `state` returns
    these and `replay` plays them again, after which every later step is the same as if nothing had happened. Whether
    it is, a checksum tells. So that nothing else outlives a reset (Box2D's world would), Gymnasium's tasks are made
    anew; ALE's reset leaves nothing behind.
    """

    inexact = False
    """Whether games that were played again came out otherwise, and the run went on."""

    def __init__(
        self, config: EnvConfig, num_envs: int, *, threads: int = 1, fingerprint: bool = False,
        beside: tuple[str, ...] | None = None,
    ) -> None:  # fmt: skip
        """Args:
        fingerprint: tell one of each episode.
        beside: another policy's view. Where the environment shows that otherwise than `config.view`, observations
            are records of both, with a field for each by `views.name_of`; `views.part` has one of them.
        """
        if num_envs < 1:
            raise InputError(f"the number of environments must be at least 1, not {num_envs}")
        self.config = config
        self.num_envs = num_envs
        self._fingerprint = fingerprint
        self._played = False
        views = dict.fromkeys(sensed(view) for view in (config.view, beside) if view is not None)
        self._native = config.atari and not any(views)  # whether it is ALE's own vector environment
        # Both kinds take actions by `send` and tell what came of them by `recv`.
        make = partial(make_atari, threads=threads) if self._native else partial(_make_gymnasium, views=[*views])
        self._make: Any = partial(make, config, num_envs)
        self._venv: Any = self._make()
        self.bounds: Array | None = None  # (2, d), least and greatest value of each continuous action, in its dtype
        self.choices: list[Array] = []  # of each of the choices made at once, the environment's own actions
        self.action_space = space = self._venv.single_action_space
        spaces = gymnasium.spaces
        if isinstance(space, spaces.Box):
            self.bounds = _bounds(config, space)
        elif isinstance(space, spaces.Discrete):
            indices = np.array(config.actions if config.actions is not None else range(int(space.n)))
            if len(np.unique(indices)) < max(2, len(indices)) or indices.min() < 0 or indices.max() >= space.n:
                raise InputError(
                    f"actions {config.actions} do not fit {config.id}, which has {space.n}: two or more, none twice"
                )
            self.choices = [int(space.start) + indices]
        elif isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary) and config.actions is None:
            many = space.nvec if isinstance(space, spaces.MultiDiscrete) else np.full(space.shape, 2)
            first = space.start if isinstance(space, spaces.MultiDiscrete) else np.zeros(space.shape, int)
            self.choices = [a + np.arange(n) for a, n in zip(np.ravel(first), np.ravel(many), strict=True)]
        else:
            raise InputError(
                f"{config.id} has {type(space).__name__} actions; potstill trains Discrete, MultiDiscrete, MultiBinary"
                " and Box ones" + (", and --actions chooses among Discrete ones" if config.actions else "")
            )
        shown: Any = self._venv.single_observation_space
        shown = shown.spaces if len(views) > 1 else {name_of(config.view): shown}
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(space.shape or ()) for name, space in shown.items()}
        observation_space = self.observation_space = shown[name_of(config.view)]
        readable = isinstance(observation_space, spaces.Box) and 0 not in observation_space.shape
        if not readable or np.dtype(observation_space.dtype).itemsize > 8:
            raise InputError(f"{config.id} has observations {observation_space}; potstill reads arrays, to 64 bits")
        self.parts: gymnasium.Space[Any] | None = None  # what observations are flattened from, a Dict for instance
        for each in [] if self._native else _wrappers(cast(Any, self._venv).envs[0]):
            if isinstance(each, FlattenObservation):
                self.parts = each.env.observation_space
        self.observation_shape = tuple(observation_space.shape)
        self.observation_dtype = observation_space.dtype
        self.layout = _layout(config, self._venv, self.observation_shape, np.dtype(self.observation_dtype))
        #: Whether frames may not be what `rollout.Preparer` takes them for. Those of ALE are, and views are read whole.
        self._doubtful = self.layout == "stack" and not self._native and not sensed(config.view)

    @property
    def continuous(self) -> bool:
        return self.bounds is not None

    @property
    def num_actions(self) -> int | tuple[int, ...]:
        """How many there are to choose from, of each choice where several are made at once; of continuous actions, how
        many are taken at once."""
        if self.bounds is not None:
            return int(self.bounds.shape[1])
        if isinstance(self.action_space, gymnasium.spaces.Discrete):
            return len(self.choices[0])
        return tuple(len(options) for options in self.choices)

    @property
    def spaces(self) -> dict[str, Any]:
        """What a policy for it sees and chooses: `Policy(config, **envs.spaces)`."""
        return {
            "observation_shape": self.observation_shape,
            "num_actions": self.num_actions,
            "continuous": self.continuous,
            "layout": self.layout,
            "dtype": np.dtype(self.observation_dtype).name,
            "view": self.config.view,
        }

    @property
    def action_dtype(self) -> "np.dtype[Any]":
        """In which actions are logged: bytes where they suffice."""
        most = max((len(options) for options in self.choices), default=0)
        return np.dtype(np.float32 if self.continuous else np.uint8 if most <= 256 else np.int64)

    def own_actions(self, actions: Array) -> Array:
        """A policy's actions, as `step` takes them, as the environment's own: for indices what they stand for, for
        numbers in units of half the range their value within the bounds, in the space's own shape and dtype."""
        space = self.action_space
        if self.bounds is not None:
            low, high = self.bounds
            own = (low + high) / 2 + (high - low) / 2 * np.clip(actions, -1.0, 1.0)
            own = np.clip(own, low, high)  # which rounding may leave
            own = np.rint(own) if np.dtype(space.dtype).kind in "biu" else own
        elif isinstance(self.num_actions, int):
            chosen: Array = self.choices[0][actions]
            return chosen
        else:
            own = np.stack([options[actions[:, k]] for k, options in enumerate(self.choices)], axis=1)
        typed: Array = own.reshape(-1, *space.shape).astype(space.dtype)  # type: ignore[misc]  # a Box has a shape
        return typed

    def random_actions(self, rng: np.random.Generator, *steps: int) -> Array:
        """Uniformly random actions, (*steps, N) indices, or (*steps, N, K) of K choices, or (*steps, N, d) float32 in
        units of half the range."""
        if self.bounds is not None:
            return rng.uniform(-1.0, 1.0, (*steps, self.num_envs, self.bounds.shape[1])).astype(np.float32)
        if isinstance(self.num_actions, int):
            return rng.integers(0, self.num_actions, (*steps, self.num_envs))
        return rng.integers(0, self.num_actions, (*steps, self.num_envs, len(self.choices)))

    def random_play(self, steps: int) -> Array:
        """Observations of the games of seed 0 as they begin and after each of so many uniformly random steps,
        ((steps + 1) N, *observation shape)."""
        actions = self.random_actions(np.random.default_rng(0), steps)
        return np.concatenate([self.reset(0), *(self.step(each).observations for each in actions)])

    def reset(self, seed: int, first: int = 0) -> Array:
        """Starts N games. The same seed gives the same games; (N, *observation shape) raw observations.

        Args:
            first: plays the games of more than N environments from this row on.
        """
        observations: Array
        check_seed(seed)
        seeds = np.random.SeedSequence(seed).generate_state(first + self.num_envs)[first:] & 0x7FFFFFFF
        if self._native:
            observations, _ = self._venv.reset(seed=seeds.astype(np.int64))  # ALE takes arrays
        else:
            if self._played:
                self._venv.close()
                self._venv = self._make()
            observations, _ = self._venv.reset(seed=seeds.tolist())
        self._played = True
        self._seed = seed
        self._log: list[Array] = []
        self.ages = np.zeros(self.num_envs, dtype=np.int64)  # agent steps since each row's game began
        self._won = np.zeros(self.num_envs)
        self._lost = np.zeros(self.num_envs)
        self._crc = [0] * self.num_envs
        self._check_observations(observations, steps=0)
        self._pad_stacks(observations)
        self._update_fingerprints(observations)
        self.shown, self._checksum = observations, 0  # (N, *observation shape) raw, as they are now
        return observations

    def step(self, actions: Array) -> Step:
        """Plays one action per environment: `send`, then `receive`."""
        self.send(actions)
        return self.receive()

    def send(self, actions: Array) -> None:
        """Tells the environments what to play. Atari games are played in threads of their own, until `receive`.

        Args:
            actions: (N,) ints in [0, num_actions), indices into `config.actions`; (N, K) of K choices; or (N, d)
                numbers in units of half the range of each action, -1 and 1 its bounds, clipped to them here.
        """
        actions = actions.astype(self.action_dtype)
        self._log.append(actions)
        self._venv.send(self.own_actions(actions))

    def receive(self) -> Step:
        """What came of the actions sent.

        Raises:
            DivergedError: the task returned a reward or an observation that is not finite.
            TaskError: its own code raised.
        """
        observations, rewards, terminated, truncated, info = self._venv.recv()
        rewards = np.asarray(rewards, dtype=np.float32)
        self._check_finite(rewards, "a reward")
        self._check_observations(observations)
        ended = np.flatnonzero(terminated | truncated)
        for row in ended[~terminated[ended]]:  # whose last observation tells what the game was worth
            self._check_observations(np.asarray(info["final_obs"][row])[None], row=int(row))
        if self._doubtful:
            self._check_frames(observations, ended)
        self.ages += 1
        self._won += np.maximum(rewards, 0.0)
        self._lost += np.maximum(-rewards, 0.0)
        finals = {int(row): np.asarray(info["final_obs"][row]) for row in ended}
        episodes = [self._finish(int(row), bool(truncated[row])) for row in ended]
        self._pad_stacks(observations)
        self._update_fingerprints(observations)
        self.shown = observations
        for what in (rewards, terminated, truncated):
            self._checksum = zlib.crc32(what.tobytes(), self._checksum)
        if len(self._log) % CHECKED_EVERY == 0:
            self._checksum = zlib.crc32(self._newest(), self._checksum)
        return Step(observations, rewards, terminated, truncated, finals, episodes)

    def state(self) -> Past:
        """The seed of the last reset, all actions since and a checksum of what came of them."""
        checksum = zlib.crc32(self._newest(), self._checksum)
        if not self._log:
            none = self.random_actions(np.random.default_rng(0), 0).astype(self.action_dtype)
            return Past(self._seed, none, checksum)
        return Past(self._seed, np.stack(self._log), checksum)

    def replay(self, past: Past, tolerant: bool = False) -> Iterator[Array]:
        """Resets and plays the actions of `past`, as `state` gave it, again.

        Args:
            tolerant: go on where other observations, rewards or ends come of it, and set `inexact`.

        Yields:
            The observations before each of these actions, and last those the run went on from.

        Raises:
            InputError: other observations, rewards or ends came of the same actions, and this is not `tolerant`.
        """
        observations = self.reset(past.seed)
        for actions in past.actions:
            yield observations
            observations = self.step(actions).observations
        if past.checksum not in (None, zlib.crc32(self._newest(), self._checksum)):
            if not tolerant:
                raise InputError(
                    f"{self.config.id} is not a function of its seed and actions: played again, the games went"
                    " otherwise, so that the run cannot go on exactly; --inexact goes on from where they are now"
                )
            self.inexact = True
        yield observations

    @property
    def closed(self) -> bool:
        return bool(self._venv.closed)

    def close(self) -> None:
        self._venv.close()

    def _check_observations(self, observations: Array, row: int | None = None, steps: int = 1) -> None:
        if not self._native:
            for name in observations.dtype.names or [...]:
                self._check_finite(observations[name], "an observation", row, steps)

    def _check_finite(self, values: Array, what: str, row: int | None = None, steps: int = 1) -> None:
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            at = tuple(np.argwhere(~np.isfinite(values))[0].tolist())
            row = at[0] if row is None else row
            raise DivergedError(
                f"{self.config.id} returned {what} that is not finite ({values[at]}) in environment {row},"
                f" {self.ages[row] + steps} steps into its game"
            )

    def _check_frames(self, observations: Array, ended: Array) -> None:
        """Refuses a stack that did not move up by one frame where a game goes on: only its newest is read."""
        now, before = (np.delete(part(shown, self.config.view), ended, 0) for shown in (observations, self.shown))
        if not np.array_equal(now[:, :-1], before[:, 1:]):
            raise InputError(
                f"{self.config.id} does not show the last frames of a game, the newest last: --layout first reads its"
                " images as channels"
            )

    def _finish(self, row: int, truncated: bool) -> Episode:
        won, lost = float(self._won[row]), float(self._lost[row])
        episode = Episode(row, won - lost, int(self.ages[row]), won, lost, truncated, self._crc[row])
        self.ages[row] = 0
        self._won[row] = self._lost[row] = 0.0
        self._crc[row] = 0
        return episode

    def _pad_stacks(self, observations: Array) -> None:
        """Fills the stack of a young game with its first frame, as Gymnasium's FrameStackObservation does.

        ALE's vector environment leaves zeros there, which no later observation holds and which normalise to outliers.
        """
        if not self._native:
            return
        for row in np.flatnonzero(self.ages < self.config.frame_stack - 1):
            missing = self.config.frame_stack - 1 - int(self.ages[row])
            observations[row, :missing] = observations[row, missing]

    def _newest(self) -> Any:
        """The bytes of what is shown now; of a stack its newest frame, for the others were seen before."""
        if names := self.shown.dtype.names:
            return b"".join(self.shown[name].tobytes() for name in names)
        return np.ascontiguousarray(self.shown[:, -1] if self._native else self.shown).data

    def _update_fingerprints(self, observations: Array) -> None:
        if self._fingerprint:
            newest = observations[:, -1] if self._native else part(observations, self.config.view)
            self._crc = [zlib.crc32(np.ascontiguousarray(newest[i]).data, crc) for i, crc in enumerate(self._crc)]


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that the random generators do not take."""
    if seed < 0:
        raise InputError(f"seed must not be negative, but is {seed}")
    if seed >= 2**63:
        raise InputError(f"seed must be below 2^63, not {seed}")


def _bounds(config: EnvConfig, space: "gymnasium.spaces.Box") -> Array:
    """The bounds of continuous actions, (2, d) float32 or float64; refuses those a clipped Gaussian does not fit."""
    if config.actions is not None:
        raise InputError(f"{config.id} has continuous actions: there are none to choose by --actions")
    dtype = space.dtype if space.dtype == np.float32 else np.float64
    bounds: Array = np.stack([space.low.ravel(), space.high.ravel()]).astype(dtype)
    with np.errstate(over="ignore"):  # of the greatest float32, which stands for no bound, the range is infinite
        finite = np.isfinite(2 * bounds.astype(np.float32)).all()
    if not bounds.size or not finite or (bounds[0] >= bounds[1]).any():
        raise InputError(
            f"{config.id} has actions without finite bounds, the low one below the high one: potstill needs a range to"
            " explore, such as gymnasium.wrappers.TransformAction gives"
        )
    return bounds


def _layout(config: EnvConfig, venv: Any, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Any:
    """How observations are read: from what is known of the task, from its space where only one way makes sense.

    Raises:
        InputError: there is more than one way, or what the user says does not fit.
    """
    fits = {"flat": True, "first": len(shape) in (2, 3), "last": len(shape) == 3, "stack": len(shape) == 3}
    if config.layout != "auto":
        if not fits[config.layout]:
            raise InputError(f"--layout {config.layout} reads images; {config.id} shows observations of shape {shape}")
        return config.layout
    if config.atari and len(shape) == 3:
        return "stack"
    if len(shape) < 2:
        return "flat"
    if config.id.startswith("MinAtar/"):
        return "last"
    stacks = (each for each in _wrappers(venv.envs[0]) if isinstance(each, FrameStackObservation))
    if len(shape) < 4 and any(each.observation_space.shape == shape for each in stacks):
        return "stack" if len(shape) == 3 else "flat"
    image = dtype in (np.uint8, np.bool_)
    if len(shape) == 2:
        return "first" if image and min(shape) >= 3 else "flat"
    if len(shape) == 3 and image:
        first, last = (n in (1, 3, 4) for n in (shape[0], shape[-1]))
        if first != last:
            return "first" if first else "last"
    elif len(shape) > 3:
        raise InputError(f"{config.id} shows observations of shape {shape}: {config.id}@flat takes them as numbers")
    raise InputError(
        f"{config.id} shows observations of shape {shape}, which can be read in several ways: say --layout first, last"
        f" (where the channels are), stack (of frames) or flat; or name the task so, as {config.id}@last"
    )


def make_atari(config: EnvConfig, num_envs: int, threads: int, **options: Any) -> VectorEnv[Any, Any, Any]:
    """ALE's emulators of a game; with `options` of ALE's own that differ from how a policy sees it."""
    import ale_py.roms
    from ale_py.vector_env import AtariVectorEnv

    if config.id not in ale_py.roms.get_all_rom_ids():
        hint = meant(config.id, ale_py.roms.get_all_rom_ids(), "see `python -m ale_py.roms`")
        raise InputError(f"ALE has no game {config.id!r}; {hint}")
    settings: dict[str, Any] = {
        "num_threads": min(threads, num_envs), "repeat_action_probability": config.sticky,
        "frameskip": config.frame_skip, "stack_num": config.frame_stack, "noop_max": config.noop_max,
        "use_fire_reset": config.fire_on_reset, "max_num_frames_per_episode": config.max_frames,
        "reward_clipping": False, "episodic_life": False, "autoreset_mode": AutoresetMode.SAME_STEP,
    }  # fmt: skip
    return AtariVectorEnv(config.id, num_envs, **settings | options)


def _copied(shown: Any) -> Any:
    return shown.copy() if isinstance(shown, np.ndarray) else deepcopy(shown)


class _Games(SyncVectorEnv):
    """Gymnasium's SyncVectorEnv with SAME_STEP autoreset, for tasks as people write them.

    Infos, which potstill does not read, may be of any shape; a reward may be an array of one number; an observation may
    be a buffer that the next reset writes over, or that all games share; and what a task's own code raises is told by
    task and step, SystemExit too, which would end the process as if all were done.
    """

    def __init__(self, name: str, games: Sequence[Any]) -> None:
        super().__init__(games, autoreset_mode=AutoresetMode.SAME_STEP)
        self._name, self._steps = name, 0

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        try:
            for i, env in enumerate(self.envs):
                self._env_obs[i] = _copied(env.reset(seed=seed[i])[0])
            return self._shown(), {}
        except RAISED as error:
            raise TaskError(f"{self._name} raised {first_line(error)}, when it was reset") from error

    def send(self, actions: Any) -> None:
        self._actions = actions

    def recv(self) -> tuple[Any, Array, Array, Array, dict[str, Any]]:
        rewards, finals = self._rewards, {}
        terminated, truncated = self._terminations, self._truncations
        self._steps += 1
        i = 0
        try:
            for i, action in enumerate(iterate(self.action_space, self._actions)):
                env = self.envs[i]
                shown, reward, terminated[i], truncated[i], _ = env.step(action)
                rewards[i] = reward if isinstance(reward, float | int) else float(np.asarray(reward).item())
                if terminated[i] or truncated[i]:
                    finals[i] = _copied(shown)
                    shown, _ = env.reset()
                self._env_obs[i] = _copied(shown)
            return self._shown(), rewards.copy(), terminated.copy(), truncated.copy(), {"final_obs": finals}
        except RAISED as error:
            where = f"in environment {i} at step {self._steps:,} of each"
            raise TaskError(f"{self._name} raised {first_line(error)}, {where}") from error

    def _shown(self) -> Any:
        if getattr(self._env_obs[0], "dtype", np.dtype(float)).names:  # a record of several views
            return np.stack(cast(list[Array], self._env_obs))
        shape = self.single_observation_space.shape
        if not shape:
            return deepcopy(concatenate(self.single_observation_space, self._env_obs, self._observations))
        shown = np.empty((self.num_envs, *shape), self.single_observation_space.dtype)
        try:
            np.concatenate(cast(list[Array], self._env_obs), out=shown.reshape(-1, *shape[1:]))
            told = [np.asarray(each) for each in self._env_obs]
            if shown.dtype.kind in "iu" and {each.dtype for each in told} != {shown.dtype} and (shown != told).any():
                raise ValueError("beyond what its space holds")
        except (TypeError, ValueError) as error:
            kinds = {f"{each.dtype} {each.shape}" for each in map(np.asarray, self._env_obs)}
            raise ValueError(f"it shows {', '.join(sorted(kinds))}, its space says {shown.dtype} {shape}") from error
        return shown


def emulator(config: EnvConfig, **options: Any) -> Any:
    """One emulator of a game, which gives every frame."""
    import ale_py
    from ale_py.registration import rom_id_to_name

    gymnasium.register_envs(ale_py)
    settings = {"repeat_action_probability": config.sticky, "max_num_frames_per_episode": config.max_frames}
    name = f"ALE/{rom_id_to_name(config.id)}-v5"
    return gymnasium.make(name, frameskip=1, disable_env_checker=True, **settings | options)


def played_alone(config: EnvConfig, **options: Any) -> "gymnasium.Env[Any, Any]":
    """A game as Gymnasium shows it, frame by frame: ALE's vector environment tells of nothing but its pictures."""
    frames = emulator(config, obs_type="grayscale", **options)
    env = AtariPreprocessing(frames, noop_max=config.noop_max, frame_skip=config.frame_skip)
    return _Fires(env) if config.fire_on_reset else env


class _Fires(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Presses FIRE when a game starts."""

    def reset(self, **options: Any) -> Any:
        shown, info = self.env.reset(**options)
        meanings = cast(Any, self.unwrapped).get_action_meanings()
        return (self.env.step(meanings.index("FIRE"))[0], info) if "FIRE" in meanings else (shown, info)


def _seen(config: EnvConfig, view: tuple[str, ...], game: "gymnasium.Env[Any, Any]") -> "gymnasium.Env[Any, Any]":
    """A game as the environment shows it of this view."""
    for number, entry in enumerate(view):
        before = replace(config, view=view[:number])
        game = game if ":" in entry else _as_array(game)  # a wrapper of the user's own wraps the game as it is
        game = wrapped(game, entry, partial(_deviation, before))
    return FrameStackObservation(_as_array(game), config.frame_stack) if config.atari else _as_array(game)


@cache
def _deviation(config: EnvConfig) -> Array:
    """Of each feature, or of all pixels of an image, in random play."""
    with closing(Envs(config, 1)) as envs:
        seen = envs.random_play(100 if len(envs.observation_shape) > 1 else 1_000)[1:]
    return np.asarray(seen.std(dtype=np.float64) if seen.ndim > 2 else seen.std(0, dtype=np.float64))


def maker(config: EnvConfig) -> Callable[..., Any]:
    """What makes a game as Gymnasium shows it, with options of Gymnasium's own."""
    if ":" in config.id:  # Gymnasium would import its module, which is to run it: here the user must have named it
        return cast(Callable[..., Any], find(config.id, "--env"))
    if config.atari:
        return partial(played_alone, config)
    register_minatar(config.id)
    options: dict[str, Any] = {"sticky_action_prob": config.sticky} if config.has_sticky_actions else {}
    # The checker looks at the first step alone, and warns of what does no harm here.
    return partial(gymnasium.make, config.id, disable_env_checker=True, **options)


def _make_gymnasium(config: EnvConfig, num_envs: int, views: Sequence[tuple[str, ...]]) -> VectorEnv[Any, Any, Any]:
    for view in views:  # before a game is made: of some simulators only one can run
        for number in [number for number, entry in enumerate(view) if measures(entry)]:
            _deviation(replace(config, view=view[:number]))
    new, made = maker(config), list[gymnasium.Env[Any, Any]]()

    def make() -> gymnasium.Env[Any, Any]:
        env = new()
        if not isinstance(env, gymnasium.Env) or any(env is other for other in made):
            what = "the same environment twice" if isinstance(env, gymnasium.Env) else f"a {type(env).__name__}"
            raise InputError(
                f"--env {config.id} makes {what}: it should make a new gymnasium.Env whenever it is called"
            )
        made.append(env)
        if config.id.startswith("MinAtar/"):
            env = _NothingSticks(env.unwrapped, config.max_frames // config.frame_skip)  # two layers less a step
        elif not config.atari and not any(isinstance(each, TimeLimit) for each in _wrappers(env)):
            env = TimeLimit(env, config.max_frames // config.frame_skip)
        if not any(views):
            return _as_array(env)
        return Shown(env, {name_of(view): partial(_seen, config, view) for view in views})

    try:
        with warnings.catch_warnings():  # of a task's age, which is no news to who asks for it
            warnings.simplefilter("ignore")
            return _Games(config.id, [make] * num_envs)
    except InputError:
        raise
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise InputError(f"{config.id} needs a package that is not installed: {first_line(error)}") from error
    except gymnasium.error.UnregisteredEnv as error:
        raise InputError(f"no task is registered as {config.id!r}{makers_of(config.id)}") from error
    except RAISED as error:  # a user's constructor raises whatever it likes
        raise InputError(f"{config.id} cannot be made: {first_line(error)}") from error


def _wrappers(env: "gymnasium.Env[Any, Any]") -> Iterator["gymnasium.Wrapper[Any, Any, Any, Any]"]:
    env = next(iter(env.views.values())) if isinstance(env, Shown) else env  # the policy's own
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env


def check_task(config: EnvConfig) -> None:
    """Makes one game of a task and starts it, before anything is built on it.

    Raises:
        InputError: that cannot be done, with the reason.
    """
    with closing(Envs(config, 1)) as envs:
        try:
            envs.reset(0)
        except TaskError as error:
            raise InputError(str(error)) from error


def is_builtin(config: EnvConfig) -> bool:
    """Whether a process that imports nothing of the user's knows the task."""
    spec = gymnasium.registry.get(config.id)
    known = ("gymnasium.envs.", "minatar.")
    return config.atari or config.has_sticky_actions or (spec is not None and str(spec.entry_point).startswith(known))


def _as_array(env: "gymnasium.Env[Any, Any]") -> "gymnasium.Env[Any, Any]":
    """Observations as one array each."""
    space = env.observation_space
    if isinstance(space, gymnasium.spaces.Box):
        return env
    parts: list[Any] = [space]
    for each in parts:
        if isinstance(each, gymnasium.spaces.Dict | gymnasium.spaces.Tuple):
            parts += each.spaces.values() if isinstance(each, gymnasium.spaces.Dict) else each.spaces
        elif len(each.shape or ()) > 1 or not each.is_np_flattenable:
            raise InputError(f"observations hold {each}; potstill reads arrays, and Dict and Tuple of vectors")
    return FlattenObservation(env)


class _NothingSticks(TimeLimit):
    """Starts a game without the sticky action of the last, which MinAtar remembers even across a seeded reset."""

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        cast(Any, self.unwrapped).game.last_action = 0
        return super().reset(**options)


class _Later(ModuleType):
    """Stands in for a module while another is imported that will hardly use it; imported when it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or sys.modules.get(self.__name__) is self:
            raise AttributeError(name)
        return getattr(import_module(self.__name__), name)


def register_minatar(name: str) -> None:
    if not name.startswith("MinAtar/") or "MinAtar/Breakout-v1" in gymnasium.registry:
        return
    drawing = ("matplotlib", "matplotlib.pyplot", "matplotlib.colors", "seaborn")  # two seconds, for its own window
    later = {each: _Later(each) for each in drawing if each not in sys.modules}
    try:
        sys.modules.update(later)
        from minatar.gym import register_envs
    except ImportError as error:
        raise InputError(f"{name} needs MinAtar: pip install 'potstill[minatar]'") from error
    finally:
        for each in later:
            del sys.modules[each]
    register_envs()
