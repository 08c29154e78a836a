"""python figures/differences.py FOLDER [--arms ARM ...] [--out FILE]"""

from potstill.report.scaling_figures import differences
from potstill.report.script import main

if __name__ == "__main__":
    main(differences)
