"""python figures/learning_curves.py FOLDER [--arms ARM ...] [--out FILE]"""

from potstill.report.scaling_figures import learning_curves
from potstill.report.script import main

if __name__ == "__main__":
    main(learning_curves)
