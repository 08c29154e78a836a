"""python figures/learning_costs.py FOLDER [--arms ARM ...] [--out FILE]"""

from potstill.report.scaling_figures import learning_costs
from potstill.report.script import main_of_study

if __name__ == "__main__":
    main_of_study(learning_costs)
