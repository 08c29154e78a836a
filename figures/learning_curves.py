"""python figures/learning_curves.py FOLDER_OR_CSV [--arms ARM ...] [--out FILE]"""

from potstill.report.figures import learning_curves
from potstill.report.script import main
from potstill.results import CURVES

if __name__ == "__main__":
    main(learning_curves, CURVES)
