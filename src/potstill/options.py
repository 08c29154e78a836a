"""Words of the command line to options, and figures to words: what every command needs."""

import ast
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

import tyro
from docstring_parser import attrdoc

from potstill.configs import MOST
from potstill.envs import check_seed
from potstill.errors import InputError, meant, printable
from potstill.menu import COMMANDS

T = TypeVar("T")
NARROWEST = 40  # columns of the help: in fewer tyro looks for room for ever

MANY = 13
FIRST = {
    "help", "help-all", "env", "out", "resume", "teachers", "arms", "width", "widths", "leads", "total-timesteps",
    "seed", "seeds", "keep", "budget", "minimise", "max-parameters", "threads", "workers", "evaluate", "quiet",
}  # fmt: skip
"""Options that a help shows where there are more than MANY; `--help-all` shows all."""

SAME = (
    {"episodes", "evaluate", "games"}, {"total-timesteps", "timesteps", "steps", "max-steps"}, {"env", "task", "game"},
    {"out", "output"}, {"learning-rate", "lr"}, {"width", "max-parameters"}, {"threads", "workers", "cores"},
)  # fmt: skip
"""Options of different commands, and of other programs, that say the same."""

ROW = re.compile(r"^  ((?:-h, )?--[a-z][a-z0-9-]*(?:, --[a-z][a-z0-9-]*)*)", re.MULTILINE)  # of an option, in a help


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
    if asked := {"-h", "--help", "--help-all"}.intersection(arguments):
        print(_help(cls, command, default, "--help-all" in asked)[0])
        sys.exit(0)
    options, more, wrong = _parsed(cls, arguments, command, default)
    lacked = {f"--{name}" for name in COMMANDS[command].without}
    if options is None or more or lacked.intersection(word.partition("=")[0] for word in arguments):
        raise _refusal(arguments, command, more, wrong, _help(cls, command, default)[1])
    for name, value in vars(options).items():  # those of a config are the config's to check
        if type(value) is int and abs(value) > MOST and name != "seed":
            raise InputError(f"{name.replace('_', '-')} must be at most {MOST:,}, not {value:,}")
    if hasattr(options, "seed"):
        check_seed(options.seed)
    return options


def lacking(command: str, *names: str) -> InputError:
    """The error where these were not given, with an example of the command."""
    return InputError(f"{command} needs {' and '.join(names)}, such as potstill {command} {COMMANDS[command].example}")


def _parsed(cls: type[T], arguments: Sequence[str], command: str, default: Any) -> tuple[T | None, list[str], str]:
    """What tyro makes of the arguments, those that it does not know, and what it prints where it ends."""
    keywords, said = {} if default is None else {"default": default}, StringIO()
    attrdoc.ast_get_constant_value = _in_one_line  # of our classes alone
    try:
        with redirect_stdout(said), redirect_stderr(said):
            options, more = tyro.cli(
                cls, args=list(arguments), prog=f"potstill {command}", return_unknown_args=True, **keywords,
                description=f"Such as: potstill {command} {COMMANDS[command].example}".rstrip(),
                config=(tyro.conf.SuppressFixed, tyro.conf.PositionalMetavarFromFieldName),
            )  # fmt: skip
    except SystemExit:
        return None, [], said.getvalue().rstrip()
    finally:
        attrdoc.ast_get_constant_value = _AS_IT_IS
    return options, more, ""


def _help(cls: type[Any], command: str, default: Any, whole: bool = False) -> tuple[str, list[str]]:
    """The help of a command, where it is long without the options that can wait; and the names of all its options."""
    page = _parsed(cls, ["--help"], command, default)[2]
    page = re.sub(r"(?m)\{None\}\|(.*?)(?=  |$)", r"\1       ", page)  # the text beside it stays where it was
    page = re.sub(r"\{(\[.*?\.\.\.\]+)\}", r"\1  ", page)
    page = re.sub(r"(?m)\s+\(default:\s*(?:None)?\)| +$", "", page)
    usage, _, page = page.partition("\n")
    page = textwrap.fill(usage, shutil.get_terminal_size().columns, subsequent_indent="    ") + f"\n{page}"
    short = not whole and len(ROW.findall(page)) > MANY
    lines, known, waiting, shown = [], list[str](), 0, True
    for line in page.splitlines():
        if row := ROW.match(line):
            names = re.findall(r"--([a-z0-9-]+)", row[1])
            lacks, waits = names[0] in COMMANDS[command].without, short and FIRST.isdisjoint(names)
            known += [] if lacks else names
            waiting += waits and not lacks
            shown = not (lacks or waits)
        lines += [line] * shown
    more = f"\n\n{waiting} more options: potstill {command} --help-all" if waiting else ""
    return "\n".join(lines) + more, known


def _refusal(arguments: Sequence[str], command: str, more: list[str], wrong: str, known: list[str]) -> InputError:
    """The error for arguments of which tyro does not know `more`, or where its box says what is `wrong`."""
    for word in arguments:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and name and name.replace("_", "-") not in known:
            same = next((option for group in SAME if name in group for option in known if option in group), None)
            hint = f"did you mean {same}?" if same else meant(name, known, f"see potstill {command} --help")
            return InputError(f"{command} has no option --{name}; {hint.replace('mean ', 'mean --')}")
    if more:
        hint = f", such as --env {more[0]}" if command == "train" else ""
        return InputError(f"{more[0]!r} is one word too many for {command}: it may want an option before it{hint}")
    if "Required options" in wrong.partition("\n")[0]:
        return lacking(command, *re.findall(r"^ {6}(\S+(?<=[A-Z])|--\S+)", wrong, re.MULTILINE))
    said = " ".join(re.split(r"\n +-{3,}", wrong)[1].split())  # what follows the second rule is the help again
    if found := re.match(r"Error parsing (\S+): .*\b(int|float)\b.*?: '(.*?)'", said):
        option, kind, value = found.groups()
        percent = re.fullmatch(r"(-?\d+\.?\d*) ?%", value) if kind == "float" else None
        right = f": write {float(percent[1]) / 100:g}" if percent else ""
        said = f"{option} is a {'whole ' * (kind == 'int')}number, not {value!r}{right}"
    return InputError(f"{command}: {said.removeprefix('Error parsing ')}")


def peek(arguments: Sequence[str], flag: str, default: str) -> str:
    """The value of `flag`, before the defaults that depend on it are known."""
    for word, following in reversed(list(zip(arguments, [*arguments[1:], None], strict=False))):  # the last one counts
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
        decimals = 3 - (abs(value) >= 10) - (abs(value) >= 100)
        return f"{value:,.{decimals}f}".rstrip("0").rstrip(".")
    if isinstance(value, list):
        return " to ".join(describe_value(item) for item in value)
    return f"{value:,}" if type(value) is int else printable(value)
