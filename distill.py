"""Distils a saved expert into a smaller student; logs in distill_run/. `python distill.py --help` lists the options."""

import sys

from potstill.cli import main

if __name__ == "__main__":
    main(["distill", *sys.argv[1:]])
