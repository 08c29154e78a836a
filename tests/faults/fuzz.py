"""Feeds every reader of files with damage: each answers with a value or an InputError, and touches nothing else.

python tests/faults/fuzz.py --cases 100000 --seed 0

A case is a valid file, or a folder of them, with bytes changed, JSON changed value by value, or both. While a reader is
at work, an audit hook of the interpreter notes what is opened, made, removed, started and connected to.
"""

import argparse
import io
import json
import math
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from potstill import ppo, telemetry
from potstill.buffer import new_dataset, open_dataset
from potstill.distill import DistillConfig
from potstill.envs import Envs
from potstill.errors import InputError, printable
from potstill.export import hub
from potstill.load import sb3, weights
from potstill.networks import NetworkConfig, Policy
from potstill.policies import load_policy, rebuild, recorded_result, save_policy
from potstill.report import page
from potstill.results import curves_frame, episodes_frame, read_runs, runs_frame
from potstill.storage import checkpoints, runs
from potstill.storage.runs import Run
from potstill.study import execute
from potstill.study.planfile import read_plan
from potstill.tasks import TASKS
from potstill.training import assessment

PLACES = 4  # that each drawn case is tried in
SLOW = 5.0  # seconds of processor time that no case may take
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CARTPOLE = TASKS["cartpole"].env

# What is done to files


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


ODD: list[Any] = [None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1 << 31, 1 << 53, 1 << 63, 1 << 64, -(1 << 63), 10**400]
ODD += [1e308, 5e-324, math.nan, math.inf, -math.inf, "", "x", "0", "1/8", "../../x", "/etc/passwd", "a\0b", "a\nb"]
ODD += ["\x1b[2J\x1b]0;x\x07", "\u202e", "\ud800", "$\\frac{$", "[/]", "<script>alert(1)</script>", "x" * 5_000, "é"]
ODD += [[], {}, [[]], [1, "a", None], {"a": 1}, {"": []}, nested(40), nested(3), [0] * 300, "os:CartPole-v1", "1e9999"]

values = st.one_of(
    st.sampled_from(ODD),
    st.integers(),
    st.floats(allow_subnormal=False),  # training turns them off for its process
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers(-3, 300) | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
)
kinds = st.sampled_from(("set", "delete", "add", "copy"))
edits = st.lists(st.tuples(kinds, st.integers(0, 1 << 16), values), min_size=1, max_size=3)
damage = st.lists(
    st.tuples(
        st.sampled_from(("set", "flip", "insert", "delete", "cut", "repeat")),
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


class Case(NamedTuple):
    """What happens to a seed: to its JSON, to its bytes, or first to one and then to the other."""

    which: int
    edits: list[tuple[str, int, Any]]
    damage: list[tuple[str, int, bytes]]
    choice: int


cases = st.builds(
    Case,
    st.integers(0, 63),
    st.one_of(st.just([]), edits, edits),
    st.one_of(st.just([]), st.just([]), damage),
    st.integers(0, 1 << 16),
)


def spread(case: Case) -> Iterator[Case]:
    """A drawn case, and the same changes in other places: to draw one takes several times as long as to try it."""
    yield case
    shift = random.Random(case.choice)
    for _ in range(PLACES - 1):
        moved = ([(what, shift.randrange(1 << 20), new) for what, _, new in changes] for changes in case[1:3])
        yield Case(shift.randrange(64), *moved, shift.randrange(1 << 16))


def slots(document: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON document that a value stands in: (container, key)."""
    found = []
    waiting = [document]
    while waiting:
        value = waiting.pop()
        inner = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        found += [(value, key) for key, _ in inner]
        waiting += [below for _, below in inner if isinstance(below, dict | list)]
    return found


def edited(document: Any, changes: list[tuple[str, int, Any]]) -> Any:
    document = deepcopy(document)
    for what, at, new in changes:
        value = deepcopy(new)  # or a later change would reach into the strategy's own
        places = slots(document) if isinstance(document, dict | list) else []
        if not places:
            return value
        container, key = places[at % len(places)]
        if what == "delete":
            del container[key]
        elif what == "copy":
            other, there = places[(at * 7919 + 13) % len(places)]
            container[key] = deepcopy(other[there])
        elif what == "add" and isinstance(container, dict):
            container[value if isinstance(value, str) else str(key)[::-1]] = value
        elif what == "add":
            container.insert(key, value)
        else:
            container[key] = value
    return document


def damaged(data: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    content = bytearray(data)
    for what, at, new in changes:
        at = at % (len(content) + 1)
        match what:
            case "set":
                content[at : at + len(new)] = new
            case "flip" if at < len(content):
                content[at] ^= new[0] or 1
            case "insert":
                content[at:at] = new
            case "delete":
                del content[at : at + new[0]]
            case "cut":
                del content[at:]
            case "repeat":
                content[at:at] = content[max(0, at - new[0]) : at] * (1 + new[-1] % 4)
    return bytes(content)


def dumped(document: Any) -> bytes:
    return json.dumps(document).encode()


# The readers


@dataclass
class Reader:
    """A reader, what it is given, and how many of every thousand cases are its."""

    name: str
    share: int
    make: Callable[[Path, Case], None]  # puts the case's files into a folder
    read: Callable[[Path], Any]


class Seeds:
    """Valid files, made once."""

    def __init__(self, folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        policy = Policy(NetworkConfig(width="1/32"), (4,), 2).initialise(generator)
        probe = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
        save_policy(folder / "policy.safetensors", policy, CARTPOLE, probe, {"command": "potstill train", "seed": 0})
        self.policy = (folder / "policy.safetensors").read_bytes()
        self.loaded = load_policy(folder / "policy.safetensors")

        small = {"num_envs": 2, "num_steps": 8, "minibatch_size": 8, "normalise_inputs": 0}
        self.config = ppo.PPOConfig(
            env=CARTPOLE, network=NetworkConfig(width="1/32"), total_timesteps=64, precision="float32", **small
        )
        with closing(Envs(CARTPOLE, 2)) as envs:
            algorithm = self.fresh(envs)
            next(algorithm.steps())
            saved = algorithm.state_dict()
            tensors = {name: value for name, value in saved.items() if isinstance(value, torch.Tensor)}
            document = {name: value for name, value in saved.items() if name not in tensors}
        checkpoints.save(folder / "resume.safetensors", tensors, document | {"kind": "resume", "seconds": 1.0})
        self.resume = (folder / "resume.safetensors").read_bytes()
        self.envs = Envs(CARTPOLE, 2)

        observations = self.envs.reset(0)
        with new_dataset(folder / "data", self.envs, 20, {"seed": 0}) as data:
            for _ in range(10):
                data.add(observations, self.envs.ages, torch.zeros(2, 2), torch.zeros(2))
        self.dataset = {path.name: path.read_bytes() for path in (folder / "data").iterdir()}

        training, distillation = (json.loads(json.dumps(asdict(each))) for each in (self.config, DistillConfig()))
        self.run_config = {"kind": "train", "config": training, "threads": 1, "commit": "0123456789ab"}
        self.run_config |= {"command": "potstill train", "machine": "a processor"}
        self.distill_config = {"kind": "distill", "teacher": "x", "config": distillation}
        self.result = {
            "status": "done", "kind": "train", "arm": "rl", "env": "CartPole-v1", "width": "1/32", "parameters": 22,
            "seed": 0, "score": 9.5, "ci95": [9.0, 10.0], "returns": [9.0, 10.0], "episodes": 2, "distinct": 2,
            "std": 0.5, "point_win_rate": None, "starts": {"0": {"score": 9.5, "point_win_rate": None}},
            "latency_ms": 0.1, "wall_seconds": 2.0, "commit": None, "training_macs": 1000,
        }  # fmt: skip
        self.metrics = [{"step": 16 * n, "seconds": 0.1 * n, "score": None, "loss": 0.5} for n in range(1, 6)]
        self.record = self.result | {"run": "rl_width-1_32_seed-0", "method": "rl", "curve": self.metrics}
        self.study = {"name": "small", "plan": "x = 1", "potstill": "0", "planned": 2, "random_score": 9.0}
        self.plan = {
            "name": "small", "env": "cartpole", "widths": ["1/8", "1/4"], "seeds": [0, 1], "teachers": ["t"],
            "evaluation": {"episodes": 5, "starts": [50]},
            "tune": {"seeds": [9], "widths": ["1/8"], "arms": {"rl": {"learning-rate": [1e-3, 2e-3]}}},
            "arms": {
                "rl": {"total-timesteps": 1000, "width": {"1/8": {"learning-rate": 1e-3}}},
                "distill-student": {"objective": "forward-kl"}, "finetune": {"from": "distill-student"},
            },
        }  # fmt: skip
        self.zip = self._zip()

    def fresh(self, envs: Envs) -> ppo.PPO:
        return ppo.PPO(self.config, envs, torch.device("cpu"))

    def _zip(self) -> dict[str, bytes]:
        """What Stable-Baselines3 writes of a PPO with two layers of eight units."""
        from stable_baselines3 import PPO

        file = io.BytesIO()
        PPO("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [8, 8]}, device="cpu", seed=0).save(file)
        with zipfile.ZipFile(file) as archive:
            return {name: archive.read(name) for name in archive.namelist()}


def reheaded(data: bytes, case: Case) -> bytes:
    """A safetensors file with its header edited: the entries of its tensors, or the document in its metadata."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]["digest"]  # or it would refuse nearly all
    if case.choice % 3:
        document = edited(json.loads(header["__metadata__"]["potstill"]), case.edits)
        header["__metadata__"]["potstill"] = json.dumps(document)
    else:
        header = edited(header, case.edits)
    text = dumped(header)
    if case.choice % 11 == 0 and text.count(b'"'):  # a key twice
        text = text[:-1] + b', "__metadata__": {"potstill": "{}"}}'
    told = len(text) + (case.choice % 97 if case.choice % 13 == 0 else 0)
    if case.choice % 101 == 0:
        told = case.choice << 40
    return told.to_bytes(8, "little") + text + data[8 + length :]


def readers(seeds: Seeds) -> list[Reader]:
    def safetensors(name: str, data: bytes) -> Callable[[Path, Case], None]:
        def make(folder: Path, case: Case) -> None:
            content = reheaded(data, case) if case.edits else data
            (folder / name).write_bytes(damaged(content, case.damage))

        return make

    def json_files(files: dict[str, Any], among: int | None = None) -> Callable[[Path, Case], None]:
        def make(folder: Path, case: Case) -> None:
            names = list(files)
            for number, (name, document) in enumerate(files.items()):
                hit = number == case.which % len(names)
                changes = case.edits if hit else []
                lines = isinstance(document, list)
                if lines:
                    rows = edited(document, changes)
                    content = b"\n".join(map(dumped, rows if isinstance(rows, list) else [rows])) + b"\n"
                else:
                    content = dumped(edited(document, changes))
                path = folder / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(damaged(content, case.damage) if hit else content)

        return make

    def checkpoint(folder: Path) -> Any:
        return checkpoints.load(folder / "a.safetensors")

    def policy(folder: Path) -> Any:
        loaded = load_policy(folder)
        loaded.policy(torch.zeros(2, *loaded.policy.observation_shape))
        return recorded_result(loaded)

    def go_on(folder: Path) -> Any:
        tensors, document = checkpoints.load(folder / "resume.safetensors")
        seeds.fresh(seeds.envs).load_state_dict(tensors | document)

    def zipped(folder: Path, case: Case) -> None:
        members = dict(seeds.zip)
        inside = case.choice % 4
        if inside == 1:
            members["policy.pth"] = damaged(members["policy.pth"], case.damage)
        if case.edits:
            members["data"] = dumped(edited(json.loads(members["data"]), case.edits))
        file = io.BytesIO()
        packed = zipfile.ZIP_DEFLATED if case.choice % 5 == 0 else zipfile.ZIP_STORED
        with zipfile.ZipFile(file, "w", packed) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        (folder / "model.zip").write_bytes(damaged(file.getvalue(), [] if inside == 1 else case.damage))

    def unzip(folder: Path) -> Any:
        with patch.object(weights, "WATCHED", 5):  # its play would take nine tenths of the time
            return sb3.load_sb3(folder / "model.zip", CARTPOLE)

    def plan(folder: Path, case: Case) -> None:
        document = edited(seeds.plan, case.edits)
        (folder / "plan.toml").write_bytes(damaged(toml(document), case.damage))

    def metrics(folder: Path) -> Any:
        return telemetry.read(folder / "m.jsonl")

    def run(folder: Path) -> Any:
        found = Run.open(folder / "a")
        kinds = {"train": ppo.PPOConfig, "distill": DistillConfig}
        asked = found.config.get("kind")
        games = execute._games(found), assessment._kept_matches(found)
        config = rebuild(kinds.get(asked if isinstance(asked, str) else "", Run), found.config.get("config"))
        return found.status, games, tables(folder), config

    def records(folder: Path) -> Any:
        return page.read_study(folder), tables(folder)

    def tables(folder: Path) -> Any:
        return [frame(read_runs(folder)) for frame in (runs_frame, episodes_frame, curves_frame)]

    def dataset(folder: Path, case: Case) -> None:
        target = sorted(seeds.dataset)[case.which % len(seeds.dataset)]
        for name, content in seeds.dataset.items():
            if name == target and name.endswith(".json") and case.edits:
                content = dumped(edited(json.loads(content), case.edits))
            elif name == target and case.edits:  # the header of an array
                tokens = re.compile(rb"\d+|\(|\)|False|[<|]\w\w")
                text = tokens.sub(lambda match: cut(match[0], case), content[:128], count=1 + case.choice % 6)
                content = text + content[128:]
            (folder / name).write_bytes(damaged(content, case.damage) if name == target else content)

    def cut(token: bytes, case: Case) -> bytes:
        new = str(case.edits[0][2])[:200].encode(errors="replace")
        return new if case.choice % 2 else token[::-1]

    def states(folder: Path) -> Any:
        data = open_dataset(folder, seeds.envs)
        positions = data.draw(4, torch.Generator().manual_seed(0))
        return data.batch(positions, seeds.loaded.policy, torch.float32)

    def card(folder: Path) -> Any:
        result, config = runs.read_document(folder / "result.json"), runs.read_document(folder / "config.json")
        return hub._card(seeds.loaded, result, config, "user/name", "mit", film=False)

    def listing(folder: Path) -> Any:
        try:
            sizes = json.loads((folder / "listing.json").read_bytes())
        except ValueError:  # huggingface_hub reads it before we do
            sizes = None
        whole = isinstance(sizes, dict) and all(type(size) in (int, type(None)) for size in sizes.values())
        return hub._expected("user/name", sizes if whole else {}, None)  # huggingface_hub itself checks the types

    run_files = {"a/config.json": seeds.run_config, "a/result.json": seeds.result, "a/metrics.jsonl": seeds.metrics}
    games = {"format": 1, "played": 3, "games": 9, "matches": {"0123456789ab": {"mean": 1.0, "episodes": 3}}}
    lock = {"pid": 2**22 + 1, "host": "elsewhere", "started": "2026", "born": 5}
    study = {f"{seeds.record['run']}.json": seeds.record, "study.json": seeds.study}
    sizes = {"policy.safetensors": 1000, "result.json": 10, "config.json": 20, "README.md": 5, "a/b.bin": 7}
    return [
        Reader("checkpoint", 180, safetensors("a.safetensors", seeds.policy), checkpoint),
        Reader("policy", 150, safetensors("policy.safetensors", seeds.policy), policy),
        Reader("resume state", 70, safetensors("resume.safetensors", seeds.resume), go_on),
        Reader("SB3 zip", 90, zipped, unzip),
        Reader("plan", 130, plan, lambda folder: read_plan(folder / "plan.toml")),
        Reader("metrics", 90, json_files({"m.jsonl": seeds.metrics}), metrics),
        Reader("run", 90, json_files(run_files | {"a/run.lock": lock, "a/games.json": games}), run),
        Reader("run of a distillation", 20, json_files({"a/config.json": seeds.distill_config}), run),
        Reader("records", 80, json_files(study), records),
        Reader("data set", 40, dataset, states),
        Reader("hub card", 20, json_files({"result.json": seeds.result, "config.json": seeds.run_config}), card),
        Reader("hub listing", 20, json_files({"listing.json": sizes}), listing),
    ]  # fmt: skip


def toml(document: Any) -> bytes:
    """TOML of a document, good or bad: JSON's values are TOML's but for objects and None."""

    def value(it: Any) -> str:
        if isinstance(it, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {value(inner)}" for key, inner in it.items()) + "}"
        if isinstance(it, list):
            return "[" + ", ".join(map(value, it)) + "]"
        return {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}.get(json.dumps(it), json.dumps(it))

    table = document if isinstance(document, dict) else {}
    return "\n".join(f"{json.dumps(key)} = {value(it)}" for key, it in table.items()).encode(errors="surrogatepass")


# The watch, and the count


class Watch:
    """Notes what the interpreter opens, changes, starts or connects to while a reader is at work."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.seen: list[str] = []
        code = (sys.prefix, sys.base_prefix, torch.__path__[0], *sys.path)
        self.allowed = tuple({os.path.realpath(path) for path in code if path})
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int):
                return
            real = os.path.realpath(os.fsdecode(path))
            if (flags or 0) & WRITES:
                self.seen.append(f"writes {real}")
            elif not real.startswith((str(self.inside), *self.allowed)):  # modules are imported as they are needed
                self.seen.append(f"reads {real}")
        elif event.startswith(("os.", "subprocess.", "socket.", "shutil.", "ctypes.dlopen")) and not event.startswith(
            ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.add_dll", "os.putenv", "os.unsetenv")
        ):
            self.seen.append(f"{event}{arguments}"[:200])

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        self.seen, self.inside = [], folder.resolve()
        try:
            yield
        finally:
            self.inside = None


@dataclass
class Tally:
    """What came of a reader's cases."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)  # by what failed, the first of a kind
    lines: Counter[str] = field(default_factory=Counter)


WATCH: list[Watch] = []  # an audit hook cannot be taken back: there is one


def attempt(reader: Reader, case: Case, folder: Path, tally: Tally) -> None:
    """One case, in an empty folder."""
    if not WATCH:
        WATCH.append(Watch())
    tally.cases += 1
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    reader.make(folder, case)
    began, failure = time.process_time(), ""
    try:
        with WATCH[0].over(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(folder)
        tally.accepted += 1
    except InputError as error:
        tally.refused += 1
        said = str(error)
        tally.lines[re.sub(r"'.*|\d+|/\S*", "", said)[:40]] += 1
        if said != printable(said) or not said.isprintable() or not said:
            failure = f"a line that is none: {said!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        failure = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {printable(error, 150)}"
    taken = time.process_time() - began
    tally.slowest = max(tally.slowest, taken)
    if taken > SLOW:
        failure = failure or f"{taken:.1f} s of processor time"
    failure = failure or "; ".join(WATCH[0].seen)
    if failure:
        tally.failures.setdefault(re.sub(r"[\d']+", "", failure)[:100], f"{failure}   {case!r:.600}")


def fuzz(reader: Reader, count: int, start: int, folder: Path) -> Tally:
    """`count` cases of one reader, from seed `start`."""
    attempt(reader, Case(0, [], [], 1), folder, first := Tally())  # which imports what it needs, unwatched by time
    if not first.accepted or any(not failure.startswith("reads") for failure in first.failures):
        return Tally(failures={"whole": f"what is whole is not read: {first}"})
    tally = Tally()
    while (left := count - tally.cases) > 0:

        @seed(start)
        @settings(
            max_examples=math.ceil(left / PLACES), database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(cases)
        def run(case: Case) -> None:
            for each in spread(case):
                attempt(reader, each, folder, tally)

        run()
        start += 1_000_003
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers whose name begins so")
    options = parser.parse_args()
    torch.set_num_threads(1)
    total = failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "seeds").mkdir()
        chosen = [reader for reader in readers(Seeds(root / "seeds")) if reader.name.startswith(options.only)]
        whole = sum(reader.share for reader in chosen)
        print(f"{'reader':<24}{'cases':>9}{'refused':>9}{'accepted':>10}{'slowest':>10}{'failures':>10}")
        for reader in chosen:
            tally = fuzz(reader, math.ceil(options.cases * reader.share / whole), options.seed, root / "case")
            total, failed = total + tally.cases, failed + len(tally.failures)
            print(
                f"{reader.name:<24}{tally.cases:>9,}{tally.refused:>9,}{tally.accepted:>10,}{tally.slowest:>8.2f} s"
                f"{len(tally.failures):>10}",
                flush=True,
            )
            for failure in tally.failures.values():
                print(f"    {failure}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    spent = f"{time.process_time():.0f} s of processor time, at most {peak:,.0f} MiB of memory"
    print(f"{total:,} cases, {failed} failures, {spent}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
