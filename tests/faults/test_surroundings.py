"""What is around a command: streams, limits, folders, variables, absurd numbers. One line where it cannot go on."""

import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from processes import call, surrounded

TINY = ["--env", "cartpole", "--total-timesteps", "256", "--num-envs", "4", "--num-steps", "64", "--minibatch-size"]
TINY += ["64", "--width", "1/8", "--normalise-inputs", "40", "--device", "cpu", "--threads", "1", "--evaluate", "0"]
TRAIN = ["train", *TINY, "--precision", "float32", "--out", "run"]
HELP = "potstill COMMAND --help lists its options; --help-all lists the rare ones too."


def potstill(tmp_path, before, words):
    """Exit code and output of `potstill` in an empty folder, after `before`, a function of that folder."""
    (tmp_path / "here").mkdir()
    return call(surrounded, partial(before, tmp_path / "here"), *words, output=tmp_path / "log")


def here(folder):
    os.chdir(folder)


def stream(number, place, folder):
    """Closes a standard stream where `place` is empty, or lets it lead there."""
    os.chdir(folder)
    name = ("stdin", "stdout", "stderr")[number]
    os.close(number)
    made = None
    if place:
        os.open(place, os.O_RDWR)
        made = open(number, "w", buffering=1 if number == 2 else -1, closefd=False)  # noqa: SIM115
    for each in (name, f"__{name}__"):
        setattr(sys, each, made)


def no_reader(folder):
    stream(1, os.devnull, folder)
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.close(reading)


def deleted(folder):
    os.chdir(folder)
    folder.rmdir()


def limit(what, most, folder):
    os.chdir(folder)
    resource.setrlimit(what, (most, most))


def little_memory(spare, folder):
    """Lets the process have `spare` bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit(resource.RLIMIT_AS, pages * resource.getpagesize() + spare, folder)


def variable(name, value, folder):
    os.chdir(folder)
    os.environ[name] = value


def path_of_bytes(folder):
    os.mkdir(os.fsencode(folder) + b"/\xff\xfe")
    os.chdir(os.fsencode(folder) + b"/\xff\xfe")


SHORT = "bad file descriptor: stdout"
FULL = "no space left on device: stdout"
AROUND = {
    "stdout closed, --help": (partial(stream, 1, ""), ["--help"], 2, SHORT),
    "stdout closed, help of a command": (partial(stream, 1, ""), ["train", "--help"], 2, SHORT),
    "stdout closed, info": (partial(stream, 1, ""), ["info"], 2, SHORT),
    "stdout closed, a bad command": (partial(stream, 1, ""), ["trian"], 2, "did you mean train?"),
    "stdout full, --help": (partial(stream, 1, "/dev/full"), ["--help"], 2, FULL),
    "stdout full, --version": (partial(stream, 1, "/dev/full"), ["--version"], 2, FULL),
    "stdout full, help of a command": (partial(stream, 1, "/dev/full"), ["train", "--help"], 2, FULL),
    "stdout full, info": (partial(stream, 1, "/dev/full"), ["info"], 2, FULL),
    "stdout without a reader": (no_reader, ["info"], 0, ""),
    "stderr closed, --help": (partial(stream, 2, ""), ["--help"], 0, HELP),
    "stderr closed, a bad command": (partial(stream, 2, ""), ["trian"], 2, ""),
    "stderr full, --help": (partial(stream, 2, "/dev/full"), ["--help"], 0, HELP),
    "stderr full, a bad command": (partial(stream, 2, "/dev/full"), ["trian"], 2, ""),
    "a working directory that was deleted": (deleted, TRAIN, 2, "the working directory was deleted: change to another"),
    "no memory for a rollout": (
        partial(little_memory, 1 << 25),
        [*TRAIN, "--num-steps", "1000000", "--quiet"],
        1,
        "out of memory: ",
    ),
    "no files": (partial(limit, resource.RLIMIT_NOFILE, 3), ["info"], 2, "too many open files"),
    "a module that is not there": (
        partial(variable, "POTSTILL_IMPORT", "nowhere"),
        TRAIN,
        2,
        "POTSTILL_IMPORT nowhere cannot be imported: ModuleNotFoundError: No module named 'nowhere'",
    ),
    "a terminal of one column": (partial(variable, "COLUMNS", "1"), ["info", "--help"], 0, "usage: potstill info"),
}


@pytest.mark.parametrize("around", AROUND)
def test_a_command_ends_in_one_line_or_well(around, tmp_path):
    before, words, code, said = AROUND[around]
    ended, output = potstill(tmp_path, before, words)
    assert (ended, "Traceback" in output) == (code, False)
    assert said in output
    if code and output:
        assert output.startswith("potstill: ")
        assert output.count("\n") == 1


@pytest.mark.parametrize(
    ("around", "code"),
    [
        (partial(stream, 0, ""), 0),
        (partial(stream, 1, ""), 2),  # what was to be printed is lost
        (partial(stream, 1, "/dev/full"), 2),
        (partial(stream, 2, ""), 0),
        (partial(stream, 2, "/dev/full"), 0),
        (partial(variable, "HOME", "/nowhere"), 0),
        (partial(variable, "TMPDIR", "/nowhere"), 0),
        (partial(variable, "PATH", ""), 0),  # without git
        (path_of_bytes, 0),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(getattr(value, "args", value)),  # no address: it differs
)
def test_a_training_is_whole_whatever_is_around_it(around, code, tmp_path):
    ended, output = potstill(tmp_path, around, TRAIN)
    (run,) = [path.parent for path in tmp_path.rglob("result.json")]
    assert (ended, "Traceback" in output) == (code, False)
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "policy.safetensors",
        "result.json",
    ]


def test_a_name_that_is_not_utf_8_is_refused_and_nothing_is_made(tmp_path):
    code, output = potstill(tmp_path, here, [*TRAIN, "--out", os.fsdecode(b"\xff\xfe")])
    assert (code, output) == (2, "potstill: b'\\xff\\xfe' is not UTF-8: names of files and folders must be\n")
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("limit", [500, 586, 700])  # some of them ended in torch, without a word
def test_memory_that_does_not_suffice_to_start_is_told(tmp_path, limit):
    start = f"ulimit -v {limit << 10}; exec {sys.executable} -m potstill train --env cartpole --out {tmp_path / 'run'}"
    done = subprocess.run(["bash", "-c", start], capture_output=True, text=True, check=False)
    told = f"this process may have {limit} MiB of memory, and needs 800 to start: raise the limit, such as ulimit -v"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"potstill: {told}\n")
    assert list(tmp_path.iterdir()) == []
