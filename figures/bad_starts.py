"""python figures/bad_starts.py FOLDER [--arms ARM ...] [--out FILE]"""

from potstill.report.scaling_figures import bad_starts
from potstill.report.script import main

if __name__ == "__main__":
    main(bad_starts)
