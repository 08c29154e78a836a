"""VecNormalize's statistics: folded into the policy as SB3 applies them, and read from hostile pickles without harm."""

import json
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from edited_zips import Payload, imported
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

import potstill as ps
from potstill.distill import DistillConfig, start
from potstill.errors import InputError
from potstill.load.pickles import array, read_pickle
from potstill.load.sb3 import NO_STATISTICS, load_sb3
from potstill.load.statistics import read_statistics
from potstill.policies import load_policy
from potstill.tasks import TASKS

CARTPOLE = TASKS["cartpole"].env


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A policy, its environment and their two files; observations reach beyond the clip of 0.7 deviations."""
    folder = tmp_path_factory.mktemp("trained")
    venv = VecNormalize(make_vec_env("CartPole-v1", 2, seed=0), clip_obs=0.7)
    model = PPO("MlpPolicy", venv, n_steps=64, device="cpu", seed=0).learn(256)
    model.save(folder / "model.zip")
    venv.save(folder / "kept.pkl")
    return model, venv, folder


def beside(trained, folder, name):
    _, _, source = trained
    folder.mkdir(parents=True)
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copy(source / "kept.pkl", folder / name)
    return Path(shutil.copy(source / "model.zip", folder / "model.zip"))


def observations():
    return np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)


def expected_logits(trained, seen):
    model, venv, _ = trained
    with torch.no_grad():
        inputs, _ = model.policy.obs_to_tensor(venv.normalize_obs(seen))
        return model.policy.get_distribution(inputs).distribution.logits


@pytest.mark.parametrize(
    "name", ["vec_normalize.pkl", "vecnormalize.pkl", "model/vecnormalize.pkl", "CartPole-v1/vecnormalize.pkl"]
)
def test_statistics_beside_the_zip_are_part_of_the_policy_clip_included(trained, tmp_path, name):
    file = beside(trained, tmp_path / "CartPole-v1_1", name)
    seen = observations()
    share = (np.abs(trained[1].normalize_obs(seen)) == np.float32(0.7)).mean()
    assert 0.1 < share < 0.9
    loaded = load_sb3(file, CARTPOLE)
    logits = loaded.policy(torch.from_numpy(seen))[0].log_softmax(-1)
    assert torch.allclose(logits, expected_logits(trained, seen), rtol=0, atol=1e-5)
    assert loaded.document["provenance"]["statistics"]["file"] == Path(name).name


def test_an_import_keeps_the_clip_and_a_student_takes_it_over(trained, tmp_path):
    file = beside(trained, tmp_path / "zip", "vecnormalize.pkl")
    seen = torch.from_numpy(observations())
    expected = load_sb3(file, CARTPOLE).policy
    imported(file, CARTPOLE, tmp_path / "imported")
    kept = load_policy(tmp_path / "imported").policy
    assert kept.clip == np.float32(0.7)
    assert torch.equal(kept(seen)[0], expected(seen)[0])
    student = start(DistillConfig(), kept, torch.device("cpu")).student
    assert torch.equal(student.prepare(seen), expected.prepare(seen))


def test_the_statistics_are_part_of_what_a_teacher_is_known_by(trained, tmp_path):
    file = beside(trained, tmp_path / "zip", "vecnormalize.pkl")
    other = load_sb3(file, CARTPOLE, statistics=NO_STATISTICS)
    assert load_sb3(file, CARTPOLE).hash != other.hash


def test_the_statistics_of_a_checkpoints_own_steps_are_taken(trained, tmp_path):
    file = beside(trained, tmp_path / "zip", "rl_vecnormalize_2_steps.pkl")
    with pytest.raises(InputError, match=r"rl_vecnormalize_2_steps\.pkl may hold the statistics .* --statistics FILE"):
        load_sb3(file, CARTPOLE)
    renamed = file.rename(file.with_name("rl_2_steps.zip"))
    (file.parent / "vecnormalize.pkl").write_bytes(b"of another time")
    assert load_sb3(renamed, CARTPOLE).policy.clip == np.float32(0.7)


def test_a_zip_trained_with_statistics_that_are_not_there_is_refused_with_what_settles_it(call, trained, tmp_path):
    _, _, folder = trained
    words = ["import-sb3", folder / "model.zip", "--env", "cartpole", "--out", tmp_path / "out"]
    code, _, err = call(*words)
    assert code == 2
    assert "trained with VecNormalize" in err
    assert "--statistics FILE, or --statistics none" in err
    assert call(*words, "--statistics", folder / "kept.pkl")[0] == 0
    assert load_policy(tmp_path / "out").policy.clip == np.float32(0.7)
    words[-1] = tmp_path / "none"
    assert call(*words, "--statistics", "none")[0] == 0
    assert load_policy(tmp_path / "none").policy.clip == float("inf")


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "--episodes", 2, "--device", "cpu"],
        ["export", "--episodes", 0, "--threads", 1, "--out", "new.onnx"],
        ["distill", "--total-timesteps", 512, "--num-envs", 8, "--warmup-steps", 256, "--evaluate", 0, "--out", "run"],
    ],
)
def test_statistics_are_named_wherever_a_zip_is_opened(call, trained, tmp_path, monkeypatch, words):
    _, _, folder = trained
    monkeypatch.chdir(tmp_path)
    words = [words[0], folder / "model.zip", "--env", "cartpole", *words[1:]]
    code, _, err = call(*words)
    assert code == 2
    assert "--statistics FILE, or --statistics none" in err
    code, _, err = call(*words, "--statistics", folder / "kept.pkl")
    assert code == 0, err
    if words[0] == "distill":
        assert load_policy(tmp_path / "run").policy.clip == np.float32(0.7)
        assert json.loads((tmp_path / "run" / "config.json").read_text())["teacher_statistics"] == str(
            folder / "kept.pkl"
        )


def test_what_was_opened_without_statistics_teaches_without(trained, tmp_path):
    file = beside(trained, tmp_path / "zip", "vecnormalize.pkl")
    opened = ps.load(file, "cartpole", statistics="none")
    settings = {"total_timesteps": 512, "num_envs": 8, "warmup_steps": 256, "episodes": 0, "device": "cpu"}
    run = ps.distill(opened, out=tmp_path / "run", quiet=True, **settings)
    assert run.policy.clip == float("inf")


def test_statistics_of_rewards_only_leave_the_observations_alone(trained, tmp_path):
    _, _, folder = trained
    venv = VecNormalize(make_vec_env("CartPole-v1", 1), norm_obs=False)
    venv.save(tmp_path / "rewards.pkl")
    loaded = load_sb3(folder / "model.zip", CARTPOLE, statistics=tmp_path / "rewards.pkl")
    assert loaded.policy.input_clip is None
    assert torch.equal(loaded.policy.scale, torch.ones(4))


def test_a_student_of_one_that_normalises_nothing_is_normalised_by_its_play(trained, tmp_path):
    _, _, folder = trained
    loaded = imported(folder / "model.zip", CARTPOLE, tmp_path / "out", statistics=NO_STATISTICS)
    assert torch.equal(loaded.policy.scale, torch.ones(4))
    for teacher in (loaded.policy, load_policy(tmp_path / "out").policy):
        student = start(DistillConfig(), teacher, torch.device("cpu")).student
        assert (student.scale > 2).all()  # a pole that is balanced moves by less than half a unit
        assert student.seen_mean is None


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.ones(3, ">f8"),
        np.float32(0.5),
        2.5,
    ],
)
def test_arrays_are_what_was_pickled(protocol, value):
    read = array(read_pickle(pickle.dumps(value, protocol)))
    assert read.dtype == np.float64
    np.testing.assert_array_equal(read, value)


# What a stranger's pickle may hold


class Statistics:
    """Says of itself that it is a VecNormalize's state, of values that a test chooses."""

    def __init__(self, **changes):
        self.__dict__ = {"norm_obs": True, "clip_obs": 10.0, "epsilon": 1e-8, "obs_rms": Moments()} | changes


class Moments:
    def __init__(self, mean=None, var=None):
        self.mean = np.zeros(4) if mean is None else mean
        self.var = np.ones(4) if var is None else var


def test_nothing_that_a_pickle_names_is_run(tmp_path):
    marker = tmp_path / "marker"
    file = tmp_path / "vecnormalize.pkl"
    file.write_bytes(pickle.dumps(Statistics(more=Payload(marker))))
    assert read_statistics(file).of(None)[0].shape == (4,)
    file.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(InputError, match=r"vecnormalize\.pkl: it is no VecNormalize"):
        read_statistics(file)
    assert not marker.exists()
    pickle.loads(file.read_bytes())
    assert marker.exists()  # the payload is a live one


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"obs_rms": None}, "holds no mean and variance"),
        ({"obs_rms": {}}, "holds no mean and variance"),
        ({"obs_rms": {"a": None}}, "holds no mean and variance"),
        ({"obs_rms": Moments(mean=np.zeros(3))}, "not finite numbers of one shape"),
        ({"obs_rms": Moments(mean=np.full(4, np.nan))}, "not finite numbers of one shape"),
        ({"obs_rms": Moments(var=-np.ones(4))}, r"least variance is -1\.0"),
        ({"obs_rms": Moments(var=np.zeros(4)), "epsilon": 0.0}, r"least variance is 0\.0"),
        ({"obs_rms": Moments(mean=np.zeros(4, int))}, "something else where an array"),
        ({"obs_rms": Moments(mean=[0.0] * 4)}, "something else where an array"),
        ({"obs_rms": Moments(mean="zeros")}, "something else where an array"),
        ({"clip_obs": 0.0}, r"clip_obs is 0\.0"),
        ({"clip_obs": float("nan")}, "clip_obs is nan"),
        ({"clip_obs": np.ones(2)}, "an array of 2 numbers where one belongs"),
        ({"epsilon": None}, "something else where an array"),
    ],
)
def test_numbers_that_cannot_be_are_refused_in_one_line(tmp_path, changes, words):
    file = tmp_path / "vecnormalize.pkl"
    file.write_bytes(pickle.dumps(Statistics(**changes)))
    with pytest.raises(InputError, match=words) as error:
        read_statistics(file)
    assert "\n" not in str(error.value)


HOSTILE = {
    "empty": b"",
    "text": b"hello",
    "stops at once": b"\x80\x04.",
    "deep": b"\x80\x04)" + b"\x85" * 1_000_000 + b".",
    "doubled a hundred times and hashed": b"\x80\x04})" + b"q\x00h\x00\x86" * 100 + b"Ns.",
    "a memo of terabytes": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "bytes of exabytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "a bytearray of terabytes": b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.",
    "a long of gigabytes": b"\x80\x04\x8b\xff\xff\xff\x7f.",
    "a number of many digits": b"I" + b"9" * 100_000 + b"\n.",
    "an extension": b"\x80\x04\x82\x01.",
    "a persistent id": b"\x80\x04NQ.",
    "an array of terabytes": pickle.dumps(np.zeros(4)).replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"),
    "an item of nothing": b"\x80\x04K\x01K\x02s.",
    "an unset memo": b"\x80\x04h\x05.",
    "a mark too few": b"\x80\x04K\x01t.",
    "an attribute of a number": b"\x80\x04K\x01)R.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_one_line_and_takes_no_memory(tmp_path, name):
    file = tmp_path / "vecnormalize.pkl"
    file.write_bytes(HOSTILE[name])
    with pytest.raises(InputError) as error:
        read_statistics(file)
    assert "\n" not in str(error.value)
    if name == "an array of terabytes":
        with pytest.raises(InputError, match="something else where an array"):
            array(read_pickle(HOSTILE[name]))


def test_mutated_statistics_are_one_line_or_statistics(trained, tmp_path):
    content = (trained[2] / "kept.pkl").read_bytes()
    rng = random.Random(0)
    file = tmp_path / "vecnormalize.pkl"
    refused = []
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 5, 50))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            statistics = read_statistics(file)
        except InputError as error:
            refused.append(str(error))
        else:
            assert statistics is None or np.isfinite(np.concatenate(statistics.of(None))).all()
    assert len(refused) > 100
    assert not any("\n" in line for line in refused)


def test_a_file_too_large_is_not_read(tmp_path):
    file = tmp_path / "vecnormalize.pkl"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(InputError, match=r"vecnormalize\.pkl"):
        read_statistics(file)


def test_statistics_of_other_observations_are_refused(trained, tmp_path):
    venv = VecNormalize(make_vec_env("Acrobot-v1", 1))
    venv.save(tmp_path / "acrobot.pkl")
    with pytest.raises(InputError, match=r"acrobot\.pkl normalises \(6,\), not \(4,\)"):
        load_sb3(trained[2] / "model.zip", CARTPOLE, statistics=tmp_path / "acrobot.pkl")
