import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from potstill import evaluation as module
from potstill.envs import Envs, Episode
from potstill.errors import InputError
from potstill.evaluation import EvalConfig, Evaluation, Start, check_fit, compare, latency, play, steps_beside
from potstill.networks import NetworkConfig, Policy
from potstill.objectives import forward_kl
from potstill.rollout import input_statistics
from potstill.tasks import TASKS

CARTPOLE = TASKS["cartpole"].env
PONG = replace(TASKS["pong"].env, max_frames=160)  # games of 40 agent steps


def make_policy(env=CARTPOLE, seed=6, sharpness=1.0):
    """An untrained network that likes different actions in different states."""
    envs = Envs(env, 8)
    generator = torch.Generator().manual_seed(seed)
    policy = Policy(NetworkConfig(width="1/8"), **envs.spaces).initialise(generator)
    policy.normalise_by(*input_statistics(envs, 200, seed))
    torch.nn.init.orthogonal_(policy.actor.weight, sharpness, generator=generator)
    return policy


def episodes_of(policy, env=CARTPOLE, *, episodes=16, seed=0, **options):
    *_, evaluation = play(policy, env, episodes=episodes, seed=seed, **options)
    return evaluation.episodes


def summary(*episodes):
    return Evaluation(PONG, "greedy", 0, 0, list(episodes)).summary()


def game(score, fingerprint, won=0.0, lost=0.0, length=10, truncated=False):
    return Episode(0, score, length, won, lost, truncated, fingerprint)


# Playing


@pytest.mark.parametrize(("episodes", "each"), [(7, 1), (32, 1), (64, 2), (50, 2), (99, 9)])
def test_every_environment_plays_the_same_number_of_games(episodes, each):
    rows = Counter(episode.row for episode in episodes_of(make_policy(), episodes=episodes))
    assert sum(rows.values()) == episodes
    assert set(rows.values()) == {each}


def test_a_prime_number_of_games_is_shared_out_in_advance():
    rows = Counter(episode.row for episode in episodes_of(make_policy(), episodes=67))
    assert rows == {row: 3 if row < 3 else 2 for row in range(32)}


def test_short_games_are_not_over_represented():
    # Rows whose first games are short would otherwise fill the quota.
    episodes = episodes_of(make_policy(), episodes=64)
    firsts = episodes_of(make_policy(), episodes=32)
    assert {(e.row, e.length) for e in firsts} <= {(e.row, e.length) for e in episodes}
    assert len(firsts) == 32


def stepped(monkeypatch):
    """How many vector steps each `Envs` takes from here on."""
    counts, receive = Counter(), Envs.receive
    monkeypatch.setattr(Envs, "receive", lambda envs: (counts.update([id(envs)]), receive(envs))[1])
    return counts


def test_halves_play_the_games_that_all_play_together(pong_policy, monkeypatch):
    together = episodes_of(pong_policy, PONG, episodes=6, alter=lambda actions, ages: actions)
    counts = stepped(monkeypatch)
    halves = episodes_of(pong_policy, PONG, episodes=6)
    assert len(counts) == 2
    assert sorted(halves) == sorted(together)
    assert {episode.row for episode in halves} == set(range(6))


def test_a_half_whose_games_are_over_plays_no_more(pong_policy, monkeypatch):
    counts = stepped(monkeypatch)
    assert len(episodes_of(pong_policy, replace(PONG, max_frames=40), episodes=11)) == 11  # three rows have two
    assert sorted(counts.values()) == [10, 2 * 10]


@pytest.mark.parametrize(("task", "games", "rows"), [("pong", 30, 6), ("pong", 46, 11), ("cartpole", 46, 23)])
def test_of_atari_an_environment_plays_four_games_or_more_and_of_any_task_many_play(task, games, rows, pong_policy):
    env = replace(PONG, max_frames=8) if task == "pong" else CARTPOLE
    policy = pong_policy if task == "pong" else make_policy()
    assert {episode.row for episode in episodes_of(policy, env, episodes=games)} == set(range(rows))


@pytest.mark.parametrize("actions", ["greedy", "sampled"])
def test_games_are_the_same_on_any_number_of_threads(pong_policy, actions):
    options = {"episodes": 9, "actions": actions, "seed": 3}
    one, two = (episodes_of(pong_policy, PONG, threads=threads, **options) for threads in (1, 2))
    assert one == two
    assert [game.row for game in one] == sorted(game.row for game in one)


def test_what_ends_the_games_of_one_thread_ends_those_of_the_other(pong_policy, monkeypatch):
    whole = replace(PONG, max_frames=108_000)
    counts = stepped(monkeypatch)

    def fail(*_):
        if sum(counts.values()) > 20:
            raise InputError("enough")

    hook = pong_policy.trunk.register_forward_pre_hook(fail)
    with pytest.raises(InputError, match="enough"):
        episodes_of(pong_policy, whole, episodes=4, threads=2)
    hook.remove()
    assert sum(counts.values()) < 30


def test_games_that_nobody_waits_for_are_given_up(pong_policy, monkeypatch):
    monkeypatch.setattr(module, "SIGN_EVERY", 5)
    counts = stepped(monkeypatch)
    games = play(pong_policy, replace(PONG, max_frames=108_000), episodes=4, seed=0, threads=2)
    next(games)
    games.close()
    assert sum(counts.values()) < 30


def test_it_yields_the_evaluation_after_each_game():
    counts = [len(evaluation.episodes) for evaluation in play(make_policy(), CARTPOLE, episodes=8, seed=0)]
    assert counts == list(range(1, 9))


def test_a_long_game_shows_signs_of_life_too(monkeypatch):
    monkeypatch.setattr(module, "SIGN_EVERY", 3)
    counts = [len(so_far.episodes) for so_far in play(make_policy(), CARTPOLE, episodes=1, seed=0)]
    (game,) = episodes_of(make_policy(), episodes=1)
    assert counts == [*([0] * ((game.length - 1) // 3)), 1]


@pytest.mark.parametrize("actions", ["greedy", "sampled"])
def test_the_same_seed_gives_the_same_games_and_another_seed_others(actions):
    policy = make_policy()
    first, again, other = (episodes_of(policy, seed=seed, actions=actions) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_greedy_play_takes_the_most_probable_action_and_sampled_play_does_not_always():
    policy, sharp = make_policy(), make_policy()
    with torch.no_grad():
        sharp.actor.weight.mul_(2.0**40)  # the same preferences to the last bit, without doubt
    assert episodes_of(policy) == episodes_of(sharp) == episodes_of(sharp, actions="sampled")
    assert episodes_of(policy, actions="sampled") != episodes_of(policy)


def test_scores_are_those_of_whole_games():
    episodes = episodes_of(make_policy(), episodes=32)
    assert all(episode.score == episode.length for episode in episodes)  # CartPole pays 1 for each step
    assert len({episode.length for episode in episodes}) > 5


# Repeated games


@pytest.fixture(scope="module")
def pong_policy():
    return make_policy(PONG, sharpness=5.0)


def test_a_greedy_policy_without_stickiness_repeats_its_games(pong_policy):
    frozen = replace(PONG, sticky=0.0, noop_max=1)
    *_, evaluation = play(pong_policy, frozen, episodes=4, seed=0)
    figures = evaluation.summary()
    assert (figures["episodes"], figures["distinct"], figures["ci95"]) == (4, 1, None)


def test_with_no_op_starts_it_has_no_more_games_than_starts(pong_policy):
    few = replace(PONG, sticky=0.0, noop_max=4)
    *_, evaluation = play(pong_policy, few, episodes=12, seed=0)
    assert 1 < evaluation.summary()["distinct"] <= 4


def test_with_stickiness_every_game_is_another(pong_policy):
    *_, evaluation = play(pong_policy, PONG, episodes=6, seed=0)
    assert evaluation.summary()["distinct"] == 6
    assert evaluation.summary()["sticky"] == 0.25
    assert evaluation.summary()["truncated"] == 6


# Starts


def test_a_random_start_does_not_depend_on_the_policy_until_it_takes_over():
    policy, other = make_policy(seed=6), make_policy(seed=3)
    assert episodes_of(policy) != episodes_of(other)
    whole_game = Start(steps=500)
    assert episodes_of(policy, start=whole_game) == episodes_of(other, start=whole_game)
    assert episodes_of(policy, start=Start(steps=3)) != episodes_of(other, start=Start(steps=3))


def test_a_random_start_changes_the_games():
    policy = make_policy()
    assert episodes_of(policy, start=Start(steps=5)) != episodes_of(policy)
    assert episodes_of(policy, start=Start(steps=0)) == episodes_of(policy)


def test_a_start_by_another_policy_is_as_that_policy_plays_with_its_own_normalisation():
    policy, other = make_policy(seed=6), make_policy(seed=3, sharpness=8.0)
    other.mean.add_(0.05)
    started = episodes_of(policy, start=Start(steps=500, policy=other))
    assert started == episodes_of(other, actions="sampled")


def test_every_game_of_a_row_begins_with_the_start_not_only_its_first():
    episodes = episodes_of(make_policy(), episodes=256, start=Start(steps=500))
    mean = np.mean([episode.length for episode in episodes])
    assert mean == pytest.approx(22, abs=3)  # a random policy's


# Figures


def test_the_figures_of_four_games_worked_out_by_hand():
    figures = summary(*(game(score, fingerprint=k) for k, score in enumerate((4.0, -1.0, 2.0, -3.0))))
    deviation = math.sqrt((3.5**2 + 1.5**2 + 1.5**2 + 3.5**2) / 3)
    half = 3.182446 * deviation / 2  # Student's t with 3 degrees of freedom
    assert (figures["mean"], figures["median"], figures["p_negative"]) == (0.5, 0.5, 0.5)
    assert figures["std"] == pytest.approx(deviation)
    assert figures["ci95"] == pytest.approx([0.5 - half, 0.5 + half], rel=1e-5)
    assert (figures["episodes"], figures["distinct"]) == (4, 4)
    assert figures["returns"] == [4.0, -1.0, 2.0, -3.0]


def test_the_score_so_far_is_the_mean_of_the_games_so_far():
    assert Evaluation(PONG, "greedy", 0, 0).score is None
    assert Evaluation(PONG, "greedy", 0, 0, [game(3.0, 1), game(-1.0, 2)]).score == 1.0


def test_repeated_games_widen_the_interval_because_they_are_no_evidence():
    scores = (1.0, 2.0) * 4
    figures = summary(*(game(score, fingerprint=int(score)) for score in scores))
    half = 12.706205 * np.std(scores, ddof=1) / math.sqrt(2)  # one degree of freedom
    assert (figures["episodes"], figures["distinct"]) == (8, 2)
    assert figures["ci95"] == pytest.approx([1.5 - half, 1.5 + half], rel=1e-5)


def test_one_game_over_and_over_has_no_interval():
    figures = summary(*[game(20.0, fingerprint=7)] * 5)
    assert (figures["distinct"], figures["ci95"], figures["std"]) == (1, None, 0.0)


def test_a_single_game_has_no_deviation_either():
    figures = summary(game(3.0, fingerprint=1))
    assert (figures["mean"], figures["std"], figures["ci95"]) == (3.0, None, None)


def test_games_are_distinct_where_their_course_is_even_if_their_scores_are_not():
    assert summary(game(1.0, fingerprint=1), game(1.0, fingerprint=2))["distinct"] == 2
    assert summary(game(1.0, fingerprint=1, length=3), game(1.0, fingerprint=1, length=4))["distinct"] == 2


def test_the_point_win_rate_is_of_all_points_together():
    figures = summary(game(21.0, 1, won=21.0, lost=0.0), game(-11.0, 2, won=10.0, lost=21.0))
    assert figures["point_win_rate"] == pytest.approx(31 / 52)
    assert summary(game(0.0, 1))["point_win_rate"] is None


def test_the_figures_are_strict_json():
    for figures in (summary(game(1.0, 1)), summary(game(1.0, 1), game(2.0, 2, truncated=True))):
        assert json.loads(json.dumps(figures, allow_nan=False)) == figures


# Beside the teacher


@pytest.mark.parametrize("env", [CARTPOLE, PONG], ids=["cartpole", "pong"])
def test_a_policy_agrees_with_itself(env, pong_policy):
    policy = pong_policy if env.atari else make_policy(env)
    figures = compare(policy, policy, env, steps=640, alone=env.atari)  # 16 emulators take a second to begin
    assert figures["agreement"] == figures["agreement_teacher_states"] == 1.0
    assert figures["kl"] == figures["kl_teacher_states"] == pytest.approx(0.0, abs=1e-6)


def test_it_never_agrees_with_its_opposite():
    policy, opposite = make_policy(), make_policy()
    with torch.no_grad():
        opposite.actor.weight.neg_()
    figures = compare(policy, opposite, CARTPOLE, steps=160)
    assert figures["agreement"] == figures["agreement_teacher_states"] == 0.0
    assert figures["kl"] > 0


def by_hand(player, policy, teacher, steps):
    """Agreement and divergence over `steps` vector steps of `player`, greedy, from raw observations."""
    envs = Envs(CARTPOLE, 16)
    seen, agree, kl = torch.from_numpy(envs.reset(5)), [], []
    for _ in range(steps):
        own, labels = policy(seen)[0], teacher(seen)[0]
        agree.append((own.argmax(-1) == labels.argmax(-1)).float().mean().item())
        kl.append(forward_kl(own, labels).mean().item())
        seen = torch.from_numpy(envs.step(player(seen)[0].argmax(-1).numpy()).observations)
    return np.mean(agree), np.mean(kl)


def test_agreement_and_divergence_are_measured_on_the_states_of_each_with_the_normalisation_of_each():
    policy, teacher = make_policy(seed=6), make_policy(seed=3)
    assert not torch.equal(policy.mean, teacher.mean)
    figures = compare(policy, teacher, CARTPOLE, steps=320, seed=5)
    own, theirs = (by_hand(player, policy, teacher, 20) for player in (policy, teacher))
    assert (figures["agreement"], figures["kl"]) == pytest.approx(own, abs=1e-4)
    assert (figures["agreement_teacher_states"], figures["kl_teacher_states"]) == pytest.approx(theirs, abs=1e-4)
    assert own != pytest.approx(theirs, abs=1e-3)


def test_networks_of_different_families_may_be_compared():
    env = TASKS["minatar-breakout"].env
    policies = [
        Policy(NetworkConfig(width="1/8", family=family), (10, 10, 4), 3).initialise(torch.Generator().manual_seed(0))
        for family in ("minatar", "mlp")
    ]
    figures = compare(*policies, env, steps=160)
    raw = torch.from_numpy(Envs(env, 16).reset(0))
    expected = forward_kl(policies[0](raw)[0], policies[1](raw)[0]).mean().item()
    assert compare(*policies, env, steps=16)["kl"] == pytest.approx(expected, rel=1e-3)
    assert 0 <= figures["agreement"] <= 1


def test_the_fewer_games_are_played_the_shorter_is_the_comparison_with_the_teacher():
    assert [steps_beside(games) for games in (1, 4, 32, 100)] == [512, 2_048, 16_384, 16_384]


# Speed


def test_latency_is_measured_on_one_thread_which_is_then_given_back():
    threads = torch.get_num_threads()
    figures = latency(make_policy(), repeats=20)
    assert 0 < figures["latency_ms"] <= figures["latency_p95_ms"]
    assert torch.get_num_threads() == threads


# Bad input


def test_a_policy_of_another_task_is_refused(pong_policy):
    with pytest.raises(InputError, match=r"reads observations of shape \(4,\), pong shows \(4, 84, 84\)"):
        check_fit(make_policy(CARTPOLE), Envs(PONG, 1))
    with pytest.raises(InputError, match="chooses among 3 actions, pong has 6"):
        check_fit(pong_policy, Envs(replace(PONG, actions=None), 1))


def test_so_is_one_with_actions_of_another_kind():
    with pytest.raises(InputError, match="the policy has discrete actions, Pendulum-v1 has continuous ones"):
        check_fit(Policy(NetworkConfig(), (3,), 1), Envs(TASKS["pendulum"].env, 1))


def test_so_is_one_that_starts_or_teaches():
    policy, stranger = make_policy(), make_policy(TASKS["acrobot"].env)
    with pytest.raises(InputError, match=r"reads observations of shape \(6,\)"):
        episodes_of(policy, start=Start(steps=3, policy=stranger))
    with pytest.raises(InputError, match=r"reads observations of shape \(6,\)"):
        compare(policy, stranger, CARTPOLE, steps=16)


def test_no_games_are_refused():
    with pytest.raises(InputError, match="episodes must be at least 1, not 0"):
        next(play(make_policy(), CARTPOLE, episodes=0, seed=0))


@pytest.mark.parametrize("name", ["episodes", "start_games", "secondary_games", "starts"])
def test_nonsense_numbers_of_games_are_refused(name):
    with pytest.raises(InputError, match=r"must be 0 or more, not -1|at least 1, not -1"):
        EvalConfig(**{name: (-1,) if name == "starts" else -1})
