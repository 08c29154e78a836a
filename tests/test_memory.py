"""A network with a memory: it learns what one without cannot, and plays, learns and goes on as if it were never cut."""

import threading
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from itertools import islice

import numpy as np
import own_tasks
import pytest
import torch
from sb3_contrib import RecurrentPPO
from small_runs import sharpened
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

import potstill as ps
from potstill import evaluation, watch
from potstill.buffer import Dataset, new_dataset, open_dataset
from potstill.distill import Distillation, DistillConfig, minibatch, record, start
from potstill.envs import EnvConfig, Envs
from potstill.errors import InputError
from potstill.evaluation import Start
from potstill.imports import allow
from potstill.load.callables import Foreign
from potstill.networks import GRU, NetworkConfig, Policy
from potstill.policies import save_policy
from potstill.ppo import PPO, PPOConfig, minibatches, rollout
from potstill.ppo import start as start_training
from potstill.rollout import Preparer
from potstill.storage import checkpoints
from potstill.study.planfile import read_plan

CPU = torch.device("cpu")
CUE = EnvConfig("own_tasks:Cue")
TRAIN = PPOConfig(
    env=CUE, network=NetworkConfig(width="1/4", family="gru"), total_timesteps=16_000, num_envs=32, num_steps=16,
    minibatch_size=128, epochs=4, learning_rate=3e-3, max_learning_rate=1e-2, entropy=0.0, anneal_from=0.5,
    normalise_inputs=0, precision="float32",
)  # fmt: skip
DISTILL = DistillConfig(
    network=NetworkConfig(width="1/4", family="gru"), total_timesteps=8_000, num_envs=32, batch_size=128, sequence=8,
    burn_in=6, warmup_steps=640, learning_rate=1e-2, precision="float32", objective="greedy-cross-entropy",
)  # fmt: skip
CARTPOLE = replace(TRAIN, env=EnvConfig("CartPole-v1"))


@pytest.fixture(scope="module", autouse=True)
def allowed():
    allow(own_tasks.Cue)


@pytest.fixture(scope="module")
def teacher(allowed):
    """Plays `Cue` without a mistake, by a memory of its own."""
    with closing(Envs(CUE, 1)) as envs:
        return Foreign("recalls", own_tasks.Recalls(), envs)


def score(policy):
    """Of `Cue`, greedy: the share of 400 games in which the answer is right."""
    *_, games = evaluation.play(policy, CUE, episodes=400, seed=5)
    return games.score


def without(config):
    return replace(config, network=replace(config.network, family="mlp"))


def algorithm(config, teacher=None):
    envs = Envs(CUE, config.num_envs)
    if isinstance(config, PPOConfig):
        return PPO(config, envs, CPU)
    data = None
    if config.lead == "teacher":
        data = Dataset(envs, config.vector_steps * config.num_envs)
        list(record(config, teacher, envs, data, seed=0))
    return Distillation(config, envs, CPU, teacher=teacher, data=data)


def made(config, teacher=None):
    made = algorithm(config, teacher)
    list(made.steps())
    return made.policy


# The units


def test_the_units_are_torchs_own():
    mine, theirs = GRU(5, 7), nn.GRU(5, 7)
    for name, part in (("read", "ih"), ("recall", "hh")):
        getattr(mine, name).weight.data.copy_(getattr(theirs, f"weight_{part}_l0"))
        getattr(mine, name).bias.data.copy_(getattr(theirs, f"bias_{part}_l0"))
    x, memory = torch.randn(6, 3, 5), torch.randn(3, 7)
    expected, last = theirs(x, memory[None])
    outputs = mine(x.flatten(0, 1), memory)
    assert torch.allclose(outputs, expected.flatten(0, 1), atol=1e-6)
    assert torch.allclose(outputs[-3:], last[0], atol=1e-6)


def test_a_sequence_is_the_games_one_after_another():
    policy = Policy(NetworkConfig(width="1/2", family="gru"), (4,), 2).initialise(torch.Generator().manual_seed(0))
    x, begun = torch.randn(5, 3, 4), torch.rand(5, 3) < 0.3
    begun[0] = True
    logits, values = policy.heads(x.flatten(0, 1), torch.randn(3, 32), begun.flatten())
    for t in range(5):
        policy.restart(begun[t].numpy())
        live = policy.heads(x[t])
        assert torch.allclose(live[0], logits.view(5, 3, 2)[t], atol=1e-6)
        assert torch.allclose(live[1], values.view(5, 3)[t], atol=1e-6)


def test_its_size_worked_out_by_hand():
    size = Policy(NetworkConfig(width="1/8", family="gru"), (4,), 2).size()  # two layers of 8, 8 units that remember
    assert size.macs == 4 * 8 + 8 * 8 + 2 * (8 * 24) + 8 * 2
    assert size.parameters == size.macs + 8 + 8 + 2 * 24 + 2


def test_what_was_not_told_of_its_games_does_not_play_them():
    policy = Policy(NetworkConfig(width="1/8", family="gru"), (4,), 2)
    policy.restart(np.ones(3, bool))
    with pytest.raises(RuntimeError, match="1 observations, of games that `restart` was not told of"):
        policy.logits(torch.zeros(1, 4))


# What it learns


@pytest.mark.parametrize("config", [TRAIN, without(TRAIN)], ids=["memory", "none"])
def test_from_reward_only_a_memory_learns_to_recall(config):
    found = score(made(config))
    assert found > 0.95 if config is TRAIN else 0.35 < found < 0.65


@pytest.mark.parametrize("lead", ["student", "mixed", "teacher"])
@pytest.mark.parametrize("family", ["gru", "mlp"])
def test_from_a_teacher_only_a_memory_learns_to_recall(family, lead, teacher):
    config = replace(DISTILL, lead=lead, network=replace(DISTILL.network, family=family))
    found = score(made(config, teacher))
    assert found > 0.95 if family == "gru" else 0.35 < found < 0.65


def test_a_student_without_a_memory_learns_from_a_teacher_with_one():
    """Of CartPole, in which nothing need be remembered."""
    config = replace(DISTILL, network=NetworkConfig(width="1/2"))
    expert = sharpened(Policy(TRAIN.network, (4,), 2))
    with closing(Envs(CARTPOLE.env, 32)) as envs:
        student = Distillation(config, envs, CPU, teacher=expert)
        *_, last = student.steps()
    assert last.metrics["agreement"] > 0.8


# A rollout


def played(config, count):
    envs = Envs(config.env, config.num_envs)
    state = start_training(config, envs, CPU)
    preparer, observations, storage = Preparer(state.policy), envs.reset(0), None
    for _ in range(count):
        batch, storage, observations, _ = rollout(config, state, envs, preparer, observations, storage)
        yield state, batch._replace(inputs=batch.inputs.clone())


@pytest.mark.parametrize("config", [TRAIN, CARTPOLE], ids=["cue", "cartpole"])
def test_the_value_beyond_a_rollout_is_that_of_the_next_ones_first_step(config):
    config = replace(config, num_steps=13)
    (_, first), (_, second) = played(config, 2)
    assert torch.allclose(first.values[-1], second.values[0], atol=1e-6)
    assert first.dones.any()


@pytest.mark.parametrize("config", [TRAIN, CARTPOLE], ids=["cue", "cartpole"])
def test_a_minibatch_is_whole_sequences_and_recalls_what_was_played(config):
    config = replace(config, num_steps=13)
    for state, batch in played(config, 2):
        parts = minibatches(config, True, torch.Generator().manual_seed(0))
        assert len(torch.cat(list(parts)).unique()) == 3 * 9 * 13  # nine environments fit into 128 samples
        for chosen in parts:
            assert (chosen.view(13, 9) == 32 * torch.arange(13)[:, None] + chosen[:9]).all()
            logits, values = state.policy.heads(batch.inputs.flatten(0, 1)[chosen], *batch.before(chosen))
            assert torch.allclose(values * state.policy.return_scale, batch.values.flatten()[chosen], atol=1e-5)
            log_probs, _ = state.policy.distribution.log_prob_and_entropy(logits, batch.actions.flatten()[chosen])
            assert torch.allclose(log_probs, batch.log_probs.flatten()[chosen], atol=1e-5)


# A buffer of sequences


@pytest.mark.parametrize(
    "settings",
    [{}, {"burn_in": 0}, {"buffer_size": 32 * 32}, {"lead": "teacher"}, {"sequence": 3, "batch_size": 2}],
    ids=["memory stored", "no burn-in", "a ring", "a teacher's data", "short"],
)
def test_a_student_that_is_its_teacher_finds_nothing_to_learn(settings):
    """It remembers of a sequence what was remembered when it was played; games are shorter than the burn-in."""
    teacher = sharpened(Policy(DISTILL.network, (3,), 2, dtype="float32"), times=100)
    config = replace(DISTILL, objective="forward-kl", learning_rate=1e-15, **settings)
    made = algorithm(config, teacher)
    made.policy.load_state_dict(teacher.state_dict())
    losses = [progress.metrics["loss"] for progress in made.steps() if progress.metrics]
    assert len(losses) >= 3
    assert max(losses) < 1e-8
    made.policy.trunk.gru.recall.bias.data += 0.5
    if made.data is not None:
        batch, before = minibatch(config, made.state, made.data, torch.float32)
        assert not torch.allclose(made.policy.heads(batch.inputs, *before)[0], batch.logits, atol=0.1)


def test_sequences_are_of_one_environment_each_in_the_order_they_were_played():
    with closing(Envs(CUE, 3)) as envs:
        data, shown = Dataset(envs, 3 * 20), envs.reset(0)
        for step in range(50):
            data.add(shown, envs.ages, torch.zeros(3, 2), torch.arange(3) + 3.0 * step)
            shown = envs.step(np.zeros(3, int)).observations
        first, positions = data.draw_sequences(500, 4, 3, torch.Generator().manual_seed(0))
        values = data.batch(positions.flatten(), Policy(DISTILL.network, (3,), 2), torch.float32).values.view(7, 500)
        assert (values == 3 * first + values[0] % 3 + 3 * torch.arange(7)[:, None]).all()
        assert first.unique().tolist() == [32, 36, 40]
        assert data.begun(positions.flatten()).view(7, 500).tolist() == (values // 3 % 5 == 0).tolist()


def test_stored_data_that_do_not_tell_where_games_begin_are_refused(tmp_path):
    """As those of an older potstill, of observations that are no stacks."""
    with closing(Envs(CUE, 4)) as envs:
        shown = envs.reset(0)
        with new_dataset(tmp_path / "data", envs, 64, {}) as made:
            for _ in range(16):
                made.add(shown, np.zeros(4), torch.zeros(4, 2), torch.zeros(4))
        data = open_dataset(tmp_path / "data", envs)
        with pytest.raises(InputError, match="an older potstill recorded them, which did not tell: delete"):
            data.begun(torch.arange(4))


# The same again


@pytest.mark.parametrize(
    "config",
    [replace(TRAIN, total_timesteps=4_000, num_steps=13), DISTILL, replace(DISTILL, lead="teacher")],
    ids=["ppo", "student", "teacher"],
)
def test_what_was_cut_ends_exactly_as_what_was_not(config, teacher, tmp_path):
    whole, first, second = (algorithm(config, teacher) for _ in range(3))
    list(whole.steps())
    list(islice(first.steps(), 3))
    saved = first.state_dict()
    tensors = {name: value for name, value in saved.items() if isinstance(value, torch.Tensor)}
    document = {name: value for name, value in saved.items() if name not in tensors}
    checkpoints.save(tmp_path / "resume.safetensors", tensors, document)
    tensors, document = checkpoints.load(tmp_path / "resume.safetensors")
    second.load_state_dict(tensors | document)
    list(second.steps())
    theirs = second.policy.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in whole.policy.state_dict().items())


def test_what_was_not_remembered_of_these_games_is_refused():
    config = replace(TRAIN, total_timesteps=2_048)
    made = algorithm(config)
    next(made.steps())
    saved = made.state_dict() | {"policy.memory": torch.zeros(31, made.policy.actor.in_features)}
    with pytest.raises(InputError, match=r"cannot go on with this one: policy remembers \(31, 16\)"):
        algorithm(config).load_state_dict(saved)


def test_a_branch_goes_on_with_what_its_trunk_remembered():
    config = replace(TRAIN, total_timesteps=4_000, num_steps=13, branch=("1/2",))
    trunk, alone = algorithm(config), algorithm(config.of_share("1/2"))
    (leaving,) = [deepcopy(progress.branches["1/2"]) for progress in trunk.steps() if progress.branches]
    branch = algorithm(config.of_share("1/2"))
    branch.load_state_dict(leaving)
    for made in (alone, branch):
        list(made.steps())
    theirs = branch.policy.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in alone.policy.state_dict().items())


# Several users of one policy


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A policy of CartPole that goes by what it remembers."""
    path = tmp_path_factory.mktemp("loaded") / "policy.safetensors"
    policy = sharpened(Policy(NetworkConfig(width="1/8", family="gru"), (4,), 2, dtype="float32"))
    with torch.no_grad():
        policy.trunk.gru.recall.weight *= 3
    save_policy(path, policy, CARTPOLE.env, np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32), {})
    return ps.load(path)


class Alternates:
    """Pushes to the left and to the right in turn."""

    def reset(self, begun):
        self.age = np.zeros(len(begun), int) if begun.all() else np.where(begun, 0, self.age)

    def __call__(self, observations):
        self.age = self.age + 1
        return self.age % 2


def returns(policy, **options):
    *_, games = evaluation.play(policy, CARTPOLE.env, episodes=12, seed=3, actions="sampled", **options)
    return [episode.score for episode in games.episodes]


def test_a_policy_agrees_with_itself_where_it_is_its_own_teacher(loaded):
    for who, task in ((loaded, None), (Alternates(), CARTPOLE.env)):
        told = ps.evaluate(who, env=task, teacher=who, episodes=4, quiet=True, device="cpu")
        assert (told["agreement"], told["agreement_teacher_states"]) == (1.0, 1.0)
        assert max(told["kl"], told["kl_teacher_states"]) < 1e-6


def test_games_of_one_policy_that_are_played_in_turns_are_those_of_two(loaded):
    one, other = (evaluation.play(loaded.policy, CARTPOLE.env, episodes=12, seed=seed) for seed in (3, 4))
    for first, second in zip(one, other, strict=False):
        mine, theirs = first, second
    for seed, found in ((3, mine), (4, theirs)):
        *_, alone = evaluation.play(ps.load(loaded.path).policy, CARTPOLE.env, episodes=12, seed=seed)
        played = len(found.episodes)
        assert played >= 8
        assert found.episodes == alone.episodes[:played]


def test_who_plays_the_first_steps_may_be_the_policy_itself(loaded):
    same, apart = (returns(loaded.policy, start=Start(5, who)) for who in (loaded.policy, ps.load(loaded.path).policy))
    assert same == apart


def test_a_policy_filmed_beside_itself_plays_the_same_game(loaded, tmp_path, monkeypatch):
    pictures = []
    monkeypatch.setattr(watch, "_encode", lambda path, *_: (pictures.extend(_[-1]), path.write_bytes(b"")))
    watch.film([("one", loaded)] * 2, tmp_path / "game.mp4", seed=0, max_steps=30, scale=1, quiet=True)
    half = (pictures[0].shape[1] - 8) // 2
    assert len(pictures) > 20
    assert all((picture[:, :half] == picture[:, half + 8 :]).all() for picture in pictures)


def test_a_student_that_plays_between_two_steps_of_its_training_learns_the_same(teacher):
    first, second = (algorithm(replace(DISTILL, burn_in=0, total_timesteps=4_000), teacher) for _ in range(2))
    list(first.steps())
    for _ in second.steps():
        score(second.policy)
    theirs = second.policy.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in first.policy.state_dict().items())


def test_code_whose_memory_cannot_be_copied_is_not_used_twice():
    def alternates(observations):
        return np.arange(len(observations)) % 2

    alternates.reset = lambda begun: None
    locked = Alternates()
    locked.lock = threading.Lock()
    for who, told in ((alternates, "has one memory: make it a class"), (locked, "cannot be copied: TypeError")):
        assert ps.evaluate(who, env=CARTPOLE.env, episodes=2, quiet=True, device="cpu")["mean"] > 5
        with pytest.raises(InputError, match=rf"is used twice.*{told}"):
            ps.evaluate(who, env=CARTPOLE.env, teacher=who, episodes=2, quiet=True, device="cpu")


# From end to end


def test_a_plan_names_it_as_any_network(tmp_path):
    text = 'env = "cartpole"\nwidths = ["1/4"]\nseeds = [0]\nteachers = ["cartpole.zip"]\n'
    text += '[arms.remembers]\nmethod = "distill"\nnetwork = "gru"\nburn-in = 4\n'
    (tmp_path / "plan.toml").write_text(text)
    (tmp_path / "cartpole.zip").touch()
    (spec,) = read_plan(tmp_path / "plan.toml").specs()
    assert (spec.config.network.family, spec.config.burn_in) == ("gru", 4)
    same, other = (spec._replace(config=replace(spec.config, burn_in=steps)).identity(None) for steps in (4, 16))
    assert spec.identity(None) == same != other


def test_a_run_is_saved_scored_and_distilled(tmp_path):
    common = {"num_envs": 32, "width": "1/4", "network": "gru", "quiet": True, "device": "cpu", "episodes": 40}
    run = ps.train(
        own_tasks.Cue, out=tmp_path / "run", total_timesteps=1_024, num_steps=16, minibatch_size=128, **common
    )
    assert run.policy.remembers
    assert run.result["score"] == ps.evaluate(run, episodes=40, quiet=True, device="cpu")["mean"]
    student = ps.distill(run, out=tmp_path / "student", total_timesteps=2_048, warmup_steps=512, **common)
    assert student.result["agreement"] > 0.5


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory):
    """A zip of SB3's RecurrentPPO that has learned `Cue`."""
    options = {"lstm_hidden_size": 16, "net_arch": [16], "enable_critic_lstm": False, "shared_lstm": True}
    model = RecurrentPPO(
        "MlpLstmPolicy", make_vec_env(own_tasks.Cue, n_envs=16, seed=0), n_steps=25, batch_size=100, n_epochs=4,
        learning_rate=5e-3, seed=0, device="cpu", policy_kwargs=options,
    )  # fmt: skip
    model.learn(6_000).save(path := tmp_path_factory.mktemp("recurrent") / "model.zip")
    return path


@pytest.mark.parametrize("network", ["gru", "mlp"])
def test_from_a_recurrent_zip_only_a_memory_learns_to_recall(network, recurrent, tmp_path):
    settings = {"num_envs": 32, "total_timesteps": 8_000, "width": "1/4", "episodes": 200, "precision": "float32"}
    run = ps.distill(
        recurrent, env=own_tasks.Cue, out=tmp_path / "run", network=network, quiet=True, device="cpu", **settings
    )
    assert run.result["teacher_score"] > 0.95
    assert run.result["score"] > 0.95 if network == "gru" else 0.35 < run.result["score"] < 0.65


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda t: start(replace(DISTILL, mode="stepwise"), t, CPU), "learns from sequences"),
        (lambda t: start(replace(DISTILL, bits=8), t, CPU), "learns from sequences"),
        (lambda t: start(replace(DISTILL, buffer_size=800), t, CPU), "buffer-size must be at least 896"),
        (lambda t: start_training(TRAIN, Envs(CUE, 1), CPU, teacher=t), "teaches by distill alone"),
        (lambda t: start_training(replace(TRAIN, overlap=True), Envs(CUE, 1), CPU), "leave out --overlap"),
        (lambda t: Policy(NetworkConfig(family="gru", critic="split"), (3,), 2), "one memory for actor and critic"),
    ],
    ids=["stepwise", "integers", "buffer", "beside reward", "overlap", "critic"],
)
def test_what_a_memory_cannot_be_is_refused(make, words, teacher):
    with pytest.raises(InputError, match=words):
        make(teacher)
