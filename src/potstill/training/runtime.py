"""What a run may use: device, threads, memory; and what it records of where it was made."""

import ctypes
import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from potstill.configs import normalise
from potstill.errors import InputError
from potstill.imports import imported
from potstill.networks import resolve_device

A_CORE = 8  # threads or workers at most: more only wait for each other, and a million end the process
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class Runtime:
    """How a run uses the machine. Not part of its identity, but recorded: threads can change the last bits."""

    device: str = "auto"
    """cuda, mps or cpu; auto takes the first there is. Only the CPU is tested."""
    threads: int = 0
    """CPU threads for emulator and network; 0 takes all cores."""
    save_every: float = 60.0
    """Seconds between two saves of the resume state."""
    quiet: bool = False
    """Show no progress."""
    track: bool = False
    """Send metrics to TensorBoard, and to Weights & Biases where it is installed and configured."""
    inexact: bool = False
    """Go on with a run whose task is no function of its seed and actions, which cannot be exact; its result says so."""

    def __post_init__(self) -> None:
        normalise(self)
        for name in ("threads", "save_every"):
            if not getattr(self, name) >= 0:  # NaN is refused too
                raise InputError(f"{name.replace('_', '-')} must be 0 or more, not {getattr(self, name)}")
        check_number("threads", self.threads)

    @property
    def cores(self) -> int:
        """CPU threads to use: those asked for, or as many as this process may run on."""
        if self.threads:
            return self.threads
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def apply(self) -> None:
        """Tells torch how to use the processor; denormal numbers would slow the smallest networks.

        And tells glibc, where that is the C library, to keep freed memory for the next minibatch: what is given back to
        the system comes back page by page, thousands of faults in every minibatch.
        """
        torch.set_num_threads(1)  # more only for as long as `networks.torch_threads` says that it is worth it
        torch.set_flush_denormal(True)
        if platform.libc_ver()[0] == "glibc":
            allocate = ctypes.CDLL(None).mallopt
            allocate(_M_TRIM_THRESHOLD, 2**30)
            allocate(_M_MMAP_THRESHOLD, 2**30)


def check_number(name: str, number: int, cores: int = 0, place: str = "machine") -> None:
    """Refuses more threads, or workers, than can be meant on so many cores; 0: those of this machine."""
    most = A_CORE * (cores or os.cpu_count() or 1)
    if number > most:
        raise InputError(
            f"{name} must be at most {most} on this {place}, {A_CORE} for each of its cores, not {number:,}"
        )


def provenance(runtime: Runtime) -> dict[str, Any]:
    """What a run's config.json says of where it was made: command, commit, machine, threads."""
    device = resolve_device(runtime.device)
    threads = f"{runtime.cores} thread{'s' if runtime.cores > 1 else ''}"
    started = Path(sys.argv[0]).name
    script = started.endswith(".py") and started != "__main__.py"  # which is what `python -m potstill` starts
    arguments = [re.sub(r"^(--?[\w-]+=)?(/.*)", _without_place, word, flags=re.DOTALL) for word in sys.argv[1:]]
    return {
        "command": shlex.join([*(["python", started] if script else ["potstill"]), *arguments]),
        "commit": commit(),
        "machine": f"{processor()}, {threads}, {device}, torch {torch.__version__}",
        "threads": runtime.cores,
    } | ({"imports": list(imported())} if imported() else {})


def _without_place(word: re.Match[str]) -> str:
    """An absolute path as seen from the working directory, or where it does not lie below that, its name alone."""
    path = Path(word[2])
    return (word[1] or "") + str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name)


def processor() -> str:
    """The CPU's name and the instructions torch uses on it, such as "AMD EPYC (AVX2)".

    On a virtual machine one name stands for processors of which some are three times as fast as others.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


@cache  # what was imported does not change
def commit() -> str | None:
    """The commit of the checkout this code runs from, with a + where it was changed; None for an installed package."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # a package installed inside another checkout is not it
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", str(folder)) else "")
    except (OSError, subprocess.CalledProcessError):
        return None
