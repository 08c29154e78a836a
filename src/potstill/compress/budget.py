"""The clock: how long a training will take here, and games that stop when time is up."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

from potstill.distill import DistillConfig, distill, start
from potstill.envs import Envs
from potstill.networks import Policy, fitting_precision, resolve_device, torch_threads
from potstill.policies import LoadedPolicy
from potstill.training.runtime import Runtime


class TimeUp(Exception):
    """The budget is spent: what was under way counts as not begun."""


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
