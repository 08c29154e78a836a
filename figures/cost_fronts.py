"""python figures/cost_fronts.py FOLDER [--arms ARM ...] [--out FILE]"""

from potstill.report.scaling_figures import cost_fronts
from potstill.report.script import main

if __name__ == "__main__":
    main(cost_fronts)
