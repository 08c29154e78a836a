"""python figures/size_ratios.py FOLDER [--arms ARM ...] [--out FILE]"""

from potstill.report.scaling_figures import size_ratios
from potstill.report.script import main

if __name__ == "__main__":
    main(size_ratios)
