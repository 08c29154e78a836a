"""Measures how fast training runs, one thread per run, and writes tables to benchmarks/results/.

python benchmarks/throughput.py efficiency    a PPO run against the sum of its parts
python benchmarks/throughput.py cores         two runs side by side against one
python benchmarks/throughput.py data          teacher-led training from the memory map against prepared inputs
python benchmarks/throughput.py memory        peak memory of a PPO run at width 1
python benchmarks/throughput.py growth        cost per agent step against width and number of environments

Each takes --repeats, --updates (per repeat) and --widths. What is compared alternates within each repeat, and tables
hold medians over repeats. Run it on an otherwise quiet machine.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from common import RESULTS, ROOT, Row, child, one_thread, publish, say
from gymnasium.vector import AutoresetMode
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from potstill import ppo
from potstill.algorithm import Adam, Progress
from potstill.arms import ARMS
from potstill.buffer import Batch, Dataset, new_dataset, open_dataset
from potstill.distill import DistillConfig, distill_from, record, start
from potstill.envs import Envs
from potstill.networks import NetworkConfig, Policy, resolve_precision
from potstill.policies import load_policy
from potstill.ppo import _as_inputs, _like_inputs
from potstill.report.figures import GREY, STYLE, WIDTH, save
from potstill.rollout import Preparer

CPU = torch.device("cpu")
TEACHER = ROOT / "data" / "experts" / "pong" / "seed-0"
IMAGE = ROOT / "docs" / "images" / "growth.png"
PARTS = ("emulator", "forward", "training")
SUMS = {  # of times, as shares of a run's
    "parts_of_run": PARTS,
    "with_copies": (*PARTS, "moving", "gathering"),
    "with_all_named": (*PARTS, "gathering", "frames", "choosing", "loss"),  # frames are moved as they are made
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    for name, widths in (
        ("efficiency", ["1/16", "1/4", "1/2"]),
        ("cores", ["1/2"]),
        ("data", ["1/16", "1/8", "1/4"]),
        ("memory", ["1"]),
        ("growth", ["1/32", "1/16", "1/8", "1/4", "1/2", "1"]),
        ("worker", ["1/2"]),  # one of the two runs of `cores`
    ):
        command = what.add_parser(name)
        command.add_argument("--repeats", type=int, default=5)
        command.add_argument("--widths", nargs="+", default=widths)
        updates = 3 if name == "memory" else 2
        command.add_argument("--updates", type=int, default=updates, help="rollouts and updates per repeat")
        if name == "data":
            command.add_argument("--states", type=int, default=100_000, help="states to record")
            command.add_argument("--steps", type=int, default=200, help="gradient steps per repeat")
        if name == "growth":
            command.add_argument("--num-envs", type=int, nargs="+", default=[8, 16, 32, 64, 128])
            command.add_argument("--draw", action="store_true", help="only draw the figure, from the last measurement")
    options = parser.parse_args()
    one_thread()
    {"efficiency": efficiency, "cores": cores, "data": data, "memory": memory, "growth": growth, "worker": worker}[
        options.what
    ](options)


def efficiency(options: argparse.Namespace) -> None:
    """Point by point what a PPO run does, alone: stepping the emulator, the policy's passes, the gradient steps."""
    rows = [measure_parts(_config(width), options.updates, options.repeats) for width in options.widths]
    keys = ["width", "precision", "run_steps_per_s", "emulator_steps_per_s", "forward_samples_per_s"]
    publish("efficiency", rows, [*keys, "training_samples_per_s", *SUMS, "at_most"], repeats=options.repeats)


def cores(options: argparse.Namespace) -> None:
    """Alternately one run alone and two side by side, each a process of its own."""
    rows = []
    for width in options.widths:
        alone: list[float] = []
        both: list[float] = []
        for _ in range(options.repeats):
            alone += _side_by_side(width, options.updates, 1)
            both.append(sum(_side_by_side(width, options.updates, 2)))
        gain = median(two / one for one, two in zip(alone, both, strict=True))
        rows.append({"width": width, "one": median(alone), "two": median(both), "two_over_one": gain})
        rows[-1] |= {"all_one": alone, "all_two": both}
    publish("cores", rows, ["width", "one", "two", "two_over_one"], repeats=options.repeats, unit="agent steps per s")


def worker(options: argparse.Namespace) -> None:
    """Says when it is warm, begins when it is told to, and says how fast it was."""
    training = _Training(_config(options.widths[0]))
    say(inputs=True)
    sys.stdin.readline()
    say(rate=options.updates * training.config.batch_size / training.seconds(options.updates))


def data(options: argparse.Namespace) -> None:
    """The same learning loop, fed from a stored data set and with inputs that lie at hand.

    `at_most` is the share if inputs came from nowhere and had only to be written.
    """
    teacher = load_policy(TEACHER)
    rows = []
    with tempfile.TemporaryDirectory(prefix="potstill-") as folder:
        stored = _record(teacher.policy, Path(folder) / "data", options.states)
        size = sum(file.stat().st_size for file in (Path(folder) / "data").iterdir())
        for width in options.widths:
            config = DistillConfig(NetworkConfig(width), total_timesteps=10**9, lead="teacher")
            prepared = _Prepared(stored, teacher.policy, config)
            mapped, at_hand = (
                _learning(config, teacher.policy, source, options.steps) for source in (stored, prepared)
            )
            inputs = torch.empty_like(prepared.batch(None, teacher.policy, torch.float32).inputs)

            def write(inputs: Tensor = inputs) -> None:
                for _ in range(options.steps):
                    inputs.fill_(0.0)

            works: dict[str, Callable[[], object]] = {
                "mapped": partial(next, mapped),
                "prepared": partial(next, at_hand),
            }
            times = _alternately(options.repeats, **works, writing=write)
            samples = options.steps * config.batch_size
            share = median(fast / slow for fast, slow in zip(times["prepared"], times["mapped"], strict=True))
            bound = median(
                fast / (fast + least) for fast, least in zip(times["prepared"], times["writing"], strict=True)
            )
            rates = {f"{name}_samples_per_s": samples / median(times[name]) for name in works}
            precision = _named(resolve_precision(config.precision, CPU))
            rows.append({"width": width, "precision": precision, **rates, "share": share, "at_most": bound})
            rows[-1]["seconds"] = times
            rows[-1]["mb_per_100k_steps"] = size / len(stored) / 10
    keys = [
        "width",
        "precision",
        "mapped_samples_per_s",
        "prepared_samples_per_s",
        "share",
        "at_most",
        "mb_per_100k_steps",
    ]
    publish("data", rows, keys, repeats=options.repeats, states=options.states)


def memory(options: argparse.Namespace) -> None:
    """The command a user types, for as many updates as it takes to reach the peak."""
    rows = []
    for width in options.widths:
        for precision in ("float32", "bfloat16"):
            with tempfile.TemporaryDirectory(prefix="potstill-") as folder:
                steps = str(options.updates * ppo.PPOConfig().batch_size)
                command = ["-m", "potstill", "train", "--env", "pong", "--width", width, "--precision", precision]
                command += ["--total-timesteps", steps, "--threads", "1", "--evaluate", "0", "--quiet"]
                _, peak = child([*command, "--out", Path(folder) / "run"])
            rows.append({"width": width, "precision": precision, "peak_gib": peak, "peak_gb": peak * 2**30 / 1e9})
    publish("memory", rows, ["width", "precision", "peak_gib", "peak_gb"], updates=options.updates)


def growth(options: argparse.Namespace) -> None:
    """One PPO run per width with 32 environments, and per number of environments; rollouts of 4,096 samples each."""
    if not options.draw:
        settings = [(width, 32) for width in options.widths]
        settings += [(width, n) for width in ("1/16", "1/2") for n in options.num_envs if (width, n) not in settings]
        rows = []
        for width, num_envs in settings:
            config = replace(_config(width), num_envs=num_envs, num_steps=4096 // num_envs)
            row = measure_parts(config, options.updates, options.repeats)
            row |= {"run_us": 1e6 / row["run_steps_per_s"], "emulator_us": 1e6 / row["emulator_steps_per_s"]}
            row["emulator_share"] = row["emulator_us"] / row["run_us"]
            rows.append(row)
            print(f"width {width}, {num_envs} environments: {row['run_us']:.0f} us per agent step", file=sys.stderr)
        keys = ["width", "num_envs", "precision", "run_us", "emulator_us", "emulator_share"]
        publish("growth", rows, keys, repeats=options.repeats, unit="microseconds per agent step")
    with rc_context(STYLE):
        save(_growth_figure(json.loads((RESULTS / "growth.json").read_text())["runs"]), IMAGE)


def _config(width: str) -> ppo.PPOConfig:
    """Pong as `python pong.py` learns it, at this width, without an end."""
    return ppo.PPOConfig(network=NetworkConfig(width), total_timesteps=10**9)


class _Training:
    """A PPO run past its first update, which allocates and warms up."""

    def __init__(self, config: ppo.PPOConfig) -> None:
        self.config = config
        self.envs = Envs(config.env, config.num_envs)
        self.state = ppo.start(config, self.envs, CPU)
        self._steps = ppo.train(config, self.state, self.envs)
        next(self._steps)

    def seconds(self, updates: int) -> float:
        begin = time.perf_counter()
        for _ in range(updates):
            next(self._steps)
        return time.perf_counter() - begin


def measure_parts(config: ppo.PPOConfig, updates: int, repeats: int) -> Row:
    """A run's rate, its parts' rates and the sum of the parts' times as a share of the run's.

    The parts hold nothing but what they are named for: the emulator without our class around it, passes over one batch
    that lies at hand, a loss of two means. Beside them what a run that keeps its inputs cannot do without: it copies as
    many bytes, each vector step's to where they are kept and each minibatch's to one place. And what makes a loop of
    these parts PPO: frames normalised and stacked, actions sampled and advantages, the loss on given logits and the
    clipping of gradients.
    """
    training = _Training(config)
    dtype = resolve_precision(config.precision, CPU)
    policy = deepcopy(training.state.policy)
    optimizer = Adam(policy, config.learning_rate, eps=1e-5)
    vector_steps, minibatches = updates * config.num_steps, updates * config.epochs * config.batch_size
    minibatches //= config.minibatch_size
    with closing(training.envs), closing(_emulator(config)) as emulator:
        seen, _ = emulator.reset(seed=0)
        inputs = policy.prepare(torch.from_numpy(seen), dtype)
        copies = math.ceil(config.minibatch_size / config.num_envs)
        minibatch = inputs.repeat(copies, 1, 1, 1)[: config.minibatch_size].contiguous(
            memory_format=torch.channels_last
        )
        chosen = np.random.default_rng(0).integers(0, training.envs.num_actions, (vector_steps, config.num_envs))

        def step() -> None:
            for actions in training.envs.own_actions(chosen):
                emulator.step(actions)

        @torch.no_grad()
        def forward() -> None:
            for _ in range(vector_steps + updates):  # each rollout ends with the value of what follows it
                policy.heads(inputs)

        def train() -> None:
            for _ in range(minibatches):
                logits, values = policy.heads(minibatch)
                optimizer.zero_grad()
                (logits.square().mean() + values.square().mean()).backward()
                optimizer.step()

        kept = _like_inputs(inputs, config.num_steps).copy_(inputs)
        flat = kept.permute(0, 1, 3, 4, 2).flatten(0, 1)
        gathered = torch.empty_like(flat[: config.minibatch_size])
        order = torch.randperm(config.batch_size)[: config.minibatch_size]
        pairs = [(t % config.num_steps, (t - 1) % config.num_steps) for t in range(vector_steps)]

        def move() -> None:
            for to, before in pairs:
                kept[to].copy_(kept[before])

        def gather() -> None:
            for _ in range(minibatches):
                torch.index_select(flat, 0, order, out=gathered)

        def bare() -> None:
            for begin in range(0, vector_steps, config.num_steps):
                with torch.no_grad():
                    for to, before in pairs[begin : begin + config.num_steps]:
                        policy.heads(kept[to])
                        emulator.step(training.envs.own_actions(chosen[begin + to]))
                        kept[to].copy_(kept[before])
                    policy.heads(inputs)
                for _ in range(minibatches // updates):
                    torch.index_select(flat, 0, order, out=gathered)
                    logits, values = policy.heads(_as_inputs(gathered))
                    optimizer.zero_grad()
                    (logits.square().mean() + values.square().mean()).backward()
                    optimizer.step()

        preparer = Preparer(policy, dtype)
        with closing(Envs(config.env, config.num_envs)) as others:  # the run's own must not be stepped behind its back
            others.reset(seed=0)
            shown = others.step(chosen[0])

        @torch.no_grad()
        def frames() -> None:
            for to, before in pairs:
                preparer.following(kept[before], shown, kept[to])

        kind, generator = policy.distribution, torch.Generator().manual_seed(0)
        logits, values = (head.detach() for head in policy.heads(minibatch))
        rewards, dones = torch.zeros((2, config.num_steps, config.num_envs))
        of_rollout = torch.zeros((config.num_steps + 1, config.num_envs))

        @torch.no_grad()
        def choose() -> None:
            few = logits[: config.num_envs]
            for _ in range(vector_steps):
                kind.log_prob_and_entropy(few, kind.sample(few, generator))
            for _ in range(updates):
                ppo.gae(rewards, of_rollout, dones, config.gamma, config.gae_lambda)

        taken = kind.sample(logits, generator)
        before, _ = kind.log_prob_and_entropy(logits, taken)

        def lose() -> None:
            for _ in range(minibatches):
                heads = logits.requires_grad_(), values.requires_grad_()
                log_probs, entropies = kind.log_prob_and_entropy(heads[0], taken)
                ratio, advantage = (log_probs - before).exp(), values.detach()
                clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
                policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
                (policy_loss + (heads[1] - advantage).square().mean() - entropies.mean()).backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm).isfinite().item()

        times = _alternately(
            repeats,
            run=lambda: training.seconds(updates),
            emulator=step,
            forward=forward,
            training=train,
            moving=move,
            gathering=gather,
            frames=frames,
            choosing=choose,
            loss=lose,
            bare=bare,
        )
    steps = updates * config.batch_size
    counts = {
        "run_steps": steps,
        "emulator_steps": steps,
        "forward_samples": (vector_steps + updates) * config.num_envs,
    }
    counts["training_samples"] = minibatches * config.minibatch_size
    rates = {f"{name}_per_s": count / median(times[name.split("_")[0]]) for name, count in counts.items()}
    facts = {"width": config.network.width, "num_envs": config.num_envs, "precision": _named(dtype)}
    shares = {
        name: median(sum(each) / whole for *each, whole in zip(*(times[part] for part in (*of, "run")), strict=True))
        for name, of in SUMS.items()
    }
    at_most = median(
        sum(each) / whole for *each, whole in zip(*(times[part] for part in (*PARTS, "bare")), strict=True)
    )
    return {**facts, **rates, **shares, "at_most": at_most, "seconds": times}


def _growth_figure(rows: list[Row]) -> Figure:
    """Cost of an agent step: against width on the left, against the number of environments on the right."""
    figure = Figure(figsize=(WIDTH, 3.6))
    left, right = figure.subplots(1, 2, sharey=True)
    figure.suptitle(
        "What one agent step of a PPO run costs, Pong, one thread\n", x=0.015, ha="left", fontsize=13, fontweight="bold"
    )
    note = "grey: the emulator alone, the floor below which no network can push a run"
    figure.text(0.015, 1 - 0.35 / figure.get_figheight(), note, va="top", fontsize=9, color=GREY)
    widths = sorted((row for row in rows if row["num_envs"] == 32), key=lambda row: float(Fraction(row["width"])))
    at = range(len(widths))
    left.plot(at, [row["run_us"] for row in widths], color=ARMS["rl"].colour, marker="o")
    left.set_xticks(at, [row["width"] for row in widths])
    left.set_xlabel("width, 32 environments")
    left.set_ylabel("microseconds per agent step")
    floors = [(left, at, widths)]
    for width, arm in (("1/16", "distill-teacher"), ("1/2", "distill-student")):
        of_width = sorted((row for row in rows if row["width"] == width), key=lambda row: int(row["num_envs"]))
        numbers = [row["num_envs"] for row in of_width]
        at = range(len(numbers))
        right.plot(
            at, [row["run_us"] for row in of_width], color=ARMS[arm].colour, marker=ARMS[arm].marker, label=width
        )
        right.set_xticks(at, numbers)
    right.set_xlabel("environments, rollouts of 4,096 samples")
    right.legend(title="width", frameon=False)
    floors.append((right, at, of_width))
    for ax, places, of in floors:
        floor = [row["emulator_us"] for row in of]
        ax.fill_between(places, floor, color="#999999", alpha=0.35, linewidth=0)
        ax.plot(places, floor, color=GREY, linewidth=1.0)
        ax.set_ylim(bottom=0.0)
    return figure


def _alternately(repeats: int, **work: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each piece of work, the pieces in turns; a first round only warms up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, do in work.items():
            begin = time.perf_counter()
            do()
            if repeat:
                times[name].append(time.perf_counter() - begin)
    return times


def _emulator(config: ppo.PPOConfig) -> AtariVectorEnv:
    env = config.env
    return AtariVectorEnv(
        env.id,
        config.num_envs,
        num_threads=1,
        repeat_action_probability=env.sticky,
        frameskip=env.frame_skip,
        stack_num=env.frame_stack,
        noop_max=env.noop_max,
        use_fire_reset=env.fire_on_reset,
        max_num_frames_per_episode=env.max_frames,
        reward_clipping=False,
        episodic_life=False,
        autoreset_mode=AutoresetMode.SAME_STEP,
    )


def _side_by_side(width: str, updates: int, runs: int) -> list[float]:
    """Agent steps per second of each of so many runs that begin at the same time."""
    command = [sys.executable, __file__, "worker", "--widths", width, "--updates", str(updates)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, **pipes) for _ in range(runs)]
    for each in workers:
        each.stdout.readline()  # type: ignore[union-attr]
    for each in workers:
        each.stdin.write("go\n")  # type: ignore[union-attr]
        each.stdin.flush()  # type: ignore[union-attr]
    return [float(json.loads(each.communicate()[0])["rate"]) for each in workers]


def _record(teacher: Policy, folder: Path, states: int) -> Dataset:
    """The teacher's play on disk, as `potstill distill --lead teacher` makes it."""
    config = DistillConfig(lead="teacher")
    with closing(Envs(ppo.PPOConfig().env, config.num_envs)) as envs:
        with new_dataset(folder, envs, states, {}) as data:
            for _ in record(config, teacher, envs, data, seed=0):
                pass
        return open_dataset(folder, envs)


class _Prepared:
    """Stands in for a data set whose minibatches are prepared already: eight of them, in turns."""

    def __init__(self, data: Dataset, policy: Policy, config: DistillConfig) -> None:
        generator, dtype = torch.Generator().manual_seed(0), resolve_precision(config.precision, CPU)
        draws = (data.draw(config.batch_size, generator) for _ in range(8))
        self._batches = [data.batch(drawn, policy, dtype) for drawn in draws]
        self._next = 0

    def draw(self, count: int, generator: torch.Generator) -> None:
        self._next += 1

    def batch(self, positions: None, policy: Policy, dtype: torch.dtype) -> Batch:
        return self._batches[self._next % len(self._batches)]


def _learning(config: DistillConfig, teacher: Policy, source: Dataset | _Prepared, every: int) -> Iterator[Progress]:
    """Each `next` takes `every` gradient steps."""
    return distill_from(config, start(config, teacher, CPU), cast(Dataset, source), every)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
