"""Runs several distillations and compares them; logs in distill_run/. `--help` lists the options."""

import sys

from potstill.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
