"""Measures what a person waits for, and writes tables to benchmarks/results/.

python benchmarks/waiting.py games       an evaluation against the emulator alone, same environments and threads
python benchmarks/waiting.py minatar     PPO on MinAtar, here against an older commit
python benchmarks/waiting.py overlap     PPO on Pong, on one thread, on two, and playing while it learns
python benchmarks/waiting.py start       from Enter to a training's first update
python benchmarks/waiting.py busy        commands with and without --threads 1, while two others keep one core busy
python benchmarks/waiting.py emulator    what the pieces of an agent step and of a reset cost in ale-py

What is compared alternates; tables hold medians over --repeats. Run it on an otherwise quiet machine.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from common import ROOT, Row, one_thread, publish, say

from potstill import evaluation, ppo
from potstill.envs import EnvConfig, Envs
from potstill.networks import NetworkConfig, Policy
from potstill.policies import load_policy
from potstill.tasks import TASKS

EXPERT = ROOT / "data" / "experts" / "pong" / "seed-2"
PONG = TASKS["pong"].env
ROWS, STEPS = 25, 200  # environments, as of a hundred games; agent steps of each game, which is cut there
KINDS: dict[str, tuple[EnvConfig, dict[str, Any]]] = {
    "greedy": (PONG, {}),
    "sampled": (PONG, {"actions": "sampled"}),
    "not sticky": (replace(PONG, sticky=0.0), {}),
    "after 50 random steps": (PONG, {"start": evaluation.Start(50)}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    for each in (games, minatar, overlap, start, busy, emulator, rate):
        command = what.add_parser(each.__name__)
        command.set_defaults(run=each)
        command.add_argument("--repeats", type=int, default=5)
        if each is minatar:
            command.add_argument("--against", default="289c481", help="the older commit")
        if each is overlap:
            command.add_argument("--widths", nargs="+", default=["1/2", "1/8"])
        if each in (minatar, rate):
            command.add_argument("--tasks", nargs="+", default=["minatar-breakout", "minatar-space-invaders"])
            command.add_argument("--widths", nargs="+", default=["1/32", "1/8", "1/2"])
    options = parser.parse_args()
    options.run(options)


def games(options: argparse.Namespace) -> None:
    """Games cut at 200 agent steps, so that none waits for another; and a hundred whole ones, some of which do."""
    one_thread()
    expert = load_policy(EXPERT).policy
    student = Policy(NetworkConfig("1/8"), **expert.spaces).initialise(torch.Generator().manual_seed(0))
    student.normalise_as(expert)
    rows = []
    for threads in (1, 2):
        for name, (env, how) in KINDS.items():
            rows.append(_games(student, "1/8", name, replace(env, max_frames=4 * STEPS), threads, options, how))
        rows.append(_games(expert, "1/2", "greedy", replace(PONG, max_frames=4 * STEPS), threads, options, {}))
        rows.append(_games(expert, "1/2", "greedy, whole games", PONG, threads, options, {"episodes": 4 * ROWS}))
    keys = ["width", "games", "threads", "evaluation_steps_per_s", "emulator_steps_per_s", "share"]
    publish("games", rows, keys, repeats=options.repeats, environments=ROWS)


def _games(
    policy: Policy,
    width: str,
    name: str,
    env: EnvConfig,
    threads: int,
    options: argparse.Namespace,
    how: dict[str, Any],
) -> Row:
    """The share is of agent steps per second, those of games that count."""
    how = {"episodes": ROWS, "threads": threads, "seed": 1} | how
    played, alone = [], []
    with closing(Envs(env, ROWS, threads=threads)) as envs:
        for _ in range(options.repeats if how["episodes"] == ROWS else 1):
            played.append(_played(policy, env, how))
            envs.reset(1)
            actions = envs.random_actions(np.random.default_rng(0), STEPS)
            begin = time.perf_counter()
            for each in actions:
                envs._venv.step(envs.own_actions(each))  # without our class around it
            alone.append(STEPS * ROWS / (time.perf_counter() - begin))
    share = median(mine / theirs for mine, theirs in zip(played, alone, strict=True))
    facts = {"width": width, "games": name, "threads": threads}
    return facts | {
        "evaluation_steps_per_s": median(played),
        "emulator_steps_per_s": median(alone),
        "share": share,
        "all": [played, alone],
    }


def _played(policy: Policy, env: EnvConfig, how: dict[str, Any]) -> float:
    """Agent steps per second of an evaluation once its games have begun."""
    from potstill.rollout import in_turns  # which older commits, that `rate` runs at, do not have

    begun, ended = [], []  # on several threads both halves call it

    def timed(groups: Any) -> Iterator[Any]:
        begun.append(time.perf_counter())
        yield from in_turns(groups)
        ended.append(time.perf_counter())

    with patch.object(evaluation, "in_turns", timed):
        *_, result = evaluation.play(policy, env, **how)
    return sum(episode.length for episode in result.episodes) / (max(ended) - min(begun))


def minatar(options: argparse.Namespace) -> None:
    """Each rate in a process of its own, here and at the older commit in turns."""
    rows = []
    with ExitStack() as stack:
        old = Path(stack.enter_context(TemporaryDirectory(prefix="potstill-"))) / "old"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(old), options.against], check=True)
        stack.callback(subprocess.run, [*git, "remove", "--force", str(old)], check=True)
        for task in options.tasks:
            for width in options.widths:
                both = [[_rate(tree, task, width) for tree in (old, ROOT)] for _ in range(options.repeats)]
                before, now = ([pair[k]["rate"] for pair in both] for k in (0, 1))
                gain = median(b / a for a, b in zip(before, now, strict=True))
                row = {"task": task, "width": width, "parameters": both[0][1]["parameters"]}
                rows.append(row | {"before": median(before), "now": median(now), "gain": gain, "all": [before, now]})
    keys = ["task", "width", "parameters", "before", "now", "gain"]
    publish("minatar", rows, keys, repeats=options.repeats, against=options.against, unit="agent steps per s")


def _rate(tree: Path, task: str, width: str) -> Row:
    command = [sys.executable, __file__, "rate", "--tasks", task, "--widths", width]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(tree / "src")}, stdout=subprocess.PIPE, check=True
    )
    row: Row = json.loads(done.stdout)
    return row


def rate(options: argparse.Namespace) -> None:
    """Agent steps per second of a PPO run."""
    one_thread()
    network = NetworkConfig(width=options.widths[0])
    config = replace(ppo.PPOConfig.for_task(TASKS[options.tasks[0]].env), network=network)
    say(**_training(config, 1))


def _training(config: ppo.PPOConfig, threads: int) -> Row:
    """Ten updates, past the second of them."""
    config = replace(config, total_timesteps=10**9)
    torch.set_num_threads(threads)
    with closing(Envs(config.env, config.num_envs, threads=threads)) as envs:
        state = ppo.start(config, envs, torch.device("cpu"))
        with closing(cast(Any, ppo.train(config, state, envs))) as steps:  # a thread may play them
            next(steps), next(steps)
            begin = time.perf_counter()
            for _ in range(10):
                next(steps)
            taken = time.perf_counter() - begin
    return {"rate": 10 * config.batch_size / taken, "parameters": state.policy.size().parameters}


def overlap(options: argparse.Namespace) -> None:
    """One run, three ways in turns: a core, two threads for each of its parts, and a core for each of its parts."""
    one_thread()
    rows = []
    for width in options.widths:
        config = replace(ppo.PPOConfig.for_task(PONG), network=NetworkConfig(width=width))
        ahead = replace(config, overlap=True)
        ways = [(config, 1), (config, 2), (ahead, 1)]
        taken = [[_training(*way)["rate"] for way in ways] for _ in range(options.repeats)]
        one, two, over = (median(rates) for rates in zip(*taken, strict=True))
        gains = {
            "two_over_one": median(b / a for a, b, _ in taken),
            "overlap_over_one": median(c / a for a, _, c in taken),
        }
        rows.append({"width": width, "one": one, "two": two, "overlap": over, **gains, "all": taken})
    keys = ["width", "one", "two", "overlap", "two_over_one", "overlap_over_one"]
    publish("overlap", rows, keys, repeats=options.repeats, unit="agent steps per s")


def start(options: argparse.Namespace) -> None:
    """Until the first line of metrics.jsonl, with the default of all cores and with one."""
    rows = []
    for task in ("cartpole", "minatar-breakout", "pong"):
        for threads in (0, 1):
            taken = []
            for _ in range(options.repeats):
                with TemporaryDirectory(prefix="potstill-") as folder:
                    out = Path(folder) / "run"
                    command = ["train", "--env", task, "--threads", str(threads), "--quiet", "--out", str(out)]
                    begin = time.perf_counter()
                    started = [sys.executable, "-m", "potstill", *command]
                    with subprocess.Popen(started, stderr=subprocess.DEVNULL) as process:
                        metrics = out / "metrics.jsonl"
                        while not metrics.exists() or not metrics.stat().st_size:
                            time.sleep(0.005)
                        taken.append(time.perf_counter() - begin)
                        process.terminate()
            rows.append({"task": task, "threads": threads or "all", "seconds": median(taken), "all": taken})
    publish("start", rows, ["task", "threads", "seconds"], repeats=options.repeats)


def busy(options: argparse.Namespace) -> None:
    """The default against `--threads 1`, while two endless loops share the last core."""
    expert, quick = str(EXPERT), ["--evaluate", "0"]
    commands = {
        "train pong": ["train", "--env", "pong", "--total-timesteps", "12288", *quick],
        "train cartpole": ["train", "--env", "cartpole", "--total-timesteps", "30000", *quick],
        "distill": ["distill", expert, "--total-timesteps", "12288", *quick],
        "evaluate": ["evaluate", expert, "--episodes", "6"],
    }
    rows = []
    with _loops():
        for name, command in commands.items():
            pairs = [[_seconds([*command, *more]) for more in ([], ["--threads", "1"])] for _ in range(options.repeats)]
            default, one = zip(*pairs, strict=True)
            times = {"default_s": median(default), "one_thread_s": median(one)}
            rows.append({"command": name, **times, "ratio": median(a / b for a, b in pairs), "all": pairs})
    publish("busy", rows, ["command", "default_s", "one_thread_s", "ratio"], repeats=options.repeats)


@contextmanager
def _loops() -> Iterator[None]:
    core = max(os.sched_getaffinity(0))
    loop = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    running = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(2)]
    try:
        yield
    finally:
        for each in running:
            each.kill()


def _seconds(command: Sequence[str]) -> float:
    with TemporaryDirectory(prefix="potstill-") as folder:
        out = [] if command[0] == "evaluate" else ["--out", str(Path(folder) / "run")]
        begin = time.perf_counter()
        silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([sys.executable, "-m", "potstill", *command, *out], check=True, **silent)
        return time.perf_counter() - begin


def emulator(options: argparse.Namespace) -> None:
    """Processor time. A piece is the difference of two emulators, one of which leaves it out."""
    import ale_py
    from ale_py.roms import get_rom_path

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    alone = ale_py.ALEInterface()
    rom = get_rom_path("pong")
    assert rom is not None
    alone.loadROM(rom)
    screen = np.empty((210, 160), np.uint8)

    def act() -> None:
        for _ in range(ROWS):
            for _ in range(4):
                alone.act(0)
            if alone.game_over():
                alone.reset_game()

    def grey() -> None:
        for _ in range(2 * ROWS):
            alone.getScreenGrayscale(screen)

    whole, stacked, plain, large = (
        _vector(**how)
        for how in (
            {},
            {"stack_num": 1},
            {"stack_num": 1, "maxpool": False},
            {"stack_num": 1, "img_height": 210, "img_width": 160},
        )
    )
    steps = {"act": act, "grey": grey, "all": whole, "one frame": stacked, "no max": plain, "no resize": large}
    us = {name: 1e6 * seconds / ROWS for name, seconds in _processor(options.repeats, 40, steps).items()}
    games = _atari()
    seeded, plain_reset = (_reset(games, seeds) for seeds in (np.arange(ROWS), np.full(ROWS, -1)))
    resets = _processor(options.repeats, 1, {"seeded": seeded, "unseeded": plain_reset})
    rows = [
        {"piece": "an agent step of AtariVectorEnv", "us": us["all"]},
        {"piece": "four frames emulated", "us": us["act"]},
        {"piece": "two frames to grey", "us": us["grey"]},
        {"piece": "the larger of two frames", "us": us["one frame"] - us["no max"]},
        {"piece": "area resize to 84 x 84", "us": us["one frame"] - us["no resize"]},
        {"piece": "three older frames of the stack", "us": us["all"] - us["one frame"]},
        {"piece": "a reset with a seed, which loads the ROM", "us": 1e6 * resets["seeded"] / ROWS},
        {"piece": "a reset without", "us": 1e6 * resets["unseeded"] / ROWS},
    ]
    publish("emulator", rows, ["piece", "us"], repeats=options.repeats, environments=ROWS)


def _atari(**how: Any) -> Any:
    from ale_py.vector_env import AtariVectorEnv

    return AtariVectorEnv("pong", ROWS, num_threads=1, autoreset_mode="SameStep", use_fire_reset=False, **how)


def _vector(**how: Any) -> Callable[[], None]:
    games = _atari(**how)
    games.reset(seed=np.arange(ROWS))
    return lambda: games.step(np.zeros(ROWS, np.int64)) and None


def _reset(games: Any, seeds: Any) -> Callable[[], None]:
    return lambda: games.reset(seed=seeds) and None


def _processor(repeats: int, calls: int, work: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Seconds of the processor's time for one call of each, in turns; medians."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, do in work.items():
            begin = time.process_time()
            for _ in range(calls):
                do()
            taken[name].append((time.process_time() - begin) / calls)
    return {name: median(times) for name, times in taken.items()}


if __name__ == "__main__":
    main()
