"""Policy + seed -> one record per game, and what they amount to. The only source of scores."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor
from tyro.conf import arg

from potstill.configs import normalise
from potstill.envs import Array, EnvConfig, Envs, Episode, check_seed
from potstill.errors import InputError
from potstill.networks import FAMILIES, Policy, torch_threads
from potstill.rollout import Group, Preparer, collect, in_turns, side_by_side
from potstill.views import name_of, sensed

Actions = Literal["greedy", "sampled"]
SIGN_EVERY = 1_000  # vector steps between two signs of life of a long game


@dataclass(frozen=True)
class EvalConfig:
    """The games that score a run at its end. Not part of its identity: training does not depend on them."""

    episodes: Annotated[int, arg(name="evaluate")] = 100
    """Whole games, greedy; 0 leaves the evaluation out."""
    starts: tuple[int, ...] = ()
    """Also score greedy play after so many steps of a random policy, such as 50 200 500."""
    start_games: int = 0
    """Games after each of these; 0 plays as many as of the main evaluation."""
    secondary_games: int | None = None
    """Games with sampled actions, and on Atari games without stickiness (of these at most 30): the scores that stand
    beside the main one; 0 leaves them out, None plays as many as of the main evaluation."""

    def __post_init__(self) -> None:
        normalise(self)
        counts = {"evaluate": self.episodes, "start-games": self.start_games, "secondary-games": self.secondary_games}
        for name, games in counts.items():
            if (games or 0) < 0:
                raise InputError(f"{name} must be 0 or more, not {games}")
        if any(steps < 1 for steps in self.starts):
            raise InputError(f"starts are numbers of steps, at least 1, not {min(self.starts)}")


NOT_EVALUATED = EvalConfig(episodes=0)


def steps_beside(games: int) -> int:
    """Agent steps over which a policy is compared with its teacher where so many games are played."""
    return min(512 * games, 16_384)


@dataclass(frozen=True)
class Start:
    """Who plays the first steps of each game: an off-distribution start. The score counts from the first step."""

    steps: int = 0
    """Agent steps before the evaluated policy takes over."""
    policy: Policy | None = None
    """Plays them, sampled; None plays uniformly at random."""


@dataclass
class Evaluation:
    """What was played, and how it went."""

    env: EnvConfig
    actions: Actions
    seed: int
    start_steps: int
    episodes: list[Episode] = field(default_factory=list)

    @property
    def score(self) -> float | None:
        """Mean score of the games so far, unclipped; None before the first."""
        return float(np.mean([episode.score for episode in self.episodes])) if self.episodes else None

    def summary(self) -> dict[str, Any]:
        """The figures of a report; JSON-ready, undefined ones are None.

        The 95 % interval is Student's t with as many degrees of freedom as there are *distinct* games: a deterministic
        policy without sticky actions replays the same few, and repeats are no evidence.
        """
        from scipy import special  # half a second, which no training need wait for

        scores = np.array([episode.score for episode in self.episodes])
        won = sum(episode.won for episode in self.episodes)
        lost = sum(episode.lost for episode in self.episodes)
        distinct = len({(episode.fingerprint, episode.length, episode.score) for episode in self.episodes})
        ci95 = None
        if distinct > 1:
            half = float(special.stdtrit(distinct - 1, 0.975) * scores.std(ddof=1) / math.sqrt(distinct))
            ci95 = [float(scores.mean()) - half, float(scores.mean()) + half]
        return {
            "mean": float(scores.mean()), "ci95": ci95, "median": float(np.median(scores)),
            "std": float(scores.std(ddof=1)) if len(scores) > 1 else None,
            "episodes": len(scores), "distinct": distinct,
            "p_negative": float((scores < 0).mean()), "point_win_rate": won / (won + lost) if won + lost else None,
            "truncated": sum(episode.truncated for episode in self.episodes),
            "mean_length": float(np.mean([episode.length for episode in self.episodes])),
            "returns": [float(score) for score in scores], "env": self.env.id, "sticky": self.env.sticky,
            "actions": self.actions, "seed": self.seed, "start_steps": self.start_steps,
        }  # fmt: skip


@torch.no_grad()
def play(
    policy: Policy,
    env: EnvConfig,
    *,
    episodes: int,
    seed: int,
    actions: Actions = "greedy",
    start: Start | None = None,
    threads: int = 1,
    alone: bool = False,
    alter: Callable[[Tensor, Array], Tensor] | None = None,
) -> Iterator[Evaluation]:
    """Plays whole games, in each environment a number fixed in advance so that short games are not over-represented.

    Args:
        alone: in one environment, where no second may be open.
        alter: what the environments get, of the actions chosen, (N,) or (N, d), and of each game's steps so far, (N,).

    Yields:
        The evaluation so far, after each game and, as a sign of life, every `SIGN_EVERY` steps; the last is complete.

    Raises:
        InputError: the policy does not fit the environment.
    """
    if episodes < 1:
        raise InputError(f"episodes must be at least 1, not {episodes}")
    start = start or Start()
    check_seed(seed)
    # All wait for the longest game, which is dear on Atari: there each environment plays four games or more.
    most = min(32, max(8, episodes // 4)) if env.atari else 32
    num_envs = max(n for n in range(1, min(episodes, most) + 1) if episodes % n == 0)
    if num_envs <= most // 4:  # as of a prime number: the first ones play one game more
        num_envs = min(episodes, most)
    num_envs = 1 if alone else num_envs
    policy = policy.player()
    start = start if start.policy is None else replace(start, policy=start.policy.player([policy]))
    left = np.full(num_envs, episodes // num_envs)
    left[: episodes % num_envs] += 1
    kind, evaluation, over = policy.distribution, Evaluation(env, actions, seed, start.steps), threading.Event()
    # Two halves, so that emulator and network work at the same time; what remembers its rows wants them together.
    together = alter is not None or any(who is not None and who.remembers for who in (policy, start.policy))
    half = num_envs if together or not env.atari else math.ceil(num_envs / 2)
    # On several threads neither half waits for the other, unless code that is not ours would run in both at once.
    ours = type(policy) is Policy and policy.family in FAMILIES and start.policy is None and not sensed(env.view)
    apart = threads > 1 and half < num_envs and ours
    threads = max(1, threads // 2) if apart else threads

    def group(first: int, size: int) -> Group:
        generator = torch.Generator().manual_seed(seed + (first > 0))  # of each half, whichever is sooner
        envs = Envs(env, size, threads=threads, fingerprint=True)
        check_fit(policy, envs)
        if start.policy is not None:
            check_fit(start.policy, envs)

        def act(inputs: Tensor) -> Tensor:
            policy.restart(envs.ages == 0)
            logits = policy.logits(inputs).cpu()
            chosen = kind.greedy(logits) if actions == "greedy" else kind.sample(logits, generator)
            early = torch.from_numpy(envs.ages < start.steps)
            if early.any():
                if start.policy is None:
                    other = kind.uniform(logits, generator)
                else:  # which normalises in its own way
                    start.policy.restart(envs.ages == 0)
                    other = kind.sample(start.policy.logits(Preparer(start.policy).first(envs.shown)).cpu(), generator)
                chosen[early] = other[early]
            return chosen if alter is None else alter(chosen, envs.ages)

        return Group(envs, Preparer(policy), envs.reset(seed, first), act)

    groups = [group(first, min(half, num_envs - first)) for first in range(0, num_envs, half)]
    firsts = range(0, num_envs, half)

    @torch.no_grad()
    def games(which: Sequence[int]) -> Iterator[Episode | None]:
        for turn, (at, transition) in enumerate(in_turns([groups[i] for i in which]), start=1):
            envs, first = groups[which[at]].envs, firsts[which[at]]
            for episode in transition.step.episodes:
                row = first + episode.row
                if left[row]:
                    left[row] -= 1
                    yield episode._replace(row=row)
            if over.is_set() or not left[first : first + envs.num_envs].any():
                envs.close()
            elif turn % SIGN_EVERY == 0:
                yield None

    parts = [[i] for i in range(len(groups))] if apart else [list(range(len(groups)))]
    with ExitStack() as stack, torch_threads(threads, policy.size().macs * half):
        for each in groups:
            stack.enter_context(closing(each.envs))
        for episode in side_by_side([games(which) for which in parts], over):
            if episode is not None:
                evaluation.episodes.append(episode)
                evaluation.episodes.sort(key=lambda episode: episode.row)  # whichever was over sooner
            yield evaluation


def check_fit(policy: Policy, envs: Envs) -> None:
    """Raises InputError where the policy reads other observations or chooses among other actions than `envs` has."""
    name = name_of(policy.view)
    if name not in envs.shapes:
        raise InputError(f"the policy sees {name}, {envs.config.id} shows {' and '.join(envs.shapes)} here")
    if policy.observation_shape != (shape := envs.shapes[name]):
        raise InputError(
            f"the policy reads observations of shape {policy.observation_shape}, {envs.config.id} shows {shape}"
        )
    if policy.continuous != envs.continuous:
        kinds = ["continuous" if who.continuous else "discrete" for who in (policy, envs)]
        raise InputError(f"the policy has {kinds[0]} actions, {envs.config.id} has {kinds[1]} ones")
    if policy.num_actions != envs.num_actions:
        raise InputError(
            f"the policy chooses among {policy.num_actions} actions, {envs.config.id} has {envs.num_actions}"
        )


@torch.no_grad()
def compare(
    policy: Policy,
    teacher: Policy,
    env: EnvConfig,
    *,
    steps: int,
    seed: int = 0,
    threads: int = 1,
    alone: bool = False,
) -> dict[str, float | None]:
    """How often, and how far, a policy departs from its teacher: on its own states and on the teacher's.

    Args:
        steps: agent steps played greedily by each, in 16 environments.
        alone: in one environment, where no second may be open, and for a sixteenth of the steps.

    Returns:
        `agreement` (share of states with the same greedy action) and `kl` (forward, nats, mean over states) on the
        policy's own states; `agreement_teacher_states` and `kl_teacher_states` on the teacher's. Continuous actions
        have no agreement (None) but an `action_difference` and `action_difference_teacher_states`: between the greedy
        actions, absolute, mean over states and actions, in units of half the range of each action.
    """
    figures: dict[str, float | None] = {}
    policy = policy.player()
    teacher = teacher.player([policy])
    work = 16 * max(policy.size().macs, teacher.size().macs)
    shown = Envs(env, 1 if alone else 16, threads=threads, beside=teacher.view)
    with closing(shown) as envs, torch_threads(threads, work):
        check_fit(policy, envs)
        check_fit(teacher, envs)
        mine, theirs = Preparer(policy), Preparer(teacher)
        shared = policy.sees_as(teacher)
        for suffix, player in (("", policy), ("_teacher_states", teacher)):
            sums: dict[str, float] = {}
            count = 0
            observations = envs.reset(seed)
            said, begun = torch.empty(0), envs.ages == 0

            def act(inputs: Tensor, player: Policy = player) -> Tensor:
                nonlocal said, begun
                begun = envs.ages == 0
                player.restart(begun)
                said = player.logits(inputs)
                return player.distribution.greedy(said).cpu()

            for transition in collect(envs, mine if player is policy else theirs, observations, act):
                inputs = transition.inputs
                own = labels = said  # what has a memory is asked once
                if player is policy:
                    teacher.restart(begun)
                    labels = teacher.logits(inputs if shared else theirs.first(transition.observations))
                else:
                    policy.restart(begun)
                    own = policy.logits(inputs if shared else mine.first(transition.observations))
                agreement = policy.distribution.agreement(own, labels) | {"kl": policy.distribution.kl(own, labels)}
                for name, each in agreement.items():
                    sums[name] = sums.get(name, 0.0) + each.sum().item()
                count += len(own)
                if count >= (steps // 16 if alone else steps):
                    break
            figures[f"agreement{suffix}"] = None
            figures |= {f"{name}{suffix}": total / count for name, total in sums.items()}
    return figures


@torch.no_grad()
def latency(policy: Policy, repeats: int = 200) -> dict[str, float]:
    """Milliseconds from one raw observation to its logits, batch 1, one thread: median and 95th percentile."""
    with torch_threads(1):
        observation = torch.zeros((1, *policy.observation_shape), dtype=torch.uint8, device=policy.mean.device)
        times, policy = [], policy.player()
        policy.restart(np.ones(1, bool))
        for _ in range(repeats + 20):
            begin = time.perf_counter()
            policy.logits(policy.prepare(observation)).cpu()
            times.append(1e3 * (time.perf_counter() - begin))
    return {"latency_ms": float(np.median(times[20:])), "latency_p95_ms": float(np.quantile(times[20:], 0.95))}
