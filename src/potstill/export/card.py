"""The card of an exported file: how it plays, undisturbed and as robots meet it, and how long it takes."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill import evaluation, telemetry
from potstill.envs import Array
from potstill.export.actor import Actor, Exported
from potstill.policies import LoadedPolicy

NOISE = 0.1  # of actions that are random ones, or of half their range; of an observation's own standard deviation


def latencies(players: Mapping[str, Exported]) -> dict[str, dict[str, float]]:
    """`evaluation.latency` of each, in turns, and of three the one with the least median: other programs interfere."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(3):
        for name, player in players.items():
            measured = evaluation.latency(player)
            if name not in best or measured["latency_ms"] < best[name]["latency_ms"]:
                best[name] = measured
    return best


def no_better(large: dict[str, Any], small: dict[str, Any]) -> str | None:
    """Why a quantised file is not worth writing, by its flash in C and its bytes elsewhere; None where it is."""
    size = "flash" if "flash" in large else "bytes"
    if small[size] is not None and small[size] >= large[size]:
        return f"it would take {small[size]:,} bytes{' of flash' * (size == 'flash')}, float32 takes {large[size]:,}"
    if small["latency_ms"] > large["latency_ms"]:
        return f"it would take {small['latency_ms']:.4f} ms, float32 takes {large['latency_ms']:.4f}"
    return None


def scores(
    player: Exported,
    actor: Actor,
    loaded: LoadedPolicy,
    episodes: int,
    seed: int,
    threads: int,
    title: str,
    quiet: bool,
) -> dict[str, Any]:
    """Plays `episodes` whole games, greedy, as the file is, and as many under each disturbance.

    Returns:
        `score`, `action_noise`, `observation_noise` and `delay`: of each `mean`, `ci95`, `worst` and `episodes`.
        Action noise: one action in ten is a random one, or Gaussian noise of a tenth of half the range is added.
        Observation noise: Gaussian, a tenth of each feature's deviation in recorded play; of pixels, of all of them.
        Delay: an action is played one step late, the first of a game twice.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)

    def played(name: str, who: Exported, alter: Callable[[Tensor, Array], Tensor] | None) -> dict[str, Any]:
        with telemetry.Progress(f"{title}, {name}", episodes, quiet=quiet, unit="games") as bar:
            for games in evaluation.play(
                who, loaded.env, episodes=episodes, seed=seed, threads=threads, alone=loaded.alone, alter=alter
            ):
                bar.update(len(games.episodes))
        summary = games.summary()
        return {key: summary[key] for key in ("mean", "ci95", "episodes")} | {"worst": min(summary["returns"])}

    def noisy(actions: Tensor, ages: Array) -> Tensor:
        if actor.bounds is not None:
            return actions + NOISE * torch.randn(actions.shape, generator=generator)
        if actions.dim() > 1:
            others = player.distribution.uniform(torch.zeros(len(actions), player.num_logits), generator)
            return torch.where(torch.rand(len(actions), 1, generator=generator) < NOISE, others, actions)
        others = torch.randint(player.actor.out_features, actions.shape, generator=generator)
        return torch.where(torch.rand(len(actions), generator=generator) < NOISE, others, actions)

    waiting: list[Tensor] = []

    def late(actions: Tensor, ages: Array) -> Tensor:
        before = waiting.pop() if waiting else actions.clone()
        waiting.append(actions.clone())
        young = torch.from_numpy(ages == 0)
        before[young] = actions[young]
        return before

    return {
        "score": played("undisturbed", player, None),
        "action_noise": played("action noise", player, noisy),
        "observation_noise": played("observation noise", Exported(actor, _blurred(player, actor, rng)), None),
        "delay": played("delay", player, late),
    }


def _blurred(player: Exported, actor: Actor, rng: np.random.Generator) -> Callable[..., Any]:
    """`player.run` of observations with noise; integers are rounded and stay within what their dtype holds."""
    seen = actor.observations.astype(np.float64)
    deviation = seen.std() if seen.ndim > 2 else seen.std(axis=0)
    dtype = actor.observations.dtype

    def run(observations: Array, *memory: Array) -> Any:
        noise = rng.standard_normal(observations.shape) * (NOISE * deviation)
        if dtype.kind == "b":  # no number to add to: as many are turned over as a random action would be
            return player.run(observations ^ (rng.random(observations.shape) < NOISE * deviation), *memory)
        shown = observations + noise
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            shown = shown.round().clip(limits.min, limits.max)
        return player.run(shown.astype(dtype), *memory)

    return run
