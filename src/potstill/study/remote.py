"""What lives on a machine of the cluster. It imports nothing heavy: Ray gives its workers the least priority."""

import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from potstill.study.local import launch

KEPT = ("resume.safetensors", "policy.safetensors", "metrics.jsonl", "result.json", "log.txt")  # of a run's directory


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
        """Exit code or None, the files that changed, and the seconds since the last sign of life."""
        assert self.process is not None
        code = self.process.poll()
        now = self._times()
        changed = {name: (self.path / name).read_bytes() for name, at in now.items() if self.sent.get(name) != at}
        self.sent = now
        signs = [path.stat().st_mtime for path in self.path.iterdir() if path.exists()]
        return code, changed, time.time() - max(signs)

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
        places = {name: self.path / name for name in KEPT}
        return {name: path.stat().st_mtime_ns for name, path in places.items() if path.exists()}
