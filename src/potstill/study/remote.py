"""What lives on a machine of the cluster. It imports nothing heavy: Ray gives its workers the least priority."""

import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from potstill.study.local import Worker, launch

# Of a run's directory, each file after those that it presupposes: whatever is killed, a resume state has its metrics.
KEPT = ("metrics.jsonl", "resume.safetensors", "policy.safetensors", "games.json", "log.txt", "result.json")


class RemoteRun:
    """Lives on a machine of the cluster and does one run there."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="potstill-"))
        self.path = self.folder / "run"
        self.sent: dict[str, tuple[int, int]] = {}
        self.process: Worker | None = None

    def start(
        self,
        files: dict[str, bytes],
        origins: dict[str, dict[str, bytes]],
        runtime: dict[str, Any],
        eval_config: dict[str, Any],
        environment: dict[str, str],
    ) -> None:
        """Begins, or goes on with, the run whose directory holds `files`."""
        self.path.mkdir()
        for name, content in files.items():
            (self.path / name).write_bytes(content)
        places = {}
        for role, contents in origins.items():
            (self.folder / role).mkdir()
            for name, content in contents.items():
                (self.folder / role / name).write_bytes(content)
            places[role] = self.folder / role / next(iter(contents))  # the policy itself
        self.sent = {name: self._version(name) for name in files if name in KEPT}
        self.process = launch(self.path, runtime, eval_config, self.folder / "data", places, environment)

    def poll(self) -> tuple[int | None, dict[str, bytes], float]:
        """Exit code or None, the files that changed in the order to write them, and the seconds since the last sign of
        life."""
        assert self.process is not None
        code = self.process.poll()
        changed = {}
        # What presupposes another is looked at first: a state saved meanwhile never comes without its metrics.
        branches = sorted(path.name for path in self.path.glob("branch-*.safetensors"))
        for name in reversed((KEPT[0], *branches, *KEPT[1:])):
            with suppress(FileNotFoundError):  # not yet; or the run is done, and its resume state gone
                seen = self._version(name)
                if self.sent.get(name) != seen:
                    changed[name], self.sent[name] = (self.path / name).read_bytes(), seen
        signs = []
        for path in self.path.iterdir():
            with suppress(FileNotFoundError):  # temporary files come and go
                signs.append(path.stat().st_mtime)
        return code, dict(reversed(changed.items())), time.time() - max(signs)

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

    def _version(self, name: str) -> tuple[int, int]:
        """Of a file: when it was written, to the clock's tick; and its size, as a line more takes less than that."""
        found = (self.path / name).stat()
        return found.st_mtime_ns, found.st_size
