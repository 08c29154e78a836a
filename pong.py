"""Trains an expert from scratch with PPO; logs in pong_run/. `python pong.py --help` lists the options."""

import sys

from potstill.cli import main

if __name__ == "__main__":
    main(["train", "--env", "pong", *sys.argv[1:]])
