"""What lives on a machine of the cluster. It imports nothing heavy: Ray gives its workers the least priority."""

import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from potstill.study.local import launch

# Of a run's directory, each file after those that it presupposes: whatever is killed, a resume state has its metrics.
KEPT = ("metrics.jsonl", "resume.safetensors", "policy.safetensors", "log.txt", "result.json")


class RemoteRun:
    """Lives on a machine of the cluster and does one run there."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="potstill-"))
        self.path = self.folder / "run"
        self.sent: dict[str, int] = {}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, files: dict[str, bytes], origins: dict[str, dict[str, bytes]], machine: dict[str, Any]) -> None:
        """Begins, or goes on with, the run whose directory holds `files`."""
        self.path.mkdir()
        for name, content in files.items():
            (self.path / name).write_bytes(content)
        places = {}
        for role, contents in origins.items():
            places[role] = self.folder / role
            places[role].mkdir()
            for name, content in contents.items():
                (places[role] / name).write_bytes(content)
        self.sent = self._times()
        self.process = launch(self.path, machine, self.folder / "data", places)

    def poll(self) -> tuple[int | None, dict[str, bytes], float]:
        """Exit code or None, the files that changed in the order to write them, and the seconds since the last sign of
        life."""
        assert self.process is not None
        code = self.process.poll()
        now = self._times()
        changed = {}
        for name in reversed(now):  # the metrics last, so that none of a resume state's are missing
            if self.sent.get(name) != now[name]:
                with suppress(FileNotFoundError):  # the run is done, and its resume state gone
                    changed[name] = (self.path / name).read_bytes()
        self.sent = now
        signs = []
        for path in self.path.iterdir():
            with suppress(FileNotFoundError):  # temporary files come and go
                signs.append(path.stat().st_mtime)
        return code, {name: changed[name] for name in now if name in changed}, time.time() - max(signs)

    def stop(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            if self.process.stdin is not None:
                self.process.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _times(self) -> dict[str, int]:
        times = {}
        for name in KEPT:
            with suppress(FileNotFoundError):
                times[name] = (self.path / name).stat().st_mtime_ns
        return times
