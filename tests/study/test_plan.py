import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_plan import PLAN

from potstill.arms import ARMS
from potstill.distill import DistillConfig, start
from potstill.errors import InputError
from potstill.load import Origin
from potstill.networks import Policy
from potstill.policies import load_policy, save_policy
from potstill.study.execute import open_or_create, teacher_of_run
from potstill.study.plan import Part
from potstill.study.planfile import line_of, read_plan
from potstill.tasks import TASKS
from potstill.training.runtime import Runtime

RUNTIME = Runtime(device="cpu", threads=1, quiet=True)


def write(folder, text=PLAN):
    path = folder / "small.toml"
    path.write_text(text)
    return path


def test_a_plan_is_every_arm_at_every_width_from_every_seed_and_teacher(tmp_path):
    plan = read_plan(write(tmp_path))
    assert (plan.name, plan.env, plan.evaluation.episodes, plan.evaluation.starts) == ("small", "cartpole", 20, (50,))
    assert (plan.evaluation.start_games, plan.evaluation.secondary_games) == (20, 20)
    assert read_plan(write(tmp_path, PLAN.replace("[50]", "[50]\nstart-games = 5"))).evaluation.start_games == 5
    for games in (7, 0):
        plan = read_plan(write(tmp_path, PLAN.replace("[50]", f"[50]\nsecondary-games = {games}")))
        assert plan.evaluation.secondary_games == games
    of_a_width = [
        "rl_width-{}_seed-3",
        "distill-student_width-{}_teacher-a_seed-3",
        "distill-student_width-{}_teacher-b_seed-3",
        "finetune_width-{}_teacher-a_seed-3",
        "finetune_width-{}_teacher-b_seed-3",
    ]
    first = [name.format(width) for width in ("1_8", "1_16") for name in of_a_width]
    assert [spec.name for spec in plan.specs()] == [*first, "rl_width-1_8_seed-4", "rl_width-1_16_seed-4"]


def test_a_run_comes_after_the_one_it_begins_with_whatever_the_order_of_seeds(tmp_path):
    text = PLAN.replace("seeds = [3]\nvalue", "seeds = [3, 4]\nvalue").replace(
        'student"\nseeds = [3]', 'student"\nseeds = [4]'
    )
    names = [spec.name for spec in read_plan(write(tmp_path, text)).specs()]
    assert len(names) == 16
    for name in names:
        if name.startswith("finetune"):
            assert names.index(name.replace("finetune", "distill-student")) < names.index(name)


def test_settings_are_the_tasks_then_the_arms_then_the_widths(tmp_path):
    specs = {spec.name: spec for spec in read_plan(write(tmp_path)).specs()}
    small, large = specs["rl_width-1_16_seed-3"].config, specs["rl_width-1_8_seed-3"].config
    assert (small.network.width, small.seed, small.total_timesteps, small.max_learning_rate) == ("1/16", 3, 8192, 1e-2)
    assert (large.total_timesteps, large.max_learning_rate) == (8192, 5e-3)
    assert small.env.id == "CartPole-v1"
    student = specs["distill-student_width-1_8_teacher-b_seed-3"]
    taught = {"network": large.network, "seed": 3, "value_coefficient": 1.0, "precision": "float32"}
    assert student.config == replace(DistillConfig(), **taught)
    assert student.teacher == Origin(tmp_path / "experts" / "b")


def test_a_finetune_begins_with_the_student_of_its_own_width_seed_and_teacher(tmp_path):
    specs = {spec.name: spec for spec in read_plan(write(tmp_path)).specs()}
    tuned = specs["finetune_width-1_8_teacher-b_seed-3"]
    assert tuned.start_from == specs["distill-student_width-1_8_teacher-b_seed-3"]
    assert (tuned.method, tuned.teacher) == ("finetune", None)


def test_pairing_by_cycle_gives_each_seed_one_teacher_in_turn(tmp_path):
    text = PLAN.replace("seeds = [3, 4]", 'pairing = "cycle"\nseeds = [3, 4, 5]').replace("seeds = [3]\n", "")
    names = [spec.name for spec in read_plan(write(tmp_path, text)).specs() if spec.arm == "distill-student"]
    assert [name for name in names if "1_16" in name] == [
        "distill-student_width-1_16_teacher-a_seed-3",
        "distill-student_width-1_16_teacher-b_seed-4",
        "distill-student_width-1_16_teacher-a_seed-5",
    ]


def test_a_part_of_a_plan_is_its_runs_of_these_arms_widths_and_seeds_and_those_they_begin_with(tmp_path):
    plan = read_plan(write(tmp_path))
    assert plan.specs_of(Part()) == plan.specs() == plan.specs_of(Part(("rl", "finetune")))
    assert {spec.arm for spec in plan.specs_of(Part(("rl",)))} == {"rl"}
    assert {spec.arm for spec in plan.specs_of(Part(("finetune",)))} == {"distill-student", "finetune"}
    small = plan.specs_of(Part(("finetune",), ("0.0625",), (3,)))  # the plan writes 1/16
    assert small == [
        spec for spec in plan.specs() if spec.arm != "rl" and "width-1_16" in spec.name and spec.config.seed == 3
    ]
    assert {spec.arm for spec in small} == {"distill-student", "finetune"}


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (Part(("rl", "r")), "the plan has no arm 'r': it has distill-student, finetune, rl"),
        (Part(widths=("1/3",)), "the plan has no width '1/3': it has 1/16, 1/8"),
        (Part(seeds=(3, 9)), "the plan has no seed '9': it has 3, 4"),
        (Part(widths=("small",)), "width 'small' is not a number; write 1/8 or 0.125"),
        (Part(("finetune",), seeds=(4,)), "the plan has no run of all these arms, widths and seeds"),
    ],
    ids=["arm", "width", "seed", "not a width", "nothing"],
)
def test_a_part_that_the_plan_does_not_have_is_refused(tmp_path, part, says):
    with pytest.raises(InputError, match=re.escape(says)):
        read_plan(write(tmp_path)).specs_of(part)


def test_an_identity_changes_with_whatever_would_change_the_result(tmp_path):
    def identities(text=PLAN, teacher="0" * 12):
        return {spec.name: spec.identity(teacher) for spec in read_plan(write(tmp_path, text)).specs()}

    first = identities()
    assert len(set(first.values())) == 8  # the two teachers are one here
    assert identities() == first
    assert identities(PLAN.replace("episodes = 20", "episodes = 30")) == first
    changed = identities(PLAN.replace("value-coefficient = 1", "value-coefficient = 2"))
    assert {name.split("_")[0] for name in first if changed[name] != first[name]} == {"distill-student", "finetune"}
    other_teacher = identities(teacher="1" * 12)
    assert (
        other_teacher["distill-student_width-1_8_teacher-a_seed-3"]
        != first["distill-student_width-1_8_teacher-a_seed-3"]
    )


def test_the_line_of_a_key_is_found_in_its_own_table():
    text = 'seeds = [1]\n[arms.a]\nseeds = [2]\n[arms."b c"]\n# seeds\nseeds = [3]\n'
    assert line_of(text, ("seeds",)) == 1
    assert line_of(text, ("arms", "a", "seeds")) == 3
    assert line_of(text, ("arms", "b c", "seeds")) == 6
    assert line_of(text, ("arms", "b c", "width")) == 4


def test_an_arm_of_rl_has_a_variant_for_each_critic_whose_cost_is_not_its_size(tmp_path):
    text = PLAN.replace("seeds = [3, 4]", 'seeds = [3, 4]\ncritic = ["shared", "full", "1/4"]\nscores = [100, 400]', 1)
    plan = read_plan(write(tmp_path, text))
    assert plan.scores == (100.0, 400.0)
    assert [arm.name for arm in plan.arms] == ["rl", "rl-split", "rl-split-1_4", "distill-student", "finetune"]
    specs = {spec.name: spec for spec in plan.specs()}
    networks = [specs[f"{arm}_width-1_8_seed-3"].config.network for arm in ("rl", "rl-split", "rl-split-1_4")]
    assert [(n.critic, n.critic_width) for n in networks] == [("shared", "1"), ("split", "1"), ("split", "1/4")]
    assert len({Policy(network, (4,), 2).size() for network in networks}) == 1
    assert specs["finetune_width-1_8_teacher-a_seed-3"].config.network.critic == "shared"
    written = read_plan(
        write(tmp_path, PLAN + '[arms.rl-split]\n[arms.rl-split.width."1/16"]\nmax-learning-rate = 1e-2\n')
    )
    alone = next(spec for spec in written.specs() if spec.name == "rl-split_width-1_16_seed-3")
    assert alone.config.network == specs[alone.name].config.network


def test_a_plan_has_one_precision_which_is_float32_where_it_does_not_say(tmp_path):
    assert {spec.config.precision for spec in read_plan(write(tmp_path)).specs()} == {"float32"}
    coarse = read_plan(write(tmp_path, 'precision = "bfloat16"\n' + PLAN))
    assert {spec.config.precision for spec in coarse.specs()} == {"bfloat16"}


def test_a_plan_says_how_its_task_is_played_as_the_command_line_does(tmp_path):
    def tasks(table):
        text = PLAN.replace("[evaluation]", f"{table}\n[evaluation]").replace('"experts/b"', '"my_tasks:controller"')
        plan = read_plan(write(tmp_path, text))
        runs, code = plan.specs(), "my_tasks:controller"
        (of_code,) = {spec.teacher.env for spec in runs if spec.teacher is not None and str(spec.teacher.path) == code}
        return {plan.task, of_code} | {spec.config.env for spec in runs if spec.method == "rl"}

    assert tasks("") == {TASKS["cartpole"].env}
    written = '[task]\nactions = [1, 0]\nmax-frames = 400\nlayout = "flat"'
    played = replace(TASKS["cartpole"].env, actions=(1, 0), max_frames=400, layout="flat")
    assert tasks("") != tasks(written) == {played}


def test_students_of_code_are_others_where_the_plan_plays_its_task_otherwise(tmp_path):
    def students(table):
        text = PLAN.replace("[evaluation]", f"{table}\n[evaluation]").replace('"experts/b"', '"my_tasks:controller"')
        runs = read_plan(write(tmp_path, text)).specs()
        return {spec.name: spec.identity("0") for spec in runs if "controller" in spec.name}

    before, after = students(""), students("[task]\nmax-frames = 400")
    assert before.keys() == after.keys() != set()
    assert not set(before.values()) & set(after.values())


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("sticky = 'no'", "line 2: sticky should be a number, not 'no'"),
        ("sticky = 0.25", "line 2: CartPole-v1 has no sticky actions: leave sticky at 0"),
        ("sticky = 1.5", "line 2: sticky must be a probability below 1, not 1.5"),
        ("hidden-rows = 84", "line 2: hidden-rows are 0 to 83 rows of an Atari frame, not 84 of CartPole-v1"),
        ("actions = 3", "line 2: actions is a list, not 3"),
        ("actions = ['noop']", "line 2: actions should be a whole number, not 'noop'"),
        ("layout = 'last one'", "line 2: layout is one of auto, flat, first, last, stack, not 'last one'"),
        ("stickiness = 0.1", "line 2: task has no setting 'stickiness': did you mean sticky?"),
        ("network-options = {}", "line 2: task has no setting 'network-options'"),
        ("id = 'pong'", "line 2: task has no setting 'id'"),
        ("frame-skip = 0", "line 2: frame-skip must be at least 1"),
        ("view = ['42x42']", "line 2: task has no setting 'view'"),
    ],
)
def test_an_option_that_a_task_does_not_have_is_refused_by_its_line(tmp_path, table, says):
    text = PLAN.replace('env = "cartpole"\n', "")
    with pytest.raises(InputError, match=re.escape(says)):
        read_plan(write(tmp_path, f'env = "cartpole"\ntask = {{ {table} }}\n{text}'))


def test_a_plan_may_begin_with_a_byte_order_mark(tmp_path):
    path = write(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_plan(path).specs()) == len(read_plan(write(tmp_path)).specs())


def test_every_named_arm_can_be_planned(tmp_path):
    arms = "".join(
        f"[arms.{name}]\n{chr(10) + 'from = ' + chr(34) + 'distill-student' + chr(34) if name == 'finetune' else ''}\n"
        for name in ARMS
    )
    text = PLAN[: PLAN.index("[arms.rl]")] + arms
    specs = read_plan(write(tmp_path, text)).specs()
    assert {spec.arm for spec in specs} == set(ARMS)
    split = next(spec for spec in specs if spec.arm == "rl-split")
    assert (split.config.network.critic, split.method) == ("split", "rl")


@pytest.fixture(params=sorted((Path(__file__).parents[2] / "plans").glob("*.toml")), ids=lambda path: path.stem)
def plan(request):
    """Each plan that ships."""
    return request.param


def is_there(spec):
    teacher = teacher_of_run(spec)
    return teacher is None or (teacher.path / "policy.safetensors").is_file()


def test_the_plans_that_ship_can_be_read_and_their_teachers_are_there_or_how_to_train_them(plan):
    specs = read_plan(plan).specs()
    assert specs
    for spec in specs:
        assert is_there(spec) or f"--out {teacher_of_run(spec).path.relative_to(plan.parents[1])}\n" in plan.read_text()


def test_the_plans_of_the_second_study_have_as_many_runs_and_the_sizes_that_they_say(plan):
    if said := re.search(r"# (\d+) runs, of which (\d+) are branches", plan.read_text()):
        specs = read_plan(plan).specs()
        assert (len(specs), sum(spec.trunk is not None for spec in specs)) == (int(said[1]), int(said[2]))
        assert {spec.config.precision for spec in specs} == {"float32"}
        for arm in {spec.arm for spec in specs}:
            assert {spec.config.seed for spec in specs if spec.arm == arm} == {1, 2, 3, 4, 5}
    else:
        assert not plan.stem.startswith("second-")
    if plan.stem == "second-pong":
        shapes = {spec.config.network for spec in specs}
        sizes = {f"{Policy(shape, (4, 84, 84), 3).size().parameters:,}" for shape in shapes}
        assert re.search(r"Sizes: (.*) parameters", plan.read_text())[1] == "711, 1,964, 4,324 and 7,197"
        assert sizes == {"711", "1,964", "4,324", "7,197"}


def test_every_arm_of_the_plans_that_ship_can_begin_with_each_of_its_teachers(plan, tmp_path):
    specs = {(spec.arm, teacher_of_run(spec)): spec for spec in reversed(read_plan(plan).specs()) if is_there(spec)}
    for spec in specs.values():
        if spec.start_from is not None:
            # A student that has learned nothing stands for the one that the study would make.
            teacher = load_policy(spec.start_from.teacher.path)
            student = start(spec.start_from.config, teacher.policy, torch.device("cpu")).student
            probe = np.zeros((1, *student.observation_shape), dtype=np.uint8)
            begun = open_or_create(spec.start_from, tmp_path, RUNTIME)
            save_policy(begun.policy_path, student, teacher.env, probe, {})
        assert open_or_create(spec, tmp_path, RUNTIME).status == "new"
