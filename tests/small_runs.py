"""Runs of a second or two, of each kind there is."""

import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from potstill import telemetry
from potstill.buffer import Dataset
from potstill.distill import DistillConfig, distill, distill_from, record, start
from potstill.envs import EnvConfig, Envs
from potstill.evaluation import compare
from potstill.networks import NetworkConfig, Policy
from potstill.ppo import PPOConfig
from potstill.storage import checkpoints
from potstill.storage.runs import Run
from potstill.tasks import TASKS
from potstill.training.runtime import Runtime
from potstill.training.trainer import Interrupted, execute, new_run

RUNTIME = Runtime(device="cpu", threads=1, quiet=True, save_every=0)
TRAIN = PPOConfig(
    env=TASKS["cartpole"].env,
    network=NetworkConfig(width="1/2"),
    total_timesteps=4 * 512,
    num_envs=8,
    num_steps=64,
    minibatch_size=128,
    learning_rate=2e-3,
    normalise_inputs=160,
    reseed_every=3 * 512,
    precision="float32",
)
PONG = replace(TRAIN, env=TASKS["pong"].env, network=NetworkConfig(width="1/32"), epochs=1, normalise_inputs=40)
PONG = replace(PONG, num_envs=2, num_steps=64, minibatch_size=64, total_timesteps=4 * 128, reseed_every=3 * 128)
STUDENT = DistillConfig(
    network=NetworkConfig(width="1/8"),
    total_timesteps=2_048,
    num_envs=8,
    batch_size=32,
    warmup_steps=64,
    updates_per_step=0.25,
    precision="float32",
)
CONFIGS = {
    "cartpole": TRAIN,
    "pong": PONG,
    "minatar": replace(TRAIN, env=TASKS["minatar-breakout"].env, network=NetworkConfig(width="1/16")),
    "ppd": replace(TRAIN, anneal_teacher_from=0.5),
    "finetune": TRAIN,
    "student": STUDENT,
    "teacher": replace(STUDENT, lead="teacher", updates_per_step=1.0),
    "mixed": replace(STUDENT, lead="mixed"),
    "stepwise": replace(STUDENT, mode="stepwise", act="after", constant_learning_rate=True),
}
"""Runs of four lines of metrics each, a save after every one."""


def small_run(name: str, teacher: Path, out: Path, runtime: Runtime = RUNTIME, **changes: object) -> Run:
    """A run of CONFIGS with other settings here and there; `teacher` counts where it has one."""
    role = {"ppd": "teacher", "finetune": "initial"}.get(name)
    role = "teacher" if isinstance(CONFIGS[name], DistillConfig) else role
    return new_run(replace(CONFIGS[name], **changes), out, runtime, **({role: teacher} if role else {}))


def outcome(run: Run) -> tuple[dict[str, bytes], list[dict[str, object]]]:
    """What must not depend on how often a run was stopped: the policy's bits, and all metrics but the clock."""
    tensors, _ = checkpoints.load(run.policy_path)
    records = telemetry.read(run.metrics_path)
    assert all(record.pop("seconds") > 0 for record in records)
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, records


def sharpened(policy: Policy, seed: int = 0, times: float = 300.0) -> Policy:
    """The policy, untrained, which likes different actions in different states, and clearly."""
    policy.initialise(torch.Generator().manual_seed(seed))
    policy.actor.weight.data *= times
    return policy


def learned(config: DistillConfig, teacher: Policy, task: EnvConfig) -> tuple[Policy, dict[str, float | None]]:
    """A student that has learned what its teacher does on a task, and how it agrees with it."""
    task = config.task_of(replace(task, view=teacher.view))
    with closing(Envs(task, 8, beside=teacher.view)) as envs:
        state = start(config, teacher, torch.device("cpu"), envs, observations=500)
        if config.lead == "teacher":
            data = Dataset(envs, config.vector_steps * 8)
            list(record(config, teacher, envs, data, 0))
            list(distill_from(config, state, data))
        else:
            list(distill(config, state, teacher, envs))
    return state.student, compare(state.student, teacher, task, steps=1_600)


def cut(run, monkeypatch):
    """Stops a run after its first line of metrics, and goes on with it in another."""
    write = telemetry.Metrics.write
    with monkeypatch.context() as patch:
        stop = lambda self, line: (write(self, line), signal.raise_signal(signal.SIGINT))  # noqa: E731
        patch.setattr(telemetry.Metrics, "write", stop)
        with pytest.raises(Interrupted):
            execute(run, RUNTIME)
    return execute(Run.open(run.path), RUNTIME)
