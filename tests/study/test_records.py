import io
import json
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest

from potstill.cli import main
from potstill.errors import InputError
from potstill.results import COLUMNS, CURVE_POINTS, curves_table, episodes_frame, read_runs, runs_table
from potstill.study import execute
from potstill.study.local import LocalProcess
from potstill.study.plan import Part
from potstill.study.planfile import read_plan
from potstill.study.records import make_record, recorded, run_study, status
from potstill.study.tune import tuning_plan
from potstill.tasks import TASKS
from potstill.training.runtime import Runtime

ROOT = Path(__file__).parents[2]
RUNTIME = Runtime(device="cpu", threads=2, quiet=True)
NAMES = [
    "rl_width-1_32_seed-0",
    "student_width-1_32_teacher-expert_seed-0",
    "finetune_width-1_32_teacher-expert_seed-0",
]
PLAN = """\
env = "cartpole"
widths = ["1/32"]
seeds = [0]
teachers = ["expert"]

[evaluation]
episodes = 4
starts = [5, 50]
start-games = 3
secondary-games = 2

[arms.rl]
total-timesteps = 5120
num-steps = 16
minibatch-size = 128

[arms.student]
method = "distill"
total-timesteps = 1024
num-envs = 8
batch-size = 32
warmup-steps = 64
value-coefficient = 0.5

[arms.finetune]
from = "student"
total-timesteps = 2048
"""


def write(folder, text=PLAN):
    (folder / "plan.toml").write_text(text)
    return folder / "plan.toml"


def study(*words):
    """`potstill study` in this process; exit code, stdout and stderr."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(["study", *map(str, words)])
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def run(plan, out):
    return study("run", plan, "--out", out, "--quiet", "--workers", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def done(tmp_path_factory, save_teacher):
    """A whole study: three runs, one of which begins with another's policy."""
    folder = tmp_path_factory.mktemp("study")
    save_teacher(folder / "expert")
    plan, out = write(folder), folder / "results"
    before = study("status", plan, "--out", out, "--json")
    return SimpleNamespace(folder=folder, plan=plan, out=out, before=before, first=run(plan, out))


def test_a_study_ends_with_a_record_of_every_run_and_says_so(done):
    assert (done.first.code, done.first.err) == (0, "")
    assert sorted(path.stem for path in done.out.glob("*.json")) == sorted([*NAMES, "study"])
    assert json.loads(done.before.out)["missing"] == 3
    report = json.loads(study("status", done.plan, "--out", done.out, "--json").out)
    assert report == dict.fromkeys(("running", "interrupted", "failed", "missing"), 0) | {
        "study": "plan",
        "planned": 3,
        "done": 3,
        "failures": {},
        "damaged": {},
        "ignored": [],
    }


def test_a_record_tells_what_was_run_what_it_cost_and_how_it_scored(done):
    rl, student, tuned = (json.loads((done.out / f"{name}.json").read_bytes()) for name in NAMES)
    assert (rl["arm"], rl["method"], rl["teacher"], rl["env_steps"]) == ("rl", "rl", None, 5120)
    assert (student["arm"], student["method"], student["teacher"]) == ("student", "distill", "expert")
    assert (student["teacher_env_steps"], student["teacher_gradient_steps"]) == (77, None)
    assert (tuned["arm"], tuned["method"], tuned["teacher_env_steps"]) == ("finetune", "finetune", 77)
    assert tuned["initial_env_steps"] == 1024
    assert tuned["initial_training_macs"] == student["training_macs"]
    for record in (rl, tuned, student):
        assert (record["status"], record["episodes"], len(record["returns"])) == ("done", 4, 4)
        assert set(record["starts"]) == {"0", "5", "50"}
        assert record["starts"]["0"]["score"] == record["score"]
        assert [record["starts"][k]["episodes"] for k in ("0", "5", "50")] == [4, 3, 3]
        assert record["secondary_games"] == 2
        assert 15 < record["random_score"] < 30
        assert record["curve"][-1]["step"] == record["env_steps"]


def test_training_macs_are_counted_by_hand_for_the_smallest_network(done):
    rl = json.loads((done.out / f"{NAMES[0]}.json").read_bytes())
    forward = 4 * 2 + 2 * 2 + 2 * 2 + 2 * 1  # two layers of two units, two logits, a value
    backward = 2 * forward - 4 * 2  # no gradient of the inputs is asked for
    assert rl["training_macs"] == rl["env_steps"] * forward + rl["gradient_steps"] * 128 * (forward + backward)


def test_running_a_finished_study_again_does_nothing(done):
    before = {path: path.stat().st_mtime_ns for path in done.out.glob("*_*")}
    again = run(done.plan, done.out)
    assert (again.code, again.out.splitlines()) == (0, ["nothing to do: all runs of the plan are done", str(done.out)])
    assert {path: path.stat().st_mtime_ns for path in done.out.glob("*_*")} == before


def test_records_alone_are_enough_to_know_what_is_done(done, tmp_path):
    for record in done.out.glob("*.json"):
        (tmp_path / record.name).write_bytes(record.read_bytes())
    assert run(done.plan, tmp_path).out.startswith("nothing to do")
    assert not (tmp_path / "runs").exists()


def test_only_the_part_that_is_named_runs_and_the_plan_stays_whole(done, tmp_path):
    words = (done.plan, "--out", tmp_path / "some", "--quiet", "--device", "cpu", "--arms")
    assert study("run", *words, "student").code == 0
    assert sorted(path.stem for path in (tmp_path / "some").glob("*.json")) == [
        "student_width-1_32_teacher-expert_seed-0",
        "study",
    ]
    assert json.loads((tmp_path / "some/study.json").read_text())["planned"] == 3
    assert study("run", *words, "student").out.startswith("nothing to do: all runs of this part of the plan are done")
    refused = study("run", *words, "student", "--widths", "1/2")
    assert (refused.code, refused.err) == (2, "potstill: the plan has no width '1/2': it has 1/32\n")
    refused = study("run", *words, "student", "--seeds", "7")
    assert (refused.code, refused.err) == (2, "potstill: the plan has no seed '7': it has 0\n")


def test_each_run_has_as_many_threads_as_are_asked_for_and_records_them(done, tmp_path):
    words = ("run", done.plan, "--out", tmp_path, "--arms", "rl", "--quiet", "--device", "cpu", "--threads")
    refused = study(*words, 0)
    assert (refused.code, refused.err) == (2, "potstill: threads must be at least 1, not 0\n")
    assert study(*words, 2).code == 0
    record = json.loads((tmp_path / f"{NAMES[0]}.json").read_bytes())
    assert record["threads"] == 2
    assert ", 2 threads, cpu" in record["machine"]
    assert "begun on" not in record["machine"]
    assert ", 1 thread, cpu" in json.loads((done.out / f"{NAMES[0]}.json").read_bytes())["machine"]


@pytest.mark.timeout(300)  # over a minute where another test runs beside it
def test_runs_of_two_threads_go_one_after_the_other_on_two_cores(done, tmp_path):
    alive = []

    def start(run, runtime, eval_config, data):
        assert [process for process in alive if process.poll() is None] == []
        alive.append(LocalProcess(run, runtime, eval_config, data))
        return alive[-1]

    part = Part(arms=("rl", "student"))
    ended = list(run_study(read_plan(done.plan), tmp_path, RUNTIME, part=part, threads=2, start=start))
    assert [(each.error, each.run.config["threads"]) for each in ended] == [(None, 2)] * 2
    assert len(alive) == 2


def test_a_policy_that_a_new_run_begins_with_is_made_again_where_it_is_gone(done, tmp_path):
    (tmp_path / f"{NAMES[1]}.json").write_bytes((done.out / f"{NAMES[1]}.json").read_bytes())
    shutil.copytree(done.folder / "expert", tmp_path / "expert")
    plan = read_plan(write(tmp_path, PLAN.replace("[arms.rl]", "[arms.rl]\nseeds = [9]")))
    names = [ended.spec.name for ended in run_study(plan, tmp_path, RUNTIME, workers=2) if ended.spec.arm != "rl"]
    assert names == NAMES[1:]


def test_a_record_of_a_run_with_other_settings_is_refused_and_left(done):
    plan = write(done.folder, PLAN.replace("value-coefficient = 0.5", "value-coefficient = 1"))
    before = (done.out / f"{NAMES[1]}.json").read_bytes()
    try:
        refused = run(plan, done.out)
    finally:
        write(done.folder)
    assert refused.code == 2
    assert f"{NAMES[2]}.json is of a run with other settings or another teacher" in refused.err  # the first by name
    assert (done.out / f"{NAMES[1]}.json").read_bytes() == before


def test_the_records_that_are_committed_are_of_the_plans_beside_them():
    for name in ("pong", "minatar-breakout", "minatar-space-invaders"):
        plan = read_plan(ROOT / f"plans/{name}.toml")
        found = len(recorded(plan.specs(), ROOT / "data" / "results" / "first" / name))
        assert found == len(plan.specs()) or (name == "pong" and found)  # begun
        if name != "minatar-breakout":
            assert recorded(tuning_plan(plan).specs(), ROOT / "data" / "results" / "first" / name / "tune")


def test_a_study_that_another_process_begins_is_waited_for_and_the_lock_of_the_dead_is_taken_over(done):
    script = "import sys, time; from pathlib import Path; from potstill.storage.runs import Run\n"
    script += "with Run(Path(sys.argv[1]), {}).lock(): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script, str(done.out)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        threading.Timer(1.0, other.kill).start()
        assert run(done.plan, done.out).code == 0
        assert other.wait() == -signal.SIGKILL
    assert not execute.Run(done.out, {}).lock_path.exists()


def test_the_tables_of_records_are_those_of_run_directories(done, tmp_path):
    table = runs_table(done.out)
    assert table["run"].to_list() == sorted(NAMES)
    starts = {"score_start_0", "score_start_5", "score_start_50"}
    assert starts <= set(table.columns) <= set(COLUMNS) | starts
    assert table.filter(run=NAMES[1])["score_start_50"][0] > 0
    assert episodes_frame(read_runs(done.out)).height == 12
    assert set(curves_table(done.out)["run"]) == set(NAMES)
    for suffix, read in ((".csv", pl.read_csv), (".parquet", pl.read_parquet)):
        out = tmp_path / f"table{suffix}"
        assert study("table", done.out, "--out", out).code == 0
        assert read(out)["run"].to_list() == sorted(NAMES)
        assert f"{out} exists" in study("table", done.out, "--out", out).err
    assert "neither a .csv nor a .parquet" in study("table", done.out, "--out", tmp_path / "table.xls").err


def test_a_record_keeps_a_learning_curve_short(done):
    record = json.loads((done.out / f"{NAMES[0]}.json").read_bytes())
    assert record["curve"][0].keys() == {"step", "seconds", "score"}
    assert len(record["curve"]) == 40 <= CURVE_POINTS


@pytest.mark.parametrize(
    ("text", "words"),
    [("{}", "holds no runs"), ('{"run": "other", "status": "done"}', "stray.json is"), ("no JSON", "stray.json is")],
)
def test_a_file_that_is_no_record_is_named_where_there_is_nothing_else(done, tmp_path, text, words):
    (tmp_path / "stray.json").write_text(text)
    with pytest.raises(InputError, match=words):
        read_runs(tmp_path)


def test_a_run_whose_loss_diverges_is_recorded_and_not_tried_again_and_the_others_finish(tmp_path, save_teacher):
    save_teacher(tmp_path / "expert")
    plan = PLAN.replace("value-coefficient = 0.5", "learning-rate = 3e38")
    ended = run(write(tmp_path, plan), tmp_path / "out")
    assert ended.code == 1
    assert "2 of 3 runs failed" in ended.err
    assert f"{NAMES[2]}: {NAMES[1]}, which it begins with, failed" in ended.err
    failed = json.loads((tmp_path / "out" / f"{NAMES[1]}.json").read_bytes())
    assert failed["status"] == "failed"
    assert "finite" in failed["error"]
    assert (tmp_path / "out/runs" / NAMES[1] / "log.txt").read_text().count("finite") == 1
    report = status(read_plan(tmp_path / "plan.toml"), tmp_path / "out")
    assert (report["done"], report["failed"]) == (1, 2)
    assert set(report["failures"]) == set(NAMES[1:])


def test_a_run_that_cannot_begin_when_its_turn_comes_is_recorded_and_the_others_finish(tmp_path, save_teacher):
    save_teacher(tmp_path / "expert")
    plan = PLAN.replace("seeds = [0]", "seeds = [0, 1]").replace("[arms.rl]", "[arms.rl]\nseeds = [1]")
    plan += "seeds = [0]\n"
    place = tmp_path / "out" / "runs" / NAMES[2]
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    ended = study(
        "run", write(tmp_path, plan), "--out", tmp_path / "out", "--quiet", "--workers", "1", "--device", "cpu"
    )
    assert ended.code == 1
    assert "1 of 4 runs failed" in ended.err
    assert f"{NAMES[2]}: {place} is not a run directory" in ended.err
    report = status(read_plan(tmp_path / "plan.toml"), tmp_path / "out")
    assert (report["done"], set(report["failures"])) == (3, {NAMES[2]})


@pytest.mark.parametrize(("task", "name"), [("acrobot", "Acrobot-v1"), ("pong", "pong")])  # which hides rows
def test_a_teacher_of_another_task_than_the_plans_is_refused(task, name, tmp_path, save_teacher):
    save_teacher(tmp_path / "expert")
    plan = read_plan(write(tmp_path, PLAN.replace("cartpole", task)))
    with pytest.raises(InputError, match=rf"expert plays CartPole-v1, the plan's task is {name}$"):
        list(run_study(plan, tmp_path / "out", RUNTIME))
    assert not (tmp_path / "out").exists()


def test_what_another_setting_of_the_teachers_task_is_a_plan_is_told(tmp_path, save_teacher):
    save_teacher(tmp_path / "expert", replace(TASKS["cartpole"].env, max_frames=100))
    plan = read_plan(write(tmp_path, PLAN))
    how = "expert plays CartPole-v1 with other max-frames: leave out the arms that learn from reward"
    with pytest.raises(InputError, match=how):
        list(run_study(plan, tmp_path / "out", RUNTIME))


def test_a_plan_that_plays_its_task_otherwise_takes_teachers_of_that(tmp_path, save_teacher):
    save_teacher(tmp_path / "expert")
    students = PLAN[: PLAN.index("[arms.")] + "[task]\nmax-frames = 100\n[arms.distill-student]\n"
    how = "expert plays CartPole-v1 with other max-frames: leave out \\[task\\] of the plan"
    with pytest.raises(InputError, match=how):
        list(run_study(read_plan(write(tmp_path, students)), tmp_path / "out", RUNTIME))


def test_the_score_of_random_play_is_measured_again_where_the_task_is_another(tmp_path):
    rl = PLAN[: PLAN.index("[arms.")] + "[arms.rl]\ntotal-timesteps = 1024\n"
    kept, scores = tmp_path / "out" / "study.json", []
    for table in ("", "", "[task]\nmax-frames = 400\n"):
        list(run_study(read_plan(write(tmp_path, rl + table)), tmp_path / "out", RUNTIME))
        document = json.loads(kept.read_text())
        scores.append(document["random_score"])
        kept.write_text(json.dumps(document | {"random_score": 999.0}))
        (tmp_path / "out" / "rl_width-1_32_seed-0.json").unlink()  # as if its run had not ended
        shutil.rmtree(tmp_path / "out" / "runs")
    assert scores == [pytest.approx(22, abs=7), 999.0, pytest.approx(22, abs=7)]


def test_a_part_of_a_plan_needs_no_teacher_that_it_does_not_learn_from(tmp_path):
    plan = read_plan(write(tmp_path, PLAN))
    ended = list(run_study(plan, tmp_path / "out", RUNTIME, part=Part(arms=("rl",)), workers=1))
    assert [(each.spec.arm, each.error) for each in ended] == [("rl", None)]


def test_a_run_with_other_settings_is_refused_at_once_though_it_would_begin_with_another(done, tmp_path):
    (tmp_path / "runs").mkdir()
    shutil.copytree(done.out / "runs" / NAMES[2], tmp_path / "runs" / NAMES[2])
    plan = write(tmp_path, PLAN.replace("total-timesteps = 2048", "total-timesteps = 4096"))
    shutil.copytree(done.folder / "expert", tmp_path / "expert")
    ended = run(plan, tmp_path)
    assert ended.code == 2
    assert f"{NAMES[2]} is a run with other settings: choose another --out" in ended.err
    assert sorted(path.stem for path in tmp_path.glob("*_*.json")) == []


def test_a_run_that_never_began_is_recorded_too(done):
    tuned = next(spec for spec in read_plan(done.plan).specs() if spec.arm == "finetune")
    record = make_record(execute.Ended(tuned, None, "no student"), done.out / "runs")
    assert (record["run"], record["status"], record["error"]) == (NAMES[2], "failed", "no student")
    assert record["identity"] == json.loads((done.out / f"{NAMES[2]}.json").read_bytes())["identity"]
