"""python figures/cost_fronts.py FOLDER [--arms ARM ...] [--out FILE]"""

from potstill.report.scaling_figures import cost_fronts
from potstill.report.script import main_of_study

if __name__ == "__main__":
    main_of_study(cost_fronts)
