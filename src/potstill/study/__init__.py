"""A grid of runs: what to run, and running it on all cores."""
