import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from potstill.buffer import Dataset
from potstill.distill import DistillConfig, DistillState, beta, distill, distill_from, record, start
from potstill.distributions import sample
from potstill.envs import Envs
from potstill.errors import DivergedError, InputError
from potstill.evaluation import compare
from potstill.networks import NetworkConfig, Policy
from potstill.objectives import OBJECTIVES, forward_kl
from potstill.rollout import Preparer, input_statistics
from potstill.tasks import TASKS

CPU = torch.device("cpu")
CARTPOLE = TASKS["cartpole"].env
PONG = replace(TASKS["pong"].env, max_frames=40)  # games of 10 agent steps
NUMBER = {CARTPOLE: 8, PONG: 2}  # of environments: each emulator takes a tenth of a second to begin
CONFIG = DistillConfig(
    network=NetworkConfig(width="1/2"),
    total_timesteps=4_000,
    num_envs=8,
    batch_size=64,
    warmup_steps=160,
    learning_rate=1e-2,
    precision="float32",
)
TINY = replace(CONFIG, total_timesteps=240, buffer_size=80, batch_size=16, warmup_steps=0)


def make_teacher(env=CARTPOLE, seed=0, sharpness=10.0):
    """An untrained network whose preferences are strong, and differ from state to state."""
    envs = Envs(env, NUMBER[env])
    generator = torch.Generator().manual_seed(seed)
    network = NetworkConfig(width="1" if env is CARTPOLE else "1/16")
    teacher = Policy(network, **envs.spaces).initialise(generator)
    teacher.normalise_by(*input_statistics(envs, 160, seed))
    with torch.no_grad():
        torch.nn.init.orthogonal_(teacher.actor.weight, sharpness, generator=generator)
    teacher.return_scale.fill_(2.0)
    return teacher


def copy_of(policy):
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}


def same_weights(policy, other):
    return all(torch.equal(mine, other.state_dict()[name]) for name, mine in policy.state_dict().items())


def run(config, teacher, env=CARTPOLE, every=64):
    """A whole distillation, whoever leads: the final state, what it yielded, its environments."""
    envs = Envs(env, config.num_envs)
    state = start(config, teacher, CPU)
    if config.lead != "teacher":
        return state, list(distill(config, state, teacher, envs, every=every)), envs
    data = Dataset(envs, config.vector_steps * config.num_envs)
    list(record(config, teacher, envs, data, seed=0))
    return state, list(distill_from(config, state, data, every)), envs


# What it comes to


@pytest.mark.parametrize(
    "settings",
    [
        {"lead": "student"},
        {"lead": "mixed"},
        {"lead": "teacher"},
        {"lead": "teacher", "noise": 0.3},
        {"mode": "stepwise", "total_timesteps": 8_000},
        {"mode": "stepwise", "total_timesteps": 8_000, "act": "after", "lead": "mixed"},
        *({"objective": name} for name in OBJECTIVES if name != "forward-kl"),
    ],
    ids=lambda settings: " ".join(str(value) for value in settings.values()),
)
def test_a_student_comes_to_decide_as_its_teacher_does(settings):
    teacher = make_teacher()
    config = replace(CONFIG, **settings)
    state, progress, _ = run(config, teacher)
    before = compare(start(config, teacher, CPU).student, teacher, CARTPOLE, steps=800)
    after = compare(state.student, teacher, CARTPOLE, steps=800)
    assert before["agreement"] < 0.8
    assert after["agreement"] > 0.93
    assert after["agreement_teacher_states"] > 0.93
    assert progress[-1].metrics["agreement"] > 0.93
    assert progress[-1].metrics["loss"] < 0.3 * progress[0].metrics["loss"]


def test_a_student_may_learn_its_teachers_value_too():
    teacher = make_teacher()
    state, _, _ = run(replace(CONFIG, value_coefficient=1.0), teacher)
    other, _, _ = run(CONFIG, teacher)
    states = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) / teacher.scale
    values, learned, unlearned = (policy(states)[1] for policy in (teacher, state.student, other.student))
    assert (learned - values).square().mean() < 0.25 * values.var()
    assert (unlearned - values).square().mean() > 0.75 * values.var()


@pytest.mark.parametrize("lead", ["student", "mixed", "teacher"])
def test_the_teacher_is_left_as_it_was(lead):
    teacher = make_teacher()
    before = copy_of(teacher)
    run(replace(TINY, lead=lead, value_coefficient=0.5), teacher)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_student_begins_with_its_teachers_normalisation_and_weights_of_its_own():
    teacher = make_teacher(PONG)
    student = start(TINY, teacher, CPU).student
    assert torch.equal(student.mean, teacher.mean)
    assert torch.equal(student.scale, teacher.scale)
    assert student.return_scale == 2.0
    expected = Policy(TINY.network, teacher.observation_shape, 3).initialise(torch.Generator().manual_seed(TINY.seed))
    assert torch.equal(student.actor.weight, expected.actor.weight)


# How many steps


@pytest.mark.parametrize("lead", ["student", "mixed", "teacher"])
@pytest.mark.parametrize("updates_per_step", [0.3, 1.0, 2.5])
def test_every_lead_takes_the_same_number_of_gradient_steps(lead, updates_per_step):
    config = replace(TINY, lead=lead, updates_per_step=updates_per_step)
    state, progress, envs = run(config, make_teacher())
    expected = int((30 - 2) * updates_per_step)  # two vector steps of 8 make the first batch of 16
    assert state.gradient_steps == config.gradient_steps == expected
    assert len(envs.state()[1]) == config.vector_steps == 30
    assert progress[-1].step == config.total_timesteps


def test_none_is_taken_before_the_warm_up():
    teacher = make_teacher()
    state = start(replace(TINY, warmup_steps=80), teacher, CPU)
    steps = distill(replace(TINY, warmup_steps=80), state, teacher, Envs(CARTPOLE, 8), every=1)
    taken = [state.gradient_steps for _ in steps]
    assert taken == [0] * 10 + list(range(1, 21))


@pytest.mark.parametrize("act", ["before", "after"])
def test_stepwise_takes_one_per_vector_step(act):
    teacher = make_teacher()
    config = replace(TINY, mode="stepwise", act=act)
    state = start(config, teacher, CPU)
    taken = [state.gradient_steps for _ in distill(config, state, teacher, Envs(CARTPOLE, 8), every=1)]
    assert taken == list(range(1, 31))
    assert config.gradient_steps == 30


@pytest.mark.parametrize("lead", ["student", "teacher"])
def test_the_learning_rate_follows_half_a_cosine(lead):
    config = replace(TINY, lead=lead)
    _, progress, _ = run(config, make_teacher(), every=1)
    rates = [p.metrics["learning_rate"] for p in progress if p.metrics]
    assert rates == pytest.approx([0.005 * (1 + math.cos(math.pi * k / 28)) for k in range(28)])


def test_or_stays_where_it_starts():
    _, progress, _ = run(replace(TINY, constant_learning_rate=True), make_teacher(), every=1)
    assert {p.metrics["learning_rate"] for p in progress if p.metrics} == {0.01}


# Stepwise


def one_step(act):
    """One vector step of 64 environments: the fresh student, the state after, and what both saw and did."""
    teacher = make_teacher()
    config = replace(TINY, total_timesteps=64, num_envs=64, mode="stepwise", act=act, learning_rate=0.1)
    state, _, envs = run(config, teacher)
    fresh = start(config, teacher, CPU)
    inputs = Preparer(teacher).first(Envs(CARTPOLE, 64).reset(config.seed))
    return config, teacher, fresh, state, inputs, envs.state()[1][0]


@pytest.mark.parametrize("act", ["before", "after"])
def test_a_stepwise_update_is_one_adam_step_on_that_steps_own_states(act):
    config, teacher, fresh, state, inputs, _ = one_step(act)
    optimizer = torch.optim.Adam(fresh.student.parameters(), lr=config.learning_rate)
    forward_kl(fresh.student.logits(inputs), teacher.logits(inputs)).mean().backward()
    torch.nn.utils.clip_grad_norm_(fresh.student.parameters(), config.max_grad_norm)
    optimizer.step()
    for mine, theirs in zip(state.student.parameters(), fresh.student.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_a_student_that_acts_before_the_update_acts_on_its_old_weights_and_after_it_on_its_new_ones():
    *_, fresh, updated, inputs, actions = one_step("before")
    old, new = (sample(s.student.logits(inputs), fresh.generator.clone_state()) for s in (fresh, updated))
    assert not torch.equal(old, new)
    assert actions.tolist() == old.tolist()
    *_, actions = one_step("after")
    assert actions.tolist() == new.tolist()


def test_acting_before_or_after_the_update_makes_another_student():
    teacher = make_teacher()
    before, after = (run(replace(TINY, mode="stepwise", act=act), teacher)[0] for act in ("before", "after"))
    assert not same_weights(before.student, after.student)


# Whose states


def test_beta_falls_linearly_from_1_to_0():
    config = replace(TINY, lead="mixed", beta_until=0.5)  # 30 vector steps
    assert [beta(config, step) for step in (0, 3, 9, 15, 29)] == pytest.approx([1.0, 0.8, 0.4, 0.0, 0.0])
    assert beta(replace(config, beta_until=1.0), 15) == pytest.approx(0.5)
    assert beta(replace(config, beta_until=0.0), 0) == 0.0


def obstinate_teacher():
    """Always takes action 1."""
    teacher = make_teacher()
    with torch.no_grad():
        teacher.actor.weight.zero_()
        teacher.actor.bias.copy_(torch.tensor([-50.0, 50.0]))
    return teacher


def test_a_mixed_run_begins_with_the_teachers_actions_and_ends_with_the_students():
    config = replace(CONFIG, total_timesteps=64 * 40, num_envs=64, lead="mixed", learning_rate=1e-9)
    _, _, envs = run(config, obstinate_teacher())
    share = envs.state()[1].mean(axis=1)
    assert share[0] == 1.0
    assert share[8:12].mean() == pytest.approx(0.75, abs=0.1)  # half the teacher's, half an untrained student's
    assert share[20:].mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("noise", "share"), [(0.0, 1.0), (0.5, 0.75), (1.0, 0.5)])
def test_recorded_play_is_the_teachers_with_noise_and_its_labels_without(noise, share):
    config = replace(TINY, total_timesteps=64 * 40, num_envs=64, lead="teacher", noise=noise)
    teacher, envs = obstinate_teacher(), Envs(CARTPOLE, 64)
    data = Dataset(envs, 64 * 40)
    progress = list(record(config, teacher, envs, data, seed=3))
    assert envs.state()[1].mean() == pytest.approx(share, abs=0.03)
    assert len(data) == progress[-1].step == 64 * 40
    assert progress[-1].games > 0
    assert (data.batch(torch.arange(len(data)), teacher, torch.float32).logits.argmax(-1) == 1).all()


@pytest.mark.parametrize("env", [CARTPOLE, PONG], ids=["cartpole", "pong"])
def test_recorded_labels_are_what_the_teacher_says_of_the_recorded_states(env):
    config = replace(TINY, total_timesteps=200, lead="teacher", num_envs=NUMBER[env])
    teacher, envs = make_teacher(env), Envs(env, config.num_envs)
    data = Dataset(envs, 200)
    list(record(config, teacher, envs, data, seed=0))
    batch = data.batch(torch.arange(200), teacher, torch.float32)
    logits, values = teacher.heads(batch.inputs)
    assert torch.allclose(batch.logits, logits, rtol=1e-3, atol=1e-3)
    assert torch.allclose(batch.values, 2.0 * values, rtol=1e-3, atol=1e-3)


def test_the_seed_of_a_recording_decides_it():
    def recorded(seed):
        envs = Envs(CARTPOLE, 8)
        list(record(replace(TINY, lead="teacher"), make_teacher(), envs, Dataset(envs, 240), seed))
        return envs.state()[1]

    assert np.array_equal(recorded(0), recorded(0))
    assert not np.array_equal(recorded(0), recorded(1))


# The same again


EVERY_WAY = pytest.mark.parametrize(
    ("settings", "env"),
    [
        ({"lead": "student"}, CARTPOLE),
        ({"lead": "mixed"}, CARTPOLE),
        ({"lead": "teacher"}, CARTPOLE),
        ({"mode": "stepwise", "act": "after"}, CARTPOLE),
        (
            {
                "lead": "mixed",
                "network": NetworkConfig(width="1/32"),
                "precision": "bfloat16",
                "num_envs": NUMBER[PONG],
                "total_timesteps": 30 * NUMBER[PONG],
            },
            PONG,
        ),
    ],
    ids=["student", "mixed", "teacher", "stepwise", "pong"],
)


@EVERY_WAY
def test_a_repeated_run_ends_with_the_same_weights_and_another_seed_with_others(settings, env):
    config, teacher = replace(TINY, **settings), make_teacher(env)
    first, again, other = (run(c, teacher, env)[0] for c in (config, config, replace(config, seed=1)))
    assert same_weights(first.student, again.student)
    assert not torch.equal(first.student.actor.weight, other.student.actor.weight)


@EVERY_WAY
def test_a_run_that_is_interrupted_ends_exactly_as_one_that_is_not(settings, env):
    config, teacher = replace(TINY, **settings), make_teacher(env)
    whole, progress, whole_envs = run(config, teacher, env, every=6)

    envs, fresh_envs = (Envs(env, config.num_envs) for _ in range(2))
    state = start(config, teacher, CPU)
    data = Dataset(fresh_envs, 240)
    if config.lead == "teacher":
        list(record(config, teacher, fresh_envs, data, seed=0))
        before = list(islice(distill_from(config, state, data, every=6), 3))
        state = resumed(state, config, teacher)
        after = list(distill_from(config, state, data, every=6))
    else:
        before = list(islice(distill(config, state, teacher, envs, every=6), 3))
        state = resumed(state, config, teacher)
        again = list(distill(config, state, teacher, fresh_envs, envs.state(), every=6))
        assert [progress.step for progress in again[:3]] == [progress.step for progress in before]  # played again
        assert all(progress.metrics == {} for progress in again[:3])
        after = again[3:]

    assert [repr(p) for p in before + after] == [repr(p) for p in progress]  # repr: nan equals nan
    assert same_weights(state.student, whole.student)
    assert (state.vector_steps, state.gradient_steps) == (whole.vector_steps, whole.gradient_steps)
    assert torch.equal(state.generator.get_state(), whole.generator.get_state())
    assert np.array_equal(fresh_envs.state()[1], whole_envs.state()[1])


def resumed(state, config, teacher):
    """A state made anew, filled with what a checkpoint would hold."""
    copy = start(config, teacher, CPU)
    copy.student.load_state_dict(copy_of(state.student))
    copy.optimizer.load_state_dict(state.optimizer.state_dict())
    copy.generator.set_state(state.generator.get_state())
    counts = (state.vector_steps, state.gradient_steps, state.games)
    return DistillState(copy.student, copy.optimizer, copy.generator, *counts, state.recent.copy())


# What cannot be


@pytest.mark.parametrize(
    "settings", [{}, {"mode": "stepwise"}, {"lead": "teacher"}], ids=["buffer", "stepwise", "data"]
)
def test_a_run_that_diverges_says_so_and_keeps_the_last_finite_weights(settings):
    config = replace(TINY, learning_rate=1e30, objective="logit-mse", **settings)
    teacher, envs = make_teacher(), Envs(CARTPOLE, 8)
    state = start(config, teacher, CPU)
    data = Dataset(envs, 240)
    if config.lead == "teacher":
        list(record(config, teacher, envs, data, seed=0))
        steps = distill_from(config, state, data)
    else:
        steps = distill(config, state, teacher, envs)
    with pytest.raises(DivergedError, match=r"no longer finite at gradient step \d .* lower --learning-rate"):
        list(steps)
    assert all(parameter.isfinite().all() for parameter in state.student.parameters())


def test_a_student_may_be_of_another_family_that_reads_what_the_teacher_sees():
    teacher = Policy(NetworkConfig(family="mlp"), (10, 10, 4), 3)
    student = start(replace(CONFIG, network=NetworkConfig(family="minatar")), teacher, CPU).student
    seen = torch.rand(2, 10, 10, 4)
    assert torch.equal(student.prepare(seen), teacher.prepare(seen))
    vectors = Policy(NetworkConfig(), (4,), 2)
    with pytest.raises(InputError, match="the nature family reads images"):
        start(replace(CONFIG, network=NetworkConfig(family="nature")), vectors, CPU)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"total_timesteps": -1}, "total-timesteps must be at least 1, not -1"),
        ({"batch_size": 0}, "batch-size must be at least 1, not 0"),
        ({"temperature": 0.0}, "temperature must be positive and finite, not 0.0"),
        ({"learning_rate": math.nan}, "learning-rate must be positive and finite, not nan"),
        ({"updates_per_step": math.inf}, "updates-per-step must be positive and finite, not inf"),
        ({"seed": -1}, "seed must not be negative, but is -1"),
        ({"objective": "backward-kl"}, "no objective is called 'backward-kl'; known: forward-kl, "),
        ({"lead": "teacher", "noise": 1.5}, "noise and beta-until are shares between 0 and 1"),
        ({"beta_until": -0.5}, "noise and beta-until are shares between 0 and 1"),
        ({"noise": 0.1}, "noise goes with --lead teacher"),
        ({"lead": "teacher", "mode": "stepwise"}, "stepwise mode learns from live play"),
        ({"act": "after"}, "--act after goes with --mode stepwise"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, complaint):
    with pytest.raises(InputError, match=complaint):
        DistillConfig(**settings)


def test_the_specified_loop_is_one_update_per_step_of_fifty_environments():
    loop = DistillConfig(total_timesteps=1_000_000, mode="stepwise", num_envs=50, learning_rate=1e-4)
    assert loop.gradient_steps == loop.vector_steps == 20_000
