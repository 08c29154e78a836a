"""States and what the teacher says of them: in memory while a student plays, or on disk once for all students.

Frames are kept once, as raw uint8; a stack is put together when it is drawn. 100,000 Pong states take 706 MB.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from potstill.envs import Array, Envs
from potstill.errors import InputError, reason
from potstill.networks import Policy
from potstill.storage.checkpoints import new_folder, write_atomically
from potstill.storage.files import open_regular, read_json
from potstill.views import part


class Batch(NamedTuple):
    """A minibatch as the losses want it."""

    inputs: Tensor  # (B, ...) prepared inputs
    logits: Tensor  # (B, L) the teacher's, float32
    values: Tensor  # (B,) the teacher's, in units of reward


class Dataset:
    """A ring of states in the order they were played, N environments abreast, as the policy of `envs` sees them.

    Args:
        capacity: states kept; rounded down to a multiple of `num_envs`.
        folder: keeps the arrays in memory-mapped files there instead of in memory.
    """

    def __init__(self, envs: Envs, capacity: int, folder: Path | None = None, mode: str = "w+", size: int = 0) -> None:
        self.num_envs = envs.num_envs
        self.view = envs.config.view
        self.stack = envs.config.frame_stack if envs.config.atari and envs.layout == "stack" else 1
        rows = capacity // self.num_envs * self.num_envs
        if rows < self.num_envs * (self.stack + 1):
            raise InputError(f"a buffer of {capacity} states is too small for {self.num_envs} environments")
        frame = envs.observation_shape[1:] if self.stack > 1 else envs.observation_shape

        def array(name: str, shape: tuple[int, ...], dtype: Any) -> Array:
            if folder is None:
                return np.zeros(shape, dtype)
            if mode == "r":
                open_regular(folder / f"{name}.npy").close()  # a link would be followed, a pipe waited for
                stored: Array = np.lib.format.open_memmap(folder / f"{name}.npy", mode="r")
                if stored.shape != shape or stored.dtype != dtype:
                    raise InputError(f"{folder} is of another task: its {name} are {stored.shape}, not {shape}")
                return stored
            made = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
            if hasattr(os, "posix_fallocate"):  # else a full disk is a SIGBUS on the first page it has no room for
                with (folder / f"{name}.npy").open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            return made

        self._frames = array("frames", (rows, *frame), envs.observation_dtype)
        self._ages = array("ages", (rows,), np.uint8)  # frames of its game before it, up to the stack, at least to 1
        outputs = int(np.sum(envs.num_actions))  # of several choices, those of all
        self._logits = array("logits", (rows, 2 * outputs if envs.continuous else outputs), np.float32)
        self._values = array("values", (rows,), np.float32)
        self.capacity = rows
        self.added = size  # states ever added

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, observations: Array, ages: Array, logits: Tensor, values: Tensor) -> None:
        """Adds one vector step: raw observations (N, ...), ages (N,), the teacher's logits (N, L) and values (N,)."""
        at = self.added % self.capacity
        observations = part(observations, self.view)
        rows = slice(at, at + self.num_envs)
        self._frames[rows] = observations[:, -1] if self.stack > 1 else observations
        self._ages[rows] = np.minimum(ages, max(1, self.stack - 1))
        self._logits[rows] = logits.float().cpu().numpy()
        self._values[rows] = values.float().cpu().numpy()
        self.added += self.num_envs

    def flush(self) -> None:
        """Waits until what is mapped from files is on disk."""
        for array in (self._frames, self._ages, self._logits, self._values):
            if isinstance(array, np.memmap):
                array.flush()

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` states uniformly at random, as positions for `batch`, (count,) int64.

        Where the ring has begun to overwrite itself, the oldest states are left out: their stacks have lost a frame.
        """
        return torch.randint(self._oldest, self.added, (count,), generator=generator) % self.capacity

    @property
    def _oldest(self) -> int:
        lost = (self.stack - 1) * self.num_envs if self.added > self.capacity else 0
        return self.added - len(self) + lost

    def draw_sequences(
        self, count: int, length: int, burn_in: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """`count` times `burn_in + length` steps in a row, of one environment each, at random; less where there are not
        so many yet, of `burn_in` at first.

        Returns:
            The vector steps at which they begin, (count,), each a multiple of `length`; and their positions for
            `batch`, (steps, count). Both int64.
        """
        oldest, end = -(-self._oldest // (self.num_envs * length)) * length, self.added // self.num_envs
        steps = min(burn_in + length, end - oldest)
        first = length * torch.randint(oldest // length, (end - steps) // length + 1, (count,), generator=generator)
        rows = torch.randint(self.num_envs, (count,), generator=generator)
        return first, ((first + torch.arange(steps)[:, None]) * self.num_envs + rows) % self.capacity

    def begun(self, positions: Tensor) -> Tensor:
        """Whether a game begins at each of these positions, bool.

        Raises:
            InputError: it cannot be told.
        """
        if not self._ages.any():
            raise InputError(
                "no game of the stored data is longer than a step, or an older potstill recorded them, which did not"
                " tell: delete the data set, and it is recorded again"
            )
        return torch.from_numpy(self._ages[positions.numpy()] == 0)

    def batch(self, positions: Tensor, policy: Policy, dtype: torch.dtype) -> Batch:
        """Stacks, prepares and labels the states at `positions` (B,)."""
        chosen = positions.numpy()
        device = policy.mean.device
        if self.stack == 1:
            inputs = policy.prepare(torch.from_numpy(self._frames[chosen]).to(device), dtype)
        else:
            ages = self._ages[chosen].astype(np.int64)
            back = np.minimum(np.arange(self.stack - 1, -1, -1), ages[:, None])  # a young game repeats its first frame
            frames = (chosen[:, None] - back * self.num_envs) % self.capacity
            if policy.look is None:
                inputs = self._prepare(frames, policy, dtype)
            else:
                inputs = policy.prepare(torch.from_numpy(self._frames[frames]).to(device), dtype)
        logits, values = torch.from_numpy(self._logits[chosen]), torch.from_numpy(self._values[chosen])
        return Batch(inputs, logits.to(device), values.to(device))

    def _prepare(self, frames: Array, policy: Policy, dtype: torch.dtype) -> Tensor:
        """Frame positions (B, stack) to prepared stacks, a few at a time so that they stay in the processor's cache."""
        B, chunk = len(frames), 16
        rows, columns = self._frames.shape[1:]
        pixels, device = rows * columns, policy.mean.device
        out = torch.empty((B, pixels, self.stack), dtype=dtype, device=device)
        scale = policy.scale.view(-1, 1).expand(-1, self.stack).contiguous()  # of each number of a stack
        shift = -policy.mean.view(-1, 1) * scale
        # Into the same memory again and again, which stays in the cache; fresh memory would not be there yet.
        raw = np.empty((chunk, self.stack, rows, columns), self._frames.dtype)
        woven = np.empty((chunk, pixels, self.stack), self._frames.dtype)
        x = torch.empty(woven.shape, device=device)
        for at in range(0, B, chunk):
            part = frames[at : at + chunk]
            n = len(part)
            np.take(self._frames, part, axis=0, out=raw[:n], mode="clip")  # the other modes make a copy first
            for back in range(self.stack):  # frames side by side to channels last, while a number is one byte
                woven[:n, :, back] = raw[:n, back].reshape(n, pixels)
            x[:n] = torch.from_numpy(woven[:n])
            torch.addcmul(shift, x[:n], scale, out=x[:n])
            out[at : at + chunk] = x[:n].clamp_(-policy.clip, policy.clip)
        return out.view(B, rows, columns, self.stack).permute(0, 3, 1, 2)


def open_dataset(folder: Path, envs: Envs, description: dict[str, Any] | None = None) -> Dataset:
    """A stored data set, memory-mapped read-only, after its content was compared with what was recorded.

    Args:
        description: what it must have been made from.

    Raises:
        InputError: the folder is not a data set of these environments, or is another one, or damaged.
    """
    try:
        document = read_json(folder / "dataset.json")
        num_envs, states = document["num_envs"], document["states"]
        if type(num_envs) is not int or type(states) is not int:
            raise TypeError(f"{states!r} states of {num_envs!r} environments")
        if num_envs != envs.num_envs:
            raise ValueError(f"it was made with {num_envs} environments, not {envs.num_envs}")
        for key, value in (description or {}).items():
            if key != "states" and document.get(key) != json.loads(json.dumps(value)):
                raise ValueError(f"it is of another {key}: delete it, and it is recorded again")
        for name, digest in document.get("digests", {}).items():  # the first data sets had none
            if digest != _digest(folder / f"{name}.npy"):
                raise ValueError(f"{name}.npy is damaged: delete the data set, and it is recorded again")
        return Dataset(envs, states, folder, mode="r", size=states)
    except Exception as error:  # numpy parses an array's header as Python, and a hostile one raises whatever it likes
        raise InputError(f"{folder} is not a data set, or not a whole one: {error}") from error


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return file_digest(cast(BufferedReader, file), "blake2b").hexdigest()[:32]


@contextmanager
def new_dataset(folder: Path, envs: Envs, states: int, description: dict[str, Any]) -> Iterator[Dataset]:
    """A data set to fill, in a folder that appears when the block has ended. One that another process finished
    meanwhile is as good, and stays.

    Raises:
        InputError: there is no room for it, or it may not be written there; nothing is left behind.
    """
    filled = False
    try:
        with new_folder(folder) as unfinished:
            try:
                dataset = Dataset(envs, states, unfinished)
            except OSError as error:
                raise InputError(f"cannot record {states:,} states in {folder}: {reason(error)}") from error
            yield dataset
            filled = True
            dataset.flush()
            document = description | {"num_envs": envs.num_envs, "states": dataset.capacity}
            document["digests"] = {path.stem: _digest(path) for path in sorted(unfinished.glob("*.npy"))}
            write_atomically(unfinished / "dataset.json", json.dumps(document, indent=1).encode())
    except InputError:
        if not filled or not (folder / "dataset.json").exists():
            raise
