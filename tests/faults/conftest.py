import pytest
from processes import MACHINE, TRAIN

from potstill.jobs import execute, new_training


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The run directory of a CartPole expert, of sorts."""
    run = new_training(TRAIN, tmp_path_factory.mktemp("teacher") / "run", MACHINE)
    execute(run, MACHINE)
    return run.path
