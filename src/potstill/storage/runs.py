"""Runs: a directory each, its identity, its lock and its life (new, running, interrupted, failed, done)."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from glob import escape
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Literal

from potstill.errors import InputError, reason
from potstill.storage.checkpoints import check_format, new_folder, write_atomically
from potstill.storage.files import CAREFUL, open_regular, parse_json, read_bytes, read_json

Status = Literal["new", "running", "interrupted", "failed", "done"]
LOCK_LIMIT = 1 << 16  # bytes that are read of a lock: ours have some hundred
FORMAT_VERSION = 1  # of config.json and result.json, whose "format" it is; the first ones did not say so
GRACE = 600.0  # seconds without a sign of life after which a lock that the kernel does not guard is stale
WRITING = 20.0  # seconds after which a lock that does not say whose it is will not say it any more
_NONCE = secrets.token_hex(8)  # this process's, whatever its host is called later


class InUseError(InputError):
    """A live process holds the lock."""


class LockLostError(InputError):
    """The lock is no longer this process's."""


@dataclass(frozen=True)
class Run:
    """A run's directory. Made by `Run.create` or `Run.open`, never directly."""

    path: Path
    config: dict[str, Any]

    @classmethod
    def create(cls, out: Path, config: dict[str, Any]) -> "Run":
        """A new directory `out`, parents included, that holds config.json and nothing else. It appears whole.

        Raises:
            InputError: `out` exists, whatever it is, or cannot be made; or the config could not be read again.
            TypeError: the config is no JSON.
        """
        out, data = Path(out), _to_json(config)
        try:
            parse_json(data)
            str(out).encode()
        except ValueError as error:  # half of a surrogate pair, from bytes that are not UTF-8
            raise InputError(f"{out} cannot record its own settings: {error}") from error
        if os.path.lexists(out):
            raise InputError(f"{out} exists: {_way_on(out)}")
        sweep(out.parent, out.name)
        with new_folder(out) as folder, open(folder / "config.json", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return cls.open(out)

    @classmethod
    def open(cls, path: Path) -> "Run":
        """The run in an existing directory. Raises InputError that says what is missing."""
        path = Path(path)
        if not path.is_dir():
            what = "is a file, not a run directory" if path.exists() else "does not exist: a run directory is needed"
            raise InputError(f"{path} {what}")
        if not (path / "config.json").is_file():
            raise InputError(f"{path} is not a run directory: it has no config.json")
        config = read_document(path / "config.json")
        config.pop("format", None)
        return cls(path, config)

    @property
    def identity(self) -> str:
        """What its other files know it by: the hash of its config. Where its teacher lies may change."""
        places = ("teacher", "initial", "teacher_here", "initial_here")
        return config_hash({key: value for key, value in self.config.items() if key not in places})

    @property
    def policy_path(self) -> Path:
        """The deployable policy."""
        return self.path / "policy.safetensors"

    @property
    def resume_path(self) -> Path:
        """Everything needed to continue."""
        return self.path / "resume.safetensors"

    def branch_path(self, share: str) -> Path:
        """Everything the run of a share of this one's budget goes on from, until it does."""
        return self.path / f"branch-{share.replace('/', '_')}.safetensors"

    @property
    def games_path(self) -> Path:
        """What an evaluation that is not over has played."""
        return self.path / "games.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result_path(self) -> Path:
        return self.path / "result.json"

    @property
    def lock_path(self) -> Path:
        return self.path / "run.lock"

    @property
    def status(self) -> Status:
        """Where the run is in its life, from its files alone. Raises InputError if result.json cannot be read."""
        if self.result_path.exists():
            status = read_document(self.result_path).get("status")
            if status not in ("done", "failed"):
                raise InputError(f"{self.result_path} has status {status!r}: should be 'done' or 'failed'")
            return "done" if status == "done" else "failed"
        if _holder(self.lock_path) is not None:
            return "running"
        return "interrupted" if self.resume_path.exists() else "new"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """`hold` run.lock, so that no second process writes into this directory; sweeps what a dead one left half made.

        Raises InputError as `hold`.
        """
        with hold(self.lock_path):
            sweep(self.path)
            yield

    def touch_lock(self) -> None:
        """`touch` run.lock: a sign of life, to be given at each checkpoint."""
        touch(self.lock_path)

    def tidy(self) -> None:
        """Removes what only an unfinished run needs."""
        for path in (self.resume_path, self.games_path):
            path.unlink(missing_ok=True)

    def write_result(self, record: dict[str, Any]) -> None:
        """Write result.json atomically: the run is over, as `record["status"]` ("done" or "failed") says. A digest
        of what it says goes with it.

        Raises:
            InputError: it cannot be written; an older result is intact.
            ValueError, TypeError: another status, or not strict JSON (NaN is not).
        """
        if record.get("status") not in ("done", "failed"):
            raise ValueError(f"status must be 'done' or 'failed', not {record.get('status')!r}")
        record = {"format": FORMAT_VERSION} | record
        write_atomically(self.result_path, _to_json(record | {"digest": config_hash(record)}))

    def write_games(self, document: dict[str, Any]) -> None:
        """Write games.json atomically. Raises InputError where it cannot be written, as `write_result`."""
        write_atomically(self.games_path, _to_json(document))


@contextmanager
def working_in(folder: Path) -> Iterator[Run]:
    """Holds the lock of a folder of runs. The folder is made where it is missing, and gone again if it stays empty.

    Raises:
        InputError: it cannot be made, or another process works there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {folder}: {reason(error)}; choose another --out") from error
    run = Run(folder, {})
    try:
        with run.lock():
            yield run
    finally:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`: a kernel lock (flock) on it, which ends with the process, however that ends.

    Where the file system has none, what the file says counts: a process of this machine holds it while it lives, one
    of another, where we cannot look, until `GRACE` seconds without a `touch` have passed.

    Raises:
        InUseError: a live process holds it (named by pid and host).
        InputError: the file cannot be written.
    """
    try:
        while (file := _try_lock(path)) is None:
            pass
    except OSError as error:
        raise InputError(f"cannot lock {path.parent}: {reason(error)}") from error
    with file:
        try:
            yield
        finally:
            with suppress(OSError):
                if _is_mine(path):
                    path.unlink()


def sweep(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes left half made in `folder`: of the file or directory `name`, or all there is."""
    for stray in folder.glob(".*.tmp" if name is None else f".{escape(name)}.{'[0-9a-f]' * 8}.tmp"):
        if stray.is_dir() and not stray.is_symlink():
            shutil.rmtree(stray, ignore_errors=True)
        else:
            with suppress(OSError):
                stray.unlink()


def touch(path: Path) -> None:
    """A sign of life of the process that holds the lock at `path`.

    Raises:
        LockLostError: that is not this process any more.
        InputError: the folder is gone.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} has vanished: this process stops, and what was there is lost")
    if not _is_mine(path):
        holder = _holder(path)
        what = "was removed" if holder is None else f"was taken over by {holder}"
        raise LockLostError(f"the lock {path} {what}: this process stops and leaves {path.parent} alone")
    os.utime(path)


def _is_mine(path: Path) -> bool:
    try:
        holder = _parse_holder(read_bytes(path, LOCK_LIMIT).decode(errors="replace"))
    except InputError:
        return False
    return holder is not None and (holder["pid"], holder["nonce"]) == (os.getpid(), _NONCE)


def _holder(path: Path) -> str | None:
    """Who holds the lock at `path`, in words; None where no live process does."""
    try:
        with open_regular(path) as file:
            free = _flock(file, shared=True)
            text = file.read(LOCK_LIMIT).decode(errors="replace")
            if free or (free is None and not _is_held(text, os.fstat(file.fileno()).st_mtime)):
                return None
    except InputError:  # there is none, or it is no file
        return None
    return _named(text)


def _named(text: str) -> str:
    holder = _parse_holder(text)
    return "a process" if holder is None else f"process {holder['pid']} on {holder['host']} (since {holder['started']})"


def next_directory(root: Path, stem: str) -> Path:
    """A directory name under `root` that nobody has, such as `pong_run/2026-11-22T16-05-10_seed-0`. Local time."""
    name = f"{datetime.now():%Y-%m-%dT%H-%M-%S}_{stem}"
    path, number = Path(root) / name, 2
    while os.path.lexists(path):
        path, number = Path(root) / f"{name}_{number}", number + 1
    return path


def branch_name(trunk: str, share: str) -> str:
    """Of the run of a share of another's budget."""
    return f"{trunk}_branch-{share.replace('/', '_')}"


def config_hash(config: dict[str, Any]) -> str:
    """A run's identity: 12 hex digits of the SHA-256 of its canonical JSON, whatever the order of its keys."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_alive(pid: int) -> bool:
    """Whether this machine has such a process, and it has not ended; True on Windows, where asking would kill it."""
    if sys.platform == "win32":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return _born(pid) != 0


@dataclass
class StopRequested:
    """Whether the user, or the system, has asked this process to stop."""

    requested: signal.Signals | None = None
    """The first SIGINT or SIGTERM received; the exit code is 128 + this."""


@contextmanager
def stop_on_signals() -> Iterator[StopRequested]:
    """Turn the first SIGINT or SIGTERM into a request, for the loop to finish its step and save.

    A SIGINT after that raises KeyboardInterrupt at once. Earlier handlers are restored on exit. Outside the main
    thread, where Python allows no handlers, nothing is ever requested.
    """
    stop = StopRequested()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested is None:
            stop.requested = signal.Signals(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in previous:
            signal.signal(number, handle)
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _way_on(out: Path) -> str:
    """What to do about an existing `out`."""
    with suppress(InputError):
        run = Run.open(out)
        if (holder := _holder(run.lock_path)) is not None:
            return f"it is in use by {holder}; choose another --out"
        if run.resume_path.exists() and run.status != "done":
            return f"choose another --out, or continue it with --resume {out}"
    return "choose another --out"


def _to_json(document: dict[str, Any]) -> bytes:
    return (json.dumps({"format": FORMAT_VERSION} | document, indent=2, allow_nan=False) + "\n").encode()


def read_document(path: Path) -> dict[str, Any]:
    """A config.json, a result.json or a study's record.

    Raises:
        InputError: as `files.read_json`, it is of a format this version does not know, or was changed since its digest.
    """
    document = read_json(path)
    version = document.get("format", 1)
    if type(version) is not int:
        raise InputError(f"{path} is damaged: its format is {version!r}, not a number")
    check_format(path, version, FORMAT_VERSION)
    digest = document.pop("digest", None)
    if digest is not None and digest != config_hash(document):
        raise InputError(f"{path} was changed after it was written: restore it from a copy")
    return document


def _try_lock(path: Path) -> BinaryIO | None:
    """The lock file, new or of the dead, locked and saying who we are. None: it went away meanwhile, try again."""
    try:
        descriptor, fresh = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | CAREFUL, 0o666), True
    except FileExistsError:
        try:
            descriptor, fresh = os.open(path, os.O_RDWR | CAREFUL), False
        except FileNotFoundError:
            return None
    with ExitStack() as stack:
        file = stack.enter_context(open(descriptor, "r+b", buffering=0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is not a file")
        locked = _flock(file)
        text = file.read(LOCK_LIMIT).decode(errors="replace")
        if locked is False or (locked is None and not fresh and _is_held(text, os.fstat(descriptor).st_mtime)):
            raise InUseError(f"{path.parent} is in use by {_named(text)}: wait for it, or choose another --out")
        try:
            if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return None
        except FileNotFoundError:
            return None
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine(), "nonce": _NONCE}
        mine |= {"started": datetime.now().astimezone().isoformat(timespec="seconds"), "born": _born(os.getpid())}
        line = json.dumps(mine).ljust(len(text.encode())).encode()
        file.seek(0)
        if file.write(line) != len(line):  # in one call: a killed process leaves no half a lock
            path.unlink(missing_ok=True)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.truncate(len(line))
        stack.pop_all()
        return file


def _flock(file: BinaryIO, shared: bool = False) -> bool | None:
    """Takes the kernel's lock of an open file. False: another has it; None: this file system or machine has none.

    Who only looks takes it `shared`, for a moment, in which the one who wants it tries again.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    for wait in (0.0,) if shared else (0.02, 0.05, 0.1, 0.0):
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(wait)
        except OSError:
            return None
    return False


def _is_held(text: str, modified: float) -> bool:
    """Whether a lock file that the kernel does not guard, with this text, last modified at `modified` (seconds since
    1970), has a live holder."""
    holder = _parse_holder(text)
    if holder is None:  # half a text is a lock being written, by a process that may have been killed at it
        return time.time() - modified < WRITING
    if holder["machine"] is None or holder["machine"] != _machine():
        return time.time() - modified < GRACE
    born = _born(holder["pid"])
    return is_alive(holder["pid"]) and born == holder["born"]  # another process may have got the pid since


def _parse_holder(text: str) -> dict[str, Any] | None:
    """The holder that a lock file names: pid, host, machine, nonce, started, born. None if the text is torn."""
    try:
        holder = parse_json(text)
        known = {key: holder[key] for key in ("pid", "host", "machine", "nonce", "started", "born")}
    except (ValueError, KeyError, TypeError):
        return None
    return known if type(known["pid"]) is int and known["pid"] > 0 else None


def _machine() -> str | None:
    """What process ids are counted in: this boot of this machine, and the container; None where that is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _born(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; 0 for a zombie, None where there is no /proc."""
    try:
        # The name, in brackets, may itself hold spaces and brackets.
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (OSError, ValueError):
        return None
    return 0 if state == b"Z" else int(fields[18])
