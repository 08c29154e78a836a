"""Words of the command line to options, and figures to words: what every command needs."""

import ast
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro
from docstring_parser import attrdoc

from potstill.configs import MOST
from potstill.envs import check_seed
from potstill.errors import InputError, meant, printable

T = TypeVar("T")
NARROWEST = 40  # columns of the help: in fewer tyro looks for room for ever

SAME = (
    {"episodes", "evaluate", "games"},
    {"total-timesteps", "timesteps", "steps", "max-steps"},
    {"learning-rate", "lr"},
    {"env", "task", "game"},
    {"out", "output"},
    {"threads", "workers", "cores"},
)
"""Options of different commands, and of other programs, that say the same."""


def _in_one_line(node: ast.AST) -> Any:
    """The docstring of an option without its line breaks: tyro begins a new line at every indented one."""
    value = getattr(node, "value", None)
    return " ".join(value.split()) if isinstance(value, str) else value


_AS_IT_IS = attrdoc.ast_get_constant_value


@dataclass(frozen=True, kw_only=True)
class Unnamed:
    """What a policy's file may not tell of it."""

    env: str | None = None
    """The task of a zip, a state dict, an ONNX file or code, which do not name it; other policies know theirs."""
    statistics: Path | None = None
    """VecNormalize's .pkl of a Stable-Baselines3 zip, or none. Default: the one beside the zip."""


def parse(cls: type[T], arguments: Sequence[str], command: str, default: Any = None) -> T:
    """The options of `potstill COMMAND` as a `cls`; exits 2 with what would be right where they are wrong."""
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    keywords = {} if default is None else {"default": default}
    known = list(_names(cls))
    for word in arguments:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and name and name.replace("_", "-") not in (*known, "help"):
            same = next((option for group in SAME if name in group for option in known if option in group), None)
            hint = f"did you mean {same}?" if same else meant(name, known, f"see potstill {command} --help")
            raise InputError(f"{command} has no option --{name}; {hint.replace('mean ', 'mean --')}")
    options: T
    attrdoc.ast_get_constant_value = _in_one_line  # of our classes alone
    try:
        options, more = tyro.cli(
            cls, args=list(arguments), prog=f"potstill {command}", return_unknown_args=True, **keywords
        )
    finally:
        attrdoc.ast_get_constant_value = _AS_IT_IS
    if more:
        hint = f", such as --env {more[0]}" if command == "train" else ""
        raise InputError(f"{more[0]!r} is one word too many for {command}: it may want an option before it{hint}")
    for name, value in vars(options).items():  # those of a config are the config's to check
        if type(value) is int and abs(value) > MOST and name != "seed":
            raise InputError(f"{name.replace('_', '-')} must be at most {MOST:,}, not {value:,}")
    if hasattr(options, "seed"):
        check_seed(options.seed)
    return options


def _names(cls: Any) -> Iterator[str]:
    """The options that tyro makes of a dataclass or a named tuple and of those inside it, without their dashes."""
    for name, hint in get_type_hints(cls, include_extras=True).items():
        inner, marks = getattr(hint, "__origin__", hint), getattr(hint, "__metadata__", ())
        if is_dataclass(inner) or hasattr(inner, "_fields"):
            yield from _names(inner)
        elif tyro.conf.Positional not in marks:
            name = next((mark.name for mark in marks if getattr(mark, "name", None)), name).replace("_", "-")
            yield from (name, f"no-{name}") if inner is bool else (name,)


def peek(arguments: Sequence[str], flag: str, default: str) -> str:
    """The value of `flag`, before the defaults that depend on it are known."""
    for word, following in reversed(list(zip(arguments, [*arguments[1:], None], strict=True))):  # the last one counts
        if word == flag and following is not None:
            return following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return default


def fitted(sentence: str) -> str:
    """A sentence in lines that a terminal does not break; in one line where stdout is none."""
    return textwrap.fill(sentence, shutil.get_terminal_size().columns) if sys.stdout.isatty() else sentence


def describe_value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.3f}".rstrip("0").rstrip(".")
    if isinstance(value, list):
        return " to ".join(describe_value(item) for item in value)
    return f"{value:,}" if type(value) is int else printable(value)
