"""What all figures share: paper, style, and how one is written to a file."""

from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from potstill.errors import InputError
from potstill.storage.checkpoints import write_atomically

WIDTH = 7.2  # inches: 10 pt text is 13 px high where the figure is shown 700 px wide
GREY = "#555555"
STYLE: Any = {  # matplotlib types the name of every setting
    "font.size": 10.0,
    "axes.labelsize": 10.0,
    "axes.labelcolor": "#222222",
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#999999",
    "ytick.color": "#999999",
    "xtick.labelcolor": "#222222",
    "ytick.labelcolor": "#222222",
    "xtick.minor.bottom": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
    "svg.hashsalt": "potstill",  # the same table, the same file
}


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
