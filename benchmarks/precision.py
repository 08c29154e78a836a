"""What computing in bfloat16 changes of what PPO learns from, on an expert's own play.

python benchmarks/precision.py data/experts/pong/seed-0

One rollout of `PPOConfig`'s size, sampled actions computed in float32, after ten more that spread the games. The same
weights then read the same states in both precisions: how far log-probabilities, values and advantages lie apart, when
all of the network computes in bfloat16 and when its heads stay in float32.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import Row, one_thread, publish
from torch import Tensor

from potstill.envs import Envs
from potstill.networks import Policy
from potstill.policies import load_policy
from potstill.ppo import PPOConfig, gae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", type=Path, nargs="+")
    options = parser.parse_args()
    one_thread()
    rows = [_measure(path, heads) for path in options.policies for heads in ("bfloat16", "float32")]
    publish("precision", rows, ["policy", "heads", "log_prob_error", "value_error", "advantage_error"])


@torch.no_grad()
def _measure(path: Path, heads: str) -> Row:
    loaded, config = load_policy(path), PPOConfig()
    policy, envs = loaded.policy, Envs(loaded.env, config.num_envs)
    generator = torch.Generator().manual_seed(0)
    observations = torch.from_numpy(envs.reset(seed=0))
    logits, values, rounded_logits, rounded_values, rewards, dones = [], [], [], [], [], []
    for step in range(11 * config.num_steps + 1):
        exact, value = policy.heads(policy.prepare(observations))
        if step >= 10 * config.num_steps:
            rounded, rounded_value = _in_bfloat16(policy, observations, heads)
            logits.append(exact)
            rounded_logits.append(rounded)
            values.append(value * policy.return_scale)
            rounded_values.append(rounded_value * policy.return_scale)
        after = envs.step(policy.distribution.sample(exact, generator).numpy())
        if step >= 10 * config.num_steps:
            rewards.append(torch.from_numpy(np.sign(after.rewards)))
            dones.append(torch.from_numpy(after.terminated | after.truncated).float())
        observations = torch.from_numpy(after.observations)
    played = (torch.stack(rewards[:-1]), torch.stack(dones[:-1]))

    def advantages(predicted: list[Tensor]) -> Tensor:
        return gae(played[0], torch.stack(predicted), played[1], config.gamma, config.gae_lambda)[0]

    log_probs = torch.stack(logits).log_softmax(-1)
    apart = torch.stack(rounded_logits).log_softmax(-1) - log_probs
    exact_advantages = advantages(values)
    return {
        "policy": str(path),
        "heads": heads,
        "log_prob_error": (log_probs.exp() * apart.square()).sum(-1).mean().sqrt().item(),
        "value_error": _share(torch.stack(rounded_values) - torch.stack(values), torch.stack(values)),
        "advantage_error": _share(advantages(rounded_values) - exact_advantages, exact_advantages),
    }


def _in_bfloat16(policy: Policy, observations: Tensor, heads: str) -> tuple[Tensor, Tensor]:
    inputs = policy.prepare(observations, torch.bfloat16)
    if heads == "bfloat16":
        return policy.heads(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        features = policy.trunk(inputs)
    return policy.actor(features.float()), policy.critic(features.float()).squeeze(-1)


def _share(error: Tensor, of: Tensor) -> float:
    """Root mean square of the error, as a share of the deviation of what it is an error of."""
    return (error.square().mean().sqrt() / of.std()).item()


if __name__ == "__main__":
    main()
