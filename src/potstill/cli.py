"""The command line: `potstill <command>`. Each command imports its room only when it is called."""

import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from potstill.menu import COMMANDS

LEAST_MEMORY = 800
"""MiB of address space without which importing torch, or the first run after it, may end the process."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 done, 1 the run failed, 2 bad input, 130/143 stopped and saved.

    What the user can mend is one line on stderr, never a traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _streams():
        code = _guarded(arguments)
    if code is not None:
        sys.exit(code)


def _guarded(arguments: list[str]) -> Any:
    """Runs a command; what to exit with, None where it has just ended."""
    from potstill.errors import InputError, failure

    try:
        try:
            if strange := next((word for word in arguments if any("\ud800" <= c <= "\udfff" for c in word)), None):
                raise InputError(f"{os.fsencode(strange)!r} is not UTF-8: names of files and folders must be")
            _run(arguments)
        except SystemExit as stop:
            return stop.code
        finally:
            sys.stdout.flush()  # here a full disk or a closed pipe can still be told; on the way out it cannot
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        return 0
    except BaseException as error:
        if (told := failure(error)) is None:
            raise
        failed = f"{_split(_without_imports(arguments)[1])[0]} failed: " if told.code == 1 else ""
        print(f"potstill: {failed}{told.line}", file=sys.stderr)
        return told.code
    return None


def _run(arguments: list[str]) -> None:
    imports, arguments = _without_imports(arguments)
    command, rest = _split(arguments)
    if not arguments or {"-h", "--help", "--help-all"}.intersection(command.split()):
        print(_usage())
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        from potstill import __version__

        print(f"potstill {__version__}")
        return
    import signal
    import threading
    from importlib import import_module

    from potstill.errors import InputError, meant, terminate

    if command not in COMMANDS:
        study = ", ".join(name for name in COMMANDS if name.startswith("study "))
        hint = f"write one of {study}" if arguments[0] == "study" else meant(command, COMMANDS)
        raise InputError(f"no command is called {command!r}; {hint}")
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise InputError("the working directory was deleted: change to another") from error
    _check_memory()

    main_thread = threading.current_thread() is threading.main_thread()  # no other may have handlers
    previous = signal.signal(signal.SIGTERM, terminate) if main_thread else None
    try:
        with _starting(command):
            _import(imports)
            module = import_module(f"potstill.commands.{COMMANDS[command].room}")
        getattr(module, re.sub("[- ]", "_", command))(rest)
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, previous)


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """The command's name, such as `study run`, and what follows it."""
    words = 1 + (arguments[:1] == ["study"])
    return " ".join(arguments[:words]), arguments[words:]


def _check_memory() -> None:
    """Refuses to begin where torch would end the process without a word."""
    if sys.platform == "win32":
        return
    import resource

    from potstill.errors import InputError

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < LEAST_MEMORY << 20:
        told = f"this process may have {limit >> 20} MiB of memory, and needs {LEAST_MEMORY} to start"
        raise InputError(f"{told}: raise the limit, such as ulimit -v")


@contextmanager
def _starting(command: str) -> Iterator[None]:
    """Says on a terminal that it goes on, until torch and its like are imported: that takes seconds."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"potstill {command}: starting", end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\x1b[2K", end="\r", file=sys.stderr, flush=True)


class _Stream(io.FileIO):
    """stdout, which names itself where it takes nothing more; or stderr, which then swallows what it is told: a run is
    worth more than its progress."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            if self.fileno() == 1:
                raise
        except OSError as error:
            if self.fileno() == 1:
                raise OSError(error.errno, error.strerror, "stdout") from None
        return memoryview(data).nbytes


@contextmanager
def _streams() -> Iterator[None]:
    """Makes the process's own stdin, stdout and stderr ones that can be relied on.

    Where one is closed, a file that is opened later would get its number, and whatever is printed would go into that.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):  # a closed stdout refuses what is printed
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # gets the first number that is free
    with ExitStack() as stack:
        for name, number in (("stdout", 1), ("stderr", 2)):
            if (before := getattr(sys, name)) is not None and before is not getattr(sys, f"__{name}__"):
                continue  # a notebook's or a test's
            raw = _Stream(number, "w", closefd=False)
            encoding, lines = getattr(before, "encoding", "utf-8"), number == 2 or raw.isatty()
            stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=lines)
            setattr(sys, name, stream)
            stack.callback(setattr, sys, name, before)
            stack.enter_context(suppress(OSError))  # what could not be written was told
            stack.callback(stream.close)
        yield


def _without_imports(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The modules that `--import MODULE` names, wherever it stands, and the other arguments."""
    named, rest = [], []
    for word in (words := iter(arguments)):
        flag, equals, value = word.partition("=")
        if flag == "--import":
            named.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    return named, rest


def _import(named: list[str]) -> None:
    """Imports what POTSTILL_IMPORT and the command line name."""
    from potstill.errors import InputError

    if "" in named:
        raise InputError("--import needs a module or a file, such as --import my_tasks or --import ./my_tasks.py")
    of_surroundings = filter(None, os.environ.get("POTSTILL_IMPORT", "").split(os.pathsep))
    for source, name in [*(("POTSTILL_IMPORT", each) for each in of_surroundings), *(("--import", n) for n in named)]:
        from potstill.imports import import_modules

        import_modules([name], source)


def _usage() -> str:
    longest = max(map(len, COMMANDS))
    opening = "usage: potstill COMMAND [OPTIONS]\nTrain a policy, distil it to smaller ones, measure what size buys.\n"
    commands = (f"  potstill {name:<{longest}}  {each.does}" for name, each in COMMANDS.items())
    closing = "\npotstill COMMAND --help lists its options; --help-all lists the rare ones too."
    imports = "--import MODULE, with any command, imports tasks or networks of yours first."
    return "\n".join((opening, *commands, closing, imports))


if __name__ == "__main__":
    main()
