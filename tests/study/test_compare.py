import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch

from potstill import imports
from potstill.cli import main
from potstill.commands import studying
from potstill.distill import DistillConfig
from potstill.errors import InputError
from potstill.evaluation import EvalConfig
from potstill.load import Origin
from potstill.storage.runs import Run
from potstill.study import execute as study
from potstill.study import local
from potstill.study.execute import StudyInterrupted
from potstill.study.execute import execute as generate
from potstill.study.grid import Grid
from potstill.training.runtime import Runtime
from potstill.training.trainer import new_run


def execute(*arguments, **options):
    """All runs to their end; the names of those that failed."""
    return [ended.spec.name for ended in generate(*arguments, **options) if ended.error is not None]


RUNTIME = Runtime(device="cpu", threads=2, quiet=True)
GAMES = EvalConfig(episodes=2)
BASE = DistillConfig(total_timesteps=1_024, num_envs=8, batch_size=32, warmup_steps=64, precision="float32")
NAMES = ["width-1_32_student_seed-0", "width-1_16_student_seed-0"]
FIGURES = {f"{name}.png" for name in ("size_score", "learning_curves", "score_distributions", "agreement_score")}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, save_teacher):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "run")


def make_plan(teacher, **changes):
    return Grid(**{"teachers": (teacher,), "widths": ("1/16", "1/32"), "base": BASE} | changes)


def compare(*words):
    """`potstill compare` with two workers in this process; exit code, stdout and stderr."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    settings = ["--widths", "1/16", "1/32", "--total-timesteps", "1024", "--num-envs", "8", "--batch-size", "32"]
    settings += ["--warmup-steps", "64", "--precision", "float32", "--evaluate", "2", "--device", "cpu"]
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(["compare", *settings, "--workers", "2", "--quiet", *map(str, words)])
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def times(*folders):
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, teacher):
    """Two students, compared in two calls: in the first, one of the workers is killed while it holds its lock."""
    out, start = tmp_path_factory.mktemp("study") / "comparison", local.launch
    killed, survivor = (out / name for name in NAMES)

    script = """
import os, signal, sys
from pathlib import Path
from potstill.storage.runs import Run
with Run.open(Path(sys.argv[1])).lock():
    os.kill(os.getpid(), signal.SIGKILL)
"""

    def start_one_to_kill(run, *others):
        if run == killed:
            return subprocess.Popen([sys.executable, "-c", script, str(run)])
        return start(run, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "launch", start_one_to_kill)
        first = compare("--teachers", teacher, "--out", out)
    left = SimpleNamespace(lock=(killed / "run.lock").exists(), status=Run.open(killed).status, times=times(survivor))
    second = compare("--teachers", teacher, "--out", out)
    return SimpleNamespace(out=out, killed=killed, survivor=survivor, first=first, left=left, second=second)


def test_the_cells_of_a_plan_go_from_small_to_large_then_by_lead_and_seed(teacher):
    plan = make_plan(teacher, widths=("1/4", "0.125"), leads=("teacher", "student"), seeds=(2, 0))
    specs = plan.specs()
    assert [spec.name for spec in specs] == [
        f"width-{width}_{lead}_seed-{seed}"
        for width in ("0.125", "1_4")
        for lead in ("teacher", "student")
        for seed in (2, 0)
    ]
    assert {spec.teacher for spec in specs} == {Origin(teacher)}
    expected = replace(BASE, network=replace(BASE.network, width="0.125"), lead="teacher", seed=2)
    assert specs[0].config == expected


def test_several_teachers_are_numbered():
    specs = make_plan(Path("a"), teachers=(Path("a"), Path("b")), widths=("1/8",)).specs()
    assert [(spec.name, str(spec.teacher.path)) for spec in specs] == [
        ("teacher-0_width-1_8_student_seed-0", "a"),
        ("teacher-1_width-1_8_student_seed-0", "b"),
    ]


@pytest.mark.parametrize(
    ("axis", "values", "said"),
    [
        ("widths", ("1/8", "1/4", "1/8"), "widths must .*none twice: 1/8 1/4 1/8"),
        ("widths", ("1/8", "0.125"), "widths must .*none twice: 1/8 0.125"),
        ("widths", (), "widths must name at least one, .*: none"),
        ("widths", ("wide",), "width 'wide' is not a number"),
        ("leads", ("student", "student"), "leads must"),
        ("seeds", (1, 1), "seeds must .*none twice: 1 1"),
        ("seeds", (-1,), "seed must not be negative"),
        ("teachers", (Path("a"), Path("./a")), "teachers must"),
        ("teachers", (), "teachers must"),
    ],
)
def test_an_axis_that_is_empty_or_names_something_twice_is_refused(axis, values, said):
    with pytest.raises(InputError, match=said):
        make_plan(Path("a"), **{axis: values}).specs()


def test_a_killed_worker_is_reported_and_the_others_finish(comparison):
    first = comparison.first
    assert first.code == 1
    assert first.err.splitlines()[-2:] == [
        "potstill: 1 of 2 runs failed (see log.txt there):",
        f"  {NAMES[0]}: killed by SIGKILL",
    ]
    assert (comparison.left.lock, comparison.left.status) == (True, "new")  # its lock is left, and counts no longer
    assert Run.open(comparison.survivor).status == "done"
    assert str(comparison.survivor / "log.txt") in map(str, comparison.left.times)


def test_the_next_call_runs_only_what_failed(comparison):
    assert comparison.second.code == 0
    assert times(comparison.survivor) == comparison.left.times
    assert Run.open(comparison.killed).status == "done"
    assert sorted(path.name for path in comparison.killed.iterdir()) == [
        *("config.json", "log.txt", "metrics.jsonl", "policy.safetensors", "result.json")
    ]


def test_a_comparison_ends_with_a_table_and_figures(comparison):
    assert {path.name for path in comparison.out.glob("*.*")} == {"table.csv", "episodes.csv", "curves.csv"} | FIGURES
    table = pl.read_csv(comparison.out / "table.csv")
    assert sorted(table["run"]) == sorted(NAMES)
    assert set(table["status"]) == {"done"}
    assert set(table["threads"]) == {1}  # each worker is single-threaded, whatever the machine has
    assert set(table["episodes"]) == {2}
    rows = [line.split()[:4] for line in comparison.second.out.splitlines() if line.startswith("distill-student")]
    assert [row[2:] for row in rows] == [["(1/32)", "1"], ["(1/16)", "1"]]
    assert all(str(comparison.out / name) in comparison.second.out for name in FIGURES)


def test_a_finished_comparison_runs_nothing_and_prints_the_same(comparison, teacher, monkeypatch):
    before = times(comparison.killed, comparison.survivor)
    monkeypatch.setattr(local.subprocess, "Popen", None)
    monkeypatch.setitem(imports._named, "json", "json")  # which has a worker try the tasks that are left
    third = compare("--teachers", teacher, "--out", comparison.out)
    assert (third.code, third.out) == (0, comparison.second.out)
    assert times(comparison.killed, comparison.survivor) == before


def test_other_settings_or_another_teacher_in_the_same_folder_are_refused(comparison, teacher, save_teacher, tmp_path):
    before = times(comparison.killed, comparison.survivor)
    other = compare("--teachers", teacher, "--out", comparison.out, "--learning-rate", "0.1")
    assert other.code == 2
    assert "is a run with other settings: choose another --out" in other.err
    other = compare("--teachers", save_teacher(tmp_path / "other", seed=1), "--out", comparison.out)
    assert other.code == 2
    assert "is a run with another teacher: choose another --out" in other.err
    assert times(comparison.killed, comparison.survivor) == before


def test_a_precision_once_measured_is_kept(comparison, teacher, monkeypatch):
    measured = {"auto": torch.bfloat16, "float32": torch.float32}
    monkeypatch.setattr("potstill.training.trainer.resolve_precision", lambda precision, device: measured[precision])
    plan = make_plan(teacher, base=replace(BASE, precision="auto"))
    assert execute(plan.specs(), comparison.out, RUNTIME, GAMES, workers=2) == []


def test_without_scores_the_table_stands_and_the_figures_are_missed_aloud(comparison, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(studying, "execute", lambda *_, **__: [])
    run = new_run(BASE, tmp_path / "out" / "run", RUNTIME, teacher=teacher)
    run.write_result({"status": "done", "env": "CartPole-v1"})
    done = compare("--teachers", teacher, "--out", tmp_path / "out")
    assert done.code == 0
    assert (tmp_path / "out" / "table.csv").exists()
    assert f"potstill: no {tmp_path / 'out' / 'size_score.png'}: " in done.err


@pytest.mark.parametrize(
    ("number", "most"),
    [(-1, "0 or more"), (1_000_000, f"at most {8 * os.cpu_count()} on this machine, 8 for each of its cores")],
)
def test_a_number_of_workers_that_cannot_be_meant_is_refused(teacher, tmp_path, number, most):
    done = compare("--teachers", teacher, "--out", tmp_path / "out", "--workers", number)
    assert (done.code, done.err) == (2, f"potstill: workers must be {most}, not {number:,}\n")
    assert not (tmp_path / "out").exists()


def test_a_missing_teacher_is_one_line(tmp_path):
    done = compare("--teachers", tmp_path / "nobody", "--out", tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "nobody" in done.err
    assert not (tmp_path / "out").exists()


def test_a_study_that_is_terminated_saves_its_workers_and_the_next_call_completes_it(teacher, tmp_path, monkeypatch):
    base = replace(BASE, total_timesteps=16_000, updates_per_step=0.25)
    specs = make_plan(teacher, widths=("1/32",), base=base).specs()
    run_path, progress = tmp_path / specs[0].name, study._progress

    def terminating_progress(run):
        if run.metrics_path.exists() and run.metrics_path.stat().st_size:
            os.kill(os.getpid(), signal.SIGTERM)
        return progress(run)

    with monkeypatch.context() as patch:
        patch.setattr(study, "_progress", terminating_progress)
        patch.setattr(study.time, "sleep", lambda seconds, sleep=time.sleep: sleep(seconds / 10))
        with pytest.raises(StudyInterrupted, match="stopped by SIGTERM; the same command goes on with it") as stop:
            execute(specs, tmp_path, RUNTIME, GAMES, workers=2)
    assert stop.value.code == 143
    assert Run.open(run_path).status == "interrupted"  # so the worker has saved
    assert "stopped by SIGTERM" in (run_path / "log.txt").read_text()
    assert execute(specs, tmp_path, RUNTIME, GAMES, workers=2) == []
    assert Run.open(run_path).status == "done"


@pytest.mark.parametrize(
    ("games", "words"),
    [
        ('{"played": 30, "games": 120}', "30/120 games, agreement 0.75"),
        ('{"played": 30, "games": 0}', "evaluating, agreement 0.75"),
        ('{"played": "30"}', "evaluating, agreement 0.75"),
        ("{", "evaluating, agreement 0.75"),
    ],
)
def test_a_run_at_its_games_says_how_many_are_played(games, words, teacher, tmp_path):
    run = study.open_or_create(make_plan(teacher).specs()[0], tmp_path, RUNTIME)
    metrics = {"step": run.config["config"]["total_timesteps"], "agreement": 0.75}
    run.metrics_path.write_text(json.dumps(metrics) + "\n")
    run.games_path.write_text(games)
    seen = study._progress(run)
    assert (seen.text, seen.trained, seen.played) == (words, 1.0, 0.25 if words.startswith("30") else None)


def test_the_games_played_while_one_looks_on_tell_how_long_the_rest_takes(monkeypatch):
    clock = iter([5.0, 10.0, 20.0, 40.0])
    monkeypatch.setattr(study.time, "monotonic", lambda: next(clock))
    worker = study._Worker(None, None, None, 0.0, 0.0, ExitStack())
    told = [worker.underway(study._Seen("", 1.0, played)).games for played in (0.5, 0.4, 0.4, 0.7)]
    # At first there was what an earlier process had left, some of which is played again.
    assert told == [None, None, None, pytest.approx(30.0)]  # 0.3 of them took 30 s, and as many are left


def test_workers_do_not_outlive_a_study_that_fails(teacher, tmp_path, monkeypatch):
    processes, start = [], local.launch

    def remembering_start(*arguments):
        processes.append(start(*arguments))
        return processes[-1]

    def failing_progress(run):
        if len(processes) == 2:
            raise InputError("the metrics are damaged")
        return study._Seen("starting", 0.0)

    monkeypatch.setattr(local, "launch", remembering_start)
    monkeypatch.setattr(study, "_progress", failing_progress)
    with pytest.raises(InputError, match="the metrics are damaged"):
        execute(make_plan(teacher).specs(), tmp_path, RUNTIME, GAMES, workers=2)
    assert [process.poll() is None for process in processes] == [False, False]


def test_a_worker_that_does_not_stop_when_time_is_up_is_killed_and_can_be_run_again(teacher, tmp_path, monkeypatch):
    specs, processes = make_plan(teacher, widths=("1/32",)).specs(), []

    def suspended(*arguments):
        processes.append(local.LocalProcess(*arguments))
        os.kill(processes[-1].process.pid, signal.SIGSTOP)  # SIGTERM waits until it is continued
        monkeypatch.setattr(study.time, "monotonic", lambda now=time.monotonic: now() + 1_000.0)
        return processes[-1]

    monkeypatch.setattr(study, "SAVING", 0.3)
    assert execute(specs, tmp_path, RUNTIME, GAMES, until=time.monotonic() + 500.0, start=suspended) == []
    assert [process.returncode for process in processes] == [-signal.SIGKILL]
    assert Run.open(tmp_path / specs[0].name).status == "new"
