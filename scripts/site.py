"""What MkDocs fills in while it builds the site: the help of every command, the columns of the tables, and files.

A page that would load anything from elsewhere stops the build, and so does a link to a file that is not there.
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from check_docs import ROOT, help_text

from potstill.menu import COMMANDS
from potstill.results import COLUMNS

TYPES = {"String": "text", "Int64": "whole number", "Float64": "number"}


def command_line() -> str:
    """A section per command with what its `--help-all` prints."""
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    shown = {f"potstill {name}": help_text("potstill", *name.split()) for name in COMMANDS}
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


LINKED = re.compile(r"^\[`[^`\n]+`\]\((?:\.\./)+([^)\n]+)\)$", re.MULTILINE)  # a line of nothing but a link to a file


def file_of(link: re.Match[str]) -> str:
    """The file itself, where GitHub shows the link to it."""
    path = Path(link[1])
    return f'```{path.suffix[1:]} title="{path}"\n{(ROOT / path).read_text()}```'


def on_page_markdown(markdown: str, **_: Any) -> str:
    for marker, made in MADE.items():
        if marker in markdown:
            markdown = markdown.replace(marker, made())
    return LINKED.sub(file_of, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    if loaded := re.findall(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)", output):
        raise SystemExit(f"{page.file.src_path} loads {loaded[0]}: the site works without a network")
    return output
