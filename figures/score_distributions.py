"""python figures/score_distributions.py FOLDER [--arms ARM ...] [--out FILE]"""

from potstill.report.scaling_figures import score_distributions
from potstill.report.script import main

if __name__ == "__main__":
    main(score_distributions)
