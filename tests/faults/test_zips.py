"""Zips that are damaged, lie, or would run code: a policy of Stable-Baselines3's, changed in one place at a time."""

import base64
import io
import json
import pickle
import random
import shutil
import tracemalloc
import zipfile
from contextlib import suppress
from functools import partial
from inspect import signature
from pathlib import Path

import pytest
import torch
from edited_zips import Payload, rewrite, with_data, with_state
from stable_baselines3 import A2C, DQN, PPO

from potstill.errors import InputError
from potstill.load import weights
from potstill.load.sb3 import load_sb3
from potstill.tasks import TASKS

CARTPOLE = TASKS["cartpole"].env


@pytest.fixture(autouse=True)
def hardly_played(monkeypatch):
    """A policy that was read is played to see its observations: here it matters what is read."""
    monkeypatch.setattr(weights, "WATCHED", 5)


@pytest.fixture(scope="module")
def zips(tmp_path_factory):
    """Policies of CartPole as SB3 saves them."""
    folder = tmp_path_factory.mktemp("zips")
    for algorithm in (PPO, A2C, DQN):
        model = algorithm("MlpPolicy", "CartPole-v1", device="cpu", seed=0)
        model.save(folder / f"{algorithm.__name__.lower()}.zip")
    return folder


def parameters(loaded):
    return {name: tensor.tolist() for name, tensor in loaded.policy.state_dict().items()}


def one_line(error):
    return "\n" not in str(error.value)


# What is never run


def test_a_pickle_in_the_json_is_left_alone(zips, tmp_path):
    marker = tmp_path / "marker"
    pickled = base64.b64encode(pickle.dumps(Payload(marker))).decode()

    def poison(members):
        data = json.loads(members["data"])
        for value in data.values():
            if isinstance(value, dict) and ":serialized:" in value:
                value[":serialized:"] = pickled
        members["data"] = json.dumps(data | {"more": {":type:": "<class 'dict'>", ":serialized:": pickled}}).encode()

    file = rewrite(zips / "ppo.zip", tmp_path / "model.zip", poison)
    assert parameters(load_sb3(file, CARTPOLE)) == parameters(load_sb3(zips / "ppo.zip", CARTPOLE))
    assert not marker.exists()
    with pytest.raises(FileExistsError):  # made by the first pickle, refused to the second: the payload is a live one
        PPO.load(file, device="cpu")
    assert marker.exists()


@pytest.mark.parametrize("form", ["torch.save", "tensor beside it", "pickle.dumps", "legacy torch.save"])
def test_a_pickle_in_the_weights_is_refused_and_not_run(zips, tmp_path, form):
    marker = tmp_path / "marker"

    def poison(members):
        if form == "pickle.dumps":
            members["policy.pth"] = pickle.dumps(Payload(marker))
            return
        state = torch.load(io.BytesIO(members["policy.pth"]), weights_only=True)
        file = io.BytesIO()
        content = state | {"more": Payload(marker)} if form == "tensor beside it" else Payload(marker)
        torch.save(content, file, _use_new_zipfile_serialization=form != "legacy torch.save")
        members["policy.pth"] = file.getvalue()

    file = rewrite(zips / "ppo.zip", tmp_path / "model.zip", poison)
    with pytest.raises(InputError, match=r"policy\.pth holds something else than tensors") as error:
        load_sb3(file, CARTPOLE)
    assert one_line(error)
    assert not marker.exists()
    with zipfile.ZipFile(file) as archive, suppress(RuntimeError):
        torch.load(io.BytesIO(archive.read("policy.pth")), weights_only=False)
    assert marker.exists()  # the payload is a live one


def test_a_refused_pickle_is_named(zips, tmp_path):
    def poison(members):
        file = io.BytesIO()
        torch.save(Payload(tmp_path / "marker"), file)
        members["policy.pth"] = file.getvalue()

    with pytest.raises(InputError, match=r"it asks for (posix|nt)\.mkdir, which is not run"):
        load_sb3(rewrite(zips / "ppo.zip", tmp_path / "model.zip", poison), CARTPOLE)


# What is not a zip of SB3's


def bomb(members):
    return members | {"pytorch_variables.pth": bytes(30_000_000)}


def of_another(name):
    """Puts in a member of another algorithm's zip."""

    def change(members, folder):
        with zipfile.ZipFile(folder / name[0]) as archive:
            return members | {name[1]: archive.read(name[1])}

    return change


def compressed_inside(members):
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(members["policy.pth"])) as inner,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as outer,
    ):
        for name in inner.namelist():
            outer.writestr(name, inner.read(name))
    return members | {"policy.pth": file.getvalue()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (bomb, r"it would unpack to 30,\d{3},\d{3} bytes"),
        (compressed_inside, r"policy\.pth is compressed inside"),
        (lambda members: members | {f"m{i}": b"" for i in range(5_000)}, "more than 4,096 members"),
        (lambda members: members | {"../../evil.txt": b"x"}, r"holds '\.\./\.\./evil\.txt', a name that"),
        (lambda members: members | {"/tmp/evil.txt": b"x"}, "holds '/tmp/evil.txt', a name that"),
        (lambda members: members | {"..\\evil": b"x"}, "a name that Stable-Baselines3 does not write"),
        (lambda members: members | {"a\nb": b"x"}, "a name that Stable-Baselines3 does not write"),
        (lambda members: {f"model/{name}": content for name, content in members.items()}, "'model/data', a name that"),
        (lambda members: {"a.txt": b"x"}, "has no member 'data' and is not a zip that"),
        (lambda members: {k: v for k, v in members.items() if k != "policy.pth"}, r"has no member 'policy\.pth'"),
        (lambda members: members | {"data": b"{"}, "'data' is not JSON"),
        (lambda members: members | {"data": b"[" * 100_000}, "'data' is not JSON"),
        (lambda members: members | {"data": b"\xff"}, "'data' is not JSON"),
        (lambda members: members | {"data": b"[]"}, "'data' is not a JSON object"),
        (lambda members: members | {"policy.pth": b""}, "holds something else than tensors: or it is damaged"),
        (lambda members: members | {"_stable_baselines3_version": bytes(101)}, "has 101 bytes; 100 are read at most"),
        (with_data(action_space=None), "does not describe the action_space"),
        (with_data(policy_class="x"), "does not describe the policy_class"),
        (with_data(policy_kwargs="x"), "policy_kwargs is not an object"),
        (
            with_state(lambda state: {**state, "log_std": torch.zeros(2)}),
            "log_std, for which potstill's families have",
        ),
        (with_state(lambda state: {**state, "lstm_actor.w": torch.zeros(2)}), r"lstm_actor\.w, for which"),
        (
            with_state(lambda state: {"actor.mu.weight": torch.zeros(2)}),
            r"no action_net\.weight: it is no MlpPolicy or CnnPolicy of PPO",
        ),
        (with_state(lambda state: {**state, "a\nb": torch.zeros(2)}), "names a tensor 'a.*b'"),
        (with_state(lambda state: {**state, 5: torch.zeros(2)}), "names a tensor '5'"),
        (with_state(lambda state: {k: v for k, v in state.items() if k != "value_net.bias"}), r"no value_net\.bias"),
        (with_state(lambda state: {**state, "value_net.bias": torch.zeros(1).double()}), "not a plain float32 tensor"),
        (with_state(lambda state: {**state, "value_net.bias": torch.zeros(1).to_sparse()}), "not a plain float32"),
        (with_state(lambda state: {**state, "value_net.bias": [0.0]}), "not a plain float32 tensor"),
        (with_state(lambda state: {**state, "value_net.bias": torch.zeros(2)}), r"is \(2,\);.*would be \(1,\)"),
        (with_state(lambda state: {**state, "value_net.bias": torch.tensor([torch.nan])}), r"bias in .* is not finite"),
        (with_state(lambda state: {**state, "action_net.bias": torch.zeros(1).expand(10**12)}), "claims a shape of"),
        (with_state(lambda state: {**state, "action_net.bias": torch.zeros(3)}), "chooses among 3 actions"),
        (
            with_state(lambda state: {**state, "value_net.bias": torch.nested.nested_tensor([torch.zeros(1)])}),
            "not a plain float32 tensor",
        ),
        (with_state(lambda state: {**state, "value_net.bias": torch.zeros(1, device="meta")}), "not a plain float32"),
        (
            with_state(lambda state: {**state, "value_net.bias": torch.full((1,), torch.inf)}),
            r"bias in .* is not finite",
        ),
        (
            with_state(lambda state: {k: 3e38 * torch.ones_like(v) for k, v in state.items()}),
            "what the policy answers is not finite",
        ),
        (with_state(lambda state: {**state, "action_net.weight": torch.zeros(2, 64, 1)}), "action_net"),
        (with_state(lambda state: {**state, "action_net.weight": torch.zeros(0, 64)}), "action_net"),
        (with_state(lambda state: {}), r"policy\.pth is not a state dict"),
        (of_another(("dqn.zip", "policy.pth")), r"policy\.pth has no .*: it is no MlpPolicy or CnnPolicy of PPO"),
        (of_another(("dqn.zip", "data")), r"policy\.pth has no .*: it is no MlpPolicy or CnnPolicy of DQN"),
        (with_state(lambda state: torch.zeros(3)), r"policy\.pth is not a state dict"),
        (with_state(lambda state: [1]), r"policy\.pth is not a state dict"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_not_as_sb3_writes_it_is_refused_in_one_line_that_names_it(zips, tmp_path, change, words):
    change = partial(change, folder=zips) if "folder" in signature(change).parameters else change
    file = rewrite(zips / "ppo.zip", tmp_path / "model.zip", change, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=words) as error:
        load_sb3(file, CARTPOLE)
    assert one_line(error)
    assert str(error.value).startswith(f"{file}: ")


def test_a_member_whose_size_is_a_lie_is_refused_without_being_unpacked(zips, tmp_path):
    def lie(members):
        return members | {"data": bytes(60_000_000)}

    file = rewrite(zips / "ppo.zip", tmp_path / "model.zip", lie, zipfile.ZIP_DEFLATED)
    content = file.read_bytes()
    size = (60_000_000).to_bytes(4, "little")
    assert content.count(size) == 2  # in the member's own header and in the directory
    file.write_bytes(content.replace(size, (100).to_bytes(4, "little")))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="member 'data' is damaged"):
            load_sb3(file, CARTPOLE)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_zip_that_is_cut_behind_a_zip_within_is_told_as_cut(zips, tmp_path):
    content = (zips / "ppo.zip").read_bytes()
    end = content.index(b"PK\x05\x06") + 22  # of policy.pth or another member, which is a zip of its own
    assert end < len(content)
    (file := tmp_path / "model.zip").write_bytes(content[:end])
    with pytest.raises(InputError, match="not a whole zip file: it begins with something else, or its end is missing"):
        load_sb3(file, CARTPOLE)


def test_two_members_of_the_same_name_are_refused(zips, tmp_path):
    file = shutil.copy(zips / "ppo.zip", tmp_path / "model.zip")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr("data", "{}")
    with pytest.raises(InputError, match="two members of the same name"):
        load_sb3(Path(file), CARTPOLE)


def test_damage_anywhere_is_one_line_or_harmless(zips, tmp_path):
    content = (zips / "ppo.zip").read_bytes()
    rng = random.Random(0)
    file = tmp_path / "model.zip"
    refused = []
    for trial in range(120):
        damaged = bytearray(content)
        if trial % 3 == 0:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            for _ in range(rng.choice((1, 20, 2_000))):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            load_sb3(file, CARTPOLE)  # the damage may lie in a member that is not read
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 60
    assert not any("\n" in line for line in refused)


def test_what_is_no_zip_is_refused(tmp_path):
    (tmp_path / "text.zip").write_text("hello")
    with pytest.raises(InputError, match=r"text\.zip: it is not a zip file, or not a whole one"):
        load_sb3(tmp_path / "text.zip", CARTPOLE)
    with pytest.raises(InputError, match=r"cannot read .*none\.zip: no such file"):
        load_sb3(tmp_path / "none.zip", CARTPOLE)
    with pytest.raises(InputError, match=r"cannot read .*: is a directory"):
        load_sb3(tmp_path, CARTPOLE)
