"""Every screen at the two sizes of terminal that people have: no line is wider, and none is broken in two."""

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from rich.console import Console

from potstill import api, cli, options, telemetry
from potstill.commands import studying
from potstill.results import runs_table
from potstill.study import execute
from potstill.study.plan import RunSpec
from potstill.tasks import TASKS

SIZES = pytest.mark.parametrize(("columns", "rows"), [(80, 24), (120, 40)])
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@contextmanager
def terminal(columns: int, rows: int) -> Iterator[list[str]]:
    """A terminal of this size in the place of stdout and stderr. Yields a list that afterwards holds the lines drawn on
    it, none of which is wider than it is."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    blocks: list[bytes] = []
    lines: list[str] = []

    def drain() -> None:
        with suppress(OSError):  # the other end is closed
            while block := os.read(ours, 1 << 16):
                blocks.append(block)

    reader = threading.Thread(target=drain)
    reader.start()
    with pytest.MonkeyPatch.context() as patch, os.fdopen(theirs, "w", encoding="utf-8") as screen:
        patch.setattr(sys, "stdout", screen)
        patch.setattr(sys, "stderr", screen)
        patch.setenv("TERM", "xterm-256color")
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
            patch.delenv(name, raising=False)
        yield lines
    reader.join(10)
    os.close(ours)
    shown = ESCAPE.sub("", b"".join(blocks).decode())
    lines += [line.rstrip() for line in re.split(r"[\r\n]+", shown) if line.strip()]
    assert lines
    assert max(map(len, lines)) <= columns


@SIZES
@pytest.mark.parametrize("env", [task.env.id for task in TASKS.values()])
@pytest.mark.parametrize(
    ("what", "fields", "unit"),
    [
        ("train", {"score": 12.123, "agreement": 0.98765}, "steps"),
        ("distill", {"score": -12.123, "agreement": 0.98765}, "steps"),
        ("evaluate", {"not sticky": 123.456}, "games"),
        ("film", {}, "steps"),
    ],
)
def test_a_bar_is_one_line_that_says_what_which_size_and_how_long(columns, rows, env, what, fields, unit, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: now[0])
    title = f"{what} {env}, width 1/16"
    with terminal(columns, rows) as lines, telemetry.Progress(title, total=2_000_000, unit=unit) as progress:
        for step in (1_000, 1_234_567, 2_000_000):
            now[0] += 3_000.0
            progress.update(step, **fields)
    assert all(line.startswith(f"{what} {env}, width 1/16  ") for line in lines)
    assert any(re.search(r" 1,234,567/2,000,000 .*[0-9]:[0-9]{2}( left)?$", line) for line in lines)


NAMES = [
    "distill-student_width-1_16_teacher-seed-0_seed-0",
    "rl-split-1_4_width-1_32_seed-3",
    "distill-student_learning-rate-0.001_width-1_16_teacher-seed-0_seed-101",
]


@SIZES
def test_a_study_under_way_has_a_line_for_each_run(columns, rows):
    workers = [execute._Worker(RunSpec(name, "rl", None), None, None, 0.0, 0.0, None) for name in NAMES]
    looks = [execute._Seen("99%, agreement 0.987", 0.99)] * len(NAMES)
    with terminal(columns, rows) as lines:
        Console().print(execute._table(workers, looks, 120, 300, 100, 12, "12:34:56"))
    assert len(lines) == 1 + len(NAMES)
    assert lines[0].startswith("305 of 420 runs done, 100 waiting, 12 failed, 12:34:56 left")
    assert all(line.endswith("  99%, agreement 0.987") for line in lines[1:])
    assert lines[1].startswith(NAMES[0])  # whole


def records(seeds: int) -> list[dict[str, object]]:
    return [
        {
            "run": f"{arm}-{parameters}-{seed}", "status": "done", "arm": arm, "env": "pong", "seed": seed,
            "width": width, "parameters": parameters, "score": 100.0 * seed + 123.456, "teacher_score": 426.5,
        }
        for arm in ("rl-split-1_4", "distill-student", "distill-student_learning-rate-0.001"[: 20 if seeds > 1 else 99])
        for width, parameters in (("1/16", 1_584), ("1", 1_693_321))
        for seed in range(seeds)
    ]  # fmt: skip


@SIZES
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_table_of_a_study_has_six_columns_and_a_line_for_each_size(columns, rows, seeds, tmp_path):
    made = records(seeds)
    made[-1] |= {"status": "failed", "score": None}
    for record in made:
        (tmp_path / f"{record['run']}.json").write_text(json.dumps(record))
    with terminal(columns, rows) as lines:
        studying._print(api.overview(runs_table(tmp_path)))
    assert len(lines) == 2 + 6  # headings, a rule, and three arms at two sizes
    cells = [re.split(r" {2,}", line.strip()) for line in lines]
    assert {len(row) for row in cells[:1] + cells[2:]} == {6 if seeds > 1 else 5}
    assert "…" not in "".join(lines)
    assert cells[-1][2:] == (["2 of 3", "173.5", "123.5 to 223.5", "41 %"] if seeds > 1 else ["0 of 1", "-", "-"])


def test_the_table_of_a_study_has_the_interquartile_mean_as_the_report_has(tmp_path):
    for seed, score in enumerate((1.0, 2.0, 3.0, 4.0, 100.0)):
        record = records(1)[-1] | {"score": score, "seed": seed, "teacher_score": 6.0, "run": f"student-{seed}"}
        (tmp_path / f"student-{seed}.json").write_text(json.dumps(record))
    with terminal(120, 40) as lines:
        studying._print(api.overview(runs_table(tmp_path)))
    assert re.split(r" {2,}", lines[-1].strip())[2:] == ["5", "3.0", "1.0 to 100.0", "50 %"]


def test_runs_that_failed_before_they_had_a_size_stand_beside_others(tmp_path):
    for seed, width in enumerate((None, "1/16")):
        record = records(1)[-1] | {"status": "failed", "score": None, "parameters": None, "width": width, "seed": seed}
        (tmp_path / f"student-{seed}.json").write_text(json.dumps(record | {"run": f"student-{seed}"}))
    with terminal(80, 24) as lines:
        studying._print(api.overview(runs_table(tmp_path)))
    assert [re.split(r" {2,}", line.strip())[1:3] for line in lines[2:]] == [["-", "0 of 1"], ["1/16", "0 of 1"]]


@SIZES
def test_a_sentence_is_broken_between_words(columns, rows):
    sentence = "A student of 7,197 parameters keeps 77 % of its teacher's points. " * 5
    with terminal(columns, rows) as lines:
        print(options.fitted(sentence))
    assert " ".join(lines) == sentence.strip()
    assert len(lines) > 1
    assert options.fitted(sentence) == sentence


@SIZES
def test_the_list_of_commands_fits(columns, rows):
    with terminal(columns, rows) as lines:
        print(cli._usage())
    assert len(lines) == cli._usage().replace("\n\n", "\n").count("\n") + 1


@SIZES
def test_something_is_on_the_screen_before_what_takes_long_is_imported(columns, rows, monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: sys.exit(f"imported {name}"))
    with terminal(columns, rows) as lines, pytest.raises(SystemExit, match=r"imported potstill\.commands\.learning"):
        cli.main(["distill"])
    assert lines == ["potstill distill: starting"]
