"""python figures/iqm_by_size.py FOLDER [--arms ARM ...] [--out FILE]"""

from potstill.report.scaling_figures import iqm_by_size
from potstill.report.script import main_of_study

if __name__ == "__main__":
    main_of_study(iqm_by_size)
