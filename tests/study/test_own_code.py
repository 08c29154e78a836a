"""A study of a user's own task, network and loss comes to the same table here, on Ray and by two processes at once."""

import pytest
import ray
from polars.testing import assert_frame_equal
from processes import Child, warm

import potstill as ps
from potstill import imports
from potstill.cli import main
from potstill.results import runs_table

pytestmark = pytest.mark.timeout(600)

MINE = '''
import gymnasium, numpy as np, torch
from gymnasium import spaces

class Errand(gymnasium.Env):
    """Fetch a key, then reach a door, on a board of 5 x 5. The observation is a Dict of places and a flag."""

    action_space = spaces.MultiDiscrete([2, 2])
    observation_space = spaces.Dict({"places": spaces.Box(0, 4, (6,), np.float32), "has_key": spaces.Discrete(2)})

    def _observe(self):
        return {"places": np.concatenate([self.me, self.key, self.door]).astype(np.float32), "has_key": int(self.has)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        places = self.np_random.choice(25, 3, replace=False)
        self.me, self.key, self.door = (np.array(divmod(int(place), 5)) for place in places)
        self.has, self.t = False, 0
        return self._observe(), {}

    def step(self, action):
        axis, forward = int(action[0]), int(action[1])
        self.me[axis] = np.clip(self.me[axis] + 2 * forward - 1, 0, 4)
        self.t += 1
        found = not self.has and (self.me == self.key).all()
        self.has = bool(self.has or found)
        over = bool(self.has and (self.me == self.door).all())
        return self._observe(), 0.5 * found + over, over, self.t >= 20, {}

gymnasium.register("Mine/Errand-v0", entry_point=Errand)

class Gated(torch.nn.Module):
    def __init__(self, inputs, units):
        super().__init__()
        self.value, self.gate = torch.nn.Linear(inputs, units), torch.nn.Linear(inputs, units)

    def forward(self, x):
        return torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x))

def gated(shape, width, units="32"):
    return Gated(shape[0], max(2, round(int(units) * width)))

def hellinger(student, teacher, temperature):
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return 1 - (p * q).sqrt().sum(-1)
'''
PLAN = """
imports = ["./mine.py"]
env = "Mine/Errand-v0"
widths = ["1/4"]
seeds = [0]
teachers = ["teacher"]

[evaluation]
episodes = 4

[arms.rl]
network = "mine:gated"
network-options = {{ units = 16 }}
{small}
minibatch-size = 64
num-steps = 16
anneal-from = 0.5
branch = ["1/2"]

[arms.student]
method = "distill"
network = "mine:gated"
objective = "mine:hellinger"
{small}
warmup-steps = 64
batch-size = 32
""".format(small="total-timesteps = 512\nnum-envs = 8")
MEASURED = ["wall_seconds", "latency_ms", "latency_p95_ms", "command", "machine"]


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # a cluster that nobody asked for
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "plan.toml").write_text(PLAN)
    imports.import_modules([str(tmp_path / "mine.py")])
    ps.train("Mine/Errand-v0", out=tmp_path / "teacher", total_timesteps=256, num_envs=4, num_steps=32,
             minibatch_size=64, episodes=4, quiet=True, threads=1)  # fmt: skip
    yield tmp_path / "plan.toml"
    ray.shutdown()


def test_a_task_a_network_and_a_loss_of_ones_own_give_one_table_wherever_the_study_runs(plan, tmp_path):
    words = ["study", "run", str(plan), "--quiet", "--workers", "2", "--out"]
    main([*words, str(tmp_path / "here")])
    main([*words, str(tmp_path / "ray"), "--executor", "ray"])
    shared = [*words, str(tmp_path / "shared")]
    both = [Child(warm, *shared, output=tmp_path / f"{number}.log") for number in range(2)]
    assert [child.wait(300) for child in both] == [0, 0], [child.said for child in both]
    here, there, shared = (runs_table(tmp_path / name).drop(MEASURED) for name in ("here", "ray", "shared"))
    assert here["status"].to_list() == ["done"] * 3
    assert here["branch"].to_list() == [None, "1/2", None]
    assert set(here["objective"]) == {None, "mine:hellinger"}
    assert_frame_equal(there, here)
    assert_frame_equal(shared, here)
