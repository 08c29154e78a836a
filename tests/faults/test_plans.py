"""Plans that are wrong, or a stranger's: refused in one line with its number, before anything is made."""

import json
import time

import pytest
from small_plan import PLAN

from potstill.errors import InputError
from potstill.study.plan import MAX_RUNS
from potstill.study.planfile import read_plan

SMALL = 'env = "cartpole"\nwidths = ["1/8"]\nseeds = [0]\n[arms.rl]\n'


def write(folder, text=PLAN):
    path = folder / "small.toml"
    path.write_text(text)
    return path


def refused(folder, old, new):
    """What is said of the plan with `old` replaced; it names the file once."""
    assert old in PLAN
    with pytest.raises(InputError) as error:
        read_plan(write(folder, PLAN.replace(old, new, 1)))
    assert str(error.value).startswith(str(folder / "small.toml"))
    return str(error.value).removeprefix(str(folder / "small.toml"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('env = "cartpole"', 'env = "cartpol"', ", line 1: no environment is called 'cartpol'; did you mean cartpole?"),
        ('env = "cartpole"', "", ", line 1: env is missing"),
        ("seeds = [3, 4]", "seed = [3, 4]", ", line 3: seed is not a key of a plan; did you mean seeds?"),
        ("seeds = [3, 4]", "seeds = [3, 3]", ", line 3: seeds must name at least one, and none twice: 3, 3"),
        ("seeds = [3, 4]", 'seeds = ["3"]', ", line 3: seeds should be a whole number, not '3'"),
        ('"1/8", "1/16"', '"1/8", "0.125"', ", line 2: widths must name at least one, and none twice: 1/8, 0.125"),
        ('"1/8", "1/16"', '"1/8", "0"', ", line 2: width must be above 0 and at most 16, not 0"),
        (
            "episodes = 20",
            "episodes = 0",
            ", line 6: episodes, starts and start-games are at least 1, secondary-games 0",
        ),
        (
            "starts = [50]",
            "secondary-games = -1",
            ", line 6: episodes, starts and start-games are at least 1, secondary-games 0",
        ),
        (
            "starts = [50]",
            "start-games = 0",
            ", line 6: episodes, starts and start-games are at least 1, secondary-games 0",
        ),
        (
            "[arms.rl]",
            '[arms.ppd]\nteachers = ["model.zip"]\n[arms.rl]',
            "model.zip is no policy of potstill's, as trainings begin with: import-sb3 or distill makes one",
        ),
        ("[arms.rl]", '[arms.rl]\nmethod = "ppd"', ", line 11: rl is an arm of rl: one of ppd needs another name"),
        ("[arms.rl]", "[arms.rll]", ", line 10: no arm is called 'rll': did you mean rl?"),
        ("total-timesteps = 8192", "total-steps = 8192", ", line 11: rl has no setting 'total-steps': did you mean"),
        ("total-timesteps = 8192", "total-timesteps = 0", ", line 10: total-timesteps must be at least 1, not 0"),
        ("total-timesteps = 8192", "total-timesteps = 8e3", ", line 11: total-timesteps should be a whole number, not"),
        ("total-timesteps = 8192", "networks = 1", ", line 11: rl has no setting 'networks'"),
        ('[arms.rl.width."1/16"]', '[arms.rl.width."1/4"]', ", line 13: width 1/4 is not one of this arm's: 1/8, 1/16"),
        ("max-learning-rate = 1e-2", "max-learning-rate = -1.0", "max-learning-rate must be positive and finite"),
        ('from = "distill-student"', 'from = "rl"', ", line 21: from names an arm of this plan that distils, not 'rl'"),
        ('from = "distill-student"', "", ", line 20: arms.finetune.from is missing"),
        ('from = "distill-student"\nseeds = [3]', 'from = "distill-student"', "which the plan does not make"),
        ('"experts/b"', '"other/a"', ", line 4: two teachers have the same last name"),
        ('"experts/b"', '"experts/\\u0000"', " is not TOML: it holds a null character"),
        (
            "seeds = [3, 4]",
            'seeds = [3, 4]\nprecision = "half"',
            ", line 4: precision is one of auto, float32, bfloat16",
        ),
        ("value-coefficient = 1", 'precision = "bfloat16"', "a plan has one precision for all its arms"),
        ("seeds = [3, 4]", "seeds = [3, 4]\nscores = [1, 1]", ", line 4: scores are finite numbers, none twice"),
        ("seeds = [3, 4]", "seeds = [3, 4]\nscores = [nan]", ", line 4: scores are finite numbers, none twice"),
        ("seeds = [3, 4]", 'seeds = [3, 4]\ncritic = ["half"]', ", line 4: width 'half' is not"),
        (
            "seeds = [3, 4]",
            'seeds = [3, 4]\ncritic = ["full", "full"]',
            ", line 4: critic must name at least one, and none",
        ),
        ("value-coefficient = 1", 'critic = ["full"]', "critics to compare go with the method rl, not distill"),
        ("[arms.rl]", '[arms.rl-split]\n[arms.rl]\ncritic = ["full"]', "two arms are called rl-split"),
        ("[evaluation]", "[evaluation", " is not TOML: Expected ']' at the end of a table declaration (at line 6"),
    ],
)
def test_a_bad_plan_is_refused_with_its_line_and_what_would_be_right(tmp_path, old, new, words):
    said = refused(tmp_path, old, new)
    assert words in said
    assert "\n" not in said


def test_a_plan_that_is_too_large_or_not_there_is_refused(tmp_path):
    path = write(tmp_path, "# " + "x" * (1 << 16))
    with pytest.raises(InputError, match=r"small.toml has [\d,]+ bytes; at most 65,536 are read"):
        read_plan(path)
    with pytest.raises(InputError, match=r"cannot read .*none.toml: no such file or directory"):
        read_plan(tmp_path / "none.toml")


def test_deeply_nested_toml_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not TOML"):
        read_plan(write(tmp_path, "a = " + "[" * 60_000))


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "", ".hidden"])
def test_the_name_of_a_plan_cannot_lead_out_of_the_results(tmp_path, name):
    assert "becomes a folder" in refused(tmp_path, 'env = "cartpole"', f'name = "{name}"\nenv = "cartpole"')


# Hostile ones


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SMALL + '[arms."../../evil"]\nmethod = "rl"\n', r"arm '\.\./\.\./evil' becomes part of the names of files"),
        (SMALL + '[arms."/tmp/evil"]\nmethod = "rl"\n', "arm '/tmp/evil' becomes part"),
        (SMALL + '[arms."a\\u0000b"]\nmethod = "rl"\n', "holds a null character"),
        (SMALL + '[arms."a\\nb"]\nmethod = "rl"\n', "becomes part"),
        (SMALL + f'[arms.{"x" * 300}]\nmethod = "rl"\n', "becomes part"),
        ('name = "../evil"\n' + SMALL, "becomes a folder"),
        (SMALL.replace("1/8", "1/8\\n"), "is not a number"),
        (SMALL.replace("1/8", "1e999999999"), "is not a number"),
        (SMALL.replace("[0]", f"[{10**30}]"), r"below 2\^63"),
        (SMALL.replace("[0]", "[1" + "0" * 5_000 + "]"), "is not TOML"),
        (SMALL.replace('"cartpole"', '"os:CartPole-v1"'), "is code of module os: allow it with"),
        (f'"{"a" * 5_000}\\n\\u001b[2J" = 1\n', "is not a key of a plan"),
        ("x = " + "[" * 30_000, "is not TOML"),
        (".".join(["a"] * 30_000) + " = 1", "more than 200 dots"),
        ("[" + ".".join(["'a b'"] * 10_000) + "]", "more than 200 dots"),
    ],
)
def test_a_hostile_plan_is_refused_in_one_line(tmp_path, text, words):
    (tmp_path / "plan.toml").write_text(text)
    began = time.process_time()
    with pytest.raises(InputError, match=words) as error:
        read_plan(tmp_path / "plan.toml")
    assert str(error.value).isprintable()
    assert time.process_time() - began < 5


def test_a_plan_of_a_hundred_megabytes_is_refused_unread(tmp_path, call):
    path = tmp_path / "plan.toml"
    path.write_text(SMALL + f"# {'x' * (100 << 20)}\n")
    for command in ("run", "status"):
        code, out, err = call("study", command, path, "--out", tmp_path / "out")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "at most 65,536 are read" in err
    assert not (tmp_path / "out").exists()


def test_a_plan_of_more_runs_than_can_be_listed_is_refused(tmp_path):
    seeds = list(range(8_000))
    widths = [f"{n}/1000" for n in range(1, 1_000)]
    (tmp_path / "plan.toml").write_text(
        f'env = "cartpole"\nseeds = {seeds}\nwidths = {json.dumps(widths)}\n[arms.rl]\n'
    )
    with pytest.raises(InputError, match=f"some 7,992,000 runs; {MAX_RUNS:,} are planned at most"):
        read_plan(tmp_path / "plan.toml")
