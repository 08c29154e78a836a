import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "commit_subject"


def judged(tmp_path, subject):
    message = tmp_path / "message"
    message.write_text(f"{subject}\n\nWhy.\n")
    return subprocess.run([SCRIPT, message], check=False, capture_output=True, text=True)


@pytest.mark.parametrize(
    "subject", ["Add start to discrete actions", "Merge branch 'x'", "Don't guess layouts", "Seed the games"]
)
def test_a_subject_that_says_what_changes_passes(tmp_path, subject):
    assert judged(tmp_path, subject).returncode == 0


@pytest.mark.parametrize(
    ("subject", "problem"),
    [
        ("Say " + "much " * 20, "characters, at most 72"),
        ("x", "begins with a capital verb"),
        ("Bootstrap truncated episodes.", "without a full stop"),
        ("Pong: three more runs", "begins with a capital verb"),
        ("Added start to discrete actions", "it is an imperative"),
    ],
)
def test_other_subjects_are_refused_with_the_reason(tmp_path, subject, problem):
    done = judged(tmp_path, subject)
    assert done.returncode == 1
    assert problem in done.stderr
