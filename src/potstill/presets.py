"""Settings of PPO for the tasks that have a preset in `envs`."""

from dataclasses import replace

from potstill.networks import NetworkConfig
from potstill.ppo import PPOConfig

_CONTROL = PPOConfig(
    network=NetworkConfig(width="1"),
    num_envs=16,
    epochs=4,
    minibatch_size=256,
    learning_rate=1e-3,
    max_learning_rate=5e-3,
    target_kl=0.02,
    anneal_from=0.0,
    entropy=0.01,
    normalise_inputs=2_000,
    precision="float32",  # these networks are too small to gain from less
)
_MINATAR = PPOConfig(
    network=NetworkConfig(width="1"),
    total_timesteps=1_000_000,
    num_envs=64,
    num_steps=64,
    epochs=3,
    learning_rate=2e-3,
    max_learning_rate=1e-2,
    target_kl=0.03,
    anneal_from=0.3,
    entropy=0.01,
    precision="float32",
)
PPO_PRESETS: dict[str, PPOConfig] = {
    "pong": PPOConfig(),
    "cartpole": replace(_CONTROL, total_timesteps=60_000, num_envs=8, entropy=0.0),
    "acrobot": replace(_CONTROL, total_timesteps=200_000),
    "lunarlander": replace(_CONTROL, total_timesteps=500_000, clip_rewards=False),
    # Gamma after the RL Zoo: what a swing is worth shows within some ten steps.
    "pendulum": replace(_CONTROL, total_timesteps=100_000, clip_rewards=False, gamma=0.9, entropy=0.0),
    "lunarlander-continuous": replace(_CONTROL, total_timesteps=500_000, clip_rewards=False, entropy=0.0),
    "minatar-breakout": _MINATAR,
    "minatar-space-invaders": _MINATAR,
}
"""Settings by the name of an environment's preset; other tasks take Pong's."""
