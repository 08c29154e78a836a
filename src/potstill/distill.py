"""Distillation: a student learns a teacher's policy by supervised learning. Read from top to bottom.

Whose states (`lead`), which loss (`objective`), when to update (`mode`). Sources: Rusu et al. 2015, "Policy
Distillation"; Ross et al. 2011 (DAgger, the mixture and the growing buffer); Laskey et al. 2017 (DART, noise injected
into the teacher's play); Czarnecki et al. 2019, "Distilling Policy Distillation" (whose states); Kapturowski et al.
2019, "Recurrent Experience Replay in Distributed Reinforcement Learning" (sequences, with a stored memory and burn-in).
"""

import math
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tyro.conf import UseAppendAction

from potstill.algorithm import Adam, Cost, Progress, pack, pack_games, unpack, unpack_games
from potstill.buffer import Batch, Dataset
from potstill.configs import MOST, MOST_ENVS, bounded, normalise
from potstill.envs import Array, EnvConfig, Envs, Past, check_seed
from potstill.errors import DivergedError, InputError
from potstill.networks import NetworkConfig, Policy, Precision, resolve_precision
from potstill.objectives import find_objective, value_mse
from potstill.quantisation import prune, round_statistics, round_weights, simulated
from potstill.rollout import Preparer, collect, normalise_by_play
from potstill.views import chosen

Lead = Literal["student", "teacher", "mixed"]


@dataclass(frozen=True)
class DistillConfig:
    """Everything a distillation depends on but the teacher and its task. The defaults are tuned on Pong, width 1/8."""

    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(width="1/8"))
    """The student's shape."""
    view: Annotated[tuple[str, ...], UseAppendAction] = ()
    """What the student sees of an observation, as `train --view` has it: 42x42, frames=1, keep=0,2 and more. Default:
    what its teacher sees; full: all there is."""
    total_timesteps: int = 150_000
    """Agent steps to collect, all environments together."""
    seed: int = 0
    """Seeds the weights, the games and the sampling."""
    lead: Lead = "student"
    """Whose play the states come from: the student's, the teacher's (a stored data set), or a mixture (DAgger)."""
    objective: str = "forward-kl"
    """What the student minimises, state by state: forward-kl, reverse-kl, greedy-cross-entropy or logit-mse; or a
    function of yours as module:name, given the student's and the teacher's logits (B, L) and the temperature; of
    several choices at once it is given each in turn, and their losses are added up."""
    temperature: float = 1.0
    """Divides the logits of student and teacher; below 1 sharpens the target."""
    value_coefficient: float = 0.0
    """Weight of regressing the teacher's value beside its policy, for a student that will go on with PPO."""
    mode: Literal["buffer", "stepwise"] = "buffer"
    """buffer: minibatches from all states so far. stepwise: one update on each vector step's own batch, once."""
    act: Literal["before", "after"] = "before"
    """Stepwise only: the student chooses its action before or after the update on that state."""
    num_envs: int = 32
    """Environments stepped together; in stepwise mode also the batch size."""
    buffer_size: int = 100_000
    """States the buffer keeps; the oldest go first."""
    batch_size: int = 256
    """States per gradient step."""
    updates_per_step: float = 1.0
    """Gradient steps per vector step of `num_envs` environments (buffer mode)."""
    sequence: int = 16
    """Steps of a game in a row that a student with a memory learns from at once; `batch_size` states hold so many."""
    burn_in: int = 16
    """Steps before these that it sees again first, from what it remembered then, so that it remembers as it would now;
    in a teacher's data it begins them without a memory."""
    warmup_steps: int = 2_048
    """Agent steps collected before the first gradient step (buffer mode)."""
    learning_rate: float = 2e-3
    """Adam's rate at the start; it falls to zero along a half cosine."""
    constant_learning_rate: bool = False
    """Keep the rate where it starts."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    beta_until: float = 0.5
    """Mixed lead: share of the run over which the teacher's share of the steps falls linearly from 1 to 0."""
    noise: float = 0.0
    """Teacher lead: probability of a random action, so that the data hold bad states and the way back (DART)."""
    precision: Precision = "auto"
    """float32, bfloat16, or what measures faster here; of numbers, not pixels, float32."""
    bits: int = 32
    """Of a deployed weight: 32, or 8 or 4 for a network that is exported as integers: over the last half of its
    gradient steps the student plays and learns with rounded weights and activations, and its weights end rounded."""
    sparsity: float = 0.0
    """Share of the deployed weights, those of the last layer apart, that end as zero and are counted no more: the
    smallest go, more and more over the first half of the gradient steps."""

    def __post_init__(self) -> None:
        normalise(self)
        if self.bits not in (32, 8, 4):
            raise InputError(f"bits are 32, 8 or 4, not {self.bits}")
        if not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity is a share from 0 to below 1, such as 0.9, not {self.sparsity}")
        bounded(self, total_timesteps=MOST, num_envs=MOST_ENVS, buffer_size=MOST, batch_size=1 << 24, sequence=1 << 16)
        if not 0 <= self.burn_in <= 1 << 16:
            raise InputError(f"burn-in must be 0 to {1 << 16:,}, not {self.burn_in}")
        for name in ("temperature", "learning_rate", "updates_per_step", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name.replace('_', '-')} must be positive and finite, not {getattr(self, name)}")
        if self.updates_per_step > MOST_ENVS:
            raise InputError(f"updates-per-step must be at most {MOST_ENVS:,}, not {self.updates_per_step:g}")
        check_seed(self.seed)
        if not 0 <= self.value_coefficient < math.inf:
            raise InputError(f"value-coefficient must not be negative, but is {self.value_coefficient}")
        find_objective(self.objective)
        if not 0 <= self.noise <= 1 or not 0 <= self.beta_until <= 1:
            raise InputError("noise and beta-until are shares between 0 and 1")
        if self.noise and self.lead != "teacher":
            raise InputError("noise goes with --lead teacher: a student's own play is noisy enough")
        if self.mode == "stepwise" and self.lead == "teacher":
            raise InputError("stepwise mode learns from live play: use --lead student or mixed, or --mode buffer")
        if self.act == "after" and self.mode != "stepwise":
            raise InputError("--act after goes with --mode stepwise")

    @classmethod
    def for_task(cls, env: EnvConfig) -> "DistillConfig":
        """The settings of a task, which are those of all."""
        return cls()

    def task_of(self, teacher: EnvConfig) -> EnvConfig:
        """The teacher's task, as the student sees it."""
        return replace(teacher, view=chosen(self.view, teacher.view))

    @property
    def vector_steps(self) -> int:
        return math.ceil(self.total_timesteps / self.num_envs)

    @property
    def gradient_steps(self) -> int:
        """Gradient steps of the whole run: the same for every lead."""
        if self.mode == "stepwise":
            return self.vector_steps
        return max(1, int((self.vector_steps - self.warmup_vector_steps) * self.updates_per_step))

    @property
    def warmup_vector_steps(self) -> int:
        return min(math.ceil(max(self.warmup_steps, self.batch_size) / self.num_envs), self.vector_steps - 1)


@dataclass
class DistillState:
    """All that changes while distilling. With the environments' own state, it is what a resumed run needs."""

    student: Policy
    optimizer: Adam
    generator: torch.Generator
    vector_steps: int = 0
    gradient_steps: int = 0
    games: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    memories: Tensor = field(default_factory=lambda: torch.empty(0))  # (S, N, F), what a student remembered that has a
    # memory, every `sequence` steps of N games, in a ring


def fitted(config: DistillConfig, teacher: Policy) -> DistillConfig:
    """The same; where the teacher tells actions alone and no objective was chosen, with the one for such a teacher."""
    if teacher.hard_objective is None or config.objective != "forward-kl":
        return config
    return replace(config, objective=teacher.hard_objective)


def start(
    config: DistillConfig, teacher: Policy, device: torch.device, envs: Envs | None = None, observations: int = 10_000
) -> DistillState:
    """A fresh student. Where it sees what the teacher sees, it normalises that as the teacher does.

    Of continuous actions it takes over the squashing, and the deviations, which are no function of the state: they need
    no network, and a student-led run begins with states near the teacher's.

    Args:
        envs: whose view is the student's; its teacher's where there are none.
        observations: of random play, to normalise by what another view than the teacher's shows.

    Raises:
        InputError: the student's family does not read what the teacher sees; or the teacher's value is wanted and it
            has none; or its network has no weights to prune; or it has a memory, and would not learn from sequences.
    """
    if config.value_coefficient and not teacher.critic.weight.any():
        raise InputError("the teacher has no value head, as one from elsewhere: leave --value-coefficient at 0")
    generator = torch.Generator().manual_seed(config.seed)
    if envs is None or envs.config.view == teacher.view:
        student = Policy(config.network, **teacher.spaces).initialise(generator)
        student.normalise_as(teacher)
    else:
        student = Policy(config.network, **envs.spaces).initialise(generator)
        normalise_by_play(student, envs, observations, config.seed)
        student.return_scale.copy_(teacher.return_scale)
    if config.bits < 32:
        round_statistics(student)
    if student.log_std is not None and teacher.log_std is not None:
        student.log_std.data.copy_(teacher.log_std)
        student.squash = None if teacher.squash is None else teacher.squash.clone()
    if config.sparsity:
        prune(student, 0.0)  # refused, where there is nothing to prune
    student.to(device)
    state = DistillState(student, Adam(student, config.learning_rate), generator)
    if student.remembers:
        if config.mode == "stepwise" or config.bits < 32:
            raise InputError("a student with a memory learns from sequences, in float32: use --mode buffer --bits 32")
        if config.buffer_size < (least := 2 * (config.burn_in + config.sequence) * config.num_envs):
            raise InputError(f"buffer-size must be at least {least:,}, for two such sequences of each environment")
        rows = min(config.buffer_size // config.num_envs, config.vector_steps)
        if config.lead != "teacher":
            slots = rows // config.sequence + 1
            state.memories = torch.zeros((slots, config.num_envs, student.actor.in_features), device=device)
    return state


def distill(
    config: DistillConfig,
    state: DistillState,
    teacher: Policy,
    envs: Envs,
    past: Past | None = None,
    tolerant: bool = False,
    every: int = 64,
) -> Iterator[Progress]:
    """Student-led or mixed: plays, asks the teacher, learns. `state` is current whenever it yields.

    Args:
        past: the games of a run that goes on; they are played again to fill the buffer, with yields too, without
            metrics, of the steps played again.
        tolerant: as `Envs.replay` takes it.
        every: vector steps between two yields.

    Raises:
        DivergedError: the loss, or a weight, is no longer a finite number.
    """
    dtype = resolve_precision(config.precision, state.student.mean.device)
    preparer = Preparer(state.student, dtype)
    draw = state.student.distribution.sample
    most = min(config.buffer_size, config.vector_steps * config.num_envs)
    buffer = Dataset(envs, most) if config.mode == "buffer" else None
    learner = _Learner(config, state)
    label = _Labels(teacher, state.student, envs, dtype)
    observations = yield from _begin(config, state, label, envs, preparer, buffer, past, tolerant, every)
    logits, values = torch.empty(0), torch.empty(0)

    @torch.no_grad()
    def act(inputs: Tensor) -> Tensor:
        nonlocal logits, values
        logits, values = label(inputs, observations)
        state.student.restart(envs.ages == 0)
        if state.student.memory is not None and state.vector_steps % config.sequence == 0:
            state.memories[state.vector_steps // config.sequence % len(state.memories)] = state.student.memory
        if config.act == "after":
            with torch.enable_grad():
                learner.learn(Batch(inputs, logits, values))
        with learner.rounding():
            own = draw(state.student.logits(inputs).cpu(), state.generator)
        if config.lead == "student":
            return own
        shown = draw(logits.cpu(), state.generator)
        teachers_turn = torch.rand(len(own), generator=state.generator) < beta(config, state.vector_steps)
        own[teachers_turn] = shown[teachers_turn]
        return own

    ages = envs.ages.copy()
    for transition in collect(envs, preparer, observations, act):
        if buffer is not None:
            buffer.add(transition.observations, ages, logits, values)
            if state.vector_steps >= config.warmup_vector_steps:
                due = (state.vector_steps + 1 - config.warmup_vector_steps) * config.updates_per_step
                while state.gradient_steps < min(int(due), config.gradient_steps):
                    learner.learn(*minibatch(config, state, buffer, dtype))
        elif config.act == "before":
            learner.learn(Batch(transition.inputs, logits, values))
        ages, observations = envs.ages.copy(), transition.step.observations
        state.vector_steps += 1
        state.games += len(transition.step.episodes)
        state.recent.extend(episode.score for episode in transition.step.episodes)
        if state.vector_steps % every == 0 or state.vector_steps == config.vector_steps:
            score = float(np.mean(state.recent)) if state.recent else math.nan
            learner.check_weights()
            if state.vector_steps == config.vector_steps:
                learner.finish()
            yield Progress(state.vector_steps * config.num_envs, score, state.games, learner.metrics())
        if state.vector_steps >= config.vector_steps:
            return


def distill_from(config: DistillConfig, state: DistillState, data: Dataset, every: int = 64) -> Iterator[Progress]:
    """Teacher-led: learns from a stored data set, with as many gradient steps as the other leads take."""
    dtype = resolve_precision(config.precision, state.student.mean.device)
    learner = _Learner(config, state)
    while state.gradient_steps < config.gradient_steps:
        learner.learn(*minibatch(config, state, data, dtype))
        if state.gradient_steps % every == 0 or state.gradient_steps == config.gradient_steps:
            done = state.gradient_steps / config.gradient_steps
            learner.check_weights()
            if done == 1.0:
                learner.finish()
            yield Progress(round(done * config.total_timesteps), math.nan, 0, learner.metrics())


def record(config: DistillConfig, teacher: Policy, envs: Envs, data: Dataset, seed: int) -> Iterator[Progress]:
    """Fills `data` with the teacher's play, sampled, with `config.noise` of its actions replaced by random ones."""
    generator = torch.Generator().manual_seed(seed)
    preparer = Preparer(teacher, resolve_precision(config.precision, teacher.mean.device))
    label = _Labels(teacher, None, envs, preparer.dtype)
    recent: deque[float] = deque(maxlen=100)
    logits, values = torch.empty(0), torch.empty(0)
    games = 0

    def act(inputs: Tensor) -> Tensor:
        nonlocal logits, values
        logits, values = label(inputs, observations)
        shown = teacher.distribution.sample(logits.cpu(), generator)
        if not config.noise:
            return shown
        if teacher.continuous or not isinstance(teacher.num_actions, int):
            noise = teacher.distribution.uniform(logits.cpu(), generator)
        else:  # one draw of integers per step, as the data sets there are were made
            noise = torch.randint(0, teacher.num_actions, shown.shape, generator=generator)
        noisy = torch.rand(len(shown), generator=generator) < config.noise
        shown[noisy] = noise[noisy]
        return shown

    observations = envs.reset(seed)
    ages = envs.ages.copy()
    for transition in collect(envs, preparer, observations, act):
        data.add(transition.observations, ages, logits, values)
        ages = envs.ages.copy()
        games += len(transition.step.episodes)
        recent.extend(episode.score for episode in transition.step.episodes)
        if data.added >= data.capacity or data.added // envs.num_envs % 64 == 0:
            yield Progress(data.added, float(np.mean(recent)) if recent else math.nan, games, {})
        if data.added >= data.capacity:
            return


def minibatch(
    config: DistillConfig, state: DistillState, data: Dataset, dtype: torch.dtype
) -> tuple[Batch, tuple[Tensor, ...]]:
    """States at random from all so far, and what `Policy.heads` is told of them beside: for a student with a memory,
    which sees sequences, what it remembers before them, and where games begin."""
    student = state.student
    if not student.remembers:
        return data.batch(data.draw(config.batch_size, state.generator), student, dtype), ()
    count = max(1, config.batch_size // config.sequence)
    first, positions = data.draw_sequences(count, config.sequence, config.burn_in, state.generator)
    memory = student.mean.new_zeros((count, student.actor.in_features), dtype=torch.float32)
    if len(state.memories):
        memory = state.memories[first // config.sequence % len(state.memories), positions[0] % config.num_envs]
    burnt, learned = positions[: -config.sequence].flatten(), positions[-config.sequence :].flatten()
    if len(burnt):
        before = data.batch(burnt, student, dtype)
        with torch.no_grad():
            memory = student.remember(before.inputs, memory, data.begun(burnt))
    return data.batch(learned, student, dtype), (memory, data.begun(learned))


def beta(config: DistillConfig, vector_step: int) -> float:
    """Mixed lead: the probability that an environment's action is the teacher's, falling linearly from 1 to 0."""
    until = config.beta_until * config.vector_steps
    return max(0.0, 1.0 - vector_step / until) if until else 0.0


class _Labels:
    """What a teacher says of the states that `envs` show, asked of each once, in order. `player` is whose prepared
    inputs it is given; None where it plays itself."""

    def __init__(self, teacher: Policy, player: Policy | None, envs: Envs, dtype: torch.dtype) -> None:
        self.teacher, self.envs = teacher.player(), envs
        alike = player is None or player.sees_as(teacher)
        self.preparer = None if alike else Preparer(teacher, dtype)  # it sees otherwise than the player

    @torch.no_grad()
    def __call__(self, inputs: Tensor, observations: Array) -> tuple[Tensor, Tensor]:
        """The teacher's logits (N, L) and values (N,), in units of reward, of one state per environment.

        Args:
            inputs: the player's prepared inputs.
            observations: the same, raw.
        """
        self.teacher.restart(self.envs.ages == 0)
        logits, value = self.teacher.heads(inputs if self.preparer is None else self.preparer.first(observations))
        return logits, value * self.teacher.return_scale


class _Learner:
    """One gradient step after another, and what they did since the last report."""

    def __init__(self, config: DistillConfig, state: DistillState) -> None:
        self.config, self.state = config, state
        self.loss = state.student.distribution.loss(find_objective(config.objective))
        self._sums: dict[str, float] = {}
        self._steps = 0

    def learn(self, batch: Batch, before: tuple[Tensor, ...] = ()) -> None:
        """`before` as `minibatch` gives it."""
        config, state = self.config, self.state
        rate = config.learning_rate
        if not config.constant_learning_rate:
            rate *= 0.5 * (1.0 + math.cos(math.pi * state.gradient_steps / config.gradient_steps))
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        with self.rounding():
            logits, value = state.student.heads(batch.inputs, *before)
            per_state = self.loss(logits, batch.logits, config.temperature)
            loss = per_state.mean()
            if config.value_coefficient:
                targets = batch.values / state.student.return_scale
                loss = loss + config.value_coefficient * value_mse(value, targets).mean()
            state.optimizer.zero_grad()
            loss.backward()
        norm = nn.utils.clip_grad_norm_(state.student.parameters(), config.max_grad_norm)
        if not torch.isfinite(norm):
            raise DivergedError(
                f"the loss or its gradient is no longer finite at gradient step {state.gradient_steps} (loss"
                f" {loss.item()}, learning rate {rate:.3g}); the weights before it are kept: lower --learning-rate"
            )
        state.optimizer.step()
        state.gradient_steps += 1
        if config.sparsity:
            prune(state.student, config.sparsity * (1.0 - max(0.0, 1.0 - 2.0 * self.done) ** 3))
        agreement = state.student.distribution.agreement(logits, batch.logits)
        numbers = {"loss": loss.item(), **{name: each.mean().item() for name, each in agreement.items()}}
        for name, number in (numbers | {"grad_norm": norm.item()}).items():
            self._sums[name] = self._sums.get(name, 0.0) + number
        self._sums["learning_rate"] = rate
        self._steps += 1

    @property
    def done(self) -> float:
        """The share of the gradient steps that is taken."""
        return self.state.gradient_steps / self.config.gradient_steps

    def rounding(self) -> AbstractContextManager[None]:
        """In which the student computes: as an integer file will, where it learns for one, once half the steps are
        done."""
        late = self.config.bits < 32 and self.done >= 0.5
        return simulated(self.state.student, self.config.bits) if late else nullcontext()

    def finish(self) -> None:
        if self.config.bits < 32:
            round_weights(self.state.student, self.config.bits)

    def check_weights(self) -> None:
        """Raises DivergedError where the last step left a weight that is not finite, which must not be saved."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.state.student.parameters()):
            raise DivergedError(
                f"a weight is no longer finite after gradient step {self.state.gradient_steps}: lower --learning-rate"
            )

    def metrics(self) -> dict[str, float]:
        """Means since the last call, and the rate as it stands."""
        rate = self._sums.pop("learning_rate", math.nan)
        means = {name: total / self._steps for name, total in self._sums.items()}
        self._sums, self._steps = {}, 0
        return means | {"learning_rate": rate} if means else {}


def _begin(
    config: DistillConfig, state: DistillState, label: _Labels, envs: Envs, preparer: Preparer, buffer: Dataset | None,
    past: Past | None, tolerant: bool, every: int,
) -> Generator[Progress, None, Array]:  # fmt: skip
    """Starts the games, or plays those of an interrupted run again; returns the observations to go on from."""
    if past is None:
        return envs.reset(config.seed)
    observations: Array | None = None
    for at, observations in enumerate(envs.replay(past, tolerant)):
        if (buffer is not None or label.teacher.remembers) and at < len(past.actions):
            labels = label(preparer.first(observations), observations)
            if buffer is not None:
                buffer.add(observations, envs.ages, *labels)
        if at and at % every == 0:
            yield Progress(at * config.num_envs, math.nan, state.games, {})
    assert observations is not None
    return observations


class Distillation:
    """A distillation as the trainer takes it, an `algorithm.Algorithm`; `data` is stored play of a leading teacher."""

    def __init__(
        self, config: DistillConfig, envs: Envs, device: torch.device, *, teacher: Policy, data: Dataset | None = None,
        tolerant: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.envs, self.teacher, self.data, self.tolerant = config, envs, teacher, data, tolerant
        self.state = start(config, teacher, device, envs)
        self.total = config.total_timesteps if data is not None else config.vector_steps * config.num_envs
        self._past: Past | None = None

    @property
    def policy(self) -> Policy:
        return self.state.student

    @property
    def done(self) -> int:
        if self.data is not None:
            return round(self.gradient_steps / self.config.gradient_steps * self.total)
        return self.state.vector_steps * self.config.num_envs

    @property
    def gradient_steps(self) -> int:
        return self.state.gradient_steps

    def steps(self) -> Iterator[Progress]:
        if self.data is not None:
            yield from distill_from(self.config, self.state, self.data)
        elif self.done < self.total:
            yield from distill(self.config, self.state, self.teacher, self.envs, self._past, self.tolerant)

    def costs(self) -> list[Cost]:
        batch = self.config.num_envs if self.config.mode == "stepwise" else self.config.batch_size
        acted = 0 if self.data is not None else self.total
        if self.state.student.remembers:
            acted += self.gradient_steps * max(1, batch // self.config.sequence) * self.config.burn_in
        own = Cost(self.state.student, acted, self.gradient_steps * batch, batch)
        costs = [own, Cost(self.teacher, self.total, 0, self.config.num_envs)]
        return [cost for cost in costs if not cost.policy.sees_raw]  # what the user's own code computes is unknown

    def state_dict(self) -> dict[str, Any]:
        return pack(self.state) | (pack_games(self.envs) if self.data is None else {})

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        unpack(self.state, saved)
        self._past = unpack_games(self.envs, saved) if self.data is None else None
