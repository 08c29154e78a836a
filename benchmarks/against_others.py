"""PPO against others' on Pong, side by side, on the same cores.

python benchmarks/against_others.py speed      the same network and settings: agent steps per second, peak memory, and
                                               what the emulator and the network alone would allow
python benchmarks/against_others.py --to 15    each at its own defaults, on one core: minutes to that mean of the last
                                               100 games

Run it on an otherwise quiet machine. Stable-Baselines3 plays in the environments its own `make_atari_env` makes, under
sticky actions (0.25) as ours, with the settings of RL Zoo's `atari` entry. `--to` keeps what it knows every minute: a
run cut short gives a lower bound. `--cleanrl` takes CleanRL's `ppo_atari_envpool.py` as it is, for `speed`. It has no
sticky actions. Its environment, once:

python -m venv cleanrl
cleanrl/bin/pip install envpool==0.8.4 gym==0.23.1 "setuptools<81" "numpy<2" torch tyro tensorboard
"""

import argparse
import math
import os
import resource
import subprocess
import time
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import Row, child, commit, one_thread, others, publish, save, say, sb3_pong
from throughput import measure_parts

from potstill import ppo
from potstill.envs import Envs
from potstill.networks import NetworkConfig, resolve_precision
from potstill.tasks import TASKS

STICKY = 0.25
#: RL Zoo's settings, all six actions and the scoreboard seen, as Stable-Baselines3 plays.
SAME = ppo.PPOConfig(
    env=replace(TASKS["pong"].env, actions=None, hidden_rows=0, sticky=STICKY),
    network=NetworkConfig("1"),
    total_timesteps=10**9,
    num_envs=8,
    num_steps=128,
    epochs=4,
    minibatch_size=256,
    learning_rate=2.5e-4,
    max_learning_rate=2.5e-4,
    clip=0.1,
    entropy=0.01,
    value_coefficient=0.5,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", nargs="?", choices=("speed", "ours", "sb3", "cleanrl", "parts"), help="all but speed: what it starts"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--updates", type=int, default=8, help="rollouts and updates per measurement of speed")
    parser.add_argument("--cores", type=int, nargs="+", default=[1], help="to measure speed on; ours overlaps on two")
    parser.add_argument("--cleanrl", type=Path, help="its ppo_atari_envpool.py, to be measured too")
    parser.add_argument("--cleanrl-python", type=Path, help="the Python that it runs under")
    parser.add_argument("--to", type=float, help="mean of the last 100 games to wait for")
    parser.add_argument("--limit-minutes", type=float, default=180.0, help="of each run to that mean")
    parser.add_argument("--who", nargs="+", choices=("ours", "sb3"), default=["ours", "sb3"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of our runs; sb3 has one, with seed 0")
    options = parser.parse_args()
    if options.cleanrl and not options.cleanrl_python:
        parser.error("say --cleanrl-python too")
    if options.what in ("ours", "sb3", "cleanrl", "parts"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores[0]])
        one_thread()
        runs = {
            ("parts", False): our_parts,
            ("ours", False): our_speed,
            ("ours", True): our_time,
            ("sb3", False): sb3_speed,
            ("cleanrl", False): cleanrl_speed,
            ("sb3", True): sb3_time,
        }
        runs[options.what, options.to is not None](options)
    elif options.to is not None:
        time_to(options)
    elif options.what == "speed":
        speed(options)
    else:
        parser.error("say speed, or --to 15")


def speed(options: argparse.Namespace) -> None:
    """Alternately, each time in a process of its own."""
    table = []
    for cores in options.cores:
        how = ["--updates", str(options.updates), "--cores", str(cores)]
        measured: dict[str, list[Row]] = {"ours": [], "sb3": []}
        if options.cleanrl:
            measured["cleanrl"] = []
            how += ["--cleanrl", str(options.cleanrl.absolute())]
            how += ["--cleanrl-python", str(options.cleanrl_python.absolute())]
        for _ in range(options.repeats):
            for who, rows in measured.items():
                printed, peak = child([__file__, who, *how])
                rows.append({"peak_gib": peak} | printed[-1])
        for who, rows in measured.items():
            medians = {key: median(row[key] for row in rows) for key in ("steps_per_s", "peak_gib")}
            pairs = zip(measured["ours"], rows, strict=True)
            ratio = median(ours["steps_per_s"] / row["steps_per_s"] for ours, row in pairs)
            facts = {"who": who, "cores": cores, "precision": rows[0]["precision"], "ours_over_it": ratio}
            table.append({**facts, **medians, "all": rows})
    # What the steps of ours cost at least: with the same kernels, no loop around them is faster.
    parts = child([__file__, "parts", "--updates", str(options.updates), "--repeats", str(options.repeats)])[0][-1]
    table.append({"who": "sum of the parts of ours", "cores": 1, **parts})
    keys = ["who", "cores", "precision", "steps_per_s", "ours_over_it", "peak_gib"]
    publish("against_others_speed", table, keys, repeats=options.repeats)


def our_speed(options: argparse.Namespace) -> None:
    config = replace(SAME, overlap=options.cores[0] > 1)
    with closing(Envs(config.env, config.num_envs)) as envs:
        training = ppo.train(config, ppo.start(config, envs, torch.device("cpu")), envs)
        next(training)
        begin = time.perf_counter()
        for _ in range(options.updates):
            next(training)
        took = time.perf_counter() - begin
    precision = str(resolve_precision(SAME.precision, torch.device("cpu"))).removeprefix("torch.")
    say(steps_per_s=options.updates * SAME.batch_size / took, precision=precision)


def our_parts(options: argparse.Namespace) -> None:
    row = measure_parts(SAME, options.updates, options.repeats)
    say(steps_per_s=row["run_steps_per_s"] / row["parts_of_run"], **row)


def sb3_speed(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.cores[0])
    begins: list[float] = []

    def note(steps: int, score: float) -> bool:
        begins.append(time.perf_counter())
        return True

    _train_sb3((options.updates + 1) * SAME.batch_size, note)
    say(steps_per_s=options.updates * SAME.batch_size / (begins[-1] - begins[1]), precision="float32")


def cleanrl_speed(options: argparse.Namespace) -> None:
    """From the end of its first update to the end of its last, each of which it prints."""
    settings = {
        "env-id": "Pong-v5",
        "total-timesteps": (options.updates + 1) * SAME.batch_size,
        "num-envs": SAME.num_envs,
        "num-steps": SAME.num_steps,
        "num-minibatches": SAME.batch_size // SAME.minibatch_size,
        "update-epochs": SAME.epochs,
    }
    command = [str(options.cleanrl_python), "-u", str(options.cleanrl), "--no-cuda"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    threads = os.environ | {"OMP_NUM_THREADS": str(options.cores[0])}
    with TemporaryDirectory(prefix="potstill-") as folder:  # it writes its curves where it stands
        with subprocess.Popen(command, cwd=folder, env=threads, stdout=subprocess.PIPE, text=True) as process:
            ends = [time.perf_counter() for line in process.stdout or () if line.startswith("SPS:")]
        if process.returncode:
            raise SystemExit(f"{options.cleanrl} failed")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    say(steps_per_s=options.updates * SAME.batch_size / (ends[-1] - ends[0]), precision="float32", peak_gib=peak)


def time_to(options: argparse.Namespace) -> None:
    """One run after the other; the records of earlier calls stay where this one makes no new ones."""
    name = f"against_others_to_{options.to:g}"
    rows: list[Row] = []
    for who in options.who:
        for seed in options.seeds if who == "ours" else [0]:
            limits = ["--to", str(options.to), "--limit-minutes", str(options.limit_minutes)]

            def keep(row: Row, who: str = who, seed: int = seed) -> None:
                print(f"{who}, seed {seed}: {row['score']} after {row['minutes']:.1f} minutes", flush=True)
                before = others(name, who, seed)
                save(name, [*before, {"who": who, "seed": seed, "commit": commit(), **row}], to=options.to)

            printed, peak = child([__file__, who, "--seeds", str(seed), *limits], each=keep)
            row = {"who": who, "seed": seed, "commit": commit(), **printed[-1], "peak_gib": peak}
            rows = [*others(name, who, seed), row]
            save(name, rows, to=options.to)
    rows.sort(key=itemgetter("who", "seed"))
    publish(name, rows, ["who", "seed", "reached", "minutes", "steps", "score", "peak_gib", "commit"], to=options.to)


def our_time(options: argparse.Namespace) -> None:
    """What `python pong.py --seed S --threads 1` does, until the score is there."""
    report = _Report(options)
    config = ppo.PPOConfig(seed=options.seeds[0])
    with closing(Envs(config.env, config.num_envs)) as envs:
        training = ppo.train(config, ppo.start(config, envs, torch.device("cpu")), envs)
        for progress in training:
            if not report(progress.step, progress.score if progress.games >= 100 else math.nan):
                break
    report.say()


def sb3_time(options: argparse.Namespace) -> None:
    import stable_baselines3  # noqa: F401  # ours is imported before its clock starts, too

    report = _Report(options)
    _train_sb3(10_000_000, report)  # RL Zoo's budget, along which rate and clipping range fall
    report.say()


class _Report:
    """Says once a minute how far a run is; called after each update, tells whether the run should go on."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._target, self._limit = options.to, options.limit_minutes
        self._begin, self._said = time.perf_counter(), 0.0
        self._row: Row = {}

    def __call__(self, steps: int, score: float) -> bool:
        minutes = (time.perf_counter() - self._begin) / 60
        reached = score >= self._target
        score_or_none = None if math.isnan(score) else score
        self._row = {"reached": reached, "minutes": minutes, "steps": steps, "score": score_or_none}
        if minutes - self._said >= 1.0:
            self._said = minutes
            self.say()
        return not reached and minutes < self._limit

    def say(self) -> None:
        say(**self._row)


def _train_sb3(total_timesteps: int, each: Callable[[int, float], bool]) -> None:
    """Trains as RL Zoo does.

    Args:
        each: called before each rollout and at the end with the agent steps so far and the mean score of the last 100
            games (nan before there are as many); what it returns says whether to go on.
    """
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.utils import LinearSchedule

    class Watch(BaseCallback):
        go_on = True

        def _on_rollout_start(self) -> None:
            games: Collection[dict[str, Any]] = self.model.ep_info_buffer or []
            score = float(np.mean([game["r"] for game in games])) if len(games) >= 100 else math.nan
            self.go_on = each(self.num_timesteps, score)

        def _on_training_end(self) -> None:
            self._on_rollout_start()

        def _on_step(self) -> bool:
            return self.go_on

    venv = sb3_pong(SAME.num_envs, STICKY, seed=0)
    model = PPO(
        "CnnPolicy",
        venv,
        learning_rate=LinearSchedule(SAME.learning_rate, 0.0, 1.0),
        n_steps=SAME.num_steps,
        batch_size=SAME.minibatch_size,
        n_epochs=SAME.epochs,
        clip_range=LinearSchedule(SAME.clip, 0.0, 1.0),
        ent_coef=SAME.entropy,
        vf_coef=SAME.value_coefficient,
        seed=0,
        device="cpu",
    )
    model.learn(total_timesteps, callback=Watch())


if __name__ == "__main__":
    main()
