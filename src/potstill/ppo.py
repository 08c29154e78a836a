"""Proximal policy optimisation: the expert, and the from-scratch baseline. Read from top to bottom.

Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms"; details after Huang et al. 2022, "The 37
Implementation Details of PPO". We depart from both where a comment says so. With a teacher it is proximal policy
distillation (Spigler 2025); from a distilled student's weights it is fine-tuning on reward. Actions are discrete or
continuous: what their probabilities are, `policy.distribution` knows. A policy with a memory learns from the whole
sequences of some environments at a time, as CleanRL's `ppo_atari_lstm`.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from potstill.algorithm import Adam, Cost, Progress, pack, pack_games, unpack, unpack_games
from potstill.configs import MOST, MOST_ENVS, bounded, normalise
from potstill.envs import Array, EnvConfig, Envs, Past, check_seed
from potstill.errors import DivergedError, InputError
from potstill.networks import NetworkConfig, Policy, Precision, parse_width, resolve_precision
from potstill.quantisation import keep_pruned
from potstill.rollout import Preparer, collect, normalise_by_play
from potstill.tasks import TASKS, task_of


@dataclass(frozen=True)
class PPOConfig:
    """Everything a training run depends on. The defaults are tuned on Pong; `for_task` has other tasks' settings."""

    env: EnvConfig = TASKS["pong"].env
    """The task."""
    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(width="1/2"))
    """The policy's shape."""
    total_timesteps: int = 2_000_000
    """Agent steps to train for, all environments together (an agent step is `frame_skip` emulator frames)."""
    seed: int = 0
    """Seeds the weights, the games and the sampling."""
    num_envs: int = 32
    """Environments stepped together."""
    num_steps: int = 128
    """Agent steps of each environment per rollout."""
    epochs: int = 3
    """Passes over each rollout."""
    minibatch_size: int = 512
    """Samples per gradient step; of a network with a memory, those of so many whole environments as they fill."""
    learning_rate: float = 5e-4
    """Adam's rate at the start; afterwards it follows the KL divergence."""
    max_learning_rate: float = 2.5e-3
    """Upper bound of the rate."""
    target_kl: float = 0.04
    """The rate is divided by 1.3 after an update that moved the policy further than twice this, and multiplied by 1.3
    after one that moved it less than half."""
    anneal_from: float = 0.15
    """Share of the training after which the rate, from where it stands then, and the entropy bonus fall linearly to
    zero; 1 keeps them."""
    branch: tuple[str, ...] = ()
    """Shares of the training, such as 1/8 1/4 1/2, that are budgets too. Where a run of so many steps begins to anneal,
    it branches off this one, and ends exactly as if it had been planned alone."""
    average_over: float = 0.05
    """The policy deployed is the exponential moving average of the weights over about this share of the training; 0
    deploys the last weights."""
    clip: float = 0.2
    """Clipping range of the probability ratio."""
    entropy: float = 0.025
    """Weight of the entropy bonus at the start."""
    value_coefficient: float = 1.0
    """Weight of the value loss, on targets divided by their running deviation."""
    gamma: float = 0.99
    """Discount per agent step."""
    gae_lambda: float = 0.95
    """Trace of generalised advantage estimation."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm."""
    clip_rewards: bool = True
    """Learn from the sign of the reward, as is customary on Atari; scores are never clipped."""
    normalise_inputs: int = 10_000
    """Observations of a random policy to take the input normalisation from; 0 leaves inputs as they are."""
    teacher_coefficient: float = 1.0
    """Weight of KL(teacher || policy) beside the reward, where there is a teacher."""
    anneal_teacher_from: float = 1.0
    """Share of the training after which that weight falls linearly to zero; 1 keeps it."""
    reseed_every: int = 2**19
    """Agent steps after which all games start anew, which bounds how many a resumed run has to play again."""
    overlap: bool = False
    """Play each rollout while the one before is learned from, on two cores, by the policy as it was before that: the
    data are one update older (HTS-RL, Liu et al. 2020)."""
    precision: Precision = "auto"
    """float32, bfloat16, or what measures faster here; of numbers, not pixels, float32."""

    def __post_init__(self) -> None:
        normalise(self)
        bounded(self, total_timesteps=MOST, num_envs=MOST_ENVS, num_steps=MOST, epochs=MOST, minibatch_size=MOST)
        bounded(self, reseed_every=MOST)
        if not 2 <= self.batch_size <= MOST:
            raise InputError(
                f"num-envs x num-steps must be 2 to {MOST:,}, not {self.batch_size:,}: advantages are compared"
            )
        if self.minibatch_size > self.batch_size:
            raise InputError(f"minibatch-size {self.minibatch_size} exceeds the rollout of {self.batch_size} samples")
        if not 0 < self.gamma <= 1 or not 0 <= self.gae_lambda <= 1:
            raise InputError(f"gamma and gae-lambda lie in [0, 1], not {self.gamma} and {self.gae_lambda}")
        for name in ("learning_rate", "max_learning_rate", "target_kl", "clip", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name.replace('_', '-')} must be positive and finite, not {getattr(self, name)}")
        check_seed(self.seed)
        for name in ("entropy", "value_coefficient", "normalise_inputs", "teacher_coefficient"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name.replace('_', '-')} must not be negative, but is {getattr(self, name)}")
        for name in ("anneal_from", "anneal_teacher_from", "average_over"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name.replace('_', '-')} is a share between 0 and 1, not {getattr(self, name)}")
        shares = {parse_width(share, "branch") for share in self.branch}
        if len(shares) < len(self.branch) or max(shares, default=0) >= 1:
            raise InputError(f"branch names shares of the training below 1, none twice, not {' '.join(self.branch)}")
        for share in self.branch:
            self.of_share(share)

    @classmethod
    def for_task(cls, env: EnvConfig) -> "PPOConfig":
        """The settings that `tasks` has for a task."""
        known = dict(task_of(env).ppo)
        network = NetworkConfig(width=known.pop("width", "1/2"))
        return cls(env=env, network=network, **known)

    @property
    def batch_size(self) -> int:
        """Samples per rollout."""
        return self.num_envs * self.num_steps

    @property
    def updates(self) -> int:
        return math.ceil(self.total_timesteps / self.batch_size)

    def task_of(self, origin: EnvConfig) -> EnvConfig:
        """The task of a policy it learns from or begins with, as its own policy sees it."""
        return replace(origin, view=self.env.view)

    def of_share(self, share: str) -> "PPOConfig":
        """The run of a share of the budget."""
        return replace(self, total_timesteps=math.floor(self.total_timesteps * parse_width(share, "branch")), branch=())

    @property
    def constant_updates(self) -> int:
        """Updates at the start that a run of any larger budget makes too: nothing is annealed in them."""
        return math.floor(min(self.anneal_from, self.anneal_teacher_from) * self.updates)


@dataclass
class ReturnScale:
    """Running deviation of the value targets (Welford): the unit the value head works in."""

    count: float = 0.0
    mean: float = 0.0
    square: float = 0.0  # sum of squared deviations

    def include(self, returns: Tensor) -> float:
        """Adds a batch of targets; returns the deviation so far, at least 1e-2 so that a silent reward stays finite."""
        n, mean = returns.numel(), returns.mean().item()
        delta, total = mean - self.mean, self.count + n
        self.square += returns.var(correction=0).item() * n + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total
        return max(math.sqrt(self.square / self.count), 1e-2)


@dataclass
class TrainState:
    """All that changes while training. With the environments' own state, it is what a resumed run needs."""

    policy: Policy
    average: Policy  # its moving average: what is deployed
    optimizer: Adam
    generator: torch.Generator
    learning_rate: float
    rate_bound: float  # the rate when annealing begins
    returns: ReturnScale = field(default_factory=ReturnScale)
    update: int = 0
    games: int = 0
    gradient_steps: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    averages: nn.ModuleList = field(default_factory=nn.ModuleList)  # of each branch, over its own budget
    players: nn.ModuleList = field(default_factory=nn.ModuleList)  # who plays the next rollout, where they overlap
    past: Past | None = field(default=None, init=False)  # the games as that rollout began


class Rollout(NamedTuple):
    """T steps of N environments."""

    inputs: Tensor  # (T, N, ...) prepared inputs, memory in the layout the network wants
    actions: Tensor  # (T, N) int64, or (T, N, d) float32
    log_probs: Tensor  # (T, N) of these actions under the policy that took them
    values: Tensor  # (T + 1, N) in units of reward; the last row bootstraps
    rewards: Tensor  # (T, N), as learned from
    dones: Tensor  # (T, N) float, 1 where a game ended on that step
    teacher_logits: Tensor | None = None  # (T, N, L) the teacher's logits, where there is one
    memory: Tensor | None = None  # (N, F) before the first step, of a policy that has one

    def before(self, chosen: Tensor) -> tuple[Tensor, ...]:
        """What `heads` is told of the samples of one of `minibatches`: of a policy with a memory, that of each sequence
        and where games begin."""
        if self.memory is None:
            return ()
        begun = torch.cat([torch.zeros_like(self.dones[:1]), self.dones[:-1]]).flatten()
        return self.memory[chosen[: len(chosen) // len(self.dones)]], begun[chosen]


def start(
    config: PPOConfig, envs: Envs, device: torch.device, *, teacher: Policy | None = None, initial: Policy | None = None
) -> TrainState:
    """A fresh policy for `envs`, its input normalisation taken from a random policy's play.

    Args:
        teacher: whose normalisation to take instead, as every student does that sees what its teacher sees.
        initial: whose weights and normalisation to begin with.

    Raises:
        InputError: one of these is of another shape; or there are both, and they see the task differently.
    """
    if teacher is not None and teacher.remembers:
        raise InputError("a teacher with a memory teaches by distill alone, not beside the reward")
    generator = torch.Generator().manual_seed(config.seed)
    policy = Policy(config.network, **envs.spaces).initialise(generator)
    if policy.remembers and config.overlap:
        raise InputError(
            "a network with a memory learns from one rollout before it plays the next: leave out --overlap"
        )
    returns = ReturnScale()
    if initial is not None:
        policy.sparsity = initial.sparsity
        try:
            policy.load_state_dict(initial.state_dict())
        except RuntimeError as error:
            raise InputError(
                "the policy to start from is of another shape: use"
                f" --width {initial.config.width} --critic {initial.config.critic} --network {initial.family}"
            ) from error
        if teacher is not None and teacher.view == policy.view and not policy.sees_as(teacher):
            raise InputError(
                "the teacher normalises its inputs otherwise than the policy to start from: they must agree"
            )
        unit, weight = float(initial.return_scale), 10.0 * config.batch_size  # as if it had seen ten rollouts
        returns = ReturnScale(count=weight, square=unit**2 * weight)
    elif teacher is not None and teacher.view == policy.view:
        policy.normalise_as(teacher)
    else:
        normalise_by_play(policy, envs, config.normalise_inputs, config.seed)
    policy.to(device)
    optimizer = Adam(policy, config.learning_rate, eps=1e-5)
    averages = nn.ModuleList(deepcopy(policy) for _ in config.branch)
    players = nn.ModuleList([deepcopy(policy)] if config.overlap else [])
    rates = config.learning_rate, config.max_learning_rate
    if policy.sparsity is not None:
        keep_pruned(policy)
    return TrainState(
        policy, deepcopy(policy), optimizer, generator, *rates, returns, averages=averages, players=players
    )


def train(
    config: PPOConfig, state: TrainState, envs: Envs, observations: Array | None = None, teacher: Policy | None = None
) -> Iterator[Progress]:
    """Trains until `config.total_timesteps`, yielding after each update; `state` is current whenever it yields.

    Where a branch leaves, it yields the branch's state too, which is this one's but for the average.

    Args:
        observations: what `envs` showed last, for a run that goes on; None starts new games.
        teacher: the policy to learn from beside the reward; it normalises its inputs as `state.policy` does.

    Raises:
        DivergedError: a loss or a weight is no longer a finite number. The last saved checkpoint stands.
    """
    branches = {share: config.of_share(share) for share in config.branch}
    for batch, scores in (_ahead if config.overlap else _in_turn)(config, state, envs, observations, teacher):
        advantages, returns = gae(batch.rewards, batch.values, batch.dones, config.gamma, config.gae_lambda)
        state.policy.return_scale.fill_(state.returns.include(returns))
        decay = _decay(state.update / config.updates, config.anneal_from)
        if decay == 1.0 and state.update:
            state.rate_bound = state.learning_rate
        metrics = update(config, state, batch, advantages, returns, decay)
        state.learning_rate = _follow_kl(metrics["learning_rate"], metrics["kl"], config)
        if not all(bool(parameter.isfinite().all()) for parameter in state.policy.parameters()):
            raise DivergedError(f"a weight is no longer finite after update {state.update}: lower --max-learning-rate")
        average(state.average, state, config.average_over * config.updates)
        averages = dict(zip(branches, cast(list[Policy], state.averages), strict=True))
        for share, branch in branches.items():
            average(averages[share], state, config.average_over * branch.updates)
        state.update += 1
        state.games += len(scores)
        state.recent.extend(scores)
        score = float(np.mean(state.recent)) if state.recent else math.nan
        leaving = {
            share: pack(replace(state, average=averages[share], averages=nn.ModuleList()))
            | pack_games(envs, state.past)
            for share, branch in branches.items()
            if branch.constant_updates == state.update
        }
        yield Progress(state.update * config.batch_size, score, state.games, metrics, leaving)


def _in_turn(
    config: PPOConfig, state: TrainState, envs: Envs, observations: Array | None, teacher: Policy | None
) -> Iterator[tuple[Rollout, list[float]]]:
    """A rollout for each update left, and the scores of its games, each by the policy as it stands."""
    preparer = Preparer(state.policy, resolve_precision(config.precision, state.policy.mean.device))
    storage: Tensor | None = None
    while state.update < config.updates:
        observations = _begin(config, state.update, envs, observations)
        batch, storage, observations, scores = rollout(config, state, envs, preparer, observations, storage, teacher)
        yield batch, scores


def _ahead(
    config: PPOConfig, state: TrainState, envs: Envs, observations: Array | None, teacher: Policy | None
) -> Iterator[tuple[Rollout, list[float]]]:
    """The same, each played in a thread while the one before is learned from. Which of the two is faster changes
    nothing: a rollout has a generator of its own, and a policy that nobody else touches."""
    if state.update == config.updates:  # saved, and stopped before it said so
        return
    player = cast(Policy, state.players[0])
    preparer = Preparer(player, resolve_precision(config.precision, player.mean.device))
    storages: list[Tensor | None] = [None, None]

    def play(update: int) -> tuple[Rollout, list[float]]:
        nonlocal observations
        observations = _begin(config, update, envs, observations)
        playing = replace(state, policy=player, generator=torch.Generator().manual_seed(_seed(config.seed, update, 1)))
        room = storages[update % 2]  # the other one is being learned from
        batch, storages[update % 2], observations, scores = rollout(
            config, playing, envs, preparer, observations, room, teacher
        )
        return batch, scores

    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
        following: Future[tuple[Rollout, list[float]]] = thread.submit(play, state.update)
        for update in range(state.update, config.updates):
            batch, scores = following.result()
            state.past = None
            if update + 1 < config.updates:
                player.load_state_dict(state.policy.state_dict())
                state.past = envs.state()
                following = thread.submit(play, update + 1)
            yield batch, scores


def _begin(config: PPOConfig, update: int, envs: Envs, observations: Array | None) -> Array:
    """What a rollout begins from: what was shown last, or new games."""
    segment = max(1, config.reseed_every // config.batch_size)
    if observations is None or update % segment == 0:
        return envs.reset(seed=_seed(config.seed, update // segment))
    return observations


@torch.no_grad()
def rollout(
    config: PPOConfig,
    state: TrainState,
    envs: Envs,
    preparer: Preparer,
    observations: Array,
    storage: Tensor | None,
    teacher: Policy | None = None,
) -> tuple[Rollout, Tensor, Array, list[float]]:
    """Plays `num_steps` vector steps with sampled actions.

    Returns:
        The rollout, the storage of its inputs (pass it back in to use the memory again), the last raw observations,
        and the scores of the games that ended.
    """
    policy, (T, N) = state.policy, (config.num_steps, config.num_envs)
    device = policy.mean.device
    others = Preparer(teacher, preparer.dtype) if teacher is not None and teacher.view != policy.view else None
    actions: list[Tensor] = []
    rewards, dones = np.empty((2, T, N), np.float32)
    values = torch.empty((T + 1, N), device=device)
    logits = torch.empty((T, N, policy.num_logits), device=device)
    teacher_logits = torch.empty((T, N, policy.num_logits), device=device) if teacher is not None else None
    t, scores, memory = 0, [], None

    def act(inputs: Tensor) -> Tensor:
        nonlocal memory
        policy.restart(envs.ages == 0)
        memory = policy.memory if t == 0 else memory
        logits[t], values[t] = policy.heads(inputs)
        if teacher is not None and teacher_logits is not None:
            teacher_logits[t] = teacher.logits(inputs if others is None else others.first(envs.shown))
        return policy.distribution.sample(logits[t].cpu(), state.generator)

    if storage is None:
        storage = _like_inputs(preparer.first(observations), T)
    for transition in collect(envs, preparer, observations, act, storage):
        step = transition.step
        actions.append(transition.actions)
        rewards[t] = np.sign(step.rewards) if config.clip_rewards else step.rewards
        for row in np.flatnonzero(step.truncated & ~step.terminated).tolist():  # truncated is not terminated: bootstrap
            held = policy.memory[row, None] if policy.memory is not None else None
            _, value = policy(policy.read(step.final_observations[row][None]), held)
            rewards[t, row] += config.gamma * value.item()
        dones[t] = step.terminated | step.truncated
        scores += [episode.score for episode in step.episodes]
        observations = step.observations
        t += 1
        if t == T:
            _, values[T] = policy.heads(transition.next_inputs, policy.memory, torch.from_numpy(dones[-1]).to(device))
            break
    values *= policy.return_scale
    taken = torch.stack(actions).to(device)
    log_probs, _ = policy.distribution.log_prob_and_entropy(logits.flatten(0, 1), taken.flatten(0, 1))
    learned, ended = (torch.from_numpy(each).to(device) for each in (rewards, dones))
    batch = Rollout(storage, taken, log_probs.view(T, N), values, learned, ended, teacher_logits, memory)
    return batch, storage, observations, scores


def gae(rewards: Tensor, values: Tensor, dones: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation.

    Args:
        rewards: (T, N), with the bootstrap of truncated games already added.
        values: (T + 1, N) of the states acted from, and of the one after the last.
        dones: (T, N), 1 where the game ended on that step.

    Returns:
        Advantages and value targets (lambda-returns), both (T, N).

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using GAE", eq. 16.
    """
    nonterminal = 1.0 - dones
    deltas = rewards + gamma * values[1:] * nonterminal - values[:-1]
    traces = gamma * gae_lambda * nonterminal
    advantages = torch.empty_like(rewards)
    following = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        following = advantages[t] = deltas[t] + traces[t] * following
    return advantages, advantages + values[:-1]


def update(
    config: PPOConfig, state: TrainState, batch: Rollout, advantages: Tensor, returns: Tensor, decay: float
) -> dict[str, float]:
    """`epochs` passes of clipped policy and value steps over one rollout.

    Where there is a teacher, the loss gains its forward KL, weighed per sample by the ratio bounded from below, so that
    an update that makes an action much rarer does not escape what is taught there (Spigler 2025).

    Args:
        decay: in [0, 1], scales the learning rate's bound, `state.rate_bound`, and the entropy bonus.
    """
    policy, optimizer = state.policy, state.optimizer
    rate = min(state.learning_rate, state.rate_bound * decay)
    entropy_weight = config.entropy * decay
    for group in optimizer.param_groups:
        group["lr"] = rate
    inputs = _flat(batch.inputs)
    actions, old_log_probs = batch.actions.flatten(0, 1), batch.log_probs.flatten()
    teacher_logits = batch.teacher_logits.flatten(0, 1) if batch.teacher_logits is not None else None
    teacher_weight = config.teacher_coefficient * _decay(state.update / config.updates, config.anneal_teacher_from)
    advantages = advantages.flatten()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    targets = returns.flatten() / policy.return_scale
    gathered = torch.empty_like(inputs[:0])  # grows once, and is used again and again: fresh pages are slow
    sums: dict[str, float] = {}
    for epoch in range(config.epochs):
        parts = minibatches(config, policy.remembers, state.generator)
        for chosen in (part.to(inputs.device) for part in parts):
            torch.index_select(inputs, 0, chosen, out=gathered)
            logits, values = policy.heads(_as_inputs(gathered), *batch.before(chosen))
            log_probs, entropies = policy.distribution.log_prob_and_entropy(logits, actions[chosen])
            log_ratio = log_probs - old_log_probs[chosen]
            ratio, advantage = log_ratio.exp(), advantages[chosen]
            clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
            policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
            value_loss = 0.5 * (values - targets[chosen]).square().mean()
            entropy = entropies.mean()
            loss = policy_loss + config.value_coefficient * value_loss - entropy_weight * entropy
            numbers = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
            if teacher_logits is not None:
                teacher_kl = policy.distribution.kl(logits, teacher_logits[chosen])
                loss = loss + teacher_weight * (ratio.clamp(min=1 - config.clip) * teacher_kl).mean()
                numbers["teacher_kl"] = teacher_kl.mean()
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            if not torch.isfinite(norm):
                raise DivergedError(
                    f"the loss or its gradient is no longer finite at update {state.update} (loss {loss.item()},"
                    f" learning rate {rate:.3g}); the weights before this step are kept: lower --learning-rate"
                )
            optimizer.step()
            state.gradient_steps += 1
            if epoch == config.epochs - 1:  # the last pass tells how far the whole update went
                with torch.no_grad():
                    # k3 estimator: http://joschu.net/blog/kl-approx.html
                    numbers["kl"] = ((ratio - 1) - log_ratio).mean()
                    numbers["clip_fraction"] = ((ratio - 1).abs() > config.clip).float().mean()
                for name, number in (numbers | {"grad_norm": norm}).items():
                    sums[name] = sums.get(name, 0.0) + number.item() / len(parts)
    return sums | {"learning_rate": rate, "return_scale": policy.return_scale.item()}


def minibatches(config: PPOConfig, sequences: bool, generator: torch.Generator) -> Sequence[Tensor]:
    """One pass over a rollout in random order: the samples of each gradient step, as indices into (T N,).

    Args:
        sequences: in whole ones, all steps of some environments, in the order they were played.
    """
    T, N = config.num_steps, config.num_envs
    count, size = (N, max(1, config.minibatch_size // T)) if sequences else (T * N, config.minibatch_size)
    order = torch.randperm(count, generator=generator)
    parts: Sequence[Tensor] = order[: count // size * size].split(size)
    return [(N * torch.arange(T)[:, None] + rows).flatten() for rows in parts] if sequences else parts


@torch.no_grad()
def average(mean: Policy, state: TrainState, over: float) -> None:
    """Moves `mean` towards the policy: the exponential moving average over about `over` updates.

    Steps large enough to learn leave the last weights scattered about a better point, their mean (Polyak and Juditsky
    1992). The average never acts in training.
    """
    weight = 1.0 / max(1.0, min(over, state.update + 1))  # at first the mean of all there is
    for to, last in zip(mean.parameters(), state.policy.parameters(), strict=True):
        to.lerp_(last, weight)
    mean.return_scale.copy_(state.policy.return_scale)


def _follow_kl(rate: float, kl: float, config: PPOConfig) -> float:
    """Source: the adaptive schedule of rl_games and RSL-RL, after Schulman et al. 2017's adaptive penalty."""
    if kl > 2.0 * config.target_kl:
        return max(rate / 1.3, 1e-6)
    if kl < 0.5 * config.target_kl:
        return min(rate * 1.3, config.max_learning_rate)
    return rate


def _decay(progress: float, anneal_from: float) -> float:
    return 1.0 if progress < anneal_from or anneal_from >= 1.0 else (1.0 - progress) / (1.0 - anneal_from)


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _like_inputs(inputs: Tensor, steps: int) -> Tensor:
    """(T, N, ...) storage with the memory layout of `inputs` (N, ...): channels last for images."""
    if inputs.dim() != 4:
        return torch.empty((steps, *inputs.shape), dtype=inputs.dtype, device=inputs.device)
    n, channels, rows, columns = inputs.shape
    nhwc = torch.empty((steps, n, rows, columns, channels), dtype=inputs.dtype, device=inputs.device)
    return nhwc.permute(0, 1, 4, 2, 3)


def _flat(storage: Tensor) -> Tensor:
    """(T, N, ...) storage as contiguous rows (T * N, ...), NHWC for images: what index_select copies fastest."""
    if storage.dim() != 5:
        return storage.flatten(0, 1)
    return storage.permute(0, 1, 3, 4, 2).flatten(0, 1)


def _as_inputs(rows: Tensor) -> Tensor:
    return rows.permute(0, 3, 1, 2) if rows.dim() == 4 else rows


class PPO:
    """A training as the trainer takes it, an `algorithm.Algorithm`, in `config.num_envs` environments."""

    def __init__(
        self, config: PPOConfig, envs: Envs, device: torch.device, *, teacher: Policy | None = None,
        initial: Policy | None = None, tolerant: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.envs, self.teacher, self.tolerant = config, envs, teacher, tolerant
        self.state = start(config, envs, device, teacher=teacher, initial=initial)
        self.total = config.updates * config.batch_size
        self._past: Past | None = None

    @property
    def policy(self) -> Policy:
        return self.state.average

    @property
    def done(self) -> int:
        return self.state.update * self.config.batch_size

    @property
    def gradient_steps(self) -> int:
        return self.state.gradient_steps

    def steps(self) -> Iterator[Progress]:
        observations: Array | None = None
        if self._past is not None and self.done < self.total:
            for at, shown in enumerate(self.envs.replay(self._past, self.tolerant)):
                observations = shown
                yield Progress(at * self.config.num_envs, math.nan, self.state.games, {})
        yield from train(self.config, self.state, self.envs, observations, self.teacher)

    def costs(self) -> list[Cost]:
        config, batch = self.config, self.config.minibatch_size
        own = Cost(self.state.policy, self.total, self.gradient_steps * batch, batch)
        return [own] + ([Cost(self.teacher, self.total, 0, config.num_envs)] if self.teacher is not None else [])

    def state_dict(self) -> dict[str, Any]:
        return pack(self.state) | pack_games(self.envs, self.state.past)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        unpack(self.state, saved)
        self._past = unpack_games(self.envs, saved)
