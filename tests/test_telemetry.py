import io
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill import telemetry
from potstill.errors import InputError
from potstill.telemetry import Metrics, Progress, last, read, sinks


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved: `clock[0] += 5`."""
    now = [100.0]
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: now[0])
    return now


def test_records_come_back_in_order_with_the_step_first(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Metrics(path) as metrics:
        metrics.write({"loss": 0.5, "step": 1, "phase": "warm-up"})
        assert path.read_text() == '{"step": 1, "loss": 0.5, "phase": "warm-up"}\n'  # on disk before the file is closed
        metrics.write({"step": 2, "loss": 0.25})
    assert read(path) == [{"step": 1, "loss": 0.5, "phase": "warm-up"}, {"step": 2, "loss": 0.25}]


def test_non_finite_numbers_become_null_and_scalars_of_numpy_and_torch_plain(tmp_path):
    with Metrics(tmp_path / "m") as metrics:
        metrics.write(
            {
                "step": 1,
                "nan": float("nan"),
                "inf": np.float32("inf"),
                "torch": torch.tensor(-float("inf")),
                "count": np.int64(3),
                "half": torch.tensor(0.5),
                "list": [1.0, float("nan")],
                "by": {"left": np.float64("nan"), "right": 2},
            }
        )
    plain = {"nan": None, "inf": None, "torch": None, "count": 3, "half": 0.5, "list": [1.0, None]}
    assert read(tmp_path / "m") == [{"step": 1, **plain, "by": {"left": None, "right": 2}}]


@pytest.mark.parametrize("record", [{}, {"step": 1.0}, {"step": True}])
def test_a_record_without_an_integer_step_is_refused(tmp_path, record):
    with Metrics(tmp_path / "m") as metrics, pytest.raises(ValueError, match="int 'step'"):
        metrics.write(record)
    assert (tmp_path / "m").read_bytes() == b""


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    assert read(path) == [{"step": 1}]


def test_a_last_line_that_lacks_only_its_newline_is_whole(tmp_path):
    (tmp_path / "m").write_bytes(b'{"step": 1}\n{"step": 2}')
    assert [record["step"] for record in read(tmp_path / "m")] == [1, 2]


@pytest.mark.parametrize("bad", [b"{", b"", b"[1]", b'{"loss": 1}', b'{"step": 1.5}', b"\xff"])
def test_a_bad_line_in_the_middle_is_named_by_its_number(tmp_path, bad):
    (tmp_path / "m").write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 2}\n')
    with pytest.raises(InputError, match="m, line 2: not a JSON object with an integer 'step'"):
        read(tmp_path / "m")


def test_an_empty_file_has_no_records_and_a_missing_one_is_an_error(tmp_path):
    (tmp_path / "m").touch()
    assert read(tmp_path / "m") == []
    with pytest.raises(InputError, match=r"cannot read .*none: no such file"):
        read(tmp_path / "none")


def test_a_resumed_run_keeps_what_was_saved_and_drops_what_it_will_write_again(tmp_path):
    path = tmp_path / "m"
    with Metrics(path) as metrics:
        metrics.write({"step": 1})
        kept = metrics.written
        metrics.write({"step": 2})
        metrics.copy(tmp_path / "copy")
        all_of_it = metrics.written
    assert (tmp_path / "copy").read_text() == path.read_text() == '{"step": 1}\n{"step": 2}\n'
    with open(path, "ab") as file:
        file.write(b'{"st')
    with Metrics(path, kept) as metrics:
        assert path.read_text() == '{"step": 1}\n'
        metrics.write({"step": 2})
        assert metrics.written == all_of_it
    assert telemetry.digest(path) == all_of_it["digest"]
    with Metrics(path):
        assert path.read_text() == ""


@pytest.mark.parametrize("content", [b"", b'{"step": 1', b'{"step": 7}\n'])
def test_a_resumed_run_does_not_write_on_in_another_file(tmp_path, content):
    with Metrics(tmp_path / "m") as metrics:
        metrics.write({"step": 1})
        kept = metrics.written
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(InputError, match=r"m is not the one that this run had written when it was saved: restore"):
        Metrics(tmp_path / "m", kept)
    assert (tmp_path / "m").read_bytes() == content


def test_the_last_record_is_read_from_the_end_however_long_the_file(tmp_path):
    path = tmp_path / "m"
    assert last(path) is None
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"ste')
    assert last(path) == {"step": 2}
    with open(path, "r+b") as file:  # sparse: longer than what is read at once
        file.truncate(telemetry.LIMIT + 1)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"step": 9}\n')
    assert last(path) == {"step": 9}
    path.write_bytes(b"x" * 100_000)
    assert last(path) is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
@pytest.mark.parametrize("count", [1, 10, 11, 35])
def test_a_file_that_is_too_large_to_keep_in_memory_is_read_thinned_and_written_on(tmp_path, monkeypatch, count):
    path = tmp_path / "m"
    monkeypatch.setattr(telemetry, "LIMIT", 5)
    with Metrics(path) as metrics:
        for step in range(1, count + 1):
            metrics.write({"step": step})
        kept = metrics.written
    with pytest.raises(InputError, match="at most 5 are read"):
        read(path)
    steps = [record["step"] for record in read(path, 10)]
    assert (
        steps == {1: [1], 10: [*range(1, 11)], 11: [1, 3, 5, 7, 9, 11], 35: [3, 7, 11, 15, 19, 23, 27, 31, 35]}[count]
    )
    with Metrics(path, kept) as metrics:
        metrics.write({"step": 99})
    assert read(path, 1) == [{"step": 99}]


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    full = open("/dev/full", "ab", buffering=0)  # noqa: SIM115  # Metrics closes it
    monkeypatch.setattr(telemetry, "open_append", lambda path: full)
    with Metrics(tmp_path / "m") as metrics, pytest.raises(InputError, match="m: no space left on device"):
        metrics.write({"step": 1})


def test_a_folder_that_is_missing_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*m: no such file"):
        Metrics(tmp_path / "none" / "m")


def test_off_a_terminal_a_line_comes_every_ten_seconds_and_at_the_end(capsys, clock):
    with Progress("train pong", total=100_000, start=20_000) as progress:
        for step in range(21_000, 31_000, 1000):  # 1,000 steps in 2.5 s
            clock[0] += 2.5
            progress.update(step, score=-3.14159, lost=None)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "train pong  24,000/100,000 steps  400 steps/s  score -3.142  3:10 left",
        "train pong  28,000/100,000 steps  400 steps/s  score -3.142  3:00 left",
        "train pong  30,000/100,000 steps  400 steps/s  score -3.142  2:55 left",
    ]


def test_a_long_wait_is_shown_in_hours(capsys, clock):
    with Progress("train", total=4000) as progress:
        clock[0] += 10
        progress.update(10)
    assert "train  10/4,000 steps  1 steps/s  1:06:30 left" in capsys.readouterr().err


def test_quiet_prints_nothing(capsys, clock):
    with Progress("train", total=10, quiet=True) as progress:
        clock[0] += 60
        progress.update(10, score=1.0)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_bar_shows_steps_score_and_the_words_as_they_are(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with Progress("train [pong]", total=2000) as progress:
        progress.update(1000)
        progress.update(2000, score=18.25)
        print("{}")
    shown = terminal.getvalue()
    assert "train [pong]" in shown
    assert "2,000/2,000" in shown
    assert "score 18.25" in shown
    assert "steps/s" in shown
    assert capsys.readouterr().out == "{}\n"


def test_a_full_disk_under_the_log_does_not_end_the_run(monkeypatch, clock):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    with Progress("train", total=10) as progress:
        clock[0] += 60
        progress.update(10)


def test_without_track_there_are_no_sinks(tmp_path):
    assert sinks(False, tmp_path, {}) == []
    assert not list(tmp_path.iterdir())


def tensorboard_points(folder: Path) -> list[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(name, e.step, e.value) for name in events.Tags()["scalars"] for e in events.Scalars(name)]


def test_track_sends_the_finite_numbers_to_tensorboard(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (sink,) = sinks(True, tmp_path, {"seed": 0})
    sink.write({"step": 5, "score": 1.5, "loss": float("nan"), "phase": "a", "done": True, "games": np.int64(2)})
    sink.close()
    assert sorted(tensorboard_points(tmp_path / "tensorboard")) == [("games", 5, 2.0), ("score", 5, 1.5)]


def test_track_without_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"--track needs TensorBoard: pip install 'potstill\[track\]'"):
        sinks(True, tmp_path, {})


@pytest.mark.parametrize(("variable", "count"), [("WANDB_MODE", 2), ("WANDB_API_KEY", 2), ("OTHER", 1)])
def test_wandb_joins_where_it_is_installed_and_set_up(tmp_path, monkeypatch, variable, count):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "offline")
    calls = []

    class Session:
        def log(self, data, step):
            calls.append((data, step))

        def finish(self):
            calls.append("finish")

    def init(**settings):
        calls.append(settings["config"])
        return Session()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    found = sinks(True, tmp_path, {"seed": 3})
    assert len(found) == count
    for sink in found:
        sink.write({"step": 1, "score": 2.0, "loss": None})
        sink.close()
    assert calls == ([{"seed": 3}, ({"score": 2.0}, 1), "finish"] if count == 2 else [])


def test_a_resumed_run_is_the_same_run_in_tensorboard_and_no_point_is_lost(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # killed after 3, saved after 2
        (sink,) = sinks(True, tmp_path, {}, start)
        for step in steps:
            sink.write({"step": step, "score": float(step)})
        sink.close()
    assert tensorboard_points(tmp_path / "tensorboard") == [("score", step, float(step)) for step in (1, 2, 3, 4)]


def test_a_resumed_run_is_the_same_run_in_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    begun = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **settings: begun.append(settings)))
    for folder, step in (("a", 0), ("a", 64), ("b", 0)):
        sinks(True, tmp_path / folder, {"seed": 3}, step)[0].close()
    assert [settings["resume"] for settings in begun] == ["allow"] * 3
    assert begun[0]["id"] == begun[1]["id"] != begun[2]["id"]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_wandb_that_fails_says_so_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys, where):
    monkeypatch.setenv("WANDB_API_KEY", "bad")

    def fail(*_, **__):
        raise RuntimeError("no\nnetwork")

    session = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    monkeypatch.setattr(session, where, fail, raising=False)
    init = fail if where == "init" else lambda **_: session
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    board, wandb = sinks(True, tmp_path, {})
    for step in (1, 2):
        board.write({"step": step, "score": 1.0})
        wandb.write({"step": step, "score": 1.0})
    board.close()
    wandb.close()
    said = "potstill: Weights & Biases failed, and the run goes on without it: no network\n"
    assert capsys.readouterr().err == said
    assert len(tensorboard_points(tmp_path / "tensorboard")) == 2


def test_tensorboard_without_a_folder_says_so_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (tmp_path / "tensorboard").touch()
    (sink,) = sinks(True, tmp_path, {})
    sink.write({"step": 1, "score": 1.0})
    sink.close()
    assert capsys.readouterr().err.startswith("potstill: TensorBoard failed, and the run goes on without it: ")


def test_wandb_that_is_set_up_but_not_installed_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setitem(sys.modules, "wandb", None)
    found = sinks(True, tmp_path, json.loads("{}"))
    assert len(found) == 1
    found[0].close()
