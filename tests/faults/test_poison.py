"""What a stranger's file may hold: code, lies about sizes, bombs, links, names that lead elsewhere. Each is tried.

test_zips.py has the hostile zips, test_plans.py the plans, tests/storage/test_checkpoints.py and tests/test_policies.py
the damaged files, tests/report/test_page.py HTML in names; fuzz.py looks for what nobody thought of.
"""

import json
import os
import pickle
import resource
import struct
import tracemalloc
import zipfile
from contextlib import closing
from dataclasses import asdict, replace

import gymnasium
import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch
from edited_zips import Payload

from potstill import api, ppo, results, telemetry
from potstill.buffer import new_dataset, open_dataset
from potstill.cli import main
from potstill.commands import studying
from potstill.envs import EnvConfig, Envs
from potstill.errors import InputError, printable
from potstill.load.sb3 import load_sb3
from potstill.networks import NetworkConfig, Policy
from potstill.policies import load_policy, recorded_result, save_policy
from potstill.report import page
from potstill.storage import checkpoints, files, runs
from potstill.storage.runs import Run
from potstill.study import execute
from potstill.study.local import launch
from potstill.study.planfile import read_plan
from potstill.tasks import TASKS
from potstill.training import assessment

CARTPOLE = TASKS["cartpole"].env
TEN_GB = 10 << 30
SPACES = {  # what Stable-Baselines3 says of a CartPole policy before its weights are read
    "observation_space": {":type:": "<class 'gymnasium.spaces.box.Box'>"},
    "action_space": {":type:": "<class 'gymnasium.spaces.discrete.Discrete'>"},
    "policy_class": {":type:": "<class 'abc.ABCMeta'>", "__module__": "stable_baselines3.common.policies"},
}
ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202e\n\rsecond line"
PLAN = 'env = "cartpole"\nwidths = ["1/8"]\nseeds = [0]\n[arms.rl]\n'


def save(path, env=CARTPOLE):
    policy = Policy(NetworkConfig(width="1/32"), (4,), 2).initialise(torch.Generator().manual_seed(0))
    save_policy(path, policy, env, np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32), {})
    return path


@pytest.fixture
def policy(tmp_path):
    (tmp_path / "policy").mkdir()
    return save(tmp_path / "policy" / "policy.safetensors")


@pytest.fixture
def run(tmp_path):
    """A run that is done, with its metrics."""
    made = Run.create(tmp_path / "runs" / "run", {"kind": "train", "config": {"env": {"id": "CartPole-v1"}}})
    made.metrics_path.write_text('{"step": 1, "score": 9.0}\n')
    made.write_result({"status": "done", "score": 9.0, "parameters": 22})
    return made


def rewrite(path, tensors=None, **document):
    """Changes tensors and description of a checkpoint, whose file stays a whole one."""
    old, description = checkpoints.load(path)
    checkpoints.save(path, old | (tensors or {}), description | document)


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one_line(error):
    line = str(error.value)
    return bool(line) and line.isprintable() and len(line) <= 1_100


def tree(folder):
    """Everything under a folder, links themselves, with what tells a change."""
    found = {}
    for place, folders, names in os.walk(folder):
        for name in folders + names:
            path = os.path.join(place, name)
            stat = os.lstat(path)
            found[path] = (stat.st_mode, stat.st_size, stat.st_mtime_ns)
    return found


def refused(capsys, *words):
    """What `potstill WORDS` says: one line, exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("potstill: ")
    assert printed.err.count("\n") == 1
    assert printed.err[:-1].isprintable()
    return printed.err


# Code that is not run


def test_a_pickle_given_as_a_policy_is_refused_and_not_run(tmp_path, capsys):
    marker = tmp_path / "marker"
    for name, legacy in (("model.pt", False), ("model.pth", True), ("policy.safetensors", False)):
        file = tmp_path / name
        torch.save(Payload(marker), file, _use_new_zipfile_serialization=not legacy)
        task = ["--env", "cartpole"] if name != "policy.safetensors" else []
        said = "is not a safetensors file" if not task else "which is not run"
        assert said in refused(capsys, "evaluate", file, *task)
        assert said in refused(capsys, "distill", file, "--out", tmp_path / "out", *task)
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert marker.exists()  # the payload is a live one


def test_the_task_of_a_policy_cannot_name_a_module_to_import(tmp_path, policy, capsys, monkeypatch):
    marker = tmp_path / "marker"
    (tmp_path / "stranger.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    save(policy, EnvConfig("stranger:CartPole-v1"))
    line = refused(capsys, "evaluate", policy)
    assert "--env stranger:CartPole-v1 is code of module stranger: allow it with --import stranger" in line
    assert not marker.exists()
    gymnasium.make_vec("stranger:CartPole-v1", 1).close()
    assert marker.exists()


@pytest.mark.parametrize("member", ["policy.optimizer.pth", "pytorch_variables.pth", "more"])
def test_members_of_a_zip_that_are_not_read_are_not_run(tmp_path, capsys, member):
    marker = tmp_path / "marker"
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("data", json.dumps(SPACES))
        archive.writestr(member, pickle.dumps(Payload(marker)))
    words = refused(capsys, "import-sb3", tmp_path / "model.zip", "--env", "cartpole", "--out", tmp_path / "out")
    assert "policy.pth" in words
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


class Room:
    """A terabyte, asked for by a call that torch's restricted unpickler allows."""

    def __reduce__(self):
        return bytearray, (1 << 40,)


def test_memory_that_a_pickle_asks_for_is_refused(tmp_path):
    torch.save({"action_net.weight": Room()}, tmp_path / "policy.pth")
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("data", json.dumps(SPACES))
        archive.write(tmp_path / "policy.pth", "policy.pth")
    with pytest.raises(InputError, match=r"model\.zip: ") as error:
        load_sb3(tmp_path / "model.zip", CARTPOLE)
    assert one_line(error)


@pytest.fixture
def data(tmp_path):
    """A data set of CartPole's."""
    envs = Envs(CARTPOLE, 2)
    with new_dataset(tmp_path / "data", envs, 20, {}) as made:
        for _ in range(10):
            made.add(envs.reset(0), envs.ages, torch.zeros(2, 2), torch.zeros(2))
    assert len(open_dataset(tmp_path / "data", envs)) == 20
    return tmp_path / "data"


def test_objects_in_the_arrays_of_a_data_set_are_refused_and_not_made(data, tmp_path):
    marker = tmp_path / "marker"
    np.save(data / "frames.npy", np.array([Payload(marker)] * 20, dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="data is not a data set, or not a whole one") as error:
        open_dataset(data, Envs(CARTPOLE, 2))
    assert one_line(error)
    assert not marker.exists()
    np.load(data / "frames.npy", allow_pickle=True)
    assert marker.exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: np.savez(data / "a.npz", a=np.zeros(3)) or os.replace(data / "a.npz", data / "frames.npy"),
        lambda data: os.truncate(data / "frames.npy", 200),
        lambda data: (data / "frames.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", 9_000) + b"(" * 9_000),
        lambda data: (data / "frames.npy").write_bytes(
            (data / "frames.npy").read_bytes().replace(b"(20, 4)", b"(9**9,)")
        ),
        lambda data: (data / "dataset.json").write_text('{"states": 1e400, "num_envs": 2}'),
        lambda data: (data / "dataset.json").write_text('{"states": 1000000000000000000, "num_envs": 2}'),
        lambda data: (data / "dataset.json").write_text('{"states": -20, "num_envs": 2}'),
        lambda data: (data / "dataset.json").write_text('{"states": 20.5, "num_envs": 2}'),
        lambda data: (data / "dataset.json").write_text('{"states": "20", "num_envs": true}'),
    ],
)
def test_a_data_set_that_lies_about_its_arrays_is_refused(data, spoil):
    spoil(data)
    with pytest.raises(InputError, match="data is not a data set, or not a whole one") as error:
        open_dataset(data, Envs(CARTPOLE, 2))
    assert one_line(error)


# Lies about sizes


def seen(view):
    return asdict(replace(CARTPOLE, view=(view,)))


@pytest.mark.parametrize(
    ("tensors", "document", "words"),
    [
        ({}, {}, r"it is proved by 1 to 256 observations of \(400000,\), not \(4, 4\)"),
        ({"probe.observations": torch.zeros(1, 400_000)}, {}, "has a size mismatch: it is .*, and should be "),
        ({}, {"observation_shape": [5_000_000_000], "env": seen("mask=0")}, "it is proved by"),
        (
            {"probe.observations": torch.zeros(1, 400_000, 1)},
            {"observation_shape": [400_000, 1], "layout": "first", "env": seen("99999x1")},
            "the image is too large",
        ),
    ],
    ids=["unproved", "weights", "places of a view", "weights of a view"],
)
def test_a_network_that_a_file_describes_but_does_not_hold_is_refused_before_it_is_made(
    policy, tensors, document, words
):
    """1.6 GB of weights, which no tensor of the file is, or the tables of a view of as much."""
    rewrite(policy, tensors, **{"network": {"width": "16"}, "observation_shape": [400_000]} | document)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=words) as error:
        load_policy(policy)
    assert one_line(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"observation_shape": [10**18, 10**18]}, "does not hold the policy"),
        ({"observation_shape": [-4]}, "observations of shape"),
        ({"observation_shape": [4.0]}, "observations of shape"),
        ({"observation_shape": "4"}, "observations of shape"),
        ({"num_actions": 10**15}, "does not hold the policy"),
        ({"num_actions": True}, "True actions"),
        ({"continuous": "yes"}, "continuous is 'yes'"),
        ({"network": {"width": "1e999999999"}}, "is not a number"),
        ({"network": {"width": 4}}, "width is 4"),
        ({"network": {"family": "nature"}}, "does not hold the policy"),
        ({"network": []}, "is no object"),
        ({"env": {"id": 5}}, "id is 5"),
        ({"env": {"id": "CartPole-v1", "actions": [0, "1"]}}, "actions is"),
        ({"env": {"id": ESCAPES}}, "a task is called"),
        ({"kind": {"policy": 1}}, "not a policy"),
    ],
)
def test_a_description_that_cannot_be_is_refused_in_one_line(policy, document, words):
    rewrite(policy, **document)
    with pytest.raises(InputError, match=words) as error:
        load_policy(policy)
    assert one_line(error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_weights_of_another_dtype_are_refused(policy, dtype):
    tensors, _ = checkpoints.load(policy)
    rewrite(policy, {"policy.actor.weight": tensors["policy.actor.weight"].to(dtype)})
    with pytest.raises(InputError, match=rf"actor\.weight has a size mismatch: it is \(2, 2\) {dtype}"):
        load_policy(policy)


def test_a_policy_is_not_proved_by_more_observations_than_fit_in_memory(policy):
    rewrite(policy, {"probe.observations": torch.zeros(10_000, 4), "probe.logits": torch.zeros(10_000, 2)})
    with pytest.raises(InputError, match=r"proved by 1 to 256 observations of \(4,\), not \(10000, 4\)"):
        load_policy(policy)


META = {"potstill": '{"format": 1}'}
SMALL = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"__metadata__": META, "a": SMALL | {"shape": [1 << 32, 1 << 32, 1 << 32]}}, 4),
        ({"__metadata__": META, "a": SMALL | {"shape": [-1]}}, 4),
        ({"__metadata__": META, "a": SMALL | {"shape": [1.0]}}, 4),
        ({"__metadata__": META, "a": SMALL | {"shape": []}, "b": SMALL | {"data_offsets": [-4, 4]}}, 4),
        ({"__metadata__": META, "a": SMALL | {"data_offsets": [4, 0]}}, 4),
        ({"__metadata__": META, "a": SMALL | {"data_offsets": [0, 1 << 63]}}, 4),
        ({"__metadata__": META, "a": SMALL, "b": SMALL}, 4),
        ({"__metadata__": META, "a": SMALL | {"dtype": "F64"}}, 4),
        ({"__metadata__": META, "a": SMALL | {"dtype": "PICKLE"}}, 4),
        ({"__metadata__": META, "a": SMALL | {"dtype": None}}, 4),
        (b'{"__metadata__": {"potstill": "{\\"format\\": 1}"}, "__metadata__": {"potstill": "{\\"format\\": 1}"}}', 0),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {}, "a": 4}', 4),
        ({"__metadata__": {"potstill": '{"format": 1, "a": NaN}'}}, 0),
        ({"__metadata__": {"potstill": '{"format": 1, "a": -Infinity}'}}, 0),
        ({"__metadata__": {"potstill": '{"format": 1, "a": 1e400}'}}, 0),
        ({"__metadata__": {"potstill": '{"format": 1, "a": 1' + "0" * 400 + "}"}}, 0),
        ({"__metadata__": {"potstill": '{"format": 1, "a": 1' + "0" * 9_000 + "}"}}, 0),
        ({"__metadata__": {"potstill": '{"format": 1, "a": ' + "[" * 500 + "]" * 500 + "}"}}, 0),
        ({"__metadata__": {"potstill": '{"format": 1, "format": 1}'}}, 0),
        ({"__metadata__": {"potstill": '{"format": 1, "a": "\\ud800"}'}}, 0),
        ({"__metadata__": {"potstill": {"format": 1}}}, 0),
    ],
)
def test_a_header_that_lies_is_refused_in_one_line(tmp_path, header, data):
    (tmp_path / "a.safetensors").write_bytes(raw(header, bytes(data)))
    with pytest.raises(InputError) as error:
        checkpoints.load(tmp_path / "a.safetensors")
    assert one_line(error)
    assert "a.safetensors" in str(error.value)


def whole(name):
    """A header that a file of ten gigabytes fits to the byte."""
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    for _ in range(3):  # until the length of its numbers is right
        size = TEN_GB - len(raw({"__metadata__": META, name: entry}))
        entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    return raw({"__metadata__": META, name: entry})


HUGE = {
    "a.safetensors": (checkpoints.load, whole("a")),
    "policy.safetensors": (load_policy, whole("policy.actor.bias")),
    "header.safetensors": (checkpoints.load, struct.pack("<Q", 100 << 20) + b'{"__metadata__": {"a": "'),
    "model.zip": (lambda path: load_sb3(path, CARTPOLE), b"PK\x03\x04"),
    "plan.toml": (read_plan, PLAN.encode() + b"# "),
    "metrics.jsonl": (telemetry.read, b'{"step": 1}\n'),
    "config.json": (lambda path: Run.open(path.parent), b'{"kind": "'),
    "result.json": (lambda path: results.read_runs(path.parent), b'{"status": "'),
    "study.json": (files.read_json, b'{"name": "'),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_file_of_ten_gigabytes_is_refused_without_being_read(tmp_path, name):
    read, start = HUGE[name]
    path = tmp_path / name
    path.write_bytes(start)
    os.truncate(path, TEN_GB)
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as error:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert one_line(error)
    assert name in str(error.value)


@pytest.mark.parametrize("size", [0, 1, 8, 9])
def test_a_policy_of_no_bytes_is_refused(policy, size):
    os.truncate(policy, size)
    with pytest.raises(InputError, match=r"is empty or truncated|is truncated") as error:
        load_policy(policy.parent)
    assert one_line(error)


# Bombs and odd values in JSON


BOMBS = {
    "deep": "[" * 500_000,
    "just deep": '{"status": "done", "a": ' + "[" * 100 + "]" * 100 + "}",
    "not finite": '{"status": "done", "score": NaN}',
    "1e400": '{"status": "done", "score": 1e400}',
    "400 digits": '{"status": "done", "seed": 1' + "0" * 400 + "}",
    "9000 digits": '{"status": "done", "seed": 1' + "0" * 9_000 + "}",
    "a key twice": '{"status": "done", "status": "failed"}',
    "half a character": '{"status": "done", "error": "\\udc80"}',
    "not UTF-8": b'{"status": "done", "error": "\xff"}',
    "UTF-16": '{"status": "done"}'.encode("utf-16"),
    "a list": "[]",
    "nothing": "",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_json_that_is_a_bomb_or_none_is_refused_wherever_it_stands(run, bomb):
    content = BOMBS[bomb] if isinstance(BOMBS[bomb], bytes) else BOMBS[bomb].encode()
    for name in ("result.json", "config.json"):
        whole = (run.path / name).read_bytes()
        (run.path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name} is damaged") as error:
            results.runs_table(run.path)
        assert one_line(error)
        (run.path / name).write_bytes(whole)
    run.metrics_path.write_bytes(content + b"\n" + b'{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 1: not a JSON object") as error:
        telemetry.read(run.metrics_path)
    assert one_line(error)


@pytest.mark.parametrize(
    "odd",
    [
        {"score": "high"}, {"score": [1.0]}, {"score": True}, {"score": 10**19}, {"seed": 0.5}, {"seed": {}},
        {"status": 5}, {"arm": []}, {"arm": "$\\frac{$"}, {"arm": "a\x1b[2J"}, {"env": {}}, {"width": 3},
        {"ci95": 5}, {"ci95": [1.0]}, {"ci95": [1, 2, 3]}, {"ci95": ["a", "b"]}, {"returns": 5}, {"returns": [[]]},
        {"starts": []}, {"starts": {"50": 3}}, {"starts": {"50": {}}}, {"curve": 5}, {"curve": [5]},
        {"curve": [{"score": 1.0}]}, {"curve": [{"step": "x"}]}, {"curve": [{"step": 1, "score": {}}]},
    ],
)  # fmt: skip
def test_a_record_with_a_value_of_another_type_is_refused(tmp_path, odd):
    record = {"run": "a", "status": "done", "arm": "rl", "score": 9.0, "parameters": 22} | odd
    (tmp_path / "a.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=f"{next(iter(odd))}|does not say that it is a") as error:
        page.read_study(tmp_path)
    assert one_line(error)


@pytest.mark.parametrize("odd", [[], 5, "x", {"network": []}, {"env": 3}])
def test_a_config_of_another_shape_is_refused(run, odd):
    (run.path / "config.json").write_text(json.dumps({"kind": "train", "config": odd}))
    with pytest.raises(InputError, match=r"config\.json is damaged") as error:
        results.read_runs(run.path)
    assert one_line(error)


@pytest.mark.parametrize(
    "document", [{"kind": "train"}, {"kind": "distill", "config": {}}, {"kind": "train", "config": {"seed": "x"}}, {}]
)
def test_a_run_that_cannot_be_gone_on_with_is_refused(tmp_path, capsys, document):
    run = Run.create(tmp_path / "run", document)
    before = tree(tmp_path)
    refused(capsys, "train", "--resume", run.path, "--quiet")
    assert tree(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("odd", [{"score": "x"}, {"score": None}, {"ci95": 3}, {"ci95": [1]}, {"episodes": {}}])
def test_a_result_beside_a_policy_that_is_none_counts_as_not_there(policy, odd):
    result = policy.with_name("result.json")
    result.write_text(json.dumps({"score": 9.0}))
    assert recorded_result(load_policy(policy)) == {
        "score": 9.0,
        "ci95": None,
        "point_win_rate": None,
        "episodes": None,
    }
    result.write_text(json.dumps({"score": 9.0} | odd))
    assert recorded_result(load_policy(policy)) is None


# The state of an unfinished run


SMALL_RUN = ppo.PPOConfig(
    env=CARTPOLE, network=NetworkConfig(width="1/32"), num_envs=2, num_steps=8, minibatch_size=8, normalise_inputs=0,
    precision="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def unfinished():
    """A run after its first update: its environments, and what is saved of it."""
    with closing(Envs(CARTPOLE, 2)) as envs:
        algorithm = ppo.PPO(SMALL_RUN, envs, torch.device("cpu"))
        next(algorithm.steps())
        saved = algorithm.state_dict()
        tensors = {name: value for name, value in saved.items() if isinstance(value, torch.Tensor)}
        yield envs, tensors, {name: value for name, value in saved.items() if name not in tensors}


def go_on(path, envs):
    tensors, document = checkpoints.load(path)
    algorithm = ppo.PPO(SMALL_RUN, envs, torch.device("cpu"))
    algorithm.load_state_dict(tensors | document)
    next(progress for progress in algorithm.steps() if progress.metrics)


@pytest.mark.parametrize(
    ("tensors", "document", "words"),
    [
        ({"optimizer.0.exp_avg": torch.zeros(1)}, {}, "the optimiser's state of parameter 0 is of another shape"),
        ({"optimizer.0.exp_avg": torch.zeros(2, 4).double()}, {}, "is of another shape"),
        ({"optimizer.99.step": torch.zeros(())}, {}, "the optimiser has no 99.step"),
        ({"optimizer.x": torch.zeros(())}, {}, "the optimiser has no x"),
        ({"generator": torch.zeros(5056, dtype=torch.uint8)}, {}, "cannot go on with this one"),
        ({"generator": torch.zeros(3)}, {}, "cannot go on with this one"),
        ({"env.log": torch.full((8, 2), 2, dtype=torch.uint8)}, {}, "what it saved of its games"),
        ({"env.log": torch.zeros(8, 3, dtype=torch.uint8)}, {}, "what it saved of its games"),
        ({"env.log": torch.zeros(8, 2, dtype=torch.int64)}, {}, "what it saved of its games"),
        ({}, {"env_seed": -1}, "what it saved of its games"),
        ({}, {"env_seed": "0"}, "what it saved of its games"),
        ({}, {"env_checksum": 0.5}, "what it saved of its games"),
        ({}, {"env_checksum": 1}, "is not a function of its seed and actions"),
        ({"env.log": torch.zeros(8, 2, dtype=torch.uint8)}, {}, "is not a function of its seed and actions"),
        ({}, {"update": -1}, "cannot go on with this one"),
        ({}, {"games": "many"}, "cannot go on with this one"),
        ({}, {"recent": 5}, "cannot go on with this one"),
        ({}, {"recent": ["x"]}, "cannot go on with this one"),
        ({}, {"returns": {"count": 1.0, "colour": 2.0}}, "cannot go on with this one"),
        ({}, {"learning_rate": None}, "cannot go on with this one"),
        ({}, {"seconds": []}, "cannot go on with this one"),
    ],
)
def test_a_state_that_would_be_read_out_of_bounds_is_refused(unfinished, tmp_path, tensors, document, words):
    envs, saved, described = unfinished
    checkpoints.save(tmp_path / "whole", saved, described)
    go_on(tmp_path / "whole", envs)
    checkpoints.save(tmp_path / "resume", saved | tensors, described | document)
    with pytest.raises(InputError, match=words) as error:
        go_on(tmp_path / "resume", envs)
    assert one_line(error)


# Links, pipes and directories in a file's place


def put_link(path):
    whole = path.read_bytes() if path.exists() else b"secret"
    path.unlink(missing_ok=True)
    outside = path.parents[2] / "outside"
    outside.write_bytes(whole)
    os.utime(outside, (0, 0))  # so long ago that a lock there would be taken over
    path.symlink_to(outside)


def put_pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def put_directory(path):
    path.unlink(missing_ok=True)
    path.mkdir()


INSIDE = {
    "config.json": Run.open,
    "result.json": lambda run: Run.open(run).status,
    "metrics.jsonl": lambda run: results.curves_table(run.parent),
    "policy.safetensors": load_policy,
    "resume.safetensors": lambda run: checkpoints.load(run / "resume.safetensors"),
    "run.lock": lambda run: Run.open(run).lock().__enter__(),
}


@pytest.mark.timeout(60)  # a pipe that is opened to be read waits for ever
@pytest.mark.parametrize(
    ("name", "put"),
    [
        (name, put)
        for name in INSIDE
        for put in (put_link, put_pipe, put_directory)
        if (name, put) != ("policy.safetensors", put_link)  # the user names the run, and its policy may be one
    ],
)
def test_what_is_no_plain_file_in_a_run_is_not_read(run, name, put):
    save(run.policy_path)
    save(run.resume_path)
    path = run.path / name
    put(path)
    before = tree(run.path.parents[1])
    if name == "metrics.jsonl":
        assert INSIDE[name](run.path).is_empty()  # as if there were none
    else:
        with pytest.raises(InputError) as error:
            INSIDE[name](run.path)
        assert one_line(error)
        assert str(run.path) in str(error.value)
    assert tree(run.path.parents[1]) == before


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", [put_link, put_pipe, put_directory])
def test_games_that_are_no_plain_file_count_as_none(run, put):
    match = dict.fromkeys(("mean", *assessment.KEYS), 1.0)
    run.write_games({"played": 1, "games": 2, "matches": {"0123": match}})
    assert (assessment._kept_matches(run), execute._games(run)) == ({"0123": match}, (0.5, "1/2 games"))
    put(run.games_path)
    before = tree(run.path.parents[1])
    assert (assessment._kept_matches(run), execute._games(run)) == ({}, (None, "evaluating"))
    assert tree(run.path.parents[1]) == before


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", [put_link, put_pipe, put_directory])
def test_nothing_is_written_through_a_link_or_into_a_pipe(run, put):
    for name in ("metrics.jsonl", "log.txt", "run.lock"):
        put(run.path / name)
        before = tree(run.path.parents[1])
        with pytest.raises(InputError) as error:
            telemetry.Metrics(run.metrics_path)
        assert one_line(error)
        if name != "metrics.jsonl":
            with pytest.raises(
                InputError,
                match=r"cannot write .*log\.txt: (it is not a file|.*symbolic|is a directory|no such device)",
            ):
                launch(run.path, {}, {}, run.path, {}, {})
        if name == "run.lock":
            with pytest.raises(InputError, match="cannot lock"), run.lock():
                pass
        assert tree(run.path.parents[1]) == before
    with pytest.raises(InputError, match=r"cannot read .*metrics"):
        telemetry.read(run.metrics_path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", [put_pipe, put_directory])
@pytest.mark.parametrize("command", [("evaluate",), ("study", "status"), ("export", "--env", "cartpole")])
def test_a_pipe_or_a_directory_named_as_a_file_is_refused(tmp_path, put, command, capsys):
    path = tmp_path / {"evaluate": "a.safetensors", "study": "plan.toml", "export": "model.zip"}[command[0]]
    put(path)
    refused(capsys, *command, path)


def test_a_policy_in_a_folder_of_links_is_read(policy, tmp_path):
    """As huggingface_hub's cache, DVC and git-annex lay it out."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123").write_bytes(policy.read_bytes())
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "policy.safetensors"
    link.symlink_to("../blobs/0123")
    for named in (link, link.parent):
        assert load_policy(named).env == CARTPOLE
    for elsewhere in ("policy.safetensors", "../blobs", "../none"):  # itself, a directory, nothing
        link.unlink()
        link.symlink_to(elsewhere)
        with pytest.raises(InputError) as error:
            load_policy(link.parent)
        assert one_line(error)


def test_a_link_that_the_user_names_is_followed(policy, tmp_path):
    (tmp_path / "best").symlink_to(policy)
    assert load_policy(tmp_path / "best").env == CARTPOLE
    (tmp_path / "small.toml").write_text(PLAN)
    (tmp_path / "plan.toml").symlink_to(tmp_path / "small.toml")
    assert len(read_plan(tmp_path / "plan.toml").specs()) == 1


@pytest.mark.parametrize("content", [b"[" * 50_000, b"\xff\xfe", b'{"pid": 1e400}', bytes(1_000), bytes(100_000)])
def test_a_lock_that_is_a_bomb_is_no_life_and_names_nobody(run, content, monkeypatch):
    run.result_path.unlink()
    run.lock_path.write_bytes(content)
    assert run.status == "new"
    with run.lock():
        assert run.status == "running"
    run.lock_path.write_bytes(content)
    monkeypatch.setattr(runs, "_flock", lambda *_, **__: None)  # a file system without kernel locks
    assert run.status == "running"  # it may be one that is being written
    os.utime(run.lock_path, (0, 0))
    with run.lock():
        assert run.status == "running"


def test_a_report_publishes_no_file_that_a_link_leads_to(run, tmp_path):
    (tmp_path / "secret").write_bytes(b"private key")
    (run.path.parent / "film.mp4").symlink_to(tmp_path / "secret")
    os.mkfifo(run.path.parent / "pipe.mp4")
    (run.path.parent / "folder.mp4").mkdir()
    (run.path.parent / "real.mp4").write_bytes(b"film")
    assert page.read_study(run.path.parent).films == [("real", b"film")]


def test_a_push_uploads_no_file_that_a_link_leads_to(policy, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there: were it asked, it would say so
    (tmp_path / "secret").write_text('{"token": "hf_secret"}')
    policy.with_name("config.json").symlink_to(tmp_path / "secret")
    assert "config.json: it is a symbolic link" in refused(capsys, "push", policy.parent, "user/name")


# Names


def test_a_record_is_known_by_its_file_and_by_no_path_inside(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"run": "../../elsewhere", "status": "done"}))
    with pytest.raises(InputError, match="does not say that it is a"):
        results.read_runs(tmp_path)


# What reaches the terminal and the page


def test_a_line_of_an_error_cannot_command_the_terminal(tmp_path, capsys):
    folder = tmp_path / f"a{ESCAPES}"
    folder.mkdir()
    (folder / "a.json").write_text("{")
    line = refused(capsys, "report", folder)
    assert r"a\x1b[2J\x1b]0;owned\x07\u202e second line/a.json is damaged: it is not JSON" in line


def test_a_message_of_any_length_is_cut_and_one_that_is_made_twice_stays_the_same():
    error = InputError("start " + ESCAPES * 1_000_000 + " end")
    assert str(error).startswith(r"start \x1b[2J")
    assert str(error).endswith("second line end")
    assert len(str(error)) < 1_000
    assert str(InputError(str(error))) == str(error)
    assert printable("an ordinary line: é, 中") == "an ordinary line: é, 中"


def test_what_a_record_says_reaches_tables_and_lists_as_text(tmp_path, capsys):
    """Escape sequences, and what rich would take for its own markup."""
    name = "[red]x"
    record = {"run": name, "status": "failed", "error": ESCAPES, "arm": "x", "parameters": 22}
    (tmp_path / f"{name}.json").write_text(json.dumps(record))
    studying._print(api.overview(results.runs_table(tmp_path).with_columns(arm=pl.lit(name))))
    assert "[red]x" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        studying._exit_for({name: ESCAPES}, 1)
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert said.count("\n") == 2
    assert r"[red]x: \x1b[2J" in said


def test_html_and_escapes_of_a_record_are_text_in_the_page(tmp_path, capsys):
    attack = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    for seed in range(2):
        record = {
            "run": f"a{seed}",
            "status": "done",
            "arm": "rl",
            "method": "rl",
            "env": "CartPole-v1",
            "width": "1/8",
        }
        record |= {"score": 9.0 + seed, "parameters": 22, "seed": seed, "returns": [9.0, 10.0], "ci95": [9.0, 10.0]}
        record |= dict.fromkeys(("command", "machine", "commit", "teacher", "precision"), f"{attack} {ESCAPES}")
        (tmp_path / f"a{seed}.json").write_text(json.dumps(record))
    name = attack.replace("/", "\u2215")  # a file's name
    failed = {"run": name, "status": "failed", "error": f"{attack} {ESCAPES}"}
    (tmp_path / f"{name}.json").write_text(json.dumps(failed))
    study = {"name": f"{attack} {ESCAPES}", "plan": f"{attack} {ESCAPES}", "planned": 3}
    (tmp_path / "study.json").write_text(json.dumps(study))
    main(["report", str(tmp_path), "--out", str(tmp_path / "page.html"), "--resamples", "100"])
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    html = (tmp_path / "page.html").read_text()
    assert "<img" not in html
    assert html.count("<script>") == 1  # its own
    assert html.count("&lt;img src=x onerror=alert(1)&gt;&lt;script&gt;") >= 7
    assert not any(letter in html for letter in "\x1b\x07\u202e\r")


@pytest.mark.parametrize("arm", ["$\\frac{$", "<b>", "a\x1bb", "x" * 100])
def test_an_arm_that_a_figure_would_take_for_tex_is_refused(tmp_path, arm):
    (tmp_path / "a.json").write_text(json.dumps({"run": "a", "status": "done", "arm": arm}))
    with pytest.raises(InputError, match="do not fit a table: one has the arm") as error:
        page.read_study(tmp_path)
    assert one_line(error)


def test_safetensors_of_somebody_else_are_refused_by_name(tmp_path):
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors", {"potstill": "<script>\x1b[2J"})
    with pytest.raises(InputError, match=r"w\.safetensors is a safetensors file, but not potstill's") as error:
        load_policy(tmp_path / "w.safetensors")
    assert one_line(error)
