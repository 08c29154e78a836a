"""Trains on a GPU, and holds it against the CPU: `make gpu-check`.

CartPole, and 0.2M steps of Pong, on each of the two; prints steps per second, scores, and how far logits lie apart.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

import potstill as ps
from potstill.envs import Envs
from potstill.errors import InputError
from potstill.networks import resolve_device
from potstill.policies import load_policy

APART = 1e-3  # of two logits of one state, and as a share of them: as a policy's file is checked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cartpole", type=int, default=60_000, help="agent steps")
    parser.add_argument("--pong", type=int, default=200_000, help="agent steps")
    options = parser.parse_args()
    resolve_device(options.device)
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(f"torch {torch.__version__}, {name}")
    apart = False
    with TemporaryDirectory(prefix="potstill-") as folder:
        for task in ("cartpole", "pong"):
            for where, device in (("here", "cpu"), ("there", options.device)):
                out, steps = Path(folder) / f"{task}-{where}", getattr(options, task)
                run = ps.train(task, total_timesteps=steps, episodes=20, secondary_games=0, device=device, out=out)
                rate = run.result["env_steps"] / run.result["wall_seconds"]
                print(f"{task} on {device}: {rate:,.0f} agent steps/s, score {run.result['score']:.1f} over 20 games")
            difference, bound = _difference(out, options.device)
            print(f"{task}: logits on {options.device} and on the CPU lie {difference:.2g} apart, {bound:.2g} allowed")
            apart |= not difference <= bound
    if apart:
        sys.exit("the GPU computes something else")


def _difference(run: Path, device: str) -> tuple[float, float]:
    """The largest difference between logits on the CPU and on `device`, over 512 states of random play; what may be."""
    cpu, other = (load_policy(run, where) for where in ("cpu", device))
    envs = Envs(cpu.env, 16)
    envs.reset(0)
    rng = np.random.default_rng(0)
    states = torch.from_numpy(np.concatenate([envs.step(envs.random_actions(rng)).observations for _ in range(32)]))
    with torch.no_grad():
        here, there = cpu.policy(states)[0], other.policy(states.to(device))[0].cpu()
    return (here - there).abs().max().item(), APART * (1.0 + here.abs().max().item())


if __name__ == "__main__":
    try:
        main()
    except InputError as error:  # no such device
        sys.exit(str(error))
