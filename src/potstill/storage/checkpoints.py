"""Checkpoints: tensors and a JSON document in one safetensors file, written atomically and checked on load."""

import errno
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from potstill import __version__
from potstill.errors import InputError, reason
from potstill.storage.files import open_regular, parse_json

FORMAT_VERSION = 1
KEY, DIGEST = "potstill", "digest"  # the keys in the safetensors `__metadata__`: the document, and `_digest`
MAX_HEADER_BYTES = 10_000_000
MAX_BYTES = 8 << 30  # of a file: the resume state of a Nature-CNN of width 16, the widest there is, takes 7 GB


class DamagedError(InputError):
    """A file that does not hold what was saved."""


class ProbeMismatch(InputError):
    """A policy computes other logits on this device than it did when it was saved."""


def save(path: Path, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
    """Write tensors and document to `path` atomically: afterwards the file is the new one or the old one, whole.

    Args:
        path: the file, conventionally `*.safetensors`; replaced if it exists.
        tensors: any shapes and dtypes, on any device. Each is saved as a contiguous CPU copy, so views, channels_last
            weights and tensors that share memory come back equal, but plain and apart.
        document: strict JSON. "format" and "versions" are set here, whatever the caller has there.

    Raises:
        InputError: the file cannot be written (full disk, no permission, no such folder); nothing was changed.
        ValueError, TypeError: the document is not strict JSON (NaN is not), or too large (10 MB), or the tensors are
            (8 GiB); nothing was changed.
    """
    document = {**document, "format": FORMAT_VERSION, "versions": _versions()}
    # Wrong results on MPS come from non-contiguous weights (pytorch #192212, #180984): none are ever stored.
    plain = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    text = json.dumps(document, allow_nan=False)
    data = safetensors.torch.save(plain, {KEY: text, DIGEST: _digest(text, plain)})
    if int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES:
        raise ValueError(f"the header of {path} passes {MAX_HEADER_BYTES} bytes: keep bulk data in tensors")
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} would take {len(data):,} bytes; more than {MAX_BYTES:,} could not be read again")
    write_atomically(path, data)


def load(path: Path, device: str = "cpu", follow: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, contiguous on `device`, and the document of a checkpoint. Non-finite values are not refused here.

    Args:
        follow: read what a symbolic link leads to.

    Raises:
        InputError: no such file, a symbolic link, not a safetensors file, truncated or damaged, larger than 8 GiB, not
            potstill's, of an unknown format, or the device cannot hold it.
    """
    try:
        with open_regular(path, follow) as file:
            document, text, digest = _read_document(file, path)
            file.seek(0)
            data = file.read()  # not mapped: a later change to the file must not reach the tensors
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason(error)}") from error
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # the others: dtypes that torch has not
        raise DamagedError(f"{path} is damaged ({error}): restore it from a copy") from error
    if digest not in (None, _digest(text, tensors)):  # the first checkpoints had none
        raise DamagedError(f"{path} is damaged: it does not hold what was saved; restore it from a copy")
    try:
        return {name: tensor.to(device) for name, tensor in tensors.items()}, document
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA answers with an AssertionError
        why = str(error).partition("\n")[0]
        raise InputError(f"cannot place {path} on device '{device}' ({why}): try --device cpu") from error


def verify_probe(expected: Tensor, actual: Tensor, device: str, path: Path) -> None:
    """Compare logits computed now, on `device`, with those stored when the policy was saved.

    Args:
        expected: stored logits of the probe batch, (B, A) float.
        actual: logits of the same batch from the loaded policy, (B, A) float, in full precision (no autocast).
        device: where `actual` was computed, for the message.
        path: the checkpoint, for the message.

    Raises:
        ProbeMismatch: the shapes differ, a logit is not finite, or |actual - expected| > 1e-3 + 1e-3 |expected|.
    """
    expected, actual = expected.detach().cpu().double(), actual.detach().cpu().double()
    if expected.shape != actual.shape or expected.numel() == 0:
        shapes = f"{tuple(actual.shape)}, stored {tuple(expected.shape)}"
        raise ProbeMismatch(f"{path} computes probe logits of shape {shapes}: the file does not fit its own network")
    difference = (actual - expected).abs()
    finite = bool(difference.isfinite().all())  # an infinite logit is not within its own infinite tolerance
    if finite and bool((difference <= 1e-3 + 1e-3 * expected.abs()).all()):
        return
    how = f"largest difference {difference.max().item():.2g}" if finite else "some are not finite"
    advice = "try --device cpu"
    if device.startswith("cpu"):
        advice = "the file is damaged, or the libraries compute differently from those it was saved with"
    raise ProbeMismatch(
        f"{path} computes other logits on device '{device}' than when it was saved ({how}): "
        f"do not trust scores from this device; {advice}"
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path`: temporary file in the same folder, fsync, rename, fsync of the folder.

    Raises:
        InputError: it could not be written; the temporary file is gone and an older file at `path` is intact.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            # Not tempfile: its mode 0600 would survive the rename and lock out the people a run is shared with.
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {reason(error)}; nothing was changed") from error
    sync_folder(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears at `path` when the block has ended. Where it fails nothing is left, no new parent
    either.

    Raises:
        InputError: there is something at `path` already, or it cannot be made.
    """
    if os.path.lexists(path):
        raise InputError(f"{path} exists: choose another --out")
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    missing = [folder for folder in path.parents if not os.path.isdir(folder)]
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(path)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, InputError):
            raise InputError(str(error).replace(str(unfinished), str(path))) from error
        if not isinstance(error, OSError):
            raise
        if os.path.lexists(path):  # another process was quicker
            raise InputError(f"{path} exists: choose another --out") from error
        raise InputError(f"cannot make {path}: {reason(error)}; choose another --out") from error
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can."""
    if os.name != "posix":
        return  # a folder cannot be opened elsewhere
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that have no such thing
            raise InputError(
                f"a file in {folder} was written, but may not survive a power cut: {reason(error)}"
            ) from error


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """BLAKE2 of a document's JSON and of the tensors' names, dtypes, shapes and bytes."""
    digest = blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_document(file: BinaryIO, path: Path) -> tuple[dict[str, Any], str, str | None]:
    """The checked document of an open checkpoint, its text and the digest of all.

    The header and the file's length are checked on the way.

    Entries of single tensors (dtype, shape, gaps, overlaps) are left to safetensors, which checks them in `load`.
    """
    foreign = DamagedError(f"{path} is not a safetensors file: a potstill checkpoint (*.safetensors) is needed")
    size = os.fstat(file.fileno()).st_size
    if size > MAX_BYTES:
        raise InputError(f"{path} has {size:,} bytes; no checkpoint has more than {MAX_BYTES:,}")
    start = file.read(9)
    if start[8:] != b"{":
        raise DamagedError(f"{path} is empty or truncated: restore it from a copy") if size < 9 else foreign
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise foreign
    if length > size - 8:
        raise DamagedError(
            f"{path} is truncated ({size} bytes, its header alone needs {8 + length}): restore it from a copy"
        )
    try:
        header = parse_json(start[8:] + file.read(length - 1))
        offsets = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = 8 + length + max(offsets, default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise foreign from error
    if whole != size:
        what = "is truncated" if size < whole else "has bytes after its end"
        raise DamagedError(f"{path} {what} ({size} bytes, should be {whole}): restore it from a copy")
    try:
        text, digest = header["__metadata__"][KEY], header["__metadata__"].get(DIGEST)
        document = parse_json(text)
        version = document["format"]
        if not isinstance(document, dict) or type(version) is not int:
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is a safetensors file, but not potstill's: it has no '{KEY}' metadata") from error
    check_format(path, version, FORMAT_VERSION)
    return document, text, digest


def check_format(path: Path, version: int, known: int) -> None:
    """Raises InputError where the file at `path` is of a format that this version does not read (1 to `known`)."""
    if version > known:
        raise InputError(f"{path} has format {version}, this potstill reads up to {known}: upgrade potstill")
    if version < 1:
        raise InputError(f"{path} has format {version}, which never was: restore it from a copy")


def _versions() -> dict[str, str | None]:
    """What computed the tensors: library versions, None where one is not installed."""
    found: dict[str, str | None] = {"potstill": __version__, "python": platform.python_version()}
    for package in ("torch", "ale_py", "gymnasium", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
