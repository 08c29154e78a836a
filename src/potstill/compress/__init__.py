"""The smallest student that keeps a share of its teacher's score: distil a few widths, bracket, bisect, confirm.

Screening is cheap and decides where to look; it proves nothing. What is claimed rests on a confirmation with fresh
games of the one student that screening chose, and on as many more confirmations as it takes, each at a stricter level.

Read `search.py` first. `config.py` says what may be asked for, `confirmation.py` has the test, `budget.py` minds the
clock, `outcome.py` writes what was found.
"""
