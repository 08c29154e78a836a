"""Files that somebody else may have written: opened without following or waiting, bounded before they are read."""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from potstill.errors import InputError, reason

JSON_LIMIT = 1 << 24  # bytes of a config, a result or a record: one of 10,000 games takes 200 kB
DEPTH = 32  # of nested lists and objects in JSON: ours has five
# Windows has neither: no link is followed, no pipe waited for.
NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
CAREFUL: int = NO_FOLLOW | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def open_regular(path: Path, follow: bool = False) -> BinaryIO:
    """A plain file, open for reading.

    Args:
        follow: read what a symbolic link leads to, because it is the user who named `path`. In a directory that may be
            a stranger's, a link could lead anywhere.

    Raises:
        InputError: there is none, it cannot be read, or `path` is a symbolic link, a directory, a pipe or a device.
    """
    if not follow and os.path.islink(path):  # for its words: the flag below refuses a link made since then, too
        raise InputError(f"cannot read {path}: it is a symbolic link, and those inside a run are not followed")
    try:
        descriptor = os.open(path, os.O_RDONLY | (CAREFUL & ~NO_FOLLOW if follow else CAREFUL))
    except (OSError, ValueError) as error:  # a ValueError: a null character
        hint = ""
        if isinstance(error, FileNotFoundError) and Path(path).parts[:1] in (("data",), ("plans",)):
            hint = (
                "; the plans and experts of the documents come with potstill's source, not with the installed package"
            )
        raise InputError(f"cannot read {path}: {_reason(error)}{hint}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise InputError(f"cannot read {path}: {'is a directory' if stat.S_ISDIR(mode) else 'it is not a file'}")
    return open(descriptor, "rb")


def open_append(path: Path) -> BinaryIO:
    """A plain file, new or old, open for appending and reading, unbuffered.

    Raises:
        OSError: it is a link, a pipe or a device.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | CAREFUL, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a file")
    return open(descriptor, "a+b", buffering=0)


def read_bytes(path: Path, limit: int, follow: bool = False) -> bytes:
    """The content of a plain file. A larger one is refused before anything of it is read.

    Raises:
        InputError: as `open_regular`, or it has more than `limit` bytes.
    """
    try:
        with open_regular(path, follow) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(size) if size <= limit else b""  # what is appended meanwhile is not of this reading
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {_reason(error)}") from error
    if size > limit:
        raise InputError(f"{path} has {size:,} bytes; at most {limit:,} are read")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: as `read_bytes`, or it holds something else than a JSON object as `parse_json` reads it.
    """
    data = read_bytes(path, JSON_LIMIT)
    try:
        document = parse_json(data)
    except ValueError as error:
        raise InputError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} is damaged: it is not a JSON object")
    return document


def parse_json(data: bytes | str) -> Any:
    """Strict JSON in UTF-8: no NaN or Infinity, nor 1e400; whole numbers below 2**64; no key twice in an object; at
    most `DEPTH` deep; text that can be written again (no half of a surrogate pair).

    Raises:
        ValueError: it is something else.
    """
    text = data.decode() if isinstance(data, bytes) else data
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError(f"more than {DEPTH} deep") from error
    _check(value)
    if "\\u0000" in text:  # no name of a file, and no text of ours, holds one
        raise ValueError("a null character")
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def _check(value: Any) -> None:
    """Level by level: hooks of the parser would take three times as long for a learning curve."""
    level = [value]
    for _ in range(DEPTH + 1):
        deeper: list[Any] = []
        for each in level:
            if isinstance(each, float):
                if not math.isfinite(each):  # 1e400
                    raise ValueError("a number that is not finite")
            elif isinstance(each, dict):
                deeper += each.values()
            elif isinstance(each, list):
                deeper += each
            elif isinstance(each, int) and abs(each) >= 1 << 64:
                raise ValueError("a number that is too large")
        if not deeper:
            return
        level = deeper
    raise ValueError(f"more than {DEPTH} deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key twice")
    return made


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _reason(error: OSError | ValueError) -> str:
    return reason(error) if isinstance(error, OSError) else str(error)
