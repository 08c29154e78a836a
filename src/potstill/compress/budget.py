"""The clock: what is spent of the budget, what a game and a training cost here, and games that stop when time is up."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

from potstill.distill import DistillConfig, distill, start
from potstill.envs import Envs
from potstill.networks import Policy, fitting_precision, resolve_device, torch_threads
from potstill.policies import LoadedPolicy
from potstill.training.runtime import Runtime

FINISHING = 0.1  # share of the budget kept for ONNX, card, film and page
SLACK = 1.1  # on every estimate of time: what is begun and does not end in time is cut, and lost to this call
CHEAP = 0.02  # share of the budget for games that are no more than welcome
EIGHT = 8  # games are played side by side, or a multiple
RATES = ("game", "start", "training")


class TimeUp(Exception):
    """The budget is spent: what was under way counts as not begun."""


@dataclass
class Clock:
    """What is spent of a budget, and what things cost here. All in seconds."""

    budget: float
    began: float  # as `time.monotonic()` counts, and earlier where earlier calls spent some
    game: float = 0.0
    start: float = 0.0  # of the processes that train
    training: float = 1.3  # times what was foreseen; before one was timed, a guess that leaves room

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """For the search: some of the budget is kept for what comes after it."""
        return (1 - FINISHING) * self.budget - self.spent

    @property
    def end(self) -> float:
        """Of the search, as `time.monotonic()` counts."""
        return time.monotonic() + self.left

    def games(self, seconds: float) -> float:
        """How many are played in these."""
        return max(0.0, seconds) / (SLACK * self.game or 1e-9)

    @property
    def cheap(self) -> int:
        """How many games take but a small share of the budget, in whole eights."""
        return int(self.games(CHEAP * self.budget)) // EIGHT * EIGHT

    def part(self, foreseen: float, games: int) -> float:
        """How much there is time for of a training, and of games after it; above 1 where more than all."""
        return (self.left / SLACK - self.start - self.game * games) / (self.training * foreseen)


@contextmanager
def deadline(policy: Policy, until: float) -> Iterator[None]:
    """Games played by `policy` in here are cut by `TimeUp` at the step at which `time.monotonic()` passes `until`.

    Games can last as long as their task allows, and a policy may take that long for the first time at any game.
    """

    def look(*_: object) -> None:
        if time.monotonic() > until:
            raise TimeUp

    handle = policy.trunk.register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def training_seconds(config: DistillConfig, teacher: LoadedPolicy, runtime: Runtime) -> float:
    """About how long a distillation takes on one core: its first steps, gradient steps among them, are timed."""
    first = replace(config, lead="student", noise=0.0, warmup_steps=config.batch_size)
    device = resolve_device(runtime.device)
    try:
        policy = teacher.policy.to(device)
        task, beside = first.task_of(teacher.env), teacher.env.view
        with torch_threads(1), closing(Envs(task, first.num_envs, beside=beside)) as envs:
            state = start(first, policy, device, envs, observations=0)
            first = replace(first, precision=fitting_precision(first.precision, state.student.layout))
            began, counted, most = time.perf_counter(), 0, first.vector_steps - first.warmup_vector_steps - 1
            for _ in distill(first, state, policy, envs, every=1):
                if state.vector_steps <= first.warmup_vector_steps:
                    began = time.perf_counter()
                    continue
                counted = state.vector_steps - first.warmup_vector_steps
                if counted >= min(32, most) or time.perf_counter() - began > 5.0:
                    break
            return (time.perf_counter() - began) / max(1, counted) * config.vector_steps
    finally:
        teacher.policy.to("cpu")
