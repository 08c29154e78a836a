import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict, replace

import gymnasium
import numpy as np
import pytest
from ale_py.vector_env import AtariVectorEnv

from potstill.envs import EnvConfig, Envs
from potstill.errors import InputError
from potstill.tasks import TASKS, find_env

PONG = TASKS["pong"].env
SHORT = replace(PONG, max_frames=80)  # games of 20 agent steps
NOOP, RIGHT, LEFT = 0, 1, 2  # as `PONG.actions` numbers them


def play(envs, steps, seed=0, act=0):
    """The first observations, and the steps of a fixed sequence of random actions (seeded by `act`)."""
    actions = envs.random_actions(np.random.default_rng(act), steps)
    first = envs.reset(seed)
    return first, [envs.step(a) for a in actions]


def everything(envs, steps, seed=0, act=0):
    """All observations of `play`, (steps + 1, N, ...)."""
    first, later = play(envs, steps, seed, act)
    return np.stack([first, *(step.observations for step in later)])


# What a policy sees and does


def test_pong_shows_four_grey_frames_and_offers_its_three_actions():
    envs = Envs(PONG, 3)
    step = play(envs, 1)[1][0]
    assert envs.observation_shape == (4, 84, 84)
    assert envs.observation_dtype == np.uint8
    assert envs.num_actions == 3
    assert step.observations.shape == (3, 4, 84, 84)
    assert step.observations.dtype == np.uint8
    assert step.rewards.shape == step.terminated.shape == step.truncated.shape == (3,)
    assert step.rewards.dtype == np.float32


def test_a_policys_actions_are_those_of_ales_own_that_the_config_names():
    subset, full = Envs(PONG, 2), Envs(replace(PONG, actions=None), 2)
    assert full.num_actions == 6
    subset.reset(0)
    full.reset(0)
    for actions in np.random.default_rng(0).integers(0, 3, (50, 2)):
        mine = subset.step(actions).observations
        theirs = full.step(np.array(PONG.actions)[actions]).observations
        assert np.array_equal(mine, theirs)


def test_right_moves_the_paddle_up_and_left_moves_it_down():
    envs = Envs(PONG, 3)
    envs.reset(0)
    for _ in range(5):
        seen = envs.step(np.array([NOOP, RIGHT, LEFT])).observations[:, -1]
    paddles = seen[:, 15:77, 74]  # the column of one's own, between the walls
    still, up, down = (np.flatnonzero(column != np.median(column)).mean() for column in paddles)
    assert up < still < down


def test_the_environment_behind_is_ales_own_with_nothing_left_to_its_defaults():
    own = AtariVectorEnv("pong", 2, repeat_action_probability=0.25, noop_max=30, reward_clipping=False)
    envs = Envs(PONG, 2)
    envs.reset(7)
    own.reset(seed=np.random.SeedSequence(7).generate_state(2).astype(np.int64) & 0x7FFFFFFF)
    for actions in np.random.default_rng(0).integers(0, 3, (40, 2)):
        mine, theirs = envs.step(actions).observations, own.step(np.array(PONG.actions)[actions])[0]
    assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("name", TASKS)
def test_every_preset_plays(name):
    if name.startswith("lunarlander") and importlib.util.find_spec("Box2D") is None:
        with pytest.raises(InputError, match=r"LunarLander\w*-v3 needs a package that is not installed: .*box2d"):
            Envs(TASKS[name].env, 2)
        return
    envs = Envs(find_env(name), 2)
    seen = everything(envs, 5)
    assert seen.shape == (6, 2, *envs.observation_shape)
    assert seen.dtype == envs.observation_dtype


def test_rewards_are_not_clipped():
    envs = Envs(find_env("ale/ms_pacman"), 4)
    _, steps = play(envs, 100)
    assert max(step.rewards.max() for step in steps) == 10.0  # a pellet


# Seeds


@pytest.mark.parametrize(
    "name", ["pong", "cartpole", "acrobot", "minatar-breakout", "minatar-space-invaders", "minatar-asterix", "pendulum"]
)
def test_the_same_seed_gives_the_same_games_and_another_seed_others(name):
    config = replace(TASKS[name].env, max_frames=200)
    first, again, other = (everything(Envs(config, 3), 120, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("name", ["pong", "cartpole", "minatar-breakout"])
def test_a_seeded_reset_leaves_nothing_of_what_was_played_before(name):
    used = Envs(TASKS[name].env, 3)
    for _ in range(3 if name.startswith("minatar") else 1):  # its sticky last action differs in one row of ten
        play(used, 20, seed=1, act=1)
        assert np.array_equal(everything(used, 20), everything(Envs(TASKS[name].env, 3), 20))


def test_the_environments_of_one_seed_play_different_games():
    envs = Envs(PONG, 4)
    envs.reset(0)
    for action in np.random.default_rng(0).integers(0, 3, 40):
        seen = envs.step(np.full(4, action)).observations
    assert len({row.tobytes() for row in seen}) == 4


def test_the_games_that_follow_one_another_in_a_row_are_different_games():
    envs = Envs(SHORT, 1, fingerprint=True)
    envs.reset(0)
    episodes = [episode for _ in range(80) for episode in envs.step(np.array([RIGHT])).episodes]
    assert len(episodes) == 4
    assert len({episode.fingerprint for episode in episodes}) == 4


def test_without_stickiness_and_no_ops_only_the_actions_decide():
    config = replace(PONG, sticky=0.0, noop_max=1)
    assert np.array_equal(everything(Envs(config, 2), 80, seed=0), everything(Envs(config, 2), 80, seed=1))


def test_with_stickiness_the_seed_decides_too():
    config = replace(PONG, sticky=0.25, noop_max=1)
    assert not np.array_equal(everything(Envs(config, 2), 80, seed=0), everything(Envs(config, 2), 80, seed=1))


def test_more_threads_play_the_same_games():
    assert np.array_equal(everything(Envs(SHORT, 2), 50), everything(Envs(SHORT, 2, threads=2), 50))


# Resets


@pytest.mark.parametrize("name", ["pong", "cartpole"])
def test_the_rows_of_a_part_are_those_of_the_whole(name):
    config = replace(TASKS[name].env, max_frames=160)
    whole, part = Envs(config, 5, fingerprint=True), Envs(config, 2, fingerprint=True)
    rng = np.random.default_rng(0)
    assert np.array_equal(whole.reset(5)[3:], part.reset(5, first=3))
    for _ in range(50):
        actions = whole.random_actions(rng)
        expected, step = whole.step(actions), part.step(actions[3:])
        for seen, all_there_is in zip(step[:4], expected[:4], strict=True):
            assert np.array_equal(seen, all_there_is[3:])
        assert step.episodes == [e._replace(row=e.row - 3) for e in expected.episodes if e.row >= 3]


def test_a_new_games_stack_is_its_first_frame_repeated_and_never_zeros():
    envs = Envs(PONG, 3)
    first, (second, third, fourth) = play(envs, 3)
    frames = [first[:, -1], *(step.observations[:, -1] for step in (second, third, fourth))]
    assert all(frame.any() for frame in frames)
    for seen, ages in ((first, (0, 0, 0, 0)), (second.observations, (0, 0, 0, 1)), (third.observations, (0, 0, 1, 2))):
        assert np.array_equal(seen, np.stack([frames[age] for age in ages], axis=1))
    assert np.array_equal(fourth.observations, np.stack(frames, axis=1))


def test_so_is_the_stack_of_a_game_that_begins_while_others_go_on():
    envs = Envs(replace(SHORT, noop_max=1), 2)
    envs.reset(0)
    seen = []
    for t in range(24):
        step = envs.step(np.array([RIGHT, LEFT]))
        seen.append(step.observations)
        assert bool(step.episodes) == (t == 19)
    frames = [observations[:, -1] for observations in seen[19:]]
    for after, ages in enumerate([(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 2), (0, 1, 2, 3)]):
        assert np.array_equal(seen[19 + after], np.stack([frames[age] for age in ages], axis=1))


def test_the_row_of_an_ended_game_shows_the_new_game_and_its_final_observation_the_old():
    envs = Envs(SHORT, 2)
    _, steps = play(envs, 20)
    before, last = steps[-2], steps[-1]
    assert last.truncated.all()
    assert sorted(last.final_observations) == [0, 1]
    for row, final in last.final_observations.items():
        assert np.array_equal(final[:3], before.observations[row, 1:])  # the old game goes on by one frame
        assert not np.array_equal(final, last.observations[row])
        assert np.array_equal(last.observations[row, 0], last.observations[row, 3])  # the new one has but one


def test_cartpole_too_resets_on_the_step_its_game_ends():
    envs = Envs(TASKS["cartpole"].env, 2)
    _, steps = play(envs, 60)
    ended = next(step for step in steps if step.terminated.any())
    row = int(np.flatnonzero(ended.terminated)[0])
    assert np.abs(ended.observations[row]).max() <= 0.05  # where CartPole begins
    assert abs(ended.final_observations[row][2]) > 0.2 or abs(ended.final_observations[row][0]) > 2.4  # fallen


def test_later_steps_leave_the_arrays_of_earlier_ones_alone():
    for name in ("pong", "cartpole", "minatar-breakout"):
        envs = Envs(replace(TASKS[name].env, max_frames=80), 2)
        kept = [envs.reset(0)]
        copies = [kept[0].copy()]
        for action in np.random.default_rng(0).integers(0, 2, (50, 2)):
            step = envs.step(action)
            kept += [step.observations, *step.final_observations.values()]
            copies += [array.copy() for array in kept[len(copies) :]]
        assert len(kept) > 51
        assert all(np.array_equal(array, copy) for array, copy in zip(kept, copies, strict=True))


# Episodes


def test_a_game_of_pong_without_a_move_is_lost_by_21_points():
    envs = Envs(PONG, 1)
    envs.reset(0)
    length, step = 1, envs.step(np.array([NOOP]))
    while not step.episodes:
        length, step = length + 1, envs.step(np.array([NOOP]))
    episode = step.episodes[0]
    assert (episode.score, episode.won, episode.lost) == (-21.0, 0.0, 21.0)
    assert (episode.length, episode.truncated, bool(step.terminated[0])) == (length, False, True)


def test_an_episodes_score_is_the_sum_of_its_rewards_and_splits_into_won_and_lost():
    config = replace(PONG, max_frames=4 * 500)
    envs = Envs(config, 4)
    _, steps = play(envs, 500)
    rewards = np.stack([step.rewards for step in steps])
    episodes = {episode.row: episode for step in steps for episode in step.episodes}
    assert sum(episode.won for episode in episodes.values()) > 0  # random play scores now and then
    for row, episode in episodes.items():
        assert episode.score == rewards[:, row].sum()
        assert episode.won == (rewards[:, row] > 0).sum()
        assert episode.lost == (rewards[:, row] < 0).sum()


def test_a_game_that_runs_out_of_frames_is_truncated_not_terminated():
    envs = Envs(SHORT, 2)
    _, steps = play(envs, 20)
    assert not any(step.terminated.any() or step.truncated.any() for step in steps[:-1])
    assert steps[-1].truncated.all()
    assert not steps[-1].terminated.any()
    assert [(episode.length, episode.truncated) for episode in steps[-1].episodes] == [(20, True), (20, True)]


def test_a_balanced_cartpole_is_truncated_after_500_steps():
    envs = Envs(TASKS["cartpole"].env, 1)
    seen = envs.reset(0)
    for _ in range(500):
        step = envs.step((seen @ np.array([0.0, 0.2, 1.0, 1.0]) > 0).astype(int))
        seen = step.observations
    assert step.truncated.all()
    assert not step.terminated.any()
    assert step.episodes[0][1:6] == (500.0, 500, 500.0, 0.0, True)


def test_fingerprints_are_equal_where_the_games_are():
    def fingerprints(seed):
        _, steps = play(Envs(SHORT, 2, fingerprint=True), 40, seed)
        return [episode.fingerprint for step in steps for episode in step.episodes]

    assert fingerprints(0) == fingerprints(0)
    assert len({*fingerprints(0), *fingerprints(1)}) == 8


# Continuous actions


class Scale(gymnasium.Env):
    """Pays the first action it gets, and shows both."""

    observation_space = gymnasium.spaces.Box(-100.0, 100.0, (2,))
    action_space = gymnasium.spaces.Box(np.array([0.0, -4.0], np.float32), np.array([10.0, -2.0], np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert action in self.action_space
        return action, float(action[0]), False, False, {}


gymnasium.register("Scale-v0", Scale, max_episode_steps=10)


def test_continuous_actions_are_in_units_of_half_the_range_and_clipped_to_the_bounds():
    envs = Envs(EnvConfig("Scale-v0"), 5)
    assert (envs.continuous, envs.num_actions) == (True, 2)
    assert envs.bounds.tolist() == [[0.0, -4.0], [10.0, -2.0]]
    envs.reset(0)
    step = envs.step(np.array([[0, 0], [-1, 1], [1, -1], [0.5, -0.5], [-7, 7]]))
    assert step.observations.tolist() == [[5, -3], [0, -2], [10, -4], [7.5, -3.5], [0, -2]]
    assert step.rewards.tolist() == [5, 0, 10, 7.5, 0]


def test_random_continuous_actions_fill_the_range():
    envs = Envs(EnvConfig("Scale-v0"), 8)
    actions = envs.random_actions(np.random.default_rng(0), 1_000)
    assert (actions.shape, actions.dtype) == ((1_000, 8, 2), np.float32)
    assert actions.min() == pytest.approx(-1, abs=0.01)
    assert actions.max() == pytest.approx(1, abs=0.01)
    assert envs.random_actions(np.random.default_rng(0)).shape == (8, 2)


@pytest.mark.parametrize(
    ("space", "complaint"),
    [
        (gymnasium.spaces.Box(-np.inf, np.inf, (2,)), "Odd-v0 has actions without finite bounds"),
        (gymnasium.spaces.Box(0.0, np.inf, (2,)), "Odd-v0 has actions without finite bounds"),
        (gymnasium.spaces.Box(-np.finfo("f").max, np.finfo("f").max, (2,)), "without finite bounds"),
        (gymnasium.spaces.Box(-1e300, 1e300, (2,), np.float64), "without finite bounds"),
        (gymnasium.spaces.Box(np.float32([0, 1]), np.float32([1, 1])), "the low one below the high one"),
        (gymnasium.spaces.Text(3), "Odd-v0 has Text actions; potstill trains Discrete, MultiDiscrete, MultiBinary"),
    ],
    ids=str,
)
def test_action_spaces_that_no_policy_of_ours_fits_are_refused(space, complaint):
    class Odd(Scale):
        action_space = space

    gymnasium.register("Odd-v0", Odd, max_episode_steps=10)
    with pytest.raises(InputError, match=complaint):
        Envs(EnvConfig("Odd-v0"), 1)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"frame_skip": 0}, "frame-skip must be at least 1, not 0"),
        ({"frame_stack": 0}, "frame-stack must be at least 1, not 0"),
        ({"max_frames": 2**31}, "max-frames must be at most 2,147,483,647, not 2,147,483,648"),
        ({"noop_max": -1}, "noop-max must be 0 or more"),
    ],
)
def test_numbers_of_frames_that_cannot_be_are_refused(settings, complaint):
    with pytest.raises(InputError, match=complaint):
        EnvConfig("CartPole-v1", **settings)


def test_a_task_takes_the_numbers_of_numpy():
    config = EnvConfig("pong", atari=True, actions=[0, np.int64(2)], sticky=np.float32(0.25))
    assert config == EnvConfig("pong", atari=True, actions=(0, 2), sticky=0.25)
    json.dumps(asdict(config))


# Replay


@pytest.mark.parametrize("name", ["pong", "cartpole", "minatar-breakout", "pendulum"])
def test_a_replay_shows_the_same_and_goes_on_the_same(name):
    config = replace(TASKS[name].env, max_frames=4 * 37)
    envs, copy = (Envs(config, 2, fingerprint=True) for _ in range(2))
    actions = envs.random_actions(np.random.default_rng(0), 130)
    if envs.continuous:
        actions *= 1.5  # some beyond the bounds, to be clipped again
    shown = [(envs.reset(5), envs.ages.copy())]
    shown += [(envs.step(a).observations, envs.ages.copy()) for a in actions[:90]]

    replayed = [(observations, copy.ages.copy()) for observations in copy.replay(envs.state())]
    assert len(replayed) == 91
    for (observations, ages), (observations_again, ages_again) in zip(shown, replayed, strict=True):
        assert np.array_equal(observations, observations_again)
        assert np.array_equal(ages, ages_again)
    for a in actions[90:]:
        step, again = envs.step(a), copy.step(a)
        assert np.array_equal(step.observations, again.observations)
        assert np.array_equal(step.rewards, again.rewards)
        assert step.episodes == again.episodes


def test_the_log_of_continuous_actions_holds_numbers():
    envs = Envs(TASKS["pendulum"].env, 2)
    first = envs.reset(3)
    past = envs.state()
    assert (past.seed, past.actions.shape, past.actions.dtype) == (3, (0, 2, 1), np.float32)
    assert [np.array_equal(first, seen) for seen in Envs(TASKS["pendulum"].env, 2).replay(past)] == [True]
    envs.step(np.array([[0.25], [-0.125]]))
    assert envs.state()[1].tolist() == [[[0.25], [-0.125]]]


def test_a_fresh_game_replays_to_its_first_observation():
    envs = Envs(PONG, 2)
    first = envs.reset(3)
    past = envs.state()
    assert (past.seed, past.actions.shape) == (3, (0, 2))
    assert [np.array_equal(first, seen) for seen in Envs(PONG, 2).replay(past)] == [True]


# Names and bad input


def test_names_are_presets_roms_or_gymnasium_ids():
    assert find_env("pong") is PONG
    assert find_env("ale/ms_pacman") == EnvConfig("ms_pacman", atari=True, sticky=0.25)
    assert find_env("CartPole-v1") == EnvConfig("CartPole-v1")
    assert find_env("MinAtar/Freeway-v1") == EnvConfig("MinAtar/Freeway-v1")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("pnog", "no environment is called 'pnog'; did you mean pong?"),
        ("CartPole-v7", "did you mean CartPole-v1?"),
        ("gibberish", "known: pong, .*ale/<rom>, any Gymnasium id"),
        ("MinAtar/Brakeout-v1", "did you mean MinAtar/Breakout-v"),
        ("ALE/Pong-v5", "write ale/pong"),
        ("PongNoFrameskip-v4", "write ale/pong"),
        ("SpaceInvaders-v0", "write ale/space_invaders"),
        ("tennis", "write ale/tennis"),
    ],
)
def test_an_unknown_name_gets_a_hint(name, hint):
    with pytest.raises(InputError, match=hint):
        find_env(name)


def test_an_unknown_rom_gets_a_hint():
    with pytest.raises(InputError, match=r"ALE has no game 'pomg'; did you mean pong\?"):
        Envs(find_env("ale/pomg"), 1)


def test_minatar_is_played_without_the_libraries_that_draw_it_and_drawn_with_them():
    code = """
import sys, gymnasium
from potstill.envs import Envs
from potstill.tasks import TASKS
Envs(TASKS["minatar-breakout"].env, 1).reset(0)
assert not {"seaborn", "pandas", "matplotlib"} & sys.modules.keys()
game = gymnasium.make("MinAtar/Breakout-v1", render_mode="rgb_array")
game.reset(seed=0)
assert game.render().shape == (10, 10, 3) and "seaborn" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_minatar_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "minatar.gym", None)
    monkeypatch.delitem(gymnasium.registry, "MinAtar/Breakout-v1", raising=False)
    with pytest.raises(InputError, match=r"needs MinAtar: pip install 'potstill\[minatar\]'"):
        find_env("MinAtar/Nothing-v1")


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (EnvConfig("Pendulum-v1", actions=(0, 1)), "Pendulum-v1 has continuous actions: there are none to choose"),
        (EnvConfig("NoSuch-v0"), "no task is registered as 'NoSuch-v0': a task of your own needs --import MODULE"),
        (replace(PONG, actions=(0, 6)), r"actions \(0, 6\) do not fit pong, which has 6"),
        (replace(PONG, actions=(2,)), "two or more, none twice"),
        (replace(PONG, actions=()), "two or more, none twice"),
        (replace(PONG, actions=(2, 3, 2)), "two or more, none twice"),
        (replace(PONG, actions=(-1, 2)), "do not fit"),
    ],
)
def test_a_task_that_cannot_be_played_is_refused(config, complaint):
    with pytest.raises(InputError, match=complaint):
        Envs(config, 1)


@pytest.mark.parametrize(
    ("task", "change", "complaint"),
    [
        ("cartpole", {"sticky": 0.25}, "CartPole-v1 has no sticky actions: leave sticky at 0"),
        ("cartpole", {"hidden_rows": 1}, "hidden-rows are 0 to 83 rows of an Atari frame, not 1 of CartPole-v1"),
        ("pong", {"hidden_rows": 84}, "hidden-rows are 0 to 83 rows of an Atari frame, not 84 of pong"),
        ("pong", {"sticky": 1.0}, "sticky must be a probability below 1, not 1.0"),
        ("pong", {"sticky": -0.1}, "sticky must be a probability"),
        ("pong", {"sticky": float("nan")}, "sticky must be a probability"),
    ],
)
def test_a_task_is_refused_before_it_is_opened_where_its_numbers_are_out_of_bounds(task, change, complaint):
    with pytest.raises(InputError, match=complaint):
        replace(TASKS[task].env, **change)


def test_no_environments_are_refused():
    with pytest.raises(InputError, match="must be at least 1, not 0"):
        Envs(PONG, 0)


def test_a_negative_seed_is_refused():
    with pytest.raises(InputError, match="seed must not be negative, but is -1"):
        Envs(TASKS["cartpole"].env, 1).reset(-1)


def test_a_task_without_a_limit_of_its_own_is_truncated_too():
    class Endless(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(2, np.float32), {}

        def step(self, action):
            return np.zeros(2, np.float32), 1.0, False, False, {}

    gymnasium.register("Endless-v0", Endless)
    envs = Envs(EnvConfig("Endless-v0", max_frames=4 * 30), 1)
    _, steps = play(envs, 30)
    assert [bool(step.truncated[0]) for step in steps] == [False] * 29 + [True]
