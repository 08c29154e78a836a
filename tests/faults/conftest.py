import os
import subprocess

import pytest
from processes import SUDO
from small_runs import RUNTIME, TRAIN

from potstill.training.trainer import execute, new_run


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The run directory of a CartPole expert, of sorts."""
    run = new_run(TRAIN, tmp_path_factory.mktemp("teacher") / "run", RUNTIME)
    execute(run, RUNTIME)
    return run.path


@pytest.fixture
def disk(tmp_path):
    """A file system of 2 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size=2m,uid={os.geteuid()}", "none", str(path)]
    if subprocess.run([*SUDO, *mount], capture_output=True, check=False).returncode:
        pytest.skip(
            "only root may mount a file system; test_full_disk.py also has a limit of file sizes, which anyone may set"
        )
    yield path
    subprocess.run([*SUDO, "umount", "--lazy", str(path)], check=True)
