import gymnasium
import pytest

from potstill.envs import EnvConfig
from potstill.ppo import PPOConfig
from potstill.tasks import TASKS, task_of


def test_pongs_settings_are_the_defaults():
    assert PPOConfig.for_task(TASKS["pong"].env) == PPOConfig()


@pytest.mark.parametrize("name", ["pendulum", "lunarlander", "lunarlander-continuous"])
def test_tasks_whose_reward_is_more_than_its_sign_learn_from_its_size(name):
    assert not PPOConfig.for_task(TASKS[name].env).clip_rewards


@pytest.mark.parametrize("name", TASKS)
def test_an_entry_is_found_by_its_id_and_its_settings_are_ones_of_ppo(name):
    assert task_of(TASKS[name].env.id) is task_of(TASKS[name].env) is TASKS[name]
    assert PPOConfig.for_task(TASKS[name].env).env is TASKS[name].env


@pytest.mark.parametrize("name", ["SpongeBob-v0", "pong_maze", "MountainCar-v0"])
def test_a_task_without_an_entry_has_no_limits_and_no_targets_whatever_its_name_holds(name):
    task = task_of(name)
    assert (task.targets, task.margin, task.two_sided) == (None, None, False)
    assert task.limits == (-float("inf"), float("inf"))


def test_an_unknown_task_learns_with_the_settings_of_control_tasks_and_an_unknown_atari_game_with_pongs():
    config = PPOConfig.for_task(EnvConfig("MountainCar-v0"))
    assert (config.num_envs, config.network.width, config.clip_rewards) == (16, "1", False)
    assert PPOConfig.for_task(EnvConfig("ms_pacman", atari=True)).num_envs == PPOConfig().num_envs


@pytest.mark.parametrize("name", ["cartpole", "acrobot", "pong"])
def test_the_limits_of_a_score_are_those_of_the_task(name):
    low, high = TASKS[name].limits
    if name != "pong":
        steps = gymnasium.spec(TASKS[name].env.id).max_episode_steps
        assert steps in (high, -low)
    else:
        assert (low, high) == (-21, 21)
