"""python figures/growth.py FOLDER [--arms ARM ...] [--out FILE]"""

from potstill.report.scaling_figures import growth
from potstill.report.script import main

if __name__ == "__main__":
    main(growth)
