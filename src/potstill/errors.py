"""The one error that is the user's to fix, and words for the system's."""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import NamedTuple

LONGEST = 1_000  # characters of a message: a hostile name could be of any length
RAISED = (Exception, SystemExit)  # by code of the user's: the second would end a command as if all were done


class InputError(Exception):
    """Bad input, said in one clear line: what was wrong and what would be right.

    The command line prints it as `potstill: <line>` on stderr and exits with code 2, without a traceback. It may quote
    a stranger's file, so the line is made `printable` here, once for all who raise it.
    """

    def __init__(self, line: str) -> None:
        super().__init__(printable(line))


class DivergedError(Exception):
    """Something is no longer a finite number. Says where and why; what was saved before stands."""


class TaskError(Exception):
    """A task's own code raised while it was played. Says which task, where, and what was raised, in one line."""


class Stopped(Exception):
    """Somebody asked for it, and what there is is saved. A command exits with `code`."""

    code: int


class Terminated(KeyboardInterrupt):
    """SIGTERM, where no loop waits for it to save first: unwinds what is open, as Ctrl-C does."""


def terminate(number: int, frame: object) -> None:
    """Handles SIGTERM so."""
    raise Terminated


def need(what: str, extra: str, *packages: str) -> None:
    """Raises InputError where a package is missing that `what` needs, and that potstill's `extra` brings."""
    for package in packages:
        if find_spec(package) is None:
            raise InputError(f"{what} needs {package}: pip install 'potstill[{extra}]'")


def printable(text: object, longest: int = LONGEST) -> str:
    """`text` as one line that a terminal shows and does not obey: line breaks become spaces, and control characters,
    escape sequences and what turns the direction of writing become escapes such as \\x1b. Long text loses its middle.
    """
    line = _cut(str(text), longest)
    if len(lines := line.splitlines()) > 1:
        line = " ".join(text for part in lines if (text := part.strip()))
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return _cut(line, longest)


def meant(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """'did you mean pong?', or where nothing is near, `otherwise` or all that is known."""
    from difflib import get_close_matches

    near = get_close_matches(word, names := list(known), n=1)
    return f"did you mean {near[0]}?" if near else otherwise or f"known: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """'ValueError: too small': what somebody else's code raised, by kind and the first line of its words."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {printable(said, 300)}" if said else type(error).__name__


def _cut(line: str, longest: int) -> str:
    return line if len(line) <= longest else f"{line[: longest * 2 // 3]} ... {line[len(line) - longest // 4 :]}"


def reason(error: OSError) -> str:
    """'no space left on device': why the system refused, without error number or path."""
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


class Failure(NamedTuple):
    """How a command ends that could not do what it was asked for."""

    code: int
    line: str


def failure(error: BaseException) -> Failure | None:
    """Exit code and the one line that is due; None for what is a fault of ours, and deserves its traceback."""
    if lacking := [each for each in causes(error) if _lacks(each)]:
        return Failure(1, f"out of memory: {printable(lacking[-1]) or 'no more to be had'}")
    match error:
        case InputError():
            return Failure(2, str(error))
        case DivergedError() | TaskError():
            return Failure(1, printable(error))
        case Stopped():
            return Failure(error.code, str(error))
        case KeyboardInterrupt():
            return Failure(143 if isinstance(error, Terminated) else 130, "stopped")
        case ImportError():
            return Failure(2, f"this installation is not whole: {first_line(error)}")
        case OSError():
            return Failure(2, printable(reason(error) + (f": {error.filename}" if error.filename else "")))
    return None


def causes(error: BaseException) -> list[BaseException]:
    """An error and what it came from: a library, or code of the user's, may have other words for it."""
    return [error, *(causes(error.__cause__) if error.__cause__ is not None else [])]


def _lacks(error: BaseException) -> bool:
    """Whether it is memory, or a thread, that the system did not grant: each library has its own words."""
    signs = ("allocate memory", "start new thread", "map segment", "return without exception set")
    other = isinstance(error, ImportError | RuntimeError | SystemError)
    return isinstance(error, MemoryError) or (other and any(each in str(error) for each in signs))
