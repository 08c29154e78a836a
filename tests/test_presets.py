import pytest

from potstill.envs import PRESETS
from potstill.ppo import PPOConfig
from potstill.presets import PPO_PRESETS


def test_every_task_with_a_name_but_breakout_has_settings_of_its_own():
    assert set(PRESETS) - set(PPO_PRESETS) == {"breakout"}
    assert set(PPO_PRESETS) <= set(PRESETS)
    assert PPO_PRESETS["pong"] == PPOConfig()


@pytest.mark.parametrize("name", ["pendulum", "lunarlander", "lunarlander-continuous"])
def test_tasks_whose_reward_is_more_than_its_sign_learn_from_its_size(name):
    assert not PPO_PRESETS[name].clip_rewards
