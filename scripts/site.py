"""What MkDocs fills in while it builds the site: the help of every command, and the columns of the tables.

A page that would load anything from elsewhere, or lacks a file that it includes, stops the build.
"""

import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from check_docs import help_text

from potstill.cli import COMMANDS
from potstill.results import COLUMNS

TYPES = {"String": "text", "Int64": "whole number", "Float64": "number"}


def command_line() -> str:
    """A section per command with what its `--help` prints."""
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    names = [name for name in COMMANDS if name != "study"] + [
        f"study {name}" for name in ("run", "status", "tune", "table")
    ]
    shown = {f"potstill {name}": help_text("potstill", *name.split()) for name in names}
    if missing := [name for name, text in shown.items() if text is None]:
        raise SystemExit(f"no help is printed by {', '.join(missing)}")
    return "\n\n".join(f"## {name}\n\n```text\n{(text or '').strip()}\n```" for name, text in shown.items())


PPO = [
    *("step", "seconds", "score", "games", "kl", "clip_fraction", "policy_loss", "value_loss", "entropy", "grad_norm"),
    *("learning_rate", "return_scale"),
]
DISTILLATION = [
    *("step", "seconds", "score", "games", "loss", "agreement", "action_difference", "grad_norm", "learning_rate"),
]


def columns(names: Iterable[str] = COLUMNS) -> str:
    """A table of these columns."""
    rows = [
        f"| `{column.name}` | {TYPES[column.dtype.__name__]} | {column.help.replace('|', chr(92) + '|')} |"
        for column in map(COLUMNS.__getitem__, names)
    ]
    return "\n".join(["| column | type | meaning |", "|---|---|---|", *rows])


MADE: dict[str, Callable[[], str]] = {
    "<!-- the command line -->": command_line,
    "<!-- the columns -->": columns,
    "<!-- the metrics of PPO -->": lambda: columns(PPO),
    "<!-- the metrics of distillation -->": lambda: columns(DISTILLATION),
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    for marker, made in MADE.items():
        if marker in markdown:
            markdown = markdown.replace(marker, made())
    return markdown


def on_post_page(output: str, page: Any, **_: Any) -> str:
    if loaded := re.findall(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)", output):
        raise SystemExit(f"{page.file.src_path} loads {loaded[0]}: the site works without a network")
    if "--8" in re.sub(r"<[^>]*>", "", output):  # a formatter of code once took the marker for Python
        raise SystemExit(f'{page.file.src_path} shows the marker of an include: write --8<-- "FILE"')
    return output
