"""What a policy sees: from the same state as its teacher, in what it costs, and in its files."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import own_tasks
import pytest
import torch
from small_runs import CONFIGS, RUNTIME, cut, learned, sharpened, small_run

import potstill
from potstill import imports, results, telemetry, views
from potstill.api import training_config
from potstill.buffer import Dataset
from potstill.cli import main
from potstill.distill import DistillConfig, fitted
from potstill.envs import EnvConfig, Envs
from potstill.errors import InputError
from potstill.evaluation import play
from potstill.export import export
from potstill.imports import allow
from potstill.load.callables import Foreign
from potstill.networks import NetworkConfig, Policy
from potstill.policies import load_policy, save_policy
from potstill.rollout import Preparer, collect, input_statistics
from potstill.storage import checkpoints
from potstill.study.execute import open_or_create
from potstill.study.planfile import read_plan
from potstill.tasks import TASKS
from potstill.training.trainer import execute
from potstill.views import Look, chosen

CARTPOLE, PONG = TASKS["cartpole"].env, TASKS["pong"].env
RNG = np.random.default_rng(0)
STACK = RNG.integers(0, 255, (2, 4, 84, 84)).astype(np.uint8)
PHOTO = RNG.integers(0, 255, (2, 30, 40, 3)).astype(np.uint8)


def seen(view, shown, layout, dtype=torch.float32):
    look = Look(tuple(view.split()), shown.shape[1:], layout)
    found = look(torch.from_numpy(shown), dtype)
    assert found.shape[1:] == look.shape
    return found.numpy()


def shrunk(images, rows, columns):
    """(B, C, H, W) to (B, C, rows, columns), as OpenCV does it."""
    flat = images.reshape(-1, *images.shape[-2:]).astype(np.float32)
    small = [cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA) for image in flat]
    return np.stack(small).reshape(*images.shape[:2], rows, columns)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ("frames=1", STACK[:, 3:]),
        ("frames=4", STACK),
        ("crop=10:80", STACK[:, :, 10:80]),
        ("crop=10:80,1:20 frames=2 crop=5:6", STACK[:, 2:, 15:16, 1:20]),
        ("42x42", shrunk(STACK, 42, 42)),
        ("30x50 crop=1:3", shrunk(STACK, 30, 50)[:, :, 1:3]),
        ("crop=34:84 20x42 frames=2", shrunk(STACK[:, 2:, 34:], 20, 42)),
        ("42x42 21x21", shrunk(STACK, 21, 21)),
    ],
)
def test_a_stack_of_frames_is_seen_as_the_view_says(view, expected):
    np.testing.assert_allclose(seen(view, STACK, "stack"), expected, rtol=1e-4, atol=1e-3)


def test_a_photo_is_seen_grey_and_small_wherever_its_channels_are():
    grey = (PHOTO * np.array(views.GREY)).sum(-1, keepdims=True)
    np.testing.assert_allclose(seen("grey", PHOTO, "last"), grey, rtol=1e-4)
    np.testing.assert_allclose(seen("grey", PHOTO.transpose(0, 3, 1, 2).copy(), "first")[:, 0], grey[..., 0], rtol=1e-4)
    small = shrunk(PHOTO.transpose(0, 3, 1, 2), 10, 10).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(seen("10x10 keep=2,0", PHOTO, "last"), small[..., [0, 2]], rtol=1e-4)
    np.testing.assert_allclose(
        seen("15x20", PHOTO[..., 0].copy(), "first"), shrunk(PHOTO[None, ..., 0], 15, 20)[0], rtol=1e-4
    )


def test_features_are_left_out_and_large_numbers_keep_their_digits():
    vector = 1.7e9 + RNG.random((3, 5))
    assert np.array_equal(seen("mask=1,3", vector, "flat", torch.float64), vector[:, [0, 2, 4]])
    assert np.array_equal(seen("keep=4,0 mask=0", vector, "flat", torch.float64), vector[:, [4]])


@pytest.mark.parametrize(
    ("view", "shape", "layout", "complaint"),
    [
        (
            "crop=10:85",
            (4, 84, 84),
            "stack",
            "observations .4, 84, 84.: of 84 rows, 10 to 85 cannot be kept",
        ),
        ("crop=0:9,9:9", (84, 84), "first", "of 84 columns, 9 to 9 cannot be kept"),
        ("crop=9", (84, 84), "first", "write it as crop=10:84 or crop=10:84,0:42"),
        ("frames=9", (4, 84, 84), "stack", "the observation is a stack of 4 frames"),
        ("frames=0", (4, 84, 84), "stack", "the observation is a stack of 4 frames"),
        ("frames=1", (3, 84, 84), "first", "the observation is no stack of frames"),
        ("42x42", (4,), "flat", "it is for images"),
        ("42x85", (4, 84, 84), "stack", "the image has 84 columns"),
        ("0x42", (4, 84, 84), "stack", "the image has 84 rows"),
        ("grey", (4, 84, 84), "stack", "it is for vectors, and for images with channels"),
        ("grey", (10, 10, 4), "last", "it is for images of red, green and blue"),
        ("mask=4", (4,), "flat", "there are 4 features, 0 to 3"),
        ("keep=1,1", (4,), "flat", "each to name once"),
        ("mask=0,1", (2,), "flat", "it leaves nothing to see"),
        ("keep=0", (2, 3), "flat", "it is for vectors"),
        ("mask=-1", (2,), "flat", "write it as mask=1,3"),
        ("framse=1", (4, 84, 84), "stack", "--view 'framse=1' is unknown: did you mean frames"),
        ("blur", (4, 84, 84), "stack", "--view 'blur' is unknown: there are 42x42, crop=10:84"),
    ],
)
def test_what_cannot_be_seen_is_refused(view, shape, layout, complaint):
    with pytest.raises(InputError, match=complaint):
        Look((view,), shape, layout)


def test_full_is_everything_again():
    assert chosen((), ("42x42",)) == ("42x42",)
    assert chosen(("full",), ("42x42",)) == ()
    assert chosen(("42x42", "full", "frames=1", "grey")) == ("frames=1", "grey")
    assert EnvConfig("CartPole-v1", view=("mask=0", "full")) == EnvConfig("CartPole-v1")


def test_the_help_has_every_view(capsys):
    for command in (["train"], ["distill"]):
        with pytest.raises(SystemExit):
            main([*command, "--help-all"])
        told = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "--view" in told
        assert command == ["distill"] or all(view.written in told for view in views.VIEWS.values())


# The cost


def test_what_a_view_costs_is_counted():
    whole = Policy(NetworkConfig("1/16"), (4, 84, 84), 3, layout="stack")
    cut = Policy(NetworkConfig("1/16"), (4, 84, 84), 3, layout="stack", view=("crop=0:42,0:42",))
    small = Policy(NetworkConfig("1/16"), (4, 84, 84), 3, layout="stack", view=("42x42",))
    one = Policy(NetworkConfig("1/16"), (4, 84, 84), 3, layout="stack", view=("42x42", "frames=1"))
    rows, columns = 42 * 84 * 2, 42 * 42 * 2  # each of so many numbers is the sum of two products
    assert small.size().macs - cut.size().macs == 4 * (rows + columns)
    assert small.size().parameters == cut.size().parameters < whole.size().parameters
    assert small.size().bytes - cut.size().bytes == 4 * (84 + 84)
    assert one.size().macs < small.size().macs / 3
    assert "stack as 42x42 frames=1 (1, 42, 42)" in str(one)


# Preparing


@pytest.mark.parametrize("view", ["42x42", "frames=1", "crop=30:80,0:50 frames=2", "30x30 frames=3"])
def test_frames_prepared_one_by_one_are_the_stack_prepared_whole_and_so_is_the_buffer_s(view):
    env = replace(PONG, max_frames=40, view=tuple(view.split()))
    with closing(Envs(env, 2)) as envs:
        policy = Policy(NetworkConfig(width="1/32", family="mlp"), **envs.spaces).initialise(torch.Generator())
        policy.normalise_by(*input_statistics(envs, 40, 0, policy.look))
        policy.hide(10)
        shown, rng = envs.reset(0), np.random.default_rng(0)
        data, ages = Dataset(envs, 100), envs.ages.copy()
        for number, transition in enumerate(
            collect(envs, Preparer(policy), shown, lambda _: torch.from_numpy(envs.random_actions(rng)))
        ):
            wanted = policy.prepare(torch.from_numpy(transition.observations))
            assert torch.equal(transition.inputs, wanted)
            data.add(transition.observations, ages, torch.zeros(2, 3), torch.zeros(2))
            kept = data.batch(torch.tensor([2 * number, 2 * number + 1]), policy, torch.float32)
            assert torch.equal(kept.inputs, wanted)
            ages = envs.ages.copy()
            if number == 24:
                break


def test_what_is_hidden_stays_hidden_in_every_view():
    for view in ("42x42", "50x50", "crop=5:60", "frames=2"):
        policy = Policy(NetworkConfig(family="mlp"), (4, 84, 84), 3, layout="stack", dtype="uint8", view=(view,))
        policy.normalise_by(torch.full_like(policy.mean, 128.0), torch.full_like(policy.mean, 64.0))
        policy.hide(10)
        shown = torch.from_numpy(STACK)
        above, below = shown.clone(), shown.clone()
        above[:, :, :10], below[:, :, 12] = 255 - above[:, :, :10], 255 - below[:, :, 12]
        assert torch.equal(policy.prepare(above), policy.prepare(shown))
        assert not torch.equal(policy.prepare(below), policy.prepare(shown))


def test_float_frames_are_left_as_they_were_shown():
    policy = Policy(NetworkConfig(family="mlp"), (2, 6, 6), 3, layout="stack", dtype="float32")
    policy.normalise_by(torch.full((6, 6), 5.0), torch.full((6, 6), 2.0))
    step = type("Step", (), {"observations": np.ones((1, 2, 6, 6), np.float32), "terminated": np.zeros(1, bool)})
    step.truncated = step.terminated
    preparer = Preparer(policy)
    first = preparer.first(step.observations)
    assert torch.equal(preparer.following(first, step), first)
    assert (step.observations == 1).all()


# Learning


def controller():
    """Holds CartPole's pole up, by its angle and the two speeds."""
    policy = Policy(NetworkConfig(family="linear"), (4,), 2, dtype="float32")
    with torch.no_grad():
        policy.actor.weight.copy_(torch.tensor([[0.0, 0, 0, 0], [0.5, 1.0, 20.0, 20.0]]))
        policy.actor.bias.zero_()
    return policy


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    out = tmp_path_factory.mktemp("views")
    probe = np.random.default_rng(0).normal(0, 0.1, (4, 4)).astype(np.float32)
    save_policy(out / "policy.safetensors", controller(), CARTPOLE, probe, {})
    return out


LEARN = DistillConfig(
    network=NetworkConfig(family="linear"), total_timesteps=6_000, num_envs=8, batch_size=64, warmup_steps=160,
    learning_rate=2e-2, precision="float32",
)  # fmt: skip
QUICK = {"total_timesteps": 2_048, "num_envs": 8, "precision": "float32", "device": "cpu", "threads": 1}
QUICK |= {"quiet": True, "episodes": 0}


@pytest.mark.parametrize("lead", ["student", "teacher", "mixed"])
def test_a_student_that_sees_what_matters_learns_and_one_that_does_not_says_so(lead):
    enough, agrees = learned(replace(LEARN, view=("mask=0",), lead=lead), controller(), CARTPOLE)
    blind, differs = learned(replace(LEARN, view=("keep=0",), lead=lead), controller(), CARTPOLE)
    assert agrees["agreement_teacher_states"] > 0.85 > 0.75 > differs["agreement_teacher_states"]
    assert (enough.size().parameters, blind.size().parameters) == (8, 4)
    *_, played = play(enough, replace(CARTPOLE, view=("mask=0",)), episodes=1, seed=1)
    assert played.score == 500


def test_a_student_may_see_more_than_its_teacher():
    teacher = learned(replace(LEARN, view=("mask=0",)), controller(), CARTPOLE)[0]
    task = replace(CARTPOLE, view=("mask=0",))
    as_it, more = (learned(replace(LEARN, view=view), teacher, task) for view in ((), ("full",)))
    assert (as_it[0].view, more[0].view) == (("mask=0",), ())
    assert min(as_it[1]["agreement"], more[1]["agreement"]) > 0.9


def test_a_small_image_is_enough_where_it_shows_what_matters():
    task = EnvConfig(allow(own_tasks.Photo))
    with closing(Envs(task, 8)) as envs:
        teacher = Foreign("sees", own_tasks.sees, envs)
    config = fitted(replace(LEARN, total_timesteps=3_000), teacher)
    small, agrees = learned(replace(config, view=("grey", "2x2")), teacher, task)
    assert small.size().parameters == 3 * 4 + 3
    assert agrees["agreement"] > 0.99


def test_reward_teaches_through_a_view_with_a_teacher_of_another_and_from_a_student(expert, tmp_path):
    settings = QUICK | {"num_steps": 64, "normalise_inputs": 200, "minibatch_size": 128}
    alone = potstill.train("cartpole", view=("mask=0",), out=tmp_path / "rl", **settings)
    assert alone.policy.seen_shape == (3,)
    taught = potstill.train(teacher=expert, view=("mask=0",), out=tmp_path / "ppd", **settings)
    assert taught.policy.view == load_policy(taught.path).env.view == ("mask=0",)
    assert results.runs_table(taught.path)["view"].to_list() == [taught.result["view"]] == ["mask=0"]
    kl = [line["teacher_kl"] for line in telemetry.read(taught.metrics_path)]
    assert kl[-1] < 0.9 * kl[0]
    tuned = potstill.train(start_from=taught, out=tmp_path / "finetune", **settings)
    assert tuned.policy.view == ("mask=0",)
    with pytest.raises(InputError, match="was made for another task"):
        potstill.train(start_from=taught, view=("full",), out=tmp_path / "no", **settings)


def test_a_teacher_s_play_is_recorded_once_for_all_views(expert, tmp_path):
    for number, view in enumerate(((), ("keep=0",), ("mask=3",))):
        potstill.distill(expert, view=view, lead="teacher", out=tmp_path / f"{number}", **QUICK)
    assert len([*(tmp_path / "data").glob("CartPole*")]) == 1


def test_play_through_a_wrapper_is_recorded_anew_when_its_code_changed(expert, tmp_path):
    code = "import gymnasium\nclass W(gymnasium.ObservationWrapper):\n    def observation(self, x): return x * {}\n"
    for number, factor in enumerate((1, 1, 2)):
        (tmp_path / "wrapped.py").write_text(code.format(factor))
        imports.import_modules([str(tmp_path / "wrapped.py")])
        potstill.distill(expert, view=("wrapped:W",), lead="teacher", out=tmp_path / f"{number}", **QUICK)
    assert len([*(tmp_path / "data").glob("CartPole*")]) == 2


@pytest.mark.parametrize("name", ["pong", "student", "mixed", "ppd"])
def test_a_run_with_a_view_goes_on_to_the_same_bits(name, expert, tmp_path, monkeypatch):
    view = ("42x42", "frames=2") if name == "pong" else ("keep=1,2,3",)
    changes = {"view": view} if isinstance(CONFIGS[name], DistillConfig) else {}
    changes = changes or {"env": replace(CONFIGS[name].env, view=view)}
    whole, other = (small_run(name, expert, tmp_path / each, **changes) for each in ("whole", "other"))
    execute(whole, RUNTIME)
    cut(other, monkeypatch)
    policies = [load_policy(run.policy_path).policy for run in (whole, other)]
    assert policies[0].view == view
    first, second = (policy.state_dict() for policy in policies)
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


# Files


def opinionated(env, **network):
    """A policy of clear opinions of a task, and what it is shown."""
    with closing(Envs(env, 2)) as envs:
        policy = sharpened(Policy(NetworkConfig(**network), **envs.spaces), seed=1)
        policy.normalise_by(*input_statistics(envs, 40, 0, policy.look))
        shown = envs.reset(0)
    return policy, shown


SHORT = replace(PONG, max_frames=80)
FILES = [
    (replace(SHORT, view=("42x42", "frames=2")), {"width": "1/32"}),
    (replace(SHORT, view=("crop=34:80", "46x60")), {"width": "1/16", "family": "framewise"}),
    (replace(TASKS["minatar-breakout"].env, view=("keep=0,1,3",)), {"width": "1/8"}),
    (replace(CARTPOLE, view=("mask=1",)), {"width": "1/8"}),
]


@pytest.mark.parametrize(("env", "network"), FILES, ids=lambda value: " ".join(getattr(value, "view", ())) or None)
def test_files_hold_the_view_and_play_the_same(env, network, tmp_path):
    policy, shown = opinionated(env, **network)
    save_policy(tmp_path / "policy.safetensors", policy, env, shown, {})
    loaded = load_policy(tmp_path / "policy.safetensors")
    assert (loaded.env, loaded.policy.view) == (env, env.view)
    told = export(loaded, tmp_path / "policy.onnx", int8=True, episodes=0 if env.atari else 2)
    code = export(loaded, tmp_path / "policy.c", int8=True)
    assert max(told["max_difference"], code["max_difference"]) <= 1e-3
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx", providers=["CPUExecutionProvider"])
    assert tuple(session.get_inputs()[0].shape[1:]) == policy.observation_shape
    chosen = session.run(["action"], {"observation": shown})[0]
    with torch.no_grad():
        assert (chosen == policy(torch.from_numpy(shown))[0].argmax(-1).numpy()).all()
    with pytest.raises(InputError, match="it has a view"):
        export(loaded, tmp_path / "policy.zip")


def test_colour_frames_are_prepared_and_seen_within_the_file(tmp_path):
    env = replace(PONG, view=("42x42", "frames=1"), max_frames=400)
    policy, shown = opinionated(env, width="1/32")
    save_policy(tmp_path / "policy.safetensors", policy, env, shown, {})
    told = export(load_policy(tmp_path / "policy.safetensors"), tmp_path / "policy.onnx", raw=True)
    assert told["models"]["float32"]["raw"]["steps"] >= 90


def test_a_file_whose_view_cannot_be_is_refused(tmp_path):
    policy, shown = opinionated(replace(CARTPOLE, view=("mask=1",)), width="1/8")
    save_policy(tmp_path / "policy.safetensors", policy, replace(CARTPOLE, view=("mask=1",)), shown, {})
    tensors, document = checkpoints.load(tmp_path / "policy.safetensors")
    for view in (["mask=9"], ["42x42"], ["frames"], ["mask=1,2"], []):
        document["env"]["view"] = view
        checkpoints.save(tmp_path / "edited.safetensors", tensors, document)
        with pytest.raises(InputError, match="does not hold the policy its own description speaks of"):
            load_policy(tmp_path / "edited.safetensors")


# Plans, and other doors


def test_a_plan_compares_views_and_they_are_part_of_what_its_runs_are(expert, tmp_path):
    plan = tmp_path / "plan.toml"
    text = f"""
env = "cartpole"
widths = ["1/8"]
seeds = [0]
teachers = ["{expert}"]
[arms.distill-student]
[arms.blind]
method = "distill"
view = ["keep=0"]
[arms.tuned]
method = "finetune"
from = "blind"
[arms.rl]
view = ["keep=0"]
"""
    plan.write_text(text)
    specs = {spec.arm: spec for spec in read_plan(plan).specs()}
    assert specs["blind"].config.view == specs["rl"].config.env.view == specs["tuned"].config.env.view == ("keep=0",)
    assert specs["distill-student"].config.view == ()
    first = {arm: spec.identity("x") for arm, spec in specs.items()}
    plan.write_text(text.replace("keep=0", "keep=1"))
    second = {spec.arm: spec.identity("x") for spec in read_plan(plan).specs()}
    assert {arm for arm in first if first[arm] != second[arm]} == {"blind", "rl", "tuned"}


WITH_TEACHER = """
env = "cartpole"
widths = ["1/8"]
seeds = [0]
teachers = ["expert"]
[arms.distill-student]
network = "gru"
total-timesteps = 1024
num-envs = 8
batch-size = 32
warmup-steps = 256
[arms.finetune]
from = "distill-student"
total-timesteps = 1024
normalise-inputs = 100
[arms.ppd]
total-timesteps = 1024
normalise-inputs = 100
[arms.full]
method = "distill"
view = ["full"]
network-options = {layers = "8", activation = "relu"}
critic = "split"
[arms.tuned]
method = "finetune"
from = "full"
[arms.more]
method = "ppd"
view = ["full"]
[arms.less]
method = "ppd"
view = ["keep=1"]
[arms.rl]
"""


@pytest.fixture(scope="module")
def half_blind(tmp_path_factory):
    """An expert that does not see where the cart is, in a folder for plans."""
    folder = tmp_path_factory.mktemp("half-blind")
    policy = Policy(NetworkConfig(family="linear"), (4,), 2, dtype="float32", view=("mask=0",))
    with torch.no_grad():
        policy.actor.weight.copy_(torch.tensor([[0.0, 0, 0], [1.0, 20.0, 20.0]]))
    (folder / "expert").mkdir()
    task = replace(CARTPOLE, view=("mask=0",))
    save_policy(folder / "expert" / "policy.safetensors", policy, task, np.eye(4, dtype=np.float32), {})
    return folder


def planned(folder, text=WITH_TEACHER):
    (folder / "plan.toml").write_text(text)
    return {spec.arm: spec for spec in read_plan(folder / "plan.toml").specs()}


def test_an_arm_with_a_teacher_sees_what_that_sees_and_one_that_begins_with_a_student_is_as_that_is(half_blind):
    specs = planned(half_blind)
    task = replace(CARTPOLE, view=("mask=0",))
    seen = {
        arm: spec.config.task_of(task).view if isinstance(spec.config, DistillConfig) else spec.config.env.view
        for arm, spec in specs.items()
    }
    blind = dict.fromkeys(("distill-student", "finetune", "ppd"), ("mask=0",))
    assert seen == blind | {"less": ("keep=1",)} | dict.fromkeys(("full", "tuned", "more", "rl"), ())
    assert specs["finetune"].config.network == NetworkConfig("1/8", "gru")
    assert specs["tuned"].config.network == specs["full"].config.network
    assert specs["tuned"].config.network.options == ("activation=relu", "layers=8")
    assert specs["ppd"].config.network == NetworkConfig("1/8")


def test_such_arms_run(half_blind, tmp_path):
    specs = planned(half_blind)
    for arm in ("distill-student", "finetune", "ppd"):
        run = open_or_create(specs[arm], tmp_path, RUNTIME)
        execute(run, RUNTIME)
        made = load_policy(run.path)
        assert (made.env.view, made.policy.remembers) == (("mask=0",), arm != "ppd")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ('view = ["keep=1"]', "view is mask=0, not keep=1: leave out view"),
        ('view = ["full"]', "view is mask=0, not full: leave out view"),
        ('network = "mlp"', "network is gru, not mlp: leave out network"),
        ('network-options = {layers = "8"}', "network-options is none, not layers=8: leave out network-options"),
        ('critic = "split"', "critic is shared, not split: leave out critic"),
    ],
)
def test_an_arm_that_contradicts_the_student_it_begins_with_is_refused(setting, told, half_blind):
    text = WITH_TEACHER.replace('from = "distill-student"', f'from = "distill-student"\n{setting}')
    with pytest.raises(InputError, match=f"arm finetune begins with a policy of distill-student, whose {told}"):
        planned(half_blind, text)


def test_what_an_arm_repeats_of_its_student_is_no_contradiction(half_blind):
    setting = 'network = "gru"\nview = ["mask=0"]\ncritic = "shared"'
    text = WITH_TEACHER.replace('from = "distill-student"', f'from = "distill-student"\n{setting}')
    assert planned(half_blind, text) == planned(half_blind)


def test_a_teacher_that_is_not_there_yet_leaves_the_plan_readable(half_blind):
    text = WITH_TEACHER.replace('["expert"]', '["later"]')
    assert planned(half_blind, text)["ppd"].config.env.view == ()


def test_a_task_by_name_is_seen_as_the_teacher_or_the_first_policy_sees_it(half_blind):
    expert = half_blind / "expert"
    for origins in ({"teacher": expert}, {"start_from": expert}):
        for env in (None, "cartpole", replace(CARTPOLE, view=("mask=0",))):
            assert training_config(env, **origins)[1].env.view == ("mask=0",)
    assert training_config("cartpole")[1].env.view == ()


@pytest.mark.parametrize(("view", "seen"), [([], ("mask=0",)), (["keep=1"], ("keep=1",)), (["full"], ())])
def test_a_view_on_the_command_line_takes_the_place_of_the_teacher_s(view, seen, half_blind, tmp_path):
    words = ["--teacher", str(half_blind / "expert"), "--env", "cartpole", "--out", str(tmp_path / "run"), "--quiet"]
    words += ["--total-timesteps", "64", "--num-envs", "2", "--num-steps", "32", "--minibatch-size", "32"]
    words += ["--evaluate", "0", "--normalise-inputs", "20", *(f"--view={each}" for each in view)]
    main(["train", *words, "--device", "cpu", "--threads", "1"])
    assert load_policy(tmp_path / "run").env.view == seen


def test_a_view_that_cannot_be_is_refused_before_anything_is_made(expert, tmp_path, capsys):
    for command, complaint in (
        (["distill", str(expert), "--view", "mask=7"], "--view mask=7 of observations (4,): there are 4 features"),
        (["train", "--env", "cartpole", "--view", "42x42"], "--view 42x42 of observations (4,): it is for images"),
        (["distill", str(expert), "--view", "mask=0,1", "--view", "mask=2"], "--view mask=2 of observations (2,)"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--out", str(tmp_path / "run")])
        assert stop.value.code == 2
        assert complaint in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_the_plan_of_views_has_an_arm_of_each():
    arms = {spec.arm: spec.config for spec in read_plan(Path(__file__).parent.parent / "plans" / "views.toml").specs()}
    seen = {arm: config.view if isinstance(config, DistillConfig) else config.env.view for arm, config in arms.items()}
    assert seen["distill-student"] == ()
    assert seen["rl"] == seen["angle-and-speeds"] == ("mask=0",)
    assert len(seen) == 6
