"""The command line: `potstill <command>`. Each command imports its room only when it is called."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

COMMANDS = {
    "train": "an expert, from scratch, with PPO",
    "distill": "a student from a teacher",
    "compare": "several distillations on all cores, a table and figures",
    "study": "a plan's runs: run, status, table",
    "report": "a study's answers and figures in one offline HTML page",
    "compress": "the smallest student that keeps a share of the score",
    "evaluate": "a policy's score, with its interval and latency",
    "watch": "film a game, or teacher and student side by side",
    "export": "a policy as an ONNX file, checked against PyTorch",
    "import-sb3": "a Stable-Baselines3 zip as a policy, running none of it",
    "push": "a policy to the Hugging Face Hub, with a card",
    "pull": "a policy from the Hugging Face Hub, never a pickle",
    "info": "versions, devices, cores: what a bug report needs",
}
_ROOMS = {
    "commands.learning": ("train", "distill", "compress"),
    "commands.looking": ("report", "evaluate", "watch", "info"),
    "commands.exchange": ("export", "import-sb3", "push", "pull"),
    "commands.studying": ("compare", "study"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 done, 1 the run failed, 2 bad input, 130/143 stopped and saved."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        from potstill import __version__

        print(f"potstill {__version__}")
        sys.exit(0)
    command, *rest = arguments
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        _refuse(f"no command is called {command!r}; {hint}")
    _call(command, rest)


def _call(command: str, arguments: list[str]) -> None:
    """Calls a command; what the user can mend is one line on stderr and exit code 2, never a traceback."""
    import signal
    import threading
    from importlib import import_module

    from potstill.errors import DivergedError, InputError, TaskError, Terminated, printable, reason

    def terminate(number: int, frame: object) -> None:
        raise Terminated

    main_thread = threading.current_thread() is threading.main_thread()  # no other may have handlers
    previous = signal.signal(signal.SIGTERM, terminate) if main_thread else None
    try:
        arguments = _import_named(arguments)
        room = next(room for room, commands in _ROOMS.items() if command in commands)
        with _starting(command):
            module = import_module(f"potstill.{room}")
        getattr(module, command.replace("-", "_"))(arguments)
        sys.stdout.flush()  # here a full disk or a closed pipe can still be told; on the way out it cannot
    except InputError as error:
        _refuse(str(error))
    except (DivergedError, TaskError) as error:
        print(f"potstill: {command} failed: {printable(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as stop:
        print("potstill: stopped", file=sys.stderr)
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        _drop_output()
        sys.exit(0)
    except OSError as error:
        _drop_output()
        _refuse(printable(reason(error) + (f": {error.filename}" if error.filename else "")))
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, previous)


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


def _import_named(arguments: list[str]) -> list[str]:
    """Imports what POTSTILL_IMPORT and every `--import MODULE` name; returns the other arguments."""
    import os

    named, rest = [("POTSTILL_IMPORT", name) for name in os.environ.get("POTSTILL_IMPORT", "").split(os.pathsep)], []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--import":
            named.append((flag, value if equals else next(words, "")))
        else:
            rest.append(word)
    for source, name in named:
        if name:
            from potstill.imports import import_modules

            import_modules([name], source)
        elif source == "--import":
            _refuse("--import needs a module or a file, such as --import my_tasks or --import ./my_tasks.py")
    return rest


def _drop_output() -> None:
    """Where stdout takes nothing more, Python would say so a second time on its way out."""
    import os

    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(line: str) -> None:
    print(f"potstill: {line}", file=sys.stderr)
    sys.exit(2)


def _usage() -> str:
    lines = [
        "usage: potstill COMMAND [OPTIONS]",
        "",
        "Train a policy, distil it into smaller ones, measure what size buys.",
        "",
    ]
    lines += [f"  potstill {name:<10} {what}" for name, what in COMMANDS.items()]
    lines += ["", "potstill COMMAND --help lists a command's options with their defaults."]
    lines += ["--import MODULE, with any command, imports tasks or networks of yours first."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
