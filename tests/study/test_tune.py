import tomllib

import pytest

from potstill.errors import InputError
from potstill.study.planfile import read_plan
from potstill.study.tune import as_toml, choose, trials, tuning_plan

PLAN = """\
env = "cartpole"
widths = ["1/32", "1/16", "1/8", "1/2"]
seeds = [0, 1]
teachers = ["expert"]

[arms.rl]
total-timesteps = 8192
[arms.distill-student]

[tune]
seeds = [100, 101]
widths = ["1/32", "1/8"]
episodes = 8
[tune.arms.rl]
max-learning-rate = [1e-3, 4e-3, 16e-3]
[tune.arms.distill-student]
learning-rate = [1e-3, 2e-3, 4e-3]
"""


def plan_of(folder, text=PLAN):
    (folder / "plan.toml").write_text(text)
    return read_plan(folder / "plan.toml")


def records(plan, score):
    """What runs of every trial would leave, with scores made up by `score(arm, value, width, seed)`."""
    return [
        {
            "arm": trial.name,
            "width": width,
            "seed": seed,
            "score": score(trial.arm, next(iter(trial.setting.values())), width, seed),
        }
        for trial in trials(plan)
        for width in plan.tune["widths"]
        for seed in plan.tune["seeds"]
    ]


def test_every_combination_of_an_arms_values_is_a_trial(tmp_path):
    text = PLAN.replace("16e-3]", "16e-3]\nepochs = [2, 3]").replace("4e-3]\n", "4e-3]\nbatch-size = [128, 256]\n", 2)
    text = text.replace("16e-3]\nbatch-size = [128, 256]", "16e-3]")
    tried = [trial for trial in trials(plan_of(tmp_path, text)) if trial.arm == "rl"]
    assert [trial.setting for trial in tried[:3]] == [
        {"max-learning-rate": 1e-3, "epochs": 2},
        {"max-learning-rate": 1e-3, "epochs": 3},
        {"max-learning-rate": 4e-3, "epochs": 2},
    ]
    assert len(tried) == 6


def test_trials_are_a_plan_with_seeds_and_widths_of_its_own(tmp_path):
    plan = tuning_plan(plan_of(tmp_path))
    specs = {spec.name: spec for spec in plan.specs()}
    assert len(specs) == 2 * 3 * 2 * 2
    spec = specs["rl_max-learning-rate-0.004_width-1_8_seed-101"]
    assert (spec.config.max_learning_rate, spec.config.total_timesteps, spec.config.seed) == (4e-3, 8192, 101)
    assert (plan.evaluation.episodes, plan.evaluation.secondary_games) == (8, 0)


def test_the_best_mean_over_the_seeds_is_chosen_and_what_lies_between_is_interpolated(tmp_path):
    plan = plan_of(tmp_path)
    best = {"1/32": 4e-3, "1/8": 1e-3}
    made = records(plan, lambda arm, value, width, seed: seed - 100 + (5.0 if value == best[width] else 1.0))
    chosen = {choice.width: choice for choice in choose(plan, made) if choice.arm == "rl"}
    assert [chosen[width].setting["max-learning-rate"] for width in ("1/32", "1/8")] == [4e-3, 1e-3]
    assert chosen["1/32"].scores["rl_max-learning-rate-0.004"] == 5.5
    assert chosen["1/16"].setting == {"max-learning-rate": 2e-3}  # the geometric mean of 4e-3 and 1e-3, half way
    assert chosen["1/2"].setting == {"max-learning-rate": 1e-3}  # beyond the tuned widths: the nearest
    assert (chosen["1/32"].edges, chosen["1/8"].edges) == ((), ("max-learning-rate",))


def test_a_setting_with_one_value_is_how_trials_run_and_no_choice(tmp_path):
    plan = plan_of(tmp_path, PLAN.replace("16e-3]", "16e-3]\ntotal-timesteps = [4096]"))
    specs = {spec.name: spec for spec in tuning_plan(plan).specs()}
    assert specs["rl_max-learning-rate-0.004_width-1_8_seed-101"].config.total_timesteps == 4096
    made = records(plan, lambda arm, value, width, seed: value)
    assert {tuple(choice.setting) for choice in choose(plan, made) if choice.arm == "rl"} == {("max-learning-rate",)}


def test_the_choice_is_written_as_toml_that_a_plan_takes_with_its_evidence(tmp_path):
    plan = plan_of(tmp_path)
    text = as_toml(choose(plan, records(plan, lambda arm, value, width, seed: value)))
    assert tomllib.loads(text)["arms"]["rl"]["width"]["1/8"] == {"max-learning-rate": 16e-3}
    assert "# mean score of 2 runs each: max-learning-rate-0.016 0.02, max-learning-rate-0.004 0.00" in text
    assert "# at the edge of its grid, which should grow: max-learning-rate" in text
    assert text.count("# interpolated between the tuned widths") == 4
    grown = plan_of(tmp_path, PLAN.replace("[tune]", f"{text}\n[tune]"))
    assert {spec.config.max_learning_rate for spec in grown.specs() if spec.arm == "rl"} == {16e-3}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[1e-3, 2e-3, 4e-3]", "[1e-3]", "every arm gets the same number of trials.*: rl 3, distill-student 1"),
        ("seeds = [100, 101]", "seeds = [1, 100]", r"tune.seeds must name seeds that no arm uses; .* \[0, 1\]"),
        ('widths = ["1/32", "1/8"]', 'widths = ["1/4"]', "tune.widths must name widths of arm rl: 1/32"),
        ("[tune.arms.rl]", "[tune.arms.rll]", "tune.arms.rll is not an arm of the plan that can be tuned: rl,"),
        ("[1e-3, 2e-3, 4e-3]", "1e-3", "tune.arms.distill-student needs a list of values"),
        ("seeds = [100, 101]", "seeds = 100", "line 11: seeds is a list, not 100"),
        ("seeds = [100, 101]", 'seeds = ["100"]', "line 11: seeds should be a whole number, not '100'"),
        ("episodes = 8", "episodes = 0", "line 13: tune.episodes must be at least 1, not 0"),
        ("episodes = 8", "games = 8", "line 13: tune.games is not a key of a plan"),
        ("[tune.arms.rl]", "[[tune.arms.rl]]", r"line 14: tune.arms.rl is a table: \[tune.arms.rl\]"),
        ("max-learning-rate = [", "max-learning-rat = [", "rl has no setting 'max-learning-rat'"),
    ],
)
def test_a_grid_that_is_not_fair_or_not_possible_is_refused(tmp_path, old, new, words):
    assert old in PLAN
    with pytest.raises(InputError, match=words):
        tuning_plan(plan_of(tmp_path, PLAN.replace(old, new)))


def test_a_plan_without_a_grid_is_refused(tmp_path):
    with pytest.raises(InputError, match="the plan has no"):
        trials(plan_of(tmp_path, PLAN[: PLAN.index("[tune]")]))
