"""A plan with three arms, one of which changes a width, and one of which begins with another's policies."""

PLAN = """\
env = "cartpole"
widths = ["1/8", "1/16"]
seeds = [3, 4]
teachers = ["experts/a", "experts/b"]

[evaluation]
episodes = 20
starts = [50]

[arms.rl]
total-timesteps = 8192

[arms.rl.width."1/16"]
max-learning-rate = 1e-2

[arms.distill-student]
seeds = [3]
value-coefficient = 1

[arms.finetune]
from = "distill-student"
seeds = [3]
"""
