"""What a policy sees of its task, `--view`. A view is added here, as one entry of `VIEWS`.

A policy applies its views before anything else, so that they are part of its size, its speed and its files. Student and
teacher may have different ones of the same observation.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from potstill.errors import InputError, meant

Array = NDArray[Any]
Steps = Mapping[int, Array]
"""By axis of an observation, (k,) int64, the places kept; or (k, n) float32, whose rows weigh all n places."""
GREY = (0.2989, 0.5870, 0.1140)  # of red, green and blue, as ALE rounds its palette


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
    """One kind of view."""

    written: str  # an example
    steps: Callable[[str, Observed], Steps]
    """What it does to an observation, of what stands after `=`."""


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


VIEWS: dict[str, View] = {
    "ROWSxCOLUMNS": View("42x42", _size),  # means over areas
    "crop": View("crop=10:84 or crop=10:84,0:42", _crop),  # rows, and columns, from the first to before the last
    "grey": View("grey", _grey),
    "frames": View("frames=1", _frames),  # the newest of a stack
    "keep": View("keep=0,2", _keep),  # these features, or channels
    "mask": View("mask=1,3", _mask),  # all but these
}
FULL = "full"


def chosen(view: tuple[str, ...], default: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What is seen where `view` is asked for: `default` where nothing is; after `full` whatever stands there."""
    if not view:
        return default
    return view[len(view) - view[::-1].index(FULL) :] if FULL in view else view


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
            name, _, value = entry.partition("=")
            if name[:1].isdigit():
                name, value = "ROWSxCOLUMNS", entry
            if (view := VIEWS.get(name)) is None:
                known = ", ".join(known.written for known in VIEWS.values())
                raise InputError(f"--view {entry!r} is unknown: {meant(name, VIEWS, f'there are {known}, {FULL}')}")
            try:
                steps = view.steps(value, seen)
            except InputError as error:
                why = str(error) or f"write it as {view.written}"
                raise InputError(f"--view {entry} of observations {seen.shape}: {why}") from error
            for axis, step in steps.items():
                self.axes[axis] = _after(self.axes[axis], step) if axis in self.axes else step
            sizes = (len(steps[axis]) if axis in steps else size for axis, size in enumerate(seen.shape))
            seen = seen._replace(shape=tuple(sizes))
        self.shape = seen.shape
        self._spans: dict[
            int, tuple[int, int]
        ] = {}  # where along an axis the first place lies that counts, and how many
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
