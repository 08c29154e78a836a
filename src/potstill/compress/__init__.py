"""The smallest student that keeps a share of its teacher's score: distil a few shapes, screen, confirm, go on downward.

Screening is cheap and decides where to look; it proves nothing. What is claimed rests on confirmations with fresh
games of the students that screening chose, which share one error rate.

Read `search.py` first. `config.py` says what may be asked for, `shapes.py` what is tried, `choice.py` what
comes next, `confirmation.py` has the test, `budget.py` minds the clock, `outcome.py` writes what was found.
"""
