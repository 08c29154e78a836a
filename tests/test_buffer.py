import json
import os
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from potstill.buffer import Dataset, new_dataset, open_dataset
from potstill.envs import EnvConfig, Envs
from potstill.errors import InputError
from potstill.networks import NetworkConfig, Policy
from potstill.tasks import TASKS

PONG = replace(TASKS["pong"].env, max_frames=40)  # games of 10 agent steps
CARTPOLE, MINATAR = TASKS["cartpole"].env, TASKS["minatar-breakout"].env
TASKS = pytest.mark.parametrize("env", [PONG, CARTPOLE, MINATAR], ids=["pong", "cartpole", "minatar"])
N = 3


@cache  # a reset leaves nothing of what was played before, and an emulator takes a tenth of a second to begin
def games(env):
    return Envs(env, N)


def fill(data, envs, steps, seed=0):
    """Adds `steps` of random play, state number i with i as first logit and value; returns all observations."""
    rng, kept = np.random.default_rng(seed), []
    observations = envs.reset(seed)
    for t in range(steps):
        number = torch.arange(t * N, (t + 1) * N).float()
        logits = torch.zeros(N, envs.num_actions)
        logits[:, 0] = number
        data.add(observations, envs.ages, logits, number)
        kept.append(observations)
        observations = envs.step(rng.integers(0, envs.num_actions, N)).observations
    return torch.from_numpy(np.concatenate(kept))


def reader(envs, mean=128.0, deviation=64.0):
    """A policy whose normalisation is exact in binary arithmetic, so that results may be compared bit for bit."""
    policy = Policy(NetworkConfig(width="1/32"), envs.observation_shape, envs.num_actions)
    shape = policy.normalised_shape
    policy.normalise_by(torch.full(shape, mean), torch.full(shape, deviation))
    return policy


def drawn(data, envs, count=2_000, dtype=torch.float32):
    """A batch, and the numbers of the states it holds."""
    batch = data.batch(data.draw(count, torch.Generator().manual_seed(0)), reader(envs), dtype)
    assert torch.equal(batch.logits[:, 0], batch.values)
    return batch, batch.values.long()


# What is drawn is what was added


@TASKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_come_back_as_they_were_seen_across_the_ends_of_games(env, dtype):
    envs = games(env)
    data = Dataset(envs, N * 40)
    seen = fill(data, envs, 40)
    batch, numbers = drawn(data, envs, dtype=dtype)
    assert len(data) == data.added == N * 40
    assert set(numbers.tolist()) == set(range(N * 40))
    assert batch.inputs.dtype == dtype
    assert torch.equal(batch.inputs, reader(envs).prepare(seen[numbers], dtype))


@pytest.mark.parametrize(
    ("env", "lost"), [(PONG, 3), (replace(PONG, frame_stack=2), 1), (CARTPOLE, 0)], ids=["pong", "pairs", "cartpole"]
)
def test_once_the_ring_is_full_the_newest_states_come_back_whole(env, lost):
    envs = games(env)
    data = Dataset(envs, N * 20)
    seen = fill(data, envs, 47)
    batch, numbers = drawn(data, envs)
    assert (len(data), data.added) == (N * 20, N * 47)
    assert set(numbers.tolist()) == set(range(N * (27 + lost), N * 47))  # the oldest have lost frames of their stacks
    assert torch.equal(batch.inputs, reader(envs).prepare(seen[numbers]))


def test_a_ring_that_is_just_full_has_lost_nothing():
    envs = games(PONG)
    data = Dataset(envs, N * 20)
    fill(data, envs, 20)
    assert set(drawn(data, envs)[1].tolist()) == set(range(N * 20))


def test_stacks_lie_in_memory_as_the_network_reads_them():
    envs = games(PONG)
    data = Dataset(envs, N * 8)
    fill(data, envs, 8)
    batch, _ = drawn(data, envs, count=20)  # not a multiple of the chunks they are prepared in
    assert batch.inputs.shape == (20, 4, 84, 84)
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)


def test_inputs_are_normalised_and_clipped_as_the_policy_does():
    envs = games(PONG)
    data = Dataset(envs, N * 15)
    seen = fill(data, envs, 15)
    policy, generator = reader(envs), torch.Generator().manual_seed(0)
    mean, deviation = (1 + scale * torch.rand(84, 84, generator=generator) for scale in (200, 60))
    policy.normalise_by(mean, deviation)
    batch = data.batch(torch.arange(len(data)), policy, torch.float32)
    assert (batch.inputs.abs() == 5).any()
    assert torch.allclose(batch.inputs, policy.prepare(seen), atol=1e-4)


def test_a_batch_is_a_copy_that_later_states_leave_alone():
    envs = Envs(CARTPOLE, N)
    data = Dataset(envs, N * 4)
    fill(data, envs, 4)
    batch = data.batch(torch.arange(len(data)), reader(envs), torch.float32)
    copies = [tensor.clone() for tensor in batch]
    fill(data, envs, 4, seed=1)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(batch, copies, strict=True))


# Drawing


def test_every_state_is_as_likely_as_any_other():
    envs = Envs(CARTPOLE, N)
    data = Dataset(envs, N * 20)
    fill(data, envs, 31)
    counts = data.draw(60_000, torch.Generator().manual_seed(0)).bincount(minlength=60)
    assert counts.min() > 1_000 - 5 * 1_000**0.5
    assert counts.max() < 1_000 + 5 * 1_000**0.5


def test_the_generator_decides_the_draw():
    envs = Envs(CARTPOLE, N)
    data = Dataset(envs, N * 20)
    fill(data, envs, 20)
    first, again, other = (data.draw(100, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_before_the_ring_is_full_only_what_is_there_is_drawn():
    envs = Envs(CARTPOLE, N)
    data = Dataset(envs, 1_000)
    fill(data, envs, 2)
    assert set(drawn(data, envs)[1].tolist()) == set(range(2 * N))


# Capacity


def test_the_capacity_is_rounded_down_to_whole_vector_steps():
    assert Dataset(Envs(CARTPOLE, N), 3 * N + 2).capacity == 3 * N


@pytest.mark.parametrize(("env", "least"), [(PONG, 5 * N), (CARTPOLE, 2 * N)], ids=["pong", "cartpole"])
def test_a_buffer_without_room_for_one_whole_stack_and_more_is_refused(env, least):
    assert Dataset(games(env), least).capacity == least
    with pytest.raises(InputError, match=f"a buffer of {least - 1} states is too small for 3 environments"):
        Dataset(games(env), least - 1)


# On disk


def write(folder, envs):
    """A data set of 20 steps."""
    with new_dataset(folder, envs, 20 * N, {}) as data:
        fill(data, envs, 20)


@TASKS
def test_a_folder_gives_the_same_batches_as_memory(env, tmp_path):
    envs = games(env)
    write(tmp_path / "data", envs)
    memory = Dataset(envs, 20 * N)
    fill(memory, envs, 20)
    stored = open_dataset(tmp_path / "data", envs)
    assert len(stored) == len(memory)
    for mine, theirs in zip(drawn(stored, envs)[0], drawn(memory, envs)[0], strict=True):
        assert torch.equal(mine, theirs)


def test_the_folder_appears_only_when_it_is_whole(tmp_path):
    envs = Envs(CARTPOLE, N)
    with new_dataset(tmp_path / "sub" / "data", envs, 20 * N, {"teacher": "mine"}) as data:
        fill(data, envs, 20)
        assert not (tmp_path / "sub" / "data").exists()
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["data"]
    document = json.loads((tmp_path / "sub" / "data" / "dataset.json").read_text())
    assert list(document.pop("digests")) == sorted(path.stem for path in (tmp_path / "sub" / "data").glob("*.npy"))
    assert document == {"teacher": "mine", "num_envs": N, "states": 20 * N}


def test_one_that_was_finished_meanwhile_stays(tmp_path):
    envs = Envs(CARTPOLE, N)
    with new_dataset(tmp_path / "data", envs, 20 * N, {"by": "the second"}):
        write(tmp_path / "data", envs)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert "by" not in json.loads((tmp_path / "data" / "dataset.json").read_text())


def test_a_full_disk_is_said_at_once_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(InputError, match=r"cannot record 60 states in .*data: no space left on device"):
        write(tmp_path / "data", Envs(CARTPOLE, N))
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_that_is_too_small_leaves_nothing_either(tmp_path):
    with pytest.raises(InputError, match="too small"), new_dataset(tmp_path / "data", games(PONG), N, {}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_stored_data_set_cannot_be_written_to(tmp_path):
    envs = Envs(CARTPOLE, N)
    write(tmp_path / "data", envs)
    with pytest.raises(ValueError, match="read-only"):
        fill(open_dataset(tmp_path / "data", envs), envs, 1)


def spoil(folder, how):
    match how:
        case "missing":
            (folder / "dataset.json").unlink()
        case "not json":
            (folder / "dataset.json").write_text("{")
        case "foreign json":
            (folder / "dataset.json").write_text('{"a": 1}')
        case "truncated":
            os.truncate(folder / "frames.npy", 200)
        case "incomplete":
            (folder / "logits.npy").unlink()


@pytest.mark.parametrize("how", ["missing", "not json", "foreign json", "truncated", "incomplete"])
def test_a_folder_that_is_no_whole_data_set_is_refused(how, tmp_path):
    envs = Envs(CARTPOLE, N)
    write(tmp_path / "data", envs)
    spoil(tmp_path / "data", how)
    with pytest.raises(InputError, match="data is not a data set, or not a whole one"):
        open_dataset(tmp_path / "data", envs)


def test_a_data_set_of_other_environments_is_refused(tmp_path):
    write(tmp_path / "data", Envs(CARTPOLE, N))
    with pytest.raises(InputError, match=r"is not a data set, .*: it was made with 3 environments, not 4"):
        open_dataset(tmp_path / "data", Envs(CARTPOLE, 4))
    with pytest.raises(InputError, match=r"is of another task: its frames are \(60, 4\), not \(60, 6\)"):
        open_dataset(tmp_path / "data", Envs(EnvConfig("Acrobot-v1"), N))
