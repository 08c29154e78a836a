"""python figures/size_score.py FOLDER [--arms ARM ...] [--out FILE]"""

from potstill.report.scaling_figures import size_score
from potstill.report.script import main

if __name__ == "__main__":
    main(size_score)
