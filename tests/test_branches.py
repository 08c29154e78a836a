"""A branch of a run is, bit for bit, the run that was planned for its share of the budget."""

import json
import signal
from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest
from processes import at
from small_runs import RUNTIME, outcome

from potstill import api
from potstill.errors import InputError
from potstill.evaluation import NOT_EVALUATED
from potstill.networks import NetworkConfig
from potstill.ppo import PPOConfig
from potstill.storage.runs import Run
from potstill.study.execute import execute
from potstill.study.planfile import read_plan
from potstill.study.records import make_record
from potstill.tasks import TASKS
from potstill.training import trainer
from potstill.training.trainer import Interrupted

SHARES = ("1/4", "1/2")
WHOLE = PPOConfig(
    env=TASKS["cartpole"].env,
    network=NetworkConfig(width="1/8"),
    total_timesteps=16 * 64,
    num_envs=4,
    num_steps=16,
    minibatch_size=32,
    epochs=2,
    anneal_from=0.75,
    average_over=0.2,
    normalise_inputs=100,
    reseed_every=5 * 64,
    precision="float32",
)
TRUNK = replace(WHOLE, branch=SHARES)


def train(config, out):
    return api.train(config.env, config=config, out=out, runtime=RUNTIME, evaluation=NOT_EVALUATED)


@pytest.fixture(scope="module", params=[False, True], ids=["in turn", "overlap"])
def whole(request):
    return replace(WHOLE, overlap=request.param)


@pytest.fixture(scope="module")
def planned(whole, tmp_path_factory):
    """What the run of each share comes to that was planned alone, and of the whole budget ("")."""
    folder = tmp_path_factory.mktemp("planned")
    alone = {share: replace(whole, total_timesteps=int(1024 * Fraction(share))) for share in SHARES} | {"": whole}
    return {share: outcome(train(config, folder / str(config.total_timesteps))) for share, config in alone.items()}


@pytest.fixture(scope="module")
def trunk(whole, tmp_path_factory):
    return train(replace(whole, branch=SHARES), tmp_path_factory.mktemp("trunk") / "run")


def test_a_branch_ends_exactly_as_the_run_planned_for_its_budget_and_costs_its_end_alone(trunk, planned):
    assert outcome(trunk) == planned[""]
    assert [branch.path.name for branch in trunk.branches] == ["run_branch-1_4", "run_branch-1_2"]
    for share, branch in zip(SHARES, trunk.branches, strict=True):
        assert outcome(branch) == planned[share]
        assert (branch.result["branch"], branch.result["env_steps"]) == (share, int(1024 * Fraction(share)))
    assert "branch" not in trunk.result
    for run in (trunk, *trunk.branches):  # what was kept for a branch is in it
        assert sorted(path.name for path in run.path.iterdir()) == [
            "config.json", "metrics.jsonl", "policy.safetensors", "result.json",
        ]  # fmt: skip


@pytest.mark.parametrize(
    "line", [3, 5, 6, 16, 17]
)  # at the first fork, at a new game's start, at the second, in branches
def test_a_trunk_and_its_branches_that_are_interrupted_end_as_they_would(line, whole, planned, tmp_path, monkeypatch):
    stop = partial(signal.raise_signal, signal.SIGINT)
    with monkeypatch.context() as patch:
        at("potstill.telemetry.Metrics.write", line, stop, after=True, patch=patch.setattr)
        with pytest.raises(Interrupted, match=rf"--resume {tmp_path / 'run'}$"):
            train(replace(whole, branch=SHARES), tmp_path / "run")
    run = api.resume(tmp_path / "run", runtime=RUNTIME, evaluation=NOT_EVALUATED)
    assert [outcome(each) for each in (run, *run.branches)] == [planned[share] for share in ("", *SHARES)]
    with pytest.raises(InputError, match="is finished"):
        api.resume(tmp_path / "run", runtime=RUNTIME, evaluation=NOT_EVALUATED)


@pytest.mark.parametrize("state", ["lost", "damaged"])
def test_a_branch_whose_beginning_is_gone_begins_anew_and_ends_the_same(state, whole, planned, tmp_path, capsys):
    run = trainer.new_run(replace(whole, branch=SHARES), tmp_path / "run", RUNTIME)
    trainer.execute(run, RUNTIME)
    if state == "lost":
        run.branch_path("1/4").unlink()
    else:
        run.branch_path("1/4").write_bytes(run.branch_path("1/4").read_bytes()[:-1])
    branch = trainer.new_branch(run, "1/4", tmp_path / "branch")
    trainer.execute(branch, RUNTIME)
    assert outcome(branch) == planned["1/4"]
    assert ("begun again" in capsys.readouterr().err) == (state == "damaged")


def test_the_state_of_another_run_is_no_beginning(trunk, tmp_path):
    run = trainer.new_run(TRUNK, tmp_path / "run", RUNTIME)
    other = trainer.new_run(replace(TRUNK, seed=1), tmp_path / "other", RUNTIME)
    trainer.execute(other, RUNTIME)
    other.branch_path("1/4").rename(run.branch_path("1/4"))
    with pytest.raises(InputError, match=r"branch-1_4\.safetensors was saved by a run with another config"):
        trainer.new_branch(run, "1/4", tmp_path / "branch")


def test_a_branch_leaves_where_the_teacher_begins_to_weigh_less():
    assert replace(WHOLE, anneal_teacher_from=0.5).of_share("1/2").constant_updates == 4
    assert WHOLE.of_share("1/2").constant_updates == 6


@pytest.mark.parametrize(
    ("branch", "complaint"),
    [
        (("1/2", "0.5"), "none twice"),
        (("1",), "shares of the training below 1"),
        (("half",), "branch 'half' is not a number"),
        (("0.0001",), "total-timesteps must be at least 1"),
    ],
)
def test_shares_that_are_no_budgets_are_refused(branch, complaint):
    with pytest.raises(InputError, match=complaint):
        replace(WHOLE, branch=branch)


PLAN = """\
env = "cartpole"
widths = ["1/8"]
seeds = [0]
[arms.rl]
branch = ["1/4", "1/2"]
total-timesteps = 1024
num-envs = 4
num-steps = 16
minibatch-size = 32
epochs = 2
anneal-from = 0.75
average-over = 0.2
normalise-inputs = 100
reseed-every = 320
"""


def test_an_arm_with_branches_has_a_record_of_each_budget(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN)
    cells = read_plan(tmp_path / "plan.toml").specs()
    names = ["rl_width-1_8_seed-0", "rl_width-1_8_seed-0_branch-1_4", "rl_width-1_8_seed-0_branch-1_2"]
    assert [cell.name for cell in cells] == names
    (tmp_path / "plan.toml").write_text(PLAN.replace("branch", "# branch"))
    (alone,) = read_plan(tmp_path / "plan.toml").specs()
    assert alone.identity(None) == cells[0].identity(None)  # its branches change nothing of it
    ended = list(execute(cells, tmp_path / "runs", RUNTIME, workers=1))
    assert [end.error for end in ended] == [None] * 3
    records = {end.spec.name: make_record(end, tmp_path / "runs") for end in ended}
    assert {n: (r["arm"], r.get("branch"), r["env_steps"]) for n, r in records.items()} == {
        names[0]: ("rl", None, 1024), names[1]: ("rl", "1/4", 256), names[2]: ("rl", "1/2", 512),
    }  # fmt: skip
    assert json.loads((tmp_path / "runs" / names[1] / "config.json").read_text())["identity"] == cells[1].identity(None)
    assert outcome(Run.open(tmp_path / "runs" / names[1])) == outcome(train(cells[1].config, tmp_path / "alone"))
