"""python figures/budgets.py FOLDER [--arms ARM ...] [--out FILE]"""

from potstill.report.scaling_figures import budgets
from potstill.report.script import main_of_study

if __name__ == "__main__":
    main_of_study(budgets)
