"""python figures/agreement_score.py FOLDER_OR_CSV [--arms ARM ...] [--out FILE]"""

from potstill.report.figures import agreement_score
from potstill.report.script import main
from potstill.results import TABLE

if __name__ == "__main__":
    main(agreement_score, TABLE)
