"""What a policy sees of its task, `--view`. A view is added here, as one entry of `VIEWS`.

Functions of the observation are the policy's: it applies them before anything else, so that they are part of its size,
its speed and its files. The others are the environment's, which shows student and teacher each its own of one step.
"""

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import takewhile
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.wrappers import TransformObservation
from numpy.typing import NDArray
from torch import Tensor, nn

from potstill.errors import RAISED, InputError, first_line, meant
from potstill.imports import find

Array = NDArray[Any]
MOST_WEIGHTS = 1 << 24  # of one axis, that means are taken with
Env = gymnasium.Env[Any, Any]
Steps = Mapping[int, Array]
"""By axis of an observation, (k,) int64, the places kept; or (k, n) float32, whose rows weigh all n places."""
GREY = (0.2989, 0.5870, 0.1140)  # of red, green and blue, as ALE rounds its palette
OBJECTS = {"pong": (49, 54, 51, 50)}
"""By game, where in its RAM positions lie; of Pong those of the ball (x, y), of the own paddle and of the other's (y).
Source: Anand et al. 2019, "Unsupervised State Representation Learning in Atari"."""


class Observed(NamedTuple):
    """An observation on its way through a policy's views."""

    shape: tuple[int, ...]
    layout: str  # as `networks.Layout` has it

    @property
    def image(self) -> tuple[int, int]:
        """The axes of rows and columns."""
        if self.layout == "flat":
            raise InputError("it is for images")
        rows = len(self.shape) - 2 - (self.layout == "last")
        return rows, rows + 1

    @property
    def features(self) -> int:
        """The axis of features, or of an image's channels."""
        if self.layout == "stack" or len(self.shape) != (1 if self.layout == "flat" else 3):
            raise InputError("it is for vectors, and for images with channels")
        return 0 if self.layout != "last" else 2


class View(NamedTuple):
    """One kind of view: of the policy, `steps`, or of the environment, `wrap`."""

    written: str  # an example
    steps: Callable[[str, Observed], Steps] | None = None
    """(what stands after `=`, an observation) -> what is done along its axes."""
    wrap: Callable[[Env, str, Callable[[], Array]], Env] | None = None
    """(a game, what stands after `=`, how to learn the deviation of its observations) -> the game so seen."""
    measures: bool = False
    """Whether it asks for that deviation, which is learned in a game of its own."""


def area(source: int, target: int) -> Array:
    """Means over equal parts of a line of `source` pixels, (target, source) float32: OpenCV's INTER_AREA, to shrink."""
    edges = np.linspace(0, source, target + 1)
    pixels = np.arange(source)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights: Array = (covered.clip(0) * (target / source)).astype(np.float32)
    return weights


def _numbers(value: str, pattern: str) -> list[int]:
    if not re.fullmatch(pattern, value, re.ASCII):
        raise InputError("")
    return [int(digits) for digits in re.findall(r"\d+", value)]


def _size(value: str, seen: Observed) -> Steps:
    wanted = dict(zip(seen.image, _numbers(value, r"\d{1,5}x\d{1,5}"), strict=True))
    for axis, size in wanted.items():
        if size * seen.shape[axis] > MOST_WEIGHTS:
            raise InputError("the image is too large")
        if not 0 < size <= seen.shape[axis]:
            raise InputError(f"the image has {seen.shape[axis]} {'rows' if axis == seen.image[0] else 'columns'}")
    return {axis: area(seen.shape[axis], size) for axis, size in wanted.items()}


def _crop(value: str, seen: Observed) -> Steps:
    ends, kept = _numbers(value, r"\d{1,5}:\d{1,5}(,\d{1,5}:\d{1,5})?"), {}
    for axis, low, high in zip(seen.image, ends[::2], ends[1::2], strict=False):
        if not low < high <= seen.shape[axis]:
            what = "rows" if axis == seen.image[0] else "columns"
            raise InputError(f"of {seen.shape[axis]} {what}, {low} to {high} cannot be kept")
        kept[axis] = np.arange(low, high)
    return kept


def _grey(value: str, seen: Observed) -> Steps:
    if value or seen.shape[seen.features] != 3 or seen.layout == "flat":
        raise InputError("it is for images of red, green and blue")
    return {seen.features: np.array([GREY], np.float32)}


def _frames(value: str, seen: Observed) -> Steps:
    (count,) = _numbers(value, r"\d{1,5}")
    if seen.layout != "stack" or not 0 < count <= seen.shape[0]:
        there = f"a stack of {seen.shape[0]} frames" if seen.layout == "stack" else "no stack of frames"
        raise InputError(f"the observation is {there}")
    return {0: np.arange(seen.shape[0] - count, seen.shape[0])}


def _keep(value: str, seen: Observed) -> Steps:
    chosen, there = _numbers(value, r"\d{1,9}(,\d{1,9})*"), seen.shape[seen.features]
    if max(chosen) >= there or len({*chosen}) < len(chosen):
        raise InputError(f"there are {there} features, 0 to {there - 1}, each to name once")
    return {seen.features: np.array(sorted(chosen))}


def _mask(value: str, seen: Observed) -> Steps:
    ((axis, hidden),) = _keep(value, seen).items()
    if len(hidden) == seen.shape[axis]:
        raise InputError("it leaves nothing to see")
    return {axis: np.setdiff1d(np.arange(seen.shape[axis]), hidden)}


class _Noisy(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Adds noise of a share of the deviation under random play: of each feature, or of all pixels of an image."""

    def __init__(self, env: Env, share: float, deviation: Callable[[], Array]) -> None:
        super().__init__(env)
        space = env.observation_space
        if not isinstance(space, gymnasium.spaces.Box) or space.dtype == np.bool_:
            raise InputError("it is for numbers")
        self._deviation, self._whole = share * deviation(), np.issubdtype(space.dtype, np.integer)
        self._dtype: Any = space.dtype
        self._ends = np.iinfo(self._dtype) if self._whole else np.finfo(self._dtype)
        if not self._whole:
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, space.shape, self._dtype)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._rng = np.random.default_rng([seed, 1])
        shown, info = self.env.reset(seed=seed, options=options)
        return self._noisy(shown), info

    def step(self, action: Any) -> Any:
        shown, *rest = self.env.step(action)
        return self._noisy(shown), *rest

    def _noisy(self, shown: Array) -> Array:
        noisy = shown + self._deviation * self._rng.standard_normal(np.shape(shown))
        return np.clip(np.rint(noisy) if self._whole else noisy, self._ends.min, self._ends.max).astype(self._dtype)


class _Delayed(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Shows what was so many steps ago; in a young game, how it began."""

    def __init__(self, env: Env, steps: int) -> None:
        super().__init__(env)
        self._steps = steps

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        shown, info = self.env.reset(seed=seed, options=options)
        self._waiting = deque([np.array(shown)] * self._steps)
        return shown, info

    def step(self, action: Any) -> Any:
        shown, *rest = self.env.step(action)
        self._waiting.append(np.array(shown))
        return self._waiting.popleft(), *rest


def _noise(game: Env, value: str, deviation: Callable[[], Array]) -> Env:
    if not re.fullmatch(r"\d{1,3}(\.\d{1,9})?|\.\d{1,9}", value, re.ASCII):
        raise InputError("")
    return _Noisy(game, float(value), deviation)


def _delay(game: Env, value: str, _: Callable[[], Array]) -> Env:
    (steps,) = _numbers(value, r"[1-9]\d{0,3}")
    return _Delayed(game, steps)


def _ram(game: Env, value: str, _: Callable[[], Array], places: Sequence[int] = range(128)) -> Env:
    """The console's RAM, or some bytes of it, in place of the picture: a frame of one row."""
    emulator: Any = game.unwrapped
    if value or not hasattr(emulator, "ale"):
        raise InputError("it is for Atari games")
    space = gymnasium.spaces.Box(0, 255, (1, len(places)), np.uint8)
    return TransformObservation(game, lambda _: emulator.ale.getRAM()[None, list(places)], space)


def _objects(game: Env, value: str, _: Callable[[], Array]) -> Env:
    known = game.unwrapped.spec.kwargs.get("game", "") if game.unwrapped.spec is not None else ""
    if known not in OBJECTS:
        raise InputError(f"where things are is known of {', '.join(OBJECTS)} alone")
    return _ram(game, value, _, OBJECTS[known])


VIEWS: dict[str, View] = {
    "ROWSxCOLUMNS": View("42x42", _size),  # means over areas
    "crop": View("crop=10:84 or crop=10:84,0:42", _crop),  # rows, and columns, from the first to before the last
    "grey": View("grey", _grey),
    "frames": View("frames=1", _frames),  # the newest of a stack
    "keep": View("keep=0,2", _keep),  # these features, or channels
    "mask": View("mask=1,3", _mask),  # all but these
    "noise": View("noise=0.1", wrap=_noise, measures=True),  # of the deviation
    "delay": View("delay=2", wrap=_delay),  # agent steps
    "ram": View("ram", wrap=_ram),
    "objects": View("objects", wrap=_objects),  # their positions
}
FULL = "full"


def chosen(view: tuple[str, ...], default: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What is seen where `view` is asked for: `default` where nothing is; after `full` whatever stands there."""
    if not view:
        return default
    return view[len(view) - view[::-1].index(FULL) :] if FULL in view else view


def sensed(view: tuple[str, ...]) -> tuple[str, ...]:
    """The environment's part of a view, which comes first."""
    return tuple(takewhile(_is_sensed, view))


def _is_sensed(entry: str) -> bool:
    return ":" in _named(entry)[0] or _kind(entry)[0].wrap is not None


def measures(entry: str) -> bool:
    """Whether an entry needs the deviation of what is shown before it."""
    return ":" not in _named(entry)[0] and _kind(entry)[0].measures


def name_of(view: tuple[str, ...]) -> str:
    """What the environment shows, by name: the field of a record of several."""
    return " ".join(sensed(view)) or FULL


def part(observations: Array, view: tuple[str, ...]) -> Array:
    """Of observations that may hold several views, what the environment shows of this one."""
    return np.ascontiguousarray(observations[name_of(view)]) if observations.dtype.names else observations


def _named(entry: str) -> tuple[str, str]:
    name, _, value = entry.partition("=")
    return ("ROWSxCOLUMNS", entry) if name[:1].isdigit() else (name, value)


def _kind(entry: str) -> tuple[View, str]:
    """A view and what stands after its `=`; InputError where there is none."""
    name, value = _named(entry)
    if name not in VIEWS:
        known = ", ".join(known.written for known in VIEWS.values())
        raise InputError(f"--view {entry!r} is unknown: {meant(name, VIEWS, f'there are {known}, {FULL}')}")
    return VIEWS[name], value


def _told(entry: str, shape: Any, error: InputError, written: str) -> InputError:
    return InputError(f"--view {entry} of observations {shape}: {str(error) or f'write it as {written}'}")


def wrapped(game: Env, entry: str, deviation: Callable[[], Array]) -> Env:
    """A game as an entry of the environment's part of a view shows it.

    Raises:
        InputError: the game has no such thing; or the wrapper is a user's, and not one that he named, or it raised.
    """
    if ":" in _named(entry)[0]:
        try:
            made: Env = find(entry, "--view")(game)
        except InputError:
            raise
        except RAISED as error:  # a user's wrapper raises whatever it likes
            raise InputError(f"--view {entry} cannot be made: {first_line(error)}") from error
        if not isinstance(made, gymnasium.Wrapper):
            raise InputError(f"--view {entry} makes a {type(made).__name__}: it should be a gymnasium.Wrapper")
        return made
    view, value = _kind(entry)
    assert view.wrap is not None
    try:
        return view.wrap(game, value, deviation)
    except InputError as error:
        raise _told(entry, game.observation_space.shape, error, view.written) from error


class _Told(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A game that somebody else plays: whoever asks for a step hears what came of the last one. What is drawn here at
    random leaves the game's own chances alone."""

    told: Any = None

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if seed is not None:
            self._random = np.random.default_rng([seed, 2])
        told, self.told = self.told, None
        return told

    def step(self, action: Any) -> Any:
        if self.told is None:
            raise InputError("a view asked for a second step: it may only show what the game does")
        told, self.told = self.told, None
        return told

    @property
    def np_random(self) -> np.random.Generator:
        return self._random

    @np_random.setter
    def np_random(self, value: np.random.Generator) -> None:
        self._random = value


class Shown(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A game as its views show it, by name: an array, or of several views a record, all of the same step."""

    def __init__(self, env: Env, views: Mapping[str, Callable[[Env], Env]]) -> None:
        super().__init__(env)
        self._told = {name: _Told(env) for name in views}
        self.views = {name: view(self._told[name]) for name, view in views.items()}
        spaces: dict[str, Any] = {name: view.observation_space for name, view in self.views.items()}
        self._kind = np.dtype([(name, space.dtype, space.shape) for name, space in spaces.items()], align=True)
        self._alone = next(iter(spaces)) if len(spaces) == 1 else None
        own = gymnasium.spaces.Dict(spaces) if self._alone is None else spaces[self._alone]
        self.observation_space = own

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        told = self.env.reset(seed=seed, options=options)
        return self._seen(told, lambda view: view.reset(seed=seed, options=options)), {}

    def step(self, action: Any) -> Any:
        told = self.env.step(action)
        return self._seen(told, lambda view: view.step(action)), *told[1:]

    def _seen(self, told: Any, ask: Callable[[Env], Any]) -> Array:
        record = np.empty((), self._kind)
        for name, view in self.views.items():
            self._told[name].told = (deepcopy(told[0]), *told[1:])  # no view may change what another sees
            shown, kind = np.asarray(ask(view)[0]), self._kind[name]
            if shown.shape != kind.shape or not np.can_cast(shown.dtype, kind.base, "same_kind"):
                raise InputError(
                    f"--view {name} shows {shown.dtype} {shown.shape}, and its space says {kind.base} {kind.shape}"
                )
            record[name] = shown
        return record if self._alone is None else np.asarray(record[self._alone])


class Look(nn.Module):
    """Views as a policy applies them, one after another, (B, *raw shape) to (B, *shape): along each axis of an
    observation it keeps some places, or weighs them.

    Raises:
        InputError: a view is unknown, or the observation has no such thing.
    """

    def __init__(self, views: tuple[str, ...], shape: tuple[int, ...], layout: str) -> None:
        super().__init__()
        seen = Observed(shape, layout)
        self.axes: dict[int, Array] = {}
        for entry in views:
            if _is_sensed(entry):
                raise InputError(f"--view {entry} is shown by the environment: name it before {views[0]}")
            view, value = _kind(entry)
            assert view.steps is not None
            try:
                steps = view.steps(value, seen)
            except InputError as error:
                raise _told(entry, seen.shape, error, view.written) from error
            for axis, step in steps.items():
                self.axes[axis] = _after(self.axes[axis], step) if axis in self.axes else step
            sizes = (len(steps[axis]) if axis in steps else size for axis, size in enumerate(seen.shape))
            seen = seen._replace(shape=tuple(sizes))
        self.shape = seen.shape
        self._spans: dict[int, tuple[int, int]] = {}  # along an axis, the first place that counts, and how many
        for axis, step in self.axes.items():
            places = step if step.ndim == 1 else np.flatnonzero(step.any(0))
            low, count = int(places.min()), int(places.max() - places.min()) + 1
            self._spans[axis] = low, count
            rest = step[:, low : low + count] if step.ndim == 2 else step - low if len(step) < count else None
            tensor = torch.from_numpy(np.ascontiguousarray(rest)) if rest is not None else None
            self.register_buffer(f"axis{axis}", tensor, persistent=False)

    def forward(self, x: Tensor, dtype: torch.dtype, framed: bool = False) -> Tensor:
        """Args:
        dtype: of the result, and of what is computed.
        framed: `x` is one frame (B, ...) of each stack.
        """
        axes = {axis: axis + (not framed) for axis in self.axes if axis or not framed}
        for axis, at in axes.items():
            x = x.narrow(at, *self._spans[axis])
        x = x.to(dtype)
        for axis, at in axes.items():
            step = getattr(self, f"axis{axis}")
            if step is not None and step.dim() == 1:
                x = x.index_select(at, step)
            elif step is not None:
                x = (step.to(dtype) @ x.transpose(at, -2)).transpose(at, -2)
        return x

    @property
    def macs(self) -> int:
        """Multiply-adds for one observation; to leave something out costs none."""
        sizes, total = list(self.shape), 0
        for axis, step in reversed(self.axes.items()):  # the last one gives what is seen
            if step.ndim == 2:
                total += int(np.count_nonzero(step)) * int(np.prod(sizes)) // sizes[axis]
                sizes[axis] = self._spans[axis][1]
        return total

    @property
    def numbers(self) -> int:
        """How many it has to keep to do its work."""
        return sum(
            int(np.count_nonzero(step)) if step.ndim == 2 else len(step)
            for axis, step in self.axes.items()
            if getattr(self, f"axis{axis}") is not None
        )


def _after(first: Array, then: Array) -> Array:
    """Two steps along an axis as one."""
    if then.ndim == 1:
        return first[then]
    if first.ndim == 2:
        return np.asarray(then @ first)
    whole = np.zeros((len(then), first.max() + 1), np.float32)
    whole[:, first] = then
    return whole
