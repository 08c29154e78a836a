"""python figures/covariate_shift.py FOLDER [--arms ARM ...] [--out FILE]"""

from potstill.report.scaling_figures import covariate_shift
from potstill.report.script import main

if __name__ == "__main__":
    main(covariate_shift)
