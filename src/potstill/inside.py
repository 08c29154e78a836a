"""A policy's network as a picture: every weight, and what every layer passes on while it plays.

A row per layer: what it is, its weights, and to their right what it makes of this observation. All have one scale of
colours, blue below zero and orange above.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from potstill.envs import Array
from potstill.errors import InputError
from potstill.networks import CONVS, Policy, Trunk

MOST = 20_000  # parameters: each has pixels of its own
WIDTH, HEIGHT = 1280, 720  # pixels
MARGIN, GAME = 8, (380, 564)  # at the left and top; room for the game
ABOUT, WEIGHTS, PASSED = (404, 150), (560, 344), (916, 352)  # left and width: what a layer is, its weights, its output
TOP, LEAST_ROW = 36, 66  # below the headings; a row holds four lines of text
LINES = 640  # connections that are drawn as lines: more hide each other
DOTS = 64  # numbers that are drawn as dots
TILE, STRIP, LARGEST = 84, 260, 14  # pixels at most: a tile's side, a strip's length, a number's side
GAP = 2  # pixels between tiles
BACKGROUND, WHITE, PALE, DIM, YELLOW = (16, 16, 16), (255, 255, 255), (176, 176, 176), (96, 96, 96), (240, 228, 66)
ZERO, BELOW, ABOVE = (np.array(colour) for colour in ((44, 44, 44), (86, 180, 233), (255, 160, 30)))


class Layer(NamedTuple):
    """A module with parameters of its own, and one observation's way through it."""

    module: nn.Module
    reads: Array  # (F,) numbers or (C, H, W) maps
    passes: Array  # the same: what it gives, after its activation

    @property
    def parameters(self) -> dict[str, Array]:
        return {name: p.detach().cpu().numpy() for name, p in self.module.named_parameters(recurse=False)}

    @property
    def scale(self) -> float:
        """The largest magnitude of a parameter, which has the full colour."""
        return max(float(np.abs(values).max()) for values in self.parameters.values()) or 1.0

    @property
    def about(self) -> tuple[str, ...]:
        """What it is, in four short lines."""
        module: Any = self.module
        weight = max(self.parameters.values(), key=np.ndim)
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(module).__name__).lower()
        between = " x ".join(map(str, weight.shape))
        if isinstance(module, CONVS):
            name = f"conv {' x '.join(map(str, module.kernel_size))}, stride {module.stride[0]}"
            between = f"{module.in_channels} to {module.out_channels} channels"
        elif isinstance(module, nn.Linear):
            between = f"{module.in_features} to {module.out_features} numbers"
        count = sum(values.size for values in self.parameters.values())
        zeros = sum(int((values == 0).sum()) for values in self.parameters.values() if values.ndim > 1)
        size = f"{count - zeros:,} of {count:,} not 0" if zeros else f"{count:,} parameters"
        return name, between, size, f"full colour: ±{self.scale:.2g}"


class Watched:
    """Keeps what the layers of the deployed actor computed last, by forward hooks."""

    def __init__(self, policy: Policy) -> None:
        self._seen: dict[nn.Module, list[Tensor]] = {}  # what each read and gave, in the order of the pass
        self._chain = isinstance(policy.trunk, Trunk)  # whose activations are functions: the next layer reads them
        modules = [*policy.trunk.modules(), policy.actor]
        self._hooks = [module.register_forward_hook(self._keep, with_kwargs=True) for module in modules]

    def _keep(self, module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        read, given = next(iter((*inputs, *named.values()))), output[0] if isinstance(output, tuple) else output
        if next(module.parameters(recurse=False), None) is not None:
            self._seen.pop(module, None)
            self._seen[module] = [read, given]
        elif self._seen and read is (last := [*self._seen.values()][-1])[1] and read.shape == given.shape:
            last[1] = given  # an activation that is a module

    @property
    def layers(self) -> list[Layer]:
        """Of the last pass, which was of one observation."""
        seen = list(self._seen.items())
        layers, reads = [], [read for read, _ in self._seen.values()]
        for (module, (read, given)), following in zip(seen, [*reads[1:], seen[-1][1][1]], strict=True):
            if self._chain and following.numel() == given.numel():
                given = following.reshape(given.shape)
            elif self._chain and module is seen[-2][0]:  # gated units, whose memory is what the actor reads
                given = following
            layers.append(Layer(module, _array(read), _array(given)))
        return layers

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Inside:
    """Draws a policy's network beside its game, 1280 x 720."""

    names: Sequence[str]  # of the outputs, actions to choose among or numbers: to be set before the first step

    def __init__(self, policy: Policy, path: Path) -> None:
        """Args:
            path: of the policy, for messages.

        Raises:
            InputError: there is no network to see, or it is too large.
        """
        if policy.sees_raw:
            raise InputError(f"{path} is code, an ONNX file or a network with a memory: --inside draws none of these")
        if (parameters := policy.stored) > MOST:
            raise InputError(
                f"{path} has {parameters:,} parameters, and --inside draws {MOST:,} at most: leave it out, or watch a"
                f" smaller student, such as `potstill distill {path} --width 1/32` makes"
            )
        self._path, self._shape = path, policy.input_shape
        self._watched = Watched(policy)
        self._rows: list[_Row] = []
        self._paper = self._panel = Image.new("RGB", (WIDTH, HEIGHT))

    def step(self, inputs: Tensor, logits: Tensor, chosen: Sequence[int]) -> None:
        """Draws the pass that was made last.

        Args:
            inputs: (1, ...) prepared, that it was made of.
            logits: (1, L) that came of it.
            chosen: which of the names were.

        Raises:
            InputError: there are too many layers for the picture.
        """
        layers = self._watched.layers
        if not self._rows:
            self._lay_out(_array(inputs), layers)
        self._panel = self._paper.copy()
        outputs = _array(logits)[: len(self.names)]
        for row, values in zip(self._rows, [_array(inputs), *(layer.passes for layer in layers[:-1])], strict=False):
            row.draw(self._panel, values)
        self._rows[-1].draw(self._panel, outputs, chosen)
        if chosen:
            action = " + ".join(self.names[number] for number in chosen)
            _write(self._panel, (MARGIN, HEIGHT - 134), f"plays {action}", 22, YELLOW, GAME[0])

    def around(self, game: Array) -> Array:
        """The network of the last step and at its left a picture of the game, smaller if need be: (720, 1280, 3)."""
        frame = np.array(self._panel)
        if (ratio := min(GAME[0] / game.shape[1], GAME[1] / game.shape[0])) < 1:
            size = int(ratio * game.shape[1]), int(ratio * game.shape[0])
            game = np.asarray(Image.fromarray(game).resize(size, Image.Resampling.BOX))
        frame[MARGIN : MARGIN + len(game), MARGIN : MARGIN + game.shape[1]] = game
        return frame

    def about(self) -> list[tuple[str, ...]]:
        """What is said of what it sees and of each layer, in lines."""
        return [row.about for row in self._rows]

    def close(self) -> None:
        self._watched.close()

    def _lay_out(self, inputs: Array, layers: list[Layer]) -> None:
        """Decides where everything is, and draws what stays: words, weights and lines."""
        rows = [_Row(("it sees", f"{' x '.join(map(str, self._shape))} numbers", "normalised"), [], inputs)]
        for layer in layers:
            names = self.names if layer is layers[-1] else None
            row = _Row(layer.about, _blocks(layer, [each.first for each in rows]), layer.passes, names)
            weight = next(iter(layer.parameters.values()))
            if rows[-1].dots and row.dots and weight.shape == (row.first.size, rows[-1].first.size):
                row.lines = weight / layer.scale if weight.size <= LINES else None
            rows.append(row)
        spare = HEIGHT - TOP - sum(row.height for row in rows)
        while spare > 0 and (least := min(rows, key=lambda row: row.grown)).grown < 1:
            least.height += min(4, spare)
            spare -= 4
        if spare <= -4 or not all(row.cell and row.passed_cell for row in rows):
            raise InputError(
                f"{self._path} has {len(layers)} layers with weights, more than a picture of {WIDTH} x {HEIGHT} has"
                " room for: leave --inside out"
            )
        top = TOP
        for row in rows:
            row.top, top = top, top + row.height
        self._rows, self._paper = rows, _lines(rows)
        for (left, width), heading in zip(
            (ABOUT, WEIGHTS, PASSED), ("layer", "its weights", "what it passes on"), strict=True
        ):
            _write(self._paper, (left, 9), heading, 15, YELLOW, width)
        for row in rows:
            row.draw_what_stays(self._paper)
        ramp = Image.fromarray(_colours(np.linspace(-1, 1, 120)[None].repeat(12, 0)))
        self._paper.paste(ramp, (MARGIN + 66, HEIGHT - 88))
        for left, top, words in (
            (0, -91, "negative"), (66 + 128, -91, "positive; dark grey is 0"),
            (0, -67, "Weights, and below them biases, stay as they are."),
            (0, -47, "What is passed on changes with every step:"),
            (0, -29, "the full colour is the largest one of late."),
        ):  # fmt: skip
            _write(self._paper, (MARGIN + left, HEIGHT + top), words, 13, PALE, GAME[0] - left)


class _Row:
    """One layer's row: its words, its weights, and what it passes on, as tiles or as dots."""

    def __init__(
        self, about: tuple[str, ...], blocks: list[Array], first: Array, names: Sequence[str] | None = None
    ) -> None:
        """Args:
        blocks: of parameters, (rows, columns, h, w) tiles each, in units of the layer's scale.
        first: what it passes on at the first step.
        names: of the numbers, which are told then.
        """
        self.about, self.blocks, self.first = about, blocks, first
        self.dots = names is not None or (first.ndim == 1 and first.size <= DOTS)
        self.lines: Array | None = None  # (outputs, inputs) in [-1, 1], from the dots of the row above
        self.top, self.foot, self.scale = 0, 0, 1e-9
        self.spacing = min(PASSED[1] / first.size, 44 if names is None else 110)
        self.names, self.turned = names if self.spacing >= 15 else None, False  # else there is no room for them
        if self.names is not None:
            self.turned = max(_mask(name, 13).width for name in (*self.names, "-00.00")) + 4 > self.spacing
            self.foot = max(_mask(f"{name}  -00.00", 12).width for name in self.names) + 4 if self.turned else 38
        self.height = LEAST_ROW + self.foot
        count = np.arange(first.size) - (first.size - 1) / 2
        self.places: Array = PASSED[0] + PASSED[1] / 2 + count * self.spacing  # of the dots, from the left
        self.diameter = int(min(0.8 * self.spacing, 18))

    @property
    def cell(self) -> int:
        """Pixels of a weight, to a side."""
        return _cell(self.blocks, WEIGHTS[1], self.height - 8)

    @property
    def passed_cell(self) -> int:
        """Pixels of a number that is passed on, to a side."""
        return 1 if self.dots else _cell([_tiles(self.first)], PASSED[1], self.height - 8)

    @property
    def grown(self) -> float:
        """The share of the size from which on more room is of no use."""
        shares = [self.cell / max(1, _cell(self.blocks, WEIGHTS[1], HEIGHT))]
        shares += [] if self.dots else [self.passed_cell / max(1, _cell([_tiles(self.first)], PASSED[1], HEIGHT))]
        return min(shares + ([] if self.lines is None else [(self.height - self.foot) / 150]))

    @property
    def middle(self) -> int:
        """Of the dots, from the top of the picture."""
        return self.top + self.height - self.foot - 20

    def draw_what_stays(self, paper: Image.Image) -> None:
        for number, words in enumerate(self.about):
            where = ABOUT[0], self.top + 15 * number + (number > 0)
            _write(paper, where, words, 13 if number else 14, PALE if number else WHITE, ABOUT[1])
        top = self.top
        for block in self.blocks:
            sheet = _mosaic(block, self.cell, WEIGHTS[1])
            paper.paste(sheet, (WEIGHTS[0], top))
            top += sheet.height + GAP

    def draw(self, panel: Image.Image, values: Array, chosen: Sequence[int] = ()) -> None:
        """Draws what is passed on at this step."""
        self.scale = max(0.97 * self.scale, float(np.abs(values).max()))  # half of it is forgotten in 23 steps
        if not self.dots:
            panel.paste(_mosaic(_tiles(values / self.scale), self.passed_cell, PASSED[1]), (PASSED[0], self.top))
            return
        for number, (x, colour) in enumerate(zip(self.places, _colours(values / self.scale).tolist(), strict=True)):
            strong = number in chosen
            _paste(panel, YELLOW if strong else DIM, x, self.middle, _disc(self.diameter + (8 if strong else 2)))
            _paste(panel, tuple(colour), x, self.middle, _disc(self.diameter))
            if self.names is None:
                continue
            top = self.middle + 16
            name, value = self.names[number], f"{values[number]:+.2f}"
            for words in [f"{name}  {value}"] if self.turned else [name, value]:
                mask = _mask(words, 12 if self.turned else 13, self.turned)
                _paste(panel, YELLOW if strong else PALE, x, top + mask.height / 2, mask)
                top += mask.height


def _array(tensor: Tensor) -> Array:
    """One observation's numbers: (F,), or maps (C, H, W)."""
    values: Array = tensor.detach().float().cpu().numpy().squeeze()
    return values.reshape(-1) if values.ndim < 2 else values.reshape(-1, *values.shape[-2:])


def _blocks(layer: Layer, earlier: list[Array]) -> list[Array]:
    """A layer's parameters as tiles (rows, columns, h, w), in units of its scale.

    A kernel is a tile. So are, in a linear layer that reads maps, an output's weights for one of them; in others, all
    weights of an output, or of an input where these are more.
    """
    blocks = []
    for values in layer.parameters.values():
        v = values / layer.scale
        if v.ndim < 2:
            blocks.append(v.reshape(1, -1, 1, 1))
        elif prod(v.shape[2:]) > 1:
            blocks.append(v.reshape(len(v), -1, v.shape[-2] if v.ndim > 3 else 1, v.shape[-1]).swapaxes(0, 1))
        else:
            v = v.reshape(len(v), -1)
            tiles = v if len(v) >= v.shape[1] else v.T
            over = _over_maps(v, layer.reads, earlier)
            blocks.append(tiles[None, :, :, None] if over is None else over)
    return blocks


def _over_maps(weight: Array, reads: Array, earlier: list[Array]) -> Array | None:
    """Weights (O, I) over the maps that were made one row of numbers, (maps, O, h, w); None where none were."""
    for maps in reversed(earlier):
        channels, *sides = maps.shape
        if reads.ndim == 1 and maps.ndim == 3 and maps.size == weight.shape[1]:
            if np.array_equal(maps.ravel(), reads):
                return weight.reshape(-1, channels, *sides).swapaxes(0, 1)
            if np.array_equal(np.moveaxis(maps, 0, -1).ravel(), reads):
                return np.moveaxis(weight.reshape(-1, *sides, channels), -1, 0)
    return None


def _tiles(values: Array) -> Array:
    """Numbers as tiles (1, columns, h, w): a map each, a large one by the means of its squares."""
    if values.ndim < 3:
        return values[None, :, None, None]
    side = ceil(max(values.shape[1:]) / TILE)
    channels, rows, columns = (n // by for n, by in zip(values.shape, (1, side, side), strict=True))
    whole: Array = values[:, : rows * side, : columns * side]
    return np.asarray(whole.reshape(1, channels, rows, side, columns, side).mean((3, 5)))


def _gap(width: int) -> int:
    """Between tiles of so many columns."""
    return GAP if width > 1 else 1


def _wrapped(block: Array, cell: int, width: int) -> Array:
    """Tiles in lines no longer than `width`, whichever way round takes fewer; NaN where there are none."""
    ways = []
    for tiles in (block, block.swapaxes(0, 1)):
        rows, columns, h, w = tiles.shape
        most = max(1, (width + _gap(w)) // (w * cell + _gap(w)))
        bands = ceil(columns / most)
        filled = np.full((rows, bands * ceil(columns / bands), h, w), np.nan)
        filled[:, :columns] = tiles
        ways.append(filled.reshape(rows, bands, -1, h, w).swapaxes(0, 1).reshape(rows * bands, -1, h, w))
    return min(ways, key=len)


def _cell(blocks: list[Array], width: int, height: int) -> int:
    """The most pixels of a number, to a side, with which all blocks fit below each other; 0 where they do not."""
    limits = [(TILE if block.shape[3] > 1 else STRIP) // max(block.shape[2:]) for block in blocks]
    for cell in range(max(1, min([LARGEST, *limits])), 0, -1):
        shapes = [_wrapped(block, cell, width).shape for block in blocks]
        fits = all(columns * (w * cell + _gap(w)) <= width + _gap(w) for _, columns, _, w in shapes)
        if fits and sum(rows * (h * cell + _gap(w)) + GAP for rows, _, h, w in shapes) <= height:
            return cell
    return 0


def _mosaic(block: Array, cell: int, width: int) -> Image.Image:
    """Tiles (rows, columns, h, w) in [-1, 1] as a picture no wider than `width`; NaN is background."""
    tiles = _wrapped(block, cell, width)
    rows, columns, h, w = tiles.shape
    gap = _gap(w)
    sheet = np.empty((rows, columns, h * cell + gap, w * cell + gap, 3), np.uint8)
    sheet[:] = BACKGROUND
    sheet[:, :, :-gap, :-gap] = _colours(tiles).repeat(cell, 2).repeat(cell, 3)
    whole = sheet.swapaxes(1, 2).reshape(rows * (h * cell + gap), columns * (w * cell + gap), 3)
    return Image.fromarray(whole[:-gap, :-gap])


def _colours(values: Array) -> Array:
    """Numbers (...) to (..., 3) uint8: blue at -1, dark grey at 0, orange at 1."""
    v = np.clip(values, -1.0, 1.0)[..., None]
    mixed = ZERO + np.where(v > 0, v * (ABOVE - ZERO), -v * (BELOW - ZERO))
    return np.where(np.isnan(v), BACKGROUND, mixed).astype(np.uint8)


def _lines(rows: list[_Row]) -> Image.Image:
    """A paper with the lines between dots, the strongest on top, drawn three times as large and smoothed."""
    large = Image.new("RGB", (3 * WIDTH, 3 * HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(large)
    for above, row in pairwise(rows):
        weights = np.zeros((0, 0)) if row.lines is None else row.lines
        order = np.argsort(np.abs(weights), axis=None)
        for end, start in zip(*np.unravel_index(order, weights.shape), strict=True):
            places = 3 * above.places[start], 3 * above.middle, 3 * row.places[end], 3 * row.middle
            strength = abs(float(weights[end, start]))
            draw.line(places, tuple(_colours(weights[end, start]).tolist()), 1 + round(5 * strength))
    return large.reduce(3)


def cut(text: str, draw: ImageDraw.ImageDraw, font: Any, room: float) -> str:
    """`text`, or as much of its two ends as fits into `room` pixels: names of runs differ at either."""
    shown = text
    for kept in range(len(text) - 1, -1, -1):
        if draw.textlength(shown, font) <= room:
            return shown
        shown = text[: kept - kept // 2] + "…" + text[len(text) - kept // 2 :] if kept else ""
    return shown


def _write(image: Image.Image, where: tuple[int, int], words: str, size: int, colour: Any, room: int) -> None:
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    draw.text(where, cut(words, draw, font, room), colour, font)


def _paste(image: Image.Image, colour: Any, x: float, y: float, mask: Image.Image) -> None:
    """A colour through a mask whose middle is at (x, y)."""
    image.paste(colour, (round(x - mask.width / 2), round(y - mask.height / 2)), mask)


@lru_cache(maxsize=512)
def _mask(words: str, size: int, turned: bool = False) -> Image.Image:
    """Words, read from below where they are turned."""
    font = ImageFont.load_default(size)
    mask = Image.new("L", (ceil(font.getlength(words)), size + size // 3))
    ImageDraw.Draw(mask).text((0, 0), words, 255, font)
    return mask.rotate(90, expand=True) if turned else mask


@lru_cache(maxsize=64)
def _disc(diameter: int) -> Image.Image:
    large = Image.new("L", (8 * diameter, 8 * diameter))
    ImageDraw.Draw(large).ellipse([0, 0, 8 * diameter - 1, 8 * diameter - 1], 255)
    return large.reduce(8)
