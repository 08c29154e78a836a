"""python figures/score_distributions.py FOLDER_OR_CSV [--arms ARM ...] [--out FILE]"""

from potstill.report.figures import score_distributions
from potstill.report.script import main
from potstill.results import EPISODES

if __name__ == "__main__":
    main(score_distributions, EPISODES)
