"""What a run tells: metrics.jsonl is the truth; progress, TensorBoard and W&B are sinks of it."""

import errno
import importlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from potstill.errors import InputError, printable, reason
from potstill.storage.files import open_append, open_regular, parse_json

LIMIT = 1 << 28  # bytes of a metrics.jsonl whose records are all kept in memory: 600,000 of them
TAIL = 1 << 16  # bytes read for its last record, and of any: ours have some hundred
INTERVAL = 10.0  # seconds between plain lines of progress


class Metrics(AbstractContextManager["Metrics"]):
    """Appends records to a metrics.jsonl, one JSON object a line, each line in one system call. A `Sink`.

    Args:
        kept: what `written` was when the state was saved that the run goes on from: lines since then are dropped. None
            starts anew.

    Raises:
        InputError: it cannot be written, or does not begin with what is to be kept.
    """

    def __init__(self, path: Path, kept: dict[str, Any] | None = None) -> None:
        self.path = Path(path)
        size, digest = (0, "") if kept is None else (kept["bytes"], kept["digest"])
        self._hash, self._size, self._unsaved = _hash_of(self.path, size), size, b""
        there = self.path.stat().st_size if self.path.exists() else 0
        if there < size or digest not in ("", self._hash.hexdigest()):
            raise InputError(
                f"{self.path} is not the one that this run had written when it was saved: restore it from a copy, or"
                " begin the run again with another --out"
            )
        try:
            self._file = open_append(self.path)
            if there > size:
                self._file.truncate(size)
        except OSError as error:
            raise self._failure(error) from error

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; its "step" (int) comes first, non-finite floats become null.

        Raises:
            InputError: the disk is full.
            ValueError: there is no int "step".
        """
        line = _line(record)
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._failure(error) from error
        self._hash.update(line)
        self._unsaved += line

    @property
    def written(self) -> dict[str, Any]:
        """The size and the digest of all lines, for a resume state that counts on them."""
        return {"bytes": self._size + len(self._unsaved), "digest": self._hash.hexdigest()}

    def sync(self) -> None:
        """Wait until all lines are on disk, for a resume state that counts on them is about to be saved."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from error
        self._size, self._unsaved = self._size + len(self._unsaved), b""

    def copy(self, path: Path) -> None:
        """Copy all lines to `path`, even where another process writes into this file or has put one in its place."""
        try:
            with open(path, "xb") as copy:
                self._file.seek(0)
                left = self._size
                while left and (block := self._file.read(min(left, 1 << 20))):
                    copy.write(block)
                    left -= len(block)
                copy.write(self._unsaved)
        except OSError as error:
            raise InputError(f"cannot write {path}: {reason(error)}") from error

    def close(self) -> None:
        self._file.close()

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _failure(self, error: OSError) -> InputError:
        return InputError(f"cannot write {self.path}: {reason(error)}; earlier lines are intact")


def read(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, oldest first. A torn last line is dropped.

    Args:
        most: so many at most, every n-th and the last, of a file of any size; None reads all of one up to `LIMIT`.

    Raises:
        InputError: no such file, one too large, or a bad line before the last, by its number.
    """
    if most is None:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > LIMIT:
                raise InputError(f"{path} has {size:,} bytes; at most {LIMIT:,} are read")
        return list(stream(path))
    count = sum(1 for _ in stream(path))
    every = max(1, math.ceil(count / most))
    return [record for number, record in enumerate(stream(path), start=1) if (count - number) % every == 0]


def stream(path: Path) -> Iterator[dict[str, Any]]:
    """As `read`, one record after the other."""
    with open_regular(path) as file:
        for number in itertools.count(1):
            line = file.readline(TAIL)
            try:
                record = parse_json(line)
                if type(record["step"]) is not int:
                    raise TypeError
            except (ValueError, KeyError, TypeError) as error:
                if len(line) < TAIL and line[-1:] != b"\n":  # after the last newline: nothing, or a line cut short
                    return
                raise InputError(f"{path}, line {number}: not a JSON object with an integer 'step'") from error
            yield record


def last(path: Path) -> dict[str, Any] | None:
    """The last whole record of a metrics.jsonl, read from its end; None where there is none yet."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            line = file.read(TAIL).rpartition(b"\n")[0].rpartition(b"\n")[2]
        record: dict[str, Any] = parse_json(line)
        return record if type(record["step"]) is int else None
    except (InputError, ValueError, KeyError, TypeError):
        return None


def digest(path: Path) -> str:
    """What `Metrics.written` calls the digest of a whole metrics.jsonl. Raises InputError where it cannot be read."""
    return str(_hash_of(path, sys.maxsize).hexdigest())


def _hash_of(path: Path, size: int) -> Any:
    """BLAKE2 of the first `size` bytes of a file, or of all; of none where there is no file."""
    found = blake2b(digest_size=16)
    if size and os.path.lexists(path):
        with open_regular(path) as file:
            while size > 0 and (block := file.read(min(size, 1 << 20))):
                found.update(block)
                size -= len(block)
    return found


class Progress:
    """How far a loop is, on stderr: a bar on a terminal, else a plain line every `INTERVAL` seconds, for log files.

    Args:
        description: what is running and which size, e.g. "train pong, width 1/4".
        start: steps done by an earlier process; they do not count for the speed.
    """

    def __init__(self, description: str, total: int, start: int = 0, quiet: bool = False, unit: str = "steps") -> None:
        self.description, self.total, self.start, self.quiet, self.unit = description, total, start, quiet, unit
        self._step = start
        self._fields: list[str] = []
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._began = self._printed = time.monotonic()
        if not self.quiet and sys.stderr.isatty():
            self._live = Live(console=Console(stderr=True), auto_refresh=False, redirect_stdout=False)  # --json's
            self._live.start()
            self._live.update(self, refresh=True)
        return self

    def update(self, step: int, **fields: float | str | None) -> None:
        """Show that `step` steps are done, and the latest fields, e.g. score=12.5; None hides a field."""
        self._step = step
        shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in fields.items()}
        self._fields = [f"{name} {value}" for name, value in shown.items() if value is not None]
        if not self.quiet and time.monotonic() - self._printed >= (INTERVAL if self._live is None else 0.5):
            self._print()

    def __exit__(self, *raised: object) -> None:
        if self._live is not None or (not self.quiet and self._step > self.start):
            self._print()
        if self._live is not None:
            self._live.stop()

    def _print(self) -> None:
        self._printed = time.monotonic()
        if self._live is not None:
            self._live.update(self, refresh=True)
            return
        with suppress(OSError):  # a full disk under a log file must not end the run
            print("  ".join(self._parts()), file=sys.stderr, flush=True)

    def _parts(self) -> list[str]:
        """What is running, how far it is, its speed, the fields, the time left."""
        done = self._step - self.start
        speed = done / max(time.monotonic() - self._began, 1e-9)
        parts = [self.description, f"{self._step:,}/{self.total:,} {self.unit}"]
        if done <= 0:
            return [*parts, *self._fields]
        per_second = f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
        left = clock(max(self.total - self._step, 0) / speed)
        return [*parts, f"{per_second} {self.unit}/s", *self._fields, f"{left} left"]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Table]:
        """One line, whatever the terminal's width: what says least goes first, and a bar takes the room there is."""
        parts, at = self._parts(), 2
        while len("  ".join(parts)) + 8 > options.max_width and len(parts) > 3:
            parts.pop(at)  # the speed, then the last field, and so on
            at = -2
        if len("  ".join(parts)) > options.max_width:
            parts[1:] = [part.split()[0] for part in parts[1:]]  # the units go
        room = options.max_width - len("  ".join(parts)) - 2
        bar = [ProgressBar(self.total, self._step, width=min(room, 30))] if room >= 6 else []
        line = Table.grid(Column(no_wrap=True, overflow="ellipsis"), padding=(0, 2), pad_edge=False)
        for _ in (*bar, *parts[1:]):
            line.add_column(no_wrap=True)
        line.add_row(Text(parts[0]), *bar, *map(Text, parts[1:]))
        yield line


def sinks(track: bool, directory: Path, config: dict[str, Any], step: int = 0) -> list["Sink"]:
    """Where metrics go besides metrics.jsonl: nowhere, or with `track` to TensorBoard (`directory`/tensorboard).

    W&B is added where it is installed and set up (WANDB_API_KEY or WANDB_MODE in the environment). Where one of them
    fails, it is told once, and the run goes on without it. A resumed run is the same run in both.

    Args:
        step: where a resumed run goes on; TensorBoard forgets later points.

    Raises:
        InputError: TensorBoard is not installed.
    """
    if not track:
        return []
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--track needs TensorBoard: pip install 'potstill[track]'") from error

    def tensorboard() -> _Log:
        writer: Any = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1 if step else None)
        if not step:
            writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```")
        return lambda numbers, at: [writer.add_scalar(*each, at) for each in numbers.items()], writer.close

    def wandb() -> _Log:
        place = f"{directory.resolve()} {json.dumps(config, sort_keys=True)}"
        settings = {"name": directory.name, "dir": str(directory), "config": config}
        settings |= {"id": blake2b(place.encode(), digest_size=8).hexdigest(), "resume": "allow"}
        run = importlib.import_module("wandb").init(project="potstill", **settings)
        return lambda numbers, at: run.log(numbers, step=at), run.finish

    found: list[Sink] = [_StandingBack("TensorBoard", tensorboard)]
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE"):
        with suppress(ImportError):
            importlib.import_module("wandb")
            found.append(_StandingBack("Weights & Biases", wandb))
    return found


_Log = tuple[Callable[[dict[str, float], int], Any], Callable[[], Any]]  # takes the numbers of a step; ends


class _StandingBack:
    """A sink that training does not need: where it fails, this is told once, and it gets nothing more."""

    def __init__(self, name: str, make: Callable[[], _Log]) -> None:
        self._name = name
        self._log: _Log | None = self._try(make)

    def write(self, record: dict[str, Any]) -> None:
        if (log := self._log) is not None:
            self._try(lambda: log[0](_numbers(record), record["step"]))

    def close(self) -> None:
        if self._log is not None:
            self._try(self._log[1])

    def _try(self, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except Exception as error:  # whatever a library of others raises
            self._log = None
            why = printable(str(error) or type(error).__name__, 200)
            with suppress(OSError):
                print(f"potstill: {self._name} failed, and the run goes on without it: {why}", file=sys.stderr)


Sink = Metrics | _StandingBack
"""Something that metrics go to: one flat record with an int "step" per write."""


def _line(record: dict[str, Any]) -> bytes:
    if type(record.get("step")) is not int:
        raise ValueError(f"a record needs an int 'step', not {record.get('step')!r}")
    ordered = {"step": record["step"]} | {name: _plain(value) for name, value in record.items()}
    return (json.dumps(ordered, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    """A value for strict JSON: scalars of numpy and torch become Python's, non-finite floats None, inside lists too."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a record, without its step: what a curve can show."""
    plain = {name: _plain(value) for name, value in record.items() if name != "step"}
    return {name: value for name, value in plain.items() if type(value) in (int, float)}


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
