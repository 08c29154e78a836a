import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import safetensors.torch
import torch
from small_runs import sharpened

from potstill.envs import EnvConfig
from potstill.errors import InputError
from potstill.networks import NetworkConfig, Policy
from potstill.policies import load_policy, rebuild, save_policy
from potstill.ppo import PPOConfig
from potstill.storage import checkpoints
from potstill.storage.checkpoints import ProbeMismatch
from potstill.tasks import TASKS

RNG = np.random.default_rng(0)
PROBES = {
    "cartpole": RNG.normal(size=(16, 4)).astype(np.float32),
    "pong": RNG.integers(0, 256, (2, 4, 84, 84), dtype=np.uint8),
    "minatar-breakout": RNG.random((16, 10, 10, 4)) < 0.2,
}


def make_policy(task="cartpole", width="1/8"):
    probe = PROBES[task]
    policy = sharpened(Policy(NetworkConfig(width=width), probe.shape[1:], 3))
    policy.normalise_by(torch.full_like(policy.mean, 0.25), torch.full_like(policy.mean, 2.0))
    return policy


@pytest.fixture
def saved(tmp_path):
    save_policy(tmp_path / "policy.safetensors", make_policy(), TASKS["cartpole"].env, PROBES["cartpole"], {"seed": 7})
    return tmp_path / "policy.safetensors"


def rewrite(path, tensors=None, **document):
    """Changes tensors and description of a checkpoint, whose file stays a whole one."""
    old, description = checkpoints.load(path)
    checkpoints.save(path, {k: v for k, v in (old | (tensors or {})).items() if v is not None}, description | document)


def one_line(error):
    return "\n" not in str(error.value)


@pytest.mark.parametrize("task", PROBES)
def test_a_loaded_policy_computes_the_same_logits_of_any_kind_of_observation(tmp_path, task):
    policy, probe = make_policy(task), torch.from_numpy(PROBES[task])
    save_policy(tmp_path / "policy.safetensors", policy, TASKS[task].env, PROBES[task], {"seed": 7})
    loaded = load_policy(tmp_path / "policy.safetensors")
    expected, value = policy(probe)
    assert expected.std() > 0.1  # else any policy would do
    logits, same_value = loaded.policy(probe)
    assert torch.equal(logits, expected)
    assert torch.equal(same_value, value)
    assert loaded.env == TASKS[task].env
    assert loaded.policy.config == policy.config
    assert loaded.document["provenance"] == {"seed": 7}
    assert not loaded.policy.training


def test_a_run_directory_and_the_checkpoint_in_it_are_the_same_policy(saved):
    assert load_policy(saved.parent).path == load_policy(saved).path == saved


@pytest.mark.parametrize("name", ["policy.actor.weight", "policy.trunk.linears.0.bias", "policy.mean", "policy.scale"])
def test_a_changed_weight_or_normalisation_is_found_by_the_probe_which_names_the_device(saved, name):
    tensors, _ = checkpoints.load(saved)
    changed = tensors[name].clone()
    changed.view(-1)[0] += 0.5
    rewrite(saved, {name: changed})
    with pytest.raises(ProbeMismatch, match=r"policy\.safetensors computes other logits on device 'cpu'") as error:
        load_policy(saved)
    assert one_line(error)


def test_a_directory_without_a_policy_says_whether_it_is_a_run(tmp_path):
    with pytest.raises(InputError, match=r"holds no policy\.safetensors$"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds no policy\.safetensors: the run is not finished$"):
        load_policy(tmp_path)
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds no policy\.safetensors: compress found no student$"):
        load_policy(tmp_path)


def test_what_is_no_policy_is_refused_in_one_line(tmp_path, saved):
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    checkpoints.save(tmp_path / "resume.safetensors", {"policy.weight": torch.zeros(2)}, {"kind": "resume"})
    (tmp_path / "truncated.safetensors").write_bytes(saved.read_bytes()[:-1])
    (tmp_path / "zip.safetensors").write_bytes(b"PK\x03\x04" + b"0" * 30)
    for name, words in {
        "missing": "cannot read .*missing",
        "foreign.safetensors": "not potstill's",
        "resume.safetensors": "not a policy: name the run directory instead",
        "truncated.safetensors": "is truncated",
        "zip.safetensors": "not a safetensors file",
    }.items():
        with pytest.raises(InputError, match=words) as error:
            load_policy(tmp_path / name)
        assert one_line(error), name


@pytest.mark.parametrize(
    ("tensors", "document", "words"),
    [
        ({"policy.actor.bias": None}, {}, "actor.bias"),
        ({"policy.actor.bias": torch.zeros(5)}, {}, "size mismatch"),
        ({"probe.logits": None}, {}, "probe.logits"),
        ({"probe.observations": torch.zeros(16, 5)}, {}, "does not hold the policy"),
        ({}, {"num_actions": "many"}, "many"),
        ({}, {"observation_shape": [9]}, "it is proved by 1 to 256 observations of"),
        ({}, {"env": None}, "does not hold the policy"),
        ({}, {"env": asdict(TASKS["cartpole"].env) | {"colour": True}}, "EnvConfig has no field 'colour'"),
        ({}, {"network": {"width": "wide"}}, "width 'wide' is not a number"),
    ],
)
def test_a_description_that_does_not_fit_its_tensors_is_refused_in_one_line(saved, tensors, document, words):
    rewrite(saved, tensors, **document)
    with pytest.raises(InputError, match=words) as error:
        load_policy(saved)
    assert one_line(error)


def test_an_unknown_device_is_refused(saved):
    with pytest.raises(InputError, match=r"on device 'cuda:99'.*try --device cpu"):
        load_policy(saved, "cuda:99")


def test_a_config_comes_back_from_json_with_its_nested_configs_and_tuples():
    env = replace(TASKS["pong"].env, actions=(0, 2))
    config = PPOConfig(env=env, network=NetworkConfig(width="1/16", critic="split"), seed=3, gamma=0.5)
    again = rebuild(PPOConfig, json.loads(json.dumps(asdict(config))))
    assert again == config
    assert again.env.actions == (0, 2)


def test_a_field_that_an_older_version_did_not_write_takes_its_default():
    assert rebuild(EnvConfig, {"id": "CartPole-v1"}) == EnvConfig("CartPole-v1")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"seed": 0, "colour": "red"}, "PPOConfig has no field 'colour': was it written by a newer potstill"),
        ({"env": {"id": "pong", "colour": "red"}}, "EnvConfig has no field 'colour'"),
        ({"env": {"atari": True}}, "EnvConfig cannot be read: .*'id'"),
        ({"num_envs": "eight"}, "PPOConfig cannot be read"),
        ({"num_envs": 0}, "num-envs must be at least 1"),
    ],
)
def test_a_config_that_this_version_cannot_read_is_refused_by_name(data, words):
    with pytest.raises(InputError, match=words):
        rebuild(PPOConfig, data)
