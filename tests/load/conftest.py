import pytest

from potstill.cli import main


@pytest.fixture
def call(capsys):
    """Calls `potstill` in this process; returns exit code, stdout and stderr."""

    def call(*words):
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call
