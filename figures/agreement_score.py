"""python figures/agreement_score.py FOLDER [--arms ARM ...] [--out FILE]"""

from potstill.report.scaling_figures import agreement_score
from potstill.report.script import main

if __name__ == "__main__":
    main(agreement_score)
