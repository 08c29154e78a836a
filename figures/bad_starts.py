"""python figures/bad_starts.py FOLDER [--arms ARM ...] [--out FILE]"""

from potstill.report.scaling_figures import bad_starts
from potstill.report.script import main_of_study

if __name__ == "__main__":
    main_of_study(bad_starts)
