"""Words of the command line to options, and figures to words: what every command needs."""

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from potstill.configs import MOST
from potstill.envs import check_seed
from potstill.errors import InputError, printable

T = TypeVar("T")
NARROWEST = 40  # columns of the help: in fewer tyro looks for room for ever


@dataclass(frozen=True, kw_only=True)
class Unnamed:
    """What a policy's file may not tell of it."""

    env: str | None = None
    """The task of a zip, a state dict, an ONNX file or code, which do not name it; other policies know theirs."""
    statistics: Path | None = None
    """VecNormalize's .pkl of a Stable-Baselines3 zip, or none. Default: the one beside the zip."""


def parse(cls: type[T], arguments: Sequence[str], command: str, default: Any = None) -> T:
    """The options of `potstill COMMAND` as a `cls`; exits 2 with a line of help where they are wrong."""
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    keywords = {} if default is None else {"default": default}
    options: T = tyro.cli(cls, args=list(arguments), prog=f"potstill {command}", **keywords)
    for name, value in vars(options).items():  # those of a config are the config's to check
        if type(value) is int and abs(value) > MOST and name != "seed":
            raise InputError(f"{name.replace('_', '-')} must be at most {MOST:,}, not {value:,}")
    if hasattr(options, "seed"):
        check_seed(options.seed)
    return options


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
