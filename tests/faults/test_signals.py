"""SIGINT and SIGTERM: saved, and told how to go on; a second SIGINT quits at once; nobody is left behind."""

import json
import signal
import time
from pathlib import Path

import pytest
from processes import OPTIONS, Child, gone, potstill, until

from potstill.cli import main
from potstill.storage import checkpoints
from potstill.storage.runs import Run

ENDLESS = ["train", "--env", "cartpole", "--total-timesteps", "100000000", "--num-envs", "4", "--num-steps", "64"]
ENDLESS += ["--minibatch-size", "64", "--width", "1/8", "--normalise-inputs", "40", "--precision", "float32", *OPTIONS]


def begun(run: Path) -> bool:
    return (run / "resume.safetensors").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_training_that_is_asked_to_stop_saves_and_says_how_to_go_on(number, code, tmp_path):
    run, options = tmp_path / "run", [*ENDLESS, "--save-every", "1000"]
    child = Child(potstill, *options, "--out", run, output=tmp_path / "log")
    until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size)
    assert not begun(run)
    child.send_signal(number)
    assert child.wait() == code
    assert child.said == f"potstill: stopped by {signal.Signals(number).name}; continue with --resume {run}\n"
    assert Run.open(run).status == "interrupted"
    assert checkpoints.load(run / "resume.safetensors")[1]["update"] > 0
    assert not (run / "run.lock").exists()


def hang_while_saving(marker: Path, *words: object) -> None:
    def hang(*_: object) -> None:
        marker.touch()
        time.sleep(1000)

    checkpoints.save = hang
    potstill(*words)


def test_a_second_sigint_quits_at_once(tmp_path):
    marker = tmp_path / "saving"
    child = Child(hang_while_saving, marker, *ENDLESS, "--out", tmp_path / "run", output=tmp_path / "log")
    until(marker.exists)
    child.send_signal(signal.SIGINT)
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    assert child.wait(10) == 130
    assert "Traceback" not in child.said
    assert Run.open(tmp_path / "run").status == "new"


def test_handlers_are_as_they_were_after_a_command(capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit):
        main(["train", "--env", "cartpol"])
    main(["info"])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_workers_save_and_stop_when_their_comparison_is_killed(number, teacher, tmp_path):
    words = ["compare", "--teachers", teacher, "--widths", "1/32", "--total-timesteps", "10000000", "--num-envs", "8"]
    words += ["--batch-size", "32", "--precision", "float32", "--out", tmp_path / "out", *OPTIONS]
    driver = Child(potstill, *words, output=tmp_path / "log")
    run = tmp_path / "out" / "width-1_32_student_seed-0"
    until(lambda: begun(run), 100)
    worker = json.loads((run / "run.lock").read_text())["pid"]
    driver.send_signal(number)
    assert driver.wait() == -number
    gone(worker)
    assert (run / "log.txt").read_text() == f"potstill: stopped by SIGTERM; continue with --resume {run}\n"
    assert Run.open(run).status == "interrupted"
