import json
import shutil
import signal
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from processes import at, names
from small_runs import CONFIGS, RUNTIME, STUDENT, TRAIN, outcome, small_run

from potstill import evaluation, telemetry
from potstill.distill import Distillation, DistillConfig
from potstill.errors import DivergedError, InputError, Terminated
from potstill.evaluation import EvalConfig
from potstill.networks import NetworkConfig, Policy
from potstill.policies import load_policy, save_policy
from potstill.ppo import PPOConfig
from potstill.storage import checkpoints
from potstill.storage.runs import Run, config_hash
from potstill.study.planfile import read_plan
from potstill.tasks import TASKS
from potstill.training import teacher_data
from potstill.training.runtime import Runtime
from potstill.training.trainer import CONFIGS as CONFIGS_OF
from potstill.training.trainer import KINDS, Interrupted, execute, new_run

GAMES = EvalConfig(episodes=4)

RUN = {"status", "kind", "arm", "env", "width", "seed", "teacher", "env_steps", "gradient_steps"}
RUN |= {"training_macs", "wall_seconds", "config_hash", "policy_hash", "metrics_digest"}
RUN |= {"parameters", "conv", "linear", "macs", "bytes", "latency_ms", "latency_p95_ms"}
RUN |= {"command", "commit", "machine", "threads", "precision"}
SCORES = {"score", "ci95", "median", "std", "p_negative", "distinct", "episodes", "point_win_rate", "returns"}
SCORES |= {"score_sampled", "score_nosticky", "secondary_games"}
BESIDE_TEACHER = {"teacher_score", "teacher_parameters", "teacher_point_win_rate", "agreement", "kl"}
BESIDE_TEACHER |= {"agreement_teacher_states", "kl_teacher_states"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The run directory of a CartPole expert, of sorts."""
    run = new_run(TRAIN, tmp_path_factory.mktemp("teacher") / "run", RUNTIME)
    execute(run, RUNTIME, GAMES)
    return run.path


def stopped(run, line, number, monkeypatch):
    """Runs until a signal comes after a line of metrics; returns what is said about it."""
    with monkeypatch.context() as patch:
        stop = partial(signal.raise_signal, number)
        at("potstill.telemetry.Metrics.write", line, stop, after=True, patch=patch.setattr)
        with pytest.raises(Interrupted) as stop:
            execute(run, RUNTIME)
    return stop.value


def test_a_training_leaves_its_config_metrics_policy_and_result_and_nothing_else(teacher):
    assert names(teacher) == ["config.json", "metrics.jsonl", "policy.safetensors", "result.json"]
    result = json.loads((teacher / "result.json").read_text())
    assert set(result) == RUN | SCORES | {"format", "digest"}
    assert (result["status"], result["kind"], result["arm"], result["env"]) == ("done", "train", "rl", "CartPole-v1")
    assert (result["width"], result["seed"], result["teacher"], result["precision"]) == ("1/2", 0, None, "float32")
    assert (result["env_steps"], result["gradient_steps"]) == (2048, 4 * 3 * 4)
    assert result["episodes"] == len(result["returns"]) == 4
    assert result["score"] == sum(result["returns"]) / 4 > 8
    assert result["score_nosticky"] is None  # CartPole has no sticky actions
    assert result["parameters"] == 4 * 32 + 32 + 32 * 32 + 32 + 32 * 2 + 2
    records = telemetry.read(teacher / "metrics.jsonl")
    assert [record["step"] for record in records] == [512, 1024, 1536, 2048]
    assert {"seconds", "score", "games", "kl", "clip_fraction", "entropy", "learning_rate"} <= set(records[0])
    provenance = load_policy(teacher).document["provenance"]
    assert (provenance["seed"], provenance["env_steps"]) == (0, 2048)


@pytest.mark.parametrize("lead", ["student", "teacher"])
def test_a_distillation_leaves_the_same_files_and_stands_beside_its_teacher(teacher, tmp_path, lead):
    run = new_run(CONFIGS[lead], tmp_path / "run", RUNTIME, teacher=teacher)
    result = execute(run, RUNTIME, GAMES)
    assert names(run.path) == ["config.json", "metrics.jsonl", "policy.safetensors", "result.json"]
    digest = config_hash({"format": 1} | result)
    assert {"format": 1, "digest": digest} | result == json.loads(run.result_path.read_text())
    assert set(result) == RUN | SCORES | BESIDE_TEACHER | {"lead", "objective", "mode"}
    assert (result["arm"], result["lead"], result["mode"]) == (f"distill-{lead}", lead, "buffer")
    assert (result["teacher"], result["env_steps"]) == (str(teacher), 2048)
    assert result["teacher_score"] == json.loads((teacher / "result.json").read_text())["score"]
    assert 0 <= result["agreement"] <= 1
    assert result["kl"] > 0
    assert telemetry.read(run.metrics_path)[-1]["step"] == 2048
    assert run.status == "done"


@dataclass(frozen=True)
class HalfConfig(DistillConfig):
    """An algorithm of one's own, in a file of its own: a distillation at half the rate."""


class Half(Distillation):
    def __init__(self, config, *given, **options):
        super().__init__(replace(config, learning_rate=config.learning_rate / 2), *given, **options)


def test_another_algorithm_is_a_kind_of_run_and_a_method_of_plans_by_one_line(teacher, tmp_path, monkeypatch):
    kind = KINDS["distill"]._replace(config=HalfConfig, algorithm=Half, methods=("half",))
    monkeypatch.setitem(KINDS, "half", kind)
    monkeypatch.setitem(CONFIGS_OF, "half", HalfConfig)
    config = HalfConfig(**vars(STUDENT))
    run = new_run(config, tmp_path / "run", RUNTIME, teacher=teacher)
    result = execute(run, RUNTIME)
    assert (result["kind"], result["arm"], result["gradient_steps"]) == ("half", "half", config.gradient_steps)
    plan = f'env = "cartpole"\nwidths = ["1"]\nseeds = [0]\nteachers = ["{teacher}"]\n[arms.mine]\nmethod = "half"\n'
    (tmp_path / "plan.toml").write_text(plan + "noise = 0.0\n")
    (spec,) = read_plan(tmp_path / "plan.toml").specs()
    assert (spec.method, type(spec.config)) == ("half", HalfConfig)


@pytest.mark.parametrize("name", ["ppd", "finetune"])
def test_training_from_another_policy_says_so_and_names_it(name, teacher, tmp_path):
    run = small_run(name, teacher, tmp_path / "run", RUNTIME)
    result = execute(run, RUNTIME, GAMES)
    role = "teacher" if name == "ppd" else "initial"
    assert result["arm"] == name
    assert run.config[role] == load_policy(run.policy_path).document["provenance"][role] == str(teacher)
    assert result["teacher"] == (str(teacher) if name == "ppd" else None)
    assert ("agreement" in result) == (name == "ppd")
    assert all(("teacher_kl" in record) == (name == "ppd") for record in telemetry.read(run.metrics_path))


@pytest.mark.parametrize("role", ["teacher", "initial"])
def test_what_a_policy_hides_from_itself_is_hidden_from_those_that_inherit_how_it_sees_and_no_more(role, tmp_path):
    task = replace(TASKS["pong"].env, hidden_rows=3)
    shown = Policy(NetworkConfig(width="1/32"), (4, 84, 84), 3).initialise(torch.Generator().manual_seed(0))
    shown.hide(3)
    (tmp_path / "teacher").mkdir()
    probe = np.zeros((1, 4, 84, 84), dtype=np.uint8)
    save_policy(tmp_path / "teacher" / "policy.safetensors", shown, task, probe, {})
    config = replace(TRAIN, env=TASKS["pong"].env, network=shown.config, total_timesteps=128, num_envs=2)
    run = new_run(config, tmp_path / "run", RUNTIME, **{role: tmp_path / "teacher"})
    execute(run, RUNTIME)
    made = load_policy(run.policy_path)
    assert made.env == task
    assert made.policy.sees_as(shown)


def test_training_from_a_policy_of_another_task_is_refused_and_makes_nothing(teacher, tmp_path):
    with pytest.raises(InputError, match=r"was made for another task: EnvConfig.*CartPole-v1.*pong"):
        new_run(replace(TRAIN, env=TASKS["pong"].env), tmp_path / "run", RUNTIME, teacher=teacher)
    assert not (tmp_path / "run").exists()


def test_without_evaluation_a_result_has_no_scores(teacher, tmp_path):
    result = execute(small_run("cartpole", teacher, tmp_path / "run"), RUNTIME)
    assert set(result) == RUN


@pytest.mark.parametrize(("error", "code"), [(Terminated, 143), (KeyboardInterrupt, 130)])
def test_an_evaluation_stops_at_once_and_is_done_again(error, code, teacher, tmp_path, monkeypatch):
    run = small_run("cartpole", teacher, tmp_path / "run")

    def stopping(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "latency", stopping)
        with pytest.raises(Interrupted, match="continue with --resume") as stop:
            execute(run, RUNTIME)
    assert stop.value.code == code
    assert run.status == "interrupted"
    execute(run, RUNTIME)
    assert outcome(run) == outcome(Run.open(teacher))


def test_a_run_that_stopped_among_its_games_goes_on_with_them(teacher, tmp_path, monkeypatch):
    run, play, matches = small_run("student", teacher, tmp_path / "run"), evaluation.play, []

    def stopping(*arguments, **options):
        matches.append(options["actions"])
        if len(matches) == 2:
            raise KeyboardInterrupt
        return play(*arguments, **options)

    monkeypatch.setattr(evaluation, "play", stopping)
    with pytest.raises(Interrupted):
        execute(run, RUNTIME, GAMES)
    assert run.games_path.exists()
    stopped = execute(run, RUNTIME, GAMES)
    assert matches == ["greedy", "sampled", "sampled"]
    whole = execute(small_run("student", teacher, tmp_path / "whole"), RUNTIME, GAMES)
    assert {key: stopped[key] for key in SCORES | BESIDE_TEACHER} == {
        key: whole[key] for key in SCORES | BESIDE_TEACHER
    }
    assert not run.games_path.exists()


def test_a_finished_run_is_not_run_again(teacher):
    before = {path: path.stat().st_mtime_ns for path in teacher.iterdir()}
    with pytest.raises(InputError, match=r"run is finished: its result is in result.json"):
        execute(Run.open(teacher), RUNTIME)
    assert {path: path.stat().st_mtime_ns for path in teacher.iterdir()} == before


def test_an_existing_directory_is_never_used(teacher, tmp_path):
    for make in (lambda: new_run(TRAIN, teacher, RUNTIME), lambda: small_run("student", teacher, teacher)):
        with pytest.raises(InputError, match="exists: choose another --out"):
            make()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot make .*choose another --out"):
        new_run(TRAIN, tmp_path / "file" / "run", RUNTIME)


@pytest.mark.parametrize("name", ["cartpole", "student"])
def test_a_run_that_diverges_is_marked_failed_and_may_be_tried_again(name, teacher, tmp_path):
    config = CONFIGS[name]
    if isinstance(config, PPOConfig):
        config = replace(config, learning_rate=1e20, max_learning_rate=1e20)
        run = new_run(config, tmp_path / "run", RUNTIME)
    else:
        run = new_run(replace(config, learning_rate=1e39), tmp_path / "run", RUNTIME, teacher=teacher)
    for _ in range(2):
        with pytest.raises(DivergedError, match="lower --learning-rate"):
            execute(run, RUNTIME)
        result = json.loads(run.result_path.read_text())
        assert result["status"] == run.status == "failed"
        assert "--learning-rate" in result["error"]
        assert not run.policy_path.exists()
        assert not run.lock_path.exists()


def test_a_second_attempt_is_no_longer_failed(teacher, tmp_path, monkeypatch):
    run, during = small_run("cartpole", teacher, tmp_path / "run"), []
    run.write_result({"status": "failed", "kind": "train", "error": "the sun"})
    look = lambda: during.append(run.status)  # noqa: E731
    at("potstill.telemetry.Metrics.write", 1, look, after=True, patch=monkeypatch.setattr)
    execute(run, RUNTIME)
    assert [*during, run.status] == ["running", "done"]
    assert "error" not in json.loads(run.result_path.read_text())


def test_a_run_does_not_go_on_with_another_teacher(teacher, tmp_path, monkeypatch):
    shutil.copytree(teacher, tmp_path / "teacher")
    run = small_run("student", tmp_path / "teacher", tmp_path / "run")
    stopped(run, 1, signal.SIGTERM, monkeypatch)
    shutil.copy(tmp_path / "teacher" / "policy.safetensors", tmp_path / "kept.safetensors")
    tensors, document = checkpoints.load(teacher / "policy.safetensors")
    checkpoints.save(tmp_path / "teacher" / "policy.safetensors", tensors, document | {"provenance": {"seed": 9}})
    with pytest.raises(InputError, match="is no longer the teacher this run began with"):
        execute(run, RUNTIME)
    shutil.copy(tmp_path / "kept.safetensors", tmp_path / "teacher" / "policy.safetensors")
    assert execute(run, RUNTIME)["status"] == "done"


def test_students_of_one_teacher_share_the_data_that_the_first_one_made(teacher, tmp_path):
    made = []
    for seed in (0, 1):
        config = replace(CONFIGS["teacher"], seed=seed)
        execute(new_run(config, tmp_path / str(seed), RUNTIME, teacher=teacher), RUNTIME)
        made.append({path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")})
    assert made[0] == made[1]
    assert names(tmp_path) == ["0", "1", "data"]
    assert len(names(tmp_path / "data")) == 1
    noisy = replace(CONFIGS["teacher"], noise=0.5)
    execute(new_run(noisy, tmp_path / "noisy", RUNTIME, teacher=teacher), RUNTIME, data_root=tmp_path / "data")
    assert len(names(tmp_path / "data")) == 2  # other play is other data


def test_a_run_that_ends_with_other_threads_than_it_began_with_says_so(teacher, tmp_path, monkeypatch):
    run = small_run("cartpole", teacher, tmp_path / "run")
    stopped(run, 2, signal.SIGINT, monkeypatch)
    record = execute(run, replace(RUNTIME, threads=2))
    now, begun = record["machine"].split("; begun on ")
    assert (record["threads"], begun) == (2, run.config["machine"])
    assert (now, "1 thread," in begun) == (begun.replace("1 thread,", "2 threads,"), True)


def test_a_recording_that_is_stopped_leaves_nothing_behind(teacher, tmp_path, monkeypatch):
    run = small_run("teacher", teacher, tmp_path / "run")

    def stopping(*_):
        assert len(names(tmp_path / "data")) == 2  # what is recorded, and its lock
        raise Terminated

    with monkeypatch.context() as patch:
        patch.setattr(teacher_data, "record", stopping)
        with pytest.raises(Interrupted):
            execute(run, RUNTIME)
    assert names(tmp_path / "data") == []
    assert execute(run, RUNTIME)["status"] == "done"


@pytest.mark.parametrize(("name", "value"), [("threads", -1), ("save_every", -1.0), ("save_every", float("nan"))])
def test_a_runtime_with_nonsense_settings_is_refused(name, value):
    with pytest.raises(InputError, match=f"{name.replace('_', '-')} must be 0 or more, not {value}"):
        Runtime(**{name: value})


def test_what_does_not_fit_is_refused_before_anything_is_made(teacher, tmp_path):
    images = NetworkConfig(width="1/8", family="nature")
    with pytest.raises(InputError, match="reads images"):
        new_run(replace(TRAIN, network=images), tmp_path / "run", RUNTIME)
    with pytest.raises(InputError, match="reads images"):
        new_run(replace(STUDENT, network=images), tmp_path / "run", RUNTIME, teacher=teacher)
    with pytest.raises(InputError, match="has no sticky actions"):
        new_run(replace(TRAIN, env=replace(TRAIN.env, sticky=0.25)), tmp_path / "run", RUNTIME)
    with pytest.raises(InputError, match="device 'tpu' is unknown"):
        new_run(TRAIN, tmp_path / "run", replace(RUNTIME, device="tpu"))
    assert names(tmp_path) == []


def test_a_directory_with_a_config_of_something_else_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"editor": "ed"}')
    with pytest.raises(InputError, match=r"is not a run of potstill's"):
        execute(Run.open(tmp_path), RUNTIME)
    assert names(tmp_path) == ["config.json"]


def test_a_save_that_lacks_what_this_version_keeps_is_refused_in_one_line(teacher, tmp_path, monkeypatch):
    run = small_run("cartpole", teacher, tmp_path / "run")
    stopped(run, 1, signal.SIGTERM, monkeypatch)
    tensors, document = checkpoints.load(run.resume_path)
    del document["rate_bound"]
    checkpoints.save(run.resume_path, tensors, document)
    with pytest.raises(InputError, match=r"saved by potstill 0\.1\.0.* and cannot go on with this one: 'rate_bound'"):
        execute(run, RUNTIME)


def test_auto_precision_is_settled_when_the_run_is_made(tmp_path):
    run = new_run(replace(TRAIN, precision="auto"), tmp_path / "run", RUNTIME)
    assert run.config["config"]["precision"] in ("float32", "bfloat16")


def test_numbers_are_learned_in_float32_where_bfloat16_is_faster(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("potstill.networks.faster_precision", lambda device: torch.bfloat16)
    own, pixels = replace(TRAIN, precision="auto"), replace(TRAIN, env=TASKS["minatar-breakout"].env, precision="auto")
    student = DistillConfig(network=NetworkConfig(width="1/8"), total_timesteps=1_024)
    made = [new_run(config, tmp_path / str(at), RUNTIME) for at, config in enumerate((own, pixels))]
    made.append(new_run(student, tmp_path / "student", RUNTIME, teacher=teacher))
    made.append(new_run(replace(student, precision="bfloat16"), tmp_path / "asked", RUNTIME, teacher=teacher))
    precisions = [run.config["config"]["precision"] for run in made]
    assert precisions == ["float32", "bfloat16", "float32", "bfloat16"]


def test_threads_of_torch_follow_the_machine(teacher, tmp_path):
    torch.set_num_threads(2)
    execute(small_run("cartpole", teacher, tmp_path / "run"), RUNTIME)
    assert torch.get_num_threads() == 1
