"""A small share of `python tests/faults/fuzz.py`, and a look at whether it would notice."""

import math
from pathlib import Path

import fuzz
import pytest

from potstill.errors import InputError

CASES = 1_000


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return {reader.name: reader for reader in fuzz.readers(fuzz.Seeds(tmp_path_factory.mktemp("seeds")))}


NAMES = ("checkpoint", "policy", "resume state", "SB3 zip", "plan", "metrics", "run", "run of a distillation")
NAMES += ("records", "data set", "hub card", "hub listing")


def test_every_reader_is_fuzzed_here(readers):
    assert tuple(readers) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_refused_in_one_line_or_harmless_and_nothing_else_is_touched(readers, name, tmp_path):
    reader = readers[name]
    whole = sum(each.share for each in readers.values())
    tally = fuzz.fuzz(reader, math.ceil(CASES * reader.share / whole), 0, tmp_path / "case")
    assert tally.failures == {}
    assert tally.refused > 0
    assert tally.accepted > 0


def reads_outside(folder):
    (folder.parent / "outside").read_bytes()


def writes(folder):
    (folder / "new").write_bytes(b"")


def removes(folder):
    (folder / "a").unlink()


def runs(folder):
    fuzz.os.system("true")


def raises(folder):
    raise KeyError("a")


def recurses(folder):
    recurses(folder)


def says_two_lines(folder):
    error = InputError("")
    error.args = ("a\nb",)
    raise error


def is_slow(folder):
    began = fuzz.time.process_time()
    while fuzz.time.process_time() - began < 0.02:
        pass


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (reads_outside, "reads /.*outside"),
        (writes, "writes /.*new"),
        (removes, "os.remove"),
        (runs, "os.system"),
        (raises, "KeyError at test_fuzz.py"),
        (recurses, "RecursionError"),
        (says_two_lines, "a line that is none"),
        (is_slow, "s of processor time"),
    ],
)
def test_the_fuzzer_notices_what_it_looks_for(read, words, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SLOW", 0.01 if read is is_slow else 5.0)
    (tmp_path / "outside").write_bytes(b"secret")
    reader = fuzz.Reader("bad", 1, lambda folder, case: Path(folder / "a").write_bytes(b""), read)
    tally = fuzz.Tally()
    fuzz.attempt(reader, fuzz.Case(0, [], [], 0), tmp_path / "case", tally)
    (failure,) = tally.failures.values()
    assert fuzz.re.search(words, failure)
