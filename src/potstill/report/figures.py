"""What all figures and pages share: paper, style, and how one is written."""

import re
import zlib
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from potstill.errors import InputError
from potstill.storage.checkpoints import write_atomically

WIDTH = 7.2  # inches: 10 pt text is 13 px high where the figure is shown 700 px wide
GREY = "#555555"
FINEST = 20_000  # points of lines, or ten times those of dots, that a part of a figure draws; more become a picture
STYLE: Any = {  # matplotlib types the name of every setting
    "font.size": 10.0, "axes.labelsize": 10.0, "axes.labelcolor": "#222222", "axes.edgecolor": "#999999",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e6e6e6", "xtick.color": "#999999", "ytick.color": "#999999", "xtick.labelcolor": "#222222",
    "ytick.labelcolor": "#222222", "xtick.minor.bottom": False, "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.06, "figure.constrained_layout.w_pad": 0.06,
    "svg.hashsalt": "potstill",  # the same table, the same file
}  # fmt: skip


def template(name: str) -> Template:
    """A page or a card beside this file, to be rendered; what is put into a page is text, but for Markup."""
    beside = FileSystemLoader(Path(__file__).parent)
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=beside, autoescape=name.endswith(".html"), **options).get_template(name)


def svg(figure: Figure) -> Markup:
    """A figure as an element of a page: no prologue, names that no other figure there has, and text as text."""
    text = StringIO()
    points = {axes: sum(np.size(line.get_xdata()) for line in axes.lines) for axes in figure.axes}
    for axes in figure.axes:
        dots = sum(len(np.asarray(cloud.get_offsets())) for cloud in axes.collections)
        if points[axes] + 10 * dots > FINEST or sum(points.values()) > 3 * FINEST:
            for artist in (*axes.lines, *axes.collections):
                artist.set_rasterized(True)
    with rc_context(STYLE | {"svg.fonttype": "none", "path.simplify_threshold": 0.5}):
        figure.savefig(text, format="svg", dpi=100, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    element = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    useless = (
        r"font-family: [^;\"]*; |; font-family: [^;\"]*(?=\")| transform=\"rotate\(-0 [^\"]*\"|(?<=<g) id=\"[^\"]*\""
    )
    element = re.sub(useless, "", element)
    prefix = f"f{zlib.crc32(element.encode()):08x}-"
    element = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{prefix}", element)
    element = re.sub(r"(?<!: )(\d\.\d)\d+(?=[\s,\"])", r"\1", element)  # less than a tenth of a point is not seen
    element = re.sub(r"\s*\n\s*", "\n", element)
    opening, rest = element.split(">", 1)
    # As wide as the page lets it be, and in the font that it was laid out in, or one as wide. Matplotlib escapes text.
    opening = re.sub(r' (width|height)="[^"]*"', "", opening) + " font-family=\"'DejaVu Sans', Verdana, sans-serif\""
    return Markup(f"{opening}>{rest}")


def save(figure: Figure, path: Path) -> None:
    """Writes PNG (200 dpi) or SVG, as the suffix of `path` says, atomically; an older file there is replaced.

    Raises:
        InputError: another suffix, or the file cannot be written.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise InputError(f"{path}: figures are written as .png or .svg")
    data = BytesIO()
    with rc_context(STYLE):
        figure.savefig(data, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
    write_atomically(Path(path), data.getvalue())


def short(count: float) -> str:
    """A count in the fewest characters that tell sizes apart: 2.0k, 28k, 424k, 1.7M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * unit:
            value = count / unit
            return f"{value:.1f}{name}" if value < 9.95 else f"{value:.0f}{name}"
    return f"{count:g}"
