"""Cut anywhere, however hard, a run ends with the same bits as one that was not; so does the same seed again."""

import json
import signal
from dataclasses import replace

import pytest
from processes import WARM, Child, call, go_on, gone, names, until
from small_runs import RUNTIME, STUDENT, outcome, small_run

from potstill.evaluation import EvalConfig
from potstill.load import Origin
from potstill.networks import NetworkConfig
from potstill.storage.runs import Run
from potstill.study import local
from potstill.study.execute import execute as execute_study
from potstill.study.execute import open_or_create
from potstill.study.plan import RunSpec
from potstill.training.trainer import execute

LINE, SAVE, POLICY = (
    "potstill.telemetry.Metrics.write",
    "potstill.storage.checkpoints.save",
    "potstill.training.trainer.save_policy",
)
CUTS = [
    (LINE, 1, signal.SIGTERM),  # saved, for it was asked
    ("os.replace", 2, signal.SIGKILL),  # line 2 is written, its save is not renamed; the first is of the metrics
    (LINE, 2, signal.SIGKILL, True),  # line 3 is written, the save is of line 2
    (POLICY, 1, signal.SIGKILL),  # trained and saved, no policy yet
    ("potstill.evaluation.latency", 1, signal.SIGKILL),  # with a policy, without a result
]


@pytest.mark.timeout(300)  # processes one after the other, on a machine that may be busy
@pytest.mark.parametrize("name", ["cartpole", "pong", "student"])  # others, without a kill: test_cuts.py
def test_a_run_cut_at_several_points_ends_with_the_same_bits_as_one_that_was_not(name, teacher, tmp_path):
    whole = small_run(name, teacher, tmp_path / "whole")
    execute(whole, RUNTIME)
    expected = outcome(whole)
    assert len(expected[1]) == 4

    run = small_run(name, teacher, tmp_path / "cut")
    for cut in CUTS[1:3] if name == "pong" else CUTS:
        code, said = call(go_on, run.path, *cut, output=tmp_path / "log")
        assert (code, said) == (143 if cut[2] == signal.SIGTERM else -signal.SIGKILL, "")
        assert run.status == "interrupted"
    assert call(go_on, run.path, output=tmp_path / "log") == (0, "")
    assert outcome(run) == expected
    assert names(run.path) == names(whole.path)


@pytest.mark.parametrize("name", ["cartpole", "student"])
def test_the_same_seed_twice_is_the_same_run_and_another_seed_another(name, teacher, tmp_path):
    ended = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = small_run(name, teacher, tmp_path / out, seed=seed)
        result = execute(run, RUNTIME, EvalConfig(episodes=4))
        measured = ("wall_seconds", "latency_ms", "latency_p95_ms", "policy_hash", "metrics_digest")  # these hold times
        ended.append((outcome(run), {key: value for key, value in result.items() if key not in measured}))
    first, again, other = ended
    assert first == again
    assert all(mine != others for mine, others in zip(first, other, strict=True))


def study(teacher):
    config = replace(STUDENT, network=NetworkConfig(width="1/32"), total_timesteps=16 * 2_048)
    return [RunSpec("student", "student", config, Origin(teacher))]


def drive(folder, teacher):
    local.subprocess = WARM
    for ended in execute_study(study(teacher), folder, RUNTIME, workers=1):
        assert ended.error is None, ended.error


@pytest.mark.timeout(300)
def test_a_study_cut_by_sigterm_and_by_sigkill_ends_with_the_same_bits_as_one_that_was_not(teacher, tmp_path):
    whole = open_or_create(study(teacher)[0], tmp_path / "whole", RUNTIME)
    execute(whole, RUNTIME)

    path = tmp_path / "cut" / "student"
    for number in (signal.SIGTERM, signal.SIGKILL):
        lines = saved(path)
        driver = Child(drive, tmp_path / "cut", teacher, output=tmp_path / "log")
        until(lambda lines=lines: saved(path) > lines, 100)
        worker = json.loads((path / "run.lock").read_text())["pid"]
        driver.send_signal(number)
        driver.wait()
        gone(worker)  # it dies with its study
        assert Run.open(path).status == "interrupted"
    assert call(drive, tmp_path / "cut", teacher, output=tmp_path / "log")[0] == 0
    assert outcome(Run.open(path)) == outcome(whole)


def saved(path):
    """Lines of metrics that a study's run has saved."""
    if not (path / "resume.safetensors").exists():
        return 0
    return len((path / "metrics.jsonl").read_bytes().splitlines())
