"""Distillation against the loop this project began with, to the same share of the teacher's points, one thread each.

python benchmarks/against_spec.py [--limit-minutes 120]    minutes until the student keeps 95 % of its teacher's score

The old loop: 50 environments made by Stable-Baselines3's wrappers, the student plays, and each vector step's batch of
50 is one gradient step of KL with Adam at 1e-4, then thrown away. It is written out here as one would write it by hand.
Ours is `potstill distill` with its defaults, at the same width. Each student plays 16 games from time to time,
greedily, in our environments; that is not counted in its time. Run it on an otherwise quiet machine.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import closing
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from common import ROOT, Row, child, commit, one_thread, others, publish, save, say, sb3_pong
from torch import Tensor, nn

from potstill import evaluation
from potstill.distill import DistillConfig, distill, start
from potstill.envs import EnvConfig, Envs
from potstill.networks import NetworkConfig, Policy, Trunk
from potstill.policies import LoadedPolicy, load_policy

TEACHER = ROOT / "data" / "experts" / "pong" / "seed-2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("ours", "spec"), help="what the run without it starts")
    parser.add_argument("--who", nargs="+", choices=("ours", "spec"), default=["ours", "spec"])
    parser.add_argument("--teacher", type=Path, default=TEACHER)
    parser.add_argument("--width", default="1/8")
    parser.add_argument("--keep", type=float, default=0.95, help="share of the teacher's point-win rate to reach")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--total-timesteps", type=int, default=DistillConfig().total_timesteps, help="of ours")
    parser.add_argument("--every", type=int, default=25_000, help="agent steps between evaluations")
    parser.add_argument("--games", type=int, default=16, help="games per evaluation")
    parser.add_argument("--limit-minutes", type=float, default=120.0, help="of training, evaluations not counted")
    options = parser.parse_args()
    if options.what:
        one_thread()
        _watch(options)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """One run after the other; the records of earlier calls stay where this one makes no new ones."""
    rows: list[Row] = []
    name = f"against_spec_{options.teacher.name}"
    facts = {"width": options.width, "keep": options.keep, "games": options.games}
    settings = ["--teacher", str(options.teacher.resolve()), "--width", options.width]
    settings += ["--keep", str(options.keep), "--every", str(options.every)]
    settings += ["--games", str(options.games), "--limit-minutes", str(options.limit_minutes)]
    settings += ["--total-timesteps", str(options.total_timesteps)]
    for who in options.who:
        for seed in options.seeds:
            of = {"who": who, "teacher": options.teacher.name, "seed": seed, "commit": commit()}

            def keep(row: Row, who: str = who, seed: int = seed, of: Row = of) -> None:
                print(f"{who}, seed {seed}: {row['kept']:.3f} after {row['minutes']:.1f} minutes", flush=True)
                before = others(name, who, seed)
                save(name, [*before, {**of, **row}], **facts)

            printed, peak = child([__file__, who, "--seeds", str(seed), *settings], each=keep)
            row = {**of, **printed[-1], "peak_gib": peak, "curve": printed}
            rows = [*others(name, who, seed), row]
            save(name, rows, **facts)
    keys = ["who", "teacher", "seed", "reached", "minutes", "steps", "kept", "steps_per_s", "peak_gib", "commit"]
    rows.sort(key=itemgetter("who", "seed"))
    publish(name, rows, keys, **facts)


def _watch(options: argparse.Namespace) -> None:
    """Evaluates the student as it learns, and stops it when it is good enough or out of time."""
    teacher = load_policy(options.teacher)
    goal = float(json.loads((options.teacher / "result.json").read_text())["point_win_rate"])
    learning = (_ours if options.what == "ours" else _spec)(teacher, options)
    seconds, steps, due = 0.0, 0, options.every
    begin = time.perf_counter()
    for steps, student in learning:
        so_far = seconds + time.perf_counter() - begin
        last = so_far >= 60 * options.limit_minutes or (options.what == "ours" and steps >= options.total_timesteps)
        if steps < due and not last:
            continue
        seconds = so_far
        kept = _point_win_rate(student, teacher.env, options.games) / goal
        say(reached=kept >= options.keep, minutes=seconds / 60, steps=steps, kept=kept, steps_per_s=steps / seconds)
        if kept >= options.keep or last:
            return
        due += options.every
        begin = time.perf_counter()


def _point_win_rate(student: Policy, env: EnvConfig, games: int) -> float:
    *_, played = evaluation.play(student, env, episodes=games, seed=1)
    return float(played.summary()["point_win_rate"])


def _ours(teacher: LoadedPolicy, options: argparse.Namespace) -> Iterator[tuple[int, Policy]]:
    config = DistillConfig(NetworkConfig(options.width), total_timesteps=options.total_timesteps, seed=options.seeds[0])
    with closing(Envs(teacher.env, config.num_envs)) as envs:
        state = start(config, teacher.policy, torch.device("cpu"))
        for progress in distill(config, state, teacher.policy, envs):
            yield progress.step, state.student


def _spec(teacher: LoadedPolicy, options: argparse.Namespace) -> Iterator[tuple[int, Policy]]:
    """The old loop, in plain PyTorch and in full precision."""
    torch.manual_seed(options.seeds[0])
    env = teacher.env
    venv = sb3_pong(50, env.sticky, options.seeds[0])
    own_actions = np.array(env.actions)

    shape = Policy(NetworkConfig(options.width), (4, 84, 84), len(own_actions))
    student = _nature_cnn(shape)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-4)
    divergence = nn.KLDivLoss(reduction="batchmean")
    seen = venv.reset()
    steps = 0
    while True:
        observations = torch.from_numpy(np.moveaxis(np.asarray(seen), -1, 1).copy())
        with torch.no_grad():
            wanted = teacher.policy(observations)[0].softmax(-1)
        logits = student(observations.float() / 255.0)
        loss = divergence(logits.log_softmax(-1), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        actions = torch.multinomial(logits.detach().softmax(-1), 1).squeeze(1)
        seen, _, _, _ = venv.step(own_actions[actions.numpy()])
        steps += venv.num_envs
        if steps % 1000 == 0:
            yield steps, _as_policy(student, shape, observations)


def _nature_cnn(shape: Policy) -> nn.Sequential:
    """Layers of the sizes `shape` has, with PyTorch's own initial weights."""
    layers: list[nn.Module] = []
    assert isinstance(shape.trunk, Trunk)
    for conv in shape.trunk.convs:
        assert isinstance(conv, nn.Conv2d)
        layers += [nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride), nn.ReLU()]  # type: ignore[arg-type]
    (linear,) = shape.trunk.linears
    assert isinstance(linear, nn.Linear)
    layers += [nn.Flatten(), nn.Linear(linear.in_features, linear.out_features), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(shape.actor.in_features, shape.actor.out_features))


@torch.no_grad()
def _as_policy(student: nn.Sequential, shape: Policy, observations: Tensor) -> Policy:
    """The same network where `evaluation` can play it; its normalisation is the division by 255."""
    theirs = [layer for layer in student if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert isinstance(shape.trunk, Trunk)
    ours = [*shape.trunk.convs, *shape.trunk.linears, shape.actor]
    for mine, given in zip(ours, theirs, strict=True):
        mine.load_state_dict(given.state_dict())
    shape.normalise_by(torch.zeros(84, 84), torch.full((84, 84), 255.0))
    torch.testing.assert_close(shape(observations)[0], student(observations.float() / 255.0), atol=1e-4, rtol=1e-4)
    return shape


if __name__ == "__main__":
    main()
